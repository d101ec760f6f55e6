//! What was seen of one side, as named aspects, and how two sides differ.
//!
//! Normalises only what must differ between any two runs: dates, times, generated ids. Everything else that differs is told.
use std::collections::{BTreeMap, BTreeSet};
use std::io::Read as _;

use mesh_tests::http1::{Answer, End};

use crate::backend::Seen;
use crate::case::{Case, Judge};
use crate::differences::{DIFFERENCES, Difference, EVERYWHERE, What, is_aspect};

/// What the access log says of one request.
#[derive(Clone, Debug, Default)]
pub struct Logged {
    /// Response flags.
    pub flags: String,
    /// Response code details.
    pub details: String,
    /// Whether the line every request has is there; it comes after the others.
    pub whole: bool,
    /// Lines of the scenario's own formats, by number.
    pub lines: BTreeMap<String, String>,
    /// Labels of its metrics.
    pub tags: BTreeMap<String, String>,
}

/// One request as it went on one side.
#[derive(Clone, Debug)]
pub struct Observed {
    /// The answer, or why there was none.
    pub answer: Result<Answer, String>,
    /// What came back after an upgrade.
    pub echoed: Option<String>,
    /// What the endpoints saw.
    pub seen: Vec<Seen>,
    /// The log.
    pub logged: Option<Logged>,
    /// The id it was sent with.
    pub id: String,
    /// The proxy was not told the id.
    pub anonymous: bool,
}

/// Named aspects.
pub type Aspects = BTreeMap<String, String>;

/// All aspects of a case on one side.
pub fn aspects(case: &Case, all: &[Observed], took_ms: u64) -> Aspects {
    let mut out = Aspects::new();
    if let Some((least, most)) = case.takes {
        let right = (least..=most).contains(&took_ms);
        out.insert("time".into(), if right { format!("within {least} to {most} ms") } else { format!("{took_ms} ms") });
    }
    match case.judge {
        Judge::Whole => {
            for (at, one) in all.iter().enumerate() {
                let number = if all.len() == 1 { String::new() } else { format!("{} ", at + 1) };
                whole(&number, one, !case.arrives_or_not, &mut out);
            }
        }
        Judge::Tally => {
            let mut counts: BTreeMap<String, usize> = BTreeMap::new();
            for one in all {
                *counts.entry(short(one)).or_default() += 1;
            }
            out.extend(counts.into_iter().map(|(what, n)| (format!("answers {what}"), n.to_string())));
        }
        Judge::Share { version, percent, tolerance } => {
            let statuses: BTreeSet<String> = all.iter().map(status).collect();
            out.insert("statuses".into(), format!("{statuses:?}"));
            let hits = all.iter().filter(|one| header(one, "x-served-by") == Some(version)).count();
            let share = hits as f64 * 100.0 / all.len() as f64;
            let right = (share - percent).abs() <= tolerance;
            let text = if right {
                format!("{percent} ± {tolerance} %")
            } else {
                format!("{share:.1} %, not {percent} ± {tolerance} %")
            };
            out.insert(format!("share of {version}"), text);
        }
    }
    out
}

fn header<'a>(one: &'a Observed, name: &str) -> Option<&'a str> {
    one.answer.as_ref().ok()?.header(name)
}

fn status(one: &Observed) -> String {
    one.answer.as_ref().map_or_else(|_| "none".into(), |answer| answer.status.to_string())
}

fn short(one: &Observed) -> String {
    let flags = one.logged.as_ref().map_or("?", |logged| &logged.flags);
    let mut text = format!("{} {flags}", status(one));
    if let Some(value) = header(one, "x-envoy-overloaded") {
        text += &format!(" overloaded={value}");
    }
    if let Some(version) = header(one, "x-served-by") {
        text += &format!(" by {version}");
    }
    text
}

fn whole(number: &str, one: &Observed, with_arrivals: bool, out: &mut Aspects) {
    let mut put = |name: &str, value: String| {
        out.insert(format!("{number}{name}"), value);
    };
    match &one.answer {
        Err(_why) => put("status", "none".into()),
        Ok(answer) => {
            put("status", answer.status.to_string());
            put("version", answer.version.clone());
            put("body", body(answer));
            put(
                "end",
                match answer.end {
                    End::Kept => "kept".into(),
                    End::Closed => "closed".into(),
                    End::Broken => "broken".into(),
                },
            );
            for (name, value) in gather(&answer.headers, &one.id) {
                put(&format!("header {name}"), value);
            }
            for (name, value) in gather(&answer.trailers, &one.id) {
                put(&format!("trailer {name}"), value);
            }
        }
    }
    if let Some(echoed) = &one.echoed {
        put("after upgrade", echoed.clone());
    }
    match &one.logged {
        // The line cannot be found without the id.
        None if one.anonymous => {}
        None => put("log", "nothing".into()),
        Some(logged) => {
            put("flags", logged.flags.clone());
            put("details", logged.details.clone());
            for (number, line) in &logged.lines {
                put(&format!("line {number}"), line.clone());
            }
            for (name, value) in &logged.tags {
                put(&format!("tag {name}"), value.clone());
            }
        }
    }
    if !with_arrivals {
        return;
    }
    put("arrivals", one.seen.len().to_string());
    // Copies come when they come: in an order that does not depend on time.
    let mut seen: Vec<&Seen> = one.seen.iter().collect();
    let key = |one: &&Seen| (shadow(one), one.version.clone(), one.line.clone());
    seen.sort_by_key(key);
    for (at, arrival) in seen.iter().enumerate() {
        let name = format!("arrival {}", at + 1);
        put(&format!("{name} at"), format!("{} {}", arrival.version, arrival.protocol));
        put(&format!("{name} line"), arrival.line.clone());
        put(
            &format!("{name} body"),
            if arrival.whole { String::from_utf8_lossy(&arrival.body).into_owned() } else { "cut".into() },
        );
        let retried = arrival.headers.iter().any(|(name, value)| name == "x-envoy-attempt-count" && value != "1");
        for (header, mut value) in gather(&arrival.headers, &one.id) {
            // What is left of the time, at another moment on either side.
            if retried && header == "x-envoy-expected-rq-timeout-ms" && value.parse::<u64>().is_ok() {
                value = "what is left".into();
            }
            put(&format!("{name} header {header}"), value);
        }
    }
}

/// The body, decoded: compressors may pack differently.
fn body(answer: &Answer) -> String {
    let mut plain = Vec::new();
    let decoded = match answer.header("content-encoding") {
        Some("gzip") => flate2::read::GzDecoder::new(&*answer.body).read_to_end(&mut plain),
        Some("br") => brotli::Decompressor::new(&*answer.body, 4096).read_to_end(&mut plain),
        Some("zstd") => zstd::Decoder::new(&*answer.body).and_then(|mut decoder| decoder.read_to_end(&mut plain)),
        _ => return String::from_utf8_lossy(&answer.body).into_owned(),
    };
    match decoded {
        Ok(_) => format!("{} bytes decoded: {}", plain.len(), String::from_utf8_lossy(&plain)),
        // Cut as it is, one packs more into the beginning than another.
        Err(_) if answer.end == End::Broken => "the beginning of something compressed".into(),
        // Some answers only say that they are compressed.
        Err(_) => String::from_utf8_lossy(&answer.body).into_owned(),
    }
}

fn shadow(seen: &Seen) -> bool {
    seen.headers.iter().any(|(name, value)| name.eq_ignore_ascii_case("host") && value.contains("-shadow"))
}

/// Values by name in the case they came in, in their order.
fn gather(headers: &[(String, String)], id: &str) -> BTreeMap<String, String> {
    let mut out: BTreeMap<String, String> = BTreeMap::new();
    for (name, value) in headers {
        let value = normal(name, value, id);
        out.entry(name.clone()).and_modify(|old| *old += &format!(" ⏎ {value}")).or_insert(value);
    }
    out
}

fn normal(name: &str, value: &str, id: &str) -> String {
    match name.to_ascii_lowercase().as_str() {
        "date" if value.ends_with(" GMT") && value.len() == 29 => "a date".into(),
        "x-envoy-upstream-service-time" if value.parse::<u64>().is_ok() => "a time".into(),
        "x-request-id" | "x-case" if value == id => "as sent".into(),
        "x-request-id" if is_uuid4(value) => "a UUID".into(),
        // Counts down while the suite runs.
        "x-ratelimit-reset" if value.parse::<u64>().is_ok_and(|seconds| seconds > 600) => {
            let minutes = value.parse::<u64>().map_or(0, |seconds| seconds.div_ceil(60));
            format!("{minutes} min")
        }
        // What a proxy makes up to know a client again.
        "set-cookie" => match value.split('"').collect::<Vec<_>>()[..] {
            [name, made, rest] if !made.is_empty() && made.bytes().all(|b| b.is_ascii_alphanumeric() || b"+/=-".contains(&b)) => {
                format!("{name}\"made up\"{rest}")
            }
            _ => value.to_owned(),
        },
        _ => value.to_owned(),
    }
}

fn is_uuid4(text: &str) -> bool {
    let bytes = text.as_bytes();
    bytes.len() == 36
        && bytes.iter().enumerate().all(|(at, byte)| match at {
            8 | 13 | 18 | 23 => *byte == b'-',
            14 => *byte == b'4',
            _ => byte.is_ascii_hexdigit(),
        })
}

/// Where two sides differ: aspect, ours, Envoy's.
fn found<'a>(ours: &'a Aspects, envoy: &'a Aspects) -> Vec<(&'a str, Option<&'a str>, Option<&'a str>)> {
    let names: BTreeSet<&str> = ours.keys().chain(envoy.keys()).map(String::as_str).collect();
    names
        .into_iter()
        .map(|name| (name, ours.get(name).map(String::as_str), envoy.get(name).map(String::as_str)))
        .filter(|(_, ours, envoy)| ours != envoy)
        .collect()
}

/// Whether a case holds: no difference but those listed for it or everywhere, and each listed one. Counts those it met, of
/// [`EVERYWHERE`].
pub fn judge(case: &Case, name: &str, ours: &Aspects, envoy: &Aspects, met: &mut [usize]) -> anyhow::Result<()> {
    let listed: Vec<&Difference> = DIFFERENCES.iter().filter(|one| one.cases.contains(&name)).collect();
    let mut wrong = Vec::new();
    let differing = found(ours, envoy);
    for &(aspect, mine, theirs) in &differing {
        if let Some(at) = EVERYWHERE.iter().position(|one| (one.is_it)(aspect, mine, theirs)) {
            met[at] += 1;
            continue;
        }
        let covered = |one: &&Difference| match one.what {
            What::Aspects(aspects) => aspects.iter().any(|listed| is_aspect(listed, aspect)),
            What::Statuses(..) => true,
        };
        if !listed.iter().any(covered) {
            let show = |value: Option<&str>| value.map_or_else(|| "nothing".into(), |text| format!("{text:?}"));
            wrong.push(format!("{aspect}: Culvert {}, Envoy {}", show(mine), show(theirs)));
        }
    }
    for Difference { what, reason, .. } in listed {
        match *what {
            What::Aspects(aspects) => {
                for aspect in aspects.iter().filter(|listed| !differing.iter().any(|(found, ..)| is_aspect(listed, found))) {
                    wrong.push(format!("{aspect}: listed as different ({reason}), but it is not"));
                }
            }
            What::Statuses(mine, theirs) => {
                let is = [ours, envoy].map(|side| side.get("status").map_or("none", String::as_str));
                if is != [mine, theirs] {
                    wrong.push(format!("status: listed as {mine} and {theirs} ({reason}), but it is {} and {}", is[0], is[1]));
                }
            }
        }
    }
    // A case in which both sides fail alike would prove nothing.
    if ours.iter().any(|(name, value)| (name.ends_with("status") || name == "statuses") && value.contains("none")) && !case.silent
    {
        wrong.push("there was no answer at all, and the case does not say so".into());
    }
    if let Some(value) = ours
        .iter()
        .chain(envoy)
        .find_map(|(name, value)| (name.starts_with("share of") && value.contains("not")).then_some(value))
    {
        wrong.push(format!("a share is wrong: {value}"));
    }
    anyhow::ensure!(wrong.is_empty(), "{}", wrong.join("\n"));
    Ok(())
}
