//! What all connections share, and what is known of one.
use crate::facts::Facts;
use crate::limits::Limits;
use crate::me::Me;
use crate::places::{Place, Places};
use crate::settings::Settings;
use crate::telemetry::Telemetry;
use crate::token::source::Sources;
use crate::upstream::Upstreams;
use http::HeaderValue;
use mesh_identity::SvidHandle;
use mesh_identity::live::LivePeers;
use mesh_model::in_force::InForce;
use mesh_model::l7::gateway::GatewayKey;
use mesh_model::workload::Workload;
use mesh_model::{Reason, Refusal, Snapshot, SpiffeId};
use mesh_runtime::drain::DrainWatch;
use mesh_runtime::gate::Gate;
use mesh_runtime::threads::DataThreads;
use mesh_sources::Mesh;
use std::ops::Deref;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, OnceLock};
use std::time::Duration;
use tokio::time::Instant;

/// What the whole process shares.
pub struct Shared {
    /// Settings.
    pub settings: Settings,
    /// The mesh.
    pub mesh: Mesh,
    /// Data threads.
    pub threads: DataThreads,
    /// Our certificate, rotated in place.
    pub svid: SvidHandle,
    /// Our identity.
    pub identity: SpiffeId,
    /// Which workload of the mesh this process is.
    pub me: Me,
    /// The Gateway this process serves.
    pub gateway: GatewayKey,
    /// Trust bundles, to see that a peer's root was withdrawn.
    pub tls: mesh_identity::TlsContext,
    /// Handshakes in progress.
    pub gate: Gate,
    /// What is in force where connections go.
    pub places: Places,
    /// Tunnel settings, of both sides.
    pub hbone: Arc<mesh_hbone::Settings>,
    /// Clusters, pools, health.
    pub upstreams: Arc<Upstreams>,
    /// Keys of issuers.
    pub tokens: Sources,
    /// Buckets of rate limits.
    pub limits: Limits,
    /// Metrics and access log.
    pub telemetry: Telemetry,
    /// Live tunnels, for revocation.
    pub tunnels: LivePeers,
}
impl Shared {
    /// The workload this process is, as `snap` knows it.
    pub fn me<'s>(&self, snap: &'s Snapshot) -> Result<&'s Arc<Workload>, Refusal> {
        self.me.find(snap).ok_or_else(|| {
            let name = format!("{}/{}", self.settings.namespace, self.settings.pod);
            Refusal::new(Reason::UnknownWorkload, format!("this waypoint ({name}) is no workload of the mesh yet"))
        })
    }
}

/// One connection: its facts, and what it needs of the process.
pub struct Conn {
    /// What all share.
    pub shared: Arc<Shared>,
    /// What is known of it.
    pub facts: Facts,
    /// Ends with the process or the listener.
    pub drain: DrainWatch,
    place: Arc<Place>,
    /// Whether it is in use, for its limits of time.
    pub(crate) activity: Activity,
    client_cert: OnceLock<Option<HeaderValue>>,
}
impl Conn {
    /// A connection of which this is known.
    pub fn new(shared: Arc<Shared>, facts: Facts, drain: DrainWatch) -> Self {
        let place = shared.places.of(&facts, &shared.mesh.load());
        Self { shared, facts, drain, place, activity: Activity::default(), client_cert: OnceLock::new() }
    }
    /// The same, of a client whose certificate was verified beside the mesh: its requests carry this as
    /// `x-forwarded-client-cert`.
    pub(crate) fn presenting(self, certificate: HeaderValue) -> Self {
        Self { client_cert: OnceLock::from(Some(certificate)), ..self }
    }
    /// What its requests carry as `x-forwarded-client-cert`, where the client has an identity and it is to be told.
    pub(crate) fn client_cert(&self) -> Option<&HeaderValue> {
        let make = || {
            let id = self.facts.identity.as_ref().filter(|_| self.shared.settings.forward_client_identity)?;
            HeaderValue::try_from(format!("By={};URI={id}", self.shared.identity)).ok()
        };
        self.client_cert.get_or_init(make).as_ref()
    }
    /// What is in force where it goes, by this version of the mesh.
    pub(crate) fn in_force(&self, snap: &Snapshot) -> Arc<InForce> {
        self.shared.places.in_force(&self.place, snap)
    }
}
impl Deref for Conn {
    type Target = Facts;
    fn deref(&self) -> &Facts {
        &self.facts
    }
}

/// What an HTTP connection is busy with, as far as its limits of time ask. Exchanges and the bytes that arrive tell it;
/// `http` looks.
#[derive(Debug)]
pub(crate) struct Activity {
    opened: Instant,
    /// Exchanges under way, to the last byte of their answers.
    exchanges: AtomicU32,
    /// Milliseconds after `opened` since when there is none.
    idle_since: AtomicU64,
    /// Milliseconds after `opened` since when a head is arriving; [`NEVER`] when none is.
    head_since: AtomicU64,
}
const NEVER: u64 = u64::MAX;
impl Default for Activity {
    fn default() -> Self {
        Self { opened: Instant::now(), exchanges: 0.into(), idle_since: 0.into(), head_since: NEVER.into() }
    }
}
impl Activity {
    fn now(&self) -> u64 {
        u64::try_from(self.opened.elapsed().as_millis()).unwrap_or(NEVER - 1)
    }
    /// An exchange begins: its head is there.
    pub(crate) fn begins(&self) {
        self.exchanges.fetch_add(1, Relaxed);
        self.head_since.store(NEVER, Relaxed);
    }
    /// An exchange is over.
    pub(crate) fn ends(&self) {
        self.exchanges.fetch_sub(1, Relaxed);
        self.idle_since.store(self.now(), Relaxed);
    }
    /// Bytes arrived: outside of an exchange they are of the next head.
    pub(crate) fn bytes_arrived(&self) {
        if self.exchanges.load(Relaxed) == 0 && self.head_since.load(Relaxed) == NEVER {
            self.head_since.store(self.now(), Relaxed);
        }
    }
    /// When the limit for being idle, or for a head to arrive, will have passed if nothing happens; a limit of 0 is none.
    pub(crate) fn due(&self, idle: Duration, head: Duration) -> Option<Instant> {
        if self.exchanges.load(Relaxed) > 0 {
            return None;
        }
        let (since, limit) = match self.head_since.load(Relaxed) {
            NEVER => (self.idle_since.load(Relaxed), idle),
            since => (since, head),
        };
        (!limit.is_zero()).then(|| self.opened + Duration::from_millis(since) + limit)
    }
    /// Whether a head has begun to arrive.
    pub(crate) fn is_reading_head(&self) -> bool {
        self.head_since.load(Relaxed) != NEVER
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_connection_is_idle_reading_or_busy() {
        let secs = Duration::from_secs;
        let activity = Activity::default();
        let due = || activity.due(secs(100), secs(10)).map(|at| at.duration_since(activity.opened));
        assert_eq!(due(), Some(secs(100)));
        tokio::time::advance(secs(5)).await;
        activity.bytes_arrived();
        tokio::time::advance(secs(1)).await;
        activity.bytes_arrived();
        assert_eq!((due(), activity.is_reading_head()), (Some(secs(15)), true), "from its first byte on");
        activity.begins();
        activity.begins();
        activity.bytes_arrived();
        assert_eq!((due(), activity.is_reading_head()), (None, false), "a body is no head");
        tokio::time::advance(secs(50)).await;
        activity.ends();
        assert_eq!(due(), None, "one is still under way");
        activity.ends();
        assert_eq!(due(), Some(secs(156)));
        assert_eq!(activity.due(secs(0), secs(10)), None, "no limit");
    }
}
