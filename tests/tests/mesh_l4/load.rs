//! Many connections, stuck readers, and what is left afterwards.
use std::io::Read;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use mesh_tests::agent::Agent;
use mesh_tests::program::Client;
use mesh_tests::wait;

use crate::mesh::{Mesh, PORT, WEB_VIP, refused};

pub(crate) fn hundreds_of_connections_at_once(mesh: &mut Mesh) -> anyhow::Result<()> {
    // More than one tunnel takes (100 streams), to two endpoints, so that tunnels are added while others are in use.
    let client = mesh.pod("client");
    let mut open = client.netns.enter(|| {
        std::thread::scope(|scope| {
            let batches: Vec<_> = (0..8)
                .map(|_| {
                    scope.spawn(|| -> anyhow::Result<Vec<Client>> {
                        (0..50).map(|_| Ok(Client::who(client, WEB_VIP.into())?.0)).collect()
                    })
                })
                .collect();
            let ended = batches.into_iter().map(|batch| batch.join().map_err(|_panic| anyhow::anyhow!("a batch panicked"))?);
            ended.collect::<anyhow::Result<Vec<_>>>()
        })
    })?;
    for (number, one) in open.iter_mut().flatten().enumerate() {
        one.ping(&format!("connection {number}"))?;
    }
    ensure!(open.iter().flatten().count() == 400);
    Ok(())
}

pub(crate) fn connections_leave_nothing_open(mesh: &mut Mesh) -> anyhow::Result<()> {
    let settle = |agent: &Agent, at_most: usize| {
        wait::until("descriptors to come back", wait::PATIENCE, || agent.open_fds().ok().filter(|now| *now <= at_most))
            .with_context(|| format!("{} has {:?}, wanted at most {at_most}", agent.node(), agent.open_fds()))
    };
    mesh.call("client", WEB_VIP.into())?;
    let before = [mesh.a().open_fds()?, mesh.b().open_fds()?];
    for _ in 0..150 {
        mesh.call("client", WEB_VIP.into())?;
        mesh.call("client", mesh.outside().at(PORT))?;
        refused(mesh.pod("other"), mesh.pod("web1").at(PORT))?;
        refused(mesh.outside(), mesh.pod("web1").at(PORT))?;
    }
    settle(mesh.a(), before[0] + 4)?;
    settle(mesh.b(), before[1] + 4)?;
    Ok(())
}

pub(crate) fn a_reader_that_stops_holds_up_nobody(mesh: &mut Mesh) -> anyhow::Result<()> {
    const SIZE: usize = 256 << 20;
    let web1 = mesh.pod("web1").at(PORT);
    let before = [mesh.a().rss_kib()?, mesh.b().rss_kib()?];
    let mut stuck = Vec::new();
    for _ in 0..8 {
        let mut client = Client::open(mesh.pod("client"), web1, &format!("source {SIZE}"))?;
        let mut first = [0; 100];
        client.stream().read_exact(&mut first)?;
        stuck.push(client);
    }
    // On the same tunnel, others go on.
    let begun = Instant::now();
    for _ in 0..20 {
        ensure!(mesh.call("client", web1)? == "web1");
    }
    ensure!(begun.elapsed() < Duration::from_secs(20), "20 calls took {:?}", begun.elapsed());
    let mut moved = Client::open(mesh.pod("client"), web1, "source 8000000")?;
    ensure!(moved.rest()?.bytes == 8_000_000, "a transfer on the same tunnel ends");
    for (agent, before) in [mesh.a(), mesh.b()].into_iter().zip(before) {
        let grown = agent.rss_kib()?.saturating_sub(before);
        ensure!(grown < 96 * 1024, "{} grew by {grown} KiB for 8 readers that do not read", agent.node());
    }
    Ok(())
}
