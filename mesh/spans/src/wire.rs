//! One connection to a collector: OTLP over gRPC, or as protobuf over HTTP/1.1 (OTLP Specification 1.x).
use crate::Way;
use bytes::{BufMut as _, Bytes, BytesMut};
use http::header::{self, HeaderMap, HeaderValue};
use http::{Request, Response, StatusCode};
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::body::Incoming;
use hyper::client::conn::{http1, http2};
use hyper_util::rt::{TokioExecutor, TokioIo};
use mesh_model::telemetry::tracing::{Collector, Otlp};
use mesh_proto::Message as _;
use mesh_proto::opentelemetry::proto::collector::trace::v1::ExportTraceServiceResponse;
use std::fmt::Display;
use tokio::task::JoinSet;

const EXPORT: &str = "/opentelemetry.proto.collector.trace.v1.TraceService/Export";
/// Largest answer that is read.
const LARGEST: usize = 64 << 10;
const USER_AGENT: HeaderValue = HeaderValue::from_static(concat!("OTel-OTLP-Exporter-Culvert/", env!("CARGO_PKG_VERSION")));

/// A connection.
pub(super) struct Link {
    sender: Sender,
    /// What drives it; ends with it.
    _driver: JoinSet<()>,
}
enum Sender {
    Grpc(http2::SendRequest<Full<Bytes>>),
    Http(http1::SendRequest<Full<Bytes>>),
}

/// Why a batch was not taken.
pub(super) enum Failed {
    /// The connection is of no use any more.
    Broken(String),
    /// The collector said no.
    Refused(String),
}
impl Failed {
    pub fn into_words(self) -> String {
        match self {
            Self::Broken(why) | Self::Refused(why) => why,
        }
    }
}
fn broken(error: impl Display) -> Failed {
    Failed::Broken(error.to_string())
}

impl Link {
    /// Connects. On the data thread of the way.
    pub async fn open(to: &Collector, way: &dyn Way) -> Result<Self, String> {
        let grpc = to.over == Otlp::Grpc;
        let io = TokioIo::new(way.connect(to).await?);
        let mut driver = JoinSet::new();
        let sender = if grpc {
            let (sender, connection) = http2::handshake(TokioExecutor::new(), io).await.map_err(|e| e.to_string())?;
            // How it ends is seen by who sends.
            driver.spawn(async move { drop(connection.await) });
            Sender::Grpc(sender)
        } else {
            let (sender, connection) = http1::handshake(io).await.map_err(|e| e.to_string())?;
            driver.spawn(async move { drop(connection.await) });
            Sender::Http(sender)
        };
        Ok(Self { sender, _driver: driver })
    }

    /// Sends a batch; how many of its spans were rejected.
    pub async fn send(&mut self, to: &Collector, message: &Bytes) -> Result<u64, Failed> {
        let answer = match &mut self.sender {
            Sender::Grpc(sender) => {
                let request = request(to, EXPORT, "application/grpc", framed(message))?;
                sender.ready().await.map_err(broken)?;
                sender.send_request(request).await
            }
            Sender::Http(sender) => {
                let Otlp::Http(path) = &to.over else { return Err(broken("no path")) };
                let request = request(to, path, "application/x-protobuf", message.clone())?;
                sender.ready().await.map_err(broken)?;
                sender.send_request(request).await
            }
        };
        read(to, answer.map_err(broken)?).await
    }
}

fn request(to: &Collector, path: &str, content_type: &'static str, body: Bytes) -> Result<Request<Full<Bytes>>, Failed> {
    let authority = if to.host.contains(':') { format!("[{}]:{}", to.host, to.port) } else { format!("{}:{}", to.host, to.port) };
    let mut request = Request::post(path).body(Full::new(body)).map_err(broken)?;
    if to.over == Otlp::Grpc {
        *request.uri_mut() = format!("http://{authority}{path}").parse().map_err(broken)?;
        request.headers_mut().insert(header::TE, HeaderValue::from_static("trailers"));
    } else {
        request.headers_mut().insert(header::HOST, HeaderValue::try_from(authority).map_err(broken)?);
    }
    let headers = request.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(content_type));
    headers.insert(header::USER_AGENT, USER_AGENT);
    for (name, value) in &to.headers {
        headers.insert(name.clone(), value.clone());
    }
    Ok(request)
}

/// A message of gRPC: not compressed, its length, itself.
fn framed(message: &Bytes) -> Bytes {
    let mut out = BytesMut::with_capacity(5 + message.len());
    out.put_u8(0);
    // Far below 4 GiB: a batch is bounded.
    out.put_u32(message.len() as u32);
    out.extend_from_slice(message);
    out.freeze()
}

async fn read(to: &Collector, answer: Response<Incoming>) -> Result<u64, Failed> {
    let (head, body) = answer.into_parts();
    let body = Limited::new(body, LARGEST).collect().await.map_err(broken)?;
    let trailers = body.trailers().cloned().unwrap_or_default();
    let bytes = body.to_bytes();
    if head.status != StatusCode::OK {
        return Err(Failed::Refused(format!("answered {}", head.status)));
    }
    let message = match to.over {
        Otlp::Http(_) => &bytes[..],
        Otlp::Grpc => {
            let all = [&head.headers, &trailers];
            let text = |name: &str| all.iter().find_map(|h: &&HeaderMap| h.get(name)?.to_str().ok()).unwrap_or_default();
            if text("grpc-status") != "0" {
                return Err(Failed::Refused(format!("grpc-status {}: {}", text("grpc-status"), text("grpc-message"))));
            }
            bytes.get(5..).unwrap_or_default()
        }
    };
    // What cannot be read says nothing of the spans, which were taken.
    let partial = ExportTraceServiceResponse::decode(message).unwrap_or_default().partial_success;
    Ok(partial.map_or(0, |p| u64::try_from(p.rejected_spans).unwrap_or(0)))
}
