//! How long a client may be silent on a connection that carries HTTP.
use std::net::SocketAddr;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use mesh_tests::raw::Raw;

use crate::binding::{canary, service, wait_canary};
use crate::frames;
use crate::mesh::Mesh;

const LIMIT: Duration = Duration::from_millis(1500);

/// The connection ends by itself, in good order, once the limit has passed since `begun`.
fn ends(mut raw: Raw, begun: Instant, what: &str) -> anyhow::Result<()> {
    let rest = raw.rest(LIMIT * 3)?;
    let took = begun.elapsed();
    ensure!(rest.ended && rest.bytes.is_empty(), "{what}: {rest:?} after {took:?}");
    ensure!(took > LIMIT * 9 / 10, "{what}: ended after {took:?}");
    Ok(())
}

/// The idle limit of HTTP connections (`CULVERT_HTTP_IDLE_TIMEOUT`), counted from the last answer; requests have none by it.
pub(crate) fn a_silent_http_connection_is_ended(mesh: &mut Mesh) -> anyhow::Result<()> {
    let bound = service("t", "idle", "web1", "10.96.2.22", "istio.io/use-waypoint: canary", "");
    let _canary = canary(mesh, &[("CULVERT_HTTP_IDLE_TIMEOUT", "1500ms"), ("CULVERT_WORKER_THREADS", "1")], &bound)?;
    wait_canary(mesh, "http://10.96.2.22/")?;
    let (client, to) = (mesh.pod("client"), SocketAddr::new("10.96.2.22".parse()?, 80));
    let get = |path: &str| format!("GET {path} HTTP/1.1\r\nhost: idle\r\n\r\n");
    let answered = |raw: &mut Raw, path: &str| -> anyhow::Result<()> {
        raw.send(get(path).as_bytes())?;
        let status = raw.answer().with_context(|| path.to_owned())?.status;
        ensure!(status == 200, "{path}: {status}");
        Ok(())
    };
    // One that never asks anything, one that asked, one that asks all the time, and one whose answer takes longer.
    let begun = Instant::now();
    let mute = Raw::open(client, to)?;
    let mut asked = Raw::open(client, to)?;
    answered(&mut asked, "/asked")?;
    let mut slow = Raw::open(client, to)?;
    slow.send(get("/slow/3200").as_bytes())?;
    ends(mute, begun, "never asked")?;
    ends(asked, begun, "asked once")?;
    let status = slow.answer().context("an answer that takes longer than the limit")?.status;
    ensure!(status == 200, "{status}");
    let mut busy = Raw::open(client, to)?;
    let begun = Instant::now();
    while begun.elapsed() < LIMIT + LIMIT / 2 {
        sleep(Duration::from_millis(200));
        answered(&mut busy, "/busy")?;
    }
    ends(busy, Instant::now(), "silent after many requests")?;

    // In HTTP/2 it is said before: GOAWAY without an error.
    let mut raw = Raw::say(client, to, &frames::preface())?;
    ensure!(frames::still_serves(&mut raw, 1, "idle", "/h2")?);
    let said = std::iter::from_fn(|| frames::next(&mut raw)).find(|(kind, ..)| *kind == frames::GOAWAY);
    let code = said.as_ref().and_then(|(.., payload)| payload.get(4..8));
    ensure!(code == Some(&[0; 4]), "GOAWAY, without an error: {said:?}");
    // By default it is an hour.
    let mut patient = Raw::open(client, SocketAddr::from((crate::mesh::WEB_IP, 80)))?;
    answered(&mut patient, "/first")?;
    sleep(LIMIT + LIMIT / 4);
    answered(&mut patient, "/second")
}
