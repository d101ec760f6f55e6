//! The gateway, and what is told about requests.
use anyhow::ensure;
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
