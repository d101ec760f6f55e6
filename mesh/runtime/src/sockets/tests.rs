use std::io::{self, Read};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::AsFd;
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use nix::sched::{CloneFlags, unshare};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::*;
use crate::threads::DataThreads;

const LOCALHOST: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);

fn local(port: u16) -> SocketAddr {
    SocketAddr::new(LOCALHOST, port)
}

fn listen(addr: SocketAddr) -> (Listener, SocketAddr) {
    let listener = Listener::bind(&ListenerOptions::new(addr)).unwrap();
    let addr = listener.local_addr().unwrap();
    (listener, addr)
}

fn from(source: IpAddr) -> ConnectOptions {
    ConnectOptions { source: Some(source), ..ConnectOptions::default() }
}

/// Both ends of a new connection.
async fn pair(
    listener: &Listener,
    addr: SocketAddr,
    options: &ConnectOptions,
) -> (io::Result<tokio::net::TcpStream>, io::Result<(RawAccepted, SocketAddr)>) {
    tokio::join!(connect(addr, options), listener.accept())
}

#[tokio::test]
async fn a_connection_carries_bytes_and_options() {
    let (listener, addr) = listen(local(0));
    let (client, accepted) = pair(&listener, addr, &ConnectOptions::default()).await;
    let (mut client, (accepted, peer)) = (client.unwrap(), accepted.unwrap());
    assert_eq!(peer, client.local_addr().unwrap());
    assert_eq!(accepted.local_addr().unwrap(), addr);
    assert_eq!(accepted.original_dst().unwrap(), addr, "nothing was redirected");
    assert_eq!(socket2::SockRef::from(&accepted).tcp_keepalive_interval().unwrap(), Duration::from_mins(3), "inherited");
    accepted.tune(&StreamOptions { user_timeout: Some(Duration::from_secs(7)), ..Default::default() }).unwrap();
    let socket = socket2::SockRef::from(&accepted);
    assert_eq!(socket.tcp_user_timeout().unwrap(), Some(Duration::from_secs(7)));
    for socket in [socket, socket2::SockRef::from(&client)] {
        assert!(socket.tcp_nodelay().unwrap());
        assert!(socket.keepalive().unwrap());
        assert_eq!(socket.tcp_keepalive_time().unwrap(), Duration::from_mins(3));
        assert_eq!(socket.tcp_keepalive_retries().unwrap(), 9);
    }
    let mut server = accepted.into_tcp().unwrap();
    server.write_all(b"ping").await.unwrap();
    let mut buffer = [0; 4];
    client.read_exact(&mut buffer).await.unwrap();
    assert_eq!(&buffer, b"ping");
    let info = tcp_info(&server).unwrap();
    assert!(info.rtt > Duration::ZERO && info.cwnd > 0, "{info:?}");
    assert!(rtt(&server).unwrap() < Duration::from_secs(1));
}

#[tokio::test]
async fn an_accepted_connection_can_move_to_a_data_thread() {
    let threads = DataThreads::start(2).unwrap();
    let (listener, addr) = listen(local(0));
    let (client, accepted) = pair(&listener, addr, &ConnectOptions::default()).await;
    let (accepted, _) = accepted.unwrap();
    let index = threads.workers()[1]
        .spawn(async move {
            let mut server = accepted.into_tcp().unwrap();
            server.write_all(b"here").await.unwrap();
            crate::threads::current()
        })
        .await
        .unwrap();
    assert_eq!(index, Some(1));
    let mut text = String::new();
    client.unwrap().read_to_string(&mut text).await.unwrap();
    assert_eq!(text, "here");
}

#[tokio::test]
async fn dual_stack_peers_are_shown_as_what_they_are() {
    let Ok(listener) = Listener::bind(&ListenerOptions::new((Ipv6Addr::UNSPECIFIED, 0).into())) else {
        eprintln!("skipped: no IPv6 here");
        return;
    };
    let port = listener.local_addr().unwrap().port();
    let (client, accepted) = pair(&listener, local(port), &ConnectOptions::default()).await;
    let (accepted, peer) = accepted.unwrap();
    assert_eq!(peer, client.unwrap().local_addr().unwrap());
    assert_eq!(accepted.original_dst().unwrap(), local(port));
}

#[test]
fn mapped_addresses_are_canonical() {
    let parse = |text: &str| text.parse::<SocketAddr>().unwrap();
    assert_eq!(canonical(parse("[::ffff:10.0.0.1]:80")), parse("10.0.0.1:80"));
    assert_eq!(canonical(parse("[::1]:80")), parse("[::1]:80"));
    assert_eq!(canonical(parse("10.0.0.1:80")), parse("10.0.0.1:80"));
}

#[tokio::test]
async fn the_source_address_is_the_one_asked_for() {
    let (listener, addr) = listen(local(0));
    let source: IpAddr = "127.0.0.77".parse().unwrap();
    for own_ports in [0, 1] {
        connect::use_own_ports(own_ports);
        let (client, accepted) = pair(&listener, addr, &from(source)).await;
        client.unwrap();
        assert_eq!(accepted.unwrap().1.ip(), source);
    }
    // The destination as source: nothing is bound, the kernel chooses.
    connect::use_own_ports(0);
    let (client, accepted) = pair(&listener, addr, &from(LOCALHOST)).await;
    client.unwrap();
    assert_eq!(accepted.unwrap().1.ip(), LOCALHOST);
    let wrong = connect(addr, &from(IpAddr::V6(Ipv6Addr::LOCALHOST))).await.unwrap_err();
    assert_eq!(wrong.kind(), io::ErrorKind::InvalidInput);
}

#[tokio::test]
async fn own_ports_are_used_without_a_source_too() {
    let (listener, addr) = listen(local(0));
    connect::use_own_ports(1);
    let (client, accepted) = pair(&listener, addr, &ConnectOptions::default()).await;
    client.unwrap();
    assert!(accepted.unwrap().1.port() >= 32768);
}

#[tokio::test]
async fn given_ports_are_the_only_ones_used() {
    let (listener, addr) = listen(local(0));
    let options = ConnectOptions { ports: Some(9100..=9115), ..from("127.0.0.78".parse().unwrap()) };
    let (client, accepted) = pair(&listener, addr, &options).await;
    client.unwrap();
    assert!((9100..=9115).contains(&accepted.unwrap().1.port()));
    // One port, taken: an error, not another port.
    let one = ConnectOptions { ports: Some(9120..=9120), ..options };
    let (client, accepted) = pair(&listener, addr, &one).await;
    let held = (client.unwrap(), accepted.unwrap());
    assert_eq!(connect(addr, &one).await.unwrap_err().kind(), io::ErrorKind::AddrNotAvailable);
    drop(held);
}

#[tokio::test]
async fn refusals_and_silence_are_errors() {
    let (listener, addr) = listen(local(0));
    drop(listener);
    let refused = connect(addr, &ConnectOptions::default()).await.unwrap_err();
    assert_eq!(refused.kind(), io::ErrorKind::ConnectionRefused);

    // A full queue swallows the SYN.
    let full = ListenerOptions { backlog: 0, ..ListenerOptions::new(local(0)) }.bind().unwrap();
    let addr = full.local_addr().unwrap();
    let options = ConnectOptions { timeout: Duration::from_millis(200), ..ConnectOptions::default() };
    let mut held = Vec::new();
    let mut last = None;
    for _ in 0..8 {
        match connect(addr, &options).await {
            Ok(stream) => held.push(stream),
            Err(error) => {
                last = Some(error.kind());
                break;
            }
        }
    }
    assert_eq!(last, Some(io::ErrorKind::TimedOut));
}

#[tokio::test]
async fn a_reset_stays_a_reset() {
    let (listener, addr) = listen(local(0));
    let (client, accepted) = pair(&listener, addr, &ConnectOptions::default()).await;
    let server = accepted.unwrap().0.into_tcp().unwrap();
    reset_on_close(&server).unwrap();
    drop(server);
    let error = client.unwrap().read_u8().await.unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
    assert!(is_reset(&error));
    assert!(!is_reset(&io::ErrorKind::UnexpectedEof.into()));
}

#[test]
fn rights_are_tried_not_guessed() {
    match probe_rights(1337) {
        Ok(()) => {}
        Err(error) => {
            assert!(check_capabilities(&[Capability::SysAdmin, Capability::NetAdmin]).is_err(), "{error}");
            eprintln!("skipped: {error}");
        }
    }
}

#[test]
fn udp_sockets_bind() {
    let socket = bind_udp(local(0), None, false).unwrap();
    assert_ne!(socket.local_addr().unwrap().port(), 0);
}

#[test]
fn a_listener_outside_of_a_runtime_is_an_error() {
    assert!(ListenerOptions::new(local(0)).bind().unwrap().into_listener().is_err());
}

/// A new network namespace with a working loopback, or `None` (and a word) where this machine does not allow it.
fn new_netns(commands: &[&[&str]]) -> Option<Arc<NetnsFd>> {
    let made = std::thread::scope(|scope| {
        let run = || -> io::Result<NetnsFd> {
            unshare(CloneFlags::CLONE_NEWNET)?;
            for command in [["ip", "link", "set", "lo", "up"].as_slice()].iter().chain(commands) {
                if !Command::new(command[0]).args(&command[1..]).status()?.success() {
                    return Err(io::Error::other(command.join(" ")));
                }
            }
            NetnsFd::current()
        };
        scope.spawn(run).join().unwrap()
    });
    made.map(Arc::new).inspect_err(|error| eprintln!("skipped: no network namespace here: {error}")).ok()
}

#[test]
fn opening_a_fifo_as_a_namespace_fails_at_once() {
    let dir = std::env::temp_dir().join(format!("culvert-fifo-{}", std::process::id()));
    nix::unistd::mkfifo(&dir, nix::sys::stat::Mode::S_IRWXU).unwrap();
    // Without O_NONBLOCK this waits for a writer for ever.
    let error = NetnsFd::open(&dir).unwrap_err();
    std::fs::remove_file(&dir).unwrap();
    assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
}

#[test]
fn only_namespaces_are_namespaces() {
    let file = std::fs::File::open("/proc/self/status").unwrap();
    assert_eq!(NetnsFd::from_fd(file.into()).unwrap_err().kind(), io::ErrorKind::InvalidInput);
    assert!(NetnsFd::open("/nonexistent").is_err());
    let own = NetnsFd::current().unwrap();
    let again = NetnsFd::from_fd(own.as_fd().try_clone_to_owned().unwrap()).unwrap();
    assert_eq!(own.id(), again.id());
    // Not a network namespace: entering is refused. (The own one is never entered.)
    let other = NetnsFd::open("/proc/self/ns/uts").unwrap();
    assert!(other.run_in(|| Ok(())).is_err());
    assert_eq!(own.run_in(|| Ok(7)).unwrap(), 7);
}

#[tokio::test]
async fn sockets_live_in_the_namespace_they_were_made_in() {
    let Some(pod) = new_netns(&[]) else { return };
    let home = NetnsFd::current().unwrap().id();
    assert_ne!(pod.id(), home);
    let (bound, seen) = pod
        .run_in(|| Ok((ListenerOptions { mark: Some(1337), ..ListenerOptions::new(local(0)) }.bind()?, NetnsFd::current()?.id())))
        .unwrap();
    assert_eq!(seen, pod.id());
    assert_eq!(NetnsFd::current().unwrap().id(), home, "back home");
    let listener = bound.into_listener().unwrap();
    let addr = listener.local_addr().unwrap();
    let outside = connect(addr, &ConnectOptions::default()).await.unwrap_err();
    assert_eq!(outside.kind(), io::ErrorKind::ConnectionRefused);
    let options = ConnectOptions { netns: Some(Arc::clone(&pod)), mark: Some(1337), ..ConnectOptions::default() };
    let (client, accepted) = pair(&listener, addr, &options).await;
    assert_eq!(accepted.unwrap().1, client.unwrap().local_addr().unwrap());
}

#[test]
fn an_excursion_comes_back_after_errors_and_panics_and_does_not_nest() {
    let Some(pod) = new_netns(&[]) else { return };
    let home = NetnsFd::current().unwrap().id();
    assert!(pod.run_in(|| Err::<(), _>(io::Error::other("no"))).is_err());
    let nested = pod.run_in(|| Ok(pod.run_in(|| Ok(())).is_err())).unwrap();
    assert!(nested);
    let caught = std::panic::catch_unwind(|| pod.run_in(|| -> io::Result<()> { panic!("in a foreign place") }));
    assert!(caught.is_err());
    assert_eq!(NetnsFd::current().unwrap().id(), home);
    assert_eq!(pod.run_in(|| Ok(NetnsFd::current()?.id())).unwrap(), pod.id());
}

#[tokio::test]
async fn any_source_address_can_be_borrowed() {
    let routes: &[&[&str]] = &[&["ip", "route", "add", "local", "192.0.2.0/24", "dev", "lo"]];
    let Some(pod) = new_netns(routes) else { return };
    let listener = pod.run_in(|| ListenerOptions::new(local(0)).bind()).unwrap().into_listener().unwrap();
    let addr = SocketAddr::new(LOCALHOST, listener.local_addr().unwrap().port());
    let source: IpAddr = "192.0.2.7".parse().unwrap();
    let options = ConnectOptions { netns: Some(pod), ..from(source) };
    let (client, accepted) = pair(&listener, addr, &options).await;
    client.unwrap();
    assert_eq!(accepted.unwrap().1.ip(), source);
}

/// Where the kernel finds no port any more, connections still get through.
#[tokio::test]
async fn running_out_of_ephemeral_ports_is_survived() {
    let Some(pod) = new_netns(&[&["sysctl", "-qw", "net.ipv4.ip_local_port_range=33000 33015"]]) else { return };
    let listener = pod.run_in(|| ListenerOptions::new(local(0)).bind()).unwrap().into_listener().unwrap();
    let addr = listener.local_addr().unwrap();
    for source in [None, Some("127.0.0.9".parse().unwrap())] {
        let options = ConnectOptions { netns: Some(Arc::clone(&pod)), source, ..ConnectOptions::default() };
        connect::use_own_ports(0);
        let mut held = Vec::new();
        for _ in 0..64 {
            let (client, accepted) = pair(&listener, addr, &options).await;
            held.push((client.unwrap(), accepted.unwrap()));
        }
        let beyond = held.iter().filter(|(_, (_, peer))| !(33000..=33015).contains(&peer.port())).count();
        assert!(beyond >= 48, "{beyond}");
    }
}

/// Descriptor limits hold for a whole process, so this runs in one of its own.
#[test]
fn running_out_of_descriptors_pauses_the_accept_loop() {
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "--ignored", "--nocapture", "sockets::tests::child_runs_out_of_descriptors"])
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
    assert!(String::from_utf8_lossy(&output.stdout).contains("1 passed"));
}

#[test]
#[ignore = "run by running_out_of_descriptors_pauses_the_accept_loop"]
fn child_runs_out_of_descriptors() {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let (listener, addr) = listen(local(0));
        let mut client = std::net::TcpStream::connect(addr).unwrap();
        let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
        setrlimit(Resource::RLIMIT_NOFILE, 64, hard).unwrap();
        let mut hoard = Vec::new();
        while let Ok(file) = std::fs::File::open("/dev/null") {
            hoard.push(file);
        }
        let accepting = tokio::spawn(async move { listener.accept().await });
        // The pause counter says when the loop has hit the limit; the number of turns is bounded by the test's timeout.
        tokio::time::timeout(Duration::from_secs(20), async {
            while accept_pauses() == 0 {
                tokio::task::yield_now().await;
            }
        })
        .await
        .unwrap();
        hoard.clear();
        let (accepted, _) = accepting.await.unwrap().unwrap();
        assert!((1..5).contains(&accept_pauses()), "no spinning: {}", accept_pauses());
        drop(accepted);
        assert_eq!(client.read(&mut [0]).unwrap(), 0);
    });
    let limit = getrlimit(Resource::RLIMIT_NOFILE).unwrap().1;
    assert_eq!(raise_nofile().unwrap(), limit);
    assert_eq!(getrlimit(Resource::RLIMIT_NOFILE).unwrap().0, limit);
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let room: u64 = status.lines().find_map(|line| line.strip_prefix("FDSize:")).unwrap().trim().parse().unwrap();
    assert!(room >= limit.min(1 << 16), "no data thread waits for a larger table of descriptors: {room} of {limit}");
}

/// Prints what connections from one source cost past the port-search cliff; run by hand with `--ignored --nocapture`.
#[tokio::test]
#[ignore = "a measurement"]
async fn churn_from_one_source() {
    use nix::sys::resource::{UsageWho, getrusage};
    use nix::sys::time::TimeValLike;
    use std::time::Instant;
    let cpu = || {
        let usage = getrusage(UsageWho::RUSAGE_SELF).unwrap();
        usage.user_time().num_microseconds() + usage.system_time().num_microseconds()
    };
    for (name, adaptive) in [("kernel's port only", false), ("as built", true)] {
        // Two namespaces and a veth: on loopback the kernel reuses ports in TIME_WAIT and there is no cliff.
        let Some(server) = new_netns(&[]) else { return };
        let path = format!("/proc/{}/fd/{}", std::process::id(), std::os::fd::AsRawFd::as_raw_fd(&server.as_fd()));
        let Some(pod) = new_netns(&[
            &["ip", "link", "add", "v0", "type", "veth", "peer", "name", "v1"],
            &["ip", "link", "set", "v1", "netns", &path],
            &["ip", "addr", "add", "192.0.2.1/24", "dev", "v0"],
            &["ip", "link", "set", "v0", "up"],
        ]) else {
            return;
        };
        let listener = server.run_in(|| {
            for command in [["addr", "add", "192.0.2.2/24", "dev", "v1"].as_slice(), &["link", "set", "v1", "up"]] {
                assert!(Command::new("ip").args(command).status()?.success());
            }
            ListenerOptions::new("192.0.2.2:0".parse().unwrap()).bind()
        });
        let listener = listener.unwrap().into_listener().unwrap();
        let addr = listener.local_addr().unwrap();
        let source = Some("192.0.2.1".parse().unwrap());
        let options = ConnectOptions { netns: Some(pod), source, ..ConnectOptions::default() };
        for block in 0..8 {
            let (before, cpu_before) = (Instant::now(), cpu());
            for _ in 0..4000 {
                if !adaptive {
                    connect::use_own_ports(0);
                }
                let client = connect(addr, &options).await.unwrap();
                let accepted = listener.accept().await.unwrap();
                drop(client);
                drop(accepted);
            }
            let rate = 4000.0 / before.elapsed().as_secs_f64();
            let cost = (cpu() - cpu_before) as f64 / 4000.0;
            println!("{name}, block {block}: {rate:.0} connections/s, {cost:.0} us CPU each");
            if rate < 1000.0 {
                break;
            }
        }
    }
}
