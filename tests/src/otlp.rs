//! A collector of spans for pods and hosts: OTLP over gRPC, kept in memory, and silent on request.
//!
//! Reads the protobuf itself, by the numbers of OpenTelemetry's definitions, so that it knows nothing of what the product writes
//! them with. Owns: a thread with a runtime. Refuses: HTTP/1.
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Response};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

use crate::topology::Place;

/// A span as it arrived.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Span {
    /// Trace, in hexadecimal digits.
    pub trace: String,
    /// Span.
    pub span: String,
    /// The span it is part of; empty for none.
    pub parent: String,
    /// Name.
    pub name: String,
    /// 2: server, 3: client.
    pub kind: u64,
    /// When it began and ended, in nanoseconds since 1970.
    pub time: (u64, u64),
    /// Tags.
    pub tags: BTreeMap<String, String>,
    /// Tags of the process.
    pub resource: BTreeMap<String, String>,
}
impl Span {
    /// A tag; empty for none.
    pub fn tag(&self, key: &str) -> &str {
        self.tags.get(key).map_or("", String::as_str)
    }
}

/// The collector. Ends when dropped.
#[derive(Debug)]
pub struct Collector {
    stop: watch::Sender<bool>,
    shared: Arc<Shared>,
}
#[derive(Debug, Default)]
struct Shared {
    spans: Mutex<Vec<Span>>,
    silent: AtomicBool,
}
impl Shared {
    fn spans(&self) -> MutexGuard<'_, Vec<Span>> {
        self.spans.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Collector {
    /// Listens in a pod or host.
    pub fn start(place: &Arc<Place>, port: u16) -> anyhow::Result<Self> {
        let listener = place.listen(port)?;
        listener.set_nonblocking(true)?;
        let (stop, mut stopped) = watch::channel(false);
        let shared = Arc::new(Shared::default());
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let to = Arc::clone(&shared);
        thread::spawn(move || {
            runtime.block_on(async {
                let Ok(listener) = TcpListener::from_std(listener) else { return };
                loop {
                    let accepted = tokio::select! {
                        accepted = listener.accept() => accepted,
                        _ = stopped.changed() => return,
                    };
                    let Ok((stream, _)) = accepted else { continue };
                    let to = Arc::clone(&to);
                    tokio::spawn(async move {
                        let _client_went = serve(stream, to).await;
                    });
                }
            });
        });
        Ok(Self { stop, shared })
    }
    /// All spans so far.
    pub fn spans(&self) -> Vec<Span> {
        self.shared.spans().clone()
    }
    /// How many there are.
    pub fn len(&self) -> usize {
        self.shared.spans().len()
    }
    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
    /// From now on batches are taken and not answered, or answered again.
    pub fn silent(&self, silent: bool) {
        self.shared.silent.store(silent, Ordering::Relaxed);
    }
}
impl Drop for Collector {
    fn drop(&mut self) {
        let _gone_already = self.stop.send(true);
    }
}

async fn serve(stream: TcpStream, to: Arc<Shared>) -> Result<(), h2::Error> {
    let mut connection = h2::server::handshake(stream).await?;
    while let Some(accepted) = connection.accept().await {
        let (request, mut respond) = accepted?;
        let to = Arc::clone(&to);
        tokio::spawn(async move {
            let path = request.uri().path().to_owned();
            let mut body = request.into_body();
            let mut all = Vec::new();
            while let Some(Ok(data)) = body.data().await {
                let _window = body.flow_control().release_capacity(data.len());
                all.extend_from_slice(&data);
            }
            if to.silent.load(Ordering::Relaxed) {
                return std::future::pending().await;
            }
            let known = path == "/opentelemetry.proto.collector.trace.v1.TraceService/Export";
            let read = all.get(5..).filter(|_| known).and_then(batch);
            let status = if let Some(spans) = read {
                to.spans().extend(spans);
                "0"
            } else {
                "3"
            };
            let mut head = Response::new(());
            head.headers_mut().insert("content-type", HeaderValue::from_static("application/grpc"));
            let Ok(mut send) = respond.send_response(head, false) else { return };
            // An empty answer: all were taken.
            let _client_went = send.send_data(Bytes::from_static(&[0; 5]), false);
            let mut trailers = HeaderMap::new();
            trailers.insert("grpc-status", HeaderValue::from_static(status));
            let _client_went = send.send_trailers(trailers);
        });
    }
    Ok(())
}

/// A field of a protobuf message.
enum Field<'a> {
    Number(u64),
    Bytes(&'a [u8]),
}
/// The fields of a message in order; `None` when it is none.
fn fields(mut rest: &[u8]) -> Option<Vec<(u64, Field<'_>)>> {
    let mut out = Vec::new();
    while !rest.is_empty() {
        let (key, after) = varint(rest)?;
        let (value, after) = match key & 7 {
            0 => varint(after).map(|(n, after)| (Field::Number(n), after))?,
            1 => (Field::Number(u64::from_le_bytes(after.get(..8)?.try_into().ok()?)), after.get(8..)?),
            2 => {
                let (length, after) = varint(after)?;
                let length = usize::try_from(length).ok()?;
                (Field::Bytes(after.get(..length)?), after.get(length..)?)
            }
            5 => (Field::Number(u32::from_le_bytes(after.get(..4)?.try_into().ok()?).into()), after.get(4..)?),
            _ => return None,
        };
        out.push((key >> 3, value));
        rest = after;
    }
    Some(out)
}
fn varint(bytes: &[u8]) -> Option<(u64, &[u8])> {
    let end = bytes.iter().take(10).position(|b| b & 0x80 == 0)?;
    let value = bytes[..=end].iter().rev().fold(0u64, |n, b| n << 7 | u64::from(b & 0x7f));
    Some((value, &bytes[end + 1..]))
}
/// The messages below a field.
fn below(message: &[u8], number: u64) -> Option<Vec<&[u8]>> {
    let all = fields(message)?;
    Some(
        all.into_iter()
            .filter_map(|(n, value)| match value {
                Field::Bytes(bytes) if n == number => Some(bytes),
                _ => None,
            })
            .collect(),
    )
}
fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}
fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut out, b| {
        // Writing to a String does not fail.
        let _ = write!(out, "{b:02x}");
        out
    })
}

/// `ExportTraceServiceRequest`.
fn batch(message: &[u8]) -> Option<Vec<Span>> {
    let mut out = Vec::new();
    for of_resource in below(message, 1)? {
        let mut resource = BTreeMap::new();
        for message in below(of_resource, 1)? {
            resource.extend(tags(message, 1)?);
        }
        for of_scope in below(of_resource, 2)? {
            for message in below(of_scope, 2)? {
                out.push(Span { resource: resource.clone(), ..span(message)? });
            }
        }
    }
    Some(out)
}
fn span(message: &[u8]) -> Option<Span> {
    let mut out = Span { tags: tags(message, 9)?, ..Span::default() };
    for field in fields(message)? {
        match field {
            (1, Field::Bytes(id)) => out.trace = hex(id),
            (2, Field::Bytes(id)) => out.span = hex(id),
            (4, Field::Bytes(id)) => out.parent = hex(id),
            (5, Field::Bytes(name)) => out.name = text(name),
            (6, Field::Number(kind)) => out.kind = kind,
            (7, Field::Number(time)) => out.time.0 = time,
            (8, Field::Number(time)) => out.time.1 = time,
            _ => {}
        }
    }
    Some(out)
}
/// `KeyValue`s below a field, those with text.
fn tags(message: &[u8], number: u64) -> Option<BTreeMap<String, String>> {
    let mut out = BTreeMap::new();
    for pair in below(message, number)? {
        let key = below(pair, 1)?.first().map(|key| text(key))?;
        for value in below(pair, 2)? {
            if let Some(value) = below(value, 1)?.first() {
                out.insert(key.clone(), text(value));
            }
        }
    }
    Some(out)
}
