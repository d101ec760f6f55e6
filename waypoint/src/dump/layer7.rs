//! Routes, destinations and gateways as readable JSON: the compiled form, in the words of the objects they came from.
use mesh_model::gateway::ServiceKey;
use mesh_model::l7::destination::{Balance, Destination, HashKey, TrafficPolicy};
use mesh_model::l7::gateway::{GatewayRoutes, ListenerProtocol, ListenerTls};
use mesh_model::l7::headers::{BothEdits, HeaderEdits};
use mesh_model::l7::limit::Limit;
use mesh_model::l7::policy::{L7Action, L7Body, L7Policies, L7Policy, PolicyTarget};
use mesh_model::l7::route::{
    Abort, BackendRef, Dialect, Fault, Forward, HttpAction, PathMatch, PathRewrite, RetryOn, RetryPolicy, Rewrite, TcpRoute,
};
use mesh_model::l7::session::{Carrier, Session};
use mesh_model::l7::{Backend, HttpMatch, HttpRule, RouteTable, StringMatch, Treatment};
use mesh_model::origin::Origin;
use serde_json::{Map, Value, json};
use std::sync::Arc;
use std::time::Duration;

/// The routes of a service.
pub(super) fn routes(key: &ServiceKey, table: &RouteTable) -> Value {
    let mut out = self::table(table);
    out["service"] = json!(key.to_string());
    out
}

/// The policies of a target.
pub(super) fn policies(target: &PolicyTarget, all: &L7Policies) -> Value {
    let policy = |p: &Arc<L7Policy>| {
        let mut out = json!({ "name": p.key.to_string(), "origin": p.origin.as_ref().map(ToString::to_string) });
        match &p.body {
            L7Body::Unusable { why } => out["unusable"] = json!(why),
            L7Body::Rules { action, dry_run, rules } => {
                let (action, provider) = match action {
                    L7Action::Allow => ("ALLOW", None),
                    L7Action::Deny => ("DENY", None),
                    L7Action::Audit => ("AUDIT", None),
                    L7Action::Custom { provider } => ("CUSTOM", Some(provider)),
                };
                out["action"] = json!(action);
                out["provider"] = json!(provider);
                out["dryRun"] = json!(dry_run.then_some(true));
                out["rules"] = json!(rules.len());
            }
        }
        out
    };
    let mut out = json!({ "target": target.to_string(), "policies": all.iter().map(policy).collect::<Vec<_>>() });
    prune(&mut out);
    out
}

/// What TrafficPolicies say about a target.
pub(super) fn treatment(target: &PolicyTarget, t: &Treatment) -> Value {
    let limit = |l: &Arc<Limit>| {
        json!({
            "policy": l.counts.policy,
            "name": l.counts.name,
            "tokens": l.counts.rate.most(),
            "key": l.counts.key.iter().map(|k| format!("{k:?}")).collect::<Vec<_>>(),
            "point": format!("{:?}", l.point),
        })
    };
    let mut out = json!({
        "target": target.to_string(),
        "unusable": t.broken,
        "rateLimits": t.limits.iter().map(limit).collect::<Vec<_>>(),
        "maxRequestBytes": t.max_request_bytes,
        "cors": t.cors.is_some().then_some(true),
        "responseHeaders": t.response.iter().map(edits).collect::<Vec<_>>(),
        "cacheControl": t.cache.iter().map(|c| c.value.to_str().unwrap_or_default()).collect::<Vec<_>>(),
        "compression": t.compression.as_ref().map(|c| c.codings.iter().map(|c| c.as_str()).collect::<Vec<_>>()),
    });
    prune(&mut out);
    out
}

fn table(t: &RouteTable) -> Value {
    let mut out = json!({
        "origins": origins(&t.origins),
        "broken": t.broken,
        "http": t.http.iter().map(rule).collect::<Vec<_>>(),
        "tls": t.tls.iter()
            .map(|r| json!({ "sni": r.sni, "port": r.port, "to": tcp(&r.route) }))
            .collect::<Vec<_>>(),
        "tcp": t.tcp.iter()
            .map(|r| json!({
                "destinations": r.destinations.iter().map(ToString::to_string).collect::<Vec<_>>(),
                "port": r.port,
                "to": tcp(&r.route),
            }))
            .collect::<Vec<_>>(),
    });
    prune(&mut out);
    out
}

/// Removes what says nothing.
fn prune(value: &mut Value) {
    if let Value::Object(map) = value {
        map.retain(|_, v| {
            prune(v);
            let empty = v.is_null() || v.as_array().is_some_and(Vec::is_empty) || v.as_object().is_some_and(Map::is_empty);
            !empty
        });
    } else if let Value::Array(all) = value {
        all.iter_mut().for_each(prune);
    }
}

fn origins(all: &[Arc<Origin>]) -> Vec<String> {
    all.iter().map(ToString::to_string).collect()
}

fn rule(r: &HttpRule) -> Value {
    let route = &r.route;
    json!({
        "name": route.name,
        "origin": route.origin.as_ref().map(ToString::to_string),
        "dialect": match route.dialect { Dialect::Istio => "Istio", Dialect::GatewayApi => "GatewayAPI" },
        "match": http_match(&r.matches),
        "action": action(&route.action),
        "headers": both(&route.headers),
        "cors": route.cors.as_ref().map(|c| json!({
            "allowOrigins": c.origins.iter().map(text).collect::<Vec<_>>(),
            "allowMethods": c.methods,
            "allowHeaders": c.headers,
            "exposeHeaders": c.expose,
            "maxAgeSeconds": c.max_age,
            "allowCredentials": c.credentials,
            "forwardUnmatched": c.forward_unmatched,
        })),
        "fault": route.fault.as_ref().map(fault),
    })
}

fn http_match(m: &HttpMatch) -> Value {
    let pairs = |all: &[(http::HeaderName, StringMatch)]| {
        all.iter().map(|(name, m)| (name.as_str().to_owned(), text(m))).collect::<Map<_, _>>()
    };
    json!({
        "path": m.path.as_ref().map(|p| match p {
            PathMatch::Exact(x) => json!({ "exact": x }),
            PathMatch::TextPrefix(x) => json!({ "prefix": x }),
            PathMatch::SegmentPrefix(x) => json!({ "pathPrefix": x }),
            PathMatch::Regex(x) => json!({ "regex": x.source() }),
        }),
        "ignoreCase": m.ignore_case.then_some(true),
        "method": m.method.as_ref().map(text),
        "scheme": m.scheme.as_ref().map(text),
        "authority": m.authority.as_ref().map(text),
        "headers": pairs(&m.headers),
        "withoutHeaders": pairs(&m.without_headers),
        "query": m.query.iter().map(|(name, m)| (name.to_string(), text(m))).collect::<Map<_, _>>(),
        "claims": m.claims.iter().map(|(path, m)| (path.join("."), text(m))).collect::<Map<_, _>>(),
        "port": m.port,
        "grpc": m.grpc.as_ref().map(|g| {
            json!({ "service": g.service.as_ref().map(text), "method": g.method.as_ref().map(text) })
        }),
    })
}

fn text(m: &StringMatch) -> Value {
    match m {
        StringMatch::Exact(x) => json!({ "exact": x }),
        StringMatch::Prefix(x) => json!({ "prefix": x }),
        StringMatch::Suffix(x) => json!({ "suffix": x }),
        StringMatch::Regex(x) => json!({ "regex": x.source() }),
        StringMatch::Present => json!("present"),
    }
}

fn action(a: &HttpAction) -> Value {
    match a {
        HttpAction::Forward(f) => json!({ "forward": forward(f) }),
        HttpAction::Redirect(r) => json!({ "redirect": {
            "status": r.status,
            "scheme": r.scheme,
            "authority": r.authority,
            "port": format!("{:?}", r.port),
            "path": r.path.as_ref().map(path_rewrite),
        } }),
        HttpAction::Respond(r) => json!({ "respond": { "status": r.status, "bodyBytes": r.body.len() } }),
    }
}

fn forward(f: &Forward) -> Value {
    json!({
        "backends": f.backends.iter().map(|b| backend(b, f.total_weight)).collect::<Vec<_>>(),
        "rewrite": f.rewrite.as_ref().map(rewrite),
        "timeout": f.timeout.map(time),
        "session": f.session.as_deref().map(session),
        "retries": f.retry.as_deref().map_or(json!("mesh default"), retries),
        "mirrors": f.mirrors.iter()
            .map(|m| json!({ "to": target(&m.to), "percent": f64::from(m.fraction.per_million) / 10_000.0 }))
            .collect::<Vec<_>>(),
    })
}

fn backend(b: &Backend, total: u64) -> Value {
    json!({
        "to": target(&b.to),
        "weight": b.weight,
        "ofTotal": total,
        "headers": both(&b.headers),
        "rewrite": b.rewrite.as_ref().map(rewrite),
        "mirrors": b.mirrors.iter().map(|m| target(&m.to)).collect::<Vec<_>>(),
    })
}

fn target(to: &BackendRef) -> Value {
    match to {
        BackendRef::Service(key) => json!(key.to_string()),
        BackendRef::Invalid { status, why } => json!({ "invalid": why, "answeredWith": status }),
    }
}

fn rewrite(r: &Rewrite) -> Value {
    json!({ "path": r.path.as_ref().map(path_rewrite), "authority": r.authority })
}
fn path_rewrite(p: &PathRewrite) -> Value {
    match p {
        PathRewrite::Full(x) => json!({ "full": x }),
        PathRewrite::TextPrefix(x) => json!({ "prefix": x }),
        PathRewrite::SegmentPrefix(x) => json!({ "pathPrefix": x }),
        PathRewrite::Regex { pattern, replacement } => json!({ "regex": pattern.source(), "replacement": replacement }),
    }
}

const RETRY_WORDS: [(RetryOn, &str); 15] = [
    (RetryOn::FIVE_XX, "5xx"),
    (RetryOn::GATEWAY_ERROR, "gateway-error"),
    (RetryOn::CONNECT_FAILURE, "connect-failure"),
    (RetryOn::REFUSED_STREAM, "refused-stream"),
    (RetryOn::RESET, "reset"),
    (RetryOn::RESET_BEFORE_REQUEST, "reset-before-request"),
    (RetryOn::RETRIABLE_4XX, "retriable-4xx"),
    (RetryOn::STATUS_CODES, "retriable-status-codes"),
    (RetryOn::CANCELLED, "cancelled"),
    (RetryOn::DEADLINE_EXCEEDED, "deadline-exceeded"),
    (RetryOn::INTERNAL, "internal"),
    (RetryOn::RESOURCE_EXHAUSTED, "resource-exhausted"),
    (RetryOn::UNAVAILABLE, "unavailable"),
    (RetryOn::ENVOY_RATELIMITED, "envoy-ratelimited"),
    (RetryOn::HTTP3, "http3-post-connect-failure"),
];

fn retries(r: &RetryPolicy) -> Value {
    if r.attempts == 0 {
        return Value::Null;
    }
    let on: Vec<&str> = RETRY_WORDS.iter().filter(|(bit, _)| r.on.has(*bit)).map(|(_, word)| *word).collect();
    json!({
        "attempts": r.attempts,
        "retryOn": on.join(","),
        "statuses": r.statuses,
        "perTryTimeout": r.per_try.map(time),
        "backoff": time(r.base_backoff),
    })
}

fn fault(f: &Fault) -> Value {
    json!({
        "delay": f.delay.map(|(share, by)| json!({ "percent": f64::from(share.per_million) / 10_000.0, "by": time(by) })),
        "abort": f.abort.map(|(share, with)| {
            let with = match with {
                Abort::Http(status) => json!({ "httpStatus": status }),
                Abort::Grpc(status) => json!({ "grpcStatus": status }),
            };
            json!({ "percent": f64::from(share.per_million) / 10_000.0, "with": with })
        }),
    })
}

fn both(e: &BothEdits) -> Value {
    json!({ "request": edits(&e.request), "response": edits(&e.response) })
}
fn edits(e: &HeaderEdits) -> Value {
    let pairs = |all: &[(http::HeaderName, http::HeaderValue)]| {
        all.iter().map(|(n, v)| format!("{n}: {}", String::from_utf8_lossy(v.as_bytes()))).collect::<Vec<_>>()
    };
    json!({
        "remove": e.remove.iter().map(http::HeaderName::as_str).collect::<Vec<_>>(),
        "set": pairs(&e.set),
        "add": pairs(&e.add),
        "authority": e.authority,
    })
}

fn tcp(r: &TcpRoute) -> Value {
    json!({ "name": r.name, "backends": r.backends.iter().map(|b| backend(b, r.total_weight)).collect::<Vec<_>>() })
}

fn time(t: Duration) -> String {
    format!("{t:?}")
}

/// How a service is reached.
pub(super) fn destination(d: &Destination) -> Value {
    let ports = |all: &std::collections::BTreeMap<u16, Arc<TrafficPolicy>>| {
        all.iter().map(|(port, p)| (port.to_string(), policy(p))).collect::<Map<_, _>>()
    };
    let subsets: Map<String, Value> = d
        .subsets
        .iter()
        .map(|(name, s)| {
            let labels: Map<String, Value> = s.labels.iter().map(|(k, v)| (k.to_string(), json!(v))).collect();
            (name.to_string(), json!({ "labels": labels, "policy": policy(&s.policy), "ports": ports(&s.ports) }))
        })
        .collect();
    let mut out = json!({
        "service": d.key.to_string(),
        "origins": origins(&d.origins),
        "broken": d.broken,
        "policy": policy(&d.policy),
        "ports": ports(&d.ports),
        "subsets": subsets,
    });
    prune(&mut out);
    out
}

fn session(s: &Session) -> Value {
    let mut out = match &s.carrier {
        Carrier::Cookie { name, path, permanent } => json!({ "cookie": name, "path": path, "permanent": permanent }),
        Carrier::Header(name) => json!({ "header": name.as_str() }),
    };
    out["lifetime"] = json!(s.lifetime.map(time));
    out
}

fn policy(p: &TrafficPolicy) -> Value {
    let limit = |n: u32| (n != u32::MAX).then_some(n);
    let pool = &p.pool;
    json!({
        "loadBalancer": match &p.balance {
            Balance::LeastRequest => json!("LEAST_REQUEST"),
            Balance::RoundRobin => json!("ROUND_ROBIN"),
            Balance::Random => json!("RANDOM"),
            Balance::Passthrough => json!("PASSTHROUGH"),
            Balance::Hash { algorithm, key } => json!({ "algorithm": format!("{algorithm:?}"), "key": match key {
                HashKey::Header(name) => json!({ "header": name.as_str() }),
                HashKey::Cookie { name, path, ttl, attributes } => {
                    json!({ "cookie": name, "path": path, "ttl": ttl.map(time), "attributes": attributes })
                }
                HashKey::SourceIp => json!("sourceIp"),
                HashKey::Query(name) => json!({ "query": name }),
            } }),
        },
        "warmup": p.warmup.map(|w| time(w.duration)),
        "connectionPool": {
            "maxConnections": limit(pool.max_connections),
            "connectTimeout": time(pool.connect_timeout),
            "keepalive": pool.keepalive.map(|k| {
                json!({ "time": time(k.time), "interval": time(k.interval), "probes": k.probes })
            }),
            "maxConnectionDuration": pool.max_connection_duration.map(time),
            "tcpIdleTimeout": pool.tcp_idle_timeout.map(time),
            "http1MaxPendingRequests": limit(pool.max_pending),
            "http2MaxRequests": limit(pool.max_requests),
            "maxRequestsPerConnection": Some(pool.max_requests_per_connection).filter(|n| *n > 0),
            "maxRetries": limit(pool.max_retries),
            "httpIdleTimeout": pool.http_idle_timeout.map(time),
            "h2Upgrade": pool.h2_upgrade.then_some(true),
            "h2UpgradeOfHttp": pool.h2_upgrade_of_http.then_some(true),
            "useClientProtocol": pool.use_client_protocol.then_some(true),
        },
        "outlierDetection": p.outlier.as_ref().map(|o| json!({
            "consecutive5xxErrors": o.consecutive_5xx,
            "consecutiveGatewayErrors": o.consecutive_gateway,
            "consecutiveLocalOriginFailures": o.consecutive_local,
            "splitExternalLocalOriginErrors": o.split_external_local,
            "interval": time(o.interval),
            "baseEjectionTime": time(o.base_ejection),
            "maxEjectionTime": time(o.max_ejection),
            "maxEjectionPercent": o.max_ejection_percent,
            "minHealthPercent": o.min_health_percent,
            "httpErrorCodes": Some(&o.error_statuses).filter(|statuses| !statuses.is_empty()),
        })),
        "tls": p.tls.as_ref().map(|t| json!({
            "sni": t.sni,
            "subjectAltNames": t.sans,
            "insecureSkipVerify": t.skip_verify.then_some(true),
            "revocationLists": t.crl.is_some().then_some(true),
            "clientCertificate": t.client.is_some(),
            "alpn": t.alpn,
        })),
        "tunnel": p.tunnel.as_ref().map(|t| json!({ "protocol": if t.post { "POST" } else { "CONNECT" }, "target": t.target })),
        "proxyProtocol": p.proxy_protocol.map(|v| format!("{v:?}")),
        "session": p.session.as_deref().map(session),
        "retryBudget": p.retry_budget.map(|b| {
            json!({
                "percent": f64::from(b.percent_hundredths) / 100.0,
                "minRetryConcurrency": b.min_concurrency,
                "budgetInterval": b.interval.map(time),
            })
        }),
    })
}

/// A gateway with its listeners.
pub(super) fn gateway(g: &GatewayRoutes) -> Value {
    let listeners: Vec<Value> = g
        .listeners
        .iter()
        .map(|l| {
            json!({
                "name": l.name,
                "port": l.port,
                "protocol": match l.protocol {
                    ListenerProtocol::Http => "HTTP",
                    ListenerProtocol::Https => "HTTPS",
                    ListenerProtocol::Tls => "TLS",
                    ListenerProtocol::Tcp => "TCP",
                },
                "hostname": l.hostname,
                "tls": l.tls.as_ref().map(|t| match t {
                    ListenerTls::Passthrough => json!("Passthrough"),
                    // Never the keys.
                    ListenerTls::Terminate(pairs) => json!({ "terminate": pairs.len() }),
                    ListenerTls::Files { chain, .. } => json!({ "terminate": chain }),
                }),
                "clientCertificates": l.clients.as_ref().map(|c| if c.required { "required" } else { "optional" }),
                "broken": l.broken,
                "hosts": l.hosts.iter().map(|(host, t)| (host.to_string(), table(t))).collect::<Map<_, _>>(),
            })
        })
        .collect();
    let mut out =
        json!({ "name": g.key.to_string(), "origin": g.origin.as_ref().map(ToString::to_string), "listeners": listeners });
    prune(&mut out);
    out
}

#[cfg(test)]
mod tests;
