//! What a scenario is: objects for Culvert, the same as Envoy configuration, endpoints, and requests that both get.
use serde_json::{Value, json};

use crate::istiod;

/// One service with its objects, and the requests to it.
#[derive(Clone, Debug)]
pub struct Scenario {
    /// Name of the service, too.
    pub name: &'static str,
    /// Versions of its pods and how many of each. The version `dead` has nothing listening, `hang` never takes a connection.
    pub pods: Vec<(&'static str, usize)>,
    /// Name of the service's port, which declares its protocol.
    pub port_name: &'static str,
    /// YAML of the objects.
    pub objects: String,
    /// Envoy's routes.
    pub routes: Vec<Value>,
    /// Merged into every Envoy cluster of this service.
    pub cluster: Value,
    /// Envoy's HTTP filters before the usual ones, and between them and the router.
    pub filters: Vec<Value>,
    /// See `filters`.
    pub last_filters: Vec<Value>,
    /// What is merged into Envoy's connection manager.
    pub manager: Value,
    /// How paths are normalised.
    pub paths: Paths,
    /// Lines of the access log beside the one every request has: formats (text, or an object), and which requests they tell.
    pub lines: Vec<(Value, Option<&'static str>)>,
    /// Of MeshConfig's `extensionProviders`.
    pub providers: Vec<Value>,
    /// Labels of the metrics and their CEL expressions.
    pub tags: Vec<(&'static str, &'static str)>,
    /// Cases.
    pub cases: Vec<Case>,
}

/// Where an EnvoyFilter puts a filter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum At {
    /// Before all others.
    First,
    /// Before the router.
    Last,
}

/// How paths are normalised (`meshConfig.pathNormalization`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Paths {
    /// Not at all.
    None,
    /// Dot segments, backslashes, escapes.
    Base,
    /// And runs of slashes.
    Merge,
    /// And escaped slashes.
    DecodeAndMerge,
}

/// A service without objects: one pod, the default route.
pub fn scenario(name: &'static str) -> Scenario {
    Scenario {
        name,
        pods: vec![("v1", 1)],
        port_name: "http",
        objects: String::new(),
        routes: Vec::new(),
        cluster: json!({}),
        filters: Vec::new(),
        last_filters: Vec::new(),
        manager: json!({}),
        paths: Paths::Base,
        lines: Vec::new(),
        providers: Vec::new(),
        tags: Vec::new(),
        cases: Vec::new(),
    }
}

impl Scenario {
    /// Host name of the service.
    pub fn host(&self) -> String {
        host(self.name)
    }

    /// Pods by version.
    pub fn pods(mut self, pods: &[(&'static str, usize)]) -> Self {
        self.pods = pods.to_vec();
        self
    }

    /// Another name of the port.
    pub fn port(mut self, name: &'static str) -> Self {
        self.port_name = name;
        self
    }

    /// A VirtualService for this host with this `http` list.
    pub fn virtual_service(self, http: &str) -> Self {
        let (name, host) = (self.name, self.host());
        let body = indent(&http.replace("$HOST", &host), 2);
        self.object(&format!(
            "apiVersion: networking.istio.io/v1\nkind: VirtualService\nmetadata: {{ name: {name}, namespace: d }}\nspec:\n  hosts: [{host}]\n  http:\n{body}"
        ))
    }

    /// A DestinationRule for this host with this `trafficPolicy` (may be empty) and one subset per version.
    pub fn destination_rule(self, policy: &str) -> Self {
        let (name, host) = (self.name, self.host());
        let subsets: String =
            self.pods.iter().map(|(v, _)| format!("  - {{ name: {v}, labels: {{ version: {v} }} }}\n")).collect();
        let policy = if policy.is_empty() { String::new() } else { format!("  trafficPolicy:\n{}", indent(policy, 4)) };
        self.object(&format!(
            "apiVersion: networking.istio.io/v1\nkind: DestinationRule\nmetadata: {{ name: {name}, namespace: d }}\nspec:\n  host: {host}\n{policy}  subsets:\n{subsets}"
        ))
    }

    /// An HTTPRoute whose parent is this service.
    pub fn http_route(self, rules: &str) -> Self {
        let name = self.name;
        let rules = indent(&rules.replace("$NAME", name), 2);
        self.object(&format!(
            "apiVersion: gateway.networking.k8s.io/v1\nkind: HTTPRoute\nmetadata: {{ name: {name}, namespace: d }}\nspec:\n  parentRefs: [{{ group: '', kind: Service, name: {name} }}]\n  rules:\n{rules}"
        ))
    }

    /// Any object; `$NAME` and `$HOST` are of the service.
    pub fn object(mut self, yaml: &str) -> Self {
        let yaml = yaml.replace("$NAME", self.name).replace("$HOST", &self.host());
        self.objects += "---\n";
        self.objects += &yaml;
        self.objects += "\n";
        self
    }

    /// A route of Envoy.
    pub fn route(mut self, route: istiod::Route) -> Self {
        self.routes.push(route.into_json(self.name));
        self
    }

    /// What every cluster of it has beside the defaults.
    pub fn cluster(mut self, patch: Value) -> Self {
        istiod::merge(&mut self.cluster, patch);
        self
    }

    /// A TrafficPolicy for this service, of these sections.
    pub fn traffic_policy(self, sections: &str) -> Self {
        self.object(&format!(
            "apiVersion: culvert.dev/v1alpha1\nkind: TrafficPolicy\nmetadata: {{ name: $NAME, namespace: d }}\nspec:\n  \
             targetRefs: [{{ group: '', kind: Service, name: $NAME }}]\n{sections}"
        ))
    }

    /// A filter of Envoy before the usual ones.
    pub fn filter(mut self, name: &str, kind: &str, config: Value) -> Self {
        self.filters.push(istiod::filter(name, kind, config));
        self
    }

    /// A filter of Envoy before the router.
    pub fn last_filter(mut self, name: &str, kind: &str, config: Value) -> Self {
        self.last_filters.push(istiod::filter(name, kind, config));
        self
    }

    /// An EnvoyFilter that puts a filter there, and the filter at Envoy. To be called before `filter` where it comes first.
    pub fn envoy_filter(mut self, at: At, name: &str, kind: &str, config: Value) -> Self {
        let value = istiod::filter(name, kind, config);
        let router = json!({"filterChain": {"filter": {
            "name": "envoy.filters.network.http_connection_manager", "subFilter": {"name": "envoy.filters.http.router"},
        }}});
        let (operation, listener) = if at == At::First { ("INSERT_FIRST", json!({})) } else { ("INSERT_BEFORE", router) };
        let patch = json!([{
            "applyTo": "HTTP_FILTER", "match": {"context": "SIDECAR_INBOUND", "listener": listener},
            "patch": {"operation": operation, "value": value},
        }]);
        if at == At::First {
            self.filters.push(value);
        } else {
            self.last_filters.push(value);
        }
        let number = self.filters.len() + self.last_filters.len();
        self.object(&format!(
            "apiVersion: networking.istio.io/v1alpha3\nkind: EnvoyFilter\nmetadata: {{ name: $NAME-{number}, namespace: d }}\nspec:\n  \
             targetRefs: [{{ group: '', kind: Service, name: $NAME }}]\n  configPatches: {patch}"
        ))
    }

    /// A line more in the access log, of requests of which the expression (if any) is true.
    pub fn line(mut self, format: Value, when: Option<&'static str>) -> Self {
        self.lines.push((format, when));
        self
    }

    /// A label more of the metrics.
    pub fn tag(mut self, name: &'static str, expression: &'static str) -> Self {
        self.tags.push((name, expression));
        self
    }

    /// Paths are normalised so.
    pub fn paths(mut self, paths: Paths) -> Self {
        self.paths = paths;
        self
    }

    /// What Envoy's connection manager has beside the defaults.
    pub fn manager(mut self, patch: Value) -> Self {
        istiod::merge(&mut self.manager, patch);
        self
    }

    /// A case.
    pub fn case(mut self, case: Case) -> Self {
        self.cases.push(case);
        self
    }

    /// Several cases of one request each, nothing special.
    pub fn gets(self, cases: &[(&'static str, &'static str)]) -> Self {
        cases.iter().fold(self, |this, &(name, target)| this.case(case(name, get(target))))
    }
}

fn indent(text: &str, by: usize) -> String {
    let pad = " ".repeat(by);
    text.trim_matches('\n').lines().map(|line| format!("{pad}{line}\n")).collect()
}

/// Host name of a service of the suite.
pub fn host(name: &str) -> String {
    format!("{name}.d.svc.cluster.local")
}

/// Who sends a request that does not say it.
pub const CLIENT: &str = "spiffe://cluster.local/ns/d/sa/client";
/// Names who sends a request.
pub const AS: &str = "x-as";

/// In which protocol a request is sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wire {
    /// HTTP/1.1.
    Http1,
    /// HTTP/2 with prior knowledge.
    Http2,
}

/// One request.
#[derive(Clone, Debug)]
pub struct Req {
    /// Method.
    pub method: &'static str,
    /// Target.
    pub target: String,
    /// Headers, beside `host` and `x-request-id`.
    pub headers: Vec<(String, String)>,
    /// Host, if not the service's.
    pub host: Option<String>,
    /// Body.
    pub body: Vec<u8>,
    /// As chunks.
    pub chunked: bool,
    /// Bytes to be sent as they are, with `$ID` and `$HOST`.
    pub raw: Option<String>,
    /// Protocol.
    pub wire: Wire,
    /// Milliseconds before it is sent.
    pub pause: u64,
    /// Give up (close) this many milliseconds after an endpoint got it.
    pub give_up: Option<u64>,
    /// Without `x-request-id`.
    pub anonymous: bool,
    /// Sent after a 101 came; expected back.
    pub after_upgrade: Option<&'static str>,
    /// An extended CONNECT of HTTP/2 (RFC 8441), to this protocol.
    pub connects: Option<&'static str>,
}

/// A request.
pub fn request(method: &'static str, target: &str) -> Req {
    Req {
        method,
        target: target.into(),
        headers: Vec::new(),
        host: None,
        body: Vec::new(),
        chunked: false,
        raw: None,
        wire: Wire::Http1,
        pause: 0,
        give_up: None,
        anonymous: false,
        after_upgrade: None,
        connects: None,
    }
}

/// GET.
pub fn get(target: &str) -> Req {
    request("GET", target)
}

/// Bytes as they are.
pub fn raw(text: &str) -> Req {
    Req { raw: Some(text.into()), ..get("/raw") }
}

/// A gRPC call.
pub fn grpc(target: &str) -> Req {
    let mut call = request("POST", target).h2().header("content-type", "application/grpc").header("te", "trailers");
    call.body = b"\0\0\0\0\x02hi".to_vec();
    call
}

impl Req {
    /// A header more.
    pub fn header(mut self, name: &str, value: &str) -> Self {
        self.headers.push((name.into(), value.into()));
        self
    }
    /// Sent by somebody else: the waypoint is shown a certificate, Envoy told a header (in which both see it).
    pub fn by(self, whom: &str) -> Self {
        self.header(AS, whom)
    }
    /// Who sends it.
    pub fn whom(&self) -> &str {
        self.headers.iter().find(|(name, _)| name == AS).map_or(CLIENT, |(_, whom)| whom)
    }
    /// What the endpoint does.
    pub fn script(self, script: &str) -> Self {
        self.header("x-do", script)
    }
    /// Another host.
    pub fn host(mut self, host: &str) -> Self {
        self.host = Some(host.into());
        self
    }
    /// A body.
    pub fn body(mut self, body: &[u8]) -> Self {
        self.body = body.to_vec();
        self
    }
    /// A chunked body.
    pub fn chunks(mut self, body: &[u8]) -> Self {
        self.chunked = true;
        self.body(body)
    }
    /// By HTTP/2.
    pub fn h2(mut self) -> Self {
        self.wire = Wire::Http2;
        self
    }
    /// Later.
    pub fn pause(mut self, ms: u64) -> Self {
        self.pause = ms;
        self
    }
    /// The client goes so many milliseconds after an endpoint got its request.
    pub fn give_up(mut self, ms: u64) -> Self {
        self.give_up = Some(ms);
        self
    }
    /// Without a request id.
    pub fn anonymous(mut self) -> Self {
        self.anonymous = true;
        self
    }
    /// An extended CONNECT.
    pub fn connects(self, protocol: &'static str) -> Self {
        Self { method: "CONNECT", connects: Some(protocol), ..self.h2() }
    }
    /// An upgrade to WebSocket, then these bytes there and back.
    pub fn websocket(mut self, message: &'static str) -> Self {
        self.after_upgrade = Some(message);
        self.header("connection", "Upgrade").header("upgrade", "websocket")
    }
}

/// How the requests of a case are sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// One after the other, each on a connection of its own.
    InTurn,
    /// One after the other on one connection.
    OneConnection,
    /// All at once, each on a connection of its own.
    AtOnce,
}

/// What is compared.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Judge {
    /// Everything of every request.
    Whole,
    /// How many got which answer (status, flags, headers of overload, served by), not which.
    Tally,
    /// Whether a version's share in percent is within a tolerance, and the statuses.
    Share { version: &'static str, percent: f64, tolerance: f64 },
}

/// Requests, and what is compared of them.
#[derive(Clone, Debug)]
pub struct Case {
    /// Name within the scenario.
    pub name: &'static str,
    /// Requests.
    pub requests: Vec<Req>,
    /// How they are sent.
    pub order: Order,
    /// What is compared.
    pub judge: Judge,
    /// Whether the request arrives depends on time: what the endpoints saw is not compared.
    pub arrives_or_not: bool,
    /// Wait until the endpoints saw this many requests in all (mirrors come when they come).
    pub arrivals: Option<usize>,
    /// The whole must take at least, at most (milliseconds).
    pub takes: Option<(u64, u64)>,
    /// There may be no answer at all.
    pub silent: bool,
}

/// A case of one request.
pub fn case(name: &'static str, request: Req) -> Case {
    Case {
        name,
        requests: vec![request],
        order: Order::InTurn,
        judge: Judge::Whole,
        arrives_or_not: false,
        arrivals: None,
        takes: None,
        silent: false,
    }
}

impl Case {
    /// Another request.
    pub fn then(mut self, request: Req) -> Self {
        self.requests.push(request);
        self
    }
    /// The last request this many times in all.
    pub fn times(mut self, n: usize) -> Self {
        if let Some(last) = self.requests.last().cloned() {
            self.requests.extend(std::iter::repeat_n(last, n - 1));
        }
        self
    }
    /// All at once.
    pub fn at_once(mut self) -> Self {
        self.order = Order::AtOnce;
        self
    }
    /// On one connection.
    pub fn one_connection(mut self) -> Self {
        self.order = Order::OneConnection;
        self
    }
    /// Only how many got what.
    pub fn tally(mut self) -> Self {
        self.judge = Judge::Tally;
        self
    }
    /// Only whether the share of a version is right.
    pub fn share(mut self, version: &'static str, percent: f64, tolerance: f64) -> Self {
        self.judge = Judge::Share { version, percent, tolerance };
        self
    }
    /// It may or may not arrive.
    pub fn arrives_or_not(mut self) -> Self {
        self.arrives_or_not = true;
        self
    }
    /// Wait for this many arrivals at the endpoints.
    pub fn arrivals(mut self, n: usize) -> Self {
        self.arrivals = Some(n);
        self
    }
    /// There need not be an answer.
    pub fn silent(mut self) -> Self {
        self.silent = true;
        self
    }
    /// Time the case takes.
    pub fn takes(mut self, least: u64, most: u64) -> Self {
        self.takes = Some((least, most));
        self
    }
}
