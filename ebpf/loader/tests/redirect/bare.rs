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
    net::{Netns, Topology, ip},
    odd::{packet, tcp_syn},
    require_root,
};

const POD: [&str; 2] = ["10.8.0.2", "fd00:8::2"];
const HOST: [&str; 2] = ["10.8.0.1", "fd00:8::1"];

/// A tun device `tun0` with these addresses, up; the file its packets come out of and go into.
fn tun(netns: &Netns, [v4, v6]: [&str; 2]) -> File {
    let file = netns.run(|| {
        const TUNSETIFF: libc::c_ulong = 0x4004_54ca;
        let file = OpenOptions::new().read(true).write(true).open("/dev/net/tun").expect("/dev/net/tun");
        // `struct ifreq`: the name, then `IFF_TUN | IFF_NO_PI`.
        let mut request = [0u8; 40];
        request[..4].copy_from_slice(b"tun0");
        request[16..18].copy_from_slice(&0x1001u16.to_ne_bytes());
        // SAFETY: the request is as long as the kernel's, and outlives the call.
        let done = unsafe { libc::ioctl(file.as_raw_fd(), TUNSETIFF, request.as_mut_ptr()) };
        assert_eq!(done, 0, "{}", std::io::Error::last_os_error());
        file
    });
    netns.ip(&format!("addr add {v4}/24 dev tun0"));
    netns.ip(&format!("-6 addr add {v6}/64 dev tun0 nodad"));
    netns.ip("link set tun0 up");
    file
}

/// Joins the two; both ends are given back to write packets of their own.
fn join(net: &Topology) -> [File; 2] {
    let ends = [tun(&net.pod, POD), tun(&net.host, HOST)];
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

    // What is no plain IP does not get in by looking like something else.
    let (host, pod) = (SocketAddr::new(ip(HOST[0]), 4000), SocketAddr::new(ip(POD[0]), 9090));
    let syn = tcp_syn(host, pod);
    let fragment = packet(host.ip(), pod.ip(), 6, Some((0, true)), &syn);
    let (before, frames) = (agent.count("odd_tcp4"), agent.count("refused_frame"));
    ends[0].write_all(&fragment).expect("a packet into the pod");
    assert_eq!(agent.count("odd_tcp4"), before + 1);
    // Its header says it is IPv4, its first byte does not.
    ends[0].write_all(&[&[0x25], &packet(host.ip(), pod.ip(), 6, None, &syn)[1..]].concat()).ok();
    assert!(agent.count("refused_frame") >= frames && agent.nothing_captured());
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
