//! Which waypoint traffic goes through, if any.
use std::io::Read as _;
use std::net::{Ipv4Addr, SocketAddr};
use std::process::Command;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use mesh_tests::agent::Agent;
use mesh_tests::dev_ca::TestCa;
use mesh_tests::hbone::{self, Tunnel};
use mesh_tests::program::Server;
use mesh_tests::raw::Raw;
use mesh_tests::wait;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use crate::mesh::{Got, MORE, Mesh, ObjectsForNow, PORT, WEB};

/// A Service of `app`, at this address, with these labels and annotations.
pub(crate) fn service(ns: &str, name: &str, app: &str, ip: &str, labels: &str, annotations: &str) -> String {
    format!(
        "apiVersion: v1\nkind: Service\nmetadata: {{ name: {name}, namespace: {ns}, labels: {{ {labels} }}, annotations: {{ {annotations} }} }}\nspec:\n  selector: {{ app: {app} }}\n  clusterIP: {ip}\n  ports:\n  - {{ name: http, port: 80, targetPort: {PORT}, protocol: TCP }}\n---\n"
    )
}
/// The namespace `u` with these labels.
fn namespace(labels: &str) -> String {
    format!(
        "apiVersion: v1\nkind: Namespace\nmetadata: {{ name: u, labels: {{ istio.io/dataplane-mode: ambient, {labels} }} }}\n---\n"
    )
}
/// The waypoint of namespace `t` once more, as the Gateway `wide`.
fn wide(serves: &str, from: &str) -> String {
    format!(
        "apiVersion: gateway.networking.k8s.io/v1\nkind: Gateway\nmetadata: {{ name: wide, namespace: t, labels: {{ istio.io/waypoint-for: {serves} }} }}\nspec:\n  gatewayClassName: istio-waypoint\n  listeners:\n  - {{ name: mesh, port: 15008, protocol: HBONE, allowedRoutes: {{ namespaces: {{ from: {from} }} }} }}\nstatus:\n  addresses: [ {{ type: Hostname, value: wp.t.svc.cluster.local }} ]\n---\n"
    )
}
/// Whether the call went through a waypoint: only those count attempts.
fn through(got: &Got) -> anyhow::Result<bool> {
    ensure!(got.status == 200, "{got:?}");
    Ok(got.echo()?["headers"]["x-envoy-attempt-count"] == "1")
}
/// What becomes of calls once all have heard of the change: through a waypoint or not, or refused.
fn becomes(mesh: &Mesh, url: &str, want: Option<bool>, why: &str) -> anyhow::Result<()> {
    let now = || mesh.call(&[url]).ok().and_then(|got| through(&got).ok());
    wait::until_true(&format!("{url}: {why}"), || now() == want)?;
    ensure!(now() == want, "{url}: {why}");
    Ok(())
}

/// Labels on namespace, service and workload; a waypoint of another namespace, which must let them; what it is for.
pub(crate) fn labels_say_which_waypoint(mesh: &mut Mesh) -> anyhow::Result<()> {
    const WIDE: &str = "istio.io/use-waypoint: wide, istio.io/use-waypoint-namespace: t";
    let services = [
        service("u", "by-namespace", "far", "10.96.2.1", "", ""),
        service("u", "opted-out", "far", "10.96.2.2", "istio.io/use-waypoint: none", ""),
        service("u", "by-itself", "far", "10.96.2.3", WIDE, ""),
    ]
    .concat();
    let (inherits, opted_out, by_itself) = ("http://10.96.2.1/", "http://10.96.2.2/", "http://10.96.2.3/");
    let pod = format!("http://{}:{PORT}/", mesh.pod("far").v4);
    {
        let _space = mesh.instead("01-namespace-u.yaml", &namespace(WIDE))?;
        for (serves, [of_namespace, of_itself, of_pod]) in [
            ("service", [Some(true), Some(true), Some(false)]),
            // What asks by its own label for what the waypoint does not do is refused; what inherits goes without.
            ("workload", [Some(false), None, Some(true)]),
            ("all", [Some(true), Some(true), Some(true)]),
            ("none", [Some(false), None, Some(false)]),
        ] {
            let _objects = mesh.objects("binding", &format!("{}{services}", wide(serves, "All")))?;
            becomes(mesh, inherits, of_namespace, &format!("waypoint-for {serves}, by the namespace's label"))?;
            becomes(mesh, by_itself, of_itself, &format!("waypoint-for {serves}, by its own label"))?;
            becomes(mesh, opted_out, Some(false), &format!("waypoint-for {serves}, opted out"))?;
            becomes(mesh, &pod, of_pod, &format!("waypoint-for {serves}, the pod's address"))?;
        }
        let _objects = mesh.objects("binding", &format!("{}{services}", wide("all", "Same")))?;
        let mark = mesh.proxy("node-a").mark();
        becomes(mesh, inherits, None, "allowedRoutes does not name the namespace")?;
        mesh.proxy("node-a").wait_access("the refusal", mark, |r| r["reason"] == "no_waypoint")?;
    }
    // Without the namespace's label: what asks itself.
    let own = mesh.topology.pod_yaml("far", &[("istio.io/use-waypoint", "wide"), ("istio.io/use-waypoint-namespace", "t")]);
    let _objects = mesh.objects("binding", &format!("{}{services}", wide("all", "All")))?;
    becomes(mesh, inherits, Some(false), "nothing asks")?;
    becomes(mesh, by_itself, Some(true), "the service asks")?;
    becomes(mesh, &pod, Some(false), "the pod does not")?;
    let _pod = mesh.instead("pod-far.yaml", &own)?;
    becomes(mesh, &pod, Some(true), "the pod asks")?;
    becomes(mesh, inherits, Some(false), "a service in front of it does not")
}

/// A second waypoint, the Gateway `canary`, in the pod `wp2`. What is there for its time goes in this order.
pub(crate) struct Canary<'a> {
    _objects: ObjectsForNow<'a>,
    _pod: ObjectsForNow<'a>,
    _proxy: Agent,
}
/// Starts it with this environment and makes what is bound to it; ready once it answers for itself.
pub(crate) fn canary<'a>(mesh: &'a Mesh, env: &[(&str, &str)], bound: &str) -> anyhow::Result<Canary<'a>> {
    const GATEWAY: &str = "apiVersion: gateway.networking.k8s.io/v1\nkind: Gateway\nmetadata: { name: canary, namespace: t }\nspec:\n  gatewayClassName: istio-waypoint\n  listeners: [ { name: mesh, port: 15008, protocol: HBONE } ]\nstatus:\n  addresses: [ { type: Hostname, value: canary.t.svc.cluster.local } ]\n---\napiVersion: v1\nkind: Service\nmetadata: { name: canary, namespace: t }\nspec:\n  selector: { app: canary }\n  clusterIP: 10.96.2.20\n  ports: [ { name: hbone, port: 15008, protocol: TCP } ]\n---\n";
    let proxy = mesh.start_with("canary", env)?;
    let labels = [("app", "canary"), ("gateway.networking.k8s.io/gateway-name", "canary")];
    let pod = mesh.topology.pod_yaml("wp2", &labels);
    let pod = mesh.instead("pod-wp2.yaml", &pod)?;
    let objects = mesh.objects("canary-waypoint", &format!("{GATEWAY}{bound}"))?;
    proxy.wait_ready(Duration::from_secs(40))?;
    Ok(Canary { _objects: objects, _pod: pod, _proxy: proxy })
}
/// Waits until calls to this address come through it.
pub(crate) fn wait_canary(mesh: &Mesh, url: &str) -> anyhow::Result<()> {
    let here = mesh.pod("wp2").v4.to_string();
    wait::until_true(&format!("{url} through the second waypoint"), || {
        mesh.call(&[url]).ok().and_then(|got| got.echo().ok()).is_some_and(|echo| echo["peer"] == here)
    })
}

/// Two waypoints of one service by weight, per connection. The second is set to tell the client's identity, the first is not.
pub(crate) fn a_canary_waypoint_gets_its_share(mesh: &mut Mesh) -> anyhow::Result<()> {
    const CALLS: usize = 200;
    let weighted = service(
        "t",
        "weighted",
        "web1",
        "10.96.2.21",
        "istio.io/use-waypoint: wp, istio.io/use-waypoint-canary: canary",
        "istio.io/use-waypoint-canary-weight: '30'",
    );
    let _canary = canary(mesh, &[("CULVERT_FORWARD_CLIENT_IDENTITY", "true")], &weighted)?;
    let (first, second) = (mesh.pod("wp").v4, mesh.pod("wp2").v4);
    let from = |echo: &serde_json::Value, ip: Ipv4Addr| echo["peer"] == ip.to_string();
    wait::until_true("both waypoints in use", || {
        let seen: Vec<_> = (0..20).filter_map(|_| mesh.call(&["http://10.96.2.21/"]).ok()?.echo().ok()).collect();
        seen.len() == 20 && seen.iter().any(|e| from(e, first)) && seen.iter().any(|e| from(e, second))
    })?;
    let mut command = Command::new("curl");
    let url = format!("http://10.96.2.21/[1-{CALLS}]");
    command.args(["-sS", "--max-time", "60", "--noproxy", "*", "-H", "connection: close", &url]);
    let output = mesh.pod("client").netns.output(&mut command)?;
    let mut counts = [0_usize; 2];
    for line in String::from_utf8_lossy(&output.stdout).lines() {
        let echo: serde_json::Value = serde_json::from_str(line).with_context(|| format!("not an echo: {line}"))?;
        let told = &echo["headers"]["x-forwarded-client-cert"];
        if from(&echo, second) {
            counts[1] += 1;
            let all = "By=spiffe://test.local/ns/t/sa/wp;URI=spiffe://test.local/ns/t/sa/client";
            ensure!(told == all, "the canary tells the client's identity: {echo}");
        } else {
            counts[0] += 1;
            ensure!(from(&echo, first) && told.is_null(), "the primary does not: {echo}");
        }
    }
    // 60 expected, standard deviation 6.5: five of them to either side.
    ensure!(counts[0] + counts[1] == CALLS && (28..=92).contains(&counts[1]), "{counts:?}");
    Ok(())
}

/// A waypoint behind the agent of its own node: the agent ends the tunnel and hands connections over with a PROXY header.
pub(crate) fn a_sandwiched_waypoint_is_told_who_calls(mesh: &mut Mesh) -> anyhow::Result<()> {
    let place = mesh.pod("web3").clone();
    let listener = place.listen(15088)?;
    let (send, taken) = mpsc::channel();
    std::thread::spawn(move || -> std::io::Result<()> {
        let (mut stream, _) = listener.accept()?;
        stream.set_read_timeout(Some(Duration::from_secs(5)))?;
        let mut bytes = vec![0; 16];
        stream.read_exact(&mut bytes)?;
        let mut rest = vec![0; usize::from(u16::from_be_bytes([bytes[14], bytes[15]]))];
        stream.read_exact(&mut rest)?;
        bytes.extend(rest);
        let mut said = [0; 5];
        stream.read_exact(&mut said)?;
        let _nobody_waits = send.send((bytes, said));
        Ok(())
    });
    let pod = mesh.topology.pod_yaml("web3", &[("gateway.networking.k8s.io/gateway-name", "sand")]);
    let _pod = mesh.instead("pod-web3.yaml", &pod)?;
    let gateway = format!(
        "apiVersion: gateway.networking.k8s.io/v1\nkind: Gateway\nmetadata: {{ name: sand, namespace: t, annotations: {{ ambient.istio.io/waypoint-inbound-binding: PROXY/15088 }} }}\nspec:\n  gatewayClassName: other-waypoint\n  listeners: [ {{ name: proxy, port: 15088, protocol: istio.io/PROXY }} ]\nstatus:\n  addresses: [ {{ type: IPAddress, value: {} }} ]\n---\n",
        place.v4,
    );
    let sandwiched = service("t", "sandwiched", "web2", "10.96.2.4", "istio.io/use-waypoint: sand", "");
    let _objects = mesh.objects("sandwich", &format!("{gateway}{sandwiched}"))?;
    let node = mesh.proxy("node-a");
    node.wait_config("the service", |dump| dump["services"].to_string().contains("10.96.2.4"))?;
    let _call = Raw::say(mesh.pod("client"), SocketAddr::new("10.96.2.4".parse()?, 80), b"hello")?;
    let (bytes, said) = taken.recv_timeout(wait::PATIENCE).context("the PROXY header")?;
    ensure!(bytes.starts_with(b"\r\n\r\n\0\r\nQUIT\n\x21\x11"), "{bytes:?}");
    ensure!(bytes.get(16..20) == Some(&mesh.pod("client").v4.octets()[..]), "the client's address: {bytes:?}");
    ensure!(
        bytes.get(20..24) == Some(&[10, 96, 2, 4][..]) && bytes.get(26..28) == Some(&[0, 80][..]),
        "what it asked for: {bytes:?}"
    );
    let text = String::from_utf8_lossy(&bytes);
    ensure!(text.contains("spiffe://test.local/ns/t/sa/client"), "its identity: {text:?}");
    ensure!(&said == b"hello", "{said:?}");
    Ok(())
}

/// A waypoint is no relay: it carries what names it and nothing else, for those alone who prove who they are.
pub(crate) fn a_waypoint_carries_only_what_names_it(mesh: &mut Mesh) -> anyhow::Result<()> {
    let wp = mesh.pod("wp").at(15008);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    // From a pod whose traffic no agent takes.
    let ask = |ca: &TestCa, id: &str, authority: &str| -> anyhow::Result<()> {
        let tls = hbone::client_tls(&ca.issue(id)?)?;
        mesh.pod("gw").netns.enter(|| {
            runtime.block_on(async {
                let tunnel = Tunnel::connect(wp, &tls).await?;
                tunnel.open(authority).await.map(drop)
            })
        })
    };
    let ours = TestCa::of_dir(mesh.ca.path())?;
    let client = "spiffe://test.local/ns/t/sa/client";
    let (web, web1, own) = (format!("{WEB}:80"), mesh.pod("web1").at(PORT).to_string(), wp.to_string());
    for (authority, status) in [
        (web.as_str(), ""),
        ("web.t.svc.cluster.local:80", ""),
        // A service and a workload that name no waypoint, or none for this; what nobody knows.
        ("10.96.0.40:80", "404"),
        ("issuer.t.svc.cluster.local:80", "404"),
        (web1.as_str(), "404"),
        ("192.0.2.1:80", "404"),
        ("nobody.example:80", "404"),
        ("10.96.0.20:81", "503"),
        (own.as_str(), "503"),
        ("10.96.0.20:0", "400"),
    ] {
        let got = ask(&ours, client, authority);
        let fits = match &got {
            Ok(()) => status.is_empty(),
            Err(error) => !status.is_empty() && format!("{error:#}").contains(&format!("is answered {status}")),
        };
        ensure!(fits, "{authority}: {got:?}, wanted {status}");
    }
    ensure!(ask(&ours, "spiffe://other.local/ns/t/sa/client", &web).is_err(), "another trust domain");
    ensure!(ask(&TestCa::unknown()?, client, &web).is_err(), "an authority nobody trusts");
    Ok(())
}

/// The CONNECTs of one tunnel are spread over the data threads.
pub(crate) fn the_streams_of_one_tunnel_use_all_threads(mesh: &mut Mesh) -> anyhow::Result<()> {
    const THREADS: usize = 3;
    const STREAMS: usize = 30;
    let bound = "apiVersion: v1\nkind: Service\nmetadata: { name: spread, namespace: t, labels: { istio.io/use-waypoint: canary } }\nspec:\n  selector: { app: web1 }\n  clusterIP: 10.96.2.24\n  ports: [ { name: tcp, port: 92, targetPort: 9092, protocol: TCP } ]\n";
    let _server = Server::start(mesh.pod("web1"), MORE)?;
    let _canary = canary(mesh, &[("CULVERT_WORKER_THREADS", &THREADS.to_string())], bound)?;
    let tls = hbone::client_tls(&TestCa::of_dir(mesh.ca.path())?.issue("spiffe://test.local/ns/t/sa/client")?)?;
    let (waypoint, admin) = (mesh.pod("wp2").at(15008), SocketAddr::from(([127, 0, 0, 1], 15000)));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    // From a pod whose traffic no agent takes.
    mesh.pod("gw").netns.enter(|| {
        runtime.block_on(async {
            let tunnel = Tunnel::connect(waypoint, &tls).await?;
            let mut open = Vec::new();
            // It is ready before it has heard of the service, which came after it was started.
            let deadline = Instant::now() + wait::PATIENCE;
            while let Err(error) = tunnel.open("10.96.2.24:92").await {
                ensure!(Instant::now() < deadline, "{error:#}");
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            for _ in 0..STREAMS {
                let mut stream = tunnel.open("10.96.2.24:92").await?;
                stream.write_all(b"who\n").await?;
                let mut name = [0; 4];
                stream.read_exact(&mut name).await?;
                ensure!(&name == b"web1", "{name:?}");
                open.push(stream);
            }
            // One that was given up just now may be listed still.
            let deadline = Instant::now() + wait::PATIENCE;
            loop {
                let page = mesh_tests::http::get(&mesh.pod("wp2").netns, admin, "/streams")?.body;
                let page: serde_json::Value = serde_json::from_str(&page)?;
                let inbound = page["tunnels"]["inbound"].as_array().map_or(0, Vec::len);
                let by_thread = page["tunnels"]["outboundByThread"].as_array().context("threads")?;
                let carried: Vec<u64> = by_thread.iter().filter_map(|pool| pool["streams"].as_u64()).collect();
                // A thread keeps what it accepts until another has clearly less to do.
                let spread = carried.len() == THREADS && carried.iter().all(|n| *n >= 4);
                if inbound == 1 && carried.iter().sum::<u64>() == STREAMS as u64 && spread {
                    return Ok(());
                }
                ensure!(Instant::now() < deadline, "{page}");
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        })
    })
}
