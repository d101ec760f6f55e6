//! What a load client says on a connection, and how it knows that what came back is the answer to it: bytes that are echoed,
//! or HTTP requests, each with a number that has to be in its answer.
use std::io;
use std::sync::Arc;

use super::wire::{Mode, pattern};

/// What is spoken.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Talk {
    /// Messages of this size, echoed ([`Mode::Echo`]).
    Echo {
        /// At least 16 bytes.
        size: usize,
    },
    /// HTTP/1.1 requests without a body.
    Http {
        /// `Host`.
        host: String,
        /// Path, without a query.
        path: String,
        /// Bearer tokens, all of one length, one a request in turn; none: requests bear none.
        tokens: Arc<[String]>,
    },
}

/// Length of the body of an HTTP answer.
const BODY: usize = 64;
/// Digits of a request's number.
const DIGITS: usize = 16;
/// Largest answer.
const ROOM: usize = 2048;
/// Connections that begin with tokens as far from each other as can be.
const APART: usize = 16;

impl Talk {
    /// What goes before the first message.
    pub fn opening(&self) -> Vec<u8> {
        match self {
            Self::Echo { .. } => Mode::Echo.header().to_vec(),
            Self::Http { .. } => Vec::new(),
        }
    }
    /// Payload bytes of one answer.
    pub fn size(&self) -> usize {
        match self {
            Self::Echo { size } => (*size).max(16),
            Self::Http { .. } => BODY,
        }
    }
    /// The conversation of connection `number`.
    pub fn dialog(&self, number: u64) -> Dialog {
        let (message, at) = match self {
            Self::Echo { .. } => (pattern(number, self.size()).to_vec(), None),
            Self::Http { host, path, tokens } => {
                let begin = format!("GET {path}?");
                let digits = "0".repeat(DIGITS);
                let token = tokens.first().map(|t| format!("authorization: Bearer {t}\r\n")).unwrap_or_default();
                let rest = format!(" HTTP/1.1\r\nhost: {host}\r\nuser-agent: loadgen\r\naccept: */*\r\n{token}\r\n");
                (format!("{begin}{digits}{rest}").into_bytes(), Some(begin.len()))
            }
        };
        let room = if at.is_some() { ROOM } else { message.len() };
        let tokens = match self {
            Self::Http { tokens, .. } => Arc::clone(tokens),
            Self::Echo { .. } => Arc::default(),
        };
        // Connections begin far apart, so that each token is used again only after most of the others.
        let next = number as usize * (tokens.len() / APART);
        Dialog { message, at, sequence: number << 32, answer: vec![0; room], filled: 0, tokens, next }
    }
}

/// One conversation: what is asked next, and what has come of the answer.
#[derive(Debug)]
pub struct Dialog {
    message: Vec<u8>,
    /// HTTP: where the number stands.
    at: Option<usize>,
    sequence: u64,
    answer: Vec<u8>,
    filled: usize,
    tokens: Arc<[String]>,
    /// Token of the next request.
    next: usize,
}

impl Dialog {
    /// The next message.
    pub fn ask(&mut self) -> &[u8] {
        self.sequence += 1;
        self.filled = 0;
        match self.at {
            None => self.message[..8].copy_from_slice(&self.sequence.to_be_bytes()),
            Some(at) => self.message[at..at + DIGITS].copy_from_slice(&digits(self.sequence)),
        }
        if self.tokens.len() > 1 {
            let token = self.tokens[self.next % self.tokens.len()].as_bytes();
            self.next += 1;
            // It is the end of the head, and they are of one length.
            let end = self.message.len() - 4;
            self.message[end - token.len()..end].copy_from_slice(token);
        }
        &self.message
    }
    /// Where the next bytes of the answer go.
    pub fn room(&mut self) -> &mut [u8] {
        &mut self.answer[self.filled..]
    }
    /// Takes as many bytes as were put there. Once the answer is whole: whether it is the right one.
    pub fn got(&mut self, bytes: usize) -> io::Result<Option<bool>> {
        if bytes == 0 {
            let why = if self.filled == self.answer.len() { "an answer larger than any" } else { "closed before the answer" };
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, why));
        }
        self.filled += bytes;
        let seen = &self.answer[..self.filled];
        if self.at.is_none() {
            return Ok((seen.len() == self.message.len()).then(|| seen == self.message));
        }
        let Some(end) = end_of_head(seen) else { return Ok(None) };
        let (head, body) = seen.split_at(end);
        if !head.starts_with(b"HTTP/1.1 200 ") {
            let head = String::from_utf8_lossy(head);
            return Err(io::Error::other(format!("answered {}", head.lines().next().unwrap_or_default())));
        }
        let right = body.starts_with(&digits(self.sequence)) && body.len() == BODY;
        Ok((body.len() >= BODY).then_some(right))
    }
}

/// A number as requests and answers hold it.
fn digits(number: u64) -> [u8; DIGITS] {
    std::array::from_fn(|at| b"0123456789abcdef"[(number >> (60 - 4 * at)) as usize & 15])
}

/// Length of a message's head, once it is whole.
pub fn end_of_head(seen: &[u8]) -> Option<usize> {
    seen.windows(4).position(|four| four == b"\r\n\r\n").map(|at| at + 4)
}

/// The target of a request's head.
pub fn target(head: &[u8]) -> Option<&str> {
    std::str::from_utf8(head).ok()?.strip_prefix("GET ")?.split(' ').next()
}

/// The answer to a request: its query, filled up to 64 bytes.
pub fn answer(target: &str) -> Vec<u8> {
    let query = target.split_once('?').map_or("", |(_, query)| query);
    format!("HTTP/1.1 200 OK\r\ncontent-type: text/plain\r\ncontent-length: {BODY}\r\n\r\n{query:.<BODY$.BODY$}").into_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn put(dialog: &mut Dialog, bytes: &[u8]) -> io::Result<Option<bool>> {
        dialog.room()[..bytes.len()].copy_from_slice(bytes);
        dialog.got(bytes.len())
    }

    #[test]
    fn an_answer_must_be_that_to_its_request() {
        let talk = Talk::Http { host: "h".into(), path: "/x".into(), tokens: Arc::default() };
        let mut dialog = talk.dialog(3);
        let asked = dialog.ask().to_vec();
        let asked = target(&asked).unwrap().to_owned();
        assert_eq!(asked, "/x?0000000300000001");
        let right = answer(&asked);
        assert_eq!(put(&mut dialog, &right[..40]).unwrap(), None);
        assert_eq!(put(&mut dialog, &right[40..]).unwrap(), Some(true));
        dialog.ask();
        assert_eq!(put(&mut dialog, &right).unwrap(), Some(false), "the answer to the one before");
        dialog.ask();
        assert!(put(&mut dialog, b"HTTP/1.1 503 Service Unavailable\r\n\r\n").unwrap_err().to_string().contains("503"));
        assert!(dialog.got(0).is_err());
    }

    #[test]
    fn requests_bear_the_tokens_in_turn() {
        let tokens: Arc<[String]> = ["aa", "bb", "cc"].map(String::from).into();
        let mut dialog = Talk::Http { host: "h".into(), path: "/x".into(), tokens }.dialog(0);
        for token in ["aa", "bb", "cc", "aa"] {
            let asked = String::from_utf8(dialog.ask().to_vec()).unwrap();
            assert!(asked.ends_with(&format!("\r\nauthorization: Bearer {token}\r\n\r\n")), "{asked}");
        }
    }

    #[test]
    fn an_echo_must_be_the_message() {
        let mut dialog = Talk::Echo { size: 20 }.dialog(0);
        let mut message = dialog.ask().to_vec();
        assert_eq!(put(&mut dialog, &message).unwrap(), Some(true));
        dialog.ask();
        message[7] = 9;
        assert_eq!(put(&mut dialog, &message).unwrap(), Some(false));
    }
}
