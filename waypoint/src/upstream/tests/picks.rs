//! Which endpoints a cluster has and chooses, and how traffic changes that. Time stands still where it matters.
use super::*;
use mesh_model::l7::destination::{Balance, HashAlgorithm, HashKey, LocalityPolicy, OutlierPolicy, Subset, Warmup};
use mesh_model::labels::Labels;
use mesh_model::service::{LbMode, LbScope};
use mesh_model::workload::{Health, Locality};
use std::collections::BTreeSet;

fn at(n: u8) -> SocketAddr {
    SocketAddr::from(([10, 0, 0, n], 8080))
}
fn name(host: &Host) -> String {
    host.workload().name.to_string()
}
fn seen(cluster: &Cluster) -> BTreeSet<String> {
    (0..200).filter_map(|d| pick_with(cluster, mesh_model::lb::redraw(3, d)).ok()).map(|h| name(&h)).collect()
}
fn set(names: &[&str]) -> BTreeSet<String> {
    names.iter().map(ToString::to_string).collect()
}
fn named(cluster: &Cluster, wanted: &str) -> Arc<Host> {
    cluster.hosts().iter().find(|h| name(h) == wanted).cloned().unwrap()
}
fn world(names: &[&str]) -> World {
    let mut world = World::new();
    for (n, one) in names.iter().enumerate() {
        world.endpoint(one, at(n as u8 + 1));
    }
    world
}
fn outlier(consecutive_5xx: u32, max_ejection_percent: u32) -> TrafficPolicy {
    let outlier = OutlierPolicy { consecutive_5xx, max_ejection_percent, ..OutlierPolicy::default() };
    TrafficPolicy { outlier: Some(outlier), ..TrafficPolicy::default() }
}

#[tokio::test(start_paused = true)]
async fn an_endpoint_that_fails_is_ejected_and_comes_back() {
    let mut world = world(&["a", "b", "c"]);
    world.policy(outlier(5, 50));
    let cluster = world.cluster();
    let fail = |which: &str, times: usize| {
        for _ in 0..times {
            cluster.report(&named(&cluster, which), Observed::Status(500));
        }
    };
    fail("a", 4);
    cluster.report(&named(&cluster, "a"), Observed::Status(200));
    fail("a", 4);
    assert_eq!(seen(&cluster), set(&["a", "b", "c"]));
    fail("a", 1);
    assert_eq!(seen(&cluster), set(&["b", "c"]));
    // Half of three is one.
    fail("b", 5);
    assert_eq!(seen(&cluster), set(&["b", "c"]));
    let view = &world.upstreams.clusters()[0];
    assert_eq!((view.counts.ejections, view.counts.ejection_overflows), (1, 1));
    assert!(view.hosts.iter().any(|h| h.ejected && h.ejections == 1));
    // Health survives a change of the mesh.
    world.endpoint("d", at(9));
    let newer = world.cluster();
    assert_eq!(seen(&newer), set(&["b", "c", "d"]));
    // 30 s, looked at every 10 s.
    tokio::time::sleep(Duration::from_secs(29)).await;
    assert!(!seen(&newer).contains("a"));
    tokio::time::sleep(Duration::from_secs(2)).await;
    assert_eq!(seen(&newer), set(&["a", "b", "c", "d"]));
    // Our own failures count as well, but not what the endpoint has nothing to do with.
    for _ in 0..9 {
        newer.report(&named(&newer, "d"), Observed::Failed(Failure::Overflow));
        newer.report(&named(&newer, "d"), Observed::Failed(Failure::ClientGone));
    }
    assert!(seen(&newer).contains("d"));
    for failure in [Failure::Connect, Failure::ConnectTimeout, Failure::Reset, Failure::Timeout, Failure::Refused] {
        newer.report(&named(&newer, "d"), Observed::Failed(failure));
    }
    assert!(!seen(&newer).contains("d"));
    // Without outlier detection nobody is ejected.
    world.policy(TrafficPolicy::default());
    assert_eq!(seen(&world.cluster()), set(&["a", "b", "c", "d"]));
}

#[tokio::test(start_paused = true)]
async fn all_ejected_is_no_healthy_upstream_unless_it_panics() {
    let mut world = world(&["a"]);
    world.policy(outlier(1, 100));
    let cluster = world.cluster();
    cluster.report(&pick(&cluster), Observed::Status(503));
    assert_eq!(pick_with(&cluster, 1).unwrap_err().failure, Failure::NoHealthy);
    let mut panicking = outlier(1, 100);
    panicking.outlier.as_mut().unwrap().min_health_percent = 50;
    world.policy(panicking);
    assert_eq!(seen(&world.cluster()), set(&["a"]));
}

/// Ejects an endpoint on another thread, which must not wait for anything held here.
fn eject_beside(cluster: &Arc<Cluster>, which: &str) {
    let (runtime, cluster, host) = (tokio::runtime::Handle::current(), Arc::clone(cluster), named(cluster, which));
    let (tell, told) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let _in = runtime.enter();
        cluster.report(&host, Observed::Status(500));
        tell.send(()).unwrap();
    });
    told.recv_timeout(PATIENCE).expect("it waits for the table");
}

#[tokio::test]
async fn an_ejection_does_not_wait_for_a_table_and_is_in_the_next() {
    let mut world = world(&["a", "b", "c", "d"]);
    world.policy(outlier(1, 100));
    let cluster = world.cluster();
    // As while other addresses are taken over.
    let (making, table) = (cluster.state.making.lock(), cluster.planning.lock());
    eject_beside(&cluster, "a");
    assert_eq!(seen(&cluster), set(&["a", "b", "c", "d"]), "by the table before");
    drop((table, making));
    // As whoever made that table does.
    cluster.catch_up();
    assert_eq!(seen(&cluster), set(&["b", "c", "d"]));
}

#[tokio::test]
async fn an_ejection_while_a_version_is_made_is_in_it() {
    let names = ["a", "b", "c", "d", "e", "f", "g", "h"];
    let mut world = world(&names);
    let policy = |n: u32| {
        let pool = PoolLimits { max_connections: 100 + n, ..PoolLimits::default() };
        TrafficPolicy { pool, ..outlier(1, 100) }
    };
    world.policy(policy(0));
    for (n, which) in (1..).zip(&names[1..]) {
        let before = world.cluster();
        world.policy(policy(n));
        let (runtime, host) = (tokio::runtime::Handle::current(), named(&before, which));
        let newer = std::thread::scope(|scope| {
            scope.spawn(|| {
                let _in = runtime.enter();
                before.report(&host, Observed::Status(500));
            });
            world.cluster()
        });
        assert!(!Arc::ptr_eq(&before, &newer) && !seen(&newer).contains(*which), "{which}");
    }
}

#[tokio::test(start_paused = true)]
async fn an_ejection_moves_what_a_ring_had() {
    let mut world = world(&["a", "b", "c"]);
    let algorithm = HashAlgorithm::Maglev(65_537);
    let mut policy = outlier(1, 100);
    policy.balance = Balance::Hash { algorithm, key: HashKey::SourceIp };
    world.policy(policy);
    let cluster = world.cluster();
    let by = |hash| {
        name(
            &cluster
                .pick(&PickContext { draw: 1, hash: Some(hash), session: None, tried: &[], before: &[], dst: None, name: None })
                .unwrap(),
        )
    };
    let first = by(42);
    assert!((0..50).all(|_| by(42) == first));
    cluster.report(&named(&cluster, &first), Observed::Status(500));
    // The table is made on another thread.
    for _ in 0..500 {
        if by(42) != first {
            return;
        }
        tokio::task::yield_now().await;
        std::thread::sleep(Duration::from_millis(2));
    }
    panic!("still {first}");
}

#[tokio::test]
async fn a_request_never_makes_a_table() {
    let mut world = world(&["a"]);
    let balance = Balance::Hash { algorithm: HashAlgorithm::Maglev(65_537), key: HashKey::SourceIp };
    world.policy(TrafficPolicy { balance: balance.clone(), ..TrafficPolicy::default() });
    let asked = async |world: &World| {
        world.upstreams.cluster(&Arc::new(world.snap.clone()), &cluster_key(), Role::Waypoint).await.unwrap()
    };
    let first = asked(&world).await;
    assert_eq!(seen(&first), set(&["a"]), "the first of all waits for its table");
    world.endpoint("b", at(2));
    assert!(Arc::ptr_eq(&first, &asked(&world).await), "what there is serves until the next table is made");
    // Though nobody collects: who did may have been here before there was anything to bring up to date.
    let made = async |world: &World, is_it: fn(&Cluster) -> bool| {
        let wait = async {
            while !is_it(&*asked(world).await) {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(20), wait).await.expect("the next table");
    };
    made(&world, |cluster| cluster.hosts().len() == 2).await;
    // What needs no table is as new as the request.
    world.policy(TrafficPolicy::default());
    let plain = asked(&world).await;
    assert_eq!((plain.policy().balance.clone(), seen(&plain)), (Balance::default(), set(&["a", "b"])));
    world.policy(TrafficPolicy { balance, ..TrafficPolicy::default() });
    assert_eq!(asked(&world).await.policy().balance, Balance::default(), "until its table is made");
    made(&world, |cluster| cluster.policy().balance != Balance::default()).await;
}

#[tokio::test]
async fn requests_that_come_first_together_have_one_table_made() {
    let mut world = world(&["a"]);
    let balance = Balance::Hash { algorithm: HashAlgorithm::Maglev(65_537), key: HashKey::SourceIp };
    world.policy(TrafficPolicy { balance, ..TrafficPolicy::default() });
    let (snap, key) = (Arc::new(world.snap.clone()), cluster_key());
    let mut all =
        futures_util::future::join_all((0..32).map(|_| world.upstreams.cluster(&snap, &key, Role::Waypoint))).await.into_iter();
    let first = all.next().unwrap().unwrap();
    assert!(all.all(|other| Arc::ptr_eq(&first, &other.unwrap())));
}

#[tokio::test]
async fn unhealthy_and_unknown_endpoints_are_left_out() {
    let mut world = world(&["a", "b"]);
    let mut sick = pod("sick", at(7));
    sick.health = Health::Unhealthy;
    world.put(sick);
    let mut nameless = pod("nameless", at(8));
    nameless.ips.clear();
    world.put(nameless);
    let mut far = pod("far", at(9));
    far.network = "elsewhere".into();
    world.put(far);
    assert_eq!(seen(&world.cluster()), set(&["a", "b"]));
}

#[tokio::test]
async fn subsets_are_chosen_by_labels_and_have_policies_of_their_own() {
    let mut world = World::new();
    let labels = |version: &str| Labels::of(vec![("version".into(), version.into())]);
    for (n, (one, version)) in [("a", "v1"), ("b", "v2"), ("c", "v2")].into_iter().enumerate() {
        let mut w = pod(one, at(n as u8 + 1));
        w.labels = labels(version);
        world.put(w);
    }
    let own = Arc::new(TrafficPolicy { balance: Balance::RoundRobin, ..TrafficPolicy::default() });
    let subset = |version| Subset { labels: labels(version), policy: Arc::clone(&own), ports: BTreeMap::new() };
    let destination = Destination {
        key: key(),
        policy: Arc::default(),
        ports: BTreeMap::new(),
        subsets: [("v1".into(), subset("v1")), ("v2".into(), subset("v2"))].into(),
        origins: Vec::new(),
        broken: None,
    };
    world.apply(vec![Change::Destination(Arc::new(destination.clone()))]);
    let of = |world: &World, name: &str| {
        let key = ClusterKey { subset: Some(name.into()), ..cluster_key() };
        world.upstreams.renew(&world.snap, &key, Role::Waypoint).unwrap()
    };
    assert_eq!(seen(&of(&world, "v1")), set(&["a"]));
    let v2 = of(&world, "v2");
    assert_eq!((v2.name(), seen(&v2)), ("outbound|80|v2|web.shop.svc.cluster.local", set(&["b", "c"])));
    assert_eq!(v2.policy().balance, Balance::RoundRobin);
    let turns: Vec<_> = (0..4).map(|_| name(&pick_with(&v2, 1).unwrap())).collect();
    assert!(turns[0] != turns[1] && turns[0] == turns[2] && turns[1] == turns[3], "{turns:?}");
    // One that nobody declared is no cluster.
    let undeclared = ClusterKey { subset: Some("v3".into()), ..cluster_key() };
    assert_eq!(world.upstreams.renew(&world.snap, &undeclared, Role::Waypoint).unwrap_err().failure, Failure::NoCluster);
    assert_eq!(seen(&world.cluster()), set(&["a", "b", "c"]));
    // Forgotten with what they belonged to.
    world.policy(TrafficPolicy::default());
    world.upstreams.collect(&world.snap);
    let names: Vec<_> = world.upstreams.clusters().into_iter().map(|c| c.name).collect();
    assert_eq!(names, ["outbound|80||web.shop.svc.cluster.local"]);
    // What cannot be understood is refused.
    let broken = Destination { broken: Some("no such field".into()), ..destination };
    world.apply(vec![Change::Destination(Arc::new(broken))]);
    let error = world.upstreams.renew(&world.snap, &cluster_key(), Role::Waypoint).unwrap_err();
    assert_eq!((error.failure, &*error.detail), (Failure::NoCluster, "destination_unusable: no such field"));
    world.apply(vec![Change::DestinationGone(key()), Change::ServiceGone(key())]);
    world.upstreams.collect(&world.snap);
    assert!(world.upstreams.clusters().is_empty());
    assert_eq!(world.upstreams.renew(&world.snap, &cluster_key(), Role::Waypoint).unwrap_err().failure, Failure::NoCluster);
}

#[tokio::test]
async fn passthrough_goes_where_the_client_wanted() {
    let mut world = world(&["a"]);
    let beside = SocketAddr::new(at(1).ip(), 9090);
    world.endpoint("beside", beside);
    world.policy(TrafficPolicy { balance: Balance::Passthrough, ..TrafficPolicy::default() });
    let cluster = world.cluster();
    let to = |dst: Option<SocketAddr>| {
        cluster.pick(&PickContext { draw: 1, hash: None, session: None, tried: &[], before: &[], dst, name: None })
    };
    assert_eq!([at(1), beside].map(|dst| name(&to(Some(dst)).unwrap())), ["a", "beside"]);
    // Another port of a known endpoint, and a stranger: the same one every time.
    let other = SocketAddr::new(at(1).ip(), 9999);
    assert_eq!((name(&to(Some(other)).unwrap()), to(Some(other)).unwrap().addr()), ("a".to_owned(), other));
    let stranger: SocketAddr = "192.0.2.7:443".parse().unwrap();
    let host = to(Some(stranger)).unwrap();
    assert_eq!((host.addr(), host.is_hbone(), host.identity()), (stranger, false, None));
    assert!(host.is_same(&to(Some(stranger)).unwrap()));
    assert_eq!(to(None).unwrap_err().failure, Failure::NoHealthy);
}

#[tokio::test(start_paused = true)]
async fn localities_are_preferred_as_policies_say() {
    let place = |w: &mut Workload, region: &str, zone: &str| {
        w.locality = Locality { region: region.into(), zone: zone.into(), subzone: "".into() };
    };
    let mut world = World::new();
    world.apply(vec![Change::OwnLocality(Locality { region: "r1".into(), zone: "z1".into(), subzone: "".into() })]);
    for (n, (one, region, zone)) in [("near", "r1", "z1"), ("next", "r1", "z2"), ("far", "r2", "z1")].into_iter().enumerate() {
        let mut w = pod(one, at(n as u8 + 1));
        place(&mut w, region, zone);
        world.put(w);
    }
    assert_eq!(seen(&world.cluster()), set(&["near", "next", "far"]), "nothing is said");
    // Outlier detection brings failover by distance with it.
    world.policy(outlier(1, 100));
    let cluster = world.cluster();
    assert_eq!(seen(&cluster), set(&["near"]));
    cluster.report(&named(&cluster, "near"), Observed::Status(500));
    assert_eq!(seen(&cluster), set(&["next"]));
    // Distribution needs none.
    let distribute = vec![("r1/*".into(), vec![("r1/z2".into(), 50), ("r2/*".into(), 50)])];
    let locality = LocalityPolicy { distribute, ..LocalityPolicy::default() };
    world.policy(TrafficPolicy { locality, ..TrafficPolicy::default() });
    assert_eq!(seen(&world.cluster()), set(&["next", "far"]));
    let locality = LocalityPolicy { disabled: true, ..LocalityPolicy::default() };
    world.policy(TrafficPolicy { locality, ..outlier(1, 100) });
    assert_eq!(seen(&world.cluster()).len(), 3, "a policy without outlier detection forgave");
    // The service's own preferences, without any policy.
    world.apply(vec![Change::DestinationGone(key())]);
    let mut service = (**world.snap.find_service(&key()).unwrap()).clone();
    service.lb.mode = LbMode::Failover;
    service.lb.scopes = vec![LbScope::Region, LbScope::Zone];
    world.apply(vec![Change::Service(Arc::new(service))]);
    assert_eq!(seen(&world.cluster()), set(&["near"]));
}

#[tokio::test(start_paused = true)]
async fn a_new_endpoint_warms_up() {
    let mut world = world(&["a"]);
    let warmup = Some(Warmup { duration: Duration::from_secs(100), minimum_percent: 10, aggression_milli: 1000 });
    world.policy(TrafficPolicy { warmup, ..TrafficPolicy::default() });
    world.cluster();
    tokio::time::sleep(Duration::from_secs(200)).await;
    world.endpoint("b", at(2));
    let cluster = world.cluster();
    let share = || (0..10_000).filter(|d| name(&pick_with(&cluster, mesh_model::lb::redraw(5, *d)).unwrap()) == "b").count();
    let young = share();
    assert!((600..1300).contains(&young), "a tenth against one: {young}");
    tokio::time::sleep(Duration::from_secs(100)).await;
    let grown = share();
    assert!((4700..5300).contains(&grown), "{grown}");
}

/// An endpoint with this name and no address.
fn without_address(name: &str, port: u16) -> Workload {
    let mut w = pod("a", SocketAddr::new([0, 0, 0, 0].into(), port));
    w.ips.clear();
    w.hostname = Some(name.into());
    w
}

#[tokio::test]
async fn a_name_is_its_addresses_once_they_are_known() {
    use mesh_model::service::IpFamilies;
    let server = Server::open().await;
    for logical_dns in [false, true] {
        let mut world = World::new();
        let mut service = Service::clone(world.snap.find_service(&key()).unwrap());
        // `localhost` has addresses of both families on most machines.
        (service.ip_families, service.logical_dns) = (IpFamilies::V4, logical_dns);
        world.apply(vec![Change::Service(Arc::new(service))]);
        world.put(without_address("localhost", server.addr.port()));
        let cluster = world.cluster();
        let first = pick(&cluster);
        assert!(first.addr().ip().is_unspecified(), "not looked up yet");
        fetch(&cluster, false).await.unwrap();
        for _ in 0..500 {
            if logical_dns || !pick(&cluster).is_same(&first) {
                break;
            }
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        let then = pick(&cluster);
        assert_eq!((then.addr(), cluster.hosts().len()), (server.addr, 1));
        assert_eq!(then.is_same(&first), logical_dns, "each address is an endpoint of its own, or they are one together");
        // What was learned survives changes of anything else.
        world.policy(TrafficPolicy::default());
        let after = world.cluster();
        assert!(pick(&after).is_same(&then));
        fetch(&after, false).await.unwrap();
    }
}

#[tokio::test]
async fn a_name_without_addresses_is_no_endpoint() {
    let mut world = World::new();
    world.put(without_address("no such name", 1));
    let cluster = world.cluster();
    assert_eq!(fetch(&cluster, false).await.unwrap_err().failure, Failure::NoHealthy);
}

#[tokio::test]
async fn a_workload_can_be_addressed_by_itself() {
    let server = Server::open().await;
    let mut world = World::new();
    world.endpoint("a", SocketAddr::new(server.addr.ip(), 1));
    let known = Arc::clone(world.snap.find_known(&uid("a")).unwrap());
    let cluster = world.upstreams.workload(&world.snap, &known, server.addr.port());
    fetch(&cluster, false).await.unwrap();
    assert!(cluster.service().is_none());
    world.apply(vec![Change::Service(Arc::new(Service::new("x", "y", "x.y")))]);
    assert!(Arc::ptr_eq(&cluster, &world.upstreams.workload(&world.snap, &known, server.addr.port())));
    world.remove("a");
    world.upstreams.collect(&world.snap);
    assert!(world.upstreams.clusters().is_empty());
}
