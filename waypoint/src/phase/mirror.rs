//! Copies of requests to somewhere else, whose answers nobody waits for (spec/waypoint §3.1, §10).
//!
//! A copy gets the body as the request itself is sent, and never holds that up: one that falls further behind than what is
//! kept for retries ends. (Only the first of all to a destination with a table for hashing waits until that is made.) What becomes of copies counts for the health of their endpoints, as in Envoy.
use crate::phase::Exchange;
use crate::phase::attempt::{observed, outgoing, speaks_http2};
use crate::phase::trace;
use crate::upstream::{self, Failure, PickContext, SendOptions, UpstreamError};
use http::{HeaderValue, Response};
use http_body_util::BodyExt as _;
use mesh_model::hosts::host_of;
use mesh_model::l7::mirror;
use mesh_model::l7::route::{BackendRef, HttpAction, Mirror};
use std::time::Duration;
use tokio::time::timeout;

/// A copy that takes longer is given up: nobody waits for it, but it holds a connection.
const LIMIT: Duration = Duration::from_mins(1);

/// Sends the copies the route and the backend ask for.
pub(crate) async fn copy(ex: &mut Exchange<'_>) {
    let Some(route) = ex.route.clone() else { return };
    let HttpAction::Forward(forward) = &route.action else { return };
    for (mirror, draw) in mirror::copies(forward, ex.backend_of(forward), ex.draw) {
        one(ex, mirror, draw).await;
    }
}

async fn one(ex: &mut Exchange<'_>, mirror: &Mirror, draw: u64) {
    let BackendRef::Service(key) = &mirror.to else { return };
    let Ok(cluster) = ex.conn.shared.upstreams.cluster(&ex.snap, key, ex.conn.role()).await else { return };
    let name = Some(host_of(&ex.authority));
    let pick = PickContext { draw, hash: None, session: None, tried: &[], before: &[], dst: ex.conn.asked(), name };
    let (Ok(host), Ok(guard)) = (cluster.pick(&pick), cluster.admit()) else { return };
    let Some(body) = ex.copy_body() else { return };
    let http2 = speaks_http2(ex, &cluster);
    let Ok(mut request) = outgoing(ex, body, &mirror::shadow(&ex.authority), 1, http2) else { return };
    trace::forward_copy(ex, request.headers_mut());
    request.headers_mut().insert("x-envoy-internal", HeaderValue::from_static("true"));
    let client = Some(ex.conn.client);
    let grpc = ex.grpc;
    tokio::spawn(async move {
        let options = SendOptions { http2, client, guard: Some(&guard), ..SendOptions::default() };
        let sent = timeout(LIMIT, upstream::send(&cluster, &host, request, options)).await;
        let sent = sent.unwrap_or_else(|_| Err(UpstreamError::new(Failure::Timeout, "")));
        cluster.report(&host, observed(grpc, &sent));
        // Read to its end, so that the connection can be used again.
        let Ok(mut body) = sent.map(Response::into_body) else { return };
        let rest = async { while let Some(Ok(_)) = body.frame().await {} };
        if timeout(LIMIT, rest).await.is_err() {
            tracing::debug!(cluster = cluster.name(), "the answer to a mirrored request was given up");
        }
    });
}
