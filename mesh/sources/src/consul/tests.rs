//! What registrations and intentions become.
use std::collections::BTreeSet;
use std::path::Path;

use serde_json::{Value, json};

use super::catalog::{Catalog, Texts};
use super::intentions::Intentions;
use super::{Access, Secret};

fn instance(id: &str, service: &str, address: &str, meta: Value) -> Value {
    json!({
        "Node": { "Node": "n1", "Address": "192.0.2.1", "Datacenter": "dc1", "Meta": { "culvert-region": "r", "culvert-zone": "z" } },
        "Service": { "ID": id, "Service": service, "Address": address, "Port": 8080, "Meta": meta, "Tags": ["version=v1", "blue", "a b"] },
        "Checks": [{ "Status": "passing" }],
    })
}
fn ambient() -> Value {
    json!({ "culvert-dataplane-mode": "ambient" })
}
fn catalog(services: &[(&str, Vec<Value>)]) -> Catalog {
    let mut catalog = Catalog::new("consul", "td", "n1");
    let names: serde_json::Map<String, Value> = services.iter().map(|(name, _)| ((*name).to_owned(), json!([]))).collect();
    catalog.name(&names.into()).unwrap();
    for (name, all) in services {
        catalog.fill(name, &json!(all)).unwrap();
    }
    catalog
}
/// Objects of a text.
fn objects(texts: &Texts, name: &str) -> Vec<Value> {
    let text = texts.iter().find(|(path, _)| path == Path::new(name)).and_then(|(_, text)| text.clone());
    let text = text.unwrap_or(Ok(String::new())).unwrap();
    text.split("---\n").filter(|part| !part.is_empty()).map(|part| serde_json::from_str(part).unwrap()).collect()
}
fn told(catalog: &Catalog) -> Vec<String> {
    catalog.problems().map(ToString::to_string).collect()
}

#[test]
fn a_registration_is_a_service_entry_and_a_workload_entry() {
    let meta = json!({ "culvert-dataplane-mode": "ambient", "culvert-namespace": "shop", "culvert-service-account": "till", "culvert-netns": "/run/netns/a" });
    let mut catalog = catalog(&[("web", vec![instance("web-1", "web", "10.0.0.1", meta)])]);
    let texts = catalog.take();
    let [service] = &objects(&texts, "consul service web")[..] else { panic!("{texts:?}") };
    assert_eq!(service["metadata"]["namespace"], "shop");
    assert_eq!(service["metadata"]["labels"], json!({ "version": "v1", "blue": "true" }), "what no label can be is left out");
    assert_eq!(service["spec"]["hosts"], json!(["web.service.consul", "web.service.dc1.consul"]));
    assert_eq!(service["spec"]["ports"][0]["number"], 8080);
    let [workload] = &objects(&texts, "consul workload n1 10.0.0.1")[..] else { panic!("{texts:?}") };
    assert_eq!(workload["metadata"]["name"], "web-1.n1");
    assert_eq!(workload["spec"]["serviceAccount"], "till");
    assert_eq!(workload["spec"]["locality"], "r/z");
    assert_eq!(workload["metadata"]["annotations"]["culvert.dev/netns"], "/run/netns/a");
    let node = &objects(&texts, "consul node")[0];
    assert_eq!(node["metadata"]["labels"]["topology.kubernetes.io/zone"], "z");
    assert!(told(&catalog).is_empty());
    assert!(catalog.take().is_empty(), "nothing twice");
}

#[test]
fn health_and_weight_are_consuls() {
    for (status, weights, healthy, weight) in [
        ("passing", json!({ "Passing": 5, "Warning": 1 }), "True", 5),
        ("warning", json!({ "Passing": 5, "Warning": 2 }), "True", 2),
        ("warning", json!({ "Passing": 5, "Warning": 0 }), "False", 1),
        ("critical", json!(null), "False", 1),
        ("maintenance", json!(null), "False", 1),
    ] {
        let mut one = instance("web-1", "web", "10.0.0.1", json!({}));
        one["Checks"] = json!([{ "Status": "passing" }, { "Status": status }]);
        one["Service"]["Weights"] = weights;
        let workload = &objects(&catalog(&[("web", vec![one])]).take(), "consul workload n1 10.0.0.1")[0];
        assert_eq!(workload["status"]["conditions"][0]["status"], healthy, "{status}");
        assert_eq!(workload["spec"]["weight"], weight, "{status}");
    }
}

#[test]
fn members_at_one_address_are_one_workload_and_others_are_not() {
    let (web, mut admin) = (instance("w", "web", "10.0.0.1", ambient()), instance("a", "admin", "10.0.0.1", json!({})));
    admin["Service"]["Port"] = json!(9999);
    admin["Checks"][0]["Status"] = json!("critical");
    let texts = catalog(&[("admin", vec![admin.clone()]), ("web", vec![web])]).take();
    let [one] = &objects(&texts, "consul workload n1 10.0.0.1")[..] else { panic!("{texts:?}") };
    assert_eq!(one["metadata"]["labels"]["consul.culvert.dev/web"], "true");
    assert!(one["metadata"]["labels"]["consul.culvert.dev/admin"].is_null(), "what is ill does not serve");
    assert_eq!(one["status"]["conditions"][0]["status"], "True", "nor pull the rest down");
    // Two programs on a node's address.
    let texts = catalog(&[("admin", vec![admin]), ("web", vec![instance("w", "web", "10.0.0.1", json!({}))])]).take();
    assert_eq!(objects(&texts, "consul workload n1 10.0.0.1").len(), 2);
}

#[test]
fn two_identities_at_one_address_are_nobodys() {
    let mut other = ambient();
    other["culvert-service-account"] = json!("root");
    let mut catalog = catalog(&[
        ("aaa", vec![instance("a", "aaa", "10.0.0.1", other)]),
        ("web", vec![instance("w", "web", "10.0.0.1", ambient())]),
    ]);
    let workload = &objects(&catalog.take(), "consul workload n1 10.0.0.1")[0];
    assert_eq!(workload["spec"]["serviceAccount"], "culvert-conflict");
    assert!(told(&catalog)[0].contains("until they agree it is nobody's"), "{:?}", told(&catalog));
}

#[test]
fn what_is_wrong_is_refused_with_its_key() {
    for (meta, says) in [
        (json!({ "culvert-namespace": "Shop" }), "Service.Meta[\"culvert-namespace\"]: `Shop` is not a name"),
        (json!({ "culvert-dataplane-mode": "sidecar" }), "`sidecar` is no mode"),
        (json!({ "culvert-port": "http" }), "`http` is no port"),
        (json!({ "culvert-address": "web" }), "`web` is no address"),
    ] {
        let mut catalog = catalog(&[("web", vec![instance("w", "web", "10.0.0.1", meta)])]);
        assert!(objects(&catalog.take(), "consul service web").is_empty());
        assert!(told(&catalog)[0].contains(says), "{:?}", told(&catalog));
    }
    for (key, value) in [("Namespace", "team"), ("Partition", "p"), ("PeerName", "other")] {
        let mut one = instance("w", "web", "10.0.0.1", json!({}));
        one["Service"][key] = json!(value);
        let mut catalog = catalog(&[("web", vec![one])]);
        assert!(objects(&catalog.take(), "consul service web").is_empty());
        assert!(told(&catalog)[0].contains("are not understood"), "{:?}", told(&catalog));
    }
    let mut catalog = catalog(&[("web", vec![instance("w", "web", "db.example", ambient())]), ("Bad_Name", vec![])]);
    catalog.take();
    assert!(told(&catalog).iter().any(|p| p.contains("is no IP address")), "{:?}", told(&catalog));
    assert!(told(&catalog).iter().any(|p| p.contains("neither DNS nor the mesh")), "{:?}", told(&catalog));
}

#[test]
fn a_registration_that_goes_wrong_stays_as_it_was() {
    let mut catalog = catalog(&[("web", vec![instance("w", "web", "10.0.0.1", ambient())])]);
    catalog.take();
    let meta = json!({ "culvert-dataplane-mode": "ambiend" });
    catalog.fill("web", &json!([instance("w", "web", "10.0.0.1", meta)])).unwrap();
    let texts = catalog.take();
    let workload = &objects(&texts, "consul workload n1 10.0.0.1")[0];
    assert_eq!(workload["metadata"]["annotations"]["ambient.istio.io/redirection"], "enabled");
    assert!(told(&catalog)[0].contains("what it was before stays"), "{:?}", told(&catalog));
}

#[test]
fn a_service_that_goes_takes_everything_along() {
    let mut catalog = catalog(&[("web", vec![instance("w", "web", "10.0.0.1", ambient())])]);
    catalog.take();
    catalog.name(&json!({})).unwrap();
    let gone = catalog.take();
    for name in ["consul service web", "consul workload n1 10.0.0.1", "consul intentions web", "consul node"] {
        assert!(gone.iter().any(|(path, text)| path == Path::new(name) && text.is_none()), "{name}: {gone:?}");
    }
    assert_eq!(catalog.names().count(), 0);
}

#[test]
fn a_waypoint_that_instances_do_not_agree_on_is_no_waypoint() {
    let tagged = |id: &str, address: &str, waypoint: &str| {
        let mut one = instance(id, "web", address, ambient());
        one["Service"]["Tags"] = json!([format!("istio.io/use-waypoint={waypoint}"), format!("version={waypoint}")]);
        one
    };
    let mut catalog = catalog(&[("web", vec![tagged("1", "10.0.0.1", "a"), tagged("2", "10.0.0.2", "b")])]);
    let service = &objects(&catalog.take(), "consul service web")[0];
    assert_eq!(service["metadata"]["labels"], json!({ "istio.io/use-waypoint": "unclear" }));
    assert!(told(&catalog)[0].contains("istio.io/use-waypoint"), "{:?}", told(&catalog));
}

/// Source, destination, whether it allows.
fn rule_for(list: &[(&str, &str, &str)], default: bool, destination: &str) -> Value {
    let all: Vec<Value> = list
        .iter()
        .map(|(source, destination, action)| json!({ "SourceName": source, "DestinationName": destination, "Action": action }))
        .collect();
    let intentions = Intentions::read(&json!({ "Intentions": all, "Allowed": default })).unwrap();
    let accounts = |source: &str| BTreeSet::from([("default".into(), source.into())]);
    intentions.rule(destination, "td", accounts, BTreeSet::new()).unwrap_or(Value::Null)
}

#[test]
fn the_more_exact_intention_counts() {
    let but = |names: &[&str]| {
        let all: Vec<String> = names.iter().map(|name| format!("td/ns/default/sa/{name}")).collect();
        json!({ "from": [{ "source": { "notPrincipals": all } }] })
    };
    let these = |names: &[&str]| {
        let all: Vec<String> = names.iter().map(|name| format!("td/ns/default/sa/{name}")).collect();
        json!({ "from": [{ "source": { "principals": all } }] })
    };
    for (list, default, expected) in [
        (&[][..], true, Value::Null),
        (&[], false, json!({})),
        (&[("a", "web", "allow")], true, Value::Null),
        (&[("a", "web", "allow")], false, but(&["a"])),
        (&[("a", "web", "deny")], true, these(&["a"])),
        (&[("*", "web", "deny"), ("a", "web", "allow")], true, but(&["a"])),
        (&[("*", "*", "deny"), ("a", "*", "allow"), ("b", "web", "allow")], true, but(&["a", "b"])),
        (&[("*", "*", "deny"), ("*", "web", "allow"), ("a", "web", "deny")], true, these(&["a"])),
        // What is said of the destination wins over what is said of the source.
        (&[("*", "web", "deny"), ("a", "*", "allow")], true, json!({})),
        (&[("a", "web", "deny"), ("a", "*", "allow")], true, these(&["a"])),
        (&[("a", "other", "deny")], true, Value::Null),
    ] {
        assert_eq!(rule_for(list, default, "web"), expected, "{list:?} {default}");
    }
}

#[test]
fn an_intention_that_is_not_understood_denies_its_source() {
    let one = json!({ "SourceName": "a", "DestinationName": "web", "Permissions": [{ "Action": "allow" }] });
    let peer = json!({ "SourceName": "b", "DestinationName": "web", "Action": "allow", "SourcePeer": "other" });
    let intentions = Intentions::read(&json!({ "Intentions": [one, peer], "Allowed": true })).unwrap();
    let accounts = |source: &str| BTreeSet::from([("default".into(), source.into())]);
    let rule = intentions.rule("web", "td", accounts, BTreeSet::new()).unwrap();
    assert_eq!(rule["from"][0]["source"]["principals"], json!(["td/ns/default/sa/a"]));
    let told: Vec<String> = intentions.problems().map(ToString::to_string).collect();
    assert!(told[0].contains("permissions of layer 7") && told[1].contains("reach nothing here"), "{told:?}");
}

#[test]
fn a_waypoint_is_no_stranger_to_what_is_behind_it() {
    let mut web = instance("w", "web", "10.0.0.1", ambient());
    web["Service"]["Tags"] = json!(["istio.io/use-waypoint=wp"]);
    let mut gateway = instance("g", "gate", "10.0.0.2", json!({}));
    gateway["Service"]["Tags"] = json!(["gateway.networking.k8s.io/gateway-name=wp"]);
    let mut catalog = catalog(&[("web", vec![web]), ("gate", vec![gateway])]);
    let intentions = json!([{ "SourceName": "a", "DestinationName": "web", "Action": "allow" }]);
    catalog.intend(&json!({ "Intentions": intentions, "Allowed": false })).unwrap();
    let texts = catalog.take();
    let [workload, waypoint] = &objects(&texts, "consul intentions web")[..] else { panic!("{texts:?}") };
    let names = |policy: &Value| policy["spec"]["rules"][0]["from"][0]["source"]["notPrincipals"].clone();
    assert_eq!(names(workload), json!(["td/ns/default/sa/a", "td/ns/default/sa/gate"]));
    assert_eq!(names(waypoint), json!(["td/ns/default/sa/a"]));
    assert_eq!(waypoint["spec"]["targetRefs"][0]["name"], "web.service.consul");
}

#[test]
fn an_address_is_checked_before_anybody_is_asked() {
    assert!(Access::at("127.0.0.1:8500").check().is_ok());
    assert!(Access::at("unix:///run/consul.sock").check().is_err());
    assert!(Access::at("https://consul:8501").check().unwrap_err().contains("CONSUL_CACERT"));
    let with_token = Access { token: Some(Secret("hidden".into())), ..Access::at("http://c:1") };
    assert!(!format!("{with_token:?}").contains("hidden"));
}
