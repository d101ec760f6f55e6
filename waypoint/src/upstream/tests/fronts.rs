//! Services reached through their waypoints, by who is a gateway.
use super::hbone::leading;
use super::*;
use mesh_model::Reason;
use mesh_model::l7::destination::{Roots, UpstreamTls};
use mesh_model::service::WeightedWaypoint;
use mesh_model::workload::{GatewayDestination, GatewayRef};

const WAYPOINT: &str = "spiffe://cluster.local/ns/shop/sa/wp";

/// The service, with this waypoint.
fn fronted(world: &mut World, waypoint: Option<std::net::IpAddr>) {
    let mut service = Service::clone(world.snap.find_service(&key()).unwrap());
    service.ingress_use_waypoint = true;
    let at = |ip| GatewayRef { destination: GatewayDestination::Address("".into(), ip), hbone_port: 15008 };
    service.waypoints = waypoint.map(|ip| WeightedWaypoint { waypoint: at(ip), weight: 100 }).into_iter().collect();
    service.waypoint_error = waypoint.is_none().then(|| "it is not there".into());
    world.apply(vec![Change::Service(Arc::new(service))]);
}

#[tokio::test]
async fn a_gateway_asks_the_waypoint_and_a_waypoint_the_endpoints() {
    let mut world = World::new();
    let server = Server::open().await;
    let waypoint = leading(&world, WAYPOINT, None, Some(server.addr)).await;
    let mut w = Workload::new(&uid("wp"), "wp", "shop");
    (w.ips, w.protocol, w.service_account) = (vec![waypoint.ip], Protocol::Hbone, "wp".into());
    world.put(w);
    world.endpoint("a", "10.9.0.1:8080".parse().unwrap());
    // What is said of endpoints is the waypoint's to keep: nothing here speaks TLS.
    let tls = UpstreamTls {
        sni: None,
        sans: Vec::new(),
        roots: Roots::System,
        crl: None,
        client: None,
        skip_verify: false,
        alpn: Vec::new(),
    };
    world.policy(TrafficPolicy { tls: Some(tls.into()), ..TrafficPolicy::default() });
    fronted(&mut world, Some(waypoint.ip));
    let of = |world: &World, role| world.upstreams.renew(&world.snap, &cluster_key(), role);
    let straight = of(&world, Role::Waypoint).unwrap();
    assert_eq!(pick(&straight).addr(), "10.9.0.1:8080".parse().unwrap());
    let by_waypoint = of(&world, Role::Gateway).unwrap();
    let host = pick(&by_waypoint);
    assert_eq!((host.addr(), host.identity().map(ToString::to_string)), ((waypoint.ip, 15008).into(), Some(WAYPOINT.into())));
    for http2 in [false, true] {
        assert_eq!(fetch(&by_waypoint, http2).await.unwrap().0, StatusCode::OK);
    }
    for (authority, headers) in waypoint.connects.lock().iter() {
        assert_eq!(authority, "web.shop.svc.cluster.local:80");
        assert_eq!(headers["x-istio-source"], "gateway", "no waypoint was passed yet");
    }
    let names = |world: &World| world.upstreams.clusters().into_iter().map(|c| (c.name, c.hosts.len())).collect::<Vec<_>>();
    assert_eq!(names(&world), [("outbound|80||web.shop.svc.cluster.local".into(), 1)], "a name is there once");

    // It is not there: refused, and a waypoint does not care.
    fronted(&mut world, None);
    let refused = of(&world, Role::Gateway).unwrap_err();
    assert_eq!((refused.failure, refused.reason), (Failure::NoHealthy, Some(Reason::NoWaypoint)));
    assert!(refused.detail.contains("it is not there"), "{refused}");
    of(&world, Role::Waypoint).unwrap();
    // The label goes, and with it the way and what is kept of it.
    let mut service = Service::clone(world.snap.find_service(&key()).unwrap());
    service.ingress_use_waypoint = false;
    world.apply(vec![Change::Service(Arc::new(service))]);
    world.upstreams.collect(&world.snap);
    assert!(world.upstreams.fronted.entries.load().is_empty());
    assert!(Arc::ptr_eq(&of(&world, Role::Gateway).unwrap(), &of(&world, Role::Waypoint).unwrap()));
}
