//! The fuzz checks on some thousand mutated inputs each, from a fixed seed: what plain `cargo test` can say about parsers of
//! outside bytes without a nightly toolchain. The open-ended search is `tests/fuzz`.
#![forbid(unsafe_code)]

#[path = "../fuzz/src/lib.rs"]
mod checks;

use std::time::{Duration, Instant};

/// No single input may take longer, however it is made: a parser of outside bytes has a bound.
const SLOWEST: Duration = Duration::from_secs(5);

/// A small generator of numbers, the same on every run.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    /// Below `end`; zero if there is nothing below it.
    fn below(&mut self, end: usize) -> usize {
        if end == 0 { 0 } else { usize::try_from(self.next() % end as u64).unwrap_or_default() }
    }

    fn range(&mut self, length: usize) -> std::ops::Range<usize> {
        let start = self.below(length + 1);
        start..start + self.below((length - start).min(64) + 1)
    }
}

/// One to six changes of one seed: flips, cuts, repetitions, pieces of other seeds, and words the parser knows.
fn mutate(random: &mut Random, seeds: &[Vec<u8>], words: &[&str]) -> Vec<u8> {
    let mut bytes = seeds[random.below(seeds.len())].clone();
    for _ in 0..=random.below(6) {
        let at = random.below(bytes.len() + 1);
        match random.below(7) {
            0 if at < bytes.len() => bytes[at] ^= 1 << random.below(8),
            1 => bytes.insert(at, random.next() as u8),
            2 => drop(bytes.drain(random.range(bytes.len()))),
            3 => {
                let piece = bytes[random.range(bytes.len())].repeat(random.below(5));
                bytes.splice(at..at, piece);
            }
            4 => {
                let other = &seeds[random.below(seeds.len())];
                let piece = other[random.range(other.len())].to_vec();
                bytes.splice(at..at, piece);
            }
            5 => bytes.truncate(at),
            _ => {
                let word = words[random.below(words.len())].bytes();
                let end = (at + random.below(8)).min(bytes.len());
                bytes.splice(at..end, word);
            }
        }
    }
    bytes
}

fn smoke(check: fn(&[u8]), seeds: &[Vec<u8>], words: &[&str], inputs: usize) {
    let mut random = Random(0x5eed_0123_4567_89ab);
    for seed in seeds {
        check(seed);
    }
    for number in 0..inputs {
        let input = mutate(&mut random, seeds, words);
        let start = Instant::now();
        let outcome = std::panic::catch_unwind(|| check(&input));
        assert!(outcome.is_ok(), "input {number} breaks it:\n{}\n{:?}", String::from_utf8_lossy(&input), input);
        assert!(start.elapsed() < SLOWEST, "input {number} took {:?}:\n{}", start.elapsed(), String::from_utf8_lossy(&input));
    }
}

fn seeds(texts: &[&str]) -> Vec<Vec<u8>> {
    texts.iter().map(|text| text.as_bytes().to_vec()).collect()
}

#[test]
fn authorities() {
    let texts =
        ["10.0.0.1:80", "[2001:db8::1]:15008", "[::ffff:1.2.3.4]:1", "api.shop.svc.cluster.local.:443", "[fe80::1%1]:9", "a:0"];
    smoke(checks::authority, &seeds(&texts), &[":", "[", "]", ".", "65536", "%", "::", "xn--", "-", "@", "/"], 20_000);
}

#[test]
fn baggages() {
    let texts = [
        "k8s.cluster.name=c,k8s.namespace.name=ns,k8s.deployment.name=d,service.name=s,service.version=v1,cloud.region=r,cloud.availability_zone=z",
        "k8s.pod.name=a%20b%2Cc;prop=1,k8s.job.name=x, service.name = caf%C3%A9 ,=,;,a=b=c",
    ];
    smoke(
        checks::baggage,
        &seeds(&texts),
        &[",", ";", "=", "%", "%2", "%00", "%ff", " ", "k8s.cronjob.name=", "service.name="],
        20_000,
    );
}

#[test]
fn forwardeds() {
    let texts =
        ["for=\"10.0.0.1:80\";host=api.shop", "For=\"[2001:db8::1]:9\";proto=http, for=x", "for=\"[fe80::1%3]:1\";host=\"a\""];
    smoke(checks::forwarded, &seeds(&texts), &["for=", "host=", "\"", ";", ",", "[", "]", ":", "%"], 20_000);
}

#[test]
fn traceparents() {
    let texts = [
        "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
        "cc-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01-what-the-future-brings",
        "00-00000000000000000000000000000000-0000000000000000-00",
    ];
    smoke(checks::traceparent, &seeds(&texts), &["-", "ff", "00", "0", "é", "A", " "], 20_000);
}

#[test]
fn spiffe_ids() {
    let texts = ["spiffe://cluster.local/ns/shop/sa/front", "spiffe://td/ns/../sa/x", "cluster.local"];
    smoke(checks::spiffe_id, &seeds(&texts), &["spiffe://", "/ns/", "/sa/", "/", "..", "%", "?", "#", "@", ":1", "é"], 20_000);
}

#[test]
fn certificates() {
    let mut params = rcgen::CertificateParams::default();
    let uri = rcgen::string::Ia5String::try_from("spiffe://cluster.local/ns/shop/sa/front").unwrap();
    params.subject_alt_names = vec![rcgen::SanType::URI(uri), rcgen::SanType::IpAddress([10, 0, 0, 1].into())];
    let key = rcgen::KeyPair::generate().unwrap();
    let certificate = params.self_signed(&key).unwrap().der().to_vec();
    assert!(mesh_identity::verify::spiffe_id_of(&certificate).is_ok(), "the seed is a certificate with an id");
    let words = ["\u{30}", "\u{2}", "spiffe://", "/ns/", "\u{86}", "\u{0}", "\u{7f}"];
    smoke(checks::certificate, &[certificate], &words, 20_000);
}

#[test]
fn objects() {
    let mut all = seeds(&[
        include_str!("../fuzz/seeds/mesh.yaml"),
        include_str!("../fuzz/seeds/layer7.yaml"),
        include_str!("../fuzz/seeds/gateway_api.yaml"),
        include_str!("../fuzz/seeds/traffic.yaml"),
    ]);
    // One seed per object, so that a change often hits the part that matters; those of layer 7 with their services, without
    // which nothing is made of them.
    let documents = |seed: &[u8]| -> Vec<String> { String::from_utf8_lossy(seed).split("---\n").map(str::to_owned).collect() };
    let (mesh, layer7) = (documents(&all[0]), [documents(&all[1]), documents(&all[2])]);
    all.extend(mesh.into_iter().map(String::into_bytes));
    for (services, rest) in layer7.iter().filter_map(|documents| documents.split_first()) {
        all.extend(rest.iter().map(|object| format!("{object}---\n{services}").into_bytes()));
    }
    let words = [
        "- ",
        ": ",
        "\n",
        "  ",
        "---\n",
        "&a ",
        "*a",
        "<<: *a",
        "!!binary ",
        "? ",
        "| \n",
        "null",
        "~",
        "{}",
        "[]",
        "\"",
        "'",
        "0x10",
        ".inf",
        "1e999",
        "-1",
        "65536",
        "99999999999999999999",
        "10.0.0.0/33",
        "*",
        "principals: []",
        "match: [{}]",
        "delegate: {name: leaf}",
        "host: api",
        "'*'",
        "\\1",
        "1h2m3s",
        "%%",
        "rules: [{}]",
        "mode: X",
        "kind: List\nitems:\n",
        "\t",
        "\u{feff}",
        "\u{0}",
        "{{",
        "%YAML 1.1\n",
    ];
    smoke(checks::yaml, &all, &words, 6_000);
}

#[test]
fn paths() {
    let texts = ["/a/b;v=1/../c%2fd?q", "/%2e%2e/\\..;x/%5C%5c//", "/%4%31/%%32f/%00", "/a#b", "//", "*"];
    let words = ["/", "\\", ".", "..", "%2e", "%2F", "%5c", "%25", "%", ";", "//", "%00", "%41", "#", "ä", " "];
    smoke(checks::path, &seeds(&texts), &words, 20_000);
}

/// A ClientHello that asks for `api.example.com`, in one record.
fn hello() -> Vec<u8> {
    let name = b"api.example.com";
    let length = |n: usize, bytes: usize| n.to_be_bytes()[8 - bytes..].to_vec();
    let entry = [vec![0], length(name.len(), 2), name.to_vec()].concat();
    let extension = [vec![0, 0], length(entry.len() + 2, 2), length(entry.len(), 2), entry].concat();
    let body = [vec![3, 3], vec![7; 32], vec![0, 0, 2, 0x13, 1, 1, 0], length(extension.len(), 2), extension].concat();
    let message = [vec![1], length(body.len(), 3), body].concat();
    [vec![0x16, 3, 1], length(message.len(), 2), message].concat()
}

#[test]
fn first_words() {
    let mut all = seeds(&[
        "GET / HTTP/1.1\r\nhost: a\r\n\r\n",
        "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        "220 ready\r\n",
        "*1\r\n$4\r\nPING\r\n",
    ]);
    all.push(hello());
    let words = [" ", "\r\n", "\n", "HTTP/1.", "\u{16}\u{3}\u{1}", "\u{0}", "\u{1}", "PRI", "\u{ff}"];
    smoke(checks::first_bytes, &all, &words, 20_000);
}

/// HTTP/2: preface, SETTINGS, one request, its body, all fields written literally.
fn http2_request(fields: &[(&str, &str)], body: &[u8]) -> Vec<u8> {
    let frame = |kind: u8, flags: u8, stream: u8, payload: &[u8]| {
        [&payload.len().to_be_bytes()[5..], &[kind, flags, 0, 0, 0, stream], payload].concat()
    };
    let text = |text: &str| [&[u8::try_from(text.len()).unwrap_or_default()], text.as_bytes()].concat();
    let block: Vec<u8> = fields.iter().flat_map(|(name, value)| [vec![0], text(name), text(value)].concat()).collect();
    let preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec();
    [preface, frame(4, 0, 0, &[]), frame(1, 4, 1, &block), frame(0, 1, 1, body), frame(6, 0, 0, &[1; 8])].concat()
}

#[test]
fn requests_through_a_tunnel() {
    let mut all = seeds(&[
        "GET /a/../b?x=1 HTTP/1.1\r\nhost: api.shop:80\r\nx-forwarded-for: 1.1.1.1\r\nconnection: close, x-a\r\nx-a: 1\r\n\r\n",
        "POST /p HTTP/1.1\r\nhost: api\r\ncontent-length: 5\r\n\r\nhelloGET /second HTTP/1.1\r\nhost: api\r\n\r\n",
        "POST /c HTTP/1.1\r\nhost: api\r\ntransfer-encoding: chunked\r\n\r\n5;x=y\r\nhello\r\n0\r\nx-trailer: 1\r\n\r\n",
        "POST /both HTTP/1.1\r\nhost: api\r\ncontent-length: 4\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
        "GET /ws HTTP/1.1\r\nhost: api\r\nconnection: Upgrade\r\nupgrade: websocket\r\nexpect: 100-continue\r\n\r\n",
        "OPTIONS http://api.shop/x HTTP/1.1\r\nhost: other\r\norigin: https://a.b\r\ncookie: a=b\r\ncookie: c=d\r\n\r\n",
    ]);
    let usual = [(":method", "POST"), (":scheme", "http"), (":authority", "api.shop"), (":path", "/two?x")];
    all.push(http2_request(&[&usual[..], &[("cookie", "a=b"), ("cookie", "c=d"), ("te", "trailers")]].concat(), b"hello"));
    all.push(http2_request(&[&usual[..], &[("content-length", "5"), ("host", "other")]].concat(), b"hello"));
    // What is checked of nothing says nothing.
    let counts: Vec<usize> = all.iter().map(|seed| checks::listen(seed).len()).collect();
    assert_eq!(counts, [1, 2, 1, 1, 1, 1, 1, 1], "requests in the seeds");
    let words = [
        "\r\n",
        "\n",
        "\r",
        ": ",
        ":",
        " ",
        "\t",
        "\0",
        "chunked",
        "content-length: 5\r\n",
        "transfer-encoding: chunked\r\n",
        "host: b\r\n",
        "HTTP/1.0",
        "HTTP/1.1",
        "0\r\n\r\n",
        "5\r\n",
        "GET /x HTTP/1.1\r\nhost: api\r\n\r\n",
        "@",
        "%2e",
        "\\",
        "#",
        "é",
        "connection: host\r\n",
    ];
    smoke(checks::http, &all, &words, 4_000);
}
