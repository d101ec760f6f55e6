//! Every phase of an exchange, through two agents and the waypoint (`waypoint/src/exchange.rs` lists them).
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use mesh_tests::grpc::Grpc;
use mesh_tests::raw::Raw;
use mesh_tests::wait;
use serde_json::Value;

use crate::mesh::{GRPC, GRPC_PORT, Mesh, OTHER, WEB};

/// A VirtualService of `other` with these `http` rules.
fn rules(yaml: &str) -> String {
    format!(
        "apiVersion: networking.istio.io/v1\nkind: VirtualService\nmetadata: {{ name: rules, namespace: t }}\nspec:\n  hosts: [ other ]\n  http:\n{yaml}"
    )
}
/// An HTTPRoute of `other` with this spec beside its parent.
fn http_route(spec: &str) -> String {
    format!(
        "apiVersion: gateway.networking.k8s.io/v1\nkind: HTTPRoute\nmetadata: {{ name: rules, namespace: t }}\nspec:\n  parentRefs: [ {{ group: \"\", kind: Service, name: other }} ]\n{spec}"
    )
}

fn at(path: &str) -> String {
    format!("http://{OTHER}{path}")
}

pub(crate) fn rules_match_by_everything_they_name(mesh: &mut Mesh) -> anyhow::Result<()> {
    let _rules = mesh.objects(
        "matches",
        &rules(
            r#"
  - { match: [ { method: { exact: PUT } } ], directResponse: { status: 201 } }
  - { match: [ { headers: { x-kind: { regex: "a[0-9]+" } } } ], directResponse: { status: 202 } }
  - { match: [ { uri: { prefix: /without }, withoutHeaders: { x-kind: {} } } ], directResponse: { status: 203 } }
  - { match: [ { queryParams: { v: { exact: "2" } } } ], directResponse: { status: 206 } }
  - { match: [ { uri: { regex: "/r[ae]gex/.*" } } ], directResponse: { status: 210 } }
  - { match: [ { uri: { exact: /Loud }, ignoreUriCase: true } ], directResponse: { status: 211 } }
  - { match: [ { authority: { prefix: special. } } ], directResponse: { status: 212 } }
  - { match: [ { uri: { prefix: /port }, port: 81 }, { uri: { prefix: /port }, port: 80, scheme: { exact: http } } ], directResponse: { status: 213 } }
  - { match: [ { uri: { prefix: /a/b } } ], directResponse: { status: 214 } }
  - directResponse: { status: 299 }
"#,
        ),
    )?;
    for (args, path, status) in [
        (&["-X", "PUT"][..], "/x", 201),
        (&["-H", "x-kind: a12"], "/x", 202),
        (&["-H", "x-kind: a12b"], "/x", 299),
        (&[], "/without", 203),
        (&["-H", "x-kind: b"], "/without", 299),
        (&[], "/x?u=1&v=2", 206),
        (&[], "/x?v=22", 299),
        (&[], "/regex/1", 210),
        (&[], "/rogex/1", 299),
        (&[], "/lOUD", 211),
        (&["-H", "host: special.example"], "/x", 212),
        (&[], "/port", 213),
        // Normalised before it is matched, and a prefix of text, not of segments.
        (&["--path-as-is"], "/a/./c/../b", 214),
        (&["--path-as-is"], "/a/%62c", 214),
        (&[], "/a/bc", 214),
    ] {
        let url = at(path);
        let args: Vec<&str> = args.iter().copied().chain([url.as_str()]).collect();
        let got = mesh.call(&args)?;
        ensure!(got.status == status, "{args:?}: {got:?}, wanted {status}");
    }
    Ok(())
}

pub(crate) fn faults_are_injected(mesh: &mut Mesh) -> anyhow::Result<()> {
    let _rules = mesh.objects(
        "faults",
        &rules(
            r"
  - match: [ { uri: { exact: /late } } ]
    fault: { delay: { percentage: { value: 100 }, fixedDelay: 300ms } }
    route: [ { destination: { host: other } } ]
  - match: [ { uri: { exact: /gone } } ]
    fault: { abort: { percentage: { value: 100 }, httpStatus: 418 } }
    route: [ { destination: { host: other } } ]
  - match: [ { uri: { exact: /both } } ]
    fault: { delay: { percentage: { value: 100 }, fixedDelay: 200ms }, abort: { percentage: { value: 100 }, httpStatus: 503 } }
    route: [ { destination: { host: other } } ]
  - match: [ { uri: { prefix: /grpc } } ]
    fault: { abort: { percentage: { value: 100 }, grpcStatus: UNAVAILABLE } }
    route: [ { destination: { host: other } } ]
  - match: [ { uri: { exact: /never } } ]
    fault: { abort: { percentage: { value: 0 }, httpStatus: 500 } }
    route: [ { destination: { host: other } } ]
",
        ),
    )?;
    let before = mesh.web["web1"].requests();
    let begun = Instant::now();
    ensure!(mesh.call(&[&at("/late")])?.status == 200 && begun.elapsed() >= Duration::from_millis(300), "{:?}", begun.elapsed());
    let got = mesh.call(&[&at("/gone")])?;
    ensure!(got.status == 418 && got.body == "fault filter abort", "{got:?}");
    let begun = Instant::now();
    ensure!(mesh.call(&[&at("/both")])?.status == 503 && begun.elapsed() >= Duration::from_millis(200), "{:?}", begun.elapsed());
    let got = mesh.call(&["-X", "POST", "-H", "content-type: application/grpc", &at("/grpc.Svc/Do")])?;
    ensure!(got.status == 200 && got.header("grpc-status") == Some("14"), "{got:?}");
    ensure!(got.header("grpc-message") == Some("fault filter abort"), "{got:?}");
    ensure!(mesh.call(&[&at("/never")])?.status == 200);
    ensure!(mesh.web["web1"].requests() == before + 2, "what was aborted did not reach the endpoint");
    Ok(())
}

/// What the client takes to send its request is not the endpoint's time.
pub(crate) fn a_limit_of_time_begins_with_the_end_of_the_request(mesh: &mut Mesh) -> anyhow::Result<()> {
    let _rules = mesh.objects(
        "limits-of-time",
        &rules("\n  - timeout: 1s\n    retries: { attempts: 1, perTryTimeout: 800ms }\n    route: [ { destination: { host: other } } ]\n"),
    )?;
    let late = |head: &str, rest: &str| -> anyhow::Result<u16> {
        let mut raw = Raw::say(mesh.pod("client"), format!("{OTHER}:80").parse()?, format!("{head}\r\n").as_bytes())?;
        std::thread::sleep(Duration::from_millis(1200));
        raw.send(rest.as_bytes())?;
        Ok(raw.answer()?.status)
    };
    let head = |path: &str, length: &str| format!("POST {path} HTTP/1.1\r\nhost: other\r\n{length}\r\n");
    ensure!(late(&head("/up", "content-length: 5"), "hello")? == 200, "a late body of a known length");
    ensure!(late(&head("/up", "transfer-encoding: chunked"), "5\r\nhello\r\n0\r\n\r\n")? == 200, "a late body");
    let begun = Instant::now();
    ensure!(late(&head("/slow/6000", "content-length: 5"), "hello")? == 504, "a late answer to a late body");
    let took = begun.elapsed();
    ensure!(took >= Duration::from_millis(1900) && took < Duration::from_secs(6), "{took:?}");
    ensure!(mesh.call(&[&at("/slow/6000")])?.status == 504);
    Ok(())
}

pub(crate) fn cors_is_answered_and_added(mesh: &mut Mesh) -> anyhow::Result<()> {
    let _rules = mesh.objects(
        "cors",
        &rules(
            r"
  - match: [ { uri: { prefix: /cors/strict } } ]
    corsPolicy: { allowOrigins: [ { regex: 'https://r[0-9]+[.]example' } ], allowMethods: [ GET ], unmatchedPreflights: IGNORE }
    route: [ { destination: { host: other } } ]
  - corsPolicy:
      allowOrigins: [ { exact: https://shop.example } ]
      allowMethods: [ GET, PUT ]
      allowHeaders: [ x-token ]
      exposeHeaders: [ x-seen ]
      maxAge: 10m
      allowCredentials: true
    route: [ { destination: { host: other } } ]
",
        ),
    )?;
    let before = mesh.web["web1"].requests();
    let preflight = ["-X", "OPTIONS", "-H", "access-control-request-method: PUT"];
    let to = |path: &str, origin: &str, more: &[&str]| {
        let (origin, url) = (format!("origin: {origin}"), at(path));
        let args: Vec<&str> = more.iter().copied().chain(["-H", &origin, &url]).collect();
        mesh.call(&args)
    };
    let from = |origin: &str, more: &[&str]| to("/cors", origin, more);
    let got = from("https://shop.example", &preflight)?;
    ensure!(got.status == 200 && got.body.is_empty(), "{got:?}");
    for (name, value) in [
        ("access-control-allow-origin", "https://shop.example"),
        ("access-control-allow-credentials", "true"),
        ("access-control-allow-methods", "GET,PUT"),
        ("access-control-allow-headers", "x-token"),
        ("access-control-max-age", "600"),
    ] {
        ensure!(got.header(name) == Some(value), "{name}: {got:?}");
    }
    ensure!(mesh.web["web1"].requests() == before, "a preflight is answered here");
    let got = from("https://shop.example", &[])?;
    ensure!(got.status == 200 && got.header("access-control-allow-origin") == Some("https://shop.example"), "{got:?}");
    ensure!(got.header("access-control-expose-headers") == Some("x-seen"), "{got:?}");
    let got = from("https://evil.example", &[])?;
    ensure!(got.status == 200 && got.header("access-control-allow-origin").is_none(), "{got:?}");
    let got = from("https://evil.example", &preflight)?;
    ensure!(got.status == 200 && got.echo()?["method"] == "OPTIONS", "an unmatched preflight goes on: {got:?}");
    let before = mesh.web["web1"].requests();
    for (origin, allowed) in [("https://r12.example", Some("https://r12.example")), ("https://r12.example.evil", None)] {
        let got = to("/cors/strict", origin, &preflight)?;
        ensure!(got.status == 200 && got.header("access-control-allow-origin") == allowed, "{origin}: {got:?}");
    }
    ensure!(mesh.web["web1"].requests() == before, "`unmatchedPreflights: IGNORE` answers here, too");
    Ok(())
}

pub(crate) fn headers_are_edited_at_route_and_destination(mesh: &mut Mesh) -> anyhow::Result<()> {
    let _rules = mesh.objects(
        "edits",
        &rules(
            r"
  - headers:
      request: { set: { x-set: route, x-both: route }, add: { x-add: route }, remove: [ x-gone ] }
      response: { set: { x-answer: route }, remove: [ content-type ] }
    route:
    - destination: { host: other }
      headers:
        request: { set: { x-both: destination }, add: { x-add: destination } }
        response: { add: { x-more: destination } }
",
        ),
    )?;
    let got = mesh.call(&["-H", "x-gone: 1", "-H", "x-set: client", "-H", "x-add: client", &at("/edits")])?;
    let echo = got.echo()?;
    let headers = &echo["headers"];
    ensure!(headers["x-set"] == "route" && headers["x-gone"].is_null(), "{echo}");
    // Of a single destination istiod makes a part of the route, after the route's own: what is set last stays.
    ensure!(headers["x-both"] == "destination" && headers["x-add"] == "destination", "{echo}");
    ensure!(got.header("x-answer") == Some("route") && got.header("x-more") == Some("destination"), "{got:?}");
    ensure!(got.header("content-type").is_none(), "{got:?}");
    Ok(())
}

pub(crate) fn mirrors_get_a_copy_of_their_own(mesh: &mut Mesh) -> anyhow::Result<()> {
    let _rules = mesh.objects(
        "mirror",
        &rules(
            r"
  - match: [ { uri: { prefix: /mirrored } } ]
    mirrors:
    - { destination: { host: web, subset: v2 }, percentage: { value: 100 } }
    - { destination: { host: web, subset: v1 }, percentage: { value: 0 } }
    route: [ { destination: { host: other } } ]
",
        ),
    )?;
    let got = mesh.call(&["-d", "the order", "-H", "host: other.example:80", &at("/mirrored")])?;
    ensure!(got.status == 200 && got.echo()?["name"] == "web1" && got.echo()?["body"] == "the order", "{got:?}");
    let copy: Value = wait::until("the copy", wait::PATIENCE, || mesh.web["web2"].seen("/mirrored").pop())?;
    ensure!(copy["body"] == "the order" && copy["headers"]["host"] == "other.example-shadow:80", "{copy}");
    ensure!(copy["headers"]["x-envoy-internal"] == "true", "{copy}");
    ensure!(copy["headers"]["x-request-id"] == got.echo()?["headers"]["x-request-id"], "{copy}");
    ensure!(mesh.web["web1"].seen("/mirrored").len() == 1, "none of the copies that are switched off");
    // However large it is and however slow the copy: the request itself arrives whole.
    let large = mesh.logs.path().join("large");
    std::fs::write(&large, "x".repeat(300_000))?;
    let data = format!("@{}", large.display());
    for _ in 0..10 {
        let got = mesh.call(&["--data-binary", &data, "-H", "expect:", &at("/mirrored/large")])?;
        ensure!(got.status == 200 && got.echo()?["body"].as_str().map(str::len) == Some(300_000), "{}", got.head);
    }
    Ok(())
}

pub(crate) fn delegates_are_part_of_their_root(mesh: &mut Mesh) -> anyhow::Result<()> {
    let _rules = mesh.objects(
        "delegates",
        &format!(
            "{}---\napiVersion: networking.istio.io/v1\nkind: VirtualService\nmetadata: {{ name: leaf, namespace: t }}\nspec:\n  http:\n  - match: [ {{ uri: {{ prefix: /tree/leaf }} }} ]\n    rewrite: {{ uri: /cut }}\n    route: [ {{ destination: {{ host: other }} }} ]\n",
            rules("  - { match: [ { uri: { prefix: /tree } } ], delegate: { name: leaf } }\n")
        ),
    )?;
    let got = mesh.call(&[&at("/tree/leaf/1")])?;
    ensure!(got.echo()?["path"] == "/cut/1", "{got:?}");
    ensure!(mesh.call(&[&at("/tree/bark")])?.status == 404 && mesh.call(&[&at("/leaf")])?.status == 404);
    Ok(())
}

pub(crate) fn an_http_route_does_as_it_says(mesh: &mut Mesh) -> anyhow::Result<()> {
    let _route = mesh.objects(
        "http-route",
        &http_route(
            r#"
  rules:
  - matches: [ { path: { type: PathPrefix, value: /api } } ]
    filters:
    - { type: RequestHeaderModifier, requestHeaderModifier: { set: [ { name: x-set, value: route } ], remove: [ x-gone ] } }
    - { type: ResponseHeaderModifier, responseHeaderModifier: { add: [ { name: x-answer, value: route } ] } }
    - { type: URLRewrite, urlRewrite: { hostname: inner.example, path: { type: ReplacePrefixMatch, replacePrefixMatch: /v2 } } }
    - { type: RequestMirror, requestMirror: { backendRef: { name: web, port: 80 }, percent: 100 } }
    backendRefs: [ { name: other, port: 80 } ]
  - matches: [ { path: { type: Exact, value: /api/exact } } ]
    filters: [ { type: RequestRedirect, requestRedirect: { hostname: there.example, statusCode: 301, path: { type: ReplaceFullPath, replaceFullPath: /x } } } ]
  - matches: [ { path: { type: PathPrefix, value: /weights } } ]
    backendRefs: [ { name: other, port: 80, weight: 0 }, { name: web, port: 80, weight: 1 } ]
  - matches: [ { path: { type: PathPrefix, value: /none } } ]
    backendRefs: [ { name: nowhere, port: 80 } ]
  - matches: [ { path: { type: PathPrefix, value: /elsewhere } } ]
    backendRefs: [ { name: far, namespace: u, port: 80 } ]
  - matches: [ { path: { type: PathPrefix, value: /slow } } ]
    timeouts: { request: 200ms }
    backendRefs: [ { name: other, port: 80 } ]
  - matches: [ { path: { type: Exact, value: /slow/1001 } } ]
    timeouts: { backendRequest: 200ms }
    backendRefs: [ { name: other, port: 80 } ]
  - matches: [ { path: { type: Exact, value: /slow/1002 } } ]
    timeouts: { request: 5s, backendRequest: 200ms }
    retry: { attempts: 1, codes: [ 504 ], backoff: 10ms }
    backendRefs: [ { name: other, port: 80 } ]
  - matches: [ { path: { type: RegularExpression, value: '/n[0-9]+/x' } } ]
    filters: [ { type: URLRewrite, urlRewrite: { path: { type: ReplaceFullPath, replaceFullPath: /whole } } } ]
    backendRefs: [ { name: other, port: 80 } ]
  - matches: [ { path: { type: PathPrefix, value: /moved } } ]
    filters: [ { type: RequestRedirect, requestRedirect: { scheme: https, port: 8443, path: { type: ReplacePrefixMatch, replacePrefixMatch: /here } } } ]
  - matches: [ { path: { type: PathPrefix, value: /cors } } ]
    filters: [ { type: CORS, cors: { allowOrigins: [ 'https://*.shop.example' ], allowMethods: [ PUT ] } } ]
    backendRefs: [ { name: other, port: 80 } ]
  - matches: [ { path: { type: PathPrefix, value: /half } } ]
    filters: [ { type: RequestMirror, requestMirror: { backendRef: { name: web, port: 80 }, fraction: { numerator: 0 } } } ]
    backendRefs:
    - { name: other, port: 80, filters: [ { type: RequestHeaderModifier, requestHeaderModifier: { add: [ { name: x-add, value: backend } ] } } ] }
  - matches: [ { path: { type: PathPrefix, value: /fail } } ]
    retry: { codes: [ 503 ], attempts: 3, backoff: 10ms }
    backendRefs: [ { name: other, port: 80 } ]
  - matches: [ { method: PATCH, headers: [ { name: x-a, value: "1" } ], queryParams: [ { name: q, value: z } ] } ]
    backendRefs: [ { name: other, port: 80 } ]
"#,
        ),
    )?;
    let got = mesh.call(&["-H", "x-gone: 1", &at("/api/a?q=1")])?;
    let echo = got.echo()?;
    ensure!(echo["path"] == "/v2/a?q=1" && echo["headers"]["host"] == "inner.example", "{echo}");
    ensure!(echo["headers"]["x-set"] == "route" && echo["headers"]["x-gone"].is_null(), "{echo}");
    ensure!(got.header("x-answer") == Some("route"), "{got:?}");
    wait::until_true("the copy", || ["web1", "web2"].iter().any(|n| mesh.web[n].seen("/v2/a").iter().any(is_shadow)))?;
    let got = mesh.call(&[&at("/api/exact")])?;
    ensure!(got.status == 301 && got.header("location") == Some("http://there.example/x"), "exact before prefix: {got:?}");
    let got = mesh.call(&[&at("/apiary")])?;
    ensure!(got.status == 404, "prefixes are of whole segments, and what no rule matches is not found: {got:?}");
    for _ in 0..8 {
        let before = mesh.web["web2"].requests() + mesh.web["web1"].seen("/weights").len();
        ensure!(mesh.call(&[&at("/weights")])?.status == 200);
        ensure!(mesh.web["web2"].requests() + mesh.web["web1"].seen("/weights").len() == before + 1);
    }
    ensure!(mesh.call(&[&at("/none")])?.status == 500, "a backend that does not exist");
    for path in ["/slow/1000", "/slow/1001", "/slow/1002"] {
        let begun = Instant::now();
        let got = mesh.call(&[&at(path)])?;
        ensure!(got.status == 504 && got.body == "upstream request timeout", "{path}: {got:?}");
        ensure!(begun.elapsed() < Duration::from_millis(900), "{path}: {:?}", begun.elapsed());
    }
    for (path, to) in [("/n12/x", Some("/whole")), ("/n12/y", None), ("/n/x", None)] {
        let got = mesh.call(&[&at(path)])?;
        let reached = got.echo().ok().and_then(|echo| Some(echo["path"].as_str()?.to_owned()));
        ensure!(reached.as_deref() == to, "{path}: {got:?}");
    }
    let got = mesh.call(&[&at("/moved/a?q")])?;
    let moved = format!("https://{OTHER}:8443/here/a?q");
    ensure!(got.status == 302 && got.header("location") == Some(&moved), "{got:?}");
    for (origin, allowed) in [("https://a.shop.example", true), ("https://shop.evil", false)] {
        let got = mesh.call(&[
            "-X",
            "OPTIONS",
            "-H",
            "access-control-request-method: PUT",
            "-H",
            &format!("origin: {origin}"),
            &at("/cors"),
        ])?;
        ensure!(got.header("access-control-allow-origin") == allowed.then_some(origin), "{got:?}");
    }
    let got = mesh.call(&[&at("/half")])?;
    ensure!(got.echo()?["headers"]["x-add"] == "backend", "{got:?}");
    ensure!(["web1", "web2"].iter().all(|n| !mesh.web[n].seen("/half").iter().any(is_shadow)), "a share of nothing");
    let got = mesh.call(&[&at("/fail/2/http-route")])?;
    ensure!(got.status == 200 && got.echo()?["headers"]["x-envoy-attempt-count"] == "3", "{got:?}");
    ensure!(mesh.call(&["-X", "PATCH", "-H", "x-a: 1", &at("/any?q=z")])?.status == 200);
    ensure!(mesh.call(&["-X", "PATCH", "-H", "x-a: 1", &at("/any?q=y")])?.status == 404);
    // Into another namespace only with leave from there.
    ensure!(mesh.call(&[&at("/elsewhere")])?.status == 500, "no ReferenceGrant");
    let _grant = mesh.objects(
        "grant",
        "apiVersion: gateway.networking.k8s.io/v1beta1\nkind: ReferenceGrant\nmetadata: { name: let-t, namespace: u }\nspec:\n  from: [ { group: gateway.networking.k8s.io, kind: HTTPRoute, namespace: t } ]\n  to: [ { group: \"\", kind: Service } ]\n",
    )?;
    let got = mesh.call(&[&at("/elsewhere")])?;
    ensure!(got.status == 200 && got.echo()?["name"] == "far", "{got:?}");
    Ok(())
}
fn is_shadow(echo: &Value) -> bool {
    echo["headers"]["host"].as_str().is_some_and(|host| host.contains("-shadow"))
}

const GRPC_ROUTE: &str = r"
apiVersion: gateway.networking.k8s.io/v1
kind: GRPCRoute
metadata: { name: calls, namespace: t }
spec:
  parentRefs: [ { group: '', kind: Service, name: grpc } ]
  rules:
  - matches: [ { method: { service: svc, method: '0' } }, { method: { service: svc, method: '5' }, headers: [ { name: x-a, value: '1' } ] } ]
    filters: [ { type: ResponseHeaderModifier, responseHeaderModifier: { set: [ { name: x-route, value: calls } ] } } ]
    backendRefs: [ { name: grpc, port: 80 } ]
";

pub(crate) fn grpc_is_routed_and_its_trailers_arrive(mesh: &mut Mesh) -> anyhow::Result<()> {
    let server = Grpc::start(mesh.pod("web1"), GRPC_PORT)?;
    let call = |path: &str, more: &[&str]| {
        let url = format!("http://{GRPC}{path}");
        let usual = ["--http2-prior-knowledge", "-X", "POST", "-H", "content-type: application/grpc", "-H", "te: trailers"];
        let args: Vec<&str> = usual.iter().copied().chain(more.iter().copied()).chain(["-d", "message", &url]).collect();
        mesh.call(&args)
    };
    let got = call("/svc/5", &[])?;
    ensure!(got.status == 200 && got.header("x-name") == Some("web1"), "{got:?}");
    ensure!(got.body.starts_with("message") && got.body.contains("grpc-status: 5"), "trailers: {got:?}");
    let route = mesh.objects("grpc-route", GRPC_ROUTE)?;
    let got = call("/svc/0", &[])?;
    ensure!(got.header("x-route") == Some("calls") && got.body.contains("grpc-status: 0"), "{got:?}");
    let got = call("/svc/5", &["-H", "x-a: 1"])?;
    ensure!(got.header("x-route") == Some("calls") && got.body.contains("grpc-status: 5"), "{got:?}");
    let got = call("/svc/5", &[])?;
    ensure!(got.status == 200 && got.header("grpc-status") == Some("12"), "what no rule matches is UNIMPLEMENTED: {got:?}");
    // A server that says GOAWAY after three requests loses none.
    server.goaway_after(3);
    let before = server.connections();
    drop(route);
    for n in 0..40 {
        let got = call("/svc/0", &[])?;
        ensure!(got.status == 200 && got.body.contains("grpc-status: 0"), "request {n}: {got:?}");
    }
    ensure!(server.connections() > before + 8, "{} connections", server.connections() - before);
    Ok(())
}

pub(crate) fn what_nobody_wrote_a_route_for_is_carried(mesh: &mut Mesh) -> anyhow::Result<()> {
    // The default retry of Istio: a connection that breaks before anything was sent is tried again, a broken answer is not.
    let got = mesh.call(&[&format!("http://{WEB}/drop")])?;
    ensure!(got.status == 503 && got.body.contains("connection termination"), "{got:?}");
    let got = mesh.call(&["-H", "connection: x-secret", "-H", "x-secret: 1", &format!("http://{WEB}/hop")])?;
    ensure!(got.echo()?["headers"]["x-secret"].is_null(), "{got:?}");
    // What the log would say the path was is not the client's to say.
    let got = mesh.call(&["-H", "x-envoy-original-path: /innocent", &format!("http://{WEB}/true")])?;
    ensure!(got.echo()?["headers"]["x-envoy-original-path"].is_null(), "{got:?}");
    let got =
        mesh.call(&["-H", "x-envoy-retry-on: 5xx", "-H", "x-forwarded-for: 1.1.1.1", &format!("http://{WEB}/status/500")])?;
    ensure!(got.status == 500 && got.echo()?["headers"]["x-envoy-attempt-count"] == "1", "{got:?}");
    let text = got.echo()?["headers"]["x-forwarded-for"].as_str().context("forwarded-for")?.to_owned();
    ensure!(text == format!("1.1.1.1,{}", mesh.pod("client").v4), "{text}");
    Ok(())
}
