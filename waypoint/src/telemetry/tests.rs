use super::*;
use crate::facts::Scope;
use http::{Method, Version};
use mesh_model::TrustDomain;
use mesh_model::waypoint::Target;
use std::time::{Instant, SystemTime};

fn facts(source: &Arc<Workload>, service: &Arc<Service>) -> Facts {
    Facts {
        scope: Scope::Mesh(Target::Service { service: Arc::clone(service), port: 80 }),
        client: ([10, 0, 0, 1], 4000).into(),
        local: ([10, 96, 0, 1], 80).into(),
        identity: Some(SpiffeId::new(&TrustDomain::default(), "shop", "front").expect("id")),
        source: Some(Arc::clone(source)),
        sni: None,
        plain: None,
    }
}
fn record(status: u16) -> Record {
    Record {
        started: Instant::now(),
        start_time: SystemTime::now(),
        method: Method::GET,
        path: "/x?y=1".into(),
        protocol: Version::HTTP_11,
        authority: "web".into(),
        user_agent: None,
        request_id: None,
        forwarded_for: None,
        grpc: false,
        route: None,
        cluster: None,
        host: None,
        status,
        grpc_status: None,
        flags: Flags::default(),
        details: "via_upstream".into(),
        transport_failure: "".into(),
        reason: None,
        attempts: 1,
        upstream_time: None,
        received: Arc::default(),
        sent: 5,
    }
}

#[test]
fn requests_are_counted_under_the_names_of_both_ends() {
    let registry = Registry::new();
    let telemetry = Telemetry::new(&registry, None).expect("registered");
    let source = Arc::new(Workload::new("c//Pod/shop/front-1", "front-1", "shop"));
    let service = Arc::new(Service::new("web", "shop", "web.shop.svc.cluster.local"));
    let facts = facts(&source, &service);
    for _ in 0..3 {
        telemetry.request_done(&facts, &record(200));
    }
    let mut refused = record(503);
    refused.flags.set(Flag::NoHealthyUpstream);
    refused.reason = Some(mesh_model::Reason::NoHealthyEndpoint);
    telemetry.request_done(&facts, &refused);
    let page = registry.encode();
    let line = |needles: &[&str]| {
        let found = page.lines().find(|l| l.starts_with("istio_requests_total") && needles.iter().all(|n| l.contains(n)));
        found.unwrap_or_else(|| panic!("no line with {needles:?} in\n{page}")).to_owned()
    };
    let ok = line(&["response_code=\"200\"", "response_flags=\"-\"", "reporter=\"waypoint\""]);
    assert!(ok.ends_with(" 3"), "{ok}");
    for label in [
        "source_workload=\"front-1\"",
        "source_principal=\"spiffe://cluster.local/ns/shop/sa/front\"",
        "destination_service=\"web.shop.svc.cluster.local\"",
        "destination_service_name=\"web\"",
        "destination_workload=\"unknown\"",
        "connection_security_policy=\"mutual_tls\"",
        "request_protocol=\"http\"",
    ] {
        assert!(ok.contains(label), "{label} in {ok}");
    }
    assert!(line(&["response_code=\"503\"", "response_flags=\"UH\""]).ends_with(" 1"));
    assert!(page.lines().any(|l| l.starts_with("culvert_refused_total") && l.contains("no_healthy_endpoint")), "{page}");
}

#[test]
fn lines_hold_istios_keys_and_text() {
    let source = Arc::new(Workload::new("c//Pod/shop/front-1", "front-1", "shop"));
    let service = Arc::new(Service::new("web", "shop", "web.shop.svc.cluster.local"));
    let (facts, record) = (facts(&source, &service), record(200));
    let line = |json| {
        let mut out = Vec::new();
        let elapsed = std::time::Duration::from_millis(12);
        access::Line { conn: &facts, record: &record, elapsed, received: 3 }.write(&mut out, json);
        String::from_utf8(out).expect("text")
    };
    let json: serde_json::Value = serde_json::from_str(&line(true)).expect("JSON");
    for (key, value) in [("method", "GET"), ("path", "/x?y=1"), ("protocol", "HTTP/1.1"), ("response_flags", "-")] {
        assert_eq!(json[key], value);
    }
    assert!(json["response_code"] == 200 && json["bytes_received"] == 3 && json["bytes_sent"] == 5 && json["duration"] == 12);
    assert!(json["route_name"].is_null());
    let text = line(false);
    let rest = text.split_once("] ").expect("a time").1;
    assert_eq!(
        rest,
        "\"GET /x?y=1 HTTP/1.1\" 200 - via_upstream - \"-\" 3 5 12 - \"-\" \"-\" \"-\" \"web\" \"-\" - - 10.96.0.1:80 10.0.0.1:4000 - -\n"
    );
}
