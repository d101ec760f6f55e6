//! How endpoints are used: retries, ejection, timeouts.
use std::io::Write as _;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use anyhow::ensure;
use mesh_tests::raw::Raw;
use mesh_tests::rude::Rude;
use mesh_tests::wait;
use mesh_tests::web::Web;

use crate::destinations::policy;
use crate::mesh::{Kept, Mesh, OTHER, RUDE, RUDE_PORT, WEB};
use crate::policy::{of_web, refused};

pub(crate) fn failures_are_retried_as_the_route_says(mesh: &mut Mesh) -> anyhow::Result<()> {
    // Istio's default does not retry an answered 503.
    let got = mesh.call(&[&format!("http://{OTHER}/fail/1/default")])?;
    ensure!(got.status == 503, "{got:?}");
    let _retries = mesh.objects(
        "retries",
        r#"
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: { name: retries, namespace: t }
spec:
  hosts: [ other ]
  http:
  - retries: { attempts: 3, retryOn: "503" }
    route: [ { destination: { host: other } } ]
"#,
    )?;
    let got = mesh.call(&[&format!("http://{OTHER}/fail/2/asked")])?;
    ensure!(got.status == 200 && got.echo()?["headers"]["x-envoy-attempt-count"] == "3", "{got:?}");
    // A body is sent again, whole.
    let got = mesh.call(&["-d", "the order", &format!("http://{OTHER}/fail/1/body")])?;
    ensure!(got.status == 200 && got.echo()?["body"] == "the order", "{got:?}");
    let got = mesh.call(&[&format!("http://{OTHER}/fail/9/never")])?;
    ensure!(got.status == 503, "{got:?}");
    // Where the second attempt goes: never to who failed, unless the route does not mind.
    let _draws = mesh.objects("draws", &policy("web", "    loadBalancer: { simple: RANDOM }\n"))?;
    mesh.web["web2"].behave(503);
    let _well = Afterwards(&mesh.web["web2"]);
    for (ignore, fails) in [(true, false), (false, true)] {
        let _route = mesh.objects(
            "previous",
            &format!(
                "apiVersion: networking.istio.io/v1\nkind: VirtualService\nmetadata: {{ name: previous, namespace: t }}\nspec:\n  hosts: [ web ]\n  http:\n  - retries: {{ attempts: 1, retryOn: '503', backoff: 1ms, retryIgnorePreviousHosts: {ignore} }}\n    route: [ {{ destination: {{ host: web }} }} ]\n"
            ),
        )?;
        let mut client = Kept::to(mesh, WEB)?;
        let mut failures = 0;
        // One in four fails twice: none of 60 would be one case in 30 million.
        for _ in 0..60 {
            failures += usize::from(client.get("/")?.status == 503);
        }
        ensure!((failures > 0) == fails, "retryIgnorePreviousHosts: {ignore}: {failures} failures");
    }
    Ok(())
}

pub(crate) fn mesh_config_counts_where_no_object_does(mesh: &mut Mesh) -> anyhow::Result<()> {
    let _deny = of_web(mesh, "deny", "action: DENY, rules: [{ to: [{ operation: { paths: [/refused/*] } }] }]")?;
    let fails = |name: &str| mesh.call(&[&format!("http://{OTHER}/fail/2/{name}")]);
    let twice = format!("http://{WEB}//refused/x");
    ensure!(fails("before")?.status == 503 && mesh.call(&[&twice])?.status == 200);
    let _config = mesh.objects(
        "mesh-config",
        r#"
apiVersion: v1
kind: ConfigMap
metadata: { name: istio, namespace: istio-system }
data:
  mesh: |
    accessLogFile: /dev/stdout
    defaultHttpRetryPolicy: { attempts: 2, retryOn: "503" }
    defaultTrafficPolicy: { outlierDetection: { consecutive5xxErrors: 3, baseEjectionTime: 60s, maxEjectionPercent: 100 } }
    pathNormalization: { normalization: MERGE_SLASHES }
"#,
    )?;
    let got = fails("with")?;
    ensure!(got.status == 200 && got.echo()?["headers"]["x-envoy-attempt-count"] == "3", "{got:?}");
    // Three failures in a row, of a service without a DestinationRule: its only endpoint is ejected.
    let told = |path: &str| mesh.call(&[&format!("http://{OTHER}{path}")]);
    ensure!(told("/fail/9/ejected")?.status == 503);
    let gone = told("/")?;
    ensure!(gone.status == 503 && gone.body == "no healthy upstream", "{gone:?}");
    refused(&mesh.call(&[&twice])?, "policy_denied")
}

pub(crate) fn an_early_refusal_is_retried_with_the_whole_body(mesh: &mut Mesh) -> anyhow::Result<()> {
    // Much more than is kept for another attempt, and it comes while the first one, already answered, still could read it.
    const LENGTH: usize = 300_000;
    let _retries = mesh.objects(
        "early",
        r#"
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: { name: early, namespace: t }
spec:
  hosts: [ rude ]
  http:
  - retries: { attempts: 3, retryOn: "503", backoff: 300ms }
    route: [ { destination: { host: rude } } ]
"#,
    )?;
    let server = Rude::start(mesh.pod("web1"), RUDE_PORT, |request, stream| {
        let early = request.len() < LENGTH;
        let status = if early { "503 Service Unavailable" } else { "200 OK" };
        write!(stream, "HTTP/1.1 {status}\r\ncontent-length: 0\r\n\r\n")
    })?;
    let head = format!("POST /early HTTP/1.1\r\nhost: rude\r\ncontent-length: {LENGTH}\r\n\r\n");
    let mut client = Raw::say(mesh.pod("client"), SocketAddr::new(RUDE.parse()?, 80), head.as_bytes())?;
    wait::until_true("the first attempt", || server.text().contains("/early"))?;
    client.send(format!("{}\r\n\r\n", "x".repeat(LENGTH - 4)).as_bytes())?;
    let answer = client.answer()?;
    ensure!(answer.status == 200, "{answer:?}");
    Ok(())
}

struct Afterwards<'a>(&'a Web);
impl Drop for Afterwards<'_> {
    fn drop(&mut self) {
        self.0.behave(0);
    }
}
pub(crate) fn a_breaker_opens_and_heals(mesh: &mut Mesh) -> anyhow::Result<()> {
    let _breaker = mesh.objects(
        "breaker",
        r"
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: { name: breaker, namespace: t }
spec:
  host: web.t.svc.cluster.local
  trafficPolicy:
    loadBalancer: { simple: ROUND_ROBIN }
    outlierDetection: { consecutive5xxErrors: 5, interval: 500ms, baseEjectionTime: 4s, maxEjectionPercent: 50 }
",
    )?;
    mesh.web["web2"].behave(503);
    // Whatever comes of it, the tests after this one find it well.
    let _well = Afterwards(&mesh.web["web2"]);
    let mut client = Kept::to(mesh, WEB)?;
    let mut failures = 0;
    for _ in 0..40 {
        failures += usize::from(client.get("/")?.status == 503);
    }
    ensure!((5..=8).contains(&failures), "five in a row eject: {failures} failures of 40");
    let before = mesh.web["web2"].requests();
    for _ in 0..20 {
        ensure!(client.get("/")?.status == 200, "the other one answers");
    }
    ensure!(mesh.web["web2"].requests() == before, "nothing goes to the ejected one");
    mesh.web["web2"].behave(0);
    let begun = Instant::now();
    loop {
        let got = mesh.call(&[&format!("http://{WEB}/")])?;
        ensure!(got.status == 200, "{got:?}");
        if got.echo()?["name"] == "web2" {
            break;
        }
        ensure!(begun.elapsed() < wait::PATIENCE, "web2 does not come back");
    }
    Ok(())
}

pub(crate) fn a_slow_upstream_is_timed_out(mesh: &mut Mesh) -> anyhow::Result<()> {
    let _timeout = mesh.objects(
        "timeout",
        "apiVersion: networking.istio.io/v1\nkind: VirtualService\nmetadata: { name: timeout, namespace: t }\nspec:\n  hosts: [ other ]\n  http:\n  - timeout: 1s\n    route: [ { destination: { host: other } } ]\n",
    )?;
    let begun = Instant::now();
    let got = mesh.call(&[&format!("http://{OTHER}/slow/6000")])?;
    ensure!(got.status == 504 && got.body == "upstream request timeout", "{got:?}");
    ensure!(begun.elapsed() < Duration::from_secs(5), "in time: {:?}", begun.elapsed());
    let got = mesh.call(&[&format!("http://{OTHER}/slow/1")])?;
    ensure!(got.status == 200 && got.echo()?["headers"]["x-envoy-expected-rq-timeout-ms"] == "1000", "{got:?}");
    // A call of gRPC may ask for less time, not for more, and the endpoint is told.
    let call = |path: &str, limit: &str| {
        let limit = format!("grpc-timeout: {limit}");
        mesh.call(&["-X", "POST", "-H", "content-type: application/grpc", "-H", &limit, &format!("http://{OTHER}{path}")])
    };
    for (asked, most) in [("5S", 1000), ("600m", 600), ("999999u", 1000), ("soon", 1000)] {
        let headers = call("/slow/1", asked)?.echo()?["headers"].clone();
        let told = headers["x-envoy-expected-rq-timeout-ms"].as_str().and_then(|ms| ms.parse().ok()).unwrap_or(0);
        // What was left of it when the attempt began.
        ensure!((most - 300..=most).contains(&told), "{asked}: {headers}");
        ensure!(headers["grpc-timeout"] == format!("{told}m"), "{asked}: {headers}");
    }
    let begun = Instant::now();
    let got = call("/slow/3000", "150m")?;
    ensure!(got.status == 200 && got.header("grpc-status") == Some("14"), "{got:?}");
    ensure!(got.header("grpc-message") == Some("upstream request timeout"), "{got:?}");
    ensure!(begun.elapsed() < Duration::from_millis(900), "{:?}", begun.elapsed());
    Ok(())
}

pub(crate) fn request_bodies_arrive_whole(mesh: &mut Mesh) -> anyhow::Result<()> {
    let file = mesh.logs.path().join("upload");
    let text: String = (0..200_000).map(|n| char::from(b'a' + (n % 26) as u8)).collect();
    std::fs::write(&file, &text)?;
    let data = format!("@{}", file.display());
    for more in [&[][..], &["-H", "transfer-encoding: chunked"][..]] {
        let args: Vec<&str> = more.iter().copied().chain(["--data-binary", &data]).collect();
        let url = format!("http://{WEB}/upload");
        let args: Vec<&str> = args.into_iter().chain([url.as_str()]).collect();
        let got = mesh.call(&args)?;
        ensure!(got.status == 200 && got.echo()?["body"] == text, "{} bytes came back", got.body.len());
    }
    Ok(())
}
