//! How long TLS handshakes take. One pair for a process: every certificate has it, so that a handshake notes its time without
//! looking for anything.

use std::sync::Arc;

use mesh_runtime::metrics::{Family, Histogram, MetricError, Registry};

/// Times of handshakes that succeeded. Clones count together.
#[derive(Clone, Debug)]
pub(crate) struct Handshakes {
    pub(crate) dialled: Arc<Histogram>,
    pub(crate) accepted: Arc<Histogram>,
    family: Family<Histogram>,
}

impl Default for Handshakes {
    fn default() -> Self {
        let help = "Time of mutual TLS handshakes that succeeded, without the TCP connect, in seconds";
        let bounds = [0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0];
        let family = Family::with_buckets("culvert_tls_handshake_seconds", help, &["direction"], &bounds);
        Self { dialled: family.pin(&["dialled"]), accepted: family.pin(&["accepted"]), family }
    }
}

impl Handshakes {
    /// Registers `culvert_tls_handshake_seconds{direction}`.
    pub(crate) fn expose(&self, registry: &Registry) -> Result<(), MetricError> {
        registry.family(self.family.clone()).map(drop)
    }
}
