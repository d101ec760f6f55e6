use super::super::{Settings, Translator};
use crate::diagnostics::{Problem, Severity};
use http::{HeaderName, HeaderValue};
use mesh_model::Change;
use mesh_model::defaults::MeshDefaults;
use mesh_model::l7::destination::{LocalityPolicy, OutlierPolicy, PoolLimits, TcpKeepalive, TrafficPolicy};
use mesh_model::l7::gateway::GatewayKey;
use mesh_model::l7::path::PathNormalization;
use mesh_model::l7::route::{RetryOn, RetryPolicy};
use mesh_model::service::Service;
use mesh_model::snapshot::Viewpoint;
use mesh_model::telemetry::format::{Format, Json};
use mesh_model::telemetry::tracing::{Otlp, Tag, Tracing};
use mesh_model::telemetry::{Metric, Place, Sides, TelemetryRules};
use std::sync::Arc;
use std::time::Duration;

fn rules(text: &str) -> (Arc<TelemetryRules>, Vec<Problem>) {
    let (changes, problems) = changes(text);
    let rules = changes.into_iter().rev().find_map(|c| if let Change::Telemetry(rules) = c { Some(rules) } else { None });
    (rules.unwrap_or_default(), problems)
}
fn changes(text: &str) -> (Vec<Change>, Vec<Problem>) {
    more(&mut Translator::new(Viewpoint::default(), &Settings { layer7: true, ..Settings::default() }), text)
}
/// What is made of more objects, or of others of the same names.
fn more(t: &mut Translator, text: &str) -> (Vec<Change>, Vec<Problem>) {
    let mut problems = Vec::new();
    for doc in crate::yaml::documents(text) {
        let root = crate::yaml::parse_whole(doc).unwrap_or_else(|e| panic!("{e}\n{text}"));
        let mut r = t.reader("t.yaml".into());
        let object = r.object(&root);
        problems.append(&mut r.problems);
        if let Some(object) = object {
            t.upsert(object);
        }
    }
    let changes = t.flush();
    problems.extend(t.problems().cloned());
    (changes, problems)
}
fn good(text: &str) -> Arc<TelemetryRules> {
    let (rules, problems) = rules(text);
    assert!(problems.is_empty(), "{problems:#?}");
    rules
}
fn mesh_config(mesh: &str) -> String {
    let body = mesh.replace('\n', "\n    ");
    format!(
        "apiVersion: v1\nkind: ConfigMap\nmetadata:\n  name: istio\n  namespace: istio-system\ndata:\n  mesh: |\n    {body}\n---\n"
    )
}
fn telemetry(namespace: &str, name: &str, spec: &str) -> String {
    let body = spec.replace('\n', "\n  ");
    format!(
        "apiVersion: telemetry.istio.io/v1\nkind: Telemetry\nmetadata: {{ name: {name}, namespace: {namespace} }}\nspec:\n  {body}\n---\n"
    )
}
/// At a waypoint, for a service where it has a name.
fn at<'r>(rules: &'r TelemetryRules, namespace: &str, gateway: &str, service: &str) -> &'r Sides {
    let service = Service::new(service, namespace, "host");
    let service = Some(&service).filter(|s| !s.name.is_empty());
    let gateway = GatewayKey::new(namespace, gateway);
    rules.find(&Place { service, gateway: &gateway, waypoint: true }).expect("something is said")
}
fn of_shop(rules: &TelemetryRules) -> &Sides {
    at(rules, "shop", "wp", "")
}
/// Filters of the access logs of a waypoint.
fn filters(sides: &Sides) -> Option<Vec<&str>> {
    let logs = sides.server.access.as_ref()?;
    Some(logs.iter().map(|log| log.filter.as_ref().map_or("", |f| f.source())).collect())
}

#[test]
fn mesh_config_decides_where_no_object_does() {
    assert!(good("").mesh.is_none());
    let off = good(&mesh_config("rootNamespace: istio-system"));
    assert_eq!(filters(of_shop(&off)), Some(vec![]), "accessLogFile is empty by default");
    let on = good(&mesh_config("accessLogFile: /dev/stdout"));
    assert_eq!(filters(of_shop(&on)), Some(vec![""]));
    assert_eq!(of_shop(&on).server.access.as_ref().expect("logs")[0].format, None);
    let json = mesh_config(
        "accessLogFile: /dev/stdout\naccessLogEncoding: JSON\naccessLogFormat: |\n  {\n    \"path\": \"%REQ(X-ENVOY-ORIGINAL-PATH?:PATH)%\",\n    \"who\": { \"user\": \"%REQ(X-USER-ID)%\" },\n    \"v\": 1\n  }",
    );
    let rules = good(&json);
    let Some(Format::Json(object)) = &of_shop(&rules).server.access.as_ref().expect("logs")[0].format else { panic!("JSON") };
    let keys: Vec<&str> = object.entries.iter().map(|(key, _)| &**key).collect();
    assert_eq!(keys, ["path", "who", "v"]);
    assert!(matches!(&object.entries[1].1, Json::Object(o) if o.entries.len() == 1));
    assert_eq!(object.entries[2].1, Json::Verbatim("1".into()));
    let text = good(&mesh_config("accessLogFile: /dev/stdout\naccessLogFormat: \"%PROTOCOL%\\n\""));
    assert!(matches!(of_shop(&text).server.access.as_ref().expect("logs")[0].format, Some(Format::Text(_))));
}

#[test]
fn what_is_wrong_in_mesh_config_is_told_with_its_line_and_the_rest_counts() {
    let (rules, problems) = rules(&mesh_config(
        "accessLogFile: /dev/stdout\naccessLogFormat: \"%NOPE%\"\nextensionProviders:\n- name: files\n  envoyFileAccessLog: { path: /var/log/x }",
    ));
    let told: Vec<(u32, &str, &str)> = problems.iter().map(|p| (p.origin.line, &*p.field, &*p.message)).collect();
    assert_eq!(told[0], (9, "accessLogFormat", "there is no operator %NOPE%, or not here"));
    assert_eq!((told[1].0, told[1].1), (12, "extensionProviders[0].envoyFileAccessLog.path"));
    assert_eq!(filters(of_shop(&rules)), Some(vec![""]), "in Istio's format");
}

fn defaults(changes: &[Change]) -> MeshDefaults {
    let new = changes.iter().find_map(|c| if let Change::Defaults(new) = c { Some(&**new) } else { None });
    new.cloned().unwrap_or_default()
}
#[test]
fn mesh_config_says_what_is_tried_again() {
    let of = |value: &str| {
        let (changes, problems) = changes(&mesh_config(value));
        let retry = RetryPolicy::clone(&defaults(&changes).retry);
        (retry, problems.into_iter().map(|p| (p.origin.line, p.field)).collect::<Vec<_>>())
    };
    let (none, default) = (RetryPolicy::none(), RetryPolicy::istio_default());
    assert_eq!(of("accessLogFile: ''"), (default.clone(), vec![]));
    assert_eq!(of("defaultHttpRetryPolicy: { attempts: 0 }"), (none.clone(), vec![]));
    let four = RetryPolicy { attempts: 4, on: RetryOn::FIVE_XX, ..default.clone() };
    assert_eq!(of("defaultHttpRetryPolicy: { attempts: 4, retryOn: 5xx }"), (four, vec![]));
    let told = vec![(8, "defaultHttpRetryPolicy.retryOn".into())];
    assert_eq!(of("defaultHttpRetryPolicy: { attempts: 4, retryOn: 5xy }"), (none, told));
    assert_eq!(of("defaultDestinationRuleExportTo: ['.', '*', b]"), (default.clone(), vec![]));
    assert_eq!(of("defaultDestinationRuleExportTo: ['']"), (default, vec![(8, "defaultDestinationRuleExportTo[0]".into())]));
}
#[test]
fn mesh_config_says_how_services_are_reached() {
    let of = |mesh: &str| {
        let (changes, problems) = changes(&mesh_config(mesh));
        let policy = TrafficPolicy::clone(&defaults(&changes).traffic);
        (policy, problems.into_iter().map(|p| (p.origin.line, p.field)).collect::<Vec<_>>())
    };
    let (plain, pool) = (TrafficPolicy::default(), PoolLimits::default());
    let with = |pool: PoolLimits| TrafficPolicy { pool, ..plain.clone() };
    let (second, minute) = (Duration::from_secs(1), Duration::from_mins(1));
    let keepalive = |probes, time, interval| Some(TcpKeepalive { probes, time, interval });
    let locality = LocalityPolicy { failover: vec![("a".into(), "b".into())], mesh_wide: true, ..LocalityPolicy::default() };
    for (mesh, want) in [
        ("defaultTrafficPolicy: {}", plain.clone()),
        ("connectTimeout: 1s", with(PoolLimits { connect_timeout: second, ..pool.clone() })),
        (
            "tcpKeepalive: { probes: 3, time: 60s }",
            with(PoolLimits { keepalive: keepalive(3, minute, Duration::from_secs(75)), ..pool.clone() }),
        ),
        ("h2UpgradePolicy: UPGRADE", with(PoolLimits { h2_upgrade_of_http: true, ..pool.clone() })),
        ("h2UpgradePolicy: DO_NOT_UPGRADE", plain.clone()),
        (
            "defaultTrafficPolicy: { connectionPool: { tcp: { maxConnections: 5, tcpKeepalive: { time: 1s } }, http: { h2UpgradePolicy: DO_NOT_UPGRADE } }, outlierDetection: {} }\nconnectTimeout: 60s\ntcpKeepalive: { probes: 2, time: 60s }\nh2UpgradePolicy: UPGRADE",
            TrafficPolicy {
                pool: PoolLimits {
                    max_connections: 5,
                    connect_timeout: minute,
                    keepalive: keepalive(2, second, Duration::from_secs(75)),
                    ..pool.clone()
                },
                outlier: Some(OutlierPolicy::default()),
                ..plain.clone()
            },
        ),
        ("localityLbSetting: { failover: [ { from: a, to: b } ] }", TrafficPolicy { locality, ..plain.clone() }),
        (
            "localityLbSetting: { enabled: false }",
            TrafficPolicy {
                locality: LocalityPolicy { disabled: true, mesh_wide: true, ..LocalityPolicy::default() },
                ..plain.clone()
            },
        ),
    ] {
        assert_eq!(of(mesh), (want, vec![]), "{mesh}");
    }
    // What is wrong is left out, the rest counts.
    for (wrong, field) in [
        ("defaultTrafficPolicy: { loadBalancer: {} }", "defaultTrafficPolicy.loadBalancer"),
        (
            "defaultTrafficPolicy: { connectionPool: { tcp: { maxConnections: -1 } } }",
            "defaultTrafficPolicy.connectionPool.tcp.maxConnections",
        ),
        ("defaultTrafficPolicy: { outlierDetection: { interval: 0s } }", "defaultTrafficPolicy.outlierDetection.interval"),
        ("connectTimeout: 10", "connectTimeout"),
        ("tcpKeepalive: { time: 10ms }", "tcpKeepalive.time"),
        ("h2UpgradePolicy: DEFAULT", "h2UpgradePolicy"),
        ("localityLbSetting: { failover: [ { from: a, to: a } ] }", "localityLbSetting.failover[0]"),
    ] {
        assert_eq!(of(wrong), (plain.clone(), vec![(8, field.into())]), "{wrong}");
    }
    let (both, told) =
        of("defaultTrafficPolicy: { connectionPool: { tcp: { maxConnections: 5 } }, outlierDetection: { interval: 0s } }");
    assert_eq!((both.pool.max_connections, both.outlier, told.len()), (5, None, 1));
}
#[test]
fn what_mesh_config_says_of_destinations_is_joined_anew_when_it_changes() {
    const RULES: &str = "\
apiVersion: v1
kind: Service
metadata: { name: api, namespace: a }
spec: { clusterIP: 10.1.0.1, ports: [ { port: 80, name: http } ] }
---
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: { name: all, namespace: istio-system }
spec: { host: '*.local', trafficPolicy: { loadBalancer: { simple: RANDOM } } }
---
";
    let mut t = Translator::new(Viewpoint::default(), &Settings { layer7: true, ..Settings::default() });
    let mut of = |text: &str| {
        let (changes, problems) = more(&mut t, text);
        assert!(problems.is_empty(), "{problems:#?}");
        changes.into_iter().find_map(|change| match change {
            Change::Destination(new) => Some(Some(new.policy.pool.connect_timeout.as_secs())),
            Change::DestinationGone(_) => Some(None),
            _ => None,
        })
    };
    assert_eq!(of(RULES), Some(Some(10)));
    assert_eq!(of(&mesh_config("connectTimeout: 3s")), Some(Some(3)));
    assert_eq!(of(&mesh_config("connectTimeout: 3s\naccessLogFile: /dev/stdout")), None);
    let own = "connectTimeout: 3s\ndefaultDestinationRuleExportTo: ['.']";
    assert_eq!(of(&mesh_config(own)), Some(None));
    assert_eq!(of(&mesh_config("connectTimeout: 4s")), Some(Some(4)));
}
#[test]
fn mesh_config_says_how_paths_are_normalised() {
    use PathNormalization::{Base, DecodeAndMergeSlashes, MergeSlashes, None as Off};
    let of = |value: &str| {
        let (changes, problems) = changes(&mesh_config(&format!("pathNormalization: {value}")));
        (defaults(&changes).path_normalization, problems.into_iter().map(|p| (p.origin.line, p.field)).collect::<Vec<_>>())
    };
    for (value, want) in [
        ("{}", Base),
        ("{ normalization: DEFAULT }", Base),
        ("{ normalization: NONE }", Off),
        ("{ normalization: MERGE_SLASHES }", MergeSlashes),
        ("{ normalization: DECODE_AND_MERGE_SLASHES }", DecodeAndMergeSlashes),
    ] {
        assert_eq!(of(value), (want, Vec::new()), "{value}");
    }
    // What is not understood lets no path past a policy.
    assert_eq!(of("{ normalization: MERGE }"), (DecodeAndMergeSlashes, vec![(8, "pathNormalization.normalization".into())]));
    assert_eq!(of("{ normalisation: NONE }").0, DecodeAndMergeSlashes);
}

#[test]
fn closer_levels_replace_and_the_oldest_counts() {
    let log = |filter: &str| format!("accessLogging:\n- providers: [{{ name: envoy }}]\n  filter: {{ expression: '{filter}' }}");
    let everywhere = telemetry("istio-system", "all", &log("response.code >= 400"));
    let shop = telemetry("shop", "own", &log("response.code >= 500"));
    let younger =
        telemetry("shop", "young", &log("true")).replace("name: young", "name: young, creationTimestamp: '2026-01-01T00:00:00Z'");
    let older = telemetry("shop", "zz", &log("connection.mtls"))
        .replace("name: zz", "name: zz, creationTimestamp: '2025-01-01T00:00:00Z'");
    let target = "targetRefs:\n- { group: gateway.networking.k8s.io, kind: Gateway, name: edge }\n";
    let of_edge = telemetry("shop", "edge", &format!("{target}accessLogging:\n- disabled: true"));
    let of_web =
        telemetry("shop", "web", &format!("targetRefs:\n- {{ kind: Service, name: web }}\n{}", log("request.size > 10")));

    let two = good(&format!("{everywhere}{shop}"));
    assert_eq!(filters(of_shop(&two)), Some(vec!["response.code >= 500"]));
    assert_eq!(filters(at(&two, "other", "wp", "")), Some(vec!["response.code >= 400"]));

    let all = good(&format!("{everywhere}{shop}{younger}{older}{of_edge}{of_web}"));
    assert_eq!(filters(of_shop(&all)), Some(vec!["connection.mtls"]), "the oldest");
    assert_eq!(filters(at(&all, "shop", "edge", "")), Some(vec![]), "disabled");
    assert_eq!(filters(at(&all, "shop", "edge", "web")), Some(vec!["request.size > 10"]), "the service says most");
}

#[test]
fn parts_of_proxies_are_told_apart() {
    let both = good(&telemetry(
        "shop",
        "x",
        "accessLogging:\n- match: { mode: CLIENT }\n  providers: [{ name: envoy }]\nmetrics:\n- overrides:\n  - match: { mode: SERVER, metric: REQUEST_COUNT }\n    disabled: true",
    ));
    let sides = of_shop(&both);
    assert!(sides.server.access.is_none() && sides.client.access.as_ref().is_some_and(|a| a.len() == 1));
    assert!(sides.server.metrics.of(Metric::RequestCount).disabled && sides.client.metrics.is_empty());
}

#[test]
fn tags_are_merged_by_name_and_worked_out_once() {
    let root = "metrics:\n- providers: [{ name: prometheus }]\n  overrides:\n  - match: { metric: ALL_METRICS }\n    tagOverrides:\n      request_host: { value: request.host }\n      source_app: { operation: REMOVE }";
    let own = "metrics:\n- overrides:\n  - match: { metric: REQUEST_COUNT }\n    tagOverrides:\n      request_host: { operation: UPSERT, value: 'request.host + \"!\"' }";
    let rules = good(&(telemetry("istio-system", "r", root) + &telemetry("shop", "s", own)));
    let metrics = &of_shop(&rules).server.metrics;
    let tags = |metric: Metric| -> Vec<(&str, &str)> {
        let all = metrics.of(metric).tags.iter();
        all.map(|(name, at)| (&**name, at.map_or("-", |at| metrics.tags[at].source()))).collect()
    };
    assert_eq!(tags(Metric::RequestCount), [("request_host", "request.host + \"!\""), ("source_app", "-")]);
    assert_eq!(tags(Metric::TcpSentBytes), [("request_host", "request.host"), ("source_app", "-")]);
    assert_eq!(metrics.tags.len(), 2);
}

#[test]
fn a_wrong_expression_refuses_its_object_and_helps() {
    let jq = ".request.url_path | if startswith(\"/api/auth/\") then \"auth\" else \"user\" end";
    let spec = format!("metrics:\n- overrides:\n  - tagOverrides:\n      endpoint_type:\n        value: '{jq}'");
    let (rules, problems) = rules(&telemetry("shop", "jq", &spec));
    assert!(rules.namespaces.is_empty());
    let [problem] = &problems[..] else { panic!("{problems:#?}") };
    assert_eq!((problem.severity, problem.origin.line), (Severity::Error, 9));
    assert_eq!(&*problem.field, "spec.metrics[0].overrides[0].tagOverrides.endpoint_type.value");
    assert!(problem.fix.contains("request.url_path.startsWith(\"/api/auth/\") ? \"auth\""), "{problem}");
    for (spec, field) in [
        ("accessLogging:\n- filter: { expression: 'request.nope' }", "spec.accessLogging[0].filter.expression"),
        ("accessLogging:\n- provider: x", "spec.accessLogging[0].provider"),
        ("metrics:\n- overrides:\n  - match: { metric: NOPE }", "spec.metrics[0].overrides[0].match.metric"),
        (
            "metrics:\n- overrides:\n  - tagOverrides: { 'a-b': { value: request.host } }",
            "spec.metrics[0].overrides[0].tagOverrides.a-b",
        ),
        ("tracing:\n- randomSamplingPercentage: 101", "spec.tracing[0].randomSamplingPercentage"),
        ("tracing:\n- sampling: 1", "spec.tracing[0].sampling"),
        ("tracing:\n- customTags: { a: { formatter: { value: '%NOPE%' } } }", "spec.tracing[0].customTags.a.formatter.value"),
        (
            "tracing:\n- customTags: { a: { formatter: { value: '%CEL(request.nope)%' } } }",
            "spec.tracing[0].customTags.a.formatter.value",
        ),
        ("tracing:\n- customTags: { a: { header: { name: 'x y' } } }", "spec.tracing[0].customTags.a.header.name"),
        ("tracing:\n- customTags: { a: {} }", "spec.tracing[0].customTags.a"),
        ("tracing:\n- customTags: { a: { literal: { value: x }, header: { name: x } } }", "spec.tracing[0].customTags.a"),
        ("targetRefs: [{ kind: Pod, group: '', name: x }]", "spec.targetRefs[0]"),
    ] {
        let (_, problems) = super::tests::rules(&telemetry("shop", "x", spec));
        assert!(problems.iter().any(|p| *p.field == *field && p.severity == Severity::Error), "{spec}: {problems:#?}");
    }
}

#[test]
fn providers_must_be_there() {
    let (rules, problems) = rules(
        &(mesh_config("extensionProviders:\n- name: als\n  envoyHttpAls: { service: als, port: 9 }")
            + &telemetry(
                "shop",
                "s",
                "accessLogging:\n- providers: [{ name: als }, { name: none }, { name: envoy }]\ntracing:\n- providers: [{ name: envoy }]",
            )),
    );
    assert_eq!(filters(of_shop(&rules)), Some(vec![""]), "the one that is there");
    let told = |part: &str| problems.iter().any(|p| p.message.contains(part));
    assert!(told("provider `als`") && told("provider `none`") && told("provider `envoy` of kind opentelemetry"), "{problems:#?}");
}

const OTEL: &str =
    "extensionProviders:\n- name: otel\n  opentelemetry: { service: obs/otel.obs.svc.cluster.local, port: 4317 }\n";

#[test]
fn mesh_config_traces_where_no_object_does() {
    let traced = |mesh: &str| of_shop(&good(&mesh_config(mesh))).server.tracing.clone();
    assert_eq!(traced(OTEL), None, "nobody names the provider");
    let plain = traced(&format!("{OTEL}defaultProviders: {{ tracing: [otel] }}")).expect("traced");
    assert_eq!((plain.sampling, plain.by_request_id, plain.propagates, plain.istio_tags), (100, true, true, true));
    assert_eq!((plain.longest_path, plain.tags.len()), (256, 0));
    let collector = &plain.collector;
    assert_eq!(
        (&*collector.host, collector.namespace.as_deref(), collector.port),
        ("otel.obs.svc.cluster.local", Some("obs"), 4317)
    );
    assert_eq!((&collector.over, collector.timeout.as_secs(), collector.headers.len()), (&Otlp::Grpc, 10, 0));
    let of = |tracing: &str| {
        let all = format!("{OTEL}defaultProviders: {{ tracing: [otel] }}\ndefaultConfig:\n  tracing: {{ {tracing} }}");
        traced(&all).expect("traced")
    };
    let all = of("sampling: 12.5, maxPathTagLength: 9, enableIstioTags: false, customTags: { a: { literal: { value: b } } }");
    assert_eq!((all.sampling, all.longest_path, all.istio_tags), (1250, 9, false));
    assert_eq!(*all.tags, [("a".into(), Tag::Literal("b".into()))]);
    assert_eq!((of("sampling: 0").sampling, of("sampling: 101").sampling), (100, 100), "istiod's words for 1 %");
}

#[test]
fn collectors_are_read_whole_or_not_at_all() {
    let read = |provider: &str| {
        let mesh = format!(
            "extensionProviders:\n- name: otel\n  opentelemetry: {{ {provider} }}\ndefaultProviders: {{ tracing: [otel] }}"
        );
        let (rules, problems) = rules(&mesh_config(&mesh));
        (of_shop(&rules).server.tracing.as_ref().map(|t| Arc::clone(&t.collector)), problems)
    };
    let (http, problems) =
        read("service: otel, port: 4318, http: { path: v1/traces, timeout: 250ms, headers: [{ name: x-key, value: k }] }");
    let http = http.unwrap_or_else(|| panic!("{problems:#?}"));
    assert_eq!((&http.over, http.timeout.as_millis()), (&Otlp::Http("/v1/traces".into()), 250));
    assert_eq!(*http.headers, [(HeaderName::from_static("x-key"), HeaderValue::from_static("k"))]);
    let (grpc, _) =
        read("service: otel, port: 4317, grpc: { timeout: 1s, initialMetadata: [{ name: x, envName: CULVERT_NOT_SET }] }");
    assert_eq!(grpc.expect("read").timeout.as_secs(), 1);
    for (provider, field) in [
        ("port: 4317", ".service"),
        ("service: otel", ".port"),
        ("service: x/, port: 1", ".service"),
        ("service: otel, port: 1, http: {}, grpc: {}", ".grpc"),
        ("service: otel, port: 1, http: { path: 'a b' }", ".http.path"),
        ("service: otel, port: 1, grpc: { initialMetadata: [{ name: x }] }", ".grpc.initialMetadata[0]"),
        ("service: otel, port: 1, dynatraceSampler: {}", ".dynatraceSampler"),
        ("service: otel, port: 1, resourceDetectors: { dynatrace: {} }", ".resourceDetectors.dynatrace"),
    ] {
        let (collector, problems) = read(provider);
        let field = format!("extensionProviders[0].opentelemetry{field}");
        assert!(collector.is_none(), "{provider}");
        assert!(problems.iter().any(|p| *p.field == *field && p.severity == Severity::Error), "{provider}: {problems:#?}");
        assert!(problems.iter().any(|p| p.code == Some("provider")), "who names it is told: {problems:#?}");
    }
}

#[test]
fn traces_inherit_field_by_field() {
    let mesh = mesh_config(&format!(
        "{OTEL}- name: jaeger\n  zipkin: {{ service: z, port: 9411 }}\ndefaultConfig:\n  tracing: {{ sampling: 10, customTags: {{ m: {{ literal: {{ value: m }} }} }} }}"
    ));
    let root = "tracing:\n- providers: [{ name: otel }]\n  customTags:\n    env: { literal: { value: prod } }\n    user: { header: { name: X-User, defaultValue: nobody } }";
    let shop = "tracing:\n- randomSamplingPercentage: 1.5\n  useRequestIdForTraceSampling: false\n- match: { mode: CLIENT }\n  disableSpanReporting: true";
    let web = "targetRefs: [{ kind: Service, name: web, group: '' }]\ntracing:\n- customTags: { kind: { formatter: { value: '%CEL(request.method)%' } } }\n  disableContextPropagation: true";
    let all = good(
        &(mesh.clone() + &telemetry("istio-system", "r", root) + &telemetry("shop", "s", shop) + &telemetry("shop", "w", web)),
    );
    let tracing = of_shop(&all).server.tracing.as_ref().expect("traced");
    assert_eq!((tracing.sampling, tracing.by_request_id, tracing.propagates), (150, false, true));
    assert_eq!(of_shop(&all).client.tracing, None, "disabled");
    let names = |t: &Tracing| t.tags.iter().map(|(name, _)| name.to_string()).collect::<Vec<_>>();
    assert_eq!(names(tracing), ["env", "user"], "instead of those of the mesh");
    assert_eq!(tracing.tags[1].1, Tag::Header(HeaderName::from_static("x-user"), Some("nobody".into())));
    let of_web = at(&all, "shop", "wp", "web").server.tracing.as_ref().expect("traced");
    assert_eq!((names(of_web), of_web.propagates, of_web.sampling), (vec!["kind".to_owned()], false, 150));
    let mesh_wide = all.mesh.as_ref().expect("the mesh's").server.tracing.as_ref().expect("traced");
    assert_eq!(mesh_wide.sampling, 1000);
    assert_eq!(all.collectors().count(), 4, "both parts of the mesh, the server's of the shop and of web");

    let (_, problems) = rules(&(mesh + &telemetry("shop", "s", "tracing:\n- providers: [{ name: jaeger }]")));
    assert!(problems.iter().any(|p| p.code == Some("provider") && p.message.contains("jaeger")), "{problems:#?}");
}

#[test]
fn a_selector_has_no_effect_and_says_so() {
    let (rules, problems) =
        rules(&telemetry("shop", "x", "selector: { matchLabels: { app: web } }\naccessLogging:\n- providers: [{ name: envoy }]"));
    assert_eq!(*rules, TelemetryRules::default());
    assert!(problems.iter().any(|p| p.severity == Severity::Warning && p.message.contains("selector")), "{problems:#?}");
}
