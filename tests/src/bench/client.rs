//! The load clients. Each opens its connections first, then measures, and checks every byte that comes back.
//!
//! Refuses to hang: connecting, each answer and each whole run are bounded in time; what ran out counts as an error.
use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::task::JoinSet;

use super::outcome::{Latencies, Outcome};
use super::talk::{Dialog, Talk};
use super::wire::{CHUNK, Checker, Mode, RECEIPT, Receipt, pattern};

/// No single step of a client may take longer.
const STEP: Duration = Duration::from_secs(20);
/// No stream may take longer.
const STREAM: Duration = Duration::from_mins(5);

/// Which way a stream flows, seen from the client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// Client to server.
    Up,
    /// Server to client.
    Down,
}

impl std::str::FromStr for Direction {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "up" => Ok(Self::Up),
            "down" => Ok(Self::Down),
            _ => Err("up or down".into()),
        }
    }
}

async fn within<T>(limit: Duration, what: &str, work: impl Future<Output = io::Result<T>>) -> io::Result<T> {
    match tokio::time::timeout(limit, work).await {
        Ok(result) => result.map_err(|error| io::Error::new(error.kind(), format!("{what}: {error}"))),
        Err(_elapsed) => Err(io::Error::new(io::ErrorKind::TimedOut, format!("{what}: nothing for {} s", limit.as_secs()))),
    }
}

async fn open(to: SocketAddr) -> io::Result<TcpStream> {
    let stream = within(STEP, "connect", TcpStream::connect(to)).await?;
    stream.set_nodelay(true)?;
    Ok(stream)
}

/// Waits for every task and adds what they found.
async fn sum(mut tasks: JoinSet<Outcome>) -> Outcome {
    let mut sum = Outcome::default();
    while let Some(ended) = tasks.join_next().await {
        match ended {
            Ok(outcome) => sum.merge(outcome),
            Err(error) => sum.fail(&error),
        }
    }
    sum
}

/// `streams` connections move `bytes` in all. Returns what was found and the seconds it took.
pub async fn stream(to: SocketAddr, streams: u64, bytes: u64, direction: Direction) -> (Outcome, f64) {
    let mut opened = Vec::new();
    let mut failed = Outcome::default();
    for _ in 0..streams {
        match open(to).await {
            Ok(stream) => opened.push(stream),
            Err(error) => failed.fail(&error),
        }
    }
    let each = bytes / streams.max(1);
    let start = Instant::now();
    let mut tasks = JoinSet::new();
    for mut stream in opened {
        tasks.spawn(async move {
            let mut outcome = Outcome::default();
            let work = async {
                match direction {
                    Direction::Up => upload(&mut stream, each).await,
                    Direction::Down => download(&mut stream, each).await,
                }
            };
            match within(STREAM, "stream", work).await {
                Ok(receipt) => {
                    outcome.count = 1;
                    outcome.bytes = receipt.bytes;
                    outcome.mismatches = receipt.mismatches + u64::from(receipt.bytes != each);
                }
                Err(error) => outcome.fail(&error),
            }
            outcome
        });
    }
    let mut outcome = sum(tasks).await;
    outcome.merge(failed);
    (outcome, start.elapsed().as_secs_f64())
}

async fn upload(stream: &mut TcpStream, bytes: u64) -> io::Result<Receipt> {
    stream.write_all(&Mode::Sink.header()).await?;
    let mut sent = 0;
    while sent < bytes {
        let next = pattern(sent, usize::try_from(bytes - sent).unwrap_or(CHUNK));
        sent += stream.write(next).await? as u64;
    }
    stream.shutdown().await?;
    let mut receipt = [0; RECEIPT];
    stream.read_exact(&mut receipt).await?;
    Ok(Receipt::from_bytes(receipt))
}

async fn download(stream: &mut TcpStream, bytes: u64) -> io::Result<Receipt> {
    stream.write_all(&Mode::Source(bytes).header()).await?;
    let mut buffer = vec![0; CHUNK];
    let mut checker = Checker::default();
    loop {
        let read = stream.read(&mut buffer).await?;
        if read == 0 {
            return Ok(checker.receipt());
        }
        checker.take(&buffer[..read]);
    }
}

/// One connection on which messages go back and forth.
struct Pinger {
    stream: TcpStream,
    dialog: Dialog,
}

impl Pinger {
    /// Connects and makes one round trip, which also carries what the protocol opens with.
    async fn open(to: SocketAddr, talk: &Talk, number: u64) -> io::Result<Self> {
        let mut pinger = Self { stream: open(to).await?, dialog: talk.dialog(number) };
        let mut first = talk.opening();
        first.extend(pinger.dialog.ask());
        within(STEP, "first message", pinger.stream.write_all(&first)).await?;
        if !within(STEP, "first answer", pinger.receive()).await? {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "the first answer is not that to the first message"));
        }
        Ok(pinger)
    }

    /// True if the answer is the one to the message.
    async fn receive(&mut self) -> io::Result<bool> {
        loop {
            let read = self.stream.read(self.dialog.room()).await?;
            if let Some(right) = self.dialog.got(read)? {
                return Ok(right);
            }
        }
    }

    async fn ping(&mut self) -> io::Result<bool> {
        self.stream.write_all(self.dialog.ask()).await?;
        self.receive().await
    }
}

/// `conns` connections make round trips, one after the other, for `length` or until each has made its part of `most`.
pub async fn ping(to: SocketAddr, conns: u64, length: Duration, most: u64, talk: &Talk) -> (Outcome, f64) {
    let (pingers, failed) = open_many(to, conns, talk, 1).await;
    let (most, size) = (most.div_ceil(conns.max(1)), talk.size());
    let start = Instant::now();
    let end = start + length;
    let mut tasks = JoinSet::new();
    for mut pinger in pingers {
        tasks.spawn(async move {
            let mut outcome = Outcome { latencies: Latencies::with_capacity(1 << 16), ..Outcome::default() };
            // One timer for the whole run: one per message would be a good part of the client's work.
            let run = tokio::time::timeout_at((end + STEP).into(), async {
                let mut before = Instant::now();
                while before < end && outcome.count < most {
                    let right = pinger.ping().await?;
                    let after = Instant::now();
                    outcome.latencies.add(after - before);
                    outcome.count += 1;
                    outcome.bytes += size as u64;
                    outcome.mismatches += u64::from(!right);
                    before = after;
                }
                io::Result::Ok(())
            })
            .await;
            match run {
                Ok(Ok(())) => {}
                Ok(Err(error)) => outcome.fail(&error),
                Err(_elapsed) => outcome.fail("no answer"),
            }
            outcome
        });
    }
    let mut outcome = sum(tasks).await;
    let seconds = start.elapsed().as_secs_f64();
    outcome.merge(failed);
    (outcome, seconds)
}

/// `count` times: connect, one round trip, close; `concurrency` at a time.
pub async fn churn(to: SocketAddr, concurrency: u64, count: u64, talk: &Talk) -> (Outcome, f64) {
    let start = Instant::now();
    let mut tasks = JoinSet::new();
    let concurrency = concurrency.clamp(1, count.max(1));
    for lane in 0..concurrency {
        let share = count / concurrency + u64::from(lane < count % concurrency);
        let (talk, size) = (talk.clone(), talk.size());
        tasks.spawn(async move {
            let mut outcome = Outcome { latencies: Latencies::with_capacity(share as usize), ..Outcome::default() };
            for number in 0..share {
                let before = Instant::now();
                match Pinger::open(to, &talk, lane * count + number).await {
                    Ok(pinger) => {
                        drop(pinger);
                        outcome.latencies.add(before.elapsed());
                        outcome.count += 1;
                        outcome.bytes += size as u64;
                    }
                    Err(error) => outcome.fail(&error),
                }
            }
            outcome
        });
    }
    let outcome = sum(tasks).await;
    (outcome, start.elapsed().as_secs_f64())
}

/// Opens `conns` connections, `at_once` at a time, each with one round trip.
async fn open_many(to: SocketAddr, conns: u64, talk: &Talk, at_once: u64) -> (Vec<Pinger>, Outcome) {
    let mut pingers = Vec::new();
    let mut failed = Outcome::default();
    let mut tasks: JoinSet<io::Result<Pinger>> = JoinSet::new();
    let mut next = 0;
    while next < conns || !tasks.is_empty() {
        while next < conns && (tasks.len() as u64) < at_once {
            let (talk, number) = (talk.clone(), next);
            tasks.spawn(async move { Pinger::open(to, &talk, number).await });
            next += 1;
        }
        match tasks.join_next().await {
            Some(Ok(Ok(pinger))) => pingers.push(pinger),
            Some(Ok(Err(error))) => failed.fail(&error),
            Some(Err(error)) => failed.fail(&error),
            None => break,
        }
    }
    (pingers, failed)
}

/// Connections that are open and silent.
pub struct Idle(Vec<Pinger>);

/// Opens `conns` connections and leaves them idle.
pub async fn idle(to: SocketAddr, conns: u64, talk: &Talk) -> (Idle, Outcome, f64) {
    let start = Instant::now();
    let (pingers, mut outcome) = open_many(to, conns, talk, 32).await;
    outcome.count = pingers.len() as u64;
    (Idle(pingers), outcome, start.elapsed().as_secs_f64())
}

impl Idle {
    /// One round trip on each: how many are still alive.
    pub async fn alive(&mut self) -> Outcome {
        let mut outcome = Outcome::default();
        for pinger in &mut self.0 {
            match within(STEP, "round trip after idling", pinger.ping()).await {
                Ok(true) => outcome.count += 1,
                Ok(false) => outcome.mismatches += 1,
                Err(error) => outcome.fail(&error),
            }
        }
        outcome
    }
}

/// `conns` connections make `per_second` round trips in all at fixed times, however long answers take; a latency counts from
/// the time a message was due. Threads, because they wake within microseconds where a timer wheel counts milliseconds.
pub fn rate(to: SocketAddr, conns: u32, per_second: f64, length: Duration, talk: &Talk) -> (Outcome, f64) {
    let conns = conns.max(1);
    let interval = Duration::from_secs_f64(f64::from(conns) / per_second);
    // Time for everyone to connect before the first message is due.
    let start = Instant::now() + Duration::from_millis(200);
    let outcomes: Vec<Outcome> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..conns)
            .map(|number| {
                let first = start + interval * number / conns;
                scope.spawn(move || rate_one(to, first, interval, start + length, talk, u64::from(number)))
            })
            .collect();
        threads.into_iter().filter_map(|thread| thread.join().ok()).collect()
    });
    let seconds = start.elapsed().as_secs_f64();
    let mut sum = Outcome::default();
    for outcome in outcomes {
        sum.merge(outcome);
    }
    (sum, seconds)
}

fn rate_one(to: SocketAddr, first: Instant, interval: Duration, end: Instant, talk: &Talk, number: u64) -> Outcome {
    use std::io::{Read as _, Write as _};
    let mut outcome = Outcome { latencies: Latencies::with_capacity(1 << 14), ..Outcome::default() };
    let mut dialog = talk.dialog(number);
    let mut run = || -> io::Result<()> {
        let mut stream = std::net::TcpStream::connect_timeout(&to, STEP)?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(STEP))?;
        stream.set_write_timeout(Some(STEP))?;
        stream.write_all(&talk.opening())?;
        let mut due = first;
        while due < end {
            std::thread::sleep(due.saturating_duration_since(Instant::now()));
            stream.write_all(dialog.ask())?;
            let right = loop {
                let read = stream.read(dialog.room())?;
                if let Some(right) = dialog.got(read)? {
                    break right;
                }
            };
            outcome.latencies.add(due.elapsed());
            outcome.count += 1;
            outcome.bytes += talk.size() as u64;
            outcome.mismatches += u64::from(!right);
            due += interval;
        }
        Ok(())
    };
    if let Err(error) = run() {
        outcome.fail(&error);
    }
    outcome
}

/// Connections that asked for more than anybody buffers and read nothing of it.
pub struct Stalled(#[expect(dead_code, reason = "held only to stay open")] Vec<TcpStream>);

/// `conns` connections ask for `path`, see that the answer begins, and read no further.
pub async fn stall(to: SocketAddr, conns: u64, host: &str, path: &str) -> (Stalled, Outcome, f64) {
    let start = Instant::now();
    let mut outcome = Outcome::default();
    let mut all = Vec::new();
    for _ in 0..conns {
        let begun = async {
            let mut stream = open(to).await?;
            stream.write_all(format!("GET {path} HTTP/1.1\r\nhost: {host}\r\n\r\n").as_bytes()).await?;
            let mut status = [0; 12];
            stream.read_exact(&mut status).await?;
            if status == *b"HTTP/1.1 200" { Ok(stream) } else { Err(io::Error::other("the answer is not 200")) }
        };
        match within(STEP, "the beginning of an answer", begun).await {
            Ok(stream) => {
                outcome.count += 1;
                all.push(stream);
            }
            Err(error) => outcome.fail(&error),
        }
    }
    (Stalled(all), outcome, start.elapsed().as_secs_f64())
}

#[cfg(test)]
mod tests {
    use super::super::server::tests::{start, start_http};
    use super::*;

    const ECHO: Talk = Talk::Echo { size: 64 };

    fn clean(outcome: &Outcome) -> bool {
        outcome.errors == 0 && outcome.mismatches == 0 && outcome.count > 0
    }

    #[tokio::test]
    async fn streams_arrive_whole_both_ways() {
        let to = start();
        for direction in [Direction::Up, Direction::Down] {
            let (outcome, _seconds) = stream(to, 3, 3_000_000, direction).await;
            assert!(clean(&outcome), "{direction:?}: {outcome:?}");
            assert_eq!((outcome.count, outcome.bytes), (3, 3_000_000));
        }
    }

    #[tokio::test]
    async fn round_trips_connections_and_idling() {
        let to = start();
        let (outcome, _seconds) = ping(to, 4, Duration::from_millis(50), u64::MAX, &ECHO).await;
        assert!(clean(&outcome) && outcome.latencies.len() as u64 == outcome.count, "{outcome:?}");
        let (outcome, _seconds) = churn(to, 4, 10, &ECHO).await;
        assert!(clean(&outcome) && outcome.count == 10, "{outcome:?}");
        let (mut idle, outcome, _seconds) = idle(to, 20, &ECHO).await;
        assert!(clean(&outcome) && outcome.count == 20, "{outcome:?}");
        assert_eq!(idle.alive().await.count, 20);
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_fixed_rate_is_kept() {
        let to = start();
        let run = tokio::task::spawn_blocking(move || rate(to, 4, 400.0, Duration::from_millis(500), &ECHO));
        let (outcome, _seconds) = run.await.unwrap();
        assert!(clean(&outcome), "{outcome:?}");
        assert_eq!(outcome.count, 200);
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn http_is_spoken_and_checked() {
        let to = start_http();
        let talk = Talk::Http { host: "h".into(), path: "/a".into(), tokens: std::sync::Arc::default() };
        let (outcome, _seconds) = ping(to, 4, Duration::from_secs(5), 40, &talk).await;
        assert!(clean(&outcome) && outcome.count == 40, "{outcome:?}");
        let other = talk.clone();
        let run = tokio::task::spawn_blocking(move || rate(to, 2, 200.0, Duration::from_millis(100), &other));
        assert!(clean(&run.await.unwrap().0));
        let (_held, outcome, _seconds) = stall(to, 2, "h", "/bytes/50000000").await;
        assert!(clean(&outcome) && outcome.count == 2, "{outcome:?}");
    }

    #[tokio::test]
    async fn a_closed_port_is_counted_not_waited_for() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let closed = listener.local_addr().unwrap();
        drop(listener);
        let (outcome, _seconds) = churn(closed, 2, 5, &ECHO).await;
        assert_eq!((outcome.errors, outcome.count), (5, 0));
        assert!(outcome.first_error.is_some_and(|error| error.starts_with("connect")));
    }
}
