//! The stream and its faults.
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use mesh_model::authz::{Verdict, authorize};
use mesh_model::conn::InboundConn;
use mesh_model::id::SpiffeId;
use mesh_model::policy::{PolicyBody, PolicyKey};
use mesh_model::service::ServiceKey;
use mesh_proto::istio::security::{Action, Scope};
use mesh_proto::istio::workload::{Address, LoadBalancing, NetworkAddress, Service, Workload, address};
use mesh_proto::{ADDRESS_TYPE, AUTHORIZATION_TYPE, Message as _};
use mesh_sources::istiod::MissingPolicy;
use mesh_tests::istiod::{Istiod, Order};

use crate::fixture::{Fixture, PATIENCE, Wish, policy, service, until, workload};

const WEB: &str = "web.ns.svc.cluster.local";
const API: &str = "api.ns.svc.cluster.local";

fn told() -> Istiod {
    let istiod = Istiod::local().unwrap();
    istiod.workload(workload("a"));
    istiod.service(service(WEB));
    istiod.policy(&policy("deny", Scope::WorkloadSelector, Action::Deny));
    istiod
}

#[tokio::test]
async fn nothing_is_told_before_both_types_were_and_then_all_is_one_version() {
    let istiod = told();
    istiod.withhold(AUTHORIZATION_TYPE, true);
    let fixture = Fixture::over(istiod);
    until("the addresses to be acknowledged", || fixture.istiod.seen().acks == 1).await;
    assert!(!fixture.mesh.is_synced());
    assert_eq!(fixture.mesh.load().version(), 0, "half a mesh was published");
    fixture.istiod.withhold(AUTHORIZATION_TYPE, false);
    let fixture = fixture.synced().await;
    let snapshot = fixture.mesh.load_full();
    assert_eq!(snapshot.version(), 1);
    assert!(fixture.has_workload("c1//Pod/ns/a") && fixture.has_service(WEB) && fixture.has_policy("deny"));
    assert_eq!(snapshot.endpoints(&mesh_model::service::ServiceKey::new("ns", WEB)).count(), 1);
    until("both to be acknowledged", || fixture.istiod.seen().acks == 2).await;
    let seen = fixture.istiod.seen();
    assert_eq!(seen.nodes, ["ztunnel~1.1.1.1~zt.~.svc.cluster.local"; 2]);
    assert_eq!(seen.metadata["NODE_NAME"], "node-1");
    assert_eq!(seen.tokens, ["Bearer first"]);
    assert!(seen.nacks.is_empty(), "{:?}", seen.nacks);
    until("the metric to tell", || fixture.metric("culvert_xds_connected 1")).await;
}

#[tokio::test]
async fn an_empty_mesh_is_a_mesh() {
    let fixture = Fixture::over(Istiod::local().unwrap()).synced().await;
    assert_eq!(fixture.mesh.load().workloads().count(), 0);
}

#[tokio::test]
async fn changes_and_removals_are_a_version_each() {
    let fixture = Fixture::over(told()).synced().await;
    let before = fixture.mesh.load().version();
    let mut changed = workload("a");
    changed.authorization_policies = vec!["ns/deny".into()];
    fixture.istiod.workload(changed);
    until("the change", || fixture.mesh.load().find_workload("c1//Pod/ns/a").is_some_and(|w| w.policies.len() == 1)).await;
    assert_eq!(fixture.mesh.load().version(), before + 1);
    fixture.istiod.remove(ADDRESS_TYPE, &format!("ns/{WEB}"));
    until("the removal of the service", || !fixture.has_service(WEB)).await;
    fixture.istiod.remove(ADDRESS_TYPE, "c1//Pod/ns/a");
    until("the removal of the workload", || !fixture.has_workload("c1//Pod/ns/a")).await;
    fixture.istiod.remove(AUTHORIZATION_TYPE, "ns/deny");
    until("the removal of the policy", || !fixture.has_policy("deny")).await;
    assert_eq!(fixture.mesh.load().version(), before + 4);
}

#[tokio::test]
async fn a_bad_resource_is_named_and_the_rest_of_its_response_counts() {
    let fixture = Fixture::over(told()).synced().await;
    let mut bad = workload("bad");
    bad.addresses = vec![bytes::Bytes::from_static(&[1, 2, 3])];
    // Of a later istiod.
    let strange = Service {
        load_balancing: Some(LoadBalancing { mode: 99, ..LoadBalancing::default() }),
        addresses: vec![NetworkAddress { network: String::new(), address: [10, 96, 0, 9].to_vec().into(), length: None }],
        ..service("strange.ns.svc.cluster.local")
    };
    let unreadable = vec![0xff; 11];
    let mut good = workload("a");
    good.capacity = Some(7);
    let encode = |w| {
        mesh_proto::Message::encode_to_vec(&mesh_proto::istio::workload::Address {
            r#type: Some(mesh_proto::istio::workload::address::Type::Workload(w)),
        })
    };
    fixture.istiod.replace(vec![
        (ADDRESS_TYPE, "c1//Pod/ns/a".into(), encode(good)),
        (ADDRESS_TYPE, "c1//Pod/ns/bad".into(), encode(bad)),
        (
            ADDRESS_TYPE,
            "ns/strange.ns.svc.cluster.local".into(),
            Address { r#type: Some(address::Type::Service(strange)) }.encode_to_vec(),
        ),
        (ADDRESS_TYPE, "noise".into(), unreadable.clone()),
        (AUTHORIZATION_TYPE, "ns/deny".into(), unreadable),
    ]);
    until("both refusals", || fixture.istiod.seen().nacks.len() == 2).await;
    let nacks = fixture.istiod.seen().nacks;
    let (_, addresses) = nacks.iter().find(|(url, _)| url == ADDRESS_TYPE).expect("addresses refused");
    assert!(addresses.contains("c1//Pod/ns/bad: an address of 3 bytes") && addresses.contains("noise: "), "{addresses}");
    assert!(addresses.contains("ns/strange.ns.svc.cluster.local: mode 99"), "{addresses}");
    assert!(!addresses.contains("ns/a:"), "{addresses}");
    until("the good one", || fixture.mesh.load().find_workload("c1//Pod/ns/a").is_some_and(|w| w.capacity == 7)).await;
    // What cannot be used is there and refuses: were it not, calls would go past its waypoint.
    let bad = || fixture.mesh.load().find_workload("c1//Pod/ns/bad").map(|w| (w.waypoint_error.is_some(), w.identity().is_ok()));
    assert_eq!(bad(), Some((true, false)));
    let strange = ServiceKey { namespace: "ns".into(), hostname: "strange.ns.svc.cluster.local".into() };
    let refuses = fixture.mesh.load().find_service(&strange).map(|s| (s.waypoint_error.is_some(), s.vips.len()));
    assert_eq!(refuses, Some((true, 1)));
    // A policy that cannot be read denies.
    let denies = || {
        let snapshot = fixture.mesh.load_full();
        snapshot.find_policy(&PolicyKey::new("ns", "deny")).is_some_and(|p| matches!(p.body, PolicyBody::Unusable { .. }))
    };
    until("the stand-in of the policy", denies).await;
    until("four problems", || fixture.diagnostics.list().len() == 4).await;
    fixture.istiod.workload(workload("bad"));
    fixture.istiod.remove(ADDRESS_TYPE, "noise");
    fixture.istiod.remove(ADDRESS_TYPE, "ns/strange.ns.svc.cluster.local");
    fixture.istiod.policy(&policy("deny", Scope::WorkloadSelector, Action::Deny));
    until("all problems to go", || fixture.diagnostics.list().is_empty()).await;
    until("the corrected one", || bad() == Some((false, true))).await;
}

#[tokio::test]
async fn a_new_stream_resumes_from_what_is_held() {
    let fixture = Fixture::over(told()).synced().await;
    fixture.istiod.put(ADDRESS_TYPE, "noise", vec![0xff; 11]);
    until("the refusal", || fixture.istiod.seen().nacks.len() == 1).await;
    let before = fixture.istiod.seen().sent.len();
    fixture.istiod.away(true);
    fixture.istiod.remove(ADDRESS_TYPE, "c1//Pod/ns/a");
    fixture.istiod.workload(workload("b"));
    until("the loss to be told", || fixture.metric("culvert_xds_connected 0")).await;
    assert!(fixture.has_workload("c1//Pod/ns/a"), "the last good state serves");
    std::fs::write(fixture.file("token"), "second").unwrap();
    fixture.istiod.away(false);
    until("what is new", || fixture.has_workload("c1//Pod/ns/b")).await;
    until("what went meanwhile", || !fixture.has_workload("c1//Pod/ns/a")).await;
    let seen = fixture.istiod.seen();
    let (_, held) = seen.initial.iter().rfind(|(url, _)| url == ADDRESS_TYPE).unwrap();
    assert!(held.contains_key("c1//Pod/ns/a") && !held["c1//Pod/ns/a"].is_empty(), "{held:?}");
    assert_eq!(held["noise"], "", "a refused resource is asked for again");
    let mut again = seen.sent[before..].to_vec();
    again.sort();
    again.dedup();
    assert_eq!(again, ["c1//Pod/ns/b", "noise"], "only what is not held is sent");
    assert_eq!(seen.tokens.last().unwrap(), "Bearer second");
    assert!(fixture.mesh.is_synced() && fixture.has_policy("deny"));
}

#[tokio::test]
async fn another_replica_with_other_versions_changes_nothing() {
    let fixture = Fixture::over(told()).synced().await;
    let before = fixture.mesh.load().canonical_dump();
    let acks = fixture.istiod.seen().acks;
    fixture.istiod.jump_versions();
    until("all to be sent again", || fixture.istiod.seen().acks >= acks + 2).await;
    assert_eq!(fixture.mesh.load().canonical_dump(), before);
}

/// Another process, with other roots, another mesh, and no memory of the stream.
#[tokio::test]
async fn a_restarted_control_plane_is_believed_by_the_roots_of_now() {
    let mut fixture = Fixture::over(told()).synced().await;
    let port = fixture.istiod.addr().unwrap().port();
    fixture.istiod.away(true);
    fixture.istiod = {
        let listener = {
            drop(fixture.istiod);
            let begun = Instant::now();
            loop {
                match std::net::TcpListener::bind(("127.0.0.1", port)) {
                    Ok(listener) => break listener,
                    Err(e) => assert!(begun.elapsed() < PATIENCE, "the port stays taken: {e}"),
                }
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        Istiod::start(listener, &["localhost"]).unwrap()
    };
    fixture.istiod.workload(workload("c"));
    tokio::time::sleep(Duration::from_millis(200)).await;
    assert!(fixture.istiod.seen().nodes.is_empty(), "a stranger was believed");
    std::fs::write(fixture.file("root.pem"), fixture.istiod.root()).unwrap();
    until("the new mesh", || fixture.has_workload("c1//Pod/ns/c")).await;
    until("the old one to go", || !fixture.has_workload("c1//Pod/ns/a") && !fixture.has_service(WEB)).await;
}

#[tokio::test]
async fn a_control_plane_that_cannot_prove_itself_is_not_heard() {
    let fixture = Fixture::with(told(), Wish { foreign_roots: true, ..Wish::default() });
    until("the attempts to be counted", || {
        let page = fixture.registry.encode();
        page.lines().any(|line| line.starts_with("istio_xds_connection_terminations_total{reason=\"ConnectionError\"}"))
    })
    .await;
    assert!(fixture.istiod.seen().tokens.is_empty(), "the token went to a stranger");
    assert!(!fixture.mesh.is_synced());
}

#[tokio::test]
async fn a_silent_control_plane_keeps_what_there_is() {
    let istiod = told();
    istiod.stall(true);
    let fixture = Fixture::over(istiod);
    until("the subscriptions", || fixture.istiod.seen().initial.len() == 2).await;
    assert!(!fixture.mesh.is_synced());
    fixture.istiod.stall(false);
    let fixture = fixture.synced().await;
    fixture.istiod.stall(true);
    fixture.istiod.workload(workload("b"));
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert!(fixture.has_workload("c1//Pod/ns/a") && !fixture.has_workload("c1//Pod/ns/b"));
    fixture.istiod.stall(false);
    until("the change", || fixture.has_workload("c1//Pod/ns/b")).await;
}

fn bound(policy: &str) -> Workload {
    Workload { authorization_policies: vec![format!("ns/{policy}")], ..workload("a") }
}

/// What there is after an exchange: `a` to `d` became `a`, `b` and `e`, and all have an address that was another's.
fn exchanged() -> Vec<(&'static str, String, Vec<u8>)> {
    let at = |name: &str, of: &str| Workload { addresses: workload(of).addresses, ..workload(name) };
    let workloads = [at("a", "d"), at("b", "a"), at("e", "c")].map(|w| {
        let name = w.uid.clone();
        (ADDRESS_TYPE, name, Address { r#type: Some(address::Type::Workload(w)) }.encode_to_vec())
    });
    let services = [service(API), Service { addresses: Vec::new(), ..service(WEB) }].map(|s| {
        let name = format!("ns/{}", s.hostname);
        (ADDRESS_TYPE, name, Address { r#type: Some(address::Type::Service(s)) }.encode_to_vec())
    });
    let deny = policy("deny", Scope::WorkloadSelector, Action::Deny).encode_to_vec();
    workloads.into_iter().chain(services).chain([(AUTHORIZATION_TYPE, "ns/deny".to_owned(), deny)]).collect()
}

/// Addresses that change hands, objects that come and go: whatever is told first, the mesh is the same in the end.
#[tokio::test]
async fn the_order_within_a_type_does_not_matter() {
    let istiod = Istiod::local().unwrap();
    istiod.replace(exchanged());
    let expected = Fixture::over(istiod).synced().await.mesh.load().canonical_dump();
    for (order, responses) in [(Order::Names, 1), (Order::Backwards, 1), (Order::Apart, 7)] {
        let istiod = told();
        for name in ["b", "c", "d"] {
            istiod.workload(workload(name));
        }
        istiod.service(Service { addresses: Vec::new(), ..service(API) });
        let fixture = Fixture::over(istiod).synced().await;
        assert_ne!(fixture.mesh.load().canonical_dump(), expected);
        let acks = fixture.istiod.seen().acks;
        fixture.istiod.order(order);
        fixture.istiod.replace(exchanged());
        until("the last of it", || fixture.mesh.load().canonical_dump() == expected).await;
        until("all of it to be acknowledged", || fixture.istiod.seen().acks == acks + responses).await;
        assert_eq!(fixture.mesh.load().canonical_dump(), expected, "{order:?}");
    }
}

/// istiod sends the two types apart, in any order: no version in between may cut what both together allow.
#[tokio::test]
async fn a_workload_waits_for_the_policy_it_names() {
    let fixture = Fixture::over(told()).synced().await;
    // A version is published before the control plane has read what acknowledges it.
    until("both types to be acknowledged", || fixture.istiod.seen().acks == 2).await;
    let before = fixture.mesh.load().version();
    fixture.istiod.withhold(AUTHORIZATION_TYPE, true);
    let acks = fixture.istiod.seen().acks;
    fixture.istiod.workload(bound("late"));
    fixture.istiod.policy(&policy("late", Scope::WorkloadSelector, Action::Allow));
    until("the address to be acknowledged", || fixture.istiod.seen().acks == acks + 1).await;
    assert_eq!(fixture.mesh.load().version(), before, "published without its policy");
    fixture.istiod.withhold(AUTHORIZATION_TYPE, false);
    until("both", || fixture.has_policy("late")).await;
    assert_eq!(fixture.mesh.load().version(), before + 1, "they are one version");
    // Taken back the other way round: the policy first.
    fixture.istiod.withhold(ADDRESS_TYPE, true);
    fixture.istiod.remove(AUTHORIZATION_TYPE, "ns/late");
    fixture.istiod.workload(workload("a"));
    until("the removal to be acknowledged", || fixture.istiod.seen().acks == acks + 3).await;
    assert!(fixture.has_policy("late"), "taken from a workload that still names it");
    fixture.istiod.withhold(ADDRESS_TYPE, false);
    until("both to go", || !fixture.has_policy("late")).await;
    assert_eq!(fixture.mesh.load().version(), before + 2);
}

/// Only who names the policy waits for it, by what was told of it last.
#[tokio::test]
async fn a_policy_that_is_late_holds_nobody_else_up() {
    let fixture = Fixture::over(told()).synced().await;
    let is_as_before = || fixture.mesh.load().find_workload("c1//Pod/ns/a").is_some_and(|w| w.policies.is_empty());
    // Any of these may be late on a busy machine, but not each.
    let mut quickest = Duration::MAX;
    for name in ["b", "c", "d", "e", "f"] {
        let begun = Instant::now();
        fixture.istiod.workload(bound(&format!("late-for-{name}")));
        fixture.istiod.workload(workload(name));
        until("the other workload", || fixture.has_workload(&format!("c1//Pod/ns/{name}"))).await;
        let (waits, took) = (is_as_before(), begun.elapsed());
        assert!(waits || took > Duration::from_millis(900), "it did not wait");
        quickest = quickest.min(took);
        // Taken back while it waits: what was told first never counts.
        fixture.istiod.workload(workload("a"));
    }
    assert!(quickest < Duration::from_millis(900), "{quickest:?}");
    until("nothing to be missing", || fixture.metric("culvert_xds_missing_policies 0")).await;
    tokio::time::sleep(Duration::from_millis(1200)).await;
    assert!(is_as_before(), "what was held back was told after what took its place");
}

#[tokio::test]
async fn the_wait_is_bounded_and_then_the_workload_refuses() {
    let fixture = Fixture::over(told()).synced().await;
    let begun = Instant::now();
    fixture.istiod.workload(bound("never"));
    let named = || fixture.mesh.load().find_workload("c1//Pod/ns/a").is_some_and(|w| w.policies.len() == 1);
    until("the version without the policy", named).await;
    assert!(begun.elapsed() > Duration::from_millis(900), "{:?}", begun.elapsed());
    let snapshot = fixture.mesh.load_full();
    let bound = snapshot.policy_index().bound(snapshot.find_workload("c1//Pod/ns/a").unwrap());
    assert!(bound.is_some_and(|bound| bound.missing().is_some()), "nothing is missing");
    until("the metric to tell", || fixture.metric("culvert_xds_missing_policies 1")).await;
    // Known to be missing, it holds up nobody else: if it did, each of these would take a second. A busy machine may be late, but
    // not every time.
    let mut quickest = Duration::MAX;
    for name in ["b", "c", "d", "e", "f"] {
        let begun = Instant::now();
        fixture.istiod.workload(workload(name));
        until("another workload", || fixture.has_workload(&format!("c1//Pod/ns/{name}"))).await;
        quickest = quickest.min(begun.elapsed());
    }
    assert!(quickest < Duration::from_millis(900), "{quickest:?}");
}

/// istiod names conversions of PeerAuthentications that it never makes.
#[tokio::test]
async fn a_conversion_that_does_not_come_refuses_plaintext_only() {
    let fixture = Fixture::over(told()).synced().await;
    let name = "converted_peer_authentication_web";
    fixture.istiod.workload(bound(name));
    until("the stand-in", || fixture.has_policy(name)).await;
    let client: SpiffeId = "spiffe://cluster.local/ns/ns/sa/client".parse().unwrap();
    let allows = |identity: Option<&SpiffeId>| {
        let snapshot = fixture.mesh.load_full();
        let at: SocketAddr = "10.0.0.9:8080".parse().unwrap();
        let conn = InboundConn { client: at.into(), dst: at, identity };
        matches!(authorize(&snapshot, snapshot.find_workload("c1//Pod/ns/a").unwrap(), &conn).verdict, Verdict::Allow(_))
    };
    assert!(!allows(None), "plaintext gets in");
    assert!(allows(Some(&client)), "a caller of the mesh is refused");
    // It comes after all, and says less.
    fixture.istiod.policy(&policy(name, Scope::WorkloadSelector, Action::Allow));
    until("the policy itself", || allows(None)).await;
    fixture.istiod.remove(AUTHORIZATION_TYPE, &format!("ns/{name}"));
    until("the stand-in again", || !allows(None)).await;
    fixture.istiod.workload(workload("a"));
    until("it to go with its last user", || !fixture.has_policy(name) && allows(None)).await;
}

#[tokio::test]
async fn a_policy_that_does_not_come_may_be_left_out() {
    let fixture = Fixture::with(told(), Wish { missing: MissingPolicy::Ignore, ..Wish::default() }).synced().await;
    fixture.istiod.workload(bound("never"));
    until("the stand-in", || fixture.has_policy("never")).await;
    let snapshot = fixture.mesh.load_full();
    let PolicyBody::Rules { rules, .. } = &snapshot.find_policy(&PolicyKey::new("ns", "never")).unwrap().body else {
        panic!("it denies")
    };
    assert!(rules.is_empty());
    fixture.istiod.workload(workload("a"));
    until("it to go with its last user", || !fixture.has_policy("never")).await;
}
