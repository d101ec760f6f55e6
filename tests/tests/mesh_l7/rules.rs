//! Fields of a DestinationRule: what ports and subsets say of their own, hashing by query, TLS by Secret, limits by connection.
use std::collections::BTreeSet;
use std::io::Write as _;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use mesh_tests::rude::Rude;
use mesh_tests::tls::{OwnCert, TlsWeb};
use mesh_tests::wait;
use mesh_tests::web::Web;
use serde_json::Value;

use crate::destinations::{OUTSIDE, different, names, policy};
use crate::mesh::{Mesh, PORT, RUDE, RUDE_PORT, SECURE, SECURE_PORT, SPAN, WEB};

/// Whom `calls` requests to `url` reach, all of one user.
fn of_one_user(mesh: &Mesh, calls: usize, url: &str, more: &[&str]) -> anyhow::Result<Vec<String>> {
    let args: Vec<String> = ["-H", "x-user: ann"].iter().chain(more).chain([&url]).map(|arg| (*arg).to_owned()).collect();
    names(mesh, calls, |_| args.clone())
}

/// Two ports, of the same servers.
const TWO_PORTS: &str = r"
apiVersion: v1
kind: Service
metadata: { name: ports, namespace: t, labels: { istio.io/use-waypoint: wp } }
spec:
  selector: { tier: web }
  clusterIP: 10.96.2.50
  ports:
  - { name: http, port: 80, targetPort: 8080, protocol: TCP }
  - { name: http-more, port: 81, targetPort: 8080, protocol: TCP }
---
";

pub(crate) fn a_port_has_settings_of_its_own(mesh: &mut Mesh) -> anyhow::Result<()> {
    let ejecting =
        "outlierDetection: { consecutive5xxErrors: 1, interval: 200ms, baseEjectionTime: 2s, maxEjectionPercent: 100 }";
    let by_user = "loadBalancer: { consistentHash: { httpHeaderName: x-user } }";
    let rule = policy(
        "ports",
        &format!(
            "    loadBalancer: {{ simple: ROUND_ROBIN }}\n    {ejecting}\n    portLevelSettings:\n    - port: {{ number: 80 }}\n      {by_user}\n"
        ),
    );
    let _objects = mesh.objects("ports", &format!("{TWO_PORTS}{rule}"))?;
    mesh.proxy("node-a").wait_config("the service", |dump| dump["services"].to_string().contains("10.96.2.50"))?;
    let (own, rest) = ("http://10.96.2.50/", "http://10.96.2.50:81/");
    let here = of_one_user(mesh, 8, own, &[])?;
    ensure!(different(&here).len() == 1, "the port's own balancing: {here:?}");
    let there = of_one_user(mesh, 8, rest, &[])?;
    ensure!(different(&there).len() == 2, "another port has that of all: {there:?}");
    // Blocks that a port does not write are not those of all: nothing is ejected here.
    let name = here.first().context("a name")?.as_str();
    mesh.web[name].behave(503);
    let statuses: Vec<u16> = (0..4).map(|_| Ok(mesh.call(&["-H", "x-user: ann", own])?.status)).collect::<anyhow::Result<_>>()?;
    mesh.web[name].behave(0);
    ensure!(statuses == [503; 4], "{statuses:?}");
    Ok(())
}

pub(crate) fn a_subset_has_settings_of_its_own(mesh: &mut Mesh) -> anyhow::Result<()> {
    let by_user = "loadBalancer: { consistentHash: { httpHeaderName: x-user } }";
    let _rules = mesh.objects(
        "subset",
        &format!(
            "apiVersion: networking.istio.io/v1\nkind: DestinationRule\nmetadata: {{ name: span, namespace: t }}\nspec:\n  host: '*.t.svc.cluster.local'\n  trafficPolicy: {{ {by_user} }}\n  subsets:\n  - {{ name: all, labels: {{ span: both }}, trafficPolicy: {{ loadBalancer: {{ simple: ROUND_ROBIN }} }} }}\n  - {{ name: same, labels: {{ span: both }} }}\n---\napiVersion: networking.istio.io/v1\nkind: VirtualService\nmetadata: {{ name: span, namespace: t }}\nspec:\n  hosts: [ span ]\n  http:\n  - match: [ {{ headers: {{ x-subset: {{ exact: all }} }} }} ]\n    route: [ {{ destination: {{ host: span, subset: all }} }} ]\n  - match: [ {{ headers: {{ x-subset: {{ exact: same }} }} }} ]\n    route: [ {{ destination: {{ host: span, subset: same }} }} ]\n  - route: [ {{ destination: {{ host: span }} }} ]\n"
        ),
    )?;
    let url = format!("http://{SPAN}/");
    for (subset, reached) in [("none", 1), ("same", 1), ("all", 2)] {
        let got = of_one_user(mesh, 8, &url, &["-H", &format!("x-subset: {subset}")])?;
        ensure!(different(&got).len() == reached, "subset {subset}: {got:?}");
    }
    Ok(())
}

pub(crate) fn hashing_by_query_keeps_a_value_where_it_is(mesh: &mut Mesh) -> anyhow::Result<()> {
    let _policy =
        mesh.objects("query", &policy("web", "    loadBalancer: { consistentHash: { httpQueryParameterName: user } }\n"))?;
    let by_user = |user: String, n: usize| vec![format!("http://{WEB}/?n={n}&user={user}&m={n}")];
    for user in ["ann", "bob"] {
        let of_one = names(mesh, 6, |n| by_user(user.to_owned(), n))?;
        ensure!(different(&of_one).len() == 1, "{user} {of_one:?}");
    }
    let of_many = names(mesh, 16, |n| by_user(format!("user-{n}"), 0))?;
    ensure!(different(&of_many).len() == 2, "{of_many:?}");
    let without = names(mesh, 16, |n| vec![format!("http://{WEB}/?users=ann&n={n}")])?;
    ensure!(different(&without).len() == 2, "nothing to hash: {without:?}");
    Ok(())
}

pub(crate) fn tls_is_originated_with_certificates_of_a_secret(mesh: &mut Mesh) -> anyhow::Result<()> {
    let own = OwnCert::of(&["secure.example"])?;
    let client = OwnCert::of(&["client.example"])?;
    let tls = |fields: &str| policy("secure", &format!("    tls: {{ {fields} }}\n"));
    let secret = |entries: &[(&str, &str)]| {
        let indent = |(key, pem): &(&str, &str)| format!("  {key}: |\n    {}\n", pem.trim_end().replace('\n', "\n    "));
        let data: String = entries.iter().map(indent).collect();
        format!("---\napiVersion: v1\nkind: Secret\nmetadata: {{ name: outside-tls, namespace: t }}\nstringData:\n{data}")
    };
    let call = |path: &str| mesh.call(&[&format!("http://{SECURE}{path}")]);
    let told = |path: &str| -> anyhow::Result<Value> {
        let got = call(path)?;
        serde_json::from_str(&got.body).with_context(|| format!("{got:?}"))
    };
    {
        let _server = TlsWeb::start(mesh.pod("web1"), SECURE_PORT, &own, None)?;
        // Nobody vouches for this server, and it has another name.
        let _tls = mesh.objects("tls", &tls("mode: SIMPLE, sni: other.example, insecureSkipVerify: true"))?;
        let told = told("/skip")?;
        ensure!(told["sni"] == "other.example" && told["client"] == false, "{told}");
    }
    {
        let _server = TlsWeb::start(mesh.pod("web1"), SECURE_PORT, &own, None)?;
        let simple = tls("mode: SIMPLE, sni: secure.example, credentialName: outside-tls");
        let _tls = mesh.objects("tls", &simple)?;
        let got = call("/no-secret")?;
        ensure!(got.status == 503 && got.body.contains("remote connection failure"), "no Secret, no trust: {got:?}");
        {
            let _secret = mesh.objects("tls-secret", &secret(&[("ca.crt", &own.cert)]))?;
            ensure!(told("/simple")?["client"] == false);
        }
        for (lists, status) in [(own.list(false)?, 200), (own.list(true)?, 503), ("no list\n".to_owned(), 503)] {
            let _secret = mesh.objects("tls-secret", &secret(&[("ca.crt", &own.cert), ("ca.crl", &lists)]))?;
            let got = call("/listed")?;
            ensure!(got.status == status, "{lists}: {got:?}");
        }
    }
    let _server = TlsWeb::start(mesh.pod("web1"), SECURE_PORT, &own, Some(&client))?;
    let _tls = mesh.objects("tls", &tls("mode: MUTUAL, sni: secure.example, credentialName: outside-tls"))?;
    {
        let pair = [("ca.crt", own.cert.as_str()), ("tls.crt", &client.cert), ("tls.key", &client.key)];
        let _secret = mesh.objects("tls-secret", &secret(&pair))?;
        ensure!(told("/mutual")?["client"] == true);
    }
    // The names that Secrets for gateways have.
    let pair = [("cacert", own.cert.as_str()), ("cert", &client.cert), ("key", &client.key)];
    let _secret = mesh.objects("tls-secret", &secret(&pair))?;
    ensure!(told("/mutual")?["client"] == true);
    Ok(())
}

/// Limits that are seen on connections and retries.
pub(crate) fn limits_of_connections_and_retries_hold(mesh: &mut Mesh) -> anyhow::Result<()> {
    let url = format!("http://{RUDE}/");
    let serve = |status: u16, wait: Duration| {
        Rude::start(mesh.pod("web1"), RUDE_PORT, move |_, stream| {
            std::thread::sleep(wait);
            write!(stream, "HTTP/1.1 {status} x\r\ncontent-length: 2\r\n\r\nok")
        })
    };
    let told = |pool: &str| mesh.objects("limits", &policy("rude", &format!("    connectionPool: {pool}\n")));
    {
        let (server, _policy) = (serve(200, Duration::ZERO)?, told("{ http: { maxRequestsPerConnection: 1 } }")?);
        for _ in 0..4 {
            ensure!(mesh.call(&[&url])?.status == 200);
        }
        ensure!(server.seen().len() == 4, "one request each: {}", server.text());
    }
    {
        let (server, _policy) = (serve(200, Duration::ZERO)?, told("{ http: { idleTimeout: 500ms } }")?);
        ensure!(mesh.call(&[&url])?.status == 200);
        std::thread::sleep(Duration::from_millis(1500));
        ensure!(mesh.call(&[&url])?.status == 200);
        ensure!(server.seen().len() == 2, "an idle connection is ended: {}", server.text());
    }
    {
        let retries = "apiVersion: networking.istio.io/v1\nkind: VirtualService\nmetadata: { name: rude, namespace: t }\nspec:\n  hosts: [ rude ]\n  http:\n  - retries: { attempts: 1, retryOn: '503' }\n    route: [ { destination: { host: rude } } ]\n";
        let _retries = mesh.objects("retries", retries)?;
        let (server, _policy) = (serve(503, Duration::from_millis(700))?, told("{ http: { maxRetries: 1 } }")?);
        std::thread::scope(|scope| {
            let calls = [(); 4].map(|()| scope.spawn(|| mesh.call(&[&url]).map(|got| got.status)));
            calls.into_iter().try_for_each(|call| {
                let status = call.join().map_err(|_panic| anyhow::anyhow!("a call panicked"))??;
                ensure!(status == 503, "{status}");
                Ok(())
            })
        })?;
        let requests = server.text().matches("GET / ").count();
        ensure!((5..8).contains(&requests), "one retry at a time of four: {requests} requests");
    }
    Ok(())
}

/// An endpoint that says nothing to a connect is given up after the policy's time.
pub(crate) fn a_connect_takes_no_longer_than_told(mesh: &mut Mesh) -> anyhow::Result<()> {
    let [a, b, c, _] = mesh.topology.host("outside").v4.octets();
    // On the network between the nodes; nobody has it.
    let _entry = mesh.objects("outside", &OUTSIDE.replace("ADDRESS", &format!("{a}.{b}.{c}.250")))?;
    mesh.proxy("node-a").wait_config("the service", |dump| dump["services"].to_string().contains("10.96.1.1"))?;
    let _policy = mesh.objects(
        "connect",
        "apiVersion: networking.istio.io/v1\nkind: DestinationRule\nmetadata: { name: ext, namespace: t }\nspec:\n  host: ext.example\n  trafficPolicy: { connectionPool: { tcp: { connectTimeout: 200ms } } }\n",
    )?;
    let begun = Instant::now();
    let got = mesh.call(&["-H", "host: ext.example", "http://10.96.1.1/nobody"])?;
    ensure!(got.status == 503 && got.body.contains("connection timeout"), "{got:?}");
    // Istio's two retries included: without the limit it would be seconds each.
    ensure!(begun.elapsed() < Duration::from_secs(3), "{:?}", begun.elapsed());
    Ok(())
}

/// Endpoints of other regions, and the client's own choice among those of one service.
pub(crate) fn regions_fail_over_as_told(mesh: &mut Mesh) -> anyhow::Result<()> {
    let (outside, other) = (mesh.topology.host("outside").clone(), mesh.pod("wp2").clone());
    let _servers = [Web::start(&outside, PORT)?, Web::start(&other, PORT)?];
    let endpoints = format!(
        "{{ address: {}, locality: region-2/zone-1 }}, {{ address: {}, locality: region-3/zone-1 }}",
        outside.v4, other.v4
    );
    let yaml = OUTSIDE.replace("{ address: ADDRESS }", &endpoints);
    let entry = mesh.objects("outside", &yaml)?;
    mesh.proxy("node-a").wait_config("the service", |dump| dump["services"].to_string().contains("10.96.1.1"))?;
    let rule = |policy: &str| {
        mesh.objects(
            "regions",
            &format!(
                "apiVersion: networking.istio.io/v1\nkind: DestinationRule\nmetadata: {{ name: ext, namespace: t }}\nspec:\n  host: ext.example\n  trafficPolicy: {{ {policy} }}\n"
            ),
        )
    };
    let reached = || -> anyhow::Result<BTreeSet<String>> {
        let all = names(mesh, 12, |_| ["-H", "host: ext.example", "http://10.96.1.1/"].map(str::to_owned).to_vec())?;
        Ok(all.into_iter().collect())
    };
    let only = |name: &str| BTreeSet::from([name.to_owned()]);
    for (to, name) in [("region-2", "outside"), ("region-3", "wp2")] {
        let settings = format!("localityLbSetting: {{ failover: [ {{ from: region-1, to: {to} }} ] }}");
        let _rule = rule(&format!("loadBalancer: {{ {settings} }}, outlierDetection: {{ interval: 10s }}"))?;
        let got = reached()?;
        ensure!(got == only(name), "from our region to {to}: {got:?}");
    }
    {
        let settings = "localityLbSetting: { enabled: false, failover: [ { from: region-1, to: region-3 } ] }";
        let _rule = rule(&format!("loadBalancer: {{ {settings} }}, outlierDetection: {{ interval: 10s }}"))?;
        let got = reached()?;
        ensure!(got.len() == 2, "localities do not matter: {got:?}");
    }
    // A service that has the address of one of its endpoints: with PASSTHROUGH that one is meant.
    drop(entry);
    let own = yaml
        .replace("10.96.1.1", &outside.v4.to_string())
        .replace("number: 80, name: http, protocol: HTTP, targetPort: 8080", "number: 8080, name: http, protocol: HTTP");
    let _entry = mesh.objects("outside", &own)?;
    let _rule = rule("loadBalancer: { simple: PASSTHROUGH }")?;
    let url = format!("http://{}:{PORT}/", outside.v4);
    let calls = |count| names(mesh, count, |_| ["-H", "host: ext.example", &url].map(str::to_owned).to_vec());
    wait::until_true("the service", || calls(1).is_ok())?;
    let got = calls(6)?;
    ensure!(different(&got) == BTreeSet::from(["outside"]), "{got:?}");
    Ok(())
}
