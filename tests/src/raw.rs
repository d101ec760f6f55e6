//! A client without manners: sends exactly the bytes it is given and tells exactly what came back.
//!
//! Owns: a connection, its limits in time. Refuses: to correct anything.
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::time::Duration;

use crate::http::{self, Answer};
use crate::topology::Place;

/// No single read or write takes longer.
const LIMIT: Duration = Duration::from_secs(15);

/// A connection.
#[derive(Debug)]
pub struct Raw {
    reader: BufReader<TcpStream>,
}

/// What came until the other side ended, or went silent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rest {
    /// The bytes.
    pub bytes: Vec<u8>,
    /// The other side ended the connection (in whichever way).
    pub ended: bool,
}

impl Raw {
    /// Connects from `place`.
    pub fn open(place: &Place, to: SocketAddr) -> io::Result<Self> {
        let stream = place.netns.connect(to, LIMIT)?;
        stream.set_read_timeout(Some(LIMIT))?;
        stream.set_write_timeout(Some(LIMIT))?;
        stream.set_nodelay(true)?;
        Ok(Self { reader: BufReader::new(stream) })
    }

    /// Connects and sends. What cannot be sent any more because the other side had enough is no error.
    pub fn say(place: &Place, to: SocketAddr, bytes: &[u8]) -> io::Result<Self> {
        let mut raw = Self::open(place, to)?;
        let _refused_midway = raw.send(bytes);
        Ok(raw)
    }

    /// Sends.
    pub fn send(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.reader.get_mut().write_all(bytes)
    }

    /// One HTTP/1 answer.
    pub fn answer(&mut self) -> anyhow::Result<Answer> {
        http::read_answer(&mut self.reader, false)
    }

    /// One line, without its end.
    pub fn line(&mut self) -> io::Result<String> {
        let mut line = String::new();
        self.reader.read_line(&mut line)?;
        Ok(line.trim_end().to_owned())
    }

    /// Exactly so many bytes.
    pub fn exactly(&mut self, count: usize) -> io::Result<Vec<u8>> {
        let mut bytes = vec![0; count];
        self.reader.read_exact(&mut bytes)?;
        Ok(bytes)
    }

    /// Closes the sending half.
    pub fn finish(&mut self) -> io::Result<()> {
        self.reader.get_ref().shutdown(Shutdown::Write)
    }

    /// Everything until the end, or until something came and then nothing for `quiet`.
    pub fn rest(&mut self, quiet: Duration) -> io::Result<Rest> {
        let mut bytes = Vec::new();
        let mut piece = vec![0; 16 << 10];
        let ended = loop {
            match self.reader.read(&mut piece) {
                Ok(0) => break true,
                Ok(n) => {
                    bytes.extend_from_slice(&piece[..n]);
                    self.reader.get_ref().set_read_timeout(Some(quiet))?;
                }
                Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => break false,
                Err(_reset) => break true,
            }
        };
        self.reader.get_ref().set_read_timeout(Some(LIMIT))?;
        Ok(Rest { bytes, ended })
    }
}
