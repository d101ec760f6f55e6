use super::super::{Settings, Translator};
use crate::diagnostics::{Problem, Severity};
use mesh_model::Change;
use mesh_model::l7::gateway::GatewayKey;
use mesh_model::service::Service;
use mesh_model::snapshot::Viewpoint;
use mesh_model::telemetry::format::{Format, Json};
use mesh_model::telemetry::{Metric, Place, Sides, TelemetryRules};
use std::sync::Arc;

fn rules(text: &str) -> (Arc<TelemetryRules>, Vec<Problem>) {
    let mut t = Translator::new(Viewpoint::default(), &Settings { layer7: true, ..Settings::default() });
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
    let mut rules = Arc::default();
    for change in t.flush() {
        if let Change::Telemetry(new) = change {
            rules = new;
        }
    }
    problems.extend(t.problems().cloned());
    (rules, problems)
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
                "accessLogging:\n- providers: [{ name: als }, { name: none }, { name: envoy }]\ntracing: []",
            )),
    );
    assert_eq!(filters(of_shop(&rules)), Some(vec![""]), "the one that is there");
    let told = |part: &str| problems.iter().any(|p| p.message.contains(part));
    assert!(told("provider `als`") && told("provider `none`") && told("not traced yet"), "{problems:#?}");
}

#[test]
fn a_selector_has_no_effect_and_says_so() {
    let (rules, problems) =
        rules(&telemetry("shop", "x", "selector: { matchLabels: { app: web } }\naccessLogging:\n- providers: [{ name: envoy }]"));
    assert_eq!(*rules, TelemetryRules::default());
    assert!(problems.iter().any(|p| p.severity == Severity::Warning && p.message.contains("selector")), "{problems:#?}");
}
