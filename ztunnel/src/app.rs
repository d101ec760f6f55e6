//! The whole agent: builds every part, in the order in which they need each other, and ends them in reverse.
//!
//! Owns the wiring, nothing else. The control thread is the caller's: sources, certificates, admin and the pod supervisor
//! run on it; connections run on the data threads.
use crate::cni::desk::Desk;
use crate::cni::files::Files;
use crate::cni::{self, Entry};
use crate::control;
use crate::dialer::MARK;
use crate::dump;
use crate::enrolment::ByKubernetes;
use crate::environment;
use crate::gateways::FailedGateways;
use crate::handover::{self, Ask, Predecessor};
use crate::metrics::Metrics;
use crate::nft::Table;
use crate::node::Node;
use crate::own::{self, Own};
use crate::pod::Shared;
use crate::pods::{PodSupervisor, PodTable, Take};
use crate::settings::{OnAgentDeath, RedirectMode, Settings, Udp};
use crate::spans::Tracing;
use crate::zds;
use anyhow::{Context, Result, ensure};
use ebpf_loader::PinRoot;
use http::Method;
use mesh_identity::cache::CacheSettings;
use mesh_identity::clock::SystemClock;
use mesh_identity::{IdentitySource, SvidCache, TlsContext};
use mesh_identity::{crl_file, federation};
use mesh_model::explain;
use mesh_model::snapshot::{MissingWaypoint, Viewpoint};
use mesh_model::workload::Locality;
use mesh_model::{Network, TrustDomain};
use mesh_runtime::admin::{HttpServer, json};
use mesh_runtime::allocator;
use mesh_runtime::drain::{self, Drain, DrainMode, Finished};
use mesh_runtime::gate::Gate;
use mesh_runtime::logging::Logging;
use mesh_runtime::memory::Budget;
use mesh_runtime::metrics::Registry;
use mesh_runtime::process;
use mesh_runtime::readiness::Readiness;
use mesh_runtime::resolve::Resolver;
use mesh_runtime::signals;
use mesh_runtime::sockets::{probe_rights, raise_nofile};
use mesh_runtime::threads::DataThreads;
use mesh_sources::kubernetes::{DaemonSet, Lookup};
use mesh_sources::{Diagnostics, Mesh, translate};
use parking_lot::Mutex;
use std::collections::HashSet;
use std::convert::Infallible;
use std::io;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use tokio::runtime::Handle;
use tokio::sync::{Notify, mpsc, oneshot, watch};

/// How long data threads may take to drop what is left after the drain.
const STOP_LIMIT: Duration = Duration::from_secs(2);
/// Connections that must have gone from a data thread before its free memory is worth returning.
const WORTH_RETURNING: usize = 500;
/// How long an agent that ends may ask whether it is uninstalled: API servers believe a token that was taken back for ten seconds.
const ASK_WHETHER_UNINSTALLED: Duration = Duration::from_secs(12);
/// How often the agent before this one is asked whom it serves that is not served here.
const ASK_AGAIN: Duration = Duration::from_millis(500);
/// Series of metrics nobody used for this long are dropped.
const SERIES_UNUSED: Duration = Duration::from_mins(10);

/// Version information as JSON.
pub fn version() -> serde_json::Value {
    dump::version()
}

/// Removes the rules of the agent that kept its redirections in `pins` from every pod. Without `nft` there are none.
pub fn remove_rules(pins: &Path, proc_dir: &Path) {
    if let Err(error) = Table::of(pins).sweep(proc_dir, &HashSet::new()) {
        eprintln!("ztunnel: rules of nftables, if there are any, remain: {error}");
    }
}

/// Runs the agent until SIGTERM, SIGINT or `/quitquitquit`.
pub fn run(settings: Settings) -> Result<()> {
    process::run("ztunnel", async |logging| {
        environment::check(mesh_runtime::settings::variables())?;
        serve(settings.spelled_out(), logging).await
    })
}

/// The agent on the current (control) runtime.
pub async fn serve(mut settings: Settings, logging: &Logging) -> Result<()> {
    if let Err(error) = allocator::refuse_huge_pages() {
        tracing::debug!(%error, "transparent huge pages stay on");
    }
    let open_files = raise_nofile().context("raising the limit of open files")?;
    let (redirect, pins) = preflight(&settings)?;
    settings.redirect = redirect;
    let handover = handover::path(settings.run_dir(), &settings.node);
    // Two agents can serve a pod at once only if its redirection is neither's own.
    let kept = pins.is_some() || settings.zds.is_some() || redirect == RedirectMode::Nftables;
    let found = if kept { Predecessor::find(&handover)? } else { None };
    let (predecessor, inherited) = found.map_or_else(Default::default, |(agent, pods)| (Some(Arc::new(agent)), pods));
    let stop = signals::shutdown().context("installing signal handlers")?;
    let readiness = Readiness::new();
    let registry = Registry::new();
    registry.process()?;
    registry.build_info("ztunnel", env!("CARGO_PKG_VERSION"))?;

    // Who we believe and where we stand.
    let view = viewpoint(&settings)?;
    let origin = control::origin(&settings, &registry)?;
    let source = control::authority(&settings, &view, &origin)?;

    // What the mesh is.
    let first_snapshot = readiness.pending("mesh configuration");
    let (mesh, diagnostics) = mesh_sources::start(origin, view.clone());

    let shared = assemble(&settings, mesh.clone(), source, &registry, logging)?;
    let workers = shared.threads.workers().len();

    // Faces: addresses are bound before anything is promised.
    let quit = Arc::new(Notify::new());
    let pods = PodTable::default();
    pods.expose(&registry)?;
    shared.svids.expose(&registry)?;
    shared.threads.expose(&registry)?;
    let (drain, drained) = drain::channel();
    let (faces, _) = drain::channel();
    let servers = [
        (settings.face(settings.readiness_addr), readiness.route(HttpServer::new("readiness"))),
        (settings.face(settings.stats_addr), registry.route(HttpServer::new("stats"))),
        (settings.face(settings.admin_addr), admin(&shared, &pods, &diagnostics, logging, &quit)),
    ];
    let mut later = Vec::new();
    for (addr, server) in servers {
        match process::listen(&server, addr, &faces) {
            Ok(()) => {}
            // In one network namespace with this one, the agent before us gives its addresses up when it is released.
            Err(e) if e.kind() == io::ErrorKind::AddrInUse && predecessor.is_some() => later.push((addr, server)),
            Err(e) => return Err(e).with_context(|| format!("cannot listen on {addr}")),
        }
    }
    tracing::info!(
        version = env!("CARGO_PKG_VERSION"),
        node = settings.node,
        workers,
        open_files,
        admin = %settings.admin_addr,
        stats = %settings.stats_addr,
        readiness = %settings.readiness_addr,
        "agent starting"
    );

    // Nothing is captured before the first snapshot is in (node-agent §1.1).
    let enrols = settings.is_enrolled_by_kubernetes().then(|| (view, control::access(&settings), settings.proc_dir.clone()));
    let (asks, successor) = mpsc::channel(1);
    let (alone, is_alone) = watch::channel(predecessor.is_none());
    let plugin = plugin_files(&settings);
    let ours = plugin.as_ref().and_then(|_| daemon_set(&settings));
    let mut supervisor = PodSupervisor::new(Arc::clone(&shared), readiness.clone(), pods, pins, inherited);
    if let Some(predecessor) = &predecessor {
        supervisor = supervisor.after(Arc::clone(predecessor), is_alone.clone());
    }
    let (takes, taking) = mpsc::channel(1);
    let supervisor = supervisor.taking(taking);
    let mut looked = supervisor.looked();
    let control = tokio::spawn({
        let (mesh, readiness, zds) = (mesh.clone(), readiness.clone(), settings.zds.clone());
        let (settings, plugin) = (settings.clone(), plugin.clone());
        async move {
            let never = drained.clone();
            tokio::select! {
                () = mesh.synced() => {}
                _ = never.draining() => return,
            }
            let supervisor = match zds.map(|socket| zds::follow(&socket, &readiness)).transpose() {
                Ok(Some(orders)) => supervisor.by_cni(orders),
                Ok(None) => supervisor,
                // Never ready, and the pods stay as they are.
                Err(error) => return tracing::error!(%error, "the CNI agent cannot be followed"),
            };
            let supervisor = match enrols {
                Some((view, access, proc_dir)) => {
                    let asked_to_end = drained.clone();
                    let lookup = match Lookup::new(&access, view.clone()) {
                        Ok(lookup) => lookup,
                        Err(error) => return tracing::error!(%error, "the pods of this node cannot be asked about"),
                    };
                    let pods = tokio::select! {
                        pods = ByKubernetes::follow(&access, view, proc_dir) => pods,
                        _ = asked_to_end.draining() => return,
                    };
                    match pods {
                        Ok(pods) => supervisor.by_kubernetes(hold_back(pods, lookup, &settings, plugin, is_alone)),
                        Err(error) => return tracing::error!(%error, "the pods of this node cannot be followed"),
                    }
                }
                None => supervisor,
            };
            supervisor.run(drained, first_snapshot, successor).await;
        }
    });
    if let Some(own) = Own::of_environment(mesh_runtime::settings::variables()) {
        tokio::spawn(own::serve(own, Arc::clone(&shared), faces.watch(), drain.watch()));
    }
    let upkeep = tokio::spawn(upkeep(registry, Arc::clone(&shared), diagnostics));

    let succession = async {
        if let Some(predecessor) = predecessor {
            tokio::select! {
                () = all_taken(&predecessor, &readiness, takes) => {}
                () = predecessor.gone() => {}
            }
            succeed(predecessor, later, &faces).await?;
            alone.send_replace(true);
        }
        // Ready or not: what is served here the next agent can have.
        if kept && looked.wait_for(|looked| *looked).await.is_ok() {
            be_succeeded(&handover, asks, &faces).await;
        }
        Ok(std::future::pending::<Infallible>().await)
    };
    tokio::select! {
        signal = stop => tracing::info!(?signal, "shutting down"),
        () = quit.notified() => tracing::info!("shutting down: /quitquitquit"),
        Err(error) = succession => return Err(error),
    }
    let leaving = readiness.pending("shutting down");
    let plugin = tokio::spawn(take_along(plugin, ours));
    drain.start(DrainMode::Graceful { deadline: settings.deadline() });
    faces.start(DrainMode::Graceful { deadline: settings.deadline() });
    if let Err(error) = control.await
        && !error.is_cancelled()
    {
        tracing::error!(%error, "the pod supervisor failed");
    }
    if let Finished::Abandoned(left) = drain.finished().await {
        tracing::warn!(left, "servers closed at the deadline");
    }
    upkeep.abort();
    let _ = plugin.await;
    if let Some(tracing) = &shared.tracing {
        tracing.close(STOP_LIMIT).await;
    }
    if !shared.threads.stop(STOP_LIMIT).await {
        tracing::warn!("a data thread did not stop in time");
    }
    drop(leaving);
    tracing::info!("agent stopped");
    Ok(())
}

/// Resolves when every pod that the agent before this one serves is served here too. One that neither can serve does not matter.
async fn all_taken(predecessor: &Arc<Predecessor>, readiness: &Readiness, takes: mpsc::Sender<Take>) {
    loop {
        readiness.ready_otherwise().await;
        let agent = Arc::clone(predecessor);
        match tokio::task::spawn_blocking(move || agent.pods()).await {
            Ok(Ok(Some(pods))) => {
                let (reply, served) = oneshot::channel();
                if takes.send(Take { pods, reply }).await.is_ok() && served.await.unwrap_or(false) {
                    return;
                }
            }
            // Of that somebody else tells.
            Ok(Ok(None)) | Err(_) => {}
            Ok(Err(error)) => {
                tracing::debug!(error = format!("{error:#}"), "the agent before this one does not say whom it serves");
            }
        }
        tokio::time::sleep(ASK_AGAIN).await;
    }
}

/// Takes over from the agent before this one, now that every pod is served here too.
async fn succeed(predecessor: Arc<Predecessor>, faces: Vec<(SocketAddr, HttpServer)>, drain: &Drain) -> Result<()> {
    if let Err(error) = tokio::task::spawn_blocking(move || predecessor.release()).await? {
        tracing::warn!(error = format!("{error:#}"), "the agent before this one ended early");
    }
    for (addr, server) in faces {
        let mut tries = 0;
        while let Err(error) = process::listen(&server, addr, drain) {
            tries += 1;
            if tries == 100 {
                return Err(error).with_context(|| format!("cannot listen on {addr}"));
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }
    tracing::info!("took over from the agent before this one");
    Ok(())
}

/// The CNI plugin on the node, if it is wanted.
fn plugin_files(settings: &Settings) -> Option<Arc<Files>> {
    let (conf_dir, bin_dir) = (settings.cni.cni_conf_dir.clone()?, settings.cni.cni_bin_dir.clone()?);
    let mut exclude_namespaces = translate::Settings::default().excluded_namespaces;
    exclude_namespaces.push(settings.root_namespace.clone());
    let entry = Entry {
        r#type: cni::PLUGIN.to_owned(),
        socket: cni::path(settings.run_dir(), &settings.node),
        unreachable: settings.cni.cni_unreachable,
        exclude_namespaces,
    };
    Some(Arc::new(Files { conf_dir, bin_dir, entry, removed: Mutex::default() }))
}

/// The DaemonSet this agent is of, watched from now on: its end is mostly that of the right to ask about it.
fn daemon_set(settings: &Settings) -> Option<DaemonSet> {
    let (namespace, name) = settings.cni.cni_daemon_set.as_ref()?;
    match DaemonSet::new(&control::access(settings), namespace, name) {
        Ok(ours) => {
            let watched = ours.clone();
            tokio::spawn(async move { watched.follow().await });
            Some(ours)
        }
        Err(error) => {
            tracing::error!(%error, "the CNI plugin will stay when this is uninstalled: the DaemonSet cannot be asked about");
            None
        }
    }
}

/// Removes the CNI plugin where this agent is uninstalled rather than replaced: no agent would answer it.
async fn take_along(plugin: Option<Arc<Files>>, ours: Option<DaemonSet>) {
    let (Some(plugin), Some(ours)) = (plugin, ours) else { return };
    match ours.is_uninstalled(ASK_WHETHER_UNINSTALLED).await {
        Ok(false) => tracing::info!("the CNI plugin stays, for the next agent"),
        Ok(true) => match plugin.remove() {
            Ok(_) => tracing::info!("uninstalled: the CNI plugin is removed"),
            Err(error) => tracing::error!(%error, "uninstalled, and the CNI plugin remains: no pod that is enrolled starts here"),
        },
        Err(why) => {
            tracing::error!(why, "the CNI plugin stays: it is not known whether the agent is uninstalled (`ztunnel cleanup`)");
        }
    }
}

/// Lets pods of this node start only when they are captured, if that is wanted; from when no agent before this one does it.
fn hold_back(
    pods: ByKubernetes,
    lookup: Lookup,
    settings: &Settings,
    plugin: Option<Arc<Files>>,
    mut alone: watch::Receiver<bool>,
) -> ByKubernetes {
    let Some(files) = plugin else { return pods };
    let (arrivals, told) = mpsc::channel(16);
    let desk = Desk { pods: pods.pods(), arrivals: arrivals.clone(), lookup, runtime: Handle::current() };
    let socket = cni::path(settings.run_dir(), &settings.node);
    tokio::spawn(async move {
        if alone.wait_for(|alone| *alone).await.is_err() {
            return;
        }
        // Until the pods are the next agent's.
        let keep = || files.keep(move || !arrivals.is_closed()).context("no thread");
        if let Err(error) = desk.open(&socket).and_then(|()| keep()) {
            tracing::error!(error = format!("{error:#}"), socket = %socket.display(), "pods that start are not captured before they do");
        }
    });
    pods.expecting(told)
}

/// Waits for the agent after this one, and leaves it the addresses for operators.
async fn be_succeeded(path: &Path, asks: mpsc::Sender<Ask>, faces: &Drain) {
    let (released, taken) = oneshot::channel();
    if let Err(error) = handover::serve(path, asks, released) {
        let error = format!("{error:#}");
        tracing::warn!(error, path = %path.display(), "no later agent can take over: between the two, new connections will be dropped");
        return;
    }
    if taken.await.is_ok() {
        faces.start(DrainMode::Immediate);
    }
}

/// What all pods share, made from its parts. Starts the data threads and the certificate cache.
pub fn assemble(
    settings: &Settings,
    mesh: Mesh,
    source: Arc<dyn IdentitySource>,
    registry: &Registry,
    logging: &Logging,
) -> Result<Arc<Shared>> {
    let workers = settings.workers.count()?;
    let control = tokio::runtime::Handle::current();
    let source = match settings.crl_file() {
        Some(file) => crl_file::over(source, file, &control),
        None => source,
    };
    // Over the lists: bundle endpoints are looked up in them too.
    let source = match settings.federation() {
        Some(others) => federation::over(source, others, &control, registry)?,
        None => source,
    };
    let tls = TlsContext::new(&settings.compliance.into(), source.as_ref(), Arc::new(SystemClock))?;
    let budget = Budget::new(settings.window_budget);
    let threads = DataThreads::start(workers).context("starting data threads")?;
    Ok(Arc::new(Shared {
        gate: Gate::new(settings.max_handshakes),
        hbone: Arc::new(hbone_settings(settings, &budget)),
        node: Node::of(settings),
        resolver: Resolver::default(),
        gateways: FailedGateways::default(),
        access: logging.access.clone(),
        settings: settings.clone(),
        mesh,
        tracing: Tracing::start(settings, threads.pick(None), registry)?,
        threads,
        svids: SvidCache::start(source, tls, &CacheSettings::default(), &control),
        metrics: Metrics::new(registry)?,
        budget,
    }))
}

/// What can be known to fail, said before anything starts. Answers how pods are redirected, and where that is kept.
fn preflight(settings: &Settings) -> Result<(RedirectMode, Option<PinRoot>)> {
    let nameless = settings.is_enrolled_by_kubernetes() && settings.node.is_empty();
    ensure!(!nameless, "which node's pods are to be enrolled? set --node (NODE_NAME)");
    ensure!(
        settings.cni.cni_conf_dir.is_none() || settings.is_enrolled_by_kubernetes(),
        "--cni-conf-dir: only pods that Kubernetes enrols can be held back by our CNI plugin"
    );
    ensure!(
        settings.udp == Udp::Allow || (settings.zds.is_none() && settings.redirect != RedirectMode::None),
        "--udp=refuse: whoever redirects the pods decides about UDP, and that is not this agent"
    );
    if settings.zds.is_some() {
        probe_rights(MARK).context("pods of the CNI agent cannot be served")?;
        return Ok((RedirectMode::None, None));
    }
    let kept = settings.pins.of_node(&settings.node);
    let rules = || Table::of(&kept).probe().context("this machine cannot redirect connections with nftables");
    let programs = || ebpf_loader::probe().context("this machine cannot redirect connections with eBPF");
    let redirect = redirection(settings.redirect, programs, rules)?;
    let open = settings.on_agent_death == OnAgentDeath::Open;
    if redirect == RedirectMode::Nftables {
        ensure!(!open, "--on-agent-death=open: rules of nftables do not end with the agent");
        probe_rights(MARK).context("pods cannot be served")?;
    }
    if open && redirect == RedirectMode::Ebpf {
        tracing::warn!("--on-agent-death=open: whenever this agent does not run, its pods talk in plaintext");
    }
    if redirect == RedirectMode::Ebpf && !open {
        let pins = PinRoot::open(&kept).context(
            "redirections cannot outlive the agent (mount a BPF filesystem there, name another place with --bpf-dir, or accept with \
             --on-agent-death=open that pods talk in plaintext while no agent runs)",
        )?;
        return Ok((redirect, Some(pins)));
    }
    if redirect != RedirectMode::None && kept.exists() {
        // By an agent with other settings; its programs would go on dropping.
        PinRoot::open(&kept)?.sweep([])?;
    }
    Ok((redirect, None))
}

/// How pods are redirected, as `asked`, by what this machine allows.
fn redirection(
    asked: RedirectMode,
    programs: impl FnOnce() -> Result<()>,
    rules: impl FnOnce() -> Result<()>,
) -> Result<RedirectMode> {
    match asked {
        RedirectMode::None => {}
        RedirectMode::Ebpf => programs()?,
        RedirectMode::Nftables => rules()?,
        RedirectMode::Auto => {
            let Err(why) = programs() else { return Ok(RedirectMode::Ebpf) };
            rules().with_context(|| format!("{why:#}; and"))?;
            tracing::warn!(why = format!("{why:#}"), "pods are redirected with nftables (TPROXY) instead of eBPF");
            return Ok(RedirectMode::Nftables);
        }
    }
    Ok(asked)
}

fn viewpoint(s: &Settings) -> Result<Viewpoint> {
    if s.on_missing_waypoint == MissingWaypoint::Direct {
        tracing::warn!("--on-missing-waypoint=direct: what declares a missing waypoint is reached without it and its policies");
    }
    let domain = |d: &String| TrustDomain::parse(d).with_context(|| format!("trust domain {d:?}"));
    Ok(Viewpoint {
        network: Network::from(s.network.as_str()),
        cluster: s.cluster_id.as_str().into(),
        node: s.node.as_str().into(),
        locality: Locality::default(),
        cluster_domain: s.cluster_domain.as_str().into(),
        root_namespace: s.root_namespace.as_str().into(),
        trust_domain: domain(&s.trust_domain)?,
        trust_domain_aliases: s.trust_domain_aliases.iter().map(domain).collect::<Result<_>>()?,
        missing_waypoint: s.on_missing_waypoint,
        preferred_namespace: s.preferred_namespace.as_str().into(),
    })
}

fn hbone_settings(s: &Settings, budget: &Budget) -> mesh_hbone::Settings {
    mesh_hbone::Settings {
        max_stream_window: s.stream_window,
        connection_window: s.connection_window,
        frame_size: s.frame_size,
        client_max_streams: s.pool_max_streams,
        handshake_timeout: s.handshake_timeout,
        connect_timeout: s.handshake_timeout,
        unused_release: s.pool_unused_release,
        budget: Some(budget.clone()),
        ..mesh_hbone::Settings::default()
    }
    .clamped()
}

fn admin(shared: &Arc<Shared>, pods: &PodTable, diagnostics: &Diagnostics, logging: &Logging, quit: &Arc<Notify>) -> HttpServer {
    let dump = {
        let (shared, pods, diagnostics) = (Arc::clone(shared), pods.clone(), diagnostics.clone());
        move |_| json(&dump::config_dump(&shared, &pods, &diagnostics))
    };
    let mesh = shared.mesh.clone();
    // What waypoints do is not translated here.
    let why = move |q| explain::why(&mesh.load_full(), &q, &explain::Settings { layer7: false, ..explain::Settings::default() });
    let server = HttpServer::new("admin").route_blocking(Method::GET, "/config_dump", dump).route_question("/why", why);
    process::admin_routes(server, dump::version(), logging, Arc::clone(quit))
}

/// Slow periodic work of the control thread.
async fn upkeep(registry: Registry, shared: Arc<Shared>, diagnostics: Diagnostics) {
    let workers = shared.threads.workers();
    let mut peaks = vec![0; workers.len()];
    let mut tick = tokio::time::interval(Duration::from_secs(2));
    let mut beats = 0u32;
    loop {
        tick.tick().await;
        shared.metrics.config_problems.set(diagnostics.list().len() as i64);
        allocator::return_free_pages();
        for (worker, peak) in workers.iter().zip(&mut peaks) {
            let live = worker.live();
            if *peak > WORTH_RETURNING && live < *peak / 2 {
                // Each thread has a heap of its own; this one has just become mostly empty.
                worker.spawn(async { allocator::return_free_pages() });
                *peak = live;
            }
            *peak = live.max(*peak);
        }
        beats = beats.wrapping_add(1);
        if beats.is_multiple_of(150) {
            registry.sweep(SERIES_UNUSED);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_redirection_is_what_was_asked_or_what_can_be_had() {
        let outcome = |can: bool| move || if can { Ok(()) } else { Err(anyhow::anyhow!("cannot")) };
        let choose = |asked, ebpf, nft| redirection(asked, outcome(ebpf), outcome(nft)).ok();
        assert_eq!(choose(RedirectMode::Auto, true, true), Some(RedirectMode::Ebpf));
        assert_eq!(choose(RedirectMode::Auto, false, true), Some(RedirectMode::Nftables));
        assert_eq!(choose(RedirectMode::Auto, false, false), None);
        assert_eq!(choose(RedirectMode::Ebpf, false, true), None);
        assert_eq!(choose(RedirectMode::Nftables, true, true), Some(RedirectMode::Nftables));
        assert_eq!(choose(RedirectMode::Nftables, true, false), None);
        assert_eq!(choose(RedirectMode::None, false, false), Some(RedirectMode::None));
    }
}
