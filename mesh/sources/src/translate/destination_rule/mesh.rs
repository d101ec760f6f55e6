//! What MeshConfig says of reaching services, for those of which no DestinationRule says otherwise.
//!
//! A part that is wrong is left out and reported; the others count.

use std::sync::Arc;
use std::time::Duration;

use mesh_model::l7::destination::{LocalityPolicy, OutlierPolicy, TrafficPolicy};

use super::super::object::Reader;
use super::super::read::{self, Bad, Read};
use super::{Dr, Keepalive, Pool, at_least_1ms};
use crate::diagnostics::Severity;
use crate::yaml::Node;

/// See the module.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(in super::super) struct MeshTraffic {
    /// `defaultTrafficPolicy`: each block counts where a DestinationRule has none.
    pub(super) pool: Option<Arc<Pool>>,
    pub(super) outlier: Option<OutlierPolicy>,
    /// `connectTimeout`.
    pub(super) connect_timeout: Option<Duration>,
    /// `tcpKeepalive`, each number where a DestinationRule has none.
    pub(super) keepalive: Option<Keepalive>,
    /// `h2UpgradePolicy: UPGRADE`.
    pub(super) h2_upgrade: bool,
    /// `localityLbSetting`.
    pub(super) locality: Option<Arc<LocalityPolicy>>,
}

impl MeshTraffic {
    /// Reads these parts of MeshConfig.
    pub(in super::super) fn read<'p>(r: &mut Reader<'_>, mesh: &'p Node<'p>) -> Self {
        let mut dr = Dr { r, root: mesh };
        let mut out = Self::default();
        if let Some(Some(p)) = dr.told(read::map(mesh, "defaultTrafficPolicy")) {
            dr.told(read::only(p, &["connectionPool", "outlierDetection"]));
            let pool = dr.told(read::map(p, "connectionPool")).flatten().map(Dr::pool);
            out.pool = pool.and_then(|read| dr.told(read)).map(Arc::new);
            let outlier = dr.told(read::map(p, "outlierDetection")).flatten().map(|n| dr.outlier(n));
            out.outlier = outlier.and_then(|read| dr.told(read));
        }
        out.connect_timeout = dr.told(at_least_1ms(mesh, "connectTimeout")).flatten();
        let keepalive = dr.told(read::map(mesh, "tcpKeepalive")).flatten().map(Keepalive::read);
        out.keepalive = keepalive.and_then(|read| dr.told(read));
        out.h2_upgrade = dr.told(h2_upgrade(mesh)).unwrap_or_default();
        let locality = dr.told(read::map(mesh, "localityLbSetting")).flatten().map(|n| dr.locality(n));
        let locality = locality.and_then(|read| dr.told(read));
        out.locality = locality.map(|locality| Arc::new(LocalityPolicy { mesh_wide: true, ..locality }));
        out
    }
    /// How a service is reached of which nothing else is said.
    pub(in super::super) fn policy(&self) -> TrafficPolicy {
        TrafficPolicy {
            locality: self.locality(),
            pool: Pool::limits(None, self),
            outlier: self.outlier.clone(),
            ..TrafficPolicy::default()
        }
    }
    /// Locality preferences where a DestinationRule has none.
    pub(super) fn locality(&self) -> LocalityPolicy {
        self.locality.as_deref().cloned().unwrap_or_default()
    }
}

fn h2_upgrade<'p>(mesh: &'p Node<'p>) -> Read<'p, bool> {
    match read::text_or_empty(mesh, "h2UpgradePolicy")? {
        "" | "DO_NOT_UPGRADE" => Ok(false),
        "UPGRADE" => Ok(true),
        t => {
            let at = mesh.get("h2UpgradePolicy").unwrap_or(mesh);
            Err(Bad::value(at, format!("`{t}` is not understood"), "write DO_NOT_UPGRADE or UPGRADE"))
        }
    }
}

impl<'p> Dr<'_, '_, 'p> {
    /// What was read; else that it cannot be is told.
    fn told<T>(&mut self, read: Read<'p, T>) -> Option<T> {
        read.map_err(|bad| self.r.report(self.root, &bad, Severity::Error)).ok()
    }
}
