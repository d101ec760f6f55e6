//! TrafficPolicies and EnvoyFilters: what they say, what they bind, and what is wrong with them.

use http::{HeaderName, HeaderValue, StatusCode};
use mesh_model::l7::StringMatch;
use mesh_model::l7::compression::{Coding, Compression};
use mesh_model::l7::limit::{KeyPart, Limit, Point, Rate};
use mesh_model::l7::treatment::Treatment;
use std::time::Duration;

use super::*;

const SERVICE: &str = "service a/s.a.svc.cluster.local";
const GATEWAY: &str = "gateway a/wp";

fn base() -> String {
    gateway("a", "wp", "", "Same", true)
        + &service("a", "s", ", labels: {istio.io/use-waypoint: wp}", "{clusterIP: 10.1.0.1, ports: [{port: 80}]}")
}
fn policy(name: &str, spec: &str) -> String {
    let to = if spec.contains("targetRefs") { "" } else { "  targetRefs: [{kind: Service, name: s}]\n" };
    format!(
        "---\napiVersion: culvert.dev/v1alpha1\nkind: TrafficPolicy\nmetadata: {{name: {name}, namespace: a}}\nspec:\n{to}{spec}\n"
    )
}
fn filter(spec: &str) -> String {
    format!(
        "---\napiVersion: networking.istio.io/v1alpha3\nkind: EnvoyFilter\nmetadata: {{name: f, namespace: a}}\nspec:\n{spec}\n"
    )
}
/// One patch that inserts a filter; `config` is indented by ten.
fn http_filter(place: &str, config: &str) -> String {
    filter(&format!(
        "  targetRefs: [{{kind: Gateway, group: gateway.networking.k8s.io, name: wp}}]
  configPatches:
  - applyTo: HTTP_FILTER
    match: {{context: SIDECAR_INBOUND, listener: {{filterChain: {{filter: {{name: envoy.filters.network.http_connection_manager{place}}}}}}}}}
    patch:
      operation: INSERT_BEFORE
      value:
        name: n
        typed_config:
{config}"
    ))
}
fn made(text: &str, target: &str) -> Arc<Treatment> {
    let (state, problems) = mesh7(&(base() + text));
    assert_eq!(told(&problems), [""; 0]);
    Arc::clone(state.treatments.get(target).unwrap_or_else(|| panic!("nothing for {target}: {:?}", state.treatments)))
}
/// What is told about these objects.
fn told(problems: &[Problem]) -> Vec<String> {
    let of = |p: &&Problem| p.origin.object.starts_with("TrafficPolicy") || p.origin.object.starts_with("EnvoyFilter");
    let all = problems.iter().filter(of);
    all.map(|p| format!("{} {}:{} {}; {}", p.severity.as_str(), p.origin.line, p.field, p.message, p.fix)).collect()
}
fn per_minute(n: u32) -> Rate {
    Rate::new(n, n, Duration::from_mins(1)).expect("a rate")
}
fn header(name: &'static str, value: &'static str) -> (HeaderName, HeaderValue) {
    (HeaderName::from_static(name), HeaderValue::from_static(value))
}

#[test]
fn every_section_is_read() {
    let text = policy(
        "p",
        "  rateLimits:
  - name: per-ip
    key: [{sourceIP: {}}]
    tokenBucket: {maxTokens: 100, tokensPerFill: 100, fillInterval: 60s}
    response: {status: 503, headers: {x-local-rate-limit: 'true'}}
  - name: admin
    match: {methods: [POST], paths: ['/admin/*'], headers: {x-plan: free}}
    key: [{header: x-tenant}, {path: {}}, {authority: {}}]
    tokenBucket: {maxTokens: 10, fillInterval: 1s}
    rateLimitHeaders: false
  - name: user
    key: [{claim: realm.tenant}, {sourceIP: {}}]
    tokenBucket: {maxTokens: 5, fillInterval: 1s}
  - name: network
    key: [{sourceIP: {ipv4Prefix: 24, ipv6Prefix: 48}}]
    phase: AfterAuthorization
    tokenBucket: {maxTokens: 5, tokensPerFill: 5, fillInterval: 1h}
  responseHeaders: {set: {X-Frame-Options: DENY}, remove: [x-powered-by]}
  cacheControl: [{paths: ['/static/*'], value: 'public, max-age=31536000'}]
  cors: {allowOrigins: [{exact: https://a.b}], allowCredentials: true}
  compression: {codings: [gzip, br], minBytes: 1000, contentTypes: [Text/HTML], keepStrongETag: true, hideAcceptEncoding: true}
  buffer: {maxRequestBytes: 1048576}",
    );
    let t = made(&text, SERVICE);
    let [per_ip, admin, user, network] = &t.limits[..] else { panic!("{:?}", t.limits) };
    assert_eq!((per_ip.counts.rate, per_ip.point, per_ip.status.as_u16()), (per_minute(100), Point::BeforeAuthentication, 503));
    assert_eq!(per_ip.counts.key, [KeyPart::SourceIp { v4: 32, v6: 64 }]);
    let claim = KeyPart::Claim(Box::new(["realm".into(), "tenant".into()]));
    assert_eq!(user.counts.key, [claim, KeyPart::SourceIp { v4: 32, v6: 64 }]);
    assert_eq!(user.point, Point::AfterAuthorization, "claims are not known before");
    assert_eq!(per_ip.tells, Some(HeaderValue::from_static("100")));
    assert_eq!(per_ip.headers, [header("x-local-rate-limit", "true")]);
    assert_eq!(*per_ip.counts.policy, *"TrafficPolicy a/p");
    assert_eq!((admin.point, admin.tells.is_some()), (Point::AfterAuthorization, false));
    assert_eq!(admin.counts.key.len(), 3);
    assert_eq!(admin.counts.rate, Rate::new(10, 1, Duration::from_secs(1)).expect("a rate"));
    assert_eq!(admin.counts.which.methods, ["POST"]);
    assert_eq!(network.counts.key, [KeyPart::SourceIp { v4: 24, v6: 48 }]);
    assert_eq!(network.point, Point::AfterAuthorization);
    assert_eq!(t.response[0].set, [header("x-frame-options", "DENY")]);
    assert_eq!(t.cache[0].value, "public, max-age=31536000");
    assert!(t.cors.as_ref().is_some_and(|c| c.credentials));
    let expect = Compression {
        codings: vec![Coding::Gzip, Coding::Brotli],
        min_bytes: 1000,
        types: vec!["text/html".into()],
        keep_etag: true,
        hide_accept: true,
    };
    assert_eq!(t.compression.as_deref(), Some(&expect));
    assert_eq!(t.max_request_bytes, Some(1 << 20));
    assert_eq!(t.broken, None);
}

#[test]
fn what_is_wrong_closes_its_targets_and_says_where() {
    let limit = |fields: &str| format!("  rateLimits: [{{{fields}}}]");
    let bucket = "tokenBucket: {maxTokens: 1, fillInterval: 1s}";
    for (spec, expect) in [
        ("  rateLimit: []".to_owned(), "12:spec.rateLimit unknown field `rateLimit`; did you mean `rateLimits`?"),
        (limit(bucket), "12:spec.rateLimits[0].name a limit has a name"),
        (limit("name: x"), "12:spec.rateLimits[0].tokenBucket a limit has a bucket"),
        (limit(&format!("name: x, {bucket}, keys: []")), "12:spec.rateLimits[0].keys unknown field `keys`; did you mean `key`?"),
        (limit(&format!("name: x, {bucket}, key: [{{ip: {{}}}}]")), "12:spec.rateLimits[0].key[0].ip unknown field `ip`"),
        (
            limit(&format!("name: x, {bucket}, key: [{{path: {{}}}}, {{claim: sub}}], phase: BeforeAuthentication")),
            "12:spec.rateLimits[0].key[1] claims are not known before authentication",
        ),
        (limit(&format!("name: x, {bucket}, key: [{{claim: a..b}}]")), "12:spec.rateLimits[0].key[0].claim a claim is a name"),
        (
            limit(&format!("name: x, {bucket}, key: [{{path: {{}}, sourceIP: {{}}}}]")),
            "12:spec.rateLimits[0].key[0] each element of `key` has one field",
        ),
        (
            limit(&format!("name: x, {bucket}, key: [{{sourceIP: {{ipv4Prefix: 33}}}}]")),
            "12:spec.rateLimits[0].key[0].sourceIP.ipv4Prefix a prefix has at most 32 bits",
        ),
        (
            limit("name: x, tokenBucket: {maxTokens: 0, fillInterval: 1s}"),
            "12:spec.rateLimits[0].tokenBucket tokens and interval are at least 1",
        ),
        (
            limit("name: x, tokenBucket: {maxTokens: 1, fillInterval: soon}"),
            "12:spec.rateLimits[0].tokenBucket.fillInterval expected a duration",
        ),
        (
            limit(&format!("name: x, {bucket}, response: {{status: 200}}")),
            "12:spec.rateLimits[0].response.status a refusal has a status from 400 to 599",
        ),
        (
            format!("  rateLimits: [{{name: x, {bucket}}}, {{name: x, {bucket}}}]"),
            "12:spec.rateLimits[1].name there are two limits `x`",
        ),
        ("  compression: {codings: [deflate]}".into(), "12:spec.compression.codings[0] `deflate` is no coding"),
        (
            "  compression: {contentTypes: [text/event-stream]}".into(),
            "12:spec.compression.contentTypes[0] `text/event-stream` is never compressed",
        ),
        ("  compression: {contentTypes: ['text/*']}".into(), "12:spec.compression.contentTypes[0] `text/*` is no media type"),
        ("  buffer: {maxRequestBytes: 0}".into(), "12:spec.buffer.maxRequestBytes a buffer has a size"),
        ("  cacheControl: [{paths: ['/a']}]".into(), "12:spec.cacheControl[0].value for example"),
        ("  responseHeaders: {set: {'a b': c}}".into(), "12:spec.responseHeaders.set[\"a b\"] `a b` is not a header name"),
    ] {
        let (state, problems) = mesh7(&(base() + &policy("p", &spec)));
        let told = told(&problems);
        let line = |t: &String| t.strip_prefix("error ").is_some_and(|t| strip_line(t).starts_with(strip_line(expect)));
        assert!(told.len() == 1 && line(&told[0]), "{spec}: {told:?}");
        let broken = state.treatments[SERVICE].broken.as_ref().expect("closed");
        assert!(broken.starts_with("TrafficPolicy a/p cannot be used: "), "{broken}");
    }
}
fn strip_line(text: &str) -> &str {
    text.split_once(':').map_or(text, |(_, rest)| rest)
}

#[test]
fn targets_decide_what_closes() {
    let with = |targets: &str| policy("p", &format!("  targetRefs: {targets}\n  buffer: {{maxRequestBytes: 1}}"));
    for (targets, binds, says) in [
        ("[{kind: Service, name: s}]", SERVICE, ""),
        ("[{group: gateway.networking.k8s.io, kind: Gateway, name: wp}]", GATEWAY, ""),
        ("[{kind: Service, name: t}]", "service a/t.a.svc.cluster.local", "the service a/t does not exist: through this target"),
        ("[{kind: Gateway, name: wp}]", "namespace a", "the group of a Gateway is gateway.networking.k8s.io"),
        ("[]", "namespace a", "it is bound to Services, ServiceEntries or Gateways by `targetRefs`"),
    ] {
        let (state, problems) = mesh7(&(base() + &with(targets)));
        let bound: Vec<&String> = state.treatments.keys().collect();
        assert_eq!(bound, [binds], "{targets}");
        assert_eq!(state.treatments[binds].broken.is_some(), binds.starts_with("namespace"), "{targets}");
        let told = told(&problems);
        assert!(if says.is_empty() { told.is_empty() } else { told.len() == 1 && told[0].contains(says) }, "{targets}: {told:?}");
    }
}

#[test]
fn policies_of_one_target_are_joined() {
    let text = policy("a", "  buffer: {maxRequestBytes: 10}\n  compression: {codings: [gzip]}")
        + &policy("b", "  buffer: {maxRequestBytes: 5}\n  compression: {codings: [br]}\n  responseHeaders: {set: {x-a: b}}");
    let (state, problems) = mesh7(&(base() + &text));
    let t = &state.treatments[SERVICE];
    assert_eq!(t.max_request_bytes, Some(5));
    assert_eq!(t.compression.as_ref().map(|c| c.codings[0]), Some(Coding::Gzip));
    assert_eq!(t.response.len(), 1);
    let told = told(&problems);
    assert_eq!(told.len(), 1, "{told:?}");
    assert!(told[0].contains("another object says what service a/s.a.svc.cluster.local does about compression"), "{told:?}");
}

#[test]
fn a_good_policy_stays_in_force_and_a_corrected_one_takes_over() {
    let mut t = Translator::new(view(), &layer7());
    let mut state = State::default();
    let mut put = |text: &str| {
        for o in objects(&mut t, text).0 {
            t.upsert(o);
        }
        state.apply(t.flush());
        state.treatments.get(SERVICE).map(|t| (t.max_request_bytes, t.broken.is_some()))
    };
    put(&base());
    assert_eq!(put(&policy("p", "  buffer: {maxRequestBytes: 7}")), Some((Some(7), false)));
    assert_eq!(put(&policy("p", "  buffer: {maxRequestBytes: x}")), Some((Some(7), false)));
    assert_eq!(put(&policy("p", "  buffer: {maxRequestBytes: 8}")), Some((Some(8), false)));
}

const RATE_LIMIT: &str = "          '@type': type.googleapis.com/envoy.extensions.filters.http.local_ratelimit.v3.LocalRateLimit
          stat_prefix: http_local_rate_limiter
          token_bucket: {max_tokens: 100, tokens_per_fill: 100, fill_interval: 60s}
          filter_enabled: {runtime_key: local_rate_limit_enabled, default_value: {numerator: 100, denominator: HUNDRED}}
          filter_enforced: {runtime_key: local_rate_limit_enforced, default_value: {numerator: 100, denominator: HUNDRED}}
          response_headers_to_add: [{append_action: OVERWRITE_IF_EXISTS_OR_ADD, header: {key: x-local-rate-limit, value: 'true'}}]
          enable_x_ratelimit_headers: DRAFT_VERSION_03\n";
const PER_ADDRESS: &str = "          rate_limits: [{actions: [{remote_address: {}}]}]
          descriptors: [{entries: [{key: remote_address}], token_bucket: {max_tokens: 10, tokens_per_fill: 10, fill_interval: 60s}}]\n";

fn limits(t: &Treatment) -> Vec<(Rate, &[KeyPart], Point)> {
    let of = |l: &'_ Limit| (l.counts.rate, l.point);
    t.limits.iter().map(|l| (of(l).0, &l.counts.key[..], of(l).1)).collect()
}

#[test]
fn the_rate_limit_filter_is_understood() {
    let t = made(&http_filter("", RATE_LIMIT), GATEWAY);
    assert_eq!(limits(&t), [(per_minute(100), &[][..], Point::BeforeAuthentication)]);
    assert_eq!(t.limits[0].tells, Some(HeaderValue::from_static("100")));
    assert_eq!(t.limits[0].headers, [header("x-local-rate-limit", "true")]);
    assert_eq!(t.limits[0].status, StatusCode::TOO_MANY_REQUESTS);
    let t = made(&http_filter(", subFilter: {name: envoy.filters.http.router}", &(RATE_LIMIT.to_owned() + PER_ADDRESS)), GATEWAY);
    let address = [KeyPart::SourceIp { v4: 32, v6: 64 }];
    assert_eq!(
        limits(&t),
        [(per_minute(10), &address[..], Point::AfterAuthorization), (per_minute(100), &[], Point::AfterAuthorization)]
    );
    // In a TypedStruct, in camel case, with the descriptors alone.
    let wrapped = "          '@type': type.googleapis.com/udpa.type.v1.TypedStruct
          type_url: type.googleapis.com/envoy.extensions.filters.http.local_ratelimit.v3.LocalRateLimit
          value:
            tokenBucket: {maxTokens: 100, tokensPerFill: 100, fillInterval: 60s}
            filterEnabled: {defaultValue: {numerator: 100}}
            filterEnforced: {defaultValue: {numerator: 1000000, denominator: MILLION}}
            alwaysConsumeDefaultTokenBucket: false
            rateLimits: [{actions: [{requestHeaders: {headerName: x-tenant, descriptorKey: t}}, {genericKey: {descriptorValue: v}}]}]
            descriptors: [{entries: [{key: t}, {key: generic_key, value: v}], tokenBucket: {maxTokens: 9, tokensPerFill: 9, fillInterval: 60s}}]";
    let t = made(&http_filter("", wrapped), GATEWAY);
    assert_eq!(
        limits(&t),
        [(per_minute(9), &[KeyPart::Header(HeaderName::from_static("x-tenant"))][..], Point::BeforeAuthentication)]
    );
    assert_eq!(t.limits[0].tells, None);
}

#[test]
fn the_other_filters_of_the_reference_mesh_are_understood() {
    let edits = "          '@type': type.googleapis.com/envoy.extensions.filters.http.header_mutation.v3.HeaderMutation
          mutations:
            response_mutations:
            - append: {header: {key: X-Frame-Options, value: DENY}, append_action: OVERWRITE_IF_EXISTS_OR_ADD}
            - remove: x-powered-by";
    let t = made(&http_filter("", edits), GATEWAY);
    assert_eq!(t.response[0].set, [header("x-frame-options", "DENY")]);
    assert_eq!(t.response[0].remove, ["x-powered-by"]);
    let lua = "          '@type': type.googleapis.com/envoy.extensions.filters.http.lua.v3.Lua
          inlineCode: |
            -- security headers
            function envoy_on_request(request_handle)
            end
            function envoy_on_response(h)
              h:headers():add(\"X-Content-Type-Options\", \"nosniff\")
              h:headers():replace('X-XSS-Protection', '1; mode=block');
              h:headers():remove(\"server\")
            end";
    let t = made(&http_filter("", lua), GATEWAY);
    assert_eq!(t.response[0].add, [header("x-content-type-options", "nosniff")]);
    assert_eq!(t.response[0].set, [header("x-xss-protection", "1; mode=block")]);
    assert_eq!(t.response[0].remove, ["server"]);
    let cors = filter(
        "  targetRefs: [{kind: Service, name: s}]
  configPatches:
  - applyTo: HTTP_FILTER
    patch: {operation: INSERT_FIRST, value: {name: envoy.filters.http.cors, typed_config: {'@type': type.googleapis.com/envoy.extensions.filters.http.cors.v3.Cors}}}
  - applyTo: VIRTUAL_HOST
    match: {context: SIDECAR_INBOUND}
    patch:
      operation: MERGE
      value:
        response_headers_to_add: [{header: {key: x-a, value: b}, append: false}]
        typed_per_filter_config:
          envoy.filters.http.cors:
            '@type': type.googleapis.com/envoy.extensions.filters.http.cors.v3.CorsPolicy
            allow_origin_string_match: [{exact: https://app.example}, {suffix: .dev.example}]
            allow_methods: GET,POST
            max_age: '600'
            allow_credentials: true",
    );
    let t = made(&cors, SERVICE);
    let cors = t.cors.as_ref().expect("CORS");
    assert_eq!(cors.origins, [StringMatch::Exact("https://app.example".into()), StringMatch::Suffix(".dev.example".into())]);
    assert_eq!((&*cors.methods, cors.max_age, cors.credentials, cors.forward_unmatched), ("GET,POST", Some(600), true, true));
    assert_eq!(t.response[0].set, [header("x-a", "b")]);
    let compressor = "          '@type': type.googleapis.com/envoy.extensions.filters.http.compressor.v3.Compressor
          response_direction_config:
            common_config: {min_content_length: 1024, content_type: [application/json]}
            remove_accept_encoding_header: true
          compressor_library: {name: text_optimized, typed_config: {'@type': type.googleapis.com/envoy.extensions.compression.gzip.compressor.v3.Gzip}}";
    let t = made(&http_filter("", compressor), GATEWAY);
    let c = t.compression.as_ref().expect("compression");
    assert_eq!((&c.codings[..], c.min_bytes, c.hide_accept), (&[Coding::Gzip][..], 1024, true));
    assert_eq!(c.types, ["application/json".into()]);
}

#[test]
fn everything_else_is_refused_with_its_reason() {
    let typed = |kind: &str| format!("          '@type': type.googleapis.com/{kind}");
    for (text, expect) in [
        (
            http_filter("", &typed("envoy.extensions.filters.http.ext_proc.v3.ExternalProcessor")),
            "the filter `n` (ext_proc.v3.ExternalProcessor) is not done here",
        ),
        (http_filter("", &RATE_LIMIT.replace("numerator: 100", "numerator: 50")), "a limit that is not always in force is none"),
        (
            http_filter("", &RATE_LIMIT.replace("filter_enforced", "request_headers_to_add_when_not_enforced")),
            "`request_headers_to_add_when_not_enforced` is not done here",
        ),
        (
            http_filter(", subFilter: {name: envoy.filters.http.cors}", RATE_LIMIT),
            "its place among the filters is not told apart here",
        ),
        (
            http_filter("", &(RATE_LIMIT.to_owned() + PER_ADDRESS).replace("{remote_address: {}}", "{destination_cluster: {}}")),
            "`destination_cluster` is not done here",
        ),
        (
            http_filter("", &(RATE_LIMIT.to_owned() + PER_ADDRESS).replace("key: remote_address", "key: client")),
            "no `rate_limits` of this filter make these entries",
        ),
        (
            http_filter(
                "",
                &(typed("envoy.extensions.filters.http.lua.v3.Lua")
                    + "\n          inline_code: |\n            function envoy_on_response(h)\n              os.execute('x')\n            end"),
            ),
            "scripts are not run, and `os.execute('x')` is not the edit of a response header",
        ),
        (
            http_filter(
                "",
                &(typed("envoy.extensions.filters.http.header_mutation.v3.HeaderMutation")
                    + "\n          mutations: {request_mutations: []}"),
            ),
            "`request_mutations` is not done here",
        ),
        (
            filter("  workloadSelector: {labels: {app: x}}\n  configPatches: []"),
            "no waypoint or gateway is selected by labels; this filter is for sidecars",
        ),
        (
            filter(
                "  targetRefs: [{kind: Service, name: s}]\n  configPatches: [{applyTo: CLUSTER, patch: {operation: MERGE, value: {a: b}}}]",
            ),
            "MERGE of CLUSTER is not done here",
        ),
        (
            filter(
                "  targetRefs: [{kind: Service, name: s}]\n  configPatches: [{applyTo: HTTP_FILTER, match: {context: SIDECAR_OUTBOUND}, patch: {operation: INSERT_FIRST, value: {name: x}}}]",
            ),
            "this is not what a waypoint or gateway does",
        ),
    ] {
        let (state, problems) = mesh7(&(base() + &text));
        let told = told(&problems);
        assert!(told.len() == 1 && told[0].starts_with("error") && told[0].contains(expect), "{expect}: {told:?}");
        // Whatever it names is closed; what names nothing here is for sidecars.
        assert!(state.treatments.values().all(|t| t.broken.is_some()));
        assert_eq!(state.treatments.is_empty(), text.contains("workloadSelector"), "{expect}");
    }
}
#[test]
fn the_agent_leaves_them_alone() {
    let (state, problems) = mesh(&(base() + &policy("p", "  buffer: {maxRequestBytes: 1}") + &http_filter("", RATE_LIMIT)));
    assert!(state.treatments.is_empty());
    assert!(problems.iter().all(|p| p.severity == Severity::Note), "{problems:?}");
}
