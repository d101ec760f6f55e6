//! Which span of which trace a request is, as its headers say it: W3C Trace Context (`traceparent`) and Zipkin's B3, in one
//! header (`b3`) or several (`x-b3-…`).
//!
//! `traceparent` counts first, as in Envoy's OpenTelemetry tracer, which knows no B3; what is malformed counts as not there. A
//! request goes on with `traceparent`, and with B3 in the shape in which it brought that.

use http::{HeaderMap, HeaderName, HeaderValue};

/// `traceparent` (W3C Trace Context).
pub const TRACEPARENT: HeaderName = HeaderName::from_static("traceparent");
const TRACESTATE: HeaderName = HeaderName::from_static("tracestate");
const B3: HeaderName = HeaderName::from_static("b3");
const B3_TRACE: HeaderName = HeaderName::from_static("x-b3-traceid");
const B3_SPAN: HeaderName = HeaderName::from_static("x-b3-spanid");
const B3_PARENT: HeaderName = HeaderName::from_static("x-b3-parentspanid");
const B3_SAMPLED: HeaderName = HeaderName::from_static("x-b3-sampled");
const B3_FLAGS: HeaderName = HeaderName::from_static("x-b3-flags");

/// A W3C trace context: `00-<trace id>-<parent id>-<flags>`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TraceParent {
    /// 128 bits, never zero.
    pub trace: u128,
    /// 64 bits, never zero.
    pub parent: u64,
    /// Bit 0: sampled.
    pub flags: u8,
}

impl TraceParent {
    /// Reads a `traceparent`; `None` when it is not a valid one (Trace Context §3.2.2). Versions above 00 are read by
    /// their first four fields, as the specification asks.
    pub fn parse(value: &[u8]) -> Option<Self> {
        let value = std::str::from_utf8(value).ok()?.trim();
        if !value.is_ascii() || value.len() < 55 {
            return None;
        }
        let (version, rest) = (value.get(..2)?, value.get(2..)?);
        let version = lower_hex(version)? as u8;
        if version == 0xff || (version == 0 && value.len() != 55) || (value.len() > 55 && rest.get(53..54)? != "-") {
            return None;
        }
        let mut fields = rest.get(1..53)?.split('-');
        if !rest.starts_with('-') {
            return None;
        }
        let trace = lower_hex(fields.next().filter(|f| f.len() == 32)?)?;
        let parent = lower_hex(fields.next().filter(|f| f.len() == 16)?)? as u64;
        let flags = lower_hex(fields.next().filter(|f| f.len() == 2)?)? as u8;
        (trace != 0 && parent != 0).then_some(Self { trace, parent, flags })
    }

    /// Whether the span is told of.
    pub fn is_sampled(self) -> bool {
        self.flags & 1 == 1
    }

    /// The header value.
    pub fn encode(self) -> Option<HeaderValue> {
        // Not by the formatter: every request that is traced has one.
        let mut text = *b"00-00000000000000000000000000000000-0000000000000000-00";
        let (head, flags) = text.split_at_mut(53);
        let (head, parent) = head.split_at_mut(36);
        write_hex(head.get_mut(3..35)?, self.trace);
        write_hex(parent.get_mut(..16)?, self.parent.into());
        write_hex(flags, self.flags.into());
        HeaderValue::from_bytes(&text).ok()
    }
}

/// Lower-case hexadecimal digits only, at most 32.
fn lower_hex(text: &str) -> Option<u128> {
    text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f')).then(|| u128::from_str_radix(text, 16).ok())?
}
/// The lowest digits of a number, as many as there is room for.
fn write_hex(out: &mut [u8], mut n: u128) {
    for place in out.iter_mut().rev() {
        let digit = (n & 0xf) as u8;
        *place = if digit < 10 { b'0' + digit } else { b'a' - 10 + digit };
        n >>= 4;
    }
}

/// What a request said of the trace it is part of.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Incoming {
    /// Trace, and the span that sent it.
    pub ids: Option<(u128, u64)>,
    /// Whether that span is told of; `None` when the sender left it to us.
    pub sampled: Option<bool>,
    said: Shape,
}
/// How it said that.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Shape {
    w3c: bool,
    single: bool,
    multi: bool,
}
/// Of a span that is known otherwise than by the headers of what it carries.
impl From<TraceParent> for Incoming {
    fn from(span: TraceParent) -> Self {
        Self { ids: Some((span.trace, span.parent)), sampled: Some(span.is_sampled()), said: Shape::default() }
    }
}
impl Incoming {
    /// Reads the headers of a request.
    pub fn read(headers: &HeaderMap) -> Self {
        let single = headers.get(B3);
        let multi = [B3_TRACE, B3_SAMPLED, B3_FLAGS].iter().any(|n| headers.contains_key(n));
        let w3c = headers.get(TRACEPARENT).and_then(|v| TraceParent::parse(v.as_bytes()));
        let said = Shape { w3c: w3c.is_some(), single: single.is_some(), multi };
        let (ids, sampled) = match w3c {
            Some(w3c) => (Some((w3c.trace, w3c.parent)), Some(w3c.is_sampled())),
            None if said.single => single.and_then(|v| of_single(v.to_str().ok()?)).unwrap_or_default(),
            None if said.multi => of_multi(headers).unwrap_or_default(),
            None => (None, None),
        };
        Self { ids, sampled, said }
    }
}

/// Trace and span, and whether they are told of.
type Said = (Option<(u128, u64)>, Option<bool>);

/// `<trace>-<span>[-<sampled>[-<parent>]]`, or the decision alone.
fn of_single(value: &str) -> Option<Said> {
    let mut fields = value.split('-');
    let (first, span) = (fields.next()?, fields.next());
    let Some(span) = span else { return Some((None, Some(decision(first)?))) };
    let sampled = fields.next().map(|d| decision(d).ok_or(())).transpose().ok()?;
    // The sender's own parent tells us nothing, but has to be one.
    let rest = fields.next().is_none_or(|parent| id(parent, &[16]).is_some()) && fields.next().is_none();
    rest.then(|| Some((Some((id(first, &[16, 32])?, id(span, &[16])? as u64)), sampled)))?
}
fn of_multi(headers: &HeaderMap) -> Option<Said> {
    let text = |name: &HeaderName| headers.get(name).map(|v| v.to_str().unwrap_or_default());
    let sampled = match text(&B3_FLAGS) {
        Some("1") => Some(true),
        _ => text(&B3_SAMPLED).map(|d| decision(d).ok_or(())).transpose().ok()?,
    };
    let ids = match (text(&B3_TRACE), text(&B3_SPAN)) {
        (None, None) => None,
        (trace, span) => Some((id(trace?, &[16, 32])?, id(span?, &[16])? as u64)),
    };
    Some((ids, sampled))
}
/// `d` (debug) is told of in any case; older libraries write words.
fn decision(text: &str) -> Option<bool> {
    match text {
        "1" | "d" | "true" => Some(true),
        "0" | "false" => Some(false),
        _ => None,
    }
}
fn id(text: &str, lengths: &[usize]) -> Option<u128> {
    lengths.contains(&text.len()).then(|| lower_hex(text)).flatten().filter(|n| *n != 0)
}

/// Which span of which trace a request is here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Context {
    /// The trace, never zero.
    pub trace: u128,
    /// The span of this proxy, never zero.
    pub span: u64,
    /// The span it is part of.
    pub parent: Option<u64>,
    /// It is told of.
    pub sampled: bool,
    said: Shape,
}
impl Context {
    /// A span under what came in, or the first of a new trace; `fresh` are random ids for what it needs.
    pub fn under(incoming: Incoming, fresh: (u128, u64), sampled: bool) -> Self {
        let (trace, parent) = incoming.ids.map_or((fresh.0.max(1), None), |(trace, parent)| (trace, Some(parent)));
        Self { trace, span: fresh.1.max(1), parent, sampled, said: incoming.said }
    }
    /// A span under this one, told of if this one is.
    #[must_use]
    pub fn child(self, fresh: u64) -> Self {
        Self { span: fresh.max(1), parent: Some(self.span), ..self }
    }
    /// A span under this one that is not told of.
    #[must_use]
    pub fn silent_child(self, fresh: u64) -> Self {
        Self { sampled: false, ..self.child(fresh) }
    }
    /// This span as what comes after it is told of it.
    pub fn parent_of_others(&self) -> TraceParent {
        TraceParent { trace: self.trace, parent: self.span, flags: self.sampled.into() }
    }
    /// Tells whoever the request goes to. What the request said before is replaced; `tracestate` stays where its trace does.
    pub fn inject(&self, headers: &mut HeaderMap) {
        let w3c = self.parent_of_others();
        if !self.said.w3c {
            // It speaks of another trace than ours, or of none that could be read (Trace Context §3.3).
            headers.remove(TRACESTATE);
        }
        if let Some(value) = w3c.encode() {
            headers.insert(TRACEPARENT, value);
        }
        if self.said.single {
            self.inject_single(headers);
        }
        if self.said.multi {
            self.inject_multi(headers);
        }
    }
    fn inject_single(&self, headers: &mut HeaderMap) {
        let parent = self.parent.map(|parent| format!("-{parent:016x}")).unwrap_or_default();
        let text = format!("{}-{:016x}-{}{parent}", self.trace_of_b3(), self.span, u8::from(self.sampled));
        if let Ok(value) = HeaderValue::try_from(text) {
            headers.insert(B3, value);
        }
    }
    fn inject_multi(&self, headers: &mut HeaderMap) {
        let parent = self.parent.map(|parent| format!("{parent:016x}"));
        let ids = [(B3_TRACE, Some(self.trace_of_b3())), (B3_SPAN, Some(format!("{:016x}", self.span))), (B3_PARENT, parent)];
        for (name, text) in ids {
            match text.and_then(|text| HeaderValue::try_from(text).ok()) {
                Some(value) => headers.insert(name, value),
                None => headers.remove(name),
            };
        }
        headers.insert(B3_SAMPLED, HeaderValue::from_static(if self.sampled { "1" } else { "0" }));
    }
    /// Traces of 64 bits stay that short for those who began them.
    fn trace_of_b3(&self) -> String {
        u64::try_from(self.trace).map_or_else(|_| format!("{:032x}", self.trace), |short| format!("{short:016x}"))
    }
}

#[cfg(test)]
mod tests;
