//! The pods of this node: who is served, started and ended from the published snapshot.
//!
//! Owns the table of running pods and reconciles it with who is enrolled, from scratch: what should run is a function of the
//! snapshot, or what the Kubernetes API or the CNI agent said last. It refuses to take a pod half: without listeners *and* redirection the pod is
//! not served, is retried, and holds readiness back. Upstream: `Mesh` versions, `zds`. Downstream: `pod`, `accept`,
//! `ebpf-loader`.
mod settle;
mod start;

use crate::enrolment::{Arrival, ByKubernetes, Enrolled, Place};
use crate::handover::{Ask, Inherited, Predecessor};
use crate::pod::{Pod, Shared};
use crate::prefilter::Prefilter;
use crate::settings::RedirectMode;
use crate::sockets::Sockets;
use crate::zds::{Named, Order};
use ebpf_loader::{CaptureRoutes, PinRoot, Redirect, RedirectError, Tally, Unsettled};
use futures_util::StreamExt as _;
use futures_util::stream::FuturesUnordered;
use mesh_hbone::Pool;
use mesh_identity::{IdentityError, TrustBundles};
use mesh_model::authz::SourceVerdict;
use mesh_model::workload::WorkloadUid;
use mesh_model::{Reason, Refusal, SpiffeId, Version};
use mesh_runtime::drain::{DrainMode, DrainWatch};
use mesh_runtime::metrics::{MetricError, Registry};
use mesh_runtime::readiness::{Readiness, ReadyTask};
use mesh_runtime::sockets::{NetnsFd, NetnsId};
use parking_lot::Mutex;
use settle::Settler;
pub use start::Counts;
use start::{Owner, Rules, Running, Starter, table_of};
use std::collections::{BTreeMap, HashMap, HashSet};
use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinHandle;

/// How long after a failure a pod is tried again.
const RETRY: Duration = Duration::from_secs(5);

/// Pods that are made ready at a time. The kernel lets one pod's programs in after another, which is mostly waiting.
const AT_ONCE: usize = 4;

/// How long connections that were cut may take to end before the redirection is removed under them.
const TAKE_DOWN: Duration = Duration::from_secs(1);

/// How long the agent before this one may serve what is not to be served here, before that is taken for what it has not heard.
const HEARSAY: Duration = Duration::from_secs(10);

/// Connections of an agent that was replaced live until it is told to end, which sets the deadline.
const UNTIL_TOLD: Duration = Duration::from_hours(24 * 365);

/// What the supervisor knows of each pod, for admin.
#[derive(Clone, Debug, Default)]
pub struct PodTable(Arc<Mutex<BTreeMap<WorkloadUid, PodState>>>);

/// State of one pod.
#[derive(Clone, Debug)]
pub enum PodState {
    /// Served.
    Up {
        /// It.
        pod: Arc<Pod>,
        /// What its redirection counts.
        traffic: Option<Counts>,
        /// Sources whose connections it drops.
        denied: Arc<[SourceVerdict]>,
    },
    /// Should be served and is not.
    Pending {
        /// Why.
        error: String,
    },
}

impl PodTable {
    /// A copy of the table.
    pub fn list(&self) -> Vec<(WorkloadUid, PodState)> {
        self.0.lock().iter().map(|(uid, state)| (Arc::clone(uid), state.clone())).collect()
    }
    /// Registers what there is of pods anyway, read at each scrape: tunnels, and what the redirection of each pod counts. What never
    /// came is left out.
    pub fn expose(&self, registry: &Registry) -> Result<(), MetricError> {
        const TUNNELS: &str = "culvert_tunnels_active";
        const STREAMS: &str = "culvert_tunnel_streams_active";
        const PACKETS: &str = "culvert_redirect_packets_total";
        const BYTES: &str = "culvert_redirect_bytes_total";
        let table = self.clone();
        registry.on_scrape(&[TUNNELS, STREAMS, PACKETS, BYTES], move |out| {
            let (mut inbound, mut outbound, mut streams) = (0, 0, 0);
            let mut seen = Vec::new();
            for (_, state) in table.list() {
                let PodState::Up { pod, traffic, .. } = state else { continue };
                inbound += pod.tunnels.list().len() as u64;
                for pool in pod.pools.iter().map(Pool::stats) {
                    outbound += pool.tunnels as u64;
                    streams += pool.streams as u64;
                }
                let counted = traffic.map(|traffic| traffic.read()).unwrap_or_default();
                seen.extend(counted.into_iter().map(|(event, tally)| (Arc::clone(&pod), event, tally)));
            }
            out.family(TUNNELS, "Tunnels that are open now", "gauge")
                .put(&[("direction", "inbound")], inbound)
                .put(&[("direction", "outbound")], outbound);
            out.family(STREAMS, "Connections in tunnels of ours now", "gauge").put(&[("direction", "outbound")], streams);
            let mut redirected = |name, help, of: fn(&Tally) -> u64| {
                let mut samples = out.family(name, help, "counter");
                for (pod, event, tally) in &seen {
                    samples.put(&[("namespace", &pod.namespace), ("pod", &pod.name), ("event", event)], of(tally));
                }
            };
            redirected(PACKETS, "Packets that a pod's redirection saw, by what became of them", |t| t.packets);
            redirected(BYTES, "Bytes of those packets, link-layer headers included", |t| t.bytes);
        })
    }
    fn set(&self, uid: &WorkloadUid, state: PodState) {
        self.0.lock().insert(Arc::clone(uid), state);
    }
    fn remove(&self, uid: &str) {
        self.0.lock().remove(uid);
    }
}

/// A pod that is being started: where, and as whom.
struct Starting {
    place: Option<NetnsId>,
    identity: Option<SpiffeId>,
}

/// A pod that was being started.
struct Started {
    enrolled: Enrolled,
    /// When it was known that it is to be served.
    learned: Instant,
    outcome: Result<Running, String>,
}

/// The agent before this one, and what is to be known of its pods.
struct Before {
    agent: Arc<Predecessor>,
    /// Whether this one is alone.
    alone: watch::Receiver<bool>,
    /// Pods it serves that are not to be served here, and since when that is known.
    strangers: HashMap<WorkloadUid, Instant>,
}

/// What the agent before this one serves now.
#[derive(Debug)]
pub struct Take {
    /// Its listeners.
    pub pods: Inherited,
    /// Whether it is all served here.
    pub reply: oneshot::Sender<bool>,
}

/// The next question what is taken; never, if nobody asks.
async fn next_take(takes: Option<&mut mpsc::Receiver<Take>>) -> Take {
    if let Some(takes) = takes
        && let Some(take) = takes.recv().await
    {
        return take;
    }
    std::future::pending().await
}

/// Resolves when the agent before this one has stopped accepting; never, if there was none.
async fn is_alone(before: Option<&mut Before>) {
    let known = match before {
        Some(before) => before.alone.wait_for(|alone| *alone).await.is_ok(),
        None => false,
    };
    if !known {
        std::future::pending::<()>().await;
    }
}

/// The pods that the CNI agent enrols.
struct Cni {
    /// What it wants; `None` once it speaks to another agent.
    orders: Option<mpsc::Receiver<Order>>,
    enrolled: HashMap<Arc<str>, Enrolled>,
}

/// The next order; never, if nobody gives any.
async fn next_order(cni: Option<&mut Cni>) -> Order {
    if let Some(orders) = cni.and_then(|cni| cni.orders.as_mut())
        && let Some(order) = orders.recv().await
    {
        return order;
    }
    std::future::pending().await
}

/// The next change among the pods that the Kubernetes API enrols, or one of them that is about to start; never, if it enrols none.
async fn next_pods(kubernetes: Option<&mut ByKubernetes>) -> Option<Arrival> {
    match kubernetes {
        Some(kubernetes) => kubernetes.next().await,
        None => std::future::pending().await,
    }
}

/// Runs the pods of this node.
pub struct PodSupervisor {
    shared: Arc<Shared>,
    readiness: Readiness,
    running: HashMap<WorkloadUid, Running>,
    /// Those that are being started.
    starting: HashMap<WorkloadUid, Starting>,
    /// Where the agent is.
    own_place: Option<NetnsId>,
    /// Those that could not be served yet, and who they would be.
    pending: HashMap<WorkloadUid, (ReadyTask, Option<SpiffeId>)>,
    /// Pods that are being taken down, by where they are.
    ending: HashMap<NetnsId, JoinHandle<()>>,
    table: PodTable,
    pins: Option<PinRoot>,
    /// Whether redirections that an earlier agent left for pods that are gone may still be there.
    unswept: bool,
    /// Whether those are removed of which is known that they are no pod's that is waited for.
    swept_but: bool,
    inherited: Inherited,
    /// The agent before this one, until it is released.
    before: Option<Before>,
    takes: Option<mpsc::Receiver<Take>>,
    /// Who is to be served.
    wanted: HashSet<WorkloadUid>,
    /// Pods that another agent may have begun to serve in the moment in which this one did, or may have meant to take over: whoever came last
    /// is who their programs and rules hand connections to.
    contested: HashSet<WorkloadUid>,
    /// Those of them that could not be had.
    unclaimed: HashMap<WorkloadUid, ReadyTask>,
    /// Whether a successor is about to take over.
    succeeded: bool,
    handed_over: bool,
    cni: Option<Cni>,
    kubernetes: Option<ByKubernetes>,
    /// Pods whose interfaces changed.
    changed: (mpsc::Sender<WorkloadUid>, mpsc::Receiver<WorkloadUid>),
    settler: Settler,
    /// Set when every pod was looked at once.
    looked: watch::Sender<bool>,
}

impl PodSupervisor {
    /// A supervisor with no pods. What it captures is kept in `pins`; `inherited` are listeners of the agent before this one.
    pub fn new(shared: Arc<Shared>, readiness: Readiness, table: PodTable, pins: Option<PinRoot>, inherited: Inherited) -> Self {
        Self {
            readiness,
            running: HashMap::new(),
            starting: HashMap::new(),
            own_place: NetnsFd::current().ok().map(|own| own.id()),
            pending: HashMap::new(),
            ending: HashMap::new(),
            table,
            unswept: pins.is_some() || shared.settings.redirect == RedirectMode::Nftables,
            pins,
            swept_but: false,
            inherited,
            before: None,
            takes: None,
            wanted: HashSet::new(),
            contested: HashSet::new(),
            unclaimed: HashMap::new(),
            succeeded: false,
            handed_over: false,
            cni: None,
            kubernetes: None,
            changed: mpsc::channel(16),
            settler: Settler::start(),
            looked: watch::Sender::new(false),
            shared,
        }
    }

    /// Becomes true when every pod was looked at once: from then on a successor is answered.
    pub fn looked(&self) -> watch::Receiver<bool> {
        self.looked.subscribe()
    }

    /// Asks this agent again for the listeners of a pod whose ports are taken: it goes on enrolling until it is released, or gone, of
    /// which `alone` tells.
    #[must_use]
    pub fn after(mut self, agent: Arc<Predecessor>, alone: watch::Receiver<bool>) -> Self {
        self.before = Some(Before { agent, alone, strangers: HashMap::new() });
        self
    }

    /// Answers whether all is served here that the agent before this one serves.
    #[must_use]
    pub fn taking(mut self, takes: mpsc::Receiver<Take>) -> Self {
        self.takes = Some(takes);
        self
    }

    /// Serves the pods these orders name, where they are redirected already, instead of those the mesh names.
    #[must_use]
    pub fn by_cni(mut self, orders: mpsc::Receiver<Order>) -> Self {
        self.cni = Some(Cni { orders: Some(orders), enrolled: HashMap::new() });
        self
    }

    /// Serves the pods that the Kubernetes API enrols, instead of those the mesh names.
    #[must_use]
    pub fn by_kubernetes(mut self, pods: ByKubernetes) -> Self {
        self.kubernetes = Some(pods);
        self
    }

    /// Follows the mesh until `drain` starts, then drains every pod. `synced` is marked after the first reconciliation.
    /// `successor` asks for the listeners.
    pub async fn run(mut self, drain: DrainWatch, synced: ReadyTask, mut successor: mpsc::Receiver<Ask>) {
        let mut versions = self.shared.mesh.watch();
        let mut bundles = self.shared.svids.tls().bundles();
        let draining = drain.draining();
        tokio::pin!(draining);
        // Set when another agent accepts: handshakes under way end before the tunnels are told to go.
        let mut settled = None;
        let mut retry = tokio::time::Instant::now() + RETRY;
        let ended = loop {
            versions.mark_unchanged();
            // First what must end, then what takes time to begin.
            self.rejudge();
            self.reconcile().await;
            synced.ready();
            self.looked.send_if_modified(|looked| !std::mem::replace(looked, true));
            tokio::select! {
                ended = &mut draining => break ended,
                changed = versions.changed() => if changed.is_err() { break draining.await },
                // Also without a new version: pods that failed are tried again, and a namespace that was replaced under its
                // path is noticed.
                () = tokio::time::sleep_until(retry) => {
                    retry = tokio::time::Instant::now() + RETRY;
                    self.contested.extend(self.unclaimed.keys().cloned());
                }
                Some(ask) = successor.recv() => match ask {
                    Ask::Listeners(reply) => {
                        self.succeeded = true;
                        self.leave_unsettled().await;
                        drop(reply.send(self.listeners()));
                    }
                    Ask::Release(done) => {
                        self.leave_unsettled().await;
                        self.hand_over();
                        let _ = done.send(());
                        settled = Some(tokio::time::Instant::now() + self.shared.settings.handshake_timeout);
                    }
                    Ask::Stay => {
                        self.succeeded = false;
                        self.contested.extend(self.running.keys().cloned());
                    }
                },
                () = tokio::time::sleep_until(settled.unwrap_or(tokio::time::Instant::now())), if settled.is_some() => {
                    settled = None;
                    for running in self.running.values() {
                        running.drain.start(DrainMode::Graceful { deadline: UNTIL_TOLD });
                    }
                }
                arrival = next_pods(self.kubernetes.as_mut()) => if let Some(arrival) = arrival {
                    self.receive(arrival).await;
                },
                order = next_order(self.cni.as_mut()) => self.obey(order).await,
                Some(uid) = self.changed.1.recv() => self.recapture(&uid).await,
                Ok(()) = bundles.changed() => self.rejudge_tunnels(&bundles.borrow_and_update().clone()),
                () = is_alone(self.before.as_mut()) => {
                    if self.before.take().is_some_and(|before| before.agent.was_lost()) {
                        // It took this one for gone, and captured its pods again.
                        self.contested.extend(self.running.keys().cloned());
                    }
                }
                Take { pods, reply } = next_take(self.takes.as_mut()) => drop(reply.send(self.has_taken(pods))),
                () = std::future::ready(()), if self.may_reclaim() => self.reclaim().await,
            }
        };
        let mode = match ended.mode {
            DrainMode::Graceful { .. } => {
                DrainMode::Graceful { deadline: ended.deadline.saturating_duration_since(tokio::time::Instant::now()) }
            }
            DrainMode::Immediate => DrainMode::Immediate,
        };
        // Who would take over hears that nobody is left to ask.
        drop(successor);
        self.drain_all(mode, versions, bundles).await;
    }

    /// Captures on interfaces that the pod was given after it was enrolled.
    async fn recapture(&mut self, uid: &WorkloadUid) {
        let owner = self.owner(uid);
        let (Some(pins), Some(running), false) = (self.pins.clone(), self.running.get_mut(uid), self.handed_over) else { return };
        let Some(redirect) = running.redirect.take() else { return };
        let checked = tokio::task::spawn_blocking(move || (redirect.is_outdated(), redirect)).await;
        let Ok((outdated, redirect)) = checked else { return };
        running.redirect = Some(redirect);
        match outdated {
            Ok(false) => return,
            Ok(true) => {}
            // So the runtime leaves the network of a pod that ended. What is captured stays so, and has no way while `lo` is down.
            Err(RedirectError::LoopbackDown) => return,
            Err(error) => return tracing::error!(pod = %uid, %error, "an interface of the pod may not be captured"),
        }
        if self.before.is_some() {
            // It does so too.
            self.contested.insert(Arc::clone(uid));
        }
        match running.capture_again(&owner, &self.shared.settings, Some(pins), &self.settler).await {
            Ok(interfaces) => tracing::info!(pod = %uid, ?interfaces, "the pod's new interface is captured"),
            Err(error) => tracing::error!(pod = %uid, error, "an interface of the pod may not be captured"),
        }
    }

    /// Whether all is served here that the agent before this one serves; what is not is tried with its listeners.
    fn has_taken(&mut self, pods: Inherited) -> bool {
        let Some(before) = &mut self.before else { return true };
        before.strangers.retain(|uid, _| pods.contains_key(uid));
        let (mut all, now) = (true, Instant::now());
        for (uid, sockets) in pods {
            if self.running.contains_key(&uid) {
                continue;
            }
            let is_wanted = self.wanted.contains(&uid) || self.kubernetes.as_ref().is_some_and(|pods| pods.is_unplaced(&uid));
            if is_wanted {
                all = false;
                self.inherited.entry(uid).or_insert(sockets);
            } else {
                // One of the two has yet to hear of the pod, or that it left.
                all &= *before.strangers.entry(uid).or_insert(now) + HEARSAY < now;
            }
        }
        all
    }

    fn may_reclaim(&self) -> bool {
        self.before.is_none() && !self.handed_over && !self.contested.is_empty()
    }

    /// Has some of the pods that another agent may have captured as well hand their connections to this one.
    async fn reclaim(&mut self) {
        let some: Vec<_> = self.contested.iter().take(AT_ONCE).cloned().collect();
        for uid in some {
            self.contested.remove(&uid);
            let (failed, owner) = (self.unclaimed.remove(&uid), self.owner(&uid));
            let Some(running) = self.running.get_mut(&uid) else {
                if let Some(task) = failed {
                    task.ready();
                }
                continue;
            };
            match running.capture_again(&owner, &self.shared.settings, self.pins.clone(), &self.settler).await {
                Ok(_) => {
                    tracing::debug!(pod = %uid, "captured again: another agent may have done so in the same moment");
                    if let Some(task) = failed {
                        task.ready();
                    }
                }
                Err(error) => {
                    tracing::error!(pod = %uid, error, "the pod may still hand its connections to another agent, trying again");
                    let task = failed.unwrap_or_else(|| self.readiness.pending_alone(&format!("connections of {uid}")));
                    self.unclaimed.insert(uid, task);
                }
            }
        }
    }

    /// Leaves the places of pods to the next agent, which takes all that it finds missing: not two at a time.
    async fn leave_unsettled(&self) {
        let all: Vec<_> = self.running.values().filter_map(|r| r.redirect.as_ref()).map(Redirect::unsettled).collect();
        let _ = tokio::task::spawn_blocking(move || all.iter().for_each(Unsettled::leave)).await;
    }

    /// Copies of all listeners.
    fn listeners(&self) -> Vec<(WorkloadUid, Sockets)> {
        let copy =
            |(uid, running): (&WorkloadUid, &Running)| Some((Arc::clone(uid), running.sockets.as_ref()?.try_clone().ok()?));
        self.running.iter().filter_map(copy).collect()
    }

    /// Leaves the pods to the next agent; what this one carries, it carries on and goes on judging.
    fn hand_over(&mut self) {
        self.handed_over = true;
        if let Some(cni) = &mut self.cni {
            cni.orders = None;
        }
        if let Some(kubernetes) = &mut self.kubernetes {
            kubernetes.hand_over();
        }
        for running in self.running.values_mut() {
            running.stop_accepting();
        }
        let open: usize = self.running.values().map(|r| r.pod.conns.len()).sum();
        tracing::info!(pods = self.running.len(), open, "another agent took over; open connections stay until they end");
    }

    /// Carries out what the CNI agent wants.
    async fn obey(&mut self, order: Order) {
        let (outcome, done) = match order {
            Order::Add { uid, pod, netns, done } => (self.enrol(uid, pod, netns).await, done),
            Order::Remove { uid, done } => {
                if let Some(cni) = &mut self.cni {
                    cni.enrolled.remove(&uid);
                }
                self.dismiss(|key| *key == uid, "the CNI agent removed the pod");
                (Ok(()), done)
            }
            Order::Only { named, done } => {
                if let Some(cni) = &mut self.cni {
                    cni.enrolled.retain(|uid, _| named.contains(uid));
                }
                self.inherited.clear();
                self.dismiss(|key| !named.contains(key), "the CNI agent does not name the pod any more");
                (Ok(()), done)
            }
        };
        self.count();
        // A CNI agent that did not wait for the answer asks again when it is back.
        let _ = done.send(outcome);
    }

    async fn enrol(&mut self, uid: Arc<str>, pod: Named, netns: NetnsFd) -> Result<(), String> {
        let enrolled = Enrolled::by_cni(&self.shared.mesh.load_full(), Arc::clone(&uid), pod, netns);
        let Some(cni) = &mut self.cni else { return Err("pods are enrolled by the mesh here".into()) };
        cni.enrolled.insert(uid, enrolled.clone());
        self.ensure(&enrolled).await
    }

    /// Captures a pod before its containers start, and says so to who lets them.
    async fn receive(&mut self, arrival: Arrival) {
        let Arrival { uid, netns, check, done } = arrival;
        let outcome = if check {
            let captured = self.running.get(&uid).is_some_and(|running| running.place == Some(netns.id()));
            if captured { Ok(()) } else { Err("it is not captured in this network namespace".to_owned()) }
        } else {
            let enrolled = match &mut self.kubernetes {
                Some(kubernetes) => kubernetes.place(&uid, netns).await,
                None => None,
            };
            match enrolled {
                Some(enrolled) => self.ensure(&enrolled).await,
                None => Err("it has just left the mesh, or this node".into()),
            }
        };
        self.count();
        // Who did not wait for the answer asks again.
        let _ = done.send(outcome);
    }

    /// Who should be served now.
    async fn desired(&mut self) -> Vec<Enrolled> {
        let mut desired: Vec<_> = match (&self.cni, &mut self.kubernetes) {
            (Some(cni), _) => cni.enrolled.values().cloned().collect(),
            (None, Some(kubernetes)) => kubernetes.enrolled().await,
            (None, None) => Enrolled::by_mesh(&self.shared.mesh.load()).collect(),
        };
        // In one order on every start, so that it does not depend on chance who is served when two claim one namespace.
        desired.sort_by(|a, b| a.key.cmp(&b.key));
        desired
    }

    /// Ends the pods that are not enrolled any more. Who is.
    async fn dismiss_left(&mut self) -> Vec<Enrolled> {
        let desired = self.desired().await;
        let keys: HashSet<&Arc<str>> = desired.iter().map(|e| &e.key).collect();
        self.dismiss(|key| !keys.contains(key), "the pod left the mesh");
        desired
    }

    /// Makes the running pods those that are enrolled.
    async fn reconcile(&mut self) {
        let learned = Instant::now();
        self.shared.metrics.config_version.set(self.shared.mesh.load().version() as i64);
        let desired = self.dismiss_left().await;
        self.wanted = desired.iter().map(|enrolled| Arc::clone(&enrolled.key)).collect();
        if self.handed_over {
            return;
        }
        if self.cni.is_none() {
            let keys: HashSet<&Arc<str>> = desired.iter().map(|e| &e.key).collect();
            let kubernetes = self.kubernetes.as_ref();
            self.inherited.retain(|key, _| keys.contains(key) || kubernetes.is_some_and(|pods| pods.is_unplaced(key)));
        }
        self.serve(&desired, learned).await;
        if let Some(kubernetes) = &self.kubernetes {
            kubernetes.tell(self.running.keys().cloned());
        }
        self.filter().await;
        self.count();
        self.sweep();
    }

    /// Starts those of them that are not served. A version that comes meanwhile judges at once (I6).
    async fn serve(&mut self, desired: &[Enrolled], learned: Instant) {
        let mut versions = self.shared.mesh.watch();
        versions.mark_unchanged();
        // A look at those that are served takes its time too, with hundreds of them.
        let (served, new): (Vec<_>, Vec<_>) = desired.iter().partition(|enrolled| self.running.contains_key(&enrolled.key));
        let (mut left, mut starting) = (new.into_iter().chain(served), FuturesUnordered::new());
        loop {
            while starting.len() < AT_ONCE
                && let Some(enrolled) = left.next()
            {
                starting.extend(self.begin(enrolled, learned));
            }
            tokio::select! {
                // What fails is told in the log, the table and readiness.
                started = starting.next() => match started {
                    Some(started) => drop(self.finish(started)),
                    None => return,
                },
                Ok(()) = versions.changed() => self.rejudge(),
            }
        }
    }

    /// Tells the kernel from which sources nothing needs to be asked about, where that changed.
    async fn filter(&mut self) {
        let snap = self.shared.mesh.load_full();
        let mut prefilter = Prefilter::new(&snap, &self.shared.node);
        for (uid, running) in &mut self.running {
            if running.counts().is_none() {
                continue;
            }
            let workload = running.pod.workload(&snap).ok().filter(|_| self.shared.settings.prefilter);
            let denied = workload.map_or_else(|| Arc::new([]) as Arc<[_]>, |workload| prefilter.of(workload));
            if running.denied.as_ref() == Some(&denied) {
                continue;
            }
            match running.deny(&denied).await {
                Ok(()) => {
                    running.denied = Some(Arc::clone(&denied));
                    let (pod, traffic) = (Arc::clone(&running.pod), running.counts());
                    self.table.set(uid, PodState::Up { pod, traffic, denied });
                }
                Err(error) => tracing::warn!(pod = %uid, %error, "sources that policy denies are as before in the kernel"),
            }
        }
    }

    /// Ends the pods whose keys these are, and gives up those that could not be served.
    fn dismiss(&mut self, whose: impl Fn(&Arc<str>) -> bool, why: &'static str) {
        let gone: Vec<_> = self.running.keys().filter(|key| whose(key)).cloned().collect();
        for key in gone {
            // Of a pod of the next agent only the connections are ours.
            let after = if self.handed_over { After::Kept } else { After::Direct };
            self.stop(&key, why, after);
        }
        // A pending pod that is no longer wanted does not hold readiness back.
        let given_up: Vec<_> = self.pending.keys().filter(|key| whose(key)).cloned().collect();
        for key in given_up {
            self.table.remove(&key);
            if let Some((task, identity)) = self.pending.remove(&key) {
                task.ready();
                if let Some(identity) = identity {
                    self.forget_unused(&identity);
                }
            }
        }
    }

    fn count(&self) {
        self.shared.metrics.active_pods.set(self.running.len() as i64);
        self.shared.metrics.pending_pods.set(self.pending.len() as i64);
    }

    /// Removes the redirections an earlier agent left for pods that are no longer in the mesh. Where a pod is not served yet, not its own,
    /// nor rules, of which is not known whose they are.
    fn sweep(&mut self) {
        let unplaced = self.kubernetes.as_ref().is_some_and(ByKubernetes::has_unplaced);
        self.ending.retain(|_, down| !down.is_finished());
        // What the agent before this one enrols meanwhile is its own, and so is what a successor captures; what is being taken down goes in
        // its order.
        if !self.unswept || unplaced || self.before.is_some() || self.succeeded || !self.ending.is_empty() {
            return;
        }
        if self.swept_but && !self.pending.is_empty() {
            return;
        }
        let kept = self.running.values().filter_map(|r| r.redirect.as_ref()).map(Redirect::netns);
        let waiting: Vec<&str> = self.pending.keys().map(|uid| &**uid).collect();
        let names = self.names();
        let swept = |pins: &PinRoot| if waiting.is_empty() { pins.sweep(kept) } else { pins.sweep_but(kept, names, &waiting) };
        match self.pins.as_ref().map_or(Ok(0), swept) {
            Ok(0) => {}
            Ok(removed) => tracing::info!(removed, "redirections of pods that left the mesh while no agent ran are removed"),
            Err(error) => tracing::warn!(%error, "redirections of pods that left the mesh may remain"),
        }
        if !waiting.is_empty() {
            self.swept_but = true;
            return;
        }
        if self.shared.settings.redirect != RedirectMode::None {
            let (table, proc_dir) = (table_of(&self.shared.settings), self.shared.settings.proc_dir.clone());
            let keep = self.running.values().filter_map(|r| r.place).collect();
            tokio::task::spawn_blocking(move || {
                if let Err(error) = table.sweep(&proc_dir, &keep) {
                    tracing::debug!(%error, "rules in pods that left the mesh may remain");
                }
            });
        }
        self.unswept = false;
    }

    /// Serves one pod. The error is what is told in the log too.
    async fn ensure(&mut self, enrolled: &Enrolled) -> Result<(), String> {
        match self.begin(enrolled, Instant::now()) {
            Some(start) => self.finish(start.await),
            None => Ok(()),
        }
    }

    /// What has yet to be done to serve a pod: nothing if it already is and has not changed its namespace or identity.
    fn begin(&mut self, enrolled: &Enrolled, learned: Instant) -> Option<impl Future<Output = Started> + use<>> {
        let key = &enrolled.key;
        let place = self.open_netns(enrolled);
        if let (Some(running), Ok(netns)) = (self.running.get(key), &place) {
            let same_place = running.place == netns.as_ref().map(|n| n.id());
            let same_identity = enrolled.identity.as_ref().is_ok_and(|id| *id == running.pod.identity);
            if same_place && same_identity {
                self.shared.svids.introduce(&running.pod.identity, key, &enrolled.facts);
                return None;
            }
            // What comes after it in the same namespace must not find its sockets, nor lose its rules to the old one's end.
            let after = if same_place { After::Kept } else { After::Direct };
            // Should it not be served again and then leave, nobody else would open it.
            self.unswept = self.pins.is_some() || self.shared.settings.redirect == RedirectMode::Nftables;
            self.stop(key, "the pod was replaced", after);
        } else if place.is_err() && self.running.contains_key(key) {
            self.stop(key, "the pod's network namespace is gone", After::Direct);
        }
        // The redirection of a pod that was here a moment ago is taken away by what it is kept under, which is the namespace.
        let down = place.as_ref().ok().and_then(Option::as_ref).and_then(|netns| self.ending.remove(&netns.id()));
        let starting = Starting {
            place: place.as_ref().ok().and_then(Option::as_ref).map(|netns| netns.id()),
            identity: enrolled.identity.as_ref().ok().cloned(),
        };
        self.starting.insert(Arc::clone(key), starting);
        let inherited = self.inherited.remove(key);
        if self.before.is_some() && inherited.is_none() {
            self.contested.insert(Arc::clone(key));
        }
        let (starter, enrolled) = (self.starter(), enrolled.clone());
        Some(async move {
            if let Some(down) = down {
                let _ = down.await;
            }
            let outcome = match place {
                Ok(netns) => starter.start(&enrolled, netns, inherited).await,
                Err(error) => Err(error),
            };
            Started { enrolled, learned, outcome }
        })
    }

    fn starter(&self) -> Starter {
        Starter {
            shared: Arc::clone(&self.shared),
            readiness: self.readiness.clone(),
            pins: self.pins.clone(),
            by_cni: self.cni.is_some(),
            predecessor: self.before.as_ref().map(|before| Arc::clone(&before.agent)),
            changed: self.changed.0.clone(),
            settler: self.settler.clone(),
            names: self.names(),
        }
    }

    /// What kind of names pods have here.
    fn names(&self) -> &'static str {
        match (&self.cni, &self.kubernetes) {
            (Some(_), _) => "cni",
            (None, Some(_)) => "kubernetes",
            (None, None) => "mesh",
        }
    }

    fn owner(&self, key: &WorkloadUid) -> Owner {
        Owner { kind: self.names(), name: Arc::clone(key) }
    }

    /// Enters what became of it.
    fn finish(&mut self, started: Started) -> Result<(), String> {
        let Started { enrolled, learned, outcome } = started;
        let key = &enrolled.key;
        self.starting.remove(key);
        let outcome = match outcome {
            Ok(running) => {
                if let Some((task, _)) = self.pending.remove(key) {
                    task.ready();
                }
                tracing::info!(pod = %enrolled.label(), id = %running.pod.identity, "pod is served");
                self.shared.metrics.pods_started.inc();
                self.shared.metrics.pod_start.observe(learned.elapsed().as_secs_f64());
                let traffic = running.counts();
                self.table.set(key, PodState::Up { pod: Arc::clone(&running.pod), traffic, denied: Arc::new([]) });
                Self::await_certificate(&running);
                self.running.insert(Arc::clone(key), running);
                Ok(())
            }
            Err(error) => {
                if !self.pending.contains_key(key) {
                    tracing::error!(pod = %enrolled.label(), %error, "pod cannot be served, trying again");
                    let task = self.readiness.pending_alone(&format!("pod {}", enrolled.label()));
                    self.pending.insert(Arc::clone(key), (task, enrolled.identity.as_ref().ok().cloned()));
                }
                if let Ok(id) = &enrolled.identity {
                    self.shared.svids.dismiss(id, key);
                }
                self.table.set(key, PodState::Pending { error: error.clone() });
                Err(error)
            }
        };
        self.count();
        outcome
    }

    /// Where the pod is. One that is served stays where it is unless it is known to be elsewhere: to let go of it makes its traffic direct.
    fn open_netns(&self, enrolled: &Enrolled) -> Result<Option<Arc<NetnsFd>>, String> {
        let held = self.running.get(&enrolled.key).and_then(|running| running.pod.netns.clone());
        match (&enrolled.place, self.shared.settings.redirect) {
            (Place::Path(path), _) => {
                let netns = match (NetnsFd::open(&**path), held) {
                    (Ok(netns), _) => netns,
                    // Only that nothing is there says that the pod's is gone: this agent may just be out of files or memory.
                    (Err(error), Some(held)) if error.kind() != io::ErrorKind::NotFound => {
                        tracing::warn!(pod = %enrolled.label(), path = &**path, %error, "served where it was: the path tells nothing");
                        return Ok(Some(held));
                    }
                    (Err(error), _) => return Err(format!("{path}: {error}")),
                };
                self.check_place(&enrolled.key, &netns).map_err(|e| format!("{path}: {e}"))?;
                Ok(Some(Arc::new(netns)))
            }
            (Place::Netns(netns), _) => {
                self.check_place(&enrolled.key, netns)?;
                Ok(Some(Arc::clone(netns)))
            }
            (Place::Unknown, RedirectMode::None) => Ok(None),
            (Place::Unknown, _) => {
                let why = "the pod's network namespace is not known (annotation culvert.dev/netns, or a process in its cgroup)";
                held.map(Some).ok_or_else(|| why.into())
            }
        }
    }

    /// A namespace belongs to one pod: two pods in one would carry each other's identity.
    fn check_place(&self, key: &str, netns: &NetnsFd) -> Result<(), String> {
        if self.own_place == Some(netns.id()) {
            return Err("this is the agent's own network namespace".into());
        }
        let served = self.running.iter().map(|(other, r)| (other, r.place));
        let mut places = served.chain(self.starting.iter().map(|(other, starting)| (other, starting.place)));
        match places.find(|(other, place)| *place == Some(netns.id()) && &***other != key) {
            Some((other, _)) => Err(format!("pod {other} is served in this network namespace")),
            None => Ok(()),
        }
    }

    /// The pod is ready once it can prove who it is.
    fn await_certificate(running: &Running) {
        let svid = running.pod.svid.clone();
        let uid = Arc::clone(&running.pod.uid);
        let ready = Arc::clone(&running.ready);
        let drain = running.pod.drain.clone();
        tokio::spawn(async move {
            let mut pause = Duration::from_millis(100);
            while !drain.is_draining() {
                match svid.fetch().await {
                    Ok(_) => return ready.ready(),
                    // Nor will it soon; that is no reason for the others to wait.
                    Err(error @ IdentityError::Unregistered { .. }) => {
                        tracing::warn!(%error, pod = %uid, "served without a certificate until it is registered");
                        return ready.ready();
                    }
                    Err(error) => tracing::warn!(%error, pod = %uid, "no certificate yet"),
                }
                tokio::time::sleep(pause).await;
                pause = (pause * 2).min(Duration::from_secs(15));
            }
        });
    }

    /// Ends one pod at once: it is no longer ours, its network may be gone.
    fn stop(&mut self, uid: &str, why: &'static str, after: After) {
        let Some(mut running) = self.running.remove(uid) else { return };
        if let Some(task) = self.unclaimed.remove(uid) {
            task.ready();
        }
        running.stop_accepting();
        self.table.remove(uid);
        running.ready.ready();
        let why = Refusal::new(Reason::Revoked, why);
        // Before the drain, which ends the tunnels: a connection is to know why it ended, not that its tunnel broke.
        running.pod.conns.close(&why);
        running.drain.start(DrainMode::Immediate);
        self.shared.svids.dismiss(&running.pod.identity, uid);
        self.forget_unused(&running.pod.identity);
        self.shared.metrics.pods_stopped.inc();
        tracing::info!(pod = %uid, %why, "pod is no longer served");
        let place = running.place;
        let down = tokio::spawn(take_down(running, why, after));
        self.ending.retain(|_, down| !down.is_finished());
        self.ending.extend(place.map(|place| (place, down)));
    }
    /// Drops the certificate when no other pod of this node has that identity, or is about to: a start under way has a handle of
    /// it already, which would never see another certificate.
    fn forget_unused(&self, identity: &SpiffeId) {
        let is_served = self.running.values().any(|r| r.pod.identity == *identity);
        if !is_served && !self.starting.values().any(|s| s.identity.as_ref() == Some(identity)) {
            self.shared.svids.forget(identity);
        }
    }

    /// Judges all live inbound connections by the current version (I6).
    fn rejudge(&self) {
        let snap = self.shared.mesh.load_full();
        for running in self.running.values() {
            let cut = running.pod.conns.rejudge(&snap, running.pod.workload(&snap).ok().map(|w| &**w));
            if cut > 0 {
                self.shared.metrics.cut.add(cut as u64);
                tracing::info!(pod = %running.pod.uid, cut, version = snap.version(), "connections closed due to policy change");
            }
        }
    }

    /// Ends tunnels whose peers are no longer trusted.
    fn rejudge_tunnels(&self, bundles: &TrustBundles) {
        for running in self.running.values() {
            let cut = running.pod.tunnels.rejudge(bundles) + running.pod.reached.rejudge(bundles);
            if cut > 0 {
                tracing::warn!(pod = %running.pod.uid, cut, "tunnels closed: their peers' certificates are no longer trusted");
            }
        }
    }

    /// Drains every pod: listeners close, tunnels get GOAWAY, connections may end by themselves until the deadline. Until then they
    /// are judged as before (I6).
    async fn drain_all(
        mut self,
        mode: DrainMode,
        mut versions: watch::Receiver<Version>,
        mut bundles: watch::Receiver<Arc<TrustBundles>>,
    ) {
        let deadline = match mode {
            DrainMode::Graceful { deadline } => deadline,
            DrainMode::Immediate => Duration::ZERO,
        };
        let end = tokio::time::Instant::now() + deadline;
        for running in self.running.values_mut() {
            running.stop_accepting();
            running.drain.start(mode);
        }
        // Connections have no one place to report their end to that is worth its cost on every other day.
        let mut tick = tokio::time::interval(Duration::from_millis(20));
        // Tunnels too: whoever opened a stream before it heard of the GOAWAY is served, or told that it was not.
        while self.running.values().any(|r| r.pod.conns.len() + r.drain.held() > 0) {
            tokio::select! {
                () = tokio::time::sleep_until(end) => {
                    let left: usize = self.running.values().map(|r| r.pod.conns.len() + r.drain.held()).sum();
                    tracing::warn!(left, "connections closed at the termination deadline");
                    break;
                }
                _ = tick.tick() => {}
                Ok(()) = versions.changed() => {
                    self.rejudge();
                    self.dismiss_left().await;
                }
                Ok(()) = bundles.changed() => self.rejudge_tunnels(&bundles.borrow_and_update().clone()),
                // Who wants a pod begun hears that this agent goes, and asks the next.
                arrival = next_pods(self.kubernetes.as_mut()) => if arrival.is_none() {
                    self.dismiss_left().await;
                },
                order = next_order(self.cni.as_mut()) => if !matches!(order, Order::Add { .. }) {
                    self.obey(order).await;
                },
            }
        }
        let why = Refusal::new(Reason::Draining, "the agent is shutting down");
        let kept = self.running.drain().map(|(_, r)| tokio::spawn(take_down(r, why.clone(), After::Kept)));
        let downs: Vec<_> = kept.chain(self.ending.drain().map(|(_, down)| down)).collect();
        for down in downs {
            let _ = down.await;
        }
    }
}

/// What becomes of a pod's redirection when the pod is no longer served.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum After {
    /// It is removed.
    Direct,
    /// It stays where it is pinned, for the next to serve the pod; until then new connections are dropped.
    Kept,
}

/// Ends what a pod has: connections first, because once the redirection is gone, what the application still sends on
/// them would go to the network as it is.
async fn take_down(running: Running, why: Refusal, after: After) {
    let Running { pod, redirect, rules, loops, .. } = running;
    pod.conns.close(&why);
    for pool in &pod.pools {
        pool.drain();
        pool.close_where(|_| true);
    }
    let empty = async {
        for accepting in loops {
            let _ = accepting.await;
        }
        while !pod.conns.is_empty() {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    };
    if tokio::time::timeout(TAKE_DOWN, empty).await.is_err() {
        tracing::warn!(pod = %pod.uid, left = pod.conns.len(), "connections did not end in time");
    }
    // Tens of milliseconds of system calls.
    let netns = pod.netns.clone();
    let done = tokio::task::spawn_blocking(move || {
        if after == After::Kept {
            drop(redirect);
            return Ok(());
        }
        let unloaded = match (rules, &netns) {
            (Some(Rules { table, routes }), Some(netns)) => {
                let routes = routes.map_or(Ok(()), CaptureRoutes::remove).map_err(io::Error::other);
                table.unload(netns).and(routes)
            }
            _ => Ok(()),
        };
        redirect.map_or(Ok(()), Redirect::detach).map_err(io::Error::other).and(unloaded)
    });
    if let Ok(Err(error)) = done.await {
        // The namespace is usually gone together with everything in it.
        tracing::debug!(%error, pod = %pod.uid, "redirection could not be removed");
    }
}
