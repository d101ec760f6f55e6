//! What is not HTTP, or stops being it.
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use anyhow::ensure;
use mesh_tests::program::{Client, Server};

use crate::mesh::{BYTES, Mesh, WEB_IP};

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
    let mut stream = mesh.pod("client").netns.connect(vip(90), Duration::from_secs(5))?;
    stream.set_read_timeout(Some(Duration::from_secs(5)))?;
    let mut hello = [0; 11];
    stream.read_exact(&mut hello)?;
    ensure!(&hello == b"220 ready\r\n");
    ensure!(begun.elapsed() < Duration::from_secs(1), "without stalling: {:?}", begun.elapsed());
    stream.write_all(b"EHLO x")?;
    let mut back = [0; 6];
    stream.read_exact(&mut back)?;
    ensure!(&back == b"EHLO x");
    Ok(())
}

pub(crate) fn large_transfers_arrive_whole(mesh: &mut Mesh) -> anyhow::Result<()> {
    // The byte server of the harness waits for a command: the client speaks first, and not HTTP.
    let servers = [Server::start(mesh.pod("web1"), BYTES + 1)?, Server::start(mesh.pod("web2"), BYTES + 1)?];
    let _service = mesh.objects(
        "raw",
        "apiVersion: v1\nkind: Service\nmetadata: { name: raw, namespace: t, labels: { istio.io/use-waypoint: wp } }\nspec:\n  selector: { tier: web }\n  clusterIP: 10.96.0.30\n  ports:\n  - { name: tcp-raw, port: 91, targetPort: 9091, protocol: TCP }\n",
    )?;
    for agent in ["node-a", "node-b"] {
        mesh.proxy(agent).wait_config("service raw", |dump| dump["services"].to_string().contains("10.96.0.30"))?;
    }
    let to = SocketAddr::new("10.96.0.30".parse()?, 91);
    let (mut client, who) = Client::who(mesh.pod("client"), to)?;
    ensure!(["web1", "web2"].contains(&who.name.as_str()), "{who:?}");
    client.ping("still there?")?;
    drop(servers);
    Ok(())
}
