//! Clients that call again and again on connections they keep, and count what they got: what a change in the mesh costs them.
//!
//! They behave as good HTTP clients do: a connection that ended while nothing was under way is replaced, and a request of which
//! nothing was answered on a *used* connection is sent once more (RFC 9110 §9.2.2: it is a GET or a PUT). That is counted, too.
//! Owns: the threads. Refuses: to call for ever.
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use anyhow::ensure;

use crate::topology::Place;

mod caller;
mod pace;

use caller::{Caller, Speech};
pub use pace::Pace;

/// No request may take longer.
const LIMIT: Duration = Duration::from_secs(20);
/// Bytes of a PUT's body.
const BODY: usize = 3000;

/// What came of the requests.
#[derive(Debug, Default)]
pub struct Tally {
    /// Answers by status.
    pub statuses: BTreeMap<u16, usize>,
    /// Requests that got none, or one to another body than theirs, and why.
    pub errors: Vec<String>,
    /// Answers by the `name` that the server's echo gives.
    pub names: BTreeMap<String, usize>,
    /// Bodies of answers other than 200.
    pub bodies: Vec<String>,
    /// Connections made.
    pub connections: usize,
    /// Requests sent a second time because a kept connection was closed under them.
    pub again: usize,
    /// The longest request.
    pub slowest: Duration,
}

impl Tally {
    /// All requests.
    pub fn requests(&self) -> usize {
        self.statuses.values().sum::<usize>() + self.errors.len()
    }

    /// Everything was answered 200, there were `at_least` so many, and at most so many were sent again because a kept connection
    /// had been closed without an answer.
    pub fn all_well(&self, at_least: usize, again: usize) -> anyhow::Result<()> {
        ensure!(self.again <= again, "{} requests had to be sent again: {self:?}", self.again);
        let good = self.statuses.get(&200).copied().unwrap_or_default();
        ensure!(good == self.requests(), "{} of {} failed: {self:?}", self.requests() - good, self.requests());
        ensure!(good >= at_least, "only {good} requests were made: {self:?}");
        Ok(())
    }

    fn add(&mut self, other: Self) {
        for (status, count) in other.statuses {
            *self.statuses.entry(status).or_default() += count;
        }
        for (name, count) in other.names {
            *self.names.entry(name).or_default() += count;
        }
        self.errors.extend(other.errors);
        self.bodies.extend(other.bodies);
        self.connections += other.connections;
        self.again += other.again;
        self.slowest = self.slowest.max(other.slowest);
    }
}

/// What is between the requests of a caller.
#[derive(Clone)]
enum Rest {
    For(Duration),
    Until(Arc<Pace>),
}

fn get(to: SocketAddr, path: &str) -> Speech {
    Speech { to, path: path.to_owned(), body: 0, http2: false }
}

/// Requests under way.
#[derive(Debug)]
pub struct Load {
    threads: Vec<JoinHandle<Tally>>,
    stop: Arc<AtomicBool>,
    done: Arc<AtomicUsize>,
}

impl Load {
    /// `callers` threads in `place` that GET `path` from `to`, each resting for `pause` after a request.
    pub fn start(place: &Arc<Place>, to: SocketAddr, path: &str, callers: usize, pause: Duration) -> Self {
        Self::of(place, vec![get(to, path); callers], Rest::For(pause))
    }

    /// `callers` threads in `place` that GET `path` from `to`, all of them together at `pace`.
    pub fn at_pace(place: &Arc<Place>, to: SocketAddr, path: &str, callers: usize, pace: &Arc<Pace>) -> Self {
        Self::of(place, vec![get(to, path); callers], Rest::Until(Arc::clone(pace)))
    }

    /// Four threads without rest: GET and PUT, each over HTTP/1.1 and over HTTP/2.
    pub fn mixed(place: &Arc<Place>, to: SocketAddr, path: &str) -> Self {
        let all = [(0, false), (BODY, false), (0, true), (BODY, true)];
        let speech = |(body, http2)| Speech { to, path: path.to_owned(), body, http2 };
        Self::of(place, all.map(speech).into(), Rest::For(Duration::ZERO))
    }

    fn of(place: &Arc<Place>, all: Vec<Speech>, rest: Rest) -> Self {
        let (stop, done) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
        let threads = all.into_iter().map(|speech| {
            let (place, stop, done, rest) = (Arc::clone(place), Arc::clone(&stop), Arc::clone(&done), rest.clone());
            thread::spawn(move || {
                let mut caller = match Caller::new(place, speech) {
                    Ok(caller) => caller,
                    Err(error) => return Tally { errors: vec![format!("{error:#}")], ..Tally::default() },
                };
                while !stop.load(Ordering::Relaxed) {
                    if let Rest::Until(pace) = &rest {
                        pace.wait();
                    }
                    caller.call();
                    done.fetch_add(1, Ordering::Relaxed);
                    if let Rest::For(pause) = rest {
                        thread::sleep(pause);
                    }
                }
                caller.tally
            })
        });
        Self { threads: threads.collect(), stop, done }
    }

    /// Requests so far.
    pub fn done(&self) -> usize {
        self.done.load(Ordering::Relaxed)
    }

    /// Waits until `count` requests were made since the start.
    pub fn wait(&self, count: usize) -> anyhow::Result<()> {
        crate::wait::until(&format!("{count} requests, {} now", self.done()), Duration::from_mins(3), || {
            (self.done() >= count).then_some(())
        })
    }

    /// Ends once `at_least` so many requests were made.
    pub fn finish(mut self, at_least: usize) -> anyhow::Result<Tally> {
        self.wait(at_least)?;
        self.end()
    }

    fn end(&mut self) -> anyhow::Result<Tally> {
        self.stop.store(true, Ordering::Relaxed);
        let mut all = Tally::default();
        for thread in self.threads.drain(..) {
            all.add(thread.join().map_err(|_panic| anyhow::anyhow!("a caller panicked"))?);
        }
        Ok(all)
    }
}
impl Drop for Load {
    fn drop(&mut self) {
        let _of_a_test_that_failed = self.end();
    }
}
