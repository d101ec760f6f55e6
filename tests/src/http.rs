//! The smallest HTTP/1.1 client that can read an agent's pages: one request per connection, blocking, bounded.
//! Refuses: keep-alive, redirects, compression, bodies over 64 MiB.
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use anyhow::{Context, bail};

use crate::netns::Netns;

const LIMIT: Duration = Duration::from_secs(15);

/// Status and body.
#[derive(Clone, Debug)]
pub struct Answer {
    /// HTTP status.
    pub status: u16,
    /// Header lines, lower-cased names.
    pub headers: Vec<(String, String)>,
    /// Body as text.
    pub body: String,
}

impl Answer {
    /// The first header of this name.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(key, _)| key == name).map(|(_, value)| value.as_str())
    }
    /// Whether the connection ends with it.
    pub fn closes(&self) -> bool {
        self.header("connection").is_some_and(|value| value.eq_ignore_ascii_case("close"))
    }
}

/// GET `path` from `to`, connecting from inside `ns`.
pub fn get(ns: &Netns, to: SocketAddr, path: &str) -> anyhow::Result<Answer> {
    request(ns, to, "GET", path)
}

/// GET `path` from `to`, in the namespace this process is in.
pub fn get_here(to: SocketAddr, path: &str) -> anyhow::Result<Answer> {
    let stream = TcpStream::connect_timeout(&to, LIMIT).with_context(|| format!("connect to {to}"))?;
    exchange(stream, to, "GET", path)
}

/// Any method without a body.
pub fn request(ns: &Netns, to: SocketAddr, method: &str, path: &str) -> anyhow::Result<Answer> {
    let stream = ns.connect(to, LIMIT).with_context(|| format!("connect to {to}"))?;
    exchange(stream, to, method, path)
}

fn exchange(mut stream: TcpStream, to: SocketAddr, method: &str, path: &str) -> anyhow::Result<Answer> {
    stream.set_read_timeout(Some(LIMIT))?;
    stream.set_write_timeout(Some(LIMIT))?;
    write!(stream, "{method} {path} HTTP/1.1\r\nhost: {to}\r\nconnection: close\r\ncontent-length: 0\r\n\r\n")?;
    read_answer(&mut BufReader::new(stream.take(MOST)), method == "HEAD").with_context(|| format!("the answer to {path}"))
}

/// Largest body that is read.
const MOST: u64 = 64 << 20;

/// Reads one answer off a connection; interim answers (1xx, but not 101) are passed over. `headless`: it has no body whatever
/// it says, as the answer to HEAD.
pub fn read_answer(reader: &mut impl BufRead, headless: bool) -> anyhow::Result<Answer> {
    let mut line = String::new();
    let (status, headers) = loop {
        line.clear();
        reader.read_line(&mut line)?;
        let status: u16 =
            line.split(' ').nth(1).and_then(|code| code.trim().parse().ok()).with_context(|| format!("status line {line:?}"))?;
        let mut headers = Vec::new();
        loop {
            line.clear();
            if reader.read_line(&mut line)? == 0 {
                bail!("connection closed inside the headers of a {status}");
            }
            let Some((name, value)) = line.trim_end().split_once(':') else { break };
            headers.push((name.to_ascii_lowercase(), value.trim().to_owned()));
        }
        if status >= 200 || status == 101 {
            break (status, headers);
        }
    };
    let mut answer = Answer { status, headers, body: String::new() };
    let mut body = Vec::new();
    if headless || matches!(status, 101 | 204 | 304) {
    } else if answer.header("transfer-encoding") == Some("chunked") {
        read_chunks(reader, &mut body).context("chunks")?;
    } else if let Some(length) = answer.header("content-length").and_then(|text| text.parse::<usize>().ok()) {
        body.resize(length, 0);
        reader.read_exact(&mut body)?;
    } else {
        reader.read_to_end(&mut body)?;
    }
    answer.body = String::from_utf8_lossy(&body).into_owned();
    Ok(answer)
}

/// A chunked body, to its end.
pub(crate) fn read_chunks(reader: &mut impl BufRead, body: &mut Vec<u8>) -> io::Result<()> {
    let mut line = String::new();
    loop {
        line.clear();
        reader.read_line(&mut line)?;
        let size = usize::from_str_radix(line.trim().split(';').next().unwrap_or_default(), 16).map_err(io::Error::other)?;
        let start = body.len();
        body.resize(start + size, 0);
        reader.read_exact(&mut body[start..])?;
        line.clear();
        reader.read_line(&mut line)?;
        if size == 0 {
            return Ok(());
        }
    }
}
