//! The admin pages of a running process: one HTTP request, one answer.
//!
//! Upstream: the commands. Downstream: port 15000 of an agent or waypoint, which listens on loopback only.
use anyhow::{Context, Result, bail};
use serde_json::Value;
use std::io::{Read, Write};
use std::net::{TcpStream, ToSocketAddrs};
use std::time::Duration;

/// Where a process listens when nothing else is said.
pub const DEFAULT: &str = "127.0.0.1:15000";
/// How long a process may take to be reached, and then to say something. A dump of a large mesh takes seconds.
const CONNECT: Duration = Duration::from_secs(5);
const READ: Duration = Duration::from_mins(1);
/// Largest answer: a dump of a hundred thousand workloads is some hundred MiB.
const MAX: u64 = 2 << 30;

/// Reads a page as JSON.
pub fn get(addr: &str, path: &str) -> Result<Value> {
    ask(addr, "GET", path, "")
}
/// Posts JSON and reads the answer as JSON.
pub fn post(addr: &str, path: &str, body: &str) -> Result<Value> {
    ask(addr, "POST", path, body)
}

fn ask(addr: &str, method: &str, path: &str, body: &str) -> Result<Value> {
    let whole = if addr.contains(':') { addr.to_owned() } else { format!("{addr}:15000") };
    let (status, text) = exchange(&whole, method, path, body)
        .with_context(|| format!("cannot ask {whole}{path} (is the process running, and is this its admin address?)"))?;
    if status == 422 {
        // The process understood, and has no answer: its own words.
        bail!("{}", text.trim());
    }
    if status != 200 {
        bail!("{whole}{path} answers {status}: {}", text.trim());
    }
    serde_json::from_str(&text).with_context(|| format!("{whole}{path} does not answer with JSON"))
}

fn exchange(addr: &str, method: &str, path: &str, body: &str) -> Result<(u16, String)> {
    let at = addr.to_socket_addrs()?.next().context("the name has no address")?;
    let mut stream = TcpStream::connect_timeout(&at, CONNECT)?;
    stream.set_read_timeout(Some(READ))?;
    // HTTP/1.0: the answer ends with the connection and is not chunked.
    write!(stream, "{method} {path} HTTP/1.0\r\nHost: {addr}\r\nContent-Length: {}\r\n\r\n{body}", body.len())?;
    let mut answer = Vec::new();
    stream.take(MAX).read_to_end(&mut answer)?;
    let answer = String::from_utf8(answer).context("the answer is not text")?;
    let (head, body) = answer.split_once("\r\n\r\n").context("the answer is not HTTP")?;
    let status = head.split(' ').nth(1).and_then(|s| s.parse().ok()).context("the answer has no status")?;
    Ok((status, body.to_owned()))
}
