//! CORS: which answer or headers a request of a browser gets (Envoy's cors filter; spec/waypoint §10).
use crate::l7::route::Cors;
use crate::l7::select::joined;
use http::Method;
use http::header::{
    ACCESS_CONTROL_ALLOW_CREDENTIALS, ACCESS_CONTROL_ALLOW_HEADERS, ACCESS_CONTROL_ALLOW_METHODS, ACCESS_CONTROL_ALLOW_ORIGIN,
    ACCESS_CONTROL_EXPOSE_HEADERS, ACCESS_CONTROL_MAX_AGE, ACCESS_CONTROL_REQUEST_METHOD, HeaderMap, HeaderName, HeaderValue,
    ORIGIN,
};

/// What to do about CORS.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CorsDecision {
    /// No origin, no CORS: goes on, nothing is added.
    NotCors,
    /// A preflight: answer 200 with these headers and no body (`cors_response`), nothing goes upstream.
    Preflight(HeaderMap),
    /// A preflight of an origin that does not match and is to go on: the upstream answers, nothing is added.
    Forward,
    /// Goes on; set these on the response, over whatever the upstream says under the same names.
    Simple(HeaderMap),
    /// Goes on, nothing is added: the browser will keep the answer from the page.
    SimpleUnmatched,
}

/// Decides for one request.
pub fn decide(cors: &Cors, method: &Method, headers: &HeaderMap) -> CorsDecision {
    // Several origins are one text that no origin matches.
    let several = headers.get_all(ORIGIN).iter().nth(1).is_some();
    let Some(origin) = headers.get(ORIGIN).filter(|o| !o.is_empty() || several) else { return CorsDecision::NotCors };
    let several = several.then(|| joined(headers, &ORIGIN, ",")).and_then(|all| HeaderValue::try_from(all).ok());
    let origin = several.as_ref().unwrap_or(origin);
    let allowed = origin.to_str().is_ok_and(|origin| {
        // `*` allows all, whichever kind of match accepts that text (Envoy asks each of them).
        cors.origins.iter().any(|o| o.matches("*") || o.matches(origin))
    });
    let preflight = *method == Method::OPTIONS && headers.get(ACCESS_CONTROL_REQUEST_METHOD).is_some_and(|m| !m.is_empty());
    let mut answer = HeaderMap::new();
    match (preflight, allowed) {
        (true, false) if cors.forward_unmatched => return CorsDecision::Forward,
        (false, false) => return CorsDecision::SimpleUnmatched,
        // A preflight that does not match and is not to go on is answered all the same, but for the origin.
        (true, false) => {}
        (_, true) => _ = answer.insert(ACCESS_CONTROL_ALLOW_ORIGIN, origin.clone()),
    }
    if cors.credentials {
        answer.insert(ACCESS_CONTROL_ALLOW_CREDENTIALS, HeaderValue::from_static("true"));
    }
    if allowed {
        // On preflights too, where browsers have no use for it (measured).
        set(&mut answer, ACCESS_CONTROL_EXPOSE_HEADERS, &cors.expose);
    }
    if !preflight {
        return CorsDecision::Simple(answer);
    }
    set(&mut answer, ACCESS_CONTROL_ALLOW_METHODS, &cors.methods);
    set(&mut answer, ACCESS_CONTROL_ALLOW_HEADERS, &cors.headers);
    if let Some(seconds) = cors.max_age {
        answer.insert(ACCESS_CONTROL_MAX_AGE, HeaderValue::from(seconds));
    }
    CorsDecision::Preflight(answer)
}
/// Sets a header unless there is nothing to say, or it cannot be said in a header.
fn set(answer: &mut HeaderMap, name: HeaderName, value: &str) {
    if let Some(value) = HeaderValue::from_str(value).ok().filter(|v| !v.is_empty()) {
        answer.insert(name, value);
    }
}

#[cfg(test)]
mod tests;
