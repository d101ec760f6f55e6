//! Small meshes for tests.
use crate::addr::{Network, NetworkAddr};
use crate::change::Change;
use crate::conn::{InboundConn, OutboundConn};
use crate::id::{SpiffeId, TrustDomain};
use crate::l7::route::RequestFacts;
use crate::policy::{Action, Clause, Match, Policy, PolicyBody, PolicyKey, Rule, Scope, TextMatch};
use crate::service::{AppProtocol, Service, ServiceKey, ServicePort, WeightedWaypoint};
use crate::snapshot::{Snapshot, Viewpoint};
use crate::workload::{GatewayDestination, GatewayRef, Protocol, Workload};
use http::header::{HeaderMap, HeaderName, HeaderValue};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

pub fn ip(s: &str) -> IpAddr {
    s.parse().expect("an ip")
}
pub fn sock(s: &str) -> SocketAddr {
    s.parse().expect("a socket address")
}
pub fn id(td: &str, ns: &str, sa: &str) -> SpiffeId {
    SpiffeId::new(&TrustDomain::parse(td).expect("td"), ns, sa).expect("id")
}
/// An HBONE pod on node `n1`.
pub fn pod(ns: &str, name: &str, addr: &str) -> Workload {
    let mut w = Workload::new(&format!("c//Pod/{ns}/{name}"), name, ns);
    w.ips = vec![ip(addr)];
    w.protocol = Protocol::Hbone;
    w.node = "n1".into();
    w.service_account = name.into();
    w
}
/// A service with ports `(port, target)`.
pub fn service(ns: &str, name: &str, vip: &str, ports: &[(u16, u16)]) -> Service {
    let mut s = Service::new(name, ns, &format!("{name}.{ns}.svc.cluster.local"));
    s.vips = vec![NetworkAddr { network: Network::default(), ip: ip(vip) }];
    s.ports =
        ports.iter().map(|(port, target)| ServicePort { port: *port, target: *target, protocol: AppProtocol::Tcp }).collect();
    s
}
pub fn key(ns: &str, name: &str) -> ServiceKey {
    ServiceKey::new(ns, &format!("{name}.{ns}.svc.cluster.local"))
}
/// Puts a workload behind a service.
pub fn backs(mut w: Workload, service: &ServiceKey, ports: &[(u16, u16)]) -> Workload {
    w.services.insert(service.clone(), ports.into());
    w
}
pub fn by_service(key: ServiceKey) -> GatewayRef {
    GatewayRef { destination: GatewayDestination::Service(key), hbone_port: 15008 }
}
pub fn by_addr(network: &str, addr: &str) -> GatewayRef {
    GatewayRef { destination: GatewayDestination::Address(network.into(), ip(addr)), hbone_port: 15008 }
}
pub fn weighted(waypoint: GatewayRef, weight: u32) -> WeightedWaypoint {
    WeightedWaypoint { waypoint, weight }
}
pub fn view() -> Viewpoint {
    Viewpoint { node: "n1".into(), ..Viewpoint::default() }
}
pub fn mesh(objects: Vec<Change>) -> Snapshot {
    Snapshot::empty(view()).apply(&objects)
}
pub fn outbound<'a>(source: &'a Workload, dst: &str) -> OutboundConn<'a> {
    let client = SocketAddr::new(source.ips[0], 40_000);
    OutboundConn { source, client: client.into(), dst: sock(dst).into(), draw: 7 }
}
pub fn inbound<'a>(client: &str, dst: &str, identity: Option<&'a SpiffeId>) -> InboundConn<'a> {
    InboundConn { client: sock(client).into(), dst: sock(dst), identity }
}
pub fn policy(ns: &str, name: &str, scope: Scope, action: Action, rules: Vec<Rule>) -> Policy {
    Policy { key: PolicyKey::new(ns, name), scope, body: PolicyBody::Rules { action, dry_run: false, rules }, origin: None }
}
/// A rule of one clause with one match.
pub fn rule(m: Match) -> Rule {
    Rule { clauses: vec![Clause { matches: vec![m] }] }
}
pub fn text(s: &str) -> TextMatch {
    TextMatch::parse(s).expect("not empty")
}
pub fn from_principals(of: &[&str]) -> Match {
    let mut m = Match::default();
    m.principals.set_any(of.iter().map(|p| text(p)).collect());
    m
}
impl From<Workload> for Change {
    fn from(w: Workload) -> Self {
        Self::Workload(Arc::new(w))
    }
}
impl From<Service> for Change {
    fn from(s: Service) -> Self {
        Self::Service(Arc::new(s))
    }
}
impl From<Policy> for Change {
    fn from(p: Policy) -> Self {
        Self::Policy(Arc::new(p))
    }
}
/// An HTTP request, as its facts borrow it.
#[derive(Clone, Debug)]
pub struct Req {
    pub method: http::Method,
    pub scheme: &'static str,
    pub authority: String,
    pub path: String,
    pub query: Option<String>,
    pub headers: HeaderMap,
    pub port: u16,
}
impl Req {
    /// `GET http://h.com<target>`, port 80.
    pub fn get(target: &str) -> Self {
        let (path, query) = target.split_once('?').map_or((target, None), |(p, q)| (p, Some(q)));
        Self {
            method: http::Method::GET,
            scheme: "http",
            authority: "h.com".into(),
            path: path.into(),
            query: query.map(str::to_owned),
            headers: HeaderMap::new(),
            port: 80,
        }
    }
    pub fn method(mut self, method: http::Method) -> Self {
        self.method = method;
        self
    }
    pub fn host(mut self, authority: &str) -> Self {
        self.authority = authority.into();
        self
    }
    pub fn header(mut self, name: &'static str, value: impl AsRef<[u8]>) -> Self {
        let value = HeaderValue::from_bytes(value.as_ref()).expect("a header value");
        self.headers.append(HeaderName::from_static(name), value);
        self
    }
    pub fn facts(&self) -> RequestFacts<'_> {
        RequestFacts {
            method: &self.method,
            scheme: self.scheme,
            authority: &self.authority,
            path: &self.path,
            query: self.query.as_deref(),
            headers: &self.headers,
            port: self.port,
            claims: None,
        }
    }
}
