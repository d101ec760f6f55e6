use super::*;
use crate::gateway::ServiceKey;
use http::header::COOKIE;

const NOW: u64 = 1_800_000_000;

fn key(host: &str, port: u16) -> ClusterKey {
    ClusterKey { service: ServiceKey { namespace: "t".into(), hostname: host.into() }, port, subset: None }
}
fn cookie(lifetime: Option<u64>, permanent: bool) -> Session {
    let carrier = Carrier::Cookie { name: "s".into(), path: "/shop".into(), permanent };
    Session { carrier, lifetime: lifetime.map(Duration::from_secs) }
}
fn headers(name: HeaderName, value: &str) -> HeaderMap {
    HeaderMap::from_iter([(name, HeaderValue::try_from(value).unwrap())])
}

#[test]
fn what_is_told_is_understood_again() {
    let (web, end) = (key("web", 80), endpoint("u/a", "10.0.0.1:8080".parse().unwrap()));
    let header = |lifetime: Option<u64>| Session {
        carrier: Carrier::Header(HeaderName::from_static("x-s")),
        lifetime: lifetime.map(Duration::from_secs),
    };
    for (session, shown) in [
        (cookie(None, false), "; Path=/shop; HttpOnly"),
        (cookie(Some(60), false), "; Path=/shop; HttpOnly"),
        (cookie(Some(60), true), "; Max-Age=60; Path=/shop; HttpOnly"),
        (header(None), ""),
        (header(Some(60)), ""),
    ] {
        let (name, value) = session.tell(&web, end, NOW).unwrap();
        let value = value.to_str().unwrap();
        let back = match &session.carrier {
            Carrier::Cookie { .. } => {
                let (pair, rest) = value.split_at(value.find(';').unwrap());
                assert_eq!((name, rest), (SET_COOKIE, shown));
                headers(COOKIE, &format!("other=1; {pair}"))
            }
            Carrier::Header(own) => {
                assert_eq!(name, own);
                headers(name, value)
            }
        };
        assert!(!value.contains("10.0.0.1") && !value.contains("u/a"), "{value}");
        let ticket = session.asked(&back, NOW + 59).unwrap();
        assert_eq!((ticket.backend, ticket.endpoint), (backend(&web), end));
        assert_eq!(session.asked(&back, NOW + 60).is_some(), session.lifetime.is_none(), "{session:?}");
    }
}

#[test]
fn a_client_cannot_prolong_its_session() {
    let session = cookie(Some(60), true);
    let asked = |text: &str| session.asked(&headers(COOKIE, &format!("s={text}")), NOW);
    assert!(asked(&format!("1-2-{:x}", NOW + 60)).is_some());
    assert_eq!(asked(&format!("1-2-{:x}", NOW + 61)), None);
    assert_eq!(asked("1-2"), None, "an end is asked for");
}

#[test]
fn what_is_no_ticket_is_none() {
    let session = cookie(None, false);
    for text in ["", "1", "x-2", "1-x", "1-2-x", "1-2-3-4", "-1-2", "+1-2", "1-+2", "123456789-2", "1-12345678123456781", "MTA="]
    {
        assert_eq!(session.asked(&headers(COOKIE, &format!("s={text}")), NOW), None, "{text}");
    }
    assert_eq!(session.asked(&HeaderMap::new(), NOW), None);
}

#[test]
fn names_tell_backends_and_endpoints_apart() {
    let backends = [key("web", 80), key("web", 81), key("web2", 80), ClusterKey { subset: Some("v1".into()), ..key("web", 80) }];
    let rule: Vec<Backend> = backends.iter().map(|k| Backend::to(BackendRef::Service(k.clone()))).collect();
    for (at, key) in backends.iter().enumerate() {
        let ticket = Ticket { backend: backend(key), endpoint: 0, expires: None };
        assert_eq!(kept(ticket, &rule), Some(at));
        assert_eq!(kept(ticket, rule.get(..at).unwrap()), None);
    }
    let named = [("a", "10.0.0.1:80"), ("b", "10.0.0.1:80"), ("a", "10.0.0.2:80"), ("a", "10.0.0.1:81"), ("a", "[::1]:80")];
    let names: std::collections::BTreeSet<u64> = named.iter().map(|(w, a)| endpoint(w, a.parse().unwrap())).collect();
    assert_eq!(names.len(), named.len());
}
