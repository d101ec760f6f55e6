//! How long a route change takes from the file's last byte to the first answer by it, and whether anything is dropped meanwhile.
use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use mesh_tests::bench::row::{HOST, Shape, Size, route_yaml};
use mesh_tests::bench::versus::{Fact, Versus};

use crate::{LARGE, Run};

/// What else there is when a route changes.
#[derive(Clone, Copy, Debug)]
pub enum Among {
    /// 10 000 rules on the Gateway it is on.
    Gateway,
    /// 10 000 rules on the service it is on, in objects of 16.
    Service,
    /// 10 000 services with a rule each, in a file each.
    Services,
}
impl Among {
    fn mesh(self) -> (Shape, Size, &'static str) {
        let one = Size::default();
        match self {
            Self::Gateway => (Shape::Plain, LARGE, "rules of a Gateway"),
            Self::Service => (Shape::Hbone, Size { routes: LARGE.routes, ..one }, "rules of a service"),
            Self::Services => (Shape::Hbone, Size { services: LARGE.routes, ..one }, "services with a rule each"),
        }
    }
}

/// Milliseconds a change may take.
const MUST: f64 = 20.0;
/// No change may take longer, or the run ends.
const LIMIT: Duration = Duration::from_secs(10);
/// Between two questions: asking without pause would take half of the proxy's only processor, and be what is measured.
const PAUSE: Duration = Duration::from_micros(500);
/// Path of the route that changes, its file, and the header of answers that tells its version.
const PATH: &str = "/changing";
const FILE: &str = "changing.yaml";
const VERSION: &str = "x-version";

pub fn measure(run: &Run, among: Among, versus: &mut Versus) -> anyhow::Result<()> {
    let changes = if run.quick { 20 } else { 200 };
    let peer = run.waypoint()?;
    let (shape, size, others) = among.mesh();
    let row = run.row(peer, shape, size)?;
    let held = row.client().enter(|| TcpStream::connect(row.target()))?;
    let mut client = Client { stream: held, answer: vec![0; 4096] };
    // The first one right after the start, while files are so new that their dates say nothing.
    let mut took = Vec::new();
    for version in 0..changes {
        if version % 4 == 3 {
            // Then the file is a new one.
            row.mesh().remove(FILE);
            client.until(|head| !head.contains(VERSION))?;
        }
        row.mesh().put(FILE, &yaml(shape, version))?;
        let start = Instant::now();
        let wanted = format!("{VERSION}: {version}\r\n");
        client.until(|head| head.contains(&wanted))?;
        took.push(start.elapsed().as_secs_f64() * 1e3);
        // Not in step with anything the proxy does by itself.
        std::thread::sleep(Duration::from_millis(60 + version * 7 % 100));
    }
    let first = took.first().copied().unwrap_or_default();
    took.sort_by(f64::total_cmp);
    let of = |q: f64| took[((took.len() - 1) as f64 * q) as usize];
    let facts = [(first, "the first after the start"), (of(0.5), "median"), (of(0.9), "ninth tenth"), (of(1.0), "most")];
    for (value, name) in facts {
        let what = format!("route change live among 10 k {others}, {name} of {changes}");
        versus.facts.push(Fact { peer: peer.name, what, value, unit: "ms", must: Some(MUST) });
    }
    Ok(())
}

/// A route of up to 16 rules; how many follows from the version.
fn yaml(shape: Shape, version: u64) -> String {
    let set = format!(
        "{{ type: ResponseHeaderModifier, responseHeaderModifier: {{ set: [ {{ name: {VERSION}, value: \"{version}\" }} ] }} }}"
    );
    let rule = |path: &str| {
        format!(
            "  - matches: [ {{ path: {{ type: PathPrefix, value: {path} }} }} ]\n    filters: [ {set} ]\n    backendRefs: [ {{ name: server, port: 80 }} ]\n"
        )
    };
    let rules: String = (0..15 - version % 3).map(|n| rule(&format!("/more-{n}"))).chain([rule(PATH)]).collect();
    route_yaml(shape, "changing", &rules)
}

struct Client {
    stream: TcpStream,
    answer: Vec<u8>,
}

impl Client {
    /// Asks until the answer is as wanted. Every answer must be a 200.
    fn until(&mut self, wanted: impl Fn(&str) -> bool) -> anyhow::Result<()> {
        let start = Instant::now();
        loop {
            let head = self.ask()?;
            ensure!(head.starts_with("HTTP/1.1 200 "), "a change dropped a request: {head}");
            if wanted(&head) {
                return Ok(());
            }
            std::thread::sleep(PAUSE);
            ensure!(start.elapsed() < LIMIT, "a change is not there after {LIMIT:?}");
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
