//! Where waypoints are compared: three pods in a row (client, proxy, server), in plain HTTP, or with our node agents at the two
//! ends, so that the proxy speaks HBONE to both sides.
//!
//! Owns: the wiring, the mesh folder, and the same mesh as a configuration of Envoy ([`envoy`]). A row is used for one peer and one
//! round. Refuses: more than the route both peers have to take; neither logs requests, both keep their own statistics.
use std::fmt::Write as _;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};

use anyhow::{Context as _, ensure};
use serde_json::{Value, json};
use tempfile::TempDir;

use super::parts::{self, Held, Proxy, Running, Settings, join, load_command, pinned, pod_yaml, start_listening};
use crate::agent::Metrics;
use crate::dev_ca::TestCa;
use crate::http;
use crate::issuer::{SigningKey, jwks, now};
use crate::mesh_dir::MeshDir;
use crate::netns::{self, Netns};

mod envoy;

/// Where the server and a gateway listen.
pub const PORT: u16 = 8080;
/// Host of every request.
pub const HOST: &str = "server.bench.svc.cluster.local";
const CLIENT: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 1);
const PROXY: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 3);
const PROXY_BACK: Ipv4Addr = Ipv4Addr::new(10, 78, 0, 3);
const SERVER: Ipv4Addr = Ipv4Addr::new(10, 78, 0, 2);
const SERVICE: Ipv4Addr = Ipv4Addr::new(10, 96, 0, 10);
/// The proxy's name as pod, service account and Gateway.
const NAME: &str = "wp";
/// Rules of one HTTPRoute (Gateway API: at most 16).
const RULES: usize = 16;

/// What the client's side and the server's side of the proxy speak.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shape {
    /// HTTP/1.1 over TCP.
    Plain,
    /// HTTP/1.1 in HBONE tunnels, from and to node agents.
    Hbone,
}

/// A program in the middle.
#[derive(Clone, Debug)]
pub enum Program {
    /// Ours.
    Waypoint(PathBuf),
    /// Envoy.
    Envoy(PathBuf),
}

/// Who is compared.
#[derive(Clone, Debug)]
pub struct Peer {
    /// Its name in tables.
    pub name: &'static str,
    /// What it runs.
    pub program: Program,
}

/// How large the mesh is, beside what traffic needs.
#[derive(Clone, Copy, Debug, Default)]
pub struct Size {
    /// Rules, each with a path of its own, before the one that matches everything: on the Gateway, or in [`Shape::Hbone`] on the
    /// service itself.
    pub routes: usize,
    /// Further services with a route each, behind the same waypoint. Only in [`Shape::Hbone`].
    pub services: usize,
    /// Endpoints of the service; all of them are the one server. Only in [`Shape::Plain`].
    pub endpoints: usize,
    /// Tokens of RS256 there are. If any, every request must bear one that a policy allows, and is logged as JSON.
    pub tokens: usize,
    /// Streams that an agent has in one tunnel before it opens another; 0: as it is set by itself. Only in [`Shape::Hbone`].
    pub tunnel_streams: u64,
}

static BUILT: AtomicUsize = AtomicUsize::new(0);

/// Three pods, the proxy in the middle, and in [`Shape::Hbone`] an agent for each end. Dropping it ends everything in it.
#[derive(Debug)]
pub struct Row {
    settings: Settings,
    shape: Shape,
    /// The proxy first.
    proxies: Vec<Proxy>,
    _server: Running,
    /// The file with the tokens of requests.
    tokens: Option<PathBuf>,
    client: Netns,
    server_netns: Netns,
    mesh: MeshDir,
    _authority: TempDir,
}

impl Row {
    /// Builds a row for `peer` and waits until requests are answered.
    pub fn build(peer: &Peer, shape: Shape, size: Size, agent: &Path, settings: &Settings) -> anyhow::Result<Self> {
        let prefix = format!("{}r{}-", netns::own_prefix(), BUILT.fetch_add(1, Ordering::Relaxed));
        let make = |name: &str| Netns::create(&format!("{prefix}{name}"));
        let (client, middle, server) = (make("client")?, make("proxy")?, make("server")?);
        join((&client, CLIENT, "eth0"), (&middle, PROXY, "eth0"))?;
        join((&server, SERVER, "eth0"), (&middle, PROXY_BACK, "eth1"))?;
        // Every address of an endpoint of a large service leads to the one server.
        netns::ip_batch(&client, &[format!("route add default via {PROXY}")])?;
        netns::ip_batch(&middle, &[format!("route add {} via {SERVER}", endpoint_net())])?;
        netns::ip_batch(
            &server,
            &[format!("route add default via {PROXY_BACK}"), format!("route add local {} dev lo", endpoint_net())],
        )?;
        // Tens of thousands of connections of one client; nobody's own ports are in the range.
        for end in [&client, &server] {
            end.sysctl(&[("ipv4/ip_local_port_range", "16000 65000")])?;
        }

        let mesh = MeshDir::empty()?;
        let authority = netns::scratch("ca")?;
        mesh.put("mesh.yaml", &mesh_yaml(shape, &client, &server))?;
        for (name, yaml) in large_yaml(shape, size) {
            mesh.put(&name, &yaml)?;
        }
        let filters = (size.tokens > 0).then(|| Filters::make(size.tokens)).transpose()?;
        if let Some(filters) = &filters {
            mesh.put("filters.yaml", &filters.yaml(shape))?;
        }
        let tokens = filters.as_ref().map(|filters| filters.write_tokens(authority.path())).transpose()?;
        let folders = (mesh.path(), authority.path());
        let mut ends = Vec::new();
        if shape == Shape::Hbone {
            let more: &[String] = match size.tunnel_streams {
                0 => &[],
                most => &[format!("--pool-max-streams={most}")],
            };
            for node in ["node-client", "node-server"] {
                ends.push(Proxy::agent(agent, (node, more), make(node)?, folders, peer.name, settings)?);
            }
            // Their authority signs for Envoy, too.
            ends.iter_mut().try_for_each(Proxy::wait_ready)?;
        }
        let (command, ready) = match &peer.program {
            Program::Waypoint(binary) => {
                let mut command = Proxy::ours(binary, folders.0, folders.1, settings);
                command.args(["--namespace", "bench", "--pod", NAME, "--service-account", NAME, "--gateway", NAME]);
                command.args(["--access-log", &filters.is_some().to_string()]);
                (command, (15021, "/healthz/ready"))
            }
            Program::Envoy(binary) => {
                let tls = match shape {
                    Shape::Plain => None,
                    Shape::Hbone => {
                        let made =
                            TestCa::of_dir(authority.path())?.issue(&format!("spiffe://cluster.local/ns/bench/sa/{NAME}"))?;
                        Some(made.write(authority.path(), NAME)?)
                    }
                };
                let file = authority.path().join("envoy.json");
                std::fs::write(&file, envoy::config(tls.as_ref(), size, filters.as_ref()).to_string())?;
                let mut command = pinned(settings.cpus.map(|(proxies, _load)| proxies), binary);
                command.arg("-c").arg(file).args(["--concurrency", &settings.workers.to_string()]);
                command.args(["--disable-hot-restart", "-l", "warning"]);
                (command, (envoy::ADMIN, "/ready"))
            }
        };
        let mut proxies = vec![Proxy::start(middle, command, peer.name, ready, settings)?];
        proxies.append(&mut ends);
        proxies.iter_mut().try_for_each(Proxy::wait_ready)?;
        let mut command = load_command(settings);
        let server_process = start_listening(&server, command.args(["server", "--http", "--port", &PORT.to_string()]))?;
        let row = Self {
            settings: settings.clone(),
            shape,
            tokens,
            proxies,
            _server: server_process,
            client,
            server_netns: server,
            mesh,
            _authority: authority,
        };
        let first = row.run(&["churn", "--conc", "1", "--count", "5", "--host", HOST])?;
        ensure!(first["errors"] == 0, "the first requests: {first}");
        Ok(row)
    }

    /// The address clients use.
    pub fn target(&self) -> SocketAddr {
        match self.shape {
            Shape::Plain => (PROXY, PORT).into(),
            Shape::Hbone => (SERVICE, 80).into(),
        }
    }
    /// The client's namespace.
    pub fn client(&self) -> &Netns {
        &self.client
    }
    /// The folder the mesh is in.
    pub fn mesh(&self) -> &MeshDir {
        &self.mesh
    }
    /// Further endpoints of the service, to be put and replaced: `count` pods, all of them the one server.
    pub fn endpoints_yaml(&self, count: usize) -> String {
        pods_yaml("more", 30_000, count)
    }

    /// Runs a load client and gives its line.
    pub fn run(&self, args: &[&str]) -> anyhow::Result<Value> {
        let tokens = self.tokens.as_ref().and_then(|file| file.to_str()).map(|file| ["--tokens", file]);
        let args: Vec<&str> = args.iter().copied().chain(tokens.into_iter().flatten()).collect();
        parts::load(&self.client, &self.settings, &args, self.target())
    }

    /// Opens connections that last as long as the value.
    pub fn hold(&self, args: &[&str], conns: u64) -> anyhow::Result<Held> {
        Held::open(&self.client, &self.settings, args, self.target(), conns)
    }

    /// The same from the server's pod, which is a client of its own service then.
    pub fn hold_from_server(&self, args: &[&str], conns: u64) -> anyhow::Result<Held> {
        Held::open(&self.server_netns, &self.settings, args, self.target(), conns)
    }

    /// Tunnels and streams that the client's agent has open.
    pub fn tunnels(&self) -> anyhow::Result<(u64, u64)> {
        let agent = self.proxies.get(1).context("an agent of the client's")?;
        let page = Metrics::parse(&http::get(&agent.netns, (Ipv4Addr::LOCALHOST, 15020).into(), "/metrics")?.body);
        let now = |name| page.sum(name, &[("direction", "outbound")]) as u64;
        Ok((now("culvert_tunnels_active"), now("culvert_tunnel_streams_active")))
    }

    /// CPU seconds so far: of the proxy in the middle, then of the agents.
    pub fn cpu(&self) -> anyhow::Result<Vec<f64>> {
        self.proxies.iter().map(Proxy::cpu).collect()
    }

    /// Resident KiB of the proxy in the middle.
    pub fn rss_kib(&self) -> anyhow::Result<u64> {
        self.proxies.first().context("a proxy")?.rss_kib()
    }

    /// An error, with the end of its log, if a proxy is not running any more.
    pub fn check(&mut self) -> anyhow::Result<()> {
        self.proxies.iter_mut().try_for_each(Proxy::check)
    }
}

/// Who issues the tokens.
const ISSUER: &str = "https://issuer.bench.example";

/// Tokens, and what asks for them.
struct Filters {
    tokens: Vec<String>,
    jwks: String,
}
impl Filters {
    fn make(tokens: usize) -> anyhow::Result<Self> {
        let key = SigningKey::make("bench")?;
        let expires = now() + 86_400;
        let token = |n: usize| {
            let id = format!("{n:08}");
            key.token(&json!({"iss": ISSUER, "sub": "load", "aud": ["bench"], "exp": expires, "role": "reader", "jti": id}))
        };
        Ok(Self { tokens: (0..tokens).map(token).collect::<anyhow::Result<_>>()?, jwks: jwks(&[&key]) })
    }

    /// A line a token.
    fn write_tokens(&self, dir: &Path) -> anyhow::Result<PathBuf> {
        let file = dir.join("tokens");
        std::fs::write(&file, self.tokens.join("\n"))?;
        Ok(file)
    }

    /// For our waypoint. The policy is of two rules, of which the second holds.
    fn yaml(&self, shape: Shape) -> String {
        let target = match shape {
            Shape::Plain => format!("{{ kind: Gateway, group: gateway.networking.k8s.io, name: {NAME} }}"),
            Shape::Hbone => "{ kind: Service, group: \"\", name: server }".into(),
        };
        format!(
            "apiVersion: security.istio.io/v1\nkind: RequestAuthentication\nmetadata: {{ name: tokens, namespace: bench }}\nspec:\n  \
             targetRefs: [ {target} ]\n  jwtRules: [ {{ issuer: \"{ISSUER}\", audiences: [ bench ], forwardOriginalToken: true, jwks: '{}' }} ]\n\
             ---\napiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {{ name: readers, namespace: bench }}\nspec:\n  \
             targetRefs: [ {target} ]\n  action: ALLOW\n  rules:\n  - to: [ {{ operation: {{ methods: [ POST ], paths: [ /admin/* ] }} }} ]\n  \
             - from: [ {{ source: {{ requestPrincipals: [ \"{ISSUER}/load\" ] }} }} ]\n    to: [ {{ operation: {{ methods: [ GET ] }} }} ]\n    \
             when: [ {{ key: \"request.auth.claims[role]\", values: [ reader ] }} ]\n",
            self.jwks
        )
    }
}

/// Where endpoints of a large service live.
fn endpoint_net() -> String {
    format!("{}/16", endpoint(0))
}
/// Address of endpoint `n`.
fn endpoint(n: usize) -> Ipv4Addr {
    Ipv4Addr::from_bits(Ipv4Addr::new(10, 80, 0, 0).to_bits() + n as u32)
}
/// Path prefix of rule `n`.
pub fn path(n: usize) -> String {
    format!("/api/v1/resource-{n}")
}

fn mesh_yaml(shape: Shape, client: &Netns, server: &Netns) -> String {
    let mode = if shape == Shape::Hbone { "ambient" } else { "none" };
    let pod = |name: &str, node: &str, ip: Ipv4Addr, ns: &Netns| {
        let annotation = format!("culvert.dev/netns: {}", ns.path().display());
        pod_yaml(name, ip, &format!("app: {name}"), &annotation, node)
    };
    let proxy = format!(
        "app: {NAME}, gateway.networking.k8s.io/gateway-name: {NAME}, networking.istio.io/tunnel: http, istio.io/dataplane-mode: none"
    );
    let (class, listener, uses) = match shape {
        Shape::Plain => ("istio", format!("name: http, port: {PORT}, protocol: HTTP"), ""),
        Shape::Hbone => {
            ("istio-waypoint", "name: mesh, port: 15008, protocol: HBONE".into(), "labels: { istio.io/use-waypoint: wp }")
        }
    };
    let mut yaml = format!(
        "apiVersion: v1\nkind: Namespace\nmetadata: {{ name: bench, labels: {{ istio.io/dataplane-mode: {mode} }} }}\n\
         {}{}{}---\napiVersion: gateway.networking.k8s.io/v1\nkind: Gateway\nmetadata: {{ name: {NAME}, namespace: bench }}\n\
         spec: {{ gatewayClassName: {class}, listeners: [ {{ {listener} }} ] }}\n\
         status: {{ addresses: [ {{ type: IPAddress, value: {PROXY} }} ] }}\n\
         ---\napiVersion: v1\nkind: Service\nmetadata:\n  name: server\n  namespace: bench\n  {uses}\nspec:\n  clusterIP: {SERVICE}\n  \
         selector: {{ app: server }}\n  ports: [ {{ name: http, port: 80, targetPort: {PORT} }} ]\n",
        pod("client", "node-client", CLIENT, client),
        pod("server", "node-server", SERVER, server),
        pod_yaml(NAME, PROXY, &proxy, "", "node-proxy"),
    );
    if shape == Shape::Plain {
        yaml += &route_yaml(shape, "all", EVERYTHING);
    }
    yaml
}

/// The rule for requests no other rule is for.
const EVERYTHING: &str = "  - backendRefs: [ { name: server, port: 80 } ]\n";

/// An HTTPRoute with these rules: on the proxy as a Gateway, or on the service behind it as a waypoint.
pub fn route_yaml(shape: Shape, name: &str, rules: &str) -> String {
    let parent = match shape {
        Shape::Plain => format!("  parentRefs: [ {{ name: {NAME} }} ]\n  hostnames: [ {HOST} ]\n"),
        Shape::Hbone => service_parent("server"),
    };
    http_route(name, &parent, rules)
}
fn service_parent(service: &str) -> String {
    format!("  parentRefs: [ {{ kind: Service, group: \"\", name: {service} }} ]\n")
}
fn http_route(name: &str, parent: &str, rules: &str) -> String {
    format!(
        "---\napiVersion: gateway.networking.k8s.io/v1\nkind: HTTPRoute\nmetadata: {{ name: {name}, namespace: bench }}\n\
         spec:\n{parent}  rules:\n{rules}"
    )
}
/// A service behind the waypoint with a route of its own.
fn service_yaml(n: usize) -> String {
    let name = format!("s{n}");
    let rules = format!("  - backendRefs: [ {{ name: {name}, port: 80 }} ]\n");
    format!(
        "apiVersion: v1\nkind: Service\nmetadata: {{ name: {name}, namespace: bench, labels: {{ istio.io/use-waypoint: {NAME} }} }}\n\
         spec: {{ clusterIP: 10.97.{}.{}, ports: [ {{ name: http, port: 80 }} ] }}\n{}",
        n >> 8,
        n & 255,
        http_route(&name, &service_parent(&name), &rules)
    )
}

/// The files of a large mesh.
fn large_yaml(shape: Shape, size: Size) -> Vec<(String, String)> {
    let mut files = Vec::new();
    if shape == Shape::Hbone && size.routes + size.services > 0 {
        files.push(("all.yaml".into(), route_yaml(shape, "all", EVERYTHING)));
    }
    files.extend((0..size.services).map(|n| (format!("service-{n}.yaml"), service_yaml(n))));
    for (file, from) in (0..size.routes).step_by(RULES).enumerate() {
        let mut rules = String::new();
        for n in from..(from + RULES).min(size.routes) {
            let _infallible = writeln!(
                rules,
                "  - matches: [ {{ path: {{ type: PathPrefix, value: {} }} }} ]\n    backendRefs: [ {{ name: server, port: 80 }} ]",
                path(n)
            );
        }
        files.push((format!("route-{file}.yaml"), route_yaml(shape, &format!("r{file}"), &rules)));
    }
    if size.endpoints > 0 {
        files.push(("pods.yaml".into(), pods_yaml("server", 1, size.endpoints)));
    }
    files
}

/// Pods of the service, from endpoint `from` on.
fn pods_yaml(account: &str, from: usize, count: usize) -> String {
    (from..from + count).map(|n| pod_yaml(&format!("{account}.{n}"), endpoint(n), "app: server", "", "node-far")).collect()
}
