//! Label values of Istio's standard metrics (spec/waypoint §4.1). Pure.
use mesh_model::SpiffeId;
use mesh_model::service::Service;
use mesh_model::workload::Workload;
use std::sync::Arc;

const COMMON: usize = 21;

/// Labels of `istio_requests_total` and the histograms, in the order [`Ends::http`] gives their values.
pub(super) const HTTP_LABELS: [&str; COMMON + 4] = [
    "reporter",
    "source_workload",
    "source_canonical_service",
    "source_canonical_revision",
    "source_workload_namespace",
    "source_principal",
    "source_app",
    "source_version",
    "source_cluster",
    "destination_service",
    "destination_service_namespace",
    "destination_service_name",
    "destination_workload",
    "destination_canonical_service",
    "destination_canonical_revision",
    "destination_workload_namespace",
    "destination_principal",
    "destination_app",
    "destination_version",
    "destination_cluster",
    "connection_security_policy",
    "request_protocol",
    "response_code",
    "grpc_response_status",
    "response_flags",
];
/// Labels of the TCP families.
pub(super) const TCP_LABELS: [&str; COMMON + 2] = {
    let mut out = [""; COMMON + 2];
    let mut i = 0;
    while i < COMMON + 1 {
        out[i] = HTTP_LABELS[i];
        i += 1;
    }
    out[COMMON + 1] = "response_flags";
    out
};

/// Who talks to whom, as far as it is known.
#[derive(Clone, Copy)]
pub(super) struct Ends<'a> {
    /// The client's workload.
    pub source: Option<&'a Arc<Workload>>,
    /// Its proven identity.
    pub identity: Option<&'a SpiffeId>,
    /// The chosen endpoint.
    pub destination: Option<&'a Arc<Workload>>,
    /// The identity it proved.
    pub proven: Option<&'a SpiffeId>,
    /// The service.
    pub service: Option<&'a Arc<Service>>,
    /// The client came over mutual TLS.
    pub mutual: bool,
}
const UNKNOWN: &str = "unknown";

impl<'a> Ends<'a> {
    fn common(self) -> [&'a str; COMMON] {
        fn known(text: &str) -> &str {
            if text.is_empty() { UNKNOWN } else { text }
        }
        fn side<'a>(w: Option<&'a Arc<Workload>>, id: Option<&'a SpiffeId>) -> [&'a str; 8] {
            let of = |get: fn(&Workload) -> &str| w.map_or(UNKNOWN, |w| known(get(w)));
            [
                of(|w| &w.workload_name),
                of(|w| &w.canonical_name),
                of(|w| &w.canonical_revision),
                of(|w| &w.namespace),
                id.map_or(UNKNOWN, SpiffeId::as_str),
                of(|w| &w.canonical_name),
                of(|w| &w.canonical_revision),
                of(|w| &w.cluster),
            ]
        }
        let [s0, s1, s2, s3, s4, s5, s6, s7] = side(self.source, self.identity);
        let [d0, d1, d2, d3, d4, d5, d6, d7] = side(self.destination, self.proven);
        let svc = self.service;
        [
            "waypoint",
            s0,
            s1,
            s2,
            s3,
            s4,
            s5,
            s6,
            s7,
            svc.map_or(UNKNOWN, |s| &s.key.hostname),
            svc.map_or(UNKNOWN, |s| &s.key.namespace),
            svc.map_or(UNKNOWN, |s| &s.name),
            d0,
            d1,
            d2,
            d3,
            d4,
            d5,
            d6,
            d7,
            if self.mutual { "mutual_tls" } else { "none" },
        ]
    }
    /// Values of [`HTTP_LABELS`].
    pub fn http(self, protocol: &'a str, status: &'a str, grpc: &'a str, flags: &'a str) -> [&'a str; COMMON + 4] {
        let mut out = [""; COMMON + 4];
        let rest = [protocol, status, grpc, flags];
        for (slot, value) in out.iter_mut().zip(self.common().into_iter().chain(rest)) {
            *slot = value;
        }
        out
    }
    /// Values of [`TCP_LABELS`].
    pub fn tcp(self, flags: &'a str) -> [&'a str; COMMON + 2] {
        let mut out = [""; COMMON + 2];
        for (slot, value) in out.iter_mut().zip(self.common().into_iter().chain(["tcp", flags])) {
            *slot = value;
        }
        out
    }
}
