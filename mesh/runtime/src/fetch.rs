//! One document over HTTPS: a GET on a connection of its own, for those who fetch seldom.
//!
//! Owns the connection. Refuses redirects (whom one leads to proved nothing), documents beyond a size, and what is no text. Who is
//! believed at the other end is the caller's. Downstream: the federation of identities.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use http::{Request, StatusCode, header};
use http_body_util::{BodyExt as _, Empty, Limited};
use hyper::body::Bytes;
use hyper_util::rt::TokioIo;
use rustls::ClientConfig;
use rustls::pki_types::ServerName;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

/// Limit for all of it.
const LIMIT: Duration = Duration::from_secs(30);
/// The largest document.
const LARGEST: usize = 1 << 20;

/// The text at `path` (with its query) of a server, who is judged by `tls`.
///
/// # Errors
/// Who it was and why there is no text, in words.
pub async fn get(host: &str, port: u16, path: &str, tls: ClientConfig) -> Result<String, String> {
    let asked = tokio::time::timeout(LIMIT, ask(host, port, path, tls)).await;
    asked.unwrap_or_else(|_| Err(format!("no answer in {LIMIT:?}"))).map_err(|why| format!("{host}: {why}"))
}

async fn ask(host: &str, port: u16, path: &str, tls: ClientConfig) -> Result<String, String> {
    let bad = |error: &dyn fmt::Display| error.to_string();
    let name = ServerName::try_from(host.to_owned()).map_err(|error| bad(&error))?;
    let tcp = TcpStream::connect((host, port)).await.map_err(|error| bad(&error))?;
    let stream = TlsConnector::from(Arc::new(tls)).connect(name, tcp).await.map_err(|error| bad(&error))?;
    let (mut requests, connection) =
        hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(|error| bad(&error))?;
    let host = if host.contains(':') { format!("[{host}]") } else { host.to_owned() };
    let request = Request::get(path)
        .header(header::HOST, if port == 443 { host } else { format!("{host}:{port}") })
        .header(header::ACCEPT, "application/json")
        .header(header::CONNECTION, "close")
        .body(Empty::<Bytes>::new())
        .map_err(|error| bad(&error))?;
    let answer = async {
        let answer = requests.send_request(request).await.map_err(|error| bad(&error))?;
        if answer.status() != StatusCode::OK {
            return Err(format!("it answers {}", answer.status()));
        }
        let body = Limited::new(answer.into_body(), LARGEST).collect().await.map_err(|error| bad(&error))?;
        String::from_utf8(body.to_bytes().into()).map_err(|_| "its answer is no text".to_owned())
    };
    tokio::pin!(answer, connection);
    // The connection may end with its last piece, before that was looked at.
    tokio::select! {
        biased;
        answer = &mut answer => return answer,
        ended = &mut connection => ended.map_err(|error| bad(&error))?,
    }
    answer.await
}
