//! What changes under traffic: endpoints go, routes are replaced, proxies are restarted. A request fails only where Istio's
//! rules say so.
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use mesh_tests::agent::{Agent, is_clean};
use mesh_tests::bench::process::raise_open_files;
use mesh_tests::dev_ca::TestCa;
use mesh_tests::load::Load;
use mesh_tests::raw::Raw;
use mesh_tests::wait;
use mesh_tests::web::Web;
use nix::sys::signal::Signal;

use crate::bytes::vip;
use crate::mesh::{Mesh, PORT, SPAN, WEB};

/// Requests of every test here, at the least.
const REQUESTS: usize = 2000;

/// Who sends the requests, each on a connection it keeps: with and without a body, in HTTP/1.1 and HTTP/2.
const CALLERS: usize = 4;

fn load(mesh: &Mesh, vip: &str) -> anyhow::Result<Load> {
    let load = Load::mixed(mesh.pod("client"), SocketAddr::new(vip.parse()?, 80), "/during");
    load.wait(200)?;
    Ok(load)
}

/// The Pod object says whether it is ready, and agents and waypoint have heard of it.
pub(crate) fn ready(mesh: &Mesh, pod: &str, ready: bool) -> anyhow::Result<()> {
    let yaml = mesh.topology.pod_yaml(pod, &[]);
    let state = if ready { "status: \"True\"" } else { "status: \"False\"" };
    let before = mesh.versions()?;
    mesh.dir.put(&format!("pod-{pod}.yaml"), &yaml.replace("status: \"True\"", state))?;
    mesh.wait_newer(&before)
}

pub(crate) fn an_endpoint_is_removed_and_comes_back(mesh: &mut Mesh) -> anyhow::Result<()> {
    let load = load(mesh, WEB)?;
    for _ in 0..3 {
        ready(mesh, "web2", false)?;
        // As Kubernetes does it: the endpoint goes from the Service, what is under way ends, then the process does.
        let so_far = load.done();
        load.wait(so_far + 150)?;
        let before = mesh.web["web2"].requests();
        load.wait(so_far + 300)?;
        ensure!(mesh.web["web2"].requests() == before, "a removed endpoint still gets requests");
        mesh.web.remove("web2");
        load.wait(so_far + 400)?;
        let web2 = Web::start(mesh.pod("web2"), PORT)?;
        mesh.web.insert("web2", web2);
        ready(mesh, "web2", true)?;
        let so_far = load.done();
        load.wait(so_far + 200)?;
        ensure!(mesh.web["web2"].requests() > 0, "an endpoint that came back gets requests");
    }
    load.finish(REQUESTS)?.all_well(REQUESTS, 0)
}

/// The server of an endpoint is gone while the mesh still names it: its connections break, new ones are refused and tried
/// elsewhere (`connect-failure` of Istio's default).
pub(crate) fn an_endpoint_dies_unannounced(mesh: &mut Mesh) -> anyhow::Result<()> {
    let load = load(mesh, WEB)?;
    mesh.web["web2"].die();
    mesh.web.remove("web2");
    let so_far = load.done();
    load.wait(so_far + 300)?;
    let web2 = Web::start(mesh.pod("web2"), PORT)?;
    mesh.web.insert("web2", web2);
    let tally = load.finish(REQUESTS)?;
    // What was on the dying server's connections was lost with them: one request a caller at most, answered as Envoy does.
    let lost = tally.requests() - tally.statuses.get(&200).copied().unwrap_or_default();
    ensure!(tally.errors.is_empty() && lost <= CALLERS, "{tally:?}");
    ensure!(tally.bodies.iter().all(|body| body.contains("connection termination")), "{tally:?}");
    Ok(())
}

pub(crate) fn a_route_is_replaced_and_removed(mesh: &mut Mesh) -> anyhow::Result<()> {
    let load = load(mesh, WEB)?;
    let mut last = 0;
    for round in 0..20 {
        let subset = if round % 2 == 0 { "v1" } else { "v2" };
        let _route = mesh.objects(
            "during",
            &format!(
                "apiVersion: networking.istio.io/v1\nkind: VirtualService\nmetadata: {{ name: during, namespace: t }}\nspec:\n  hosts: [ web ]\n  http:\n  - route: [ {{ destination: {{ host: web, subset: {subset} }} }} ]\n"
            ),
        )?;
        let got = mesh.call(&[&format!("http://{WEB}/")])?;
        ensure!(
            got.echo()?["name"] == if subset == "v1" { "web1" } else { "web2" },
            "the route in force is the new one: {got:?}"
        );
        last = round;
    }
    ensure!(last == 19);
    load.finish(REQUESTS)?.all_well(REQUESTS, 0)
}

/// SIGTERM: GOAWAY to the agents, what is under way is finished; the pod that takes over is used from then on.
pub(crate) fn a_waypoint_is_restarted(mesh: &mut Mesh) -> anyhow::Result<()> {
    let load = load(mesh, SPAN)?;
    for (old, new) in [("wp", "wp2"), ("wp2", "wp")] {
        // As a rolling update does it: the new pod is ready before the old one is told to go.
        if !mesh.proxies.contains_key(new) {
            let proxy = mesh.start(new)?;
            mesh.proxies.insert(new, proxy);
        }
        mesh.proxy(new).wait_ready(Duration::from_secs(40))?;
        ready(mesh, new, true)?;
        let mut under_way =
            Raw::say(mesh.pod("client"), SocketAddr::new(SPAN.parse()?, 80), b"GET /slow/1500 HTTP/1.1\r\nhost: span\r\n\r\n")?;
        let so_far = load.done();
        load.wait(so_far + 50)?;
        ready(mesh, old, false)?;
        mesh.proxy(old).signal(Signal::SIGTERM)?;
        let answer = under_way.answer().context("what was under way")?;
        ensure!(answer.status == 200, "{answer:?}");
        let status = mesh.proxy(old).wait_end(Duration::from_secs(30))?;
        ensure!(is_clean(status), "{old} ended with {status}:\n{}", mesh.proxy(old).log_tail(20));
        ensure!(!mesh.proxy(old).whole_log().contains("closed at the deadline"), "{}", mesh.proxy(old).log_tail(20));
        mesh.proxies.remove(old);
        let so_far = load.done();
        load.wait(so_far + 200)?;
    }
    load.finish(REQUESTS)?.all_well(REQUESTS, 2 * CALLERS)
}

/// As cert-manager mounts it: replaced under traffic, kept while what is there is no certificate.
pub(crate) fn a_waypoint_has_its_certificate_from_files(mesh: &mut Mesh) -> anyhow::Result<()> {
    let dir = mesh.logs.path().join("mounted");
    std::fs::create_dir_all(&dir)?;
    let put = |name: &str, text: &str| -> anyhow::Result<()> {
        std::fs::write(dir.join(".next"), text)?;
        Ok(std::fs::rename(dir.join(".next"), dir.join(name))?)
    };
    let mount = |mesh: &Mesh| -> anyhow::Result<()> {
        let issued = TestCa::of_dir(mesh.ca.path())?.issue("spiffe://test.local/ns/t/sa/wp")?;
        [("tls.key", &issued.key), ("tls.crt", &issued.cert), ("ca.crt", &issued.root)]
            .iter()
            .try_for_each(|(name, text)| put(name, text))
    };
    mount(mesh)?;
    let mounted = mesh.start_with("wp2", &[("CULVERT_CERTIFICATE_DIR", &dir.display().to_string())])?;
    mounted.wait_ready(Duration::from_secs(40))?;
    mesh.proxies.insert("wp2", mounted);
    ready(mesh, "wp2", true)?;
    ready(mesh, "wp", false)?;
    let seen = (|| {
        let load = load(mesh, SPAN)?;
        let proxy = mesh.proxy("wp2");
        let mark = proxy.mark();
        mount(mesh)?;
        wait::until_true("the next certificate to be read", || proxy.log_since(mark).contains("certificate read"))?;
        let so_far = load.done();
        load.wait(so_far + 200)?;
        put("tls.crt", "no certificate")?;
        wait::until_true("the broken one to be told", || {
            proxy.log_since(mark).contains("the mounted certificate cannot be used")
        })?;
        let so_far = load.done();
        load.wait(so_far + 200)?;
        load.finish(REQUESTS)?.all_well(REQUESTS, 0)
    })();
    ready(mesh, "wp", true)?;
    ready(mesh, "wp2", false)?;
    mesh.proxy("wp2").terminate(Duration::from_secs(30))?;
    mesh.proxies.remove("wp2");
    seen
}

/// The next agent takes the pods over from the one that serves: first where the endpoints are, then where the client is. What
/// the old one carries ends with it: the waypoint, told by GOAWAY, has begun nothing there; the client, which nobody could tell,
/// sends again what was on a kept connection then.
pub(crate) fn agents_are_upgraded(mesh: &mut Mesh) -> anyhow::Result<()> {
    let load = load(mesh, SPAN)?;
    for node in ["node-b", "node-a"] {
        let next = next_agent(mesh, node, &[])?;
        let so_far = load.done();
        load.wait(so_far + 200)?;
        let status = mesh.proxy(node).terminate(Duration::from_secs(30))?;
        ensure!(is_clean(status), "{status}");
        mesh.proxies.insert(node, next);
        let (so_far, before) = (load.done(), mesh.web["web1"].requests());
        load.wait(so_far + 400)?;
        ensure!(mesh.web["web1"].requests() > before, "the endpoints of {node} are used");
    }
    load.finish(REQUESTS)?.all_well(REQUESTS, CALLERS)
}
/// Starts another agent of a node, which takes over.
fn next_agent(mesh: &Mesh, node: &str, env: &[(&str, &str)]) -> anyhow::Result<Agent> {
    let mark = mesh.proxy(node).mark();
    let next = mesh.start_with(node, env)?;
    wait::until_true("the next agent to take over", || next.log_since(mark).contains("took over from the agent"))?;
    next.wait_ready(Duration::from_secs(40))?;
    Ok(next)
}

/// An agent that is told to share a tunnel among many does: thousands of connections at once, each with a request before and
/// after.
pub(crate) fn one_tunnel_carries_thousands_of_streams(mesh: &mut Mesh) -> anyhow::Result<()> {
    // One data thread: each has tunnels of its own.
    for env in [&[("POOL_MAX_STREAMS_PER_CONNECTION", "10000"), ("ZTUNNEL_WORKER_THREADS", "1")][..], &[]] {
        let next = next_agent(mesh, "node-a", env)?;
        mesh.proxy("node-a").terminate(Duration::from_secs(30))?;
        mesh.proxies.insert("node-a", next);
        if !env.is_empty() {
            share_a_tunnel(mesh)?;
        }
    }
    Ok(())
}
fn share_a_tunnel(mesh: &Mesh) -> anyhow::Result<()> {
    const STREAMS: usize = 2500;
    const AT_ONCE: usize = 50;
    raise_open_files();
    let ask = |some: &mut [Raw]| {
        some.iter_mut().try_for_each(|raw| raw.send(b"GET / HTTP/1.1\r\nhost: web\r\n\r\n"))?;
        some.iter_mut().try_for_each(|raw| {
            let answer = raw.answer()?;
            ensure!(answer.status == 200, "{answer:?}");
            Ok(())
        })
    };
    let until = Instant::now() + Duration::from_mins(1);
    let mut open = Vec::with_capacity(STREAMS);
    while open.len() < STREAMS {
        ensure!(Instant::now() < until, "only {} opened", open.len());
        for _ in 0..AT_ONCE {
            open.push(Raw::open(mesh.pod("client"), vip(80))?);
        }
        let before = open.len() - AT_ONCE;
        ask(&mut open[before..])?;
    }
    let page = mesh.proxy("node-a").metrics()?;
    let [tunnels, streams] =
        ["culvert_tunnels_active", "culvert_tunnel_streams_active"].map(|name| page.sum(name, &[("direction", "outbound")]));
    ensure!(tunnels as usize == 1 && streams as usize >= STREAMS, "{streams} streams in {tunnels} tunnels");
    open.chunks_mut(AT_ONCE).try_for_each(|some| {
        ensure!(Instant::now() < until, "they take too long");
        ask(some)
    })
}

/// The client's own agent is stopped before there is another. What is under way ends well; until the next one its pods reach
/// nothing; then they are served at once.
pub(crate) fn the_agent_of_the_client_is_restarted(mesh: &mut Mesh) -> anyhow::Result<()> {
    let client = Arc::clone(mesh.pod("client"));
    let vip = SocketAddr::new(WEB.parse()?, 80);
    let mut under_way: Vec<Raw> = (0..20)
        .map(|_| Raw::say(&client, vip, b"GET /slow/800 HTTP/1.1\r\nhost: web\r\n\r\n"))
        .collect::<std::io::Result<_>>()?;
    let arrived = || ["web1", "web2"].iter().map(|name| mesh.web[name].seen("/slow/800").len()).sum::<usize>() >= 20;
    wait::until_true("twenty requests under way", arrived)?;
    mesh.proxy("node-a").signal(Signal::SIGTERM)?;
    for raw in &mut under_way {
        let answer = raw.answer().context("what was under way")?;
        ensure!(answer.status == 200, "{answer:?}");
    }
    drop(under_way);
    let status = mesh.proxy("node-a").wait_end(Duration::from_secs(30))?;
    ensure!(is_clean(status), "{status}");
    let again = mesh.start("node-a")?;
    again.wait_ready(Duration::from_secs(40))?;
    mesh.proxies.insert("node-a", again);
    let load = Load::mixed(&client, vip, "/after");
    load.finish(REQUESTS)?.all_well(REQUESTS, 0)
}
