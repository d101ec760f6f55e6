//! Packets in forms the programs do not follow, or of kinds they refuse: dropped and counted, never passed around the agent.
use std::{
    io::{self, Read as _, Write as _},
    net::{IpAddr, Ipv6Addr, SocketAddr, UdpSocket},
    os::fd::{AsRawFd, OwnedFd},
    time::Duration,
};

use ebpf_loader::{Config, Source};

use crate::{
    agent::{Agent, Direction},
    capture::{Client, echo_server},
    net::{HOST4, HOST6, Netns, POD4, POD6, SERVICE4, SERVICE6, Topology, eventually, ip, timed_out},
    require_root, sock,
};

/// How long a client waits before it counts as dropped.
const DROPPED_AFTER: Duration = Duration::from_millis(400);

const HOP_BY_HOP: i32 = libc::IPV6_HOPOPTS;
const DESTINATION: i32 = libc::IPV6_DSTOPTS;

/// Dials with an IP option or extension header on every packet.
fn dial_with(netns: &Netns, to: SocketAddr, option: (i32, i32, &'static [u8]), patience: Duration) -> io::Result<()> {
    netns.run(move || {
        let socket = sock::socket(to.is_ipv6(), libc::SOCK_STREAM, 0)?;
        sock::set(&socket, option.0, option.1, option.2)?;
        sock::limit(&socket, patience)?;
        sock::connect(socket, to).map(drop)
    })
}

#[test]
fn tcp_with_options_or_extension_headers_is_dropped() {
    require_root!("tcp_with_options_or_extension_headers_is_dropped");
    const NOPS: &[u8] = &[1, 1, 1, 0];
    const PAD: &[u8] = &[0, 0, 1, 4, 0, 0, 0, 0];
    let net = Topology::new();
    echo_server(&net.host, 8080);
    echo_server(&net.pod, 9090);
    let cases = [
        (&net.pod, SERVICE4, 8080, libc::SOL_IP, libc::IP_OPTIONS, NOPS, "odd_tcp4"),
        (&net.host, POD4, 9090, libc::SOL_IP, libc::IP_OPTIONS, NOPS, "odd_tcp4"),
        (&net.pod, SERVICE6, 8080, libc::SOL_IPV6, DESTINATION, PAD, "odd_tcp6"),
        (&net.host, POD6, 9090, libc::SOL_IPV6, DESTINATION, PAD, "odd_tcp6"),
        (&net.pod, SERVICE6, 8080, libc::SOL_IPV6, HOP_BY_HOP, PAD, "odd_tcp6"),
        (&net.host, POD6, 9090, libc::SOL_IPV6, HOP_BY_HOP, PAD, "odd_tcp6"),
    ];
    for (netns, to, port, level, option, value, _) in cases {
        dial_with(netns, SocketAddr::new(ip(to), port), (level, option, value), Duration::from_secs(5))
            .unwrap_or_else(|e| panic!("such packets pass without us: {to}, option {option}: {e}"));
    }
    let agent = Agent::start(&net.pod);
    for (netns, to, port, level, option, value, counter) in cases {
        let before = agent.count(counter);
        let error = dial_with(netns, SocketAddr::new(ip(to), port), (level, option, value), DROPPED_AFTER).expect_err("dropped");
        assert!(timed_out(&error), "{to} option {option}: {error}");
        assert!(agent.count(counter) > before, "{to} option {option}");
    }
    assert!(agent.nothing_captured());
}

fn checksum(parts: &[&[u8]]) -> u16 {
    let mut sum = 0u32;
    for part in parts {
        for pair in part.chunks(2) {
            sum += u32::from(u16::from_be_bytes([pair[0], pair.get(1).copied().unwrap_or(0)]));
        }
    }
    while sum > 0xffff {
        sum = (sum >> 16) + (sum & 0xffff);
    }
    !(sum as u16)
}

fn octets(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(a) => a.octets().to_vec(),
        IpAddr::V6(a) => a.octets().to_vec(),
    }
}

pub fn tcp_syn(from: SocketAddr, to: SocketAddr) -> Vec<u8> {
    let mut tcp = Vec::new();
    tcp.extend(from.port().to_be_bytes());
    tcp.extend(to.port().to_be_bytes());
    tcp.extend([0, 0, 3, 232, 0, 0, 0, 0, 0x60, 0x02, 0xfa, 0, 0, 0, 0, 0, 2, 4, 5, 0xb4]);
    tcp.extend([0; 8]);
    let length = (tcp.len() as u16).to_be_bytes();
    let sum = checksum(&[&octets(from.ip()), &octets(to.ip()), &[0, 6], &length, &tcp]);
    tcp[16..18].copy_from_slice(&sum.to_be_bytes());
    tcp
}

/// A whole IP packet with this payload; `fragment` is offset in bytes and whether more follow.
pub fn packet(from: IpAddr, to: IpAddr, protocol: u8, fragment: Option<(u16, bool)>, payload: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    match from {
        IpAddr::V4(_) => {
            let flags = fragment.map_or(0, |(offset, more)| (offset / 8) | if more { 0x2000 } else { 0 });
            bytes.extend([0x45, 0]);
            bytes.extend((20 + payload.len() as u16).to_be_bytes());
            bytes.extend([0x10, 0x92]);
            bytes.extend(flags.to_be_bytes());
            bytes.extend([64, protocol, 0, 0]);
            bytes.extend(octets(from));
            bytes.extend(octets(to));
            let sum = checksum(&[&bytes]);
            bytes[10..12].copy_from_slice(&sum.to_be_bytes());
        }
        IpAddr::V6(_) => {
            let header = fragment.map(|(offset, more)| {
                let mut header = vec![protocol, 0];
                header.extend((offset | u16::from(more)).to_be_bytes());
                header.extend([0, 0, 0x10, 0x92]);
                header
            });
            let next = if header.is_some() { 44 } else { protocol };
            let header = header.unwrap_or_default();
            bytes.extend([0x60, 0, 0, 0]);
            bytes.extend(((header.len() + payload.len()) as u16).to_be_bytes());
            bytes.extend([next, 64]);
            bytes.extend(octets(from));
            bytes.extend(octets(to));
            bytes.extend(header);
        }
    }
    bytes.extend(payload);
    bytes
}

/// Sends ready-made IP packets from the namespace.
fn send_raw(netns: &Netns, to: IpAddr, packets: Vec<Vec<u8>>) {
    netns.run(move || {
        let socket = sock::socket(to.is_ipv6(), libc::SOCK_RAW, libc::IPPROTO_RAW).expect("raw socket");
        for packet in packets {
            send_to(&socket, &packet, &sock::sockaddr(SocketAddr::new(to, 0))).expect("send");
        }
    });
}

fn send_to(socket: &OwnedFd, bytes: &[u8], address: &[u8]) -> io::Result<()> {
    // SAFETY: pointers and lengths describe the two slices.
    let sent = unsafe {
        libc::sendto(socket.as_raw_fd(), bytes.as_ptr().cast(), bytes.len(), 0, address.as_ptr().cast(), address.len() as u32)
    };
    if sent == bytes.len() as isize { Ok(()) } else { Err(io::Error::last_os_error()) }
}

#[test]
fn tcp_in_fragments_is_dropped() {
    require_root!("tcp_in_fragments_is_dropped");
    let net = Topology::new();
    let agent = Agent::start(&net.pod);
    for (netns, from, to, counter) in [
        (&net.pod, POD4, SERVICE4, "odd_tcp4"),
        (&net.pod, POD6, SERVICE6, "odd_tcp6"),
        (&net.host, HOST4, POD4, "odd_tcp4"),
        (&net.host, HOST6, POD6, "odd_tcp6"),
    ] {
        let (from, to) = (ip(from), ip(to));
        let syn = tcp_syn(SocketAddr::new(from, 45001), SocketAddr::new(to, 8080));
        let before = agent.count(counter);
        // The first piece ends before the flags: nobody could tell that it is a SYN.
        send_raw(
            netns,
            to,
            vec![packet(from, to, 6, Some((0, true)), &syn[..8]), packet(from, to, 6, Some((8, false)), &syn[8..])],
        );
        // The pod's stack may put a locally sent v4 pair on the wire in two; arrival is asynchronous only on the veth's far side.
        assert!(eventually(|| agent.count(counter) >= before + 2), "{to}: {} {}", before, agent.count(counter));
    }
    assert!(agent.nothing_captured());
}

/// Plain segments that no TCP stack of the pod sent: from a raw socket, and as a whole frame past the IP layer.
#[test]
fn raw_sockets_do_not_get_around() {
    require_root!("raw_sockets_do_not_get_around");
    const FROM: u16 = 45002;
    let net = Topology::new();
    let agent = Agent::start(&net.pod);
    let wire = listen_to_frames(&net.host);
    for (from, to) in [(POD4, SERVICE4), (POD6, SERVICE6)] {
        let (from, to) = (SocketAddr::new(ip(from), FROM), SocketAddr::new(ip(to), 8080));
        let packet = packet(from.ip(), to.ip(), 6, None, &tcp_syn(from, to));
        let mut frame = vec![0xff; 6];
        frame.extend([2, 0, 0, 0, 0, 1]);
        frame.extend(if to.is_ipv6() { [0x86, 0xdd] } else { [0x08, 0] });
        frame.extend(&packet);
        let before = agent.count("outbound_captured");
        send_raw(&net.pod, to.ip(), vec![packet]);
        assert!(eventually(|| agent.count("outbound_captured") > before), "a raw socket's SYN to {to}");
        let before = agent.count("outbound_captured");
        let _ = net.pod.run(move || send_frame(&frame));
        assert!(eventually(|| agent.count("outbound_captured") > before), "a frame's SYN to {to}");
    }
    // The listener of the frames is alive, and what it would tell of is not among what it saw.
    net.pod
        .run(|| UdpSocket::bind("0.0.0.0:0").and_then(|socket| socket.send_to(&FROM.to_be_bytes(), (HOST4, 9))))
        .expect("sent");
    let seen = frames_until(&wire, |frame| frame.ends_with(&FROM.to_be_bytes()));
    let leaked = seen.iter().filter(|frame| [34, 54].iter().any(|at| frame.get(*at..*at + 2) == Some(&FROM.to_be_bytes())));
    assert_eq!(leaked.count(), 0, "on the wire: {seen:02x?}");
}

/// A packet socket that hears every frame of eth0.
fn listen_to_frames(netns: &Netns) -> OwnedFd {
    netns.run(|| {
        const EVERY: u16 = 3;
        // SAFETY: plain numbers; the result is checked.
        let fd = unsafe { libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, i32::from(EVERY.to_be())) };
        assert!(fd >= 0, "{}", io::Error::last_os_error());
        // SAFETY: just made, owned by nobody else.
        let socket = unsafe { <OwnedFd as std::os::fd::FromRawFd>::from_raw_fd(fd) };
        sock::limit(&socket, Duration::from_secs(3)).expect("a limit");
        socket
    })
}

/// Every frame up to the one that ends the wait.
fn frames_until(socket: &OwnedFd, last: impl Fn(&[u8]) -> bool) -> Vec<Vec<u8>> {
    let mut frames = Vec::new();
    loop {
        let mut frame = vec![0; 2048];
        // SAFETY: the pointer and length describe `frame`.
        let received = unsafe { libc::recv(socket.as_raw_fd(), frame.as_mut_ptr().cast(), frame.len(), 0) };
        assert!(received > 0, "nothing more: {}", io::Error::last_os_error());
        frame.truncate(received as usize);
        if last(&frame) {
            return frames;
        }
        frames.push(frame);
    }
}

/// Needs rights in the pod's namespace to make it, and sends through the interface below it all the same.
#[test]
fn an_interface_on_top_of_another_is_no_way_around() {
    require_root!("an_interface_on_top_of_another_is_no_way_around");
    let net = Topology::new();
    echo_server(&net.host, 8080);
    if !net.pod.can("ip link add top0 link eth0 type macvlan mode bridge") {
        eprintln!("SKIPPED: an_interface_on_top_of_another_is_no_way_around: this kernel has no macvlan");
        return;
    }
    let agent = Agent::start(&net.pod);
    net.pod.ip("addr add 10.9.1.77/24 dev top0");
    net.pod.ip("link set top0 up");
    net.pod.ip("route replace 10.9.1.1/32 dev top0 src 10.9.1.77");
    let to = SocketAddr::new(ip(HOST4), 8080);
    // Captured on eth0, below; that the agent's own dial leaves through top0 too is the pod's affair.
    let _ = net.pod.run(move || std::net::TcpStream::connect_timeout(&to, DROPPED_AFTER));
    assert!(agent.count("outbound_captured") > 0, "{:?}", agent.all_counts());
    assert_eq!(agent.count("outbound_existing"), 0);
}

#[test]
fn other_transports_and_tunnels_are_refused_by_a_setting() {
    require_root!("other_transports_and_tunnels_are_refused_by_a_setting");
    let net = Topology::new();
    let mut agent = Agent::start(&net.pod);
    let counter = "refused_protocol";
    for (netns, from, to) in
        [(&net.pod, POD4, HOST4), (&net.pod, POD6, HOST6), (&net.host, HOST4, POD4), (&net.host, HOST6, POD6)]
    {
        let (from, to) = (ip(from), ip(to));
        // IP-in-IP, IPv6-in-IP, GRE, ESP, AH, SCTP.
        for protocol in [4, 41, 47, 50, 51, 132] {
            if to.is_ipv6() && protocol == 51 {
                continue; // an extension header there
            }
            let before = agent.count(counter);
            send_raw(netns, to, vec![packet(from, to, protocol, None, &[0; 40])]);
            assert!(eventually(|| agent.count(counter) > before), "protocol {protocol} to {to}");
        }
    }
    // AH in front of TCP is TCP with an extension header.
    let before = agent.count("odd_tcp6");
    let mut behind_ah = vec![6, 4, 0, 0];
    behind_ah.extend([0; 20]);
    behind_ah.extend(tcp_syn(SocketAddr::new(ip(POD6), 1), SocketAddr::new(ip(HOST6), 2)));
    send_raw(&net.pod, ip(HOST6), vec![packet(ip(POD6), ip(HOST6), 51, None, &behind_ah)]);
    assert!(eventually(|| agent.count("odd_tcp6") > before));

    agent.redirect().set_config(Config::default().with_refuse_exotic(false)).expect("configure");
    let before = agent.count(counter);
    send_raw(&net.pod, ip(HOST4), vec![packet(ip(POD4), ip(HOST4), 132, None, &[0; 40])]);
    echo_server(&net.host, 8080);
    Client::connect(&net.pod, SocketAddr::new(ip(HOST4), 8080)).expect("still captured").finish();
    assert_eq!(agent.count(counter), before);
}

#[test]
fn vlan_and_unknown_frames_are_refused() {
    require_root!("vlan_and_unknown_frames_are_refused");
    let net = Topology::new();
    let mut agent = Agent::start(&net.pod);
    let syn = |to: &str| tcp_syn(SocketAddr::new(ip(HOST4), 45001), SocketAddr::new(ip(to), 8080));
    let frame = |header: &[u8], to: &str| {
        let mut frame = vec![0xff; 6];
        frame.extend([2, 0, 0, 0, 0, 1]);
        frame.extend(header);
        frame.extend(packet(ip(HOST4), ip(to), 6, None, &syn(to)));
        frame
    };
    // VLAN 5, QinQ 5, MPLS, local experimental.
    let headers: [&[u8]; 4] = [&[0x81, 0, 0, 5, 8, 0], &[0x88, 0xa8, 0, 5, 8, 0], &[0x88, 0x47, 0, 0, 0x11, 64], &[0x88, 0xb5]];
    for netns in [&net.pod, &net.host] {
        for header in headers {
            let (before, frame) = (agent.count("refused_frame"), frame(header, POD4));
            let _ = netns.run(move || send_frame(&frame));
            assert!(eventually(|| agent.count("refused_frame") > before), "{header:x?}");
        }
    }
    agent.redirect().set_config(Config::default().with_refuse_exotic(false)).expect("configure");
    let (before, frame) = (agent.count("refused_frame"), frame(headers[3], POD4));
    net.pod.run(move || send_frame(&frame)).expect("passes by choice");
    assert_eq!(agent.count("refused_frame"), before);
}

#[test]
fn other_udp_passes_and_odd_dns_does_not() {
    require_root!("other_udp_passes_and_odd_dns_does_not");
    let net = Topology::new();
    for port in [53, 5353] {
        let server = net.host.run(move || UdpSocket::bind((Ipv6Addr::UNSPECIFIED, port))).expect("bind");
        std::thread::spawn(move || {
            let mut buffer = vec![0; 65536];
            while let Ok((length, from)) = server.recv_from(&mut buffer) {
                let _ = server.send_to(&buffer[..length.min(100)], from);
            }
        });
    }
    let ask = |to: IpAddr, port, length: usize| {
        net.pod.run(move || {
            let any = if to.is_ipv6() { "[::]:0" } else { "0.0.0.0:0" };
            let socket = UdpSocket::bind(any)?;
            socket.set_read_timeout(Some(Duration::from_millis(400)))?;
            socket.connect((to, port))?;
            socket.send(&vec![7; length])?;
            socket.recv(&mut [0; 200])
        })
    };
    let agent = Agent::start(&net.pod);
    for to in [HOST4, HOST6] {
        let to = ip(to);
        let answer = ask(to, 53, 40).unwrap_or_else(|e| panic!("DNS is left alone for now: {to}: {e} {:?}", agent.all_counts()));
        assert_eq!(answer, 40);
        assert_eq!(ask(to, 5353, 3000).expect("fragments of other UDP pass"), 100);
        let before = agent.count("odd_dns");
        ask(to, 53, 3000).expect_err("a query in fragments");
        assert!(agent.count("odd_dns") > before);
    }
    assert!(agent.count("odd_other") > 0);
    assert!(agent.count("dns_passed") >= 2);
}

/// In and out, as messages and in fragments. The agent's own questions and DNS that nobody captured live on.
#[test]
fn udp_is_counted_and_by_choice_refused() {
    require_root!("udp_is_counted_and_by_choice_refused");
    let net = Topology::new();
    let served = |netns: &Netns, port: u16| {
        let server = netns.run(move || UdpSocket::bind((Ipv6Addr::UNSPECIFIED, port))).expect("bind");
        std::thread::spawn(move || {
            let mut buffer = vec![0; 65536];
            while let Ok((length, from)) = server.recv_from(&mut buffer) {
                let _ = server.send_to(&buffer[..length.min(100)], from);
            }
        });
    };
    served(&net.host, 53);
    served(&net.host, 5353);
    served(&net.pod, 5353);
    let ask = |netns: &Netns, to: &str, port: u16, length: usize, mark: i32| {
        let to = ip(to);
        netns.run(move || {
            let socket = UdpSocket::bind(if to.is_ipv6() { "[::]:0" } else { "0.0.0.0:0" })?;
            sock::set_number(&socket, libc::SOL_SOCKET, libc::SO_MARK, mark)?;
            socket.set_read_timeout(Some(Duration::from_millis(300)))?;
            socket.connect((to, port))?;
            socket.send(&vec![7; length])?;
            socket.recv(&mut [0; 200])
        })
    };
    let ways = [(&net.pod, HOST4), (&net.pod, HOST6), (&net.host, POD4), (&net.host, POD6)];
    let mut agent = Agent::start(&net.pod);
    for (from, to) in ways {
        let before = agent.count("udp_passed");
        ask(from, to, 5353, 40, 0).unwrap_or_else(|e| panic!("{to}: {e} {:?}", agent.all_counts()));
        assert!(agent.count("udp_passed") >= before + 2, "{to}");
    }
    agent.redirect().set_config(Config::default().with_refuse_udp(true)).expect("configure");
    for (from, to) in ways {
        for length in [40, 3000] {
            let before = agent.count("refused_udp");
            let _ = ask(from, to, 5353, length, 0).expect_err("refused");
            assert!(agent.count("refused_udp") > before, "{length} to {to}");
        }
    }
    for to in [HOST4, HOST6] {
        ask(&net.pod, to, 53, 40, 0).unwrap_or_else(|e| panic!("DNS of {to}: {e} {:?}", agent.all_counts()));
        ask(&net.pod, to, 5353, 40, 0x539).unwrap_or_else(|e| panic!("the agent asks {to}: {e} {:?}", agent.all_counts()));
    }
    agent.redirect().set_config(Config::default().with_refuse_udp(true).with_capture_dns(true)).expect("configure");
    for to in [HOST4, HOST6] {
        let _ = ask(&net.pod, to, 53, 40, 0).expect_err("DNS that should have been captured");
        ask(&net.pod, to, 53, 40, 0x539).unwrap_or_else(|e| panic!("the agent asks {to}: {e} {:?}", agent.all_counts()));
    }
}

#[test]
fn denied_sources_are_dropped_at_once() {
    require_root!("denied_sources_are_dropped_at_once");
    let net = Topology::new();
    echo_server(&net.pod, 9090);
    echo_server(&net.pod, 15008);
    let mut agent = Agent::start(&net.pod);
    let source = |address: &str, prefix_len, denied| Source { address: ip(address), prefix_len, denied };
    let dropped = |agent: &Agent, to: &str, port| {
        let (before, to) = (agent.count("denied_source"), SocketAddr::new(ip(to), port));
        let dialled = net.host.run(move || std::net::TcpStream::connect_timeout(&to, DROPPED_AFTER));
        let counted = agent.count("denied_source") > before;
        assert_eq!(dialled.is_err(), counted, "{to}: {dialled:?}");
        counted
    };
    for (set, v4, v6) in [
        (vec![source("10.9.0.0", 16, true)], true, false),
        (vec![source("fd00:9:1::", 64, true)], false, true),
        // IPv4 is not part of IPv6, and what is more precise counts.
        (vec![source("::", 0, true)], false, true),
        (vec![source("0.0.0.0", 0, true), source("10.9.1.0", 24, false), source("::", 0, true)], false, true),
        (vec![source("10.9.1.0", 24, false), source("10.9.1.1", 32, true)], true, false),
        (vec![source("::ffff:10.9.0.0", 112, true)], false, false),
        (vec![], false, false),
    ] {
        agent.redirect().set_sources(&set).expect("set");
        for port in [9090, 15008] {
            assert_eq!((dropped(&agent, POD4, port), dropped(&agent, POD6, port)), (v4, v6), "{set:?}");
        }
    }
    // Connections that are there are the agent's affair, and what the pod itself opens is not meant.
    let mut old = Client::connect(&net.host, SocketAddr::new(ip(POD4), 9090)).expect("connect");
    echo_server(&net.host, 8080);
    agent.redirect().set_sources(&[source("0.0.0.0", 0, true)]).expect("set");
    old.echo("still here");
    Client::connect(&net.pod, SocketAddr::new(ip(HOST4), 8080)).expect("outbound").finish();
}

/// An application that forces a loopback destination out of an interface gets nowhere.
#[test]
fn loopback_addresses_do_not_leave() {
    require_root!("loopback_addresses_do_not_leave");
    let net = Topology::new();
    let agent = Agent::start(&net.pod);
    let (from, to) = (SocketAddr::new(ip(HOST4), 45001), SocketAddr::new(ip("127.0.0.1"), 8080));
    let syn = tcp_syn(from, to);
    let mut frame = Vec::new();
    frame.extend([0xff; 6]);
    frame.extend([2, 0, 0, 0, 0, 1, 8, 0]);
    frame.extend(packet(from.ip(), to.ip(), 6, None, &syn));
    for netns in [&net.pod, &net.host] {
        let (before, frame) = (agent.count("loopback_on_wire"), frame.clone());
        // The kernel says so where the frame was dropped on its way out.
        let sent = netns.run(move || send_frame(&frame));
        assert!(sent.is_ok() || sent.is_err_and(|e| e.raw_os_error() == Some(libc::ENOBUFS)));
        assert!(eventually(|| agent.count("loopback_on_wire") > before));
    }
}

/// The kernel's IPv4 would refuse such packets, but for a setting that what is turned around needs.
#[test]
fn nobody_passes_for_the_pod_itself() {
    require_root!("nobody_passes_for_the_pod_itself");
    let net = Topology::new();
    let socket = net.pod.run(|| std::net::UdpSocket::bind((POD4, 5000))).expect("bind");
    socket.set_read_timeout(Some(Duration::from_millis(300))).expect("a limit");
    let link = net.pod.ip("-o link show dev eth0");
    let hardware = link.split("link/ether ").nth(1).and_then(|rest| rest.split(' ').next()).expect("an address");
    let hardware: Vec<u8> = hardware.split(':').map(|byte| u8::from_str_radix(byte, 16).expect("a byte")).collect();
    let agent = Agent::start(&net.pod);
    let send = |source: &str| {
        let mut udp = Vec::new();
        udp.extend([0x13, 0x88, 0x13, 0x88, 0, 12, 0, 0]);
        udp.extend(b"self");
        let mut frame = hardware.clone();
        frame.extend([2, 0, 0, 0, 0, 1, 8, 0]);
        frame.extend(packet(ip(source), ip(POD4), 17, None, &udp));
        net.host.run(move || send_frame(&frame)).expect("send");
    };
    send(HOST4);
    assert_eq!(socket.recv_from(&mut [0; 16]).expect("another source passes").0, 4);
    let before = agent.count("loopback_on_wire");
    send(POD4);
    assert!(timed_out(&socket.recv_from(&mut [0; 16]).expect_err("it cannot be the pod's")));
    assert_eq!(agent.count("loopback_on_wire"), before + 1);
}

/// An agent that delivers where the pod has no such address must not meet its own capture.
#[test]
fn a_delivery_does_not_leave_the_pod() {
    require_root!("a_delivery_does_not_leave_the_pod");
    let net = Topology::new();
    echo_server(&net.host, 8080);
    let agent = Agent::start(&net.pod);
    let before = agent.count("loopback_on_wire");
    let stranger = SocketAddr::new(ip(SERVICE4), 8080);
    let result = net.pod.run(move || sock::dial_as(ip(HOST4), stranger));
    assert!(result.is_err(), "reached {stranger}");
    assert!(agent.count("loopback_on_wire") > before);
    assert!(agent.nothing_captured());
}

/// Sends an Ethernet frame from eth0.
fn send_frame(frame: &[u8]) -> io::Result<()> {
    // SAFETY: plain numbers; the result is checked.
    let fd = unsafe { libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, 0) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: just made, owned by nobody else.
    let socket = unsafe { <OwnedFd as std::os::fd::FromRawFd>::from_raw_fd(fd) };
    // SAFETY: a NUL-terminated constant.
    let index = unsafe { libc::if_nametoindex(c"eth0".as_ptr()) };
    // struct sockaddr_ll: family, protocol, ifindex, hatype, pkttype, halen, addr[8]
    let mut address = Vec::new();
    address.extend((libc::AF_PACKET as u16).to_ne_bytes());
    address.extend(0x0800u16.to_be_bytes());
    address.extend(index.to_ne_bytes());
    address.extend([0, 0, 0, 6]);
    address.extend([0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0, 0]);
    send_to(&socket, frame, &address)
}

/// A connection that is captured cannot change into one that is not.
#[test]
fn options_in_the_middle_of_a_connection_are_no_way_around() {
    require_root!("options_in_the_middle_of_a_connection_are_no_way_around");
    let net = Topology::new();
    echo_server(&net.host, 8080);
    let agent = Agent::start(&net.pod);
    let mut client = Client::connect(&net.pod, SocketAddr::new(ip(SERVICE4), 8080)).expect("captured");
    client.echo("plain");
    assert_eq!(agent.next().local.ip(), ip(SERVICE4));
    let before = agent.count("odd_tcp4");
    let stream = client.stream.get_mut();
    sock::set(stream, libc::SOL_IP, libc::IP_OPTIONS, &[1, 1, 1, 0]).expect("options");
    stream.write_all(b"with options").expect("write");
    stream.set_read_timeout(Some(DROPPED_AFTER)).expect("timeout");
    let error = stream.read(&mut [0; 16]).expect_err("dropped");
    assert!(timed_out(&error), "{error}");
    assert!(agent.count("odd_tcp4") > before && agent.nothing_captured());
}

/// Memberships are no traffic of applications: they pass, with the options and extension headers they always have.
#[test]
fn memberships_of_groups_are_told() {
    require_root!("memberships_of_groups_are_told");
    let net = Topology::new();
    let agent = Agent::start(&net.pod);
    let before = agent.count("odd_other");
    let joined = net.pod.run(|| {
        let v4 = UdpSocket::bind("0.0.0.0:0")?;
        v4.join_multicast_v4(&"239.1.2.3".parse().expect("a group"), &POD4.parse().expect("an address"))?;
        let v6 = UdpSocket::bind("[::]:0")?;
        v6.join_multicast_v6(&"ff15::123".parse().expect("a group"), nix::net::if_::if_nametoindex("eth0")?)?;
        Ok::<_, io::Error>((v4, v6))
    });
    assert!(eventually(|| agent.count("odd_other") >= before + 2), "{:?}", agent.all_counts());
    drop(joined.expect("join"));
}

/// A pod whose own rules follow connections sees nothing invalid in what is captured.
#[test]
fn rules_that_follow_connections_are_no_obstacle() {
    require_root!("rules_that_follow_connections_are_no_obstacle");
    let net = Topology::new();
    if !net.pod.can("nft --version") {
        eprintln!("skipped: no nft");
        return;
    }
    echo_server(&net.host, 8080);
    echo_server(&net.pod, 9090);
    let rules = "table inet own { chain in { type filter hook input priority 0; policy drop; ct state invalid drop; \
                 ct state established,related accept; iif lo accept; meta l4proto { icmp, icmpv6 } accept; tcp dport { 9090, 15006, 8080 } accept; }; \
                 chain out { type filter hook output priority 0; policy accept; ct state invalid drop; }; }";
    let loaded = net.pod.run(move || std::process::Command::new("nft").arg(rules).output()).expect("nft");
    assert!(loaded.status.success(), "{}", String::from_utf8_lossy(&loaded.stderr));
    let agent = Agent::start(&net.pod);
    for to in [SERVICE4, SERVICE6] {
        let mut client = Client::connect(&net.pod, SocketAddr::new(ip(to), 8080)).expect("out");
        client.echo("out");
        client.finish();
        assert_eq!(agent.next().direction, Direction::Out);
    }
    for to in [POD4, POD6] {
        let mut client = Client::connect(&net.host, SocketAddr::new(ip(to), 9090)).expect("in");
        client.echo("in");
        client.finish();
        assert_eq!(agent.next().direction, Direction::In);
    }
}
