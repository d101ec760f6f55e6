//! What the mesh's configuration says for requests about which no object says otherwise.
use crate::l7::TrafficPolicy;
use crate::l7::path::PathNormalization;
use crate::l7::route::RetryPolicy;
use std::sync::Arc;

/// Settings of MeshConfig that requests follow.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MeshDefaults {
    /// How paths are normalised before anything looks at them (`pathNormalization`).
    pub path_normalization: PathNormalization,
    /// How services are reached of which nothing is said (`defaultTrafficPolicy`, `connectTimeout` and others); what is said of the
    /// others is laid over it where they are translated.
    pub traffic: Arc<TrafficPolicy>,
    /// Retries of routes that say nothing about them (`defaultHttpRetryPolicy`).
    pub retry: Arc<RetryPolicy>,
}
impl Default for MeshDefaults {
    /// Those of an Istio without configuration.
    fn default() -> Self {
        let retry = Arc::new(RetryPolicy::istio_default());
        Self { path_normalization: PathNormalization::default(), traffic: Arc::default(), retry }
    }
}
