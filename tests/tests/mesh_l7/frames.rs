//! HTTP/2 written by hand, for what no library would send.
use anyhow::Context as _;
use mesh_tests::raw::Raw;

pub(crate) const DATA: u8 = 0;
pub(crate) const HEADERS: u8 = 1;
pub(crate) const RST_STREAM: u8 = 3;
pub(crate) const SETTINGS: u8 = 4;
pub(crate) const PING: u8 = 6;
pub(crate) const GOAWAY: u8 = 7;
pub(crate) const WINDOW_UPDATE: u8 = 8;
pub(crate) const CONTINUATION: u8 = 9;

pub(crate) const END_STREAM: u8 = 1;
pub(crate) const END_HEADERS: u8 = 4;

/// What a client begins with.
pub(crate) fn preface() -> Vec<u8> {
    [&b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"[..], &frame(SETTINGS, 0, 0, &[])].concat()
}

pub(crate) fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = (payload.len() as u32).to_be_bytes();
    [&length[1..], &[kind, flags], &stream.to_be_bytes(), payload].concat()
}

/// A header block without compression: every field literal, never indexed.
pub(crate) fn block(fields: &[(&str, &str)]) -> Vec<u8> {
    let mut out = Vec::new();
    for (name, value) in fields {
        out.push(0x10);
        for text in [name, value] {
            string(&mut out, text);
        }
    }
    out
}
/// Lengths up to 126 fit the prefix; more is continued in groups of seven bits.
fn string(out: &mut Vec<u8>, text: &str) {
    let mut length = text.len();
    if length < 127 {
        out.push(length as u8);
    } else {
        out.push(127);
        length -= 127;
        while length >= 128 {
            out.push((length % 128) as u8 | 128);
            length /= 128;
        }
        out.push(length as u8);
    }
    out.extend_from_slice(text.as_bytes());
}

/// What came of a stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Came {
    /// An answer with this status.
    Status(u16),
    /// RST_STREAM with this code.
    Reset(u32),
    /// GOAWAY with this code: the connection is over.
    GoAway(u32),
    /// The connection ended without a word.
    Ended,
}

fn word(bytes: &[u8]) -> u32 {
    bytes.iter().take(4).fold(0, |all, byte| all << 8 | u32::from(*byte))
}

/// A frame as it came: kind, flags, stream, payload.
pub(crate) type Frame = (u8, u8, u32, Vec<u8>);

/// The next frame; `None` at the end of the connection.
pub(crate) fn next(raw: &mut Raw) -> Option<Frame> {
    let head = raw.exactly(9).ok()?;
    let payload = raw.exactly(word(&[0, head[0], head[1], head[2]]) as usize).ok()?;
    Some((head[3], head[4], word(&head[5..9]), payload))
}

/// Reads until it is clear what came of `stream`.
pub(crate) fn outcome(raw: &mut Raw, stream: u32) -> anyhow::Result<Came> {
    loop {
        let Some((kind, _, on, payload)) = next(raw) else { return Ok(Came::Ended) };
        match kind {
            GOAWAY => match word(&payload[4..]) {
                // A farewell that lets the stream finish.
                0 => {}
                code => return Ok(Came::GoAway(code)),
            },
            RST_STREAM if on == stream => return Ok(Came::Reset(word(&payload))),
            HEADERS if on == stream => return Ok(Came::Status(status(&payload)?)),
            _ => {}
        }
    }
}

/// `:status`, which is the first field of an answer.
fn status(block: &[u8]) -> anyhow::Result<u16> {
    const STATIC: [u16; 7] = [200, 204, 206, 304, 400, 404, 500];
    match block {
        // Size updates of the table come first.
        [0x20..=0x3f, rest @ ..] => status(rest),
        [first @ 0x88..=0x8e, ..] => Ok(STATIC[usize::from(first - 0x88)]),
        [0x48 | 0x08 | 0x18, length, text @ ..] => {
            let text = &text[..usize::from(length & 0x7f)];
            let digits = if length & 0x80 == 0 { String::from_utf8(text.to_vec())? } else { unpacked(text) };
            digits.parse().with_context(|| format!("status {digits:?}"))
        }
        _ => anyhow::bail!("no status in {block:02x?}"),
    }
}
/// Three digits in HPACK's Huffman code (RFC 7541, appendix B): 0, 1, 2 in five bits, the others in six.
fn unpacked(text: &[u8]) -> String {
    let bits: Vec<u8> = text.iter().flat_map(|byte| (0..8).rev().map(move |at| byte >> at & 1)).collect();
    let value = |bits: &[u8]| bits.iter().fold(0_u8, |all, bit| all << 1 | bit);
    let (mut at, mut digits) = (0, String::new());
    while digits.len() < 3 && at + 5 <= bits.len() {
        let five = value(&bits[at..at + 5]);
        if five <= 2 {
            digits.push(char::from(b'0' + five));
            at += 5;
        } else {
            digits.push(char::from(b'0' + (value(&bits[at..(at + 6).min(bits.len())]).wrapping_sub(0x19) + 3)));
            at += 6;
        }
    }
    digits
}

/// The head of a good GET.
pub(crate) fn get(host: &str, path: &str) -> Vec<u8> {
    block(&[(":method", "GET"), (":scheme", "http"), (":authority", host), (":path", path)])
}

/// A good GET on a connection that may have seen things; true when it was answered 200.
pub(crate) fn still_serves(raw: &mut Raw, stream: u32, host: &str, path: &str) -> anyhow::Result<bool> {
    if raw.send(&frame(HEADERS, END_STREAM | END_HEADERS, stream, &get(host, path))).is_err() {
        return Ok(false);
    }
    Ok(outcome(raw, stream)? == Came::Status(200))
}
