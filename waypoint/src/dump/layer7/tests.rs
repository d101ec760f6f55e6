use super::*;
use http::{HeaderName, HeaderValue};
use mesh_model::l7::HttpRoute;
use mesh_model::l7::destination::{KeyPair, OutlierPolicy, PoolLimits};
use mesh_model::l7::gateway::{GatewayKey, Listener};
use mesh_model::l7::route::{ClusterKey, Fraction, Mirror};
use std::collections::BTreeMap;

fn key() -> ServiceKey {
    ServiceKey::new("shop", "api.shop.svc.cluster.local")
}

#[test]
fn a_rule_reads_like_what_was_written() {
    let cluster = |subset: &str| ClusterKey { service: key(), port: 80, subset: Some(subset.into()) };
    let to = |subset, weight| Backend {
        to: BackendRef::Service(cluster(subset)),
        weight,
        headers: BothEdits::default(),
        rewrite: None,
        mirrors: Vec::new(),
    };
    let mut headers = BothEdits::default();
    headers.request.set.push((HeaderName::from_static("x-a"), HeaderValue::from_static("1")));
    let route = HttpRoute {
        name: "canary".into(),
        origin: None,
        action: HttpAction::Forward(Forward {
            backends: vec![to("v1", 95), to("v2", 5)],
            total_weight: 100,
            rewrite: Some(Rewrite { path: Some(PathRewrite::TextPrefix("/".into())), authority: None }),
            timeout: Some(Duration::from_millis(1500)),
            retry: Some(Arc::new(RetryPolicy::istio_default())),
            mirrors: vec![Mirror {
                to: BackendRef::Invalid { status: 503, why: "unknown".into() },
                fraction: Fraction::percent(12.5),
            }],
            session: None,
        }),
        headers,
        cors: None,
        fault: Some(Fault { delay: None, abort: Some((Fraction::ALL, Abort::Grpc(14))) }),
        dialect: Dialect::Istio,
    };
    let matches = HttpMatch {
        path: Some(PathMatch::TextPrefix("/api".into())),
        headers: vec![(HeaderName::from_static("x-user"), StringMatch::Exact("tester".into()))],
        ..HttpMatch::default()
    };
    let rules = vec![HttpRule { matches: matches.into(), route: Arc::new(route) }];
    let table = RouteTable { http: rules.into(), ..RouteTable::default() };
    let value = routes(&key(), &table);
    assert_eq!(value["service"], "shop/api.shop.svc.cluster.local");
    let rule = &value["http"][0];
    assert_eq!(rule["match"], json!({ "path": { "prefix": "/api" }, "headers": { "x-user": { "exact": "tester" } } }));
    assert_eq!(
        rule["action"]["forward"],
        json!({
            "backends": [
                { "to": "outbound|80|v1|api.shop.svc.cluster.local", "weight": 95, "ofTotal": 100 },
                { "to": "outbound|80|v2|api.shop.svc.cluster.local", "weight": 5, "ofTotal": 100 },
            ],
            "rewrite": { "path": { "prefix": "/" } },
            "timeout": "1.5s",
            "retries": {
                "attempts": 2,
                "retryOn": "connect-failure,refused-stream,retriable-status-codes,cancelled,unavailable",
                "backoff": "25ms",
            },
            "mirrors": [{ "to": { "invalid": "unknown", "answeredWith": 503 }, "percent": 12.5 }],
        })
    );
    assert_eq!(rule["headers"], json!({ "request": { "set": ["x-a: 1"] } }));
    assert_eq!(rule["fault"]["abort"], json!({ "percent": 100.0, "with": { "grpcStatus": 14 } }));
}

#[test]
fn limits_that_are_none_are_not_shown() {
    let pool = PoolLimits { max_connections: 100, max_pending: 50, ..PoolLimits::default() };
    let policy = TrafficPolicy { pool, outlier: Some(OutlierPolicy::default()), ..TrafficPolicy::default() };
    let value = destination(&Destination {
        key: key(),
        policy: Arc::new(policy),
        ports: BTreeMap::new(),
        subsets: BTreeMap::new(),
        origins: Vec::new(),
        broken: None,
    });
    let pool = &value["policy"]["connectionPool"];
    assert_eq!((&pool["maxConnections"], &pool["http1MaxPendingRequests"]), (&json!(100), &json!(50)));
    assert!(pool.get("http2MaxRequests").is_none() && pool.get("maxRetries").is_none());
    assert_eq!(value["policy"]["outlierDetection"]["consecutive5xxErrors"], 5);
    assert_eq!(value["policy"]["loadBalancer"], "LEAST_REQUEST");
}

#[test]
fn keys_are_never_shown() {
    let pair = KeyPair { chain: "CHAIN".into(), key: "SECRET".into() };
    let listener = Listener {
        name: "https".into(),
        port: 443,
        protocol: ListenerProtocol::Https,
        hostname: Some("*.example.com".into()),
        tls: Some(ListenerTls::Terminate(vec![pair])),
        clients: None,
        hosts: vec![("shop.example.com".into(), Arc::default())],
        broken: None,
    };
    let value = gateway(&GatewayRoutes { key: GatewayKey::new("shop", "edge"), listeners: vec![listener], origin: None });
    assert!(!value.to_string().contains("SECRET"));
    assert_eq!(value["listeners"][0]["tls"], json!({ "terminate": 1 }));
    assert_eq!((&value["name"], &value["listeners"][0]["protocol"]), (&json!("shop/edge"), &json!("HTTPS")));
}
