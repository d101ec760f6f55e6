//! Routes of connections that are carried as bytes: by port, by the name in TLS.
use std::collections::BTreeSet;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use mesh_tests::dns::Dns;
use mesh_tests::program::{Client, End, Server, Sum, pattern};
use mesh_tests::rude::Rude;
use mesh_tests::tls::{self, OwnCert, TlsWeb};
use mesh_tests::wait;
use mesh_tests::web::Web;

use crate::mesh::{MORE, Mesh, PORT, SECURE, SECURE_PORT, curl};

/// One server of bytes each.
const ONE_AND_TWO: &str = r"
apiVersion: v1
kind: Service
metadata: { name: one, namespace: t, labels: { istio.io/use-waypoint: wp } }
spec:
  selector: { app: web1 }
  clusterIP: 10.96.2.10
  ports:
  - { name: tcp, port: 92, targetPort: 9092, protocol: TCP }
---
apiVersion: v1
kind: Service
metadata: { name: two, namespace: t, labels: { istio.io/use-waypoint: wp } }
spec:
  selector: { app: web2 }
  clusterIP: 10.96.2.11
  ports:
  - { name: tcp, port: 92, targetPort: 9092, protocol: TCP }
  - { name: tls, port: 443, targetPort: 7072, protocol: TCP, appProtocol: tls }
";

fn services(mesh: &Mesh) -> anyhow::Result<crate::mesh::ObjectsForNow<'_>> {
    let guard = mesh.objects("one-and-two", ONE_AND_TWO)?;
    mesh.proxy("node-a").wait_config("the services", |dump| dump["services"].to_string().contains("10.96.2.11"))?;
    Ok(guard)
}
/// A Gateway API route with this parent and these rules.
fn route(version: &str, kind: &str, parent: &str, spec: &str) -> String {
    format!(
        "apiVersion: gateway.networking.k8s.io/{version}\nkind: {kind}\nmetadata: {{ name: bytes, namespace: t }}\nspec:\n  parentRefs: [ {parent} ]\n{spec}\n"
    )
}

pub(crate) fn connections_of_bytes_follow_their_routes(mesh: &mut Mesh) -> anyhow::Result<()> {
    let _servers = [Server::start(mesh.pod("web1"), MORE)?, Server::start(mesh.pod("web2"), MORE)?];
    let _services = services(mesh)?;
    let to = SocketAddr::new("10.96.2.10".parse()?, 92);
    let who = || Client::who(mesh.pod("client"), to).map(|(_, who)| who.name);
    let several = || (0..24).map(|_| who()).collect::<anyhow::Result<BTreeSet<_>>>();
    ensure!(who()? == "web1", "no route: what was addressed");
    let parent = "{ group: '', kind: Service, name: one }";
    let virtual_service = |tcp: &str| {
        format!(
            "apiVersion: networking.istio.io/v1\nkind: VirtualService\nmetadata: {{ name: bytes, namespace: t }}\nspec:\n  hosts: [ one ]\n  tcp:\n{tcp}\n"
        )
    };
    let (one, two) = ("destination: { host: one, port: { number: 92 } }", "destination: { host: two, port: { number: 92 } }");
    {
        let rules = format!(
            "  - match: [ {{ port: 93 }} ]\n    route: [ {{ {one} }} ]\n  - match: [ {{ port: 92 }} ]\n    route: [ {{ {two} }} ]"
        );
        let _route = mesh.objects("bytes", &virtual_service(&rules))?;
        ensure!(several()? == BTreeSet::from(["web2".to_owned()]), "VirtualService tcp: the first rule of this port");
    }
    {
        let _route =
            mesh.objects("bytes", &virtual_service(&format!("  - route: [ {{ {one}, weight: 50 }}, {{ {two}, weight: 50 }} ]")))?;
        ensure!(several()?.len() == 2, "VirtualService tcp: by weight");
    }
    {
        let backends = "  rules: [ { backendRefs: [ { name: two, port: 92 } ] } ]";
        let _route = mesh.objects("bytes", &route("v1alpha2", "TCPRoute", parent, backends))?;
        ensure!(several()? == BTreeSet::from(["web2".to_owned()]), "TCPRoute");
    }
    {
        let backends = "  rules: [ { backendRefs: [ { name: one, port: 92, weight: 1 }, { name: two, port: 92, weight: 1 } ] } ]";
        let _route = mesh.objects("bytes", &route("v1alpha2", "TCPRoute", parent, backends))?;
        ensure!(several()?.len() == 2, "TCPRoute by weight");
    }
    let backends = "  rules: [ { backendRefs: [ { name: nobody, port: 92 } ] } ]";
    let _route = mesh.objects("bytes", &route("v1alpha2", "TCPRoute", parent, backends))?;
    ensure!(who().is_err(), "a backend that does not exist is not the service itself");
    Ok(())
}

pub(crate) fn tls_passes_through_by_its_name(mesh: &mut Mesh) -> anyhow::Result<()> {
    let own = OwnCert::of(&["one.example"])?;
    let start = |pod: &str| TlsWeb::start(mesh.pod(pod), SECURE_PORT, &own, None);
    let _servers = [start("web1")?, start("web2")?];
    let _services = services(mesh)?;
    // Who answered, and the name it saw: the waypoint has not ended the TLS.
    let ask = |name: &str| -> anyhow::Result<(String, String)> {
        let resolve = format!("{name}:443:{SECURE}");
        let got = mesh.call(&["-k", "--resolve", &resolve, &format!("https://{name}/")])?;
        let told = got.echo()?;
        Ok((told["name"].as_str().unwrap_or_default().to_owned(), told["sni"].as_str().unwrap_or_default().to_owned()))
    };
    let is = |name: &str, by: &str| -> anyhow::Result<()> {
        let told = ask(name)?;
        ensure!(told == (by.to_owned(), name.to_owned()), "{told:?}, wanted {by}");
        Ok(())
    };
    is("one.example", "web1").context("without a route")?;
    {
        let parent = "{ group: '', kind: Service, name: secure, port: 443 }";
        let spec = "  hostnames: [ two.example, '*.two.example' ]\n  rules: [ { backendRefs: [ { name: two, port: 443 } ] } ]";
        let _route = mesh.objects("names", &route("v1alpha3", "TLSRoute", parent, spec))?;
        is("two.example", "web2").context("TLSRoute")?;
        is("deep.two.example", "web2").context("TLSRoute, wildcard")?;
    }
    let _route = mesh.objects(
        "names",
        "apiVersion: networking.istio.io/v1\nkind: VirtualService\nmetadata: { name: names, namespace: t }\nspec:\n  hosts: [ secure ]\n  tls:\n  - match: [ { port: 443, sniHosts: [ secure.t.svc.cluster.local ] } ]\n    route: [ { destination: { host: two, port: { number: 443 } } } ]\n",
    )?;
    is("secure.t.svc.cluster.local", "web2").context("VirtualService tls")?;
    is("one.example", "web1").context("VirtualService tls: a name it does not have")
}

/// The gateway's listeners that are not HTTP: TLS passed through by its name, TLS ended, bytes.
pub(crate) fn the_gateway_carries_tls_and_bytes(mesh: &mut Mesh) -> anyhow::Result<()> {
    let own = OwnCert::of(&["a.pass.example"])?;
    let _tls = TlsWeb::start(mesh.pod("web1"), SECURE_PORT, &own, None)?;
    let _raw = Server::start(mesh.pod("web1"), MORE)?;
    let _services = services(mesh)?;
    let routes = [
        route(
            "v1alpha3",
            "TLSRoute",
            "{ name: gw, sectionName: pass }",
            "  hostnames: [ a.pass.example ]\n  rules: [ { backendRefs: [ { name: secure, port: 443 } ] } ]",
        ),
        route(
            "v1alpha2",
            "TCPRoute",
            "{ name: gw, sectionName: bytes }",
            "  rules: [ { backendRefs: [ { name: one, port: 92 } ] } ]",
        ),
    ];
    let _routes = mesh.objects("gateway-bytes", &routes.join("---\n"))?;
    let outside = Arc::clone(mesh.topology.host("outside"));
    let gateway = mesh.pod("gw").v4;
    let ask = |name: &str| {
        let resolve = format!("{name}:8443:{gateway}");
        curl(&outside, &["-k", "--resolve", &resolve, &format!("https://{name}:8443/x")])
    };
    let got = wait::until("the listener", wait::PATIENCE, || ask("a.pass.example").ok())?;
    ensure!(got.status == 200 && got.echo()?["sni"] == "a.pass.example", "{got:?}");
    ensure!(ask("b.pass.example").is_err(), "a name without a route");
    let (mut client, who) = Client::who(&outside, (gateway, 9000).into())?;
    ensure!(who.name == "web1", "{who:?}");
    client.ping("bytes")?;
    Ok(())
}

/// A listener that ends TLS and carries what is in it as bytes: both halves of the connection, and nothing for other names.
pub(crate) fn the_gateway_ends_tls_around_bytes(mesh: &mut Mesh) -> anyhow::Result<()> {
    const SIZE: usize = 1 << 20;
    let server = Server::start(mesh.pod("web1"), MORE)?;
    let _services = services(mesh)?;
    let spec = "  rules: [ { backendRefs: [ { name: one, port: 92 } ] } ]";
    let _route = mesh.objects("ended", &route("v1alpha2", "TCPRoute", "{ name: gw, sectionName: ended }", spec))?;
    let outside = Arc::clone(mesh.topology.host("outside"));
    let to = mesh.pod("gw").at(9443);
    let open = |name: &str| tls::connect(&outside, to, name, &mesh.front);
    let said = |command: &str| -> anyhow::Result<String> {
        let mut client = BufReader::new(open("web.example")?);
        client.get_mut().write_all(command.as_bytes())?;
        let mut line = String::new();
        client.read_line(&mut line)?;
        Ok(line)
    };
    let line = wait::until("the listener", wait::PATIENCE, || said("who\n").ok().filter(|line| !line.is_empty()))?;
    ensure!(line.starts_with("web1 "), "{line:?}");
    let mut client = open("web.example")?;
    client.write_all(b"echo\n")?;
    for text in ["one", "two"] {
        client.write_all(text.as_bytes())?;
        let mut back = [0; 3];
        client.read_exact(&mut back)?;
        ensure!(back == text.as_bytes(), "{back:?}");
    }
    drop(client);
    // The end of what is sent arrives as that, and the answer comes after it.
    let mut client = open("web.example")?;
    client.write_all(b"sink\n")?;
    let bytes = pattern(SIZE);
    client.write_all(&bytes)?;
    client.conn.send_close_notify();
    client.flush()?;
    let mut line = String::new();
    client.read_to_string(&mut line)?;
    let sum = Sum::of(&bytes);
    ensure!(line == format!("{} {}\n", sum.bytes, sum.sum), "{line:?}, wanted {sum:?}");
    ensure!(server.wait_end("sink")? == End::Fin);
    // No certificate is shown, and nothing carried, for a name the listener does not have.
    let before = server.accepted();
    let refused = open("other.example")?.write_all(b"who\n");
    ensure!(refused.is_err() && server.accepted() == before, "{refused:?}");
    Ok(())
}

/// Silence ends a connection of bytes only where a DestinationRule says so.
pub(crate) fn silent_connections_live_unless_told_otherwise(mesh: &mut Mesh) -> anyhow::Result<()> {
    let _server = Server::start(mesh.pod("web1"), MORE)?;
    let _services = services(mesh)?;
    let to = SocketAddr::new("10.96.2.10".parse()?, 92);
    let (mut kept, _) = Client::who(mesh.pod("client"), to)?;
    let _policy = mesh.objects(
        "idle",
        "apiVersion: networking.istio.io/v1\nkind: DestinationRule\nmetadata: { name: idle, namespace: t }\nspec:\n  host: one.t.svc.cluster.local\n  trafficPolicy: { connectionPool: { tcp: { idleTimeout: 1s } } }\n",
    )?;
    let (mut ended, _) = Client::who(mesh.pod("client"), to)?;
    ended.ping("not silent")?;
    std::thread::sleep(Duration::from_millis(2500));
    ensure!(ended.ping("too late").is_err(), "longer silent than the idle timeout");
    kept.ping("as long silent, without one").context("a connection from before the rule")
}

/// A service of bytes with two endpoints, and a DestinationRule for it.
const BOTH: &str = r"
apiVersion: v1
kind: Service
metadata: { name: both, namespace: t, labels: { istio.io/use-waypoint: wp } }
spec:
  selector: { tier: web }
  clusterIP: 10.96.2.12
  ports:
  - { name: tcp, port: 92, targetPort: 9092, protocol: TCP }
";
fn rule_of_both(policy: &str) -> String {
    format!(
        "apiVersion: networking.istio.io/v1\nkind: DestinationRule\nmetadata: {{ name: both, namespace: t }}\nspec:\n  host: both\n  trafficPolicy: {{ {policy} }}\n"
    )
}

pub(crate) fn a_destination_of_bytes_keeps_its_rules(mesh: &mut Mesh) -> anyhow::Result<()> {
    let (_web1, web2) = (Server::start(mesh.pod("web1"), MORE)?, || Server::start(mesh.pod("web2"), MORE));
    let mut second = Some(web2()?);
    let _service = mesh.objects("both", BOTH)?;
    mesh.proxy("node-a").wait_config("the service", |dump| dump["services"].to_string().contains("10.96.2.12"))?;
    let to = SocketAddr::new("10.96.2.12".parse()?, 92);
    let call = || Client::who(mesh.pod("client"), to);
    let name = || call().map(|(_, who)| who.name);
    let rule = |policy: &str| mesh.objects("both-rule", &rule_of_both(policy));
    {
        let _rule = rule("loadBalancer: { consistentHash: { useSourceIp: true } }")?;
        let seen = (0..20).map(|_| name()).collect::<anyhow::Result<BTreeSet<_>>>()?;
        ensure!(seen.len() == 1, "one client goes to {seen:?}");
    }
    {
        let _rule = rule("connectionPool: { tcp: { maxConnections: 2 }, http: { http2MaxRequests: 1 } }")?;
        let (mut first, mut other) = (call()?.0, call()?.0);
        ensure!(call().is_err(), "a third connection of two");
        first.ping("kept")?;
        other.ping("kept, though it would be one request too many")?;
        drop((first, other));
        wait::until_true("a place to be free again", || call().is_ok())?;
    }
    {
        let _rule = rule("connectionPool: { tcp: { maxConnectionDuration: 1s } }")?;
        let (mut client, begun) = (call()?.0, Instant::now());
        wait::until_true("the longest time to be over", || client.ping("never silent").is_err())?;
        ensure!(begun.elapsed() > Duration::from_millis(900), "ended after {:?}", begun.elapsed());
    }
    let _rule = rule("outlierDetection: { consecutive5xxErrors: 2, baseEjectionTime: 300s, maxEjectionPercent: 100 }")?;
    let fails = || wait::until_true("the endpoint that is down to be chosen", || name().is_err());
    let is_chosen = || wait::until_true("web2 to be chosen", || name().is_ok_and(|name| name == "web2"));
    for _ in 0..2 {
        drop(second.take());
        fails()?;
        second = Some(web2()?);
        is_chosen().context("two failures that are not in a row eject nobody")?;
    }
    drop(second.take());
    fails()?;
    fails()?;
    second = Some(web2()?);
    for _ in 0..20 {
        ensure!(name()? == "web1", "web2 is ejected");
    }
    drop(second);
    Ok(())
}

/// A destination that is a proxy is asked to carry connections of bytes on, and what it refuses is refused.
pub(crate) fn bytes_leave_through_another_proxy(mesh: &mut Mesh) -> anyhow::Result<()> {
    const LIMIT: Duration = Duration::from_secs(20);
    // Plays the target too.
    let proxy = Rude::start(mesh.pod("web1"), MORE, |head, stream| {
        let answer = match head.split(' ').next() {
            _ if head.contains(" forbidden.example:") => "HTTP/1.1 403 Forbidden\r\ncontent-length: 0\r\n\r\n",
            Some("CONNECT") => "HTTP/1.1 200 OK\r\n\r\nhello ",
            Some("POST") => "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n6\r\nhello \r\n",
            // In a chunk.
            _ if head.ends_with("\r\n\r\n\r\n") => "4\r\npong\r\n",
            _ => "pong",
        };
        stream.write_all(answer.as_bytes())
    })?;
    let _services = services(mesh)?;
    let rule = |protocol: &str, host: &str| {
        let yaml = format!(
            "apiVersion: networking.istio.io/v1\nkind: DestinationRule\nmetadata: {{ name: one, namespace: t }}\nspec:\n  host: one\n  trafficPolicy: {{ tunnel: {{ protocol: {protocol}, targetHost: {host}, targetPort: 5432 }} }}\n"
        );
        mesh.objects("one-rule", &yaml)
    };
    let call = || -> anyhow::Result<String> {
        let mut stream = mesh.pod("client").netns.connect(SocketAddr::new("10.96.2.10".parse()?, 92), LIMIT)?;
        stream.set_read_timeout(Some(LIMIT))?;
        let mut hello = [0; 6];
        stream.read_exact(&mut hello)?;
        stream.write_all(b"ping\r\n\r\n")?;
        let mut pong = [0; 4];
        stream.read_exact(&mut pong)?;
        Ok(String::from_utf8_lossy(&[&hello[..], &pong[..]].concat()).into_owned())
    };
    for (protocol, line) in [
        ("CONNECT", "CONNECT db.example:5432 HTTP/1.1\r\nhost: db.example:5432\r\n\r\nping\r\n\r\n"),
        ("POST", "POST / HTTP/1.1\r\nhost: db.example:5432\r\n"),
    ] {
        let _rule = rule(protocol, "db.example")?;
        let got = call()?;
        ensure!(got == "hello pong" && proxy.text().contains(line), "{protocol}: {got:?} after {}", proxy.text());
    }
    let _rule = rule("CONNECT", "forbidden.example")?;
    ensure!(call().is_err(), "what the proxy refuses is not reached");
    ensure!(proxy.text().contains("CONNECT forbidden.example:5432 "), "{}", proxy.text());
    Ok(())
}

/// Names outside the mesh: one, and all of a wildcard, whichever the client names in its request or in TLS.
const OUTSIDE: &str = r"
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: { name: one-name, namespace: t, labels: { istio.io/use-waypoint: wp } }
spec:
  hosts: [ one.name.example ]
  addresses: [ 10.96.2.30 ]
  location: MESH_EXTERNAL
  resolution: DNS
  ports: [ { number: 80, name: http, protocol: HTTP, targetPort: 8080 } ]
---
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: { name: names, namespace: t, labels: { istio.io/use-waypoint: wp } }
spec:
  hosts: [ '*.wild.example' ]
  addresses: [ 10.96.2.31 ]
  location: MESH_EXTERNAL
  resolution: DYNAMIC_DNS
  ports:
  - { number: 80, name: http, protocol: HTTP, targetPort: 8080 }
  - { number: 443, name: tls, protocol: TLS, targetPort: 7072 }
";

pub(crate) fn names_outside_are_reached_by_the_name_the_client_gives(mesh: &mut Mesh) -> anyhow::Result<()> {
    // Neither is in the mesh.
    let (outside, other) = (Arc::clone(mesh.topology.host("outside")), Arc::clone(mesh.pod("wp2")));
    let own = OwnCert::of(&["tls.wild.example"])?;
    let _servers = (Web::start(&outside, PORT)?, Web::start(&other, PORT)?, TlsWeb::start(&outside, SECURE_PORT, &own, None)?);
    let (first, second) = (outside.v4, other.v4);
    let _dns = Dns::start(mesh.pod("wp"), move |name| match name {
        "one.name.example" | "a.wild.example" | "tls.wild.example" => Some(vec![first.into()]),
        "b.wild.example" => Some(vec![second.into()]),
        _ => None,
    })?;
    let _entries = mesh.objects("outside-names", OUTSIDE)?;
    mesh.proxy("node-a").wait_config("the services", |dump| dump["services"].to_string().contains("10.96.2.31"))?;
    let ask = |host: &str, vip: &str| mesh.call(&["-H", &format!("host: {host}"), &format!("http://{vip}/names")]);
    let got = ask("one.name.example", "10.96.2.30")?;
    ensure!(got.status == 200 && got.echo()?["name"] == "outside", "one name: {got:?}");
    for _ in 0..2 {
        for (host, who) in [("a.wild.example", "outside"), ("B.wild.example:80", "wp2")] {
            let got = ask(host, "10.96.2.31")?;
            ensure!(got.status == 200 && got.echo()?["name"] == who, "{host}: {got:?}");
        }
    }
    let got = ask("nobody.wild.example", "10.96.2.31")?;
    ensure!(got.status == 503 && got.body == "no healthy upstream", "a name nobody knows: {got:?}");
    for host in ["one.name.example", "wild.example", "a.wild.example.evil"] {
        let got = ask(host, "10.96.2.31")?;
        ensure!(got.status == 404, "{host} is not of the wildcard: {got:?}");
    }
    let secure = |name: &str| {
        let resolve = format!("{name}:443:10.96.2.31");
        mesh.call(&["-k", "--resolve", &resolve, &format!("https://{name}/")])
    };
    let got = secure("tls.wild.example")?;
    ensure!(got.status == 200 && got.echo()?["sni"] == "tls.wild.example", "{got:?}");
    ensure!(secure("one.name.example").is_err(), "a name that is not of the wildcard");
    Ok(())
}
