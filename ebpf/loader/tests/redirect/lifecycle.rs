//! Attaching, detaching, failing closed and open, and what is left behind.
use std::{
    io::{BufRead, BufReader, ErrorKind, Read, Write},
    net::{SocketAddr, TcpListener},
    os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd},
    path::PathBuf,
    process::{Child, Command, Stdio},
    sync::atomic::{AtomicBool, Ordering},
    time::{Duration, Instant},
};

use aya::{
    EbpfLoader,
    maps::{Array, MapData},
    programs::{LinkOrder, SchedClassifier, SkLookup, TcAttachType, links::FdLink, tc::TcAttachOptions},
};
use ebpf_loader::{CaptureRoutes, Config, ListenerFault, Listeners, PinRoot, PodSpec, Redirect, RedirectError, Source};

use crate::{
    agent::{Agent, Direction, OWNER},
    capture::{Client, echo_server},
    net::{Netns, POD4, POD6, SERVICE4, SERVICE6, Topology, eventually, ip, timed_out},
    require_root,
    sock::{self, GOOD, ListenerKind, TO_APPLICATION},
};

/// Everything the redirection could leave in a namespace, as text.
fn remains(pod: &Netns) -> String {
    let mut found = String::new();
    for family in ["-4", "-6"] {
        found += &pod.ip(&format!("{family} rule show"));
        found += &pod.ip(&format!("{family} route show table all"));
    }
    for key in ["accept_local", "src_valid_mark"] {
        found += &pod.read_sysctl(&format!("net/ipv4/conf/eth0/{key}"));
        found += "\n";
    }
    let programs = pod.run(|| {
        [("lo", TcAttachType::Ingress), ("eth0", TcAttachType::Ingress), ("eth0", TcAttachType::Egress)]
            .map(|(device, direction)| SchedClassifier::query_tcx(device, direction).expect("query").1.len())
    });
    found + &format!("programs={programs:?}\n{}", filters(pod))
}

/// The filters of `eth0`, and what they are of.
fn filters(pod: &Netns) -> String {
    let of = ["qdisc show dev eth0 clsact", "filter show dev eth0 ingress", "filter show dev eth0 egress"];
    of.map(|what| pod.tc(what)).concat()
}

#[test]
fn connections_older_than_the_enrolment_live_on() {
    require_root!("connections_older_than_the_enrolment_live_on");
    let net = Topology::new();
    echo_server(&net.host, 8080);
    echo_server(&net.pod, 9090);
    let mut old: Vec<_> =
        [(&net.pod, SERVICE4, 8080), (&net.pod, SERVICE6, 8080), (&net.host, POD4, 9090), (&net.host, POD6, 9090)]
            .into_iter()
            .map(|(netns, to, port)| Client::connect(netns, SocketAddr::new(ip(to), port)).expect("direct"))
            .collect();
    let mut agent = Agent::start(&net.pod);
    for client in &mut old {
        client.echo("still here");
    }
    assert!(agent.nothing_captured());
    assert!(agent.count("outbound_existing") >= 4);
    assert_eq!(agent.count("outbound_owned"), 0);
    // New ones are captured meanwhile.
    Client::connect(&net.pod, SocketAddr::new(ip(SERVICE4), 8080)).expect("captured").finish();
    assert_eq!(agent.next().direction, Direction::Out);
    agent.redirect.take().expect("attached").detach().expect("detach");
    for mut client in old {
        client.echo("and after");
        client.finish();
    }
}

/// What the agent's side no longer knows must not reach the network.
#[test]
fn older_connections_are_reset_by_choice() {
    require_root!("older_connections_are_reset_by_choice");
    let net = Topology::new();
    echo_server(&net.host, 8080);
    echo_server(&net.pod, 9090);
    let outbound = [SERVICE4, SERVICE6].map(|to| Client::connect(&net.pod, SocketAddr::new(ip(to), 8080)).expect("direct"));
    let agent = Agent::start_with(&net.pod, Config::default().with_reset_existing(true)).expect("attach");
    for mut client in outbound {
        client.stream.get_mut().write_all(b"still here?").expect("the first write is only queued");
        let error = client.stream.read(&mut [0; 16]).expect_err("reset");
        assert_eq!(error.kind(), ErrorKind::ConnectionReset);
    }
    assert!(agent.count("outbound_existing_reset") >= 2);
    assert_eq!(agent.count("outbound_existing"), 0);
    // Those that others opened to the pod too, and both sides learn of it.
    drop(agent);
    let inbound = [POD4, POD6].map(|to| Client::connect(&net.host, SocketAddr::new(ip(to), 9090)).expect("direct"));
    let agent = Agent::start_with(&net.pod, Config::default().with_reset_existing(true)).expect("attach");
    for mut client in inbound {
        // It learns of it with its next retransmission.
        client.stream.get_ref().set_read_timeout(Some(Duration::from_secs(10))).expect("a limit");
        client.stream.get_mut().write_all(b"still here?").expect("the first write is only queued");
        let error = client.stream.read(&mut [0; 16]).expect_err("reset");
        assert_eq!(error.kind(), ErrorKind::ConnectionReset, "{:?}", agent.all_counts());
    }
    // New connections live, with SYN cookies too: their acknowledgement is such a segment without an owner.
    for cookies in ["1", "2"] {
        net.pod.sysctl("net/ipv4/tcp_syncookies", cookies);
        for (netns, to, port) in
            [(&net.pod, SERVICE4, 8080), (&net.pod, SERVICE6, 8080), (&net.host, POD4, 9090), (&net.host, POD6, 9090)]
        {
            let mut client =
                Client::connect(netns, SocketAddr::new(ip(to), port)).unwrap_or_else(|e| panic!("{to}, cookies {cookies}: {e}"));
            client.echo("captured");
            client.finish();
            agent.next();
        }
    }
}

#[test]
fn detaching_leaves_nothing_and_restores_direct_traffic() {
    require_root!("detaching_leaves_nothing_and_restores_direct_traffic");
    let net = Topology::new();
    echo_server(&net.host, 8080);
    echo_server(&net.pod, 9090);
    let before = remains(&net.pod);
    for dropped in [false, true] {
        let mut agent = Agent::start(&net.pod);
        let during = remains(&net.pod);
        assert!(during.contains("fwmark 0x53a/0xfff") && during.contains("programs=[0, 1, 1]"), "{during}");
        let redirect = agent.redirect.take().expect("attached");
        assert_eq!(redirect.interfaces(), ["eth0"]);
        if dropped {
            drop(redirect);
        } else {
            redirect.detach().expect("detach");
        }
        assert_eq!(remains(&net.pod), before);
        for (netns, to, port) in
            [(&net.pod, SERVICE4, 8080), (&net.pod, SERVICE6, 8080), (&net.host, POD4, 9090), (&net.host, POD6, 9090)]
        {
            Client::connect(netns, SocketAddr::new(ip(to), port)).expect("direct").finish();
        }
        assert!(agent.nothing_captured());
    }
}

/// Without pins the programs end with the agent and traffic is direct again, until the next one starts.
#[test]
fn without_pins_a_killed_agent_takes_its_programs_along_and_the_next_takes_over_the_rest() {
    const NAME: &str = "without_pins_a_killed_agent_takes_its_programs_along_and_the_next_takes_over_the_rest";
    if let Ok(netns) = std::env::var(CHILD_NETNS) {
        return be_killed(&netns);
    }
    require_root!(NAME);
    let net = Topology::new();
    echo_server(&net.host, 8080);
    let before = remains(&net.pod);
    let mut child = start_child(NAME, &net.pod, None);
    assert!(remains(&net.pod).contains("programs=[0, 1, 1]"));
    Client::connect(&net.pod, SocketAddr::new(ip(SERVICE4), 8080)).expect("captured").finish();
    child.kill().expect("kill");
    child.wait().expect("wait");

    assert!(eventually(|| remains(&net.pod).contains("programs=[0, 0, 0]")), "{}", remains(&net.pod));
    assert!(remains(&net.pod).contains("fwmark 0x53a/0xfff"), "the rule stays, and harms nobody");
    let ways = [SERVICE4, SERVICE6].map(|service| SocketAddr::new(ip(service), 8080));
    for to in ways {
        Client::connect(&net.pod, to).expect("direct").finish();
    }
    let mut agent = Agent::start(&net.pod);
    for to in ways {
        Client::connect(&net.pod, to).expect("captured").finish();
        agent.next();
    }
    agent.redirect.take().expect("attached").detach().expect("detach");
    assert_eq!(remains(&net.pod), before);
}

/// Set for the process to be killed, which runs the same test.
const CHILD_NETNS: &str = "REDIRECT_TEST_NETNS";
const CHILD_PINS: &str = "REDIRECT_TEST_PINS";

/// This program as an agent of `pod`.
fn command_of(test: &str, pod: &Netns, pins: Option<&PinRoot>) -> Command {
    let mut command = Command::new(std::env::current_exe().expect("this program"));
    command.args(["--exact", &format!("lifecycle::{test}"), "--nocapture"]).env(CHILD_NETNS, &pod.name);
    if let Some(pins) = pins {
        command.env(CHILD_PINS, pins.dir());
    }
    command.stdin(Stdio::piped()).stdout(Stdio::piped());
    command
}

/// Starts it and waits until it has attached.
fn start_child(test: &str, pod: &Netns, pins: Option<&PinRoot>) -> Child {
    let mut child = command_of(test, pod, pins).spawn().expect("start");
    let mut said = BufReader::new(child.stdout.take().expect("piped")).lines().map_while(Result::ok);
    assert!(said.any(|line| line.contains("READY")));
    child
}

fn be_killed(netns: &str) {
    let pod = Netns::open(netns);
    let _agent = match std::env::var(CHILD_PINS) {
        Ok(dir) => Agent::start_pinned(&pod, &PinRoot::open(dir.as_ref()).expect("pins")),
        Err(_) => Agent::start(&pod),
    };
    println!("READY");
    // Until killed, or until the test that started it is gone.
    let _ = std::io::stdin().read(&mut [0]);
}

/// A directory of pins that is emptied and removed at the end of a test.
pub struct Pins(pub PinRoot);

impl Pins {
    pub fn new(test: &str) -> Self {
        let dir = format!("/sys/fs/bpf/culvert-test/{test}-{}", std::process::id());
        Self(PinRoot::open(dir.as_ref()).expect("a BPF filesystem"))
    }
}

impl Drop for Pins {
    fn drop(&mut self) {
        let _ = self.0.sweep([]);
        let _ = std::fs::remove_dir(self.0.dir());
    }
}

fn pinned(pins: &PinRoot) -> Vec<String> {
    let pods = std::fs::read_dir(pins.dir()).expect("list");
    let of = |pod: std::io::Result<std::fs::DirEntry>| {
        let names = std::fs::read_dir(pod.expect("entry").path()).expect("list");
        names.map(|name| name.expect("entry").file_name().into_string().expect("text")).collect::<Vec<_>>()
    };
    let marks = ["object-", "of-"];
    let mut names: Vec<_> = pods.flat_map(of).filter(|name| !marks.iter().any(|mark| name.starts_with(mark))).collect();
    names.sort();
    names
}

/// Makes the next agent take the programs there for those of another object.
fn forget_object(pins: &PinRoot) {
    for pod in std::fs::read_dir(pins.dir()).expect("list") {
        for entry in std::fs::read_dir(pod.expect("entry").path()).expect("list") {
            let path = entry.expect("entry").path();
            if path.to_string_lossy().contains("/object-") {
                std::fs::remove_file(path).expect("a pin");
            }
        }
    }
}

/// The kernel's numbers of the links on the pod's hooks; they stay when a program is replaced in a link.
fn hooks(pod: &Netns) -> Vec<(u64, usize)> {
    pod.run(|| {
        [("eth0", TcAttachType::Ingress), ("eth0", TcAttachType::Egress)]
            .map(|(device, direction)| {
                let (revision, programs) = SchedClassifier::query_tcx(device, direction).expect("query");
                (revision, programs.len())
            })
            .to_vec()
    })
}

/// In and out, both families.
const WAYS: [(bool, &str, u16); 4] = [(true, SERVICE4, 8080), (true, SERVICE6, 8080), (false, POD4, 9090), (false, POD6, 9090)];

/// In, to the port of HBONE.
const HBONE: [(bool, &str, u16); 2] = [(false, POD4, 15008), (false, POD6, 15008)];

fn dial(net: &Topology, (from_pod, to, port): (bool, &str, u16), patience: Duration) -> std::io::Result<std::net::TcpStream> {
    let to = SocketAddr::new(ip(to), port);
    let from = if from_pod { &net.pod } else { &net.host };
    from.run(move || std::net::TcpStream::connect_timeout(&to, patience))
}

#[test]
fn with_pins_a_killed_agent_leaves_its_pod_closed_and_the_next_takes_over() {
    const NAME: &str = "with_pins_a_killed_agent_leaves_its_pod_closed_and_the_next_takes_over";
    if let Ok(netns) = std::env::var(CHILD_NETNS) {
        return be_killed(&netns);
    }
    require_root!(NAME);
    let net = Topology::new();
    let pins = Pins::new("killed");
    echo_server(&net.host, 8080);
    echo_server(&net.pod, 9090);
    let before = remains(&net.pod);
    let mut old = Client::connect(&net.pod, SocketAddr::new(ip(SERVICE4), 8080)).expect("direct");
    let mut child = start_child(NAME, &net.pod, Some(&pins.0));
    Client::connect(&net.pod, SocketAddr::new(ip(SERVICE4), 8080)).expect("captured").finish();
    child.kill().expect("kill");
    child.wait().expect("wait");

    // A program of the pod takes HBONE's port while it can.
    echo_server(&net.pod, 15008);
    for way in WAYS.into_iter().chain(HBONE) {
        let error = dial(&net, way, Duration::from_millis(300)).expect_err("dropped");
        assert!(timed_out(&error), "{way:?}: {error}");
    }
    old.echo("older than the enrolment");
    assert_eq!(
        pinned(&pins.0),
        ["CONFIG", "SOCKS", "SOURCES", "STEER", "TRAFFIC", "eth_egress-2", "eth_ingress-2", "steer_lookup"]
    );

    let mut agent = Agent::start_pinned(&net.pod, &pins.0);
    assert!(hooks(&net.pod).iter().all(|(_, programs)| *programs == 1), "one program each: {:?}", hooks(&net.pod));
    assert!(agent.count("outbound_no_listener") >= 2, "the counters go on: {:?}", agent.all_counts());
    for (from_pod, to, port) in WAYS.into_iter().chain(HBONE) {
        let from = if from_pod { &net.pod } else { &net.host };
        Client::connect(from, SocketAddr::new(ip(to), port)).expect("captured").finish();
        agent.next();
    }
    old.finish();
    agent.redirect.take().expect("attached").detach().expect("detach");
    assert_eq!(remains(&net.pod), before);
    assert!(pinned(&pins.0).is_empty());
}

/// The next agent attaches while the last one still serves: no connection is lost, and none goes around.
#[test]
fn programs_are_replaced_without_a_gap() {
    require_root!("programs_are_replaced_without_a_gap");
    let net = Topology::new();
    let pins = Pins::new("replaced");
    echo_server(&net.host, 8080);
    let first = Agent::start_pinned(&net.pod, &pins.0);
    let (mut held, stop) =
        (Client::connect(&net.pod, SocketAddr::new(ip(SERVICE4), 8080)).expect("captured"), AtomicBool::new(false));
    let dialled = std::thread::scope(|scope| {
        let dialler = scope.spawn(|| {
            let mut count = 0;
            while !stop.load(Ordering::Relaxed) {
                Client::connect(&net.pod, SocketAddr::new(ip(SERVICE6), 8080)).expect("captured").finish();
                count += 1;
            }
            count
        });
        for _ in 0..5 {
            // With the same listeners: what is replaced here are the programs.
            let listeners = first.listeners();
            let spec =
                PodSpec { netns: net.pod.fd(), interfaces: None, config: Config::default(), pins: Some(&pins.0), owner: OWNER };
            forget_object(&pins.0);
            drop(Redirect::attach(&spec, &listeners).expect("take over"));
            std::thread::sleep(Duration::from_millis(20));
        }
        stop.store(true, Ordering::Relaxed);
        dialler.join().expect("dialler")
    });
    held.echo("still carried");
    let captured = std::iter::from_fn(|| first.captured.recv_timeout(Duration::from_secs(1)).ok()).count();
    assert_eq!(captured, dialled + 1);
    assert!(dialled > 5, "{dialled}");
}

/// Captured at once, by filters; the lasting places are taken under load, and nobody notices.
#[test]
fn a_pod_is_given_its_lasting_places_later() {
    require_root!("a_pod_is_given_its_lasting_places_later");
    let net = Topology::new();
    let pins = Pins::new("early");
    echo_server(&net.host, 8080);
    echo_server(&net.pod, 9090);
    echo_server(&net.pod, 15008);
    let before = remains(&net.pod);
    let mut agent = Agent::start_early(&net.pod, &pins.0);
    assert!(hooks(&net.pod).iter().all(|(_, programs)| *programs == 0), "{:?}", hooks(&net.pod));
    assert_eq!(filters(&net.pod).matches("culvert").count(), 2, "{}", filters(&net.pod));
    let captured = |agent: &Agent| {
        for (from_pod, to, port) in WAYS.into_iter().chain(HBONE) {
            let from = if from_pod { &net.pod } else { &net.host };
            Client::connect(from, SocketAddr::new(ip(to), port)).expect("captured").finish();
            agent.next();
        }
    };
    captured(&agent);
    let (mut held, stop) =
        (Client::connect(&net.pod, SocketAddr::new(ip(SERVICE4), 8080)).expect("captured"), AtomicBool::new(false));
    agent.next();
    let dialled = std::thread::scope(|scope| {
        let dialler = scope.spawn(|| {
            let mut count = 0;
            while !stop.load(Ordering::Relaxed) {
                Client::connect(&net.pod, SocketAddr::new(ip(SERVICE6), 8080)).expect("captured").finish();
                Client::connect(&net.host, SocketAddr::new(ip(POD4), 9090)).expect("captured").finish();
                count += 2;
            }
            count
        });
        std::thread::sleep(Duration::from_millis(20));
        agent.settle();
        std::thread::sleep(Duration::from_millis(20));
        stop.store(true, Ordering::Relaxed);
        dialler.join().expect("dialler")
    });
    held.echo("still carried");
    assert_eq!(std::iter::from_fn(|| agent.captured.recv_timeout(Duration::from_secs(1)).ok()).count(), dialled);
    assert!(hooks(&net.pod).iter().all(|(_, programs)| *programs == 1), "{:?}", hooks(&net.pod));
    assert_eq!(filters(&net.pod), "", "nothing is left of them");
    assert_eq!(pinned(&pins.0).len(), 8, "{:?}", pinned(&pins.0));
    captured(&agent);
    held.finish();
    agent.redirect.take().expect("attached").detach().expect("detach");
    assert_eq!(remains(&net.pod), before);
}

/// An agent that dies before the pod has its lasting places: closed until the next has them, or gives the pod up.
#[test]
fn a_pod_without_its_lasting_places_is_closed_too() {
    require_root!("a_pod_without_its_lasting_places_is_closed_too");
    let net = Topology::new();
    let pins = Pins::new("early-death");
    echo_server(&net.host, 8080);
    echo_server(&net.pod, 9090);
    let before = remains(&net.pod);
    let closed = || {
        for way in WAYS {
            let error = dial(&net, way, Duration::from_millis(50)).expect_err("no agent runs");
            assert!(timed_out(&error), "{way:?}: {error}");
        }
    };
    let captured = |agent: &Agent| {
        for (from_pod, to, port) in WAYS {
            let from = if from_pod { &net.pod } else { &net.host };
            Client::connect(from, SocketAddr::new(ip(to), port)).expect("captured").finish();
            agent.next();
        }
    };
    // Taken over; the places that it has by then are kept.
    for settled in [0, 1, 2] {
        let agent = Agent::start_early(&net.pod, &pins.0);
        let unsettled = agent.redirect.as_ref().expect("attached").unsettled();
        for _ in 0..settled {
            assert!(unsettled.settle().expect("a place"));
        }
        unsettled.leave();
        drop(agent);
        closed();
        let mut agent = Agent::start_early(&net.pod, &pins.0);
        // Filters only as before, and no less quickly; or all places at once.
        assert_eq!(agent.redirect().unsettled().is_unsettled(), settled == 0);
        assert_eq!(filters(&net.pod).matches("culvert").count(), if settled == 0 { 2 } else { 0 }, "{}", filters(&net.pod));
        captured(&agent);
        agent.settle();
        assert_eq!(filters(&net.pod), "");
        captured(&agent);
        agent.redirect.take().expect("attached").detach().expect("detach");
        drop(agent);
        assert_eq!(remains(&net.pod), before);
    }
    // Given up: direct, whatever was denied, and captured again like any other.
    let mut agent = Agent::start_early(&net.pod, &pins.0);
    let everything = Source { address: ip("0.0.0.0"), prefix_len: 0, denied: true };
    agent.redirect().set_sources(&[everything]).expect("sources");
    drop(agent);
    closed();
    assert_eq!(pins.0.sweep([]).expect("sweep"), 1);
    for way in WAYS {
        dial(&net, way, Duration::from_secs(1)).expect("direct");
    }
    let mut agent = Agent::start_early(&net.pod, &pins.0);
    assert!(agent.redirect().unsettled().is_unsettled());
    captured(&agent);
    // Given up before it has them, by itself or when it was left to an agent that never came.
    agent.redirect().unsettled().leave();
    agent.redirect.take().expect("attached").detach().expect("detach");
    assert_eq!(remains(&net.pod), before);
}

/// Filters come after programs of others in the newer places, which may pass packets on for good, and those of others are theirs.
#[test]
fn beside_others_a_pod_is_given_its_lasting_places_at_once() {
    require_root!("beside_others_a_pod_is_given_its_lasting_places_at_once");
    let net = Topology::new();
    let pins = Pins::new("early-others");
    net.pod.tc("qdisc add dev eth0 clsact");
    net.pod.tc("filter add dev eth0 egress protocol ip prio 7 u32 match u32 0 0 flowid 1:1");
    let theirs = filters(&net.pod);
    let mut agent = Agent::start_early(&net.pod, &pins.0);
    assert!(!agent.redirect().unsettled().is_unsettled());
    assert_eq!(filters(&net.pod), theirs);
    agent.redirect.take().expect("attached").detach().expect("detach");
    drop(agent);
    assert_eq!(filters(&net.pod), theirs);
    net.pod.tc("qdisc del dev eth0 clsact");
    // Its older kin takes its place and has one hook only.
    net.pod.tc("qdisc add dev eth0 ingress");
    let mut agent = Agent::start_early(&net.pod, &pins.0);
    assert!(!agent.redirect().unsettled().is_unsettled());
    agent.redirect.take().expect("attached").detach().expect("detach");
    drop(agent);
    net.pod.tc("qdisc del dev eth0 ingress");
    // An empty one is of use.
    net.pod.tc("qdisc add dev eth0 clsact");
    let mut agent = Agent::start_early(&net.pod, &pins.0);
    assert!(agent.redirect().unsettled().is_unsettled());
    agent.redirect.take().expect("attached").detach().expect("detach");
    drop(agent);
    // The links of an agent without pins are programs like those of others.
    let mut without = Agent::start(&net.pod);
    without.stop_listening();
    let mut agent = Agent::start_early(&net.pod, &pins.0);
    assert!(!agent.redirect().unsettled().is_unsettled());
    agent.redirect.take().expect("attached").detach().expect("detach");
    drop(agent);
    drop(without);
}

/// Killed at any moment of an attachment, the first or a later one: what is there drops, and the next agent completes it.
#[test]
fn an_agent_killed_while_it_attaches_opens_nothing() {
    const NAME: &str = "an_agent_killed_while_it_attaches_opens_nothing";
    if let Ok(netns) = std::env::var(CHILD_NETNS) {
        return be_killed(&netns);
    }
    require_root!(NAME);
    let net = Topology::new();
    let pins = Pins::new("crash");
    echo_server(&net.host, 8080);
    echo_server(&net.pod, 9090);
    let before = remains(&net.pod);
    // How long one takes, from its start.
    let begun = Instant::now();
    let mut child = start_child(NAME, &net.pod, Some(&pins.0));
    let whole = begun.elapsed();
    child.kill().expect("kill");
    child.wait().expect("wait");
    let closed = |after: Duration| {
        for way in WAYS {
            let error = dial(&net, way, Duration::from_millis(50)).expect_err("no agent runs");
            assert!(timed_out(&error), "killed after {after:?}, {way:?}: {error}");
        }
    };
    closed(whole);
    const TIMES: u32 = 12;
    for n in 1..=TIMES {
        // Half of the time is the start of the process.
        let after = whole / 2 + whole * n / (2 * TIMES);
        forget_object(&pins.0);
        let mut child = command_of(NAME, &net.pod, Some(&pins.0)).spawn().expect("start");
        std::thread::sleep(after);
        child.kill().expect("kill");
        child.wait().expect("wait");
        closed(after);
    }
    // The same for one that dies before all its links are pinned: what it made is taken over or made anew.
    // An agent of before had no map of sources.
    for gone in ["SOURCES", "eth_ingress-2", "eth_egress-2", "steer_lookup"] {
        let pod = std::fs::read_dir(pins.0.dir()).expect("list").next().expect("the pod's").expect("entry").path();
        std::fs::remove_file(pod.join(gone)).expect("a pin");
        std::fs::File::open(&pod).expect("the pod's pins stay");
        drop(Agent::start_pinned(&net.pod, &pins.0));
        assert_eq!(pinned(&pins.0).len(), 8, "without {gone}: {:?}", pinned(&pins.0));
    }
    let mut agent = Agent::start_pinned(&net.pod, &pins.0);
    // The kernel takes a link off its hook some time after its last pin went.
    let one_each = || hooks(&net.pod).iter().all(|(_, programs)| *programs == 1);
    assert!(eventually(one_each), "one program each: {:?}", hooks(&net.pod));
    for (from_pod, to, port) in WAYS {
        let from = if from_pod { &net.pod } else { &net.host };
        Client::connect(from, SocketAddr::new(ip(to), port)).expect("captured").finish();
        agent.next();
    }
    agent.redirect.take().expect("attached").detach().expect("detach");
    assert_eq!(remains(&net.pod), before);
}

/// The object of agents before 4614dd4: on `lo` there was a hook too.
static THREE_HOOKS: &[u8] = aya::include_bytes_aligned!("three-hooks.bpf.o");

/// What such an agent pinned for the pod, in `dir`, and made in its namespace.
fn attach_three_hooks(pod: &Netns, dir: PathBuf) {
    CaptureRoutes::install(pod.fd()).expect("rules and routes");
    let netns = pod.file();
    pod.run(move || {
        let mut loader = EbpfLoader::new();
        for map in ["SOCKS", "CONFIG", "TRAFFIC", "STEER", "SOURCES"] {
            loader.map_pin_path(map, dir.join(map));
        }
        let mut ebpf = loader.btf(None).load(THREE_HOOKS).expect("load");
        let mut config: Array<_, [u8; 8]> = ebpf.map_mut("CONFIG").expect("a map").try_into().expect("an array");
        // Exotic traffic is refused; HBONE's port.
        config.set(0, [2, 0, 0, 0, 0xa0, 0x3a, 0, 0], 0).expect("configure");
        MapData::from_pin(dir.join("CONFIG")).expect("a map").pin(dir.join("object-0")).expect("mark");
        // A map that no later object knows.
        MapData::from_pin(dir.join("CONFIG")).expect("a map").pin(dir.join("COUNTERS")).expect("pin");
        for (name, device, direction, pin) in [
            ("lo_ingress", "lo", TcAttachType::Ingress, "lo_ingress"),
            ("eth_egress", "eth0", TcAttachType::Egress, "eth_egress-2"),
            ("eth_ingress", "eth0", TcAttachType::Ingress, "eth_ingress-2"),
        ] {
            let program: &mut SchedClassifier = ebpf.program_mut(name).expect(name).try_into().expect("a classifier");
            program.load().expect("the verifier");
            let first = TcAttachOptions::TcxOrder(LinkOrder::first());
            let id = program.attach_with_options(device, direction, first).expect("attach");
            let link = FdLink::try_from(program.take_link(id).expect("a link")).expect("of tcx");
            link.pin(dir.join(pin)).expect("pin");
        }
        let lookup: &mut SkLookup = ebpf.program_mut("steer_lookup").expect("it").try_into().expect("sk_lookup");
        lookup.load().expect("the verifier");
        let id = lookup.attach(netns.as_fd()).expect("attach");
        FdLink::from(lookup.take_link(id).expect("a link")).pin(dir.join("steer_lookup")).expect("pin");
    });
}

/// An upgrade from such an agent: the pod is closed until the next one has it, and nothing of three hooks is left.
#[test]
fn three_hooks_of_an_older_agent_become_two() {
    require_root!("three_hooks_of_an_older_agent_become_two");
    let net = Topology::new();
    let pins = Pins::new("three-hooks");
    echo_server(&net.host, 8080);
    echo_server(&net.pod, 9090);
    echo_server(&net.pod, 15008);
    let before = remains(&net.pod);
    let mut first = Agent::start_pinned(&net.pod, &pins.0);
    // Only the pod's directory is wanted of it.
    let dir = std::fs::read_dir(pins.0.dir()).expect("list").next().expect("one pod").expect("entry").path();
    first.redirect.take().expect("attached").detach().expect("detach");
    drop(first);
    std::fs::create_dir(&dir).expect("create");
    attach_three_hooks(&net.pod, dir);
    assert!(remains(&net.pod).contains("programs=[1, 1, 1]"), "{}", remains(&net.pod));
    for way in WAYS {
        assert!(timed_out(&dial(&net, way, Duration::from_millis(300)).expect_err("dropped")), "{way:?}");
    }

    let mut agent = Agent::start_pinned(&net.pod, &pins.0);
    assert!(remains(&net.pod).contains("programs=[0, 1, 1]"), "{}", remains(&net.pod));
    assert_eq!(
        pinned(&pins.0),
        ["CONFIG", "SOCKS", "SOURCES", "STEER", "TRAFFIC", "eth_egress-2", "eth_ingress-2", "steer_lookup"]
    );
    assert!(agent.count("outbound_no_listener") >= 2, "the counters go on: {:?}", agent.all_counts());
    for (from_pod, to, port) in WAYS.into_iter().chain(HBONE) {
        let from = if from_pod { &net.pod } else { &net.host };
        Client::connect(from, SocketAddr::new(ip(to), port)).expect("captured").finish();
        agent.next();
    }
    agent.redirect.take().expect("attached").detach().expect("detach");
    assert_eq!(remains(&net.pod), before);
    assert!(pinned(&pins.0).is_empty());
}

/// Others' programs that pass everything for good, by the older way of attaching and by ours, before and after us.
#[test]
fn other_programs_on_the_hooks_do_not_let_anything_around() {
    require_root!("other_programs_on_the_hooks_do_not_let_anything_around");
    let net = Topology::new();
    echo_server(&net.host, 8080);
    echo_server(&net.pod, 9090);
    let tc = |arguments: &str| net.pod.program(&format!("tc {arguments}"));
    // Returns TC_ACT_OK: no later program is asked.
    let passing = |direction: &str| tc(&format!("filter add dev eth0 {direction} bpf direct-action bytecode 1,6·0·0·0,"));
    let clsact = || {
        tc("qdisc add dev eth0 clsact");
        passing("ingress");
        passing("egress");
    };
    let captured = |agent: &Agent, when: &str| {
        for (from_pod, to, port) in WAYS {
            let from = if from_pod { &net.pod } else { &net.host };
            let client = Client::connect(from, SocketAddr::new(ip(to), port));
            client.unwrap_or_else(|e| panic!("{when}: {to}: {e}")).finish();
            agent.next();
        }
    };
    clsact();
    let first = [TcAttachType::Egress, TcAttachType::Ingress].map(|direction| Passing::attach(&net.pod, direction));
    let agent = Agent::start(&net.pod);
    captured(&agent, "they were there before");
    drop(first);
    tc("qdisc del dev eth0 clsact");
    captured(&agent, "they went");
    clsact();
    let _later = [TcAttachType::Egress, TcAttachType::Ingress].map(|direction| Passing::attach(&net.pod, direction));
    captured(&agent, "they came later");
    assert_eq!(agent.count("outbound_existing"), 0);
}

/// A program of somebody else on a hook of eth0, at the end of the list as programs come by default.
struct Passing {
    _program: OwnedFd,
    _link: OwnedFd,
}

impl Passing {
    fn attach(pod: &Netns, direction: TcAttachType) -> Self {
        const BPF_PROG_LOAD: i64 = 5;
        const BPF_LINK_CREATE: i64 = 28;
        const BPF_PROG_TYPE_SCHED_CLS: u32 = 3;
        let hook: u32 = if matches!(direction, TcAttachType::Ingress) { 46 } else { 47 }; // BPF_TCX_*
        let bpf = |command: i64, attributes: &[u8]| -> OwnedFd {
            // SAFETY: the pointer and length describe the attributes, which live until the call ends.
            let fd = unsafe { libc::syscall(libc::SYS_bpf, command, attributes.as_ptr(), attributes.len()) };
            assert!(fd >= 0, "{}", std::io::Error::last_os_error());
            // SAFETY: just made, owned by nobody else.
            unsafe { OwnedFd::from_raw_fd(fd as i32) }
        };
        // r0 = 0 (TC_ACT_OK); exit
        let code: [u8; 16] = [0xb7, 0, 0, 0, 0, 0, 0, 0, 0x95, 0, 0, 0, 0, 0, 0, 0];
        let licence = c"Apache-2.0";
        let mut load = Vec::new();
        load.extend(BPF_PROG_TYPE_SCHED_CLS.to_ne_bytes());
        load.extend(2u32.to_ne_bytes());
        load.extend((code.as_ptr() as u64).to_ne_bytes());
        load.extend((licence.as_ptr() as u64).to_ne_bytes());
        load.extend([0; 24]); // no log, any kernel, no flags
        let program = bpf(BPF_PROG_LOAD, &load);
        let number = program.as_raw_fd() as u32;
        let link = pod.run(move || {
            // SAFETY: a NUL-terminated constant.
            let eth0 = unsafe { libc::if_nametoindex(c"eth0".as_ptr()) };
            let create: Vec<u8> = [number, eth0, hook, 0].iter().flat_map(|n| n.to_ne_bytes()).chain([0; 16]).collect();
            bpf(BPF_LINK_CREATE, &create)
        });
        Self { _program: program, _link: link }
    }
}

/// What is attached already is left alone: a restart takes no verifier, and a changed object does.
#[test]
fn the_same_programs_are_not_loaded_again() {
    require_root!("the_same_programs_are_not_loaded_again");
    let net = Topology::new();
    let pins = Pins::new("same");
    echo_server(&net.host, 8080);
    echo_server(&net.pod, 9090);
    let programs = || {
        net.pod.run(|| {
            [("eth0", TcAttachType::Ingress), ("eth0", TcAttachType::Egress)].map(|(device, way)| {
                SchedClassifier::query_tcx(device, way)
                    .expect("query")
                    .1
                    .iter()
                    .map(aya::programs::ProgramInfo::id)
                    .collect::<Vec<_>>()
            })
        })
    };
    drop(Agent::start_pinned(&net.pod, &pins.0));
    let first = programs();
    let begun = Instant::now();
    let again = Agent::start_pinned(&net.pod, &pins.0);
    eprintln!("MEASURED: an agent and its attachment, where everything is attached: {:?}", begun.elapsed());
    assert_eq!(programs(), first);
    for (from_pod, to, port) in WAYS {
        let from = if from_pod { &net.pod } else { &net.host };
        Client::connect(from, SocketAddr::new(ip(to), port)).expect("captured").finish();
        again.next();
    }
    drop(again);
    forget_object(&pins.0);
    let whole = Agent::start_pinned(&net.pod, &pins.0);
    assert!(programs().iter().zip(&first).all(|(now, then)| now != then && now.len() == 1), "{:?}", programs());
    drop(whole);
    // An interface more, and an interface whose number another one has now.
    net.pod.ip(&format!("link add eth1 type veth peer name eth1 netns {}", net.host.name));
    net.pod.ip("link set eth1 up");
    drop(Agent::start_pinned(&net.pod, &pins.0));
    let number: u32 = net.pod.ip("-o link show dev eth1").split(':').next().and_then(|n| n.parse().ok()).expect("a number");
    net.pod.ip("link del eth1");
    net.pod.ip(&format!("link add eth1 index {number} type veth peer name eth1 netns {}", net.host.name));
    net.pod.ip("link set eth1 up");
    drop(Agent::start_pinned(&net.pod, &pins.0));
    let on_new = net.pod.run(|| SchedClassifier::query_tcx("eth1", TcAttachType::Egress).expect("query").1.len());
    assert_eq!(on_new, 1, "the new interface is captured");
    net.pod.ip("link del eth1");
    forget_object(&pins.0);
    drop(Agent::start_pinned(&net.pod, &pins.0));
    assert!(!pinned(&pins.0).iter().any(|name| name.ends_with(&format!("-{number}"))), "{:?}", pinned(&pins.0));
}

/// While some have yet to be captured again, what others left is removed all the same.
#[test]
fn pins_of_those_who_are_waited_for_stay() {
    require_root!("pins_of_those_who_are_waited_for_stay");
    let pins = Pins::new("waited");
    let net = Topology::new();
    drop(Agent::start_pinned(&net.pod, &pins.0));
    assert_eq!(pins.0.sweep_but([], "test", &["another", "pod"]).expect("sweep"), 0, "its own");
    let mark = |pod: std::fs::DirEntry| {
        let names = std::fs::read_dir(pod.path()).expect("list").map(|name| name.expect("entry").path());
        names.filter(|path| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("of-"))).collect::<Vec<_>>()
    };
    let marks: Vec<_> = std::fs::read_dir(pins.0.dir()).expect("list").flat_map(|pod| mark(pod.expect("entry"))).collect();
    let [only] = &marks[..] else { panic!("{marks:?}") };
    // That every version of the agent makes of the name.
    assert!(only.ends_with("of-test-779b4c19564f1aec"), "{only:?}");
    std::fs::remove_file(only).expect("remove");
    assert_eq!(pins.0.sweep_but([], "test", &["another"]).expect("sweep"), 0, "an older agent did not say whose");
    drop(Agent::start_pinned(&net.pod, &pins.0));
    assert_eq!(pins.0.sweep_but([], "other", &["another"]).expect("sweep"), 0, "it may be of another name of that kind");
    assert_eq!(pins.0.sweep_but([], "test", &["another"]).expect("sweep"), 1);
    assert!(pinned(&pins.0).is_empty());
}

#[test]
fn pins_nobody_holds_are_swept() {
    require_root!("pins_nobody_holds_are_swept");
    let (net, other) = (Topology::new(), Topology::new());
    let pins = Pins::new("swept");
    echo_server(&net.host, 8080);
    let before = hooks(&net.pod);
    drop(Agent::start_pinned(&net.pod, &pins.0).redirect.take());
    let mut agent = Agent::start_pinned(&other.pod, &pins.0);
    assert_ne!(hooks(&net.pod), before);
    assert_eq!(pins.0.sweep([agent.redirect().netns()]).expect("sweep"), 1);
    // The kernel detaches a moment after the last reference is gone.
    assert!(eventually(|| hooks(&net.pod).iter().all(|(_, programs)| *programs == 0)));
    Client::connect(&net.pod, SocketAddr::new(ip(SERVICE4), 8080)).expect("direct").finish();
    assert_eq!(pinned(&pins.0).len(), 8);
    // A namespace that went with its programs attached leaves pins, and they are no obstacle to remove.
    let redirect = agent.redirect.take();
    drop((redirect, agent, other));
    assert_eq!(pins.0.sweep([]).expect("sweep"), 1);
}

#[test]
fn without_a_listener_new_connections_are_dropped_or_by_choice_direct() {
    require_root!("without_a_listener_new_connections_are_dropped_or_by_choice_direct");
    let net = Topology::new();
    echo_server(&net.host, 8080);
    echo_server(&net.pod, 9090);
    echo_server(&net.pod, 15008);
    let mut agent = Agent::start(&net.pod);
    agent.stop_listening();
    let ways = WAYS.into_iter().chain(HBONE).map(|(from_pod, to, port)| (if from_pod { &net.pod } else { &net.host }, to, port));
    let try_one = |netns: &Netns, to: &str, port| {
        let to = SocketAddr::new(ip(to), port);
        netns.run(move || std::net::TcpStream::connect_timeout(&to, Duration::from_millis(400)))
    };
    for (netns, to, port) in ways.clone() {
        let error = try_one(netns, to, port).expect_err("dropped");
        assert!(timed_out(&error), "{to}: {error}");
    }
    // For a moment after its end the kernel still knows the socket, but gives it nothing.
    assert!(agent.count("outbound_no_listener") + agent.count("assign_failed") >= 2, "{:?}", agent.all_counts());
    assert!(agent.count("inbound_no_listener") + agent.count("assign_failed") >= 2, "{:?}", agent.all_counts());
    agent.redirect().set_config(Config::default().with_fail_open(true)).expect("configure");
    for (netns, to, port) in ways {
        try_one(netns, to, port).unwrap_or_else(|e| panic!("{to} directly: {e}"));
    }
    // And new listeners take over without attaching again.
    let [out, inbound, hbone] = listeners_in(&net.pod);
    let listeners = Listeners { outbound: out.as_fd(), inbound: inbound.as_fd(), hbone: hbone.as_fd() };
    agent.redirect().replace_listeners(&listeners).expect("replace");
    let _client = try_one(&net.pod, SERVICE4, 8080).expect("captured");
    let (accepted, _) = out.accept().expect("accept");
    assert_eq!(sock::plain(accepted.local_addr().expect("address")), SocketAddr::new(ip(SERVICE4), 8080));
}

/// Three that keep the contract.
fn listeners_in(pod: &Netns) -> [TcpListener; 3] {
    pod.run(|| [(); 3].map(|()| sock::listen(GOOD, 0).expect("listen")))
}

#[test]
fn listeners_that_break_the_contract_are_refused() {
    require_root!("listeners_that_break_the_contract_are_refused");
    let net = Topology::new();
    let before = remains(&net.pod);
    let fault_of = |outbound: &TcpListener, inbound: &TcpListener, hbone: &TcpListener| {
        let spec = PodSpec { netns: net.pod.fd(), interfaces: None, config: Config::default(), pins: None, owner: OWNER };
        let listeners = Listeners { outbound: outbound.as_fd(), inbound: inbound.as_fd(), hbone: hbone.as_fd() };
        match Redirect::attach(&spec, &listeners) {
            Err(RedirectError::Listener { fault, .. }) => fault,
            Err(other) => panic!("{other}"),
            Ok(_) => panic!("accepted"),
        }
    };
    let good = net.pod.run(|| sock::listen(GOOD, 0)).expect("listen");
    let fault = |outbound: &TcpListener, inbound: &TcpListener| fault_of(outbound, inbound, &good);
    let bad = |kind: ListenerKind| net.pod.run(move || sock::listen(kind, 0)).expect("listen");
    assert!(matches!(fault(&bad(ListenerKind { mark: 0, ..GOOD }), &good), ListenerFault::Unmarked));
    assert!(matches!(fault(&good, &bad(TO_APPLICATION)), ListenerFault::Unmarked));
    assert!(matches!(fault(&good, &bad(ListenerKind { transparent: false, ..GOOD })), ListenerFault::NotTransparent));
    assert!(matches!(fault(&bad(ListenerKind { reuse_port: true, ..GOOD }), &good), ListenerFault::ReusePort));
    assert!(matches!(fault(&bad(ListenerKind { v6_only: true, ..GOOD }), &good), ListenerFault::V6Only));
    assert!(matches!(fault_of(&good, &good, &bad(TO_APPLICATION)), ListenerFault::Unmarked));
    let elsewhere = net.host.run(|| sock::listen(GOOD, 0)).expect("listen");
    assert!(matches!(fault(&elsewhere, &good), ListenerFault::ForeignNamespace));
    let four = net.pod.run(|| TcpListener::bind("0.0.0.0:0")).expect("bind");
    assert!(matches!(fault(&four, &good), ListenerFault::NotTcp6));
    assert_eq!(remains(&net.pod), before);
}

#[test]
fn unusable_namespaces_are_refused() {
    require_root!("unusable_namespaces_are_refused");
    let net = Topology::new();
    let [out, inbound, hbone] = listeners_in(&net.pod);
    let listeners = Listeners { outbound: out.as_fd(), inbound: inbound.as_fd(), hbone: hbone.as_fd() };
    let attach = |interfaces: Option<Vec<String>>| {
        let spec = PodSpec { netns: net.pod.fd(), interfaces, config: Config::default(), pins: None, owner: OWNER };
        Redirect::attach(&spec, &listeners).map(drop)
    };
    assert!(matches!(attach(Some(vec!["eth9".into()])), Err(RedirectError::UnknownInterface(_))));
    assert!(matches!(attach(Some(vec!["lo".into()])), Err(RedirectError::UnknownInterface(_))));
    assert!(matches!(attach(Some(Vec::new())), Err(RedirectError::NoInterface)));
    attach(Some(vec!["eth0".into()])).expect("attach");
    net.pod.ip("link set lo down");
    assert!(matches!(attach(None), Err(RedirectError::LoopbackDown)));
}

#[test]
fn a_pod_without_ipv6_is_captured_all_the_same() {
    require_root!("a_pod_without_ipv6_is_captured_all_the_same");
    let net = Topology::new();
    for device in ["all", "default", "lo", "eth0"] {
        net.pod.sysctl(&format!("net/ipv6/conf/{device}/disable_ipv6"), "1");
    }
    echo_server(&net.host, 8080);
    let before = remains(&net.pod);
    let mut agent = Agent::start(&net.pod);
    Client::connect(&net.pod, SocketAddr::new(ip(SERVICE4), 8080)).expect("captured").finish();
    agent.next();
    agent.redirect.take().expect("attached").detach().expect("detach");
    assert_eq!(remains(&net.pod), before);
}

/// What a pod's interface is called may change while it is captured by filters.
#[test]
fn a_renamed_interface_is_given_its_lasting_places() {
    require_root!("a_renamed_interface_is_given_its_lasting_places");
    let pins = Pins::new("renamed");
    let net = Topology::new();
    echo_server(&net.pod, 9090);
    let agent = Agent::start_early(&net.pod, &pins.0);
    for step in ["set eth0 down", "set eth0 name net0", "set net0 up"] {
        net.pod.ip(&format!("link {step}"));
    }
    agent.settle();
    let programs = net.pod.run(|| {
        [TcAttachType::Ingress, TcAttachType::Egress]
            .map(|direction| SchedClassifier::query_tcx("net0", direction).expect("query").1.len())
    });
    assert_eq!(programs, [1, 1]);
    Client::connect(&net.host, SocketAddr::new(ip(POD4), 9090)).expect("in").finish();
    assert_eq!(agent.next().direction, Direction::In);
}

#[test]
fn every_interface_is_captured() {
    require_root!("every_interface_is_captured");
    let net = Topology::new();
    net.pod.ip(&format!("link add eth1 type veth peer name eth1 netns {}", net.host.name));
    net.pod.ip("addr add 10.9.2.2/24 dev eth1");
    net.host.ip("addr add 10.9.2.1/24 dev eth1");
    net.pod.ip("link set eth1 up");
    net.host.ip("link set eth1 up");
    echo_server(&net.host, 8080);
    echo_server(&net.pod, 9090);
    let agent = Agent::start(&net.pod);
    Client::connect(&net.pod, "10.9.2.1:8080".parse().expect("address")).expect("outbound").finish();
    assert_eq!(agent.next().direction, Direction::Out);
    Client::connect(&net.host, "10.9.2.2:9090".parse().expect("address")).expect("inbound").finish();
    assert_eq!(agent.next().direction, Direction::In);
}

/// Not an assertion about time: the machine is shared. The number is printed for whoever looks.
#[test]
fn enrolment_time() {
    require_root!("enrolment_time");
    let net = Topology::new();
    let [out, inbound, hbone] = listeners_in(&net.pod);
    let listeners = Listeners { outbound: out.as_fd(), inbound: inbound.as_fd(), hbone: hbone.as_fd() };
    for _ in 0..5 {
        let pins = Pins::new("time");
        for pins in [None, Some(&pins.0)] {
            let spec = PodSpec { netns: net.pod.fd(), interfaces: None, config: Config::default(), pins, owner: OWNER };
            let start = Instant::now();
            let redirect = Redirect::attach(&spec, &listeners).expect("attach");
            let (attached, start) = (start.elapsed(), Instant::now());
            while redirect.unsettled().settle().expect("settle") {}
            let (settled, start) = (start.elapsed(), Instant::now());
            redirect.detach().expect("detach");
            eprintln!(
                "MEASURED: pinned: {}; attach {attached:?}, settle {settled:?}, detach {:?}",
                pins.is_some(),
                start.elapsed()
            );
        }
    }
}
