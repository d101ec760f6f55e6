//! What is not HTTP, or stops being it.
use std::io::{Read, Write};
use std::iter;
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use mesh_tests::program::{Client, Server};
use mesh_tests::raw::Raw;
use mesh_tests::rude::Rude;

use crate::frames::{self, Came};
use crate::mesh::{BYTES, Mesh, ObjectsForNow, RUDE, RUDE_PORT, WEB_IP};
use crate::policy::of_web;

pub(crate) fn vip(port: u16) -> SocketAddr {
    let [a, b, c, d] = WEB_IP;
    SocketAddr::new([a, b, c, d].into(), port)
}

/// A WebSocket to a server that echoes.
pub(crate) fn upgraded(mesh: &Mesh) -> anyhow::Result<TcpStream> {
    let mut stream = mesh.pod("client").netns.connect(vip(80), Duration::from_secs(5))?;
    stream.set_read_timeout(Some(Duration::from_secs(5)))?;
    stream.write_all(b"GET /chat HTTP/1.1\r\nhost: web\r\nconnection: Upgrade\r\nupgrade: websocket\r\n\r\n")?;
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        let mut byte = [0];
        stream.read_exact(&mut byte)?;
        head.push(byte[0]);
    }
    let head = String::from_utf8_lossy(&head).to_lowercase();
    ensure!(head.starts_with("http/1.1 101") && head.contains("upgrade: websocket"), "{head}");
    Ok(stream)
}

pub(crate) fn an_upgrade_is_carried(mesh: &mut Mesh) -> anyhow::Result<()> {
    let mut stream = upgraded(mesh)?;
    for text in ["one", "two", "three"] {
        stream.write_all(text.as_bytes())?;
        let mut back = vec![0; text.len()];
        stream.read_exact(&mut back)?;
        ensure!(back == text.as_bytes());
    }
    Ok(())
}

/// The same asked for in HTTP/2 (RFC 8441): an upgrade to the endpoint, and one to policies.
pub(crate) fn an_upgrade_over_http2_is_carried(mesh: &mut Mesh) -> anyhow::Result<()> {
    const MAY_CONNECT: [u8; 6] = [0, 8, 0, 0, 0, 1];
    let mut raw = Raw::say(mesh.pod("client"), vip(80), &frames::preface())?;
    let settings = iter::from_fn(|| frames::next(&mut raw)).find(|(kind, ..)| *kind == frames::SETTINGS);
    let told = settings.is_some_and(|(.., payload)| payload.chunks(6).any(|one| one == MAY_CONNECT));
    ensure!(told, "the server does not say that it can be asked");
    let ask = |stream, path: &str, more: &[(&str, &str)]| {
        let mut fields = vec![(":method", "CONNECT"), (":authority", "web"), (":scheme", "http"), (":path", path)];
        fields.extend(more);
        frames::frame(frames::HEADERS, frames::END_HEADERS, stream, &frames::block(&fields))
    };
    let websocket = [(":protocol", "websocket"), ("sec-websocket-version", "13")];
    raw.send(&ask(1, "/over-http2?a=b", &websocket))?;
    ensure!(frames::outcome(&mut raw, 1)? == Came::Status(200));
    for text in ["one", "two", "three"] {
        raw.send(&frames::frame(frames::DATA, 0, 1, text.as_bytes()))?;
        let mut back = Vec::new();
        while back.len() < text.len() {
            let (kind, _, _, payload) = frames::next(&mut raw).context("the echo")?;
            ensure!(kind != frames::RST_STREAM, "reset");
            back.extend(if kind == frames::DATA { payload } else { Vec::new() });
        }
        ensure!(back == text.as_bytes(), "{back:?}");
    }
    let seen = ["web1", "web2"].iter().find_map(|name| mesh.web[name].seen("/over-http2").pop()).context("the upgrade")?;
    let header = |name: &str| seen["headers"][name].as_str().unwrap_or_default();
    ensure!(seen["method"] == "GET" && seen["path"] == "/over-http2?a=b", "{seen}");
    ensure!(header("upgrade") == "websocket" && header("connection").eq_ignore_ascii_case("upgrade"), "{seen}");
    ensure!(header("host") == "web" && header("sec-websocket-key").len() == 24, "{seen}");
    // Its end is its end on both sides.
    raw.send(&frames::frame(frames::DATA, frames::END_STREAM, 1, &[]))?;
    let end = iter::from_fn(|| frames::next(&mut raw))
        .find(|(kind, flags, on, _)| *on == 1 && (*kind == frames::RST_STREAM || flags & frames::END_STREAM != 0));
    ensure!(end.is_some_and(|(kind, ..)| kind == frames::DATA), "not in good order");

    // The bare method, and protocols nobody carries; the connection goes on.
    for (stream, more, status) in [(3, &[][..], None), (5, &[(":protocol", "connect-udp")], Some(403))] {
        raw.send(&ask(stream, "/other", more))?;
        let came = frames::outcome(&mut raw, stream)?;
        ensure!(status.map_or(!matches!(came, Came::Status(200)), |status| came == Came::Status(status)), "{more:?}: {came:?}");
    }
    let _deny = of_web(mesh, "deny", "action: DENY, rules: [{ to: [{ operation: { methods: [GET], paths: [/refused] } }] }]")?;
    let mut raw = Raw::say(mesh.pod("client"), vip(80), &frames::preface())?;
    raw.send(&ask(1, "/refused", &websocket))?;
    ensure!(frames::outcome(&mut raw, 1)? == Came::Status(403), "policies see a GET");
    // An endpoint that answers instead of switching has not switched.
    let server = Rude::start(mesh.pod("web1"), RUDE_PORT, |_, stream| {
        stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nno")
    })?;
    let mut raw = Raw::say(mesh.pod("client"), SocketAddr::new(RUDE.parse()?, 80), &frames::preface())?;
    raw.send(&ask(1, "/plain", &websocket))?;
    ensure!(frames::outcome(&mut raw, 1)? == Came::Status(502), "200 would mean that it did");
    drop(server);
    Ok(())
}

pub(crate) fn a_server_that_speaks_first_is_heard(mesh: &mut Mesh) -> anyhow::Result<()> {
    let place = mesh.pod("web1").clone();
    let listener = place.netns.listen((place.v4, BYTES).into())?;
    let second = mesh.pod("web2").netns.listen((mesh.pod("web2").v4, BYTES).into())?;
    for listener in [listener, second] {
        std::thread::spawn(move || {
            for _ in 0..2 {
                let Ok((mut stream, _)) = listener.accept() else { return };
                let _gone = stream.write_all(b"220 ready\r\n");
                let mut piece = [0; 64];
                while let Ok(n @ 1..) = stream.read(&mut piece) {
                    let _gone = stream.write_all(&piece[..n]);
                }
            }
        });
    }
    let begun = Instant::now();
    let mut stream = mesh.pod("client").netns.connect(vip(90), Duration::from_secs(15))?;
    stream.set_read_timeout(Some(Duration::from_secs(15)))?;
    let mut hello = [0; 11];
    stream.read_exact(&mut hello)?;
    ensure!(&hello == b"220 ready\r\n");
    ensure!(begun.elapsed() < Duration::from_secs(4), "without stalling: {:?}", begun.elapsed());
    stream.write_all(b"EHLO x")?;
    let mut back = [0; 6];
    stream.read_exact(&mut back)?;
    ensure!(&back == b"EHLO x");
    Ok(())
}

/// Where [`raw_service`] is.
pub(crate) const RAW: &str = "10.96.0.30:91";

/// A service of bytes behind the waypoint, as long as this is held. Its servers wait for a command: the client speaks first, and
/// not HTTP.
pub(crate) fn raw_service(mesh: &Mesh) -> anyhow::Result<([Server; 2], ObjectsForNow<'_>)> {
    let servers = [Server::start(mesh.pod("web1"), BYTES + 1)?, Server::start(mesh.pod("web2"), BYTES + 1)?];
    let service = mesh.objects(
        "raw",
        "apiVersion: v1\nkind: Service\nmetadata: { name: raw, namespace: t, labels: { istio.io/use-waypoint: wp } }\nspec:\n  selector: { tier: web }\n  clusterIP: 10.96.0.30\n  ports:\n  - { name: tcp-raw, port: 91, targetPort: 9091, protocol: TCP }\n",
    )?;
    for agent in ["node-a", "node-b"] {
        mesh.proxy(agent).wait_config("service raw", |dump| dump["services"].to_string().contains("10.96.0.30"))?;
    }
    Ok((servers, service))
}

pub(crate) fn large_transfers_arrive_whole(mesh: &mut Mesh) -> anyhow::Result<()> {
    let _service = raw_service(mesh)?;
    let (mut client, who) = Client::who(mesh.pod("client"), RAW.parse()?)?;
    ensure!(["web1", "web2"].contains(&who.name.as_str()), "{who:?}");
    client.ping("still there?")?;
    Ok(())
}
