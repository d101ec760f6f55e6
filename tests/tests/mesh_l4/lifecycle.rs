//! Starting, draining, dying, and leaving nothing behind.
use std::collections::BTreeMap;
use std::io::{self, ErrorKind, Read};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use mesh_tests::agent::{AgentSpec, find_binary, is_clean};
use mesh_tests::netns;
use mesh_tests::program::Client;
use mesh_tests::wait;
use nix::sys::signal::Signal;

use crate::mesh::{Mesh, OBJECTS, PORT, refused};

/// What an agent says that took over.
const TOOK_OVER: &str = "took over from the agent";

pub(crate) fn restart_b(mesh: &mut Mesh) -> anyhow::Result<()> {
    restart_b_as(mesh, mesh.spec("node-b"))
}

fn restart_b_as(mesh: &mut Mesh, spec: AgentSpec) -> anyhow::Result<()> {
    mesh.agent_b = None;
    let again = spec.start(mesh.topology().node("node-b"))?;
    again.wait_ready(Duration::from_secs(40))?;
    mesh.agent_b = Some(again);
    let web1 = mesh.pod("web1").at(PORT);
    wait::until_true("calls through the new agent", || mesh.call("client", web1).is_ok())
}

fn restart_a_as(mesh: &mut Mesh, spec: AgentSpec) -> anyhow::Result<()> {
    mesh.agent_a = None;
    let again = spec.start(mesh.topology().node("node-a"))?;
    again.wait_ready(Duration::from_secs(40))?;
    mesh.agent_a = Some(again);
    let web1 = mesh.pod("web1").at(PORT);
    wait::until_true("calls through the new agent", || mesh.call("client", web1).is_ok())
}

/// An agent that lets what is under way take its time, also on a machine that has little of it.
fn patient(mesh: &Mesh, node: &str) -> AgentSpec {
    mesh.spec(node).env("CONNECTION_TERMINATION_DEADLINE", "25s")
}

pub(crate) fn sigterm_ends_idle_connections_at_the_deadline(mesh: &mut Mesh) -> anyhow::Result<()> {
    let (mut idle, _) = Client::who(mesh.pod("client"), mesh.pod("web1").at(PORT))?;
    idle.ping("open")?;
    let begun = Instant::now();
    let status = mesh.b().terminate(Duration::from_secs(30))?;
    let took = begun.elapsed();
    ensure!(is_clean(status), "the agent ended with {status}:\n{}", mesh.b().log_tail(20));
    ensure!(took > Duration::from_millis(2500) && took < Duration::from_secs(15), "it took {took:?} with a deadline of 3 s");
    idle.wait_cut().context("the idle connection is ended")?;
    restart_b(mesh)
}

pub(crate) fn sigterm_drains_what_is_in_flight(mesh: &mut Mesh) -> anyhow::Result<()> {
    const SIZE: usize = 16 << 20;
    let patient = patient(mesh, "node-b");
    restart_b_as(mesh, patient)?;
    let web1 = mesh.pod("web1").at(PORT);
    // The transfer is under way: the first bytes are here, most are not.
    let mut client = Client::open(mesh.pod("client"), web1, &format!("source {SIZE}"))?;
    let mut first = [0; 1000];
    client.stream().read_exact(&mut first)?;
    mesh.b().signal(Signal::SIGTERM)?;
    // New connections stop once the agent is draining; only then the rest is fetched.
    wait::until_true("the agent to drain", || {
        let page = mesh_tests::http::get(&mesh.topology().node("node-b").netns, ([127, 0, 0, 1], 15021).into(), "/healthz/ready");
        !page.is_ok_and(|answer| answer.status == 200)
    })?;
    let rest = client.rest().context("the transfer that was in flight")?;
    drop(client);
    ensure!(rest.bytes as usize + first.len() == SIZE, "{} of {SIZE} bytes arrived", rest.bytes as usize + first.len());
    let status = mesh.b().wait_end(Duration::from_secs(30))?;
    ensure!(is_clean(status), "the agent ended with {status}:\n{}", mesh.b().log_tail(20));
    restart_b(mesh)
}

pub(crate) fn sigterm_drains_the_sources_agent_too(mesh: &mut Mesh) -> anyhow::Result<()> {
    const SIZE: usize = 16 << 20;
    let patient = patient(mesh, "node-a");
    restart_a_as(mesh, patient)?;
    let web1 = mesh.pod("web1").at(PORT);
    let mut tunnel = Client::open(mesh.pod("client"), web1, &format!("source {SIZE}"))?;
    let mut through = Client::open(mesh.pod("client"), mesh.outside().at(PORT), &format!("source {SIZE}"))?;
    let mut first = [0; 1000];
    tunnel.stream().read_exact(&mut first)?;
    through.stream().read_exact(&mut first)?;
    mesh.a().signal(Signal::SIGTERM)?;
    wait::until_true("the agent to drain", || {
        let page = mesh_tests::http::get(&mesh.topology().node("node-a").netns, ([127, 0, 0, 1], 15021).into(), "/healthz/ready");
        !page.is_ok_and(|answer| answer.status == 200)
    })?;
    for (name, client) in [("tunnel", &mut tunnel), ("passthrough", &mut through)] {
        let rest = client.rest().with_context(|| format!("the transfer in flight, {name}"))?;
        ensure!(
            rest.bytes as usize + first.len() == SIZE,
            "{name}: {} of {SIZE} bytes arrived",
            rest.bytes as usize + first.len()
        );
    }
    drop((tunnel, through));
    let status = mesh.a().wait_end(Duration::from_secs(30))?;
    ensure!(is_clean(status), "the agent ended with {status}:\n{}", mesh.a().log_tail(20));
    let usual = mesh.spec("node-a");
    restart_a_as(mesh, usual)
}

pub(crate) fn an_agent_is_not_ready_before_it_has_its_mesh(mesh: &mut Mesh) -> anyhow::Result<()> {
    // A third agent, of a node without pods, whose folder does not exist yet.
    let place = mesh.topology().host("visitor");
    let folder = mesh.logs.path().join("later");
    let agent =
        AgentSpec::new("node-x", &folder, mesh.ca.path(), mesh.logs.path()).env("TRUST_DOMAIN", "test.local").start(place)?;
    let asked = || mesh_tests::http::get(&place.netns, ([127, 0, 0, 1], 15021).into(), "/healthz/ready");
    let answer = wait::until("an answer about readiness", wait::PATIENCE, || match agent.ended() {
        Some(status) => Some(Err(anyhow::anyhow!("it ended: {status}\n{}", agent.log_tail(5)))),
        None => asked().ok().map(Ok),
    })??;
    ensure!(answer.status == 500 && answer.body.starts_with("not ready, pending: "), "{answer:?}");
    std::fs::create_dir(&folder)?;
    std::fs::write(folder.join("base.yaml"), OBJECTS)?;
    agent.wait_ready(Duration::from_secs(40))?;
    ensure!(asked()?.body == "ready\n", "{:?}", asked());
    let status = agent.terminate(Duration::from_secs(30))?;
    ensure!(is_clean(status), "{status}");
    Ok(())
}

/// Kills agent b; what was seen while nobody was in charge; and starts it again.
fn kill_and_replace(mesh: &mut Mesh, while_dead: impl FnOnce(&Mesh) -> anyhow::Result<()>) -> anyhow::Result<()> {
    let web1 = mesh.pod("web1").at(PORT);
    let (mut live, _) = Client::who(mesh.pod("client"), web1)?;
    mesh.b().signal(Signal::SIGKILL)?;
    mesh.b().wait_end(Duration::from_secs(30))?;
    live.wait_cut().context("a live connection notices")?;
    let seen = while_dead(mesh);
    restart_b(mesh)?;
    refused(mesh.outside(), web1).context("STRICT holds again")?;
    seen
}

pub(crate) fn a_killed_agent_is_replaced_by_a_new_one(mesh: &mut Mesh) -> anyhow::Result<()> {
    kill_and_replace(mesh, |_| Ok(()))
}

pub(crate) fn a_killed_agent_fails_closed(mesh: &mut Mesh) -> anyhow::Result<()> {
    kill_and_replace(mesh, closed)?;
    // The next agent tells what was dropped before it came.
    let page = mesh.b().metrics()?;
    for event in ["inbound_no_listener", "outbound_no_listener"] {
        let labels = [("namespace", "t"), ("pod", "web1"), ("event", event)];
        ensure!(page.sum("culvert_redirect_packets_total", &labels) >= 1.0, "no {event} of web1 is counted");
    }
    Ok(())
}

pub(crate) fn a_stopped_agent_fails_closed_until_cleaned_up(mesh: &mut Mesh) -> anyhow::Result<()> {
    mesh.b().terminate(Duration::from_secs(30))?;
    let seen = closed(mesh).context("after SIGTERM").and_then(|()| {
        let node = &mesh.topology().node("node-b").netns;
        let mut cleanup = Command::new(find_binary()?);
        let done = node.output(cleanup.args(["cleanup", "--node", "node-b", "--bpf-dir"]).arg(node.pins()))?;
        ensure!(done.status.success() && done.stdout == b"4 redirections removed\n", "{done:?}");
        wait::until_true("traffic to be direct after `ztunnel cleanup`", || dial_in(mesh).is_ok() && dial_out(mesh).is_ok())
    });
    restart_b(mesh)?;
    refused(mesh.outside(), mesh.pod("web1").at(PORT)).context("STRICT holds again")?;
    seen
}

/// Pods are captured by filters first, which who administers the pod's network may remove; those go as soon as there is time.
pub(crate) fn pods_are_given_their_lasting_places(mesh: &mut Mesh) -> anyhow::Result<()> {
    let pins = mesh.topology().node("node-b").netns.pins().join("node-b");
    wait::until_true("every pod to have its places", || netns::are_settled(&pins).is_ok_and(|settled| settled))?;
    for pod in mesh.topology().plan().pods.iter().filter(|pod| pod.node == "node-b") {
        let shown = mesh.pod(&pod.name).netns.output(Command::new("tc").args(["qdisc", "show", "dev", "eth0"]))?;
        let shown = String::from_utf8_lossy(&shown.stdout).into_owned();
        ensure!(!shown.contains("clsact"), "filters are left in {}: {shown}", pod.name);
    }
    Ok(())
}

/// Only because it was told to.
pub(crate) fn a_killed_agent_may_leave_its_pods_open(mesh: &mut Mesh) -> anyhow::Result<()> {
    mesh.b().terminate(Duration::from_secs(30))?;
    mesh.agent_b = None;
    let open = mesh.spec("node-b").env("CULVERT_ON_AGENT_DEATH", "open");
    mesh.agent_b = Some(open.start(mesh.topology().node("node-b"))?);
    mesh.b().wait_ready(Duration::from_secs(40))?;
    refused(mesh.outside(), mesh.pod("web1").at(PORT)).context("while it lives")?;
    mesh.b().signal(Signal::SIGKILL)?;
    mesh.b().wait_end(Duration::from_secs(30))?;
    let seen = wait::until_true("traffic to be direct", || dial_in(mesh).is_ok() && dial_out(mesh).is_ok());
    restart_b(mesh)?;
    refused(mesh.outside(), mesh.pod("web1").at(PORT)).context("STRICT holds again")?;
    seen
}

/// The next agent starts beside the one that serves: no connection is refused or cut, in or out, and what the old one carries
/// lives until that is told to end.
pub(crate) fn an_upgrade_loses_nothing(mesh: &mut Mesh) -> anyhow::Result<()> {
    let (web1, near) = (mesh.pod("web1").at(PORT), mesh.pod("near").at(PORT));
    let ways = [(mesh.pod("client"), web1), (mesh.outside(), mesh.pod("loose").at(PORT)), (mesh.pod("web1"), near)];
    let mut held = ways.iter().map(|(from, to)| Ok(Client::who(from, *to)?.0)).collect::<anyhow::Result<Vec<_>>>()?;
    let stop = AtomicBool::new(false);
    let mark = mesh.b().mark();
    let (counts, taken) = std::thread::scope(|scope| {
        let calling = ways.map(|(from, to)| {
            let stop = &stop;
            scope.spawn(move || -> anyhow::Result<u32> {
                let mut calls = 0;
                while !stop.load(Ordering::Relaxed) {
                    let (mut client, _) = Client::who(from, to)?;
                    client.ping("whole")?;
                    client.finish()?;
                    calls += 1;
                }
                Ok(calls)
            })
        });
        let taken = (|| {
            let next = mesh.start("node-b")?;
            wait::until_true("the next agent to take over", || next.log_since(mark).contains(TOOK_OVER))?;
            next.wait_ready(Duration::from_secs(40))?;
            std::thread::sleep(Duration::from_millis(500));
            for client in &mut held {
                client.ping("still carried by the old agent")?;
            }
            mesh.b().signal(Signal::SIGTERM)?;
            std::thread::sleep(Duration::from_millis(500));
            for client in &mut held {
                client.ping("until its deadline")?;
            }
            mesh.b().wait_end(Duration::from_secs(30))?;
            std::thread::sleep(Duration::from_millis(300));
            Ok(next)
        })();
        stop.store(true, Ordering::Relaxed);
        let counts = calling.map(|calls| calls.join().unwrap_or_else(|_| Err(anyhow::anyhow!("a caller panicked"))));
        (counts, taken)
    });
    let taken: anyhow::Result<_> = taken;
    mesh.agent_b = Some(taken?);
    for (name, calls) in ["in through a tunnel", "in as plaintext", "out"].iter().zip(counts) {
        let calls = calls.with_context(|| format!("a call {name} during the upgrade"))?;
        ensure!(calls > 5, "only {calls} calls {name}");
    }
    Ok(())
}

/// Forty-five upgrades under calls that must all succeed, and every tenth time a kill. What the agent holds in the system is the
/// same afterwards.
pub(crate) fn fifty_restarts_leave_nothing_behind(mesh: &mut Mesh) -> anyhow::Result<()> {
    let (client, web1) = (Arc::clone(mesh.pod("client")), mesh.pod("web1").at(PORT));
    restart_b(mesh)?;
    pods_are_given_their_lasting_places(mesh)?;
    let before = held_by_b(mesh)?;
    for round in 1..=5 {
        let stop = AtomicBool::new(false);
        let (calls, upgraded) = std::thread::scope(|scope| {
            let calling = scope.spawn(|| -> anyhow::Result<u32> {
                let mut calls = 0;
                while !stop.load(Ordering::Relaxed) {
                    let (mut called, _) = Client::who(&client, web1)?;
                    called.ping("whole")?;
                    called.finish()?;
                    calls += 1;
                }
                Ok(calls)
            });
            let upgraded = (1..=9).try_for_each(|n| upgrade_b(mesh).with_context(|| format!("upgrade {n} of round {round}")));
            stop.store(true, Ordering::Relaxed);
            (calling.join().unwrap_or_else(|_| Err(anyhow::anyhow!("the caller panicked"))), upgraded)
        });
        upgraded?;
        let calls = calls.with_context(|| {
            let errors = |log: String| {
                log.lines().filter(|l| l.contains("error") || l.contains("warn")).map(str::to_owned).collect::<Vec<_>>()
            };
            let (a, b) = (mesh.agent_a.as_ref().map(|a| errors(a.log_tail(200))), errors(mesh.b().log_tail(200)));
            format!("a call during the upgrades of round {round}; agent a: {a:#?}, agent b: {b:#?}")
        })?;
        ensure!(calls > 20, "only {calls} calls in round {round}");
        mesh.b().signal(Signal::SIGKILL)?;
        mesh.b().wait_end(Duration::from_secs(30))?;
        restart_b(mesh)?;
    }
    holds_no_more_than(&before, mesh)
}

/// Killed at whatever moment of enrolling its pods, the agent leaves what the next one takes over, and nothing else.
pub(crate) fn an_agent_killed_while_it_enrols_is_taken_over(mesh: &mut Mesh) -> anyhow::Result<()> {
    const FILE: &str = "00-base.yaml";
    const STEPS: u32 = 6;
    let outsiders = OBJECTS.replace("istio.io/dataplane-mode: ambient", "istio.io/dataplane-mode: none");
    let served = |mesh: &Mesh| mesh.b().metrics().map(|metrics| metrics.sum("workload_manager_active_proxy_count", &[]));
    restart_b(mesh)?;
    pods_are_given_their_lasting_places(mesh)?;
    let before = held_by_b(mesh)?;
    let all = served(mesh)?;
    ensure!(all > 1.0, "{all} pods");
    let seen = (|| -> anyhow::Result<()> {
        let mut whole = Duration::ZERO;
        for step in 0..=STEPS {
            mesh.dir.put(FILE, &outsiders)?;
            wait::until_true("the pods to leave the mesh", || served(mesh).is_ok_and(|pods| pods == 0.0))?;
            let begun = Instant::now();
            mesh.dir.put(FILE, OBJECTS)?;
            if step == 0 {
                // The others are parts of this.
                wait::until_true("the pods to come", || served(mesh).is_ok_and(|pods| pods >= all))?;
                whole = begun.elapsed();
                continue;
            }
            std::thread::sleep(whole * step / STEPS);
            mesh.b().signal(Signal::SIGKILL)?;
            mesh.b().wait_end(Duration::from_secs(30))?;
            restart_b(mesh).with_context(|| format!("killed after {step}/{STEPS} of {whole:?}"))?;
        }
        Ok(())
    })();
    mesh.dir.put(FILE, OBJECTS)?;
    seen?;
    pods_are_given_their_lasting_places(mesh)?;
    holds_no_more_than(&before, mesh)
}

/// `COMPLIANCE_POLICY=pqc`: no key exchange but X25519MLKEM768, which agents of the usual settings have too.
pub(crate) fn pqc_leaves_no_other_key_exchange(mesh: &mut Mesh) -> anyhow::Result<()> {
    let at = format!("{}:15008", mesh.pod("web1").v4);
    let classical = |mesh: &Mesh| -> anyhow::Result<String> {
        let mut openssl = Command::new("openssl");
        openssl
            .args(["s_client", "-connect", &at, "-alpn", "h2", "-tls1_3", "-groups", "X25519:P-256"])
            .stdin(std::process::Stdio::null());
        let out = mesh.outside().netns.output(&mut openssl)?;
        Ok(String::from_utf8_lossy(&[out.stdout, out.stderr].concat()).into_owned())
    };
    let usual = classical(mesh)?;
    ensure!(usual.contains("Server Temp Key: X25519"), "{usual}");
    // Calls come through agent a, as it always is.
    let seen = restart_b_as(mesh, mesh.spec("node-b").env("COMPLIANCE_POLICY", "pqc")).and_then(|()| {
        let refused = classical(mesh)?;
        ensure!(refused.contains("handshake failure") && !refused.contains("Server Temp Key"), "{refused}");
        Ok(())
    });
    restart_b(mesh)?;
    seen
}

/// Nobody has to say so: where the kernel refuses programs, rules redirect, and the log tells why.
pub(crate) fn where_bpf_is_refused_rules_redirect(mesh: &mut Mesh) -> anyhow::Result<()> {
    mesh.b().terminate(Duration::from_secs(30))?;
    let (node, pins) = (Arc::clone(mesh.topology().node("node-b")), mesh.topology().node("node-b").netns.pins());
    let cleanup = || -> anyhow::Result<()> {
        let done =
            node.netns.output(Command::new(find_binary()?).args(["cleanup", "--node", "node-b", "--bpf-dir"]).arg(&pins))?;
        ensure!(done.status.success(), "{done:?}");
        Ok(())
    };
    cleanup()?;
    let mark = mesh.b().mark();
    restart_b_as(mesh, mesh.spec("node-b").without_bpf())?;
    let seen = (|| {
        let log = mesh.b().log_since(mark);
        let told = log.lines().find(|line| line.contains("pods are redirected with nftables (TPROXY) instead of eBPF"));
        ensure!(told.is_some_and(|line| line.contains("Operation not permitted")), "{told:?}");
        refused(mesh.outside(), mesh.pod("web1").at(PORT)).context("STRICT holds")?;
        mesh.call("web1", mesh.pod("near").at(PORT)).context("out")?;
        mesh.b().wait_access("the call out", mark, |record| record["direction"] == "outbound").map(drop)
    })();
    mesh.b().terminate(Duration::from_secs(30))?;
    cleanup()?;
    restart_b(mesh)?;
    refused(mesh.outside(), mesh.pod("web1").at(PORT)).context("STRICT holds again")?;
    seen
}

/// One that has never been ready has listeners too, and a pod that nobody can serve keeps neither from anything else.
pub(crate) fn an_agent_that_is_not_ready_is_replaced_too(mesh: &mut Mesh) -> anyhow::Result<()> {
    const FILE: &str = "pod-unwell.yaml";
    const LOOSE: &str = "pod-loose.yaml";
    let (netns, node) = (mesh.pod("web1").netns.path().display().to_string(), "node-b");
    let unwell = mesh.topology().pod_yaml("web1", &[]).replace("name: web1", "name: unwell").replace(&netns, "/nowhere");
    let v4 = mesh.pod("web1").v4.to_string();
    mesh.dir.put(FILE, &unwell.replace(&v4, "10.255.255.1").replace(&mesh.pod("web1").v6.to_string(), "fd00:ffff::1"))?;
    let seen = (|| -> anyhow::Result<()> {
        mesh.agent_b = None;
        mesh.agent_b = Some(mesh.spec(node).start(mesh.topology().node(node))?);
        let web1 = mesh.pod("web1").at(PORT);
        wait::until_true("the first to serve", || mesh.call("client", web1).is_ok())?;
        let (mut held, _) = Client::who(mesh.pod("client"), web1)?;
        ensure!(mesh.b().wait_ready(Duration::from_millis(200)).is_err(), "the first is ready with a pod it cannot serve");
        let mark = mesh.b().mark();
        let next = mesh.start(node)?;
        wait::until_true("the next agent to take over", || next.log_since(mark).contains(TOOK_OVER))?;
        ensure!(next.wait_ready(Duration::from_millis(200)).is_err(), "the next is ready with a pod it cannot serve");
        held.ping("still carried by the old agent")?;
        mesh.b().signal(Signal::SIGTERM)?;
        held.finish()?;
        mesh.b().wait_end(Duration::from_secs(30))?;
        mesh.agent_b = Some(next);
        mesh.call("client", web1)?;
        // What leaves the mesh while no agent runs is let go, whoever else cannot be served.
        mesh.b().signal(Signal::SIGKILL)?;
        mesh.b().wait_end(Duration::from_secs(30))?;
        mesh.dir.remove(LOOSE);
        let (loose, visitor) = (mesh.pod("loose").at(PORT), Arc::clone(mesh.topology().host("visitor")));
        let direct = || visitor.netns.connect(loose, Duration::from_millis(300)).is_ok();
        ensure!(!direct(), "the pod is open without an agent");
        mesh.agent_b = Some(mesh.spec(node).start(mesh.topology().node(node))?);
        wait::until_true("the pod to be let go", direct)?;
        ensure!(mesh.b().wait_ready(Duration::from_millis(200)).is_err(), "ready with a pod it cannot serve");
        Ok(())
    })();
    mesh.dir.put(LOOSE, &mesh.topology().pod_yaml("loose", &[]))?;
    mesh.dir.remove(FILE);
    seen.context("with a pod that cannot be served")?;
    mesh.b().wait_ready(Duration::from_secs(40))
}

/// The first agent goes on while there is a pod that only it can serve. Pods that both begin in one moment are the next one's once it
/// is alone, whoever came last; which it is too when the first dies.
pub(crate) fn an_agent_takes_over_what_the_one_before_it_has_alone(mesh: &mut Mesh) -> anyhow::Result<()> {
    let (node, web2, loose) = ("node-b", "pod-web2.yaml", "pod-loose.yaml");
    let place = mesh.logs.path().join("web2");
    let point = |to: &Path| -> io::Result<()> {
        let next = place.with_extension("next");
        std::os::unix::fs::symlink(to, &next)?;
        std::fs::rename(&next, &place)
    };
    let netns = mesh.pod("web2").netns.path().clone();
    let no_netns = mesh.logs.path().join("no-netns");
    std::fs::write(&no_netns, "")?;
    point(&netns)?;
    let whole = ["web2", "loose"].map(|pod| mesh.topology().pod_yaml(pod, &[]));
    let restore = |mesh: &Mesh| [web2, loose].iter().zip(&whole).try_for_each(|(file, yaml)| mesh.dir.put(file, yaml));
    let [web2_yaml, loose_yaml] = &whole;
    mesh.dir.put(web2, &web2_yaml.replace(&netns.display().to_string(), &place.display().to_string()))?;
    mesh.dir.remove(loose);
    let seen = (|| {
        restart_b(mesh)?;
        let (web2_at, loose_at) = (mesh.pod("web2").at(PORT), mesh.pod("loose").at(PORT));
        wait::until_true("the first to serve", || mesh.call("client", web2_at).is_ok())?;
        // The path tells nothing any more: who has the pod has it still.
        point(&no_netns)?;
        let mark = mesh.b().mark();
        let next = mesh.start(node)?;
        wait::until_true("the next to fail with it", || next.log_since(mark).contains("pod cannot be served"))?;
        mesh.b().signal(Signal::SIGSTOP)?;
        mesh.dir.put(loose, loose_yaml)?;
        let serves = |log: String| log.lines().any(|line| line.contains("pod is served") && line.contains("t/loose"));
        let begun = wait::until_true("the next to begin a pod first", || serves(next.log_since(mark)));
        mesh.b().signal(Signal::SIGCONT)?;
        begun?;
        wait::until_true("the first to begin it too", || serves(mesh.b().log_since(mark)))?;
        mesh.call("client", web2_at).context("only the first serves it")?;
        ensure!(!next.log_since(mark).contains(TOOK_OVER), "it took over a pod it cannot serve");
        point(&netns)?;
        wait::until_true("the next agent to take over", || next.log_since(mark).contains(TOOK_OVER))?;
        next.wait_ready(Duration::from_secs(40))?;
        mesh.b().terminate(Duration::from_secs(30))?;
        mesh.agent_b = Some(next);
        mesh.call("client", web2_at)?;
        mesh.call("client", loose_at).context("a pod that both had begun")?;

        point(&no_netns)?;
        let mark = mesh.b().mark();
        let third = mesh.start(node)?;
        wait::until_true("the third to fail with it", || third.log_since(mark).contains("pod cannot be served"))?;
        mesh.b().signal(Signal::SIGKILL)?;
        mesh.b().wait_end(Duration::from_secs(10))?;
        mesh.agent_b = Some(third);
        wait::until_true("the third to be alone", || mesh.b().log_since(mark).contains(TOOK_OVER))?;
        mesh.call("client", loose_at).context("served by the third")?;
        let mark = mesh.b().mark();
        let fourth = mesh.start(node)?;
        wait::until_true("the fourth to take over", || fourth.log_since(mark).contains(TOOK_OVER))?;
        mesh.b().terminate(Duration::from_secs(30))?;
        mesh.agent_b = Some(fourth);
        mesh.call("client", loose_at)
    })();
    restore(mesh)?;
    seen.context("with a pod that only one agent can serve")?;
    point(&netns)?;
    mesh.b().wait_ready(Duration::from_secs(40))
}

/// Starts the next agent b beside the one that serves, and ends that.
fn upgrade_b(mesh: &mut Mesh) -> anyhow::Result<()> {
    let mark = mesh.b().mark();
    let next = mesh.start("node-b")?;
    wait::until_true("the next agent to take over", || next.log_since(mark).contains(TOOK_OVER))?;
    next.wait_ready(Duration::from_secs(40))?;
    mesh.b().signal(Signal::SIGTERM)?;
    mesh.b().wait_end(Duration::from_secs(30))?;
    mesh.agent_b = Some(next);
    Ok(())
}

/// What agent b and its node hold in the kernel and the file system.
#[derive(Debug, Default, PartialEq, Eq)]
struct Held {
    /// Its files by kind: `socket`, `anon_inode:bpf-map`, … Tunnels and calls come and go, so TCP sockets are told by their listeners.
    files: BTreeMap<String, usize>,
    /// Below its folder of pins.
    pins: Vec<PathBuf>,
    /// Rules, routes and listeners of the node and its pods.
    network: BTreeMap<String, Vec<String>>,
}

fn held_by_b(mesh: &Mesh) -> anyhow::Result<Held> {
    let mut held = Held::default();
    for file in std::fs::read_dir(format!("/proc/{}/fd", mesh.b().pid()))? {
        let Ok(to) = std::fs::read_link(file?.path()) else { continue };
        let kind = to.to_string_lossy().split(['[', ':']).next().unwrap_or_default().to_owned();
        if kind != "socket" && !kind.starts_with('/') {
            let kind = if kind == "anon_inode" { to.to_string_lossy().into_owned() } else { kind };
            *held.files.entry(kind).or_default() += 1;
        }
    }
    let node = mesh.topology().node("node-b");
    let mut folders = vec![node.netns.pins()];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder)? {
            let path = entry?.path();
            if path.is_dir() { folders.push(path) } else { held.pins.push(path) }
        }
    }
    held.pins.sort();
    let pods = mesh.topology().plan().pods.iter().filter(|pod| pod.node == "node-b").map(|pod| mesh.pod(&pod.name));
    for place in pods.chain([node]) {
        for (what, command) in [
            ("rules", ["ip", "rule", "show"].as_slice()),
            ("rules of IPv6", &["ip", "-6", "rule", "show"]),
            ("routes", &["ip", "route", "show", "table", "all"]),
            ("listeners", &["ss", "-Htln"]),
            ("sockets of UDP", &["ss", "-Huan"]),
            ("links", &["ip", "-br", "link", "show"]),
            ("queueing disciplines", &["tc", "qdisc", "show"]),
            ("tables", &["nft", "list", "tables"]),
        ] {
            let [program, args @ ..] = command else { continue };
            let told = place.netns.output(Command::new(program).args(args))?;
            ensure!(told.status.success(), "{command:?}: {told:?}");
            let mut lines: Vec<String> = String::from_utf8_lossy(&told.stdout)
                .lines()
                .map(|line| line.split_whitespace().collect::<Vec<_>>().join(" "))
                .collect();
            lines.sort();
            held.network.insert(format!("{} of {}", what, place.netns.name()), lines);
        }
    }
    Ok(held)
}

/// Waits until agent b and its node hold what they held before.
fn holds_no_more_than(before: &Held, mesh: &Mesh) -> anyhow::Result<()> {
    let mut after = Held::default();
    wait::until_true("the agent to hold no more than before", || {
        held_by_b(mesh).is_ok_and(|now| {
            after = now;
            // Fewer files are no leak: some are open only while a pod is being enrolled.
            let files = after.files.iter().all(|(kind, count)| before.files.get(kind).is_some_and(|most| count <= most));
            files && (&after.pins, &after.network) == (&before.pins, &before.network)
        })
    })
    .with_context(|| format!("before: {before:#?}\nafter: {after:#?}"))
}

/// Without an agent nothing new gets into its pods or out of them.
fn closed(mesh: &Mesh) -> anyhow::Result<()> {
    let accepted = || mesh.servers["web1"].accepted() + mesh.servers["outside"].accepted();
    let before = accepted();
    let dialled = [dial_in(mesh), dial_out(mesh)];
    ensure!(
        dialled.iter().all(|d| d.as_ref().is_err_and(|e| e.kind() == ErrorKind::TimedOut)) && accepted() == before,
        "without an agent plaintext went in or out: {dialled:?}"
    );
    Ok(())
}
fn dial_in(mesh: &Mesh) -> io::Result<TcpStream> {
    mesh.outside().netns.connect(mesh.pod("web1").at(PORT), Duration::from_millis(500))
}
fn dial_out(mesh: &Mesh) -> io::Result<TcpStream> {
    mesh.pod("web1").netns.connect(mesh.outside().at(PORT), Duration::from_millis(500))
}

pub(crate) fn nothing_is_left_behind(mesh: &mut Mesh) -> anyhow::Result<()> {
    let paths: Vec<_> = mesh.topology().plan().pods.iter().map(|pod| mesh.pod(&pod.name).netns.path()).collect();
    for agent in [mesh.agent_a.take(), mesh.agent_b.take()].into_iter().flatten() {
        ensure!(!agent.whole_log().contains("panicked"), "agent of {} panicked", agent.node());
        agent.signal(Signal::SIGKILL)?;
        agent.wait_end(Duration::from_secs(30))?;
    }
    mesh.servers.clear();
    let pins = ["node-a", "node-b"].map(|node| mesh.topology().node(node).netns.pins());
    ensure!(pins.iter().all(|path| path.exists()), "the killed agents left no pins");
    mesh.topology = None;
    for path in paths.into_iter().chain(pins) {
        ensure!(!path.exists(), "{} is still there", path.display());
    }
    Ok(())
}
