//! Consul as a source, against an agent that misbehaves on request: what services and keys become, changes, an index that goes
//! back, answers that cannot be read, tokens that may not, and a Consul that is away.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing, reason = "a suite")]

use std::time::Duration;

use mesh_model::Snapshot;
use mesh_model::policy::PolicyBody;
use mesh_model::workload::{Health, Protocol};
use mesh_runtime::metrics::Registry;
use mesh_sources::consul::{Access, Metrics, Retry, Scope, Secret};
use mesh_sources::{Diagnostics, Mesh, Origin, Viewpoint, translate};
use mesh_tests::consul::Consul;
use mesh_tests::wait;
use serde_json::{Value, json};

const KEY: &str = "culvert/policies";

struct Followed {
    mesh: Mesh,
    diagnostics: Diagnostics,
    registry: Registry,
    _runtime: tokio::runtime::Runtime,
}

fn follow(consul: &Consul, token: Option<&str>) -> Followed {
    let (registry, metrics) = (Registry::new(), Metrics::default());
    metrics.expose(&registry).unwrap();
    let scope = Scope {
        access: Access { token: token.map(|t| Secret(t.to_owned())), ..Access::at(consul.url()) },
        prefix: "culvert/".into(),
        domain: "consul".into(),
        datacenter: None,
        intentions: true,
        retry: Retry { least: Duration::from_millis(20), most: Duration::from_millis(200) },
        metrics,
    };
    let view = Viewpoint { node: "node-a".into(), ..Viewpoint::default() };
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let settings = translate::Settings { layer7: true, ..translate::Settings::default() };
    let (mesh, diagnostics) =
        runtime.block_on(async { mesh_sources::start_with(Origin::Consul(Box::new(scope)), view, &settings) });
    Followed { mesh, diagnostics, registry, _runtime: runtime }
}

impl Followed {
    #[track_caller]
    fn synced(self) -> Self {
        self.wait("the first mesh", |_| self.mesh.is_synced());
        self
    }
    #[track_caller]
    fn wait(&self, what: &str, holds: impl Fn(&Snapshot) -> bool) {
        let held = wait::until_true(what, || holds(&self.mesh.load_full()));
        held.unwrap_or_else(|e| panic!("{e:#}: {:#?}", self.diagnostics.list()));
    }
    #[track_caller]
    fn wait_problem(&self, part: &str) {
        let has = || self.diagnostics.list().iter().any(|p| p.to_string().contains(part));
        wait::until_true(part, has).unwrap_or_else(|e| panic!("{e:#}: {:#?}", self.diagnostics.list()));
    }
    #[track_caller]
    fn wait_metric(&self, line: &str) {
        wait::until_true(line, || self.registry.encode().lines().any(|l| l == line))
            .unwrap_or_else(|e| panic!("{e:#}: {}", self.registry.encode()));
    }
}

fn web(id: &str, address: &str, status: &str) -> Value {
    json!({
        "Node": "node-a", "Address": "192.0.2.1", "NodeMeta": { "culvert-region": "r", "culvert-zone": "z" },
        "Service": {
            "ID": id, "Service": "web", "Address": address, "Port": 8080, "Tags": ["version=v1"],
            "Meta": { "culvert-dataplane-mode": "ambient", "culvert-port": "80" },
        },
        "Checks": [{ "Status": status }],
    })
}
fn allow(account: &str) -> String {
    format!(
        "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {{ name: allow }}\n\
         spec: {{ rules: [{{ from: [{{ source: {{ principals: [{account}] }} }}] }}] }}\n"
    )
}
/// Health of the endpoints of a service.
fn endpoints(snap: &Snapshot, host: &str) -> Vec<Health> {
    snap.workloads().filter(|w| w.services.iter().any(|(key, _)| *key.hostname == *host)).map(|w| w.health).collect()
}
fn policy(snap: &Snapshot, name: &str) -> String {
    snap.policies().find(|p| *p.key.name == *name).map(|p| format!("{:?}", p.body)).unwrap_or_default()
}
fn is_closed(snap: &Snapshot) -> bool {
    snap.policies().any(|p| matches!(p.body, PolicyBody::Unusable { .. }) && p.key.name.starts_with("unreadable:consul"))
}

const WEB: &str = "web.service.consul";

#[test]
fn services_and_keys_become_a_mesh_and_follow_changes() {
    let consul = Consul::start().unwrap();
    consul.register(&web("web-1", "10.0.0.1", "passing"));
    consul.put(KEY, Some(&allow("cluster.local/ns/default/sa/client")));
    let it = follow(&consul, Some("secret")).synced();
    let snap = it.mesh.load_full();
    let service = snap.find_service_by_host(WEB, "default").unwrap();
    assert_eq!(service.ports.iter().map(|p| (p.port, p.target)).collect::<Vec<_>>(), [(80, 80)]);
    assert_eq!(service.vips.len(), 1, "an address of its own");
    assert!(snap.find_service_by_host("web.service.dc1.consul", "default").is_some());
    let workload = snap.workloads().next().unwrap();
    assert_eq!((workload.protocol, &*workload.service_account, &*workload.node), (Protocol::Hbone, "web", "node-a"));
    assert_eq!((&*workload.locality.region, &*workload.locality.zone), ("r", "z"));
    assert_eq!(workload.labels.get("version").map(|v| &**v), Some("v1"));
    assert_eq!(endpoints(&snap, WEB), [Health::Healthy]);
    assert!(policy(&snap, "allow").contains("sa/client"));
    assert_eq!(consul.token().as_deref(), Some("Bearer secret"));

    consul.register(&web("web-2", "10.0.0.2", "critical"));
    it.wait("a second endpoint", |snap| endpoints(snap, WEB).len() == 2 && endpoints(snap, WEB).contains(&Health::Unhealthy));
    consul.register(&web("web-2", "10.0.0.2", "passing"));
    it.wait("it is well", |snap| endpoints(snap, WEB) == [Health::Healthy; 2]);
    consul.put(KEY, Some(&allow("cluster.local/ns/default/sa/other")));
    it.wait("the policy", |snap| policy(snap, "allow").contains("sa/other"));
    consul.put("culvert/broken", Some("kind: [VirtualService"));
    it.wait_problem("consul key culvert/broken:1");
    consul.put(KEY, None);
    it.wait("no policy", |snap| policy(snap, "allow").is_empty());
    consul.deregister("web", "node-a", "web-1");
    consul.deregister("web", "node-a", "web-2");
    it.wait("nothing", |snap| snap.find_service_by_host(WEB, "default").is_none() && snap.workloads().next().is_none());
}

#[test]
fn what_was_known_stays_while_consul_is_away_or_talks_nonsense() {
    let consul = Consul::start().unwrap();
    consul.register(&web("web-1", "10.0.0.1", "passing"));
    consul.put(KEY, Some(&allow("cluster.local/ns/default/sa/client")));
    let it = follow(&consul, None).synced();
    let holds = |snap: &Snapshot| endpoints(snap, WEB).len() == 1 && policy(snap, "allow").contains("sa/client");
    it.wait("the mesh", holds);
    it.wait_metric("culvert_consul_watch_up{what=\"keys\"} 1");
    for (status, body) in [(500, "No cluster leader"), (200, "{nonsense"), (200, "7"), (403, "ACL not found")] {
        for path in ["/v1/catalog", "/v1/kv", "/v1/health", "/v1/connect"] {
            consul.answer(path, Some((status, body)));
        }
        it.wait_metric("culvert_consul_watch_up{what=\"keys\"} 0");
        it.wait_metric("culvert_consul_watch_up{what=\"services\"} 0");
        it.wait_metric("culvert_consul_watch_up{what=\"instances\"} 0");
        it.wait_problem("what was known of it stays in force");
        assert!(holds(&it.mesh.load_full()), "{status} {body}");
        for path in ["/v1/catalog", "/v1/kv", "/v1/health", "/v1/connect"] {
            consul.answer(path, None);
        }
        for what in ["keys", "services", "instances"] {
            it.wait_metric(&format!("culvert_consul_watch_up{{what=\"{what}\"}} 1"));
        }
    }
    consul.away(true);
    it.wait_metric("culvert_consul_watch_up{what=\"keys\"} 0");
    assert!(holds(&it.mesh.load_full()) && it.mesh.is_synced());
    consul.away(false);
    consul.register(&web("web-2", "10.0.0.2", "passing"));
    it.wait("what came meanwhile", |snap| endpoints(snap, WEB).len() == 2);
}

#[test]
fn an_index_that_goes_back_is_followed_from_there() {
    let consul = Consul::start().unwrap();
    consul.register(&web("web-1", "10.0.0.1", "passing"));
    let it = follow(&consul, None).synced();
    consul.forget_index();
    consul.register(&web("web-2", "10.0.0.2", "passing"));
    consul.put(KEY, Some(&allow("cluster.local/ns/default/sa/client")));
    it.wait("both", |snap| endpoints(snap, WEB).len() == 2 && !policy(snap, "allow").is_empty());
    // Nothing asks without waiting.
    let before = consul.asked("/v1/catalog/services");
    std::thread::sleep(Duration::from_millis(300));
    assert!(consul.asked("/v1/catalog/services") <= before + 2);
}

#[test]
fn nothing_is_published_before_everything_was_told() {
    let consul = Consul::start().unwrap();
    consul.register(&web("web-1", "10.0.0.1", "passing"));
    consul.answer("/v1/health/service/web", Some((500, "rpc error")));
    let it = follow(&consul, None);
    it.wait_problem("rpc error");
    assert!(!it.mesh.is_synced());
    consul.answer("/v1/health/service/web", None);
    let it = it.synced();
    assert_eq!(endpoints(&it.mesh.load_full(), WEB), [Health::Healthy]);
}

#[test]
fn policies_that_may_not_be_read_close() {
    for path in ["/v1/kv", "/v1/connect"] {
        let consul = Consul::start().unwrap();
        consul.register(&web("web-1", "10.0.0.1", "passing"));
        consul.answer(path, Some((403, "Permission denied")));
        let it = follow(&consul, Some("lesser")).synced();
        it.wait("everything denies", is_closed);
        consul.answer(path, None);
        it.wait("open again", |snap| !is_closed(snap));
    }
    // What is left out without a word.
    for (token, acl, filtered) in [(None, true, false), (Some("lesser"), true, true)] {
        let consul = Consul::start().unwrap();
        consul.acl(acl, filtered);
        let it = follow(&consul, token).synced();
        it.wait("everything denies", is_closed);
        consul.acl(false, false);
        it.wait("open again", |snap| !is_closed(snap));
    }
}

#[test]
fn intentions_take_away() {
    let consul = Consul::start().unwrap();
    consul.register(&web("web-1", "10.0.0.1", "passing"));
    let intention = |source: &str, action: &str| json!({ "SourceName": source, "DestinationName": "web", "Action": action });
    consul.intend(vec![intention("client", "allow")], true);
    let it = follow(&consul, None).synced();
    it.wait("only the client", |snap| {
        let text = policy(snap, "intentions.web.consul");
        text.contains("Deny") && text.contains("sa/client")
    });
    consul.intend(Vec::new(), false);
    it.wait("nothing", |snap| policy(snap, "intentions.web.consul").is_empty());
}

#[test]
fn more_services_than_connections_take_turns() {
    let consul = Consul::start().unwrap();
    let one = |at: usize, status: &str| {
        json!({
            "Node": "node-a", "Address": "192.0.2.1", "Checks": [{ "Status": status }],
            "Service": { "Service": format!("s{at}"), "Port": 1000 + at },
        })
    };
    for at in 0..70 {
        consul.register(&one(at, "passing"));
    }
    let it = follow(&consul, None).synced();
    it.wait("all", |snap| snap.workloads().filter(|w| w.health == Health::Healthy).count() == 70);
    it.wait_metric("culvert_consul_services 70");
    for at in 0..70 {
        consul.register(&one(at, "critical"));
    }
    it.wait("everybody's turn", |snap| snap.workloads().filter(|w| w.health == Health::Unhealthy).count() == 70);
}
