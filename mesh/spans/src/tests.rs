//! Collectors on real sockets: one that takes what it gets, one that is not there, one that does not answer.
use super::*;
use http::{HeaderMap, HeaderName, HeaderValue, Request, Response};
use http_body_util::{BodyExt as _, Full, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use mesh_model::telemetry::tracing::Otlp;
use mesh_proto::opentelemetry::proto::collector::trace::v1::{ExportTracePartialSuccess, ExportTraceServiceResponse};
use mesh_runtime::threads::DataThreads;
use std::convert::Infallible;
use tokio::net::{TcpListener, TcpStream};

/// Requests as they arrived: head and message.
type Arrived = mpsc::UnboundedReceiver<(HeaderMap, String, ExportTraceServiceRequest)>;

/// Serves either transport; rejects one span of each batch.
async fn collector() -> (u16, Arrived) {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let port = listener.local_addr().expect("its address").port();
    let (tell, arrived) = mpsc::unbounded_channel();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let tell = tell.clone();
            let service = service_fn(move |request| answer(request, tell.clone()));
            tokio::spawn(async move {
                let server = hyper_util::server::conn::auto::Builder::new(TokioExecutor::new());
                drop(server.serve_connection(TokioIo::new(stream), service).await);
            });
        }
    });
    (port, arrived)
}
type Answer = Response<http_body_util::combinators::BoxBody<Bytes, Infallible>>;
async fn answer(
    request: Request<Incoming>,
    tell: mpsc::UnboundedSender<(HeaderMap, String, ExportTraceServiceRequest)>,
) -> Result<Answer, Infallible> {
    let (head, body) = request.into_parts();
    let bytes = body.collect().await.expect("a body").to_bytes();
    let grpc = head.headers["content-type"] == "application/grpc";
    let message = if grpc { bytes.slice(5..) } else { bytes };
    let decoded = ExportTraceServiceRequest::decode(message).expect("a batch");
    tell.send((head.headers, head.uri.path().to_owned(), decoded)).expect("somebody listens");
    let partial = ExportTracePartialSuccess { rejected_spans: 1, error_message: "too old".into() };
    let reply = ExportTraceServiceResponse { partial_success: Some(partial) }.encode_to_vec();
    if !grpc {
        return Ok(Response::new(Full::new(reply.into()).boxed()));
    }
    let mut framed = vec![0, 0, 0, 0, reply.len() as u8];
    framed.extend(reply);
    let trailers = HeaderMap::from_iter([(HeaderName::from_static("grpc-status"), HeaderValue::from_static("0"))]);
    let frames = [Frame::data(Bytes::from(framed)), Frame::trailers(trailers)].map(Ok);
    Ok(Response::new(StreamBody::new(futures_util::stream::iter(frames)).boxed()))
}

/// Straight there.
#[derive(Debug)]
struct Direct(Worker);
impl Way for Direct {
    fn worker(&self) -> &Worker {
        &self.0
    }
    fn connect<'a>(&'a self, to: &'a Collector) -> Connecting<'a> {
        Box::pin(async {
            let tcp = TcpStream::connect((&*to.host, to.port)).await.map_err(|e| e.to_string())?;
            Ok(Box::new(tcp) as Box<dyn Duplex>)
        })
    }
}

/// Held for as long as spans are to go out.
struct Running {
    spans: Spans,
    _threads: DataThreads,
}
fn process() -> Running {
    let threads = DataThreads::start(1).expect("a thread");
    let way = Arc::new(Direct(threads.pick(None).clone()));
    let spans = Spans::new(&Registry::new(), way, "wp.shop".into()).expect("a metric");
    Running { spans, _threads: threads }
}
fn to(port: u16, over: Otlp) -> Arc<Collector> {
    within(Duration::from_secs(20), port, over)
}
fn within(timeout: Duration, port: u16, over: Otlp) -> Arc<Collector> {
    Arc::new(Collector {
        host: "127.0.0.1".into(),
        namespace: None,
        port,
        over,
        timeout,
        headers: [(HeaderName::from_static("x-key"), HeaderValue::from_static("secret"))].into(),
        resource: [("deployment.environment".into(), "test".into())].into(),
    })
}
fn span(name: &str) -> Span {
    Span { name: name.to_owned(), ..Span::default() }
}
impl Running {
    fn count(&self, to: &Collector, outcome: &str) -> u64 {
        self.spans.common.outcomes.get(&[&format!("{}:{}", to.host, to.port), outcome]).get()
    }
    async fn wait(&self, to: &Collector, outcome: &str, least: u64) {
        let all = async {
            while self.count(to, outcome) < least {
                sleep(Duration::from_millis(10)).await;
            }
        };
        timeout(Duration::from_secs(30), all).await.unwrap_or_else(|_| panic!("{least} {outcome}"));
    }
}

#[tokio::test]
async fn batches_arrive_by_either_transport() {
    let process = process();
    for (over, path) in [
        (Otlp::Grpc, "/opentelemetry.proto.collector.trace.v1.TraceService/Export"),
        (Otlp::Http("/v1/traces".into()), "/v1/traces"),
    ] {
        let (port, mut arrived) = collector().await;
        let to = to(port, over);
        for round in 0..2 {
            for n in 0..3 {
                process.spans.send(&to, span(&format!("{round}-{n}")));
            }
            let (head, at, batch) = timeout(Duration::from_secs(30), arrived.recv()).await.expect("in time").expect("a batch");
            assert_eq!((&*at, &head["x-key"]), (path, &HeaderValue::from_static("secret")));
            let [of_resource] = &batch.resource_spans[..] else { panic!("{batch:?}") };
            let resource = of_resource.resource.as_ref().expect("a resource");
            let keys: Vec<&str> = resource.attributes.iter().map(|a| &*a.key).collect();
            assert_eq!(keys[0], "service.name");
            assert_eq!(resource.attributes[0], tag("service.name", "wp.shop"));
            assert!(resource.attributes.contains(&tag("deployment.environment", "test")), "{keys:?}");
            let names: Vec<&str> = of_resource.scope_spans[0].spans.iter().map(|s| &*s.name).collect();
            assert_eq!(names, [0, 1, 2].map(|n| format!("{round}-{n}")), "one batch");
            process.wait(&to, "sent", 2 * (round + 1)).await;
            assert_eq!(process.count(&to, "rejected"), round + 1);
        }
        assert_eq!((process.count(&to, "failed"), process.count(&to, "queue_full")), (0, 0));
    }
}

#[tokio::test]
async fn what_is_queued_at_the_end_still_goes_out() {
    let process = process();
    let (port, mut arrived) = collector().await;
    let to = to(port, Otlp::Grpc);
    process.spans.send(&to, span("last"));
    process.spans.close(Duration::from_secs(10)).await;
    assert_eq!(arrived.recv().await.expect("a batch").2.resource_spans[0].scope_spans[0].spans[0].name, "last");
    process.spans.send(&to, span("later"));
    assert!(process.spans.queues.load().is_empty());
}

#[tokio::test]
async fn a_collector_that_is_not_there_or_does_not_answer_loses_spans_only() {
    let process = process();
    let silent = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let gone = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let ports = [&silent, &gone].map(|l| l.local_addr().expect("its address").port());
    drop(gone);
    for port in ports {
        let to = within(Duration::from_millis(400), port, Otlp::Grpc);
        let begin = std::time::Instant::now();
        for _ in 0..5000 {
            process.spans.send(&to, span("x"));
        }
        assert!(begin.elapsed() < Duration::from_secs(10), "nobody waited");
        assert!(process.count(&to, "queue_full") >= (5000 - QUEUE - 2 * BATCH) as u64);
        process.wait(&to, "failed", BATCH as u64).await;
        assert_eq!(process.count(&to, "sent"), 0);
    }
}

#[tokio::test]
async fn collectors_nobody_mentions_are_forgotten() {
    let process = process();
    let (port, mut arrived) = collector().await;
    let [one, two] = [Otlp::Grpc, Otlp::Http("/x".into())].map(|over| to(port, over));
    process.spans.send(&one, span("one"));
    process.spans.send(&two, span("two"));
    process.spans.collect(&HashSet::from([&two]));
    assert_eq!(process.spans.queues.load().keys().collect::<Vec<_>>(), [&two]);
    for _ in 0..2 {
        timeout(Duration::from_secs(30), arrived.recv()).await.expect("both arrive").expect("a batch");
    }
}
