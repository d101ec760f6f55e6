//! Bulk data through the captured path: every byte arrives, and how fast is printed.
use std::{
    io::{Read, Write},
    net::{Ipv6Addr, Shutdown, SocketAddr, TcpListener, TcpStream},
    thread,
    time::{Duration, Instant},
};

use crate::{
    agent::Agent,
    net::{Netns, POD4, POD6, SERVICE4, SERVICE6, Topology, ip},
    require_root, sock,
};

const BYTES: usize = 64 << 20;
const CHUNK: usize = 128 << 10;

/// Bytes that depend on their position in the stream, so that reordered, lost or doubled ones show. Windows of one random
/// block: comparing them must not be slower than the path under test.
struct Pattern {
    block: Vec<u8>,
    chunk: usize,
}

impl Pattern {
    fn new() -> Self {
        let (mut state, mut block) = (1u64, Vec::with_capacity(2 * CHUNK));
        while block.len() < 2 * CHUNK {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            block.extend((state >> 24).to_ne_bytes());
        }
        Self { block, chunk: 0 }
    }

    fn next(&mut self) -> &[u8] {
        self.chunk += 1;
        let at = self.chunk * 4093 % CHUNK;
        &self.block[at..at + CHUNK]
    }
}

/// Reads everything, compares it to the pattern, answers with how much was right.
fn sink(netns: &Netns, port: u16) {
    let listener = netns.run(move || TcpListener::bind((Ipv6Addr::UNSPECIFIED, port))).expect("bind");
    thread::spawn(move || {
        for stream in listener.incoming() {
            let Ok(mut stream) = stream else { return };
            thread::spawn(move || {
                let (mut pattern, mut right, mut chunk) = (Pattern::new(), 0u64, vec![0; CHUNK]);
                while stream.read_exact(&mut chunk).is_ok() {
                    if chunk != pattern.next() {
                        break;
                    }
                    right += CHUNK as u64;
                }
                stream.write_all(&right.to_ne_bytes())
            });
        }
    });
}

fn send(netns: &Netns, to: SocketAddr) -> f64 {
    send_over(netns.run(move || TcpStream::connect_timeout(&to, Duration::from_secs(2))).expect("connect"))
}

fn send_over(mut stream: TcpStream) -> f64 {
    stream.set_read_timeout(Some(Duration::from_secs(20))).expect("timeout");
    let (mut pattern, start) = (Pattern::new(), Instant::now());
    for _ in 0..BYTES / CHUNK {
        stream.write_all(pattern.next()).expect("write");
    }
    stream.shutdown(Shutdown::Write).expect("shutdown");
    let mut right = [0; 8];
    stream.read_exact(&mut right).expect("the answer");
    assert_eq!(u64::from_ne_bytes(right), BYTES as u64, "bytes that arrived as sent");
    BYTES as f64 * 8.0 / start.elapsed().as_secs_f64() / 1e9
}

#[test]
fn bulk_data_arrives_whole() {
    require_root!("bulk_data_arrives_whole");
    let ways = [
        ("out v4", false, SERVICE4, 8080),
        ("out v6", false, SERVICE6, 8080),
        ("in v4", true, POD4, 9090),
        ("in v6", true, POD6, 9090),
    ];
    let served = || {
        let net = Topology::new();
        sink(&net.host, 8080);
        sink(&net.pod, 9090);
        net
    };
    let client =
        |net: &Topology, inbound, to, port| send(if inbound { &net.host } else { &net.pod }, SocketAddr::new(ip(to), port));
    // In a topology of its own: the last segment of a direct connection, seen after the attach, is one of an older connection
    // and rightly counted as such, which the last line below must be able to rule out.
    let direct = {
        let net = served();
        ways.map(|(_, inbound, to, port)| client(&net, inbound, to, port))
    };
    let net = served();
    let agent = Agent::start(&net.pod);
    for ((name, inbound, to, port), direct) in ways.into_iter().zip(direct) {
        let captured = client(&net, inbound, to, port);
        agent.next();
        eprintln!("MEASURED: {name}: direct {direct:.2} Gbit/s, captured and relayed {captured:.2} Gbit/s");
        assert!(captured > 0.05, "{name}: {captured:.3} Gbit/s is a cliff");
    }
    for to in [SERVICE4, SERVICE6] {
        let to = SocketAddr::new(ip(to), 8080);
        let own = send_over(net.pod.run(move || sock::dial_marked(to)).expect("connect"));
        eprintln!("MEASURED: the agent's own dial to {to}, past the programs: {own:.2} Gbit/s");
    }
    assert!(agent.nothing_captured());
    assert_eq!(agent.count("outbound_existing"), 0);
}
