//! Tables of DestinationRules and what they become.

use std::time::Duration;

use mesh_model::l7::destination::{
    Balance, ClientCertificate, Destination, ForwardTunnel, HashAlgorithm, HashKey, Http2Keepalive, LocalityPolicy,
    OutlierPolicy, PoolLimits, ProxyVersion, RetryBudget, RevocationLists, Roots, TcpKeepalive, TrafficPolicy, Warmup,
};

use super::super::tests::{State, mesh7, pod, service};
use crate::diagnostics::{Problem, Severity};

const API: &str = "a/api.a.svc.cluster.local";

fn world() -> String {
    service(
        "a",
        "api",
        "",
        "{clusterIP: 10.1.0.1, selector: {app: api}, ports: [{port: 80, name: http}, {port: 81, name: http-b}]}",
    ) + &service("b", "other", "", "{clusterIP: 10.1.0.2, ports: [{port: 80, name: http}]}")
}
fn dr_at(ns: &str, name: &str, meta: &str, spec: &str) -> String {
    let spec = spec.trim_end().replace('\n', "\n  ");
    format!(
        "---\napiVersion: networking.istio.io/v1\nkind: DestinationRule\nmetadata: {{name: {name}, namespace: {ns}{meta}}}\nspec:\n  {spec}\n"
    )
}
fn dr(spec: &str) -> String {
    dr_at("a", "d", "", spec)
}
#[track_caller]
fn of(state: &State, key: &str) -> Destination {
    let d = state.destinations.get(key).unwrap_or_else(|| panic!("no destination {key} in {:?}", state.destinations.keys()));
    (**d).clone()
}
#[track_caller]
fn destination(text: &str) -> Destination {
    let (state, problems) = mesh7(&(world() + text));
    assert_eq!(problems, [], "{text}");
    of(&state, API)
}
#[track_caller]
fn policy(fields: &str) -> TrafficPolicy {
    (*destination(&dr(&format!("host: api\ntrafficPolicy: {{{fields}}}"))).policy).clone()
}
fn codes(problems: &[Problem]) -> Vec<(Severity, &'static str)> {
    problems.iter().map(|p| (p.severity, p.code.unwrap_or(""))).collect()
}
const fn secs(s: u64) -> Duration {
    Duration::from_secs(s)
}

#[test]
fn load_balancers() {
    for (fields, want) in [
        ("", Balance::LeastRequest),
        ("simple: UNSPECIFIED", Balance::LeastRequest),
        ("simple: LEAST_CONN", Balance::LeastRequest),
        ("simple: LEAST_REQUEST", Balance::LeastRequest),
        ("simple: ROUND_ROBIN", Balance::RoundRobin),
        ("simple: RANDOM", Balance::Random),
        ("simple: PASSTHROUGH", Balance::Passthrough),
        (
            "consistentHash: {httpHeaderName: X-User}",
            Balance::Hash { algorithm: HashAlgorithm::Ring(1024), key: HashKey::Header("x-user".parse().unwrap()) },
        ),
        (
            "consistentHash: {httpCookie: {name: c, path: /p, ttl: 0s, attributes: [{name: Secure}, {name: SameSite, value: None}]}, ringHash: {minimumRingSize: 2048}}",
            Balance::Hash {
                algorithm: HashAlgorithm::Ring(2048),
                key: HashKey::Cookie {
                    name: "c".into(),
                    path: Some("/p".into()),
                    ttl: Some(secs(0)),
                    attributes: "; Secure; SameSite=None".into(),
                },
            },
        ),
        (
            "consistentHash: {httpCookie: {name: c}, minimumRingSize: 8}",
            Balance::Hash {
                algorithm: HashAlgorithm::Ring(8),
                key: HashKey::Cookie { name: "c".into(), path: None, ttl: None, attributes: "".into() },
            },
        ),
        (
            "consistentHash: {useSourceIp: true, maglev: {}}",
            Balance::Hash { algorithm: HashAlgorithm::Maglev(65537), key: HashKey::SourceIp },
        ),
        (
            "consistentHash: {httpQueryParameterName: q, maglev: {tableSize: 251}}",
            Balance::Hash { algorithm: HashAlgorithm::Maglev(251), key: HashKey::Query("q".into()) },
        ),
    ] {
        assert_eq!(policy(&format!("loadBalancer: {{{fields}}}")).balance, want, "{fields}");
    }
    let warm = |fields: &str| policy(&format!("loadBalancer: {{simple: ROUND_ROBIN, {fields}}}")).warmup.unwrap();
    let plain = Warmup { duration: secs(30), minimum_percent: 10, aggression_milli: 1000 };
    assert_eq!(warm("warmup: {duration: 30s}"), plain);
    assert_eq!(warm("warmupDurationSecs: 30s"), plain);
    assert_eq!(
        warm("warmup: {duration: 1m, minimumPercent: 20, aggression: 1.5}"),
        Warmup { duration: secs(60), minimum_percent: 20, aggression_milli: 1500 }
    );
    let locality = |fields: &str| policy(&format!("loadBalancer: {{localityLbSetting: {{{fields}}}}}")).locality;
    assert_eq!(locality(""), LocalityPolicy::default());
    assert!(locality("enabled: false").disabled && !locality("enabled: true").disabled);
    assert_eq!(
        locality("distribute: [{from: r1/z1/*, to: {r1/z1/*: 80, r1/z2/*: 20}}]").distribute,
        [("r1/z1/*".into(), vec![("r1/z1/*".into(), 80), ("r1/z2/*".into(), 20)])]
    );
    assert_eq!(locality("failover: [{from: r1, to: r2}]").failover, [("r1".into(), "r2".into())]);
    assert_eq!(
        locality("failoverPriority: [topology.istio.io/network, version=v1]").priority,
        [("topology.istio.io/network".into(), None), ("version".into(), Some("v1".into()))]
    );
}

#[test]
fn pools_and_ejection() {
    let pool = |fields: &str| policy(&format!("connectionPool: {{{fields}}}")).pool;
    let default = PoolLimits::default();
    assert_eq!(pool(""), default);
    assert_eq!(pool("tcp: {maxConnections: 0}, http: {maxRetries: 0, http2MaxRequests: 0}"), default);
    assert_eq!(
        pool(
            "tcp: {maxConnections: 100, connectTimeout: 30ms, tcpKeepalive: {time: 7200s, interval: 75s, probes: 3}, maxConnectionDuration: 1h, idleTimeout: 5m}"
        ),
        PoolLimits {
            max_connections: 100,
            connect_timeout: Duration::from_millis(30),
            keepalive: Some(TcpKeepalive { probes: 3, time: secs(7200), interval: secs(75) }),
            max_connection_duration: Some(secs(3600)),
            tcp_idle_timeout: Some(secs(300)),
            http_idle_timeout: Some(secs(300)),
            ..default.clone()
        }
    );
    assert_eq!(pool("tcp: {tcpKeepalive: {}}").keepalive, Some(TcpKeepalive { probes: 9, time: secs(7200), interval: secs(75) }));
    assert_eq!(
        pool(
            "http: {http1MaxPendingRequests: 50, http2MaxRequests: 100, maxRequestsPerConnection: 10, maxRetries: 3, idleTimeout: 30s, h2UpgradePolicy: UPGRADE, maxConcurrentStreams: 7, http2KeepAlive: {interval: 2s, timeout: 500ms}}"
        ),
        PoolLimits {
            max_pending: 50,
            max_requests: 100,
            max_requests_per_connection: 10,
            max_retries: 3,
            http_idle_timeout: Some(secs(30)),
            h2_upgrade: true,
            max_concurrent_streams: 7,
            http2_keepalive: Some(Http2Keepalive { interval: Duration::from_secs(2), timeout: Duration::from_millis(500) }),
            ..default
        }
    );
    assert_eq!(pool("tcp: {idleTimeout: 5m}, http: {idleTimeout: 0s}").http_idle_timeout, None);
    assert!(pool("http: {useClientProtocol: true, h2UpgradePolicy: DO_NOT_UPGRADE}").use_client_protocol);

    let outlier = |fields: &str| policy(&format!("outlierDetection: {{{fields}}}")).outlier;
    assert_eq!(policy("").outlier, None);
    assert_eq!(outlier(""), Some(OutlierPolicy::default()));
    assert_eq!(
        outlier(
            "consecutive5xxErrors: 0, consecutiveGatewayErrors: 7, splitExternalLocalOriginErrors: true, consecutiveLocalOriginFailures: 2, interval: 1s, baseEjectionTime: 10m, maxEjectionPercent: 100, minHealthPercent: 30"
        ),
        Some(OutlierPolicy {
            consecutive_5xx: 0,
            consecutive_gateway: 7,
            consecutive_local: 2,
            split_external_local: true,
            interval: secs(1),
            base_ejection: secs(600),
            max_ejection: secs(600),
            max_ejection_percent: 100,
            min_health_percent: 30,
            error_statuses: Vec::new(),
        })
    );
    assert_eq!(outlier("outlierDetectionHttpErrorCodes: [404, 503]").unwrap().error_statuses, [404, 503]);
    assert_eq!(policy("proxyProtocol: {version: V2}").proxy_protocol, Some(ProxyVersion::V2));
    assert_eq!(policy("proxyProtocol: {}").proxy_protocol, Some(ProxyVersion::V1));
    assert_eq!(
        policy("retryBudget: {}").retry_budget,
        Some(RetryBudget { interval: None, percent_hundredths: 2000, min_concurrency: 3 })
    );
    assert_eq!(
        policy("retryBudget: {percent: 12.5, minRetryConcurrency: 10, budgetInterval: 5s}").retry_budget,
        Some(RetryBudget { interval: Some(secs(5)), percent_hundredths: 1250, min_concurrency: 10 })
    );
}

#[test]
fn tls_towards_the_endpoint() {
    assert_eq!(policy("tls: {mode: ISTIO_MUTUAL}").tls, None);
    assert_eq!(policy("tls: {mode: DISABLE}").tls, None);
    let t = policy("tls: {mode: SIMPLE}").tls.unwrap();
    assert_eq!((&t.sni, &t.roots, &t.client, t.skip_verify, t.sans.len()), (&None, &Roots::System, &None, false, 0));
    let t = policy("tls: {mode: SIMPLE, sni: X.com, caCertificates: /etc/ca.pem, subjectAltNames: [x.com, 'spiffe://a/b'], insecureSkipVerify: true}")
        .tls
        .unwrap();
    assert_eq!(
        (t.sni.as_deref(), &t.roots, t.skip_verify, t.sans.len()),
        (Some("x.com"), &Roots::File("/etc/ca.pem".into()), true, 2)
    );
    let t = policy("tls: {mode: MUTUAL, clientCertificate: /c, privateKey: /k}").tls.unwrap();
    assert_eq!(t.client, Some(ClientCertificate::Files { chain: "/c".into(), key: "/k".into() }));

    assert_eq!(t.crl, None);
    let t = policy("tls: {mode: SIMPLE, caCrl: /crl}").tls.unwrap();
    assert_eq!((&t.roots, &t.crl), (&Roots::System, &Some(RevocationLists::File("/crl".into()))));

    // From a Secret of the rule's namespace.
    let secret = |data: &str| {
        format!("---\n{{apiVersion: v1, kind: Secret, metadata: {{name: s, namespace: a}}, stringData: {{{data}}}}}\n")
    };
    let tls = |secret: &str, mode: &str| {
        let d = destination(
            &(dr(&format!("host: api\ntrafficPolicy: {{tls: {{mode: {mode}, credentialName: kubernetes://s}}}}")) + secret),
        );
        d.policy.tls.clone().unwrap()
    };
    let t = tls("", "MUTUAL");
    assert!(matches!((&t.roots, &t.client), (Roots::Missing(_), Some(ClientCertificate::Missing(_)))), "{t:?}");
    let t = tls(&secret("tls.crt: C, tls.key: K, ca.crt: A"), "MUTUAL");
    assert!(
        matches!((&t.roots, &t.client), (Roots::Pem(a), Some(ClientCertificate::Pem(k))) if &**a == "A" && (&*k.chain, &*k.key) == ("C", "K"))
    );
    let t = tls(&secret("cacert: A"), "SIMPLE");
    assert!(matches!((&t.roots, &t.client, &t.crl), (Roots::Pem(_), None, None)));
    for entries in ["cacert: A, crl: L", "ca.crt: A, ca.crl: L", "ca.crt: A, ca.crl: L, crl: M"] {
        let t = tls(&secret(entries), "SIMPLE");
        assert_eq!(t.crl, Some(RevocationLists::Pem("L".into())), "{entries}");
    }
    let t = tls(&secret("tls.crt: C"), "SIMPLE");
    assert!(matches!(&t.roots, Roots::Missing(why) if why.contains("a/s has no entry ca.crt")), "{t:?}");
    assert!(!format!("{:?}", tls(&secret("tls.crt: C, tls.key: HUSH"), "MUTUAL")).contains("HUSH"));
}

#[test]
fn subsets_and_ports_replace_by_block() {
    let d = destination(&dr("\
host: api
trafficPolicy:
  loadBalancer: {simple: RANDOM}
  connectionPool: {tcp: {maxConnections: 1}}
  proxyProtocol: {version: V2}
  portLevelSettings:
  - {port: {number: 81}, connectionPool: {tcp: {maxConnections: 2}}}
subsets:
- {name: plain, labels: {version: v1}}
- name: own
  labels: {version: v2}
  trafficPolicy:
    loadBalancer: {simple: ROUND_ROBIN}
    portLevelSettings:
    - {port: {number: 80}, outlierDetection: {}}"));
    let say = |subset: Option<&str>, port: u16| {
        let p = d.policy(subset, port).unwrap();
        (p.balance.clone(), p.pool.max_connections, p.outlier.is_some(), p.proxy_protocol)
    };
    let v2 = Some(ProxyVersion::V2);
    assert_eq!(say(None, 80), (Balance::Random, 1, false, v2));
    // A port inherits none of the four blocks, but what a port has no say in.
    assert_eq!(say(None, 81), (Balance::LeastRequest, 2, false, v2));
    assert_eq!(say(Some("plain"), 80), (Balance::Random, 1, false, v2));
    assert_eq!(say(Some("plain"), 81), (Balance::LeastRequest, 2, false, v2));
    assert_eq!(say(Some("own"), 8080), (Balance::RoundRobin, 1, false, v2));
    assert_eq!(say(Some("own"), 81), (Balance::RoundRobin, 2, false, v2));
    assert_eq!(say(Some("own"), 80), (Balance::LeastRequest, u32::MAX, true, v2));
    assert_eq!(d.policy(Some("none"), 80), None);
    assert_eq!(d.subsets["plain"].labels.get("version").map(|v| &**v), Some("v1"));
}

#[test]
fn another_proxy_is_asked_where_it_is_written() {
    for (fields, target, post) in [
        ("targetHost: x.com, targetPort: 443", "x.com:443", false),
        ("protocol: CONNECT, targetHost: X.com, targetPort: 443", "x.com:443", false),
        ("protocol: POST, targetHost: 10.0.0.1, targetPort: 80", "10.0.0.1:80", true),
        ("targetHost: 'fd00::1', targetPort: 80", "[fd00::1]:80", false),
    ] {
        let got = policy(&format!("tunnel: {{{fields}}}")).tunnel;
        assert_eq!(got, Some(ForwardTunnel { target: target.into(), post }), "{fields}");
    }
    let d = destination(&dr("\
host: api
trafficPolicy:
  tunnel: {targetHost: top, targetPort: 1}
  portLevelSettings:
  - {port: {number: 81}, connectionPool: {tcp: {maxConnections: 2}}}
subsets:
- {name: plain, labels: {version: v1}}
- {name: other, labels: {version: v1}, trafficPolicy: {loadBalancer: {simple: RANDOM}}}
- {name: own, labels: {version: v2}, trafficPolicy: {tunnel: {targetHost: own, targetPort: 2}}}"));
    let of = |subset: Option<&str>, port: u16| d.policy(subset, port).unwrap().tunnel.as_ref().map(|t| t.target.to_string());
    let (top, own) = (Some("top:1".to_owned()), Some("own:2".to_owned()));
    assert_eq!([of(None, 80), of(None, 81)], [top.clone(), top]);
    for subset in ["plain", "other"] {
        assert_eq!([of(Some(subset), 80), of(Some(subset), 81)], [None, None], "{subset}");
    }
    assert_eq!([of(Some("own"), 80), of(Some("own"), 81)], [own.clone(), own]);
}

/// What MeshConfig says is under what a rule says, block by block.
#[test]
fn where_a_rule_says_nothing_mesh_config_counts() {
    const MESH: &str = "---
apiVersion: v1
kind: ConfigMap
metadata: {name: istio, namespace: istio-system}
data:
  mesh: |
    connectTimeout: 1s
    tcpKeepalive: {probes: 2, time: 60s, interval: 5s}
    h2UpgradePolicy: UPGRADE
    localityLbSetting: {failover: [{from: a, to: b}]}
    defaultTrafficPolicy:
      connectionPool: {tcp: {maxConnections: 5}, http: {http1MaxPendingRequests: 6}}
      outlierDetection: {consecutive5xxErrors: 7}
";
    let mesh = |fields: &str| destination(&(MESH.to_owned() + &dr(&format!("host: api\ntrafficPolicy: {{{fields}}}"))));
    let of = |fields: &str| (*mesh(fields).policy).clone();
    let told = |p: &TrafficPolicy| (p.pool.max_connections, p.pool.max_pending, p.outlier.as_ref().map(|o| o.consecutive_5xx));
    let none = u32::MAX;
    for (fields, want) in [
        ("loadBalancer: {}", (5, 6, Some(7))),
        ("connectionPool: {}", (none, none, Some(7))),
        ("connectionPool: {tcp: {maxConnections: 9}}", (9, none, Some(7))),
        ("outlierDetection: {consecutive5xxErrors: 0}", (5, 6, Some(0))),
        ("connectionPool: {}, outlierDetection: {}", (none, none, Some(5))),
    ] {
        assert_eq!(told(&of(fields)), want, "{fields}");
    }
    // Of all pools, whoever wrote them.
    let pool = |fields: &str| of(&format!("connectionPool: {{{fields}}}")).pool;
    let keepalive = |probes, time, interval| Some(TcpKeepalive { probes, time: secs(time), interval: secs(interval) });
    for (got, timeout, keepalive, upgrade) in [
        (of("loadBalancer: {}").pool, 1, keepalive(2, 60, 5), true),
        (pool(""), 1, keepalive(2, 60, 5), true),
        (pool("tcp: {connectTimeout: 3s, tcpKeepalive: {time: 9s}}"), 3, keepalive(2, 9, 5), true),
        (pool("http: {h2UpgradePolicy: DEFAULT}"), 1, keepalive(2, 60, 5), true),
        (pool("http: {h2UpgradePolicy: DO_NOT_UPGRADE}"), 1, keepalive(2, 60, 5), false),
    ] {
        assert_eq!((got.connect_timeout, got.keepalive, got.h2_upgrade_of_http), (secs(timeout), keepalive, upgrade));
    }
    let upgraded = pool("http: {h2UpgradePolicy: UPGRADE}");
    assert!(upgraded.h2_upgrade && !upgraded.h2_upgrade_of_http);
    let locality = of("loadBalancer: {simple: RANDOM}").locality;
    assert!(locality.mesh_wide && locality.failover.len() == 1);
    assert_eq!(of("loadBalancer: {localityLbSetting: {}}").locality, LocalityPolicy::default());
    // Ports and subsets too, each by its own.
    let d = destination(
        &(MESH.to_owned()
            + &dr("\
host: api
trafficPolicy:
  connectionPool: {}
  portLevelSettings: [{port: {number: 81}, outlierDetection: {}}]
subsets: [{name: v1, labels: {v: '1'}, trafficPolicy: {outlierDetection: {consecutive5xxErrors: 3}}}]")),
    );
    let at = |subset, port| told(d.policy(subset, port).unwrap());
    assert_eq!([at(None, 80), at(None, 81)], [(none, none, Some(7)), (5, 6, Some(5))]);
    assert_eq!(at(Some("v1"), 80), (none, none, Some(3)));
}

#[test]
fn which_rules_count() {
    let one = |ns: &str, name: &str, host: &str, n: u32, more: &str| {
        dr_at(ns, name, "", &format!("host: '{host}'\ntrafficPolicy: {{connectionPool: {{tcp: {{maxConnections: {n}}}}}}}{more}"))
    };
    let limit = |text: String| {
        let (state, problems) = mesh7(&(world() + &text));
        assert_eq!(problems.iter().filter(|p| p.severity == Severity::Error).count(), 0, "{problems:?}");
        state.destinations.get(API).map(|d| d.policy.pool.max_connections)
    };
    let root = "istio-system";
    let full = "api.a.svc.cluster.local";
    assert_eq!(limit(one("b", "x", full, 1, "")), None, "the client's namespace is not the waypoint's");
    assert_eq!(limit(one(root, "x", full, 2, "")), Some(2));
    assert_eq!(limit(one(root, "x", full, 2, "\nexportTo: ['.']")), None);
    assert_eq!(limit(one(root, "x", full, 2, "") + &one("a", "x", "*.cluster.local", 3, "")), Some(3), "own namespace first");
    assert_eq!(limit(one("a", "x", "*.cluster.local", 3, "") + &one("a", "y", "*.a.svc.cluster.local", 4, "")), Some(4));
    assert_eq!(
        limit(one("a", "y", "*.a.svc.cluster.local", 4, "") + &one("a", "z", "api", 5, "") + &one("a", "w", "*", 6, "")),
        Some(5)
    );
    assert_eq!(limit(one("a", "w", "*", 6, "")), Some(6));
    assert_eq!(
        limit(one("a", "w", "api", 6, "\nworkloadSelector: {matchLabels: {app: x}}") + &one("a", "x", "*", 7, "")),
        Some(7)
    );

    // Where it does not say whom it is exported to, MeshConfig does.
    let default = |to: &str| {
        format!(
            "---\n{{apiVersion: v1, kind: ConfigMap, metadata: {{name: istio, namespace: {root}}}, data: {{mesh: 'defaultDestinationRuleExportTo: [{to}]'}}}}\n"
        )
    };
    for (to, seen) in [(".", None), ("b", None), ("b, a", Some(2)), ("\"*\"", Some(2)), ("\"~\"", None)] {
        assert_eq!(limit(default(to) + &one(root, "x", full, 2, "")), seen, "{to}");
        assert_eq!(limit(default(to) + &one(root, "x", full, 2, "\nexportTo: ['*']")), Some(2), "{to}");
    }
    assert_eq!(limit(default(".") + &one("a", "x", full, 2, "")), Some(2), "its own namespace");

    // Several of one host: the oldest policy, all subsets.
    let old = dr_at(
        "a",
        "z",
        ", creationTimestamp: '2020-01-01T00:00:00Z'",
        "host: api\nsubsets: [{name: v1, labels: {v: '1'}}, {name: v2, labels: {v: '2'}}]",
    );
    let mid = dr_at(
        "a",
        "y",
        ", creationTimestamp: '2021-01-01T00:00:00Z'",
        "host: api\ntrafficPolicy: {loadBalancer: {simple: RANDOM}}\nsubsets: [{name: v2, labels: {v: other}}, {name: v3, labels: {v: '3'}}]",
    );
    let new = dr_at("a", "x", "", "host: api\ntrafficPolicy: {loadBalancer: {simple: ROUND_ROBIN}}");
    let (state, problems) = mesh7(&(world() + &new + &mid + &old));
    let d = of(&state, API);
    assert_eq!((&d.policy.balance, d.origins.len()), (&Balance::Random, 3));
    let labels: Vec<(&str, &str)> = d.subsets.iter().map(|(n, s)| (&**n, s.labels.get("v").map_or("", |v| v))).collect();
    assert_eq!(labels, [("v1", "1"), ("v2", "2"), ("v3", "3")]);
    assert!(d.subsets.values().all(|s| s.policy.balance == Balance::Random));
    assert_eq!(codes(&problems), [(Severity::Warning, "several-rules"); 2]);
}

#[test]
fn mistakes_are_told_with_line_and_field_and_close_the_host() {
    for (spec, line, field, message) in [
        ("host: api\ntrafficPolicy: {loadbalancer: {}}", 6, "spec.trafficPolicy.loadbalancer", "did you mean `loadBalancer`?"),
        (
            "host: api\ntrafficPolicy: {loadBalancer: {simple: FASTEST}}",
            6,
            "spec.trafficPolicy.loadBalancer.simple",
            "not a load balancer",
        ),
        (
            "host: api\ntrafficPolicy: {loadBalancer: {simple: RANDOM, consistentHash: {useSourceIp: true}}}",
            6,
            "spec.trafficPolicy.loadBalancer.consistentHash",
            "cannot both",
        ),
        (
            "host: api\ntrafficPolicy: {loadBalancer: {consistentHash: {}}}",
            6,
            "spec.trafficPolicy.loadBalancer.consistentHash",
            "exactly one thing",
        ),
        (
            "host: api\ntrafficPolicy: {loadBalancer: {consistentHash: {httpCookie: {name: 'a;b'}}}}",
            6,
            "spec.trafficPolicy.loadBalancer.consistentHash.httpCookie.name",
            "not a cookie name",
        ),
        (
            "host: api\ntrafficPolicy: {loadBalancer: {consistentHash: {useSourceIp: true, maglev: {tableSize: 65536}}}}",
            6,
            "spec.trafficPolicy.loadBalancer.consistentHash.maglev.tableSize",
            "a prime",
        ),
        (
            "host: api\ntrafficPolicy: {loadBalancer: {localityLbSetting: {distribute: [{from: r, to: {r: 90}}]}}}",
            6,
            "spec.trafficPolicy.loadBalancer.localityLbSetting.distribute[0].to",
            "sum to 90",
        ),
        (
            "host: api\ntrafficPolicy: {loadBalancer: {localityLbSetting: {distribute: [{from: 'r*/z', to: {r: 100}}]}}}",
            6,
            "spec.trafficPolicy.loadBalancer.localityLbSetting.distribute[0].from",
            "not a locality",
        ),
        (
            "host: api\ntrafficPolicy: {connectionPool: {tcp: {maxConnections: -1}}}",
            6,
            "spec.trafficPolicy.connectionPool.tcp.maxConnections",
            "whole number",
        ),
        (
            "host: api\ntrafficPolicy: {connectionPool: {tcp: {connectTimeout: 10}}}",
            6,
            "spec.trafficPolicy.connectionPool.tcp.connectTimeout",
            "not a duration",
        ),
        (
            "host: api\ntrafficPolicy: {connectionPool: {http: {h2UpgradePolicy: YES}}}",
            6,
            "spec.trafficPolicy.connectionPool.http.h2UpgradePolicy",
            "not understood",
        ),
        (
            "host: api\ntrafficPolicy: {connectionPool: {http: {http2KeepAlive: {interval: 10s}}}}",
            6,
            "spec.trafficPolicy.connectionPool.http.http2KeepAlive.timeout",
            "an interval and a timeout",
        ),
        (
            "host: api\ntrafficPolicy: {outlierDetection: {maxEjectionPercent: 101}}",
            6,
            "spec.trafficPolicy.outlierDetection.maxEjectionPercent",
            "at most 100",
        ),
        (
            "host: api\ntrafficPolicy: {outlierDetection: {interval: 0s}}",
            6,
            "spec.trafficPolicy.outlierDetection.interval",
            "at least 1ms",
        ),
        (
            "host: api\ntrafficPolicy: {outlierDetection: {outlierDetectionHttpErrorCodes: [503, 600]}}",
            6,
            "spec.trafficPolicy.outlierDetection.outlierDetectionHttpErrorCodes[1]",
            "not a status of HTTP",
        ),
        (
            "host: api\ntrafficPolicy: {outlierDetection: {consecutive5xx: 5}}",
            6,
            "spec.trafficPolicy.outlierDetection.consecutive5xx",
            "unknown field",
        ),
        ("host: api\ntrafficPolicy: {tls: {mode: PLAIN}}", 6, "spec.trafficPolicy.tls.mode", "not a TLS mode"),
        ("host: api\ntrafficPolicy: {tls: {mode: MUTUAL}}", 6, "spec.trafficPolicy.tls.clientCertificate", "needs a certificate"),
        (
            "host: api\ntrafficPolicy: {tls: {mode: SIMPLE, credentialName: x, caCrl: /x}}",
            6,
            "spec.trafficPolicy.tls.caCrl",
            "cannot go with",
        ),
        (
            "host: api\ntrafficPolicy: {tls: {mode: SIMPLE, credentialName: x, caCertificates: /y}}",
            6,
            "spec.trafficPolicy.tls.caCertificates",
            "cannot go with",
        ),
        (
            "host: api\ntrafficPolicy: {tunnel: {targetHost: x, targetPort: 1}, proxyProtocol: {}}",
            6,
            "spec.trafficPolicy.tunnel",
            "cannot both",
        ),
        (
            "host: api\ntrafficPolicy: {tunnel: {protocol: SOCKS, targetHost: x, targetPort: 1}}",
            6,
            "spec.trafficPolicy.tunnel.protocol",
            "not a way",
        ),
        ("host: api\ntrafficPolicy: {tunnel: {targetPort: 1}}", 6, "spec.trafficPolicy.tunnel.targetHost", "asked for a host"),
        (
            "host: api\ntrafficPolicy: {tunnel: {targetHost: '*.x', targetPort: 1}}",
            6,
            "spec.trafficPolicy.tunnel.targetHost",
            "not a host name",
        ),
        ("host: api\ntrafficPolicy: {tunnel: {targetHost: x}}", 6, "spec.trafficPolicy.tunnel.targetPort", "a port is needed"),
        (
            "host: api\nsubsets: [{name: a, trafficPolicy: {tunnel: {targetHost: x, targetPort: 0}}}]",
            6,
            "spec.subsets[0].trafficPolicy.tunnel.targetPort",
            "port",
        ),
        (
            "host: api\ntrafficPolicy: {portLevelSettings: [{}]}",
            6,
            "spec.trafficPolicy.portLevelSettings[0].port",
            "the port they are for",
        ),
        (
            "host: api\ntrafficPolicy: {portLevelSettings: [{port: {number: 1}}, {port: {number: 1}}]}",
            6,
            "spec.trafficPolicy.portLevelSettings[1].port",
            "written twice",
        ),
        ("host: api\nsubsets: [{labels: {}}]", 6, "spec.subsets[0].name", "routes name subsets"),
        ("host: api\nsubsets:\n- name: a\n- name: a", 8, "spec.subsets[1].name", "written twice"),
        ("host: api\nworkloadSelector: {labels: {}}", 6, "spec.workloadSelector.labels", "unknown field"),
    ] {
        let (state, problems) = mesh7(&(world() + &dr(spec)));
        let [p] = problems.as_slice() else { panic!("{spec}: {problems:?}") };
        // Lines are counted from the object's `apiVersion`, behind the world and a `---`.
        assert_eq!((p.severity, p.origin.line, &*p.field), (Severity::Error, line + 11, field), "{spec}: {p}");
        assert!(p.message.contains(message), "{p}");
        let why = of(&state, API).broken.expect(spec);
        assert!(why.starts_with("DestinationRule a/d cannot be used: ") && why.contains(message), "{why}");
    }
    let (state, problems) = mesh7(&(world() + &dr("trafficPolicy: {}")));
    assert_eq!((state.destinations.len(), codes(&problems)), (0, vec![(Severity::Error, "missing-field")]));
}

#[test]
fn what_has_no_effect_is_told() {
    for (spec, code) in [
        ("host: api\nworkloadSelector: {matchLabels: {app: x}}", "workload-selector"),
        ("host: nothing", "no-service"),
        ("host: other.b.svc.cluster.local", "no-service"),
        ("host: api\ntrafficPolicy: {outlierDetection: {consecutiveErrors: 5}}", "no-effect"),
        ("host: api\ntrafficPolicy: {loadBalancer: {simple: RANDOM, warmup: {duration: 1s}}}", "no-effect"),
        ("host: api\ntrafficPolicy: {tls: {mode: ISTIO_MUTUAL, sni: a.b}}", "no-effect"),
        ("host: api\ntrafficPolicy: {tls: {mode: DISABLE, insecureSkipVerify: true}}", "no-effect"),
        ("host: api\ntrafficPolicy: {tls: {mode: DISABLE, caCrl: /x}}", "no-effect"),
        ("host: api\ntrafficPolicy: {tls: {mode: SIMPLE, insecureSkipVerify: true, caCrl: /x}}", "no-effect"),
    ] {
        let (_, problems) = mesh7(&(world() + &dr(spec)));
        assert_eq!(codes(&problems), [(Severity::Warning, code)], "{spec}");
    }
}

#[test]
fn endpoints_of_a_service_entry_carry_their_own_labels() {
    let text = "---\n{apiVersion: networking.istio.io/v1, kind: ServiceEntry, metadata: {name: e, namespace: a, labels: {app: x, version: se}}, spec: {hosts: [x.com], resolution: STATIC, ports: [{number: 80, name: http}], endpoints: [{address: 192.0.2.1, labels: {version: v1}}, {address: 192.0.2.2}]}}\n";
    let (state, problems) = mesh7(&(text.to_owned() + &pod("a", "p", "10.0.0.1", "version: pod")));
    assert_eq!(problems, []);
    let labels = |tail: &str| {
        let w = state.w(tail);
        let get = |k: &str| w.labels.get(k).map_or("", |v| v).to_owned();
        (get("app"), get("version"), w.canonical_revision.to_string())
    };
    // Names and policies stay those of the ServiceEntry.
    assert_eq!(labels("192.0.2.1"), ("x".into(), "v1".into(), "se".into()));
    assert_eq!(labels("192.0.2.2"), ("x".into(), "se".into(), "se".into()));
    assert_eq!(labels("a/p").1, "pod");
}
