//! Who may do what: the layer 7 policies of what was addressed (spec/waypoint §3.4, §10).
//!
//! Owns the facts a policy is asked with, and the answer 403. A request is judged once, by the version of its start; what
//! lives on as bytes (a TCP connection, an upgraded request) is judged again with every published version ([`revoked`]).
use crate::conn::Conn;
use crate::phase::{Exchange, Flow, respond};
use crate::telemetry::{Noted, Said, Telemetry};
use http::{HeaderMap, Method, StatusCode};
use mesh_model::authz_l7::{Denial, HttpFacts, Judgement, L7Facts, L7Verdict, Shadow, Token, remote_address};
use mesh_model::in_force::InForce;
use mesh_model::l7::head::upgrade_of;
use mesh_model::l7::policy::{L7Action, L7Body};
use mesh_model::policy::PolicyKey;
use mesh_model::{Reason, Refusal, Snapshot};
use mesh_tokens::Verified;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

/// Envoy's answer.
pub(crate) const TEXT: &str = "RBAC: access denied";

/// Lets the request on, or answers 403 (gRPC: `PERMISSION_DENIED`).
pub(crate) fn check(ex: &mut Exchange<'_>) -> Flow {
    let asked = Asked {
        method: &ex.parts.method,
        authority: &ex.authority,
        path: &ex.path,
        headers: &ex.parts.headers,
        token: ex.token.as_ref(),
    };
    let judgement = judge(&ex.snap, &ex.rules, ex.conn, Some(asked));
    ex.record.noted = note(ex.conn, &judgement);
    if let L7Verdict::Deny(denial) = judgement.verdict {
        let details = denial.details();
        ex.record.reason = Some(denial.reason);
        tracing::debug!(client = %ex.conn.client, why = %denial.refusal(), "request refused");
        return Flow::Answer(respond::local(ex, StatusCode::FORBIDDEN, TEXT, details));
    }
    if upgrade_of(&ex.parts.headers).is_some() {
        ex.upgrade = Some(Box::new(Kept {
            method: ex.parts.method.clone(),
            authority: ex.authority.clone(),
            path: ex.path.clone(),
            headers: ex.parts.headers.clone(),
            token: ex.token.clone(),
            agreed: std::mem::take(&mut ex.asked),
        }));
    }
    Flow::Continue
}

/// What is asked of a request.
#[derive(Clone, Copy)]
pub(crate) struct Asked<'a> {
    method: &'a Method,
    authority: &'a str,
    path: &'a str,
    headers: &'a HeaderMap,
    token: Option<&'a Verified>,
}
/// The same of a request that lives on as an upgraded connection, to be judged again.
#[derive(Debug)]
pub(crate) struct Kept {
    method: Method,
    authority: String,
    path: String,
    headers: HeaderMap,
    token: Option<Verified>,
    /// External authorizers that were asked.
    agreed: Vec<Arc<str>>,
}
impl Kept {
    fn asked(&self) -> Asked<'_> {
        Asked {
            method: &self.method,
            authority: &self.authority,
            path: &self.path,
            headers: &self.headers,
            token: self.token.as_ref(),
        }
    }
}

/// A policy that has somebody else asked.
pub(crate) struct Asking {
    /// The policy.
    pub(crate) policy: PolicyKey,
    /// Whom.
    pub(crate) provider: Arc<str>,
    /// Envoy's words should that not be possible.
    pub(crate) details: String,
}
/// The CUSTOM policies that match a request.
pub(crate) fn custom_of_request(ex: &Exchange<'_>) -> Vec<Asking> {
    let headers = &ex.parts.headers;
    // As in Envoy: no token has been verified yet.
    let asked = Asked { method: &ex.parts.method, authority: &ex.authority, path: &ex.path, headers, token: None };
    custom(&ex.snap, &ex.rules, ex.conn, Some(asked))
}
/// The CUSTOM policies that match a request or, without `request`, a connection carried as bytes; of several that name one
/// provider the first.
pub(crate) fn custom(snap: &Snapshot, rules: &InForce, conn: &Conn, request: Option<Asked<'_>>) -> Vec<Asking> {
    let mut all: Vec<Asking> = Vec::new();
    if !rules.policies.asks() {
        return all;
    }
    with_facts(conn, request, |facts| {
        for matched in rules.policies.custom(snap, facts) {
            if let L7Body::Rules { action: L7Action::Custom { provider }, .. } = &matched.policy.body
                && all.iter().all(|a| a.provider != *provider)
            {
                let details = Denial { reason: Reason::NoAuthorizer, matched: Some(matched) }.details();
                all.push(Asking { policy: matched.policy.key.clone(), provider: Arc::clone(provider), details });
            }
        }
    });
    all
}
/// Judges a request or, without `request`, a connection carried as bytes. Whom CUSTOM policies name was asked before.
pub(crate) fn judge<'r>(snap: &Snapshot, rules: &'r InForce, conn: &Conn, request: Option<Asked<'_>>) -> Judgement<'r> {
    if rules.policies.is_empty() {
        return Judgement::NOTHING_SAID;
    }
    with_facts(conn, request, |facts| rules.policies.judge(snap, facts))
}
/// What `f` makes of the facts that policies are asked with.
fn with_facts<R>(conn: &Conn, request: Option<Asked<'_>>, f: impl FnOnce(&L7Facts<'_>) -> R) -> R {
    let client = conn.client.ip();
    let facts = L7Facts {
        peer: conn.identity.as_ref(),
        client: conn.client,
        remote: request.map_or(client, |r| remote(conn, r.headers)),
        destination: destination(conn),
        sni: conn.sni.as_deref(),
        http: request.map(|r| HttpFacts {
            method: r.method.as_str(),
            authority: r.authority,
            path: r.path,
            headers: r.headers,
            token: r.token.map(|t| t as &dyn Token),
        }),
    };
    f(&facts)
}

/// The client's address, behind the proxies that are trusted to say it.
pub(crate) fn remote(conn: &Conn, headers: &HeaderMap) -> IpAddr {
    let settings = &conn.shared.settings;
    // `admit` has appended the client itself, who is none of the proxies.
    let trusted = match settings.trusted_proxies {
        0 => 0,
        n => n + usize::from(settings.forward_client_address),
    };
    remote_address(headers, conn.client.ip(), trusted)
}

/// Tells what policies that enforce nothing said.
pub(crate) fn note(conn: &Conn, judgement: &Judgement<'_>) -> Noted {
    let mut noted = Noted::default();
    let telemetry = &conn.shared.telemetry;
    if let Some(shadow) = &judgement.shadow {
        match &shadow.verdict {
            L7Verdict::Allow(by) => telemetry.shadow(by.map(|p| &p.key), "allowed"),
            L7Verdict::Deny(denial) => {
                telemetry.shadow(denial.matched.map(|m| &m.policy.key), "denied");
                noted.dry_run = Some(denial.by());
            }
        }
        noted.dry_run_tags = dry_run_tags(telemetry, shadow);
    }
    if let Some(policy) = judgement.audited {
        telemetry.shadow(Some(&policy.key), "audited");
        noted.audit = Some(policy.key.clone());
    }
    noted
}

/// What Istio tells of dry runs in spans, and counts: of each action whether its policies alone would let the request pass, and
/// which of them matched.
fn dry_run_tags(telemetry: &Telemetry, shadow: &Shadow<'_>) -> Vec<(&'static str, Said)> {
    const ALLOW: [&str; 2] = ["istio.authorization.dry_run.allow_policy.name", "istio.authorization.dry_run.allow_policy.result"];
    const DENY: [&str; 2] = ["istio.authorization.dry_run.deny_policy.name", "istio.authorization.dry_run.deny_policy.result"];
    let mut tags = Vec::new();
    for (action, said, [name, result]) in [("allow", shadow.allow, ALLOW), ("deny", shadow.deny, DENY)] {
        if !said.any {
            continue;
        }
        tags.extend(said.first.map(|matched| (name, Said::Matched(matched.id()))));
        let passes = said.first.is_some() == (action == "allow");
        let answer = if passes { "allowed" } else { "denied" };
        telemetry.dry_run(action, answer);
        tags.push((result, Said::Answer(answer)));
    }
    tags
}

/// What the client asked for; of a service asked for by name its address.
pub(crate) fn destination(conn: &Conn) -> SocketAddr {
    let by_name = || conn.service()?.vips.first().map(|vip| vip.ip);
    let ip = Some(conn.local.ip()).filter(|ip| !ip.is_unspecified()).or_else(by_name);
    SocketAddr::new(ip.unwrap_or(conn.local.ip()), conn.port())
}

/// What lives on as bytes.
#[derive(Clone, Copy)]
pub(crate) enum Living<'a> {
    /// A connection that never was HTTP, and the external authorizers that were asked about it.
    Bytes(&'a [Arc<str>]),
    /// An upgraded request.
    Upgraded(&'a Kept),
}
impl Living<'_> {
    /// What a published version says of it. A CUSTOM policy that asks somebody who was not asked refuses.
    fn judge(self, snap: &Snapshot, conn: &Conn) -> Result<(), (Refusal, String)> {
        let (request, agreed) = match self {
            Self::Bytes(agreed) => (None, agreed),
            Self::Upgraded(kept) => (Some(kept.asked()), &*kept.agreed),
        };
        let rules = conn.in_force(snap);
        if let L7Verdict::Deny(denial) = judge(snap, &rules, conn, request).verdict {
            return Err((denial.refusal(), denial.details()));
        }
        let before = request.map(|r| Asked { token: None, ..r });
        match custom(snap, &rules, conn, before).into_iter().find(|asking| !agreed.contains(&asking.provider)) {
            None => Ok(()),
            Some(Asking { policy, provider, details }) => {
                Err((Refusal::new(Reason::NoAuthorizer, format!("{policy} asks {provider}, who was not asked")), details))
            }
        }
    }
}

/// Resolves when a published version no longer allows what lives on as bytes (I6); tells so, and gives Envoy's words for it.
/// Cancel safe.
pub(crate) async fn revoked(conn: &Conn, living: Living<'_>) -> String {
    let mut versions = conn.shared.mesh.watch();
    // What was published between the verdict and now counts too.
    versions.mark_changed();
    while versions.changed().await.is_ok() {
        versions.mark_unchanged();
        let snap = conn.shared.mesh.load();
        if let Err((why, details)) = living.judge(&snap, conn) {
            let why = Refusal::new(Reason::Revoked, why.brief());
            conn.shared.telemetry.tunnel_refused(conn.client, conn.identity.as_ref(), &why);
            return details;
        }
    }
    std::future::pending().await
}
