//! Injected faults: delay, then abort (spec/waypoint §3.1, §10).
use crate::phase::respond;
use crate::phase::{Exchange, Flow};
use crate::telemetry::Flag;
use http::StatusCode;
use mesh_model::l7::fault::decide;
use mesh_model::l7::route::Abort;
use mesh_model::lb::redraw;

const DRAW_FAULT: u64 = 12;
/// Envoy's body of an abort.
const TEXT: &str = "fault filter abort";

/// Delays and answers the share of requests the route says.
pub(crate) async fn inject(ex: &mut Exchange<'_>) -> Flow {
    let Some(fault) = ex.route.as_ref().and_then(|r| r.fault.as_ref()) else { return Flow::Continue };
    let decision = decide(fault, redraw(ex.draw, DRAW_FAULT));
    if let Some(delay) = decision.delay {
        ex.record.flags.set(Flag::DelayInjected);
        tokio::time::sleep(delay).await;
    }
    let Some(abort) = decision.abort else { return Flow::Continue };
    ex.record.flags.set(Flag::FaultInjected);
    Flow::Answer(match abort {
        Abort::Http(status) => {
            let status = StatusCode::from_u16(status).unwrap_or(StatusCode::SERVICE_UNAVAILABLE);
            respond::local(ex, status, TEXT, "fault_filter_abort")
        }
        // Who does not speak gRPC is told so under the status that gRPC has for everything.
        Abort::Grpc(_) if !ex.grpc => respond::local(ex, StatusCode::OK, TEXT, "fault_filter_abort"),
        Abort::Grpc(status) => respond::grpc(ex, status, TEXT, "fault_filter_abort"),
    })
}
