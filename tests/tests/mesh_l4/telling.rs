//! What the agents tell: metrics, the configuration page, the access log, the admin commands.
use std::io::{Read as _, Write as _};
use std::time::{Duration, SystemTime};

use anyhow::{Context as _, ensure};
use mesh_tests::agent::{Agent, is_clean};
use mesh_tests::dev_ca::TestCa;
use mesh_tests::program::Client;
use mesh_tests::{http, wait};
use nix::sys::signal::Signal;

use crate::hostile::tls_accepted;
use crate::lifecycle::restart_b;
use crate::mesh::{Mesh, PORT, WEB_VIP, entries, has_policy, id, text};

pub(crate) fn metrics_carry_istio_labels(mesh: &mut Mesh) -> anyhow::Result<()> {
    mesh.call("client", WEB_VIP.into())?;
    let expected = [
        ("source_workload", "client"),
        ("source_workload_namespace", "t"),
        ("source_principal", "spiffe://test.local/ns/t/sa/client"),
        ("source_app", "client"),
        ("source_canonical_service", "client"),
        ("destination_workload_namespace", "t"),
        ("destination_principal", "spiffe://test.local/ns/t/sa/web"),
        ("destination_service", "web.t.svc.cluster.local"),
        ("destination_service_name", "web"),
        ("destination_service_namespace", "t"),
        ("request_protocol", "tcp"),
        ("response_flags", "-"),
        ("connection_security_policy", "mutual_tls"),
    ];
    let with = |reporter: &'static str| {
        let mut all = expected.to_vec();
        all.push(("reporter", reporter));
        all
    };
    for name in [
        "istio_tcp_connections_opened_total",
        "istio_tcp_connections_closed_total",
        "istio_tcp_sent_bytes_total",
        "istio_tcp_received_bytes_total",
    ] {
        wait::until(&format!("{name} of the source"), wait::PATIENCE, || {
            (mesh.a().metrics().ok()?.sum(name, &with("source")) > 0.0).then_some(())
        })
        .with_context(|| similar(mesh.a(), name))?;
    }
    // At the destination the tunnel carries the pod's address: the service is the one the source chose.
    let at_destination: Vec<_> =
        with("destination").into_iter().filter(|(key, _)| !key.starts_with("destination_service")).collect();
    wait::until("the destination's counter", wait::PATIENCE, || {
        (mesh.b().metrics().ok()?.sum("istio_tcp_connections_opened_total", &at_destination) > 0.0).then_some(())
    })
    .with_context(|| similar(mesh.b(), "istio_tcp_connections_opened_total"))?;
    // Every series carries every label of the family: dashboards group by them.
    let metrics = mesh.a().metrics()?;
    let family: Vec<_> = metrics.0.iter().filter(|series| series.name == "istio_tcp_connections_opened_total").collect();
    for series in family {
        for label in
            ["source_cluster", "destination_cluster", "source_version", "destination_version", "destination_canonical_revision"]
        {
            ensure!(series.labels.contains_key(label), "{label} is missing in {series:?}");
        }
    }
    // The tunnel is kept for the next connection, at both ends, and its certificate ends within the hour.
    ensure!(metrics.sum("culvert_tunnels_active", &[("direction", "outbound")]) > 0.0, "no tunnel is told of");
    ensure!(mesh.b().metrics()?.sum("culvert_tunnels_active", &[("direction", "inbound")]) > 0.0, "no tunnel arrived");
    for (agent, reporter) in [(mesh.a(), "source"), (mesh.b(), "destination")] {
        let metrics = agent.metrics()?;
        let of = |part: &str| metrics.sum(&format!("culvert_connection_setup_seconds{part}"), &[("reporter", reporter)]);
        ensure!(of("_count") >= 1.0 && of("_sum") > 0.0, "the {reporter} does not say how long connections took to be made");
        // All of it, and its two parts: the client's agent dials, that of the server accepts.
        let direction = if reporter == "source" { "dialled" } else { "accepted" };
        for (part, label) in [("tcp_connect", ("reporter", reporter)), ("tls_handshake", ("direction", direction))] {
            let of = |sum: &str| metrics.sum(&format!("culvert_{part}_seconds_{sum}"), &[label]);
            ensure!(of("count") >= 1.0 && of("sum") > 0.0 && of("sum") < 5.0 * of("count"), "{part} of the {reporter}");
        }
    }
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH)?.as_secs_f64();
    let ends = metrics.sum("culvert_certificate_expiry_timestamp_seconds", &[("identity", "spiffe://test.local/ns/t/sa/client")]);
    ensure!((now..now + 3700.0).contains(&ends), "the client's certificate ends at {ends}, now is {now}");
    Ok(())
}

/// The pod of agent b, labelled as Istio's users do it.
fn agent_yaml(mesh: &Mesh) -> String {
    format!(
        "apiVersion: v1\nkind: Pod\nmetadata:\n  name: ztunnel-node-b\n  namespace: istio-system\n  \
         labels: {{ app: ztunnel, networking.istio.io/tunnel: http }}\n\
         spec: {{ nodeName: node-b, serviceAccountName: ztunnel, containers: [ {{ name: main, image: none }} ] }}\n\
         status:\n  phase: Running\n  podIP: {ip}\n  podIPs: [ {{ ip: {ip} }} ]\n  \
         conditions: [ {{ type: Ready, status: \"True\" }} ]\n",
        ip = mesh.b().place().v4
    )
}

const ONLY_NEAR: &str = r#"
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: { name: scrapers, namespace: istio-system }
spec:
  selector: { matchLabels: { app: ztunnel } }
  action: ALLOW
  rules: [ { from: [ { source: { principals: ["test.local/ns/t/sa/near"] } } ] } ]
"#;

pub(crate) fn metrics_are_scraped_over_hbone_by_whom_policies_allow(mesh: &mut Mesh) -> anyhow::Result<()> {
    let (b, metrics) = (mesh.b(), mesh.b().stats_addr());
    let scrape = |pod: &str, to| http::get(&mesh.pod(pod).netns, to, "/metrics");
    let pod = mesh.dir.put_for_now("pod-ztunnel-b.yaml", &agent_yaml(mesh))?;
    for agent in [mesh.a(), b] {
        agent.wait_config("the agent's pod", |dump| entries(dump, "workloads").any(|one| one["name"] == "ztunnel-node-b"))?;
    }
    let inbound = |mark, what: &str, from: &str, reason: Option<&str>| {
        b.wait_access(what, mark, |r| {
            r["direction"] == "inbound" && r["src.identity"] == id(from) && r["reason"].as_str() == reason
        })
    };
    let mark = b.mark();
    let page = scrape("client", metrics)?;
    ensure!(page.status == 200 && page.body.contains("culvert_tunnels_active"), "{page:?}");
    let told = inbound(mark, "the scrape", "client", None)?;
    ensure!(told["dst.identity"] == "spiffe://test.local/ns/istio-system/sa/ztunnel", "{told}");
    ensure!(told["dst.workload"] == "ztunnel-node-b" && told["dst.hbone_addr"] == metrics.to_string(), "{told}");
    // Nothing else of the agent, though it is there.
    for port in [15021, 15000, 8080] {
        let mark = b.mark();
        ensure!(scrape("client", (metrics.ip(), port).into()).is_err(), "port {port} is served");
        inbound(mark, "the refusal", "client", Some("no_such_port"))?;
    }
    // Who is nobody gets nothing of it.
    ensure!(http::get(&mesh.outside().netns, (metrics.ip(), 15008).into(), "/metrics").is_err());
    let forged = TestCa::unknown()?.issue(&id("client"))?;
    ensure!(!tls_accepted(mesh.outside(), (metrics.ip(), 15008).into(), &forged)?, "a stranger's certificate is taken");
    // Its policies are those of its workload, for connections that are open too.
    let mut kept = mesh.pod("client").netns.connect(metrics, Duration::from_secs(5))?;
    kept.set_read_timeout(Some(wait::PATIENCE))?;
    kept.write_all(b"GET /metrics HTTP/1.1\r\nhost: x\r\n\r\n")?;
    ensure!(kept.read(&mut [0; 1])? == 1);
    let policy = mesh.dir.put_for_now("policy-scrapers.yaml", ONLY_NEAR)?;
    let cut = wait::until("the open connection to be cut", wait::PATIENCE, || match kept.read(&mut [0; 8192]) {
        Ok(0) | Err(_) => Some(()),
        Ok(_) => None,
    });
    cut?;
    inbound(mark, "the end of the open connection", "client", Some("revoked"))?;
    let mark = b.mark();
    ensure!(scrape("client", metrics).is_err(), "the policy does not name it");
    inbound(mark, "the refusal", "client", Some("not_allowed"))?;
    ensure!(scrape("near", metrics)?.status == 200);
    drop((policy, pod));
    for agent in [mesh.a(), b] {
        agent
            .wait_config("the agent's pod to go", |dump| entries(dump, "workloads").all(|one| one["name"] != "ztunnel-node-b"))?;
    }
    Ok(())
}

pub(crate) fn similar(agent: &Agent, name: &str) -> String {
    let page = agent.metrics().unwrap_or_default();
    let lines: Vec<String> =
        page.0.iter().filter(|series| series.name == name).map(|series| format!("{:?}", series.labels)).collect();
    format!("series of {name} on {}:\n{}", agent.node(), lines.join("\n"))
}

pub(crate) fn config_dump_has_the_shape_istioctl_reads(mesh: &mut Mesh) -> anyhow::Result<()> {
    let dump = mesh.b().config_dump()?;
    for list in ["workloads", "services", "policies", "certificates", "problems"] {
        ensure!(dump[list].is_array(), "`{list}` is not a list");
    }
    for object in ["workloadState", "version", "config"] {
        ensure!(dump[object].is_object(), "`{object}` is not an object");
    }
    let workload = entries(&dump, "workloads").find(|workload| workload["name"] == "web1").context("workload web1")?;
    ensure!(workload["namespace"] == "t" && workload["serviceAccount"] == "web" && workload["node"] == "node-b", "{workload}");
    ensure!(workload["protocol"] == "HBONE", "{workload}");
    ensure!(
        workload["workloadIps"].as_array().is_some_and(|ips| ips.contains(&mesh.pod("web1").v4.to_string().into())),
        "{workload}"
    );
    let service = entries(&dump, "services").find(|service| service["name"] == "web").context("service web")?;
    ensure!(service["hostname"] == "web.t.svc.cluster.local" && service["namespace"] == "t", "{service}");
    ensure!(has_policy(&dump, "web-allow"), "policies: {}", dump["policies"]);
    let certificate = entries(&dump, "certificates").find(|one| one["identity"] == id("web")).context("certificate of web")?;
    ensure!(certificate["state"] == "Available", "{certificate}");
    let chain = certificate["certChain"].as_array().context("certChain")?;
    for field in ["pem", "serialNumber", "validFrom", "expirationTime"] {
        ensure!(chain.first().is_some_and(|one| one[field].is_string()), "certChain[0].{field}: {certificate}");
    }
    // Only the pods of this node are served, each by name.
    let state = dump["workloadState"].as_object().context("workloadState")?;
    let mut served: Vec<&str> = state.values().map(|one| text(&one["info"], "name")).collect();
    served.sort_unstable();
    ensure!(served == ["loose", "victim", "web1", "web2"], "{served:?}");
    ensure!(state.values().all(|one| one["state"] == "Up" && one["info"]["namespace"] == "t"), "{}", dump["workloadState"]);
    ensure!(!dump.to_string().contains("PRIVATE KEY"), "a private key is in the dump");
    Ok(())
}

/// What is in them is the business of `runtime::profile`'s own tests; here both are taken of the program, under its own allocator.
pub(crate) fn profiles_are_taken_while_it_serves(mesh: &mut Mesh) -> anyhow::Result<()> {
    let agent = mesh.b();
    ensure!(agent.admin("/debug/pprof/heap")?.status == 409, "off by itself");
    ensure!(agent.admin("/debug/pprof/heap/profiling?activate=true")?.status == 200);
    let of_cpu = std::thread::scope(|scope| {
        let taking = scope.spawn(|| agent.admin("/debug/pprof/profile?seconds=1"));
        while !taking.is_finished() {
            mesh.call("client", WEB_VIP.into())?;
        }
        taking.join().map_err(|_| anyhow::anyhow!("the thread that asks panicked"))?
    })?;
    for (profile, name) in [(of_cpu, "profile.pb.gz"), (agent.admin("/debug/pprof/heap")?, "heap.pb.gz")] {
        ensure!(profile.status == 200 && profile.body.starts_with('\u{1f}'), "{profile:?}");
        let said = profile.header("content-disposition").unwrap_or_default();
        ensure!(said.contains(name), "{said}");
    }
    ensure!(agent.admin("/debug/pprof/heap/profiling?activate=false")?.status == 200);
    mesh.call("client", WEB_VIP.into())?;
    Ok(())
}

pub(crate) fn live_connections_are_listed(mesh: &mut Mesh) -> anyhow::Result<()> {
    let web1 = mesh.pod("web1").at(PORT);
    let (open, _) = Client::who(mesh.pod("client"), web1)?;
    let listed = |agent: &Agent, pod: &str, direction: &str| {
        let (pod, direction) = (pod.to_owned(), direction.to_owned());
        agent.wait_config(&format!("the connection in {direction} of {pod}"), move |dump| {
            dump["workloadState"].as_object().into_iter().flatten().any(|(_, one)| {
                one["info"]["name"] == pod.as_str()
                    && one["connections"][&direction].as_array().into_iter().flatten().any(|connection| {
                        [&connection["originalDst"], &connection["actualDst"]]
                            .iter()
                            .any(|addr| addr.as_str() == Some(web1.to_string().as_str()))
                            && (connection["protocol"] == "HBONE")
                    })
            })
        })
    };
    listed(mesh.a(), "client", "outbound")?;
    listed(mesh.b(), "web1", "inbound")?;
    drop(open);
    mesh.a().wait_config("the closed connection to go", |dump| {
        dump["workloadState"].as_object().into_iter().flatten().all(|(_, one)| {
            one["connections"]["outbound"]
                .as_array()
                .into_iter()
                .flatten()
                .all(|connection| connection["originalDst"] != web1.to_string())
        })
    })
}

pub(crate) fn the_plain_log_is_istios_line_and_quitquitquit_ends_the_agent(mesh: &mut Mesh) -> anyhow::Result<()> {
    mesh.b().signal(Signal::SIGKILL)?;
    mesh.b().wait_end(Duration::from_secs(30))?;
    let plain = mesh.spec("node-b").env("LOG_FORMAT", "plain").start(mesh.topology().node("node-b"))?;
    plain.wait_ready(Duration::from_secs(40))?;
    mesh.agent_b = Some(plain);
    let web1 = mesh.pod("web1");
    wait::until_true("calls through the new agent", || mesh.call("client", web1.at(PORT)).is_ok())?;
    let expected = format!(
        "src.workload=\"client\" src.namespace=\"t\" src.identity=\"{}\" src.cluster=\"Kubernetes\" dst.addr={} dst.hbone_addr={} \
         dst.workload=\"web1\" dst.namespace=\"t\" dst.identity=\"{}\" dst.cluster=\"Kubernetes\" direction=\"inbound\" bytes_sent=",
        id("client"),
        web1.at(15008),
        web1.at(PORT),
        id("web"),
    );
    let line = wait::until("the plain access log line", wait::PATIENCE, || {
        mesh.b().whole_log().lines().find(|line| line.contains(&expected)).map(str::to_owned)
    })
    .with_context(|| format!("expected {expected}\nlog:\n{}", mesh.b().log_tail(5)))?;
    let columns: Vec<&str> = line.split('\t').collect();
    ensure!(columns.len() == 5 && columns[1..4] == ["info", "access", "connection complete"], "{line:?}");
    ensure!(columns[4].starts_with("src.addr=10.244.1.11:") && columns[4].contains(" duration=\""), "{line:?}");

    ensure!(mesh.b().admin_post("/logging?level=debug")?.status == 200, "/logging takes a level");
    ensure!(mesh.b().admin("/quitquitquit")?.status != 200, "a GET must not end the agent");
    ensure!(mesh.b().admin_post("/quitquitquit")?.status == 200);
    let status = mesh.b().wait_end(Duration::from_secs(30))?;
    ensure!(is_clean(status), "the agent ended with {status}");
    restart_b(mesh)
}
