//! Sessions that stay with an endpoint, through two agents and the waypoint.
use std::collections::BTreeSet;

use anyhow::{Context as _, ensure};

use crate::change::ready;
use crate::destinations::{different, names};
use crate::mesh::{Mesh, OTHER, WEB};

fn route(session: &str, backends: &str) -> String {
    format!(
        "apiVersion: gateway.networking.k8s.io/v1\nkind: HTTPRoute\nmetadata: {{ name: session, namespace: t }}\nspec:\n  parentRefs: [ {{ group: \"\", kind: Service, name: web }} ]\n  rules:\n  - matches: [ {{ path: {{ type: PathPrefix, value: /shop }} }} ]\n    sessionPersistence: {{ {session} }}\n    backendRefs: [ {backends} ]\n"
    )
}
const BACKEND: &str = "{ name: web, port: 80 }";

fn shop() -> String {
    format!("http://{WEB}/shop/1")
}
/// Who answers `calls` requests with this header, and what they set.
fn with(mesh: &Mesh, header: &str, calls: usize) -> anyhow::Result<(BTreeSet<String>, BTreeSet<String>)> {
    let (mut names, mut set) = (BTreeSet::new(), BTreeSet::new());
    for _ in 0..calls {
        let got = mesh.call(&["-H", header, &shop()])?;
        names.insert(got.echo()?["name"].as_str().context("a name")?.to_owned());
        set.extend(got.header("set-cookie").map(str::to_owned));
    }
    Ok((names, set))
}
/// Begins a session: the header that continues it, and who answered.
fn begin(mesh: &Mesh, shown: &str) -> anyhow::Result<(String, String)> {
    let got = mesh.call(&[&shop()])?;
    let set = got.header("set-cookie").context("a session begins")?;
    let (pair, rest) = set.split_once(';').context("attributes")?;
    ensure!(pair.starts_with("s=\"") && rest == shown, "{set}");
    for name in ["web1", "web2"] {
        let ip = mesh.pod(name).v4.to_string();
        ensure!(!set.contains(&ip) && !set.contains(name), "{set} tells of {name}");
    }
    Ok((format!("cookie: {pair}"), got.echo()?["name"].as_str().context("a name")?.to_owned()))
}

pub(crate) fn a_cookie_keeps_a_session_where_it_is(mesh: &mut Mesh) -> anyhow::Result<()> {
    {
        let _route = mesh.objects("session", &route("sessionName: s", BACKEND))?;
        let (cookie, first) = begin(mesh, " Path=/shop; HttpOnly")?;
        let (again, set) = with(mesh, &cookie, 12)?;
        ensure!(again == BTreeSet::from([first.clone()]) && set.is_empty(), "{first}, then {again:?}, told {set:?}");
        let of_others = names(mesh, 24, |_| vec![shop()])?;
        ensure!(different(&of_others).len() == 2, "sessions are balanced: {of_others:?}");
        // An address chooses nothing (Envoy's own cookie would be this).
        let (_, set) = with(mesh, "cookie: s=\"MTAuMC4wLjE6ODA=\"", 1)?;
        ensure!(set.len() == 1, "another session begins: {set:?}");
        // The endpoint leaves: the session goes on elsewhere, and says so.
        let left = if first == "web1" { "web1" } else { "web2" };
        ready(mesh, left, false)?;
        let moved = with(mesh, &cookie, 1);
        ready(mesh, left, true)?;
        let (now, set) = moved?;
        ensure!(!now.contains(left) && set.len() == 1, "{left} is gone: {now:?}, told {set:?}");
    }
    let _route = mesh
        .objects("session", &route("sessionName: s, absoluteTimeout: 2s, cookieConfig: { lifetimeType: Permanent }", BACKEND))?;
    let (cookie, _) = begin(mesh, " Max-Age=2; Path=/shop; HttpOnly")?;
    std::thread::sleep(std::time::Duration::from_secs(2));
    let (_, set) = with(mesh, &cookie, 1)?;
    ensure!(set.len() == 1, "a session that is over begins anew: {set:?}");
    Ok(())
}

pub(crate) fn a_session_stays_with_its_backend(mesh: &mut Mesh) -> anyhow::Result<()> {
    let _route = mesh.objects("session", &route("sessionName: s", &format!("{BACKEND}, {{ name: other, port: 80 }}")))?;
    // Only one of the two backends has `web2`.
    let (mut cookie, mut first) = begin(mesh, " Path=/shop; HttpOnly")?;
    for _ in 0..40 {
        if first == "web2" {
            break;
        }
        (cookie, first) = begin(mesh, " Path=/shop; HttpOnly")?;
    }
    let (again, set) = with(mesh, &cookie, 12)?;
    ensure!(again == BTreeSet::from(["web2".to_owned()]) && set.is_empty(), "{first}, then {again:?}, told {set:?}");
    Ok(())
}

fn traffic(target: &str, spec: &str) -> String {
    format!(
        "apiVersion: gateway.networking.x-k8s.io/v1alpha1\nkind: XBackendTrafficPolicy\nmetadata: {{ name: {target}, namespace: t }}\nspec:\n  targetRefs: [ {{ group: \"\", kind: Service, name: {target} }} ]\n  {spec}\n"
    )
}

pub(crate) fn a_policy_of_a_backend_keeps_sessions_and_a_budget(mesh: &mut Mesh) -> anyhow::Result<()> {
    {
        let _policy = mesh.objects("traffic", &traffic("web", "sessionPersistence: { type: Header, sessionName: x-session }"))?;
        let got = mesh.call(&[&shop()])?;
        let name = got.header("x-session").context("a session begins")?.to_owned();
        let first = got.echo()?["name"].as_str().context("a name")?.to_owned();
        let header = format!("x-session: {name}");
        let (again, _) = with(mesh, &header, 12)?;
        ensure!(again == BTreeSet::from([first.clone()]), "{first}, then {again:?}");
        ensure!(mesh.call(&["-H", &header, &shop()])?.header("x-session").is_none(), "who knows is not told again");
    }
    let retries = "apiVersion: networking.istio.io/v1\nkind: VirtualService\nmetadata: { name: retries, namespace: t }\nspec:\n  hosts: [ other ]\n  http:\n  - retries: { attempts: 2, retryOn: \"503\" }\n    route: [ { destination: { host: other } } ]\n";
    let _retries = mesh.objects("retries", retries)?;
    {
        let _policy = mesh.objects("traffic", &traffic("other", "retryConstraint: { budget: { percent: 0 } }"))?;
        let got = mesh.call(&[&format!("http://{OTHER}/fail/1/constraint-a")])?;
        ensure!(got.status == 200, "ten retries are always allowed: {got:?}");
    }
    let none = "retryConstraint: { budget: { percent: 0 }, minRetryRate: { count: 0 } }";
    let _policy = mesh.objects("traffic", &traffic("other", none))?;
    let got = mesh.call(&[&format!("http://{OTHER}/fail/1/constraint-b")])?;
    ensure!(got.status == 503, "nothing is left to retry with: {got:?}");
    Ok(())
}
