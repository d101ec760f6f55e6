use super::*;
use crate::http::http2_server;
use http::{Request, Response};
use http_body_util::BodyExt as _;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use std::convert::Infallible;
use std::time::Duration;
use tokio::net::{TcpListener, TcpStream};
use tokio::time::{sleep, timeout};

const PIECE: usize = 16 << 10;
const STREAMS: usize = 400;

/// Has as much as anybody takes.
struct Endless;
impl HttpBody for Endless {
    type Data = Bytes;
    type Error = BodyError;
    fn poll_frame(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        Poll::Ready(Some(Ok(Frame::data(Bytes::from_static(&[b'x'; PIECE])))))
    }
}

/// A client, connected by TCP to the server of the data path, with so many answers without end that nobody reads; and what the
/// server holds.
async fn client() -> (h2::client::SendRequest<Bytes>, Vec<h2::RecvStream>, Total) {
    let (total, listener) = (Total::default(), TcpListener::bind("127.0.0.1:0").await.unwrap());
    let (held, to) = (Arc::clone(&total), listener.local_addr().unwrap());
    tokio::spawn(async move {
        let (tcp, _) = listener.accept().await.unwrap();
        let answer = service_fn(move |request: Request<hyper::body::Incoming>| {
            let body = if request.uri().path() == "/whole" { Body::full("all") } else { Body::Boxed(Endless.boxed_unsync()) };
            let answer = Response::new(Counted::new(body, &held));
            async { Ok::<_, Infallible>(answer) }
        });
        let _client_went = http2_server().serve_connection(TokioIo::new(tcp), answer).await;
    });
    let mut builder = h2::client::Builder::new();
    // Every stream gets its own 64 KiB, so that what stops it is that nobody reads it.
    builder.initial_connection_window_size(64 << 20);
    let (requests, connection) = builder.handshake(TcpStream::connect(to).await.unwrap()).await.unwrap();
    tokio::spawn(connection);
    let mut requests = requests.ready().await.unwrap();
    let mut answers = Vec::new();
    for _ in 0..STREAMS {
        requests = requests.ready().await.unwrap();
        let (answer, _) = requests.send_request(Request::get("http://a/").body(()).unwrap(), true).unwrap();
        answers.push(answer.await.unwrap().into_body());
    }
    (requests, answers, total)
}

/// What is held once that no longer changes.
async fn settled(total: &Total) -> usize {
    let mut last = 0;
    loop {
        sleep(Duration::from_millis(200)).await;
        match total.load(Relaxed) {
            now if now == last => return now,
            now => last = now,
        }
    }
}

#[tokio::test]
async fn many_unread_answers_are_held_back_together_and_give_back_what_they_held() {
    let (requests, answers, total) = client().await;
    let held = settled(&total).await;
    assert!((STREAMS..=TOGETHER + (STREAMS + 1) * PIECE).contains(&held), "{held} bytes");
    drop(answers);
    let all_back = async {
        while total.load(Relaxed) > 0 {
            sleep(Duration::from_millis(10)).await;
        }
    };
    timeout(Duration::from_secs(20), all_back).await.expect("streams that are reset hold nothing");
    drop(requests);
}

#[tokio::test]
async fn unread_answers_go_on_in_whatever_order_they_are_read() {
    let (mut requests, mut answers, total) = client().await;
    settled(&total).await;
    let (whole, _) = requests.send_request(Request::get("http://a/whole").body(()).unwrap(), true).unwrap();
    let body = whole.await.unwrap().into_body().data().await;
    assert_eq!(body.unwrap().unwrap(), "all");
    for at in [STREAMS - 1, 0, STREAMS / 2, 1] {
        let mut left: usize = 2 << 20;
        while left > 0 {
            let data = timeout(Duration::from_secs(10), answers[at].data()).await.expect("it stands still");
            let data = data.expect("there is more").unwrap();
            answers[at].flow_control().release_capacity(data.len()).unwrap();
            left = left.saturating_sub(data.len());
        }
    }
}
