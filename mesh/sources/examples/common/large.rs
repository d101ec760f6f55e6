//! The large folder that load time and memory are measured with, and how memory is read.

use std::fmt::Write as _;

/// A line of this process's memory report (`VmRSS`, `VmHWM`), in MiB.
pub fn status(field: &str) -> u64 {
    let text = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = text.lines().find(|l| l.starts_with(field)).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() / 1024
}

/// Writes 100 000 pods in ten files, 1 000 services and 10 000 policies.
pub fn write(dir: &std::path::Path) {
    for file in 0..10 {
        let mut s = String::new();
        for i in file * 10_000..(file + 1) * 10_000 {
            let (ns, app) = (i % 100, i % 1000);
            write!(s, "---\napiVersion: v1\nkind: Pod\nmetadata:\n  name: app-{app}-5d4f8c7b9-{i}\n  namespace: ns-{ns}\n  uid: 00000000-0000-0000-0000-{i:012}\n  labels:\n    app: app-{app}\n    pod-template-hash: 5d4f8c7b9\n    version: v1\n  ownerReferences:\n  - kind: ReplicaSet\n    name: app-{app}-5d4f8c7b9\n    controller: true\nspec:\n  serviceAccountName: sa-{app}\n  nodeName: node-{}\n  containers:\n  - name: main\n    ports:\n    - name: http\n      containerPort: 8080\nstatus:\n  phase: Running\n  podIP: 10.{}.{}.{}\n  conditions:\n  - type: Ready\n    status: \"True\"\n", i % 500, i >> 16, (i >> 8) & 255, i & 255).unwrap();
        }
        std::fs::write(dir.join(format!("pods-{file}.yaml")), s).unwrap();
    }
    let mut s = String::new();
    for n in 0..100 {
        write!(
            s,
            "---\n{{apiVersion: v1, kind: Namespace, metadata: {{name: ns-{n}, labels: {{istio.io/dataplane-mode: ambient}}}}}}\n"
        )
        .unwrap();
    }
    for i in 0..1000 {
        write!(s, "---\napiVersion: v1\nkind: Service\nmetadata: {{name: app-{i}, namespace: ns-{}}}\nspec: {{clusterIP: 172.16.{}.{}, selector: {{app: app-{i}}}, ports: [{{name: http, port: 80, targetPort: http}}]}}\n", i % 100, i >> 8, i & 255).unwrap();
    }
    for i in 0..10_000 {
        write!(s, "---\napiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {{name: p-{i}, namespace: ns-{}}}\nspec:\n  selector: {{matchLabels: {{app: app-{}}}}}\n  rules:\n  - from: [{{source: {{principals: [cluster.local/ns/ns-{}/sa/sa-{i}], namespaces: [ns-1]}}}}]\n    to: [{{operation: {{ports: ['8080']}}}}]\n", i % 100, i % 1000, i % 100).unwrap();
    }
    std::fs::write(dir.join("rest.yaml"), s).unwrap();
}
