use super::*;
use crate::facts::Facts;
use crate::telemetry::tests::World;
use crate::telemetry::{Flag, Record, TcpRecord};
use mesh_model::telemetry::expression::Expression;
use mesh_model::telemetry::{AccessLog as Wanted, Telemetry};
use mesh_model::{Reason, SpiffeId};
use std::time::{Duration, SystemTime};

const TOOK: Duration = Duration::from_micros(7_900);

fn write(format: &Format, facts: &Facts, told: Told<'_>) -> String {
    let own: SpiffeId = "spiffe://cluster.local/ns/shop/sa/waypoint".parse().expect("an id");
    let mut out = String::new();
    super::write(format, &Line { facts, told, took: TOOK, own: &own }, &mut out);
    out
}

#[tokio::test]
async fn the_text_line_is_istios_to_the_byte() {
    let world = World::new();
    let record = world.answered("api");
    record.received.add(&[0; 12]);
    assert_eq!(
        write(&Format::istio_text(), &world.facts(), Told::Request(&record)),
        "[2024-02-29T12:34:56.007Z] \"POST /a?b=\"c\" HTTP/2\" 200 - via_upstream - \"-\" 12 321 7 4 \"10.0.0.5\" \"curl/8.1\" \
         \"0a1b\" \"api.shop:80\" \"envoy://connect_originate/10.0.1.7:8080\" inbound-vip|80|http|api.shop.svc.cluster.local \
         envoy://internal_client_address/ 10.96.0.1:80 10.0.0.5:40000 - -\n"
    );
}

#[tokio::test]
async fn the_json_line_has_istios_keys_in_order() {
    let world = World::new();
    let record = world.answered("api");
    assert_eq!(
        write(&Format::istio_json(), &world.facts(), Told::Request(&record)),
        concat!(
            r#"{"start_time":"2024-02-29T12:34:56.007Z","route_name":null,"method":"POST","path":"/a?b=\"c\"","#,
            r#""protocol":"HTTP/2","response_code":200,"response_flags":"-","response_code_details":"via_upstream","#,
            r#""connection_termination_details":null,"bytes_received":0,"bytes_sent":321,"duration":7,"#,
            r#""upstream_service_time":"4","x_forwarded_for":"10.0.0.5","user_agent":"curl/8.1","request_id":"0a1b","#,
            r#""authority":"api.shop:80","upstream_host":"envoy://connect_originate/10.0.1.7:8080","#,
            r#""upstream_cluster":"inbound-vip|80|http|api.shop.svc.cluster.local","#,
            r#""upstream_local_address":"envoy://internal_client_address/","downstream_local_address":"10.96.0.1:80","#,
            r#""downstream_remote_address":"10.0.0.5:40000","requested_server_name":null,"#,
            r#""upstream_transport_failure_reason":null}"#,
            "\n"
        )
    );
}

#[tokio::test]
async fn a_refusal_says_why() {
    let world = World::new();
    let mut record = Record {
        status: 503,
        details: "no_healthy_upstream".into(),
        reason: Some(Reason::NoHealthyEndpoint),
        transport_failure: "delayed connect error: Connection refused".into(),
        ..Record::new(false)
    };
    record.flags.set(Flag::NoHealthyUpstream);
    let facts = Facts { sni: Some("api.example.com".into()), ..world.facts() };
    let line = write(&Format::istio_json(), &facts, Told::Request(&record));
    let value: serde_json::Value = serde_json::from_str(&line).expect("JSON");
    for (key, expected) in [
        ("response_code", serde_json::json!(503)),
        ("response_flags", serde_json::json!("UH")),
        ("upstream_host", serde_json::Value::Null),
        ("upstream_cluster", serde_json::Value::Null),
        ("user_agent", serde_json::Value::Null),
        ("requested_server_name", serde_json::json!("api.example.com")),
        ("upstream_transport_failure_reason", serde_json::json!("delayed_connect_error:_Connection_refused")),
        ("reason", serde_json::json!("no_healthy_endpoint")),
    ] {
        assert_eq!(value[key], expected, "{key}");
    }
    assert_eq!(value.as_object().map(serde_json::Map::len), Some(25));
    assert!(!write(&Format::istio_text(), &facts, Told::Request(&record)).contains("no_healthy_endpoint"), "Istio's fields only");
}

#[tokio::test]
async fn clusters_are_named_as_istiod_names_them() {
    let world = World::new();
    let format = Format::text("%UPSTREAM_CLUSTER% %UPSTREAM_HOST%", &|_| None).expect("a format");
    let hbone = "envoy://connect_originate/";
    let inside = world.facts();
    let cases = [
        ("api", &inside, format!("inbound-vip|80|http|api.shop.svc.cluster.local {hbone}10.0.1.7:8080\n")),
        // Another service of the same waypoint.
        ("api-v2", &inside, format!("inbound-vip|80|http|api-v2.shop.svc.cluster.local {hbone}10.0.1.8:8080\n")),
        // A service of nobody's, reached in plain.
        ("db", &inside, "outbound|80||db.shop.svc.cluster.local 10.0.9.9:8080\n".to_owned()),
        ("api", &world.outside(), format!("outbound|80||api.shop.svc.cluster.local {hbone}10.0.1.7:8080\n")),
    ];
    for (name, facts, expected) in cases {
        assert_eq!(write(&format, facts, Told::Request(&world.answered(name))), expected);
    }
}

#[tokio::test]
async fn a_connection_has_the_fields_of_tcp() {
    let world = World::new();
    let (cluster, host) = world.to("api");
    let record = TcpRecord {
        start_time: SystemTime::UNIX_EPOCH,
        route: Some("tcp-route".into()),
        cluster: Some(cluster),
        host: Some(host),
        details: "idle_timeout".into(),
        ..TcpRecord::begin()
    };
    let told = Told::Connection { record: &record, received: 148, sent: 171 };
    assert_eq!(
        write(&Format::istio_text(), &world.facts(), told),
        "[1970-01-01T00:00:00.000Z] \"- - -\" 0 - - idle_timeout \"-\" 148 171 7 - \"-\" \"-\" \"-\" \"-\" \
         \"envoy://connect_originate/10.0.1.7:8080\" inbound-vip|80|tcp|api.shop.svc.cluster.local \
         envoy://internal_client_address/ 10.96.0.1:80 10.0.0.5:40000 - tcp-route\n"
    );
    let value: serde_json::Value = serde_json::from_str(&write(&Format::istio_json(), &world.facts(), told)).expect("JSON");
    assert!(value["method"].is_null() && value["response_code_details"].is_null());
    assert_eq!((&value["response_code"], &value["bytes_received"]), (&serde_json::json!(0), &serde_json::json!(148)));
}

#[tokio::test]
async fn what_a_client_sends_stays_in_its_line() {
    let world = World::new();
    let record = Record {
        path: "/\n{\"forged\":1}".into(),
        authority: "a\r\nb".into(),
        headers: [(http::header::USER_AGENT, http::HeaderValue::from_bytes(b"\xff\"\\").expect("a header's value"))]
            .into_iter()
            .collect(),
        ..world.answered("api")
    };
    for format in [Format::istio_text(), Format::istio_json()] {
        let line = write(&format, &world.facts(), Told::Request(&record));
        assert_eq!(line.matches(['\n', '\r']).count(), 1, "{line}");
    }
    let line = write(&Format::istio_json(), &world.facts(), Told::Request(&record));
    let value: serde_json::Value = serde_json::from_str(&line).expect("JSON");
    assert_eq!(value["path"], "/\n{\"forged\":1}");
    assert_eq!(value["user_agent"], "\u{fffd}\"\\");
}

#[tokio::test]
async fn formats_of_the_reference_mesh() {
    let world = World::new();
    let mut record = Record { rewritten: Some("/new?b=1".into()), ..world.answered("api") };
    for (name, value) in [("x-user-id", "ann"), ("x-multi", "a"), ("x-multi", "b"), ("x-envoy-original-path", "/old?b=1")] {
        record.headers.append(name, value.parse().expect("a value"));
    }
    record.response_headers = Some([(http::header::SERVER, http::HeaderValue::from_static("nginx"))].into_iter().collect());
    let text = |format: &str| {
        let format = Format::text(format, &|_| None).expect(format);
        write(&format, &world.facts(), Told::Request(&record)).trim_end().to_owned()
    };
    for (format, line) in [
        ("%REQ(X-ENVOY-ORIGINAL-PATH?:PATH)% %REQ(:PATH)% %REQ_WITHOUT_QUERY(:PATH)%", "/old?b=1 /new?b=1 /new"),
        ("%REQ(X-USER-ID)% %REQ(X-USER-ID):1% %REQ(X-NONE?X-USER-ID)% %REQ(x-none)%", "ann a ann -"),
        ("%REQ(X-MULTI)% %REQ(:SCHEME)% %RESP(SERVER)% %RESP(x)% %RESP(:STATUS)%", "a,b http nginx - 200"),
        (
            "%DOWNSTREAM_REMOTE_ADDRESS_WITHOUT_PORT% %DOWNSTREAM_REMOTE_PORT% %UPSTREAM_REMOTE_ADDRESS%",
            "10.0.0.5 40000 10.0.1.7:8080",
        ),
        (
            "%DOWNSTREAM_PEER_URI_SAN% %UPSTREAM_PEER_URI_SAN%",
            "spiffe://cluster.local/ns/shop/sa/front spiffe://cluster.local/ns/shop/sa/api",
        ),
        ("%START_TIME(%s.%3f)% %UPSTREAM_REQUEST_ATTEMPT_COUNT% %GRPC_STATUS%", "1709210096.007 1 -"),
        ("%CEL(request.headers['x-user-id'] + '@' + upstream_peer.app)% %CEL(request.headers['none'])%", "ann@api -"),
        ("%CEL(request.duration > duration('5ms') ? 'slow' : 'fast')% 100%%", "slow 100%"),
    ] {
        assert_eq!(text(format), line, "{format}");
    }
}

#[tokio::test]
async fn attributes_without_a_value_are_known() {
    use mesh_model::telemetry::expression::{Attributes as _, NAMES};
    let world = World::new();
    let (record, tcp, facts) = (world.answered("api"), TcpRecord::begin(), world.facts());
    let own: SpiffeId = "spiffe://cluster.local/ns/shop/sa/waypoint".parse().expect("an id");
    let absent = |told| {
        let line = Line { facts: &facts, told, took: TOOK, own: &own };
        NAMES.into_iter().filter(|name| line.find(name).is_none()).collect::<Vec<_>>()
    };
    let of_connections = ["connection.termination_details"];
    let of_answers = ["request.referer", "response.grpc_status", "response.headers", "upstream.transport_failure_reason"];
    assert_eq!(absent(Told::Request(&record)), [&of_connections[..], &of_answers].concat());
    let kept = absent(Told::Connection { record: &tcp, received: 1, sent: 2 });
    assert!(kept.contains(&"request.path") && kept.contains(&"response.code") && kept.contains(&"upstream_peer.app"), "{kept:?}");
    assert!(
        !kept.contains(&"request.size") && !kept.contains(&"connection.mtls") && !kept.contains(&"source.address"),
        "{kept:?}"
    );
}

#[tokio::test]
async fn filters_choose_and_several_logs_are_several_lines() {
    let world = World::new();
    let log = |filter: &str, format: &str| Wanted {
        format: Some(Format::text(format, &|_| None).expect(format)),
        filter: Some(Expression::parse(filter).expect(filter)),
    };
    let access = vec![log("response.code >= 400", "bad"), log("connection.mtls", "all"), log("request.method == 'POST'", "post")];
    let told = std::sync::Arc::new(Telemetry { access: Some(access.into()), ..Telemetry::default() });
    let (text, _) = logged("info", |telemetry| {
        telemetry.request_done(&world.facts(), &Record { told: Some(std::sync::Arc::clone(&told)), ..world.answered("api") });
        let mut refused = world.answered("api");
        refused.status = 403;
        refused.method = http::Method::GET;
        refused.told = Some(std::sync::Arc::clone(&told));
        telemetry.request_done(&world.facts(), &refused);
        telemetry.tcp_failed(&world.facts(), &TcpRecord { told: Some(std::sync::Arc::clone(&told)), ..TcpRecord::begin() });
    });
    assert_eq!(text, "all\npost\nbad\nall\nall\n");
}

/// What `tell` makes a log write.
fn logged(levels: &str, tell: impl FnOnce(&crate::telemetry::Telemetry)) -> (String, u64) {
    use mesh_runtime::logging::{Options, build};
    use mesh_runtime::metrics::Registry;
    #[derive(Clone, Default)]
    struct Out(std::sync::Arc<parking_lot::Mutex<Vec<u8>>>);
    impl std::io::Write for Out {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.lock().extend_from_slice(bytes);
            Ok(bytes.len())
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }
    let out = Out::default();
    let options = Options::from_env(Some(levels), Some("json"), "waypoint").expect("options");
    let (logging, _subscriber) = build(options, Box::new(out.clone())).expect("a log");
    let identity: SpiffeId = "spiffe://cluster.local/ns/shop/sa/waypoint".parse().expect("an id");
    let telemetry =
        crate::telemetry::Telemetry::new(&Registry::new(), Some(logging.access.clone()), None, identity).expect("metrics");
    tell(&telemetry);
    assert!(logging.writer.flush(Duration::from_secs(5)));
    let text = String::from_utf8(out.0.lock().clone()).expect("text");
    (text, logging.writer.dropped())
}

#[tokio::test]
async fn lines_reach_the_log_unless_it_is_off() {
    let world = World::new();
    for (levels, lines) in [("info", 2), ("info,access=off", 0)] {
        let (text, _) = logged(levels, |telemetry| {
            telemetry.request_done(&world.facts(), &world.answered("api"));
            telemetry.tcp_failed(&world.facts(), &TcpRecord::begin());
        });
        assert_eq!(text.lines().filter(|l| l.starts_with("{\"start_time\":")).count(), lines, "{text}");
        assert_eq!(text.lines().count(), lines);
    }
}
