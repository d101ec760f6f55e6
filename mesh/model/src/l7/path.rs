//! Path normalisation: one spelling for what upstreams take for one path, made before anything is matched.
//!
//! Owns: the four modes of Istio's `pathNormalization`, with the canonical form Envoy gives paths (RFC 3986 §5.2.4 and §6.2.2,
//! in the WHATWG URL dialect it inherits; measured against Envoy 1.40). It differs where Envoy's leaves a way around a rule:
//! `%2e%2e;` goes up as `..;` does, `\..;` too, and a path of slashes alone merges to `/`. Refuses: the query (cut off before)
//! and decoding what a decoder behind us could take for a delimiter, but in the mode that asks for it.
use std::borrow::Cow;
use std::str::FromStr;

/// How paths are normalised (Istio's `meshConfig.pathNormalization`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub enum PathNormalization {
    /// Taken as it comes.
    None,
    /// Dot segments are resolved (`%2e` is a dot), `\` is `/`, escapes of unreserved characters are undone, characters that
    /// belong escaped become so. `%2f` and `%5c` stay.
    #[default]
    Base,
    /// And runs of slashes become one.
    MergeSlashes,
    /// And `%2f` and `%5c` are slashes, before all else.
    DecodeAndMergeSlashes,
}
/// As settings write it: Istio's names in lower case with dashes.
impl FromStr for PathNormalization {
    type Err = NoPathNormalization;
    fn from_str(text: &str) -> Result<Self, NoPathNormalization> {
        match text {
            "none" => Ok(Self::None),
            "base" => Ok(Self::Base),
            "merge-slashes" => Ok(Self::MergeSlashes),
            "decode-and-merge-slashes" => Ok(Self::DecodeAndMergeSlashes),
            _ => Err(NoPathNormalization),
        }
    }
}
/// No mode has this name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("write none, base, merge-slashes or decode-and-merge-slashes")]
pub struct NoPathNormalization;

/// A path nobody should see: answered 400 (`path_normalization_failed`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadPath {
    /// Does not begin with `/`.
    #[error("the path does not begin with a slash")]
    NotAbsolute,
    /// Holds `#`: what follows is no part of a request.
    #[error("the path holds a fragment")]
    Fragment,
    /// Holds a byte that is not printable ASCII and was not escaped.
    #[error("the path holds bytes that must be escaped")]
    Unescaped,
    /// Holds an escaped NUL.
    #[error("the path holds a NUL")]
    Nul,
}

/// The normalised path. Borrowed when it already was.
pub fn normalize(mode: PathNormalization, path: &str) -> Result<Cow<'_, str>, BadPath> {
    if let Some(bad) = path.bytes().find(|b| !b.is_ascii_graphic() || *b == b'#') {
        return Err(if bad == b'#' { BadPath::Fragment } else { BadPath::Unescaped });
    }
    if !path.starts_with('/') {
        return Err(BadPath::NotAbsolute);
    }
    let path = Cow::Borrowed(path);
    Ok(match mode {
        PathNormalization::None => path,
        PathNormalization::Base => then(path, canonical)?,
        PathNormalization::MergeSlashes => then(then(path, canonical)?, |p| Ok(merge_slashes(p)))?,
        PathNormalization::DecodeAndMergeSlashes => {
            let decoded = then(path, |p| Ok(decode_slashes(p)))?;
            then(then(decoded, canonical)?, |p| Ok(merge_slashes(p)))?
        }
    })
}
/// One step more; stays borrowed while nothing changes.
fn then<'p>(
    path: Cow<'p, str>,
    step: impl for<'x> Fn(&'x str) -> Result<Cow<'x, str>, BadPath>,
) -> Result<Cow<'p, str>, BadPath> {
    match path {
        Cow::Borrowed(p) => step(p),
        Cow::Owned(p) => match step(&p)? {
            Cow::Owned(next) => Ok(Cow::Owned(next)),
            Cow::Borrowed(_) => Ok(Cow::Owned(p)),
        },
    }
}

/// What becomes of one byte.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Byte {
    /// Stays, escaped or not.
    Keep,
    /// Stays, and an escape of it is undone (RFC 3986 unreserved).
    Plain,
    /// Becomes an escape.
    Escape,
    /// Cannot be.
    Bad,
}
const BYTES: [Byte; 256] = {
    let mut table = [Byte::Escape; 256];
    let mut b = 0;
    while b < 256 {
        let c = b as u8;
        table[b] = match c {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' => Byte::Plain,
            0 => Byte::Bad,
            b'!' | b'$' | b'&'..=b',' | b'/' | b':' | b';' | b'=' | b'@' | b'[' | b']' | b'%' => Byte::Keep,
            _ => Byte::Escape,
        };
        b += 1;
    }
    table
};
fn kind(b: u8) -> Byte {
    BYTES.get(usize::from(b)).copied().unwrap_or(Byte::Bad)
}

/// The byte an escape at the start of `text` stands for.
fn escaped(text: &[u8]) -> Option<u8> {
    let hex = |b: u8| char::from(b).to_digit(16);
    match text {
        [b'%', high, low, ..] => u8::try_from(hex(*high)? * 16 + hex(*low)?).ok(),
        _ => None,
    }
}
/// Length of a dot at the start of `text`, plain or escaped.
fn dot(text: &[u8]) -> Option<usize> {
    match text {
        [b'.', ..] => Some(1),
        [b'%', b'2', b'e' | b'E', ..] => Some(3),
        _ => None,
    }
}
/// Length of what ends a dot segment at the start of `text`: its end, or a slash of either kind. Parameters (`..;x=1`) do
/// not keep it from being one, since they do not for servers that know them; they go with it, to the next `/`.
fn segment_end(text: &[u8]) -> Option<usize> {
    match text {
        [] => Some(0),
        [b'/' | b'\\', ..] => Some(1),
        [b';', ..] => Some(text.iter().position(|b| *b == b'/').map_or(text.len(), |slash| slash + 1)),
        _ => None,
    }
}

/// Dot segments resolved, `\` to `/`, escapes and characters in the form they belong in.
fn canonical(path: &str) -> Result<Cow<'_, str>, BadPath> {
    let bytes = path.as_bytes();
    let mut segment_starts = false;
    let canonical_already = bytes.iter().all(|b| {
        let dot_segment = segment_starts && *b == b'.';
        segment_starts = *b == b'/';
        !dot_segment && *b != b'%' && matches!(kind(*b), Byte::Keep | Byte::Plain)
    });
    if canonical_already {
        return Ok(Cow::Borrowed(path));
    }
    let mut out = String::with_capacity(path.len() + 8);
    // Where the last `%` that begins no escape went.
    let mut stray = None;
    let mut rest = bytes;
    while let Some((first, after)) = rest.split_first() {
        if out.ends_with('/')
            && let Some(past) = dot(rest)
        {
            let tail = rest.get(past..).unwrap_or_default();
            if let Some(end) = segment_end(tail) {
                rest = tail.get(end..).unwrap_or_default();
                continue;
            }
            let second = dot(tail).and_then(|n| tail.get(n..));
            if let Some(tail) = second
                && let Some(end) = segment_end(tail)
            {
                up(&mut out);
                rest = tail.get(end..).unwrap_or_default();
                continue;
            }
        }
        rest = after;
        match (*first, escaped_at(*first, after)) {
            (b'\\', _) => out.push('/'),
            (b'%', Some((value, text))) => {
                rest = after.get(2..).unwrap_or_default();
                match kind(value) {
                    Byte::Plain => {
                        out.push(char::from(value));
                        keep_stray(&mut out, stray, rest);
                    }
                    Byte::Bad => return Err(BadPath::Nul),
                    // As it was written: somebody behind us may compare.
                    Byte::Keep | Byte::Escape => {
                        out.push('%');
                        out.push_str(text);
                    }
                }
            }
            (b'%', None) => {
                stray = Some(out.len());
                out.push('%');
            }
            (b, _) => match kind(b) {
                Byte::Keep | Byte::Plain => out.push(char::from(b)),
                Byte::Escape => push_escape(&mut out, b),
                Byte::Bad => return Err(BadPath::Nul),
            },
        }
    }
    Ok(Cow::Owned(out))
}
/// A `%` that began no escape must not come to begin one because of a character decoded behind it (`%4%31` is not `%41`):
/// then it becomes `%25`. `rest` is what is still to be read.
fn keep_stray(out: &mut String, stray: Option<usize>, rest: &[u8]) {
    let Some(stray) = stray else { return };
    let begins_one = match out.as_bytes().get(stray..) {
        Some(text @ [_, _, _]) => escaped(text).is_some(),
        Some([percent, digit]) => rest.first().is_some_and(|next| escaped(&[*percent, *digit, *next]).is_some()),
        _ => false,
    };
    if begins_one {
        out.insert_str(stray + 1, "25");
    }
}
/// The value and digits of an escape that begins with `first`.
fn escaped_at(first: u8, after: &[u8]) -> Option<(u8, &str)> {
    let digits = after.get(..2).filter(|_| first == b'%')?;
    let value = escaped(&[first, *digits.first()?, *digits.last()?])?;
    Some((value, std::str::from_utf8(digits).ok()?))
}
fn push_escape(out: &mut String, b: u8) {
    const HEX: &[u8; 16] = b"0123456789ABCDEF";
    out.push('%');
    for nibble in [b >> 4, b & 15] {
        out.push(HEX.get(usize::from(nibble)).map_or('0', |h| char::from(*h)));
    }
}
/// From `…/a/` to `…/`; the root stays.
fn up(out: &mut String) {
    let parent = out.strip_suffix('/').and_then(|p| p.rfind('/'));
    out.truncate(parent.map_or(1, |slash| slash + 1));
}

/// `%2f` to `/`, `%5c` to `\` (which the canonical form then makes a slash).
fn decode_slashes(path: &str) -> Cow<'_, str> {
    let mut rest = path;
    let mut out = String::new();
    let mut done = 0;
    while let Some(at) = rest.find('%') {
        let (before, from) = rest.split_at(at);
        let slash = match escaped(from.as_bytes()) {
            Some(b'/') => Some('/'),
            Some(b'\\') => Some('\\'),
            _ => None,
        };
        let taken = if slash.is_some() { 3 } else { 1 };
        out.push_str(before);
        match slash {
            Some(slash) => {
                done += 1;
                out.push(slash);
            }
            None => out.push('%'),
        }
        // In range: an escape is three ASCII bytes, `%` one.
        rest = from.get(taken..).unwrap_or_default();
    }
    if done == 0 {
        return Cow::Borrowed(path);
    }
    out.push_str(rest);
    Cow::Owned(out)
}

/// Every run of slashes to one. (Envoy leaves `//` where the path is nothing but slashes; here that is the root too, or a rule
/// about `/` would not see it.)
fn merge_slashes(path: &str) -> Cow<'_, str> {
    if !path.contains("//") {
        return Cow::Borrowed(path);
    }
    let mut out = String::with_capacity(path.len());
    for c in path.chars() {
        if c != '/' || !out.ends_with('/') {
            out.push(c);
        }
    }
    Cow::Owned(out)
}

#[cfg(test)]
mod tests;
