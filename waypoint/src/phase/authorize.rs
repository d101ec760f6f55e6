//! Who may do what: the layer 7 policies bound to what was addressed (spec/waypoint §3.4, §10).
use crate::conn::Conn;
use crate::phase::{Exchange, Flow, respond};
use http::StatusCode;
use mesh_model::authz_l7::{HttpFacts, L7Facts, L7Verdict, authorize};
use mesh_model::{Refusal, Snapshot};
use std::borrow::Cow;
use std::sync::Arc;

/// Envoy's answer.
const TEXT: &str = "RBAC: access denied";

/// Lets the request on, or answers 403.
pub(crate) fn check(ex: &mut Exchange<'_>) -> Flow {
    let snap = Arc::clone(&ex.snap);
    let http =
        HttpFacts { method: ex.parts.method.as_str(), authority: &ex.authority, path: &ex.path, headers: &ex.parts.headers };
    let Err((why, details)) = judge(&snap, ex.conn, Some(http)) else { return Flow::Continue };
    ex.record.reason = Some(why.reason);
    tracing::debug!(client = %ex.conn.client, %why, "request refused");
    Flow::Answer(respond::local(ex, StatusCode::FORBIDDEN, TEXT, details))
}

/// Judges a request, or (without `http`) a TCP connection.
pub(crate) fn judge(snap: &Snapshot, conn: &Conn, http: Option<HttpFacts<'_>>) -> Result<(), (Refusal, Cow<'static, str>)> {
    let facts = L7Facts {
        identity: conn.identity.as_ref(),
        client: conn.client,
        destination: conn.local,
        sni: conn.sni.as_deref(),
        http,
    };
    match authorize(snap, conn.targets.iter(), &facts) {
        L7Verdict::Allow => Ok(()),
        L7Verdict::Deny { why, by } => {
            let details = match by {
                Some((key, rule)) => {
                    format!("rbac_access_denied_matched_policy[ns[{}]-policy[{}]-rule[{rule}]]", key.namespace, key.name).into()
                }
                None => "rbac_access_denied_matched_policy[none]".into(),
            };
            Err((why, details))
        }
    }
}
