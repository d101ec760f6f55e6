//! The harness on its own, without an agent: what the other suites take for granted is true, and what is built goes away.
use std::process::ExitCode;
use std::time::Duration;

use anyhow::ensure;
use mesh_tests::capture::Capture;
use mesh_tests::netns::{self, Netns};
use mesh_tests::program::{Client, Cut, End, Server, Sum, pattern};
use mesh_tests::suite::{self, Test, test};
use mesh_tests::topology::{Plan, Topology};
use mesh_tests::{agent, skip};

struct Context {
    topology: Topology,
}

const TESTS: &[Test<Context>] = &[
    test("every_place_reaches_every_pod_in_both_families", every_place_reaches_every_pod_in_both_families),
    test("line_server_half_closes_counts_and_resets", line_server_half_closes_counts_and_resets),
    test("capture_sees_plaintext_on_the_nodes_link", capture_sees_plaintext_on_the_nodes_link),
    test("a_plan_is_read_from_the_zamaz_manifests", a_plan_is_read_from_the_zamaz_manifests),
    test("a_namespace_takes_its_programs_with_it", a_namespace_takes_its_programs_with_it),
];

fn main() -> ExitCode {
    suite::run("harness", skip::netns_unavailable(), set_up, TESTS)
}

fn set_up() -> anyhow::Result<Context> {
    let plan = Plan::default()
        .node("node-a", "zone-1")
        .node("node-b", "zone-2")
        .pod("node-a", "t", "left", "left", &[])
        .pod("node-a", "t", "near", "near", &[])
        .pod("node-b", "t", "right", "right", &[])
        .host("outside");
    Ok(Context { topology: plan.build()? })
}

fn every_place_reaches_every_pod_in_both_families(context: &mut Context) -> anyhow::Result<()> {
    let t = &context.topology;
    let (left, near, right, outside) = (t.pod("left"), t.pod("near"), t.pod("right"), t.host("outside"));
    let _servers = [near, right, outside].map(|place| Server::start(place, 9000));
    for (from, to) in [(left, near), (left, right), (left, outside), (near, right), (outside, near), (outside, right)] {
        for at in [to.at(9000), to.at6(9000)] {
            let (_client, who) = Client::who(from, at)?;
            let expected = if at.is_ipv4() { from.at(0).ip() } else { from.at6(0).ip() };
            ensure!(who.name == to.name && who.peer.ip() == expected && who.local == at, "{} → {at}: {who:?}", from.name);
        }
    }
    Ok(())
}

fn line_server_half_closes_counts_and_resets(context: &mut Context) -> anyhow::Result<()> {
    let (left, right) = (context.topology.pod("left"), context.topology.pod("right"));
    let server = Server::start(right, 9000)?;
    let data = pattern(1 << 20);
    let mut client = Client::open(left, right.at(9000), "sink")?;
    std::io::Write::write_all(client.stream(), &data)?;
    client.finish()?;
    let sum = Sum::of(&data);
    let line = client.line()?;
    ensure!(line == format!("{} {}", sum.bytes, sum.sum), "sink answered {line}");

    let mut client = Client::open(left, right.at(9000), "source 1000000")?;
    ensure!(client.rest()? == Sum::of(&pattern(1_000_000)), "the source's bytes arrived whole");

    let mut client = Client::open(left, right.at(9000), "reset")?;
    ensure!(client.wait_cut()? == Cut::Reset, "a reset is seen as one");

    let client = Client::who(left, right.at(9000))?.0;
    client.reset()?;
    ensure!(server.wait_end("who")? == End::Reset, "the server sees the client's reset");
    Ok(())
}

fn capture_sees_plaintext_on_the_nodes_link(context: &mut Context) -> anyhow::Result<()> {
    let t = &context.topology;
    let _server = Server::start(t.pod("right"), 9000)?;
    let capture = Capture::start(&t.node("node-a").netns, "eth0")?;
    let (mut client, _) = Client::who(t.pod("left"), t.pod("right").at(9000))?;
    client.ping("plain-marker")?;
    drop(client);
    let captured = capture.finish();
    ensure!(captured.contains(b"plain-marker"), "{} frames, none with the marker", captured.frames);
    ensure!(captured.contains_on_port(9000, b"plain-marker") && !captured.contains_on_port(15008, b"plain-marker"));
    let (segments, tls) = captured.tls_on_port(9000);
    ensure!(segments > 0 && tls.records == 0 && tls.stray > 0, "plain text was taken for TLS: {tls:?}");
    Ok(())
}

fn a_plan_is_read_from_the_zamaz_manifests(_: &mut Context) -> anyhow::Result<()> {
    let plan = Plan::from_manifests(&agent::workspace_dir().join("manifests/examples/zamaz"))?;
    ensure!(plan.nodes.len() == 2 && plan.pods.len() == 7, "{plan:?}");
    ensure!(plan.pods.iter().all(|pod| pod.namespace == "zamaz" && plan.nodes.iter().any(|node| node.name == pod.node)));
    Ok(())
}

fn a_namespace_takes_its_programs_with_it(_: &mut Context) -> anyhow::Result<()> {
    let name = format!("{}gone", netns::own_prefix());
    let ns = Netns::create(&name)?;
    let mut child = ns.spawn(std::process::Command::new("sleep").arg("60"))?;
    let path = ns.path();
    drop(ns);
    ensure!(!path.exists(), "{} is still there", path.display());
    mesh_tests::wait::until("the program's end", Duration::from_secs(2), || child.try_wait().ok().flatten())?;
    Ok(())
}
