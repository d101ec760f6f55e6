use super::*;

const TRACE: &str = "0af7651916cd43dd8448eb211c80319c";
const FRESH: (u128, u64) = (0xf0f, 0xabc);

fn headers(text: &str) -> HeaderMap {
    let mut out = HeaderMap::new();
    for line in text.split('|').filter(|l| !l.trim().is_empty()) {
        let (name, value) = line.split_once(':').expect("name: value");
        out.append(name.trim().parse::<HeaderName>().expect("a name"), value.trim().parse().expect("a value"));
    }
    out
}
/// What a request goes on with, sorted.
fn passed(text: &str, ours: bool) -> String {
    let mut all = headers(text);
    let incoming = Incoming::read(&all);
    Context::under(incoming, FRESH, incoming.sampled.unwrap_or(ours)).inject(&mut all);
    let mut lines: Vec<String> = all.iter().map(|(n, v)| format!("{n}: {}", v.to_str().expect("text"))).collect();
    lines.sort();
    lines.join(" | ")
}

#[test]
fn every_form_is_understood_and_answered_in_kind() {
    let new = |flag: u8| format!("traceparent: 00-00000000000000000000000000000f0f-0000000000000abc-0{flag}");
    let under = |flag: u8| format!("traceparent: 00-{TRACE}-0000000000000abc-0{flag}");
    let multi = |rest: &str| format!("x-b3-traceid: {TRACE} | x-b3-spanid: b7ad6b7169203331 | {rest}");
    let multi_out = |sampled: u8| {
        format!(
            "x-b3-parentspanid: b7ad6b7169203331 | x-b3-sampled: {sampled} | x-b3-spanid: 0000000000000abc | x-b3-traceid: {TRACE}"
        )
    };
    let b3_out = |sampled: u8| format!("b3: {TRACE}-0000000000000abc-{sampled}-b7ad6b7169203331");
    let w3c = |flags: &str| format!("traceparent: 00-{TRACE}-b7ad6b7169203331-{flags}");
    let cases: Vec<(String, bool, String)> = vec![
        // Nothing came: ours to decide, and told upstream either way.
        (String::new(), false, new(0)),
        (String::new(), true, new(1)),
        // W3C: the sender's decision counts.
        (w3c("01"), false, under(1)),
        (w3c("00"), true, under(0)),
        (w3c("03"), false, under(1)),
        (w3c("01") + " | tracestate: a=1,b=2", false, under(1) + " | tracestate: a=1,b=2"),
        // What is malformed begins anew, and its state goes.
        (format!("traceparent: 00-{TRACE}-00-01 | tracestate: a=1"), false, new(0)),
        ("tracestate: a=1".into(), true, new(1)),
        // B3 in one header.
        (format!("b3: {TRACE}-b7ad6b7169203331-1"), false, b3_out(1) + " | " + &under(1)),
        (format!("b3: {TRACE}-b7ad6b7169203331-0-0000000000000001"), true, b3_out(0) + " | " + &under(0)),
        (format!("b3: {TRACE}-b7ad6b7169203331-d"), false, b3_out(1) + " | " + &under(1)),
        (format!("b3: {TRACE}-b7ad6b7169203331"), true, b3_out(1) + " | " + &under(1)),
        (format!("b3: {TRACE}-b7ad6b7169203331"), false, b3_out(0) + " | " + &under(0)),
        (
            "b3: 0".into(),
            true,
            format!("b3: 00000000000000000000000000000f0f-0000000000000abc-0 | {}", new(0))
                .replace("00000000000000000000000000000f0f-0000000000000abc-0 |", "0000000000000f0f-0000000000000abc-0 |"),
        ),
        ("b3: nonsense".into(), false, format!("b3: 0000000000000f0f-0000000000000abc-0 | {}", new(0))),
        // B3 in several.
        (multi("x-b3-sampled: 1"), false, format!("{} | {}", under(1), multi_out(1))),
        (multi("x-b3-sampled: 0 | x-b3-parentspanid: 0000000000000009"), true, format!("{} | {}", under(0), multi_out(0))),
        (multi("x-b3-sampled: true"), false, format!("{} | {}", under(1), multi_out(1))),
        (multi(""), true, format!("{} | {}", under(1), multi_out(1))),
        (multi("x-b3-flags: 1"), false, format!("{} | x-b3-flags: 1 | {}", under(1), multi_out(1))),
        (
            "x-b3-sampled: 0".into(),
            true,
            format!("{} | x-b3-sampled: 0 | x-b3-spanid: 0000000000000abc | x-b3-traceid: 0000000000000f0f", new(0)),
        ),
        // Both: W3C counts, and B3 goes along.
        (
            format!("{} | b3: 00000000000000000000000000000001-0000000000000002-0", w3c("01")),
            false,
            format!("{} | {}", b3_out(1), under(1)),
        ),
    ];
    for (incoming, ours, outgoing) in cases {
        assert_eq!(passed(&incoming, ours), outgoing, "{incoming}");
    }
}

#[test]
fn short_traces_stay_short_in_b3() {
    let short = passed("b3: 8448eb211c80319c-b7ad6b7169203331-1", false);
    assert_eq!(
        short,
        "b3: 8448eb211c80319c-0000000000000abc-1-b7ad6b7169203331 | traceparent: 00-00000000000000008448eb211c80319c-0000000000000abc-01"
    );
}

#[test]
fn malformed_b3_is_as_none() {
    for bad in [
        "b3: 00000000000000000000000000000000-b7ad6b7169203331-1",
        "b3: 0af7651916cd43dd8448eb211c80319-b7ad6b7169203331-1",
        "b3: 0af7651916cd43dd8448eb211c80319c-0-1",
        "b3: 0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-x",
        "b3: 0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-1-1",
        "b3: 0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-1-b7ad6b7169203331-1",
        "x-b3-traceid: 0af7651916cd43dd8448eb211c80319c",
        "x-b3-traceid: x | x-b3-spanid: b7ad6b7169203331 | x-b3-sampled: 1",
        "x-b3-sampled: maybe",
    ] {
        let found = Incoming::read(&headers(bad));
        assert_eq!((found.ids, found.sampled), (None, None), "{bad}");
    }
}

#[test]
fn a_copy_has_a_span_of_its_own() {
    let parent = Context::under(Incoming::default(), FRESH, true);
    let copy = parent.silent_child(7);
    assert_eq!((copy.trace, copy.parent, copy.span, copy.sampled), (parent.trace, Some(parent.span), 7, false));
}

#[test]
fn traceparent_follows_the_specification() {
    let text = b"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
    let parsed = TraceParent::parse(text).expect("valid");
    assert_eq!(parsed.flags, 1);
    assert_eq!(parsed.encode().expect("valid").as_bytes(), text);
    let small = TraceParent { trace: 0xa, parent: 0x1f, flags: 0 };
    assert_eq!(small.encode().expect("valid"), "00-0000000000000000000000000000000a-000000000000001f-00");
    for bad in [
        &b""[..],
        b"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-0",
        b"00-0AF7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
        b"00-00000000000000000000000000000000-b7ad6b7169203331-01",
        b"00-0af7651916cd43dd8448eb211c80319c-0000000000000000-01",
        b"ff-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
        b"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01-x",
        b"01-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01x",
        b"00x0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
    ] {
        assert_eq!(TraceParent::parse(bad), None, "{}", String::from_utf8_lossy(bad));
    }
    assert!(TraceParent::parse(b"01-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01-x").is_some());
}
