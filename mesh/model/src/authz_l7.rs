//! The verdict on one request, or on one TCP connection, by the policies of layer 7 ([`crate::l7::policy`]). Pure; matching
//! allocates nothing.
//!
//! On a TCP connection HTTP attributes cannot be judged: an ALLOW rule that has one allows nothing, a DENY rule denies as if it
//! matched. Without a verified token no request principal and no claim is there. Upstream: `snapshot`. Downstream: the
//! waypoint's phases.
use crate::addr::without_port;
use crate::authz::Facts as PeerFacts;
use crate::conn::InboundConn;
use crate::id::SpiffeId;
use crate::l7::policy::{L7Action, L7Body, L7Condition, L7Operation, L7Rule, L7Source, L7Target};
use crate::policy::{Match, PolicyKey, TextMatch, Values};
use crate::reason::{Reason, Refusal};
use crate::snapshot::Snapshot;
use http::HeaderMap;
use http::header::HeaderName;
use std::net::{IpAddr, SocketAddr};

/// What a request or connection is judged by.
#[derive(Clone, Copy)]
pub struct L7Facts<'a> {
    /// Proven identity of the client.
    pub identity: Option<&'a SpiffeId>,
    /// Its address.
    pub client: SocketAddr,
    /// Address it asked for, with the service's port.
    pub destination: SocketAddr,
    /// SNI.
    pub sni: Option<&'a str>,
    /// The request; `None` for a TCP connection.
    pub http: Option<HttpFacts<'a>>,
}
/// The request's part.
#[derive(Clone, Copy)]
pub struct HttpFacts<'a> {
    /// Method.
    pub method: &'a str,
    /// Authority as the client wrote it.
    pub authority: &'a str,
    /// Normalised path, without query.
    pub path: &'a str,
    /// Headers.
    pub headers: &'a HeaderMap,
}

/// The answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum L7Verdict {
    /// Let through.
    Allow,
    /// Refused: why, and by which rule of which policy.
    Deny {
        /// Reason and particulars.
        why: Refusal,
        /// Policy and rule, when one matched.
        by: Option<(PolicyKey, usize)>,
    },
}

/// Judges by the policies of every target. Order: an unusable policy, then CUSTOM, then DENY, then, when any ALLOW is bound, one
/// must match. Dry-run policies and AUDIT decide nothing.
pub fn authorize<'t>(snap: &Snapshot, targets: impl Iterator<Item = &'t L7Target> + Clone, facts: &L7Facts<'_>) -> L7Verdict {
    let bound = || targets.clone().flat_map(|t| snap.l7_policies_of(t));
    let conn = InboundConn { client: facts.client.into(), dst: facts.destination, identity: facts.identity };
    let peer = PeerFacts::of(snap.view(), &conn);
    let (mut allows, mut allowed) = (false, false);
    let mut denied: Option<(u8, &PolicyKey, usize, L7Action)> = None;
    for policy in bound() {
        let (action, rules) = match &policy.body {
            L7Body::Unusable { why } => {
                let why = Refusal::new(Reason::PolicyUnusable, format!("{}: {why}", policy.key));
                return L7Verdict::Deny { why, by: None };
            }
            L7Body::Rules { dry_run: true, .. } => continue,
            L7Body::Rules { action, rules, .. } => (*action, rules),
        };
        let rank = match action {
            L7Action::Audit => continue,
            L7Action::Allow => {
                allows = true;
                allowed = allowed || rules.iter().any(|r| judge(r, &peer, facts, action));
                continue;
            }
            L7Action::Custom => 0,
            L7Action::Deny => 1,
        };
        if let Some(rule) = rules.iter().position(|r| judge(r, &peer, facts, action)) {
            let found = (rank, &policy.key, rule, action);
            if denied.as_ref().is_none_or(|d| (found.0, found.1) < (d.0, d.1)) {
                denied = Some(found);
            }
        }
    }
    if let Some((_, key, rule, action)) = denied {
        let detail = match action {
            L7Action::Custom => format!("{key}: action CUSTOM asks an external authorizer, which is not supported yet"),
            _ => key.to_string(),
        };
        return L7Verdict::Deny { why: Refusal::new(Reason::PolicyDenied, detail), by: Some((key.clone(), rule)) };
    }
    if allows && !allowed {
        return L7Verdict::Deny { why: Refusal::new(Reason::NotAllowed, ""), by: None };
    }
    L7Verdict::Allow
}

/// What an attribute that cannot be judged on this kind of connection counts as.
#[derive(Clone, Copy)]
struct Judge<'a> {
    peer: &'a PeerFacts<'a>,
    facts: &'a L7Facts<'a>,
    /// DENY and CUSTOM: it counts as matching. ALLOW: as not matching.
    unknown: bool,
}

fn judge(rule: &L7Rule, peer: &PeerFacts<'_>, facts: &L7Facts<'_>, action: L7Action) -> bool {
    let j = Judge { peer, facts, unknown: action != L7Action::Allow };
    (rule.from.is_empty() || rule.from.iter().any(|s| j.source(s)))
        && (rule.to.is_empty() || rule.to.iter().any(|o| j.operation(o)))
        && rule.when.iter().all(|c| j.condition(c))
}

impl Judge<'_> {
    fn peer(self, m: &Match) -> bool {
        m.is_empty() || self.peer.matches(m)
    }
    fn source(self, s: &L7Source) -> bool {
        self.peer(&s.peer)
            && kind(&s.request_principals, |_| false, self.http_only())
            && kind(&s.remote_ips, |net| self.remote().is_some_and(|ip| net.contains(&ip)), self.http_only())
    }
    fn operation(self, o: &L7Operation) -> bool {
        let http = self.facts.http;
        kind(&o.ports, |p| *p == self.facts.destination.port(), None)
            && kind(&o.methods, |m| http.is_some_and(|h| m.matches(Some(h.method))), self.http_only())
            && kind(&o.hosts, |m| http.is_some_and(|h| host_matches(m, h.authority)), self.http_only())
            && kind(&o.paths, |p| http.is_some_and(|h| p.matches(h.path)), self.http_only())
    }
    fn condition(self, c: &L7Condition) -> bool {
        match c {
            L7Condition::Peer(m) => self.peer(m),
            L7Condition::RemoteIp(v) => kind(v, |net| self.remote().is_some_and(|ip| net.contains(&ip)), self.http_only()),
            L7Condition::Sni(v) => kind(v, |m| m.matches(self.facts.sni), None),
            L7Condition::Header(name, v) => kind(v, |m| self.header(name, m), self.http_only()),
            L7Condition::Token(_, v) => kind(v, |_| false, self.http_only()),
        }
    }
    /// What an HTTP attribute counts as when there is no request.
    fn http_only(self) -> Option<bool> {
        self.facts.http.is_none().then_some(self.unknown)
    }
    /// Any value of the header; `host` is the authority, which HTTP/2 does not send as a header.
    fn header(self, name: &HeaderName, m: &TextMatch) -> bool {
        if *name == http::header::HOST {
            return self.facts.http.is_some_and(|h| m.matches(Some(h.authority)));
        }
        self.facts.http.is_some_and(|h| h.headers.get_all(name).iter().any(|v| v.to_str().is_ok_and(|v| m.matches(Some(v)))))
    }
    /// Nobody between the client and us is trusted to say who the client is: its own address (numTrustedProxies 0).
    fn remote(self) -> Option<IpAddr> {
        self.facts.http.map(|_| self.facts.client.ip().to_canonical())
    }
}
/// No positive values or any of them, and none of the negative ones; `unknown` instead, when it cannot be judged.
fn kind<T>(values: &Values<T>, is: impl Fn(&T) -> bool, unknown: Option<bool>) -> bool {
    if values.is_empty() {
        return true;
    }
    if let Some(unknown) = unknown {
        return unknown;
    }
    (values.any().is_empty() || values.any().iter().any(&is)) && !values.none().iter().any(&is)
}
/// Hosts are compared without regard to case, with the port the client wrote and without it.
fn host_matches(m: &TextMatch, authority: &str) -> bool {
    let bare = without_port(authority);
    let one = |host: &str| match m {
        TextMatch::Exact(x) => x.eq_ignore_ascii_case(host),
        TextMatch::Prefix(x) => host.get(..x.len()).is_some_and(|h| h.eq_ignore_ascii_case(x)),
        TextMatch::Suffix(x) => {
            host.len().checked_sub(x.len()).and_then(|at| host.get(at..)).is_some_and(|h| h.eq_ignore_ascii_case(x))
        }
        TextMatch::Presence => !host.is_empty(),
    };
    // A name with the root's dot at its end is the same name.
    let host = bare.unwrap_or(authority);
    one(authority) || bare.is_some_and(one) || host.strip_suffix('.').is_some_and(one)
}

#[cfg(test)]
mod tests;
