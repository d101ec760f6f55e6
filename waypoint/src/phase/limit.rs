//! Rate limits: a token for each request, or the answer 429 (Envoy's local_ratelimit; spec/waypoint §10).
use crate::phase::{Exchange, Flow, authorize, respond};
use crate::telemetry::Flag;
use http::header::{HeaderMap, HeaderName, HeaderValue};
use mesh_model::Reason;
use mesh_model::l7::limit::{Limit, Point, Taken};
use std::sync::Arc;

/// Envoy's body and details of a refusal.
const TEXT: &str = "local_rate_limited";
const LIMIT: HeaderName = HeaderName::from_static("x-ratelimit-limit");
const REMAINING: HeaderName = HeaderName::from_static("x-ratelimit-remaining");
const RESET: HeaderName = HeaderName::from_static("x-ratelimit-reset");

/// Takes a token of every limit of this point that counts the request; the first that has none refuses. Tokens taken before
/// that are spent, as in Envoy.
pub(crate) fn check(ex: &mut Exchange<'_>, point: Point) -> Flow {
    let Some((limit, taken)) = take(ex, point) else { return Flow::Continue };
    let refused = !taken.allowed;
    // Of several limits the answer tells of the one that is nearest to its end.
    let nearer = ex.limited.as_ref().is_none_or(|(_, before)| taken.remaining < before.remaining);
    if refused || nearer {
        ex.limited = Some((Arc::clone(&limit), taken));
    }
    if !refused {
        return Flow::Continue;
    }
    tracing::debug!(client = %ex.conn.client, policy = %limit.counts.policy, limit = %limit.counts.name, "rate limited");
    ex.record.flags.set(Flag::RateLimited);
    ex.record.reason = Some(Reason::RateLimited);
    let mut answer = respond::local(ex, limit.status, TEXT, TEXT);
    for (name, value) in &limit.headers {
        answer.headers_mut().insert(name.clone(), value.clone());
    }
    Flow::Answer(answer)
}

/// What came of all limits of a point: the refusal, or the one with the fewest tokens left.
fn take(ex: &Exchange<'_>, point: Point) -> Option<(Arc<Limit>, Taken)> {
    let mut least: Option<(&Arc<Limit>, Taken)> = None;
    let limits = ex.treatments.iter().flat_map(|t| &t.limits).filter(|l| l.point == point);
    for limit in limits {
        let facts = ex.facts();
        if !limit.concerns(&facts) {
            continue;
        }
        let client = authorize::remote(ex.conn, &ex.parts.headers);
        let taken = ex.conn.shared.limits.take(limit, &facts, client);
        if !taken.allowed {
            return Some((Arc::clone(limit), taken));
        }
        if least.is_none_or(|(_, before)| taken.remaining < before.remaining) {
            least = Some((limit, taken));
        }
    }
    least.map(|(limit, taken)| (Arc::clone(limit), taken))
}

/// Tells on the answer how much is left.
pub(crate) fn tell(ex: &Exchange<'_>, headers: &mut HeaderMap) {
    let Some((limit, taken)) = &ex.limited else { return };
    let Some(most) = &limit.tells else { return };
    headers.insert(LIMIT, most.clone());
    headers.insert(REMAINING, HeaderValue::from(taken.remaining));
    headers.insert(RESET, HeaderValue::from(taken.reset));
}
