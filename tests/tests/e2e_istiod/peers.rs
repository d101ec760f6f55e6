//! Every combination of what PeerAuthentications of mesh, namespace, workload and port can say.
use std::fmt::Write as _;

const MODES: [Option<&str>; 5] = [None, Some("UNSET"), Some("STRICT"), Some("PERMISSIVE"), Some("DISABLE")];
/// Modes of a workload's ports, 8080 and on.
const PORTS: [&[&str]; 6] = [&[], &["STRICT"], &["PERMISSIVE"], &["DISABLE"], &["STRICT", "PERMISSIVE"], &["UNSET"]];

fn word(mode: Option<&str>) -> String {
    mode.unwrap_or("nothing").to_lowercase()
}

/// The name of a namespace, or of a workload and its PeerAuthentication, by what is said of it.
pub fn name(mode: Option<&str>, ports: &[&str]) -> String {
    let ports: Vec<String> = ports.iter().map(|mode| word(Some(mode))).collect();
    if ports.is_empty() { word(mode) } else { format!("{}-ports-{}", word(mode), ports.join("-")) }
}

/// A mesh whose root namespace says `mesh`: a namespace for each mode, in it a pod for each mode and each set of ports.
pub fn mesh(mesh: Option<&str>) -> String {
    let mut yaml = String::new();
    let mut pods = 0;
    let peer = |yaml: &mut String, namespace: &str, name: &str, said: &[String]| {
        let _ = writeln!(
            yaml,
            "---\napiVersion: security.istio.io/v1\nkind: PeerAuthentication\nmetadata: {{ name: {name}, namespace: {namespace} }}\n\
             spec: {{ {} }}",
            said.join(", ")
        );
    };
    let mtls = |mode: Option<&str>| mode.map(|mode| format!("mtls: {{ mode: {mode} }}"));
    if let Some(said) = mtls(mesh) {
        peer(&mut yaml, "istio-system", "mesh", &[said]);
    }
    for of_namespace in MODES {
        let namespace = format!("ns-{}", name(of_namespace, &[]));
        let _ = writeln!(
            yaml,
            "---\napiVersion: v1\nkind: Namespace\nmetadata: {{ name: {namespace}, labels: {{ istio.io/dataplane-mode: ambient }} }}"
        );
        if let Some(said) = mtls(of_namespace) {
            peer(&mut yaml, &namespace, "default", &[said]);
        }
        for (mode, ports) in MODES.iter().flat_map(|mode| PORTS.map(|ports| (*mode, ports))) {
            let app = name(mode, ports);
            pods += 1;
            let ip = format!("10.4.{}.{}", pods / 200, pods % 200 + 1);
            let _ = writeln!(
                yaml,
                "---\napiVersion: v1\nkind: Pod\nmetadata: {{ name: {app}, namespace: {namespace}, labels: {{ app: {app} }} }}\n\
                 spec: {{ nodeName: node-1, containers: [] }}\n\
                 status: {{ phase: Running, podIP: {ip}, podIPs: [{{ ip: {ip} }}], conditions: [{{ type: Ready, status: \"True\" }}] }}"
            );
            if mode.is_none() && ports.is_empty() {
                continue;
            }
            let levels: Vec<String> =
                ports.iter().zip(8080..).map(|(mode, port)| format!("\"{port}\": {{ mode: {mode} }}")).collect();
            let mut said = vec![format!("selector: {{ matchLabels: {{ app: {app} }} }}")];
            said.extend(mtls(mode));
            if !levels.is_empty() {
                said.push(format!("portLevelMtls: {{ {} }}", levels.join(", ")));
            }
            peer(&mut yaml, &namespace, &app, &said);
        }
    }
    yaml + AGES
}

/// Of several that say something of the same, the oldest counts.
const AGES: &str = r#"---
apiVersion: v1
kind: Namespace
metadata: { name: ages, labels: { istio.io/dataplane-mode: ambient } }
---
apiVersion: v1
kind: Pod
metadata: { name: old, namespace: ages, labels: { app: old } }
spec: { nodeName: node-1, containers: [] }
status: { phase: Running, podIP: 10.4.9.1, podIPs: [{ ip: 10.4.9.1 }], conditions: [{ type: Ready, status: "True" }] }
---
apiVersion: v1
kind: Pod
metadata: { name: other, namespace: ages, labels: { app: other } }
spec: { nodeName: node-1, containers: [] }
status: { phase: Running, podIP: 10.4.9.2, podIPs: [{ ip: 10.4.9.2 }], conditions: [{ type: Ready, status: "True" }] }
---
apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: { name: a-young, namespace: ages, creationTimestamp: "2024-02-01T00:00:00Z" }
spec: { mtls: { mode: PERMISSIVE } }
---
apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: { name: z-old, namespace: ages, creationTimestamp: "2024-01-01T00:00:00Z" }
spec: { mtls: { mode: STRICT } }
---
apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: { name: b-young, namespace: ages, creationTimestamp: "2024-02-01T00:00:00Z" }
spec: { selector: { matchLabels: { app: old } }, mtls: { mode: PERMISSIVE } }
---
apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: { name: y-old, namespace: ages, creationTimestamp: "2024-01-01T00:00:00Z" }
spec: { selector: { matchLabels: { app: old } }, mtls: { mode: STRICT } }
"#;
