//! The mesh all tests of this suite share: two nodes, a client, two versions of a web server, a waypoint, a gateway.
use std::collections::BTreeMap;
use std::fs;
use std::net::SocketAddr;
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use mesh_tests::agent::{Agent, AgentSpec, find_program};
use mesh_tests::issuer::Authority;
use mesh_tests::mesh_dir::MeshDir;
use mesh_tests::netns;
use mesh_tests::raw::Raw;
use mesh_tests::suite::CannotRun;
use mesh_tests::tls::OwnCert;
use mesh_tests::topology::{Place, Plan, Topology};
use mesh_tests::web::Web;
use serde_json::Value;
use tempfile::TempDir;

pub(crate) const PORT: u16 = 8080;
/// Port of the byte servers, declared as nothing.
pub(crate) const BYTES: u16 = 9090;
/// Another one.
pub(crate) const MORE: u16 = 9092;
pub(crate) const WEB: &str = "10.96.0.20";
pub(crate) const WEB_IP: [u8; 4] = [10, 96, 0, 20];
pub(crate) const OTHER: &str = "10.96.0.21";
/// One endpoint on each node.
pub(crate) const SPAN: &str = "10.96.0.22";
/// Where an issuer of the mesh publishes its keys.
pub(crate) const KEYS: &str = "issuer.t.svc.cluster.local";
/// Servers that tests start on ports of `web1`: one without manners, one of gRPC, one of TLS.
pub(crate) const RUDE: &str = "10.96.0.23";
pub(crate) const RUDE_PORT: u16 = 7070;
pub(crate) const GRPC: &str = "10.96.0.24";
pub(crate) const GRPC_PORT: u16 = 7071;
pub(crate) const SECURE: &str = "10.96.0.25";
pub(crate) const SECURE_PORT: u16 = 7072;

/// The mesh all tests share. Fields are dropped in this order: proxies before the topology they live in.
pub(crate) struct Mesh {
    pub(crate) proxies: BTreeMap<&'static str, Agent>,
    pub(crate) web: BTreeMap<&'static str, Web>,
    pub(crate) topology: Topology,
    pub(crate) dir: MeshDir,
    pub(crate) ca: TempDir,
    pub(crate) logs: TempDir,
    /// Whom the waypoint trusts outside the mesh.
    pub(crate) authority: Authority,
    /// The gateway's certificate, for `web.example`.
    pub(crate) front: OwnCert,
}

const OBJECTS: &str = r"
apiVersion: v1
kind: Namespace
metadata: { name: t, labels: { istio.io/dataplane-mode: ambient } }
---
apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: { name: default, namespace: istio-system }
spec: { mtls: { mode: STRICT } }
---
apiVersion: gateway.networking.k8s.io/v1
kind: Gateway
metadata: { name: wp, namespace: t }
spec:
  gatewayClassName: istio-waypoint
  listeners:
  - { name: mesh, port: 15008, protocol: HBONE }
status:
  addresses:
  - { type: Hostname, value: wp.t.svc.cluster.local }
---
apiVersion: v1
kind: Service
metadata: { name: wp, namespace: t }
spec:
  selector: { app: wp }
  clusterIP: 10.96.0.9
  ports:
  - { name: hbone, port: 15008, protocol: TCP }
---
apiVersion: v1
kind: Service
metadata: { name: web, namespace: t, labels: { istio.io/use-waypoint: wp } }
spec:
  selector: { tier: web }
  clusterIP: 10.96.0.20
  ports:
  - { name: http, port: 80, targetPort: 8080, protocol: TCP }
  - { name: bytes, port: 90, targetPort: 9090, protocol: TCP }
  - { name: more, port: 92, targetPort: 9092, protocol: TCP }
---
apiVersion: v1
kind: Service
metadata: { name: other, namespace: t, labels: { istio.io/use-waypoint: wp } }
spec:
  selector: { app: web1 }
  clusterIP: 10.96.0.21
  ports:
  - { name: http, port: 80, targetPort: 8080, protocol: TCP }
---
apiVersion: v1
kind: Service
metadata: { name: span, namespace: t, labels: { istio.io/use-waypoint: wp } }
spec:
  selector: { span: both }
  clusterIP: 10.96.0.22
  ports:
  - { name: http, port: 80, targetPort: 8080, protocol: TCP }
---
apiVersion: v1
kind: Service
metadata: { name: rude, namespace: t, labels: { istio.io/use-waypoint: wp } }
spec:
  selector: { app: web1 }
  clusterIP: 10.96.0.23
  ports:
  - { name: http, port: 80, targetPort: 7070, protocol: TCP }
---
apiVersion: v1
kind: Service
metadata: { name: issuer, namespace: t }
spec:
  selector: { app: web2 }
  clusterIP: 10.96.0.40
  ports:
  - { name: http, port: 80, targetPort: 8088, protocol: TCP }
---
apiVersion: v1
kind: Service
metadata: { name: grpc, namespace: t, labels: { istio.io/use-waypoint: wp } }
spec:
  selector: { app: web1 }
  clusterIP: 10.96.0.24
  ports:
  - { name: grpc, port: 80, targetPort: 7071, protocol: TCP }
---
apiVersion: v1
kind: Service
metadata: { name: secure, namespace: t, labels: { istio.io/use-waypoint: wp } }
spec:
  selector: { app: web1 }
  clusterIP: 10.96.0.25
  ports:
  - { name: http, port: 80, targetPort: 7072, protocol: TCP }
  - { name: tls, port: 443, targetPort: 7072, protocol: TCP, appProtocol: tls }
---
apiVersion: v1
kind: Service
metadata: { name: far, namespace: u }
spec:
  selector: { app: far }
  clusterIP: 10.96.0.26
  ports:
  - { name: http, port: 80, targetPort: 8080, protocol: TCP }
---
apiVersion: gateway.networking.k8s.io/v1
kind: Gateway
metadata: { name: gw, namespace: t }
spec:
  gatewayClassName: istio
  listeners:
  - { name: http, port: 80, protocol: HTTP }
  - name: https
    port: 443
    protocol: HTTPS
    hostname: web.example
    tls: { mode: Terminate, certificateRefs: [ { name: web-tls } ] }
  - { name: ended, port: 9443, protocol: TLS, hostname: web.example, tls: { mode: Terminate, certificateRefs: [ { name: web-tls } ] } }
  - { name: pass, port: 8443, protocol: TLS, hostname: '*.pass.example', tls: { mode: Passthrough } }
  - { name: bytes, port: 9000, protocol: TCP }
status:
  addresses:
  - { type: Hostname, value: gw.t.svc.cluster.local }
---
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: { name: front, namespace: t }
spec:
  parentRefs: [ { name: gw } ]
  hostnames: [ web.example ]
  rules:
  - matches: [ { path: { type: PathPrefix, value: /shop } } ]
    backendRefs: [ { name: web, port: 80 } ]
---
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: { name: web, namespace: t }
spec:
  host: web
  subsets:
  - { name: v1, labels: { version: v1 } }
  - { name: v2, labels: { version: v2 } }
";

pub(crate) fn set_up() -> anyhow::Result<Mesh> {
    for program in ["ztunnel", "waypoint"] {
        find_program(program).map_err(|error| CannotRun(format!("{error:#}")))?;
    }
    let plain = "istio.io/dataplane-mode=none";
    let topology = Plan::default()
        .node("node-a", "zone-1")
        .node("node-b", "zone-2")
        .pod("node-a", "t", "client", "client", &[])
        .pod("node-b", "t", "web1", "web", &["tier=web", "version=v1", "span=both", "side=right"])
        .pod("node-b", "t", "web2", "web", &["tier=web", "version=v2"])
        .pod("node-a", "t", "web3", "web", &["span=both", "version=v3", "side=left"])
        .pod("node-a", "u", "far", "far", &[])
        .pod(
            "node-b",
            "t",
            "wp",
            "wp",
            &["side=left", "gateway.networking.k8s.io/gateway-name=wp", "networking.istio.io/tunnel=http", plain],
        )
        .pod(
            "node-a",
            "t",
            "wp2",
            "wp",
            &["app=wp", "gateway.networking.k8s.io/gateway-name=wp", "networking.istio.io/tunnel=http", plain],
        )
        .pod("node-a", "t", "gw", "gw", &["gateway.networking.k8s.io/gateway-name=gw", "networking.istio.io/tunnel=http", plain])
        .host("outside")
        .build()?;
    let dir = MeshDir::empty()?;
    dir.put("00-base.yaml", OBJECTS)?;
    dir.put(
        "01-namespace-u.yaml",
        "apiVersion: v1\nkind: Namespace\nmetadata: { name: u, labels: { istio.io/dataplane-mode: ambient } }\n",
    )?;
    dir.put("01-nodes.yaml", &topology.nodes_yaml())?;
    let front = OwnCert::of(&["web.example"])?;
    dir.put("02-secret.yaml", &secret("web-tls", &front))?;
    for pod in &topology.plan().pods {
        let yaml = topology.pod_yaml(&pod.name, &[]);
        // The second instance of the waypoint is started by who needs it.
        let yaml = if pod.name == "wp2" { yaml.replace("status: \"True\"", "status: \"False\"") } else { yaml };
        dir.put(&format!("pod-{}.yaml", pod.name), &yaml)?;
    }
    let mut web = BTreeMap::new();
    for name in ["web1", "web2", "web3", "far"] {
        web.insert(name, Web::start(topology.pod(name), PORT)?);
    }
    let (ca, logs, authority) = (netns::scratch("ca")?, netns::scratch("logs")?, Authority::make()?);
    fs::write(ca.path().join("outside.pem"), authority.pem())?;
    let mut mesh = Mesh { proxies: BTreeMap::new(), web, topology, dir, ca, logs, authority, front };
    for name in ["node-a", "node-b", "wp", "gw"] {
        let proxy = mesh.start(name)?;
        mesh.proxies.insert(name, proxy);
    }
    for proxy in mesh.proxies.values() {
        proxy.wait_ready(Duration::from_secs(40))?;
    }
    Ok(mesh)
}

/// A Secret with a certificate.
fn secret(name: &str, own: &OwnCert) -> String {
    let indent = |pem: &str| format!("    {}\n", pem.trim_end().replace('\n', "\n    "));
    format!(
        "apiVersion: v1\nkind: Secret\nmetadata: {{ name: {name}, namespace: t }}\ntype: kubernetes.io/tls\nstringData:\n  tls.crt: |\n{}  tls.key: |\n{}",
        indent(&own.cert),
        indent(&own.key)
    )
}

/// What `curl` got.
#[derive(Debug)]
pub(crate) struct Got {
    pub(crate) status: u16,
    pub(crate) head: String,
    pub(crate) body: String,
}
impl Got {
    /// The server's echo.
    pub(crate) fn echo(&self) -> anyhow::Result<Value> {
        serde_json::from_str(&self.body).with_context(|| format!("not an echo: {self:?}"))
    }
    /// A response header.
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.head.lines().filter_map(|l| l.split_once(':')).find(|(n, _)| n.eq_ignore_ascii_case(name)).map(|(_, v)| v.trim())
    }
}

/// `curl` in a pod or host.
pub(crate) fn curl(from: &Place, args: &[&str]) -> anyhow::Result<Got> {
    let mut command = Command::new("curl");
    command.args(["-sS", "-i", "--max-time", "20", "--noproxy", "*"]).args(args);
    let output = from.netns.output(&mut command).context("run curl")?;
    ensure!(output.status.success(), "curl {args:?}: {}", String::from_utf8_lossy(&output.stderr).trim());
    let text = String::from_utf8_lossy(&output.stdout).replace("\r\n", "\n");
    // The last head counts: curl shows interim answers and redirects it followed, too.
    let at = text.rfind("\nHTTP/").map_or(0, |n| n + 1);
    let (head, body) = text[at..].split_once("\n\n").with_context(|| format!("no head in {text:?}"))?;
    let status = head.split(' ').nth(1).and_then(|s| s.parse().ok()).with_context(|| format!("status in {head:?}"))?;
    Ok(Got { status, head: head.to_owned(), body: body.to_owned() })
}

/// A connection of the client's pod that is kept: many requests in a short time.
pub(crate) struct Kept {
    raw: Raw,
    host: String,
}
impl Kept {
    pub(crate) fn to(mesh: &Mesh, vip: &str) -> anyhow::Result<Self> {
        Ok(Self { raw: Raw::open(mesh.pod("client"), SocketAddr::new(vip.parse()?, 80))?, host: vip.to_owned() })
    }
    pub(crate) fn get(&mut self, path: &str) -> anyhow::Result<Got> {
        self.raw.send(format!("GET {path} HTTP/1.1\r\nhost: {}\r\n\r\n", self.host).as_bytes())?;
        let answer = self.raw.answer()?;
        let head = answer.headers.iter().map(|(name, value)| format!("{name}: {value}\n")).collect::<Vec<_>>().concat();
        Ok(Got { status: answer.status, head, body: answer.body })
    }
    /// Who answered.
    pub(crate) fn name(&mut self) -> anyhow::Result<String> {
        Ok(self.get("/")?.echo()?["name"].as_str().context("a name")?.to_owned())
    }
}

impl Mesh {
    pub(crate) fn start(&self, name: &str) -> anyhow::Result<Agent> {
        self.start_with(name, &[])
    }
    /// An agent, by the name of its node, or a waypoint or gateway, by that of its pod; `canary` is another waypoint in the
    /// pod `wp2`.
    pub(crate) fn start_with(&self, name: &str, env: &[(&str, &str)]) -> anyhow::Result<Agent> {
        let (spec, place) = if name.starts_with("node") {
            (AgentSpec::new(name, self.dir.path(), self.ca.path(), self.logs.path()), self.topology.node(name))
        } else {
            let (pod, account, gateway) = match name {
                "wp2" => ("wp2", "wp", "wp"),
                "canary" => ("wp2", "wp", "canary"),
                name => (name, name, name),
            };
            let spec = AgentSpec::waypoint(("t", pod), account, gateway, self.dir.path(), self.ca.path(), self.logs.path());
            // As in the pods of a cluster: locality preferences count from there.
            let here = self.topology.plan().pods.iter().find(|known| known.name == pod);
            let node = here.with_context(|| format!("no pod {pod}"))?.node.as_str();
            (spec.env("NODE_NAME", node), self.topology.pod(pod))
        };
        let spec = env.iter().fold(spec, |spec, (key, value)| spec.env(key, value));
        let roots = self.ca.path().join("outside.pem").display().to_string();
        let spec = spec.env("SSL_CERT_FILE", &roots).env("PILOT_JWT_PUB_KEY_REFRESH_INTERVAL", "8s");
        spec.env("TRUST_DOMAIN", "test.local")
            .env("CULVERT_TRUST_DOMAIN_ALIASES", "cluster.local")
            // What an agent carries may last; requests under way at a waypoint end by themselves, and it with them.
            .env("CONNECTION_TERMINATION_DEADLINE", if name.starts_with("node") { "2s" } else { "20s" })
            .start(place)
    }
    pub(crate) fn proxy(&self, name: &str) -> &Agent {
        &self.proxies[name]
    }
    pub(crate) fn pod(&self, name: &str) -> &Arc<Place> {
        self.topology.pod(name)
    }
    /// `curl` in the client's pod.
    pub(crate) fn call(&self, args: &[&str]) -> anyhow::Result<Got> {
        curl(self.pod("client"), args)
    }
    /// Puts objects for the time of the guard and waits until waypoint and gateway know them.
    pub(crate) fn objects(&self, name: &str, yaml: &str) -> anyhow::Result<ObjectsForNow<'_>> {
        let before = self.versions()?;
        self.dir.put(&format!("objects-{name}.yaml"), yaml)?;
        let guard = ObjectsForNow { mesh: self, file: format!("objects-{name}.yaml"), was: None };
        self.wait_newer(&before)?;
        Ok(guard)
    }
    /// Puts something else in the place of a file for the time of the guard, and waits in the same way.
    pub(crate) fn instead(&self, file: &str, yaml: &str) -> anyhow::Result<ObjectsForNow<'_>> {
        let was = fs::read_to_string(self.dir.path().join(file)).with_context(|| format!("read {file}"))?;
        let before = self.versions()?;
        self.dir.put(file, yaml)?;
        let guard = ObjectsForNow { mesh: self, file: file.to_owned(), was: Some(was) };
        self.wait_newer(&before)?;
        Ok(guard)
    }
    /// What version of the mesh each waypoint and gateway has (agents do not tell); of those that do not answer, none.
    pub(crate) fn versions(&self) -> anyhow::Result<BTreeMap<&'static str, u64>> {
        let version = |proxy: &Agent| proxy.config_dump().ok()?["version"].as_u64();
        let all: BTreeMap<_, _> = self.proxies.iter().filter_map(|(name, proxy)| Some((*name, version(proxy)?))).collect();
        ensure!(!all.is_empty(), "no proxy tells its version");
        Ok(all)
    }
    /// Waits until each of these has a newer one.
    pub(crate) fn wait_newer(&self, before: &BTreeMap<&'static str, u64>) -> anyhow::Result<()> {
        for (proxy, old) in before {
            self.proxy(proxy).wait_config("a newer version", |dump| dump["version"].as_u64() > Some(*old))?;
        }
        Ok(())
    }
}

/// Takes its objects away, or puts back what was there before, and waits until the proxies have forgotten them.
pub(crate) struct ObjectsForNow<'a> {
    mesh: &'a Mesh,
    file: String,
    was: Option<String>,
}
impl Drop for ObjectsForNow<'_> {
    fn drop(&mut self) {
        let Ok(before) = self.mesh.versions() else { return };
        match &self.was {
            Some(was) => drop(self.mesh.dir.put(&self.file, was)),
            None => self.mesh.dir.remove(&self.file),
        }
        if let Err(error) = self.mesh.wait_newer(&before) {
            eprintln!("{error:#}");
        }
    }
}
