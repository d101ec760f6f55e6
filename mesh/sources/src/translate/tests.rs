//! Tables of objects and what becomes of them.

use std::collections::{BTreeMap, BTreeSet};

use mesh_model::l7::{Destination, GatewayRoutes, RouteTable};
use mesh_model::policy::{Action, PolicyBody, Scope, TextMatch};
use mesh_model::service::{AppProtocol, HealthPolicy, LbMode, LbScope};
use mesh_model::workload::{GatewayDestination, Health, NetworkMode, Protocol};
use proptest::prelude::*;

use super::*;
use crate::diagnostics::Severity;

/// What a mesh is after some changes.
#[derive(Debug, Default, PartialEq)]
pub(super) struct State {
    pub(super) workloads: BTreeMap<String, Arc<Workload>>,
    pub(super) services: BTreeMap<String, Arc<Service>>,
    pub(super) policies: BTreeMap<String, Arc<Policy>>,
    pub(super) routes: BTreeMap<String, Arc<RouteTable>>,
    pub(super) destinations: BTreeMap<String, Arc<Destination>>,
    pub(super) gateways: BTreeMap<String, Arc<GatewayRoutes>>,
    pub(super) l7: BTreeMap<String, Arc<mesh_model::l7::policy::L7Policies>>,
    pub(super) auths: BTreeMap<String, Arc<mesh_model::l7::request_auth::RequestAuths>>,
    pub(super) treatments: BTreeMap<String, Arc<mesh_model::l7::Treatment>>,
    own: Option<Locality>,
    network: Network,
    telemetry: Arc<mesh_model::telemetry::TelemetryRules>,
    authorizers: Arc<mesh_model::l7::authorizer::Authorizers>,
    defaults: Arc<mesh_model::defaults::MeshDefaults>,
}
impl State {
    pub(super) fn apply(&mut self, changes: Vec<Change>) {
        for c in changes {
            match c {
                Change::Workload(w) => drop(self.workloads.insert(w.uid.to_string(), w)),
                Change::WorkloadGone(u) => drop(self.workloads.remove(&*u)),
                Change::Service(s) => drop(self.services.insert(s.key.to_string(), s)),
                Change::ServiceGone(k) => drop(self.services.remove(&k.to_string())),
                Change::Policy(p) => drop(self.policies.insert(p.key.to_string(), p)),
                Change::PolicyGone(k) => drop(self.policies.remove(&k.to_string())),
                Change::Routes(k, t) => drop(self.routes.insert(k.to_string(), t)),
                Change::RoutesGone(k) => drop(self.routes.remove(&k.to_string())),
                Change::Destination(d) => drop(self.destinations.insert(d.key.to_string(), d)),
                Change::DestinationGone(k) => drop(self.destinations.remove(&k.to_string())),
                Change::Gateway(g) => drop(self.gateways.insert(g.key.to_string(), g)),
                Change::GatewayGone(k) => drop(self.gateways.remove(&k.to_string())),
                Change::L7Policies(t, p) => drop(self.l7.insert(t.to_string(), p)),
                Change::L7PoliciesGone(t) => drop(self.l7.remove(&t.to_string())),
                Change::RequestAuths(t, a) => drop(self.auths.insert(t.to_string(), a)),
                Change::RequestAuthsGone(t) => drop(self.auths.remove(&t.to_string())),
                Change::Telemetry(rules) => self.telemetry = rules,
                Change::Treatment(to, t) => drop(self.treatments.insert(to.to_string(), t)),
                Change::TreatmentGone(to) => drop(self.treatments.remove(&to.to_string())),
                Change::Authorizers(all) => self.authorizers = all,
                Change::Defaults(new) => self.defaults = new,
                Change::OwnLocality(l) => self.own = Some(l),
                Change::OwnNetwork(n) => self.network = n,
                Change::Unread(_) => {}
            }
        }
    }
    pub(super) fn w(&self, tail: &str) -> &Workload {
        let mut found = self.workloads.iter().filter(|(k, _)| k.ends_with(tail));
        let w = found.next().unwrap_or_else(|| panic!("no workload {tail} in {:?}", self.workloads.keys()));
        assert!(found.next().is_none(), "several {tail}");
        w.1
    }
    fn p(&self, key: &str) -> &Policy {
        self.policies.get(key).unwrap_or_else(|| panic!("no policy {key} in {:?}", self.policies.keys()))
    }
    fn s(&self, key: &str) -> &Service {
        self.services.get(key).unwrap_or_else(|| panic!("no service {key} in {:?}", self.services.keys()))
    }
    fn rules(&self, key: &str) -> (Action, &[mesh_model::policy::Rule]) {
        match &self.p(key).body {
            PolicyBody::Rules { action, rules, .. } => (*action, rules),
            PolicyBody::Unusable { why } => panic!("{key} is unusable: {why}"),
        }
    }
    fn unusable(&self, key: &str) -> &str {
        match &self.p(key).body {
            PolicyBody::Unusable { why } => why,
            PolicyBody::Rules { .. } => panic!("{key} is usable"),
        }
    }
}

pub(super) fn view() -> Viewpoint {
    Viewpoint { cluster: "c1".into(), node: "n1".into(), ..Viewpoint::default() }
}
pub(super) fn objects(t: &mut Translator, text: &str) -> (Vec<Object>, Vec<Problem>) {
    let (mut objects, mut problems) = (Vec::new(), Vec::new());
    for doc in crate::yaml::documents(text) {
        let root = crate::yaml::parse_whole(doc).unwrap();
        let mut r = t.reader("t.yaml".into());
        objects.extend(r.object(&root));
        problems.append(&mut r.problems);
    }
    (objects, problems)
}
pub(super) fn mesh(text: &str) -> (State, Vec<Problem>) {
    mesh_with(text, &Settings::default())
}
/// What a waypoint or gateway knows.
pub(super) fn mesh7(text: &str) -> (State, Vec<Problem>) {
    mesh_with(text, &layer7())
}
pub(super) fn layer7() -> Settings {
    Settings { layer7: true, ..Settings::default() }
}
fn mesh_with(text: &str, settings: &Settings) -> (State, Vec<Problem>) {
    let mut t = Translator::new(view(), settings);
    let (objects, mut problems) = objects(&mut t, text);
    for o in objects {
        t.upsert(o);
    }
    let mut state = State::default();
    state.apply(t.flush());
    problems.extend(t.problems().cloned());
    (state, problems)
}
pub(super) fn ns(name: &str, labels: &str) -> String {
    format!("---\napiVersion: v1\nkind: Namespace\nmetadata: {{name: {name}, labels: {{{labels}}}}}\n")
}
pub(super) fn pod(ns: &str, name: &str, ip: &str, labels: &str) -> String {
    format!(
        "---\napiVersion: v1\nkind: Pod\nmetadata: {{name: {name}, namespace: {ns}, labels: {{{labels}}}}}\n\
         spec: {{nodeName: n1, serviceAccountName: sa-{name}, containers: [{{name: c, ports: [{{name: web, containerPort: 8080}}]}}]}}\n\
         status: {{phase: Running, podIP: {ip}, conditions: [{{type: Ready, status: 'True'}}]}}\n"
    )
}
fn ap(ns: &str, name: &str, spec: &str) -> String {
    format!(
        "---\napiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {{name: {name}, namespace: {ns}}}\nspec: {spec}\n"
    )
}
fn pa(ns: &str, name: &str, spec: &str) -> String {
    format!(
        "---\napiVersion: security.istio.io/v1\nkind: PeerAuthentication\nmetadata: {{name: {name}, namespace: {ns}}}\nspec: {spec}\n"
    )
}
pub(super) fn gateway(ns: &str, name: &str, labels: &str, from: &str, ready: bool) -> String {
    let status = if ready { "status: {addresses: [{type: IPAddress, value: 10.9.9.9}]}\n" } else { "" };
    format!(
        "---\napiVersion: gateway.networking.k8s.io/v1\nkind: Gateway\nmetadata: {{name: {name}, namespace: {ns}, labels: {{{labels}}}}}\n\
         spec: {{gatewayClassName: istio-waypoint, listeners: [{{name: mesh, port: 15008, protocol: HBONE, allowedRoutes: {{namespaces: {{from: {from}}}}}}}]}}\n{status}"
    )
}
pub(super) fn service(ns: &str, name: &str, extra_meta: &str, spec: &str) -> String {
    format!("---\napiVersion: v1\nkind: Service\nmetadata: {{name: {name}, namespace: {ns}{extra_meta}}}\nspec: {spec}\n")
}

#[test]
fn enrolment_follows_the_cni_rule() {
    let text = ns("amb", "istio.io/dataplane-mode: ambient")
        + &ns("plain", "")
        + &ns("kube-system", "istio.io/dataplane-mode: ambient")
        + &pod("amb", "in", "10.0.0.1", "")
        + &pod("amb", "out", "10.0.0.2", "istio.io/dataplane-mode: none")
        + &pod("amb", "ztunnel", "10.0.0.3", "app: ztunnel")
        + &pod("amb", "host", "10.0.0.4", "").replace("nodeName: n1", "nodeName: n1, hostNetwork: true")
        + &pod("amb", "side", "10.0.0.5", "").replace("labels: {}", "annotations: {sidecar.istio.io/status: x}")
        + &pod("plain", "own", "10.0.0.6", "istio.io/dataplane-mode: ambient")
        + &pod("plain", "not", "10.0.0.7", "")
        + &pod("plain", "ann", "10.0.0.8", "").replace("labels: {}", "annotations: {ambient.istio.io/redirection: enabled}")
        + &pod("kube-system", "dns", "10.0.0.9", "")
        + &pod("plain", "native", "10.0.0.10", "networking.istio.io/tunnel: http");
    let (m, problems) = mesh(&text);
    assert_eq!(problems, []);
    for (name, hbone) in [
        ("amb/in", true),
        ("amb/out", false),
        ("amb/ztunnel", false),
        ("amb/host", false),
        ("amb/side", false),
        ("plain/own", true),
        ("plain/not", false),
        ("plain/ann", true),
        ("kube-system/dns", false),
        ("plain/native", true),
    ] {
        assert_eq!(m.w(name).protocol == Protocol::Hbone, hbone, "{name}");
    }
    assert!(m.w("plain/native").native_tunnel);
    assert_eq!(m.w("amb/host").network_mode, NetworkMode::HostNetwork);
}

#[test]
fn a_pod_becomes_a_workload() {
    let text = "
apiVersion: v1
kind: Pod
metadata:
  name: web-6d4cf56db6-x
  namespace: shop
  annotations: {culvert.dev/netns: /run/netns/web}
  labels: {app: web, pod-template-hash: 6d4cf56db6, version: v2}
  ownerReferences: [{kind: ReplicaSet, name: web-6d4cf56db6, controller: true}]
spec: {nodeName: n1, serviceAccountName: web}
status: {phase: Running, podIPs: [{ip: 10.0.0.1}, {ip: 'fd00::1'}], conditions: [{type: Ready, status: 'True'}]}
---
apiVersion: v1
kind: Node
metadata: {name: n1, labels: {topology.kubernetes.io/region: r, topology.kubernetes.io/zone: z, topology.istio.io/subzone: s}}
---
{apiVersion: v1, kind: Pod, metadata: {name: done, namespace: shop}, status: {phase: Succeeded, podIP: 10.0.0.2}}
---
{apiVersion: v1, kind: Pod, metadata: {name: noip, namespace: shop}, status: {phase: Pending}}
---
{apiVersion: v1, kind: Pod, metadata: {name: going, namespace: shop, deletionTimestamp: x}, status: {podIP: 10.0.0.3, conditions: [{type: Ready, status: 'True'}]}}
---
{apiVersion: v1, kind: Pod, metadata: {name: job-28000000-a, ownerReferences: [{kind: Job, name: job-28000000, controller: true}]}, status: {podIP: 10.0.0.4}}
";
    let (m, problems) = mesh(text);
    assert_eq!(problems, []);
    assert_eq!(m.workloads.len(), 3);
    let w = m.w("c1//Pod/shop/web-6d4cf56db6-x");
    assert_eq!((&*w.workload_name, &*w.canonical_name, &*w.canonical_revision, &*w.service_account), ("web", "web", "v2", "web"));
    assert_eq!((w.ips.len(), &*w.locality.zone, w.netns.as_deref(), w.health), (2, "z", Some("/run/netns/web"), Health::Healthy));
    assert_eq!(&*m.own.as_ref().unwrap().region, "r");
    assert_eq!(w.origin.as_ref().unwrap().to_string(), "Pod shop/web-6d4cf56db6-x (t.yaml:2)");
    assert_eq!(m.w("shop/going").health, Health::Unhealthy);
    let job = m.w("default/job-28000000-a");
    assert_eq!((&*job.workload_name, &*job.service_account, &*job.canonical_revision), ("job", "default", "latest"));
}

#[test]
fn services_and_their_endpoints() {
    let text = pod("a", "p", "10.0.0.1", "app: web")
        + &service(
            "a",
            "web",
            "",
            "{clusterIP: 10.1.0.1, selector: {app: web}, ports: [{name: http-x, port: 80, targetPort: web}, {port: 81}, {name: no, port: 82, targetPort: nope}, {port: 53, protocol: UDP}]}",
        )
        + &service(
            "a",
            "headless",
            "",
            "{clusterIP: None, clusterIPs: [None], selector: {app: web}, ports: [{port: 3306}], publishNotReadyAddresses: true, ipFamilies: [IPv6]}",
        )
        + &service(
            "a",
            "local",
            "",
            "{clusterIPs: [10.1.0.2], internalTrafficPolicy: Local, trafficDistribution: PreferClose, selector: {}}",
        )
        + &service(
            "a",
            "near",
            ", annotations: {networking.istio.io/traffic-distribution: preferSameNode}",
            "{clusterIP: 10.1.0.3}",
        )
        + &service("a", "ext", "", "{type: ExternalName, externalName: x.y, selector: {app: web}}")
        + &service("a", "byhand", "", "{clusterIP: 10.1.0.4, ports: [{name: web, port: 90, targetPort: 8080}]}")
        + "---\n{apiVersion: discovery.k8s.io/v1, kind: EndpointSlice, metadata: {name: s1, namespace: a, labels: {kubernetes.io/service-name: byhand}}, addressType: IPv4, ports: [{name: web, port: 7000}], endpoints: [{addresses: [10.0.0.1], targetRef: {kind: Pod, name: p}}, {addresses: [192.0.2.1]}, {addresses: [192.0.2.2], conditions: {ready: false}}]}\n";
    let (m, problems) = mesh(&text);
    assert_eq!(problems, []);
    let web = m.s("a/web.a.svc.cluster.local");
    assert_eq!((web.vips[0].ip.to_string(), web.canonical, web.ports.len()), ("10.1.0.1".into(), true, 3));
    assert_eq!((web.port(80).unwrap().target, web.port(80).unwrap().protocol), (0, AppProtocol::Http11));
    assert_eq!(web.port(81).unwrap().target, 81);
    let w = m.w("//Pod/a/p");
    let hosts: Vec<_> = w.services.iter().map(|(k, p)| (&*k.hostname, p.to_vec())).collect();
    assert_eq!(
        hosts,
        [
            ("byhand.a.svc.cluster.local", vec![(90, 8080)]),
            ("headless.a.svc.cluster.local", vec![(3306, 3306)]),
            ("web.a.svc.cluster.local", vec![(80, 8080), (81, 81)]),
        ]
    );
    let headless = m.s("a/headless.a.svc.cluster.local");
    assert_eq!(
        (headless.vips.len(), headless.lb.health, headless.port(3306).unwrap().protocol),
        (0, HealthPolicy::AllowAll, AppProtocol::Tcp)
    );
    assert_eq!(m.s("a/local.a.svc.cluster.local").lb.mode, LbMode::Strict);
    let near = &m.s("a/near.a.svc.cluster.local").lb;
    assert_eq!((near.mode, near.scopes.last()), (LbMode::Failover, Some(&LbScope::Node)));
    assert!(!m.services.contains_key("a/ext.a.svc.cluster.local"));
    let e = m.w("EndpointSlice/a/s1/192.0.2.1");
    assert_eq!(
        (e.network_mode, e.health, e.services.values().next().unwrap().to_vec()),
        (NetworkMode::HostNetwork, Health::Healthy, vec![(90, 7000)])
    );
    assert_eq!(m.w("s1/192.0.2.2").health, Health::Unhealthy);
}

#[test]
fn service_entries_and_workload_entries() {
    let text = "
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {name: ext, namespace: a, labels: {app: ext}, creationTimestamp: '2026-01-01T00:00:00Z'}
spec:
  hosts: [API.example.com, web.a.svc.cluster.local]
  addresses: [240.0.0.1, 240.1.0.0/16]
  ports: [{number: 443, name: tls, protocol: TLS, targetPort: 8443}]
  resolution: STATIC
  subjectAltNames: ['spiffe://cluster.local/ns/a/sa/x', 'plain.example.com']
  endpoints: [{address: 192.0.2.7, ports: {tls: 9443}, weight: 3, locality: r/z}]
---
{apiVersion: networking.istio.io/v1, kind: ServiceEntry, metadata: {name: dup, namespace: a, creationTimestamp: '2026-02-01T00:00:00Z'}, spec: {hosts: [api.example.com], resolution: STATIC, endpoints: [{address: 192.0.2.8}]}}
---
{apiVersion: networking.istio.io/v1, kind: ServiceEntry, metadata: {name: dns, namespace: b}, spec: {hosts: [api.example.com], resolution: DNS, ports: [{number: 80, name: http, protocol: HTTP}]}, status: {addresses: [{value: 240.240.0.1, host: api.example.com}]}}
---
{apiVersion: networking.istio.io/v1, kind: ServiceEntry, metadata: {name: one, namespace: b}, spec: {hosts: [one.example.com], resolution: DNS_ROUND_ROBIN, ports: [{number: 80, name: http, protocol: HTTP}]}}
---
{apiVersion: networking.istio.io/v1, kind: ServiceEntry, metadata: {name: sel, namespace: a}, spec: {hosts: [vm.example.com], resolution: STATIC, workloadSelector: {labels: {vm: x}}, ports: [{number: 80, name: http, protocol: HTTP}]}}
---
{apiVersion: networking.istio.io/v1, kind: ServiceEntry, metadata: {name: none, namespace: a}, spec: {hosts: ['*.wild.com'], ports: [{number: 80, name: http, protocol: HTTP}]}}
---
{apiVersion: networking.istio.io/v1, kind: WorkloadEntry, metadata: {name: vm1, namespace: a, annotations: {ambient.istio.io/redirection: enabled}}, spec: {address: 10.5.0.1, labels: {vm: x}, serviceAccount: vm, ports: {http: 8080}, network: n2}}
".to_owned() + &service("a", "web", "", "{clusterIP: 10.1.0.1, ports: [{port: 80}]}");
    let (m, problems) = mesh(&text);
    let s = m.s("a/api.example.com");
    assert_eq!((s.vips.len(), s.cidr_vips.len(), s.sans.len(), s.canonical, s.port(443).unwrap().target), (1, 1, 1, true, 8443));
    assert!(!m.s("b/api.example.com").canonical);
    assert_eq!(m.s("b/api.example.com").vips[0].ip.to_string(), "240.240.0.1");
    assert_eq!(&*m.s("a/web.a.svc.cluster.local").name, "web", "the Service wins over the ServiceEntry");
    let e = m.w("ServiceEntry/a/ext/192.0.2.7");
    assert_eq!((e.capacity, &*e.locality.zone, e.services.len()), (3, "z", 1));
    assert_eq!(e.services.values().next().unwrap().to_vec(), [(443, 9443)]);
    assert!(!m.workloads.keys().any(|k| k.contains("192.0.2.8")), "the younger one of a host is dropped with its endpoints");
    assert_eq!(m.w("ServiceEntry/b/dns/api.example.com").hostname.as_deref(), Some("api.example.com"));
    let logical = ["a/api.example.com", "b/api.example.com", "b/one.example.com"].map(|key| m.s(key).logical_dns);
    assert_eq!(logical, [false, false, true], "only DNS_ROUND_ROBIN makes one endpoint of all addresses");
    assert_eq!(m.w("ServiceEntry/b/one/one.example.com").hostname.as_deref(), Some("one.example.com"));
    assert_eq!(m.s("a/*.wild.com").lb.mode, LbMode::Passthrough);
    let vm = m.w("WorkloadEntry/a/vm1");
    assert_eq!((vm.protocol, &*vm.service_account, vm.network.as_str()), (Protocol::Hbone, "vm", "n2"));
    assert_eq!(vm.services.values().next().unwrap().to_vec(), [(80, 8080)]);
    let codes: BTreeSet<_> = problems.iter().filter_map(|p| p.code).collect();
    assert_eq!(codes, BTreeSet::from(["san", "shadowed-host"]));
}

#[test]
fn gateways_go_through_waypoints_where_labels_say_so() {
    let says = |value: &str| format!(", labels: {{istio.io/ingress-use-waypoint: \"{value}\"}}");
    let objects = |ns_label: &str| {
        ns("a", &format!("istio.io/use-waypoint: wp{ns_label}"))
            + &gateway("a", "wp", "", "Same", true)
            + &service("a", "inherits", "", "{}")
            + &service("a", "yes", &says("True"), "{}")
            + &service("a", "no", &says("false"), "{}")
            + &service("a", "opted-out", ", labels: {istio.io/use-waypoint: none, istio.io/ingress-use-waypoint: \"true\"}", "{}")
            + &service("a", "gone", ", labels: {istio.io/use-waypoint: gone, istio.io/ingress-use-waypoint: \"true\"}", "{}")
    };
    let told = |m: &State| -> Vec<bool> {
        let of = |s: &str| m.s(&format!("a/{s}.a.svc.cluster.local")).ingress_use_waypoint;
        ["inherits", "yes", "no", "opted-out", "gone"].map(of).to_vec()
    };
    // Without a waypoint that is asked for it says nothing; one that is not there is asked for.
    assert_eq!(told(&mesh(&objects("")).0), [false, true, false, false, true]);
    assert_eq!(told(&mesh(&objects(", istio.io/ingress-use-waypoint: \"true\"")).0), [true, true, false, false, true]);
    let entry = "---\napiVersion: networking.istio.io/v1\nkind: ServiceEntry\nmetadata: {name: e, namespace: a, labels: {istio.io/ingress-use-waypoint: \"true\"}}\nspec: {hosts: [e.example], ports: [{number: 80, name: http}], resolution: STATIC}\n";
    assert!(mesh(&(objects("") + entry)).0.s("a/e.example").ingress_use_waypoint);
}

#[test]
fn waypoints_are_used_or_refused_never_passed_by() {
    let uses = |n: &str| format!(", labels: {{istio.io/use-waypoint: {n}}}");
    let base = ns("a", "istio.io/use-waypoint: wp")
        + &pod("a", "p", "10.0.0.1", "")
        + &service("a", "s", "", "{}")
        + &service("a", "opt", &uses("none"), "{}")
        + &service("a", "own", &uses("other"), "{}")
        + &service("a", "wpsvc", ", labels: {gateway.istio.io/managed: istio.io-mesh-controller}", "{}");
    let key = |s: &str| format!("a/{s}.a.svc.cluster.local");
    // Missing: refused for all who asked, by label or by namespace.
    let (m, problems) = mesh(&base);
    assert!(m.s(&key("s")).waypoint_error.as_ref().unwrap().contains("a/wp does not exist"));
    assert!(m.w("a/p").waypoint_error.is_some());
    assert!(m.s(&key("own")).waypoint_error.is_some());
    assert!(m.s(&key("opt")).waypoint_error.is_none() && m.s(&key("wpsvc")).waypoint_error.is_none());
    assert_eq!(problems.iter().filter(|p| p.code == Some("waypoint")).count(), 2, "{problems:?}");
    // There: services use it, workloads only when it serves them.
    let (m, _) = mesh(&(base.clone() + &gateway("a", "wp", "", "Same", true)));
    let s = m.s(&key("s"));
    assert_eq!(s.waypoint_error, None);
    assert_eq!(s.waypoints[0].waypoint.destination, GatewayDestination::Address(Network::default(), "10.9.9.9".parse().unwrap()));
    assert_eq!((m.w("a/p").waypoint.clone(), m.w("a/p").waypoint_error.clone()), (None, None));
    let (m, _) = mesh(&(base.clone() + &gateway("a", "wp", "istio.io/waypoint-for: all", "Same", true)));
    assert!(m.w("a/p").waypoint.is_some());
    // Not ready, or not allowed: refused.
    let (m, _) = mesh(&(base.clone() + &gateway("a", "wp", "", "Same", false)));
    assert!(m.s(&key("s")).waypoint_error.as_ref().unwrap().contains("not ready"));
    let far = ns("b", "istio.io/use-waypoint: wp, istio.io/use-waypoint-namespace: a, team: x") + &service("b", "t", "", "{}");
    let t = "b/t.b.svc.cluster.local";
    let (m, _) = mesh(&(far.clone() + &gateway("a", "wp", "", "Same", true)));
    assert!(m.s(t).waypoint_error.as_ref().unwrap().contains("allowedRoutes"));
    let (m, _) = mesh(&(far.clone() + &gateway("a", "wp", "", "All", true)));
    assert_eq!(m.s(t).waypoints.len(), 1);
    let (m, _) = mesh(
        &(far.clone()
            + &gateway(
                "a",
                "wp",
                "",
                "Selector, selector: {matchLabels: {team: x}, matchExpressions: [{key: team, operator: Exists}]}",
                true,
            )),
    );
    assert_eq!(m.s(t).waypoints.len(), 1);
    // A canary takes its share; a wrong one leaves the primary.
    let canary = "---\n{apiVersion: v1, kind: Namespace, metadata: {name: a, labels: {istio.io/use-waypoint: wp, istio.io/use-waypoint-canary: c}, annotations: {istio.io/use-waypoint-canary-weight: '30'}}}\n".to_owned()
        + &service("a", "s", "", "{}") + &gateway("a", "wp", "", "Same", true);
    let (m, _) = mesh(&(canary.clone() + &gateway("a", "c", "", "Same", true).replace("10.9.9.9", "10.9.9.8")));
    assert_eq!(m.s(&key("s")).waypoints.iter().map(|w| w.weight).collect::<Vec<_>>(), [70, 30]);
    let (m, problems) = mesh(&canary);
    assert_eq!(m.s(&key("s")).waypoints.iter().map(|w| w.weight).collect::<Vec<_>>(), [100]);
    assert!(problems.iter().any(|p| p.code == Some("waypoint-canary")));
    // Instances of a waypoint have none themselves.
    let inst = ns("a", "istio.io/use-waypoint: wp")
        + &pod("a", "wp-1", "10.0.0.9", "gateway.networking.k8s.io/gateway-name: wp")
        + &gateway("a", "wp", "istio.io/waypoint-for: all", "Same", true).replace(
            "metadata: {name: wp,",
            "metadata: {annotations: {ambient.istio.io/waypoint-inbound-binding: PROXY/15088}, name: wp,",
        );
    let (m, _) = mesh(&inst);
    assert_eq!(
        (m.w("a/wp-1").waypoint.is_none(), m.w("a/wp-1").application_tunnel),
        (true, Some(mesh_model::workload::ApplicationTunnel::Proxy(Some(15088))))
    );
}

#[test]
fn policies_keep_their_scope_and_meaning() {
    let text = pod("a", "p", "10.0.0.1", "app: web")
        + &ap(
            "a",
            "sel",
            "{selector: {matchLabels: {app: web}}, rules: [{from: [{source: {principals: ['spiffe://cluster.local/ns/x/sa/y', 'cluster.local/ns/z/*'], notNamespaces: [evil], ipBlocks: [10.0.0.0/8, 1.2.3.4], serviceAccounts: [sa, ns/sa], trustDomains: [td]}}], to: [{operation: {ports: ['80'], notPorts: ['81']}}], when: [{key: source.namespace, values: ['*a']}, {key: destination.ip, notValues: ['fd00::/8']}]}]}",
        )
        + &ap("a", "all", "{rules: [{}]}")
        + &ap("a", "nothing", "{}")
        + &ap("istio-system", "global", "{action: DENY, rules: [{from: [{source: {namespaces: [bad]}}]}]}")
        + &ap("istio-system", "everywhere", "{selector: {matchLabels: {app: web}}, action: DENY, rules: [{}]}")
        + &ap(
            "a",
            "wp",
            "{targetRefs: [{group: gateway.networking.k8s.io, kind: Gateway, name: w}], action: CUSTOM, provider: {name: x}}",
        )
        + &ap("a", "audit", "{action: AUDIT}")
        + &ap("a", "dry", "{action: DENY, rules: [{}]}")
            .replace("name: dry,", "name: dry, annotations: {istio.io/dry-run: 'true'},");
    let (m, problems) = mesh(&text);
    assert_eq!(problems.iter().map(|p| (p.severity, p.code)).collect::<Vec<_>>(), [(Severity::Note, Some("action"))]);
    assert_eq!(
        m.policies.keys().map(|k| &**k).collect::<Vec<_>>(),
        ["a/all", "a/dry", "a/nothing", "a/sel", "istio-system/everywhere", "istio-system/global"]
    );
    assert_eq!(*m.w("a/p").policies, [PolicyKey::new("a", "sel"), PolicyKey::new("istio-system", "everywhere")]);
    assert_eq!(
        (m.p("a/sel").scope, m.p("a/all").scope, m.p("istio-system/global").scope),
        (Scope::Selector, Scope::Namespace, Scope::Global)
    );
    let (action, rules) = m.rules("a/sel");
    assert_eq!((action, rules.len(), rules[0].clauses.len()), (Action::Allow, 1, 4));
    let to = &rules[0].clauses[0].matches[0];
    assert_eq!((to.destination_ports.any(), to.destination_ports.none()), ([80].as_slice(), [81].as_slice()));
    let from = &rules[0].clauses[1].matches[0];
    assert_eq!(
        from.principals.any(),
        [TextMatch::Exact("cluster.local/ns/x/sa/y".into()), TextMatch::Prefix("cluster.local/ns/z/".into())]
    );
    assert_eq!(from.service_accounts.any(), [("a".into(), "sa".into()), ("ns".into(), "sa".into())]);
    assert_eq!((from.namespaces.none().len(), from.source_ips.any().len(), from.trust_domains.any().len()), (1, 2, 1));
    assert_eq!(rules[0].clauses[2].matches[0].namespaces.any(), [TextMatch::Suffix("a".into())]);
    assert_eq!(rules[0].clauses[3].matches[0].destination_ips.none().len(), 1);
    assert_eq!(m.rules("a/all").1, [mesh_model::policy::Rule::default()]);
    assert_eq!(m.rules("a/nothing"), (Action::Allow, [].as_slice()));
    assert!(matches!(m.p("a/dry").body, PolicyBody::Rules { dry_run: true, .. }));
}

#[test]
fn http_attributes_make_allow_narrower_and_deny_wider() {
    let http = "[{to: [{operation: {methods: [GET], ports: ['80']}}], from: [{source: {requestPrincipals: ['*']}}], when: [{key: 'request.headers[x]', values: [y]}]}, {to: [{operation: {ports: ['81']}}]}]";
    let text = ap("a", "allow", &format!("{{rules: {http}}}"))
        + &ap("a", "deny", &format!("{{action: DENY, rules: {http}}}"))
        + &ap("a", "denyall", "{action: DENY, rules: [{to: [{operation: {paths: [/x]}}]}]}");
    let (m, problems) = mesh(&text);
    assert_eq!(problems.iter().filter(|p| p.code == Some("http-in-l4")).count(), 3);
    let allow = m.rules("a/allow").1;
    let nothing = mesh_model::policy::Match::default();
    assert_eq!(allow.len(), 2, "every rule keeps its number");
    assert_eq!(allow[0].clauses[0].matches, [nothing], "the rule with HTTP attributes allows nothing");
    let deny = m.rules("a/deny").1;
    assert_eq!((deny.len(), deny[0].clauses.len()), (2, 1));
    assert_eq!(deny[0].clauses[0].matches[0].destination_ports.any(), [80]);
    assert_eq!(m.rules("a/denyall").1[0].clauses.len(), 0, "denies as if the path matched: everything");
}

/// Every way to write a policy wrong: `(spec, line, field, part of the message, scope it still denies in)`.
#[test]
fn malformed_policies_deny_where_they_were_meant_to() {
    let cases: &[(&str, u32, &str, &str, Scope)] = &[
        (
            "{rules: [{from: [{source: {ipBlocks: [10.0.0.0/33]}}]}]}",
            5,
            "spec.rules[0].from[0].source.ipBlocks[0]",
            "CIDR",
            Scope::Namespace,
        ),
        (
            "{selector: {matchLabels: {a: b}}, rules: [{to: [{operation: {ports: ['http']}}]}]}",
            5,
            "spec.rules[0].to[0].operation.ports[0]",
            "not a port",
            Scope::Selector,
        ),
        (
            "{rules: [{to: [{operation: {ports: ['0']}}]}]}",
            5,
            "spec.rules[0].to[0].operation.ports[0]",
            "not a port",
            Scope::Namespace,
        ),
        (
            "{rules: [{to: [{operation: {ports: ['65536']}}]}]}",
            5,
            "spec.rules[0].to[0].operation.ports[0]",
            "not a port",
            Scope::Namespace,
        ),
        (
            "{rules: [{from: [{source: {principals: ['']}}]}]}",
            5,
            "spec.rules[0].from[0].source.principals[0]",
            "empty text",
            Scope::Namespace,
        ),
        (
            "{rules: [{from: [{source: {principals: []}}]}]}",
            5,
            "spec.rules[0].from[0].source.principals",
            "constrain nothing",
            Scope::Namespace,
        ),
        (
            "{rules: [{from: [{source: {principals: }}]}]}",
            5,
            "spec.rules[0].from[0].source.principals",
            "found nothing",
            Scope::Namespace,
        ),
        (
            "{rules: [{from: [{source: {principal: [x]}}]}]}",
            5,
            "spec.rules[0].from[0].source.principal",
            "did you mean `principals`",
            Scope::Namespace,
        ),
        ("{rules: [{from: [{source: {}}]}]}", 5, "spec.rules[0].from[0].source", "is empty", Scope::Namespace),
        ("{rules: [{from: []}]}", 5, "spec.rules[0].from", "written but empty", Scope::Namespace),
        ("{rules: [{frm: []}]}", 5, "spec.rules[0].frm", "unknown field", Scope::Namespace),
        ("{rules: [null]}", 5, "spec.rules[0]", "empty rule", Scope::Namespace),
        ("{rules: {}}", 5, "spec.rules", "expected a list", Scope::Namespace),
        (
            "{rules: [{when: [{key: source.nmespace, values: [a]}]}]}",
            5,
            "spec.rules[0].when[0].key",
            "unknown condition",
            Scope::Namespace,
        ),
        ("{rules: [{when: [{key: source.namespace}]}]}", 5, "spec.rules[0].when[0].values", "values", Scope::Namespace),
        (
            "{rules: [{from: [{source: {principals: ['a*b']}}]}]}",
            5,
            "spec.rules[0].from[0].source.principals[0]",
            "at one end",
            Scope::Namespace,
        ),
        (
            "{rules: [{from: [{source: {serviceAccounts: ['a/b/c']}}]}]}",
            5,
            "spec.rules[0].from[0].source.serviceAccounts[0]",
            "service account",
            Scope::Namespace,
        ),
        ("{action: DENNY}", 5, "spec.action", "not an action", Scope::Namespace),
        ("{action: CUSTOM, provider: {name: x}}", 5, "spec.action", "external authorizer", Scope::Namespace),
        ("{provider: {name: x}}", 5, "spec.provider", "CUSTOM", Scope::Namespace),
        ("{selector: {matchLabel: {a: b}}}", 5, "spec.selector.matchLabel", "did you mean `matchLabels`", Scope::Namespace),
        ("{selector: }", 5, "spec.selector", "written but empty", Scope::Namespace),
        ("{selector: {matchLabels: {a: 'b*'}}}", 5, "spec.selector.matchLabels.a", "wildcards", Scope::Namespace),
        ("{selector: {matchLabels: {a: b}}, targetRefs: [{kind: x}]}", 5, "spec.targetRefs", "combined", Scope::Selector),
        ("[]", 5, "spec", "expected a mapping", Scope::Namespace),
        ("{rule: [{}]}", 5, "spec.rule", "did you mean `rules`", Scope::Namespace),
        ("{action: DENY, targetRefs: oops, rulez: [1]}", 5, "spec.targetRefs", "expected a list", Scope::Namespace),
        ("{action: DENY, targetRefs: oops}", 5, "spec.targetRefs", "expected a list", Scope::Namespace),
        ("{targetRefs: }", 5, "spec.targetRefs", "written but empty", Scope::Namespace),
        ("{targetRefs: [x]}", 5, "spec.targetRefs[0]", "expected a mapping", Scope::Namespace),
        ("{targetRefs: [null]}", 5, "spec.targetRefs[0].kind", "has a kind", Scope::Namespace),
        (
            "{targetRefs: [{kind: Gateway, group: gateway.networking.k8s.io}]}",
            5,
            "spec.targetRefs[0].name",
            "has a name",
            Scope::Namespace,
        ),
        (
            "{targetRefs: [{kind: Gateway, name: w}]}",
            5,
            "spec.targetRefs[0].group",
            "gateway.networking.k8s.io",
            Scope::Namespace,
        ),
        (
            "{targetRefs: [{kind: ServiceEntry, name: w, group: x}]}",
            5,
            "spec.targetRefs[0].group",
            "networking.istio.io",
            Scope::Namespace,
        ),
        ("{targetRefs: [{kind: Service, name: w, nmae: x}]}", 5, "spec.targetRefs[0].nmae", "unknown field", Scope::Namespace),
        (
            "{targetRefs: [{kind: Service, name: w, namespace: other}]}",
            5,
            "spec.targetRefs[0].namespace",
            "own namespace",
            Scope::Namespace,
        ),
        ("{targetRef: [{kind: Service, name: w}]}", 5, "spec.targetRef", "expected a mapping", Scope::Namespace),
        (
            "{targetRef: {kind: Service, name: w}, targetRefs: [{kind: Service, name: w}]}",
            5,
            "spec.targetRef",
            "cannot both",
            Scope::Namespace,
        ),
    ];
    for (spec, line, field, message, scope) in cases {
        let (m, problems) = mesh(&ap("a", "x", spec));
        let p = problems.iter().find(|p| p.severity == Severity::Error).unwrap_or_else(|| panic!("no error for {spec}"));
        assert_eq!((p.origin.line, &*p.field), (*line, *field), "{spec}: {p}");
        assert!(p.message.contains(message), "{spec}: {p}");
        assert_eq!((&*p.origin.place, &*p.origin.object), ("t.yaml", "AuthorizationPolicy a/x"));
        m.unusable("a/x");
        assert_eq!(m.p("a/x").scope, *scope, "{spec}");
        let (m, _) = mesh(&ap("istio-system", "x", spec));
        assert_eq!(m.p("istio-system/x").scope, if *scope == Scope::Selector { Scope::Selector } else { Scope::Global });
    }
    // Readable targets: a waypoint's matter, whatever else is wrong.
    for spec in [
        "{targetRef: {kind: Service, name: w}, rules: {}}",
        "{targetRef: {kind: Service, name: w}, action: DENNY}",
        "{action: DENY, targetRefs: [{kind: Service, name: s}, {kind: Service, group: core, name: t}], rules: [{}]}",
        "{targetRef: {kind: GatewayClass, group: gateway.networking.k8s.io, name: istio-waypoint}}",
        "{targetRefs: [{kind: ServiceEntry, group: networking.istio.io, name: s, namespace: a}], action: AUDIT}",
        "{targetRefs: [{kind: NotYetKnown, group: some.group, name: s}]}",
    ] {
        let (m, problems) = mesh(&ap("a", "x", spec));
        assert_eq!((m.policies.len(), problems.len()), (0, 0), "{spec}: {problems:?}");
    }
    assert_eq!(mesh(&ap("a", "x", "{targetRefs: []}")).0.rules("a/x").0, Action::Allow, "no target is no target");
    // Wrong from the outside in: kind, version, name.
    for text in [
        "apiVersion: security.istio.io/v1\nkind: AuthorizationPolice\nmetadata: {name: x, namespace: a}\n",
        "apiVersion: security.istio.io/v9\nkind: AuthorizationPolicy\nmetadata: {name: x, namespace: a}\n",
        "kind: PeerAuthentication\nmetadata: {name: x, namespace: a}\n",
        "apiVersion: security.istio.io/v1\nkind: PeerAuthentication\nmetadata: {name: X_, namespace: a}\n",
    ] {
        let (m, problems) = mesh(text);
        assert_eq!(problems[0].severity, Severity::Error);
        let p = m.policies.values().next().unwrap();
        assert!(
            p.scope == Scope::Namespace && &*p.key.namespace == "a" && matches!(p.body, PolicyBody::Unusable { .. }),
            "{text}"
        );
    }
    let (m, _) = mesh("apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\n");
    assert_eq!(m.policies.values().next().unwrap().scope, Scope::Global);
}

#[test]
fn peer_authentication_becomes_deny_policies() {
    const STRICT: &str = "istio-system/istio_converted_static_strict";
    let base = pod("a", "p", "10.0.0.1", "app: web") + &pod("b", "q", "10.0.0.2", "app: web");
    let check = |pas: String, p: &[&str], q: &[&str]| {
        let (m, _) = mesh(&(base.clone() + &pas));
        let names = |w: &Workload| w.policies.iter().map(ToString::to_string).collect::<Vec<_>>();
        assert_eq!(
            (names(m.w("a/p")), names(m.w("b/q"))),
            (p.iter().map(ToString::to_string).collect(), q.iter().map(ToString::to_string).collect()),
            "{pas}"
        );
        m
    };
    let strict = "{mtls: {mode: STRICT}}";
    let m = check(pa("istio-system", "d", strict), &[STRICT], &[STRICT]);
    let (action, rules) = m.rules(STRICT);
    assert_eq!((action, rules[0].clauses[0].matches[0].principals.none()), (Action::Deny, [TextMatch::Presence].as_slice()));
    check(pa("istio-system", "d", strict) + &pa("a", "d", "{mtls: {mode: PERMISSIVE}}"), &[], &[STRICT]);
    check(pa("istio-system", "d", strict) + &pa("a", "d", "{mtls: {mode: UNSET}}"), &[STRICT], &[STRICT]);
    check(pa("a", "d", strict), &[STRICT], &[]);
    check(pa("a", "s", "{selector: {matchLabels: {app: other}}, mtls: {mode: STRICT}}"), &[], &[]);
    let conv = "a/converted_peer_authentication_s";
    let m = check(
        pa("a", "s", "{selector: {matchLabels: {app: web}}, mtls: {mode: STRICT}, portLevelMtls: {8080: {mode: DISABLE}}}"),
        &[conv],
        &[],
    );
    let rules = m.rules(conv).1;
    assert_eq!(
        (rules.len(), rules[0].clauses.len(), rules[0].clauses[1].matches[0].destination_ports.none()),
        (1, 2, [8080].as_slice())
    );
    let m = check(
        pa(
            "a",
            "s",
            "{selector: {matchLabels: {app: web}}, mtls: {mode: PERMISSIVE}, portLevelMtls: {8080: {mode: STRICT}, 9090: {mode: STRICT}}}",
        ),
        &[conv],
        &[],
    );
    assert_eq!(m.rules(conv).1.len(), 2);
    check(
        pa("istio-system", "d", strict)
            + &pa("a", "s", "{selector: {matchLabels: {app: web}}, portLevelMtls: {8080: {mode: DISABLE}}}"),
        &[conv],
        &[STRICT],
    );
    check(
        pa("a", "s", "{selector: {matchLabels: {app: web}}, mtls: {mode: STRICT}, portLevelMtls: {8080: {mode: STRICT}}}"),
        &[STRICT],
        &[],
    );
    // Not understood: STRICT for its scope, whatever else says otherwise.
    let open = pa("a", "o", "{selector: {matchLabels: {app: web}}, mtls: {mode: PERMISSIVE}}");
    for bad in [
        "{mtls: {mode: STRCT}}",
        "{mtls: {mod: STRICT}}",
        "{portLevelMtls: {80: {mode: DISABLE}}}",
        "{selector: {matchlabels: {}}}",
        "[]",
    ] {
        check(open.clone() + &pa("a", "bad", bad), &[STRICT], &[]);
        check(open.clone() + &pa("istio-system", "bad", bad), &[STRICT], &[STRICT]);
    }
    check(pa("a", "bad", "{selector: {matchLabels: {app: web}}, mtls: {mode: X}}"), &[STRICT], &[]);
}

#[test]
fn other_kinds_are_known_ignored_or_refused_alone() {
    let text = "
{apiVersion: networking.istio.io/v1, kind: VirtualService, metadata: {name: x}}
---
{apiVersion: apps/v1, kind: Deployment, metadata: {name: x}}
---
apiVersion: v1
kind: Servce
metadata: {name: x}
---
{apiVersion: v1, metadata: {name: x}}
---
{apiVersion: v1, kind: Service, metadata: {name: bad, namespace: a}, spec: {ports: [{port: 99999}]}}
---
{apiVersion: v1, kind: Service, metadata: {name: good, namespace: a}, spec: {clusterIP: 10.0.0.1}}
";
    let (m, problems) = mesh(text);
    let seen: Vec<_> = problems.iter().map(|p| (p.severity, p.origin.line, &*p.field, p.code.unwrap())).collect();
    assert_eq!(
        seen,
        [
            (Severity::Note, 2, "", "not-for-agent"),
            (Severity::Error, 7, "kind", "unknown-kind"),
            (Severity::Error, 10, "kind", "missing-field"),
            (Severity::Error, 12, "spec.ports[0].port", "bad-value"),
        ]
    );
    assert_eq!(m.services.len(), 1);
}

#[test]
fn the_network_is_what_we_were_told_or_what_the_root_namespace_says() {
    let text = |label: &str| {
        ns("istio-system", label)
            + &ns("a", "topology.istio.io/network: elsewhere")
            + &pod("a", "p", "10.0.0.1", "")
            + &service("a", "s", "", "{clusterIP: 10.1.0.1, selector: {}}")
            + "---\n{apiVersion: networking.istio.io/v1, kind: WorkloadEntry, metadata: {name: vm, namespace: a}, spec: {address: 10.5.0.1, network: n2}}\n"
    };
    let mut t = Translator::new(view(), &Settings::default());
    let mut state = State::default();
    for (label, network) in
        [("", ""), ("topology.istio.io/network: net1", "net1"), ("topology.istio.io/network: net2", "net2"), ("", "")]
    {
        for o in objects(&mut t, &text(label)).0 {
            t.upsert(o);
        }
        state.apply(t.flush());
        let vip = &state.s("a/s.a.svc.cluster.local").vips[0];
        assert_eq!((state.w("a/p").network.as_str(), vip.network.as_str(), state.network.as_str()), (network, network, network));
        assert_eq!(state.w("WorkloadEntry/a/vm").network.as_str(), "n2");
        assert_eq!(t.problems().count(), 0);
    }

    let mut t = Translator::new(Viewpoint { network: "net1".into(), ..view() }, &Settings::default());
    let mut state = State::default();
    for (label, want) in [("topology.istio.io/network: net1", 0), ("topology.istio.io/network: net2", 1), ("", 0)] {
        for o in objects(&mut t, &text(label)).0 {
            t.upsert(o);
        }
        state.apply(t.flush());
        assert_eq!(state.w("a/p").network.as_str(), "net1");
        let problems: Vec<&Problem> = t.problems().collect();
        assert_eq!(problems.len(), want, "{label}");
        for p in problems {
            assert_eq!((p.severity, p.code, p.origin.line), (Severity::Error, Some("network"), 2));
            assert!(p.message.contains("`net2`") && p.message.contains("`net1`") && p.fix.contains("NETWORK=net2"), "{p}");
        }
    }
}

// ---- incremental = rebuild ----

/// A small universe in which everything touches everything.
fn universe() -> Vec<Vec<String>> {
    let mut all: Vec<Vec<String>> = Vec::new();
    for n in ["a", "istio-system"] {
        all.push(vec![
            ns(n, ""),
            ns(n, "istio.io/dataplane-mode: ambient"),
            ns(n, "topology.istio.io/network: net1"),
            ns(n, "istio.io/use-waypoint: wp"),
            ns(n, "topology.istio.io/network: net2, istio.io/use-waypoint: wp, istio.io/use-waypoint-namespace: a"),
        ]);
        for p in ["p", "q"] {
            all.push(vec![
                pod(n, p, "10.0.0.1", "app: web"),
                pod(n, p, "10.0.0.2", "app: db, tier: x"),
                pod(n, p, "10.0.0.1", "app: web, gateway.networking.k8s.io/gateway-name: wp")
                    .replace("nodeName: n1", "nodeName: n2"),
                pod(n, p, "10.0.0.3", "").replace("Running", "Failed"),
            ]);
        }
        all.push(vec![
            service(n, "s", "", "{clusterIP: 10.1.0.1, selector: {app: web}, ports: [{port: 80, name: web, targetPort: web}]}"),
            service(n, "s", ", labels: {istio.io/use-waypoint: wp}", "{clusterIP: 10.1.0.1, ports: [{port: 80, name: web}]}"),
            service(n, "s", "", "{type: ExternalName, selector: {app: web}}"),
        ]);
        all.push(vec![
            format!("---\n{{apiVersion: discovery.k8s.io/v1, kind: EndpointSlice, metadata: {{name: sl, namespace: {n}, labels: {{kubernetes.io/service-name: s}}}}, ports: [{{name: web, port: 7}}], endpoints: [{{addresses: [10.0.0.1], targetRef: {{kind: Pod, name: p}}}}, {{addresses: [192.0.2.1]}}]}}\n"),
            format!("---\n{{apiVersion: discovery.k8s.io/v1, kind: EndpointSlice, metadata: {{name: sl, namespace: {n}, labels: {{kubernetes.io/service-name: s}}}}, ports: [{{name: web, port: 8}}], endpoints: [{{addresses: [192.0.2.2, 192.0.2.1]}}, {{addresses: [1.1.1.1], targetRef: {{kind: Pod, name: q}}}}]}}\n"),
        ]);
        for (i, e) in ["e1", "e2"].iter().enumerate() {
            let se = |body: &str| {
                format!(
                    "---\n{{apiVersion: networking.istio.io/v1, kind: ServiceEntry, metadata: {{name: {e}, namespace: {n}, creationTimestamp: '202{i}', labels: {{app: web, istio.io/use-waypoint: wp}}}}, spec: {body}}}\n"
                )
            };
            all.push(vec![
                se("{hosts: [x.com, s.a.svc.cluster.local], resolution: STATIC, endpoints: [{address: 192.0.2.9, network: n2}, {address: 192.0.2.8, labels: {istio.io/use-waypoint: wp}}], ports: [{number: 80, name: http}]}"),
                se("{hosts: [x.com, y.com], resolution: DNS, ports: [{number: 80, name: http}]}"),
                se("{hosts: [y.com], resolution: STATIC, workloadSelector: {labels: {app: web}}, ports: [{number: 80, name: web}]}"),
            ]);
        }
        all.push(vec![
            format!("---\n{{apiVersion: networking.istio.io/v1, kind: WorkloadEntry, metadata: {{name: w, namespace: {n}}}, spec: {{address: 10.5.0.1, labels: {{app: web}}}}}}\n"),
            format!("---\n{{apiVersion: networking.istio.io/v1, kind: WorkloadEntry, metadata: {{name: w, namespace: {n}}}, spec: {{address: vm.x, labels: {{app: db}}}}}}\n"),
            format!("---\n{{apiVersion: networking.istio.io/v1, kind: WorkloadEntry, metadata: {{name: w, namespace: {n}}}, spec: {{address: 10.5.0.1, labels: {{app: web}}, network: n2}}}}\n"),
        ]);
        all.push(vec![
            networks::tests::remote(n, "rg", "n2", "172.16.0.1"),
            networks::tests::remote(n, "rg", "n3", "172.16.0.1"),
            networks::tests::remote(n, "rg", "n2", "172.16.0.2").replace("HBONE", "TCP"),
        ]);
        all.push(vec![
            ap(n, "ap", "{selector: {matchLabels: {app: web}}, rules: [{}]}"),
            ap(n, "ap", "{selector: {matchLabels: {app: db}}, rules: [{x: 1}]}"),
            ap(n, "ap", "{action: DENY}"),
            ap(n, "ap", "{targetRefs: [{name: x}]}"),
            ap(n, "ap", "{targetRefs: [{kind: Service, name: x}]}"),
            ap(n, "ap", "{targetRefs: [{kind: Service, name: s}], rules: [{to: [{operation: {methods: [GET]}}]}]}"),
            ap(n, "ap", "{targetRefs: [{kind: Service, name: s}, {kind: Gateway, group: gateway.networking.k8s.io, name: wp}], rules: [{x: 1}]}"),
        ]);
        let tp = |name: &str, spec: &str| {
            format!(
                "---\napiVersion: culvert.dev/v1alpha1\nkind: TrafficPolicy\nmetadata: {{name: {name}, namespace: {n}}}\nspec: {spec}\n"
            )
        };
        for name in ["tp", "tp2"] {
            all.push(vec![
                tp(name, "{targetRefs: [{kind: Service, name: s}], buffer: {maxRequestBytes: 1}}"),
                tp(name, "{targetRefs: [{kind: Service, name: s}, {kind: ServiceEntry, group: networking.istio.io, name: e1}], compression: {}}"),
                tp(name, "{targetRefs: [{kind: Gateway, group: gateway.networking.k8s.io, name: wp}], x: 1}"),
                tp(name, "{x: 1}"),
            ]);
        }
        all.push(vec![
            ap(n, "ap2", "{action: DENY, targetRefs: [{kind: ServiceEntry, group: networking.istio.io, name: e1}], rules: [{}]}"),
            ap(n, "ap2", "{targetRefs: [{kind: Service, name: s}]}"),
            ap(n, "ap2", "{targetRefs: [{kind: GatewayClass, group: gateway.networking.k8s.io, name: istio-waypoint}]}"),
        ]);
        for p in ["pa1", "pa2"] {
            all.push(vec![
                pa(n, p, "{mtls: {mode: STRICT}}"),
                pa(n, p, "{mtls: {mode: PERMISSIVE}}"),
                pa(n, p, "{mtls: {mode: oops}}"),
                pa(n, p, "{selector: {matchLabels: {app: web}}, mtls: {mode: STRICT}, portLevelMtls: {8080: {mode: DISABLE}}}"),
                pa(n, p, "{selector: {matchLabels: {app: web}}, portLevelMtls: {8080: {mode: STRICT}}}"),
            ]);
        }
        for (name, created) in [("v1", "2021"), ("v2", "2020")] {
            let vs = |spec: &str| {
                format!(
                    "---\n{{apiVersion: networking.istio.io/v1, kind: VirtualService, metadata: {{name: {name}, namespace: {n}, creationTimestamp: '{created}'}}, spec: {spec}}}\n"
                )
            };
            all.push(vec![
                vs("{hosts: [s, x.com], http: [{match: [{uri: {prefix: /a}}], route: [{destination: {host: y.com, subset: one}, weight: 1}, {destination: {host: s}, weight: 2}]}]}"),
                vs("{hosts: ['*.cluster.local'], http: [{match: [{port: 80}], delegate: {name: v2, namespace: a}}, {directResponse: {status: 200}}]}"),
                vs("{http: [{route: [{destination: {host: s.a.svc.cluster.local}}]}, {match: [{uri: {exact: /x}}], route: [{destination: {host: nowhere.com}}]}]}"),
                vs("{hosts: ['*'], tcp: [{route: [{destination: {host: x.com, port: {number: 80}}}]}]}"),
                vs("{hosts: ['*.com'], http: [{rout: []}]}"),
            ]);
        }
        for (name, created) in [("d1", "2021"), ("d2", "2020")] {
            let dr = |spec: &str| {
                format!(
                    "---\n{{apiVersion: networking.istio.io/v1, kind: DestinationRule, metadata: {{name: {name}, namespace: {n}, creationTimestamp: '{created}'}}, spec: {spec}}}\n"
                )
            };
            all.push(vec![
                dr("{host: s, trafficPolicy: {loadBalancer: {simple: RANDOM}, portLevelSettings: [{port: {number: 80}}]}, subsets: [{name: one, labels: {app: web}}]}"),
                dr("{host: '*.com', trafficPolicy: {tls: {mode: MUTUAL, credentialName: s}}, subsets: [{name: one, labels: {app: db}}]}"),
                dr("{host: y.com, exportTo: ['.'], subsets: [{name: one, labels: {}}, {name: two, trafficPolicy: {tls: {mode: SIMPLE, credentialName: s}}}]}"),
                dr("{host: s, trafficPolicy: {tls: {mode: ODD}}}"),
                dr("{host: x.com, workloadSelector: {matchLabels: {app: web}}}"),
            ]);
        }
        all.push(vec![
            format!("---\n{{apiVersion: v1, kind: Secret, metadata: {{name: s, namespace: {n}}}, stringData: {{tls.crt: C, tls.key: K, ca.crt: A}}}}\n"),
            format!("---\n{{apiVersion: v1, kind: Secret, metadata: {{name: s, namespace: {n}}}, data: {{ca.crt: QQ==}}}}\n"),
        ]);
        all.push(vec![
            gateway(n, "wp", "", "Same", true),
            gateway(n, "wp", "istio.io/waypoint-for: all", "All", true),
            gateway(n, "wp", "", "All", false),
        ]);
    }
    for n in ["n1", "n2"] {
        all.push(vec![
            format!(
                "---\n{{apiVersion: v1, kind: Node, metadata: {{name: {n}, labels: {{topology.kubernetes.io/zone: z1}}}}}}\n"
            ),
            format!("---\n{{apiVersion: v1, kind: Node, metadata: {{name: {n}}}}}\n"),
        ]);
    }
    all.push(vec![
        "---\n{apiVersion: gateway.networking.k8s.io/v1, kind: GatewayClass, metadata: {name: istio-waypoint}}\n".into(),
        "---\n{apiVersion: gateway.networking.k8s.io/v1, kind: GatewayClass, metadata: {name: istio-waypoint, labels: {istio.io/waypoint-for: workload}}}\n".into(),
    ]);
    all
}

/// What the property test below found once: the label of the root namespace changes with a service, and everything is looked at.
#[test]
fn a_new_network_of_our_own_leaves_no_problem_behind() {
    let mut t = Translator::new(view(), &layer7());
    let vs = "{apiVersion: networking.istio.io/v1, kind: VirtualService, metadata: {name: v, namespace: a}, spec: {hosts: [s], http: [{directResponse: {status: 200}}]}}";
    let take = |t: &mut Translator, text: &str| {
        let object = objects(t, text).0.remove(0);
        t.upsert(object);
    };
    take(&mut t, vs);
    t.flush();
    assert_eq!(t.problems().count(), 1);
    take(&mut t, "{apiVersion: v1, kind: Namespace, metadata: {name: istio-system, labels: {topology.istio.io/network: net1}}}");
    take(
        &mut t,
        "{apiVersion: v1, kind: Service, metadata: {name: s, namespace: a}, spec: {clusterIP: 10.1.0.1, ports: [{port: 80}]}}",
    );
    t.flush();
    assert_eq!(t.problems().collect::<Vec<_>>(), Vec::<&Problem>::new());
}

/// Found by it too: everything is looked at, and a Gateway is gone that nothing was attached to.
#[test]
fn a_new_network_of_our_own_leaves_no_gateway_behind() {
    let mut t = Translator::new(view(), &layer7());
    let gateway = "{apiVersion: gateway.networking.k8s.io/v1, kind: Gateway, metadata: {name: g, namespace: a}, spec: {gatewayClassName: istio, listeners: [{name: l, port: 80, protocol: TCP}]}}";
    let gateway = objects(&mut t, gateway).0.remove(0);
    let id = gateway.id.clone();
    t.upsert(gateway);
    let mut state = State::default();
    state.apply(t.flush());
    assert_eq!(state.gateways.len(), 1);
    let labelled = "{apiVersion: v1, kind: Namespace, metadata: {name: istio-system, labels: {topology.istio.io/network: net1}}}";
    let labelled = objects(&mut t, labelled).0.remove(0);
    t.upsert(labelled);
    t.remove(&id);
    state.apply(t.flush());
    assert!(state.gateways.is_empty());
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() })]
    #[test]
    fn incremental_equals_rebuild(steps in prop::collection::vec((0usize..1000, 0usize..9, any::<bool>()), 1..60)) {
        let settings = layer7();
        let universe = universe();
        let mut held: BTreeMap<usize, usize> = BTreeMap::new();
        let mut t = Translator::new(view(), &settings);
        let mut state = State { own: Some(Locality::default()), ..State::default() };
        for (which, how, flush) in steps {
            let which = which % universe.len();
            let versions = &universe[which];
            let id = objects(&mut t, &versions[0]).0.remove(0).id;
            if how < versions.len() {
                let o = objects(&mut t, &versions[how]).0.remove(0);
                let good = |at: &usize| !objects(&mut Translator::new(view(), &layer7()), &versions[*at]).0.remove(0).is_stand_in();
                // What stands in for an unreadable object does not replace a good one.
                if !(o.is_stand_in() && held.get(&which).is_some_and(good)) {
                    held.insert(which, how);
                }
                t.upsert(o);
            } else {
                held.remove(&which);
                t.remove(&id);
            }
            if flush {
                state.apply(t.flush());
            }
        }
        state.apply(t.flush());
        prop_assert_eq!(t.flush().len(), 0, "a second flush has nothing to say");
        let mut fresh = Translator::new(view(), &settings);
        // In another order, too.
        for (which, how) in held.iter().rev() {
            let o = objects(&mut fresh, &universe[*which][*how]).0.remove(0);
            fresh.upsert(o);
        }
        let mut want = State { own: Some(Locality::default()), ..State::default() };
        want.apply(fresh.flush());
        prop_assert_eq!(&state.workloads, &want.workloads);
        prop_assert_eq!(&state.services, &want.services);
        prop_assert_eq!(&state.policies, &want.policies);
        prop_assert_eq!(&state.routes, &want.routes);
        prop_assert_eq!(&state.destinations, &want.destinations);
        prop_assert_eq!(&state.gateways, &want.gateways);
        prop_assert_eq!(&state.l7, &want.l7);
        prop_assert_eq!(&state.own, &want.own);
        let problems = |t: &Translator| { let mut v: Vec<_> = t.problems().cloned().collect(); v.sort(); v.dedup(); v };
        prop_assert_eq!(problems(&t), problems(&fresh));
    }

    #[test]
    fn no_text_panics(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        fuzz_yaml(&bytes);
    }

    #[test]
    fn no_cut_object_panics(which in 0usize..1000, cut in 0usize..800, insert in any::<u8>()) {
        let universe = universe();
        let versions = &universe[which % universe.len()];
        let mut text = versions[which % versions.len()].clone().into_bytes();
        let cut = cut % text.len();
        text[cut] = insert;
        fuzz_yaml(&text);
        text.truncate(cut);
        fuzz_yaml(&text);
    }
}

#[test]
fn only_what_is_touched_changes() {
    let mut t = Translator::new(view(), &Settings::default());
    let mut text = service("a", "s", "", "{clusterIP: 10.1.0.1, selector: {app: web}}");
    for i in 0..50 {
        text += &pod("a", &format!("p{i}"), &format!("10.0.1.{i}"), if i < 5 { "app: web" } else { "app: db" });
    }
    let (all, _) = objects(&mut t, &text);
    for o in all {
        t.upsert(o);
    }
    assert_eq!(t.flush().len(), 51);
    let change = |t: &mut Translator, text: &str| {
        let (all, _) = objects(t, text);
        for o in all {
            t.upsert(o);
        }
        t.flush().len()
    };
    assert_eq!(
        change(&mut t, &ap("a", "x", "{selector: {matchLabels: {app: web}}, rules: [{}]}")),
        6,
        "the policy and five pods"
    );
    assert_eq!(change(&mut t, &ap("a", "x", "{selector: {matchLabels: {app: web}}}")), 1, "the policy alone");
    assert_eq!(change(&mut t, &pod("a", "p0", "10.0.9.9", "app: web")), 1);
    assert_eq!(change(&mut t, &service("a", "s", "", "{clusterIP: 10.1.0.1, selector: {app: web}, ports: [{port: 80}]}")), 6);
    assert_eq!(change(&mut t, &service("a", "s", "", "{clusterIP: 10.1.0.1, selector: {app: web}, ports: [{port: 80}]}")), 0);
}

/// The reference mesh as it ships: canary by header and 95/5, retries where they may be, breaker and pools.
#[test]
fn the_reference_mesh_is_understood() {
    use mesh_model::l7::destination::{Balance, OutlierPolicy, PoolLimits, TcpKeepalive};
    use mesh_model::l7::route::{BackendRef, HttpAction, RetryOn};
    use std::time::Duration;

    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../manifests/examples/zamaz");
    let mut files: Vec<_> = std::fs::read_dir(folder).unwrap().map(|e| e.unwrap().path()).collect();
    files.retain(|f| f.extension().is_some_and(|e| e == "yaml"));
    files.sort();
    let text = files.iter().map(|f| std::fs::read_to_string(f).unwrap()).collect::<Vec<_>>().join("\n---\n");
    let (state, problems) = mesh7(&text);
    let trouble: Vec<&Problem> = problems.iter().filter(|p| p.severity != Severity::Note).collect();
    assert_eq!(trouble, Vec::<&Problem>::new());

    let table = &state.routes["zamaz/zamaz-api-service.zamaz.svc.cluster.local"];
    assert_eq!((table.broken.as_ref(), table.http.len()), (None, 3));
    let rules: Vec<_> = table
        .http
        .iter()
        .map(|r| {
            let HttpAction::Forward(f) = &r.route.action else { panic!("{r:?}") };
            let backends = f.backends.iter().map(|b| match &b.to {
                BackendRef::Service(c) => (c.subset.as_deref().unwrap(), b.weight),
                BackendRef::Invalid { why, .. } => panic!("{why}"),
            });
            (&*r.route.name, backends.collect(), f.retries(&state.defaults.retry).attempts, f.timeout)
        })
        .collect();
    let seconds = |s| Some(Duration::from_secs(s));
    assert_eq!(
        rules,
        [
            ("canary-by-header", vec![("canary", 1)], 2, None),
            ("authentication", vec![("stable", 1)], 0, seconds(5)),
            ("api", vec![("stable", 95), ("canary", 5)], 3, seconds(10)),
        ]
    );
    let HttpAction::Forward(api) = &table.http.get(2).unwrap().route.action else { panic!() };
    let retries = api.retries(&state.defaults.retry);
    assert_eq!(retries.on, RetryOn::GATEWAY_ERROR.with(RetryOn::CONNECT_FAILURE).with(RetryOn::REFUSED_STREAM));
    assert_eq!((retries.per_try, api.total_weight), (seconds(2), 100));

    let d = &state.destinations["zamaz/zamaz-api-service.zamaz.svc.cluster.local"];
    let want = PoolLimits {
        max_connections: 100,
        max_pending: 50,
        max_requests: 100,
        keepalive: Some(TcpKeepalive { probes: 9, time: Duration::from_hours(2), interval: Duration::from_secs(75) }),
        ..PoolLimits::default()
    };
    let breaker = OutlierPolicy {
        consecutive_5xx: 5,
        consecutive_gateway: 5,
        interval: Duration::from_secs(30),
        base_ejection: Duration::from_secs(30),
        max_ejection_percent: 50,
        ..OutlierPolicy::default()
    };
    for subset in [None, Some("stable"), Some("canary")] {
        let p = d.policy(subset, 80).unwrap();
        assert_eq!((&p.balance, &p.pool, p.outlier.as_ref()), (&Balance::LeastRequest, &want, Some(&breaker)));
    }
    // Every subset has its pods.
    for (name, subset) in &d.subsets {
        let of_service = state.workloads.values().filter(|w| w.services.iter().any(|(k, _)| *k == d.key));
        assert!(of_service.filter(|w| subset.labels.select(&w.labels)).count() > 0, "{name}");
    }
    let front = &state.destinations["zamaz/zamaz-frontend.zamaz.svc.cluster.local"];
    assert_eq!(front.policy.balance, Balance::RoundRobin);
}

/// A seed that is refused would start the search at nothing.
#[test]
fn the_seed_of_the_fuzzer_is_understood() {
    let (changes, problems) = fuzz_yaml(include_bytes!("../../../../tests/fuzz/seeds/layer7.yaml"));
    assert_eq!(problems.iter().filter(|p| p.severity == Severity::Error).collect::<Vec<_>>(), Vec::<&Problem>::new());
    let made = |c: &Change| match c {
        Change::Routes(_, t) => t.broken.is_none() && !t.http.is_empty(),
        Change::Destination(d) => d.broken.is_none(),
        _ => false,
    };
    assert_eq!(changes.iter().filter(|c| made(c)).count(), 3);
}

#[test]
fn only_the_routes_that_are_touched_change() {
    let v = |name: &str, spec: &str| {
        format!(
            "---\n{{apiVersion: networking.istio.io/v1, kind: VirtualService, metadata: {{name: {name}, namespace: a}}, spec: {spec}}}\n"
        )
    };
    let d = |host: &str, spec: &str| {
        format!(
            "---\n{{apiVersion: networking.istio.io/v1, kind: DestinationRule, metadata: {{name: d-{host}, namespace: a}}, spec: {{host: {host}, {spec}}}}}\n"
        )
    };
    let mut text = String::new();
    for i in 0..20 {
        text += &service("a", &format!("s{i}"), "", &format!("{{clusterIP: 10.1.0.{i}, ports: [{{port: 80}}]}}"));
        text += &v(
            &format!("v{i}"),
            &format!("{{hosts: [s{i}], http: [{{route: [{{destination: {{host: s{}, subset: x}}}}]}}]}}", (i + 1) % 20),
        );
        text += &d(&format!("s{i}"), "subsets: [{name: x}]");
    }
    text += &v("leaf", "{http: [{directResponse: {status: 200}}]}");
    let mut t = Translator::new(view(), &layer7());
    let mut change = |text: &str| -> Vec<String> {
        let (all, problems) = objects(&mut t, text);
        assert_eq!(problems, []);
        for o in all {
            t.upsert(o);
        }
        let mut out: Vec<String> = t
            .flush()
            .into_iter()
            .map(|c| match c {
                Change::Routes(k, _) => format!("routes {}", k.hostname.split('.').next().unwrap_or("")),
                Change::Destination(d) => format!("destination {}", d.key.hostname.split('.').next().unwrap_or("")),
                Change::Service(s) => format!("service {}", s.name),
                c => format!("{c:?}"),
            })
            .collect();
        out.sort();
        out
    };
    assert_eq!(change(&text).len(), 60);
    assert_eq!(change(&text), [""; 0]);
    assert_eq!(change(&v("v3", "{hosts: [s3], http: [{directResponse: {status: 200}}]}")), ["routes s3"]);
    assert_eq!(change(&v("v3", "{hosts: [s3], http: [{match: [{port: 80}], delegate: {name: leaf}}]}")), ["routes s3"]);
    assert_eq!(change(&v("leaf", "{http: [{directResponse: {status: 201}}]}")), ["routes s3"]);
    assert_eq!(change(&d("s5", "subsets: [{name: x, labels: {a: b}}]")), ["destination s5"]);
    // A port that went: the service itself, and the one that routes to it.
    assert_eq!(change(&service("a", "s7", "", "{clusterIP: 10.1.0.7, ports: [{port: 81}]}")), ["routes s6", "service s7"]);
    assert_eq!(change(&v("v9", "{hosts: [s1, s9], http: [{directResponse: {status: 200}}]}")), ["routes s1", "routes s9"]);
}

use mesh_model::addr::Network;

mod request_auth;
mod targeted_policies;
mod traffic_policies;
