//! An authorizer that is asked with the request itself (Istio's `envoyExtAuthzHttp`).
use super::{Answer, Change, Edit, Grant, OF_THE_HOP, Refused, Shown, Verdict};
use crate::body::Body;
use crate::phase::Exchange;
use crate::phase::attempt::EXPECTED_TIMEOUT;
use http::header::{self, HeaderName, HeaderValue};
use http::{Request, StatusCode};
use http_body::Body as _;
use mesh_model::l7::authorizer::{HttpCheck, names};
use std::time::Duration;

/// Whether a body that is shown is not all of it (Envoy's name).
pub(super) const PARTIAL: HeaderName = HeaderName::from_static("x-envoy-auth-partial-body");

/// The request without what the authorizer is not to see, and with what Envoy says of itself and of the time there is.
pub(super) fn question(
    ex: &Exchange<'_>,
    check: &HttpCheck,
    timeout: Duration,
    shown: Option<Shown>,
) -> Result<Request<Body>, http::Error> {
    let query = ex.parts.uri.query().map(|q| format!("?{q}")).unwrap_or_default();
    let target = format!("{}{}{query}", check.path_prefix, ex.path);
    let partial = shown.as_ref().map(|s| HeaderValue::from_static(if s.cut { "true" } else { "false" }));
    let body = shown.map_or(Body::Empty, |s| Body::full(s.bytes));
    let mut question = Request::builder().method(ex.parts.method.clone()).uri(target).body(body)?;
    let headers = question.headers_mut();
    for (name, value) in &ex.parts.headers {
        let seen = *name == header::AUTHORIZATION || names(&check.asked_with, name);
        if seen && !OF_THE_HOP.contains(name) {
            headers.append(name.clone(), value.clone());
        }
    }
    headers.remove(PARTIAL);
    headers.extend(partial.map(|value| (PARTIAL, value)));
    for (name, value) in &check.always {
        headers.insert(name.clone(), value.clone());
    }
    headers.insert(header::HOST, HeaderValue::try_from(&ex.authority)?);
    headers.insert("x-envoy-internal", HeaderValue::from_static("true"));
    headers.insert(EXPECTED_TIMEOUT, HeaderValue::from(u64::try_from(timeout.as_millis()).unwrap_or(u64::MAX)));
    if question.body().is_end_stream() {
        question.headers_mut().insert(header::CONTENT_LENGTH, HeaderValue::from(0));
    }
    Ok(question)
}

/// 200 agrees, the 5xx are no answer, all else refuses.
pub(super) fn verdict(check: &HttpCheck, answer: Answer) -> Result<Verdict, String> {
    let Answer { head, body, .. } = answer;
    match head.status {
        StatusCode::OK => {
            let mut grant = Grant::default();
            for name in head.headers.keys() {
                if names(&check.to_upstream, name) {
                    // One value: the endpoint would have to choose (Envoy: the last).
                    let last = head.headers.get_all(name).iter().next_back().map(|v| Change::Set(v.clone()));
                    grant.request.extend(last.map(|what| Edit { name: name.clone(), what }));
                }
                if names(&check.to_client, name) {
                    let all = head.headers.get_all(name).iter().map(|v| Change::Append(v.clone()));
                    grant.response.extend(all.map(|what| Edit { name: name.clone(), what }));
                }
            }
            Ok(Verdict::Agrees(grant))
        }
        status if status.is_server_error() => Err(format!("it answered {}", status.as_u16())),
        status => {
            let mut headers = head.headers;
            if let Some(patterns) = &check.to_refused {
                let shown =
                    |name: &HeaderName| names(patterns, name) || *name == header::WWW_AUTHENTICATE || *name == header::LOCATION;
                let hidden: Vec<HeaderName> = headers.keys().filter(|name| !shown(name)).cloned().collect();
                for name in hidden {
                    headers.remove(name);
                }
            }
            if !body.is_empty() && !headers.contains_key(header::CONTENT_TYPE) {
                headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("text/plain"));
            }
            Ok(Verdict::Refuses(Refused { status, headers, body }))
        }
    }
}

/// A query in which parameters have new values, or none.
pub(super) fn with_parameters(query: &str, changes: &[(String, Option<String>)]) -> String {
    let named = |pair: &str| changes.iter().any(|(name, _)| pair.split('=').next() == Some(name));
    let kept = query.split('&').filter(|pair| !pair.is_empty() && !named(pair)).map(str::to_owned);
    let set = changes.iter().filter_map(|(name, value)| Some(format!("{name}={}", value.as_ref()?)));
    kept.chain(set).collect::<Vec<_>>().join("&")
}
