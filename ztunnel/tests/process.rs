//! Ring 2: the whole agent but capture, in one process on loopback. Each pod has an address of 127.1.0.0/16 of its own;
//! connections are brought to the outbound side by the test, with the destination a capture would have found.
#![allow(clippy::unwrap_used, reason = "a panic is how a test fails, also outside its own function")]
use anyhow::{Context as _, Result, bail, ensure};
use clap::Parser;
use http::HeaderValue;
use mesh_hbone::{ConnectRequest, Incoming, headers};
use mesh_identity::local_ca::{LocalCa, LocalCaSettings};
use mesh_identity::{IdentitySource, Svid, TlsContext};
use mesh_model::change::Change;
use mesh_model::labels::Labels;
use mesh_model::policy::{Action, Clause, Match, Policy, PolicyBody, PolicyKey, Rule, Scope, TextMatch, Values};
use mesh_model::service::{AppProtocol, Service, ServiceKey, ServicePort, WeightedWaypoint};
use mesh_model::snapshot::Viewpoint;
use mesh_model::workload::{GatewayDestination, GatewayRef, Protocol, Workload};
use mesh_model::{HboneAuthority, Network, NetworkAddr, Reason, SpiffeId, TrustDomain};
use mesh_runtime::drain::{self, Drain, DrainMode};
use mesh_runtime::logging::{self, Format, Logging};
use mesh_runtime::metrics::Registry;
use mesh_runtime::readiness::Readiness;
use mesh_sources::Mesh;
use mesh_sources::publisher::{self, ChangeSink};
use std::io::Write;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::sync::mpsc;
use tokio::time::{Instant, timeout};
use ztunnel::accept::Accepted;
use ztunnel::handover::{self, Ask, Inherited, Predecessor};
use ztunnel::pod::{Pod, Shared};
use ztunnel::pods::{PodState, PodSupervisor, PodTable};
use ztunnel::{Settings, app, outbound};

/// Longest any step may take.
const LIMIT: Duration = Duration::from_secs(30);

#[derive(Parser)]
struct Flags {
    #[command(flatten)]
    settings: Settings,
}

/// Everything the log said.
#[derive(Clone, Default)]
struct Said(Arc<Mutex<Vec<u8>>>);
impl Write for Said {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().extend(bytes);
        Ok(bytes.len())
    }
    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// One agent with a mesh the test writes.
struct Lab {
    net: u8,
    mesh: Mesh,
    sink: ChangeSink,
    shared: Arc<Shared>,
    pods: PodTable,
    drain: Drain,
    said: Said,
    logging: Logging,
    ca: Arc<LocalCa>,
    registry: Registry,
    asks: mpsc::Sender<Ask>,
    dir: tempfile::TempDir,
}

/// Each lab has a second byte of its own, so that tests run side by side.
static NEXT_NET: AtomicU8 = AtomicU8::new(1);

impl Lab {
    async fn start(changes: impl FnOnce(&dyn Fn(u8) -> IpAddr) -> Vec<Change>) -> Result<Self> {
        Self::start_with(&[], changes).await
    }
    async fn start_with(flags: &[&str], changes: impl FnOnce(&dyn Fn(u8) -> IpAddr) -> Vec<Change>) -> Result<Self> {
        let net = NEXT_NET.fetch_add(1, Ordering::Relaxed);
        let dir = tempfile::tempdir()?;
        let args = [
            "ztunnel",
            "--node",
            "n",
            "--redirect",
            "none",
            "--worker-threads",
            "2",
            "--handshake-timeout",
            "10s",
            "--connect-timeout",
            "10s",
        ];
        let settings = Flags::parse_from(args.iter().chain(flags)).settings;
        let said = Said::default();
        let options = logging::Options::from_env(Some("info"), Some("json"), "ztunnel")?;
        let (logging, _subscriber) = logging::build(options, Box::new(said.clone()))?;
        ensure!(logging.access.format() == Format::Json);
        let view = Viewpoint { node: "n".into(), ..Viewpoint::default() };
        let (mesh, publisher, sinks) = publisher::channel(view, 1);
        tokio::spawn(publisher.run());
        let mut sink = sinks.into_iter().next().context("one sink")?;
        let ca = LocalCaSettings { directory: dir.path().join("ca"), ..LocalCaSettings::default() };
        let ca = Arc::new(LocalCa::open(&ca, Arc::new(mesh_identity::clock::SystemClock))?);
        let registry = Registry::new();
        let shared = app::assemble(&settings, mesh.clone(), Arc::clone(&ca) as Arc<dyn IdentitySource>, &registry, &logging)?;
        sink.send(changes(&|host| Self::address(net, host))).await?;
        timeout(LIMIT, mesh.synced()).await?;
        let pods = PodTable::default();
        let readiness = Readiness::new();
        let (drain, watch) = drain::channel();
        let supervisor = PodSupervisor::new(Arc::clone(&shared), readiness.clone(), pods.clone(), None, Inherited::new());
        let (asks, successor) = mpsc::channel(1);
        tokio::spawn(supervisor.run(watch, readiness.pending("mesh"), successor));
        timeout(LIMIT, readiness.ready()).await.context("readiness")?;
        Ok(Self { net, mesh, sink, shared, pods, drain, said, logging, ca, registry, asks, dir })
    }
    fn address(net: u8, host: u8) -> IpAddr {
        Ipv4Addr::new(127, 1, net, host).into()
    }
    fn at(&self, host: u8, port: u16) -> SocketAddr {
        SocketAddr::new(Self::address(self.net, host), port)
    }
    fn pod(&self, name: &str) -> Result<Arc<Pod>> {
        let found = self.pods.list().into_iter().find_map(|(uid, state)| match state {
            PodState::Up { pod, .. } if uid.ends_with(&format!("/{name}")) => Some(pod),
            _ => None,
        });
        found.with_context(|| format!("pod {name} is not up"))
    }
    async fn change(&mut self, changes: Vec<Change>) -> Result<()> {
        let mut versions = self.mesh.watch();
        versions.mark_unchanged();
        self.sink.send(changes).await?;
        timeout(LIMIT, versions.changed()).await??;
        Ok(())
    }
    /// Opens a connection of pod `from` to `dst`, as if captured.
    async fn call(&self, from: &str, dst: SocketAddr) -> Result<TcpStream> {
        let pod = self.pod(from)?;
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
        let client = TcpStream::connect(listener.local_addr()?).await?;
        let (captured, peer) = listener.accept().await?;
        let captured = captured.into_std()?;
        let worker = self.shared.threads.pick(None).clone();
        worker.spawn(async move {
            let tcp = TcpStream::from_std(captured).unwrap();
            outbound::serve_conn(pod, Accepted { tcp, peer, original_dst: dst }).await;
        });
        Ok(client)
    }
    /// Sends a line, expects it back, and says whether that worked.
    async fn echoes(&self, from: &str, dst: SocketAddr) -> Result<TcpStream> {
        let mut client = self.call(from, dst).await?;
        echo_once(&mut client).await?;
        Ok(client)
    }
    /// Expects a refusal: the client sees a reset, the log says `reason` for `direction`.
    async fn refused(&self, from: &str, dst: SocketAddr, direction: &str, reason: Reason) -> Result<String> {
        let client = self.call(from, dst).await?;
        ensure!(is_cut(client).await?, "{from} to {dst} was not refused");
        self.told(direction, reason).await
    }
    /// Waits for an access log line.
    async fn told(&self, direction: &str, reason: Reason) -> Result<String> {
        self.told_since(0, direction, reason).await
    }
    /// The same, after this many bytes of the log.
    async fn told_since(&self, from: usize, direction: &str, reason: Reason) -> Result<String> {
        let deadline = Instant::now() + LIMIT;
        loop {
            self.logging.writer.flush(Duration::from_millis(200));
            let said = String::from_utf8(self.said.0.lock().unwrap().get(from..).unwrap_or_default().to_vec())?;
            let wanted = [format!("\"direction\":\"{direction}\""), format!("\"reason\":\"{}\"", reason.as_str())];
            if let Some(line) = said.lines().find(|l| wanted.iter().all(|w| l.contains(w))) {
                return Ok(line.to_owned());
            }
            ensure!(Instant::now() < deadline, "no {direction} line with {reason} in:\n{said}");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }
    /// A certificate of this mesh for somebody the test plays.
    async fn svid(&self, account: &str) -> Result<Svid> {
        let id = SpiffeId::new(&TrustDomain::default(), "t", account)?;
        let source: &dyn IdentitySource = &*self.ca;
        let clock = Arc::new(mesh_identity::clock::SystemClock);
        let tls = TlsContext::new(&mesh_identity::crypto::TlsSettings::default(), source, clock)?;
        Ok(Svid::new(&id, source.issue(&id).await?, &tls)?)
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        self.drain.start(DrainMode::Immediate);
    }
}

async fn echo_once(client: &mut TcpStream) -> Result<()> {
    client.write_all(b"hello").await?;
    let mut back = [0; 5];
    timeout(LIMIT, client.read_exact(&mut back)).await??;
    ensure!(&back == b"hello");
    Ok(())
}

/// Whether the connection ends without another byte, by reset or end.
async fn is_cut(mut client: TcpStream) -> Result<bool> {
    let _ = client.write_all(b"anyone?").await;
    Ok(!matches!(timeout(LIMIT, client.read(&mut [0])).await?, Ok(1)))
}

/// An application that sends back what it gets.
async fn echo_app(at: SocketAddr) -> Result<()> {
    let listener = TcpListener::bind(at).await?;
    tokio::spawn(async move {
        while let Ok((mut tcp, _)) = listener.accept().await {
            tokio::spawn(async move {
                let (mut r, mut w) = tcp.split();
                let _ = tokio::io::copy(&mut r, &mut w).await;
            });
        }
    });
    Ok(())
}

fn workload(name: &str, ip: IpAddr) -> Workload {
    let mut w = Workload::new(&format!("c//Pod/t/{name}"), name, "t");
    w.service_account = name.into();
    w.ips = vec![ip];
    w.node = "n".into();
    w.protocol = Protocol::Hbone;
    w
}
/// A pod somewhere else: known, not served here.
fn elsewhere(name: &str, ip: IpAddr) -> Workload {
    let mut w = workload(name, ip);
    w.node = "other".into();
    w
}
fn up(w: Workload) -> Change {
    Change::Workload(Arc::new(w))
}
fn policy(name: &str, scope: Scope, action: Action, principal: &str) -> Policy {
    let clause = Clause {
        matches: vec![Match { principals: Values::new(vec![TextMatch::Exact(principal.into())], vec![]), ..Match::default() }],
    };
    Policy {
        key: PolicyKey::new("t", name),
        scope,
        body: PolicyBody::Rules { action, dry_run: false, rules: vec![Rule { clauses: vec![clause] }] },
        origin: None,
    }
}
const CLIENT: &str = "cluster.local/ns/t/sa/client";

/// `client` and `server`, and an echo application behind the server.
async fn pair(more: Vec<Change>) -> Result<Lab> {
    let lab = Lab::start(|ip| {
        let mut all = vec![up(workload("client", ip(1))), up(workload("server", ip(2)))];
        all.extend(more);
        all
    })
    .await?;
    echo_app(lab.at(2, 8080)).await?;
    Ok(lab)
}

#[tokio::test]
async fn a_call_is_carried_with_both_identities() -> Result<()> {
    let lab = pair(vec![]).await?;
    let client = lab.echoes("client", lab.at(2, 8080)).await?;
    drop(client);
    let deadline = Instant::now() + LIMIT;
    let counted = |text: &str, labels: &[&str]| {
        text.lines().any(|l| l.starts_with("istio_tcp_connections_closed_total{") && labels.iter().all(|w| l.contains(w)))
    };
    loop {
        let text = lab.registry.encode();
        // On loopback the inbound side sees 127.0.0.1, so only the outbound side knows the source workload.
        let source = ["reporter=\"source\"", "mutual_tls", "source_workload=\"client\"", "destination_workload=\"server\""];
        let destination =
            ["reporter=\"destination\"", "mutual_tls", "source_principal=\"spiffe://cluster.local/ns/t/sa/client\""];
        if counted(&text, &source) && counted(&text, &destination) {
            return Ok(());
        }
        ensure!(Instant::now() < deadline, "{text}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

#[tokio::test]
async fn an_allow_list_without_the_caller_refuses_with_its_reason() -> Result<()> {
    let lab = pair(vec![Change::Policy(Arc::new(policy("only-x", Scope::Namespace, Action::Allow, "cluster.local/ns/t/sa/x")))])
        .await?;
    let line = lab.refused("client", lab.at(2, 8080), "inbound", Reason::NotAllowed).await?;
    ensure!(line.contains("spiffe://cluster.local/ns/t/sa/client"), "{line}");
    let line = lab.told("outbound", Reason::PeerRefused).await?;
    ensure!(line.contains("401") && line.contains("not_allowed"), "the client's side knows as well: {line}");
    Ok(())
}

#[tokio::test]
async fn the_access_log_tells_what_it_is_asked_for_and_every_refusal() -> Result<()> {
    let flags = ["--access-log-sampling", "0", "--access-log-fields", "dst.workload,duration,direction"];
    let lab = Lab::start_with(&flags, |ip| vec![up(workload("client", ip(1))), up(workload("server", ip(2)))]).await?;
    echo_app(lab.at(2, 8080)).await?;
    drop(lab.echoes("client", lab.at(2, 8080)).await?);
    // Nobody listens there: told after the connection before it.
    let line = lab.refused("client", lab.at(2, 8081), "inbound", Reason::ConnectFailed).await?;
    ensure!(line.contains("\"duration\"") && line.contains("\"error\""), "{line}");
    ensure!(!line.contains("src.addr") && !line.contains("bytes_sent"), "{line}");
    let said = String::from_utf8(lab.said.0.lock().unwrap().clone())?;
    ensure!(said.lines().filter(|l| l.contains("connection complete")).all(|l| l.contains("\"reason\"")), "{said}");
    Ok(())
}

#[tokio::test]
async fn a_refused_caller_is_not_moved_to_the_next_endpoint() -> Result<()> {
    let only_x = policy("only-x", Scope::Namespace, Action::Allow, "cluster.local/ns/t/sa/x");
    let lab = Lab::start(|ip| {
        let mut service = Service::new("web", "t", "web.t.svc.cluster.local");
        service.vips = vec![NetworkAddr { network: Network::default(), ip: ip(100) }];
        service.ports = vec![ServicePort { port: 80, target: 8080, protocol: AppProtocol::Unknown }];
        let backend = |name: &str, host| {
            let mut w = workload(name, ip(host));
            w.services.insert(service.key.clone(), Arc::from([(80, 8080)]));
            up(w)
        };
        vec![
            up(workload("client", ip(1))),
            backend("web1", 2),
            backend("web2", 3),
            Change::Service(Arc::new(service.clone())),
            Change::Policy(Arc::new(only_x)),
        ]
    })
    .await?;
    lab.refused("client", lab.at(100, 80), "outbound", Reason::PeerRefused).await?;
    lab.told("inbound", Reason::NotAllowed).await?;
    let said = String::from_utf8(lab.said.0.lock().unwrap().clone())?;
    let denials = said.lines().filter(|l| l.contains("\"reason\":\"not_allowed\"")).count();
    ensure!(denials == 1, "{denials} denials for one call:\n{said}");
    Ok(())
}

#[tokio::test]
async fn a_new_selector_policy_cuts_a_live_connection() -> Result<()> {
    let mut lab = pair(vec![]).await?;
    let client = lab.echoes("client", lab.at(2, 8080)).await?;
    let deny = policy("late", Scope::Selector, Action::Deny, CLIENT);
    let mut server = workload("server", lab.at(2, 0).ip());
    server.policies = [deny.key.clone()].into();
    lab.change(vec![Change::Policy(Arc::new(deny)), up(server)]).await?;
    ensure!(is_cut(client).await?);
    let line = lab.told("inbound", Reason::Revoked).await?;
    ensure!(line.contains("t/late") && line.contains("policy change"), "{line}");
    Ok(())
}

#[tokio::test]
async fn a_workload_that_names_a_policy_nobody_has_is_closed() -> Result<()> {
    let lab = Lab::start(|ip| {
        let mut server = workload("server", ip(2));
        server.policies = [PolicyKey::new("t", "missing")].into();
        vec![up(workload("client", ip(1))), up(server)]
    })
    .await?;
    echo_app(lab.at(2, 8080)).await?;
    lab.refused("client", lab.at(2, 8080), "inbound", Reason::PolicyUnknown).await?;
    Ok(())
}

#[tokio::test]
async fn a_pod_that_leaves_the_mesh_loses_its_connections() -> Result<()> {
    let mut lab = pair(vec![]).await?;
    let client = lab.echoes("client", lab.at(2, 8080)).await?;
    lab.change(vec![Change::WorkloadGone("c//Pod/t/server".into())]).await?;
    ensure!(is_cut(client).await?);
    lab.told("inbound", Reason::Revoked).await?;
    Ok(())
}

#[tokio::test]
async fn the_wrong_identity_at_the_right_address_gets_nothing() -> Result<()> {
    let lab = Lab::start(|ip| {
        // The mesh says that `server` is at that address, but the process there is `impostor`.
        vec![up(workload("client", ip(1))), up(elsewhere("server", ip(2)))]
    })
    .await?;
    let svid = Arc::new(lab.svid("impostor").await?);
    let listener = TcpListener::bind(lab.at(2, 15008)).await?;
    let heard = tokio::spawn(async move {
        let (tcp, _) = listener.accept().await.unwrap();
        let (mut tls, _) = mesh_identity::tls::accept(&svid, tcp, Instant::now() + LIMIT).await.unwrap();
        let mut all = Vec::new();
        let _ = tls.read_to_end(&mut all).await;
        all
    });
    let line = lab.refused("client", lab.at(2, 8080), "outbound", Reason::IdentityMismatch).await?;
    ensure!(line.contains("sa/impostor") && line.contains("sa/server"), "{line}");
    ensure!(timeout(LIMIT, heard).await??.is_empty(), "no byte of HTTP/2 may reach an impostor");
    Ok(())
}

#[tokio::test]
async fn nobody_there_and_nothing_listening_have_their_own_reasons() -> Result<()> {
    let lab =
        Lab::start(|ip| vec![up(workload("client", ip(1))), up(workload("server", ip(2))), up(elsewhere("gone", ip(3)))]).await?;
    lab.refused("client", lab.at(3, 8080), "outbound", Reason::ConnectFailed).await?;
    // The agent is there, the application is not: 503 from the other side.
    lab.refused("client", lab.at(2, 9), "inbound", Reason::ConnectFailed).await?;
    let line = lab.told("outbound", Reason::PeerRefused).await?;
    ensure!(line.contains("503"), "{line}");
    Ok(())
}

#[tokio::test]
async fn the_agents_own_ports_are_not_destinations() -> Result<()> {
    let lab = pair(vec![]).await?;
    lab.refused("client", lab.at(2, 15008), "outbound", Reason::Recursion).await?;
    Ok(())
}

#[tokio::test]
async fn plain_destinations_are_passed_through() -> Result<()> {
    let lab = pair(vec![]).await?;
    echo_app(lab.at(9, 7000)).await?;
    lab.echoes("client", lab.at(9, 7000)).await?;
    Ok(())
}

/// An HBONE server that is not an agent: accepts CONNECTs, notes their authority, hands the stream to `then`.
async fn hbone_server<F, Fut>(at: SocketAddr, svid: Svid, then: F) -> Result<tokio::sync::mpsc::UnboundedReceiver<String>>
where
    F: Fn(mesh_hbone::HboneStream) -> Fut + Clone + Send + Sync + 'static,
    Fut: Future<Output = ()> + Send + 'static,
{
    let (tx, rx) = tokio::sync::mpsc::unbounded_channel();
    let listener = TcpListener::bind(at).await?;
    let svid = Arc::new(svid);
    tokio::spawn(async move {
        let (_keep, watch) = drain::channel();
        while let Ok((tcp, _)) = listener.accept().await {
            let (svid, then, tx, watch) = (Arc::clone(&svid), then.clone(), tx.clone(), watch.clone());
            tokio::spawn(async move {
                let Ok((tls, _)) = mesh_identity::tls::accept(&svid, tcp, Instant::now() + LIMIT).await else { return };
                let handler = move |incoming: Incoming| {
                    let _ = tx.send(incoming.authority().to_owned());
                    let then = then.clone();
                    async move {
                        if let Ok(stream) = incoming.accept([]) {
                            then(stream).await;
                        }
                    }
                };
                let _ = mesh_hbone::serve(tls, Arc::default(), handler, watch).await;
            });
        }
    });
    Ok(rx)
}

async fn echo_stream(stream: mesh_hbone::HboneStream) {
    let (mut r, mut w) = tokio::io::split(stream.into_io());
    let _ = tokio::io::copy(&mut r, &mut w).await;
    let _ = w.shutdown().await;
}

#[tokio::test]
async fn a_service_with_a_waypoint_goes_to_the_waypoint_with_its_own_address() -> Result<()> {
    let lab = Lab::start(|ip| {
        let mut service = Service::new("web", "t", "web.t.svc.cluster.local");
        service.vips = vec![NetworkAddr { network: Network::default(), ip: ip(100) }];
        service.ports = vec![ServicePort { port: 80, target: 8080, protocol: AppProtocol::Unknown }];
        let waypoint = GatewayRef { destination: GatewayDestination::Address(Network::default(), ip(50)), hbone_port: 15008 };
        service.waypoints = vec![WeightedWaypoint { waypoint, weight: 100 }];
        vec![up(workload("client", ip(1))), up(elsewhere("waypoint", ip(50))), Change::Service(Arc::new(service))]
    })
    .await?;
    let mut asked = hbone_server(lab.at(50, 15008), lab.svid("waypoint").await?, echo_stream).await?;
    lab.echoes("client", lab.at(100, 80)).await?;
    assert_eq!(asked.recv().await.as_deref(), Some(lab.at(100, 80).to_string().as_str()));
    Ok(())
}

#[tokio::test]
async fn a_declared_waypoint_that_is_missing_is_never_bypassed() -> Result<()> {
    let lab = Lab::start(|ip| {
        let mut service = Service::new("web", "t", "web.t.svc.cluster.local");
        service.vips = vec![NetworkAddr { network: Network::default(), ip: ip(100) }];
        service.ports = vec![ServicePort { port: 80, target: 8080, protocol: AppProtocol::Unknown }];
        let missing = GatewayRef {
            destination: GatewayDestination::Service(ServiceKey::new("t", "waypoint.t.svc.cluster.local")),
            hbone_port: 15008,
        };
        service.waypoints = vec![WeightedWaypoint { waypoint: missing, weight: 100 }];
        let mut server = workload("server", ip(2));
        server.services.insert(service.key.clone(), Arc::from([(80, 8080)]));
        vec![up(workload("client", ip(1))), up(server), Change::Service(Arc::new(service))]
    })
    .await?;
    echo_app(lab.at(2, 8080)).await?;
    lab.refused("client", lab.at(100, 80), "outbound", Reason::NoWaypoint).await?;
    Ok(())
}

#[tokio::test]
async fn another_network_is_reached_through_two_tunnels() -> Result<()> {
    let lab = Lab::start(|ip| {
        let mut service = Service::new("web", "t", "web.t.svc.cluster.local");
        service.vips = vec![NetworkAddr { network: Network::default(), ip: ip(100) }];
        service.ports = vec![ServicePort { port: 80, target: 8080, protocol: AppProtocol::Unknown }];
        service.sans = vec!["spiffe://cluster.local/ns/t/sa/server".parse().unwrap()];
        let mut remote = elsewhere("remote", ip(3));
        remote.ips = vec![];
        remote.network = Network::from("west");
        remote.services.insert(service.key.clone(), Arc::from([(80, 8080)]));
        remote.network_gateway = Some(Box::new(GatewayRef {
            destination: GatewayDestination::Address(Network::default(), ip(60)),
            hbone_port: 15008,
        }));
        vec![up(workload("client", ip(1))), up(elsewhere("gateway", ip(60))), up(remote), Change::Service(Arc::new(service))]
    })
    .await?;
    let inner = Arc::new(lab.svid("server").await?);
    let (tx, mut inner_asked) = tokio::sync::mpsc::unbounded_channel();
    let beyond = move |stream: mesh_hbone::HboneStream| {
        let (inner, tx) = (Arc::clone(&inner), tx.clone());
        async move {
            let (_keep, watch) = drain::channel();
            let Ok((tls, _)) = mesh_identity::tls::accept(&inner, stream.into_io(), Instant::now() + LIMIT).await else { return };
            let handler = move |incoming: Incoming| {
                let _ = tx.send((incoming.authority().to_owned(), incoming.forwarded_network().is_some()));
                async move {
                    if let Ok(stream) = incoming.accept([]) {
                        echo_stream(stream).await;
                    }
                }
            };
            let _ = mesh_hbone::serve(tls, Arc::default(), handler, watch).await;
        }
    };
    let mut outer_asked = hbone_server(lab.at(60, 15008), lab.svid("gateway").await?, beyond).await?;
    lab.echoes("client", lab.at(100, 80)).await?;
    assert_eq!(outer_asked.recv().await.as_deref(), Some("web.t.svc.cluster.local:80"));
    assert_eq!(inner_asked.recv().await, Some(("web.t.svc.cluster.local:80".to_owned(), true)));
    Ok(())
}

#[tokio::test]
async fn connect_answers_have_the_specified_statuses() -> Result<()> {
    let mut lab = pair(vec![]).await?;
    let svid = lab.svid("client").await?;
    let expect = [SpiffeId::new(&TrustDomain::default(), "t", "server")?];
    let tcp = TcpStream::connect(lab.at(2, 15008)).await?;
    let (tls, _) = mesh_identity::tls::connect(&svid, tcp, &expect, Instant::now() + LIMIT).await?;
    let tunnel = mesh_hbone::Tunnel::handshake(tls, Arc::default(), || {}).await?;
    let ask = async |authority: HboneAuthority| match tunnel.open(&ConnectRequest::to(authority)).await {
        Ok(_) => (200, String::new()),
        Err(e) => (e.status.unwrap_or_default(), e.detail.to_string()),
    };
    assert_eq!(ask(HboneAuthority::Addr(lab.at(2, 8080))).await.0, 200);
    let (status, why) = ask(HboneAuthority::Addr(lab.at(7, 8080))).await;
    assert_eq!((status, why.contains("bad_request")), (400, true), "{why}");
    let (status, why) = ask(HboneAuthority::Addr(lab.at(2, 9))).await;
    assert_eq!((status, why.contains("connect_failed")), (503, true), "{why}");
    let (status, why) = ask(HboneAuthority::Addr(lab.at(2, 15006))).await;
    assert_eq!((status, why.contains("recursion")), (503, true), "{why}");
    lab.change(vec![Change::Policy(Arc::new(policy("no", Scope::Namespace, Action::Deny, CLIENT)))]).await?;
    let (status, why) = ask(HboneAuthority::Addr(lab.at(2, 8080))).await;
    assert_eq!((status, why.contains("policy_denied: t/no")), (401, true), "{why}");
    Ok(())
}

/// Only for what comes through a gateway the address is not the client's, and what it says of itself is believed.
#[tokio::test]
async fn a_client_s_own_word_counts_only_behind_a_gateway() -> Result<()> {
    let lab = Lab::start(|ip| {
        let mut gateway = elsewhere("gw", ip(3));
        gateway.labels = Labels::of(vec![("gateway.networking.k8s.io/gateway-name".into(), "eastwest".into())]);
        vec![up(workload("server", ip(2))), up(gateway), up(elsewhere("pod", ip(4)))]
    })
    .await?;
    echo_app(lab.at(2, 8080)).await?;
    let svid = lab.svid("client").await?;
    let expect = [SpiffeId::new(&TrustDomain::default(), "t", "server")?];
    let baggage = "k8s.cluster.name=far,k8s.namespace.name=boss,k8s.deployment.name=frontend,service.name=front";
    for (from, network, name) in [(3, "west", "behind"), (3, "", "own"), (4, "west", "forged")] {
        let socket = TcpSocket::new_v4()?;
        socket.bind(lab.at(from, 0))?;
        let tcp = socket.connect(lab.at(2, 15008)).await?;
        let (tls, _) = mesh_identity::tls::connect(&svid, tcp, &expect, Instant::now() + LIMIT).await?;
        let tunnel = mesh_hbone::Tunnel::handshake(tls, Arc::default(), || {}).await?;
        let mut request = ConnectRequest::to(HboneAuthority::Addr(lab.at(2, 9)));
        request.baggage = Some(HeaderValue::from_static(baggage));
        request.extra.push((headers::FORWARDED_NETWORK, HeaderValue::from_static(network)));
        let before = lab.said.0.lock().unwrap().len();
        ensure!(tunnel.open(&request).await.is_err(), "nobody listens there");
        let line = lab.told_since(before, "inbound", Reason::ConnectFailed).await?;
        ensure!(line.contains("\"src.identity\":\"spiffe://cluster.local/ns/t/sa/client\""), "{name}: {line}");
        let told =
            ["\"src.workload\":\"frontend\"", "\"src.namespace\":\"t\"", "\"src.cluster\":\"far\""].map(|f| line.contains(f));
        ensure!(told == [name == "behind"; 3], "{name}: {line}");
        ensure!(!line.contains("boss"), "the certificate says the namespace: {line}");
    }
    Ok(())
}

#[tokio::test]
async fn silence_and_garbage_on_the_hbone_port_do_not_stop_others() -> Result<()> {
    let lab = pair(vec![]).await?;
    let mut silent = Vec::new();
    for i in 0..300 {
        let mut tcp = TcpStream::connect(lab.at(2, 15008)).await?;
        if i % 3 == 0 {
            tcp.write_all(b"GET / HTTP/1.1\r\n\r\n").await?;
        } else if i % 3 == 1 {
            // The beginning of a ClientHello that never goes on.
            tcp.write_all(&[22, 3, 1, 2, 0, 1, 0, 1, 0xfc]).await?;
        }
        silent.push(tcp);
    }
    lab.echoes("client", lab.at(2, 8080)).await?;
    Ok(())
}

#[tokio::test]
async fn the_pod_drains_and_tells_its_peers() -> Result<()> {
    let lab = pair(vec![]).await?;
    let mut client = lab.echoes("client", lab.at(2, 8080)).await?;
    lab.drain.start(DrainMode::Graceful { deadline: LIMIT });
    // What is there goes on; what is new finds nobody.
    let deadline = Instant::now() + LIMIT;
    while TcpStream::connect(lab.at(2, 15008)).await.is_ok() {
        ensure!(Instant::now() < deadline, "the listener stays open");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    echo_once(&mut client).await?;
    drop(client);
    timeout(LIMIT, lab.drain.finished()).await?;
    Ok(())
}

/// The old agent is asked as often as is wanted on one connection, is done when it is said to be, and hears of a successor that is gone.
#[tokio::test]
async fn the_old_agent_is_asked_again_waited_for_and_told_to_stay() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let path = dir.path().join("n.handover");
    let (asks, mut asked) = mpsc::channel(1);
    let (released, is_released) = tokio::sync::oneshot::channel();
    handover::serve(&path, asks, released)?;
    let find = |path: std::path::PathBuf| async move {
        tokio::task::spawn_blocking(move || Predecessor::find(&path)).await??.context("the old agent is there")
    };
    let answer_list = async |asked: &mut mpsc::Receiver<Ask>| match timeout(LIMIT, asked.recv()).await? {
        Some(Ask::Listeners(reply)) => {
            let _ = reply.send(Vec::new());
            Ok(())
        }
        other => Err(anyhow::anyhow!("{other:?}")),
    };
    let found = tokio::spawn(find(path.clone()));
    answer_list(&mut asked).await?;
    let first = Arc::new(found.await??.0);
    for _ in 0..2 {
        let again = tokio::task::spawn_blocking({
            let first = Arc::clone(&first);
            move || first.pods()
        });
        answer_list(&mut asked).await?;
        ensure!(again.await??.is_some_and(|pods| pods.is_empty()));
    }
    drop(first);
    ensure!(matches!(timeout(LIMIT, asked.recv()).await?, Some(Ask::Stay)), "it does not hear that its successor is gone");

    let found = tokio::spawn(find(path));
    answer_list(&mut asked).await?;
    let second = found.await??.0;
    let release = tokio::task::spawn_blocking(move || second.release());
    let Some(Ask::Release(done)) = timeout(LIMIT, asked.recv()).await? else { bail!("it is not told") };
    tokio::time::sleep(Duration::from_millis(100)).await;
    ensure!(!release.is_finished(), "the successor goes on before the old agent has stopped");
    let _ = done.send(());
    timeout(LIMIT, release).await???;
    timeout(LIMIT, is_released).await??;
    Ok(())
}

/// What a start that failed was given is gone, so `inherited` counts for nothing here: neither that pod's sockets nor those of a
/// pod that was enrolled after the question hold the upgrade up.
#[tokio::test]
async fn a_pod_the_old_agent_enrols_meanwhile_is_taken_over_too() -> Result<()> {
    let mut lab = Lab::start(|ip| vec![up(workload("early", ip(1)))]).await?;
    let path = lab.dir.path().join("n.handover");
    let (released, is_released) = tokio::sync::oneshot::channel();
    handover::serve(&path, lab.asks.clone(), released)?;
    let (predecessor, inherited) =
        tokio::task::spawn_blocking(move || Predecessor::find(&path)).await??.context("the old agent is there")?;
    ensure!(inherited.len() == 1, "{inherited:?}");
    drop(inherited);
    lab.change(vec![up(workload("late", Lab::address(lab.net, 2)))]).await?;
    let deadline = Instant::now() + LIMIT;
    while lab.pod("late").is_err() {
        ensure!(Instant::now() < deadline, "the old agent does not serve it");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }

    let (pods, readiness, predecessor) = (PodTable::default(), Readiness::new(), Arc::new(predecessor));
    let (drain, watch) = drain::channel();
    let (alone, is_alone) = tokio::sync::watch::channel(false);
    let supervisor = PodSupervisor::new(Arc::clone(&lab.shared), readiness.clone(), pods.clone(), None, Inherited::new())
        .after(Arc::clone(&predecessor), is_alone);
    let (_asks, successor) = mpsc::channel(1);
    tokio::spawn(supervisor.run(watch, readiness.pending("mesh"), successor));
    timeout(LIMIT, readiness.ready()).await.with_context(|| format!("the new agent: {:?}", pods.list()))?;
    ensure!(pods.list().iter().filter(|(_, state)| matches!(state, PodState::Up { .. })).count() == 2, "{:?}", pods.list());

    tokio::task::spawn_blocking(move || predecessor.release()).await??;
    timeout(LIMIT, is_released).await??;
    alone.send_replace(true);
    // The old agent goes; its sockets stay, with the new one.
    lab.drain.start(DrainMode::Immediate);
    timeout(LIMIT, lab.drain.finished()).await?;
    for host in [1, 2] {
        timeout(LIMIT, TcpStream::connect(lab.at(host, 15008))).await??;
    }
    drain.start(DrainMode::Immediate);
    timeout(LIMIT, drain.finished()).await?;
    Ok(())
}

#[tokio::test]
async fn who_a_pod_was_that_could_never_be_served_is_forgotten_with_it() -> Result<()> {
    let mut lab = Lab::start(|_| Vec::new()).await?;
    let _taken = std::net::TcpListener::bind(lab.at(1, 15008))?;
    let stuck = workload("stuck", Lab::address(lab.net, 1));
    let (identity, uid) = (stuck.identity().context("an identity")?, Arc::clone(&stuck.uid));
    lab.change(vec![up(stuck)]).await?;
    let is_known = |lab: &Lab| lab.shared.svids.find(&identity).is_some();
    let is_pending = |lab: &Lab| lab.pods.list().iter().any(|(_, state)| matches!(state, PodState::Pending { .. }));
    let deadline = Instant::now() + LIMIT;
    while !(is_known(&lab) && is_pending(&lab)) {
        ensure!(Instant::now() < deadline, "not tried: {:?}, certificate {}", lab.pods.list(), is_known(&lab));
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    lab.change(vec![Change::WorkloadGone(uid)]).await?;
    while is_known(&lab) {
        ensure!(Instant::now() < deadline, "its certificate is renewed for ever");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    Ok(())
}

#[tokio::test]
async fn a_new_policy_cuts_what_a_draining_agent_carries() -> Result<()> {
    let mut lab = pair(vec![]).await?;
    let mut client = lab.echoes("client", lab.at(2, 8080)).await?;
    lab.drain.start(DrainMode::Graceful { deadline: LIMIT * 4 });
    let deadline = Instant::now() + LIMIT;
    while TcpStream::connect(lab.at(2, 15008)).await.is_ok() {
        ensure!(Instant::now() < deadline, "the listener stays open");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    echo_once(&mut client).await?;
    lab.change(vec![Change::Policy(Arc::new(policy("late", Scope::Namespace, Action::Deny, CLIENT)))]).await?;
    ensure!(is_cut(client).await?);
    let line = lab.told("inbound", Reason::Revoked).await?;
    ensure!(line.contains("t/late"), "{line}");
    Ok(())
}

#[tokio::test]
async fn the_task_of_a_connection_is_small() -> Result<()> {
    let lab = pair(vec![]).await?;
    let pod = lab.pod("client")?;
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
    let _client = TcpStream::connect(listener.local_addr()?).await?;
    let (tcp, peer) = listener.accept().await?;
    let size = size_of_val(&outbound::serve_conn(pod, Accepted { tcp, peer, original_dst: lab.at(2, 8080) }));
    // Ten thousand idle connections are ten thousand of these.
    ensure!(size <= 1536, "{size} bytes");
    Ok(())
}
