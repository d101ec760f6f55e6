//! Labels, handles and lines over a small mesh: a client, a service with two endpoints behind one waypoint, another service
//! bound to the same waypoint, and one that is not.
#![expect(clippy::float_cmp, reason = "counts and sums of whole numbers are exact")]
use super::cache::MOST;
use super::*;
use crate::me::Me;
use crate::upstream::{Cluster, ClusterView, Counts, Deps, Host, HostView, Limits, Role, Upstreams};
use http::{HeaderName, HeaderValue, Method, Version};
use mesh_identity::cache::CacheSettings;
use mesh_identity::clock::SystemClock;
use mesh_identity::crypto::TlsSettings;
use mesh_identity::local_ca::{LocalCa, LocalCaSettings};
use mesh_identity::{SvidCache, TlsContext};
use mesh_model::gateway::{GatewayDestination, GatewayRef};
use mesh_model::l7::route::ClusterKey;
use mesh_model::service::{AppProtocol, Service, ServiceKey, ServicePort, WeightedWaypoint};
use mesh_model::snapshot::Viewpoint;
use mesh_model::telemetry::expression::Expression;
use mesh_model::telemetry::{FamilyRules, Metric};
use mesh_model::waypoint::Target;
use mesh_model::workload::Protocol;
use mesh_model::{Change, Reason, Snapshot};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::time::{Duration, SystemTime};

pub(in crate::telemetry) struct World {
    pub snap: Snapshot,
    pub upstreams: Arc<Upstreams>,
    pub registry: Registry,
    pub telemetry: Telemetry,
    identity: SpiffeId,
    client: Arc<Workload>,
    _ca: tempfile::TempDir,
}

fn own_id() -> SpiffeId {
    "spiffe://cluster.local/ns/shop/sa/waypoint".parse().expect("an id")
}
fn key(name: &str) -> ServiceKey {
    ServiceKey::new("shop", &format!("{name}.shop.svc.cluster.local"))
}
fn service(name: &str, bound: bool) -> Service {
    let mut s = Service::new(name, "shop", &key(name).hostname);
    s.ports = vec![ServicePort { port: 80, target: 8080, protocol: AppProtocol::Http11 }];
    if bound {
        let destination = GatewayDestination::Service(key("waypoint"));
        let waypoint = GatewayRef { destination, hbone_port: 15008 };
        s.waypoints = vec![WeightedWaypoint { waypoint, weight: 100 }];
    }
    s
}
fn pod(name: &str, of: &str, ip: &str) -> Workload {
    let mut w = Workload::new(&format!("c1//Pod/shop/{name}"), name, "shop");
    w.ips = vec![ip.parse().expect("an address")];
    w.protocol = Protocol::Hbone;
    w.service_account = of.into();
    w.workload_name = format!("{of}-v1").into();
    w.canonical_name = of.into();
    w.canonical_revision = "v1".into();
    w.cluster = "c1".into();
    w.services.insert(key(of), [(80, 8080)].into());
    w
}

impl World {
    pub fn new() -> Self {
        let dir = tempfile::tempdir().expect("a directory");
        let settings = LocalCaSettings { directory: dir.path().join("ca"), ..LocalCaSettings::default() };
        let ca = LocalCa::open(&settings, Arc::new(SystemClock)).expect("a CA");
        let tls = TlsContext::new(&TlsSettings::default(), &ca, Arc::new(SystemClock)).expect("TLS");
        let svids = SvidCache::start(Arc::new(ca), tls, &CacheSettings::default(), &tokio::runtime::Handle::current());
        let upstreams = Upstreams::new(Deps {
            svid: svids.handle(&own_id()),
            identity: own_id(),
            hbone: Arc::new(mesh_hbone::Settings::default()),
            connect_timeout: Duration::from_secs(5),
            handshake_timeout: Duration::from_secs(5),
            connects: mesh_runtime::metrics::connect_times().pin(&["waypoint"]),
            threads: 1,
            me: Me::default(),
        });
        let mut plain = pod("db-0", "db", "10.0.9.9");
        plain.protocol = Protocol::Tcp;
        plain.canonical_revision = "".into();
        let changes = [
            Change::Service(Arc::new(service("api", true))),
            Change::Service(Arc::new(service("api-v2", true))),
            Change::Service(Arc::new(service("db", false))),
            Change::Workload(Arc::new(pod("front-0", "front", "10.0.0.5"))),
            Change::Workload(Arc::new(pod("api-0", "api", "10.0.1.7"))),
            Change::Workload(Arc::new(pod("api-v2-0", "api-v2", "10.0.1.8"))),
            Change::Workload(Arc::new(plain)),
        ];
        let snap = Snapshot::empty(Viewpoint::default()).apply(&changes);
        let registry = Registry::new();
        let telemetry = Telemetry::new(&registry, None, None, own_id()).expect("metrics");
        let client = Arc::clone(snap.find_workload("c1//Pod/shop/front-0").expect("the client"));
        let identity = client.identity().expect("an identity");
        Self { snap, upstreams, registry, telemetry, identity, client, _ca: dir }
    }
    /// The cluster of a service, and its endpoint.
    pub fn to(&self, name: &str) -> (Arc<Cluster>, Arc<Host>) {
        let key = ClusterKey { service: key(name), port: 80, subset: None };
        let cluster = self.upstreams.renew(&self.snap, &key, Role::Waypoint).expect("a cluster");
        let host = Arc::clone(cluster.hosts().first().expect("an endpoint"));
        (cluster, host)
    }
    fn service(&self, name: &str) -> &Arc<Service> {
        self.snap.find_service(&key(name)).expect("a service")
    }
    /// Of a connection of the client to the service.
    pub fn facts(&self) -> Facts {
        Facts {
            scope: Scope::Mesh(Target::Service { service: Arc::clone(self.service("api")), port: 80 }),
            client: "10.0.0.5:40000".parse().expect("an address"),
            local: "10.96.0.1:80".parse().expect("an address"),
            identity: Some(self.identity.clone()),
            source: Some(Arc::clone(&self.client)),
            trace: None,
            sni: None,
            plain: None,
        }
    }
    /// Of a connection from outside the mesh to a gateway.
    pub fn outside(&self) -> Facts {
        let scope = Scope::Gateway { port: 80, listener: None, secure: false };
        Facts { scope, identity: None, source: None, ..self.facts() }
    }
    /// A request that was answered by `name`.
    pub fn answered(&self, name: &str) -> Record {
        let (cluster, host) = self.to(name);
        Record {
            start_time: SystemTime::UNIX_EPOCH + Duration::from_millis(1_709_210_096_007),
            method: Method::POST,
            path: "/a?b=\"c\"".into(),
            protocol: Version::HTTP_2,
            authority: "api.shop:80".into(),
            headers: [("user-agent", "curl/8.1"), ("x-request-id", "0a1b"), ("x-forwarded-for", "10.0.0.5")]
                .map(|(name, value)| (HeaderName::from_static(name), HeaderValue::from_static(value)))
                .into_iter()
                .collect(),
            cluster: Some(cluster),
            host: Some(host),
            status: 200,
            details: "via_upstream".into(),
            attempts: 1,
            upstream_time: Some(Duration::from_micros(4_900)),
            sent: 321,
            ..Record::new(false)
        }
    }
    fn families(&self) -> Families {
        families(&self.registry.encode())
    }
}

type Series = BTreeMap<String, String>;
/// Samples by family, checked as `promtool check metrics` does.
#[derive(Debug, Default)]
struct Families {
    kinds: HashMap<String, String>,
    samples: Vec<(String, Series, f64)>,
}
impl Families {
    /// The only series of a family.
    fn one(&self, name: &str) -> (&Series, f64) {
        let mut found = self.samples.iter().filter(|(n, ..)| n == name);
        let (_, labels, value) = found.next().unwrap_or_else(|| panic!("no {name}"));
        assert!(found.next().is_none(), "several series of {name}");
        (labels, *value)
    }
    fn sum(&self, name: &str) -> f64 {
        self.samples.iter().filter(|(n, ..)| n == name).map(|(.., v)| v).sum()
    }
}

/// Reads the text format strictly: every family has HELP and TYPE before its samples and is in one piece, names are right,
/// no series comes twice, histograms have rising buckets up to `+Inf`, sum and count.
fn families(text: &str) -> Families {
    let mut out = Families::default();
    let (mut helped, mut facts) = (BTreeSet::new(), BTreeSet::new());
    let mut current = String::new();
    for line in text.lines() {
        if let Some(rest) = line.strip_prefix("# HELP ") {
            let (name, help) = rest.split_once(' ').expect("a help text");
            assert!(!help.trim().is_empty(), "{line}");
            assert!(helped.insert(name.to_owned()), "{name} comes twice");
            current = name.to_owned();
            continue;
        }
        if let Some(rest) = line.strip_prefix("# TYPE ") {
            let (name, kind) = rest.split_once(' ').expect("a kind");
            assert_eq!(name, current, "TYPE follows HELP");
            assert!(matches!(kind, "counter" | "gauge" | "histogram"), "{line}");
            if kind == "gauge" {
                assert!(!name.ends_with("_total") || name.ends_with("membership_total"), "{name} is no counter");
            }
            out.kinds.insert(name.to_owned(), kind.to_owned());
            continue;
        }
        let (series, value) = line.rsplit_once(' ').expect("a value");
        let value: f64 = value.parse().expect("a number");
        let (name, labels) = match series.split_once('{') {
            Some((name, rest)) => (name, labels(rest.strip_suffix('}').expect("a closed brace"))),
            None => (series, Series::new()),
        };
        let family = match out.kinds.get(&current).map(String::as_str) {
            Some("histogram") => ["_bucket", "_sum", "_count"].iter().find_map(|s| name.strip_suffix(s)).expect("a part"),
            Some(_) => name,
            None => panic!("{line}: no TYPE before it"),
        };
        assert_eq!(family, current, "families are in one piece");
        assert!(facts.insert(series.to_owned()), "{series} comes twice");
        out.samples.push((name.to_owned(), labels, value));
    }
    for (name, _) in out.kinds.iter().filter(|(_, kind)| *kind == "histogram") {
        check_histogram(name, &out.samples);
    }
    out
}
fn check_histogram(name: &str, samples: &[(String, Series, f64)]) {
    /// Buckets, sum and count of one series.
    #[derive(Debug, Default)]
    struct Parts(Vec<(f64, f64)>, Option<f64>, Option<f64>);
    let mut all: BTreeMap<Series, Parts> = BTreeMap::new();
    for (n, labels, value) in samples {
        let mut labels = labels.clone();
        match n.strip_prefix(name) {
            Some("_bucket") => {
                let le: f64 = labels.remove("le").unwrap_or_else(|| panic!("{n} without le")).parse().expect("a bound");
                all.entry(labels).or_default().0.push((le, *value));
            }
            Some("_sum") => all.entry(labels).or_default().1 = Some(*value),
            Some("_count") => all.entry(labels).or_default().2 = Some(*value),
            _ => {}
        }
    }
    for Parts(buckets, sum, count) in all.into_values() {
        assert!(buckets.windows(2).all(|w| w[0].0 < w[1].0 && w[0].1 <= w[1].1), "{name}: {buckets:?}");
        assert_eq!(buckets.last().map(|(le, n)| (*le, Some(*n))), Some((f64::INFINITY, count)), "{name}");
        assert!(sum.is_some(), "{name}");
    }
}
fn labels(mut text: &str) -> Series {
    let mut all = Series::new();
    while !text.is_empty() {
        let (name, rest) = text.split_once("=\"").expect("a label");
        assert!(!name.is_empty() && name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_'), "{name}");
        let mut value = String::new();
        let mut chars = rest.char_indices();
        let end = loop {
            let (at, c) = chars.next().expect("a closing quote");
            match c {
                '"' => break at,
                '\\' => value.push(chars.next().expect("an escape").1),
                c => value.push(c),
            }
        };
        assert!(all.insert(name.to_owned(), value).is_none(), "{name} comes twice");
        text = rest[end + 1..].trim_start_matches(',');
    }
    all
}
fn series(pairs: &[(&str, &str)]) -> Series {
    pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect()
}

const FRONT: [(&str, &str); 8] = [
    ("source_workload", "front-v1"),
    ("source_canonical_service", "front"),
    ("source_canonical_revision", "v1"),
    ("source_workload_namespace", "shop"),
    ("source_principal", "spiffe://cluster.local/ns/shop/sa/front"),
    ("source_app", "front"),
    ("source_version", "v1"),
    ("source_cluster", "c1"),
];
fn nobody(side: &str) -> Vec<(String, String)> {
    let names =
        ["workload", "canonical_service", "canonical_revision", "workload_namespace", "principal", "app", "version", "cluster"];
    names.iter().map(|n| (format!("{side}_{n}"), "unknown".to_owned())).collect()
}

#[tokio::test]
async fn a_request_is_labelled_by_who_asked_and_who_answered() {
    let world = World::new();
    let record = world.answered("api");
    record.received.add(&[0; 77]);
    world.telemetry.request_done(&world.facts(), &record);
    let all = world.families();
    let mut expected = series(&FRONT);
    expected.extend(series(&[
        ("reporter", "waypoint"),
        ("destination_workload", "api-v1"),
        ("destination_canonical_service", "api"),
        ("destination_canonical_revision", "v1"),
        ("destination_workload_namespace", "shop"),
        ("destination_principal", "spiffe://cluster.local/ns/shop/sa/api"),
        ("destination_app", "api"),
        ("destination_version", "v1"),
        ("destination_cluster", "c1"),
        ("destination_service", "api.shop.svc.cluster.local"),
        ("destination_service_name", "api"),
        ("destination_service_namespace", "shop"),
        ("request_protocol", "http"),
        ("response_code", "200"),
        ("response_flags", "-"),
        ("connection_security_policy", "mutual_tls"),
    ]));
    assert_eq!(all.one("istio_requests_total"), (&expected, 1.0));
    assert_eq!(all.one("istio_request_bytes_sum"), (&expected, 77.0));
    assert_eq!(all.one("istio_response_bytes_sum"), (&expected, 321.0));
    assert_eq!(all.one("istio_request_duration_milliseconds_count"), (&expected, 1.0));
    assert!(!all.kinds.contains_key("istio_request_messages_total"), "no gRPC");
    let bounds: Vec<&str> = all
        .samples
        .iter()
        .filter(|(n, ..)| n == "istio_request_duration_milliseconds_bucket")
        .map(|(_, l, _)| l["le"].as_str())
        .collect();
    assert_eq!(bounds.len(), 20);
    assert_eq!((bounds[0], bounds[1], bounds[18], bounds[19]), ("0.5", "1", "3600000", "+Inf"));
}

#[tokio::test]
async fn a_refused_request_has_no_destination_but_a_service() {
    let world = World::new();
    let mut record = Record { status: 503, reason: Some(Reason::NoHealthyEndpoint), ..Record::new(false) };
    record.flags.set(Flag::NoHealthyUpstream);
    record.flags.set(Flag::UpstreamRetryLimitExceeded);
    world.telemetry.request_done(&world.facts(), &record);
    let all = world.families();
    let (labels, value) = all.one("istio_requests_total");
    assert!((value - 1.0).abs() < f64::EPSILON);
    for (name, value) in nobody("destination") {
        assert_eq!(labels[&name], value, "{name}");
    }
    for (name, value) in FRONT {
        assert_eq!(labels[name], value, "{name}");
    }
    assert_eq!(labels["destination_service_name"], "api");
    assert_eq!((&*labels["response_code"], &*labels["response_flags"]), ("503", "URX,UH"));
    let reasons = series(&[("reporter", "waypoint"), ("reason", "no_healthy_endpoint")]);
    assert_eq!(all.one("culvert_refused_total"), (&reasons, 1.0));
}

#[tokio::test]
async fn what_is_not_known_is_unknown() {
    let world = World::new();
    let stranger: SpiffeId = "spiffe://cluster.local/ns/far/sa/away".parse().expect("an id");
    // An identity without a workload, and a plain endpoint without a revision.
    let facts = Facts { source: None, identity: Some(stranger.clone()), ..world.facts() };
    world.telemetry.request_done(&facts, &world.answered("db"));
    let all = world.families();
    let (labels, _) = all.one("istio_requests_total");
    for (name, value) in nobody("source") {
        let value = if name == "source_principal" { stranger.as_str() } else { &value };
        assert_eq!(labels[&name], value, "{name}");
    }
    assert_eq!(labels["destination_workload"], "db-v1");
    assert_eq!(labels["destination_principal"], "unknown", "a plain endpoint proves nothing");
    assert_eq!(labels["destination_version"], "unknown");
    assert_eq!(labels["destination_service_name"], "db", "the service the request went to");
    assert_eq!(labels["connection_security_policy"], "mutual_tls");
}

#[tokio::test]
async fn grpc_has_its_status_and_messages() {
    let world = World::new();
    let mut record =
        Record { grpc: true, grpc_status: Some(14), received: Arc::new(Received::new(true)), ..world.answered("api") };
    record.received.add(&[0, 0, 0, 0, 1, 9, 0, 0, 0, 0, 0]);
    record.sent(&[0, 0, 0, 0, 0]);
    world.telemetry.request_done(&world.facts(), &record);
    // One that broke off before a status has that of its HTTP status.
    record.grpc_status = None;
    world.telemetry.request_done(&world.facts(), &record);
    let all = world.families();
    let statuses: BTreeSet<Option<&str>> = all
        .samples
        .iter()
        .filter(|(n, ..)| n == "istio_requests_total")
        .map(|(_, l, _)| {
            assert_eq!(l["request_protocol"], "grpc");
            l.get("grpc_response_status").map(String::as_str)
        })
        .collect();
    assert_eq!(statuses, BTreeSet::from([Some("2"), Some("14")]));
    let (labels, messages) = all.one("istio_request_messages_total");
    assert_eq!((messages, labels.contains_key("response_code")), (4.0, false));
    assert_eq!(all.one("istio_response_messages_total").1, 2.0);
}

#[tokio::test]
async fn the_mesh_changes_labels_and_leaves_out_what_has_no_value() {
    let world = World::new();
    let tag = |source: &str| Expression::parse(source).expect(source);
    let rule = |tags: &[(&str, Option<usize>)]| FamilyRules {
        disabled: false,
        tags: tags.iter().map(|(name, at)| ((*name).into(), *at)).collect(),
    };
    let mut metrics = MetricRules {
        tags: vec![tag("request.url_path.startsWith('/a') ? 'auth' : 'user'"), tag("request.headers['x-tenant']")].into(),
        ..MetricRules::default()
    };
    metrics.families[Metric::RequestCount as usize] =
        rule(&[("endpoint_type", Some(0)), ("source_app", None), ("destination_app", Some(1)), ("tenant", Some(1))]);
    metrics.families[Metric::RequestSize as usize].disabled = true;
    metrics.families[Metric::TcpOpenedConnections as usize] = rule(&[("peer", Some(1)), ("source_version", None)]);
    let told = Some(Arc::new(mesh_model::telemetry::Telemetry { metrics, ..Default::default() }));
    let mut record = Record { told: told.clone(), ..world.answered("api") };
    world.telemetry.request_done(&world.facts(), &record);
    record.headers.insert("x-tenant", HeaderValue::from_static("blue\"\\"));
    world.telemetry.request_done(&world.facts(), &record);
    world.telemetry.request_done(&world.facts(), &record);
    drop(world.telemetry.tcp_opened(&world.facts(), &TcpRecord { told, ..TcpRecord::begin() }));
    let all = world.families();
    let counts: BTreeMap<Option<&str>, (f64, &Series)> = all
        .samples
        .iter()
        .filter(|(n, ..)| n == "istio_requests_total")
        .map(|(_, l, v)| (l.get("tenant").map(String::as_str), (*v, l)))
        .collect();
    assert_eq!(counts[&None].0, 1.0);
    let (two, labels) = counts[&Some("blue\"\\")];
    assert_eq!((two, &*labels["endpoint_type"], &*labels["destination_app"]), (2.0, "auth", "blue\"\\"));
    assert!(!labels.contains_key("source_app") && !counts[&None].1.contains_key("destination_app"));
    assert!(!all.kinds.contains_key("istio_request_bytes"), "disabled");
    assert_eq!(all.sum("istio_request_duration_milliseconds_count"), 3.0);
    let (labels, _) = all.one("istio_tcp_connections_opened_total");
    assert!(!labels.contains_key("peer") && !labels.contains_key("source_version") && labels.contains_key("source_app"));
}

#[tokio::test]
async fn a_gateway_reports_itself_as_the_source() {
    let world = World::new();
    let own = Arc::new(pod("gw-0", "gateway", "10.0.3.3"));
    world.telemetry.set_own(Some(&own));
    world.telemetry.request_done(&world.outside(), &world.answered("api"));
    let all = world.families();
    let (labels, _) = all.one("istio_requests_total");
    for (name, value) in [
        ("reporter", "source"),
        ("source_workload", "gateway-v1"),
        ("source_principal", "spiffe://cluster.local/ns/shop/sa/waypoint"),
        ("destination_workload", "api-v1"),
        ("destination_service_name", "api"),
        ("connection_security_policy", "unknown"),
    ] {
        assert_eq!(labels[name], value, "{name}");
    }
}

#[tokio::test]
async fn connections_are_counted_and_closed_once() {
    let world = World::new();
    let (cluster, host) = world.to("api");
    let record = TcpRecord { cluster: Some(cluster), host: Some(host), ..TcpRecord::begin() };
    let handles = world.telemetry.tcp_opened(&world.facts(), &record);
    assert!(!world.families().samples.iter().any(|(n, _, v)| n == "istio_tcp_connections_closed_total" && *v > 0.0));
    Counters::sent(&handles, 10);
    Counters::received(&handles, 300);
    world.telemetry.tcp_done(&world.facts(), &record, &handles);
    drop(handles);
    let all = world.families();
    let (labels, opened) = all.one("istio_tcp_connections_opened_total");
    assert_eq!(opened, 1.0);
    assert_eq!(labels.len(), TCP_LABELS);
    assert_eq!((&*labels["request_protocol"], &*labels["destination_workload"]), ("tcp", "api-v1"));
    for (name, value) in [("closed_total", 1.0), ("opened_total", 1.0)] {
        assert_eq!(all.one(&format!("istio_tcp_connections_{name}")), (labels, value));
    }
    assert_eq!(all.one("istio_tcp_received_bytes_total"), (labels, 10.0));
    assert_eq!(all.one("istio_tcp_sent_bytes_total"), (labels, 300.0));

    let mut failed = TcpRecord { reason: Some(Reason::ConnectFailed), ..TcpRecord::begin() };
    failed.flags.set(Flag::UpstreamConnectionFailure);
    world.telemetry.tcp_failed(&world.facts(), &failed);
    let all = world.families();
    assert_eq!((all.sum("istio_tcp_connections_opened_total"), all.sum("istio_tcp_connections_closed_total")), (2.0, 2.0));
    let flagged = all.samples.iter().filter(|(_, l, _)| l.get("response_flags").is_some_and(|f| f == "UF"));
    assert_eq!(flagged.count(), 4);
    assert_eq!(all.sum("culvert_refused_total"), 1.0);
}
const TCP_LABELS: usize = 23;

fn table_len() -> usize {
    CACHE.with_borrow(Cache::len)
}

#[tokio::test]
async fn handles_are_looked_up_once_per_answer() {
    let world = World::new();
    let record = world.answered("api");
    for _ in 0..3 {
        world.telemetry.request_done(&world.facts(), &record);
    }
    assert_eq!(table_len(), 1);
    assert_eq!(world.families().one("istio_requests_total").1, 3.0);
    let mut other = world.answered("api");
    other.status = 404;
    world.telemetry.request_done(&world.facts(), &other);
    world.telemetry.request_done(&Facts { identity: None, ..world.facts() }, &record);
    assert_eq!(table_len(), 3);
    // The metrics of another process (here: another registry) are not mixed up with these.
    let another = World::new();
    another.telemetry.request_done(&another.facts(), &another.answered("api"));
    assert_eq!((table_len(), another.families().one("istio_requests_total").1), (1, 1.0));
}

#[tokio::test]
async fn a_workload_that_changed_has_new_labels() {
    let world = World::new();
    let record = world.answered("api");
    world.telemetry.request_done(&world.facts(), &record);
    let mut changed = Workload::clone(&world.client);
    changed.canonical_revision = "v2".into();
    let changed = Arc::new(changed);
    world.telemetry.request_done(&Facts { source: Some(Arc::clone(&changed)), ..world.facts() }, &record);
    let all = world.families();
    let versions: BTreeSet<&str> =
        all.samples.iter().filter(|(n, ..)| n == "istio_requests_total").map(|(_, l, _)| &*l["source_version"]).collect();
    assert_eq!(versions, BTreeSet::from(["v1", "v2"]));
}

#[tokio::test]
async fn the_table_is_bounded_and_counts_go_on() {
    let world = World::new();
    let facts = world.facts();
    let mut record = Record::new(false);
    let last = MOST as u16 + 100;
    for status in 0..last {
        record.status = status;
        world.telemetry.request_done(&facts, &record);
        // One that is used all the time.
        record.status = u16::MAX;
        world.telemetry.request_done(&facts, &record);
        assert!(table_len() <= MOST);
    }
    let page = world.registry.encode();
    let requests = page.lines().filter(|l| l.starts_with("istio_requests_total{"));
    let (mut all, mut always) = (0, 0);
    for line in requests {
        let count: u64 = line.rsplit_once(' ').and_then(|(_, n)| n.parse().ok()).expect("a count");
        all += count;
        always += if line.contains("response_code=\"65535\"") { count } else { 0 };
    }
    assert_eq!((all, always), (2 * u64::from(last), u64::from(last)));
}

#[tokio::test]
async fn series_nobody_counts_in_expire() {
    let world = World::new();
    let record = world.answered("api");
    world.telemetry.request_done(&world.facts(), &record);
    assert_eq!(world.registry.sweep(Duration::ZERO), 0, "the thread holds them");
    world.telemetry.tidy_thread();
    world.telemetry.request_done(&world.facts(), &record);
    world.telemetry.tidy_thread();
    assert_eq!(world.registry.sweep(Duration::ZERO), 0, "used since the last time");
    world.telemetry.tidy_thread();
    assert_eq!(table_len(), 0);
    assert_eq!(world.registry.sweep(Duration::ZERO), 4);
    assert!(world.families().samples.is_empty());
    world.telemetry.request_done(&world.facts(), &record);
    assert_eq!(world.families().one("istio_requests_total").1, 1.0);
}

pub(crate) fn view() -> ClusterView {
    let host = |last: u8, ejected: bool| HostView {
        address: ([10, 0, 1, last], 8080).into(),
        workload: format!("c1//Pod/shop/api-{last}").into(),
        hbone: true,
        weight: 1,
        priority: 0,
        locality: "r/z/".into(),
        ejected,
        ejections: u64::from(ejected),
        active_requests: 2,
        connections: 1,
        requests: 12,
        failures: 3,
    };
    ClusterView {
        name: "outbound|80||api.shop.svc.cluster.local".into(),
        hosts: vec![host(7, false), host(8, true)],
        limits: Limits { connections: 100, pending: 2, requests: u32::MAX, retries: 3 },
        counts: Counts {
            connections: 2,
            pending: 2,
            requests: 4,
            retries: 0,
            connections_total: 9,
            connect_failures: 1,
            connection_overflows: 0,
            pending_overflows: 5,
            request_overflows: 6,
            requests_total: 24,
            retries_total: 7,
            retry_overflows: 8,
            ejections: 1,
            ejection_overflows: 0,
        },
    }
}

#[tokio::test]
async fn everything_together_is_one_page_prometheus_takes() {
    let world = World::new();
    world.registry.process().expect("process metrics");
    world.registry.build_info("waypoint", "1").expect("build info");
    world.registry.on_scrape(&scrape::cluster_names(), |out| scrape::clusters(&[view()], out)).expect("clusters");
    let state = scrape::Process { version: 5, problems: 2, tunnels: 1, lost_lines: 0 };
    world.registry.on_scrape(&scrape::PROCESS_NAMES, move |out| scrape::process(state, out)).expect("state");
    world.telemetry.request_done(&world.facts(), &world.answered("api"));
    world.telemetry.request_done(&world.facts(), &world.answered("api-v2"));
    world.telemetry.tcp_failed(&world.facts(), &TcpRecord::begin());
    let all = world.families();
    let name = series(&[("cluster_name", "outbound|80||api.shop.svc.cluster.local")]);
    for (stat, value) in [
        ("membership_total", 2.0),
        ("membership_healthy", 1.0),
        ("upstream_cx_active", 2.0),
        ("upstream_rq_active", 4.0),
        ("upstream_rq_pending_active", 2.0),
        ("upstream_rq_pending_overflow", 11.0),
        ("upstream_rq_retry", 7.0),
        ("upstream_rq_retry_overflow", 8.0),
        ("outlier_detection_ejections_active", 1.0),
        ("outlier_detection_ejections_enforced_total", 1.0),
        ("circuit_breakers_default_cx_open", 0.0),
        ("circuit_breakers_default_rq_open", 0.0),
        ("circuit_breakers_default_rq_pending_open", 1.0),
        ("circuit_breakers_default_rq_retry_open", 0.0),
        ("circuit_breakers_default_remaining_cx", 98.0),
        ("circuit_breakers_default_remaining_pending", 0.0),
    ] {
        assert_eq!(all.one(&format!("envoy_cluster_{stat}")), (&name, value), "{stat}");
    }
    assert_eq!(all.sum("envoy_cluster_circuit_breakers_default_remaining_rq"), 0.0);
    assert!(!all.samples.iter().any(|(n, ..)| n.ends_with("remaining_rq")), "no limit, nothing remains");
    assert_eq!(all.one("culvert_config_problems").1, 2.0);
}
