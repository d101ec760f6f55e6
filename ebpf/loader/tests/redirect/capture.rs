//! What is captured, what is not, and which addresses both sides see.
use std::{
    collections::BTreeSet,
    io::{self, BufRead, BufReader, Read, Write},
    net::{IpAddr, Ipv6Addr, Shutdown, SocketAddr, TcpListener, TcpStream},
    thread,
    time::Duration,
};

use ebpf_loader::Config;

use crate::{
    agent::{Agent, Direction},
    net::{HOST4, HOST6, Netns, POD4, POD6, SERVICE4, SERVICE6, Topology, ip, timed_out},
    require_root, sock,
};

/// Greets with the address it sees, then echoes.
pub fn echo_server(netns: &Netns, port: u16) {
    let listener = netns.run(move || TcpListener::bind((Ipv6Addr::UNSPECIFIED, port))).expect("bind");
    thread::spawn(move || {
        for stream in listener.incoming() {
            let Ok(mut stream) = stream else { return };
            thread::spawn(move || {
                let peer = sock::plain(stream.peer_addr()?);
                writeln!(stream, "{}", peer.ip())?;
                let mut copy = stream.try_clone()?;
                io::copy(&mut stream, &mut copy)?;
                copy.shutdown(Shutdown::Write)
            });
        }
    });
}

/// An echo client: a connection that was greeted.
pub struct Client {
    pub stream: BufReader<TcpStream>,
    pub seen_as: IpAddr,
    pub local: SocketAddr,
}

impl Client {
    pub fn connect(netns: &Netns, to: SocketAddr) -> io::Result<Self> {
        let stream = netns.run(move || TcpStream::connect_timeout(&to, Duration::from_secs(2)))?;
        Self::greeted(stream)
    }

    pub fn greeted(stream: TcpStream) -> io::Result<Self> {
        stream.set_read_timeout(Some(Duration::from_secs(2)))?;
        let local = sock::plain(stream.local_addr()?);
        let mut stream = BufReader::new(stream);
        let mut line = String::new();
        stream.read_line(&mut line)?;
        let seen_as = line.trim().parse().map_err(|_| io::Error::from(io::ErrorKind::UnexpectedEof))?;
        Ok(Self { stream, seen_as, local })
    }

    pub fn echo(&mut self, text: &str) {
        self.stream.get_mut().write_all(text.as_bytes()).expect("write");
        let mut back = vec![0; text.len()];
        self.stream.read_exact(&mut back).expect("echo");
        assert_eq!(back, text.as_bytes());
    }

    /// Waits for the other side to finish first.
    pub fn hear_out(mut self) {
        let mut rest = Vec::new();
        self.stream.read_to_end(&mut rest).expect("the end");
        assert!(rest.is_empty());
    }

    /// Half-closes and expects the other side to finish too.
    pub fn finish(mut self) {
        self.stream.get_ref().shutdown(Shutdown::Write).expect("shutdown");
        let mut rest = Vec::new();
        self.stream.read_to_end(&mut rest).expect("the end");
        assert!(rest.is_empty());
    }
}

#[test]
fn outbound_keeps_source_and_destination() {
    require_root!("outbound_keeps_source_and_destination");
    let net = Topology::new();
    echo_server(&net.host, 8080);
    let agent = Agent::start(&net.pod);
    for (service, pod) in [(SERVICE4, POD4), (SERVICE6, POD6), (HOST4, POD4), (HOST6, POD6)] {
        let to = SocketAddr::new(ip(service), 8080);
        let mut client = Client::connect(&net.pod, to).expect("connect");
        let captured = agent.next();
        assert_eq!(captured.direction, Direction::Out);
        assert_eq!(captured.peer, client.local, "source kept");
        assert_eq!(captured.local, to, "destination kept");
        assert_eq!(client.local.ip(), ip(pod));
        assert_eq!(client.seen_as, ip(pod));
        client.echo("over the agent");
        client.finish();
    }
    assert_eq!(agent.count("outbound_captured"), 4);
    assert_eq!(agent.count("outbound_assigned"), 4);
    assert_eq!(agent.count("outbound_existing"), 0, "no segment of a captured connection left unowned");
}

#[test]
fn inbound_keeps_source_and_destination() {
    require_root!("inbound_keeps_source_and_destination");
    let net = Topology::new();
    echo_server(&net.pod, 9090);
    let agent = Agent::start(&net.pod);
    for (pod, host) in [(POD4, HOST4), (POD6, HOST6)] {
        let to = SocketAddr::new(ip(pod), 9090);
        let mut client = Client::connect(&net.host, to).expect("connect");
        let captured = agent.next();
        assert_eq!(captured.direction, Direction::In);
        assert_eq!(captured.peer, client.local);
        assert_eq!(captured.local, to);
        assert_eq!(client.seen_as, ip(host), "the application sees the client's address");
        client.echo("delivered");
        client.finish();
    }
    assert_eq!(agent.count("inbound_assigned"), 2);
    assert!(agent.count("outbound_owned") > 0, "the application's answers came back to the agent");
    assert!(agent.nothing_captured());
}

#[test]
fn closed_ports_are_refused_through_the_agent() {
    require_root!("closed_ports_are_refused_through_the_agent");
    let net = Topology::new();
    let agent = Agent::start(&net.pod);
    for (from, to) in [(&net.pod, SERVICE4), (&net.pod, SERVICE6), (&net.host, POD4), (&net.host, POD6)] {
        let to = SocketAddr::new(ip(to), 8081);
        let error = Client::connect(from, to).err().expect("nobody greets");
        assert!(
            matches!(
                error.kind(),
                io::ErrorKind::ConnectionReset | io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionRefused
            ),
            "{to}: {error}"
        );
        assert_eq!(agent.next().refused, Some(io::ErrorKind::ConnectionRefused), "{to}");
    }
}

#[test]
fn the_pods_own_addresses_are_not_captured() {
    require_root!("the_pods_own_addresses_are_not_captured");
    let net = Topology::new();
    echo_server(&net.pod, 9090);
    let agent = Agent::start(&net.pod);
    for own in [POD4, POD6, "127.0.0.1", "::1"] {
        let mut client = Client::connect(&net.pod, SocketAddr::new(ip(own), 9090)).expect("connect");
        assert_eq!(client.seen_as, ip(own));
        client.echo("to myself");
        client.finish();
    }
    assert!(agent.nothing_captured());
}

/// Also where a program of the pod took the port first.
#[test]
fn hbone_is_the_agents_whoever_has_its_port() {
    require_root!("hbone_is_the_agents_whoever_has_its_port");
    let net = Topology::new();
    echo_server(&net.pod, 15008);
    echo_server(&net.pod, 15108);
    let mut agent = Agent::start(&net.pod);
    let way = |agent: &Agent, port| {
        let mut directions = BTreeSet::new();
        for (pod, host) in [(POD4, HOST4), (POD6, HOST6)] {
            let to = SocketAddr::new(ip(pod), port);
            let mut client = Client::connect(&net.host, to).expect("connect");
            let captured = agent.next();
            assert_eq!((captured.peer, captured.local), (client.local, to));
            assert_eq!(client.seen_as, ip(host));
            client.echo("tunnelled");
            client.finish();
            directions.insert(format!("{:?}", captured.direction));
        }
        directions.into_iter().collect::<String>()
    };
    assert_eq!(way(&agent, 15008), "Hbone");
    assert!(agent.count("inbound_hbone") > 0 && agent.count("inbound_tunnel") > 0);
    agent.redirect().set_config(Config::default().with_hbone_port(15108)).expect("configure");
    assert_eq!((way(&agent, 15108), way(&agent, 15008)), ("Hbone".into(), "In".into()));

    // Nobody but the agent has it afterwards either; what is carried already goes on.
    let mut tunnel = Client::connect(&net.host, SocketAddr::new(ip(POD4), 15108)).expect("connect");
    tunnel.echo("tunnelled");
    agent.stop_listening();
    for pod in [POD4, POD6] {
        let to = SocketAddr::new(ip(pod), 15108);
        let error = net.host.run(move || TcpStream::connect_timeout(&to, Duration::from_millis(400))).expect_err("dropped");
        assert!(timed_out(&error), "{to}: {error}");
    }
    tunnel.echo("still");
}

/// The agent closes first and so keeps the tuple in TIME_WAIT; the client's port comes round again.
#[test]
fn a_client_may_reuse_its_port_at_once() {
    require_root!("a_client_may_reuse_its_port_at_once");
    let net = Topology::new();
    for (netns, port) in [(&net.host, 7070), (&net.pod, 7070), (&net.pod, 15008)] {
        let listener = netns.run(move || TcpListener::bind((Ipv6Addr::UNSPECIFIED, port))).expect("bind");
        thread::spawn(move || {
            for stream in listener.incoming() {
                let Ok(mut stream) = stream else { return };
                let peer = sock::plain(stream.peer_addr().expect("peer"));
                let _ = writeln!(stream, "{}", peer.ip());
                // Dropped: the server closes first.
            }
        });
    }
    let agent = Agent::start(&net.pod);
    for (netns, local, to, port) in [
        (&net.pod, POD4, SERVICE4, 7070),
        (&net.pod, POD6, SERVICE6, 7070),
        (&net.host, HOST4, POD4, 7070),
        (&net.host, HOST6, POD6, 7070),
        (&net.host, HOST4, POD4, 15008),
        (&net.host, HOST6, POD6, 15008),
    ] {
        for attempt in 0..3 {
            let (from, to) = (SocketAddr::new(ip(local), 24111), SocketAddr::new(ip(to), port));
            let stream = netns.run(move || {
                let socket = sock::socket(to.is_ipv6(), libc::SOCK_STREAM, 0)?;
                sock::set_number(&socket, libc::SOL_SOCKET, libc::SO_REUSEADDR, 1)?;
                sock::limit(&socket, Duration::from_secs(4))?;
                sock::bind(&socket, from)?;
                sock::connect(socket, to)
            });
            let client = Client::greeted(stream.unwrap_or_else(|e| panic!("{from} to {to}, attempt {attempt}: {e}")));
            client.unwrap_or_else(|e| panic!("{from} to {to}, attempt {attempt}: {e}")).hear_out();
            agent.next();
        }
    }
    assert!(agent.count("tuple_reused") >= 12, "{} of 12 through the socket lookup", agent.count("tuple_reused"));
}

/// With cookies the listener keeps no socket between SYN and acknowledgement.
#[test]
fn inbound_syn_cookies_come_back_to_the_agent() {
    require_root!("inbound_syn_cookies_come_back_to_the_agent");
    let net = Topology::new();
    net.pod.sysctl("net/ipv4/tcp_syncookies", "2");
    // The application's own port, to which a stray acknowledgement would otherwise belong.
    echo_server(&net.pod, 9090);
    echo_server(&net.pod, 15008);
    let agent = Agent::start(&net.pod);
    for (port, direction) in [(9090, Direction::In), (15008, Direction::Hbone)] {
        for (pod, host) in [(POD4, HOST4), (POD6, HOST6)] {
            let to = SocketAddr::new(ip(pod), port);
            let mut client = Client::connect(&net.host, to).expect("connect");
            assert_eq!(client.seen_as, ip(host));
            let captured = agent.next();
            assert_eq!((captured.direction, captured.local), (direction, to));
            client.echo("through the agent");
            client.finish();
        }
    }
    assert!(agent.count("inbound_stray") >= 4);
}

#[test]
fn strict_reverse_path_filtering_is_no_obstacle() {
    require_root!("strict_reverse_path_filtering_is_no_obstacle");
    for rp_filter in ["1", "2"] {
        let net = Topology::new();
        for device in ["all", "eth0", "lo"] {
            net.pod.sysctl(&format!("net/ipv4/conf/{device}/rp_filter"), rp_filter);
        }
        echo_server(&net.host, 8080);
        echo_server(&net.pod, 9090);
        let agent = Agent::start(&net.pod);
        Client::connect(&net.pod, SocketAddr::new(ip(SERVICE4), 8080)).expect("outbound").finish();
        Client::connect(&net.host, SocketAddr::new(ip(POD4), 9090)).expect("inbound").finish();
        agent.next();
        agent.next();
    }
}

/// Both make the kernel copy marks from packets to its answers and sockets.
#[test]
fn the_pods_own_mark_settings_are_no_obstacle() {
    require_root!("the_pods_own_mark_settings_are_no_obstacle");
    let net = Topology::new();
    for key in ["net/ipv4/fwmark_reflect", "net/ipv6/fwmark_reflect", "net/ipv4/tcp_fwmark_accept"] {
        net.pod.sysctl(key, "1");
    }
    echo_server(&net.host, 8080);
    echo_server(&net.pod, 9090);
    let agent = Agent::start(&net.pod);
    for (netns, to, port) in
        [(&net.pod, SERVICE4, 8080), (&net.pod, SERVICE6, 8080), (&net.host, POD4, 9090), (&net.host, POD6, 9090)]
    {
        let mut client = Client::connect(netns, SocketAddr::new(ip(to), port)).unwrap_or_else(|e| panic!("{to}: {e}"));
        client.echo("all the same");
        client.finish();
        agent.next();
    }
}

/// Two pods of one node: what one agent dials, the other accepts.
#[test]
fn both_ends_may_be_enrolled() {
    require_root!("both_ends_may_be_enrolled");
    let net = Topology::new();
    echo_server(&net.host, 8080);
    echo_server(&net.pod, 9090);
    let (pod, host) = (Agent::start(&net.pod), Agent::start(&net.host));
    for (from, near, far, to, source) in [
        (&net.pod, &pod, &host, SocketAddr::new(ip(HOST4), 8080), POD4),
        (&net.pod, &pod, &host, SocketAddr::new(ip(HOST6), 8080), POD6),
        (&net.host, &host, &pod, SocketAddr::new(ip(POD4), 9090), HOST4),
        (&net.host, &host, &pod, SocketAddr::new(ip(POD6), 9090), HOST6),
    ] {
        let mut client = Client::connect(from, to).unwrap_or_else(|e| panic!("{to}: {e}"));
        assert_eq!(client.seen_as, ip(source));
        let (left, entered) = (near.next(), far.next());
        assert_eq!((left.direction, left.local), (Direction::Out, to));
        assert_eq!((entered.direction, entered.local, entered.peer.ip()), (Direction::In, to, ip(source)));
        client.echo("through both");
        client.finish();
    }
    assert!(pod.nothing_captured() && host.nothing_captured());
}

/// Many connections at once, to see that nothing depends on being alone.
#[test]
fn many_connections_at_once() {
    require_root!("many_connections_at_once");
    const EACH: usize = 50;
    let net = Topology::new();
    echo_server(&net.host, 8080);
    echo_server(&net.pod, 9090);
    let agent = Agent::start(&net.pod);
    let clients: Vec<_> =
        [(&net.pod, SERVICE4, 8080), (&net.pod, SERVICE6, 8080), (&net.host, POD4, 9090), (&net.host, POD6, 9090)]
            .into_iter()
            .map(|(netns, to, port)| {
                let to = SocketAddr::new(ip(to), port);
                netns.spawn(move || {
                    let mut clients: Vec<_> = (0..EACH)
                        .map(|_| {
                            let stream =
                                TcpStream::connect_timeout(&to, Duration::from_secs(5)).unwrap_or_else(|e| panic!("{to}: {e}"));
                            Client::greeted(stream).expect("greeting")
                        })
                        .collect();
                    for (n, client) in clients.iter_mut().enumerate() {
                        client.echo(&format!("connection {n}"));
                    }
                    clients.into_iter().for_each(Client::finish);
                })
            })
            .collect();
    for client in clients {
        assert!(client.join().is_ok(), "{:?}", agent.all_counts());
    }
    for _ in 0..4 * EACH {
        assert_eq!(agent.next().refused, None);
    }
    assert!(agent.nothing_captured(), "no loops");
}

/// Link-local addresses mean something only together with an interface, which the agent's accepted socket does not have.
#[test]
fn link_local_ipv6_does_not_go_around_the_agent() {
    require_root!("link_local_ipv6_does_not_go_around_the_agent");
    let net = Topology::new();
    echo_server(&net.host, 8080);
    let address = net.host.ip("-6 -o addr show dev eth0 scope link");
    let address = address.split_whitespace().skip_while(|word| *word != "inet6").nth(1).and_then(|word| word.split('/').next());
    let address: Ipv6Addr = address.expect("a link-local address").parse().expect("an address");
    let index = net.pod.ip("-o link show dev eth0").split(':').next().and_then(|word| word.parse().ok()).expect("an index");
    let to = SocketAddr::from(std::net::SocketAddrV6::new(address, 8080, 0, index));
    Client::connect(&net.pod, to).expect("works without us").finish();
    let agent = Agent::start(&net.pod);
    let error = Client::connect(&net.pod, to).err().expect("a limit written down in the crate's documentation");
    assert!(timed_out(&error), "{error}");
    assert!(agent.count("outbound_captured") > 0 && agent.count("outbound_existing") == 0);
}
