//! TrafficPolicies, and EnvoyFilters that say the same: limits, headers, caching, compression, CORS, largest body.
use anyhow::{Context as _, ensure};
use mesh_tests::wait;

use crate::mesh::{Got, Mesh, OTHER, WEB, curl};

fn policy(name: &str, target: &str, spec: &str) -> String {
    let target = match target.split_once('/') {
        Some(("Gateway", name)) => format!("{{ group: gateway.networking.k8s.io, kind: Gateway, name: {name} }}"),
        _ => format!("{{ kind: Service, name: {target} }}"),
    };
    format!(
        "apiVersion: culvert.dev/v1alpha1\nkind: TrafficPolicy\nmetadata: {{ name: {name}, namespace: t }}\nspec:\n  targetRefs: [ {target} ]\n{spec}"
    )
}
/// Status and the three headers of a limit.
fn told(got: &Got) -> (u16, [Option<&str>; 3]) {
    (got.status, ["limit", "remaining", "reset"].map(|h| got.header(&format!("x-ratelimit-{h}"))))
}

pub(crate) fn the_sixth_of_five_is_refused(mesh: &mut Mesh) -> anyhow::Result<()> {
    let spec = |most: u32| {
        format!(
            "  rateLimits:
  - name: per-ip
    match: {{ paths: [ '/limited*' ] }}
    key: [ {{ sourceIP: {{}} }} ]
    tokenBucket: {{ maxTokens: {most}, tokensPerFill: 5, fillInterval: 1h }}
    response: {{ headers: {{ x-local-rate-limit: 'true' }} }}\n"
        )
    };
    let limits = mesh.objects("limits", &policy("limits", "web", &spec(5)))?;
    let url = format!("http://{WEB}/limited?x=1");
    for left in (0..5).rev() {
        let got = mesh.call(&[&url])?;
        let (status, [limit, remaining, reset]) = told(&got);
        let reset: u32 = reset.and_then(|r| r.parse().ok()).context("x-ratelimit-reset")?;
        ensure!((status, limit, remaining) == (200, Some("5"), Some(&*left.to_string())), "{left}: {got:?}");
        // The next token is 12 minutes away once there is none.
        ensure!(if left == 0 { (600..=720).contains(&reset) } else { reset == 0 }, "{left}: {got:?}");
    }
    let before = mesh.web["web1"].requests() + mesh.web["web2"].requests();
    let got = mesh.call(&[&url])?;
    let (status, [limit, remaining, reset]) = told(&got);
    ensure!((status, limit, remaining, &*got.body) == (429, Some("5"), Some("0"), "local_rate_limited"), "{got:?}");
    ensure!(reset.and_then(|r| r.parse().ok()).is_some_and(|r: u32| (600..=720).contains(&r)), "{got:?}");
    ensure!(got.header("x-local-rate-limit") == Some("true") && got.header("content-type") == Some("text/plain"), "{got:?}");
    ensure!(got.header("x-culvert-reason") == Some("rate_limited"), "{got:?}");
    ensure!(mesh.web["web1"].requests() + mesh.web["web2"].requests() == before, "a refused request goes nowhere");
    let got = mesh.call(&[&format!("http://{WEB}/free")])?;
    ensure!(told(&got) == (200, [None; 3]), "only what matches is counted: {got:?}");
    ensure!(mesh.call(&[&format!("http://{OTHER}/limited")])?.status == 200, "another service has no limit");
    let labels = [("response_code", "429"), ("response_flags", "RL")];
    wait::until_true("the refusal in the metrics", || {
        mesh.proxy("wp").metrics().is_ok_and(|page| page.sum("istio_requests_total", &labels) >= 1.0)
    })?;
    let dump = mesh.proxy("wp").config_dump()?;
    let shown = &dump["traffic"][0];
    ensure!(shown["target"] == "service t/web.t.svc.cluster.local" && shown["rateLimits"][0]["name"] == "per-ip", "{shown}");
    // What has nothing to do with the limit does not touch its buckets; a new limit has new ones.
    let dress = mesh.objects("dress", &policy("dress", "web", "  responseHeaders: { set: { x-a: b } }\n"))?;
    ensure!(mesh.call(&[&url])?.status == 429, "a bucket outlives other changes");
    drop(dress);
    ensure!(mesh.call(&[&url])?.status == 429, "a bucket outlives other changes");
    drop(limits);
    let _limits = mesh.objects("limits", &policy("limits", "web", &spec(7)))?;
    let got = mesh.call(&[&url])?;
    ensure!(told(&got) == (200, [Some("7"), Some("6"), Some("0")]), "{got:?}");
    Ok(())
}

pub(crate) fn buckets_are_apart_by_their_key(mesh: &mut Mesh) -> anyhow::Result<()> {
    let spec = "  rateLimits:
  - name: tenant
    key: [ { header: x-tenant }, { path: {} } ]
    tokenBucket: { maxTokens: 2, fillInterval: 1h }
  - name: all
    tokenBucket: { maxTokens: 9, fillInterval: 1h }\n";
    let _limits = mesh.objects("limits", &policy("keys", "web", spec))?;
    let ask = |tenant: Option<&str>, path: &str| -> anyhow::Result<u16> {
        let header = tenant.map(|t| format!("x-tenant: {t}"));
        let url = format!("http://{WEB}{path}");
        let mut args = vec![url.as_str()];
        args.extend(header.iter().flat_map(|h| ["-H", h]));
        Ok(mesh.call(&args)?.status)
    };
    for (tenant, path, expect) in [
        (Some("a"), "/1", 200),
        (Some("a"), "/1?x", 200),
        (Some("a"), "/1?y", 429),
        (Some("a"), "/2", 200),
        (Some("b"), "/1", 200),
        (None, "/1", 200),
        (None, "/1", 200),
        // Leaving the header away is no way around.
        (None, "/1", 429),
        (Some("c"), "/1", 200),
        (Some("d"), "/1", 200),
        (Some("e"), "/1", 200),
        // Nine in all.
        (Some("f"), "/1", 429),
    ] {
        let got = ask(tenant, path)?;
        ensure!(got == expect, "{tenant:?} {path}: {got}");
    }
    Ok(())
}

pub(crate) fn the_gateway_counts_by_client_address(mesh: &mut Mesh) -> anyhow::Result<()> {
    let outside = mesh.topology.host("outside").clone();
    let gateway = mesh.pod("gw").clone();
    let spec = "  rateLimits:
  - name: per-ip
    key: [ { sourceIP: {} } ]
    tokenBucket: { maxTokens: 3, fillInterval: 1h }
  responseHeaders: { set: { X-Frame-Options: DENY }, remove: [ server ] }\n";
    let _limits = mesh.objects("limits", &policy("edge", "Gateway/gw", spec))?;
    let host = ["-H", "host: web.example"];
    let by_v4 = format!("http://{}/shop", gateway.v4);
    let by_v6 = format!("http://[{}]/shop", gateway.v6);
    let ask = |url: &str, more: &[&str]| curl(&outside, &[&host[..], more, &[url]].concat());
    for _ in 0..3 {
        let got = ask(&by_v4, &[])?;
        ensure!(got.status == 200 && got.header("x-frame-options") == Some("DENY") && got.header("server").is_none(), "{got:?}");
    }
    // Who the client says it is does not count.
    let got = ask(&by_v4, &["-H", "x-forwarded-for: 192.0.2.7"])?;
    ensure!(got.status == 429 && got.header("x-frame-options") == Some("DENY"), "{got:?}");
    let got = ask(&by_v6, &[])?;
    ensure!(told(&got) == (200, [Some("3"), Some("2"), Some("0")]), "another address has its own bucket: {got:?}");
    ensure!(mesh.call(&[&format!("http://{WEB}/")])?.status == 200, "the waypoint is not the gateway");
    Ok(())
}

pub(crate) fn answers_are_compressed_as_asked(mesh: &mut Mesh) -> anyhow::Result<()> {
    let spec = "  compression: { codings: [ zstd, br, gzip ], minBytes: 200 }
  cacheControl: [ { paths: [ '/static/*' ], value: 'public, max-age=31536000' } ]
  responseHeaders: { set: { X-Content-Type-Options: nosniff } }\n";
    let _policy = mesh.objects("compress", &policy("compress", "web", spec))?;
    let ask = |accept: &str, more: &[&str]| {
        let accept = format!("accept-encoding: {accept}");
        let url = format!("http://{WEB}/static/a");
        mesh.call(&[&["--compressed", "-H", &accept], more, &[&url]].concat())
    };
    for (accept, coding) in [
        ("gzip", Some("gzip")),
        ("gzip, br", Some("br")),
        ("gzip;q=1, br;q=0.5, zstd;q=0", Some("gzip")),
        ("*", Some("zstd")),
        ("gzip;q=0", None),
        ("identity", None),
    ] {
        let got = ask(accept, &[])?;
        ensure!(got.status == 200 && got.header("content-encoding") == coding, "{accept}: {got:?}");
        ensure!(got.header("vary") == Some("Accept-Encoding"), "{accept}: {got:?}");
        ensure!(got.header("content-length").is_none() == coding.is_some(), "{accept}: {got:?}");
        ensure!(got.header("cache-control") == Some("public, max-age=31536000"), "{got:?}");
        ensure!(got.header("x-content-type-options") == Some("nosniff"), "{got:?}");
        ensure!(got.echo()?["path"] == "/static/a", "what was packed is unpacked: {got:?}");
    }
    let head = ask("gzip", &["-I"])?;
    ensure!(head.header("content-encoding").is_none() && head.header("vary").is_some(), "{head:?}");
    let got = mesh.call(&["-H", "accept-encoding: gzip", &format!("http://{WEB}/")])?;
    ensure!(got.header("cache-control").is_none(), "only what the rule names: {got:?}");
    Ok(())
}

pub(crate) fn large_bodies_are_refused(mesh: &mut Mesh) -> anyhow::Result<()> {
    let _policy = mesh.objects("buffer", &policy("buffer", "web", "  buffer: { maxRequestBytes: 1000 }\n"))?;
    let url = format!("http://{WEB}/body");
    let (fits, large) = ("x".repeat(1000), "x".repeat(1001));
    for version in ["--http1.1", "--http2-prior-knowledge"] {
        for chunked in [&[][..], &["-H", "transfer-encoding: chunked"]] {
            if version != "--http1.1" && !chunked.is_empty() {
                continue;
            }
            let ask = |body: &str| mesh.call(&[&[version, "-H", "expect:", "--data-binary", body], chunked, &[&url]].concat());
            let got = ask(&fits)?;
            ensure!(got.status == 200 && got.echo()?["body"] == fits, "{version} {chunked:?}: {got:?}");
            let got = ask(&large)?;
            ensure!(got.status == 413 && got.body == "Payload Too Large", "{version} {chunked:?}: {got:?}");
            ensure!(got.header("x-culvert-reason") == Some("body_too_large"), "{got:?}");
        }
    }
    Ok(())
}

const FILTERS: &str = r"
apiVersion: networking.istio.io/v1alpha3
kind: EnvoyFilter
metadata: { name: known, namespace: t }
spec:
  targetRefs: [ { kind: Service, name: web } ]
  configPatches:
  - applyTo: HTTP_FILTER
    match: { context: SIDECAR_INBOUND, listener: { filterChain: { filter: { name: envoy.filters.network.http_connection_manager } } } }
    patch:
      operation: INSERT_BEFORE
      value:
        name: envoy.filters.http.local_ratelimit
        typed_config:
          '@type': type.googleapis.com/udpa.type.v1.TypedStruct
          type_url: type.googleapis.com/envoy.extensions.filters.http.local_ratelimit.v3.LocalRateLimit
          value:
            stat_prefix: http_local_rate_limiter
            token_bucket: { max_tokens: 3, tokens_per_fill: 3, fill_interval: 3600s }
            filter_enabled: { default_value: { numerator: 100, denominator: HUNDRED } }
            filter_enforced: { default_value: { numerator: 100, denominator: HUNDRED } }
            enable_x_ratelimit_headers: DRAFT_VERSION_03
  - applyTo: VIRTUAL_HOST
    patch:
      operation: MERGE
      value:
        response_headers_to_add: [ { header: { key: X-XSS-Protection, value: 1; mode=block }, append_action: OVERWRITE_IF_EXISTS_OR_ADD } ]
        typed_per_filter_config:
          envoy.filters.http.cors:
            '@type': type.googleapis.com/envoy.extensions.filters.http.cors.v3.CorsPolicy
            allow_origin_string_match: [ { exact: https://app.example } ]
            allow_methods: GET,POST
            allow_credentials: true
---
apiVersion: networking.istio.io/v1alpha3
kind: EnvoyFilter
metadata: { name: unknown, namespace: t }
spec:
  targetRefs: [ { kind: Service, name: other } ]
  configPatches:
  - applyTo: HTTP_FILTER
    patch:
      operation: INSERT_FIRST
      value: { name: wasm, typed_config: { '@type': type.googleapis.com/envoy.extensions.filters.http.wasm.v3.Wasm } }
";

pub(crate) fn known_envoy_filters_work_and_others_are_told(mesh: &mut Mesh) -> anyhow::Result<()> {
    let _filters = mesh.objects("filters", FILTERS)?;
    let url = format!("http://{WEB}/");
    let origin = ["-H", "origin: https://app.example"];
    let preflight = [&origin[..], &["-X", "OPTIONS", "-H", "access-control-request-method: GET", &url]].concat();
    let got = mesh.call(&preflight)?;
    ensure!(got.status == 200 && got.body.is_empty(), "{got:?}");
    ensure!(got.header("access-control-allow-origin") == Some("https://app.example"), "{got:?}");
    ensure!(got.header("access-control-allow-methods") == Some("GET,POST"), "{got:?}");
    // The limit is first of all: it counted the preflight.
    ensure!(told(&got) == (200, [Some("3"), Some("2"), Some("0")]), "{got:?}");
    let got = mesh.call(&[&origin[..], &[&url]].concat())?;
    ensure!(got.header("access-control-allow-credentials") == Some("true"), "{got:?}");
    ensure!(got.header("x-xss-protection") == Some("1; mode=block"), "{got:?}");
    ensure!(mesh.call(&[&url])?.status == 200 && mesh.call(&[&url])?.status == 429, "three in all");
    let dump = mesh.proxy("wp").config_dump()?;
    let problems = dump["problems"].as_array().context("problems")?;
    let about: Vec<String> = problems.iter().map(ToString::to_string).filter(|p| p.contains("EnvoyFilter")).collect();
    ensure!(about.len() == 1, "{about:?}");
    ensure!(
        about[0].contains("EnvoyFilter t/unknown") && about[0].contains("`wasm` (wasm.v3.Wasm) is not done here"),
        "{about:?}"
    );
    let got = mesh.call(&[&format!("http://{OTHER}/")])?;
    ensure!(got.status == 500 && got.header("x-culvert-reason") == Some("policy_unusable"), "what it named is closed: {got:?}");
    Ok(())
}

pub(crate) fn a_broken_policy_closes_its_targets_only(mesh: &mut Mesh) -> anyhow::Result<()> {
    let url = format!("http://{WEB}/");
    let broken = mesh.objects("broken", &policy("broken", "web", "  bufer: { maxRequestBytes: 1000 }\n"))?;
    let got = mesh.call(&[&url])?;
    ensure!(got.status == 500 && got.header("x-culvert-reason") == Some("policy_unusable"), "{got:?}");
    ensure!(mesh.call(&[&format!("http://{OTHER}/")])?.status == 200);
    drop(broken);
    ensure!(mesh.call(&[&url])?.status == 200);
    Ok(())
}
