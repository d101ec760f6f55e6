use super::*;
use mesh_proto::istio::workload::{self as wire, Service, Workload};
use mesh_proto::well_known::Any;

fn resource(kind: Kind, name: &str, version: &str, value: Vec<u8>) -> Resource {
    let any = Any { type_url: kind.url().into(), value };
    Resource { name: name.into(), version: version.into(), resource: Some(any), ..Resource::default() }
}
fn workload(uid: &str, policies: &[&str]) -> Vec<u8> {
    let w = Workload {
        uid: uid.into(),
        namespace: "ns".into(),
        authorization_policies: policies.iter().map(|p| (*p).to_owned()).collect(),
        ..Workload::default()
    };
    Address { r#type: Some(address::Type::Workload(w)) }.encode_to_vec()
}
fn service(host: &str) -> Vec<u8> {
    let s = Service { namespace: "ns".into(), hostname: host.into(), ..Service::default() };
    Address { r#type: Some(address::Type::Service(s)) }.encode_to_vec()
}
fn policy(name: &str) -> Vec<u8> {
    Authorization { namespace: "ns".into(), name: name.into(), ..Authorization::default() }.encode_to_vec()
}
fn response(resources: Vec<Resource>, removed: &[&str]) -> DeltaDiscoveryResponse {
    let removed_resources = removed.iter().map(|name| (*name).to_owned()).collect();
    DeltaDiscoveryResponse { resources, removed_resources, ..DeltaDiscoveryResponse::default() }
}
/// The changes in short: `+` and `-` with the key.
fn told(received: &Received) -> Vec<String> {
    let one = |change: &Change| match change {
        Change::Workload(w) => format!("+{}", w.uid),
        Change::WorkloadGone(uid) => format!("-{uid}"),
        Change::Service(s) => format!("+{}", s.key),
        Change::ServiceGone(key) => format!("-{key}"),
        Change::Policy(p) => format!("+{}", p.key),
        Change::PolicyGone(key) => format!("-{key}"),
        other => format!("{other:?}"),
    };
    received.changes.iter().map(one).collect()
}
fn missing(state: &State) -> Vec<String> {
    let mut all: Vec<String> = state.missing().iter().map(ToString::to_string).collect();
    all.sort();
    all
}

#[test]
fn a_removal_says_a_name_only() {
    let mut state = State::default();
    let all = vec![resource(Kind::Address, "w", "1", workload("w", &[])), resource(Kind::Address, "ns/web", "1", service("web"))];
    assert_eq!(told(&state.receive(Kind::Address, response(all, &[]))), ["+w", "+ns/web"]);
    assert_eq!(told(&state.receive(Kind::Address, response(vec![], &["ns/web", "w", "never told"]))), ["-ns/web", "-w"]);
    assert!(state.versions(Kind::Address).is_empty());
}

#[test]
fn a_name_may_come_to_mean_something_else() {
    let mut state = State::default();
    state.receive(Kind::Address, response(vec![resource(Kind::Address, "n", "1", workload("one", &[]))], &[]));
    let renamed = response(vec![resource(Kind::Address, "n", "2", workload("two", &[]))], &[]);
    assert_eq!(told(&state.receive(Kind::Address, renamed)), ["-one", "+two"]);
    let other = response(vec![resource(Kind::Address, "n", "3", service("web"))], &[]);
    assert_eq!(told(&state.receive(Kind::Address, other)), ["-two", "+ns/web"]);
}

#[test]
fn a_refused_resource_keeps_what_was_good_and_loses_its_version() {
    let mut state = State::default();
    let of = |kind, value| response(vec![resource(kind, "ns/x", "1", value)], &[]);
    state.receive(Kind::Address, of(Kind::Address, service("x")));
    let refused = state.receive(Kind::Address, of(Kind::Address, vec![0xff]));
    assert!(refused.changes.is_empty() && refused.refused.len() == 1);
    assert_eq!(state.versions(Kind::Address)["ns/x"], "");
    assert_eq!(state.problems().len(), 1);
    // A resource of another type, or none at all, is refused too.
    let mut strange = of(Kind::Address, service("x"));
    strange.resources[0].resource.as_mut().unwrap().type_url = "other".into();
    assert_eq!(state.receive(Kind::Address, strange).refused.len(), 1);
    let empty = response(vec![Resource { name: "ns/x".into(), ..Resource::default() }], &[]);
    assert_eq!(state.receive(Kind::Address, empty).refused.len(), 1);
    assert_eq!(told(&state.receive(Kind::Address, response(vec![], &["ns/x"]))), ["-ns/x"]);
    assert!(state.problems().is_empty());
}

#[test]
fn an_unreadable_policy_stands_in_for_itself() {
    let mut state = State::default();
    let of = |value| response(vec![resource(Kind::Authorization, "ns/p", "1", value)], &[]);
    let received = state.receive(Kind::Authorization, of(vec![0xff]));
    assert_eq!((told(&received), received.refused.len()), (vec!["+ns/p".to_owned()], 1));
    assert_eq!(state.versions(Kind::Authorization)["ns/p"], "");
    assert!(state.receive(Kind::Authorization, of(policy("p"))).refused.is_empty());
    assert_eq!(state.versions(Kind::Authorization)["ns/p"], "1");
    let nameless = response(vec![resource(Kind::Authorization, "p", "1", policy("p"))], &[]);
    assert_eq!(state.receive(Kind::Authorization, nameless).refused.len(), 1);
}

#[test]
fn policies_are_missing_while_somebody_names_them_and_they_are_not_there() {
    let mut state = State::default();
    let put = |state: &mut State, uid: &str, policies: &[&str]| {
        state.receive(Kind::Address, response(vec![resource(Kind::Address, uid, "1", workload(uid, policies))], &[]))
    };
    let p = |name: &str| vec![resource(Kind::Authorization, &format!("ns/{name}"), "1", policy(name))];
    put(&mut state, "a", &["ns/x", "ns/y"]);
    put(&mut state, "b", &["ns/x"]);
    assert_eq!(missing(&state), ["ns/x", "ns/y"]);
    state.receive(Kind::Authorization, response(p("x"), &[]));
    assert_eq!(missing(&state), ["ns/y"]);
    // Told again, it is still one.
    state.receive(Kind::Authorization, response(p("x"), &[]));
    put(&mut state, "a", &["ns/x"]);
    assert!(missing(&state).is_empty() && state.has_policy(&PolicyKey::new("ns", "x")));
    state.receive(Kind::Authorization, response(vec![], &["ns/x"]));
    assert_eq!(missing(&state), ["ns/x"]);
    put(&mut state, "a", &[]);
    assert_eq!(missing(&state), ["ns/x"], "the other still names it");
    state.receive(Kind::Address, response(vec![], &["b"]));
    assert!(missing(&state).is_empty() && state.policies.is_empty());
}

#[test]
fn the_locality_of_the_node_is_what_its_workloads_say() {
    use mesh_proto::istio::workload::Locality as There;
    let mut state = State::new("here".into(), false);
    let at = |uid: &str, node: &str, zone: &str| {
        let w = Workload {
            uid: uid.into(),
            namespace: "ns".into(),
            node: node.into(),
            locality: Some(There { region: "r".into(), zone: zone.into(), subzone: String::new() }),
            ..Workload::default()
        };
        let bytes = Address { r#type: Some(address::Type::Workload(w)) }.encode_to_vec();
        response(vec![resource(Kind::Address, uid, "1", bytes)], &[])
    };
    let own = |received: Received| received.changes.iter().filter(|c| matches!(c, Change::OwnLocality(_))).count();
    assert_eq!(own(state.receive(Kind::Address, at("a", "there", "z"))), 0);
    assert_eq!(own(state.receive(Kind::Address, at("b", "here", "z"))), 1);
    assert_eq!(own(state.receive(Kind::Address, at("c", "here", "z"))), 0);
    assert_eq!(own(state.receive(Kind::Address, at("d", "here", "z2"))), 1);
}

#[test]
fn a_workload_that_cannot_be_used_is_there_and_nobody_s() {
    let mut state = State::default();
    let late = |address: [u8; 4], mode: i32| {
        let w = wire::Workload {
            uid: "late".into(),
            namespace: "ns".into(),
            service_account: "late".into(),
            node: "n".into(),
            addresses: vec![address.to_vec().into(), b"no address".to_vec().into()],
            services: [("ns/web".to_owned(), wire::PortList::default())].into(),
            network_mode: mode,
            ..wire::Workload::default()
        };
        let value = Address { r#type: Some(address::Type::Workload(w)) }.encode_to_vec();
        response(vec![resource(Kind::Address, "late", "1", value)], &[])
    };
    let closed = |received: &Received| match received.changes.as_slice() {
        [Change::Workload(w)] => Arc::clone(w),
        other => panic!("{other:?}"),
    };
    let received = state.receive(Kind::Address, late([10, 0, 0, 1], 7));
    assert_eq!((received.refused.len(), state.versions(Kind::Address)["late"].as_str()), (1, ""));
    let w = closed(&received);
    assert_eq!(w.ips, ["10.0.0.1".parse::<IpAddr>().unwrap()]);
    assert!(w.waypoint_error.is_some() && w.identity().is_err() && w.services.is_empty() && w.node.is_empty(), "{w:?}");
    // Still unusable, and elsewhere.
    assert_eq!(closed(&state.receive(Kind::Address, late([10, 0, 0, 2], 7))).ips, ["10.0.0.2".parse::<IpAddr>().unwrap()]);
    // What was good stays.
    let mut good = late([10, 0, 0, 3], 0);
    good.resources = vec![resource(Kind::Address, "late", "2", workload("late", &[]))];
    assert!(state.receive(Kind::Address, good).refused.is_empty());
    let received = state.receive(Kind::Address, late([10, 0, 0, 4], 7));
    assert!(received.changes.is_empty() && received.refused.len() == 1);
}

#[test]
fn what_has_no_meaning_here_is_noted_once() {
    let mut state = State::default();
    let of_type = |type_url: &str| Some(Any { type_url: type_url.into(), value: Vec::new() });
    let extension = |name: &str| match name.split_once(' ') {
        Some((name, url)) => wire::Extension { name: name.into(), config: of_type(url) },
        None => wire::Extension { name: name.into(), config: None },
    };
    let tell = |state: &mut State, name: &str, visibility: i32, extensions: &[&str]| {
        let s = wire::Service {
            name: name.into(),
            namespace: "ns".into(),
            hostname: name.into(),
            visibility,
            extensions: extensions.iter().map(|name| extension(name)).collect(),
            ..wire::Service::default()
        };
        let value = Address { r#type: Some(address::Type::Service(s)) }.encode_to_vec();
        let received = state.receive(Kind::Address, response(vec![resource(Kind::Address, name, "1", value)], &[]));
        assert!(received.refused.is_empty(), "it is no reason to refuse");
        state.passed_over.len()
    };
    assert_eq!(tell(&mut state, "a", 1, &[]), 0);
    assert_eq!(tell(&mut state, "b", 9, &["x"]), 2);
    assert_eq!(tell(&mut state, "c", 9, &["x", "y"]), 3);
    assert_eq!(tell(&mut state, "d", 9, &["x example/T", "x example/T"]), 4, "of another type it is another");
    assert!(state.passed_over.contains("extension \"x\" of a service, example/T"), "{:?}", state.passed_over);
}
