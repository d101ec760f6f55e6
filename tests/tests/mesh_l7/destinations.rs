//! Every rule about destinations (DestinationRule, BackendTLSPolicy, ServiceEntry), through two agents and the waypoint.
use std::collections::BTreeSet;
use std::io::Write as _;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use mesh_tests::grpc::Grpc;
use mesh_tests::issuer::{self, KeyServer};
use mesh_tests::load::Load;
use mesh_tests::raw::Raw;
use mesh_tests::rude::Rude;
use mesh_tests::tls::{OwnCert, TlsWeb};
use mesh_tests::wait;
use serde_json::Value;

use crate::change::ready;
use crate::mesh::{Kept, Mesh, OTHER, PORT, RUDE, RUDE_PORT, SECURE, SECURE_PORT, SPAN, WEB};

/// A DestinationRule of `host` with this traffic policy.
pub(crate) fn policy(host: &str, yaml: &str) -> String {
    format!(
        "apiVersion: networking.istio.io/v1\nkind: DestinationRule\nmetadata: {{ name: policy, namespace: t }}\nspec:\n  host: {host}.t.svc.cluster.local\n  trafficPolicy:\n{yaml}"
    )
}

pub(crate) fn names(mesh: &Mesh, calls: usize, args: impl Fn(usize) -> Vec<String>) -> anyhow::Result<Vec<String>> {
    (0..calls)
        .map(|n| {
            let args = args(n);
            let args: Vec<&str> = args.iter().map(String::as_str).collect();
            Ok(mesh.call(&args)?.echo()?["name"].as_str().context("a name")?.to_owned())
        })
        .collect()
}
pub(crate) fn different(names: &[String]) -> BTreeSet<&str> {
    names.iter().map(String::as_str).collect()
}

pub(crate) fn consistent_hashing_keeps_clients_where_they_are(mesh: &mut Mesh) -> anyhow::Result<()> {
    for algorithm in ["ringHash: { minimumRingSize: 1024 }", "maglev: { tableSize: 251 }"] {
        let _policy = mesh.objects(
            "hash",
            &policy("web", &format!("    loadBalancer: {{ consistentHash: {{ httpHeaderName: x-user, {algorithm} }} }}\n")),
        )?;
        let by_user = |user: String| vec!["-H".to_owned(), format!("x-user: {user}"), format!("http://{WEB}/")];
        for user in ["ann", "bob"] {
            let of_one = names(mesh, 6, |_| by_user(user.to_owned()))?;
            ensure!(different(&of_one).len() == 1, "{user} {of_one:?}");
        }
        let of_many = names(mesh, 16, |n| by_user(format!("user-{n}")))?;
        ensure!(different(&of_many).len() == 2, "{of_many:?}");
    }
    {
        let _policy = mesh.objects(
            "hash",
            &policy("web", "    loadBalancer: { consistentHash: { httpCookie: { name: stick, path: /, ttl: 60s } } }\n"),
        )?;
        let got = mesh.call(&[&format!("http://{WEB}/")])?;
        let set = got.header("set-cookie").context("a cookie is set for who has none")?.to_owned();
        ensure!(set.starts_with("stick=") && set.contains("Max-Age=60") && set.contains("Path=/"), "{set}");
        let cookie = set.split(';').next().unwrap_or_default().to_owned();
        let first = got.echo()?["name"].as_str().unwrap_or_default().to_owned();
        let again = names(mesh, 6, |_| vec!["-H".to_owned(), format!("cookie: {cookie}"), format!("http://{WEB}/")])?;
        ensure!(different(&again) == BTreeSet::from([first.as_str()]), "{first}, then {again:?}");
    }
    let _policy = mesh.objects("hash", &policy("web", "    loadBalancer: { consistentHash: { useSourceIp: true } }\n"))?;
    let of_one = names(mesh, 8, |_| vec![format!("http://{WEB}/")])?;
    ensure!(different(&of_one).len() == 1, "{of_one:?}");
    Ok(())
}

pub(crate) fn turns_and_draws_reach_everybody(mesh: &mut Mesh) -> anyhow::Result<()> {
    for simple in ["ROUND_ROBIN", "RANDOM", "LEAST_REQUEST"] {
        let _policy = mesh.objects("simple", &policy("web", &format!("    loadBalancer: {{ simple: {simple} }}\n")))?;
        let all = names(mesh, 16, |_| vec![format!("http://{WEB}/")])?;
        let first = all.iter().filter(|name| *name == "web1").count();
        let fine = if simple == "ROUND_ROBIN" { (7..=9).contains(&first) } else { (1..=15).contains(&first) };
        ensure!(fine && different(&all).len() == 2, "{simple}: {all:?}");
    }
    Ok(())
}

/// The waypoint is in zone 2 with `web1`; `web3` is in zone 1.
/// `trafficDistribution`: near is near the waypoint (in `node-b`, `zone-2`), not the client.
pub(crate) fn services_prefer_what_is_near_the_waypoint(mesh: &mut Mesh) -> anyhow::Result<()> {
    let mesh: &Mesh = mesh;
    let read = |file: &str| std::fs::read_to_string(mesh.dir.path().join(file));
    let (base, nodes, pod) = (read("00-base.yaml")?, read("01-nodes.yaml")?, read("pod-web1.yaml")?);
    let reached = || names(mesh, 20, |_| vec![format!("http://{SPAN}/")]);
    let expect = |what: &str, want: &[&str]| -> anyhow::Result<()> {
        let got = reached()?;
        ensure!(different(&got) == want.iter().copied().collect(), "{what}: {got:?}");
        Ok(())
    };
    expect("nothing said", &["web1", "web3"])?;
    let named = "metadata: { name: span, namespace: t, labels: { istio.io/use-waypoint: wp } }\nspec:\n";
    ensure!(base.contains(named) && nodes.contains("zone-1") && pod.contains("status: \"True\""), "written otherwise");
    for how in ["PreferClose", "PreferSameZone", "PreferSameNode"] {
        let _service = mesh.instead("00-base.yaml", &base.replace(named, &format!("{named}  trafficDistribution: {how}\n")))?;
        expect(how, &["web1"])?;
        {
            let _pod = mesh.instead("pod-web1.yaml", &pod.replace("status: \"True\"", "status: \"False\""))?;
            expect("none is near", &["web3"])?;
        }
        // Both nodes in one zone.
        let _nodes = mesh.instead("01-nodes.yaml", &nodes.replace("zone-1", "zone-2"))?;
        expect(how, if how == "PreferSameNode" { &["web1"] } else { &["web1", "web3"] })?;
    }
    expect("nothing said any more", &["web1", "web3"])
}

pub(crate) fn locality_failover_and_shares(mesh: &mut Mesh) -> anyhow::Result<()> {
    let outlier =
        "    outlierDetection: { consecutive5xxErrors: 2, interval: 300ms, baseEjectionTime: 1500ms, maxEjectionPercent: 100 }\n";
    let calls = |n| names(mesh, n, |_| vec![format!("http://{SPAN}/")]);
    {
        let _policy = mesh.objects(
            "locality",
            &policy("span", &format!("    loadBalancer: {{ localityLbSetting: {{ enabled: true }} }}\n{outlier}")),
        )?;
        ensure!(different(&calls(12)?) == BTreeSet::from(["web1"]), "the own zone first");
        let mut client = Kept::to(mesh, SPAN)?;
        mesh.web["web1"].behave(503);
        for _ in 0..2 {
            ensure!(client.get("/")?.status == 503);
        }
        mesh.web["web1"].behave(0);
        let moved = [client.name()?, client.name()?, client.name()?];
        ensure!(different(&moved) == BTreeSet::from(["web3"]), "the other zone while the own one is ejected: {moved:?}");
        wait::until("the own zone again", wait::PATIENCE, || (calls(1).ok()?.pop()?.as_str() == "web1").then_some(()))?;
    }
    {
        // Retries: twice where the first attempt was, and then elsewhere, if the route says so.
        let patient = "    outlierDetection: { consecutive5xxErrors: 1000 }\n";
        let _policy = mesh.objects("locality", &policy("span", patient))?;
        let route = |attempts: u8, elsewhere: bool| {
            mesh.objects("retries", &format!("apiVersion: networking.istio.io/v1\nkind: VirtualService\nmetadata: {{ name: span, namespace: t }}\nspec:\n  hosts: [ span ]\n  http:\n  - retries: {{ attempts: {attempts}, retryOn: '503', retryRemoteLocalities: {elsewhere} }}\n    route: [ {{ destination: {{ host: span }} }} ]\n"))
        };
        mesh.web["web1"].behave(503);
        for (attempts, elsewhere, status) in [(3, false, 503), (1, true, 503), (2, true, 200)] {
            let _route = route(attempts, elsewhere)?;
            let got = mesh.call(&[&format!("http://{SPAN}/")])?;
            ensure!(got.status == status, "{attempts} retries, elsewhere {elsewhere}: {got:?}");
            let echo = got.echo()?;
            let (by, count) = if status == 200 { ("web3", 3) } else { ("web1", attempts + 1) };
            let counted = echo["headers"]["x-envoy-attempt-count"].as_str().and_then(|text| text.parse().ok());
            ensure!(echo["name"] == by && counted == Some(count), "{echo}");
        }
        mesh.web["web1"].behave(0);
    }
    {
        let shares = "    loadBalancer: { localityLbSetting: { distribute: [ { from: region-1/zone-2/*, to: { region-1/zone-1/*: 100 } } ] } }\n";
        let _policy = mesh.objects("locality", &policy("span", shares))?;
        ensure!(different(&calls(8)?) == BTreeSet::from(["web3"]), "all of it sent to the other zone");
    }
    {
        // By the waypoint's own labels, which are those of its pod.
        let by_label = format!("    loadBalancer: {{ localityLbSetting: {{ failoverPriority: [ side ] }} }}\n{outlier}");
        let _policy = mesh.objects("locality", &policy("span", &by_label))?;
        ensure!(different(&calls(8)?) == BTreeSet::from(["web3"]), "whose label `side` is as the waypoint's");
    }
    ensure!(different(&calls(24)?).len() == 2, "without a policy zones do not matter");
    Ok(())
}

pub(crate) fn limits_overflow_as_envoy_says(mesh: &mut Mesh) -> anyhow::Result<()> {
    let to = SocketAddr::new(OTHER.parse()?, 80);
    // All are sent before the first is answered.
    let many = |path: &str, count: usize| -> anyhow::Result<Vec<(u16, String, bool)>> {
        let mut open = (0..count).map(|_| Raw::open(mesh.pod("client"), to)).collect::<std::io::Result<Vec<_>>>()?;
        for raw in &mut open {
            raw.send(format!("GET {path} HTTP/1.1\r\nhost: {OTHER}\r\n\r\n").as_bytes())?;
        }
        let answers = open.iter_mut().map(Raw::answer);
        answers
            .map(|got| got.map(|got| (got.status, got.body.clone(), got.header("x-envoy-overloaded") == Some("true"))))
            .collect()
    };
    for limits in ["{ tcp: { maxConnections: 1 }, http: { http1MaxPendingRequests: 1 } }", "{ http: { http2MaxRequests: 2 } }"] {
        let _policy = mesh.objects("limits", &policy("other", &format!("    connectionPool: {limits}\n")))?;
        // The one connection there may be, made and free.
        ensure!(mesh.call(&[&format!("http://{OTHER}/")])?.status == 200);
        let got = many("/slow/800", 6)?;
        let (fine, full): (Vec<_>, Vec<_>) = got.iter().partition(|(status, ..)| *status == 200);
        ensure!((2..=3).contains(&fine.len()) && fine.len() + full.len() == 6, "{limits}: {got:?}");
        for (status, body, overloaded) in &full {
            ensure!(*status == 503 && *overloaded && body.ends_with("reset reason: overflow"), "{limits}: {got:?}");
        }
        ensure!(mesh.call(&[&format!("http://{OTHER}/")])?.status == 200, "and it heals");
    }
    Ok(())
}

pub(crate) fn a_retry_budget_is_kept(mesh: &mut Mesh) -> anyhow::Result<()> {
    let retries = "apiVersion: networking.istio.io/v1\nkind: VirtualService\nmetadata: { name: retries, namespace: t }\nspec:\n  hosts: [ other ]\n  http:\n  - retries: { attempts: 2, retryOn: \"503\" }\n    route: [ { destination: { host: other } } ]\n";
    let _retries = mesh.objects("retries", retries)?;
    ensure!(mesh.call(&[&format!("http://{OTHER}/fail/1/budget-a")])?.status == 200);
    let _policy = mesh.objects(
        "budget",
        &policy(
            "other",
            "    connectionPool: { http: { maxRetries: 1 } }\n    retryBudget: { percent: 0, minRetryConcurrency: 0 }\n",
        ),
    )?;
    let got = mesh.call(&[&format!("http://{OTHER}/fail/1/budget-b")])?;
    ensure!(got.status == 503, "nothing is left to retry with: {got:?}");
    Ok(())
}

pub(crate) fn a_newcomer_warms_up(mesh: &mut Mesh) -> anyhow::Result<()> {
    let _policy = mesh.objects(
        "warm",
        &policy("web", "    loadBalancer: { simple: ROUND_ROBIN, warmup: { duration: 3s, minimumPercent: 10 } }\n"),
    )?;
    ready(mesh, "web2", false)?;
    ensure!(mesh.call(&[&format!("http://{WEB}/")])?.status == 200);
    let load = Load::start(mesh.pod("client"), SocketAddr::new(WEB.parse()?, 80), "/warm", 1, Duration::from_millis(1));
    // The one that stays is warm itself by then.
    std::thread::sleep(Duration::from_secs(3));
    let before = mesh.web["web2"].requests();
    ready(mesh, "web2", true)?;
    wait::until_true("the newcomer", || mesh.web["web2"].requests() > before)?;
    let (begun, start, of_it) = (Instant::now(), load.done(), mesh.web["web2"].requests());
    // Not longer than it is cold for.
    while load.done() < start + 80 && begun.elapsed() < Duration::from_secs(1) {
        std::thread::sleep(Duration::from_millis(5));
    }
    let (all, cold) = (load.done() - start, mesh.web["web2"].requests() - of_it);
    ensure!(cold * 100 < all * 35, "{cold} of {all} while it is cold");
    std::thread::sleep(Duration::from_secs(3));
    let (start, of_it) = (load.done(), mesh.web["web2"].requests());
    load.wait(start + 100)?;
    let (all, warm) = (load.done() - start, mesh.web["web2"].requests() - of_it);
    ensure!(warm * 100 > all * 40, "{warm} of {all} when it is warm");
    load.finish(0)?.all_well(100, 0)
}

pub(crate) fn tls_is_originated(mesh: &mut Mesh) -> anyhow::Result<()> {
    let own = OwnCert::of(&["secure.example"])?;
    let client = OwnCert::of(&["client.example"])?;
    let stranger = OwnCert::of(&["secure.example"])?;
    let files = mesh.logs.path();
    let write = |name: &str, text: &str| -> anyhow::Result<String> {
        let path = files.join(name);
        std::fs::write(&path, text)?;
        Ok(path.display().to_string())
    };
    let (roots, foreign) = (write("roots.pem", &own.cert)?, write("foreign.pem", &stranger.cert)?);
    let (cert, key) = (write("client.pem", &client.cert)?, write("client.key", &client.key)?);
    let call = |path: &str| mesh.call(&[&format!("http://{SECURE}{path}")]);
    let tls = |fields: &str| mesh.objects("tls", &policy("secure", &format!("    tls: {{ {fields} }}\n")));
    let server = TlsWeb::start(mesh.pod("web1"), SECURE_PORT, &own, None)?;
    {
        let _tls = tls(&format!("mode: SIMPLE, sni: secure.example, caCertificates: {roots}"))?;
        let got = call("/simple")?;
        let told: Value = serde_json::from_str(&got.body).with_context(|| format!("{got:?}"))?;
        ensure!(told["sni"] == "secure.example" && told["alpn"] == "http/1.1" && told["client"] == false, "{told}");
    }
    {
        let _tls = tls(&format!("mode: SIMPLE, sni: secure.example, caCertificates: {foreign}"))?;
        let got = call("/foreign")?;
        ensure!(got.status == 503 && got.body.contains("remote connection failure"), "an unknown authority: {got:?}");
    }
    {
        let _tls = tls(&format!("mode: SIMPLE, sni: other.example, caCertificates: {roots}"))?;
        ensure!(call("/name")?.status == 503, "a certificate of another name");
    }
    {
        let _tls =
            tls(&format!("mode: SIMPLE, sni: other.example, caCertificates: {roots}, subjectAltNames: [ secure.example ]"))?;
        ensure!(call("/san")?.status == 200, "of a name that is accepted");
    }
    {
        let _policy = mesh.objects(
            "tls",
            &format!(
                "apiVersion: v1\nkind: ConfigMap\nmetadata: {{ name: roots, namespace: t }}\ndata:\n  ca.crt: |\n    {}\n---\napiVersion: gateway.networking.k8s.io/v1\nkind: BackendTLSPolicy\nmetadata: {{ name: secure, namespace: t }}\nspec:\n  targetRefs: [ {{ group: \"\", kind: Service, name: secure }} ]\n  validation:\n    hostname: secure.example\n    caCertificateRefs: [ {{ group: \"\", kind: ConfigMap, name: roots }} ]\n",
                own.cert.trim_end().replace('\n', "\n    ")
            ),
        )?;
        let got = call("/backend-tls")?;
        ensure!(got.status == 200 && got.body.contains("secure.example"), "BackendTLSPolicy: {got:?}");
    }
    drop(server);
    {
        // By an authority that the system of the waypoint knows.
        let server = KeyServer::start(mesh.pod("web1"), SECURE_PORT, Some(&mesh.authority))?;
        for (hostname, status, requests) in [("other.example", 503, 0), (issuer::SERVER, 200, 1)] {
            let _policy = mesh.objects(
                "tls",
                &format!(
                    "apiVersion: gateway.networking.k8s.io/v1\nkind: BackendTLSPolicy\nmetadata: {{ name: secure, namespace: t }}\nspec:\n  targetRefs: [ {{ group: \"\", kind: Service, name: secure }} ]\n  validation: {{ hostname: {hostname}, wellKnownCACertificates: System }}\n"
                ),
            )?;
            let got = call("/system")?;
            ensure!(got.status == status && server.requests() == requests, "{hostname}, roots of the system: {got:?}");
        }
    }
    let _server = TlsWeb::start(mesh.pod("web1"), SECURE_PORT, &own, Some(&client))?;
    let _tls = tls(&format!(
        "mode: MUTUAL, sni: secure.example, caCertificates: {roots}, clientCertificate: {cert}, privateKey: {key}"
    ))?;
    let got = call("/mutual")?;
    let told: Value = serde_json::from_str(&got.body).with_context(|| format!("{got:?}"))?;
    ensure!(told["client"] == true, "{told}");
    Ok(())
}

pub(crate) fn the_proxy_protocol_names_the_client(mesh: &mut Mesh) -> anyhow::Result<()> {
    let client = mesh.pod("client").v4;
    for (version, begins) in
        [("V1", format!("PROXY TCP4 {client} ").into_bytes()), ("V2", b"\r\n\r\n\0\r\nQUIT\n\x21\x11".to_vec())]
    {
        let server = Rude::start(mesh.pod("web1"), RUDE_PORT, |_, stream| {
            stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok")
        })?;
        let _policy = mesh.objects("proxy", &policy("rude", &format!("    proxyProtocol: {{ version: {version} }}\n")))?;
        ensure!(mesh.call(&[&format!("http://{RUDE}/")])?.status == 200, "{version}");
        let seen = server.seen().into_iter().find(|bytes| !bytes.is_empty()).context("a connection")?;
        ensure!(seen.starts_with(&begins), "{version}: {:?}", String::from_utf8_lossy(&seen));
        if version == "V2" {
            ensure!(seen.get(16..20) == Some(&client.octets()[..]), "{seen:?}");
        }
    }
    Ok(())
}

pub(crate) fn http2_is_spoken_to_endpoints_where_asked(mesh: &mut Mesh) -> anyhow::Result<()> {
    let server = Grpc::start(mesh.pod("web1"), RUDE_PORT)?;
    let _policy = mesh.objects("h2", &policy("rude", "    connectionPool: { http: { h2UpgradePolicy: UPGRADE } }\n"))?;
    for _ in 0..5 {
        let got = mesh.call(&["--http1.1", &format!("http://{RUDE}/svc/0")])?;
        ensure!(got.status == 200 && got.header("x-name") == Some("web1"), "{got:?}");
    }
    ensure!(server.connections() <= 2, "one connection a data thread carries them all: {}", server.connections());
    Ok(())
}

/// What limits a connection to an endpoint, and which version it is. Connections are counted: each case has a server of its own.
pub(crate) fn connections_to_endpoints_are_as_told(mesh: &mut Mesh) -> anyhow::Result<()> {
    let url = format!("http://{RUDE}/svc/0");
    let slow = |mesh: &Mesh| {
        Grpc::answering(mesh.pod("web1"), RUDE_PORT, |_, body| {
            std::thread::sleep(Duration::from_millis(100));
            body
        })
    };
    let told = |yaml: &str| mesh.objects("version", &policy("rude", &format!("    connectionPool: {yaml}\n")));
    {
        let (_policy, server) = (told("{ http: { h2UpgradePolicy: UPGRADE, maxConcurrentStreams: 1 } }")?, slow(mesh)?);
        std::thread::scope(|scope| {
            let calls = [(); 6].map(|()| scope.spawn(|| mesh.call(&[&url]).map(|got| got.status)));
            calls.into_iter().try_for_each(|call| {
                let status = call.join().map_err(|_panic| anyhow::anyhow!("a call panicked"))??;
                ensure!(status == 200, "{status}");
                Ok(())
            })
        })?;
        ensure!(server.connections() > 2, "one request at a time on each connection: {}", server.connections());
    }
    {
        let limited = "{ http: { h2UpgradePolicy: UPGRADE }, tcp: { maxConnectionDuration: 300ms } }";
        let (_policy, server) = (told(limited)?, slow(mesh)?);
        let begun = Instant::now();
        while server.connections() < 4 {
            ensure!(mesh.call(&[&url])?.status == 200);
            ensure!(begun.elapsed() < wait::PATIENCE, "connections end after their time: {}", server.connections());
        }
    }
    let _server = slow(mesh)?;
    {
        // The client's own version, whatever the port is declared as: this server knows HTTP/2 only.
        let _policy = told("{ http: { useClientProtocol: true } }")?;
        ensure!(mesh.call(&["--http2-prior-knowledge", &url])?.status == 200);
        ensure!(mesh.call(&["--http1.1", &url])?.status != 200, "HTTP/1.1 was made HTTP/2");
    }
    ensure!(mesh.call(&["--http2-prior-knowledge", &url])?.status != 200, "HTTP/2 to a port declared HTTP/1.1");
    Ok(())
}

pub(crate) const OUTSIDE: &str = r"
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: { name: ext, namespace: t, labels: { istio.io/use-waypoint: wp } }
spec:
  hosts: [ ext.example ]
  addresses: [ 10.96.1.1 ]
  location: MESH_EXTERNAL
  resolution: STATIC
  ports: [ { number: 80, name: http, protocol: HTTP, targetPort: 8080 } ]
  endpoints: [ { address: ADDRESS } ]
---
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: { name: ext, namespace: t }
spec:
  hosts: [ ext.example ]
  http:
  - headers: { request: { set: { x-egress: waypoint } } }
    route: [ { destination: { host: ext.example } } ]
";

pub(crate) fn a_service_entry_leads_out(mesh: &mut Mesh) -> anyhow::Result<()> {
    let outside = mesh.topology.host("outside").clone();
    let _server = mesh_tests::web::Web::start(&outside, PORT)?;
    let _entry = mesh.objects("outside", &OUTSIDE.replace("ADDRESS", &outside.v4.to_string()))?;
    mesh.proxy("node-a").wait_config("the service", |dump| dump["services"].to_string().contains("10.96.1.1"))?;
    let got = mesh.call(&["-H", "host: ext.example", "http://10.96.1.1/out"])?;
    let echo = got.echo()?;
    ensure!(echo["name"] == "outside" && echo["headers"]["x-egress"] == "waypoint", "{echo}");
    ensure!(echo["peer"] == mesh.pod("wp").v4.to_string(), "it leaves from the waypoint: {echo}");
    Ok(())
}

/// Where the endpoint is whatever address the client chose (`resolution: NONE`).
pub(crate) fn the_clients_own_destination_is_kept(mesh: &mut Mesh) -> anyhow::Result<()> {
    let outside = mesh.topology.host("outside").clone();
    let _server = mesh_tests::web::Web::start(&outside, PORT)?;
    let chosen = OUTSIDE
        .replace("10.96.1.1", &outside.v4.to_string())
        .replace("resolution: STATIC", "resolution: NONE")
        .replace("number: 80, name: http, protocol: HTTP, targetPort: 8080", "number: 8080, name: http, protocol: HTTP")
        .replace("  endpoints: [ { address: ADDRESS } ]\n", "");
    let _entry = mesh.objects("outside", &chosen)?;
    mesh.proxy("node-a").wait_config("the service", |dump| dump["services"].to_string().contains(&outside.v4.to_string()))?;
    let got = mesh.call(&["-H", "host: ext.example", &format!("http://{}:{PORT}/own", outside.v4)])?;
    let echo = got.echo()?;
    ensure!(echo["name"] == "outside" && echo["headers"]["x-egress"] == "waypoint", "{echo}");
    ensure!(echo["peer"] == mesh.pod("wp").v4.to_string(), "it leaves from the waypoint: {echo}");
    Ok(())
}

/// Keep-alive of the connections to an endpoint, seen in the kernel's table.
pub(crate) fn connections_are_kept_alive_as_told(mesh: &mut Mesh) -> anyhow::Result<()> {
    let outside = mesh.topology.host("outside").clone();
    let _server = mesh_tests::web::Web::start(&outside, PORT)?;
    let _entry = mesh.objects("outside", &OUTSIDE.replace("ADDRESS", &outside.v4.to_string()))?;
    mesh.proxy("node-a").wait_config("the service", |dump| dump["services"].to_string().contains("10.96.1.1"))?;
    let table = format!("/proc/{}/net/tcp", mesh.proxy("wp").pid());
    let remote = format!("{:08X}:{PORT:04X}", u32::from_ne_bytes(outside.v4.octets()));
    // Established: local address, and the kind of timer with its rest in hundredths of a second.
    let open = || -> anyhow::Result<BTreeSet<(String, String)>> {
        let text = std::fs::read_to_string(&table)?;
        let lines = text.lines().map(|line| line.split_whitespace().collect::<Vec<_>>());
        let ours = lines.filter(|f| f.get(2) == Some(&&*remote) && f.get(3) == Some(&"01"));
        Ok(ours.filter_map(|f| Some(((*f.get(1)?).to_owned(), (*f.get(5)?).to_owned()))).collect())
    };
    ensure!(mesh.call(&["-H", "host: ext.example", "http://10.96.1.1/kept"])?.status == 200);
    let before = open()?;
    let due = |timer: &str| timer.strip_prefix("02:").and_then(|rest| u64::from_str_radix(rest, 16).ok());
    let ours = |rest: u64| (9_000..=10_000).contains(&rest);
    ensure!(!before.is_empty() && !before.iter().any(|(_, timer)| due(timer).is_some_and(ours)), "nothing said: {before:?}");
    let _policy = mesh.objects(
        "kept",
        "apiVersion: networking.istio.io/v1\nkind: DestinationRule\nmetadata: { name: kept, namespace: t }\nspec:\n  host: ext.example\n  trafficPolicy: { connectionPool: { tcp: { tcpKeepalive: { time: 100s, interval: 30s, probes: 3 } } } }\n",
    )?;
    // It counts for the next request: those of before are not used any more.
    ensure!(mesh.call(&["-H", "host: ext.example", "http://10.96.1.1/kept"])?.status == 200);
    let new = open()?;
    ensure!(new.iter().any(|(_, timer)| due(timer).is_some_and(ours)), "{new:?}");
    wait::until_true("the end of those of before", || {
        open().is_ok_and(|now| now.iter().all(|(_, timer)| due(timer).is_some_and(ours)))
    })?;
    Ok(())
}

/// Failures of our own making count apart where that is asked for; and below a share of healthy ones all are used.
pub(crate) fn ejections_by_cause_and_their_limit(mesh: &mut Mesh) -> anyhow::Result<()> {
    let ejected = |mesh: &Mesh| -> anyhow::Result<f64> {
        Ok(mesh.proxy("wp").metrics()?.sum("envoy_cluster_outlier_detection_ejections_enforced_total", &[]))
    };
    let calls = |mesh: &Mesh, path: &str, count: usize| -> anyhow::Result<usize> {
        let statuses = (0..count).map(|_| Ok(mesh.call(&[&format!("http://{WEB}{path}")])?.status));
        Ok(statuses.collect::<anyhow::Result<Vec<_>>>()?.iter().filter(|status| **status >= 500).count())
    };
    let rule = |more: &str| {
        policy(
            "web",
            &format!(
                "    loadBalancer: {{ simple: ROUND_ROBIN }}\n    outlierDetection: {{ interval: 200ms, baseEjectionTime: 1s, maxEjectionPercent: 50, {more} }}\n"
            ),
        )
    };
    {
        let _policy = mesh.objects(
            "causes",
            &rule("splitExternalLocalOriginErrors: true, consecutiveLocalOriginFailures: 1, consecutive5xxErrors: 0, consecutiveGatewayErrors: 0"),
        )?;
        let before = ejected(mesh)?;
        mesh.web["web2"].behave(503);
        calls(mesh, "/", 12)?;
        mesh.web["web2"].behave(0);
        ensure!(ejected(mesh)? <= before, "answers of the endpoint do not count");
        calls(mesh, "/drop", 8)?;
        // One: each follows a connection that was made, which ends a row of failures (Envoy: `LocalOriginConnectSuccess`).
        ensure!(ejected(mesh)? > before, "broken connections do");
    }
    wait::until_true("who was ejected to be back", || {
        let page = mesh.proxy("wp").metrics();
        page.is_ok_and(|page| page.sum("envoy_cluster_outlier_detection_ejections_active", &[]) == 0.0)
    })?;
    let _policy = mesh.objects("causes", &rule("consecutiveGatewayErrors: 3, minHealthPercent: 60"))?;
    // Its counters are new with it.
    calls(mesh, "/", 2)?;
    let before = ejected(mesh)?;
    mesh.web["web2"].behave(502);
    let failures = calls(mesh, "/", 12)?;
    mesh.web["web2"].behave(0);
    ensure!(ejected(mesh)? > before && failures >= 5, "half is less than 60 %, so all are used: {failures}");
    Ok(())
}

/// Statuses that are named are errors, and no others.
pub(crate) fn ejections_by_the_statuses_that_are_named(mesh: &mut Mesh) -> anyhow::Result<()> {
    let _policy = mesh.objects(
        "statuses",
        &policy("web", "    loadBalancer: { simple: ROUND_ROBIN }\n    outlierDetection: { consecutive5xxErrors: 3, outlierDetectionHttpErrorCodes: [404, 503], interval: 200ms, baseEjectionTime: 60s, maxEjectionPercent: 50 }\n"),
    )?;
    let mut client = Kept::to(mesh, WEB)?;
    let mut failed_of_12 = |status: u16| -> anyhow::Result<usize> {
        mesh.web["web2"].behave(status);
        let statuses = (0..12).map(|_| Ok(client.get("/")?.status)).collect::<anyhow::Result<Vec<_>>>();
        mesh.web["web2"].behave(0);
        Ok(statuses?.iter().filter(|got| **got == status).count())
    };
    let of_another = failed_of_12(500)?;
    ensure!(of_another == 6, "500 is not named: {of_another}");
    let of_one = failed_of_12(404)?;
    ensure!(of_one == 3, "three of 404 eject: {of_one}");
    Ok(())
}

pub(crate) fn an_ejection_ends_and_is_counted(mesh: &mut Mesh) -> anyhow::Result<()> {
    let _policy = mesh.objects(
        "gateway-errors",
        &policy("web", "    loadBalancer: { simple: ROUND_ROBIN }\n    outlierDetection: { consecutive5xxErrors: 0, consecutiveGatewayErrors: 3, interval: 200ms, baseEjectionTime: 3s, maxEjectionPercent: 50 }\n"),
    )?;
    // 500 is no gateway error.
    mesh.web["web2"].behave(500);
    let mut client = Kept::to(mesh, WEB)?;
    for _ in 0..12 {
        client.get("/")?;
    }
    let before = mesh.web["web2"].requests();
    for _ in 0..6 {
        client.get("/")?;
    }
    ensure!(mesh.web["web2"].requests() >= before + 2, "500 does not eject");
    mesh.web["web2"].behave(502);
    let mut failures = 0;
    for _ in 0..12 {
        failures += usize::from(client.get("/")?.status == 502);
    }
    mesh.web["web2"].behave(0);
    ensure!(failures == 3, "three gateway errors eject: {failures}");
    wait::until_true("its return", || {
        mesh.call(&[&format!("http://{WEB}/")]).is_ok_and(|got| got.echo().is_ok_and(|echo| echo["name"] == "web2"))
    })
}
