//! The part of a call that passes a waypoint or a gateway: is it the one, what policies of layer 7 say, which route, and how the waypoint
//! then arrives at the endpoints.
//!
//! Owns the order of the waypoint's phases as a story (policies, then route, as the proxy has it). Upstream:
//! [`crate::explain`]. Downstream: `route`, `request`.
use super::report::{Decision, HttpQuestion, Step};
use super::{Believed, Outcome, Story, Unanswerable, decision, may_be_http, name_of, request, route};
use crate::addr::HboneAuthority;
use crate::authz_l7::{Denial, HttpFacts, InScope, L7Facts, L7Verdict, PolicyScope, remote_address};
use crate::gateway::ServiceKey;
use crate::hosts::{self, Routes};
use crate::known::Known;
use crate::l7::gateway::{GatewayKey, ListenerProtocol};
use crate::l7::path::normalize;
use crate::l7::policy::{L7Action, L7Body};
use crate::l7::route::{Backend, BackendRef, ClusterKey, Dialect, HttpAction, HttpRoute, RequestFacts, TcpFacts, TcpRoute};
use crate::l7::select::{Selected, select, select_tcp};
use crate::plan::{Front, way_by_waypoint};
use crate::reason::{Reason, Refusal};
use crate::service::Service;
use crate::snapshot::Snapshot;
use crate::waypoint::{Target, plan_tunnel};
use crate::workload::{GATEWAY_NAME, Workload};
use http::header::{AUTHORIZATION, HeaderMap, HeaderName, HeaderValue};
use http::{Method, Uri};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

/// A request, parsed.
struct Asked {
    method: Method,
    /// As the client writes it.
    authority: String,
    path: String,
    query: Option<String>,
    headers: HeaderMap,
    scheme: &'static str,
}
impl Asked {
    fn of(
        http: &HttpQuestion,
        scheme: &'static str,
        host: &str,
        normalization: crate::l7::path::PathNormalization,
    ) -> Result<Self, Unanswerable> {
        let bad = |what: String| Unanswerable::Request(what);
        let method = Method::from_bytes(http.method.as_bytes()).map_err(|_| bad(format!("`{}` is not a method", http.method)))?;
        let uri: Uri = http.path.parse().map_err(|_| bad(format!("`{}` is not a path", http.path)))?;
        let path = normalize(normalization, uri.path()).map_err(|why| bad(format!("{}: {why}; answered 400", http.path)))?;
        let mut headers = HeaderMap::new();
        for (name, value) in &http.headers {
            let name =
                HeaderName::from_bytes(name.as_bytes()).map_err(|_| bad(format!("`{name}` is not the name of a header")))?;
            let value = HeaderValue::from_str(value).map_err(|_| bad(format!("`{value}` is not the value of a header")))?;
            headers.append(name, value);
        }
        let authority = match (&http.host, headers.get(http::header::HOST)) {
            (Some(host), _) => host.clone(),
            (None, Some(host)) => String::from_utf8_lossy(host.as_bytes()).into_owned(),
            (None, None) => host.to_owned(),
        };
        Ok(Self { method, authority, path: path.into_owned(), query: uri.query().map(str::to_owned), headers, scheme })
    }
    fn facts<'a>(&'a self, port: u16, claims: Option<&'a dyn crate::l7::route::Claims>) -> RequestFacts<'a> {
        RequestFacts {
            method: &self.method,
            scheme: self.scheme,
            authority: &self.authority,
            path: &self.path,
            query: self.query.as_deref(),
            headers: &self.headers,
            port,
            claims,
        }
    }
    fn told(&self) -> String {
        let query = self.query.as_ref().map(|q| format!("?{q}")).unwrap_or_default();
        format!("{} {}://{}{}{query}", self.method, self.scheme, self.authority, self.path)
    }
}

/// What a process of layer 7 is asked for.
enum For {
    /// Through a tunnel: a service or workload.
    Mesh(Target),
    /// On a port of a gateway, where the host decides.
    Gateway {
        key: GatewayKey,
        port: u16,
        /// TLS is terminated there.
        secure: bool,
    },
}
impl For {
    fn port(&self) -> u16 {
        match self {
            Self::Mesh(target) => target.port(),
            Self::Gateway { port, .. } => *port,
        }
    }
    fn service(&self) -> Option<&Arc<Service>> {
        match self {
            Self::Mesh(target) => target.service(),
            Self::Gateway { .. } => None,
        }
    }
    fn scheme(&self) -> &'static str {
        if matches!(self, Self::Gateway { secure: true, .. }) { "https" } else { "http" }
    }
    /// The routes of a host.
    fn routes<'s>(&self, snap: &'s Snapshot, authority: &str) -> Routes<'s> {
        match self {
            Self::Mesh(target) => target.service().and_then(|s| snap.find_routes(&s.key)).map_or(Routes::Plain, Routes::Table),
            Self::Gateway { key, port, secure } => hosts::table(key, snap, *port, None, *secure, authority),
        }
    }
    /// What a route of what was addressed itself is about.
    fn key(&self) -> Option<ServiceKey> {
        match self {
            Self::Mesh(Target::Service { service, .. }) => Some(service.key.clone()),
            Self::Mesh(Target::Workload { known, .. }) => {
                let w = known.workload();
                Some(ServiceKey { namespace: Arc::clone(&w.namespace), hostname: Arc::clone(&w.uid) })
            }
            Self::Gateway { .. } => None,
        }
    }
}

fn gateway_of(me: &Workload) -> Option<GatewayKey> {
    me.labels.get(GATEWAY_NAME).map(|name| GatewayKey::new(&me.namespace, name))
}
fn scope<'a>(gateway: Option<&'a GatewayKey>, target: &'a For) -> PolicyScope<'a> {
    let namespace = match target {
        For::Mesh(Target::Service { service, .. }) => Some(&*service.key.namespace),
        For::Mesh(Target::Workload { known, .. }) => Some(&*known.workload().namespace),
        For::Gateway { .. } => None,
    };
    PolicyScope { service: target.service().map(|s| &s.key), namespace, gateway, waypoint: matches!(target, For::Mesh(_)) }
}

impl Story<'_> {
    /// The call at a gateway's own port, from a client that no tunnel brings there.
    pub(super) fn at_gateway(
        &mut self,
        question: &super::Question,
        me: &Arc<Workload>,
        port: u16,
    ) -> Option<Result<Outcome, Unanswerable>> {
        let key = GatewayKey::new(&me.namespace, me.labels.get(GATEWAY_NAME)?);
        let gateway = self.snap.find_gateway(&key)?;
        let listeners = || gateway.listeners.iter().filter(|l| l.port == port);
        let at = format!("gateway {key}");
        let secure = match listeners().find(|l| l.broken.is_none()).map(|l| l.protocol) {
            Some(ListenerProtocol::Http) => false,
            Some(ListenerProtocol::Https) => true,
            Some(ListenerProtocol::Tls | ListenerProtocol::Tcp) => {
                self.steps.push(Step::passes(at, format!("the listener on port {port} carries bytes, routed by SNI or port")));
                return Some(Ok(Outcome::new(Decision::Elsewhere, "what the route of the gateway leads to")));
            }
            None => {
                let why = listeners().find_map(|l| l.broken.as_deref()).unwrap_or("no listener has this port");
                self.steps.push(Step { passes: false, ..Step::passes(at, format!("port {port} is not listened on: {why}")) });
                return Some(Ok(Outcome::new(Decision::Denied, "the connection is refused")));
            }
        };
        let asked_for = For::Gateway { key, port, secure };
        let http = question.http.clone().unwrap_or_default();
        Some(self.ask(&http, &at, me, &asked_for))
    }
    fn ask(&mut self, http: &HttpQuestion, at: &str, me: &Arc<Workload>, asked_for: &For) -> Result<Outcome, Unanswerable> {
        let port = asked_for.port();
        let host = if port == 80 { self.target.host.clone() } else { format!("{}:{port}", self.target.host) };
        let normalization = self.settings.normalization.unwrap_or_else(|| self.snap.defaults().path_normalization);
        let asked = Asked::of(http, asked_for.scheme(), &host, normalization)?;
        self.request = Some(asked.told());
        Ok(self.as_request(at, me, asked_for, &asked))
    }

    /// The call at the waypoint `me`.
    pub(super) fn through(&mut self, question: &super::Question, me: &Arc<Workload>) -> Result<Outcome, Unanswerable> {
        let at = format!("waypoint {}", name_of(me));
        let authority = HboneAuthority::Addr(self.target.address);
        let target = match plan_tunnel(self.snap, me, self.source.namespace(), &authority) {
            Ok(target) => target,
            Err(why) => {
                let answer = format!("CONNECT is answered {}, the connection is reset", why.reason.connect_status());
                self.steps.push(Step::refuses(at, &why));
                return Ok(Outcome::new(Decision::Denied, answer));
            }
        };
        if !self.settings.layer7 {
            let text = "routes and policies of layer 7 are not known to an agent: ask the waypoint, or a folder";
            self.steps.push(Step::passes(at, text));
            return Ok(Outcome::new(Decision::Elsewhere, "decided by the waypoint"));
        }
        let http = match &question.http {
            Some(http) => Some(http.clone()),
            None => may_be_http(target.service(), target.port()).then(HttpQuestion::default),
        };
        let bytes = !may_be_http(target.service(), target.port());
        let target = For::Mesh(target);
        match http {
            Some(http) if !bytes => self.ask(&http, &at, me, &target),
            Some(_) => {
                self.notes.push("the port is declared as bytes: the waypoint does not look into them, whatever they are".into());
                Ok(self.as_bytes(&at, me, &target))
            }
            None => Ok(self.as_bytes(&at, me, &target)),
        }
    }

    fn as_request(&mut self, at: &str, me: &Arc<Workload>, target: &For, asked: &Asked) -> Outcome {
        let believed = self.believed(me, target, asked);
        let token = if let Some(Believed::True(token)) = &believed { Some(&**token) } else { None };
        let http = HttpFacts {
            method: asked.method.as_str(),
            authority: &asked.authority,
            path: &asked.path,
            headers: &asked.headers,
            token,
        };
        let mut step = self.policies(at, me, target, Some(http));
        // Tokens are looked at before policies, by rules that can be read.
        if let Some(Believed::False { status, text }) = believed
            && step.reason.as_deref() != Some(Reason::PolicyUnusable.as_str())
        {
            self.steps.push(Step { policies: step.policies, ..Step::refuses(at, &Refusal::new(Reason::TokenRefused, text)) });
            return Outcome::new(Decision::Denied, format!("{status} ({text})"));
        }
        let req = asked.facts(target.port(), token.map(|t| t as &dyn crate::l7::route::Claims));
        let plain = target.key().map(|key| HttpRoute::plain(&key, target.port()));
        let (table, selected) = match target.routes(self.snap, &asked.authority) {
            Routes::Table(table) => (Some(table), select(table, &req)),
            Routes::Plain => (None, Selected::Default),
            Routes::NoHost => (None, Selected::NotFound),
        };
        let chosen: Option<&HttpRoute> = match selected {
            Selected::Default => plain.as_ref(),
            Selected::Rule(rule) => Some(&rule.route),
            Selected::NotFound | Selected::Broken(_) => None,
        };
        step.route = chosen.map(|route| {
            let rule = if let Selected::Rule(rule) = selected { Some(rule) } else { None };
            route::http(self.snap, route, table.map(|t| &t.http).zip(rule), &req)
        });
        if !step.passes {
            self.steps.push(step);
            return Outcome::new(Decision::Denied, "403 (RBAC: access denied)");
        }
        let answer = match (selected, chosen) {
            (Selected::Broken(why), _) => {
                (step.reason, step.text) = (Some(Reason::RouteUnusable.as_str().into()), why.to_string());
                Err("503 (route_unusable)")
            }
            (_, None) => {
                step.text = match table {
                    Some(t) => {
                        let near = route::why_none(&t.http, &req).join(", ");
                        format!("the host has routes and none takes this request; the nearest asks for: {near}")
                    }
                    None => format!("no route of the gateway is for the host {}", asked.authority),
                };
                Err("404 (route_not_found)")
            }
            (_, Some(HttpRoute { action: HttpAction::Forward(f), dialect, .. })) if f.total_weight == 0 => {
                step.text = "no destination of the route has a weight".into();
                Err(if *dialect == Dialect::GatewayApi { "500 (no_backend)" } else { "503 (no_backend)" })
            }
            (_, Some(route)) => Ok(&route.action),
        };
        step.passes = answer.is_ok();
        self.steps.push(step);
        match answer {
            Err(answer) => Outcome::new(Decision::Denied, answer),
            Ok(HttpAction::Redirect(r)) => Outcome::new(Decision::Allowed, format!("{}, a redirect of the route", r.status)),
            Ok(HttpAction::Respond(r)) => Outcome::new(Decision::Allowed, format!("{}, an answer of the route", r.status)),
            Ok(HttpAction::Forward(f)) => {
                let decision = self.onward(me, target, &f.backends, f.total_weight, false);
                let answer = match decision {
                    Decision::Allowed => "what the application answers",
                    Decision::Elsewhere => "decided by the waypoint",
                    Decision::Partly => "what the application answers, or 503",
                    Decision::Denied => "503 (no endpoint takes it)",
                };
                Outcome::new(decision, answer)
            }
        }
    }

    fn as_bytes(&mut self, at: &str, me: &Arc<Workload>, target: &For) -> Outcome {
        let mut step = self.policies(at, me, target, None);
        if !step.passes {
            self.steps.push(step);
            return Outcome::new(Decision::Denied, "the connection is reset");
        }
        let table = target.service().and_then(|s| self.snap.find_routes(&s.key));
        if let Some(why) = table.and_then(|t| t.broken.as_ref()) {
            // The proxy gives this word for a connection without a usable route; the details name the object.
            self.steps.push(Step::refuses(at, &Refusal::new(Reason::NotBound, format!("route_unusable: {why}"))));
            return Outcome::new(Decision::Denied, "the connection is reset");
        }
        let facts = TcpFacts { port: target.port(), destination: Some(self.target.address.ip()), sni: None };
        let plain = || target.key().map(|key| Arc::new(TcpRoute::plain(&key, target.port())));
        let chosen = match table.and_then(|t| Some((select_tcp(t, &facts)?, t))) {
            Some((route, table)) => Some((Arc::clone(route), Some(&**table))),
            None => plain().map(|route| (route, None)),
        };
        // A gateway is never asked for bytes here.
        let Some((chosen, table)) = chosen else { return Outcome::new(Decision::Denied, "the connection is reset") };
        step.route = Some(route::bytes(self.snap, &chosen, table));
        self.steps.push(step);
        let decision = self.onward(me, target, &chosen.backends, chosen.total_weight, true);
        Outcome::new(
            decision,
            if decision == Decision::Allowed { "what the application answers" } else { "the connection is reset" },
        )
    }

    /// What becomes of the request's token; `None`: nobody looks at it.
    fn believed(&mut self, me: &Workload, target: &For, asked: &Asked) -> Option<Believed> {
        let verify = self.settings.verify?;
        let gateway = gateway_of(me);
        let rules: Vec<_> = scope(gateway.as_ref(), target).request_auths(self.snap).flat_map(|auths| auths.rules()).collect();
        if rules.is_empty() {
            if asked.headers.contains_key(AUTHORIZATION) {
                self.notes.push("no RequestAuthentication is in force: the token is not looked at, and passes as it is".into());
            }
            return None;
        }
        let believed = verify(&asked.headers, asked.query.as_deref().unwrap_or_default(), &rules);
        if let Believed::True(token) = &believed {
            self.notes.push(format!("the token is true: request principal {}/{}", token.issuer(), token.subject()));
        }
        Some(believed)
    }

    /// What the policies of layer 7 say.
    fn policies(&mut self, at: &str, me: &Workload, target: &For, http: Option<HttpFacts<'_>>) -> Step {
        let gateway = gateway_of(me);
        let scope = scope(gateway.as_ref(), target);
        let client = self.source.address.ip();
        let facts = L7Facts {
            peer: self.source.identity.as_ref(),
            client: self.source.address,
            remote: http.map_or(client, |h| remote_address(h.headers, client, self.settings.trusted_proxies)),
            destination: self.target.address,
            sni: None,
            http,
        };
        let in_scope = InScope::of(self.snap, &scope);
        let judgement = in_scope.judge(self.snap, &facts);
        let mut step = match &judgement.verdict {
            L7Verdict::Allow(Some(policy)) => Step::passes(at, format!("{} allows it", policy.key)),
            L7Verdict::Allow(None) => Step::passes(at, "no ALLOW policy is bound to it"),
            L7Verdict::Deny(denial) => Step::refuses(at, &denial.refusal()),
        };
        for matched in in_scope.custom(self.snap, &facts) {
            let L7Body::Rules { action: L7Action::Custom { provider }, .. } = &matched.policy.body else { continue };
            if matches!(self.snap.find_authorizer(provider), Some(Ok(a)) if http.is_some() || a.judges_bytes()) {
                // What it would say is not ours to know.
                step.text = format!("{} (if `{provider}` agrees, whom {} asks)", step.text, matched.policy.key);
                continue;
            }
            // Nobody can be asked: refused, whatever else is said.
            let denial = Denial { reason: Reason::NoAuthorizer, matched: Some(matched) };
            step = Step::refuses(at, &denial.refusal());
            break;
        }
        // Tokens are looked at before policies, and by rules that can be read.
        let mut auths = scope.request_auths(self.snap);
        if http.is_some()
            && let Some((key, why)) = auths.clone().find_map(|auths| auths.unusable())
        {
            step = Step::refuses(at, &Refusal::new(Reason::PolicyUnusable, format!("{key}: {why}")));
        }
        if self.settings.verify.is_none() && http.is_some_and(|h| h.headers.contains_key(AUTHORIZATION)) && auths.next().is_some()
        {
            let note = "a RequestAuthentication is in force, and the token is not verified here: a true one adds a request \
                principal and claims, a false one is answered 401";
            self.notes.push(note.into());
        }
        step.policies = request::policies(self.snap, &in_scope, &facts);
        step
    }

    /// From the waypoint to the endpoints of every backend that has a share.
    fn onward(&mut self, me: &Arc<Workload>, target: &For, backends: &[Backend], total: u64, bytes: bool) -> Decision {
        let ip = me.ips.first().map_or(IpAddr::V4(std::net::Ipv4Addr::UNSPECIFIED), IpAddr::to_canonical);
        let client = SocketAddr::new(ip, self.source.address.port());
        let identity = me.identity().ok();
        let at = name_of(me);
        let (mut outcomes, mut elsewhere) = (Vec::new(), false);
        for backend in backends.iter().filter(|b| route::share(backends, b, total) > 0) {
            let refusal = match &backend.to {
                BackendRef::Invalid { status, why } => {
                    Step { passes: false, ..Step::passes(&at, format!("{why}: answered {status}")) }
                }
                BackendRef::Service(key) if let Some(way) = self.by_waypoint(target, key, ip, me) => match way {
                    Ok(step) => {
                        self.steps.push(step);
                        outcomes.push(true);
                        elsewhere = true;
                        continue;
                    }
                    Err(why) => Step::refuses(&at, &why),
                },
                BackendRef::Service(key) => match self.cluster(target, key) {
                    Ok(reached) if !reached.is_empty() => {
                        outcomes.extend(self.arrive(&reached, client, identity.as_ref()));
                        continue;
                    }
                    Ok(_) => Step::refuses(&at, &Refusal::new(Reason::NoHealthyEndpoint, subset_of(key))),
                    // Of a request the proxy says this in details and flags only.
                    Err(why) => {
                        let reason = bytes.then(|| Reason::NotBound.as_str().to_owned());
                        Step { passes: false, reason, ..Step::passes(&at, why) }
                    }
                },
            };
            outcomes.push(false);
            self.steps.push(refusal);
        }
        match decision(outcomes.into_iter()) {
            Decision::Allowed if elsewhere => Decision::Elsewhere,
            decision => decision,
        }
    }
    /// What a gateway does that goes through the waypoint of the service; `None`: it goes to the endpoints.
    fn by_waypoint(&self, target: &For, key: &ClusterKey, own: IpAddr, me: &Workload) -> Option<Result<Step, Refusal>> {
        let service = self.snap.find_service(&key.service).filter(|_| matches!(target, For::Gateway { .. }))?;
        let way = way_by_waypoint(self.snap, service, key.port, own, &me.namespace)?;
        let told = |front: Front| {
            let waypoint = front.instances.first().map(|i| name_of(i.known.workload())).unwrap_or_default();
            let text = format!(
                "{} is reached through its waypoint {waypoint} (istio.io/ingress-use-waypoint), whose routes and policies decide the rest",
                service.key
            );
            Step::passes(name_of(me), text)
        };
        Some(way.map(told))
    }
    /// The endpoints of a cluster with their ports; why there is no such cluster.
    fn cluster(&self, target: &For, key: &ClusterKey) -> Result<Vec<(Arc<Known>, u16)>, String> {
        if let For::Mesh(Target::Workload { known, port }) = target {
            return Ok(vec![(Arc::clone(known), *port)]);
        }
        let known = self.snap.find_service(&key.service).filter(|s| s.port(key.port).is_some());
        let service = known.ok_or_else(|| format!("{} is no port of a service", subset_of(key)))?;
        let destination = self.snap.find_destination(&key.service);
        if let Some(why) = destination.and_then(|d| d.broken.as_ref()) {
            return Err(format!("destination_unusable: {why}"));
        }
        if let Some(subset) = &key.subset
            && !destination.is_some_and(|d| d.subsets.contains_key(subset))
        {
            return Err(format!("{}: no DestinationRule declares the subset", subset_of(key)));
        }
        let all = route::endpoints(self.snap, key);
        Ok(all.filter_map(|e| Some((Arc::clone(e.known()), e.target_port(service, key.port)?))).collect())
    }
}

fn subset_of(key: &ClusterKey) -> String {
    match &key.subset {
        Some(subset) => format!("{}:{} subset {subset}", key.service.hostname, key.port),
        None => format!("{}:{}", key.service.hostname, key.port),
    }
}
