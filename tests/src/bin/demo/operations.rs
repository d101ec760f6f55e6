//! What a platform team does to running traffic: enrols a pod, loses an agent, upgrades an agent.

use std::io::{Read, Write};
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::ensure;
use mesh_tests::topology::Place;
use mesh_tests::wait;
use nix::sys::signal::Signal;

use crate::{Mesh, Tour, http_server, open};

/// File of the pods in the example.
const PODS: &str = "20-workloads.yaml";
/// How a pod says that it wants no redirection.
const OPT_OUT: &str = "    app: zamaz-reports\n    istio.io/dataplane-mode: none\n";
/// How long traffic is watched before and after an event.
const WATCHED: Duration = Duration::from_millis(400);

/// A running pod leaves the mesh and comes back, by its label.
pub fn enrolled_live(tour: &mut Tour, mesh: &mut Mesh) -> anyhow::Result<()> {
    let (data, reports) = (mesh.topology.host("data").clone(), mesh.topology.pod("zamaz-reports").clone());
    mesh.programs.push(http_server(&reports, mesh.files.path())?);
    let enrolled = std::fs::read_to_string(mesh.dir.path().join(PODS))?;
    let left = enrolled.replace("    app: zamaz-reports\n", OPT_OUT);
    ensure!(left != enrolled, "no pod zamaz-reports in {PODS}");

    tour.show("folder", "label istio.io/dataplane-mode: none on the running pod zamaz-reports");
    mesh.dir.put(PODS, &left)?;
    let direct = wait::until_true("plaintext to reach a pod outside the mesh", || ask(&data, reports.at(8080)));
    tour.check(direct.is_ok(), "outside the mesh it answers a client without identity");
    let mut held = open(&data, reports.at(8080))?;

    tour.show("folder", "the label is gone again");
    let begun = Instant::now();
    mesh.dir.put(PODS, &enrolled)?;
    let refused = wait::until_true("plaintext to be refused", || !ask(&data, reports.at(8080)));
    let took = begun.elapsed();
    tour.check(refused.is_ok(), &format!("enrolled {} ms after the file: such a client is refused", took.as_millis()));
    tour.check(finish(&mut held), "the connection that was open before is still served");
    Ok(())
}

/// An agent is killed while its pods are called, and comes back.
pub fn killed(tour: &mut Tour, mesh: &mut Mesh) -> anyhow::Result<()> {
    let (from, auth) = (mesh.topology.pod("zamaz-api-canary").clone(), mesh.topology.pod("zamaz-auth").clone());
    let data = mesh.topology.host("data").clone();
    let to = auth.at(8080);
    under_load(&from, to, |counts| {
        std::thread::sleep(WATCHED);
        let (answered, failed) = counts.take();
        tour.check(
            answered > 0 && failed == 0,
            &format!("calls API → authentication service: {answered} answered, {failed} failed"),
        );
        let agent = mesh.b()?;
        tour.show("node-b $", &format!("kill -9 {}", agent.pid()));
        agent.signal(Signal::SIGKILL)?;
        agent.wait_end(Duration::from_secs(5))?;
        std::thread::sleep(Duration::from_millis(100));
        counts.take();
        let around = data.netns.connect(to, Duration::from_millis(500)).is_ok();
        std::thread::sleep(WATCHED * 2);
        let (answered, failed) = counts.take();
        tour.check(
            answered == 0 && failed > 0 && !around,
            &format!("without its agent the pod is closed: {answered} answered, {failed} failed, and no plaintext goes around"),
        );
        let begun = Instant::now();
        let next = mesh.agent("node-b")?;
        next.wait_ready(Duration::from_secs(20))?;
        mesh.replace("node-b", next)?;
        let back = wait::until_true("calls to be answered", || counts.answered.load(Ordering::Relaxed) > 0);
        tour.check(back.is_ok(), &format!("a new agent: answered again after {} ms", begun.elapsed().as_millis()));
        Ok(())
    })
}

/// An agent is replaced by the next while its pods are called.
pub fn upgraded(tour: &mut Tour, mesh: &mut Mesh) -> anyhow::Result<()> {
    let (from, auth) = (mesh.topology.pod("zamaz-api-canary").clone(), mesh.topology.pod("zamaz-auth").clone());
    let to = auth.at(8080);
    wait::until_true("calls to be answered", || ask(&from, to))?;
    let mut held = open(&from, to)?;
    under_load(&from, to, |counts| {
        std::thread::sleep(WATCHED);
        let old = mesh.b()?;
        let mark = old.mark();
        tour.show("node-b $", "ztunnel proxy …   # beside the one that serves");
        let next = mesh.agent("node-b")?;
        let taken = wait::until_true("the takeover", || next.log_since(mark).contains("took over from the agent"));
        tour.check(taken.is_ok(), "the new agent was handed the listening sockets of the old one");
        next.wait_ready(Duration::from_secs(20))?;
        std::thread::sleep(WATCHED);
        mesh.b()?.signal(Signal::SIGTERM)?;
        std::thread::sleep(WATCHED);
        tour.check(finish(&mut held), "a connection older than all that was served to its end by the old agent");
        mesh.b()?.wait_end(Duration::from_secs(10))?;
        mesh.replace("node-b", next)?;
        std::thread::sleep(WATCHED);
        let (answered, failed) = counts.take();
        tour.check(answered > 0 && failed == 0, &format!("calls meanwhile: {answered} answered, {failed} failed"));
        Ok(())
    })
}

/// What became of calls.
#[derive(Default)]
struct Counts {
    answered: AtomicUsize,
    failed: AtomicUsize,
}
impl Counts {
    /// Answered and failed since the last time.
    fn take(&self) -> (usize, usize) {
        (self.answered.swap(0, Ordering::Relaxed), self.failed.swap(0, Ordering::Relaxed))
    }
}

/// Runs `work` while one call follows the other, each on a connection of its own.
fn under_load(from: &Place, to: SocketAddr, work: impl FnOnce(&Counts) -> anyhow::Result<()>) -> anyhow::Result<()> {
    let (counts, stop) = (Counts::default(), AtomicBool::new(false));
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                let which = if ask(from, to) { &counts.answered } else { &counts.failed };
                which.fetch_add(1, Ordering::Relaxed);
            }
        });
        let done = work(&counts);
        stop.store(true, Ordering::Relaxed);
        done
    })
}

/// Whether a request is answered 200 within half a second.
fn ask(from: &Place, to: SocketAddr) -> bool {
    const LIMIT: Duration = Duration::from_millis(500);
    let answer = || -> std::io::Result<bool> {
        let mut stream = from.netns.connect(to, LIMIT)?;
        stream.set_read_timeout(Some(LIMIT))?;
        stream.write_all(b"GET / HTTP/1.1\r\nhost: demo\r\nconnection: close\r\n\r\n")?;
        let mut all = Vec::new();
        stream.read_to_end(&mut all)?;
        Ok(all.starts_with(b"HTTP/1.1 200 "))
    };
    answer().unwrap_or(false)
}

/// Whether a connection of [`open`], its request completed, is answered.
fn finish(stream: &mut std::net::TcpStream) -> bool {
    let mut answer = [0; 12];
    let asked = stream.write_all(b"host: demo\r\nconnection: close\r\n\r\n");
    asked.and_then(|()| stream.read_exact(&mut answer)).is_ok() && answer == *b"HTTP/1.1 200"
}
