//! Label values of Istio's standard metrics (spec/waypoint §4.1). Pure.
use mesh_model::metric_labels::{self, COMMON, NAMES};

/// Labels of `istio_requests_total` and the histograms, in the order [`Ends::http`] gives their values.
pub(super) const HTTP_LABELS: [&str; COMMON + 5] = metric_labels::with(
    NAMES,
    ["connection_security_policy", "request_protocol", "response_code", "grpc_response_status", "response_flags"],
);
/// Labels of the TCP families, in the order [`Ends::tcp`] gives their values.
pub(super) const TCP_LABELS: [&str; COMMON + 3] =
    metric_labels::with(NAMES, ["connection_security_policy", "request_protocol", "response_flags"]);

/// Who talks to whom, as far as it is known.
#[derive(Clone, Copy)]
pub(super) struct Ends<'a> {
    /// Both ends and the service.
    pub ends: metric_labels::Ends<'a>,
    /// The client came over mutual TLS.
    pub mutual: bool,
}

impl<'a> Ends<'a> {
    fn security(self) -> &'static str {
        if self.mutual { "mutual_tls" } else { "none" }
    }
    /// Values of [`HTTP_LABELS`].
    pub fn http(self, protocol: &'a str, status: &'a str, grpc: &'a str, flags: &'a str) -> [&'a str; HTTP_LABELS.len()] {
        metric_labels::with(self.ends.values(), [self.security(), protocol, status, grpc, flags])
    }
    /// Values of [`TCP_LABELS`].
    pub fn tcp(self, flags: &'a str) -> [&'a str; TCP_LABELS.len()] {
        metric_labels::with(self.ends.values(), [self.security(), "tcp", flags])
    }
}
