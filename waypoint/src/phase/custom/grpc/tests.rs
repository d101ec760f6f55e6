use super::*;
use http::Response;
use mesh_proto::envoy::config::core::v3::{HeaderValue as Header, QueryParameter};
use mesh_proto::envoy::service::auth::v3::HttpStatus;
use mesh_proto::google::rpc::Status;

fn answer(status: u16, body: &[u8], head: &[(&'static str, &'static str)], trailers: &[(&'static str, &'static str)]) -> Answer {
    let mut response = Response::builder().status(status);
    for (name, value) in head {
        response = response.header(*name, *value);
    }
    let trailers = trailers.iter().map(|(n, v)| (HeaderName::from_static(n), HeaderValue::from_static(v))).collect::<HeaderMap>();
    Answer { head: response.body(()).unwrap().into_parts().0, body: Bytes::copy_from_slice(body), trailers }
}

#[test]
fn only_one_whole_message_of_a_call_that_went_well_is_read() {
    let ok = [("grpc-status", "0")];
    let message = CheckResponse { status: Some(Status { code: 7, ..Status::default() }), http_response: None };
    let plain = message.encode_to_vec();
    let framed = [&[0, 0, 0, 0, plain.len() as u8], &*plain].concat();
    assert_eq!(read(&answer(200, &framed, &[], &ok)), Ok(message.clone()));
    assert_eq!(read(&answer(200, &framed, &ok, &[])), Ok(message));
    assert_eq!(read(&answer(200, &[0; 5], &[], &ok)), Ok(CheckResponse::default()), "an empty message is one");
    for (why, told) in [
        (answer(503, &framed, &[], &ok), "503"),
        (answer(200, &framed, &[], &[("grpc-status", "14")]), "14"),
        (answer(200, &framed, &ok, &[("grpc-status", "14")]), "14"),
        (answer(200, &framed, &[], &[("grpc-status", "x")]), "no gRPC status"),
        (answer(200, &framed, &[], &[]), "no gRPC status"),
        (answer(200, b"", &ok, &[]), "not one"),
        (answer(200, &framed[..framed.len() - 1], &[], &ok), "not one"),
        (answer(200, &[framed.clone(), framed.clone()].concat(), &[], &ok), "not one"),
        (answer(200, &[&[1], &framed[1..]].concat(), &[], &ok), "not one"),
        (answer(200, &[0, 0, 0, 0, 2, 0x0a, 0x7f], &[], &ok), "decode"),
    ] {
        let error = read(&why).unwrap_err();
        assert!(error.contains(told), "{error:?} {told}");
    }
}

fn option(key: &str, value: &str, append: Option<bool>, action: HeaderAppendAction) -> HeaderValueOption {
    let header = Header { key: key.into(), value: value.into(), raw_value: Bytes::new() };
    HeaderValueOption { header: Some(header), append, append_action: action.into() }
}
fn status(code: i32) -> Status {
    Status { code, ..Status::default() }
}

#[test]
fn what_an_authorizer_says_is_done() {
    use HeaderAppendAction::{AddIfAbsent, AppendIfExistsOrAdd, OverwriteIfExists, OverwriteIfExistsOrAdd};
    let value = HeaderValue::from_static("1");
    for (append, action, in_request, in_answer) in [
        (None, AppendIfExistsOrAdd, Change::Set(value.clone()), Change::Append(value.clone())),
        (Some(true), OverwriteIfExists, Change::Append(value.clone()), Change::Append(value.clone())),
        (Some(false), AppendIfExistsOrAdd, Change::Set(value.clone()), Change::Set(value.clone())),
        (None, AddIfAbsent, Change::SetIfAbsent(value.clone()), Change::SetIfAbsent(value.clone())),
        (None, OverwriteIfExistsOrAdd, Change::Set(value.clone()), Change::Set(value.clone())),
        (None, OverwriteIfExists, Change::SetIfPresent(value.clone()), Change::SetIfPresent(value.clone())),
    ] {
        let ok = OkHttpResponse {
            headers: vec![option("X-A", "1", append, action)],
            response_headers_to_add: vec![option("x-a", "1", append, action)],
            ..OkHttpResponse::default()
        };
        let answer = said(CheckResponse { status: Some(status(0)), http_response: Some(HttpResponse::OkResponse(ok)) });
        let edit = |what| vec![Edit { name: HeaderName::from_static("x-a"), what }];
        let want = Grant { request: edit(in_request), response: edit(in_answer), query: vec![] };
        assert_eq!(answer, Ok(Verdict::Agrees(want)), "{append:?} {action:?}");
    }
    let ok = OkHttpResponse {
        headers_to_remove: vec!["x-secret".into()],
        query_parameters_to_set: vec![QueryParameter { key: "a".into(), value: "1".into() }],
        query_parameters_to_remove: vec!["b".into()],
        ..OkHttpResponse::default()
    };
    let answer = said(CheckResponse { status: None, http_response: Some(HttpResponse::OkResponse(ok.clone())) });
    let want = Grant {
        request: vec![Edit { name: HeaderName::from_static("x-secret"), what: Change::Remove }],
        response: vec![],
        query: vec![("b".into(), None), ("a".into(), Some("1".into()))],
    };
    assert_eq!(answer, Ok(Verdict::Agrees(want)), "no status is 0, as protobuf has it");
    let answer = said(CheckResponse { status: Some(status(7)), http_response: Some(HttpResponse::OkResponse(ok)) });
    assert!(matches!(answer, Ok(Verdict::Refuses(r)) if r.status == 403), "the status counts");
}

#[test]
fn what_cannot_be_done_is_no_answer() {
    for key in [":path", "", "a b"] {
        let headers = vec![option(key, "1", None, HeaderAppendAction::AddIfAbsent)];
        let ok = OkHttpResponse { headers: headers.clone(), ..OkHttpResponse::default() };
        assert!(grant(ok).is_err(), "{key:?}");
        assert!(refused(DeniedHttpResponse { headers, ..DeniedHttpResponse::default() }).is_err(), "{key:?}");
        assert!(grant(OkHttpResponse { headers_to_remove: vec![key.into()], ..OkHttpResponse::default() }).is_err());
    }
    let ok = OkHttpResponse {
        headers: vec![option("a", "1\r\nb: 2", None, HeaderAppendAction::AddIfAbsent)],
        ..OkHttpResponse::default()
    };
    assert!(grant(ok).is_err());
}

#[test]
fn a_refusal_is_one_whatever_its_status() {
    for (code, want) in [(0, 403), (401, 401), (302, 302), (99, 403), (100, 403), (-1, 403), (70_000, 403), (1000, 403)] {
        let denied = DeniedHttpResponse { status: Some(HttpStatus { code }), body: "no".into(), ..DeniedHttpResponse::default() };
        let answer = said(CheckResponse { status: Some(status(16)), http_response: Some(HttpResponse::DeniedResponse(denied)) });
        assert!(matches!(answer, Ok(Verdict::Refuses(r)) if r.status == want && r.body == "no"), "{code}");
    }
    let bare = said(CheckResponse { status: Some(status(7)), http_response: None });
    assert!(matches!(bare, Ok(Verdict::Refuses(r)) if r.status == 403 && r.body.is_empty()));
    // Refused in one field and let pass in the other: what the call's status says.
    let both = CheckResponse {
        status: Some(status(0)),
        http_response: Some(HttpResponse::DeniedResponse(DeniedHttpResponse::default())),
    };
    assert_eq!(said(both), Ok(Verdict::Agrees(Grant::default())));
}

#[test]
fn values_of_one_name_are_joined_and_always_text() {
    let mut headers = HeaderMap::new();
    headers.append("a", HeaderValue::from_static("1"));
    headers.append("a", HeaderValue::from_static("2"));
    headers.append("b", HeaderValue::from_bytes(b"\xff").unwrap());
    let joined = joined(&headers);
    assert_eq!((&*joined["a"], &*joined["b"]), ("1,2", "\u{fffd}"));
}
