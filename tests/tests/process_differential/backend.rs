//! The endpoint behind both proxies: plays what the request itself asks for, and remembers what it was sent.
//!
//! The script is in the header `x-do` (or `x-do-<version>`, for pods of that version only): actions by attempt, separated by
//! `|`, the last one for all that follow. Words of an action: a status; `delay=MS`; `close`, `reset` (no answer); `garbage`;
//! `body=TEXT`; `size=N`; `len=N` (a length that is a lie); `chunked`; `noframe` (ended by closing); `drip=MS`;
//! `h:NAME=VALUE`; `grpc=N` (trailers-only); `gdata=N` (a message and then trailers); `refuse` (HTTP/2 REFUSED_STREAM);
//! `last` (`connection: close`); `upgrade` (101, then echo); `continue` (an interim 100 first); `badheader` (a
//! control byte in a value); `bighead=N` (a header of that size).
//!
//! It is also an authorizer that is asked over gRPC, and plays what `x-do` of the request in question says: 200 agrees, any other
//! status refuses with it; `grpc=N` is no answer. What arrived is then the question.
use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::Context as _;
use bytes::Bytes;
use http::{HeaderMap, Response};
use mesh_proto::Message as _;
use mesh_proto::envoy::config::core::v3::{HeaderValue, HeaderValueOption};
use mesh_proto::envoy::service::auth::v3::check_response::HttpResponse;
use mesh_proto::envoy::service::auth::v3::{CheckRequest, CheckResponse, DeniedHttpResponse, HttpStatus, OkHttpResponse};
use mesh_proto::google::rpc::Status;
use mesh_tests::http1::{Reader, fields};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::sleep;

/// Where an authorizer is asked over gRPC.
const CHECK: &str = "/envoy.service.auth.v3.Authorization/Check";

/// One request as it arrived.
#[derive(Clone, Debug)]
pub struct Seen {
    /// Version of the pod it arrived at.
    pub version: String,
    /// `h1` or `h2`; `grpc` for the question of an authorizer.
    pub protocol: &'static str,
    /// Method and target.
    pub line: String,
    /// Headers; the authority of HTTP/2 as `host`.
    pub headers: Vec<(String, String)>,
    /// Body.
    pub body: Vec<u8>,
    /// Whether the body came whole.
    pub whole: bool,
}

/// What all connections share.
#[derive(Debug, Default)]
pub struct Backend {
    versions: Mutex<HashMap<IpAddr, String>>,
    seen: Mutex<HashMap<String, Vec<Seen>>>,
    connections: AtomicUsize,
}

impl Backend {
    /// A backend for pods at these addresses, listening on `port` of all of 127/8.
    pub async fn start(port: u16) -> anyhow::Result<Arc<Self>> {
        let this = Arc::new(Self::default());
        let listener = TcpListener::bind(SocketAddr::from(([0, 0, 0, 0], port))).await?;
        let shared = Arc::clone(&this);
        tokio::spawn(async move {
            while let Ok((stream, _peer)) = listener.accept().await {
                let shared = Arc::clone(&shared);
                tokio::spawn(async move {
                    shared.connections.fetch_add(1, Ordering::Relaxed);
                    let _ended = shared.serve(stream).await;
                });
            }
        });
        Ok(this)
    }

    /// Adds a pod.
    pub fn pod(&self, ip: IpAddr, version: &str) {
        self.versions.lock().unwrap_or_else(PoisonError::into_inner).insert(ip, version.to_owned());
    }

    /// What arrived with this request id, in order of arrival.
    pub fn seen(&self, id: &str) -> Vec<Seen> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner).get(id).cloned().unwrap_or_default()
    }

    /// Notes a request; says which attempt it is, not counting copies for mirrors.
    fn note(&self, id: &str, seen: Seen) -> usize {
        let is_shadow = |seen: &Seen| {
            find(&seen.headers, "host").is_some_and(|host| host.split(':').next().is_some_and(|h| h.ends_with("-shadow")))
        };
        let mut all = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        let list = all.entry(id.to_owned()).or_default();
        let attempt = list.iter().filter(|one| !is_shadow(one)).count();
        list.push(seen);
        attempt
    }

    async fn serve(self: &Arc<Self>, stream: TcpStream) -> anyhow::Result<()> {
        stream.set_nodelay(true)?;
        let ip = stream.local_addr()?.ip();
        let version =
            self.versions.lock().unwrap_or_else(PoisonError::into_inner).get(&ip).cloned().unwrap_or_else(|| ip.to_string());
        let mut first = [0; 4];
        if stream.peek(&mut first).await? >= 3 && first.starts_with(b"PRI") {
            return self.serve_h2(stream, &version).await;
        }
        let mut reader = Reader::new(stream);
        while let Some(head) = reader.head().await? {
            let (line, rest) = head.split_once("\r\n").unwrap_or((&head, ""));
            let headers = fields(rest);
            let id = find(&headers, "x-case").or_else(|| find(&headers, "x-request-id")).unwrap_or_default().to_owned();
            let line = line.trim_end_matches(" HTTP/1.1").to_owned();
            let (body, whole) = reader.request_body(&headers).await;
            let script = script(&headers, &version);
            let is_head = line.starts_with("HEAD ");
            let attempt = self.note(&id, Seen { version: version.clone(), protocol: "h1", line, headers, body, whole });
            let action = Action::parse(nth(&script, attempt));
            if !play_h1(&action, &version, is_head, &mut reader).await? {
                return Ok(());
            }
        }
        Ok(())
    }

    async fn serve_h2(self: &Arc<Self>, stream: TcpStream, version: &str) -> anyhow::Result<()> {
        let mut connection = h2::server::handshake(stream).await?;
        while let Some(next) = connection.accept().await {
            let (request, respond) = next?;
            let (this, version) = (Arc::clone(self), version.to_owned());
            tokio::spawn(async move {
                let _ended = this.serve_stream(request, respond, &version).await;
            });
        }
        Ok(())
    }

    /// Answers the question of whether a request may pass.
    async fn judge(&self, body: &[u8], mut respond: h2::server::SendResponse<Bytes>, version: &str) -> anyhow::Result<()> {
        let question = CheckRequest::decode(body.get(5..).context("a gRPC message")?)?;
        let about = question.attributes.and_then(|all| all.request).and_then(|all| all.http).context("a request")?;
        let mut headers: Vec<(String, String)> = about.headers.into_iter().collect();
        for (name, value) in [("host", about.host), ("scheme", about.scheme), ("protocol", about.protocol)] {
            headers.push((format!("asked {name}"), value));
        }
        headers.push(("asked size".into(), about.size.to_string()));
        let id = find(&headers, "x-request-id").unwrap_or_default().to_owned();
        let script = script(&headers, version);
        let body = if about.raw_body.is_empty() { about.body.into_bytes() } else { about.raw_body.into() };
        let line = format!("may {} {}", about.method, about.path);
        self.note(&id, Seen { version: version.to_owned(), protocol: "grpc", line, headers, body, whole: true });
        let action = Action::parse(nth(&script, 0));
        sleep(action.delay).await;
        if action.end != Ending::Whole {
            respond.send_reset(h2::Reason::INTERNAL_ERROR);
            return Ok(());
        }
        let answer = Response::builder().header("content-type", "application/grpc");
        if let Some(status) = action.grpc {
            respond.send_response(answer.header("grpc-status", status.to_string()).body(())?, true)?;
            return Ok(());
        }
        let said = action.verdict().encode_to_vec();
        let length = u32::try_from(said.len())?.to_be_bytes();
        let mut send = respond.send_response(answer.body(())?, false)?;
        send.send_data(Bytes::from([&[0][..], &length, &said].concat()), false)?;
        let mut trailers = HeaderMap::new();
        trailers.insert("grpc-status", "0".parse()?);
        send.send_trailers(trailers)?;
        Ok(())
    }

    async fn serve_stream(
        &self,
        request: http::Request<h2::RecvStream>,
        mut respond: h2::server::SendResponse<Bytes>,
        version: &str,
    ) -> anyhow::Result<()> {
        let (parts, mut recv) = request.into_parts();
        let mut body = Vec::new();
        while let Some(data) = recv.data().await {
            let data = data?;
            recv.flow_control().release_capacity(data.len())?;
            body.extend(data);
        }
        if parts.uri.path() == CHECK {
            return self.judge(&body, respond, version).await;
        }
        let mut headers = pairs(&parts.headers);
        if let Some(authority) = parts.uri.authority() {
            headers.push(("host".into(), authority.to_string()));
        }
        let id = find(&headers, "x-case").or_else(|| find(&headers, "x-request-id")).unwrap_or_default().to_owned();
        let target = parts.uri.path_and_query().map_or("/", |target| target.as_str());
        let line = format!("{} {target}", parts.method);
        let is_head = parts.method == http::Method::HEAD;
        let script = script(&headers, version);
        let attempt = self.note(&id, Seen { version: version.to_owned(), protocol: "h2", line, headers, body, whole: true });
        let action = Action::parse(nth(&script, attempt));
        sleep(action.delay).await;
        if action.refuse {
            respond.send_reset(h2::Reason::REFUSED_STREAM);
            return Ok(());
        }
        if action.end != Ending::Whole {
            respond.send_reset(h2::Reason::INTERNAL_ERROR);
            return Ok(());
        }
        let mut answer = Response::builder().status(action.status).header("x-served-by", version);
        for (name, value) in &action.headers {
            answer = answer.header(name, value);
        }
        if let Some(status) = action.grpc {
            let answer = answer.header("content-type", "application/grpc").header("grpc-status", status.to_string()).body(())?;
            respond.send_response(answer, true)?;
            return Ok(());
        }
        if let Some(status) = action.grpc_data {
            let answer = answer.header("content-type", "application/grpc").body(())?;
            let mut send = respond.send_response(answer, false)?;
            send.send_data(Bytes::from_static(b"\0\0\0\0\x02hi"), false)?;
            let mut trailers = HeaderMap::new();
            trailers.insert("grpc-status", status.to_string().parse()?);
            send.send_trailers(trailers)?;
            return Ok(());
        }
        let body = action.body(version);
        let answer = answer.header("content-length", body.len().to_string()).body(())?;
        if is_head {
            respond.send_response(answer, true)?;
            return Ok(());
        }
        let mut send = respond.send_response(answer, false)?;
        send.send_data(Bytes::from(body), true)?;
        Ok(())
    }
}

/// All headers as text.
pub fn pairs(headers: &HeaderMap) -> Vec<(String, String)> {
    headers.iter().map(|(name, value)| (name.to_string(), String::from_utf8_lossy(value.as_bytes()).into_owned())).collect()
}

fn find<'a>(headers: &'a [(String, String)], name: &str) -> Option<&'a str> {
    headers.iter().find(|(key, _)| key.eq_ignore_ascii_case(name)).map(|(_, value)| value.as_str())
}

fn script(headers: &[(String, String)], version: &str) -> String {
    find(headers, &format!("x-do-{version}")).or_else(|| find(headers, "x-do")).unwrap_or("200").to_owned()
}

fn nth(script: &str, attempt: usize) -> &str {
    let actions: Vec<&str> = script.split('|').collect();
    actions[attempt.min(actions.len() - 1)]
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Ending {
    #[default]
    Whole,
    Close,
    Reset,
    Garbage,
}

#[derive(Debug, Default)]
struct Action {
    status: u16,
    delay: Duration,
    end: Ending,
    text: Option<String>,
    size: Option<usize>,
    lie: Option<usize>,
    chunked: bool,
    no_framing: bool,
    drip: Option<Duration>,
    headers: Vec<(String, String)>,
    grpc: Option<u16>,
    grpc_data: Option<u16>,
    refuse: bool,
    last: bool,
    upgrade: bool,
    interim: bool,
    bad_header: bool,
    big_head: usize,
}

impl Action {
    fn parse(text: &str) -> Self {
        let mut this = Self { status: 200, ..Self::default() };
        for word in text.split_whitespace() {
            if let Some(header) = word.strip_prefix("h:") {
                let (name, value) = header.split_once('=').unwrap_or((header, ""));
                this.headers.push((name.into(), value.into()));
                continue;
            }
            let (name, value) = word.split_once('=').unwrap_or((word, ""));
            let number = || value.parse::<usize>().unwrap_or_else(|_| panic!("`{word}` in a script needs a number"));
            match name {
                "delay" => this.delay = Duration::from_millis(number() as u64),
                "close" => this.end = Ending::Close,
                "reset" => this.end = Ending::Reset,
                "garbage" => this.end = Ending::Garbage,
                "body" => this.text = Some(value.into()),
                "size" => this.size = Some(number()),
                "len" => this.lie = Some(number()),
                "chunked" => this.chunked = true,
                "noframe" => this.no_framing = true,
                "drip" => this.drip = Some(Duration::from_millis(number() as u64)),
                "grpc" => this.grpc = Some(number() as u16),
                "gdata" => this.grpc_data = Some(number() as u16),
                "refuse" => this.refuse = true,
                "last" => this.last = true,
                "upgrade" => this.upgrade = true,
                "continue" => this.interim = true,
                "badheader" => this.bad_header = true,
                "bighead" => this.big_head = number(),
                status => this.status = status.parse().unwrap_or_else(|_| panic!("`{word}` in a script")),
            }
        }
        this
    }

    /// What an authorizer says.
    fn verdict(&self) -> CheckResponse {
        let header = |(key, value): &(String, String)| HeaderValueOption {
            header: Some(HeaderValue { key: key.clone(), value: value.clone(), ..HeaderValue::default() }),
            ..HeaderValueOption::default()
        };
        let headers = self.headers.iter().map(header).collect();
        let (code, said) = if self.status == 200 {
            (0, HttpResponse::OkResponse(OkHttpResponse { headers, ..OkHttpResponse::default() }))
        } else {
            let status = Some(HttpStatus { code: self.status.into() });
            let body = self.text.clone().unwrap_or_default();
            (7, HttpResponse::DeniedResponse(DeniedHttpResponse { status, headers, body }))
        };
        CheckResponse { status: Some(Status { code, ..Status::default() }), http_response: Some(said) }
    }

    fn body(&self, version: &str) -> Vec<u8> {
        match (self.size, &self.text) {
            (Some(size), _) => vec![b'x'; size],
            (None, Some(text)) => text.clone().into_bytes(),
            (None, None) => version.as_bytes().to_vec(),
        }
    }
}

/// Answers; false when the connection is over.
async fn play_h1(action: &Action, version: &str, is_head: bool, reader: &mut Reader<TcpStream>) -> anyhow::Result<bool> {
    sleep(action.delay).await;
    let stream = reader.stream();
    match action.end {
        Ending::Whole => {}
        Ending::Close => return Ok(false),
        Ending::Reset => {
            socket2::SockRef::from(&*stream).set_linger(Some(Duration::ZERO))?;
            return Ok(false);
        }
        Ending::Garbage => {
            stream.write_all(b"THIS IS NOT HTTP\r\n\r\n").await?;
            return Ok(false);
        }
    }
    if action.upgrade {
        stream.write_all(b"HTTP/1.1 101 Switching Protocols\r\nconnection: Upgrade\r\nupgrade: websocket\r\n\r\n").await?;
        let mut buffer = [0; 4096];
        loop {
            match stream.read(&mut buffer).await? {
                0 => return Ok(false),
                n => stream.write_all(&buffer[..n]).await?,
            }
        }
    }
    if action.interim {
        stream.write_all(b"HTTP/1.1 100 Continue\r\n\r\n").await?;
    }
    let body = action.body(version);
    let bodiless = matches!(action.status, 204 | 304);
    let mut head = format!("HTTP/1.1 {} {}\r\nx-served-by: {version}\r\n", action.status, reason(action.status));
    for (name, value) in &action.headers {
        head += &format!("{name}: {value}\r\n");
    }
    if let Some(status) = action.grpc {
        head += &format!("content-type: application/grpc\r\ngrpc-status: {status}\r\n");
    }
    if action.bad_header {
        head += "x-bad: a\u{1}b\r\n";
    }
    if action.big_head > 0 {
        head += &format!("x-big: {}\r\n", "b".repeat(action.big_head));
    }
    if action.last {
        head += "connection: close\r\n";
    }
    if action.chunked {
        head += "transfer-encoding: chunked\r\n";
    } else if !action.no_framing && !bodiless {
        head += &format!("content-length: {}\r\n", action.lie.unwrap_or(body.len()));
    }
    head += "\r\n";
    stream.write_all(head.as_bytes()).await?;
    if is_head || bodiless {
        return Ok(!action.last);
    }
    let pieces: Vec<&[u8]> = if action.drip.is_some() { body.chunks(1).collect() } else { vec![&body] };
    for piece in pieces {
        if action.chunked {
            stream.write_all(format!("{:x}\r\n", piece.len()).as_bytes()).await?;
        }
        stream.write_all(piece).await?;
        if action.chunked {
            stream.write_all(b"\r\n").await?;
        }
        if let Some(pause) = action.drip {
            sleep(pause).await;
        }
    }
    if action.chunked {
        stream.write_all(b"0\r\n\r\n").await?;
    }
    let lies = action.lie.is_some_and(|length| length != body.len());
    Ok(!(action.last || action.no_framing || lies))
}

fn reason(status: u16) -> &'static str {
    http::StatusCode::from_u16(status).ok().and_then(|status| status.canonical_reason()).unwrap_or("Unknown")
}
