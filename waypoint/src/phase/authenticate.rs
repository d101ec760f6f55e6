//! Whose request it is, by its token (RequestAuthentication, spec/waypoint §3.5, §10).
//!
//! A request without a token goes on without a principal; one with a token that is not true is answered 401 in Envoy's words.
//! What a client sends under the names of our outputs is removed whatever else happens. Two different tokens in one request
//! are refused: which of them the application would believe nobody can say (Envoy takes the first that is valid). Runs before
//! routing, which may ask for claims. Upstream: `admit`. Downstream: `route`, `authorize` and the upstream's headers.
use crate::phase::{Exchange, Flow, respond};
use crate::token::cache;
use crate::token::source::{Slot, Sources};
use http::header::{self, HeaderMap, HeaderName, HeaderValue};
use http::request::Parts;
use http::{Method, StatusCode};
use mesh_model::Reason;
use mesh_model::explain::Believed;
use mesh_model::l7::request_auth::{TokenPlace, TokenRule};
use mesh_tokens::{Belief, Fault, Jwt, Signed, Verified, behind, believe, named, presented};
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

/// What of a request's target a challenge repeats (Envoy's limit).
const LONGEST_REALM: usize = 256;

/// Keys that may know better later.
type Later = Arc<Slot>;

/// Verifies the token, if there is one, or answers 401 (403 for an audience that is not ours).
pub(crate) async fn check(ex: &mut Exchange<'_>) -> Flow {
    if ex.rules.auths.is_empty() {
        return Flow::Continue;
    }
    let in_force = Arc::clone(&ex.rules);
    let auths = in_force.auths.iter();
    if let Some((key, why)) = auths.clone().find_map(|auths| auths.unusable()) {
        tracing::debug!(client = %ex.conn.client, policy = %key, why, "request refused: unusable RequestAuthentication");
        ex.record.reason = Some(Reason::PolicyUnusable);
        let details = format!("jwt_authn_unusable[ns[{}]-policy[{}]]", key.namespace, key.name);
        return Flow::Answer(respond::local(ex, StatusCode::FORBIDDEN, "RBAC: access denied", details));
    }
    let rules = auths.flat_map(|auths| auths.rules());
    for name in rules.clone().flat_map(|rule| rule.outputs()) {
        if ex.parts.headers.remove(name).is_some() {
            // A route that was chosen already was chosen by it.
            ex.routed = None;
        }
    }
    if is_preflight(&ex.parts) {
        return Flow::Continue;
    }
    let now = ex.record.start_time.duration_since(UNIX_EPOCH).map_or(0, |t| t.as_secs());
    let sources = &ex.conn.shared.tokens;
    let mut outcome = examine(&ex.parts, rules.clone(), sources, now);
    if let Some(Belief::Unknown(_, slot)) = &outcome {
        // Whether or not we waited: another request's fetch may have ended meanwhile.
        Box::pin(slot.renewed()).await;
        outcome = examine(&ex.parts, rules.clone(), sources, now);
    }
    match outcome {
        None => Flow::Continue,
        Some(Belief::Verified(verified)) => {
            pass(ex, verified);
            Flow::Continue
        }
        Some(Belief::Refused(fault) | Belief::Unknown(fault, _)) => {
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

/// Looks at the token of a request, if there is one, by the rules in force.
fn examine<'r>(
    parts: &Parts,
    rules: impl Iterator<Item = &'r Arc<TokenRule>> + Clone,
    sources: &Sources,
    now: u64,
) -> Option<Belief<Later>> {
    let carrier = (&parts.headers, parts.uri.query().unwrap_or_default());
    let text = match presented(carrier.0, carrier.1, rules.clone()) {
        Ok(text) => text?,
        Err(fault) => return Some(Belief::Refused(fault)),
    };
    let known = cache::get(text);
    let jwt = match &known {
        Some(known) => Arc::clone(&known.jwt),
        None => match Jwt::parse(text) {
            Ok(jwt) => Arc::new(jwt),
            Err(fault) => return Some(Belief::Refused(fault)),
        },
    };
    Some(believe(&jwt, carrier, rules, now, |rule| {
        let slot = sources.slot(&rule.keys);
        if known.as_ref().is_some_and(|known| slot.is_current(&known.keys)) {
            return Signed::Yes;
        }
        let Some(keys) = slot.keys() else { return Signed::Unknown(Fault::NoKeys, slot) };
        match keys.verify(&jwt) {
            Ok(()) => {
                cache::put(Arc::clone(&jwt), keys);
                Signed::Yes
            }
            Err(fault) if fault == Fault::NoSuchKey || !jwt.names_key() => Signed::Unknown(fault, slot),
            Err(fault) => Signed::No(fault),
        }
    }))
}
/// What the keys at hand say of the token of a request that somebody only asks about.
pub(crate) fn supposed(headers: &HeaderMap, query: &str, rules: &[&Arc<TokenRule>], sources: &Sources) -> Believed {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |t| t.as_secs());
    mesh_tokens::suppose(headers, query, rules, now, |rule, jwt| match sources.slot(&rule.keys).keys() {
        Some(keys) => keys.verify(jwt),
        None => Err(Fault::NoKeys),
    })
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
mod tests {
    use super::*;

    fn parts(target: &str, headers: &[(&'static str, &'static str)]) -> Parts {
        let mut request = http::Request::get(target);
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        request.body(()).expect("a request").into_parts().0
    }

    #[test]
    fn preflights_are_what_browsers_send() {
        let ask = |method: &str, headers: &[(&'static str, &'static str)]| {
            let mut parts = parts("/", headers);
            parts.method = method.parse().expect("a method");
            is_preflight(&parts)
        };
        let both = [("origin", "https://a"), ("access-control-request-method", "GET")];
        assert!(ask("OPTIONS", &both));
        assert!(!ask("GET", &both) && !ask("OPTIONS", &both[..1]) && !ask("OPTIONS", &both[1..]));
    }
}
