//! HTTP/1.1 answers read as they are on the wire, over any byte stream: nothing repaired, names in the case they came in.
use std::io;

use anyhow::{Context, bail, ensure};
use tokio::io::{AsyncRead, AsyncReadExt as _};

/// How an answer ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum End {
    /// Whole, and the connection stays.
    Kept,
    /// Whole, ended by the end of the connection.
    Closed,
    /// Cut short.
    Broken,
}

/// One answer.
#[derive(Clone, Debug)]
pub struct Answer {
    /// `HTTP/1.1`
    pub version: String,
    /// Status.
    pub status: u16,
    /// In the order they came.
    pub headers: Vec<(String, String)>,
    /// Body.
    pub body: Vec<u8>,
    /// Trailers.
    pub trailers: Vec<(String, String)>,
    /// How it ended.
    pub end: End,
}

impl Answer {
    /// The first value of a header; `name` in lower case.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(key, _)| key.eq_ignore_ascii_case(name)).map(|(_, value)| value.as_str())
    }
}

/// Reads messages from a byte stream.
#[derive(Debug)]
pub struct Reader<S> {
    stream: S,
    seen: Vec<u8>,
}

impl<S: AsyncRead + Unpin> Reader<S> {
    /// Of a fresh connection.
    pub fn new(stream: S) -> Self {
        Self { stream, seen: Vec::new() }
    }

    /// The stream, to write to.
    pub fn stream(&mut self) -> &mut S {
        &mut self.stream
    }

    /// More bytes; false at the end.
    pub async fn more(&mut self) -> io::Result<bool> {
        self.seen.reserve(16 << 10);
        Ok(self.stream.read_buf(&mut self.seen).await? > 0)
    }

    /// The bytes up to and with an empty line; `None` when the stream ended before its first byte.
    pub async fn head(&mut self) -> anyhow::Result<Option<String>> {
        loop {
            if let Some(at) = self.seen.windows(4).position(|four| four == b"\r\n\r\n") {
                let rest = self.seen.split_off(at + 4);
                let head = std::mem::replace(&mut self.seen, rest);
                return Ok(Some(String::from_utf8_lossy(&head).into_owned()));
            }
            if !self.more().await? {
                ensure!(self.seen.is_empty(), "ended inside a head: {:?}", String::from_utf8_lossy(&self.seen));
                return Ok(None);
            }
        }
    }

    async fn line(&mut self) -> anyhow::Result<String> {
        loop {
            if let Some(at) = self.seen.windows(2).position(|two| two == b"\r\n") {
                let rest = self.seen.split_off(at + 2);
                let line = std::mem::replace(&mut self.seen, rest);
                return Ok(String::from_utf8_lossy(&line[..at]).into_owned());
            }
            ensure!(self.more().await?, "ended inside a line");
        }
    }

    /// Exactly this many bytes appended to `body`; what came before the end is there even when it fails.
    async fn exactly(&mut self, length: usize, body: &mut Vec<u8>) -> anyhow::Result<()> {
        let mut left = length;
        loop {
            let n = left.min(self.seen.len());
            body.extend(self.seen.drain(..n));
            left -= n;
            if left == 0 {
                return Ok(());
            }
            ensure!(self.more().await?, "{left} of {length} bytes missing");
        }
    }

    /// A chunked body and its trailers.
    async fn chunks(&mut self, body: &mut Vec<u8>) -> anyhow::Result<Vec<(String, String)>> {
        loop {
            let line = self.line().await?;
            let size = usize::from_str_radix(line.split(';').next().unwrap_or_default().trim(), 16).context("chunk size")?;
            if size == 0 {
                break;
            }
            self.exactly(size, body).await?;
            ensure!(self.line().await?.is_empty(), "a chunk does not end where it should");
        }
        let mut trailers = Vec::new();
        loop {
            let line = self.line().await?;
            match line.split_once(':') {
                Some((name, value)) => trailers.push((name.to_owned(), value.trim().to_owned())),
                None => return Ok(trailers),
            }
        }
    }

    /// The body of a request by its headers (none means none).
    pub async fn request_body(&mut self, headers: &[(String, String)]) -> (Vec<u8>, bool) {
        let mut body = Vec::new();
        let whole = match framing(headers) {
            Framing::Chunked => self.chunks(&mut body).await.is_ok(),
            Framing::Length(length) => self.exactly(length, &mut body).await.is_ok(),
            Framing::None => true,
        };
        (body, whole)
    }

    /// The next answer, to a request with `method`; answers 1xx but 101 are passed over.
    pub async fn answer(&mut self, method: &str) -> anyhow::Result<Answer> {
        let (version, status, headers) = loop {
            let head = self.head().await?.context("closed without an answer")?;
            let (line, rest) = head.split_once("\r\n").context("a status line")?;
            let mut words = line.splitn(3, ' ');
            let version = words.next().unwrap_or_default().to_owned();
            let Some(status) = words.next().and_then(|word| word.parse::<u16>().ok()) else { bail!("status line {line:?}") };
            if status >= 200 || status == 101 {
                break (version, status, fields(rest));
            }
        };
        let mut answer = Answer { version, status, headers, body: Vec::new(), trailers: Vec::new(), end: End::Kept };
        let bodiless = method == "HEAD" || matches!(status, 101 | 204 | 304);
        let mut body = Vec::new();
        match framing(&answer.headers) {
            _ if bodiless => {}
            Framing::Chunked => match self.chunks(&mut body).await {
                Ok(trailers) => answer.trailers = trailers,
                Err(_cut) => answer.end = End::Broken,
            },
            Framing::Length(length) => {
                if self.exactly(length, &mut body).await.is_err() {
                    answer.end = End::Broken;
                }
            }
            Framing::None => {
                answer.end = End::Closed;
                loop {
                    match self.more().await {
                        Ok(true) => {}
                        Ok(false) => break,
                        Err(_reset) => {
                            answer.end = End::Broken;
                            break;
                        }
                    }
                }
                body.append(&mut self.seen);
            }
        }
        answer.body = body;
        Ok(answer)
    }
}

enum Framing {
    Chunked,
    Length(usize),
    None,
}

fn framing(headers: &[(String, String)]) -> Framing {
    let find = |name: &str| headers.iter().find(|(key, _)| key.eq_ignore_ascii_case(name)).map(|(_, value)| value.as_str());
    if find("transfer-encoding").is_some_and(|value| value.eq_ignore_ascii_case("chunked")) {
        return Framing::Chunked;
    }
    find("content-length").and_then(|value| value.parse().ok()).map_or(Framing::None, Framing::Length)
}

/// Header lines up to the empty one.
pub fn fields(text: &str) -> Vec<(String, String)> {
    text.split("\r\n")
        .filter_map(|line| line.split_once(':'))
        .map(|(name, value)| (name.to_owned(), value.trim().to_owned()))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn read(bytes: &[u8], method: &str) -> anyhow::Result<Answer> {
        Reader::new(bytes).answer(method).await
    }

    #[tokio::test]
    async fn framings() {
        let whole = read(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nhix", "GET").await.unwrap();
        assert_eq!((whole.status, whole.body.as_slice(), whole.end), (200, &b"hi"[..], End::Kept));
        let chunked =
            read(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhi\r\n0\r\na: b\r\n\r\n", "GET").await.unwrap();
        assert_eq!((chunked.body.as_slice(), chunked.trailers.len(), chunked.end), (&b"hi"[..], 1, End::Kept));
        let cut = read(b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nhi", "GET").await.unwrap();
        assert_eq!((cut.body.as_slice(), cut.end), (&b"hi"[..], End::Broken));
        let closed = read(b"HTTP/1.1 200 OK\r\n\r\nhi", "GET").await.unwrap();
        assert_eq!((closed.body.as_slice(), closed.end), (&b"hi"[..], End::Closed));
        let head = read(b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\n", "HEAD").await.unwrap();
        assert_eq!((head.body.len(), head.end), (0, End::Kept));
        assert!(read(b"", "GET").await.is_err());
    }
}
