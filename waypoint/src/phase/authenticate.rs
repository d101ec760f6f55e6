//! Whose request it is, by its token (RequestAuthentication, spec/waypoint §3.5, §10).
//!
//! A request without a token goes on without a principal; one with a token that is not true is answered 401 in Envoy's words.
//! What a client sends under the names of our outputs is removed whatever else happens. Two different tokens in one request
//! are refused: which of them the application would believe nobody can say (Envoy takes the first that is valid). Runs before
//! routing, which may ask for claims. Upstream: `admit`. Downstream: `route`, `authorize` and the upstream's headers.
use crate::phase::{Exchange, Flow, respond};
use crate::token::source::{Slot, Sources};
use crate::token::{Fault, Jwt, Verified, cache};
use http::header::{self, HeaderMap, HeaderName, HeaderValue};
use http::request::Parts;
use http::{Method, StatusCode};
use mesh_model::Reason;
use mesh_model::l7::request_auth::{RequestAuths, TokenPlace, TokenRule};
use std::sync::Arc;
use std::time::UNIX_EPOCH;

/// What of a request's target a challenge repeats (Envoy's limit).
const LONGEST_REALM: usize = 256;

/// What came of looking at a request's token.
enum Outcome {
    /// There is none.
    Absent,
    Verified(Verified),
    Refused(Fault),
    /// Refused by the keys we have; newer ones may know better.
    Unknown(Fault, Arc<Slot>),
}

/// Verifies the token, if there is one, or answers 401 (403 for an audience that is not ours).
pub(crate) async fn check(ex: &mut Exchange<'_>) -> Flow {
    let snap = Arc::clone(&ex.snap);
    if !snap.has_request_auths() {
        return Flow::Continue;
    }
    let auths = ex.conn.policy_scope().request_auths(&snap);
    if let Some((key, why)) = auths.clone().find_map(RequestAuths::unusable) {
        tracing::debug!(client = %ex.conn.client, policy = %key, why, "request refused: unusable RequestAuthentication");
        ex.record.reason = Some(Reason::PolicyUnusable);
        let details = format!("jwt_authn_unusable[ns[{}]-policy[{}]]", key.namespace, key.name);
        return Flow::Answer(respond::local(ex, StatusCode::FORBIDDEN, "RBAC: access denied", details));
    }
    let rules = auths.flat_map(RequestAuths::rules);
    for name in rules.clone().flat_map(|rule| rule.outputs()) {
        ex.parts.headers.remove(name);
    }
    if is_preflight(&ex.parts) {
        return Flow::Continue;
    }
    let now = ex.record.start_time.duration_since(UNIX_EPOCH).map_or(0, |t| t.as_secs());
    let sources = &ex.conn.shared.tokens;
    let mut outcome = examine(&ex.parts, rules.clone(), sources, now);
    if let Outcome::Unknown(_, slot) = &outcome {
        // Whether or not we waited: another request's fetch may have ended meanwhile.
        Box::pin(slot.renewed()).await;
        outcome = examine(&ex.parts, rules.clone(), sources, now);
    }
    match outcome {
        Outcome::Absent => Flow::Continue,
        Outcome::Verified(verified) => {
            pass(ex, verified);
            Flow::Continue
        }
        Outcome::Refused(fault) | Outcome::Unknown(fault, _) => {
            // One that is refused here may be good elsewhere: neither the log nor the answer tells it.
            let in_target = rules.flat_map(|rule| &rule.places).filter(|place| matches!(place, TokenPlace::Param(_)));
            in_target.for_each(|place| strip(ex, place));
            Flow::Answer(refuse(ex, fault))
        }
    }
}

/// What browsers ask before a request of another origin carries no token.
fn is_preflight(parts: &Parts) -> bool {
    parts.method == Method::OPTIONS
        && parts.headers.contains_key(header::ORIGIN)
        && parts.headers.contains_key(header::ACCESS_CONTROL_REQUEST_METHOD)
}

/// Looks at the token of a request by the rules in force.
fn examine<'r>(parts: &Parts, rules: impl Iterator<Item = &'r Arc<TokenRule>> + Clone, sources: &Sources, now: u64) -> Outcome {
    let mut presented = rules.clone().flat_map(|rule| &rule.places).flat_map(|place| at(place, parts));
    let Some(text) = presented.next() else { return Outcome::Absent };
    if presented.any(|other| other != text) {
        return Outcome::Refused(Fault::Several);
    }
    let known = cache::get(text);
    let jwt = match &known {
        Some(known) => Arc::clone(&known.jwt),
        None => match Jwt::parse(text) {
            Ok(jwt) => Arc::new(jwt),
            Err(fault) => return Outcome::Refused(fault),
        },
    };
    let mut outcome = Outcome::Refused(Fault::UnknownIssuer);
    let meant = rules.filter(|rule| *rule.issuer == *jwt.issuer() && rule.places.iter().any(|p| at(p, parts).next().is_some()));
    for rule in meant {
        let fault = match jwt.check_time(now) {
            Err(fault) => fault,
            Ok(()) if !rule.accepts_audience(jwt.audiences()) => Fault::WrongAudience,
            Ok(()) => {
                let slot = sources.slot(&rule.keys);
                if known.as_ref().is_some_and(|known| slot.is_current(&known.keys)) {
                    return Outcome::Verified(Verified { jwt, rule: Arc::clone(rule) });
                }
                let Some(keys) = slot.keys() else {
                    outcome = Outcome::Unknown(Fault::NoKeys, slot);
                    continue;
                };
                match keys.verify(&jwt) {
                    Ok(()) => {
                        cache::put(Arc::clone(&jwt), keys);
                        return Outcome::Verified(Verified { jwt, rule: Arc::clone(rule) });
                    }
                    Err(fault) if fault == Fault::NoSuchKey || !jwt.names_key() => {
                        outcome = Outcome::Unknown(fault, slot);
                        continue;
                    }
                    Err(fault) => fault,
                }
            }
        };
        if !matches!(outcome, Outcome::Unknown(..)) {
            outcome = Outcome::Refused(fault);
        }
    }
    outcome
}

/// The tokens at a place.
fn at<'p>(place: &'p TokenPlace, parts: &'p Parts) -> impl Iterator<Item = &'p str> {
    let (mut header, mut param, mut cookie) = (None, None, None);
    match place {
        TokenPlace::Header(name, prefix) => header = Some((name, prefix)),
        TokenPlace::Param(name) => param = Some(name),
        TokenPlace::Cookie(name) => cookie = Some(name),
    }
    let of_header = header
        .into_iter()
        .flat_map(|(name, prefix)| parts.headers.get_all(name).iter().filter_map(move |value| behind(value, prefix)));
    let query = parts.uri.query().unwrap_or_default();
    let of_param = param.into_iter().flat_map(move |name| query.split('&').filter_map(|pair| named(pair, name)));
    let of_cookie = cookie.into_iter().flat_map(|name| {
        let lines = parts.headers.get_all(header::COOKIE).iter().filter_map(|value| value.to_str().ok());
        lines.flat_map(|line| line.split(';')).filter_map(|pair| named(pair.trim(), name)).map(unquoted)
    });
    of_header.chain(of_param).chain(of_cookie)
}
/// What stands behind the prefix in a header's value.
fn behind<'v>(value: &'v HeaderValue, prefix: &str) -> Option<&'v str> {
    Some(value.to_str().ok()?.strip_prefix(prefix)?.trim())
}
/// A cookie's value may be in quotes (RFC 6265 §4.1.1).
fn unquoted(value: &str) -> &str {
    value.strip_prefix('"').and_then(|v| v.strip_suffix('"')).unwrap_or(value)
}
/// The value of `name=value`; an empty one is a token like any other, and not a true one.
fn named<'v>(pair: &'v str, name: &str) -> Option<&'v str> {
    pair.strip_prefix(name)?.strip_prefix('=')
}

/// The token is true: it leaves the request unless it is to stay, and what was asked for is put into headers.
fn pass(ex: &mut Exchange<'_>, verified: Verified) {
    let Verified { jwt, rule } = &verified;
    if !rule.forward {
        for place in &rule.places {
            strip(ex, place);
        }
    }
    let mut put = |name: &HeaderName, value: &str| {
        // What cannot stand in a header is left out; the client's own was removed.
        if let Ok(value) = HeaderValue::from_str(value) {
            ex.parts.headers.insert(name.clone(), value);
        }
    };
    if let Some(name) = &rule.payload_to {
        put(name, jwt.payload());
    }
    for (name, claim) in &rule.claims_to {
        if let Some(value) = jwt.claim_text(claim) {
            put(name, &value);
        }
    }
    ex.token = Some(verified);
}

/// Takes the token away from a place.
fn strip(ex: &mut Exchange<'_>, place: &TokenPlace) {
    let headers = &mut ex.parts.headers;
    match place {
        TokenPlace::Header(name, prefix) => edit(headers, name, |value| {
            let carries = behind(value, prefix).is_some();
            (!carries).then(|| value.clone())
        }),
        // A cookie is the application's own, which it may go by: it stays, as in Envoy.
        TokenPlace::Cookie(_) => {}
        TokenPlace::Param(name) => {
            let Some(query) = ex.parts.uri.query().filter(|q| q.split('&').any(|pair| named(pair, name).is_some())) else {
                return;
            };
            let left: Vec<&str> = query.split('&').filter(|pair| named(pair, name).is_none()).collect();
            // A part of what was a query is one too. Logs and `x-envoy-original-path` must not tell it either.
            let _always = ex.set_query(&left.join("&"));
        }
    }
}
/// Replaces every value of a header by what `keep` leaves of it.
fn edit(headers: &mut HeaderMap, name: &HeaderName, keep: impl Fn(&HeaderValue) -> Option<HeaderValue>) {
    let left: Vec<HeaderValue> = headers.get_all(name).iter().filter_map(keep).collect();
    headers.remove(name);
    for value in left {
        headers.append(name, value);
    }
}

fn refuse(ex: &mut Exchange<'_>, fault: Fault) -> http::Response<crate::body::Body> {
    ex.record.reason = Some(Reason::TokenRefused);
    tracing::debug!(client = %ex.conn.client, why = fault.text(), "token refused");
    // As everybody behind us would have seen it: normalised.
    let target = match ex.parts.uri.query() {
        Some(query) => format!("{}?{query}", ex.path),
        None => ex.path.clone(),
    };
    let target = target.get(..LONGEST_REALM).unwrap_or(&target);
    let challenge = format!("Bearer realm=\"{}://{}{target}\", error=\"invalid_token\"", ex.conn.scheme(), ex.authority);
    let details = format!("jwt_authn_access_denied{{{}}}", fault.text().replace(' ', "_"));
    let mut answer = respond::local(ex, fault.status(), fault.text(), details);
    if let Ok(challenge) = HeaderValue::try_from(challenge) {
        answer.headers_mut().insert(header::WWW_AUTHENTICATE, challenge);
    }
    answer
}

#[cfg(test)]
mod tests;
