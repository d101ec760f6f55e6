use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};
use tokio::net::TcpStream;
use tokio::sync::oneshot;

use super::*;

fn server() -> HttpServer {
    HttpServer::new("test")
        .route(Method::GET, "/hello", |_| text(StatusCode::OK, "hello\n"))
        .route(Method::POST, "/echo", |request| text(StatusCode::OK, request.body))
        .route(Method::GET, "/query", |request| json(&request.query))
        .route_async(Method::GET, "/slow", |_| async {
            tokio::time::sleep(Duration::from_secs(1)).await;
            text(StatusCode::OK, "late\n")
        })
        .route_question("/half", |n: u32| if n.is_multiple_of(2) { Ok(n / 2) } else { Err("odd") })
}

/// A connection to the server through memory.
fn pipe() -> DuplexStream {
    let (client, stream) = tokio::io::duplex(1 << 20);
    tokio::spawn(async move { server().serve_stream(stream).await });
    client
}

/// What the server says to these bytes until it closes. With a paused clock its timeouts pass at once.
async fn say(bytes: &[u8]) -> String {
    let mut client = pipe();
    client.write_all(bytes).await.unwrap();
    let mut answer = Vec::new();
    client.read_to_end(&mut answer).await.unwrap();
    String::from_utf8_lossy(&answer).into_owned()
}

async fn get(target: &str) -> String {
    say(format!("GET {target} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").as_bytes()).await
}

#[tokio::test(start_paused = true)]
async fn routes_answer() {
    let answer = get("/hello").await;
    assert!(answer.starts_with("HTTP/1.1 200 OK\r\n") && answer.ends_with("\r\n\r\nhello\n"), "{answer}");
    let answer = say(b"HEAD /hello HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").await;
    assert!(answer.contains("content-length: 6") && answer.ends_with("\r\n\r\n"), "{answer}");
    let answer = get("/query?a=1&b&c=x%20y+z%zz%f&a=2&%C3%A9=%ff").await;
    let body: BTreeMap<String, String> = serde_json::from_str(answer.split("\r\n\r\n").nth(1).unwrap()).unwrap();
    let expected = [("a", "2"), ("b", ""), ("c", "x y z%zz%f"), ("é", "\u{fffd}")];
    assert_eq!(body, expected.map(|(key, value)| (key.to_owned(), value.to_owned())).into());
    assert!(get("/slow").await.ends_with("late\n"));
}

#[tokio::test]
async fn questions_are_answered_in_json() {
    for (body, status, answer) in [("8", "200", "4"), ("7", "422", "odd"), ("\"x\"", "400", "not the JSON that is expected")] {
        let asked = format!("POST /half HTTP/1.0\r\ncontent-length: {}\r\n\r\n{body}", body.len());
        let said = say(asked.as_bytes()).await;
        assert!(said.starts_with(&format!("HTTP/1.0 {status} ")), "{said}");
        assert!(said.split("\r\n\r\n").nth(1).unwrap().starts_with(answer), "{said}");
    }
}

#[tokio::test(start_paused = true)]
async fn what_is_not_there_is_said_so() {
    assert!(get("/nothing").await.starts_with("HTTP/1.1 404 "));
    let answer = get("/echo").await;
    assert!(answer.starts_with("HTTP/1.1 405 ") && answer.contains("\r\nallow: POST\r\n"), "{answer}");
    assert!(say(b"HEAD /echo HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").await.starts_with("HTTP/1.1 405 "));
}

#[tokio::test(start_paused = true)]
async fn bodies_are_bounded() {
    let post = |length: usize| {
        let mut request = format!("POST /echo HTTP/1.1\r\nhost: x\r\ncontent-length: {length}\r\nconnection: close\r\n\r\n");
        request.push_str(&"x".repeat(length));
        request
    };
    assert!(say(post(MAX_BODY).as_bytes()).await.ends_with(&"x".repeat(MAX_BODY)));
    assert!(say(post(MAX_BODY + 1).as_bytes()).await.starts_with("HTTP/1.1 413 "));
    let announced = b"POST /echo HTTP/1.1\r\nhost: x\r\ncontent-length: 10\r\n\r\nabc";
    assert!(say(announced).await.starts_with("HTTP/1.1 408 "), "a body that does not arrive");
}

#[tokio::test(start_paused = true)]
async fn garbage_and_slowness_end_the_connection() {
    assert!(say(b"\x16\x03\x01\x02\x00\x01\x00\xfc\x03\r\n\r\n").await.starts_with("HTTP/1.1 400 "));
    let endless = [b"GET /hello HTTP/1.1\r\nx: ".as_slice(), &vec![b'a'; 2 * MAX_BODY]].concat();
    assert!(say(&endless).await.starts_with("HTTP/1.1 431 "));
    // A head that never ends, and a client that says nothing at all.
    let begun = tokio::time::Instant::now();
    let answer = say(b"GET /hello HTTP/1.1\r\nho").await;
    assert!(answer.is_empty() || answer.starts_with("HTTP/1.1 408"), "{answer}");
    assert_eq!(begun.elapsed().as_secs(), READ_TIMEOUT.as_secs());
    say(b"").await;
    assert_eq!(begun.elapsed().as_secs(), 2 * READ_TIMEOUT.as_secs());
}

async fn ask(addr: SocketAddr) -> (TcpStream, String) {
    let mut client = TcpStream::connect(addr).await.unwrap();
    client.write_all(b"GET /hello HTTP/1.1\r\nhost: x\r\n\r\n").await.unwrap();
    let mut answer = vec![0; 1024];
    let length = client.read(&mut answer).await.unwrap();
    answer.truncate(length);
    (client, String::from_utf8(answer).unwrap())
}

#[tokio::test]
async fn connections_above_the_limit_wait_their_turn() {
    let bound = server().bind(([127, 0, 0, 1], 0).into()).unwrap();
    let addr = bound.local_addr().unwrap();
    let (stop, stopped) = oneshot::channel::<()>();
    let task = tokio::spawn(bound.serve(async move {
        let _ = stopped.await;
    }));
    let mut idle = Vec::new();
    for _ in 0..MAX_CONNECTIONS {
        let (client, answer) = ask(addr).await;
        assert!(answer.ends_with("hello\n"));
        idle.push(client);
    }
    let waiting = tokio::spawn(ask(addr));
    // Give it a real chance to be served by mistake: a full exchange on another connection takes place first.
    let mut one = idle.pop().unwrap();
    one.write_all(b"GET /hello HTTP/1.1\r\nhost: x\r\n\r\n").await.unwrap();
    let mut answer = [0; 1024];
    assert!(one.read(&mut answer).await.unwrap() > 0);
    assert!(!waiting.is_finished());
    drop(one);
    assert!(waiting.await.unwrap().1.ends_with("hello\n"));
    let _ = stop.send(());
    task.await.unwrap().unwrap();
    assert!(TcpStream::connect(addr).await.is_err(), "the port is closed");
    let mut rest = Vec::new();
    idle.pop().unwrap().read_to_end(&mut rest).await.unwrap();
    assert!(rest.is_empty());
}

#[tokio::test]
async fn a_handler_that_panics_takes_only_its_connection_along() {
    let server = server().route(Method::GET, "/bad", |_| panic!("a bug in a handler"));
    let bound = server.bind(([127, 0, 0, 1], 0).into()).unwrap();
    let addr = bound.local_addr().unwrap();
    let task = tokio::spawn(bound.serve(std::future::pending()));
    let mut client = TcpStream::connect(addr).await.unwrap();
    client.write_all(b"GET /bad HTTP/1.1\r\nhost: x\r\n\r\n").await.unwrap();
    let mut rest = Vec::new();
    let _ = client.read_to_end(&mut rest).await;
    assert!(ask(addr).await.1.ends_with("hello\n"));
    task.abort();
}
