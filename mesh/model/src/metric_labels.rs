//! The labels all of Istio's standard metrics share, whoever reports them (istio.io "Istio Standard Metrics"). Pure.
use crate::SpiffeId;
use crate::service::Service;
use crate::workload::Workload;
use std::sync::Arc;

/// The value of a label nothing is known for, as Istio's dashboards expect.
pub const UNKNOWN: &str = "unknown";

/// How many there are.
pub const COMMON: usize = 20;
/// Their names, in the order [`Ends::values`] gives the values.
pub const NAMES: [&str; COMMON] = [
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
];

/// [`NAMES`] or [`Ends::values`], and after them those of one family. `N` is [`COMMON`] plus `REST`, which the compiler checks.
pub const fn with<'a, const REST: usize, const N: usize>(common: [&'a str; COMMON], rest: [&'a str; REST]) -> [&'a str; N] {
    const { assert!(N == COMMON + REST) };
    let mut all = [""; N];
    let (head, tail) = all.split_at_mut(COMMON);
    head.copy_from_slice(&common);
    tail.copy_from_slice(&rest);
    all
}

/// Who talks to whom, as far as it is known.
#[derive(Clone, Copy, Debug)]
pub struct Ends<'a> {
    /// Who reports: `source`, `destination` or `waypoint`.
    pub reporter: &'static str,
    /// The client's workload.
    pub source: Option<&'a Arc<Workload>>,
    /// The identity it proved.
    pub source_id: Option<&'a SpiffeId>,
    /// The server's workload.
    pub destination: Option<&'a Arc<Workload>>,
    /// The identity it proved.
    pub destination_id: Option<&'a SpiffeId>,
    /// The service.
    pub service: Option<&'a Arc<Service>>,
}

impl<'a> Ends<'a> {
    /// Values of [`NAMES`]; what is not known is [`UNKNOWN`].
    pub fn values(self) -> [&'a str; COMMON] {
        let [s0, s1, s2, s3, s4, s5, s6, s7] = side(self.source, self.source_id);
        let [d0, d1, d2, d3, d4, d5, d6, d7] = side(self.destination, self.destination_id);
        let svc = self.service;
        [
            self.reporter,
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
        ]
    }
}

fn side<'a>(workload: Option<&'a Arc<Workload>>, id: Option<&'a SpiffeId>) -> [&'a str; 8] {
    let of = |get: fn(&Workload) -> &str| match workload.map(|w| get(w)) {
        None | Some("") => UNKNOWN,
        Some(text) => text,
    };
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
