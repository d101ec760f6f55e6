//! Programs in pods: real ones ([`Program`]) and a small line server for tests ([`Server`]) with clients for it.
//!
//! The line server speaks first-line commands over TCP, so that one listener serves every test:
//! `who` answers `<name> <peer address> <local address>` and then echoes; `echo` echoes; `sink` reads to the end of the
//! client's half, then answers `<bytes> <sum>`; `source N` sends N bytes; `reset` answers with a TCP reset; `drip N` sends N
//! bytes one at a time, each when the client has sent one; anything else is answered `? `.
//! Owns: listeners, their threads and their record of how each connection ended. Refuses: to outlive its value.
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::{Context, ensure};

use crate::topology::Place;
use crate::wait;

/// A program that runs in a pod until dropped.
#[derive(Debug)]
pub struct Program {
    child: Option<Child>,
    name: String,
}

impl Program {
    /// Starts `command` in `place`, its output appended to `log`.
    pub fn start(place: &Place, command: &mut Command, log: Option<PathBuf>) -> anyhow::Result<Self> {
        let name = command.get_program().to_string_lossy().into_owned();
        command.stdin(Stdio::null());
        match log {
            Some(path) => {
                let file = std::fs::File::options().create(true).append(true).open(path)?;
                command.stdout(file.try_clone()?).stderr(file);
            }
            None => {
                command.stdout(Stdio::null()).stderr(Stdio::null());
            }
        }
        let child = place.netns.spawn(command).with_context(|| format!("start {name} in {}", place.name))?;
        Ok(Self { child: Some(child), name })
    }

    /// Waits until something accepts TCP on `port` of the pod's loopback.
    pub fn wait_listening(&mut self, place: &Place, port: u16) -> anyhow::Result<()> {
        let to = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
        wait::until(&format!("{} listening on {port} in {}", self.name, place.name), wait::PATIENCE, || {
            if let Some(status) = self.ended() {
                return Some(Err(anyhow::anyhow!("{} ended: {status}", self.name)));
            }
            place.netns.connect(to, Duration::from_secs(1)).ok().map(|_stream| Ok(()))
        })?
    }

    /// Its exit status, when it has ended.
    pub fn ended(&mut self) -> Option<ExitStatus> {
        self.child.as_mut()?.try_wait().ok().flatten()
    }

    /// Lets it run after this value is gone.
    pub fn leave_running(mut self) {
        self.child = None;
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        if let Some(child) = &mut self.child {
            let _gone_already = child.kill();
            let _reaped = child.wait();
        }
    }
}

/// How a connection of the line server ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum End {
    /// The client closed its half.
    Fin,
    /// The client's side was reset.
    Reset,
    /// The server itself closed or reset it.
    Own,
    /// Some other error.
    Other(String),
}

/// One served connection.
#[derive(Clone, Debug)]
pub struct Served {
    /// The peer's address as the server saw it.
    pub peer: SocketAddr,
    /// The first line.
    pub command: String,
    /// How it ended; `None` while it lasts.
    pub end: Option<End>,
}

/// The line server.
#[derive(Debug)]
pub struct Server {
    served: Arc<Mutex<Vec<Served>>>,
    accepted: Arc<AtomicUsize>,
    stop: Arc<AtomicBool>,
    wake: Vec<(Arc<Place>, SocketAddr)>,
}

impl Server {
    /// Listens on `port` of every address (IPv4 and IPv6) in `place`.
    pub fn start(place: &Arc<Place>, port: u16) -> anyhow::Result<Self> {
        Self::start_named(place, port, &place.name)
    }

    /// As [`Server::start`], with the name it gives in `who`.
    pub fn start_named(place: &Arc<Place>, port: u16, name: &str) -> anyhow::Result<Self> {
        let listener = place.listen(port)?;
        let server = Self {
            served: Arc::default(),
            accepted: Arc::default(),
            stop: Arc::default(),
            wake: vec![(place.clone(), (Ipv6Addr::LOCALHOST, port).into())],
        };
        let (served, accepted, stop, name) =
            (server.served.clone(), server.accepted.clone(), server.stop.clone(), name.to_owned());
        std::thread::Builder::new()
            .name(format!("serve-{name}"))
            .spawn(move || accept_loop(&listener, &served, &accepted, &stop, &name))?;
        Ok(server)
    }

    /// Connections accepted so far.
    pub fn accepted(&self) -> usize {
        self.accepted.load(Ordering::Acquire)
    }

    /// What was served so far.
    pub fn served(&self) -> Vec<Served> {
        self.served.lock().map(|list| list.clone()).unwrap_or_default()
    }

    /// Waits for the end of the connection whose first line was `command`.
    pub fn wait_end(&self, command: &str) -> anyhow::Result<End> {
        wait::until(&format!("the server's end of `{command}`"), wait::PATIENCE, || {
            self.served().into_iter().rev().find(|one| one.command == command).and_then(|one| one.end)
        })
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        for (place, at) in &self.wake {
            let _wakes_the_accept_loop = place.netns.connect(*at, Duration::from_secs(1));
        }
    }
}

fn accept_loop(listener: &TcpListener, served: &Arc<Mutex<Vec<Served>>>, accepted: &AtomicUsize, stop: &AtomicBool, name: &str) {
    for stream in listener.incoming() {
        if stop.load(Ordering::Acquire) {
            return;
        }
        let Ok(stream) = stream else { continue };
        accepted.fetch_add(1, Ordering::AcqRel);
        let (served, name) = (served.clone(), name.to_owned());
        let _thread = std::thread::Builder::new().stack_size(256 << 10).spawn(move || {
            let Ok(peer) = stream.peer_addr() else { return };
            let peer = unmapped(peer);
            let mut reader = BufReader::new(stream);
            let mut line = String::new();
            let read = reader.read_line(&mut line);
            let command = line.trim_end().to_owned();
            let index = {
                let Ok(mut list) = served.lock() else { return };
                list.push(Served { peer, command: command.clone(), end: None });
                list.len() - 1
            };
            let end = match read {
                Ok(0) => End::Fin,
                Ok(_) => serve(&mut reader, &command, &name, peer),
                Err(error) => ended_by(&error),
            };
            if let Ok(mut list) = served.lock() {
                list[index].end = Some(end);
            }
        });
    }
}

/// Bytes that tell their position, so that loss or reordering shows in a sum.
pub fn pattern(length: usize) -> Vec<u8> {
    (0..length).map(|at| (at % 251) as u8).collect()
}

/// A position-dependent sum of a byte stream.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sum {
    /// Bytes seen.
    pub bytes: u64,
    /// The sum.
    pub sum: u64,
}
impl Sum {
    /// Adds a piece.
    pub fn add(&mut self, piece: &[u8]) {
        for byte in piece {
            self.bytes += 1;
            self.sum = self.sum.wrapping_mul(31).wrapping_add(u64::from(*byte));
        }
    }
    /// Of a whole.
    pub fn of(whole: &[u8]) -> Self {
        let mut sum = Self::default();
        sum.add(whole);
        sum
    }
}

fn serve(reader: &mut BufReader<TcpStream>, command: &str, name: &str, peer: SocketAddr) -> End {
    let mut words = command.split(' ');
    let result = match words.next().unwrap_or_default() {
        "who" => who(reader, name, peer),
        "echo" => echo(reader),
        "sink" => sink(reader),
        "source" => source(reader, words.next().and_then(|n| n.parse().ok()).unwrap_or(0)),
        "drip" => drip(reader, words.next().and_then(|n| n.parse().ok()).unwrap_or(0)),
        "reset" => {
            let stream = reader.get_ref();
            let _best_effort = socket2::SockRef::from(stream).set_linger(Some(Duration::ZERO));
            Ok(End::Own)
        }
        _ => reader.get_mut().write_all(b"?\n").map(|()| End::Own),
    };
    result.unwrap_or_else(|error| ended_by(&error))
}

fn ended_by(error: &io::Error) -> End {
    match error.kind() {
        io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe => End::Reset,
        _ => End::Other(error.to_string()),
    }
}

fn who(reader: &mut BufReader<TcpStream>, name: &str, peer: SocketAddr) -> io::Result<End> {
    let local = unmapped(reader.get_ref().local_addr()?);
    reader.get_mut().write_all(format!("{name} {peer} {local}\n").as_bytes())?;
    echo(reader)
}

fn echo(reader: &mut BufReader<TcpStream>) -> io::Result<End> {
    let mut buffer = vec![0; 64 << 10];
    loop {
        let n = reader.read(&mut buffer)?;
        if n == 0 {
            let _gone_already = reader.get_ref().shutdown(Shutdown::Write);
            return Ok(End::Fin);
        }
        reader.get_mut().write_all(&buffer[..n])?;
    }
}

fn sink(reader: &mut BufReader<TcpStream>) -> io::Result<End> {
    let mut buffer = vec![0; 64 << 10];
    let mut sum = Sum::default();
    loop {
        let n = reader.read(&mut buffer)?;
        if n == 0 {
            reader.get_mut().write_all(format!("{} {}\n", sum.bytes, sum.sum).as_bytes())?;
            return Ok(End::Fin);
        }
        sum.add(&buffer[..n]);
    }
}

fn source(reader: &mut BufReader<TcpStream>, length: usize) -> io::Result<End> {
    let piece = pattern(251 * 256);
    let mut left = length;
    while left > 0 {
        let n = left.min(piece.len());
        reader.get_mut().write_all(&piece[..n])?;
        left -= n;
    }
    reader.get_ref().shutdown(Shutdown::Write)?;
    let mut rest = Vec::new();
    reader.read_to_end(&mut rest)?;
    Ok(End::Fin)
}

fn drip(reader: &mut BufReader<TcpStream>, length: usize) -> io::Result<End> {
    let mut byte = [0];
    for _ in 0..length {
        if reader.read(&mut byte)? == 0 {
            return Ok(End::Fin);
        }
        reader.get_mut().write_all(&byte)?;
    }
    reader.get_ref().shutdown(Shutdown::Write)?;
    Ok(End::Own)
}

/// `::ffff:1.2.3.4` as `1.2.3.4`.
pub fn unmapped(addr: SocketAddr) -> SocketAddr {
    match addr.ip() {
        IpAddr::V6(v6) => v6.to_ipv4_mapped().map_or(addr, |v4| SocketAddr::from((v4, addr.port()))),
        IpAddr::V4(_) => addr,
    }
}

/// A client connection to the line server.
#[derive(Debug)]
pub struct Client {
    reader: BufReader<TcpStream>,
}

/// What `who` answers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Who {
    /// Name of the server.
    pub name: String,
    /// The client's address as the server saw it.
    pub peer: SocketAddr,
    /// The server's own address.
    pub local: SocketAddr,
}

impl Client {
    /// Connects from `place` and sends the first line. Reads and writes end after 20 s at the latest.
    pub fn open(place: &Place, to: SocketAddr, command: &str) -> io::Result<Self> {
        const LIMIT: Duration = Duration::from_secs(20);
        let mut stream = place.netns.connect(to, LIMIT)?;
        stream.set_read_timeout(Some(LIMIT))?;
        stream.set_write_timeout(Some(LIMIT))?;
        stream.write_all(format!("{command}\n").as_bytes())?;
        Ok(Self { reader: BufReader::new(stream) })
    }

    /// Connects, asks `who`, and returns the open connection (which echoes) with the answer.
    pub fn who(place: &Place, to: SocketAddr) -> anyhow::Result<(Self, Who)> {
        let mut client = Self::open(place, to, "who").with_context(|| format!("connect from {} to {to}", place.name))?;
        let line = client.line().with_context(|| format!("ask {to} from {}", place.name))?;
        let words: Vec<&str> = line.split(' ').collect();
        ensure!(words.len() == 3, "`who` answered {line:?}");
        let who = Who { name: words[0].into(), peer: words[1].parse()?, local: words[2].parse()? };
        Ok((client, who))
    }

    /// One line; an end of stream is an error.
    pub fn line(&mut self) -> io::Result<String> {
        let mut line = String::new();
        if self.reader.read_line(&mut line)? == 0 {
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "closed before an answer"));
        }
        Ok(line.trim_end().to_owned())
    }

    /// Sends a line and expects it back.
    pub fn ping(&mut self, text: &str) -> anyhow::Result<()> {
        self.reader.get_mut().write_all(format!("{text}\n").as_bytes())?;
        let back = self.line()?;
        ensure!(back == text, "sent {text:?}, got {back:?}");
        Ok(())
    }

    /// The stream.
    pub fn stream(&mut self) -> &mut TcpStream {
        self.reader.get_mut()
    }

    /// Closes the sending half.
    pub fn finish(&mut self) -> io::Result<()> {
        self.reader.get_ref().shutdown(Shutdown::Write)
    }

    /// Reads to the end.
    pub fn rest(&mut self) -> io::Result<Sum> {
        let mut buffer = vec![0; 64 << 10];
        let mut sum = Sum::default();
        loop {
            match self.reader.read(&mut buffer)? {
                0 => return Ok(sum),
                n => sum.add(&buffer[..n]),
            }
        }
    }

    /// Closes with a TCP reset.
    pub fn reset(self) -> io::Result<()> {
        socket2::SockRef::from(self.reader.get_ref()).set_linger(Some(Duration::ZERO))
    }

    /// Waits until the other side ends the connection (end of stream or reset), without sending.
    pub fn wait_cut(&mut self) -> anyhow::Result<Cut> {
        let mut byte = [0];
        match self.reader.read(&mut byte) {
            Ok(0) => Ok(Cut::Fin),
            Ok(_) => anyhow::bail!("got data while waiting for the cut"),
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => Ok(Cut::Reset),
            Err(error) => Err(error).context("waiting for the cut"),
        }
    }
}

/// How a connection was cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cut {
    /// End of stream.
    Fin,
    /// Reset.
    Reset,
}
