//! Endpoints on other networks: in a tunnel within the one to their gateway.
use super::hbone::{WEB, leading, meshed};
use super::*;
use mesh_model::workload::{GatewayDestination, GatewayRef};
use std::net::IpAddr;

const GATEWAY: &str = "spiffe://cluster.local/ns/shop/sa/east";

fn by_address(ip: IpAddr) -> GatewayRef {
    GatewayRef { destination: GatewayDestination::Address("west".into(), ip), hbone_port: 15008 }
}
/// A gateway's workload: on the network it leads to.
fn gateway(name: &str, ip: IpAddr) -> Workload {
    let mut w = Workload::new(&uid(name), name, "shop");
    (w.ips, w.network, w.protocol, w.service_account) = (vec![ip], "west".into(), Protocol::Hbone, "east".into());
    w
}
/// Somebody of the service behind it, known to be `web`.
fn far(name: &str, ip: &str, through: &GatewayRef) -> Workload {
    let mut w = meshed(name, SocketAddr::new(ip.parse().unwrap(), 8080));
    (w.network, w.network_gateway) = ("west".into(), Some(Box::new(through.clone())));
    w
}
fn shape(cluster: &Cluster) -> Vec<(String, u32)> {
    let members = cluster.members.load();
    let mut all: Vec<_> = members.hosts.iter().map(|h| (format!("{} {}", h.addr(), h.workload().uid), h.weight)).collect();
    all.sort();
    all
}

#[tokio::test]
async fn a_tunnel_in_a_tunnel_reaches_whom_the_gateway_leads_to() {
    let mut world = World::new();
    // One place for the endpoint and its agent: the gateway hands the inner tunnel to its 15008.
    let server = Server::open().await;
    let behind = leading(&world, WEB, None, Some(server.addr)).await;
    let entrance = leading(&world, GATEWAY, None, Some(SocketAddr::new(behind.ip, 15008))).await;
    let through = by_address(entrance.ip);
    world.put(gateway("gw", entrance.ip));
    world.put(far("a", "10.9.0.1", &through));
    let cluster = world.cluster();
    let host = pick(&cluster);
    assert_eq!((host.is_hbone(), host.identity().map(ToString::to_string).as_deref()), (true, Some(WEB)));
    for http2 in [false, true] {
        for _ in 0..3 {
            let (status, _) = fetch(&cluster, http2).await.unwrap();
            assert_eq!(status, StatusCode::OK);
            settle().await;
        }
    }
    // An inner tunnel for each connection, all in one outer tunnel.
    assert_eq!((server.connections(), behind.tunnels.load(SeqCst), entrance.tunnels.load(SeqCst)), (2, 2, 1));
    for at in [&entrance, &behind] {
        for (authority, headers) in at.connects.lock().iter() {
            assert_eq!(authority, "web.shop.svc.cluster.local:80");
            assert_eq!(
                (&headers["x-istio-source"], &headers["x-forwarded-network"]),
                (&"waypoint".parse().unwrap(), &"".parse().unwrap())
            );
        }
    }
}

#[tokio::test]
async fn neither_another_gateway_nor_another_endpoint_is_believed() {
    for (of_gateway, of_endpoint) in [(GATEWAY, "spiffe://cluster.local/ns/shop/sa/other"), (WEB, WEB)] {
        let mut world = World::new();
        let server = Server::open().await;
        let behind = leading(&world, of_endpoint, None, Some(server.addr)).await;
        let entrance = leading(&world, of_gateway, None, Some(SocketAddr::new(behind.ip, 15008))).await;
        world.put(gateway("gw", entrance.ip));
        world.put(far("a", "10.9.0.1", &by_address(entrance.ip)));
        let error = fetch(&world.cluster(), false).await.unwrap_err();
        assert_eq!(error.failure, Failure::Connect);
        assert!(error.detail.contains("identity_mismatch"), "{error}");
        assert_eq!((server.connections(), behind.connects.lock().len()), (0, 0));
    }
}

#[tokio::test]
async fn those_of_a_locality_are_one_endpoint_per_gateway_with_all_their_weight() {
    let mut world = World::new();
    let key = ServiceKey::new("shop", "gw.shop.svc.cluster.local");
    let mut service = Service::new("gw", "shop", "gw.shop.svc.cluster.local");
    service.ports = vec![ServicePort { port: 15008, target: 0, protocol: AppProtocol::Tcp }];
    world.apply(vec![Change::Service(Arc::new(service))]);
    for (name, ip) in [("gw-0", "172.16.0.1"), ("gw-1", "172.16.0.2")] {
        let mut w = gateway(name, ip.parse().unwrap());
        w.services.insert(key.clone(), [(15008, 15108)].into());
        world.put(w);
    }
    let through = GatewayRef { destination: GatewayDestination::Service(key), hbone_port: 15008 };
    world.endpoint("here", "10.1.0.1:8080".parse().unwrap());
    for (name, ip, capacity, zone) in [("a", "10.9.0.1", 1, ""), ("b", "10.9.0.2", 3, ""), ("c", "10.9.0.3", 1, "z")] {
        let mut w = far(name, ip, &through);
        w.capacity = capacity;
        (w.locality.region, w.locality.zone) = ("r".into(), zone.into());
        world.put(w);
    }
    let here = || ("10.1.0.1:8080 c//Pod/shop/here".to_owned(), 2);
    let at = |gateway: u8, zone: &str, weight| (format!("172.16.0.{gateway}:15108 SplitHorizon/west/r{zone}"), weight);
    assert_eq!(shape(&world.cluster()), [here(), at(1, "", 4), at(1, "/z", 1), at(2, "", 4), at(2, "/z", 1)]);

    // A gateway goes, and comes back unhealthy: the other takes all, and endpoints that stay keep their state.
    let before = world.cluster();
    world.remove("gw-0");
    let after = world.cluster();
    assert_eq!(shape(&after), [("10.1.0.1:8080 c//Pod/shop/here".to_owned(), 1), at(2, "", 4), at(2, "/z", 1)]);
    let state = |c: &Cluster| c.hosts().iter().find(|h| h.addr().ip().to_string() == "172.16.0.2").map(Arc::clone).unwrap();
    assert!(state(&before).is_same(&state(&after)));
    // Without any the endpoints of our own network serve alone; without those nothing does, and it is said why.
    world.remove("gw-1");
    assert_eq!(shape(&world.cluster()).len(), 1);
    world.remove("here");
    let none = pick_with(&world.cluster(), 0).unwrap_err();
    assert_eq!(none.failure, Failure::NoHealthy);
    assert_eq!(none.detail, "no_gateway: no healthy endpoint of shop/gw.shop.svc.cluster.local:15008");
}
