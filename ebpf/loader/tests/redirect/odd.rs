//! Packets in forms the programs do not follow, or of kinds they refuse: dropped and counted, never passed around the agent.
use std::{
    io,
    net::{IpAddr, Ipv6Addr, SocketAddr, UdpSocket},
    os::fd::{AsRawFd, OwnedFd},
    time::Duration,
};

use ebpf_loader::Config;

use crate::{
    agent::Agent,
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

fn tcp_syn(from: SocketAddr, to: SocketAddr) -> Vec<u8> {
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
fn packet(from: IpAddr, to: IpAddr, protocol: u8, fragment: Option<(u16, bool)>, payload: &[u8]) -> Vec<u8> {
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
