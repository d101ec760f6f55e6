//! A server without manners: what it answers, down to the byte, is written by the test; what it was sent, down to the byte, can
//! be looked at.
//!
//! Owns: a listener and its threads. Refuses: to outlive its value, to wait longer than ten seconds for anything.
use std::fmt;
use std::io::Read;
use std::net::{TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use crate::topology::Place;

type Answering = dyn Fn(&str, &mut TcpStream) -> std::io::Result<()> + Send + Sync;

struct State {
    seen: Mutex<Vec<Vec<u8>>>,
    stop: AtomicBool,
    answer: Box<Answering>,
}

/// The server.
pub struct Rude {
    state: Arc<State>,
    place: Arc<Place>,
    port: u16,
}
impl fmt::Debug for Rude {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Rude").field("place", &self.place.name).field("port", &self.port).finish_non_exhaustive()
    }
}

impl Rude {
    /// Listens in a pod. Whenever the bytes of a connection end with an empty line, `answer` is called with all that came since
    /// the last time; an error from it ends the connection.
    pub fn start(
        place: &Arc<Place>,
        port: u16,
        answer: impl Fn(&str, &mut TcpStream) -> std::io::Result<()> + Send + Sync + 'static,
    ) -> anyhow::Result<Self> {
        let listener = place.listen(port)?;
        let state = Arc::new(State { seen: Mutex::default(), stop: AtomicBool::new(false), answer: Box::new(answer) });
        let shared = Arc::clone(&state);
        thread::spawn(move || accept(&listener, &shared));
        Ok(Self { state, place: Arc::clone(place), port })
    }

    /// What came so far, connection by connection.
    pub fn seen(&self) -> Vec<Vec<u8>> {
        self.state.seen.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// All of it as text, in no useful order between connections.
    pub fn text(&self) -> String {
        self.seen().iter().map(|bytes| String::from_utf8_lossy(bytes).into_owned()).collect()
    }
}

impl Drop for Rude {
    fn drop(&mut self) {
        self.state.stop.store(true, Ordering::Relaxed);
        let _wakes_the_accept_loop = self.place.netns.connect(self.place.at(self.port), Duration::from_millis(200));
    }
}

fn accept(listener: &TcpListener, state: &Arc<State>) {
    for stream in listener.incoming() {
        if state.stop.load(Ordering::Relaxed) {
            return;
        }
        let Ok(stream) = stream else { continue };
        let state = Arc::clone(state);
        thread::spawn(move || {
            let _ends_as_it_likes = serve(stream, &state);
        });
    }
}

fn serve(mut stream: TcpStream, state: &State) -> std::io::Result<()> {
    stream.set_read_timeout(Some(Duration::from_secs(10)))?;
    stream.set_nodelay(true)?;
    let lock = || state.seen.lock().unwrap_or_else(PoisonError::into_inner);
    let number = {
        let mut seen = lock();
        seen.push(Vec::new());
        seen.len() - 1
    };
    let mut new = Vec::new();
    let mut piece = vec![0; 16 << 10];
    loop {
        let n = stream.read(&mut piece)?;
        if n == 0 {
            return Ok(());
        }
        new.extend_from_slice(&piece[..n]);
        lock()[number].extend_from_slice(&piece[..n]);
        if new.ends_with(b"\r\n\r\n") {
            (state.answer)(&String::from_utf8_lossy(&new), &mut stream)?;
            new.clear();
        }
    }
}
