//! CORS: preflights are answered here, other answers get their headers on the way back.
use crate::body::Body;
use crate::phase::{Exchange, Flow};
use http::{Response, StatusCode};
use mesh_model::l7::cors::{CorsDecision, decide};

/// Answers a preflight, or remembers what the response needs.
pub(crate) fn apply(ex: &mut Exchange<'_>) -> Flow {
    let Some(cors) = ex.route.as_ref().and_then(|r| r.cors.as_ref()).or_else(|| ex.treatments.cors()) else {
        return Flow::Continue;
    };
    match decide(cors, &ex.parts.method, &ex.parts.headers) {
        CorsDecision::NotCors | CorsDecision::Forward | CorsDecision::SimpleUnmatched => Flow::Continue,
        CorsDecision::Simple(headers) => {
            ex.cors_headers = Some(headers);
            Flow::Continue
        }
        CorsDecision::Preflight(headers) => {
            let mut answer = Response::new(Body::Empty);
            *answer.status_mut() = StatusCode::OK;
            *answer.headers_mut() = headers;
            ex.record.details = "cors_response".into();
            Flow::Answer(answer)
        }
    }
}
