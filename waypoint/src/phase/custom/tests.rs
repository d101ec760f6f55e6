use super::*;

async fn shown(sent: &'static str, most: usize) -> (Bytes, bool, Bytes) {
    let mut body = Body::full(sent);
    let shown = show(&mut body, BodyLimit { most, partial: true, as_bytes: false }).await.expect("no error");
    (shown.bytes, shown.cut, body.collect().await.expect("the whole").to_bytes())
}

#[tokio::test]
async fn a_body_that_was_shown_is_sent_whole() {
    for (most, want, cut) in [(8, "abcdef", false), (6, "abcdef", false), (5, "abcde", true)] {
        let (seen, more, whole) = shown("abcdef", most).await;
        assert_eq!((&*seen, more), (want.as_bytes(), cut), "{most}");
        assert_eq!(whole, "abcdef", "{most}");
    }
    assert_eq!(shown("", 5).await, (Bytes::new(), false, Bytes::new()));
}

#[test]
fn edits_do_what_they_say_and_leave_the_connection_alone() {
    let value = HeaderValue::from_static;
    let (a, b) = (HeaderName::from_static("a"), HeaderName::from_static("b"));
    for (name, what, want) in [
        (&a, Change::Set(value("x")), "a=x"),
        (&a, Change::Append(value("x")), "a=1 a=2 a=x"),
        (&a, Change::SetIfAbsent(value("x")), "a=1 a=2"),
        (&a, Change::SetIfPresent(value("x")), "a=x"),
        (&a, Change::Remove, ""),
        (&b, Change::Append(value("x")), "a=1 a=2 b=x"),
        (&b, Change::SetIfAbsent(value("x")), "a=1 a=2 b=x"),
        (&b, Change::SetIfPresent(value("x")), "a=1 a=2"),
        (&header::HOST, Change::Set(value("x")), "a=1 a=2"),
        (&header::CONTENT_LENGTH, Change::Append(value("9")), "a=1 a=2"),
        (&header::TRANSFER_ENCODING, Change::Set(value("chunked")), "a=1 a=2"),
    ] {
        let mut headers = HeaderMap::new();
        headers.append("a", value("1"));
        headers.append("a", value("2"));
        let told = format!("{name} {what:?}");
        Edit { name: name.clone(), what }.apply(&mut headers);
        let mut left: Vec<String> = headers.iter().map(|(n, v)| format!("{n}={}", v.to_str().unwrap())).collect();
        left.sort();
        assert_eq!(left.join(" "), want, "{told}");
    }
}

#[test]
fn parameters_are_set_and_removed_by_name() {
    let set = |name: &str, value: &str| (name.to_owned(), Some(value.to_owned()));
    let none = |name: &str| (name.to_owned(), None);
    for (query, changes, want) in [
        ("", vec![set("a", "1")], "a=1"),
        ("a=0&b=2&a=3", vec![set("a", "1")], "b=2&a=1"),
        ("a=0&b=2&a", vec![none("a")], "b=2"),
        ("a=0", vec![none("a")], ""),
        ("aa=0", vec![none("a"), set("a", "")], "aa=0&a="),
    ] {
        assert_eq!(http::with_parameters(query, &changes), want, "{query} {changes:?}");
    }
}

#[test]
fn the_answer_by_http_is_read_as_envoy_reads_it() {
    use mesh_model::policy::TextMatch;
    let check = |to_refused| mesh_model::l7::authorizer::HttpCheck {
        path_prefix: "".into(),
        asked_with: Vec::new(),
        always: Vec::new(),
        to_upstream: vec![TextMatch::Exact("x-user".into())],
        to_client: Vec::new(),
        to_refused,
    };
    let answer = |status: u16, headers: &[(&'static str, &'static str)], body: &'static str| {
        let mut made = Response::builder().status(status);
        for (name, value) in headers {
            made = made.header(*name, *value);
        }
        let (head, ()) = made.body(()).expect("an answer").into_parts();
        Answer { head, body: Bytes::from_static(body.as_bytes()), trailers: HeaderMap::new() }
    };
    let agreed = http::verdict(&check(None), answer(200, &[("x-user", "ann"), ("x-user", "bob"), ("x-other", "1")], ""));
    let set = Edit { name: HeaderName::from_static("x-user"), what: Change::Set(HeaderValue::from_static("bob")) };
    assert_eq!(agreed, Ok(Verdict::Agrees(Grant { request: vec![set], ..Grant::default() })), "the last value alone");
    assert!(http::verdict(&check(None), answer(503, &[], "")).is_err());
    let refused = |patterns, headers: &[(&'static str, &'static str)], body| match http::verdict(
        &check(patterns),
        answer(401, headers, body),
    ) {
        Ok(Verdict::Refuses(refused)) => {
            let mut told: Vec<String> =
                refused.headers.iter().map(|(n, v)| format!("{n}={}", v.to_str().expect("text"))).collect();
            told.sort();
            told.join(" ")
        }
        other => panic!("{other:?}"),
    };
    assert_eq!(refused(None, &[("x-why", "a")], "no"), "content-type=text/plain x-why=a");
    assert_eq!(refused(None, &[("content-type", "text/html")], "no"), "content-type=text/html");
    let only = Some(vec![TextMatch::Exact("x-why".into())]);
    assert_eq!(refused(only, &[("x-why", "a"), ("x-other", "b"), ("location", "/login")], ""), "location=/login x-why=a");
}
