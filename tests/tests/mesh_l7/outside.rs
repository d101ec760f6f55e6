//! The gateway, and what is told about requests.
use anyhow::{Context as _, ensure};
use mesh_tests::agent::Metrics;
use mesh_tests::wait;

use crate::mesh::{Mesh, WEB, curl};

pub(crate) fn the_gateway_lets_its_hosts_in(mesh: &mut Mesh) -> anyhow::Result<()> {
    let outside = mesh.topology.host("outside").clone();
    let gateway = mesh.pod("gw").v4;
    let got = curl(&outside, &["-H", "host: web.example", &format!("http://{gateway}/shop/a")])?;
    ensure!(got.status == 200, "{got:?}");
    let echo = got.echo()?;
    ensure!(echo["path"] == "/shop/a" && echo["headers"]["x-forwarded-for"] == outside.v4.to_string(), "{echo}");
    let got = curl(&outside, &["-H", "host: web.example", &format!("http://{gateway}/shopping")])?;
    ensure!(got.status == 404, "a path prefix is of whole segments: {got:?}");
    let got = curl(&outside, &["-H", "host: other.example", &format!("http://{gateway}/shop")])?;
    ensure!(got.status == 404, "{got:?}");
    // Nobody from outside says that it was encrypted, or what its requests are called.
    let claims = ["-H", "host: web.example", "-H", "x-forwarded-proto: https", "-H", "x-request-id: mine"];
    let got = curl(&outside, &[&claims[..], &[&format!("http://{gateway}/shop/a")]].concat())?;
    let echo = got.echo()?;
    ensure!(echo["headers"]["x-forwarded-proto"] == "http" && echo["headers"]["x-request-id"] != "mine", "{got:?}");
    Ok(())
}

pub(crate) fn the_gateway_ends_tls(mesh: &mut Mesh) -> anyhow::Result<()> {
    let outside = mesh.topology.host("outside").clone();
    let resolve = format!("web.example:443:{}", mesh.pod("gw").v4);
    for version in ["--http1.1", "--http2"] {
        let got = curl(&outside, &["-k", version, "--resolve", &resolve, "https://web.example/shop/b"])?;
        ensure!(got.status == 200 && got.echo()?["headers"]["x-forwarded-proto"] == "https", "{got:?}");
    }
    Ok(())
}

pub(crate) fn metrics_and_log_name_both_ends(mesh: &mut Mesh) -> anyhow::Result<()> {
    let proxy = mesh.proxy("wp");
    let page = || -> anyhow::Result<Metrics> {
        Ok(Metrics::parse(&mesh_tests::http::get(&mesh.pod("wp").netns, (mesh.pod("wp").v4, 15020).into(), "/metrics")?.body))
    };
    let labels = [
        ("reporter", "waypoint"),
        ("source_workload", "client"),
        ("source_principal", "spiffe://test.local/ns/t/sa/client"),
        ("destination_principal", "spiffe://test.local/ns/t/sa/web"),
        ("destination_service", "web.t.svc.cluster.local"),
        ("destination_service_name", "web"),
        ("request_protocol", "http"),
        ("response_code", "200"),
        ("response_flags", "-"),
        ("connection_security_policy", "mutual_tls"),
    ];
    let before = page()?.sum("istio_requests_total", &labels);
    let mark = proxy.mark();
    for _ in 0..5 {
        ensure!(mesh.call(&[&format!("http://{WEB}/counted")])?.status == 200);
    }
    wait::until_true("five more requests in the metrics", || {
        page().is_ok_and(|m| m.sum("istio_requests_total", &labels) as i64 == before as i64 + 5)
    })?;
    // How long tunnels took to be made, at both sides of the waypoint.
    let setup = page()?;
    for (part, label) in [
        ("tcp_connect", ("reporter", "waypoint")),
        ("tls_handshake", ("direction", "accepted")),
        ("tls_handshake", ("direction", "dialled")),
    ] {
        ensure!(setup.sum(&format!("culvert_{part}_seconds_count"), &[label]) >= 1.0, "{part}, {label:?}");
    }
    wait::until_true("five lines in the log", || {
        proxy.log_since(mark).lines().filter(|l| l.contains("/counted") && l.contains("response_code")).count() == 5
    })?;
    let pod = mesh.pod("wp");
    let get = |port: u16, path: &str| -> anyhow::Result<String> {
        let ip = if port == 15000 { [127, 0, 0, 1].into() } else { pod.v4 };
        Ok(mesh_tests::http::get(&pod.netns, (ip, port).into(), path)?.body)
    };
    ensure!(get(15090, "/stats/prometheus")?.contains("istio_requests_total{"), "Envoy's port shows the same page");
    let total = r#"envoy_cluster_upstream_rq_total{cluster_name="outbound|80||web.t.svc.cluster.local"}"#;
    ensure!(get(15020, "/metrics")?.contains(total), "{total}");
    let clusters = get(15000, "/clusters")?;
    ensure!(clusters.contains("outbound|80||web.t.svc.cluster.local::added_via_api::true"), "{clusters}");
    ensure!(clusters.lines().any(|l| l.ends_with("::health_flags::healthy")), "{clusters}");
    ensure!(get(15000, "/listeners")?.starts_with("connect_terminate::"));
    let streams = get(15000, "/streams")?;
    ensure!(streams.contains("spiffe://test.local/ns/t/sa/client"), "the client's tunnel: {streams}");
    Ok(())
}

const TELLING: &str = r#"
apiVersion: v1
kind: ConfigMap
metadata: { name: istio, namespace: istio-system }
data:
  mesh: |
    accessLogFile: /dev/stdout
    accessLogEncoding: JSON
    accessLogFormat: |
      { "timestamp": "%START_TIME%", "path": "%REQ(X-ENVOY-ORIGINAL-PATH?:PATH)%", "status": "%RESPONSE_CODE%",
        "user": { "id": "%REQ(X-USER-ID)%" }, "server": "%RESP(SERVER)%", "marker": "mesh" }
    extensionProviders:
    - name: short
      envoyFileAccessLog: { path: /dev/stdout, logFormat: { text: "short %RESPONSE_CODE% %REQ(:PATH)% %REQ(X-USER-ID):2%" } }
---
apiVersion: telemetry.istio.io/v1
kind: Telemetry
metadata: { name: all, namespace: istio-system }
spec:
  accessLogging:
  - providers: [ { name: envoy }, { name: short } ]
    filter: { expression: "request.headers['x-user-id'] == 'ann' || response.code >= 400" }
---
apiVersion: telemetry.istio.io/v1
kind: Telemetry
metadata: { name: web, namespace: t }
spec:
  targetRefs: [ { kind: Service, group: "", name: web } ]
  metrics:
  - overrides:
    - match: { metric: REQUEST_COUNT }
      tagOverrides:
        endpoint_type: { value: 'request.url_path.startsWith("/api/auth/") ? "auth" : "user"' }
        tenant: { value: "request.headers['x-tenant']" }
        source_cluster: { operation: REMOVE }
---
apiVersion: telemetry.istio.io/v1
kind: Telemetry
metadata: { name: jq, namespace: other }
spec:
  metrics:
  - overrides:
    - tagOverrides:
        endpoint_type: { value: '.request.url_path | if startswith("/api/auth/") then "auth" else "user" end' }
"#;

pub(crate) fn the_mesh_says_what_is_told(mesh: &mut Mesh) -> anyhow::Result<()> {
    let proxy = mesh.proxy("wp");
    let told = mesh.objects("telemetry", TELLING)?;
    let problems = proxy.config_dump()?["problems"].to_string();
    ensure!(
        problems.contains("that is jq, and this field takes CEL") && problems.contains("tagOverrides.endpoint_type.value"),
        "{problems}"
    );
    let mark = proxy.mark();
    let url = |path: &str| format!("http://{WEB}{path}");
    ensure!(mesh.call(&[&url("/told/nobody")])?.status == 200);
    ensure!(mesh.call(&["-H", "x-user-id: ann", "-H", "x-tenant: blue", &url("/api/auth/told")])?.status == 200);
    let lines = || -> Vec<String> {
        let log = proxy.log_since(mark);
        log.lines().filter(|l| l.contains("told") && (l.starts_with('{') || l.starts_with("short"))).map(str::to_owned).collect()
    };
    wait::until_true("two lines about one request", || lines().len() >= 2)?;
    let lines = lines();
    ensure!(lines.len() == 2 && lines.iter().any(|l| l == "short 200 /api/auth/told an"), "{lines:?}");
    let json = lines.iter().find(|l| l.starts_with('{')).context("one of two is JSON")?;
    let json: serde_json::Value = serde_json::from_str(json)?;
    ensure!(
        json["path"] == "/api/auth/told" && json["status"] == 200 && json["user"]["id"] == "ann" && json["marker"] == "mesh",
        "{json}"
    );
    ensure!(json["server"].is_string(), "a header of the response: {json}");
    let page = || {
        Ok::<_, anyhow::Error>(mesh_tests::http::get(&mesh.pod("wp").netns, (mesh.pod("wp").v4, 15020).into(), "/metrics")?.body)
    };
    wait::until_true("tags in the metrics", || {
        page().is_ok_and(|p| {
            let of = |tag: &str| p.lines().find(|l| l.starts_with("istio_requests_total{") && l.contains(tag)).map(str::to_owned);
            of("endpoint_type=\"auth\",tenant=\"blue\"").is_some_and(|l| !l.contains("source_cluster"))
                // A tag without a value is left out; the request counts.
                && of("endpoint_type=\"user\"").is_some_and(|l| !l.contains("tenant"))
        })
    })?;
    drop(told);
    let mark = proxy.mark();
    ensure!(mesh.call(&[&url("/as-before")])?.status == 200);
    wait::until_true("the process's own line again", || {
        proxy.log_since(mark).lines().any(|l| l.contains("/as-before") && l.contains("via_upstream"))
    })
}
