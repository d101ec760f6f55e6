//! Starting one pod: listeners, redirection, accept loops.
//!
//! Owns the order of it and what a running pod consists of. It refuses to leave a pod half started. It holds nothing of the supervisor, so that
//! several pods are started at a time. Upstream: `pods`. Downstream: `accept`, `nft`, `ebpf-loader`.
use crate::accept;
use crate::dns;
use crate::enrolment::Enrolled;
use crate::handover::Predecessor;
use crate::nft::Table;
use crate::pod::{Pod, Shared};
use crate::pods::settle::Settler;
use crate::ports::Ports;
use crate::prefilter::{ranges, sources};
use crate::settings::{OlderConnections, RedirectMode, Settings, Udp};
use crate::sockets::{DnsSockets, Sockets};
use crate::{inbound, outbound, passthrough};
use ebpf_loader::{CaptureRoutes, Config, Listeners, PinRoot, PodSpec, Redirect, Tally, Traffic};
use mesh_model::authz::SourceVerdict;
use mesh_model::workload::WorkloadUid;
use mesh_runtime::drain::{self, Drain, DrainMode};
use mesh_runtime::readiness::{Readiness, ReadyTask};
use mesh_runtime::sockets::{Doorbell, NetnsFd, NetnsId};
use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

/// A running pod. Dropping it without `PodSupervisor::stop` still ends it: every part cleans up after itself, save a pinned
/// redirection, which then keeps the pod closed.
pub(super) struct Running {
    pub(super) pod: Arc<Pod>,
    pub(super) place: Option<NetnsId>,
    pub(super) redirect: Option<Redirect>,
    /// What it was told of sources; `None` before it was told anything.
    pub(super) denied: Option<Arc<[SourceVerdict]>>,
    /// Copies of the listeners, for the next agent; closed with them.
    pub(super) sockets: Option<Sockets>,
    pub(super) loops: Vec<JoinHandle<()>>,
    /// The rules of ours in the pod.
    pub(super) rules: Option<Rules>,
    pub(super) links: Option<JoinHandle<()>>,
    pub(super) accepting: Drain,
    pub(super) drain: Drain,
    pub(super) ready: Arc<ReadyTask>,
}

impl Running {
    /// Where it is read what the redirection counts, if there is one of ours.
    pub(super) fn counts(&self) -> Option<Counts> {
        match (&self.redirect, &self.rules, &self.pod.netns) {
            (Some(redirect), ..) => Some(Counts::Programs(redirect.traffic())),
            (None, Some(Rules { table, .. }), Some(netns)) if table.tcp => Some(Counts::Rules(table.clone(), Arc::clone(netns))),
            _ => None,
        }
    }

    /// Has the kernel drop what comes from these.
    pub(super) async fn deny(&mut self, verdicts: &[SourceVerdict]) -> io::Result<()> {
        if let Some(redirect) = &mut self.redirect {
            return redirect.set_sources(&sources(verdicts)).map_err(io::Error::other);
        }
        let Some(Counts::Rules(table, netns)) = self.counts() else { return Ok(()) };
        let denied = ranges(verdicts);
        // Rules begin with none.
        if denied.is_empty() && self.denied.is_none() {
            return Ok(());
        }
        tokio::task::spawn_blocking(move || table.deny(&netns, &denied)).await.map_err(io::Error::other).flatten()
    }

    /// Puts its redirection in force anew: on all interfaces there are, and with this agent's listeners. Answers which interfaces. Keeps
    /// what it has where that fails.
    pub(super) async fn capture_again(
        &mut self,
        owner: &Owner,
        settings: &Settings,
        pins: Option<PinRoot>,
        settler: &Settler,
    ) -> Result<Vec<String>, String> {
        let (Some(netns), Some(sockets)) = (self.pod.netns.clone(), &self.sockets) else { return Ok(Vec::new()) };
        if let Some(Rules { table, .. }) = &self.rules {
            let (table, netns) = (table.clone(), Arc::clone(&netns));
            let loaded = tokio::task::spawn_blocking(move || table.load(&netns)).await.map_err(io::Error::other).flatten();
            loaded.map_err(|e| format!("rules: {e}"))?;
        }
        // Both begin with no sources.
        self.denied = None;
        let Some(redirect) = &self.redirect else { return Ok(Vec::new()) };
        // All places are taken then, not two at a time.
        let unsettled = redirect.unsettled();
        let _ = tokio::task::spawn_blocking(move || unsettled.leave()).await;
        let dns = self.rules.as_ref().is_some_and(|rules| rules.table.dns);
        let whole = attach(netns, sockets, pins, programs(settings, dns), owner).await?;
        let interfaces = whole.interfaces().to_vec();
        self.redirect = Some(whole);
        self.settle(settler);
        Ok(interfaces)
    }

    /// Has the pod given its lasting places, if it has none yet.
    fn settle(&self, settler: &Settler) {
        if let Some(redirect) = &self.redirect {
            settler.add(&self.pod.uid, redirect.unsettled());
        }
    }

    /// Closes the listeners, unless another agent has them too.
    pub(super) fn stop_accepting(&mut self) {
        self.sockets = None;
        if let Some(links) = self.links.take() {
            links.abort();
        }
        self.accepting.start(DrainMode::Immediate);
    }
}

/// Rules of nftables, and what they need if they capture TCP.
pub(super) struct Rules {
    pub(super) table: Table,
    pub(super) routes: Option<CaptureRoutes>,
}

/// Where what a pod's redirection counts is read.
#[derive(Clone, Debug)]
pub enum Counts {
    /// The programs' maps.
    Programs(Arc<Traffic>),
    /// Rules, in the pod's namespace.
    Rules(Table, Arc<NetnsFd>),
}

impl Counts {
    /// What was counted at all, by event; nothing where it cannot be read.
    pub fn read(&self) -> Vec<(&'static str, Tally)> {
        let counted = match self {
            Self::Programs(traffic) => traffic.read().unwrap_or_default(),
            Self::Rules(table, netns) => table.traffic(netns).unwrap_or_default(),
        };
        counted.into_iter().filter(|(_, tally)| tally.packets > 0).collect()
    }
}

/// What starting a pod takes.
pub(super) struct Starter {
    pub(super) shared: Arc<Shared>,
    pub(super) readiness: Readiness,
    pub(super) pins: Option<PinRoot>,
    /// Whether a CNI agent enrols, whose own rules redirect.
    pub(super) by_cni: bool,
    /// Who may have a pod's ports already.
    pub(super) predecessor: Option<Arc<Predecessor>>,
    /// Is told of pods whose interfaces change.
    pub(super) changed: mpsc::Sender<WorkloadUid>,
    pub(super) settler: Settler,
    /// What kind of names pods have.
    pub(super) names: &'static str,
}

/// Whose a redirection is.
#[derive(Clone)]
pub(super) struct Owner {
    pub(super) kind: &'static str,
    pub(super) name: WorkloadUid,
}

impl Starter {
    fn owner(&self, key: &WorkloadUid) -> Owner {
        Owner { kind: self.names, name: Arc::clone(key) }
    }

    /// Listeners, redirection, accept loops: all or nothing. `inherited` are listeners of the agent before this one.
    pub(super) async fn start(
        &self,
        enrolled: &Enrolled,
        netns: Option<Arc<NetnsFd>>,
        inherited: Option<Sockets>,
    ) -> Result<Running, String> {
        let identity = enrolled.identity.clone().map_err(|e| format!("identity: {e}"))?;
        let _enrolling = self.settler.enrolling();
        let (drain, watch) = drain::channel();
        let (accepting, accept) = drain::channel();
        self.shared.svids.introduce(&identity, &enrolled.key, &enrolled.facts);
        self.shared.svids.prefetch(&identity);
        let sockets = self.sockets(enrolled, netns.clone(), inherited).await?;
        let ports = sockets.ports().map_err(|e| format!("listeners: {e}"))?;
        let pod = Pod::new(&self.shared, enrolled, identity, (netns.clone(), ports), watch);
        let name = enrolled.label();
        // Neither waits for the other: one has the kernel wait for its readers, the other is a program that is started.
        let (redirect, rules) = match tokio::join!(
            self.redirect(&enrolled.key, netns.as_ref(), &sockets),
            self.rules(netns.as_ref(), &name, ports)
        ) {
            (Ok(Some(mut redirect)), Ok(rules)) => {
                if rules.as_ref().is_some_and(|rules| rules.table.dns) {
                    redirect.set_config(programs(&self.shared.settings, true)).map_err(|e| format!("redirection: {e}"))?;
                }
                (Some(redirect), rules)
            }
            (Ok(None), Ok(rules)) => (None, rules),
            (Err(error), Ok(Some(Rules { table, .. }))) => {
                // Nobody would answer the questions they hand over.
                if let Some(netns) = netns {
                    let _ = tokio::task::spawn_blocking(move || table.unload(&netns)).await;
                }
                return Err(error);
            }
            (Err(error), _) | (_, Err(error)) => return Err(error),
        };
        let workers = self.shared.threads.workers();
        // Pods spread over the threads by a number that does not depend on the order they came in.
        let home = enrolled.key.bytes().fold(0usize, |h, b| h.wrapping_mul(31).wrapping_add(usize::from(b))) % workers.len();
        let worker = workers.get(home).ok_or("no data thread")?;
        let copies = sockets.try_clone().map_err(|e| format!("listeners: {e}"))?;
        let Sockets { outbound, plain, hbone, dns } = sockets;
        let mut loops = vec![
            worker.spawn(report_end(
                "outbound",
                name.clone(),
                accept::run(Arc::clone(&pod), outbound, accept.clone(), outbound::serve_conn),
            )),
            worker.spawn(report_end(
                "inbound plaintext",
                name.clone(),
                accept::run(Arc::clone(&pod), plain, accept.clone(), passthrough::serve_conn),
            )),
            worker.spawn(report_end(
                "inbound",
                name.clone(),
                accept::run(Arc::clone(&pod), hbone, accept.clone(), inbound::serve_conn),
            )),
        ];
        for DnsSockets { udp, tcp } in dns {
            loops.push(worker.spawn(report_end(
                "DNS over UDP",
                name.clone(),
                dns::run_udp(Arc::clone(&pod), udp, accept.clone()),
            )));
            loops.push(worker.spawn(report_end(
                "DNS over TCP",
                name.clone(),
                dns::run_tcp(Arc::clone(&pod), tcp, accept.clone()),
            )));
        }
        let ready = Arc::new(self.readiness.pending(&format!("certificate of {name}")));
        let links = match (&self.pins, &netns) {
            (Some(_), Some(netns)) => {
                Some(tokio::spawn(watch_links(Arc::clone(netns), Arc::clone(&enrolled.key), self.changed.clone())))
            }
            _ => None,
        };
        let running = Running {
            pod,
            place: netns.map(|n| n.id()),
            redirect,
            denied: None,
            rules,
            sockets: Some(copies),
            loops,
            links,
            accepting,
            drain,
            ready,
        };
        running.settle(&self.settler);
        Ok(running)
    }

    async fn sockets(
        &self,
        enrolled: &Enrolled,
        netns: Option<Arc<NetnsFd>>,
        inherited: Option<Sockets>,
    ) -> Result<Sockets, String> {
        if let Some(inherited) = inherited {
            return Ok(inherited);
        }
        let (shared, enrolled, predecessor) = (Arc::clone(&self.shared), enrolled.clone(), self.predecessor.clone());
        let bind = move || match Sockets::bind(&enrolled, netns.as_deref(), &shared.settings) {
            // The agent before this one enrolled the pod after its pods were handed on, or what was had of it went with a start that failed.
            Err(taken) if taken.kind() == io::ErrorKind::AddrInUse => {
                let inherited = predecessor.and_then(|agent| agent.sockets_of(&enrolled.key)).map(Ok);
                let bound = inherited.or_else(|| elsewhere(&enrolled, netns.as_deref(), &shared.settings));
                bound.unwrap_or(Err(taken))
            }
            bound => bound,
        };
        tokio::task::spawn_blocking(bind).await.map_err(io::Error::other).flatten().map_err(|e| format!("listeners: {e}"))
    }

    /// The programs, where they redirect.
    async fn redirect(
        &self,
        key: &WorkloadUid,
        netns: Option<&Arc<NetnsFd>>,
        sockets: &Sockets,
    ) -> Result<Option<Redirect>, String> {
        match (self.shared.settings.redirect, netns) {
            (RedirectMode::Ebpf, Some(netns)) if !self.by_cni => {
                let config = programs(&self.shared.settings, false);
                attach(Arc::clone(netns), sockets, self.pins.clone(), config, &self.owner(key)).await.map(Some)
            }
            _ => Ok(None),
        }
    }

    /// Rules for what the programs do not do: DNS, or everything.
    async fn rules(&self, netns: Option<&Arc<NetnsFd>>, pod: &str, ports: Ports) -> Result<Option<Rules>, String> {
        let (Some(netns), false) = (netns, self.by_cni) else { return Ok(None) };
        let mut table = table_of(&self.shared.settings);
        table.tcp = self.shared.settings.redirect == RedirectMode::Nftables;
        table.dns = self.shared.settings.dns_capture;
        table.ports = ports;
        table.refuse_udp = self.shared.settings.udp == Udp::Refuse;
        if !table.tcp && (!table.dns || self.pins.is_none()) {
            return Ok(None);
        }
        match load(table.clone(), Arc::clone(netns)).await {
            Ok(rules) => Ok(Some(rules)),
            Err(error) if table.tcp => Err(format!("redirection: {error}")),
            // It asks its own name servers then, which is no reason not to serve it.
            Err(error) => {
                tracing::warn!(pod, %error, "the pod's DNS over UDP is not captured");
                Ok(None)
            }
        }
    }
}

/// At other ports, where programs of the pod have ours.
fn elsewhere(enrolled: &Enrolled, netns: Option<&NetnsFd>, settings: &Settings) -> Option<io::Result<Sockets>> {
    let bound = Sockets::bind_elsewhere(enrolled, netns, settings)?;
    if let Ok(ports) = bound.as_ref().map_err(|_| ()).and_then(|sockets| sockets.ports().map_err(|_| ())) {
        tracing::warn!(pod = enrolled.label(), ?ports, "programs of the pod have ports of the agent's, which listens at others");
    }
    Some(bound)
}

/// The rules of this agent.
pub(super) fn table_of(settings: &Settings) -> Table {
    Table::of(&settings.pins.of_node(&settings.node))
}

async fn report_end(what: &'static str, pod: String, run: impl Future<Output = io::Result<()>>) {
    if let Err(error) = run.await {
        tracing::error!(%error, pod, what, "listener failed");
    }
}

/// Tells of every change among the interfaces of a pod.
async fn watch_links(netns: Arc<NetnsFd>, uid: WorkloadUid, changed: mpsc::Sender<WorkloadUid>) {
    let opened = ebpf_loader::watch_links(netns.as_fd()).map_err(io::Error::other).and_then(Doorbell::new);
    let doorbell = match opened {
        Ok(doorbell) => doorbell,
        Err(error) => return tracing::warn!(pod = %uid, %error, "interfaces the pod is given from now on are not captured"),
    };
    // Once at first: for what came between the attachment and the watch.
    while changed.send(Arc::clone(&uid)).await.is_ok() && doorbell.rung().await.is_ok() {}
}

/// What the programs of a pod do whose DNS over UDP is captured, or not.
pub(super) fn programs(settings: &Settings, dns_captured: bool) -> Config {
    Config::default()
        .with_reset_existing(settings.older_connections == OlderConnections::Reset)
        .with_refuse_udp(settings.udp == Udp::Refuse)
        .with_capture_dns(dns_captured)
}

/// Loading and attaching takes milliseconds of system calls: not on the control thread.
pub(super) async fn attach(
    netns: Arc<NetnsFd>,
    sockets: &Sockets,
    pins: Option<PinRoot>,
    config: Config,
    owner: &Owner,
) -> Result<Redirect, String> {
    let Sockets { outbound, plain, hbone, .. } = sockets.try_clone().map_err(|e| format!("redirection: {e}"))?;
    let owner = owner.clone();
    tokio::task::spawn_blocking(move || {
        let spec = PodSpec {
            netns: netns.as_fd(),
            interfaces: None,
            config,
            pins: pins.as_ref(),
            owner: ebpf_loader::Owner { kind: owner.kind, name: &owner.name },
        };
        let listeners = Listeners { outbound: outbound.as_fd(), inbound: plain.as_fd(), hbone: hbone.as_fd() };
        Redirect::attach(&spec, &listeners)
    })
    .await
    .map_err(|e| format!("redirection: {e}"))?
    .map_err(|e| format!("redirection: {e}"))
}

/// Puts the rules into a pod; what they need first.
async fn load(table: Table, netns: Arc<NetnsFd>) -> io::Result<Rules> {
    let load = move || {
        let routes = table.tcp.then(|| CaptureRoutes::install(netns.as_fd())).transpose().map_err(io::Error::other)?;
        table.load(&netns)?;
        Ok(Rules { table, routes })
    };
    tokio::task::spawn_blocking(load).await.map_err(io::Error::other).flatten()
}
