//! What the mesh's configuration says for requests about which no object says otherwise.
use crate::l7::path::PathNormalization;
use crate::l7::route::RetryPolicy;
use std::sync::Arc;

/// Settings of MeshConfig that requests follow.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MeshDefaults {
    /// How paths are normalised before anything looks at them (`pathNormalization`).
    pub path_normalization: PathNormalization,
    /// Retries of routes that say nothing about them (`defaultHttpRetryPolicy`).
    pub retry: Arc<RetryPolicy>,
}
impl Default for MeshDefaults {
    /// Those of an Istio without configuration.
    fn default() -> Self {
        Self { path_normalization: PathNormalization::default(), retry: Arc::new(RetryPolicy::istio_default()) }
    }
}
