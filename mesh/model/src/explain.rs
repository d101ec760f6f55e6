//! Why a hypothetical call is let through or refused: the whole way of the call by one version of the mesh, with what every
//! policy on it says.
//!
//! Owns the order of the questions (source, waypoint, endpoint) and their words. Refuses to judge: plans, verdicts and routes
//! are those of [`crate::plan`], [`crate::waypoint`], [`crate::authz`], [`crate::authz_l7`] and [`crate::l7::select`], the
//! functions the proxies call. Reads all policies and costs what a person waits for: never on the path of a connection.
//! Upstream: `snapshot`. Downstream: `meshctl why`, the admin pages.
mod conditions;
mod connection;
mod names;
mod report;
mod request;
mod route;
mod waypoint;

pub use names::Unanswerable;
pub use report::{
    Call, Decision, Destination, Effect, HttpQuestion, PassedOver, Place, PolicyTold, Question, Report, Route, Step,
};

use crate::addr::HboneAuthority;
use crate::authz::{Verdict, authorize};
use crate::authz_l7::Token;
use crate::conn::{InboundConn, OutboundConn};
use crate::id::SpiffeId;
use crate::inbound::plan_inbound;
use crate::known::Known;
use crate::l7::path::PathNormalization;
use crate::l7::policy::TargetRef;
use crate::l7::request_auth::TokenRule;
use crate::plan::{Dial, HBONE_PORT, HopRole, NamedDial, OutboundPlan, plan_outbound};
use crate::reason::{Reason, Refusal};
use crate::service::Service;
use crate::snapshot::Snapshot;
use crate::waypoint::plan_tunnel;
use crate::workload::{Protocol, Workload};
use http::HeaderMap;
use names::{Source, Target, find_source, find_target};
use std::net::SocketAddr;
use std::sync::Arc;

/// What is known beside the mesh.
#[derive(Clone, Copy)]
pub struct Settings<'a> {
    /// Routes and policies of layer 7 are in the snapshot. Without, a call to a waypoint is followed up to it.
    pub layer7: bool,
    /// How paths are normalised; `None`: as the mesh wants it.
    pub normalization: Option<PathNormalization>,
    /// Proxies in front of the waypoint that are believed about the client (`numTrustedProxies`).
    pub trusted_proxies: usize,
    /// Who looks at the token of a request; `None`: nobody.
    pub verify: Option<&'a Verify<'a>>,
}
/// Looks at the token in these headers and this query, by these rules.
pub type Verify<'a> = dyn Fn(&HeaderMap, &str, &[&Arc<TokenRule>]) -> Believed + 'a;
/// What became of a token.
pub enum Believed {
    /// There is none.
    Absent,
    /// It is true.
    True(Box<dyn Token>),
    /// It is not: the status and the body of the answer.
    False {
        /// 401, or 403 for an audience that is not ours.
        status: u16,
        /// In Envoy's words.
        text: &'static str,
    },
}
impl Default for Settings<'_> {
    fn default() -> Self {
        Self { layer7: true, normalization: None, trusted_proxies: 0, verify: None }
    }
}

/// Answers a question by one version of the mesh.
///
/// # Errors
/// The question names something the mesh does not have, or is none.
pub fn why(snap: &Snapshot, question: &Question, settings: &Settings<'_>) -> Result<Report, Unanswerable> {
    let source = find_source(snap, &question.from)?;
    let target = find_target(snap, &source, &question.to)?;
    let mut story =
        Story { snap, source: &source, target: &target, settings, steps: Vec::new(), notes: Vec::new(), request: None };
    story.notes.extend(source.notes.iter().chain(&target.notes).cloned());
    let outcome = story.tell(question)?;
    let never = story.never_asked();
    if let (Some(step), false) = (story.steps.last_mut(), never.is_empty()) {
        step.policies.extend(never);
    }
    let refusal = story.steps.iter().find(|s| !s.passes);
    let mut detail = refusal.map(|s| s.text.clone()).unwrap_or_default();
    if let Some(near) = refusal.and_then(nearest) {
        detail.push_str(&near);
    }
    let reason = refusal.and_then(|s| s.reason.clone());
    let hint = Reason::ALL.iter().find(|r| Some(r.as_str()) == reason.as_deref()).map_or("", |r| r.hint());
    Ok(Report {
        call: Call {
            from: source.name(),
            identity: source.identity.as_ref().map(ToString::to_string),
            to: target.name.clone(),
            address: target.address.to_string(),
            node: source.workload.as_ref().map(|w| w.node.to_string()).filter(|n| !n.is_empty()),
            request: story.request.clone(),
        },
        decision: outcome.decision,
        detail,
        hint: hint.into(),
        reason,
        answer: outcome.answer,
        steps: story.steps,
        notes: story.notes,
    })
}

/// Of a step that refuses because nothing allows: the ALLOW policy that comes closest.
fn nearest(step: &Step) -> Option<String> {
    if step.reason.as_deref() != Some(Reason::NotAllowed.as_str()) {
        return None;
    }
    let allows = step.policies.iter().filter(|p| p.action == "ALLOW" && !p.dry_run && p.rule.is_some());
    let near = allows.min_by_key(|p| p.failed.len())?;
    Some(format!("; nearest is {}: {}", near.policy, near.failed.join(", ")))
}

/// How a call ends.
struct Outcome {
    decision: Decision,
    answer: String,
}
impl Outcome {
    fn new(decision: Decision, answer: impl Into<String>) -> Self {
        Self { decision, answer: answer.into() }
    }
}
/// Some of it passes, all of it, or nothing.
fn decision(passes: impl Iterator<Item = bool>) -> Decision {
    let (mut some, mut all) = (false, true);
    for passes in passes {
        some |= passes;
        all &= passes;
    }
    match (some, all) {
        (true, true) => Decision::Allowed,
        (true, false) => Decision::Partly,
        (false, _) => Decision::Denied,
    }
}

/// The draw of choices that are only shown by an example.
const DRAW: u64 = 0;

struct Story<'a> {
    snap: &'a Snapshot,
    source: &'a Source,
    target: &'a Target,
    settings: &'a Settings<'a>,
    steps: Vec<Step>,
    notes: Vec<String>,
    request: Option<String>,
}
/// An endpoint and the port it is reached on.
type Reached = (Arc<Known>, u16);

impl Story<'_> {
    fn tell(&mut self, question: &Question) -> Result<Outcome, Unanswerable> {
        let Some(w) = self.source.workload.as_ref().filter(|w| w.protocol == Protocol::Hbone) else {
            let who = if self.source.workload.is_some() { "is not enrolled in the mesh" } else { "is outside the mesh" };
            let text = format!("the client {who}: nothing captures its connection, no waypoint sees it, it arrives as plaintext");
            self.steps.push(Step::passes(self.source.name(), text));
            return self.straight(question, None);
        };
        let w = Arc::clone(w);
        if w.native_tunnel {
            let text = "it speaks HBONE itself: it chooses endpoints, and is not sent through waypoints";
            self.steps.push(Step::passes(self.source.name(), text));
            return self.straight(question, self.source.identity.as_ref());
        }
        let at = format!("agent of {}", self.source.name());
        let conn = OutboundConn { source: &w, client: self.source.address.into(), dst: self.target.address.into(), draw: DRAW };
        match plan_outbound(self.snap, &conn) {
            Err(why) => {
                self.steps.push(Step::refuses(at, &why));
                Ok(Outcome::new(Decision::Denied, "the connection is reset"))
            }
            Ok(plan) => self.follow(question, at, &plan),
        }
    }

    /// What the agent's plan leads to.
    fn follow(&mut self, question: &Question, at: String, plan: &OutboundPlan) -> Result<Outcome, Unanswerable> {
        let role = match &plan.dial {
            Dial::Hbone(hop) => Some(hop.role),
            Dial::Name { then: NamedDial::Hbone { role, .. }, .. } => Some(*role),
            _ => None,
        };
        let undecided = |text: &str| Outcome::new(Decision::Allowed, text);
        match (&plan.dial, role) {
            (_, Some(HopRole::Waypoint)) => {
                let Some(me) = plan.workload.clone() else { return Ok(undecided("through a waypoint that is not known")) };
                self.weights();
                let service = plan.service.as_ref().map_or_else(|| self.target.name.clone(), |s| s.key.to_string());
                self.steps.push(Step::passes(at, format!("{service} is reached through the waypoint {}", name_of(&me))));
                self.through(question, &me)
            }
            (_, Some(HopRole::Endpoint)) => {
                let text = match &plan.around {
                    Some(why) => format!("{why}: this agent is set to go around it, by a tunnel straight to the endpoint"),
                    None => "no waypoint stands in front of it: a tunnel straight to the endpoint".into(),
                };
                self.steps.push(Step::passes(at, text));
                self.straight(question, self.source.identity.as_ref())
            }
            (Dial::Passthrough(_), _) => {
                self.steps
                    .push(Step::passes(at, "no service or workload of the mesh has this address: passed through untouched"));
                Ok(undecided("what answers there"))
            }
            (Dial::DoubleHbone { outer, .. }, _) => {
                let text = format!("on another network: through its gateway {}, whose mesh decides the rest", outer.dial);
                self.steps.push(Step::passes(at, text));
                Ok(Outcome::new(Decision::Elsewhere, "decided by the other network"))
            }
            (Dial::Plain(addr), _) => {
                self.steps.push(Step::passes(
                    at,
                    format!("the endpoint {addr} is not in the mesh: plain TCP, nothing judges it there"),
                ));
                Ok(undecided("what answers there"))
            }
            (Dial::Name { host, port, .. }, _) => {
                self.steps.push(Step::passes(
                    at,
                    format!("{host}:{port} is resolved by DNS; it is not in the mesh, nothing judges it there"),
                ));
                Ok(undecided("what answers there"))
            }
            (Dial::Hbone(_), _) => Ok(undecided("")),
        }
    }

    /// Several waypoints by weight: one is told.
    fn weights(&mut self) {
        let Some(service) = self.target.service.as_ref().filter(|s| s.waypoints.len() > 1) else { return };
        let weights: Vec<String> = service.waypoints.iter().map(|w| w.weight.to_string()).collect();
        self.notes.push(format!("the service has several waypoints, drawn by weight {}; one of them is told", weights.join(":")));
    }

    /// Straight to the endpoints.
    fn straight(&mut self, question: &Question, identity: Option<&SpiffeId>) -> Result<Outcome, Unanswerable> {
        let reached = self.reached();
        if reached.is_empty() {
            let why = Refusal::new(Reason::NoHealthyEndpoint, self.target.name.clone());
            self.steps.push(Step::refuses(self.target.name.clone(), &why));
            return Ok(Outcome::new(Decision::Denied, "the connection is reset"));
        }
        if let (None, [(known, port), ..]) = (identity, reached.as_slice())
            && self.settings.layer7
            && let Some(told) = self.at_gateway(question, known.workload(), *port)
        {
            return told;
        }
        let decision = decision(self.arrive(&reached, self.source.address, identity).into_iter());
        let answer = if decision == Decision::Allowed { "what the application answers" } else { "the connection is reset" };
        Ok(Outcome::new(decision, answer))
    }
    /// The endpoints of what was asked for: of a service those of the best rank, as a pick chooses among them.
    fn reached(&self) -> Vec<Reached> {
        let port = self.target.address.port();
        let Some(service) = self.target.service.as_ref().filter(|_| self.target.by_vip) else {
            return self.target.workload.iter().map(|k| (Arc::clone(k), port)).collect();
        };
        let all: Vec<_> = self.snap.endpoint_set(&service.key).into_iter().flat_map(|set| set.open_on(port)).collect();
        let best = all.iter().map(|(rank, _)| *rank).min();
        let of_best = all.into_iter().filter(|(rank, _)| Some(*rank) == best);
        of_best.filter_map(|(_, e)| Some((Arc::clone(e.known()), e.target_port(service, port)?))).collect()
    }

    /// What endpoints say to a client of this address and identity; those that say the same are one step.
    fn arrive(&mut self, reached: &[Reached], client: SocketAddr, identity: Option<&SpiffeId>) -> Vec<bool> {
        let mut passes = Vec::new();
        for (known, port) in reached {
            let step = self.endpoint(known.workload(), *port, client, identity);
            passes.push(step.passes);
            let name = name_of(known.workload());
            let same = |s: &&mut Step| (&s.text, s.passes, &s.policies) == (&step.text, step.passes, &step.policies);
            match self.steps.iter_mut().find(same) {
                Some(same) if same.at.ends_with(&name) => {}
                Some(same) => same.at = format!("{}, {name}", same.at),
                None => self.steps.push(Step { at: format!("agent of {name}"), ..step }),
            }
        }
        passes
    }
    fn endpoint(&self, w: &Workload, port: u16, client: SocketAddr, identity: Option<&SpiffeId>) -> Step {
        if w.protocol == Protocol::Tcp {
            return Step::passes(
                "",
                format!("port {port}: the endpoint is not in the mesh, nothing judges the connection there"),
            );
        }
        let Some(ip) = w.ips.first() else {
            return Step::passes("", format!("port {port}: the endpoint is found by DNS"));
        };
        let dst = SocketAddr::new(ip.to_canonical(), port);
        if w.native_tunnel {
            // A waypoint or gateway takes tunnels for what is bound to it, not for itself.
            return match plan_tunnel(self.snap, w, self.source.namespace(), &HboneAuthority::Addr(dst)) {
                Err(why) if identity.is_some() && w.labels.get(crate::workload::GATEWAY_NAME).is_some() => {
                    Step::refuses("", &why)
                }
                _ => Step::passes("", format!("port {port}: the endpoint speaks HBONE itself and judges by its own policies")),
            };
        }
        if identity.is_some()
            && let Err(why) = plan_inbound(self.snap, w, SocketAddr::new(*ip, HBONE_PORT), &HboneAuthority::Addr(dst))
        {
            return Step::refuses("", &why);
        }
        let conn = InboundConn { client: client.into(), dst, identity };
        let decision = authorize(self.snap, w, &conn);
        let peer = identity.map_or_else(|| "a client in plaintext".into(), ToString::to_string);
        let mut step = match &decision.verdict {
            Verdict::Allow(Some(policy)) => Step::passes("", format!("{peer} may connect to port {port}: {policy} allows it")),
            Verdict::Allow(None) => Step::passes("", format!("{peer} may connect to port {port}: no ALLOW policy binds it")),
            Verdict::Deny(why) => {
                let what = if why.detail.is_empty() { why.reason.hint() } else { &why.detail };
                let mut step = Step::refuses("", why);
                step.text = format!("{peer} may not connect to port {port}: {what}");
                step
            }
        };
        step.policies = connection::policies(self.snap, w, &conn);
        step
    }

    /// Policies of layer 7 that name what is called, where no waypoint asks them.
    fn never_asked(&self) -> Vec<PolicyTold> {
        let passed = self.steps.iter().any(|s| s.at.starts_with("waypoint "));
        let Some(service) = self.target.service.as_ref().filter(|_| !passed && self.settings.layer7) else { return Vec::new() };
        let why = if service.waypoints.is_empty() {
            "it is bound to the service by targetRefs, and no waypoint stands in front of the service: nobody asks it"
        } else {
            "it is bound to the service by targetRefs, and this call does not pass the waypoint: nobody asks it"
        };
        let bound = self.snap.find_l7_policies(TargetRef::Service(&service.key));
        bound.into_iter().flat_map(|all| all.iter()).map(|p| request::never(p, why)).collect()
    }
}

/// `namespace/name`.
fn name_of(w: &Workload) -> String {
    format!("{}/{}", w.namespace, w.name)
}
/// Whether a service port may carry HTTP.
fn may_be_http(service: Option<&Arc<Service>>, port: u16) -> bool {
    use crate::service::AppProtocol;
    let declared = service.and_then(|s| s.port(port)).map_or(AppProtocol::Unknown, |p| p.protocol);
    !matches!(declared, AppProtocol::Tcp | AppProtocol::Tls)
}

#[cfg(test)]
mod tests;
