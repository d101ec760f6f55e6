//! How long a route change takes from the file's last byte to the first answer by it, and whether anything is dropped meanwhile.
use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use mesh_tests::bench::row::{HOST, Row, Shape, route_yaml};
use mesh_tests::bench::versus::{Fact, Versus};

use crate::{LARGE, REST, Run};

/// Milliseconds a change may take.
const MUST: f64 = 20.0;
/// No change may take longer, or the run ends.
const LIMIT: Duration = Duration::from_secs(10);
/// Between two questions: asking without pause would take half of the proxy's only processor, and be what is measured.
const PAUSE: Duration = Duration::from_micros(500);
/// Path of the route that changes.
const PATH: &str = "/changing";

pub fn measure(run: &Run, versus: &mut Versus) -> anyhow::Result<()> {
    let changes = if run.quick { 10 } else { 50 };
    let peer = run.waypoint()?;
    let row = run.row(peer, Shape::Plain, LARGE)?;
    let held = row.client().enter(|| TcpStream::connect(row.target()))?;
    let mut client = Client { stream: held, answer: vec![0; 4096] };
    put(&row, 0)?;
    client.until("0")?;
    std::thread::sleep(REST);
    let mut took = Vec::new();
    for version in 1..=changes {
        let text = yaml(version);
        row.mesh().put("changing.yaml", &text)?;
        let start = Instant::now();
        client.until(&version.to_string())?;
        took.push(start.elapsed().as_secs_f64() * 1e3);
        // Not in step with anything the proxy does by itself.
        std::thread::sleep(Duration::from_millis(150 + version * 7 % 100));
    }
    took.sort_by(f64::total_cmp);
    for (q, name, must) in [(0.5, "median", Some(MUST)), (0.9, "ninth tenth", Some(MUST)), (1.0, "most", None)] {
        let value = took[((took.len() - 1) as f64 * q) as usize];
        let what = format!("route change live among 10 k rules, {name} of {changes}");
        versus.facts.push(Fact { peer: peer.name, what, value, unit: "ms", must });
    }
    Ok(())
}

fn yaml(version: u64) -> String {
    let set = format!(
        "{{ type: ResponseHeaderModifier, responseHeaderModifier: {{ set: [ {{ name: x-version, value: \"{version}\" }} ] }} }}"
    );
    let rule = |path: &str| {
        format!(
            "  - matches: [ {{ path: {{ type: PathPrefix, value: {path} }} }} ]\n    filters: [ {set} ]\n    backendRefs: [ {{ name: server, port: 80 }} ]\n"
        )
    };
    let rules: String = (0..15).map(|n| rule(&format!("/more-{n}"))).chain([rule(PATH)]).collect();
    route_yaml("changing", &rules)
}

fn put(row: &Row, version: u64) -> anyhow::Result<()> {
    row.mesh().put("changing.yaml", &yaml(version))
}

struct Client {
    stream: TcpStream,
    answer: Vec<u8>,
}

impl Client {
    /// Asks until the answer has this version. Every answer must be a 200.
    fn until(&mut self, version: &str) -> anyhow::Result<()> {
        let wanted = format!("x-version: {version}\r\n");
        let start = Instant::now();
        loop {
            let head = self.ask()?;
            ensure!(head.starts_with("HTTP/1.1 200 "), "a change dropped a request: {head}");
            if head.contains(&wanted) {
                return Ok(());
            }
            std::thread::sleep(PAUSE);
            ensure!(start.elapsed() < LIMIT, "version {version} is not there after {LIMIT:?}");
        }
    }

    fn ask(&mut self) -> anyhow::Result<String> {
        self.stream.set_read_timeout(Some(LIMIT))?;
        self.stream.write_all(format!("GET {PATH} HTTP/1.1\r\nhost: {HOST}\r\n\r\n").as_bytes())?;
        let mut filled = 0;
        loop {
            let n = self.stream.read(&mut self.answer[filled..])?;
            ensure!(n > 0, "a change closed the connection");
            filled += n;
            let text = String::from_utf8_lossy(&self.answer[..filled]);
            let Some((head, body)) = text.split_once("\r\n\r\n") else { continue };
            let length = head.lines().find_map(|line| line.strip_prefix("content-length: ")).context("a length")?;
            if body.len() >= length.parse::<usize>()? {
                return Ok(format!("{head}\r\n"));
            }
        }
    }
}
