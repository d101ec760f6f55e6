//! What must hold for any bytes a peer, a file or a network gives to a parser of ours: it returns, and what it accepted means
//! the same when it is written out and read again.
//!
//! Used twice: by the fuzz targets beside this file, and by the bounded run in `tests/tests/fuzz_smoke.rs`.
#![forbid(unsafe_code)]

use mesh_hbone::headers::{self, Baggage, Forwarded, TraceParent};
use mesh_model::l7::path::{PathNormalization, normalize};
use mesh_model::{HboneAuthority, SpiffeId, TrustDomain};
use waypoint::detect::{self, Detector, Spoken};
use waypoint::http::{Heard, hear};

/// The `:authority` of a CONNECT.
pub fn authority(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    if let Some(parsed) = HboneAuthority::parse(text) {
        let written = parsed.to_string();
        assert_eq!(HboneAuthority::parse(&written), Some(parsed), "{text:?} was written as {written:?}");
    }
}

/// The `baggage` header.
pub fn baggage(bytes: &[u8]) {
    let parsed = Baggage::parse(bytes);
    let Some(written) = parsed.encode() else { return };
    assert!(written.len() <= headers::MAX_BAGGAGE, "{} bytes", written.len());
    // Escapes triple a byte at worst: what is this small was not cut.
    if bytes.len() < headers::MAX_BAGGAGE / 4 {
        let again = Baggage::parse(written.as_bytes());
        let kind_matters = !parsed.workload.is_empty();
        let same = Baggage { kind: if kind_matters { parsed.kind } else { again.kind }, ..parsed.clone() };
        assert_eq!(again, same, "written as {written:?}");
    }
}

/// The `forwarded` header.
pub fn forwarded(bytes: &[u8]) {
    let parsed = Forwarded::parse(bytes);
    if let Some(client) = parsed.client
        && let Some(written) = headers::forwarded(client, parsed.host)
    {
        let again = Forwarded::parse(written.as_bytes());
        let canonical = std::net::SocketAddr::new(client.ip().to_canonical(), client.port());
        // A scope id is of no use to another machine and is not an address.
        assert_eq!(again.client.map(|addr| (addr.ip(), addr.port())), Some((canonical.ip(), canonical.port())));
        assert!(again.host.is_none_or(|host| Some(host) == parsed.host), "{:?} became {:?}", parsed.host, again.host);
    }
}

/// The `traceparent` header.
pub fn traceparent(bytes: &[u8]) {
    if let Some(parsed) = TraceParent::parse(bytes) {
        let written = parsed.encode().map(|value| value.as_bytes().to_vec()).unwrap_or_default();
        assert_eq!(TraceParent::parse(&written), Some(parsed));
    }
}

/// SPIFFE ids and trust domains.
pub fn spiffe_id(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    if let Ok(domain) = TrustDomain::parse(text) {
        assert_eq!(domain.as_str(), text);
    }
    if let Ok(id) = text.parse::<SpiffeId>() {
        assert_eq!(id.as_str(), text, "an id is taken as it is or not at all");
        let domain = TrustDomain::parse(id.trust_domain()).ok();
        let rebuilt = domain.and_then(|domain| SpiffeId::new(&domain, id.namespace(), id.service_account()).ok());
        assert_eq!(rebuilt, Some(id));
    }
}

/// The certificate of a peer, before anybody has verified it.
pub fn certificate(bytes: &[u8]) {
    if let Ok(id) = mesh_identity::verify::spiffe_id_of(bytes) {
        spiffe_id(id.as_str().as_bytes());
    }
}

/// A file of Kubernetes and Istio objects.
pub fn yaml(bytes: &[u8]) {
    let (_changes, problems) = mesh_sources::translate::fuzz_yaml(bytes);
    for problem in problems {
        assert!(!problem.message.is_empty(), "a problem that says nothing: {problem:?}");
    }
}

/// The path of a request, in every mode of normalisation.
pub fn path(bytes: &[u8]) {
    use PathNormalization::{Base, DecodeAndMergeSlashes, MergeSlashes, None as Off};
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    for mode in [Off, Base, MergeSlashes, DecodeAndMergeSlashes] {
        let Ok(once) = normalize(mode, text) else { continue };
        assert!(once.starts_with('/') && once.bytes().all(|b| b.is_ascii_graphic() && b != b'#'), "{mode:?} {text:?}: {once:?}");
        if mode == Off {
            assert_eq!(once, text);
            continue;
        }
        assert!(!once.contains('\\'), "{mode:?} {text:?}: {once:?}");
        let up = |segment: &str| matches!(segment.split(';').next(), Some("." | ".."));
        assert!(!once.split('/').any(up), "{mode:?} {text:?}: {once:?}");
        assert!(mode == Base || !once.contains("//"), "{mode:?} {text:?}: {once:?}");
        // What decodes slashes decodes those that come out of it, too, the second time.
        if mode != DecodeAndMergeSlashes {
            assert_eq!(normalize(mode, &once).as_deref(), Ok(&*once), "{mode:?} {text:?}: not what it makes of itself");
        }
    }
}

/// What a client speaks, by its first bytes: decided in bounded space, and never otherwise once more bytes have come.
pub fn first_bytes(bytes: &[u8]) {
    let whole = detect::judge(bytes);
    assert!(bytes.len() < 2 * detect::LIMIT || whole != Spoken::Unclear, "{} bytes say nothing", bytes.len());
    if let Spoken::Tls(Some(name)) = &whole {
        assert!(!name.is_empty() && !name.bytes().any(|b| b.is_ascii_uppercase() || !b.is_ascii_graphic()), "{name:?}");
    }
    let mut pieces = Detector::default();
    for part in [bytes.len() / 2, bytes.len().saturating_sub(1)] {
        let early = detect::judge(bytes.get(..part).unwrap_or_default());
        assert_eq!(pieces.judge(bytes.get(..part).unwrap_or_default()), early, "looked at as they come, {part} bytes");
        assert!(early == Spoken::Unclear || early == whole, "{early:?} after {part} bytes, {whole:?} after {}", bytes.len());
    }
}

/// What a client sends through a tunnel: each request that is let in is one request to whoever reads it next.
pub fn http(bytes: &[u8]) {
    for request in listen(bytes) {
        clean(&request);
        let written = written(&request);
        let again = listen(&written);
        let [again] = again.as_slice() else {
            panic!("{request:?} is {} requests when it is written out:\n{}", again.len(), String::from_utf8_lossy(&written))
        };
        assert_eq!(
            (&again.method, &again.authority, &again.path, &again.query, &again.body),
            (&request.method, &request.authority, &request.path, &request.query, &request.body),
            "read again:\n{}",
            String::from_utf8_lossy(&written)
        );
    }
}

/// The requests in these bytes that are let in.
pub fn listen(bytes: &[u8]) -> Vec<Heard> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build();
    let limit = std::time::Duration::from_secs(5);
    let heard = runtime.map(|r| r.block_on(async { tokio::time::timeout(limit, hear(bytes)).await }));
    assert!(matches!(heard, Ok(Ok(Ok(_)))), "a connection that does not end, or takes its tunnel with it: {heard:?}");
    heard.into_iter().flatten().flatten().flatten().collect()
}

/// What must be true of a request that was let in.
fn clean(request: &Heard) {
    let one = |name: &str| request.headers.get_all(name).iter().collect::<Vec<_>>();
    assert!(one("host").len() <= 1 && one("content-length").len() <= 1, "{request:?}");
    for name in ["transfer-encoding", "keep-alive", "proxy-connection", "x-forwarded-client-cert", "x-envoy-attempt-count"] {
        assert!(one(name).is_empty(), "{name}: {request:?}");
    }
    assert!(one("connection").iter().all(|v| v.as_bytes().eq_ignore_ascii_case(b"upgrade")), "{request:?}");
    if let [length] = one("content-length").as_slice() {
        assert_eq!(length.to_str().ok().and_then(|n| n.parse().ok()), Some(request.body.len()), "{request:?}");
    }
    assert!(!request.authority.contains('@') && request.authority.is_ascii(), "{request:?}");
    if let [host] = one("host").as_slice() {
        assert_eq!(host.as_bytes(), request.authority.as_bytes(), "{request:?}");
    }
    path(request.path.as_bytes());
}

/// The request in HTTP/1.1.
fn written(request: &Heard) -> Vec<u8> {
    let query = request.query.as_ref().map(|q| format!("?{q}")).unwrap_or_default();
    let mut out = format!("{} {}{query} HTTP/1.1\r\nhost: {}\r\n", request.method, request.path, request.authority).into_bytes();
    for (name, value) in request.headers.iter().filter(|(name, _)| !matches!(name.as_str(), "host" | "content-length")) {
        out.extend([name.as_str().as_bytes(), b": ", value.as_bytes(), b"\r\n"].concat());
    }
    out.extend(format!("content-length: {}\r\n\r\n", request.body.len()).into_bytes());
    out.extend(&request.body);
    out
}
