//! Interfaces whose packets have no header before IP's: a tun device of the pod, joined to one of the host.
use std::{
    fs::{File, OpenOptions},
    io::{Read, Write},
    net::SocketAddr,
    os::fd::AsRawFd,
    thread,
};

use crate::{
    agent::{Agent, Direction},
    capture::{Client, echo_server},
    lifecycle::Pins,
    net::{Netns, SERVICE4, Topology, ip, timed_out},
    odd::{packet, tcp_syn},
    require_root,
};

const POD: [&str; 2] = ["10.8.0.2", "fd00:8::2"];
const HOST: [&str; 2] = ["10.8.0.1", "fd00:8::1"];

/// A tun device with these addresses, up; the file its packets come out of and go into. Of the link type `kind`, where one is given.
fn tun(netns: &Netns, name: &'static str, [v4, v6]: [&str; 2], kind: Option<libc::c_ulong>) -> File {
    let file = netns.run(move || {
        const TUNSETIFF: libc::c_ulong = 0x4004_54ca;
        const TUNSETLINK: libc::c_ulong = 0x4004_54cd;
        let file = OpenOptions::new().read(true).write(true).open("/dev/net/tun").expect("/dev/net/tun");
        // `struct ifreq`: the name, then `IFF_TUN | IFF_NO_PI`.
        let mut request = [0u8; 40];
        request[..name.len()].copy_from_slice(name.as_bytes());
        request[16..18].copy_from_slice(&0x1001u16.to_ne_bytes());
        // SAFETY: the request is as long as the kernel's, and outlives the call.
        let done = unsafe { libc::ioctl(file.as_raw_fd(), TUNSETIFF, request.as_mut_ptr()) };
        assert_eq!(done, 0, "{}", std::io::Error::last_os_error());
        if let Some(kind) = kind {
            // SAFETY: a plain number.
            let done = unsafe { libc::ioctl(file.as_raw_fd(), TUNSETLINK, kind) };
            assert_eq!(done, 0, "{}", std::io::Error::last_os_error());
        }
        file
    });
    netns.ip(&format!("addr add {v4}/24 dev {name}"));
    netns.ip(&format!("-6 addr add {v6}/64 dev {name} nodad"));
    netns.ip(&format!("link set {name} up"));
    file
}

/// Joins the two; both ends are given back to write packets of their own.
fn join(net: &Topology) -> [File; 2] {
    let ends = [tun(&net.pod, "tun0", POD, None), tun(&net.host, "tun0", HOST, None)];
    for (from, to) in [(0, 1), (1, 0)] {
        let (mut from, mut to) = (ends[from].try_clone().expect("descriptor"), ends[to].try_clone().expect("descriptor"));
        thread::spawn(move || {
            let mut packet = [0; 2048];
            while let Ok(length) = from.read(&mut packet) {
                if to.write_all(&packet[..length]).is_err() {
                    return;
                }
            }
        });
    }
    ends
}

fn captured_both_ways(net: &Topology, agent: &Agent) {
    for (host, pod) in HOST.into_iter().zip(POD) {
        let out = Client::connect(&net.pod, SocketAddr::new(ip(host), 8080)).expect("out");
        let captured = agent.next();
        assert_eq!((captured.direction, captured.peer.ip(), captured.local.ip()), (Direction::Out, ip(pod), ip(host)));
        let mut out = out;
        out.echo("out");
        out.finish();
        let into = Client::connect(&net.host, SocketAddr::new(ip(pod), 9090)).expect("in");
        let captured = agent.next();
        assert_eq!((captured.direction, captured.peer.ip(), captured.local.ip()), (Direction::In, ip(host), ip(pod)));
        assert_eq!(into.seen_as, ip(host), "the application sees who dialled");
        let mut into = into;
        into.echo("in");
        into.finish();
    }
}

#[test]
fn a_tunnel_device_is_captured() {
    require_root!("a_tunnel_device_is_captured");
    let net = Topology::new();
    let mut ends = join(&net);
    echo_server(&net.host, 8080);
    echo_server(&net.pod, 9090);
    let agent = Agent::start(&net.pod);
    captured_both_ways(&net, &agent);

    // What is no plain TCP does not get in.
    let (host, pod) = (SocketAddr::new(ip(HOST[0]), 4000), SocketAddr::new(ip(POD[0]), 9090));
    let syn = tcp_syn(host, pod);
    let fragment = packet(host.ip(), pod.ip(), 6, Some((0, true)), &syn);
    let before = agent.count("odd_tcp4");
    ends[0].write_all(&fragment).expect("a packet into the pod");
    assert_eq!(agent.count("odd_tcp4"), before + 1);
    assert!(agent.nothing_captured());
}

/// Nobody knows what its frames are: it is closed, and keeps the others from nothing.
#[test]
fn an_interface_of_another_kind_is_closed() {
    require_root!("an_interface_of_another_kind_is_closed");
    const CAN: libc::c_ulong = 280;
    let net = Topology::new();
    echo_server(&net.host, 8080);
    let mut end = tun(&net.pod, "odd0", ["10.7.0.2", "fd00:7::2"], Some(CAN));
    let agent = Agent::start(&net.pod);
    let before = agent.count("refused_frame");
    let nobody = SocketAddr::new(ip("10.7.0.1"), 8080);
    assert!(timed_out(&Client::connect(&net.pod, nobody).map(drop).expect_err("closed")));
    assert!(agent.count("refused_frame") > before, "{:?}", agent.all_counts());
    let syn = tcp_syn(SocketAddr::new(ip("10.7.0.1"), 4000), SocketAddr::new(ip("10.7.0.2"), 9090));
    let before = agent.count("refused_frame");
    end.write_all(&packet(ip("10.7.0.1"), ip("10.7.0.2"), 6, None, &syn)).expect("a packet into the pod");
    assert_eq!(agent.count("refused_frame"), before + 1);
    assert!(agent.nothing_captured());
    Client::connect(&net.pod, SocketAddr::new(ip(SERVICE4), 8080)).expect("captured").finish();
    assert_eq!(agent.next().direction, Direction::Out);
}

/// With places of its own, taken over by the next agent, and gone with the agent's word.
#[test]
fn a_tunnel_device_is_taken_over() {
    require_root!("a_tunnel_device_is_taken_over");
    let pins = Pins::new("tunnel");
    let net = Topology::new();
    let _ends = join(&net);
    echo_server(&net.host, 8080);
    echo_server(&net.pod, 9090);
    drop(Agent::start_pinned(&net.pod, &pins.0));
    let mut next = Agent::start_pinned(&net.pod, &pins.0);
    captured_both_ways(&net, &next);
    assert!(next.redirect().interfaces().contains(&"tun0".to_owned()));
    next.redirect.take().expect("attached").detach().expect("detach");
    Client::connect(&net.pod, SocketAddr::new(ip(HOST[0]), 8080)).expect("direct").finish();
    assert!(next.nothing_captured());
}
