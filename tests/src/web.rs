//! A small HTTP/1.1 server for pods: says who it is and what it was asked, and misbehaves on request.
//!
//! `/status/CODE` answers that; `/fail/N/KEY` answers 503 the first N times KEY is asked for here; `/slow/MS` waits;
//! `/drop` ends the connection without an answer; `/count` tells how many requests came. Anything else is echoed as JSON.
//! [`Web::behave`] makes every answer one status. An `upgrade: websocket` is switched to and echoed, without its frames.
use std::collections::{HashMap, VecDeque};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU16, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use serde_json::{Value, json};

use crate::http::read_chunks;
use crate::topology::Place;

#[derive(Debug)]
struct State {
    name: String,
    /// Status of every answer; 0: by the path.
    status: AtomicU16,
    requests: AtomicUsize,
    failed: Mutex<HashMap<String, usize>>,
    /// The last requests, as they are echoed.
    seen: Mutex<VecDeque<Value>>,
    stop: AtomicBool,
    /// Connections by number, to break them.
    open: Mutex<HashMap<usize, TcpStream>>,
}

impl State {
    fn open(&self) -> MutexGuard<'_, HashMap<usize, TcpStream>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Requests that are remembered.
const SEEN: usize = 4096;

/// The server. Ends when dropped.
#[derive(Debug)]
pub struct Web {
    state: Arc<State>,
    listener: TcpListener,
}

impl Web {
    /// Listens in a pod, on both families.
    pub fn start(place: &Arc<Place>, port: u16) -> anyhow::Result<Self> {
        let listener = place.listen(port)?;
        let state = Arc::new(State {
            name: place.name.clone(),
            status: AtomicU16::new(0),
            requests: AtomicUsize::new(0),
            failed: Mutex::default(),
            seen: Mutex::default(),
            stop: AtomicBool::new(false),
            open: Mutex::default(),
        });
        let (shared, twin) = (Arc::clone(&state), listener.try_clone()?);
        thread::spawn(move || accept(&twin, &shared));
        Ok(Self { state, listener })
    }
    /// From now on every answer has this status; 0: by the path again.
    pub fn behave(&self, status: u16) {
        self.state.status.store(status, Ordering::Relaxed);
    }
    /// Accepts no more, and breaks every connection, whatever is on it, as a process that is killed does. In this order: whose
    /// connection breaks is refused when it comes again, and not taken by the kernel and then reset.
    pub fn die(&self) {
        self.close();
        for stream in self.state.open().values() {
            let _gone_already = stream.shutdown(Shutdown::Both);
        }
    }
    /// The kernel lets no more connections in, and the accept loop ends.
    fn close(&self) {
        self.state.stop.store(true, Ordering::SeqCst);
        let _closed_already = socket2::SockRef::from(&self.listener).shutdown(Shutdown::Both);
    }
    /// Requests so far.
    pub fn requests(&self) -> usize {
        self.state.requests.load(Ordering::Relaxed)
    }
    /// The last requests whose path contains `part`, as they were (or would have been) echoed.
    pub fn seen(&self, part: &str) -> Vec<Value> {
        let seen = self.state.seen.lock().unwrap_or_else(PoisonError::into_inner);
        seen.iter().filter(|echo| echo["path"].as_str().is_some_and(|path| path.contains(part))).cloned().collect()
    }
}
impl Drop for Web {
    fn drop(&mut self) {
        self.close();
    }
}

fn accept(listener: &TcpListener, state: &Arc<State>) {
    for (number, stream) in listener.incoming().enumerate() {
        if state.stop.load(Ordering::SeqCst) {
            return;
        }
        let Ok(stream) = stream else { continue };
        let Ok(twin) = stream.try_clone() else { continue };
        let state = Arc::clone(state);
        state.open().insert(number, twin);
        // Until it is listed nobody can break it.
        if state.stop.load(Ordering::SeqCst) {
            state.open().remove(&number);
            return;
        }
        thread::spawn(move || {
            let _client_went = serve(stream, &state);
            state.open().remove(&number);
        });
    }
}

fn serve(stream: TcpStream, state: &State) -> io::Result<()> {
    stream.set_read_timeout(Some(Duration::from_mins(1)))?;
    stream.set_nodelay(true)?;
    let peer = stream.peer_addr()?;
    let mut out = stream.try_clone()?;
    let mut reader = BufReader::new(stream);
    loop {
        let mut line = String::new();
        if reader.read_line(&mut line)? == 0 {
            return Ok(());
        }
        let mut words = line.split_whitespace();
        let (method, path) = (words.next().unwrap_or_default().to_owned(), words.next().unwrap_or_default().to_owned());
        let mut headers: Vec<(String, String)> = Vec::new();
        loop {
            line.clear();
            if reader.read_line(&mut line)? == 0 {
                return Ok(());
            }
            let Some((name, value)) = line.trim_end().split_once(':') else { break };
            headers.push((name.to_ascii_lowercase(), value.trim().to_owned()));
        }
        let header = |name: &str| headers.iter().find(|(key, _)| key == name).map(|(_, value)| value.as_str());
        let mut body = Vec::new();
        if header("transfer-encoding").is_some_and(|v| v.eq_ignore_ascii_case("chunked")) {
            read_chunks(&mut reader, &mut body)?;
        } else if let Some(length) = header("content-length").and_then(|text| text.parse::<usize>().ok()) {
            body.resize(length, 0);
            reader.read_exact(&mut body)?;
        }
        state.requests.fetch_add(1, Ordering::Relaxed);
        let echo = json!({
            "name": state.name,
            "peer": peer.ip().to_canonical().to_string(),
            "method": method,
            "path": path,
            "headers": headers.iter().cloned().collect::<HashMap<_, _>>(),
            "body": String::from_utf8_lossy(&body),
            "requests": state.requests.load(Ordering::Relaxed),
        });
        {
            let mut seen = state.seen.lock().unwrap_or_else(PoisonError::into_inner);
            if seen.len() == SEEN {
                seen.pop_front();
            }
            seen.push_back(echo.clone());
        }
        if header("upgrade") == Some("websocket") {
            out.write_all(b"HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\n")?;
            let mut piece = [0; 4096];
            loop {
                let n = reader.read(&mut piece)?;
                if n == 0 {
                    return Ok(());
                }
                out.write_all(&piece[..n])?;
            }
        }
        let Some(status) = status_for(state, &path) else { return Ok(()) };
        let echo = format!("{echo}\n");
        let end = if method == "HEAD" { "" } else { echo.as_str() };
        write!(out, "HTTP/1.1 {status} Some\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n{end}", echo.len())?;
    }
}

/// The status for a path; `None`: no answer at all.
fn status_for(state: &State, path: &str) -> Option<u16> {
    let fixed = state.status.load(Ordering::Relaxed);
    if fixed != 0 {
        return Some(fixed);
    }
    let path = path.split('?').next().unwrap_or(path);
    let mut parts = path.trim_start_matches('/').split('/');
    match (parts.next(), parts.next(), parts.next()) {
        (Some("status"), Some(code), _) => Some(code.parse().unwrap_or(400)),
        (Some("slow"), Some(ms), _) => {
            thread::sleep(Duration::from_millis(ms.parse().unwrap_or(0)));
            Some(200)
        }
        (Some("drop"), ..) => None,
        (Some("fail"), Some(times), Some(key)) => {
            let mut failed = state.failed.lock().unwrap_or_else(PoisonError::into_inner);
            let count = failed.entry(key.to_owned()).or_default();
            *count += 1;
            Some(if *count <= times.parse().unwrap_or(0) { 503 } else { 200 })
        }
        _ => Some(200),
    }
}
