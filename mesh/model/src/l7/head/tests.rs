use super::*;

/// A request of `line` (`METHOD target`) in `version` with these headers.
fn head(line: &str, version: Version, headers: &[(&str, &str)]) -> Parts {
    let (method, target) = line.split_once(' ').expect("method and target");
    let mut request = http::Request::builder().method(method).uri(target).version(version);
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    request.body(()).expect(line).into_parts().0
}
fn told(parts: &Parts) -> (u16, &'static str, &'static str, Option<Fault>) {
    match fit(parts, &authority(&parts.uri, &parts.headers)) {
        Ok(()) => (200, "", "", None),
        Err(unfit) => (unfit.status.as_u16(), unfit.text, unfit.details, unfit.fault),
    }
}
/// All headers, `name: value` each, sorted by name.
fn lines(headers: &HeaderMap) -> Vec<String> {
    let mut all: Vec<String> = headers.iter().map(|(n, v)| format!("{n}: {}", v.to_str().expect("text"))).collect();
    all.sort();
    all
}

#[test]
fn what_is_carried() {
    const ONE: Version = Version::HTTP_11;
    const TWO: Version = Version::HTTP_2;
    let broken = |details| (400, "Bad Request", details, Some(Fault::Protocol));
    let fine = (200, "", "", None);
    let refused = (403, "", "upgrade_failed", None);
    let unknown = (501, "Not Implemented", "http1.invalid_transfer_encoding", Some(Fault::Protocol));
    for (line, version, headers, want) in [
        ("GET /", ONE, &[("host", "api")][..], fine),
        ("GET /", ONE, &[("host", "[2001:db8::1]:80")], fine),
        ("GET http://api.shop:80/x", TWO, &[], fine),
        ("GET http://api/x", ONE, &[("host", "other")], fine),
        ("QUERY /", ONE, &[("host", "api")], fine),
        // Who it is for.
        ("GET /", ONE, &[], (400, "", "missing_host_header", None)),
        ("GET /", TWO, &[], (400, "", "missing_host_header", None)),
        ("GET /", ONE, &[("host", "")], (400, "", "missing_host_header", None)),
        ("GET /", Version::HTTP_10, &[], fine),
        ("GET /", ONE, &[("host", "a"), ("host", "b")], (400, "", "http1.duplicate_host", Some(Fault::Protocol))),
        ("GET /", ONE, &[("host", "a"), ("host", "a")], (400, "", "http1.duplicate_host", Some(Fault::Protocol))),
        ("GET /", ONE, &[("host", "user@api")], broken("http.invalid_authority")),
        ("GET http://user@api/", TWO, &[], broken("http.invalid_authority")),
        ("GET /", ONE, &[("host", "a/b")], broken("http.invalid_authority")),
        ("GET /", ONE, &[("host", "a b")], broken("http.invalid_authority")),
        ("GET /", ONE, &[("host", "a\"b")], broken("http.invalid_authority")),
        // What it asks for.
        ("CONNECT api:80", ONE, &[("host", "api")], (404, "", "route_not_found", Some(Fault::NoRoute))),
        ("get /", ONE, &[("host", "api")], broken("http1.invalid_method")),
        ("gET /", TWO, &[("host", "api")], broken("http1.invalid_method")),
        ("GET api", ONE, &[("host", "api")], broken("http1.invalid_target")),
        // How its body comes.
        ("POST /", ONE, &[("host", "a"), ("transfer-encoding", "Chunked")], fine),
        ("POST /", ONE, &[("host", "a"), ("transfer-encoding", "gzip, chunked")], unknown),
        ("POST /", ONE, &[("host", "a"), ("transfer-encoding", "chunked"), ("transfer-encoding", "chunked")], unknown),
        ("POST /", ONE, &[("host", "a"), ("transfer-encoding", "identity")], unknown),
        // What it would have removed.
        ("GET /", ONE, &[("host", "a"), ("connection", "x-a, close")], fine),
        ("GET /", ONE, &[("host", "a"), ("connection", "Host")], broken("http1.connection_header_rejected")),
        (
            "GET /",
            ONE,
            &[("host", "a"), ("connection", "x"), ("connection", "y, X-Forwarded-For ")],
            broken("http1.connection_header_rejected"),
        ),
        ("GET /", ONE, &[("host", "a"), ("connection", "x-forwarded-proto")], broken("http1.connection_header_rejected")),
        ("GET /", ONE, &[("host", "a"), ("connection", "x-forwarded-host")], broken("http1.connection_header_rejected")),
        // What it would become.
        ("GET /", ONE, &[("host", "a"), ("connection", "Upgrade"), ("upgrade", "WebSocket")], fine),
        ("GET /", ONE, &[("host", "a"), ("connection", "keep-alive, upgrade"), ("upgrade", "websocket")], fine),
        ("GET /", ONE, &[("host", "a"), ("connection", "upgrade"), ("upgrade", "h2c")], fine),
        ("GET /", ONE, &[("host", "a"), ("connection", "upgrade"), ("upgrade", "spdy/3")], refused),
        ("GET /", ONE, &[("host", "a"), ("connection", "upgrade"), ("upgrade", "websocket, spdy/3")], refused),
        // Nobody asks: a word, no wish.
        ("GET /", ONE, &[("host", "a"), ("upgrade", "spdy/3")], fine),
        ("GET /", ONE, &[("host", "a"), ("connection", "upgrade")], fine),
    ] {
        assert_eq!(told(&head(line, version, headers)), want, "{line} {version:?} {headers:?}");
    }
}

#[test]
fn what_is_left_of_a_head() {
    const ONE: Version = Version::HTTP_11;
    const TWO: Version = Version::HTTP_2;
    for (line, version, before, after) in [
        ("GET /", ONE, &[("host", "api"), ("x-a", "1")][..], &["host: api", "x-a: 1"][..]),
        // The target's own authority is the host, but only where there is a field.
        ("GET http://api/", ONE, &[("host", "other")], &["host: api"]),
        ("GET http://api/", TWO, &[("host", "other")], &["host: api"]),
        ("GET http://api/", TWO, &[], &[]),
        // Of the connection.
        ("GET /", ONE, &[("connection", "close, x-a"), ("x-a", "1"), ("x-b", "2")], &["x-b: 2"]),
        (
            "GET /",
            ONE,
            &[("connection", "authorization, content-length"), ("authorization", "b"), ("content-length", "2")],
            &["authorization: b", "content-length: 2"],
        ),
        ("GET /", ONE, &[("keep-alive", "timeout=5"), ("proxy-connection", "keep-alive"), ("upgrade", "h2c")], &[]),
        ("GET /", ONE, &[("te", "gzip")], &[]),
        ("GET /", TWO, &[("te", "Trailers, gzip")], &["te: Trailers, gzip"]),
        ("POST /", ONE, &[("transfer-encoding", "chunked"), ("content-length", "5")], &[]),
        ("POST /", ONE, &[("content-length", "5")], &["content-length: 5"]),
        ("GET /", ONE, &[("connection", "Upgrade"), ("upgrade", "WebSocket")], &["connection: Upgrade", "upgrade: WebSocket"]),
        (
            "GET /",
            ONE,
            &[("connection", "keep-alive, Upgrade"), ("upgrade", "websocket")],
            &["connection: upgrade", "upgrade: websocket"],
        ),
        ("GET /", ONE, &[("connection", "upgrade, http2-settings"), ("upgrade", "h2c"), ("http2-settings", "x")], &[]),
        // Cookies are one field in HTTP/1, and stay as they are when they came so.
        ("GET /", TWO, &[("cookie", "a=b"), ("cookie", "c=d")], &["cookie: a=b; c=d"]),
        ("GET /", ONE, &[("cookie", "a=b"), ("cookie", "c=d")], &["cookie: a=b", "cookie: c=d"]),
        // Ours alone to say.
        ("GET /", ONE, &[("x-forwarded-client-cert", "By=x"), ("x-envoy-other", "stays")], &["x-envoy-other: stays"]),
        (
            "GET /",
            ONE,
            &[("x-forwarded-for", "1.1.1.1"), ("x-request-id", "r")],
            &["x-forwarded-for: 1.1.1.1", "x-request-id: r"],
        ),
    ] {
        let mut parts = head(line, version, before);
        let authority = authority(&parts.uri, &parts.headers);
        clean(&mut parts, &authority);
        assert_eq!(lines(&parts.headers), after, "{line} {version:?} {before:?}");
        let once = parts.headers.clone();
        clean(&mut parts, &authority);
        assert_eq!(parts.headers, once, "what was cleaned is clean: {before:?}");
    }
    for name in INTERNAL {
        let mut parts = head("GET /", ONE, &[(name, "1")]);
        clean(&mut parts, "");
        assert!(parts.headers.is_empty(), "{name}");
    }
}

#[test]
fn the_scheme_is_what_the_client_says() {
    const ONE: Version = Version::HTTP_11;
    const TWO: Version = Version::HTTP_2;
    for (line, version, forwarded, want) in [
        ("GET /", ONE, None, None),
        ("GET /", ONE, Some("HTTPS"), Some("https")),
        ("GET /", ONE, Some("http"), Some("http")),
        ("GET /", ONE, Some("gopher"), None),
        // A target of HTTP/1 may be written in full; it says nothing of how it came.
        ("GET https://api/", ONE, None, None),
        ("GET https://api/", TWO, None, Some("https")),
        ("GET https://api/", TWO, Some("http"), Some("https")),
        ("GET gopher://api/", TWO, Some("http"), Some("http")),
    ] {
        let headers: Vec<_> = forwarded.iter().map(|value| ("x-forwarded-proto", *value)).collect();
        assert_eq!(scheme(&head(line, version, &headers)), want, "{line} {version:?} {forwarded:?}");
    }
}

#[test]
fn an_upgrade_of_the_answer_is_put_back() {
    let answer = |pairs: &[(&str, &str)]| head("GET /", Version::HTTP_11, pairs).headers;
    for (before, upgrade, after) in [
        (
            &[("connection", "Upgrade"), ("upgrade", "websocket")][..],
            Some("websocket"),
            &["connection: Upgrade", "upgrade: websocket"][..],
        ),
        (&[("connection", "close"), ("x-a", "1")], None, &["x-a: 1"]),
        (&[("connection", "upgrade"), ("upgrade", "websocket")], None, &[]),
    ] {
        let mut headers = answer(before);
        strip_hop_by_hop(&mut headers, upgrade.map(HeaderValue::from_static).as_ref());
        assert_eq!(lines(&headers), after, "{before:?}");
    }
}

#[test]
fn the_client_is_appended_to_what_it_says() {
    for (said, client, want) in [
        (&[][..], "10.0.0.7", "10.0.0.7"),
        (&["1.1.1.1"], "10.0.0.7", "1.1.1.1,10.0.0.7"),
        (&["1.1.1.1, 2.2.2.2", "3.3.3.3"], "10.0.0.7", "1.1.1.1, 2.2.2.2,3.3.3.3,10.0.0.7"),
        (&["1.1.1.1"], "::ffff:10.0.0.7", "1.1.1.1,10.0.0.7"),
        (&[], "2001:db8::7", "2001:db8::7"),
    ] {
        let mut headers = HeaderMap::new();
        for one in said {
            headers.append(FORWARDED_FOR, HeaderValue::from_static(one));
        }
        append_client(&mut headers, client.parse().expect(client));
        assert_eq!(lines(&headers), [format!("x-forwarded-for: {want}")], "{said:?} {client}");
    }
}

#[test]
fn who_is_internal() {
    for (ip, want) in [
        ("10.1.2.3", true),
        ("172.16.0.1", true),
        ("192.168.9.9", true),
        ("127.0.0.1", true),
        ("::ffff:10.1.2.3", true),
        ("fd00::1", true),
        ("::1", true),
        ("172.32.0.1", false),
        ("100.64.0.1", false),
        ("192.0.2.1", false),
        ("2001:db8::1", false),
        ("fe80::1", false),
    ] {
        assert_eq!(is_internal(ip.parse().expect(ip)), want, "{ip}");
    }
}

#[test]
fn grpc_is_told_from_grpc_web() {
    for (text, grpc) in [
        ("application/grpc", true),
        ("application/grpc+proto", true),
        ("application/grpc;charset=utf-8", true),
        ("application/grpc-web", false),
        ("application/json", false),
        ("", false),
    ] {
        assert_eq!(is_grpc(text.as_bytes()), grpc, "{text}");
    }
}
