use super::*;
use http::HeaderName;
use mesh_identity::cache::dump::CertificateDump;
use mesh_model::gateway::ServiceKey;
use mesh_model::l7::HttpRoute;
use mesh_model::l7::route::DirectResponse;

fn backend(subset: &str, weight: u32) -> Backend {
    let key =
        ClusterKey { service: ServiceKey::new("shop", "api.shop.svc.cluster.local"), port: 80, subset: Some(subset.into()) };
    Backend { weight, ..Backend::to(BackendRef::Service(key)) }
}
fn origin(object: &str) -> Arc<Origin> {
    Arc::new(Origin { place: "x.yaml".into(), line: 1, object: object.into() })
}
fn rule(matches: HttpMatch, action: HttpAction) -> HttpRule {
    let plain = HttpRoute::plain(&ServiceKey::new("shop", "api"), 80);
    let route = HttpRoute { name: "r".into(), origin: Some(origin("VirtualService shop/api")), action, ..plain };
    HttpRule { matches: matches.into(), route: Arc::new(route) }
}
fn forward(backends: Vec<Backend>) -> HttpAction {
    HttpAction::Forward(Forward { backends, timeout: Some(Duration::from_millis(1500)), ..Forward::to(backend("x", 1).to) })
}

#[test]
fn routes_are_envoys() {
    let matches = HttpMatch {
        path: Some(PathMatch::SegmentPrefix("/a".into())),
        method: Some(StringMatch::Exact("GET".into())),
        without_headers: vec![(HeaderName::from_static("x-a"), StringMatch::Present)],
        port: Some(80),
        ..HttpMatch::default()
    };
    let table = RouteTable {
        http: vec![
            rule(matches, forward(vec![backend("v1", 95), backend("v2", 5)])),
            rule(HttpMatch { port: Some(81), ..HttpMatch::default() }, forward(vec![backend("v1", 1)])),
            rule(HttpMatch::default(), forward(vec![backend("v1", 1)])),
            rule(HttpMatch::default(), forward(vec![Backend::to(BackendRef::Invalid { status: 503, why: "no".into() })])),
            rule(HttpMatch::default(), HttpAction::Respond(DirectResponse { status: 418, body: Arc::default() })),
        ]
        .into(),
        ..RouteTable::default()
    };
    let host = virtual_host("inbound|http|80", "*", &table, Some(80));
    let routes = host["routes"].as_array().unwrap();
    assert_eq!(routes.len(), 4, "that of another port is left out");
    assert_eq!(
        routes[0],
        json!({
            "name": "r",
            "match": {
                "path_separated_prefix": "/a",
                "headers": [
                    { "name": ":method", "string_match": { "exact": "GET" }, "invert_match": false },
                    { "name": "x-a", "present_match": true, "invert_match": true },
                ],
            },
            "route": {
                "weighted_clusters": { "clusters": [
                    { "name": "outbound|80|v1|api.shop.svc.cluster.local", "weight": 95 },
                    { "name": "outbound|80|v2|api.shop.svc.cluster.local", "weight": 5 },
                ] },
                "timeout": "1.500000000s",
            },
            "metadata": { "filter_metadata": { "istio": {
                "config": "/apis/networking.istio.io/v1/namespaces/shop/virtual-service/api",
            } } },
        })
    );
    assert_eq!(routes[1]["route"]["cluster"], "outbound|80|v1|api.shop.svc.cluster.local");
    assert_eq!((&routes[2]["direct_response"]["status"], &routes[3]["direct_response"]["status"]), (&json!(503), &json!(418)));
    let broken = RouteTable { broken: Some("why".into()), ..table };
    let host = virtual_host("x", "*", &broken, None);
    assert_eq!(host["routes"][0]["direct_response"]["body"]["inline_string"], "why");
}

#[test]
fn secrets_are_certificates_and_roots_and_never_keys() {
    let dump = |pem: &str| CertificateDump {
        pem: pem.into(),
        serial_number: "1".into(),
        valid_from: "2026-01-01T00:00:00Z".into(),
        expiration_time: "2026-01-01T01:00:00Z".into(),
    };
    let identity = IdentityDump {
        identity: "spiffe://x".into(),
        state: "Available".into(),
        cert_chain: vec![dump("bGVhZg=="), dump("aW50")],
        root_certs: vec![dump("cm9vdA=="), dump("b2xk")],
    };
    let section = secrets(&[identity]);
    let all = section["dynamic_active_secrets"].as_array().unwrap();
    let names: Vec<&str> = all.iter().filter_map(|secret| secret["name"].as_str()).collect();
    assert_eq!(names, ["default", "ROOTCA", "ROOTCA-2"]);
    assert_eq!(all[0]["secret"]["tls_certificate"], json!({ "certificate_chain": { "inline_bytes": "bGVhZg==" } }));
    assert_eq!(all[1]["secret"]["validation_context"]["trusted_ca"]["inline_bytes"], "cm9vdA==");
    assert_eq!(section["@type"], "type.googleapis.com/envoy.admin.v3.SecretsConfigDump");
}
