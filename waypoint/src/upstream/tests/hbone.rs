//! Endpoints in the mesh: through their node agent, which proves to be theirs.
use super::*;
use http::HeaderMap;
use mesh_hbone::relay::{Timeouts, relay};
use mesh_model::{HboneAuthority, Reason, Refusal};
use mesh_runtime::drain;
use std::net::{IpAddr, Ipv4Addr};
use std::sync::atomic::AtomicU8;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

/// A node agent on an address of its own; delivers to servers on the same address.
pub(super) struct Agent {
    pub ip: IpAddr,
    /// Tunnels accepted, and the CONNECTs in them.
    pub tunnels: Arc<AtomicUsize>,
    pub connects: Arc<Mutex<Vec<(String, HeaderMap)>>>,
    task: tokio::task::JoinHandle<()>,
    _drain: drain::Drain,
}
impl Drop for Agent {
    fn drop(&mut self) {
        self.task.abort();
    }
}
async fn agent(world: &World, id: &str, refuse: Option<Reason>) -> Agent {
    leading(world, id, refuse, None).await
}
/// The same, which also delivers what asks for a name, to `named`.
pub(super) async fn leading(world: &World, id: &str, refuse: Option<Reason>, named: Option<SocketAddr>) -> Agent {
    static NEXT: AtomicU8 = AtomicU8::new(1);
    // Port 15008 is the agents'; addresses of this process's own.
    let ip = IpAddr::V4(Ipv4Addr::new(127, 77, std::process::id() as u8, NEXT.fetch_add(1, SeqCst)));
    let listener = TcpListener::bind((ip, 15008)).await.unwrap();
    let svid = world.svids.handle(&id.parse().unwrap()).fetch().await.unwrap();
    let (tunnels, connects) = (Arc::<AtomicUsize>::default(), Arc::<Mutex<Vec<_>>>::default());
    let (drain, watch) = drain::channel();
    let (t, c) = (Arc::clone(&tunnels), Arc::clone(&connects));
    let task = tokio::spawn(async move {
        loop {
            let (tcp, _) = listener.accept().await.unwrap();
            let deadline = Instant::now() + Duration::from_secs(5);
            // A client that does not like our certificate goes away.
            let Ok((tls, peer)) = mesh_identity::tls::accept(&svid, tcp, deadline.into()).await else { continue };
            assert_eq!(peer.id, own_id());
            t.fetch_add(1, SeqCst);
            let c = Arc::clone(&c);
            let handler = move |incoming: mesh_hbone::Incoming| {
                c.lock().push((incoming.authority().to_owned(), incoming.headers().clone()));
                async move {
                    if let Some(reason) = refuse {
                        return incoming.refuse(&Refusal::new(reason, "test"));
                    }
                    let to = match HboneAuthority::parse(incoming.authority()) {
                        Some(HboneAuthority::Addr(to)) => to,
                        Some(HboneAuthority::Name { .. }) => named.unwrap(),
                        None => return,
                    };
                    let app = TcpStream::connect(to).await.unwrap();
                    let stream = incoming.accept([]).unwrap();
                    relay(stream, app, (), std::future::pending(), Timeouts::default()).await;
                }
            };
            tokio::spawn(mesh_hbone::serve(tls, Arc::new(mesh_hbone::Settings::default()), handler, watch.clone()));
        }
    });
    Agent { ip, tunnels, connects, task, _drain: drain }
}
use std::time::Instant;

pub(super) const WEB: &str = "spiffe://cluster.local/ns/shop/sa/web";

pub(super) fn meshed(name: &str, at: SocketAddr) -> Workload {
    let mut w = pod(name, at);
    w.protocol = Protocol::Hbone;
    w
}

#[tokio::test]
async fn requests_go_through_the_endpoints_agent() {
    let mut world = World::new();
    let agent = agent(&world, WEB, None).await;
    let server = Server::open_on(agent.ip).await;
    world.put(meshed("a", server.addr));
    let mut me = Workload::new(&uid("waypoint"), "waypoint", "shop");
    (me.workload_name, me.cluster) = ("waypoint".into(), "c".into());
    world.put(me);
    world.upstreams.collect(&world.snap);
    let cluster = world.cluster();
    assert_eq!(pick(&cluster).identity().map(ToString::to_string).as_deref(), Some(WEB));
    for http2 in [false, true] {
        for _ in 0..3 {
            let (_, body) = fetch(&cluster, http2).await.unwrap();
            assert_eq!(&body[..], format!("/hello web.shop HTTP/{}", if http2 { "2.0" } else { "1.1" }).as_bytes());
            settle().await;
        }
    }
    assert_eq!((server.connections(), server.requests(), agent.tunnels.load(SeqCst)), (2, 6, 1));
    let connects = agent.connects.lock().clone();
    assert_eq!(connects.len(), 2, "one stream per kind of connection");
    for (authority, headers) in &connects {
        assert_eq!(authority, &server.addr.to_string());
        assert_eq!(headers["x-istio-source"], "waypoint");
        let baggage = headers["baggage"].to_str().unwrap();
        assert!(
            baggage.starts_with("k8s.cluster.name=c,k8s.namespace.name=shop,k8s.") && baggage.contains("=waypoint"),
            "{baggage}"
        );
        assert!(!headers.contains_key("forwarded"), "a pooled connection is nobody's in particular");
        assert!(headers.contains_key("traceparent"));
    }
    assert_eq!(world.upstreams.tunnels()[0].tunnels, 1);
}

#[tokio::test]
async fn a_raw_stream_tells_the_client_and_carries_bytes() {
    let mut world = World::new();
    let agent = agent(&world, WEB, None).await;
    let listener = TcpListener::bind((agent.ip, 0)).await.unwrap();
    world.put(meshed("a", listener.local_addr().unwrap()));
    tokio::spawn(async move {
        let (mut tcp, _) = listener.accept().await.unwrap();
        // The server speaks first.
        tcp.write_all(b"hello ").await.unwrap();
        let (mut r, mut w) = tcp.split();
        tokio::io::copy(&mut r, &mut w).await.unwrap();
    });
    let cluster = world.cluster();
    let client: SocketAddr = "10.1.2.3:4567".parse().unwrap();
    let Carrier::Straight(stream @ Stream::Hbone(..)) = connect(&cluster, &pick(&cluster), Some(client), None).await.unwrap()
    else {
        panic!("not through a tunnel");
    };
    let mut io = stream.into_io();
    io.write_all(b"there").await.unwrap();
    let mut back = [0; 11];
    io.read_exact(&mut back).await.unwrap();
    assert_eq!(&back, b"hello there");
    let (_, headers) = agent.connects.lock()[0].clone();
    assert_eq!(headers["forwarded"], "for=\"10.1.2.3:4567\";host=web.shop.svc.cluster.local");
}

#[tokio::test]
async fn another_identity_gets_not_a_byte() {
    let mut world = World::new();
    let agent = agent(&world, "spiffe://cluster.local/ns/shop/sa/impostor", None).await;
    let server = Server::open_on(agent.ip).await;
    world.put(meshed("a", server.addr));
    for http2 in [false, true] {
        let error = fetch(&world.cluster(), http2).await.unwrap_err();
        assert_eq!(error.failure, Failure::Connect);
        assert!(error.detail.contains("identity_mismatch"), "{error}");
    }
    assert_eq!((server.connections(), agent.connects.lock().len()), (0, 0));
}

#[tokio::test]
async fn an_agent_that_refuses_is_a_failed_connection() {
    let mut world = World::new();
    let agent = agent(&world, WEB, Some(Reason::PolicyDenied)).await;
    world.put(meshed("a", SocketAddr::new(agent.ip, 80)));
    let error = fetch(&world.cluster(), false).await.unwrap_err();
    assert_eq!(error.failure, Failure::Connect);
    assert!(error.detail.contains("policy_denied"), "{error}");
    assert_eq!(world.upstreams.clusters()[0].counts.connections, 0);
}

#[tokio::test]
async fn an_endpoint_that_changed_its_identity_is_another_endpoint() {
    let mut world = World::new();
    let agent = agent(&world, WEB, None).await;
    let server = Server::open_on(agent.ip).await;
    world.put(meshed("a", server.addr));
    let before = world.cluster();
    fetch(&before, false).await.unwrap();
    settle().await;
    let mut other = meshed("a", server.addr);
    other.service_account = "other".into();
    world.put(other);
    let after = world.cluster();
    assert!(!pick(&before).is_same(&pick(&after)));
    assert_eq!(fetch(&after, false).await.unwrap_err().failure, Failure::Connect);
    server.until(|s| s.live() == 0).await;
}
