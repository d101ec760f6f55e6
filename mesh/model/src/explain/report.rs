//! What an explanation consists of: text and numbers, so that it travels from a running process to `meshctl` as JSON.
//!
//! Owns the form. Upstream: the other modules of [`crate::explain`]. Downstream: `meshctl`, the admin pages.
use crate::origin::Origin;
use crate::reason::Refusal;
use serde::{Deserialize, Serialize};

/// A hypothetical call.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Question {
    /// `namespace/service-account[/pod]`, or an IP address.
    pub from: String,
    /// `service[.namespace[.svc…]]:port`, `namespace/service:port`, `namespace/pod:port` or `ip:port`.
    pub to: String,
    /// The request, where HTTP is spoken. `None`: `GET /` to the host asked for, where the port may be HTTP.
    #[serde(default)]
    pub http: Option<HttpQuestion>,
}
/// The request of a hypothetical call.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct HttpQuestion {
    /// Method.
    pub method: String,
    /// Path, with query.
    pub path: String,
    /// `Host` or `:authority`; `None`: what was asked for.
    #[serde(default)]
    pub host: Option<String>,
    /// Headers.
    #[serde(default)]
    pub headers: Vec<(String, String)>,
}
impl Default for HttpQuestion {
    fn default() -> Self {
        Self { method: "GET".into(), path: "/".into(), host: None, headers: Vec::new() }
    }
}

/// The whole answer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Report {
    /// Who calls what, as it was understood.
    pub call: Call,
    /// The decision.
    pub decision: Decision,
    /// `Reason` of the (first) refusal.
    pub reason: Option<String>,
    /// Its particulars: a policy, a service, an address.
    pub detail: String,
    /// What to look at.
    pub hint: String,
    /// What the client sees.
    pub answer: String,
    /// The places where something is decided, in the order of the call.
    pub steps: Vec<Step>,
    /// What else is worth knowing.
    pub notes: Vec<String>,
}
/// Who calls what.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Call {
    /// The calling workload's `namespace/name`, or its address.
    pub from: String,
    /// Its SPIFFE id; `None`: it has none, or does not show it.
    pub identity: Option<String>,
    /// `host:port` as resolved.
    pub to: String,
    /// The address its connection is opened to.
    pub address: String,
    /// Node it runs on.
    pub node: Option<String>,
    /// `METHOD http://host/path`, where HTTP is spoken.
    pub request: Option<String>,
}
/// The decision on the whole call.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Decision {
    /// Let through.
    Allowed,
    /// Refused.
    Denied,
    /// It depends on the endpoint or backend that is drawn.
    Partly,
    /// Nothing refused it so far; the rest is decided by a process that has not been asked.
    Elsewhere,
}
/// One place where something is decided.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Step {
    /// Who decides: `agent of zamaz/zamaz-frontend`, `waypoint zamaz/zamaz-waypoint`.
    pub at: String,
    /// What was decided, in a sentence.
    pub text: String,
    /// Whether the call goes on.
    pub passes: bool,
    /// `Reason` of its refusal.
    pub reason: Option<String>,
    /// The route that was chosen.
    pub route: Option<Route>,
    /// The policies that were asked, and those that could have been meant.
    pub policies: Vec<PolicyTold>,
}
/// What one policy says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PolicyTold {
    /// `namespace/name`.
    pub policy: String,
    /// `ALLOW`, `DENY`, `AUDIT`, `CUSTOM`; empty when it is not known.
    pub action: String,
    /// Only logged.
    pub dry_run: bool,
    /// What it does to this call.
    pub effect: Effect,
    /// The rule that matches, or comes closest, counted from 0.
    pub rule: Option<usize>,
    /// Conditions of that rule that do not hold; why it is unusable or can never apply.
    pub failed: Vec<String>,
    /// Where it was written.
    pub place: Option<Place>,
}
/// What a policy does to a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Effect {
    /// A rule matches.
    Matched,
    /// It could not be understood and refuses everything.
    Unusable,
    /// It is named and not there: refuses everything.
    Missing,
    /// One condition of a rule does not hold; with it, the rule would match.
    NearlyMatched,
    /// No rule matches.
    NotMatched,
    /// It can never match here, whatever the call.
    Never,
}
/// A route of a waypoint.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Route {
    /// Name; `default` when nothing was written.
    pub name: String,
    /// Number of the rule in the table of its host, from 0; `None`: no rules were written.
    pub rule: Option<usize>,
    /// Where it was written.
    pub place: Option<Place>,
    /// The conditions by which it matched; none: everything.
    pub conditions: Vec<String>,
    /// What happens: forwarded, redirected, answered.
    pub action: String,
    /// Where it is forwarded to.
    pub destinations: Vec<Destination>,
    /// Rules before it that came closest, and what failed.
    pub passed_over: Vec<PassedOver>,
}
/// A destination of a route.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Destination {
    /// `host:port`, or why there is none.
    pub to: String,
    /// Subset.
    pub subset: Option<String>,
    /// Weight.
    pub weight: u32,
    /// Share of the requests in percent, as text (`33.3`).
    pub percent: String,
    /// `namespace/name` of the endpoints that may be chosen.
    pub endpoints: Vec<String>,
    /// Where it is said how to reach it (DestinationRules).
    pub policies: Vec<Place>,
}
/// A rule that was passed over.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PassedOver {
    /// Its number.
    pub rule: usize,
    /// Its name.
    pub name: String,
    /// What did not hold.
    pub failed: Vec<String>,
    /// Where it was written.
    pub place: Option<Place>,
}
/// A place in the objects of the mesh.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Place {
    /// `Kind namespace/name`.
    pub object: String,
    /// File, or name of the source.
    pub file: String,
    /// Line of the object, from 1; 0: it has none.
    pub line: u32,
}
impl Place {
    /// The place an object came from.
    pub fn of(origin: &Origin) -> Self {
        Self { object: origin.object.to_string(), file: origin.place.to_string(), line: origin.line }
    }
}
impl Step {
    /// A place the call passes.
    pub(super) fn passes(at: impl Into<String>, text: impl Into<String>) -> Self {
        Self { at: at.into(), text: text.into(), passes: true, reason: None, route: None, policies: Vec::new() }
    }
    /// A place that refuses it.
    pub(super) fn refuses(at: impl Into<String>, why: &Refusal) -> Self {
        let text = if why.detail.is_empty() { why.reason.hint().to_owned() } else { why.detail.to_string() };
        Self { passes: false, reason: Some(why.reason.as_str().into()), ..Self::passes(at, text) }
    }
}
