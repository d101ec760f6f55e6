//! The verdict on one request, or on one connection carried as bytes, by the policies of layer 7 ([`crate::l7::policy`]).
//!
//! Owns the evaluation (Istio's order): CUSTOM, DENY, ALLOW; no ALLOW policy in scope lets everything through, ALLOW policies of
//! which none matches refuse. Matching allocates nothing, unless a header asked for was sent several times. Upstream:
//! `snapshot`. Downstream: the waypoint's `authorize` phase, `tcp`.
use crate::addr::without_port;
use crate::authz::{Facts, kind};
use crate::conn::InboundConn;
use crate::gateway::ServiceKey;
use crate::id::SpiffeId;
use crate::l7::gateway::GatewayKey;
use crate::l7::policy::{Condition, HeaderKey, L7Action, L7Body, L7Policies, L7Policy, L7Rule, L7Source, Operation, TargetRef};
use crate::l7::request_auth::RequestAuths;
use crate::l7::route::Claims;
use crate::policy::{PolicyKey, TextMatch, Values};
use crate::reason::{Reason, Refusal};
use crate::snapshot::Snapshot;
use http::header::{HeaderMap, HeaderName};
use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

/// What a request or connection is for: decides which policies bind it.
#[derive(Clone, Copy, Debug)]
pub struct PolicyScope<'a> {
    /// The service that was addressed through the waypoint.
    pub service: Option<&'a ServiceKey>,
    /// The namespace of what was addressed: the service's or the workload's.
    pub namespace: Option<&'a str>,
    /// The Gateway this process serves.
    pub gateway: Option<&'a GatewayKey>,
    /// It came through a tunnel: this process acts as a waypoint.
    pub waypoint: bool,
}
impl<'a> PolicyScope<'a> {
    /// What policies that bind it may be bound to, the nearest first.
    pub fn targets(&self) -> [Option<TargetRef<'a>>; 6] {
        [
            self.service.map(TargetRef::Service),
            self.gateway.map(TargetRef::Gateway),
            self.waypoint.then_some(TargetRef::Waypoints),
            self.namespace.map(TargetRef::Namespace),
            // The namespace of a gateway that serves another one: a policy of unknown targets may have meant it.
            self.gateway.map(|g| &*g.namespace).filter(|ns| self.namespace != Some(*ns)).map(TargetRef::Namespace),
            Some(TargetRef::Mesh),
        ]
    }
    /// The RequestAuthentications that bind it, the nearest first; their rules count together.
    pub fn request_auths<'s>(&self, snap: &'s Snapshot) -> impl Iterator<Item = &'s Arc<RequestAuths>> + Clone + use<'s> {
        let any = snap.has_request_auths();
        let find = |target: TargetRef<'_>| if any { snap.find_request_auths(target) } else { None };
        // What names no target is for gateways, never for waypoints (Istio's rule).
        let outside = self.gateway.filter(|_| !self.waypoint);
        let of_gateways = outside.map(|g| [find(TargetRef::GatewaysOf(&g.namespace)), find(TargetRef::Gateways)]);
        self.targets().map(|t| t.and_then(find)).into_iter().chain(of_gateways.into_iter().flatten()).flatten()
    }
}
/// The policies in scope.
#[derive(Clone, Debug, Default)]
pub struct InScope {
    /// By target, the nearest first.
    sets: Box<[Arc<L7Policies>]>,
    /// Some have somebody else asked.
    asks: bool,
}
impl InScope {
    /// The policies that bind `scope` by one version of the mesh.
    pub fn of(snap: &Snapshot, scope: &PolicyScope<'_>) -> Self {
        if !snap.has_l7_policies() {
            return Self::default();
        }
        let found = scope.targets().into_iter().flatten().filter_map(|target| snap.find_l7_policies(target));
        let found = Self { sets: found.cloned().collect(), asks: false };
        let asks =
            found.policies().any(|p| matches!(p.body, L7Body::Rules { action: L7Action::Custom { .. }, dry_run: false, .. }));
        Self { asks, ..found }
    }
    /// Whether nothing is said.
    pub fn is_empty(&self) -> bool {
        self.sets.is_empty()
    }
    /// Whether somebody else may have to be asked: there are enforced CUSTOM policies, and no policy that cannot be used, which
    /// needs nobody to be refused by.
    pub fn asks(&self) -> bool {
        self.asks && self.unusable().is_none()
    }
    fn unusable(&self) -> Option<&L7Policy> {
        self.sets.iter().find_map(|set| set.unusable())
    }
    pub(crate) fn policies(&self) -> impl Iterator<Item = &L7Policy> {
        self.sets.iter().flat_map(|set| set.iter()).map(|p| &**p)
    }

    /// The enforced CUSTOM policies that match: whoever they name must agree before [`Self::judge`] is asked. None where a
    /// policy cannot be used: then the answer needs nobody.
    pub fn custom<'f>(&'f self, snap: &'f Snapshot, facts: &'f L7Facts<'f>) -> impl Iterator<Item = Matched<'f>> {
        let judge = Judge::of(snap, facts);
        self.policies().filter(|_| self.asks()).filter_map(move |policy| {
            let L7Body::Rules { action: L7Action::Custom { .. }, dry_run: false, rules } = &policy.body else { return None };
            judge.first(rules, false).map(|rule| Matched { policy, rule: Some(rule) })
        })
    }

    /// What policies say, but for CUSTOM ones.
    ///
    /// Order: a policy that cannot be used refuses; then a matching DENY policy; then, when there is an ALLOW policy, one
    /// must match. Of several the first by key of the first target is named.
    pub fn judge(&self, snap: &Snapshot, facts: &L7Facts<'_>) -> Judgement<'_> {
        let mut judgement = Judgement::NOTHING_SAID;
        if self.is_empty() {
            return judgement;
        }
        let judge = Judge::of(snap, facts);
        if self.sets.iter().any(|s| s.dry_runs) {
            judgement.shadow = Some(self.say(&judge, true).0);
        }
        if let Some(policy) = self.unusable() {
            let matched = Some(Matched { policy, rule: None });
            judgement.verdict = L7Verdict::Deny(Denial { reason: Reason::PolicyUnusable, matched });
            return judgement;
        }
        let (said, audited) = self.say(&judge, false);
        (judgement.verdict, judgement.audited) = (said.verdict, audited);
        judgement
    }
    /// What the policies that are, or are not, dry runs say, and the AUDIT policy that matched.
    fn say(&self, judge: &Judge<'_>, dry_run: bool) -> (Shadow<'_>, Option<&L7Policy>) {
        let (mut deny, mut allow, mut audit) = (Said::default(), Said::default(), Said::default());
        for policy in self.policies() {
            let L7Body::Rules { action, dry_run: dry, rules } = &policy.body else { continue };
            let said = match action {
                _ if *dry != dry_run => continue,
                L7Action::Custom { .. } => continue,
                L7Action::Audit => &mut audit,
                L7Action::Deny => &mut deny,
                L7Action::Allow => &mut allow,
            };
            said.any = true;
            if said.first.is_none() {
                let rule = judge.first(rules, *action == L7Action::Allow);
                said.first = rule.map(|rule| Matched { policy, rule: Some(rule) });
            }
        }
        let verdict = match (deny.first, allow.first) {
            (Some(deny), _) => L7Verdict::Deny(Denial { reason: Reason::PolicyDenied, matched: Some(deny) }),
            (None, None) if allow.any => L7Verdict::Deny(Denial { reason: Reason::NotAllowed, matched: None }),
            (None, allow) => L7Verdict::Allow(allow.map(|m| m.policy)),
        };
        (Shadow { verdict, deny, allow }, audit.first.map(|m| m.policy))
    }
}

/// The verdict and what else policies say.
#[derive(Clone, Copy, Debug)]
pub struct Judgement<'s> {
    /// The enforced answer.
    pub verdict: L7Verdict<'s>,
    /// What the dry-run policies say, where there are any: to be told, never enforced.
    pub shadow: Option<Shadow<'s>>,
    /// The AUDIT policy that matched: to be told.
    pub audited: Option<&'s L7Policy>,
}
impl Judgement<'_> {
    /// Where no policy is in scope.
    pub const NOTHING_SAID: Self = Self { verdict: L7Verdict::Allow(None), shadow: None, audited: None };
}
/// What some of the policies say, had they alone a say.
#[derive(Clone, Copy, Debug)]
pub struct Shadow<'s> {
    /// The answer.
    pub verdict: L7Verdict<'s>,
    /// DENY policies. Istio tells of each action by itself, as its proxy judges them apart.
    pub deny: Said<'s>,
    /// ALLOW policies.
    pub allow: Said<'s>,
}
/// The policies of one action.
#[derive(Clone, Copy, Debug, Default)]
pub struct Said<'s> {
    /// There are some.
    pub any: bool,
    /// The first that matches.
    pub first: Option<Matched<'s>>,
}
/// The answer.
#[derive(Clone, Copy, Debug)]
pub enum L7Verdict<'s> {
    /// Let through; by this policy, or by none when no ALLOW policy is in scope.
    Allow(Option<&'s L7Policy>),
    /// Refused.
    Deny(Denial<'s>),
}
/// A policy that decided something.
#[derive(Clone, Copy, Debug)]
pub struct Matched<'s> {
    /// The policy.
    pub policy: &'s L7Policy,
    /// The rule of it that matched, counted from 0; `None` when it refuses as a whole.
    pub rule: Option<usize>,
}
impl Matched<'_> {
    /// Which it was, to be kept.
    pub fn id(&self) -> MatchedId {
        MatchedId { policy: self.policy.key.clone(), rule: self.rule }
    }
}
/// The policy that decided something, and its rule. Shown by the name istiod gives it: `ns[foo]-policy[httpbin]-rule[0]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MatchedId {
    policy: PolicyKey,
    rule: Option<usize>,
}
impl fmt::Display for MatchedId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ns[{}]-policy[{}]", self.policy.namespace, self.policy.name)?;
        self.rule.map_or(Ok(()), |rule| write!(f, "-rule[{rule}]"))
    }
}
/// Envoy's response code details of a refusal with the policy names istiod gives:
/// `rbac_access_denied_matched_policy[ns[foo]-policy[httpbin]-rule[0]]`, or `[none]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeniedBy(pub Option<MatchedId>);
impl fmt::Display for DeniedBy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0 {
            Some(matched) => write!(f, "rbac_access_denied_matched_policy[{matched}]"),
            None => f.write_str("rbac_access_denied_matched_policy[none]"),
        }
    }
}
/// A refusal: why, and by which policy, if one matched.
#[derive(Clone, Copy, Debug)]
pub struct Denial<'s> {
    /// `PolicyDenied`, `NotAllowed`, `PolicyUnusable` or `NoAuthorizer`.
    pub reason: Reason,
    /// The policy, when one matched.
    pub matched: Option<Matched<'s>>,
}
impl Denial<'_> {
    /// Envoy's response code details.
    pub fn details(&self) -> String {
        self.by().to_string()
    }
    /// The same, to be kept.
    pub fn by(&self) -> DeniedBy {
        DeniedBy(self.matched.map(|matched| matched.id()))
    }
    /// The refusal with its particulars, for logs.
    pub fn refusal(&self) -> Refusal {
        let detail = match self.matched {
            None => String::new(),
            Some(Matched { policy, rule }) => match (&policy.body, rule) {
                (L7Body::Unusable { why }, _) => format!("{}: {why}", policy.key),
                (_, Some(rule)) => format!("{} rule {rule}", policy.key),
                (_, None) => policy.key.to_string(),
            },
        };
        Refusal::new(self.reason, detail)
    }
}

/// What rules are matched against.
#[derive(Clone, Copy)]
pub struct L7Facts<'a> {
    /// The proven identity of the client; `None` outside the mesh.
    pub peer: Option<&'a SpiffeId>,
    /// The client itself (through a tunnel: the pod, kept by its agent).
    pub client: SocketAddr,
    /// The client behind the trusted proxies ([`remote_address`]); without any, the client itself.
    pub remote: IpAddr,
    /// What the client asked for: the service's address and port.
    pub destination: SocketAddr,
    /// SNI, where TLS was spoken.
    pub sni: Option<&'a str>,
    /// The request; `None` for a connection carried as bytes.
    pub http: Option<HttpFacts<'a>>,
}
/// What rules may ask of a request.
#[derive(Clone, Copy)]
pub struct HttpFacts<'a> {
    /// Method.
    pub method: &'a str,
    /// `:authority` or `Host`, as the client wrote it.
    pub authority: &'a str,
    /// Normalised path, without query.
    pub path: &'a str,
    /// Headers, as the client sent them.
    pub headers: &'a HeaderMap,
    /// The verified token; `None` without one.
    pub token: Option<&'a dyn Token>,
}
/// A verified token.
pub trait Token: Claims {
    /// `iss`.
    fn issuer(&self) -> &str;
    /// `sub`.
    fn subject(&self) -> &str;
}

/// The client's address behind `trusted` proxies (Istio's `numTrustedProxies`): of the addresses each proxy appended to
/// `x-forwarded-for` and the one that connected to us, the `trusted`-th from the right. None trusted, or an entry that is
/// missing or no address: `peer`, who connected to us.
pub fn remote_address(headers: &HeaderMap, peer: IpAddr, trusted: usize) -> IpAddr {
    let peer = peer.to_canonical();
    if trusted == 0 {
        return peer;
    }
    let mut left = trusted;
    for value in headers.get_all("x-forwarded-for").iter().rev() {
        let Ok(value) = value.to_str() else { return peer };
        for entry in value.rsplit(',') {
            left -= 1;
            if left == 0 {
                return address(entry.trim()).unwrap_or(peer);
            }
        }
    }
    peer
}
fn address(entry: &str) -> Option<IpAddr> {
    let bare = entry.parse::<IpAddr>().ok().or_else(|| entry.parse::<SocketAddr>().ok().map(|a| a.ip()));
    bare.or_else(|| entry.strip_prefix('[')?.strip_suffix(']')?.parse().ok()).map(|ip| ip.to_canonical())
}

pub(crate) struct Judge<'f> {
    conn: Facts<'f>,
    facts: &'f L7Facts<'f>,
}
impl<'f> Judge<'f> {
    pub(crate) fn of(snap: &'f Snapshot, facts: &'f L7Facts<'f>) -> Self {
        let conn = InboundConn { client: facts.client.into(), dst: facts.destination, identity: facts.peer };
        Self { conn: Facts::of(snap.view(), &conn), facts }
    }
    /// The first rule that matches; `allow`: of an ALLOW policy.
    pub(crate) fn first(&self, rules: &[L7Rule], allow: bool) -> Option<usize> {
        rules.iter().position(|r| self.rule(r, allow))
    }
    pub(crate) fn rule(&self, rule: &L7Rule, allow: bool) -> bool {
        if self.facts.http.is_none() && rule.needs_http() && allow {
            return false;
        }
        (rule.from.is_empty() || rule.from.iter().any(|s| self.source(s)))
            && (rule.to.is_empty() || rule.to.iter().any(|o| self.operation(o)))
            && rule.when.iter().all(|c| self.condition(c, allow))
    }
    fn source(&self, source: &L7Source) -> bool {
        self.conn.fields(&source.peer)
            && kind(&source.remote_ips, |net| net.contains(&self.facts.remote))
            && self.principal(&source.request_principals)
    }
    /// Holds on a TCP connection, where there is nothing to ask.
    fn principal(&self, values: &Values<TextMatch>) -> bool {
        self.facts.http.is_none_or(|http| kind(values, |v| http.token.is_some_and(|t| principal_matches(v, t))))
    }
    fn operation(&self, o: &Operation) -> bool {
        kind(&o.ports, |p| *p == self.conn.port())
            && self.facts.http.is_none_or(|http| {
                kind(&o.methods, |m| m.matches(Some(http.method)))
                    && kind(&o.hosts, |h| host_matches(h, http.authority))
                    && kind(&o.paths, |p| p.matches(http.path))
            })
    }
    fn condition(&self, condition: &Condition, allow: bool) -> bool {
        match condition {
            Condition::Peer(m) => self.conn.fields(m),
            Condition::RemoteIp(values) => kind(values, |net| net.contains(&self.facts.remote)),
            Condition::Sni(values) => kind(values, |v| v.matches(self.facts.sni)),
            Condition::RequestPrincipal(values) => self.principal(values),
            Condition::Header(key, values) => self.facts.http.is_none_or(|http| header(&http, key, values, allow)),
            Condition::Claim(path, values) => {
                self.facts.http.is_none_or(|http| kind(values, |v| http.token.is_some_and(|t| t.matches(path, v))))
            }
        }
    }
}

/// A condition on a header. Several values of one name are matched as Envoy does, joined to one text; where a match would
/// refuse, each of them alone counts too, so that no further value takes one out of sight.
fn header(http: &HttpFacts<'_>, key: &HeaderKey, values: &Values<TextMatch>, allow: bool) -> bool {
    let is = |m: &TextMatch, each: bool| match key {
        HeaderKey::Authority => host_matches(m, http.authority),
        HeaderKey::Method => m.matches(Some(http.method)),
        HeaderKey::Name(name) => header_matches(m, http.headers, name, each),
    };
    (values.any().is_empty() || values.any().iter().any(|m| is(m, !allow))) && !values.none().iter().any(|m| is(m, allow))
}
/// Whether all values together match or, with `each`, any one of them.
fn header_matches(m: &TextMatch, headers: &HeaderMap, name: &HeaderName, each: bool) -> bool {
    let values = || headers.get_all(name).iter().map(http::HeaderValue::as_bytes);
    let mut all = values();
    let (Some(first), second) = (all.next(), all.next()) else { return false };
    if second.is_none() || *m == TextMatch::Presence {
        return bytes_match(m, first);
    }
    let between: &[u8] = if *name == http::header::COOKIE { b"; " } else { b"," };
    // Several values of one name are rare enough to be joined.
    (each && values().any(|v| bytes_match(m, v))) || bytes_match(m, &values().collect::<Vec<_>>().join(between))
}
fn bytes_match(m: &TextMatch, value: &[u8]) -> bool {
    match m {
        TextMatch::Exact(x) => value == x.as_bytes(),
        TextMatch::Prefix(x) => value.starts_with(x.as_bytes()),
        TextMatch::Suffix(x) => value.ends_with(x.as_bytes()),
        TextMatch::Presence => true,
    }
}

/// Whether a host as a policy names it is the one of a request: in any case, without the final dot a client may add and still
/// mean the same host, and with any port unless the policy names one. User information was refused before.
fn host_matches(m: &TextMatch, authority: &str) -> bool {
    let bare = without_port(authority).unwrap_or(authority);
    text_matches_ignoring_case(m, authority)
        || text_matches_ignoring_case(m, bare)
        || bare.strip_suffix('.').is_some_and(|b| text_matches_ignoring_case(m, b))
}
fn text_matches_ignoring_case(m: &TextMatch, value: &str) -> bool {
    let head = |x: &str| value.as_bytes().get(..x.len()).is_some_and(|v| v.eq_ignore_ascii_case(x.as_bytes()));
    let tail = |x: &str| {
        let at = value.len().checked_sub(x.len());
        at.and_then(|at| value.as_bytes().get(at..)).is_some_and(|v| v.eq_ignore_ascii_case(x.as_bytes()))
    };
    match m {
        TextMatch::Exact(x) => x.eq_ignore_ascii_case(value),
        TextMatch::Prefix(x) => head(x),
        TextMatch::Suffix(x) => tail(x),
        TextMatch::Presence => !value.is_empty(),
    }
}

/// Whether `<issuer>/<subject>` as a policy writes it is the one of a token. What is written is divided at its last `/`, so
/// that no issuer can speak for another whose name begins with its own.
fn principal_matches(m: &TextMatch, token: &dyn Token) -> bool {
    let (issuer, subject) = (token.issuer(), token.subject());
    if issuer.is_empty() || subject.is_empty() {
        return false;
    }
    match m {
        TextMatch::Presence => true,
        TextMatch::Exact(x) => x.rsplit_once('/') == Some((issuer, subject)),
        TextMatch::Prefix(x) => {
            issuer.starts_with(&**x) || x.rsplit_once('/').is_some_and(|(iss, start)| issuer == iss && subject.starts_with(start))
        }
        TextMatch::Suffix(x) => match x.rsplit_once('/') {
            Some((end, sub)) => issuer.ends_with(end) && subject == sub,
            None => subject.ends_with(&**x),
        },
    }
}

#[cfg(test)]
pub(crate) mod tests;
