//! What must hold for any bytes a peer, a file or a network gives to a parser of ours: it returns, and what it accepted means
//! the same when it is written out and read again.
//!
//! Used twice: by the fuzz targets beside this file, and by the bounded run in `tests/tests/fuzz_smoke.rs`.
#![forbid(unsafe_code)]

use mesh_hbone::headers::{self, Baggage, Forwarded, TraceParent};
use mesh_model::{HboneAuthority, SpiffeId, TrustDomain};

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
