//! Calls that work and calls that cannot: identities, addresses, services, the bytes and how connections end.
use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use mesh_tests::capture::Capture;
use mesh_tests::program::{Client, Cut, End, Server, Sum, pattern};
use mesh_tests::{netns, wait};
use serde_json::Value;

use crate::mesh::{Mesh, PORT, WEB_VIP, WEB_VIP6, entries, id, refused, starts, text};

pub(crate) fn an_allowed_call_shows_both_identities_in_both_logs(mesh: &mut Mesh) -> anyhow::Result<()> {
    let (mark_a, mark_b) = (mesh.a().mark(), mesh.b().mark());
    let web1 = mesh.pod("web1");
    ensure!(mesh.call("client", web1.at(PORT))? == "web1");
    let ours = |direction: &'static str| {
        move |record: &Value| {
            record["direction"] == direction
                && record["src.identity"] == id("client")
                && record["dst.identity"] == id("web")
                && record["error"].is_null()
        }
    };
    let out = mesh.a().wait_access("outbound", mark_a, ours("outbound"))?;
    let inbound = mesh.b().wait_access("inbound", mark_b, ours("inbound"))?;
    for record in [&out, &inbound] {
        ensure!(record["src.workload"] == "client" && record["src.namespace"] == "t", "{record}");
        ensure!(record["dst.workload"] == "web1" && record["dst.namespace"] == "t", "{record}");
        ensure!(starts(record, "dst.addr", &web1.at(15008).to_string()), "{record}");
        ensure!(starts(record, "dst.hbone_addr", &web1.at(PORT).to_string()), "{record}");
        ensure!(starts(record, "src.addr", &format!("{}:", mesh.pod("client").v4)), "{record}");
        ensure!(record["bytes_sent"].as_u64() > Some(0) && record["bytes_recv"].as_u64() > Some(0), "{record}");
        ensure!(text(record, "duration").ends_with("ms"), "{record}");
        ensure!(record["level"] == "info" && record["message"] == "connection complete", "{record}");
    }
    // Bytes are told from each agent's own side: what the client sent is what the outbound agent sent.
    ensure!(out["bytes_sent"] == 17 && inbound["bytes_recv"] == 17, "{out}\n{inbound}");
    Ok(())
}

pub(crate) fn strict_refuses_plaintext_from_outside(mesh: &mut Mesh) -> anyhow::Result<()> {
    for at in [mesh.pod("victim").at(PORT), mesh.pod("victim").at6(PORT)] {
        let mark = mesh.b().mark();
        refused(mesh.outside(), at)?;
        let record = mesh.b().wait_access("the refusal", mark, |record| starts(record, "error", "plaintext_refused"))?;
        ensure!(record["direction"] == "inbound" && record["src.identity"].is_null(), "{record}");
    }
    Ok(())
}

/// The kubelet probes pods in plaintext, under STRICT too and whatever policies say. What comes in masquerade through the node
/// has the same source address and is refused.
pub(crate) fn probes_of_the_node_itself_pass_and_nothing_it_forwards(mesh: &mut Mesh) -> anyhow::Result<()> {
    let (node, web1) = (Arc::clone(mesh.topology().node("node-b")), Arc::clone(mesh.pod("web1")));
    let bridge: [IpAddr; 2] = [IpAddr::from([10, 244, 2, 1]), "fd00:244:2::1".parse()?];
    let before = mesh.b().metrics()?.sum("culvert_node_connections_total", &[]);
    let mut held = Vec::new();
    for (to, source) in [web1.at(PORT), web1.at6(PORT)].into_iter().zip(bridge) {
        let mark = mesh.b().mark();
        let (mut probe, who) = Client::who(&node, to).with_context(|| format!("a probe of {to}"))?;
        ensure!(who.name == "web1" && who.peer.ip() == source && who.local == to, "{who:?}");
        probe.ping("alive?")?;
        drop(Client::who(&node, to)?);
        mesh.b().wait_access("the probe", mark, |record| !record["src.node"].is_null() && record["direction"] == "inbound")?;
        held.push(probe);
    }
    let counted = mesh.b().metrics()?.sum("culvert_node_connections_total", &[]) - before;
    ensure!(counted >= 4.0, "{counted} counted");
    // The policies that refused them refuse nothing later.
    let deny = "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: { name: all, namespace: t }\n\
                spec: { selector: { matchLabels: { tier: web } }, action: DENY, rules: [{}] }\n";
    {
        let _for_now = mesh.dir.put_for_now("deny-all.yaml", deny)?;
        wait::until_true("the policy to be in force", || mesh.call("client", web1.at(PORT)).is_err())?;
        for probe in &mut held {
            probe.ping("still alive?")?;
        }
        Client::who(&node, web1.at(PORT)).context("a probe of a pod that denies everybody")?;
    }
    wait::until_true("the policy to be gone", || mesh.call("client", web1.at(PORT)).is_ok())?;

    // As kube-proxy does with what comes in at a node port.
    let rules = "table ip masked {\n chain post { type nat hook postrouting priority srcnat; ip saddr 192.0.2.0/24 oifname br0 masquerade; }\n}\n";
    let file = mesh.logs.path().join("masked.nft");
    std::fs::write(&file, rules)?;
    let loaded = node.netns.output(Command::new("nft").arg("-f").arg(&file))?;
    ensure!(loaded.status.success(), "{loaded:?}");
    let mark = mesh.b().mark();
    let seen = refused(mesh.outside(), web1.at(PORT)).and_then(|()| {
        let record = mesh.b().wait_access("the refusal", mark, |record| starts(record, "error", "plaintext_refused"))?;
        ensure!(text(&record, "src.addr").starts_with("10.244.2.1:"), "not in masquerade: {record}");
        Ok(())
    });
    node.netns.output(Command::new("nft").args(["delete", "table", "ip", "masked"]))?;
    seen
}

pub(crate) fn permissive_takes_plaintext_and_mutual_tls(mesh: &mut Mesh) -> anyhow::Result<()> {
    let loose = mesh.pod("loose");
    for (at, source) in [(loose.at(PORT), IpAddr::from(mesh.outside().v4)), (loose.at6(PORT), mesh.outside().v6.into())] {
        let (mut client, who) = Client::who(mesh.outside(), at)?;
        client.ping("plain")?;
        ensure!(who.name == "loose" && who.peer.ip() == source && who.local == at, "{who:?}");
    }
    let mark = mesh.b().mark();
    ensure!(mesh.call("client", loose.at(PORT))? == "loose");
    mesh.b().wait_access("mutual TLS to a permissive pod", mark, |record| record["src.identity"] == id("client"))?;
    Ok(())
}

pub(crate) fn the_server_sees_the_original_source(mesh: &mut Mesh) -> anyhow::Result<()> {
    let client = mesh.pod("client");
    for (to, source) in [
        (mesh.pod("web1").at(PORT), IpAddr::from(client.v4)),
        (mesh.pod("web1").at6(PORT), client.v6.into()),
        (mesh.pod("near").at(PORT), client.v4.into()),
        (mesh.pod("near").at6(PORT), client.v6.into()),
    ] {
        let (_open, who) = Client::who(client, to)?;
        ensure!(who.peer.ip() == source, "{to} sees {} instead of {source}", who.peer);
        ensure!(who.local == to, "{to} is reached as {}", who.local);
    }
    Ok(())
}

pub(crate) fn a_pod_calls_its_own_service(mesh: &mut Mesh) -> anyhow::Result<()> {
    let mut seen = BTreeMap::new();
    for _ in 0..64 {
        *seen.entry(mesh.call("web1", WEB_VIP.into())?).or_insert(0) += 1;
        if seen.contains_key("web1") && seen.contains_key("web2") {
            break;
        }
    }
    ensure!(seen.contains_key("web1"), "web1 never answered itself in 64 calls: {seen:?}");
    // And by its own address.
    ensure!(mesh.call("web1", mesh.pod("web1").at(PORT))? == "web1");
    Ok(())
}

pub(crate) fn pods_of_one_node_talk_with_mutual_tls(mesh: &mut Mesh) -> anyhow::Result<()> {
    let mark = mesh.a().mark();
    ensure!(mesh.call("client", mesh.pod("near").at(PORT))? == "near");
    for direction in ["outbound", "inbound"] {
        mesh.a().wait_access(direction, mark, |record| {
            record["direction"] == direction && record["src.identity"] == id("client") && record["dst.identity"] == id("near")
        })?;
    }
    Ok(())
}

pub(crate) fn a_service_address_spreads_over_its_endpoints(mesh: &mut Mesh) -> anyhow::Result<()> {
    let mark = mesh.a().mark();
    for vip in [SocketAddr::from(WEB_VIP), WEB_VIP6.into()] {
        let mut seen: BTreeMap<String, usize> = BTreeMap::new();
        for _ in 0..40 {
            *seen.entry(mesh.call("client", vip)?).or_default() += 1;
        }
        // Evenly weighted random choice: fewer than 5 of 40 has a probability below one in ten million.
        ensure!(seen.len() == 2 && seen.values().all(|count| *count >= 5), "{vip}: {seen:?}");
    }
    mesh.a().wait_access("the service's name", mark, |record| record["dst.service"] == "web.t.svc.cluster.local")?;
    Ok(())
}

pub(crate) fn a_service_port_that_does_not_exist_is_refused(mesh: &mut Mesh) -> anyhow::Result<()> {
    let mark = mesh.a().mark();
    refused(mesh.pod("client"), (WEB_VIP.0, 81).into())?;
    mesh.a().wait_access("the refusal", mark, |record| starts(record, "error", "no_such_port"))?;
    Ok(())
}

pub(crate) fn a_service_without_endpoints_is_refused(mesh: &mut Mesh) -> anyhow::Result<()> {
    let _guard = mesh.dir.put_for_now(
        "60-empty.yaml",
        r"
apiVersion: v1
kind: Service
metadata: { name: empty, namespace: t }
spec: { selector: { tier: nothing-has-this }, clusterIP: 10.96.0.40, ports: [{ name: tcp, port: 80, targetPort: 8080 }] }
",
    )?;
    mesh.a().wait_config("service empty", |dump| entries(dump, "services").any(|service| service["name"] == "empty"))?;
    let mark = mesh.a().mark();
    refused(mesh.pod("client"), SocketAddr::from(([10, 96, 0, 40], 80)))?;
    mesh.a().wait_access("the refusal", mark, |record| starts(record, "error", "no_healthy_endpoint"))?;
    Ok(())
}

pub(crate) fn outside_addresses_are_passed_through(mesh: &mut Mesh) -> anyhow::Result<()> {
    let client = mesh.pod("client");
    for (to, source) in [(mesh.outside().at(PORT), IpAddr::from(client.v4)), (mesh.outside().at6(PORT), client.v6.into())] {
        let mark = mesh.a().mark();
        let (mut open, who) = Client::who(client, to)?;
        open.ping("through")?;
        ensure!(who.name == "outside" && who.peer.ip() == source, "{who:?}");
        drop(open);
        let record = mesh.a().wait_access("the passed connection", mark, |record| starts(record, "dst.addr", &to.to_string()))?;
        ensure!(record["dst.identity"].is_null() && record["direction"] == "outbound" && record["error"].is_null(), "{record}");
    }
    Ok(())
}

pub(crate) fn the_wire_carries_only_tls(mesh: &mut Mesh) -> anyhow::Result<()> {
    const MARKER: &[u8] = b"culvert-plain-marker-7b1f";
    let marker = std::str::from_utf8(MARKER)?;
    let capture = Capture::start(&mesh.topology().node("node-a").netns, "eth0")?;
    let (mut client, _) = Client::who(mesh.pod("client"), mesh.pod("web1").at(PORT))?;
    for _ in 0..20 {
        client.ping(marker)?;
    }
    let (mut through, _) = Client::who(mesh.pod("client"), mesh.outside().at(PORT))?;
    through.ping(marker)?;
    drop((client, through));
    let captured = capture.finish();
    let (segments, tls) = captured.tls_on_port(15008);
    ensure!(segments > 20 && tls.encrypted > 20 && tls.stray == 0, "{segments} segments to 15008, read as {tls:?}");
    ensure!(!captured.contains_on_port(15008, MARKER), "the marker is readable on 15008");
    ensure!(captured.contains_on_port(PORT, MARKER), "the control: passed-through text is readable");
    ensure!(
        !captured
            .segments
            .iter()
            .any(|segment| segment.dst == mesh.pod("web1").at(PORT) || segment.src == mesh.pod("web1").at(PORT)),
        "something went to the pod outside the tunnel"
    );
    Ok(())
}

pub(crate) fn large_transfers_arrive_whole_both_ways(mesh: &mut Mesh) -> anyhow::Result<()> {
    const SIZE: usize = 32 << 20;
    let data = pattern(SIZE);
    let expected = Sum::of(&data);
    for to in [mesh.pod("web1").at(PORT), mesh.pod("web2").at6(PORT), mesh.pod("near").at(PORT), mesh.outside().at(PORT)] {
        let mut client = Client::open(mesh.pod("client"), to, &format!("source {SIZE}"))?;
        ensure!(client.rest()? == expected, "down from {to}");
        drop(client);
        let mut client = Client::open(mesh.pod("client"), to, "sink")?;
        client.stream().write_all(&data)?;
        client.finish()?;
        ensure!(client.line()? == format!("{} {}", expected.bytes, expected.sum), "up to {to}");
    }
    Ok(())
}

pub(crate) fn half_close_works_end_to_end(mesh: &mut Mesh) -> anyhow::Result<()> {
    // The client's half: the server answers only after it has seen the end of the client's data.
    let mut client = Client::open(mesh.pod("client"), mesh.pod("web1").at(PORT), "sink")?;
    client.stream().write_all(b"abc")?;
    client.finish()?;
    let sum = Sum::of(b"abc");
    ensure!(client.line()? == format!("{} {}", sum.bytes, sum.sum));
    ensure!(client.rest()?.bytes == 0, "then the server's end arrives as an end, not as a reset");
    // The server's half: it has closed its side and still reads ours.
    let server = &mesh.servers["web1"];
    let mut client = Client::open(mesh.pod("client"), mesh.pod("web1").at(PORT), "source 1000")?;
    ensure!(client.rest()?.bytes == 1000);
    client.stream().write_all(b"the other half is still open")?;
    client.finish()?;
    ensure!(server.wait_end("source 1000")? == End::Fin);
    Ok(())
}

pub(crate) fn server_first_protocols_work(mesh: &mut Mesh) -> anyhow::Result<()> {
    for (place, at) in [(mesh.pod("web1"), mesh.pod("web1").at(8081)), (mesh.outside(), mesh.outside().at6(8081))] {
        let listener = place.netns.listen((std::net::Ipv6Addr::UNSPECIFIED, 8081).into())?;
        let server = std::thread::spawn(move || -> std::io::Result<()> { listener.accept()?.0.write_all(b"220 ready\r\n") });
        let mut stream = mesh.pod("client").netns.connect(at, Duration::from_secs(5))?;
        stream.set_read_timeout(Some(Duration::from_secs(5)))?;
        let mut greeting = String::new();
        stream.read_to_string(&mut greeting).context("the server speaks first")?;
        ensure!(greeting == "220 ready\r\n", "{greeting:?}");
        server.join().map_err(|_panic| anyhow::anyhow!("the server panicked"))??;
    }
    Ok(())
}

pub(crate) fn a_client_port_is_usable_again_at_once(mesh: &mut Mesh) -> anyhow::Result<()> {
    // The server closes first, so that TIME_WAIT is on the side of whoever stands for the server: the agent. Its sockets
    // must not swallow the client's next connection from the same port.
    let cases = [
        (mesh.pod("client"), mesh.pod("web1").at(PORT)),
        (mesh.pod("client"), mesh.pod("near").at6(PORT)),
        (mesh.pod("client"), mesh.outside().at(PORT)),
        (mesh.outside(), mesh.pod("loose").at(PORT)),
        (mesh.outside(), mesh.pod("loose").at6(PORT)),
    ];
    for (number, (from, to)) in cases.into_iter().enumerate() {
        for round in 0..3 {
            // None the kernel would choose for another call.
            let port = 25_100 + number as u16;
            let connect = || {
                from.netns.enter(|| -> std::io::Result<TcpStream> {
                    let domain = socket2::Domain::for_address(to);
                    let socket = socket2::Socket::new(domain, socket2::Type::STREAM, None)?;
                    socket.set_reuse_address(true)?;
                    let own =
                        if to.is_ipv4() { SocketAddr::from(([0, 0, 0, 0], port)) } else { SocketAddr::from(([0_u16; 8], port)) };
                    socket.bind(&own.into())?;
                    socket.connect_timeout(&to.into(), Duration::from_secs(20))?;
                    Ok(socket.into())
                })
            };
            // The client's own last socket may still wait for the acknowledgement of its end, which the kernel sends at once.
            let mut stream = wait::until("the client's own last socket to go", wait::PATIENCE, || match connect() {
                Err(error) if error.kind() == std::io::ErrorKind::AddrNotAvailable => None,
                other => Some(other),
            })?
            .with_context(|| format!("connection {round} from {} port {port} to {to}", from.name))?;
            stream.set_read_timeout(Some(Duration::from_secs(20)))?;
            // Anything but a command is answered with `?` and closed by the server.
            stream.write_all(b"close first\n")?;
            let mut answer = String::new();
            stream.read_to_string(&mut answer).with_context(|| format!("answer {round} to {} from {to}", from.name))?;
            ensure!(answer == "?\n", "{answer:?}");
        }
    }
    Ok(())
}

pub(crate) fn the_agents_port_numbers_elsewhere_are_ordinary_ports(mesh: &mut Mesh) -> anyhow::Result<()> {
    for port in [15001, 15006, 15008] {
        let _server = Server::start(mesh.outside(), port)?;
        let (_open, who) = Client::who(mesh.pod("client"), mesh.outside().at(port))?;
        ensure!(who.name == "outside");
    }
    Ok(())
}

pub(crate) fn resets_are_passed_on_in_both_directions(mesh: &mut Mesh) -> anyhow::Result<()> {
    let web1 = mesh.pod("web1").at(PORT);
    let mut client = Client::open(mesh.pod("client"), web1, "reset")?;
    ensure!(client.wait_cut()? == Cut::Reset, "the server's reset reaches the client as a reset");

    let mut client = Client::open(mesh.pod("client"), web1, "drip 7")?;
    client.stream().write_all(b"x")?;
    let mut byte = [0];
    client.stream().read_exact(&mut byte)?;
    client.reset()?;
    ensure!(mesh.servers["web1"].wait_end("drip 7")? == End::Reset, "the client's reset reaches the server as a reset");
    Ok(())
}

pub(crate) fn nothing_listening_is_refused_quickly(mesh: &mut Mesh) -> anyhow::Result<()> {
    let mark = mesh.b().mark();
    let begun = Instant::now();
    refused(mesh.pod("client"), mesh.pod("web1").at(9))?;
    ensure!(begun.elapsed() < Duration::from_secs(8), "it took {:?}", begun.elapsed());
    mesh.b().wait_access("the failed delivery", mark, |record| starts(record, "error", "connect_failed"))?;
    Ok(())
}

/// A second network, plugged in while the pod runs.
pub(crate) fn an_interface_added_later_is_captured(mesh: &mut Mesh) -> anyhow::Result<()> {
    let (outside, web1) = (mesh.outside(), mesh.pod("web1"));
    let (near, far) = (outside.netns.name(), web1.netns.name());
    netns::ip(&["-n", near, "link", "add", "later0", "type", "veth", "peer", "name", "eth7", "netns", far])?;
    for (ns, link, address) in [(near, "later0", "10.250.7.1/24"), (far, "eth7", "10.250.7.2/24")] {
        netns::ip(&["-n", ns, "addr", "add", address, "dev", link])?;
        netns::ip(&["-n", ns, "link", "set", link, "up"])?;
    }
    let new = SocketAddr::from(([10, 250, 7, 2], PORT));
    let seen = wait::until_true("plaintext to the new address to be refused", || refused(outside, new).is_ok());
    netns::ip(&["-n", near, "link", "del", "later0"])?;
    seen?;
    ensure!(mesh.call("client", web1.at(PORT))? == "web1", "the other interface is captured as before");
    Ok(())
}
