//! Clients and servers that mean harm, or are broken. What each gets is what the RFCs and Envoy say; nobody else is affected; the
//! process lives and its memory is bounded.
use std::fmt::Write as _;
use std::io::Write as _;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use mesh_tests::load::Load;
use mesh_tests::raw::Raw;
use mesh_tests::rude::Rude;
use mesh_tests::topology::Place;
use mesh_tests::wait;

use crate::frames::{self, Came};
use crate::mesh::{Mesh, OTHER, RUDE, RUDE_PORT, WEB_IP};

/// Ways in: through two agents into the tunnel, and from outside to the gateway's plain listener.
fn doors(mesh: &Mesh) -> [(&'static str, Arc<Place>, SocketAddr); 2] {
    let vip = SocketAddr::from((WEB_IP, 80));
    [
        ("waypoint", Arc::clone(mesh.pod("client")), vip),
        ("gateway", Arc::clone(mesh.topology.host("outside")), mesh.pod("gw").at(80)),
    ]
}

/// Runs `attack` while others use the mesh as they should: they notice nothing, the proxies live, and what the attack cost is
/// given back to within `slack` MiB.
fn beside(mesh: &Mesh, slack: u64, attack: impl FnOnce() -> anyhow::Result<()>) -> anyhow::Result<()> {
    let before: Vec<u64> = ["wp", "gw"].iter().map(|name| mesh.proxy(name).rss_kib()).collect::<anyhow::Result<_>>()?;
    let bystanders =
        Load::start(mesh.pod("client"), SocketAddr::new(OTHER.parse()?, 80), "/bystander", 2, Duration::from_millis(3));
    let attacked = attack();
    let tally = bystanders.finish(20)?;
    attacked?;
    tally.all_well(20, 0).context("those who did nothing wrong")?;
    ensure!(tally.slowest < Duration::from_secs(8), "bystanders waited: {tally:?}");
    for (name, before) in ["wp", "gw"].into_iter().zip(before) {
        let proxy = mesh.proxy(name);
        ensure!(proxy.ended().is_none(), "{name} ended:\n{}", proxy.log_tail(20));
        ensure!(!proxy.whole_log().contains("panicked"), "{name} panicked:\n{}", proxy.log_tail(40));
        let limit = before + (slack << 10);
        wait::until("memory to come back", Duration::from_secs(40), || proxy.rss_kib().ok().filter(|now| *now <= limit))
            .with_context(|| format!("{name}: {before} KiB before, {:?} now", proxy.rss_kib()))?;
    }
    Ok(())
}

/// What must come of a request.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Must {
    /// Refused with one of these, the connection ended, and nothing carried.
    Refuse(&'static [u16]),
    /// Carried, so many times.
    Carry(usize),
    /// Either is allowed, but never more than one request may come out of it.
    One(&'static [u16]),
}
use Must::{Carry, One, Refuse};

const BAD: Must = Refuse(&[400]);
const H: &str = "host: web.example\r\n";
const SMUGGLED: &str = "GET /shop/smuggled HTTP/1.1\r\nhost: web.example\r\n\r\n";

/// Requests whose length two readers could see differently, and the answers they get. `$` is the path of the case, `#` a request that must not get through.
pub(crate) fn smuggling() -> Vec<(&'static str, String, Must)> {
    let post = |fields: &str, body: &str| format!("POST $ HTTP/1.1\r\n{H}{fields}\r\n{body}");
    let chunked = |body: &str| post("transfer-encoding: chunked\r\n", body);
    let mut cases = vec![
        ("two lengths that differ", post("content-length: 5\r\ncontent-length: 6\r\n", "hello!"), BAD),
        ("two lengths that agree", post("content-length: 5\r\ncontent-length: 5\r\n", "hello"), One(&[400])),
        ("a list of lengths", post("content-length: 5, 6\r\n", "hello!"), BAD),
        ("a length with a sign", post("content-length: +5\r\n", "hello"), BAD),
        ("a negative length", post("content-length: -5\r\n", "hello"), BAD),
        ("a hexadecimal length", post("content-length: 0x5\r\n", "hello"), BAD),
        ("an empty length", post("content-length:\r\n", "hello"), BAD),
        ("a length beyond counting", post("content-length: 99999999999999999999999\r\n", "hello"), BAD),
        ("length, then chunked", post("content-length: 4\r\ntransfer-encoding: chunked\r\n", "0\r\n\r\n#"), One(&[400])),
        ("chunked, then length", post("transfer-encoding: chunked\r\ncontent-length: 4\r\n", "0\r\n\r\n#"), One(&[400])),
        ("length hides a request", post("transfer-encoding: chunked\r\ncontent-length: 6\r\n", "0\r\n\r\n#"), One(&[400])),
        ("chunked twice", post("transfer-encoding: chunked, chunked\r\n", "0\r\n\r\n"), Refuse(&[400, 501])),
        (
            "chunked twice in two fields",
            post("transfer-encoding: chunked\r\ntransfer-encoding: chunked\r\n", "0\r\n\r\n"),
            Refuse(&[400, 501]),
        ),
        (
            "chunked undone",
            post("transfer-encoding: chunked\r\ntransfer-encoding: identity\r\n", "0\r\n\r\n#"),
            Refuse(&[400, 501]),
        ),
        ("chunked under gzip", post("transfer-encoding: gzip, chunked\r\n", "0\r\n\r\n"), Refuse(&[400, 501])),
        ("an unknown coding", post("transfer-encoding: xchunked\r\n", "0\r\n\r\n#"), Refuse(&[400, 501])),
        ("a coding with a parameter", post("transfer-encoding: chunked;q=1\r\n", "0\r\n\r\n#"), Refuse(&[400, 501])),
        ("a coding after a vertical tab", post("transfer-encoding: \u{b}chunked\r\n", "0\r\n\r\n#"), Refuse(&[400, 501])),
        ("a space before the colon", post("transfer-encoding : chunked\r\n", "0\r\n\r\n#"), BAD),
        ("a folded coding", post("transfer-encoding:\r\n chunked\r\n", "0\r\n\r\n#"), BAD),
        ("loud but right", post("Transfer-Encoding: CHUNKED\r\n", "5\r\nhello\r\n0\r\n\r\n"), Carry(1)),
        ("chunked in HTTP/1.0", format!("POST $ HTTP/1.0\r\n{H}transfer-encoding: chunked\r\n\r\n0\r\n\r\n"), BAD),
        ("a folded field", format!("GET $ HTTP/1.1\r\n{H}x-a: b\r\n c\r\n\r\n"), BAD),
        ("a field that begins with a space", format!("GET $ HTTP/1.1\r\n x-a: b\r\n{H}\r\n"), BAD),
        ("bare line feeds", "GET $ HTTP/1.1\nhost: web.example\n\n".to_owned(), One(&[400])),
        ("a bare carriage return in a value", format!("GET $ HTTP/1.1\r\n{H}x-a: b\rx-b: c\r\n\r\n"), BAD),
        ("a NUL in a value", format!("GET $ HTTP/1.1\r\n{H}x-a: b\0c\r\n\r\n"), BAD),
        ("a space in a name", format!("GET $ HTTP/1.1\r\n{H}x a: b\r\n\r\n"), BAD),
        ("a name that is none", format!("GET $ HTTP/1.1\r\n{H}: b\r\n\r\n"), BAD),
        ("a line without a colon", format!("GET $ HTTP/1.1\r\n{H}x-a\r\n\r\n"), BAD),
        ("two requests in one", format!("GET $ HTTP/1.1\r\n{H}\r\nGET $ HTTP/1.1\r\n{H}connection: close\r\n\r\n"), Carry(2)),
    ];
    for (name, body) in [
        ("a chunk of 0x5", "0x5\r\nhello\r\n0\r\n\r\n"),
        ("a chunk of +5", "+5\r\nhello\r\n0\r\n\r\n"),
        ("a chunk of -5", "-5\r\nhello\r\n0\r\n\r\n"),
        ("a chunk of g", "g\r\nhello\r\n0\r\n\r\n"),
        ("a chunk of nothing", "\r\nhello\r\n0\r\n\r\n"),
        ("a chunk of two sizes", "5 5\r\nhello\r\n0\r\n\r\n"),
        ("a chunk beyond counting", "ffffffffffffffffff\r\nhello\r\n0\r\n\r\n"),
        ("a chunk that is longer than it says", "5\r\nhello!\r\n0\r\n\r\n"),
        ("a chunk extension with a bare line feed", "5;a\nhello\r\n0\r\n\r\n"),
    ] {
        cases.push((name, chunked(body), BAD));
    }
    cases.push(("chunk extensions without end", chunked(&format!("5;{}\r\nhello\r\n0\r\n\r\n", "a".repeat(80_000))), BAD));
    cases.push(("a chunk extension", chunked("5;a=b\r\nhello\r\n0\r\n\r\n"), Carry(1)));
    cases
}

/// Request lines and hosts.
fn targets() -> Vec<(&'static str, String, Must)> {
    let get = |line: &str| format!("{line}\r\n{H}\r\n");
    vec![
        ("no host", "GET $ HTTP/1.1\r\n\r\n".to_owned(), BAD),
        ("two hosts", format!("GET $ HTTP/1.1\r\n{H}{H}\r\n"), BAD),
        ("a host with a user", "GET $ HTTP/1.1\r\nhost: root@web.example\r\n\r\n".to_owned(), BAD),
        ("a host with a path", "GET $ HTTP/1.1\r\nhost: web.example/x\r\n\r\n".to_owned(), BAD),
        ("a host with a space", "GET $ HTTP/1.1\r\nhost: web example\r\n\r\n".to_owned(), BAD),
        ("a target with a user", get("GET http://root@web.example$ HTTP/1.1"), BAD),
        ("CONNECT", "CONNECT web.example:80 HTTP/1.1\r\nhost: web.example:80\r\n\r\n".to_owned(), Refuse(&[400, 404, 405])),
        ("two spaces", get("GET  $ HTTP/1.1"), BAD),
        ("a tab", get("GET\t$ HTTP/1.1"), BAD),
        ("no version", get("GET $"), BAD),
        ("a version of nobody", get("GET $ HTTP/1.9"), Refuse(&[400, 505])),
        ("a version of HTTP/2", get("GET $ HTTP/2.0"), Refuse(&[400, 505])),
        ("a quiet version", get("GET $ http/1.1"), BAD),
        ("a space in the target", get("GET $ /x HTTP/1.1"), BAD),
        ("a method of brackets", get("G[T $ HTTP/1.1"), BAD),
        ("a preface that stops", "PRI * HTTP/2.0\r\n\r\nXX\r\n\r\n".to_owned(), Refuse(&[400, 404])),
        (
            "h2c",
            format!(
                "GET $ HTTP/1.1\r\n{H}connection: upgrade, http2-settings\r\nupgrade: h2c\r\nhttp2-settings: AAMAAABkAAQAoAAAAAIAAAAA\r\n\r\n"
            ),
            One(&[403]),
        ),
        (
            "a host that is not the target's",
            "GET http://web.example$ HTTP/1.1\r\nhost: evil.example\r\nconnection: close\r\n\r\n".to_owned(),
            Carry(1),
        ),
    ]
}

/// Too much of something.
fn oversized() -> Vec<(&'static str, String, Must)> {
    let mut many = String::new();
    for number in 0..200 {
        let _infallible = write!(many, "x-{number}: y\r\n");
    }
    vec![
        ("a field of 100 KB", format!("GET $ HTTP/1.1\r\n{H}x-a: {}\r\n\r\n", "a".repeat(100_000)), Refuse(&[431])),
        ("a name of 100 KB", format!("GET $ HTTP/1.1\r\n{H}{}: x\r\n\r\n", "a".repeat(100_000)), Refuse(&[431, 400])),
        ("200 fields", format!("GET $ HTTP/1.1\r\n{H}{many}\r\n"), Refuse(&[431])),
        ("a target of 100 KB", format!("GET ${} HTTP/1.1\r\n{H}\r\n", "a".repeat(100_000)), Refuse(&[400, 414, 431])),
        ("a method of 100 KB", format!("{} $ HTTP/1.1\r\n{H}\r\n", "A".repeat(100_000)), Refuse(&[400, 431])),
        ("empty lines without end", "\r\n".repeat(50_000), Refuse(&[400, 431])),
    ]
}

fn judge(mesh: &Mesh, from: &Place, to: SocketAddr, path: &str, bytes: &str, must: Must) -> anyhow::Result<()> {
    let text = bytes.replace('$', path).replace('#', SMUGGLED);
    let mut raw = Raw::say(from, to, text.as_bytes())?;
    // Who is refused is cut off, as is who asks for it in the last of several; of the others it must be seen that nothing more comes.
    let rest = raw.rest(Duration::from_millis(if matches!(must, Refuse(_) | Carry(2..)) { 5000 } else { 100 }))?;
    let text = String::from_utf8_lossy(&rest.bytes).into_owned();
    let statuses: Vec<u16> = text
        .split("HTTP/1.1 ")
        .skip(1)
        .filter_map(|answer| answer.get(..3)?.parse().ok())
        .filter(|status| *status != 100)
        .collect();
    let carried = ["web1", "web2"].iter().map(|name| mesh.web[name].seen(path).len()).sum::<usize>();
    let smuggled = ["web1", "web2"].iter().any(|name| !mesh.web[name].seen("smuggled").is_empty());
    let told = || format!("{statuses:?}, carried {carried} times, ended: {}, {text:?}", rest.ended);
    ensure!(!smuggled, "a request was smuggled: {}", told());
    match must {
        Refuse(allowed) => {
            ensure!(carried == 0 && statuses.len() == 1 && allowed.contains(&statuses[0]) && rest.ended, "{}", told());
        }
        Carry(count) => ensure!(carried == count && statuses == vec![200; count], "{}", told()),
        One(allowed) => {
            let refused = carried == 0 && statuses.len() == 1 && allowed.contains(&statuses[0]);
            ensure!(refused || (carried == 1 && statuses == [200]), "{}", told());
        }
    }
    Ok(())
}

fn all(mesh: &Mesh, group: &str, cases: &[(&'static str, String, Must)]) -> anyhow::Result<()> {
    let mut wrong = String::new();
    beside(mesh, 24, || {
        for (door, from, to) in doors(mesh) {
            for (number, (name, bytes, must)) in cases.iter().enumerate() {
                let path = format!("/shop/{group}-{door}-{number}-");
                if let Err(error) = judge(mesh, &from, to, &path, bytes, *must) {
                    let _infallible = writeln!(wrong, "{door}: {name} ({must:?}): {error:#}");
                }
            }
        }
        Ok(())
    })?;
    ensure!(wrong.is_empty(), "\n{wrong}");
    Ok(())
}

pub(crate) fn requests_cannot_be_smuggled(mesh: &mut Mesh) -> anyhow::Result<()> {
    all(mesh, "smuggling", &smuggling())
}

pub(crate) fn odd_targets_are_refused_or_made_plain(mesh: &mut Mesh) -> anyhow::Result<()> {
    all(mesh, "targets", &targets())?;
    for name in ["web1", "web2"] {
        for echo in mesh.web[name].seen("/shop/targets-") {
            let host = &echo["headers"]["host"];
            ensure!(host == "web.example", "the target's authority is the host: {echo}");
            ensure!(echo["headers"]["upgrade"].is_null() && echo["headers"]["http2-settings"].is_null(), "{echo}");
        }
    }
    Ok(())
}

pub(crate) fn too_much_of_anything_is_refused(mesh: &mut Mesh) -> anyhow::Result<()> {
    all(mesh, "oversized", &oversized())?;
    too_many_fields_of_http2(mesh)
}
/// The stream is reset, and the request told of as Envoy tells of it.
fn too_many_fields_of_http2(mesh: &Mesh) -> anyhow::Result<()> {
    let proxy = mesh.proxy("wp");
    let told = || -> anyhow::Result<f64> {
        let labels = [("response_code", "0"), ("response_flags", "DPE"), ("destination_service_name", "web")];
        Ok(proxy.metrics()?.sum("istio_requests_total", &labels))
    };
    let (before, mark) = (told()?, proxy.mark());
    let mut fields = vec![(":method", "GET"), (":scheme", "http"), (":authority", "web.example"), (":path", "/too-many")];
    fields.extend([("x-a", "b"); 97]);
    let mut raw = Raw::say(mesh.pod("client"), SocketAddr::from((WEB_IP, 80)), &frames::preface())?;
    raw.send(&frames::frame(frames::HEADERS, frames::END_STREAM | frames::END_HEADERS, 1, &frames::block(&fields)))?;
    let came = frames::outcome(&mut raw, 1)?;
    ensure!(came == Came::Reset(2), "{came:?}");
    wait::until_true("the request in the metrics", || told().is_ok_and(|now| now as u64 == before as u64 + 1))?;
    wait::until_true("its line in the log", || {
        proxy.log_since(mark).lines().any(|line| line.contains("/too-many") && line.contains("http2.too_many_headers"))
    })
}

/// Heads that HTTP/2 calls malformed (RFC 9113 §8.1.1): a stream error or 400, never a request.
pub(crate) fn malformed_http2_heads_are_stream_errors(mesh: &mut Mesh) -> anyhow::Result<()> {
    const M: (&str, &str) = (":method", "GET");
    const S: (&str, &str) = (":scheme", "http");
    const A: (&str, &str) = (":authority", "web.example");
    const P: (&str, &str) = (":path", "/shop/pseudo");
    let cases: &[(&str, &[(&str, &str)])] = &[
        ("no method", &[S, A, P]),
        ("no path", &[M, S, A]),
        ("no scheme", &[M, A, P]),
        ("two paths", &[M, S, A, P, P]),
        ("two methods", &[M, M, S, A, P]),
        ("two authorities", &[M, S, A, A, P]),
        ("an unknown pseudo-field", &[M, S, A, P, (":evil", "x")]),
        ("a status", &[M, S, A, P, (":status", "200")]),
        ("a pseudo-field after others", &[M, S, A, ("x-a", "b"), P]),
        ("a name in capitals", &[M, S, A, P, ("X-A", "b")]),
        ("a name with a space", &[M, S, A, P, ("x a", "b")]),
        ("a name with a line end", &[M, S, A, P, ("x\r\na", "b")]),
        ("an empty name", &[M, S, A, P, ("", "b")]),
        ("a value with a line end", &[M, S, A, P, ("x-a", "b\r\nx-b: c")]),
        ("a value with a NUL", &[M, S, A, P, ("x-a", "b\0c")]),
        ("connection", &[M, S, A, P, ("connection", "close")]),
        ("transfer-encoding", &[M, S, A, P, ("transfer-encoding", "chunked")]),
        ("upgrade", &[M, S, A, P, ("upgrade", "websocket")]),
        ("te other than trailers", &[M, S, A, P, ("te", "gzip")]),
        ("an empty path", &[M, S, A, (":path", "")]),
        ("a path without a slash", &[M, S, A, (":path", "shop/pseudo")]),
        ("a path with a space", &[M, S, A, (":path", "/shop/pseudo HTTP/1.1")]),
        ("a path with a line end", &[M, S, A, (":path", "/shop/pseudo\r\nx-a: b")]),
        ("an empty method", &[(":method", ""), S, A, P]),
        ("a method with a space", &[(":method", "GET /"), S, A, P]),
        ("an authority with a user", &[M, S, (":authority", "root@web.example"), P]),
        ("an authority with a slash", &[M, S, (":authority", "web.example/x"), P]),
        ("an authority with a line end", &[M, S, (":authority", "web.example\r\n"), P]),
        ("a host that is not the authority", &[M, S, A, P, ("host", "evil.example")]),
        ("a protocol without CONNECT", &[M, S, A, P, (":protocol", "websocket")]),
        ("CONNECT with a path", &[(":method", "CONNECT"), S, A, P]),
        ("a length without a body", &[(":method", "POST"), S, A, P, ("content-length", "5")]),
        ("two lengths", &[(":method", "POST"), S, A, P, ("content-length", "0"), ("content-length", "5")]),
        ("a length that is none", &[(":method", "POST"), S, A, P, ("content-length", "five")]),
    ];
    let mut wrong = String::new();
    beside(mesh, 24, || {
        for (door, from, to) in doors(mesh) {
            for (name, fields) in cases {
                let mut raw = Raw::say(&from, to, &frames::preface())?;
                let head = frames::frame(frames::HEADERS, frames::END_STREAM | frames::END_HEADERS, 1, &frames::block(fields));
                let _refused_midway = raw.send(&head);
                let came = frames::outcome(&mut raw, 1)?;
                // Of two hosts the authority is the one.
                let fine = *name == "a host that is not the authority" && came == Came::Status(200);
                if !fine && !matches!(came, Came::Reset(1) | Came::GoAway(1) | Came::Status(400 | 404 | 405)) {
                    let _infallible = writeln!(wrong, "{door}: {name}: {came:?}");
                }
            }
            // A body that is not as long as it said: longer, then shorter.
            for (name, length, body) in [("too long", "3", "hello"), ("too short", "9", "hello")] {
                let mut raw = Raw::say(&from, to, &frames::preface())?;
                let head = frames::block(&[(":method", "POST"), S, A, P, ("content-length", length)]);
                raw.send(&frames::frame(frames::HEADERS, frames::END_HEADERS, 1, &head))?;
                raw.send(&frames::frame(frames::DATA, frames::END_STREAM, 1, body.as_bytes()))?;
                let came = frames::outcome(&mut raw, 1)?;
                if !matches!(came, Came::Reset(1) | Came::GoAway(1) | Came::Status(400)) {
                    let _infallible = writeln!(wrong, "{door}: a body {name}: {came:?}");
                }
            }
        }
        Ok(())
    })?;
    for name in ["web1", "web2"] {
        let seen = mesh.web[name].seen("pseudo");
        let fine = |echo: &serde_json::Value| echo["headers"]["host"] == "web.example" && echo["body"] == "";
        if let Some(echo) = seen.iter().find(|echo| !fine(echo)) {
            let _infallible = writeln!(wrong, "carried: {echo}");
        }
    }
    ensure!(wrong.is_empty(), "\n{wrong}");
    Ok(())
}

/// Ends in one of these, and the process with whatever it cost is as before.
fn flood(mesh: &Mesh, name: &str, make: impl Fn(&mut Raw) -> std::io::Result<()>) -> anyhow::Result<()> {
    beside(mesh, 32, || {
        for (_, from, to) in doors(mesh) {
            let mut raw = Raw::say(&from, to, &frames::preface())?;
            let _cut_off_midway = make(&mut raw);
            // Whether it was cut off or not: if it is still served, it is served right.
            let _either = frames::still_serves(&mut raw, 0x00ff_ffff, "web.example", "/shop/after")?;
            drop(raw);
            let mut fresh = Raw::say(&from, to, &frames::preface())?;
            ensure!(frames::still_serves(&mut fresh, 1, "web.example", "/shop/fresh")?, "a new connection is served");
        }
        Ok(())
    })
    .with_context(|| name.to_owned())
}

pub(crate) fn http2_floods_cost_nobody_else(mesh: &mut Mesh) -> anyhow::Result<()> {
    let get = frames::get("web.example", "/shop/flood");
    let cancel = 8_u32.to_be_bytes();
    flood(mesh, "rapid reset", |raw| {
        for stream in (1..6000).step_by(2) {
            let open = frames::frame(frames::HEADERS, frames::END_STREAM | frames::END_HEADERS, stream, &get);
            raw.send(&[open, frames::frame(frames::RST_STREAM, 0, stream, &cancel)].concat())?;
        }
        Ok(())
    })?;
    flood(mesh, "continuations", |raw| {
        raw.send(&frames::frame(frames::HEADERS, frames::END_STREAM, 1, &get))?;
        let more = frames::frame(frames::CONTINUATION, 0, 1, &frames::block(&[("x-a", "b")])).repeat(64);
        for _ in 0..2000 {
            raw.send(&more)?;
        }
        Ok(())
    })?;
    flood(mesh, "one field, sixty thousand times", |raw| {
        // Put in the table of fields once (0x40), then named by its index (0xbe = 62).
        let large = [&[0x40, 3][..], b"x-a", &[127, 0xa1, 0x1e], "a".repeat(4000).as_bytes()].concat();
        let block = [get.as_slice(), &large, &[0xbe].repeat(12_000)].concat();
        raw.send(&frames::frame(frames::HEADERS, frames::END_STREAM | frames::END_HEADERS, 1, &block))
    })?;
    flood(mesh, "settings", |raw| (0..400).try_for_each(|_| raw.send(&frames::frame(frames::SETTINGS, 0, 0, &[]).repeat(100))))?;
    flood(mesh, "pings", |raw| (0..400).try_for_each(|_| raw.send(&frames::frame(frames::PING, 0, 0, &[7; 8]).repeat(100))))?;
    flood(mesh, "empty data", |raw| {
        let head =
            frames::block(&[(":method", "POST"), (":scheme", "http"), (":authority", "web.example"), (":path", "/shop/d")]);
        raw.send(&frames::frame(frames::HEADERS, frames::END_HEADERS, 1, &head))?;
        (0..400).try_for_each(|_| raw.send(&frames::frame(frames::DATA, 0, 1, &[]).repeat(100)))
    })?;
    flood(mesh, "windows", |raw| {
        raw.send(&frames::frame(frames::WINDOW_UPDATE, 0, 0, &0x7fff_ffff_u32.to_be_bytes()))?;
        raw.send(&frames::frame(frames::WINDOW_UPDATE, 0, 0, &0x7fff_ffff_u32.to_be_bytes()))
    })?;
    flood(mesh, "streams that never end", |raw| {
        let head =
            frames::block(&[(":method", "POST"), (":scheme", "http"), (":authority", "web.example"), (":path", "/shop/o")]);
        (1..4000).step_by(2).try_for_each(|stream| raw.send(&frames::frame(frames::HEADERS, frames::END_HEADERS, stream, &head)))
    })
}

/// What an endpoint answers to `GET /NAME`, byte for byte, and whether it ends the connection then.
const LIES: &[(&str, &str, bool, &[u16])] = &[
    ("nothing", "", true, &[503]),
    ("half-a-status-line", "HTTP/1.1 20", true, &[502, 503]),
    ("half-a-head", "HTTP/1.1 200 OK\r\ncontent-le", true, &[502, 503]),
    ("garbage", "\u{1}\u{2}\u{3}\u{4} what?\r\n\r\n", true, &[502]),
    ("another-protocol", "SSH-2.0-OpenSSH_9.7\r\n", true, &[502]),
    ("an-older-protocol", "<html>hello</html>\r\n\r\n", true, &[502]),
    ("two-lengths", "HTTP/1.1 200 OK\r\ncontent-length: 2\r\ncontent-length: 3\r\n\r\nok!", true, &[502]),
    ("a-length-that-is-none", "HTTP/1.1 200 OK\r\ncontent-length: two\r\n\r\nok", true, &[502]),
    ("a-length-beyond-counting", "HTTP/1.1 200 OK\r\ncontent-length: 99999999999999999999\r\n\r\nok", true, &[502]),
    ("a-status-beyond-three", "HTTP/1.1 2000 OK\r\ncontent-length: 2\r\n\r\nok", true, &[502]),
    ("a-status-of-nothing", "HTTP/1.1 000 OK\r\ncontent-length: 2\r\n\r\nok", true, &[502]),
    ("a-folded-field", "HTTP/1.1 200 OK\r\nx-a: b\r\n c\r\ncontent-length: 2\r\n\r\nok", true, &[502]),
    ("a-bare-return", "HTTP/1.1 200 OK\r\nx-a: b\rc\r\ncontent-length: 2\r\n\r\nok", true, &[502]),
    ("a-switch-nobody-asked-for", "HTTP/1.1 101 Switching\r\nconnection: upgrade\r\nupgrade: x\r\n\r\n", true, &[502, 503]),
    ("an-http2-preface", "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", true, &[502]),
];

pub(crate) fn an_endpoint_that_lies_harms_its_own_request_only(mesh: &mut Mesh) -> anyhow::Result<()> {
    let long = format!("HTTP/1.1 200 OK\r\n{}content-length: 2\r\n\r\nok", format!("x-a: {}\r\n", "a".repeat(1000)).repeat(200));
    let continued = format!("{}HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok", "HTTP/1.1 100 Continue\r\n\r\n".repeat(50));
    let _rude = Rude::start(mesh.pod("web1"), RUDE_PORT, move |head, stream| {
        let name = head.split(['/', ' ']).nth(2).unwrap_or_default();
        let ends = || Err(std::io::ErrorKind::ConnectionAborted.into());
        if let Some((_, bytes, ending, _)) = LIES.iter().find(|(lie, ..)| *lie == name) {
            stream.write_all(bytes.as_bytes())?;
            return if *ending { ends() } else { Ok(()) };
        }
        match name {
            "a-long-head" => stream.write_all(long.as_bytes())?,
            "many-continues" => stream.write_all(continued.as_bytes())?,
            "short" => {
                stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\nshort")?;
                return ends();
            }
            "short-chunks" => {
                stream.write_all(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nshort\r\n")?;
                return ends();
            }
            "bad-chunks" => {
                stream.write_all(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nshort\r\nzz\r\n")?;
                return ends();
            }
            "more" => stream.write_all(
                b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nokHTTP/1.1 200 OK\r\ncontent-length: 8\r\nx-stolen: 1\r\n\r\npoisoned",
            )?,
            "no-content-with-content" => stream.write_all(b"HTTP/1.1 204 No Content\r\n\r\npoisoned")?,
            "length-and-chunks" => stream
                .write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 40\r\ntransfer-encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n")?,
            _ => stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\nfine")?,
        }
        Ok(())
    })?;
    let to = SocketAddr::new(RUDE.parse()?, 80);
    let client = Arc::clone(mesh.pod("client"));
    let get = |path: &str| -> anyhow::Result<Raw> {
        Ok(Raw::say(&client, to, format!("GET /{path} HTTP/1.1\r\nhost: rude\r\n\r\n").as_bytes())?)
    };
    let mut wrong = String::new();
    beside(mesh, 24, || {
        for (name, _, _, allowed) in LIES {
            match get(name)?.answer() {
                Ok(answer) if allowed.contains(&answer.status) => {}
                other => drop(writeln!(wrong, "{name}: {other:?}, wanted {allowed:?}")),
            }
        }
        let answer = get("a-long-head")?.answer()?;
        ensure!(answer.status == 502, "a head of 200 KB: {}", answer.status);
        let answer = get("many-continues")?.answer()?;
        ensure!(answer.status == 200 && answer.body == "ok", "{answer:?}");
        // Of an answer that breaks off the client must notice that it is not whole.
        for name in ["short", "short-chunks", "bad-chunks"] {
            let mut raw = get(name)?;
            let rest = raw.rest(Duration::from_secs(15))?;
            let text = String::from_utf8_lossy(&rest.bytes);
            let begun = text.is_empty() || text.starts_with("HTTP/1.1 200");
            let cut = begun && !text.ends_with("0\r\n\r\n") && rest.ended;
            ensure!(cut, "{name}: {text:?}, ended: {}", rest.ended);
        }
        let answer = get("length-and-chunks")?.answer()?;
        ensure!(matches!(answer.status, 200 | 502) && !answer.body.contains("40"), "{answer:?}");
        // What an endpoint says beyond its answer is nobody's: not of this client, and not of the next.
        for name in ["more", "no-content-with-content"] {
            for _ in 0..20 {
                let answer = get(name)?.answer()?;
                ensure!(matches!((answer.status, answer.body.as_str()), (200, "ok") | (204, "")), "{name}: {answer:?}");
                let answer = get("then")?.answer()?;
                ensure!(
                    answer.status == 503
                        || (answer.status == 200 && answer.body == "fine" && answer.header("x-stolen").is_none()),
                    "after {name}: {answer:?}"
                );
            }
        }
        Ok(())
    })?;
    ensure!(wrong.is_empty(), "\n{wrong}");
    Ok(())
}

/// Clients that stop halfway: nothing stays behind for them.
pub(crate) fn half_closed_and_abandoned_requests_leave_nothing(mesh: &mut Mesh) -> anyhow::Result<()> {
    let fds = [mesh.proxy("wp").open_fds()?, mesh.proxy("gw").open_fds()?];
    beside(mesh, 24, || {
        for (_, from, to) in doors(mesh) {
            let mut open = Vec::new();
            for n in 0..40 {
                let text = match n % 4 {
                    0 => format!("GET /shop/half HTTP/1.1\r\n{H}"),
                    1 => format!("POST /shop/half HTTP/1.1\r\n{H}content-length: 100\r\n\r\nhalf"),
                    2 => format!("POST /shop/half HTTP/1.1\r\n{H}transfer-encoding: chunked\r\n\r\n5\r\nhello\r\n"),
                    _ => format!("GET /shop/slow/700 HTTP/1.1\r\n{H}\r\n"),
                };
                let mut raw = Raw::say(&from, to, text.as_bytes())?;
                if n % 8 < 4 {
                    raw.finish()?;
                }
                open.push(raw);
            }
            drop(open);
        }
        Ok(())
    })?;
    for (name, before) in ["wp", "gw"].into_iter().zip(fds) {
        let proxy = mesh.proxy(name);
        wait::until("descriptors to come back", wait::PATIENCE, || proxy.open_fds().ok().filter(|now| *now <= before + 12))
            .with_context(|| format!("{name}: {before} before, {:?} now", proxy.open_fds()))?;
    }
    Ok(())
}
