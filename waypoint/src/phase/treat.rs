//! What TrafficPolicies say of this request, for all phases that carry it out, and what they say of every answer.
use crate::phase::{Exchange, Flow, respond};
use http::{Response, StatusCode};
use mesh_model::Reason;

/// Takes them. One that could not be understood refuses what it is bound to.
pub(crate) fn find(ex: &mut Exchange<'_>) -> Flow {
    ex.treatments = ex.rules.treatments.clone();
    let Some(why) = ex.treatments.broken() else { return Flow::Continue };
    let details = format!("{}: {why}", Reason::PolicyUnusable);
    ex.record.reason = Some(Reason::PolicyUnusable);
    Flow::Answer(respond::local(ex, StatusCode::INTERNAL_SERVER_ERROR, "", details))
}

/// Edits the headers of an answer, whoever made it.
pub(crate) fn dress<B>(ex: &Exchange<'_>, answer: &mut Response<B>) {
    let status = answer.status();
    ex.treatments.dress(&ex.parts.method, &ex.path, status, answer.headers_mut());
}
