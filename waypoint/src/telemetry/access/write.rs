//! Values of fields, written as text or as JSON without a detour.
use crate::telemetry::Flags;
use mesh_runtime::logging::{JsonText, Visible, push_second};
use std::fmt::Write as _;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

/// How lines look.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Shape {
    /// As Envoy's text format: nothing quoted, `-` for what is not there.
    Text,
    /// Values of a JSON object, `null` for what is not there.
    Json,
}

/// A value.
#[derive(Clone, Copy, Debug)]
pub(super) enum Value<'a> {
    /// There is none.
    Absent,
    /// Text.
    Text(&'a str),
    /// A header's value, which need not be text.
    Bytes(&'a [u8]),
    /// A number.
    Number(u64),
    /// A number that is text in JSON: the value of a header.
    Digits(u64),
    /// A moment, since 1970.
    Time(Duration),
    /// An address with something before it.
    Address(&'static str, SocketAddr),
    /// Response flags.
    Flags(Flags),
    /// A cluster of the waypoint's own services.
    Inbound { port: &'a str, protocol: &'static str, subset: &'a str, host: &'a str },
}

impl Value<'_> {
    pub(super) fn write(self, shape: Shape, out: &mut String) {
        let bare = match self {
            Self::Absent => {
                out.push_str(if shape == Shape::Json { "null" } else { "-" });
                return;
            }
            Self::Number(_) => true,
            _ => shape == Shape::Text,
        };
        if !bare {
            out.push('"');
        }
        match self {
            Self::Absent => {}
            Self::Text(text) => escape(shape, out, text),
            Self::Bytes(bytes) => match std::str::from_utf8(bytes) {
                Ok(text) => escape(shape, out, text),
                Err(_) => escape(shape, out, &String::from_utf8_lossy(bytes)),
            },
            Self::Number(n) | Self::Digits(n) => digits(out, n),
            Self::Time(time) => moment(out, time),
            Self::Address(before, addr) => {
                out.push_str(before);
                address(out, addr);
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
        if !bare {
            out.push('"');
        }
    }
}

/// Whatever a peer sends, it stays in its line and its quotes.
fn escape(shape: Shape, out: &mut String, text: &str) {
    // Writing to a String cannot fail.
    let _ = match shape {
        Shape::Text => Visible(out).write_str(text),
        Shape::Json => JsonText(out).write_str(text),
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

/// `2024-01-31T12:00:00.123Z`, Envoy's default.
fn moment(out: &mut String, since_1970: Duration) {
    push_second(out, since_1970.as_secs());
    out.push('.');
    let millis = since_1970.subsec_millis();
    for place in [100, 10, 1] {
        digits(out, u64::from(millis / place % 10));
    }
    out.push('Z');
}

#[cfg(test)]
mod tests {
    use super::*;

    fn json(value: Value<'_>) -> String {
        let mut out = String::new();
        value.write(Shape::Json, &mut out);
        out
    }
    fn text(value: Value<'_>) -> String {
        let mut out = String::new();
        value.write(Shape::Text, &mut out);
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
        let at = |s: u64, ms: u32| text(Value::Time(Duration::new(s, ms * 1_000_000)));
        assert_eq!(at(0, 0), "1970-01-01T00:00:00.000Z");
        assert_eq!(at(1_709_210_096, 7), "2024-02-29T12:34:56.007Z");
        assert_eq!(at(1_709_210_096, 999), "2024-02-29T12:34:56.999Z", "the second is remembered");
        assert_eq!(at(1_709_210_097, 40), "2024-02-29T12:34:57.040Z");
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
