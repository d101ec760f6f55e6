//! A mesh of a given size for the measurements.
use mesh_model::addr::{Network, NetworkAddr};
use mesh_model::policy::{Action, Clause, Match, Policy, PolicyBody, PolicyKey, Rule, Scope, TextMatch};
use mesh_model::service::{AppProtocol, LbMode, LbScope, Service, ServicePort};
use mesh_model::snapshot::Viewpoint;
use mesh_model::workload::{Locality, Protocol, Workload};
use mesh_model::{Change, Snapshot};
use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;

/// Text shared as a source would share it.
pub struct Shared {
    hbone_node: Vec<Arc<str>>,
    namespaces: Vec<Arc<str>>,
    cluster: Arc<str>,
    kind: Arc<str>,
    latest: Arc<str>,
    zones: Vec<Arc<str>>,
    services: Vec<(Arc<str>, mesh_model::service::ServiceKey)>,
    ports: Arc<[(u16, u16)]>,
    empty: Arc<str>,
    network: Network,
    td: mesh_model::TrustDomain,
}
impl Shared {
    /// `services` services over 100 namespaces and 400 nodes.
    pub fn new(services: usize) -> Self {
        let namespaces: Vec<Arc<str>> = (0..100).map(|i| format!("team-{i}").into()).collect();
        let service = |i: usize| {
            let ns = &namespaces[i % 100];
            let name: Arc<str> = format!("app-{i}").into();
            let host = format!("{name}.{ns}.svc.cluster.local");
            (name, mesh_model::service::ServiceKey { namespace: Arc::clone(ns), hostname: host.into() })
        };
        Self {
            hbone_node: (0..400).map(|i| format!("node-{i}").into()).collect(),
            services: (0..services).map(service).collect(),
            namespaces,
            cluster: "Kubernetes".into(),
            kind: "deployment".into(),
            latest: "latest".into(),
            zones: (0..3).map(|i| format!("zone-{i}").into()).collect(),
            ports: Arc::new([(80, 8080)]),
            empty: "".into(),
            network: Network::default(),
            td: mesh_model::TrustDomain::default(),
        }
    }
    pub fn workload(&self, i: usize) -> Workload {
        let s = i % self.services.len();
        let (app, key) = &self.services[s];
        let name: Arc<str> = format!("{app}-6b5f9c7d4-{i}").into();
        let ns = Arc::clone(&self.namespaces[s % 100]);
        let ip = u32::from(Ipv4Addr::new(10, 0, 0, 1)) + i as u32;
        Workload {
            uid: format!("Kubernetes//Pod/{ns}/{name}").into(),
            name,
            namespace: ns,
            service_account: Arc::clone(app),
            trust_domain: self.td.clone(),
            ips: vec![IpAddr::V4(Ipv4Addr::from(ip))],
            hostname: None,
            network: self.network.clone(),
            protocol: Protocol::Hbone,
            network_mode: mesh_model::workload::NetworkMode::default(),
            native_tunnel: false,
            node: Arc::clone(&self.hbone_node[i % 400]),
            cluster: Arc::clone(&self.cluster),
            locality: Locality {
                region: Arc::clone(&self.zones[0]),
                zone: Arc::clone(&self.zones[i % 3]),
                subzone: Arc::clone(&self.empty),
            },
            workload_name: Arc::clone(app),
            workload_type: Arc::clone(&self.kind),
            canonical_name: Arc::clone(app),
            canonical_revision: Arc::clone(&self.latest),
            health: mesh_model::workload::Health::default(),
            capacity: 1,
            services: [(key.clone(), Arc::clone(&self.ports))].into_iter().collect(),
            policies: Arc::default(),
            waypoint: None,
            waypoint_error: None,
            network_gateway: None,
            application_tunnel: None,
            netns: None,
            labels: mesh_model::labels::Labels::default(),
            origin: None,
        }
    }
    pub fn service(&self, i: usize) -> Service {
        let (name, key) = &self.services[i];
        let mut s = Service::new(name, &key.namespace, &key.hostname);
        let ip = u32::from(Ipv4Addr::new(172, 16, 0, 1)) + i as u32;
        s.vips = vec![NetworkAddr { network: self.network.clone(), ip: IpAddr::V4(Ipv4Addr::from(ip)) }];
        s.ports = vec![ServicePort { port: 80, target: 8080, protocol: AppProtocol::Http11 }];
        s.canonical = true;
        s.lb.scopes = vec![LbScope::Network, LbScope::Region, LbScope::Zone];
        s.lb.mode = LbMode::Failover;
        s
    }
}
/// Ten rules, each for another service account and a port.
pub fn policy(i: usize, namespace: &str, scope: Scope, action: Action) -> Policy {
    let rule = |r: usize| {
        let mut from = Match::default();
        from.principals.set_any(vec![TextMatch::Exact(format!("cluster.local/ns/other-{}/sa/sa-{i}-{r}", i % 50).into())]);
        let mut to = Match::default();
        to.destination_ports.set_any(vec![8080]);
        Rule { clauses: vec![Clause { matches: vec![to] }, Clause { matches: vec![from] }] }
    };
    Policy {
        key: PolicyKey::new(namespace, &format!("policy-{i}")),
        scope,
        body: PolicyBody::Rules { action, dry_run: false, rules: (0..10).map(rule).collect() },
        origin: None,
    }
}
pub fn view() -> Viewpoint {
    Viewpoint {
        node: "node-0".into(),
        locality: Locality { region: "zone-0".into(), zone: "zone-0".into(), subzone: "".into() },
        ..Viewpoint::default()
    }
}
/// `workloads` over `services`.
#[allow(dead_code, reason = "`load` builds its own")]
pub fn mesh(workloads: usize, services: usize) -> (Shared, Snapshot) {
    let shared = Shared::new(services);
    let mut changes: Vec<Change> = (0..services).map(|i| Change::Service(Arc::new(shared.service(i)))).collect();
    changes.extend((0..workloads).map(|i| Change::Workload(Arc::new(shared.workload(i)))));
    let snap = Snapshot::empty(view()).apply(&changes);
    (shared, snap)
}
