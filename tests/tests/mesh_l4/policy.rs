//! Who may call whom, and what a change does to connections that are open.
use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use mesh_tests::agent::Agent;
use mesh_tests::program::Client;
use mesh_tests::wait;
use serde_json::Value;

use crate::mesh::{Mesh, PORT, SERVICE, WEB_VIP, entries, id, refused, starts, text};

pub(crate) fn a_source_outside_the_allow_list_is_refused_with_its_reason(mesh: &mut Mesh) -> anyhow::Result<()> {
    let (mark_a, mark_b) = (mesh.a().mark(), mesh.b().mark());
    let failed = |agent: &Agent| -> anyhow::Result<f64> {
        Ok(agent.metrics()?.sum("istio_tcp_connections_failed_total", &[("reporter", "destination"), ("response_flags", "DENY")]))
    };
    let before = failed(mesh.b())?;
    refused(mesh.pod("other"), mesh.pod("web1").at(PORT))?;
    let record = mesh.b().wait_access("the refusal", mark_b, |record| {
        record["direction"] == "inbound" && record["src.identity"] == id("other") && starts(record, "error", "not_allowed")
    })?;
    ensure!(text(&record, "error").contains('('), "the refusal carries a hint: {record}");
    mesh.a().wait_access("the refusal, seen by the source", mark_a, |record| {
        record["direction"] == "outbound" && record["src.workload"] == "other" && !text(record, "error").is_empty()
    })?;
    wait::until_true("the DENY counter", || failed(mesh.b()).is_ok_and(|now| now > before))
}

pub(crate) fn a_deny_policy_wins_over_an_allow_policy(mesh: &mut Mesh) -> anyhow::Result<()> {
    let web1 = mesh.pod("web1").at(PORT);
    ensure!(mesh.call("near", web1)? == "web1", "near is allowed before");
    let policy = mesh.policy(
        "deny-near",
        r#"
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: { name: deny-near, namespace: t }
spec:
  selector: { matchLabels: { tier: web } }
  action: DENY
  rules:
  - from: [{ source: { principals: ["test.local/ns/t/sa/near"] } }]
"#,
    )?;
    let mark = mesh.b().mark();
    refused(mesh.pod("near"), web1)?;
    mesh.b().wait_access("the refusal naming the policy", mark, |record| {
        starts(record, "error", "policy_denied") && text(record, "error").contains("t/deny-near")
    })?;
    ensure!(mesh.call("client", web1)? == "web1", "others stay allowed");
    drop(policy);
    ensure!(mesh.call("near", web1)? == "web1", "near is allowed again");
    Ok(())
}

pub(crate) const DENY_CLIENT: &str = r#"
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: { name: deny-client, namespace: t }
spec:
  action: DENY
  rules:
  - from: [{ source: { principals: ["test.local/ns/t/sa/client"] } }]
    to: [{ operation: { ports: ["8080"] } }]
"#;

pub(crate) fn a_namespace_policy_cuts_a_live_connection(mesh: &mut Mesh) -> anyhow::Result<()> {
    let web1 = mesh.pod("web1").at(PORT);
    let (mut live, _) = Client::who(mesh.pod("client"), web1)?;
    let (mut unaffected, _) = Client::who(mesh.pod("near"), web1)?;
    live.ping("before")?;
    let mark = mesh.b().mark();
    let policy = mesh.policy("deny-client", DENY_CLIENT)?;
    live.wait_cut()?;
    let record =
        mesh.b().wait_access("the cut", mark, |record| record["src.identity"] == id("client") && !record["error"].is_null())?;
    ensure!(text(&record, "error").contains("revoked") || text(&record, "error").contains("policy_denied"), "{record}");
    unaffected.ping("the neighbour's connection lives on")?;
    drop(policy);
    ensure!(mesh.call("client", web1)? == "web1", "allowed again");
    Ok(())
}

pub(crate) fn a_new_selector_policy_cuts_a_live_connection(mesh: &mut Mesh) -> anyhow::Result<()> {
    // The victim has no policy of its own until now; upstream misses exactly this case.
    let victim = mesh.pod("victim").at(PORT);
    let (mut live, _) = Client::who(mesh.pod("client"), victim)?;
    live.ping("before")?;
    let policy = mesh.policy(
        "victim-only-near",
        r#"
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: { name: victim-only-near, namespace: t }
spec:
  selector: { matchLabels: { app: victim } }
  action: ALLOW
  rules:
  - from: [{ source: { principals: ["test.local/ns/t/sa/near"] } }]
"#,
    )?;
    live.wait_cut()?;
    refused(mesh.pod("client"), victim)?;
    ensure!(mesh.call("near", victim)? == "victim");
    drop(policy);
    ensure!(mesh.call("client", victim)? == "victim", "allowed again");
    Ok(())
}

pub(crate) fn a_removed_workload_is_cut(mesh: &mut Mesh) -> anyhow::Result<()> {
    let victim = mesh.pod("victim").at(PORT);
    let (mut live, _) = Client::who(mesh.pod("client"), victim)?;
    live.ping("before")?;
    mesh.dir.remove("pod-victim.yaml");
    let cut = live.wait_cut();
    mesh.dir.put("pod-victim.yaml", &mesh.topology().pod_yaml("victim", &[]))?;
    cut?;
    wait::until_true("the pod to be served again", || mesh.call("client", victim).is_ok())?;
    mesh.b().wait_ready(Duration::from_secs(40))?;
    // The end of the one before takes a second at most, and takes nothing of this one with it.
    for _ in 0..6 {
        refused(mesh.outside(), victim).context("under STRICT")?;
        ensure!(mesh.call("client", victim)? == "victim");
        std::thread::sleep(Duration::from_millis(250));
    }
    Ok(())
}

pub(crate) fn problems(dump: &Value) -> Vec<String> {
    entries(dump, "problems").map(ToString::to_string).collect()
}

pub(crate) fn a_bad_object_is_rejected_alone(mesh: &mut Mesh) -> anyhow::Result<()> {
    ensure!(problems(&mesh.a().config_dump()?).is_empty(), "no problems before: {:?}", problems(&mesh.a().config_dump()?));
    // One file, a bad object between two good ones.
    let guard = mesh.dir.put_for_now(
        "50-mixed.yaml",
        r"
apiVersion: v1
kind: Service
metadata: { name: good-one, namespace: t }
spec: { selector: { tier: web }, clusterIP: 10.96.0.31, ports: [{ name: tcp, port: 80, targetPort: 8080 }] }
---
apiVersion: v1
kind: Service
metadata: { name: bad, namespace: t }
spec: { selector: { tier: web }, clusterIP: 10.96.0.32, ports: [{ name: tcp, port: 99999, targetPort: 8080 }] }
---
apiVersion: v1
kind: Service
metadata: { name: good-two, namespace: t }
spec: { selector: { tier: web }, clusterIP: 10.96.0.33, ports: [{ name: tcp, port: 80, targetPort: 8080 }] }
",
    )?;
    // What is wrong is told a moment before the rest is in force.
    mesh.a().wait_config("the rejected object and the others", |dump| {
        problems(dump).iter().any(|problem| problem.contains("50-mixed.yaml"))
            && entries(dump, "services").any(|service| service["name"] == "good-two")
    })?;
    let dump = mesh.a().config_dump()?;
    let listed = problems(&dump);
    ensure!(listed.len() == 1 && listed[0].contains("bad") && listed[0].contains("port"), "{listed:?}");
    let problem = entries(&dump, "problems").next().context("one problem")?;
    ensure!(problem["line"].as_u64() > Some(5), "it names the line: {problem}");
    for last in [31, 33] {
        mesh.call("client", SocketAddr::from(([10, 96, 0, last], 80)))?;
    }
    drop(guard);
    mesh.a().wait_config("no problems", |dump| problems(dump).is_empty())?;

    // A file that is no YAML at all in place of a good one: what it held before keeps running.
    mesh.dir.put("02-service.yaml", "kind: Service\nspec: [unclosed\n  : :\n")?;
    let seen = mesh
        .a()
        .wait_config("the unreadable file", |dump| problems(dump).iter().any(|problem| problem.contains("02-service.yaml")));
    let call = mesh.call("client", WEB_VIP.into());
    mesh.dir.put("02-service.yaml", SERVICE)?;
    seen?;
    call.context("the old state runs on")?;
    mesh.a().wait_config("no problems", |dump| problems(dump).is_empty())
}

pub(crate) fn an_unusable_policy_denies_its_target(mesh: &mut Mesh) -> anyhow::Result<()> {
    let victim = mesh.pod("victim").at(PORT);
    ensure!(mesh.call("client", victim)? == "victim");
    let mark = mesh.b().mark();
    let guard = mesh.dir.put_for_now(
        "policy-unusable.yaml",
        r#"
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: { name: unusable, namespace: t }
spec:
  selector: { matchLabels: { app: victim } }
  action: ALLOW
  rules:
  - from: [{ source: { ipBlocks: ["10.244.0.0/99"] } }]
"#,
    )?;
    mesh.b().wait_config("the rejected policy", |dump| {
        problems(dump).iter().any(|problem| problem.contains("policy-unusable.yaml"))
    })?;
    wait::until_true("the target to be denied", || refused(mesh.pod("client"), victim).is_ok())?;
    // The first refusal may have been a connection cut in the very moment of the change; the next is judged from its start.
    refused(mesh.pod("client"), victim)?;
    mesh.b().wait_access("the refusal", mark, |record| starts(record, "error", "policy_unusable"))?;
    ensure!(mesh.call("client", mesh.pod("web1").at(PORT))? == "web1", "other workloads are not touched");
    drop(guard);
    wait::until_true("the target to be served again", || mesh.call("client", victim).is_ok())
}

const LOST: &str = r"
apiVersion: v1
kind: Service
metadata: { name: lost, namespace: t, labels: { istio.io/use-waypoint: nowhere } }
spec:
  selector: { tier: web }
  clusterIP: 10.96.0.77
  ports: [ { name: tcp, port: 80, targetPort: 8080, protocol: TCP } ]
";

/// A waypoint that is declared and not there closes what declares it. Around it leads only a setting of the agent, and that is
/// told and counted; the policies of the endpoint hold as ever.
pub(crate) fn a_missing_waypoint_is_gone_around_by_setting_only(mesh: &mut Mesh) -> anyhow::Result<()> {
    let lost = SocketAddr::from(([10, 96, 0, 77], 80));
    let bypassed = |mesh: &Mesh| -> anyhow::Result<i64> {
        let labels = [("destination_service", "lost.t.svc.cluster.local"), ("destination_workload_namespace", "t")];
        Ok(mesh.a().metrics()?.sum("culvert_waypoint_bypassed_total", &labels) as i64)
    };
    mesh.dir.put("service-lost.yaml", LOST)?;
    mesh.a().wait_config("service lost", |dump| dump["services"].to_string().contains("10.96.0.77"))?;
    let mark = mesh.a().mark();
    refused(mesh.pod("client"), lost)?;
    mesh.a().wait_access("the refusal", mark, |record| {
        record["reason"] == "no_waypoint" && text(record, "error").contains("the waypoint t/nowhere does not exist")
    })?;
    ensure!(bypassed(mesh)? == 0, "nothing went around it");

    mesh.upgrade_a(mesh.spec("node-a").env("CULVERT_ON_MISSING_WAYPOINT", "direct"))?;
    ensure!(mesh.a().whole_log().contains("--on-missing-waypoint=direct"), "the agent warns of its setting");
    let mark = mesh.a().mark();
    let who = mesh.call("client", lost)?;
    ensure!(["web1", "web2"].contains(&who.as_str()), "{who}");
    let record = mesh.a().wait_access("the call", mark, |record| record["dst.service"] == "lost.t.svc.cluster.local")?;
    ensure!(text(&record, "waypoint.bypassed") == "the waypoint t/nowhere does not exist", "{record}");
    ensure!(bypassed(mesh)? == 1, "{}", bypassed(mesh)?);
    refused(mesh.pod("other"), lost)?;

    mesh.upgrade_a(mesh.spec("node-a"))?;
    refused(mesh.pod("client"), lost)?;
    mesh.dir.remove("service-lost.yaml");
    mesh.a().wait_config("service lost to go", |dump| !dump["services"].to_string().contains("10.96.0.77"))
}

/// An agent that is out of files cannot open a path either: what it serves stays served, and never becomes direct.
pub(crate) fn a_pod_whose_path_cannot_be_opened_stays_served(mesh: &mut Mesh) -> anyhow::Result<()> {
    let victim = mesh.pod("victim").at(PORT);
    let (mut live, _) = Client::who(mesh.pod("client"), victim)?;
    let loops = mesh.logs.path().join("loops");
    std::os::unix::fs::symlink(&loops, &loops)?;
    let yaml = mesh.topology().pod_yaml("victim", &[]);
    let path = mesh.pod("victim").netns.path().display().to_string();
    let mark = mesh.b().mark();
    mesh.dir.put("pod-victim.yaml", &yaml.replace(&path, &loops.display().to_string()))?;
    let seen =
        wait::until_true("the agent to look", || mesh.b().log_since(mark).contains("the path tells nothing")).and_then(|()| {
            live.ping("still carried")?;
            refused(mesh.outside(), victim).context("under STRICT")?;
            ensure!(mesh.call("client", victim)? == "victim");
            Ok(())
        });
    mesh.dir.put("pod-victim.yaml", &yaml)?;
    seen
}
