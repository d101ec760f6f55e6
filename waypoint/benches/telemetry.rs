//! What telling about one request costs its data thread: metrics, and metrics with the access log's line.
//!
//! `cargo bench -p waypoint --bench telemetry`
#![allow(missing_docs, clippy::unwrap_used, reason = "a program for developers")]

use criterion::{Criterion, criterion_group, criterion_main};
use http::{HeaderName, HeaderValue};
use mesh_identity::cache::CacheSettings;
use mesh_identity::clock::SystemClock;
use mesh_identity::crypto::TlsSettings;
use mesh_identity::local_ca::{LocalCa, LocalCaSettings};
use mesh_identity::{SvidCache, TlsContext};
use mesh_model::l7::route::ClusterKey;
use mesh_model::service::{AppProtocol, Service, ServicePort};
use mesh_model::snapshot::Viewpoint;
use mesh_model::telemetry::format::Format;
use mesh_model::waypoint::Target;
use mesh_model::workload::{Protocol, Workload};
use mesh_model::{Change, Snapshot, SpiffeId};
use mesh_runtime::logging::{Options, build};
use mesh_runtime::metrics::Registry;
use std::hint::black_box;
use std::sync::Arc;
use std::time::Duration;
use waypoint::facts::{Facts, Scope};
use waypoint::me::Me;
use waypoint::telemetry::access::{Line, Told, write};
use waypoint::telemetry::{Record, Telemetry};
use waypoint::upstream::{Deps, Role, Upstreams};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn pod(name: &str, service: &Service, ip: [u8; 4]) -> Workload {
    let mut w = Workload::new(&format!("c1//Pod/shop/{name}"), name, "shop");
    w.ips = vec![ip.into()];
    w.protocol = Protocol::Hbone;
    w.cluster = "c1".into();
    w.services.insert(service.key.clone(), [(80, 8080)].into());
    w
}

fn telling(c: &mut Criterion) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let _entered = runtime.enter();
    let dir = tempfile::tempdir().unwrap();
    let own: SpiffeId = "spiffe://cluster.local/ns/shop/sa/waypoint".parse().unwrap();
    let settings = LocalCaSettings { directory: dir.path().join("ca"), ..LocalCaSettings::default() };
    let ca = LocalCa::open(&settings, Arc::new(SystemClock)).unwrap();
    let tls = TlsContext::new(&TlsSettings::default(), &ca, Arc::new(SystemClock)).unwrap();
    let svids = SvidCache::start(Arc::new(ca), tls, &CacheSettings::default(), runtime.handle());
    let upstreams = Upstreams::new(Deps {
        svid: svids.handle(&own),
        identity: own.clone(),
        hbone: Arc::new(mesh_hbone::Settings::default()),
        connect_timeout: Duration::from_secs(5),
        handshake_timeout: Duration::from_secs(5),
        connects: mesh_runtime::metrics::connect_times().pin(&["waypoint"]),
        threads: 1,
        me: Me::default(),
    });
    let mut service = Service::new("api", "shop", "api.shop.svc.cluster.local");
    service.ports = vec![ServicePort { port: 80, target: 8080, protocol: AppProtocol::Http11 }];
    let service = Arc::new(service);
    let client = Arc::new(pod("front-0", &service, [10, 0, 0, 5]));
    let endpoint = Arc::new(pod("api-0", &service, [10, 0, 1, 7]));
    let changes = [Change::Service(Arc::clone(&service)), Change::Workload(Arc::clone(&client)), Change::Workload(endpoint)];
    let snap = Snapshot::empty(Viewpoint::default()).apply(&changes);
    let key = ClusterKey { service: service.key.clone(), port: 80, subset: None };
    let cluster = upstreams.renew(&snap, &key, Role::Waypoint).unwrap();
    let facts = Facts {
        scope: Scope::Mesh(Target::Service { service: Arc::clone(&service), port: 80 }),
        client: "10.0.0.5:40000".parse().unwrap(),
        local: "10.96.0.1:80".parse().unwrap(),
        identity: client.identity().ok(),
        source: Some(client),
        trace: None,
        sni: None,
        plain: None,
    };
    let record = Record {
        path: "/api/v1/orders/4711?verbose=true".into(),
        authority: "api.shop.svc.cluster.local".into(),
        headers: [
            ("user-agent", "Mozilla/5.0 (X11; Linux x86_64) AppleWebKit/537.36"),
            ("x-request-id", "9b1deb4d-3b7d-4bad-9bdd-2b0d7b3dcb6d"),
            ("x-forwarded-for", "10.0.0.5"),
        ]
        .map(|(name, value)| (HeaderName::from_static(name), HeaderValue::from_static(value)))
        .into_iter()
        .collect(),
        host: cluster.hosts().first().cloned(),
        cluster: Some(cluster),
        status: 200,
        details: "via_upstream".into(),
        upstream_time: Some(Duration::from_millis(4)),
        ..Record::new(false)
    };

    let quiet = Telemetry::new(&Registry::new(), None, None, own.clone()).unwrap();
    c.bench_function("request_done, metrics", |b| b.iter(|| quiet.request_done(black_box(&facts), black_box(&record))));

    for (name, format) in [("JSON line alone", Format::istio_json()), ("text line alone", Format::istio_text())] {
        let mut out = String::new();
        c.bench_function(name, |b| {
            b.iter(|| {
                out.clear();
                let told = Told::Request(black_box(&record));
                write(&format, &Line { facts: &facts, told, took: Duration::from_millis(5), own: &own }, &mut out);
            });
        });
    }

    let options = Options::from_env(None, Some("json"), "waypoint").unwrap();
    let (logging, _subscriber) = build(options, Box::new(std::io::sink())).unwrap();
    let loud = Telemetry::new(&Registry::new(), Some(logging.access.clone()), None, own).unwrap();
    c.bench_function("request_done, metrics and JSON line", |b| {
        b.iter(|| loud.request_done(black_box(&facts), black_box(&record)));
    });
}

criterion_group!(benches, telling);
criterion_main!(benches);
