//! What `meshctl why` says about a call, and what then happens to it.
use std::net::SocketAddr;

use anyhow::{Context as _, ensure};
use mesh_tests::agent::Agent;
use mesh_tests::meshctl::{why_of_folder, why_of_process};
use mesh_tests::program::Client;
use mesh_tests::topology::Place;

use crate::mesh::{Mesh, PORT, WEB_VIP, refused, starts};

/// One call: from where, to what; what a refusal is called, and whose log has it.
struct Case<'a> {
    from: &'a Place,
    who: String,
    to: String,
    addr: SocketAddr,
    refusal: Option<(&'static str, &'a Agent)>,
}

pub(crate) fn meshctl_why_says_what_the_mesh_does(mesh: &mut Mesh) -> anyhow::Result<()> {
    let _deny = mesh.policy(
        "no-near",
        r#"
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: { name: no-near, namespace: t }
spec:
  selector: { matchLabels: { app: victim } }
  action: DENY
  rules:
  - from: [{ source: { principals: ["test.local/ns/t/sa/near"] } }]
    to: [{ operation: { ports: ["8080"] } }]
"#,
    )?;
    let _broken = mesh.policy(
        "unreadable",
        r#"
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: { name: unreadable, namespace: t }
spec:
  selector: { matchLabels: { app: loose } }
  rules:
  - from: [{ source: { ipBlocks: ["not an address"] } }]
"#,
    )?;
    let pod = |name: &'static str| (&**mesh.pod(name), format!("t/{name}/{name}"));
    let outside = || (&**mesh.outside(), mesh.outside().v4.to_string());
    let at = |name: &str| (format!("{name}:{PORT}"), mesh.pod(name).at(PORT));
    let vip = |port: u16| (format!("web:{port}"), SocketAddr::from((WEB_VIP.0, port)));
    let (a, b) = (mesh.a(), mesh.b());
    let beyond = (mesh.outside().at(PORT).to_string(), mesh.outside().at(PORT));
    let cases = [
        (pod("client"), at("web1"), None),
        (pod("client"), vip(80), None),
        (pod("near"), at("web2"), None),
        (pod("client"), at("victim"), None),
        (pod("client"), beyond, None),
        (pod("other"), at("web1"), Some(("not_allowed", b))),
        (pod("other"), vip(80), Some(("not_allowed", b))),
        (pod("near"), at("victim"), Some(("policy_denied", b))),
        (pod("client"), at("loose"), Some(("policy_unusable", b))),
        (pod("client"), vip(81), Some(("no_such_port", a))),
        (outside(), at("victim"), Some(("plaintext_refused", b))),
    ];
    for ((from, who), (to, addr), refusal) in cases {
        // Names without a namespace are meant in the caller's.
        let to = if who.contains('/') || to.contains('.') { to } else { format!("t/{to}") };
        check(mesh, &Case { from, who, to, addr, refusal })?;
    }
    Ok(())
}

fn check(mesh: &Mesh, case: &Case<'_>) -> anyhow::Result<()> {
    let Case { from, who, to, addr, refusal } = case;
    let args = ["--from", who, "--to", to];
    let wanted = refusal.map(|(reason, _)| reason);
    for (whom, why) in [("the folder", why_of_folder(mesh.dir.path(), &args)), ("agent a", why_of_process(mesh.a(), &args))] {
        let why = why.with_context(|| format!("{whom} about {who} -> {to}"))?;
        ensure!(why.allowed == wanted.is_none() && why.reason() == wanted, "{whom} about {who} -> {to}: {}", why.report);
    }
    match refusal {
        None => {
            let (mut client, _who) = Client::who(from, *addr).with_context(|| format!("{who} -> {to}"))?;
            client.ping("let through")?;
        }
        Some((reason, teller)) => {
            let mark = teller.mark();
            refused(from, *addr)?;
            teller.wait_access(&format!("{reason} for {who} -> {to}"), mark, |record| starts(record, "error", reason))?;
        }
    }
    Ok(())
}
