//! What requests match, where they go, what is made of them.
use std::collections::BTreeMap;
use std::process::{Command, Stdio};

use anyhow::{Context as _, ensure};
use mesh_tests::wait;
use mesh_tests::web::Web;

use crate::mesh::{Mesh, OTHER, WEB};

pub(crate) fn a_call_goes_through_the_waypoint(mesh: &mut Mesh) -> anyhow::Result<()> {
    let agent = mesh.proxy("node-b");
    let got = mesh.call(&[&format!("http://{WEB}/hello?x=1")])?;
    ensure!(got.status == 200, "{got:?}");
    let echo = got.echo()?;
    let client = mesh.pod("client").v4.to_string();
    ensure!(echo["path"] == "/hello?x=1" && echo["method"] == "GET", "{echo}");
    ensure!(echo["headers"]["x-forwarded-for"] == client, "the endpoint learns the client's address: {echo}");
    ensure!(echo["headers"]["x-envoy-attempt-count"] == "1" && echo["headers"]["x-forwarded-proto"] == "http", "{echo}");
    ensure!(echo["headers"]["x-request-id"].as_str().is_some_and(|id| id.len() == 36), "{echo}");
    ensure!(got.header("server") == Some("istio-envoy") && got.header("x-envoy-upstream-service-time").is_some(), "{got:?}");
    // The endpoint's agent sees the waypoint as its peer: the connection stays, for the next request.
    let waypoint = mesh.pod("wp").v4.to_string();
    agent.wait_config("the waypoint's connection", |dump| {
        let pods = dump["workloadState"].as_object().into_iter().flatten();
        pods.flat_map(|(_, pod)| pod["connections"]["inbound"].as_array().into_iter().flatten())
            .any(|c| c["src"].as_str().is_some_and(|src| src.starts_with(&waypoint)) && c["protocol"] == "HBONE")
    })?;
    Ok(())
}

const CANARY: &str = r#"
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: { name: web, namespace: t }
spec:
  hosts: [ web ]
  http:
  - match: [ { headers: { canary: { exact: "true" } } } ]
    route: [ { destination: { host: web, subset: v2 } } ]
  - route:
    - { destination: { host: web, subset: v1 }, weight: 95 }
    - { destination: { host: web, subset: v2 }, weight: 5 }
"#;

pub(crate) fn a_canary_by_header_is_exact(mesh: &mut Mesh) -> anyhow::Result<()> {
    let _canary = mesh.objects("canary", CANARY)?;
    for _ in 0..20 {
        let got = mesh.call(&["-H", "canary: true", &format!("http://{WEB}/")])?;
        ensure!(got.echo()?["name"] == "web2", "{got:?}");
    }
    Ok(())
}

pub(crate) fn a_canary_by_weight_hits_its_share(mesh: &mut Mesh) -> anyhow::Result<()> {
    let _canary = mesh.objects("canary", CANARY)?;
    const CALLS: usize = 2000;
    let mut command = Command::new("curl");
    command.args(["-sS", "--max-time", "60", "--noproxy", "*", &format!("http://{WEB}/[1-{CALLS}]")]);
    let output = mesh.pod("client").netns.output(&mut command)?;
    let text = String::from_utf8_lossy(&output.stdout);
    let mut names: BTreeMap<String, usize> = BTreeMap::new();
    for line in text.lines() {
        let echo: serde_json::Value = serde_json::from_str(line).with_context(|| format!("not an echo: {line}"))?;
        *names.entry(echo["name"].as_str().unwrap_or_default().to_owned()).or_default() += 1;
    }
    let canary = names.get("web2").copied().unwrap_or_default();
    ensure!(names.values().sum::<usize>() == CALLS, "{names:?}");
    // 100 expected, standard deviation 9.7: five of them to either side.
    ensure!((50..=150).contains(&canary), "{names:?}");
    Ok(())
}

pub(crate) fn rewrites_redirects_and_answers(mesh: &mut Mesh) -> anyhow::Result<()> {
    let _routes = mesh.objects(
        "shapes",
        r"
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: { name: shapes, namespace: t }
spec:
  hosts: [ other ]
  http:
  - match: [ { uri: { prefix: /old } } ]
    rewrite: { uri: /new, authority: inner.example }
    headers: { request: { set: { x-tenant: zamaz } }, response: { set: { x-frame-options: DENY } } }
    route: [ { destination: { host: other } } ]
  - match: [ { uri: { exact: /moved } } ]
    redirect: { uri: /here, redirectCode: 308 }
  - match: [ { uri: { exact: /teapot } } ]
    directResponse: { status: 418, body: { string: short and stout } }
  - match: [ { uri: { exact: /bytes } } ]
    directResponse: { status: 200, body: { bytes: aGVsbG8= } }
  - match: [ { uri: { prefix: /service } } ]
    rewrite: { uriRegexRewrite: { match: '^/service/([^/]+)(/.*)$', rewrite: '\2/instance/\1' } }
    route: [ { destination: { host: other } } ]
  - { match: [ { uri: { prefix: /r/host } } ], redirect: { authority: n.example } }
  - { match: [ { uri: { prefix: /r/port } } ], redirect: { port: 8443, scheme: https, redirectCode: 307 } }
  - { match: [ { uri: { prefix: /r/asked } } ], redirect: { scheme: https, derivePort: FROM_REQUEST_PORT } }
  - { match: [ { uri: { prefix: /r/usual } } ], redirect: { authority: 'n.example:8080', derivePort: FROM_PROTOCOL_DEFAULT, redirectCode: 302 } }
  - { match: [ { uri: { exact: /no/host } } ], route: [ { destination: { host: nowhere } } ] }
  - { match: [ { uri: { exact: /no/subset } } ], route: [ { destination: { host: web, subset: v9 } } ] }
",
    )?;
    let got = mesh.call(&[&format!("http://{OTHER}/old/a?q=1")])?;
    let echo = got.echo()?;
    ensure!(echo["path"] == "/new/a?q=1" && echo["headers"]["host"] == "inner.example", "{echo}");
    ensure!(echo["headers"]["x-envoy-original-path"] == "/old/a?q=1" && echo["headers"]["x-tenant"] == "zamaz", "{echo}");
    ensure!(got.header("x-frame-options") == Some("DENY"), "{got:?}");
    let got = mesh.call(&[&format!("http://{OTHER}/moved")])?;
    ensure!(got.status == 308 && got.header("location") == Some(&format!("http://{OTHER}/here")), "{got:?}");
    let got = mesh.call(&[&format!("http://{OTHER}/teapot")])?;
    ensure!(got.status == 418 && got.body == "short and stout", "{got:?}");
    ensure!(mesh.call(&[&format!("http://{OTHER}/bytes")])?.body == "hello");
    let echo = mesh.call(&[&format!("http://{OTHER}/service/foo/v1/api?x=1")])?.echo()?;
    ensure!(echo["path"] == "/v1/api/instance/foo?x=1", "groups of a pattern: {echo}");
    ensure!(echo["headers"]["x-envoy-original-path"] == "/service/foo/v1/api?x=1", "{echo}");
    for (path, host, status, location) in [
        ("/r/host/x?q", OTHER, 301, "http://n.example/r/host/x?q"),
        ("/r/port", OTHER, 307, &format!("https://{OTHER}:8443/r/port")),
        // The port the client addressed, which is not that of the scheme any more.
        ("/r/asked", "shop.example:8080", 301, "https://shop.example:80/r/asked"),
        ("/r/usual", OTHER, 302, "http://n.example/r/usual"),
    ] {
        let got = mesh.call(&["-H", &format!("host: {host}"), &format!("http://{OTHER}{path}")])?;
        ensure!(got.status == status && got.header("location") == Some(location), "{path}: {got:?}");
    }
    let got = mesh.call(&[&format!("http://{OTHER}/no/host")])?;
    ensure!(got.status == 503 && got.body.is_empty(), "a destination that does not exist: {got:?}");
    let got = mesh.call(&[&format!("http://{OTHER}/no/subset")])?;
    ensure!(got.status == 503, "a subset that does not exist: {got:?}");
    let got = mesh.call(&[&format!("http://{OTHER}/nothing")])?;
    ensure!(got.status == 404 && got.body.is_empty(), "{got:?}");
    Ok(())
}

pub(crate) fn a_route_change_is_live_and_drops_nothing(mesh: &mut Mesh) -> anyhow::Result<()> {
    // A client that calls without pause while routes come and go.
    let mut command = Command::new("curl");
    command
        .args(["-sS", "--max-time", "60", "--noproxy", "*", "-o", "/dev/null", "-w", "%{http_code}\n"])
        .arg(format!("http://{WEB}/[1-3000]"))
        .stdout(Stdio::piped());
    let answered = || mesh.web.values().map(Web::requests).sum::<usize>();
    let before = answered();
    let mut child = mesh.pod("client").netns.spawn(&mut command)?;
    wait::until_true("the first answers", || answered() > before + 20)?;
    for n in 0..10 {
        let marked = CANARY
            .replace("weight: 95", &format!("weight: {}", 90 - n))
            .replace("weight: 5 ", &format!("weight: {} ", 10 + n))
            .replace("  - match:", &format!("  - headers: {{ response: {{ set: {{ churn: \"{n}\" }} }} }}\n    match:"));
        let _canary = mesh.objects("churn", &marked)?;
        wait::until_true("the change to be live", || {
            let got = mesh.call(&["-H", "canary: true", &format!("http://{WEB}/live")]);
            got.is_ok_and(|got| got.header("churn") == Some(&*n.to_string()))
        })?;
    }
    ensure!(child.try_wait()?.is_none(), "the client was done before the last change");
    let output = child.wait_with_output()?;
    let text = String::from_utf8_lossy(&output.stdout);
    let wrong: Vec<&str> = text.lines().filter(|line| *line != "200").collect();
    ensure!(
        wrong.is_empty() && text.lines().count() == 3000,
        "{} of {} failed: {:?}",
        wrong.len(),
        text.lines().count(),
        wrong.first()
    );
    Ok(())
}

pub(crate) fn a_broken_route_closes_its_host_only(mesh: &mut Mesh) -> anyhow::Result<()> {
    let _broken = mesh.objects(
        "broken",
        "apiVersion: networking.istio.io/v1\nkind: VirtualService\nmetadata: { name: broken, namespace: t }\nspec:\n  hosts: [ other ]\n  http:\n  - rout: []\n",
    )?;
    let got = mesh.call(&[&format!("http://{OTHER}/")])?;
    ensure!(got.status == 503 && got.header("x-culvert-reason") == Some("route_unusable"), "{got:?}");
    let got = mesh.call(&[&format!("http://{WEB}/")])?;
    ensure!(got.status == 200, "others are unaffected: {got:?}");
    wait::until("the problem in the dump", wait::PATIENCE, || {
        let dump = mesh.proxy("wp").config_dump().ok()?;
        dump["problems"].as_array()?.iter().any(|p| p.to_string().contains("rout")).then_some(())
    })
}
