//! Access log lines: Istio's default text, or JSON under Istio's keys (spec/waypoint §4.2). Written straight into a buffer.
use super::record::{Record, TcpRecord};
use crate::facts::Facts;
use crate::upstream::{Cluster, Host};
use http::{HeaderValue, Version};
use std::fmt::Display;
use std::io::Write as _;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// One request's line.
pub(super) struct Line<'a> {
    pub conn: &'a Facts,
    pub record: &'a Record,
    pub elapsed: Duration,
    pub received: u64,
}
/// One connection's line.
pub(super) struct TcpLine<'a> {
    pub conn: &'a Facts,
    pub record: &'a TcpRecord,
    /// Towards the server, towards the client.
    pub bytes: (u64, u64),
}

impl Line<'_> {
    pub fn write(&self, out: &mut Vec<u8>, json: bool) {
        let r = self.record;
        let host = r.host.as_deref().map(upstream_host);
        let cluster = r.cluster.as_deref().map(|c| cluster_name(self.conn, c, "http"));
        let route = r.route.as_ref().map(|route| &*route.name);
        let service_time = r.upstream_time.map(|t| t.as_millis());
        let mut w = Writer { out, json, first: true };
        w.begin();
        if json {
            w.text("start_time", Some(&start_time(r.start_time)));
            w.text("route_name", route);
            w.text("method", Some(r.method.as_str()));
            w.text("path", Some(&r.path));
            w.text("protocol", Some(protocol(r.protocol)));
            w.number("response_code", Some(u64::from(r.status)));
            w.text("response_flags", Some(&r.flags.to_string()));
            w.text("response_code_details", filled(&r.details));
            w.text("connection_termination_details", None);
            w.number("bytes_received", Some(self.received));
            w.number("bytes_sent", Some(r.sent));
            w.number("duration", Some(self.elapsed.as_millis() as u64));
            w.number("upstream_service_time", service_time.map(|t| t as u64));
            w.text("x_forwarded_for", header(r.forwarded_for.as_ref()));
            w.text("user_agent", header(r.user_agent.as_ref()));
            w.text("request_id", header(r.request_id.as_ref()));
            w.text("authority", filled(&r.authority));
            w.text("upstream_host", host.as_deref());
            w.text("upstream_cluster", cluster.as_deref());
            w.text("upstream_local_address", None);
            w.shown("downstream_local_address", self.conn.local);
            w.shown("downstream_remote_address", self.conn.client);
            w.text("requested_server_name", self.conn.sni.as_deref());
            w.text("upstream_transport_failure_reason", filled(&r.transport_failure));
            if let Some(reason) = r.reason {
                w.text("reason", Some(reason.as_str()));
            }
            w.end();
            return;
        }
        // Writing to a Vec does not fail.
        let _ = write!(
            w.out,
            "[{}] \"{} {} {}\" {} {} {} - \"{}\" {} {} {} {} \"{}\" \"{}\" \"{}\" \"{}\" \"{}\" {} - {} {} {} {}",
            start_time(r.start_time),
            r.method,
            r.path,
            protocol(r.protocol),
            r.status,
            r.flags,
            dash(filled(&r.details)),
            dash(filled(&r.transport_failure)),
            self.received,
            r.sent,
            self.elapsed.as_millis(),
            service_time.map_or_else(|| "-".to_owned(), |t| t.to_string()),
            dash(header(r.forwarded_for.as_ref())),
            dash(header(r.user_agent.as_ref())),
            dash(header(r.request_id.as_ref())),
            dash(filled(&r.authority)),
            dash(host.as_deref()),
            dash(cluster.as_deref()),
            self.conn.local,
            self.conn.client,
            dash(self.conn.sni.as_deref()),
            dash(route),
        );
        if let Some(reason) = r.reason {
            let _ = write!(w.out, " reason={reason}");
        }
        w.end();
    }
}
impl TcpLine<'_> {
    pub fn write(&self, out: &mut Vec<u8>, json: bool) {
        let r = self.record;
        let host = r.host.as_deref().map(upstream_host);
        let cluster = r.cluster.as_deref().map(|c| cluster_name(self.conn, c, "tcp"));
        let now = SystemTime::now();
        let elapsed = r.started.elapsed();
        let begun = start_time(now.checked_sub(elapsed).unwrap_or(now));
        let mut w = Writer { out, json, first: true };
        w.begin();
        if json {
            w.text("start_time", Some(&begun));
            w.text("route_name", r.route.as_deref());
            for key in ["method", "path", "protocol"] {
                w.text(key, None);
            }
            w.number("response_code", Some(0));
            w.text("response_flags", Some(&r.flags.to_string()));
            w.text("response_code_details", None);
            w.text("connection_termination_details", filled(&r.details));
            w.number("bytes_received", Some(self.bytes.0));
            w.number("bytes_sent", Some(self.bytes.1));
            w.number("duration", Some(elapsed.as_millis() as u64));
            w.text("upstream_host", host.as_deref());
            w.text("upstream_cluster", cluster.as_deref());
            w.shown("downstream_local_address", self.conn.local);
            w.shown("downstream_remote_address", self.conn.client);
            w.text("requested_server_name", self.conn.sni.as_deref());
            if let Some(reason) = r.reason {
                w.text("reason", Some(reason.as_str()));
            }
            w.end();
            return;
        }
        // Writing to a Vec does not fail.
        let _ = write!(
            w.out,
            "[{begun}] \"- - -\" 0 {} - {} \"-\" {} {} {} - \"-\" \"-\" \"-\" \"-\" \"{}\" {} - {} {} {} {}",
            r.flags,
            dash(filled(&r.details)),
            self.bytes.0,
            self.bytes.1,
            elapsed.as_millis(),
            dash(host.as_deref()),
            dash(cluster.as_deref()),
            self.conn.local,
            self.conn.client,
            dash(self.conn.sni.as_deref()),
            dash(r.route.as_deref()),
        );
        if let Some(reason) = r.reason {
            let _ = write!(w.out, " reason={reason}");
        }
        w.end();
    }
}

fn dash(text: Option<&str>) -> &str {
    text.unwrap_or("-")
}
fn filled(text: &str) -> Option<&str> {
    (!text.is_empty()).then_some(text)
}
fn header(value: Option<&HeaderValue>) -> Option<&str> {
    value.and_then(|v| v.to_str().ok())
}
fn protocol(version: Version) -> &'static str {
    match version {
        Version::HTTP_10 => "HTTP/1.0",
        Version::HTTP_2 => "HTTP/2",
        _ => "HTTP/1.1",
    }
}
/// The endpoint as Istio's waypoints log it: through the internal listener when it is reached by HBONE.
fn upstream_host(host: &Host) -> String {
    if host.is_hbone() { format!("envoy://connect_originate/{}", host.addr()) } else { host.addr().to_string() }
}
/// `inbound-vip|port|http|host` for a service this waypoint stands in front of, else the outbound name.
fn cluster_name(conn: &Facts, cluster: &Cluster, kind: &str) -> String {
    match (conn.service(), cluster.service()) {
        (Some(asked), Some(service)) if asked.key == service.key => {
            format!("inbound-vip|{}|{kind}|{}", conn.port(), service.key.hostname)
        }
        _ => cluster.name().to_owned(),
    }
}

/// `2026-11-27T06:20:01.123Z` (Envoy's `%START_TIME%`).
fn start_time(at: SystemTime) -> String {
    let since = at.duration_since(UNIX_EPOCH).unwrap_or_default();
    let (days, second) = (since.as_secs() / 86_400, since.as_secs() % 86_400);
    // Days to a civil date (Howard Hinnant's algorithm, proleptic Gregorian), from 0000-03-01.
    let z = days + 719_468;
    let era = z / 146_097;
    let day_of_era = z % 146_097;
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted + 2) / 5 + 1;
    let month = if shifted < 10 { shifted + 3 } else { shifted - 9 };
    let year = year_of_era + era * 400 + u64::from(month <= 2);
    format!(
        "{year:04}-{month:02}-{day:02}T{:02}:{:02}:{:02}.{:03}Z",
        second / 3600,
        second % 3600 / 60,
        second % 60,
        since.subsec_millis()
    )
}

/// Writes fields.
struct Writer<'a> {
    out: &'a mut Vec<u8>,
    json: bool,
    first: bool,
}
impl Writer<'_> {
    fn begin(&mut self) {
        if self.json {
            self.out.push(b'{');
        }
    }
    fn end(&mut self) {
        self.out.extend_from_slice(if self.json { b"}\n" } else { b"\n" });
    }
    fn key(&mut self, key: &str) {
        if !self.first {
            self.out.push(b',');
        }
        self.first = false;
        self.out.push(b'"');
        self.out.extend_from_slice(key.as_bytes());
        self.out.extend_from_slice(b"\":");
    }
    fn text(&mut self, key: &str, value: Option<&str>) {
        self.key(key);
        match value {
            None => self.out.extend_from_slice(b"null"),
            Some(value) => {
                self.out.push(b'"');
                self.escaped(value);
                self.out.push(b'"');
            }
        }
    }
    fn number(&mut self, key: &str, value: Option<u64>) {
        self.key(key);
        // Writing to a Vec does not fail.
        let _ = match value {
            None => self.out.write_all(b"null"),
            Some(value) => write!(self.out, "{value}"),
        };
    }
    /// Something whose text needs no escaping.
    fn shown(&mut self, key: &str, value: impl Display) {
        self.key(key);
        let _ = write!(self.out, "\"{value}\"");
    }
    fn escaped(&mut self, text: &str) {
        for c in text.chars() {
            match c {
                '"' => self.out.extend_from_slice(b"\\\""),
                '\\' => self.out.extend_from_slice(b"\\\\"),
                c if u32::from(c) < 0x20 => {
                    let _ = write!(self.out, "\\u{:04x}", u32::from(c));
                }
                c => {
                    let mut bytes = [0; 4];
                    self.out.extend_from_slice(c.encode_utf8(&mut bytes).as_bytes());
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_utc_with_milliseconds() {
        for (seconds, text) in [
            (0, "1970-01-01T00:00:00.000Z"),
            (951_782_400, "2000-02-29T00:00:00.000Z"),
            (1_795_760_401, "2026-11-27T06:20:01.000Z"),
            (4_107_542_399, "2100-02-28T23:59:59.000Z"),
            (4_107_542_400, "2100-03-01T00:00:00.000Z"),
        ] {
            assert_eq!(start_time(UNIX_EPOCH + Duration::from_secs(seconds)), text);
        }
    }
    #[test]
    fn text_cannot_break_out_of_its_quotes() {
        let mut out = Vec::new();
        let mut w = Writer { out: &mut out, json: true, first: true };
        w.begin();
        w.text("path", Some("/a\"b\\c\n\u{7f}ü"));
        w.text("none", None);
        w.number("n", Some(7));
        w.end();
        let read: serde_json::Value = serde_json::from_slice(&out).expect("JSON");
        assert_eq!(read["path"], "/a\"b\\c\n\u{7f}ü");
        assert!(read["none"].is_null() && read["n"] == 7);
    }
}
