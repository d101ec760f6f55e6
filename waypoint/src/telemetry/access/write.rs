//! Values of fields, written as text or as JSON without a detour.
use crate::telemetry::Flags;
use mesh_model::telemetry::format::{TimeFormat, TimePart};
use mesh_runtime::logging::{JsonText, Visible, push_second};
use std::borrow::Cow;
use std::fmt::Write as _;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

/// What values are written into.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Shape {
    /// A line of text: `-` for what is not there.
    Text,
    /// A string of a JSON object.
    Json,
    /// A text nobody reads line by line: nothing is escaped, what is not there is empty.
    Raw,
}

/// A value.
#[derive(Clone, Debug)]
pub(super) enum Value<'a> {
    /// There is none.
    Absent,
    /// Text.
    Text(&'a str),
    /// Text that was made for this line.
    Owned(Cow<'a, str>),
    /// A header's value, which need not be text.
    Bytes(&'a [u8]),
    /// A number.
    Number(u64),
    /// A number that is text in JSON: the value of a header.
    Digits(u64),
    /// A moment, since 1970.
    Time(&'a TimeFormat, Duration),
    /// An address with something before it.
    Address(&'static str, SocketAddr),
    /// Response flags.
    Flags(Flags),
    /// A cluster of the waypoint's own services.
    Inbound { port: &'a str, protocol: &'static str, subset: &'a str, host: &'a str },
}

impl Value<'_> {
    /// Whether there is none.
    pub fn is_absent(&self) -> bool {
        matches!(self, Self::Absent)
    }
    /// Appends it as a JSON value, of at most `most` characters.
    pub fn write_json(&self, most: Option<usize>, out: &mut String) {
        match self {
            Self::Absent => out.push_str("null"),
            Self::Number(n) if most.is_none() => digits(out, *n),
            _ => {
                out.push('"');
                self.write_bare(Shape::Json, most, out);
                out.push('"');
            }
        }
    }
    /// Appends it as a part of a text, of at most `most` characters.
    pub fn write_bare(&self, shape: Shape, most: Option<usize>, out: &mut String) {
        if let Some(most) = most {
            let mut whole = String::new();
            self.write_bare(Shape::Raw, None, &mut whole);
            let end = whole.char_indices().nth(most).map_or(whole.len(), |(at, _)| at);
            return match (self, whole.get(..end)) {
                (Self::Absent, _) => self.write_bare(shape, None, out),
                (_, cut) => escape(shape, out, cut.unwrap_or_default()),
            };
        }
        match self {
            Self::Absent => out.push_str(if shape == Shape::Raw { "" } else { "-" }),
            Self::Text(text) => escape(shape, out, text),
            Self::Owned(text) => escape(shape, out, text),
            Self::Bytes(bytes) => match std::str::from_utf8(bytes) {
                Ok(text) => escape(shape, out, text),
                Err(_) => escape(shape, out, &String::from_utf8_lossy(bytes)),
            },
            Self::Number(n) | Self::Digits(n) => digits(out, *n),
            Self::Time(format, time) => moment(format, shape, out, *time),
            Self::Address(before, addr) => {
                out.push_str(before);
                address(out, *addr);
            }
            Self::Flags(flags) => {
                // Writing to a String cannot fail.
                let _ = write!(out, "{flags}");
            }
            Self::Inbound { port, protocol, subset, host } => {
                for part in ["inbound-vip|", port, "|", protocol, if subset.is_empty() { "" } else { "/" }, subset, "|"] {
                    out.push_str(part);
                }
                escape(shape, out, host);
            }
        }
    }
}

/// Whatever a peer sends, it stays in its line and its quotes.
pub(super) fn escape(shape: Shape, out: &mut String, text: &str) {
    // Writing to a String cannot fail.
    let _ = match shape {
        Shape::Text => Visible(out).write_str(text),
        Shape::Json => JsonText(out).write_str(text),
        Shape::Raw => out.write_str(text),
    };
}

/// A number in decimal.
fn digits(out: &mut String, mut n: u64) {
    let mut text = [b'0'; 20];
    let mut at = text.len();
    loop {
        at -= 1;
        // A digit, at an index that 20 digits of a u64 keep in range.
        if let Some(place) = text.get_mut(at) {
            *place = b'0' + (n % 10) as u8;
        }
        n /= 10;
        if n == 0 || at == 0 {
            break;
        }
    }
    out.push_str(std::str::from_utf8(text.get(at..).unwrap_or_default()).unwrap_or_default());
}

fn address(out: &mut String, addr: SocketAddr) {
    match addr.ip().to_canonical() {
        IpAddr::V4(ip) => {
            let [a, b, c, d] = ip.octets();
            digits(out, a.into());
            for part in [b, c, d] {
                out.push('.');
                digits(out, part.into());
            }
        }
        IpAddr::V6(ip) => {
            let _ = write!(out, "[{ip}]");
        }
    }
    out.push(':');
    digits(out, addr.port().into());
}

fn moment(format: &TimeFormat, shape: Shape, out: &mut String, since_1970: Duration) {
    match format {
        TimeFormat::Default => {
            push_second(out, since_1970.as_secs());
            out.push('.');
            fraction(out, since_1970, 3);
            out.push('Z');
        }
        TimeFormat::Parts(parts) => {
            let mut text = String::with_capacity(20);
            push_second(&mut text, since_1970.as_secs());
            for part in parts {
                time_part(part, &text, shape, out, since_1970);
            }
        }
    }
}
/// `text` is `2024-01-31T12:00:00`.
fn time_part(part: &TimePart, text: &str, shape: Shape, out: &mut String, since_1970: Duration) {
    const MONTHS: [&str; 12] = ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"];
    // 1970 began on a Thursday.
    const DAYS: [&str; 7] = ["Thu", "Fri", "Sat", "Sun", "Mon", "Tue", "Wed"];
    let of = |range: std::ops::Range<usize>| text.get(range).unwrap_or_default();
    let found = match part {
        TimePart::Text(text) => return escape(shape, out, text),
        TimePart::Epoch => return digits(out, since_1970.as_secs()),
        TimePart::Fraction(places) => return fraction(out, since_1970, *places),
        TimePart::Year => of(0..4),
        TimePart::YearOfCentury => of(2..4),
        TimePart::Month => of(5..7),
        TimePart::MonthName => {
            of(5..7).parse::<usize>().ok().and_then(|m| MONTHS.get(m.wrapping_sub(1))).copied().unwrap_or_default()
        }
        TimePart::Day => of(8..10),
        TimePart::Weekday => DAYS.get((since_1970.as_secs() / 86_400 % 7) as usize).copied().unwrap_or_default(),
        TimePart::Hour => of(11..13),
        TimePart::Minute => of(14..16),
        TimePart::Second => of(17..19),
    };
    out.push_str(found);
}
/// The first digits of the second's fraction.
fn fraction(out: &mut String, since_1970: Duration, places: u8) {
    let mut unit = 100_000_000;
    for _ in 0..places.min(9) {
        digits(out, u64::from(since_1970.subsec_nanos() / unit % 10));
        unit = (unit / 10).max(1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn json(value: Value<'_>) -> String {
        let mut out = String::new();
        value.write_json(None, &mut out);
        out
    }
    fn text(value: Value<'_>) -> String {
        let mut out = String::new();
        value.write_bare(Shape::Text, None, &mut out);
        out
    }

    #[test]
    fn numbers_are_written_whole() {
        for n in [0, 7, 10, 999, 1_000, u64::MAX] {
            assert_eq!(text(Value::Number(n)), n.to_string());
        }
        assert_eq!(json(Value::Number(5)), "5");
        assert_eq!(json(Value::Digits(5)), "\"5\"");
    }
    #[test]
    fn moments_have_milliseconds() {
        let at = |s: u64, ms: u32| text(Value::Time(&TimeFormat::Default, Duration::new(s, ms * 1_000_000)));
        assert_eq!(at(0, 0), "1970-01-01T00:00:00.000Z");
        assert_eq!(at(1_709_210_096, 7), "2024-02-29T12:34:56.007Z");
        assert_eq!(at(1_709_210_096, 999), "2024-02-29T12:34:56.999Z", "the second is remembered");
        assert_eq!(at(1_709_210_097, 40), "2024-02-29T12:34:57.040Z");
    }
    #[test]
    fn moments_are_written_as_asked() {
        use mesh_model::telemetry::format::{Of, Part, Template};
        let write = |format: &str| {
            let Template(parts) = Template::parse(&format!("%START_TIME({format})%"), &|_| None).expect(format);
            let Part::Field(field) = &parts[0] else { panic!("a field") };
            let Of::StartTime(format) = &field.of else { panic!("a time") };
            text(Value::Time(format, Duration::new(1_709_210_096, 7_654_321)))
        };
        assert_eq!(write("%s.%3f"), "1709210096.007");
        assert_eq!(write("%a, %d %b %Y %T %Z"), "Thu, 29 Feb 2024 12:34:56 UTC");
        assert_eq!(write("%F %y/%m %H:%M:%S.%f%z %%"), "2024-02-29 24/02 12:34:56.007654321+0000 %");
    }
    #[test]
    fn values_are_cut_at_characters() {
        let cut = |value: Value<'_>, most| {
            let mut out = String::new();
            value.write_json(Some(most), &mut out);
            out
        };
        assert_eq!(cut(Value::Text("äbc\n"), 2), "\"äb\"");
        assert_eq!(cut(Value::Number(12345), 3), "\"123\"");
        assert_eq!(cut(Value::Text("ab"), 9), "\"ab\"");
        assert_eq!(cut(Value::Absent, 3), "null");
    }
    #[test]
    fn addresses_are_written_as_they_are_known() {
        for (addr, written) in [
            ("10.0.0.7:80", "10.0.0.7:80"),
            ("255.255.255.255:65535", "255.255.255.255:65535"),
            ("[::ffff:10.0.0.7]:80", "10.0.0.7:80"),
            ("[fd00::1]:8080", "[fd00::1]:8080"),
        ] {
            assert_eq!(text(Value::Address("", addr.parse().expect("an address"))), written);
        }
    }
    #[test]
    fn nobody_else_begins_a_line() {
        let evil = "a\r\n\"b\\\t\u{7f}é\u{0}";
        assert_eq!(text(Value::Text(evil)), "a\\r\\n\"b\\\\t\\u{7f}é\\0");
        let back: String = serde_json::from_str(&json(Value::Text(evil))).expect("JSON");
        assert_eq!(back, evil);
        assert_eq!(json(Value::Bytes(b"a\xff")), "\"a\u{fffd}\"");
    }
}
