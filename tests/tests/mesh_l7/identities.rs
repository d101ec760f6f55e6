//! Two clients behind one waypoint and one pool of connections to the endpoint: what each sends is judged and carried as its own,
//! or not at all.
use std::net::SocketAddr;

use anyhow::{Context as _, ensure};
use mesh_tests::raw::Raw;
use mesh_tests::topology::Place;
use serde_json::Value;

use crate::binding::{canary, service, wait_canary};
use crate::frames::{self, Came};
use crate::hostile::smuggling;
use crate::mesh::Mesh;

const SHARED: &str = "10.96.2.23";
/// Each may ask for what is hers, or his.
const POLICY: &str = "apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: { name: shared, namespace: t }
spec:
  targetRefs: [ { kind: Service, group: '', name: shared } ]
  rules:
  - from: [ { source: { principals: [ test.local/ns/t/sa/client ] } } ]
    to: [ { operation: { paths: [ '/hers/*' ] } } ]
  - from: [ { source: { principals: [ test.local/ns/u/sa/far ] } } ]
    to: [ { operation: { paths: [ '/his/*' ] } } ]
";
const HER: &str = "By=spiffe://test.local/ns/t/sa/wp;URI=spiffe://test.local/ns/t/sa/client";
const HIM: &str = "By=spiffe://test.local/ns/t/sa/wp;URI=spiffe://test.local/ns/u/sa/far";
/// What he may not ask for, and says is hers.
const HIDDEN: &str = "GET /hers/smuggled HTTP/1.1\r\nhost: shared\r\nx-forwarded-client-cert: By=spiffe://test.local/ns/t/sa/wp;URI=spiffe://test.local/ns/t/sa/client\r\n\r\n";
/// What he may ask for, where it is no request.
const INNER: &str = "GET /his/inner HTTP/1.1\r\nhost: shared\r\n\r\n";

fn to() -> anyhow::Result<SocketAddr> {
    Ok(SocketAddr::new(SHARED.parse()?, 80))
}

/// A good request on a connection that stays; the endpoint must have heard it, and no other, as this caller's.
fn asks(raw: &mut Raw, path: &str, who: &str) -> anyhow::Result<()> {
    raw.send(format!("GET {path} HTTP/1.1\r\nhost: shared\r\nx-forwarded-client-cert: forged\r\n\r\n").as_bytes())?;
    let answer = raw.answer().with_context(|| path.to_owned())?;
    ensure!(answer.status == 200, "{path}: {answer:?}");
    let echo: Value = serde_json::from_str(&answer.body)?;
    ensure!(echo["path"] == path && echo["headers"]["x-forwarded-client-cert"] == who, "{path}: {echo}");
    Ok(())
}

/// What he tries, and then what she gets on a connection she had before, and on a new one.
fn then_she_asks(mesh: &Mesh, hers: &mut Raw, number: usize, what: &str) -> anyhow::Result<()> {
    asks(hers, &format!("/hers/after-{number}"), HER).with_context(|| format!("after {what:?}"))?;
    let mut fresh = Raw::open(mesh.pod("client"), to()?)?;
    asks(&mut fresh, &format!("/hers/fresh-{number}"), HER).with_context(|| format!("after {what:?}, a new connection"))?;
    for echo in ["/hers/", "/his/"].iter().flat_map(|part| mesh.web["web1"].seen(part)) {
        let path = echo["path"].as_str().unwrap_or_default();
        let who = if path.starts_with("/hers/") { HER } else { HIM };
        ensure!(echo["headers"]["x-forwarded-client-cert"] == who, "{what:?} changed who asks: {echo}");
        ensure!(!path.contains("smuggled") && !path.contains("inner"), "{what:?} smuggled a request: {echo}");
    }
    Ok(())
}

/// Bytes of HTTP/1 he sends at once, the statuses he may get, and how often the endpoint hears of it.
fn attacks() -> Vec<(&'static str, String, &'static [u16], usize)> {
    let post = |path: &str, fields: &str, body: &str| format!("POST {path} HTTP/1.1\r\nhost: shared\r\n{fields}\r\n{body}");
    let length = |body: &str| format!("content-length: {}\r\n", body.len());
    let chunked = |body: &str| format!("{:x}\r\n{body}\r\n0\r\n\r\n", body.len());
    let te = "transfer-encoding: chunked\r\n";
    vec![
        ("a second request", format!("GET $ HTTP/1.1\r\nhost: shared\r\n\r\n{HIDDEN}"), &[200, 403], 1),
        ("one behind a body", post("$", "content-length: 4\r\n", &format!("body{HIDDEN}")), &[200, 403], 1),
        ("one behind chunks", post("$", te, &format!("4\r\nbody\r\n0\r\n\r\n{HIDDEN}")), &[200, 403], 1),
        ("one behind trailers", post("$", te, &format!("0\r\nx-a: b\r\n\r\n{HIDDEN}")), &[200, 403], 1),
        ("a body that is one", post("$", &length(HIDDEN), HIDDEN), &[200], 1),
        ("a chunk that is one", post("$", te, &chunked(HIDDEN)), &[200], 1),
        ("a GET with a body that is one", format!("GET $ HTTP/1.1\r\nhost: shared\r\n{}\r\n{HIDDEN}", length(HIDDEN)), &[200], 1),
        // Refused before the body is read: what is left of it is no request either.
        ("a refused body that is one", post("/hers/refused", &length(INNER), INNER), &[403], 0),
        ("a refused chunk that is one", post("/hers/refused", te, &chunked(INNER)), &[403], 0),
        (
            "a refused body nobody asked to continue",
            post("/hers/refused", &format!("expect: 100-continue\r\n{}", length(INNER)), INNER),
            &[403],
            0,
        ),
    ]
}

type Fields<'a> = &'a [(&'a str, &'a str)];

/// Heads and bodies of HTTP/2 that would be another request in the HTTP/1 of the endpoint.
fn streams(mesh: &Mesh, hers: &mut Raw) -> anyhow::Result<()> {
    let path = "/his/x HTTP/1.1\r\nhost: shared\r\n\r\nGET /hers/smuggled";
    let value = format!("x\r\n\r\n{HIDDEN}");
    let over = "x".repeat(9);
    let cases: [(&str, &str, Fields<'_>, &str); 7] = [
        ("a length of nothing", "/his/h2", &[("content-length", "0")], HIDDEN),
        ("a length that is too short", "/his/h2", &[("content-length", "4")], HIDDEN),
        // The rest would be the next request's bytes.
        ("a length that is too long", "/his/h2", &[("content-length", "500")], &over),
        ("a coding", "/his/h2", &[("transfer-encoding", "chunked")], HIDDEN),
        ("a path of lines", path, &[], ""),
        ("a value of lines", "/his/h2", &[("x-a", &value)], ""),
        ("a name of lines", "/his/h2", &[(&value, "y")], ""),
    ];
    for (number, (what, path, more, body)) in cases.into_iter().enumerate() {
        let before = mesh.web["web1"].seen("/his/h2").len();
        let mut raw = Raw::say(mesh.pod("far"), to()?, &frames::preface())?;
        let mut fields = vec![(":method", "POST"), (":scheme", "http"), (":authority", "shared"), (":path", path)];
        fields.extend(more);
        let head = frames::frame(frames::HEADERS, frames::END_HEADERS, 1, &frames::block(&fields));
        raw.send(&[head, frames::frame(frames::DATA, frames::END_STREAM, 1, body.as_bytes())].concat())?;
        let came = frames::outcome(&mut raw, 1)?;
        ensure!(!matches!(came, Came::Status(200)), "{what}: {came:?}");
        ensure!(mesh.web["web1"].seen("/his/h2").len() == before, "{what} arrived");
        then_she_asks(mesh, hers, 2000 + number, what)?;
    }
    Ok(())
}

pub(crate) fn no_request_is_carried_under_another_identity(mesh: &mut Mesh) -> anyhow::Result<()> {
    let bound = service("t", "shared", "web1", SHARED, "istio.io/use-waypoint: canary", "") + POLICY;
    // One data thread has one pool.
    let _canary = canary(mesh, &[("CULVERT_FORWARD_CLIENT_IDENTITY", "true"), ("CULVERT_WORKER_THREADS", "1")], &bound)?;
    wait_canary(mesh, &format!("http://{SHARED}/hers/first"))?;
    let open = |pod: &str| anyhow::Ok(Raw::open(mesh.pod(pod), to()?)?);
    let (mut hers, mut his) = (open("client")?, open("far")?);
    for number in 0..20 {
        asks(&mut hers, &format!("/hers/{number}"), HER)?;
        asks(&mut his, &format!("/his/{number}"), HIM)?;
    }
    let place = mesh.pod("wp2");
    let page = mesh_tests::http::get(&place.netns, place.at(15020), "/metrics")?.body;
    let made = "envoy_cluster_upstream_cx_total{cluster_name=\"outbound|80||shared.t.svc.cluster.local\"} 1";
    ensure!(page.lines().any(|line| line == made), "both went over one connection: {:?}", {
        page.lines().filter(|line| line.contains("upstream_cx_total") && line.contains("shared")).collect::<Vec<_>>()
    });

    let he: &Place = mesh.pod("far");
    for (number, (what, bytes, statuses, arrives)) in attacks().into_iter().enumerate() {
        let path = format!("/his/attack-{number}-");
        let mut raw = Raw::say(he, to()?, bytes.replace('$', &path).as_bytes())?;
        for status in statuses {
            let answer = raw.answer().with_context(|| format!("{what}: {status}"))?;
            ensure!(answer.status == *status, "{what}: {answer:?}, not {status}");
        }
        // What comes next answers what is asked next.
        asks(&mut raw, &format!("/his/last-{number}"), HIM).with_context(|| what.to_owned())?;
        let seen = mesh.web["web1"].seen(&path).len();
        ensure!(seen == arrives, "{what}: arrived {seen} times");
        then_she_asks(mesh, &mut hers, number, what)?;
    }
    for (number, (what, bytes, _)) in smuggling().into_iter().enumerate() {
        let path = format!("/his/smuggling-{number}-");
        let raw = Raw::say(he, to()?, bytes.replace('$', &path).replace('#', HIDDEN).as_bytes())?;
        then_she_asks(mesh, &mut hers, 1000 + number, what)?;
        drop(raw);
    }
    then_she_asks(mesh, &mut hers, 1999, "all of them")?;
    streams(mesh, &mut hers)
}
