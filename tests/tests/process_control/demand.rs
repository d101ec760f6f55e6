//! The stream on demand.
use std::net::{IpAddr, Ipv4Addr};
use std::time::{Duration, Instant};

use bytes::Bytes;
use mesh_model::service::ServiceKey;
use mesh_model::wanted::Wanted;
use mesh_model::{Network, NetworkAddr};
use mesh_proto::ADDRESS_TYPE;
use mesh_proto::istio::workload::Workload;
use mesh_sources::demand::{Demand, Fetched, Limits};
use mesh_tests::istiod::Istiod;

use crate::fixture::{Fixture, Wish, service, until, workload};

const WEB: &str = "web.ns.svc.cluster.local";
const LIMIT: Duration = Duration::from_secs(10);

fn elsewhere(name: &str) -> Workload {
    Workload { node: "node-2".into(), ..workload(name) }
}
fn at(ip: [u8; 4]) -> Wanted {
    Wanted::Address(NetworkAddr { network: Network::default(), ip: IpAddr::V4(Ipv4Addr::from(ip)) })
}
/// One pod on our node, a service with an endpoint on another, and a pod of nobody's.
async fn fixture(limits: Limits) -> Fixture {
    let istiod = Istiod::local().unwrap();
    istiod.workload(Workload { services: [].into(), ..workload("here") });
    istiod.service(service(WEB));
    istiod.workload(elsewhere("a"));
    istiod.workload(Workload { services: [].into(), ..elsewhere("alone") });
    let fixture = Fixture::with(istiod, Wish { demand: Some(Demand::new(limits)), ..Wish::default() }).synced().await;
    until("the pod of this node", || fixture.has_workload("c1//Pod/ns/here")).await;
    fixture
}
fn asked_for(fixture: &Fixture, name: &str) -> usize {
    fixture.istiod.seen().asked.iter().filter(|asked| *asked == name).count()
}

#[tokio::test]
async fn what_is_asked_for_comes_and_nothing_else() {
    let fixture = fixture(Limits::default()).await;
    assert_eq!(fixture.mesh.load().workloads().count(), 1, "only what is on this node");
    assert!(!fixture.has_service(WEB));
    // By the address of the service: it and its endpoints. Ten who want to know are one question.
    let vip = at([10, 96, 0, 1]);
    let answers = futures_util::future::join_all((0..10).map(|_| fixture.mesh.fetch(&vip, LIMIT))).await;
    assert_eq!(answers, [Fetched::Found; 10]);
    assert_eq!(asked_for(&fixture, "/10.96.0.1"), 1);
    assert!(fixture.has_service(WEB) && fixture.has_workload("c1//Pod/ns/a") && !fixture.has_workload("c1//Pod/ns/alone"));
    // By name, by id.
    assert_eq!(fixture.mesh.fetch(&Wanted::Service(ServiceKey::new("ns", WEB)), LIMIT).await, Fetched::Found);
    assert_eq!(asked_for(&fixture, &format!("ns/{WEB}")), 0, "it is there");
    assert_eq!(fixture.mesh.fetch(&Wanted::Workload("c1//Pod/ns/alone".into()), LIMIT).await, Fetched::Found);
    // What was asked for is told further on.
    fixture.istiod.workload(Workload { addresses: vec![Bytes::from_static(&[10, 7, 7, 7])], ..elsewhere("b") });
    until("a new endpoint of the service", || fixture.has_workload("c1//Pod/ns/b")).await;
    fixture.istiod.remove(ADDRESS_TYPE, &format!("ns/{WEB}"));
    until("the service to go", || !fixture.has_service(WEB)).await;
    assert_eq!(fixture.mesh.fetch(&vip, LIMIT).await, Fetched::Absent);
    assert!(fixture.istiod.seen().nacks.is_empty());
}

#[tokio::test]
async fn that_there_is_nothing_is_remembered_until_there_is() {
    let fixture = fixture(Limits { absent: Duration::from_secs(2), ..Limits::default() }).await;
    let nobody = at([192, 0, 2, 1]);
    for _ in 0..3 {
        assert_eq!(fixture.mesh.fetch(&nobody, LIMIT).await, Fetched::Absent);
    }
    assert_eq!(asked_for(&fixture, "/192.0.2.1"), 1);
    // Told without being asked again.
    fixture.istiod.workload(Workload { addresses: vec![Bytes::from_static(&[192, 0, 2, 1])], ..elsewhere("new") });
    until("what came", || fixture.has_workload("c1//Pod/ns/new")).await;
    assert_eq!(fixture.mesh.fetch(&nobody, LIMIT).await, Fetched::Found);
    // Not believed for ever.
    let other = at([192, 0, 2, 2]);
    assert_eq!(fixture.mesh.fetch(&other, LIMIT).await, Fetched::Absent);
    until("the answer to be given up", || fixture.istiod.seen().given_up.iter().any(|name| name == "/192.0.2.2")).await;
    assert_eq!(fixture.mesh.fetch(&other, LIMIT).await, Fetched::Absent);
    assert_eq!(asked_for(&fixture, "/192.0.2.2"), 2);
}

#[tokio::test]
async fn nobody_waits_for_ever_and_what_was_known_stays() {
    let fixture = fixture(Limits { absent: Duration::from_secs(1), ..Limits::default() }).await;
    let (vip, nobody) = (at([10, 96, 0, 1]), at([192, 0, 2, 1]));
    assert_eq!(fixture.mesh.fetch(&nobody, LIMIT).await, Fetched::Absent);
    fixture.istiod.away(true);
    until("the loss to be told", || fixture.metric("culvert_xds_connected 0")).await;
    let begun = Instant::now();
    assert_eq!(fixture.mesh.fetch(&vip, Duration::from_millis(1500)).await, Fetched::Unanswered);
    assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
    assert_eq!(fixture.mesh.fetch(&nobody, LIMIT).await, Fetched::Absent, "the last that was said holds while nobody says more");
    // A new stream begins with what was asked for, also meanwhile.
    fixture.istiod.away(false);
    assert_eq!(fixture.mesh.fetch(&vip, LIMIT).await, Fetched::Found);
    assert!(fixture.has_workload("c1//Pod/ns/here"));
}

#[tokio::test]
async fn a_new_stream_resumes_what_was_asked_for() {
    let fixture = fixture(Limits::default()).await;
    assert_eq!(fixture.mesh.fetch(&at([10, 96, 0, 1]), LIMIT).await, Fetched::Found);
    fixture.istiod.away(true);
    until("the loss to be told", || fixture.metric("culvert_xds_connected 0")).await;
    fixture.istiod.remove(ADDRESS_TYPE, "c1//Pod/ns/a");
    fixture.istiod.workload(Workload { addresses: vec![Bytes::from_static(&[10, 7, 7, 7])], ..elsewhere("b") });
    fixture.istiod.away(false);
    until("what is new", || fixture.has_workload("c1//Pod/ns/b")).await;
    until("what went meanwhile", || !fixture.has_workload("c1//Pod/ns/a")).await;
    assert!(fixture.has_service(WEB) && !fixture.has_workload("c1//Pod/ns/alone"));
    assert_eq!(asked_for(&fixture, "/10.96.0.1"), 2);
}

#[tokio::test]
async fn what_nobody_uses_is_forgotten() {
    let fixture = fixture(Limits { idle: Duration::from_secs(2), ..Limits::default() }).await;
    assert_eq!(fixture.mesh.fetch(&at([10, 96, 0, 1]), LIMIT).await, Fetched::Found);
    until("all of it to go", || !fixture.has_service(WEB) && !fixture.has_workload("c1//Pod/ns/a")).await;
    assert!(fixture.has_workload("c1//Pod/ns/here"), "a pod of this node");
    // Beside the names of nothing by which istiod is told at all.
    let given_up =
        || -> Vec<String> { fixture.istiod.seen().given_up.into_iter().filter(|name| !name.starts_with("/0.0.0.")).collect() };
    until("it to be given up", || given_up().len() == 3).await;
    assert!(given_up().contains(&"/10.96.0.1".to_owned()) && given_up().contains(&"c1//Pod/ns/a".to_owned()), "{:?}", given_up());
    assert_eq!(fixture.mesh.fetch(&at([10, 96, 0, 1]), LIMIT).await, Fetched::Found, "it is asked for again");
}
