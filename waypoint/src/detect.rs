//! What a connection speaks, judged by its first bytes. Pure.
//!
//! Bounded: at most [`LIMIT`] bytes are looked at, and every prefix of every input has an answer. Upstream: `tunnel`,
//! `listen::gateway`.
use std::sync::Arc;

/// What the first bytes say.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Spoken {
    /// Not enough bytes to say.
    Unclear,
    /// HTTP/1.
    Http1,
    /// HTTP/2 with prior knowledge.
    Http2,
    /// TLS, with the name the client asks for.
    Tls(Option<Arc<str>>),
    /// Anything else.
    Other,
}

/// Most bytes that are looked at; a ClientHello or request line larger than this is [`Spoken::Other`].
pub const LIMIT: usize = 16 << 10;
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
/// Longest method of the registry, with room.
const METHOD: usize = 24;

/// Judges the first bytes of a client as more and more of them come: each of them is looked at once, however they come.
#[derive(Debug, Default)]
pub struct Detector {
    /// How many bytes of a request line were looked at, and where its method ends.
    looked: usize,
    method: Option<usize>,
    /// Where the last TLS record begins, how much of it is in `hello`, and what the records hold together.
    record: usize,
    taken: usize,
    hello: Vec<u8>,
}
/// Judges the first bytes of a client.
pub fn judge(bytes: &[u8]) -> Spoken {
    Detector::default().judge(bytes)
}

impl Detector {
    /// What `bytes` say: all that came so far, those of the calls before among them.
    pub fn judge(&mut self, bytes: &[u8]) -> Spoken {
        let Some(first) = bytes.first() else { return Spoken::Unclear };
        if *first == 0x16 {
            return self.tls(bytes);
        }
        let common = bytes.len().min(PREFACE.len());
        if bytes.get(..common) == PREFACE.get(..common) {
            return if common == PREFACE.len() { Spoken::Http2 } else { Spoken::Unclear };
        }
        self.http1(bytes)
    }

    /// A request line: `METHOD SP target SP HTTP/1.x`.
    fn http1(&mut self, bytes: &[u8]) -> Spoken {
        let token = |b: &u8| b.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(b);
        let fresh = |from: usize| bytes.get(from..).unwrap_or_default();
        let method = self.method.or_else(|| Some(self.looked + fresh(self.looked).iter().position(|b| !token(b))?));
        let Some(end) = method else {
            self.looked = bytes.len();
            return if bytes.len() > METHOD { Spoken::Other } else { Spoken::Unclear };
        };
        if end == 0 || end > METHOD || bytes.get(end) != Some(&b' ') {
            return Spoken::Other;
        }
        self.method = method;
        let from = self.looked.max(end + 1);
        let line_end = fresh(from).iter().position(|b| *b == b'\n').map(|at| from + at);
        let to = line_end.unwrap_or(bytes.len());
        let printable = bytes.get(from..to).unwrap_or_default().iter().all(|b| *b > b' ' || matches!(b, b' ' | b'\r'));
        if !printable || to >= LIMIT {
            return Spoken::Other;
        }
        self.looked = to;
        if line_end.is_none() {
            return Spoken::Unclear;
        }
        let line = bytes.get(end + 1..to).unwrap_or_default();
        let line = line.strip_suffix(b"\r").unwrap_or(line);
        let version = line.rsplit(|b| *b == b' ').next().unwrap_or_default();
        if version.starts_with(b"HTTP/1.") { Spoken::Http1 } else { Spoken::Other }
    }

    /// TLS records with a ClientHello (RFC 8446 §4.1.2, §5.1), which may be spread over several of them.
    fn tls(&mut self, bytes: &[u8]) -> Spoken {
        loop {
            let rest = bytes.get(self.record..).unwrap_or_default();
            let head = match rest {
                [0x16, 3, _, high, low, ..] => usize::from(u16::from_be_bytes([*high, *low])),
                [] | [0x16] | [0x16, 3] | [0x16, 3, _] | [0x16, 3, _, _] => return Spoken::Unclear,
                _ => return Spoken::Other,
            };
            if head == 0 || head > LIMIT {
                return Spoken::Other;
            }
            let body = rest.get(5..).unwrap_or_default();
            let have = head.min(body.len());
            self.hello.extend_from_slice(body.get(self.taken..have).unwrap_or_default());
            self.taken = have;
            match self.hello.as_slice() {
                [1, a, b, c, message @ ..] => {
                    let length = usize::from(*a) << 16 | usize::from(*b) << 8 | usize::from(*c);
                    if length > LIMIT {
                        return Spoken::Other;
                    }
                    if let Some(message) = message.get(..length) {
                        return Spoken::Tls(server_name(message));
                    }
                }
                [] | [1, ..] => {}
                _ => return Spoken::Other,
            }
            if body.len() <= head {
                return if bytes.len() >= LIMIT { Spoken::Other } else { Spoken::Unclear };
            }
            self.record += 5 + head;
            self.taken = 0;
        }
    }
}

/// A reader that answers `None` beyond the end.
struct Cursor<'a>(&'a [u8]);
impl<'a> Cursor<'a> {
    fn take(&mut self, n: usize) -> Option<&'a [u8]> {
        let (head, tail) = self.0.split_at_checked(n)?;
        self.0 = tail;
        Some(head)
    }
    fn u8(&mut self) -> Option<usize> {
        self.take(1)?.first().map(|b| usize::from(*b))
    }
    fn u16(&mut self) -> Option<usize> {
        match self.take(2)? {
            [a, b] => Some(usize::from(u16::from_be_bytes([*a, *b]))),
            _ => None,
        }
    }
}

/// The host name of the `server_name` extension (RFC 6066 §3), lower case.
fn server_name(hello: &[u8]) -> Option<Arc<str>> {
    let mut at = Cursor(hello);
    at.take(2 + 32)?;
    let session = at.u8()?;
    at.take(session)?;
    let suites = at.u16()?;
    at.take(suites)?;
    let compression = at.u8()?;
    at.take(compression)?;
    let length = at.u16()?;
    let mut extensions = Cursor(at.take(length)?);
    loop {
        let (kind, length) = (extensions.u16()?, extensions.u16()?);
        let body = extensions.take(length)?;
        if kind != 0 {
            continue;
        }
        let mut list = Cursor(body);
        list.u16()?;
        loop {
            let (kind, length) = (list.u8()?, list.u16()?);
            let name = list.take(length)?;
            if kind == 0 {
                let name = std::str::from_utf8(name).ok()?;
                let fine = !name.is_empty() && name.len() <= 255 && name.bytes().all(|b| b.is_ascii_graphic());
                return fine.then(|| name.to_ascii_lowercase().into());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A ClientHello for `name`, in records of at most `split` bytes.
    fn hello(name: &str, split: usize) -> Vec<u8> {
        let mut sni = vec![0, 0];
        let list = [&[0u8][..], &(name.len() as u16).to_be_bytes(), name.as_bytes()].concat();
        sni.extend(((list.len() + 2) as u16).to_be_bytes());
        sni.extend((list.len() as u16).to_be_bytes());
        sni.extend(list);
        let mut body = vec![3, 3];
        body.extend([7; 32]);
        body.push(0);
        body.extend([0, 2, 0x13, 1]);
        body.extend([1, 0]);
        body.extend((sni.len() as u16).to_be_bytes());
        body.extend(sni);
        let mut message = vec![1];
        message.extend(&(body.len() as u32).to_be_bytes()[1..]);
        message.extend(body);
        message.chunks(split).flat_map(|c| [&[0x16, 3, 1][..], &(c.len() as u16).to_be_bytes(), c].concat()).collect()
    }

    #[test]
    fn protocols_are_told_apart() {
        for (bytes, spoken) in [
            (&b"GET / HTTP/1.1\r\n"[..], Spoken::Http1),
            (b"GET /a%20b HTTP/1.0\n", Spoken::Http1),
            (b"PURGE-ALL * HTTP/1.1\r\n", Spoken::Http1),
            (PREFACE, Spoken::Http2),
            (b"GET / SIP/2.0\r\n", Spoken::Other),
            (b"\x00\x01\x02", Spoken::Other),
            (b"*1\r\n$4\r\nPING\r\n", Spoken::Other),
            (b"PING\r\n", Spoken::Other),
            (b" GET / HTTP/1.1\r\n", Spoken::Other),
            (b"THISISNOTAMETHODATALLANDLONG / HTTP/1.1\r\n", Spoken::Other),
            (b"GET /\x01 HTTP/1.1\r\n", Spoken::Other),
            (b"\x16\x01\x00", Spoken::Other),
        ] {
            assert_eq!(judge(bytes), spoken, "{:?}", String::from_utf8_lossy(bytes));
        }
    }
    #[test]
    fn every_prefix_waits_and_the_whole_decides() {
        for (whole, spoken) in [
            (b"GET / HTTP/1.1\r\n".to_vec(), Spoken::Http1),
            (PREFACE.to_vec(), Spoken::Http2),
            (hello("Api.Example.com", 4096), Spoken::Tls(Some("api.example.com".into()))),
            (hello("api.example.com", 9), Spoken::Tls(Some("api.example.com".into()))),
        ] {
            for n in 0..whole.len() {
                assert_eq!(judge(&whole[..n]), Spoken::Unclear, "{n} of {:?}", String::from_utf8_lossy(&whole));
            }
            assert_eq!(judge(&whole), spoken);
        }
    }
    #[test]
    fn pieces_say_what_the_whole_says_and_are_looked_at_once() {
        let mut long = b"GET /".to_vec();
        long.resize(LIMIT, b'a');
        let mut names = vec![hello("api.example.com", 1), hello(&"a".repeat(200), 7), hello("api.example.com", 1000)];
        names.push([&names[0][..60], b"GET / HTTP/1.1\r\n"].concat());
        let lines: [&[u8]; 6] =
            [b"GET / HTTP/1.1\r\nhost", b"GET / SIP/2.0\r\n", b"PRI * HTTP/1.1\r\n", b"PING\r\n", b"GET /\x01 ", &long];
        for whole in names.iter().map(Vec::as_slice).chain(lines) {
            for piece in [1, 2, 3, 5, 64] {
                let mut detector = Detector::default();
                for to in (piece..whole.len() + piece).step_by(piece).map(|to| to.min(whole.len())) {
                    let before = (detector.looked, detector.hello.len());
                    let spoken = detector.judge(&whole[..to]);
                    assert!(detector.looked - before.0 <= piece + METHOD && detector.hello.len() - before.1 <= piece);
                    // The whole is slow to look at again and again: that is what this is about.
                    if to < 512 || to > whole.len() - 8 {
                        assert_eq!(spoken, judge(&whole[..to]), "{to} in pieces of {piece}: {:?}", whole.get(..40));
                    }
                    if spoken != Spoken::Unclear {
                        break;
                    }
                }
            }
        }
    }
    #[test]
    fn a_name_that_is_not_one_is_none() {
        assert_eq!(judge(&hello("", 4096)), Spoken::Tls(None));
        assert_eq!(judge(&hello("a b", 4096)), Spoken::Tls(None));
    }
    #[test]
    fn endless_first_lines_end() {
        let mut long = b"GET /".to_vec();
        long.resize(LIMIT + 1, b'a');
        assert_eq!(judge(&long), Spoken::Other);
    }
}
