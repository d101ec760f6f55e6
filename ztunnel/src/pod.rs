//! One enrolled pod: its namespace, identity, tunnels and live connections, and what all pods share.
//!
//! Owns nothing that decides: facts and handles only. Upstream: `pods` makes and ends it. Downstream: the three
//! directions hold it for as long as a connection lives.
use crate::conns::Conns;
use crate::dialer::PodDialer;
use crate::enrolment::{Enrolled, find_named};
use crate::gateways::FailedGateways;
use crate::metrics::Metrics;
use crate::node::Node;
use crate::ports::Ports;
use crate::resolv::PodDns;
use crate::settings::Settings;
use crate::spans::Tracing;
use arc_swap::ArcSwapOption;
use http::HeaderValue;
use mesh_hbone::{Pool, headers};
use mesh_identity::live::LivePeers;
use mesh_identity::{SvidCache, SvidHandle};
use mesh_model::wanted::Wanted;
use mesh_model::workload::{Workload, WorkloadUid};
use mesh_model::{Reason, Refusal, Snapshot, SpiffeId};
use mesh_runtime::drain::DrainWatch;
use mesh_runtime::gate::Gate;
use mesh_runtime::logging::AccessLog;
use mesh_runtime::memory::Budget;
use mesh_runtime::resolve::Resolver;
use mesh_runtime::sockets::NetnsFd;
use mesh_runtime::threads::DataThreads;
use mesh_sources::Mesh;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

/// How long the first connections of a pod wait for the mesh to know it (node-agent §1.2).
const KNOWN_WITHIN: Duration = Duration::from_secs(5);

/// What all pods of the process share.
#[derive(Debug)]
pub struct Shared {
    /// Settings.
    pub settings: Settings,
    /// The mesh.
    pub mesh: Mesh,
    /// Data threads.
    pub threads: DataThreads,
    /// Certificates.
    pub svids: SvidCache,
    /// Metrics.
    pub metrics: Metrics,
    /// Access log.
    pub access: AccessLog,
    /// Spans, where somebody is told of them.
    pub tracing: Option<Tracing>,
    /// Handshakes in progress.
    pub gate: Gate,
    /// The node's own processes.
    pub node: Node,
    /// Host names.
    pub resolver: Resolver,
    /// Gateways of other networks that just failed.
    pub gateways: FailedGateways,
    /// Tunnel settings.
    pub hbone: Arc<mesh_hbone::Settings>,
    /// Bytes that grown windows may hold.
    pub budget: Budget,
}

/// One enrolled pod.
#[derive(Debug)]
pub struct Pod {
    /// Workload id.
    pub uid: WorkloadUid,
    /// Its Kubernetes namespace.
    pub namespace: Arc<str>,
    /// Its name.
    pub name: Arc<str>,
    /// Whether it may be served before the mesh knows it.
    early: bool,
    /// Of the agent itself: where its metrics are, which is all there is of it.
    pub metrics: Option<SocketAddr>,
    /// Its network namespace; `None` serves the agent's own (tests).
    pub netns: Option<Arc<NetnsFd>>,
    /// Where the agent's own sockets are bound in it.
    pub ports: Ports,
    /// Its identity.
    pub identity: SpiffeId,
    /// Its certificate, rotated in place.
    pub svid: SvidHandle,
    /// Its live connections.
    pub conns: Arc<Conns>,
    /// Inbound tunnels, for revocation.
    pub tunnels: LivePeers,
    /// Those we opened tunnels to, for the same.
    pub reached: Arc<LivePeers>,
    /// Tunnels per data thread.
    pub pools: Box<[Pool<PodDialer>]>,
    /// What its DNS proxy keeps.
    pub dns: PodDns,
    /// Ends the pod.
    pub drain: DrainWatch,
    /// What it shares.
    pub shared: Arc<Shared>,
    baggage: ArcSwapOption<(Arc<Workload>, HeaderValue)>,
    /// The id it has in the mesh, where it is not the one it was enrolled by.
    told: ArcSwapOption<WorkloadUid>,
}

impl Pod {
    /// A pod with no connections yet.
    pub fn new(
        shared: &Arc<Shared>,
        enrolled: &Enrolled,
        identity: SpiffeId,
        (netns, ports): (Option<Arc<NetnsFd>>, Ports),
        drain: DrainWatch,
    ) -> Arc<Self> {
        Arc::new(Self::with(shared, enrolled, identity, (netns, ports), drain))
    }

    /// The agent itself, of which only its metrics are served, in its own network namespace.
    pub fn agent(
        shared: &Arc<Shared>,
        enrolled: &Enrolled,
        identity: SpiffeId,
        metrics: SocketAddr,
        drain: DrainWatch,
    ) -> Arc<Self> {
        let pod = Self::with(shared, enrolled, identity, (None, Ports::USUAL), drain);
        // Its own pod is in the mesh a moment after it runs.
        Arc::new(Self { early: true, metrics: Some(metrics), ..pod })
    }

    fn with(
        shared: &Arc<Shared>,
        enrolled: &Enrolled,
        identity: SpiffeId,
        (netns, ports): (Option<Arc<NetnsFd>>, Ports),
        drain: DrainWatch,
    ) -> Self {
        let svid = shared.svids.handle(&identity);
        let reached = Arc::default();
        let dialer = PodDialer::new(&shared.settings, &shared.metrics, netns.clone(), svid.clone(), Arc::clone(&reached));
        let pools = shared.threads.workers().iter().map(|_| Pool::new(dialer.clone(), Arc::clone(&shared.hbone))).collect();
        Self {
            uid: Arc::clone(&enrolled.uid),
            namespace: Arc::clone(&enrolled.namespace),
            name: Arc::clone(&enrolled.name),
            early: enrolled.is_early(),
            metrics: None,
            netns,
            ports,
            identity,
            svid,
            conns: Arc::default(),
            tunnels: LivePeers::default(),
            reached,
            dns: PodDns::default(),
            pools,
            drain,
            shared: Arc::clone(shared),
            baggage: ArcSwapOption::empty(),
            told: ArcSwapOption::empty(),
        }
    }

    /// This pod in `snap`, or the refusal that says it left.
    pub fn workload<'a>(&self, snap: &'a Snapshot) -> Result<&'a Arc<Workload>, Refusal> {
        self.find(snap)
            // A pod that was made again under its name with another account is not the one of before.
            .filter(|w| *w.service_account == *self.identity.service_account())
            .ok_or_else(|| Refusal::new(Reason::UnknownWorkload, format!("pod {} is not in the mesh", self.uid)))
    }

    /// By its id; one that a CNI agent named, whose id is a guess, also by its names.
    fn find<'a>(&self, snap: &'a Snapshot) -> Option<&'a Arc<Workload>> {
        if let Some(workload) = snap.find_workload(&self.uid) {
            return Some(workload);
        }
        if !self.early {
            return None;
        }
        if let Some(workload) = self.told.load().as_deref().and_then(|uid| snap.find_workload(uid)) {
            return Some(workload);
        }
        let workload = find_named(snap, &self.namespace, &self.name, self.identity.service_account())?;
        self.told.store(Some(Arc::new(Arc::clone(&workload.uid))));
        Some(workload)
    }

    /// Waits until the mesh knows a pod that was served before: a pod's first connection is often quicker than istiod. What is
    /// not known in time is refused by the look-up that follows.
    pub async fn known(&self) {
        let mesh = &self.shared.mesh;
        let is_known = || self.find(&mesh.load()).is_some();
        if !self.early || is_known() {
            return;
        }
        let mut versions = mesh.watch();
        let known = async {
            if mesh.demand().is_some() {
                mesh.fetch(&Wanted::Workload(Arc::clone(&self.uid)), KNOWN_WITHIN).await;
            }
            while !is_known() && versions.changed().await.is_ok() {}
        };
        let _ = tokio::time::timeout(KNOWN_WITHIN, known).await;
    }

    /// `baggage` of this pod, encoded once per version of its workload.
    pub fn baggage(&self, workload: &Arc<Workload>) -> Option<HeaderValue> {
        if let Some(cached) = &*self.baggage.load()
            && Arc::ptr_eq(&cached.0, workload)
        {
            return Some(cached.1.clone());
        }
        let value = headers::Baggage::of(workload).encode()?;
        self.baggage.store(Some(Arc::new((Arc::clone(workload), value.clone()))));
        Some(value)
    }

    /// Whether its questions of DNS are answered here.
    pub fn captures_dns(&self) -> bool {
        self.netns.is_some() && self.shared.settings.dns_capture
    }

    /// The refusal of a connection to a port of the pod that is the agent's own, by name or in fact: it would come back.
    pub fn refuse_own(&self, dst: SocketAddr) -> Result<(), Refusal> {
        if self.ports.are_own(dst.port()) {
            Err(Refusal::new(Reason::Recursion, format!("{dst} is a port of the agent itself")))
        } else {
            Ok(())
        }
    }

    /// The pool of the data thread this runs on.
    pub fn pool(&self) -> Option<&Pool<PodDialer>> {
        self.pools.get(mesh_runtime::threads::current().unwrap_or_default())
    }
}
