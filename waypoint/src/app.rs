//! The whole proxy: builds every part, in the order in which they need each other, and ends them in reverse.
//!
//! Owns the wiring, nothing else. The control thread is the caller's: sources, certificates and admin run on it;
//! connections run on the data threads.
use crate::conn::Shared;
use crate::control;
use crate::dump;
use crate::limits::Limits;
use crate::listen;
use crate::listen::gateway::Listeners;
use crate::me::Me;
use crate::phase::authenticate;
use crate::places::Places;
use crate::settings::Settings;
use crate::telemetry::{Telemetry, scrape};
use crate::token::source::Sources;
use crate::upstream::{Deps, Fetcher, Upstreams};
use ::http::{Method, StatusCode};
use anyhow::{Context, Result};
use mesh_identity::cache::CacheSettings;
use mesh_identity::clock::SystemClock;
use mesh_identity::live::LivePeers;
use mesh_identity::{IdentitySource, SvidCache, TlsContext, crl_file, federation};
use mesh_model::explain;
use mesh_model::inbound::is_instance;
use mesh_model::l7::gateway::GatewayKey;
use mesh_model::l7::policy::PolicyTarget;
use mesh_model::snapshot::Viewpoint;
use mesh_model::{Network, SpiffeId, TrustDomain};
use mesh_runtime::admin::{HttpServer, Request, Response, json, text};
use mesh_runtime::allocator;
use mesh_runtime::drain::{self, DrainMode, DrainWatch, Finished};
use mesh_runtime::gate::Gate;
use mesh_runtime::logging::{AccessLog, Logging};
use mesh_runtime::memory::Budget;
use mesh_runtime::metrics::{Registry, connect_times};
use mesh_runtime::process;
use mesh_runtime::readiness::{Readiness, ReadyTask};
use mesh_runtime::signals;
use mesh_runtime::sockets::{BoundListener, ListenerOptions, raise_nofile};
use mesh_runtime::threads::{DataThreads, cores, worker_count};
use mesh_sources::Diagnostics;
use mesh_spans::tags::Process;
use mesh_spans::{Spans, Way};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::Notify;

/// How long data threads may take to drop what is left after the drain.
const STOP_LIMIT: Duration = Duration::from_secs(2);
/// Series of metrics nobody used for this long are dropped.
const SERIES_UNUSED: Duration = Duration::from_mins(10);

/// Version information as JSON.
pub fn version() -> serde_json::Value {
    dump::version()
}

/// Runs the proxy until SIGTERM, SIGINT or `/quitquitquit`.
pub fn run(settings: Settings) -> Result<()> {
    let (levels, format) = (settings.log_levels.clone(), settings.log_format.clone());
    process::run_with(levels.as_deref(), format.as_deref(), "waypoint", async |logging| serve(settings, logging).await)
}

/// The proxy on the current (control) runtime.
pub async fn serve(settings: Settings, logging: &Logging) -> Result<()> {
    if let Err(error) = allocator::refuse_huge_pages() {
        tracing::debug!(%error, "transparent huge pages stay on");
    }
    let open_files = raise_nofile().context("raising the limit of open files")?;
    let stop = signals::shutdown().context("installing signal handlers")?;
    let readiness = Readiness::new();
    let registry = Registry::new();
    registry.process()?;
    registry.build_info("waypoint", env!("CARGO_PKG_VERSION"))?;
    let view = viewpoint(&settings)?;
    let source = control::authority(&settings, &view)?;
    let first_snapshot = readiness.pending("mesh configuration");
    let first_certificate = readiness.pending("certificate");
    let translation = mesh_sources::translate::Settings { layer7: true, ..mesh_sources::translate::Settings::default() };
    let (mesh, diagnostics) = mesh_sources::start_with(control::origin(&settings, &registry)?, view.clone(), &translation);

    let access = settings.access_log.then(|| logging.access.clone());
    let identity = SpiffeId::new(&view.trust_domain, &settings.namespace, &settings.service_account)
        .context("namespace and service account make no SPIFFE identity")?;
    let shared = assemble(settings, mesh, &view, source, &registry, access, identity)?;
    let settings = &shared.settings;
    register_state(&registry, &shared, &diagnostics, logging)?;

    let quit = Arc::new(Notify::new());
    let (drain, drained) = drain::channel();
    let servers = [
        (settings.readiness_addr, readiness.route(HttpServer::new("readiness"))),
        (settings.stats_addr, registry.route(HttpServer::new("stats"))),
        (settings.envoy_stats_addr, registry.route(HttpServer::new("envoy stats"))),
        (settings.admin_addr, admin(&shared, &diagnostics, &registry, logging, &quit)),
    ];
    for (addr, server) in servers {
        process::listen(&server, addr, &drain).with_context(|| format!("cannot listen on {addr}"))?;
    }
    let hbone =
        ListenerOptions::new(settings.hbone_addr).bind().with_context(|| format!("cannot listen on {}", settings.hbone_addr))?;
    tracing::info!(
        version = env!("CARGO_PKG_VERSION"),
        identity = %shared.identity,
        workers = shared.threads.workers().len(),
        open_files,
        hbone = %settings.hbone_addr,
        admin = %settings.admin_addr,
        stats = %settings.stats_addr,
        readiness = %settings.readiness_addr,
        "waypoint starting"
    );
    for note in &settings.notes {
        tracing::info!("without effect here: {note}");
    }
    // Nothing is accepted before it can be decided.
    let control = tokio::spawn(control(Arc::clone(&shared), hbone, drained, [first_snapshot, first_certificate]));
    let upkeep = tokio::spawn(upkeep(registry, Arc::clone(&shared)));

    tokio::select! {
        signal = stop => tracing::info!(?signal, "shutting down"),
        () = quit.notified() => tracing::info!("shutting down: /quitquitquit"),
    }
    let leaving = readiness.pending("shutting down");
    drain.start(DrainMode::Graceful { deadline: settings.termination_deadline });
    if let Finished::Abandoned(left) = drain.finished().await {
        tracing::warn!(left, "connections closed at the deadline");
    }
    control.abort();
    upkeep.abort();
    if let Some(spans) = shared.telemetry.spans() {
        spans.close(STOP_LIMIT).await;
    }
    if !shared.threads.stop(STOP_LIMIT).await {
        tracing::warn!("a data thread did not stop in time");
    }
    drop(leaving);
    tracing::info!("waypoint stopped");
    Ok(())
}

/// Opens the doors once there is something to decide by, then follows changes of mesh and trust.
async fn control(shared: Arc<Shared>, hbone: BoundListener, drain: DrainWatch, pending: [ReadyTask; 2]) {
    shared.mesh.synced().await;
    if let Err(error) = shared.svid.fetch().await {
        // Tried again by the cache; tunnels wait for it.
        tracing::error!(%error, "no certificate yet");
    }
    let mut versions = shared.mesh.watch();
    shared.upstreams.collect(&shared.mesh.load_full());
    let serve = |shared, tcp, peer, drain| listen::serve_hbone(shared, tcp, peer, drain);
    if let Err(error) = listen::accept_all(&shared, &hbone, &drain, serve) {
        tracing::error!(%error, "cannot accept tunnels");
        return;
    }
    for task in &pending {
        task.ready();
    }
    let tell_own = || shared.telemetry.set_own(shared.me(&shared.mesh.load()).ok());
    tell_own();
    follow_issuers(&shared);
    follow_collectors(&shared);
    let mut listeners = Listeners::default();
    listeners.reconcile(&shared, &drain);
    // Certificate files are renewed in place, and a port that was taken may have become free.
    let mut tick = tokio::time::interval(Duration::from_secs(5));
    let mut bundles = shared.tls.bundles();
    loop {
        tokio::select! {
            changed = versions.changed() => {
                if changed.is_err() {
                    return;
                }
                versions.mark_unchanged();
                tell_own();
                shared.places.collect(&shared.mesh.load());
                shared.upstreams.collect(&shared.mesh.load_full());
                follow_issuers(&shared);
                follow_collectors(&shared);
                listeners.reconcile(&shared, &drain);
            }
            _ = tick.tick() => listeners.reconcile(&shared, &drain),
            changed = bundles.changed() => {
                if changed.is_err() {
                    return;
                }
                let now = Arc::clone(&bundles.borrow_and_update());
                let lost = shared.tunnels.rejudge(&now) + shared.upstreams.rejudge(&now);
                if lost > 0 {
                    tracing::warn!(lost, "tunnels closed: their certificates are no longer trusted");
                }
            }
            _ = drain.draining() => return listeners.drain(shared.settings.termination_deadline),
        }
    }
}

/// Keeps the keys this process may need, so that the first token does not wait for them, and forgets the others.
fn follow_issuers(shared: &Shared) {
    let snap = shared.mesh.load_full();
    let me = shared.me(&snap).ok();
    let is_ours = |target: &PolicyTarget| match target {
        PolicyTarget::Gateway(key) => *key == shared.gateway,
        PolicyTarget::Service(key) => me
            .zip(snap.find_service(key))
            .is_some_and(|(me, service)| service.waypoints.iter().any(|w| is_instance(&snap, me, &w.waypoint))),
        PolicyTarget::GatewaysOf(ns) | PolicyTarget::Namespace(ns) => *ns == shared.gateway.namespace,
        PolicyTarget::Waypoints | PolicyTarget::Gateways | PolicyTarget::Mesh => true,
    };
    let needed = snap.request_auths().filter(|(target, _)| is_ours(target)).flat_map(|(_, auths)| auths.rules());
    let mentioned = snap.request_auths().flat_map(|(_, auths)| auths.rules()).map(|rule| &rule.keys).collect();
    shared.tokens.collect(needed.map(|rule| &rule.keys), &mentioned);
}

/// Forgets the collectors of spans nobody mentions any more.
fn follow_collectors(shared: &Shared) {
    if let Some(spans) = shared.telemetry.spans() {
        spans.collect(&shared.mesh.load_full().telemetry().collectors().collect());
    }
}

fn assemble(
    settings: Settings,
    mesh: mesh_sources::Mesh,
    view: &Viewpoint,
    source: Arc<dyn IdentitySource>,
    registry: &Registry,
    access: Option<AccessLog>,
    identity: SpiffeId,
) -> Result<Arc<Shared>> {
    let workers = worker_count(settings.worker_threads.as_deref().or(Some("0")), cores())?;
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
    if settings.gateway.is_empty() {
        // Policies bound to the Gateway would bind nobody.
        anyhow::bail!("which Gateway is this process for? set --gateway (GATEWAY) to the name of the Gateway object");
    }
    let svids = SvidCache::start(source, tls.clone(), &CacheSettings::default(), &control);
    let svid = svids.handle(&identity);
    let hbone = Arc::new(
        mesh_hbone::Settings {
            server_max_streams: settings.max_streams,
            client_max_streams: settings.pool_max_streams,
            handshake_timeout: settings.handshake_timeout,
            connect_timeout: settings.handshake_timeout,
            unused_release: settings.pool_unused_release,
            // A client that does not read is to cost 256 KiB at most: a window, this buffer, and those of HTTP. So windows do not
            // grow here: what a stream held when its client stopped reading would stay.
            stream_window: 32 << 10,
            max_stream_window: 32 << 10,
            send_buffer: 32 << 10,
            budget: Some(budget),
            ..mesh_hbone::Settings::default()
        }
        .clamped(),
    );
    let threads = DataThreads::start(workers).context("starting data threads")?;
    let me = Me {
        uid: (!settings.pod.is_empty()).then(|| format!("{}//Pod/{}/{}", view.cluster, settings.namespace, settings.pod).into()),
        ip: settings.instance_ip,
    };
    let upstreams = Upstreams::new(Deps {
        svid: svid.clone(),
        identity: identity.clone(),
        hbone: Arc::clone(&hbone),
        connect_timeout: settings.connect_timeout,
        handshake_timeout: settings.handshake_timeout,
        connects: registry.family(connect_times())?.pin(&["waypoint"]),
        threads: threads.workers().len(),
        me: me.clone(),
    });
    let gateway = GatewayKey::new(&settings.namespace, &settings.gateway);
    let fetcher = Fetcher::new(mesh.clone(), Arc::clone(&upstreams), threads.pick(None).clone(), gateway.clone());
    let fetcher = Arc::new(fetcher);
    let process = process_of(&settings);
    let spans = Spans::new(registry, Arc::clone(&fetcher) as Arc<dyn Way>, process.service_name(None))?;
    Ok(Arc::new(Shared {
        telemetry: Telemetry::new(registry, access, Some((spans, process)), identity.clone())?,
        tokens: Sources::new(fetcher, settings.jwks_refresh, control),
        gate: Gate::new(settings.max_handshakes),
        mesh,
        threads,
        svid,
        identity,
        me,
        places: Places::new(gateway.clone()),
        gateway,
        tls,
        hbone,
        upstreams,
        limits: Limits::default(),
        tunnels: LivePeers::default(),
        settings,
    }))
}

/// What spans say of this process.
fn process_of(s: &Settings) -> Process {
    let (ns, address) = (&s.namespace, s.instance_ip.map(|ip| ip.to_string()).unwrap_or_default());
    Process {
        node_id: format!("waypoint~{address}~{}.{ns}~{ns}.svc.{}", s.pod, s.cluster_domain),
        namespace: ns.clone(),
        service_account: s.service_account.clone(),
        cluster: s.cluster_id.clone(),
        mesh: s.trust_domain.clone(),
    }
}

fn viewpoint(s: &Settings) -> Result<Viewpoint> {
    let domain = |d: &String| TrustDomain::parse(d).with_context(|| format!("trust domain {d:?}"));
    Ok(Viewpoint {
        network: Network::from(s.network.as_str()),
        cluster: s.cluster_id.as_str().into(),
        node: s.node.as_str().into(),
        cluster_domain: s.cluster_domain.as_str().into(),
        root_namespace: s.root_namespace.as_str().into(),
        trust_domain: domain(&s.trust_domain)?,
        trust_domain_aliases: s.trust_domain_aliases.iter().map(domain).collect::<Result<_>>()?,
        ..Viewpoint::default()
    })
}

/// Metrics of what exists anyway, written when somebody asks.
fn register_state(registry: &Registry, shared: &Arc<Shared>, diagnostics: &Diagnostics, logging: &Logging) -> Result<()> {
    shared.svid.cache().expose(registry)?;
    let of_clusters = Arc::clone(shared);
    registry.on_scrape(&scrape::cluster_names(), move |out| scrape::clusters(&of_clusters.upstreams.clusters(), out))?;
    let (shared, diagnostics, writer) = (Arc::clone(shared), diagnostics.clone(), logging.writer.clone());
    registry.on_scrape(&scrape::PROCESS_NAMES, move |out| {
        let now = scrape::Process {
            version: shared.mesh.load().version(),
            problems: diagnostics.list().len(),
            tunnels: shared.tunnels.list().len(),
            lost_lines: writer.dropped(),
        };
        scrape::process(now, out);
    })?;
    Ok(())
}

fn admin(
    shared: &Arc<Shared>,
    diagnostics: &Diagnostics,
    registry: &Registry,
    logging: &Logging,
    quit: &Arc<Notify>,
) -> HttpServer {
    type Page = fn(&Shared, &Diagnostics, &Request) -> Response;
    let pages: [(&str, Page); 4] = [
        ("/config_dump", |shared, diagnostics, request| {
            json(&dump::config(shared, diagnostics, request.query.contains_key("include_eds")))
        }),
        ("/clusters", |shared, _, request| {
            let clusters = shared.upstreams.clusters();
            if wants_json(request) { json(&dump::clusters_json(&clusters)) } else { plain(dump::clusters_text(&clusters)) }
        }),
        ("/listeners", |shared, _, request| {
            if wants_json(request) { json(&dump::listeners_json(shared)) } else { plain(dump::listeners_text(shared)) }
        }),
        ("/streams", |shared, _, _| json(&dump::streams(shared))),
    ];
    let server = pages.into_iter().fold(registry.route(HttpServer::new("admin")), |server, (path, page)| {
        let (shared, diagnostics) = (Arc::clone(shared), diagnostics.clone());
        server.route_blocking(Method::GET, path, move |request| page(&shared, &diagnostics, &request))
    });
    let of = Arc::clone(shared);
    let server = server.route_question("/why", move |question| {
        let settings = explain::Settings {
            normalization: of.settings.path_normalization,
            trusted_proxies: of.settings.trusted_proxies,
            verify: Some(&|headers, query, rules| authenticate::supposed(headers, query, rules, &of.tokens)),
            ..explain::Settings::default()
        };
        explain::why(&of.mesh.load_full(), &question, &settings)
    });
    process::admin_routes(server, dump::version(), logging, Arc::clone(quit))
}

fn plain(page: String) -> Response {
    text(StatusCode::OK, page)
}
fn wants_json(request: &Request) -> bool {
    request.query.get("format").is_some_and(|format| format == "json")
}

/// Slow periodic work of the control thread.
async fn upkeep(registry: Registry, shared: Arc<Shared>) {
    let mut tick = tokio::time::interval(Duration::from_secs(2));
    let mut beats = 0u32;
    loop {
        tick.tick().await;
        allocator::return_free_pages();
        beats = beats.wrapping_add(1);
        if beats.is_multiple_of(15) {
            for worker in shared.threads.workers() {
                worker.spawn(async { allocator::return_free_pages() });
            }
        }
        if beats.is_multiple_of(150) {
            for worker in shared.threads.workers() {
                let telemetry = shared.telemetry.clone();
                worker.spawn(async move { telemetry.tidy_thread() });
            }
            registry.sweep(SERIES_UNUSED);
            shared.limits.sweep();
        }
    }
}
