//! CUSTOM policies: external authorizers, asked by HTTP and by gRPC.
use std::io::{Read, Write};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use mesh_proto::Message as _;
use mesh_proto::envoy::config::core::v3::{HeaderValue, HeaderValueOption, QueryParameter};
use mesh_proto::envoy::service::auth::v3::check_response::HttpResponse;
use mesh_proto::envoy::service::auth::v3::{CheckRequest, CheckResponse, DeniedHttpResponse, HttpStatus, OkHttpResponse};
use mesh_proto::google::rpc::Status;
use mesh_tests::grpc::Grpc;
use mesh_tests::wait;

use crate::bytes::{upgraded, vip};
use crate::mesh::{GRPC_PORT, MORE, Mesh, WEB};
use crate::policy::{Heard, closed, hear, line, of_web, refused};

/// Asks `ext` about everything but `/open`.
const CUSTOM: &str = "action: CUSTOM, provider: { name: ext }, rules: [{ to: [{ operation: { notPaths: [/open] } }] }]";

/// MeshConfig with the provider `ext`, and its service.
fn mesh_config(provider: &str) -> String {
    format!(
        "apiVersion: v1\nkind: Service\nmetadata: {{ name: ext, namespace: t }}\nspec:\n  selector: {{ version: v1 }}\n  clusterIP: 10.96.0.31\n  ports:\n  - {{ name: http, port: 8000, targetPort: {MORE}, protocol: TCP }}\n  - {{ name: grpc, port: 9000, targetPort: {GRPC_PORT}, protocol: TCP }}\n---\napiVersion: v1\nkind: ConfigMap\nmetadata: {{ name: istio, namespace: istio-system }}\ndata:\n  mesh: |\n    accessLogFile: /dev/stdout\n    extensionProviders:\n    - {{ name: ext, {provider} }}\n"
    )
}
fn by_grpc(more: &str) -> String {
    mesh_config(&format!("envoyExtAuthzGrpc: {{ service: ext.t.svc.cluster.local, port: 9000, timeout: 2s{more} }}"))
}

/// An authorizer: agrees with paths that begin with `/check/allow`, and keeps what it was asked.
fn authorizer(mesh: &Mesh) -> anyhow::Result<Heard> {
    let (tell, pieces) = channel();
    let open = Arc::new(AtomicBool::new(true));
    let place = mesh.pod("web1");
    let listener = place.netns.listen((place.v4, MORE).into())?;
    listener.set_nonblocking(true)?;
    let still = Arc::clone(&open);
    let listening = thread::spawn(move || {
        while still.load(Ordering::Relaxed) {
            let Ok((mut stream, _)) = listener.accept() else {
                thread::sleep(Duration::from_millis(5));
                continue;
            };
            let _ = stream.set_nonblocking(false);
            let _ = stream.set_read_timeout(Some(Duration::from_secs(5)));
            let mut seen = Vec::new();
            let mut piece = [0; 4096];
            while !seen.ends_with(b"\r\n\r\n") && !seen.ends_with(b"body") {
                match stream.read(&mut piece) {
                    Ok(n @ 1..) => seen.extend_from_slice(&piece[..n]),
                    _ => break,
                }
            }
            let agrees = seen.windows(12).any(|w| w == b"/check/allow");
            let answer: &[u8] = if agrees {
                b"HTTP/1.1 200 OK\r\nx-user: joe\r\nx-other: 1\r\nx-told: yes\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"
            } else {
                b"HTTP/1.1 401 Unauthorized\r\nwww-authenticate: Basic\r\nx-other: 1\r\ncontent-length: 2\r\nconnection: close\r\n\r\nno"
            };
            let _ = stream.write_all(answer);
            let _ = tell.send(seen);
        }
    });
    Ok(Heard { pieces, open, listening: vec![listening] })
}

pub(crate) fn over_http(mesh: &mut Mesh) -> anyhow::Result<()> {
    let limit = Duration::from_secs(5);
    let url = |path: &str| format!("http://{WEB}{path}");
    let _custom = of_web(mesh, "custom", CUSTOM)?;
    refused(&mesh.call(&[&url("/allow")])?, "no_authorizer")?;
    ensure!(mesh.call(&[&url("/open")])?.status == 200, "nobody need be asked");
    let config = |more: &str| {
        mesh_config(&format!(
            "envoyExtAuthzHttp: {{ service: ext.t.svc.cluster.local, port: 8000, pathPrefix: /check, timeout: 2s, includeRequestHeadersInCheck: [x-shown], headersToUpstreamOnAllow: [x-user], headersToDownstreamOnAllow: [x-told], headersToDownstreamOnDeny: [x-why]{more} }}"
        ))
    };
    {
        let _config = mesh.objects("mesh-config", &config(""))?;
        let heard = authorizer(mesh)?;
        let got = mesh.call(&[
            "-H",
            "authorization: t",
            "-H",
            "x-shown: a",
            "-H",
            "x-hidden: b",
            "-H",
            "x-user: root",
            &url("/allow?q=1"),
        ])?;
        ensure!(got.status == 200 && got.header("x-told") == Some("yes") && got.header("x-other").is_none(), "{got:?}");
        let echo = got.echo()?;
        ensure!(echo["headers"]["x-user"] == "joe" && echo["headers"]["x-other"].is_null(), "{echo}");
        let asked = String::from_utf8(heard.pieces.recv_timeout(limit)?)?.to_lowercase();
        ensure!(asked.starts_with("get /check/allow?q=1 http/1.1"), "{asked}");
        ensure!(asked.contains("authorization: t") && asked.contains("x-shown: a") && !asked.contains("x-hidden"), "{asked}");
        let mark = mesh.proxy("wp").mark();
        let got = mesh.call(&[&url("/deny")])?;
        ensure!(got.status == 401 && got.body == "no" && got.header("x-culvert-reason") == Some("authorizer_denied"), "{got:?}");
        ensure!(got.header("www-authenticate") == Some("Basic") && got.header("x-other").is_none(), "{got:?}");
        let line = line(mesh, mark, "/deny")?;
        ensure!(line["response_flags"] == "UAEX" && line["response_code_details"] == "ext_authz_denied", "{line}");
    }
    {
        let _config = mesh.objects("mesh-config", &config(", statusOnError: '503'"))?;
        let got = mesh.call(&[&url("/allow")])?;
        ensure!(got.status == 503 && got.header("x-culvert-reason") == Some("no_authorizer"), "nobody answers: {got:?}");
    }
    {
        let _config = mesh.objects("mesh-config", &config(", failOpen: true"))?;
        ensure!(mesh.call(&[&url("/deny")])?.status == 200, "said to pass without an answer");
    }
    {
        let body = ", includeRequestBodyInCheck: { maxRequestBytes: 8 }";
        let _config = mesh.objects("mesh-config", &config(body))?;
        let heard = authorizer(mesh)?;
        let got = mesh.call(&["-d", "the body", &url("/allow")])?;
        ensure!(got.status == 200 && got.echo()?["body"] == "the body", "{got:?}");
        ensure!(heard.pieces.recv_timeout(limit)?.ends_with(b"the body"));
        ensure!(mesh.call(&["-d", "a larger body", &url("/allow")])?.status == 413);
    }
    Ok(())
}

/// An authorizer that speaks gRPC, and what it was asked.
struct Asked {
    questions: Receiver<CheckRequest>,
    _server: Grpc,
}
impl Asked {
    /// `answer`: what it says.
    fn start(mesh: &Mesh, answer: impl Fn(&CheckRequest) -> CheckResponse + Send + Sync + 'static) -> anyhow::Result<Self> {
        let (tell, questions) = channel();
        let tell = Mutex::new(tell);
        let server = Grpc::answering(mesh.pod("web1"), GRPC_PORT, move |path, body| {
            assert_eq!(path, "/envoy.service.auth.v3.Authorization/Check");
            let question = CheckRequest::decode(body.get(5..).unwrap_or_default()).unwrap_or_default();
            let said = answer(&question).encode_to_vec();
            if let Ok(tell) = tell.lock() {
                let _nobody_listens = tell.send(question);
            }
            let length = u32::try_from(said.len()).unwrap_or_default().to_be_bytes();
            [&[0][..], &length, &said].concat()
        })?;
        Ok(Self { questions, _server: server })
    }
    fn next(&self) -> anyhow::Result<CheckRequest> {
        self.questions.recv_timeout(Duration::from_secs(5)).context("a question")
    }
}
fn header(key: &str, value: &str) -> HeaderValueOption {
    let header = HeaderValue { key: key.into(), value: value.into(), ..HeaderValue::default() };
    HeaderValueOption { header: Some(header), ..HeaderValueOption::default() }
}
fn status(code: i32) -> Status {
    Status { code, ..Status::default() }
}
/// Agrees with `/allow`, with more to do; else refuses with 401.
fn said(question: &CheckRequest) -> CheckResponse {
    let http = question.attributes.clone().unwrap_or_default().request.and_then(|r| r.http).unwrap_or_default();
    if http.path.starts_with("/allow") {
        let ok = OkHttpResponse {
            headers: vec![header("x-user", "joe"), header("x-to", "v2")],
            headers_to_remove: vec!["x-secret".into()],
            response_headers_to_add: vec![header("x-told", "yes")],
            query_parameters_to_set: vec![QueryParameter { key: "q".into(), value: "2".into() }],
            ..OkHttpResponse::default()
        };
        return CheckResponse { status: Some(status(0)), http_response: Some(HttpResponse::OkResponse(ok)) };
    }
    let denied = DeniedHttpResponse {
        status: Some(HttpStatus { code: 401 }),
        headers: vec![header("x-why", "because"), header("content-length", "99")],
        body: "no".into(),
    };
    CheckResponse { status: Some(status(16)), http_response: Some(HttpResponse::DeniedResponse(denied)) }
}

pub(crate) fn over_grpc(mesh: &mut Mesh) -> anyhow::Result<()> {
    let url = |path: &str| format!("http://{WEB}{path}");
    let _custom = of_web(mesh, "custom", CUSTOM)?;
    let _config = mesh.objects("mesh-config", &by_grpc(""))?;
    {
        let got = mesh.call(&[&url("/allow")])?;
        ensure!(got.status == 403 && got.header("x-culvert-reason") == Some("no_authorizer"), "nobody answers: {got:?}");
    }
    let asked = Asked::start(mesh, said)?;
    let got = mesh.call(&["-H", "x-user: root", "-H", "x-secret: s", "-H", "x-a: 1", "-H", "x-a: 2", &url("/allow?q=1&r=1")])?;
    ensure!(got.status == 200 && got.header("x-told") == Some("yes"), "{got:?}");
    let echo = got.echo()?;
    ensure!(echo["headers"]["x-user"] == "joe" && echo["headers"]["x-secret"].is_null(), "{echo}");
    ensure!(echo["path"] == "/allow?r=1&q=2", "{echo}");
    let attributes = asked.next()?.attributes.context("attributes")?;
    let source = attributes.source.context("a source")?;
    ensure!(source.principal == "spiffe://test.local/ns/t/sa/client", "{source:?}");
    let client = mesh.pod("client").v4.to_string();
    ensure!(format!("{:?}", source.address).contains(&client), "the pod itself: {source:?}");
    let destination = attributes.destination.context("a destination")?;
    ensure!(destination.principal == "spiffe://test.local/ns/t/sa/wp", "{destination:?}");
    ensure!(format!("{:?}", destination.address).contains(WEB), "{destination:?}");
    let http = attributes.request.and_then(|r| r.http).context("the request")?;
    ensure!((&*http.method, &*http.path, &*http.host, &*http.scheme) == ("GET", "/allow?q=1&r=1", WEB, "http"), "{http:?}");
    ensure!(http.protocol == "HTTP/1.1" && http.size == 0 && http.body.is_empty(), "{http:?}");
    ensure!(http.headers["x-a"] == "1,2" && http.headers[":path"] == http.path && !http.id.is_empty(), "{http:?}");

    let mark = mesh.proxy("wp").mark();
    let got = mesh.call(&[&url("/deny")])?;
    ensure!(got.status == 401 && got.body == "no" && got.header("x-culvert-reason") == Some("authorizer_denied"), "{got:?}");
    ensure!(got.header("x-why") == Some("because"), "{got:?}");
    let line = line(mesh, mark, "/deny")?;
    ensure!(line["response_flags"] == "UAEX" && line["response_code_details"] == "ext_authz_denied", "{line}");
    // Whoever speaks gRPC is refused in its terms.
    let got = mesh.call(&["-H", "content-type: application/grpc", "-X", "POST", &url("/deny")])?;
    ensure!(got.status == 200 && got.header("grpc-status") == Some("16") && got.header("x-why") == Some("because"), "{got:?}");
    Ok(())
}

pub(crate) fn bodies_and_routes(mesh: &mut Mesh) -> anyhow::Result<()> {
    let url = format!("http://{WEB}/allow");
    let _custom = of_web(mesh, "custom", CUSTOM)?;
    let asked = Asked::start(mesh, said)?;
    {
        let body = ", includeRequestBodyInCheck: { maxRequestBytes: 8, allowPartialMessage: true }";
        let _config = mesh.objects("mesh-config", &by_grpc(body))?;
        for (sent, seen, partial) in [("the body", "the body", "false"), ("a larger body", "a larger", "true")] {
            let got = mesh.call(&["-H", "x-envoy-auth-partial-body: forged", "-d", sent, &url])?;
            ensure!(got.status == 200 && got.echo()?["body"] == sent, "{got:?}");
            let http = asked.next()?.attributes.and_then(|a| a.request).and_then(|r| r.http).context("the request")?;
            ensure!(http.body == seen && http.raw_body.is_empty(), "{http:?}");
            ensure!(http.headers["x-envoy-auth-partial-body"] == partial, "{http:?}");
        }
    }
    {
        let body = ", includeRequestBodyInCheck: { maxRequestBytes: 8, packAsBytes: true }";
        let _config = mesh.objects("mesh-config", &by_grpc(body))?;
        ensure!(mesh.call(&["-d", "the body", &url])?.status == 200);
        let http = asked.next()?.attributes.and_then(|a| a.request).and_then(|r| r.http).context("the request")?;
        ensure!(http.body.is_empty() && http.raw_body == "the body", "{http:?}");
        ensure!(mesh.call(&["-d", "a larger body", &url])?.status == 413);
        ensure!(asked.questions.try_recv().is_err(), "nobody was asked");
    }
    // The route is that of the client's own headers, unless it is said to be chosen again.
    let route = "apiVersion: networking.istio.io/v1\nkind: VirtualService\nmetadata: { name: web, namespace: t }\nspec:\n  hosts: [ web ]\n  http:\n  - { match: [ { headers: { x-to: { exact: v2 } } } ], directResponse: { status: 299 } }\n  - route: [ { destination: { host: web } } ]\n";
    let _routes = mesh.objects("authorizer-routes", route)?;
    for (again, want) in [("", 200), (", clearRouteCache: true", 299)] {
        let _config = mesh.objects("mesh-config", &by_grpc(again))?;
        ensure!(mesh.call(&[&url])?.status == want, "{again}");
    }
    Ok(())
}

pub(crate) fn connections_of_bytes(mesh: &mut Mesh) -> anyhow::Result<()> {
    let limit = Duration::from_secs(5);
    let _heard = hear(mesh)?;
    let open = || -> anyhow::Result<std::net::TcpStream> {
        let mut bytes = mesh.pod("client").netns.connect(vip(92), limit)?;
        bytes.set_read_timeout(Some(limit))?;
        let _may_be_refused = bytes.write_all(b"\x01abc");
        Ok(bytes)
    };
    let passes = |stream: &mut std::net::TcpStream| -> anyhow::Result<()> {
        let mut back = [0; 4];
        stream.read_exact(&mut back).context("the echo")?;
        Ok(())
    };
    let mut before = open()?;
    passes(&mut before)?;
    let mut chat = upgraded(mesh)?;
    let mark = mesh.proxy("wp").mark();
    let custom = of_web(mesh, "custom", "action: CUSTOM, provider: { name: ext }, rules: [{}]")?;
    closed(&mut before).context("nobody was asked about it")?;
    closed(&mut chat).context("nobody was asked about it")?;
    // Their lines must not be taken for those of the next.
    wait::until_true("the lines of the two", || mesh.proxy("wp").log_since(mark).matches("\"reason\":\"revoked\"").count() == 2)?;
    let refused_as = |reason: &str, details: &str, flags: &str| -> anyhow::Result<()> {
        let mark = mesh.proxy("wp").mark();
        closed(&mut open()?)?;
        let line = line(mesh, mark, details)?;
        ensure!(line["reason"] == reason && line["response_flags"] == flags, "{line}");
        Ok(())
    };
    refused_as("no_authorizer", "policy[custom]", "-")?;
    {
        let http = "envoyExtAuthzHttp: { service: ext.t.svc.cluster.local, port: 8000 }";
        let _config = mesh.objects("mesh-config", &mesh_config(http))?;
        refused_as("no_authorizer", "policy[custom]", "-").context("who speaks HTTP judges requests only")?;
    }
    {
        let _config = mesh.objects("mesh-config", &by_grpc(""))?;
        refused_as("no_authorizer", "ext_authz_error", "UAEX")?;
        let agrees = Arc::new(AtomicBool::new(false));
        let says = Arc::clone(&agrees);
        let asked = Asked::start(mesh, move |_| CheckResponse {
            status: Some(status(if says.load(Ordering::Relaxed) { 0 } else { 7 })),
            http_response: None,
        })?;
        refused_as("authorizer_denied", "ext_authz_denied", "UAEX")?;
        let attributes = asked.next()?.attributes.context("attributes")?;
        ensure!(attributes.request.is_none(), "it is no request: {attributes:?}");
        let source = attributes.source.context("a source")?;
        ensure!(source.principal == "spiffe://test.local/ns/t/sa/client", "{source:?}");
        agrees.store(true, Ordering::Relaxed);
        let mut bytes = open()?;
        passes(&mut bytes)?;
        // A further version does not cut what was asked about.
        let _else = of_web(mesh, "else", "action: DENY, rules: [{ to: [{ operation: { ports: ['91'] } }] }]")?;
        bytes.write_all(b"\x01abc")?;
        passes(&mut bytes)?;
    }
    {
        let _config = mesh.objects("mesh-config", &by_grpc(", failOpen: true"))?;
        passes(&mut open()?).context("said to pass without an answer")?;
    }
    drop(custom);
    passes(&mut open()?)
}
