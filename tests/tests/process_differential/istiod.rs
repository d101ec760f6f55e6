//! Envoy configuration as istiod makes it for the chain of one service at a waypoint (waypoint §2.1): HTTP connection manager,
//! filters, inline routes, clusters. What a VirtualService or DestinationRule turns into is written by hand in each scenario;
//! here are the parts that do not depend on it.
use std::net::SocketAddr;
use std::path::Path;

use serde_json::{Value, json};

use crate::case::{Paths, Scenario, host};

const PORT: u16 = 80;

/// Merges objects deeply; anything else replaces.
pub fn merge(into: &mut Value, patch: Value) {
    match (into, patch) {
        (Value::Object(into), Value::Object(patch)) => {
            for (key, value) in patch {
                if value.is_null() {
                    into.remove(&key);
                } else {
                    merge(into.entry(key).or_insert(Value::Null), value);
                }
            }
        }
        (into, patch) => *into = patch,
    }
}

/// Name of the cluster of a service, or of a subset of it.
pub fn cluster_name(service: &str, version: &str) -> String {
    let subset = if version.is_empty() { String::new() } else { format!("/{version}") };
    format!("inbound-vip|{PORT}|http{subset}|{}", host(service))
}

/// The retry policy where nobody wrote one (waypoint §3.1).
pub fn default_retry() -> Value {
    json!({
        "retry_on": "connect-failure,refused-stream,unavailable,cancelled,retriable-status-codes",
        "num_retries": 2,
        "retry_host_predicate": [{
            "name": "envoy.retry_host_predicates.previous_hosts",
            "typed_config": {"@type": "type.googleapis.com/envoy.extensions.retry.host.previous_hosts.v3.PreviousHostsPredicate"},
        }],
        "host_selection_retry_max_attempts": 5,
    })
}

/// A retry policy as written: attempts and conditions, with the host predicate.
pub fn retry(attempts: u32, on: &str) -> Value {
    let mut policy = default_retry();
    merge(&mut policy, json!({"num_retries": attempts, "retry_on": on}));
    policy
}

/// A filter of HTTP.
pub fn filter(name: &str, kind: &str, mut config: Value) -> Value {
    config["@type"] = format!("type.googleapis.com/envoy.extensions.filters.http.{kind}").into();
    json!({"name": name, "typed_config": config})
}

/// One route.
#[derive(Clone, Debug)]
pub struct Route {
    json: Value,
    targets: Vec<(String, u32)>,
    patches: Vec<Value>,
    clusters: Value,
}

/// A route with this match.
pub fn on(matching: Value) -> Route {
    Route { json: json!({"match": matching}), targets: Vec::new(), patches: Vec::new(), clusters: json!({}) }
}

/// A route for a path prefix, as a VirtualService means it.
pub fn prefix(prefix: &str) -> Route {
    on(json!({"prefix": prefix}))
}

/// A route for everything.
pub fn all() -> Route {
    prefix("/")
}

impl Route {
    /// To a version (`""` for the whole service).
    pub fn to(mut self, version: &str) -> Self {
        self.targets = vec![(version.into(), 0)];
        self
    }
    /// To versions by weight.
    pub fn weighted(mut self, targets: &[(&str, u32)]) -> Self {
        self.targets = targets.iter().map(|&(version, weight)| (version.to_owned(), weight)).collect();
        self
    }
    /// Redirect.
    pub fn redirect(mut self, action: Value) -> Self {
        self.json["redirect"] = action;
        self
    }
    /// Direct response.
    pub fn respond(mut self, status: u16, body: &str) -> Self {
        self.json["direct_response"] = json!({"status": status});
        if !body.is_empty() {
            self.json["direct_response"]["body"] = json!({"inline_string": body});
        }
        self
    }
    /// Merged over the whole route.
    pub fn with(mut self, patch: Value) -> Self {
        self.patches.push(patch);
        self
    }
    /// Merged into every weighted cluster.
    pub fn each_cluster(mut self, patch: Value) -> Self {
        self.clusters = patch;
        self
    }
    /// Merged over the `route` action.
    pub fn action(self, patch: Value) -> Self {
        self.with(json!({"route": patch}))
    }
    /// Per-filter configuration.
    pub fn filter(self, name: &str, kind: &str, mut config: Value) -> Self {
        config["@type"] = format!("type.googleapis.com/envoy.extensions.filters.http.{kind}").into();
        self.with(json!({"typed_per_filter_config": {name: config}}))
    }
    /// Fault injection.
    pub fn fault(self, config: Value) -> Self {
        self.filter("envoy.filters.http.fault", "fault.v3.HTTPFault", config)
    }
    /// CORS.
    pub fn cors(self, config: Value) -> Self {
        self.filter("envoy.filters.http.cors", "cors.v3.CorsPolicy", config)
    }

    /// For the service it belongs to.
    pub fn into_json(self, service: &str) -> Value {
        let mut route = self.json;
        if !self.targets.is_empty() {
            let mut action = json!({"timeout": "0s", "max_grpc_timeout": "0s", "retry_policy": default_retry()});
            if let [(version, 0)] = self.targets.as_slice() {
                action["cluster"] = cluster_name(service, version).into();
            } else {
                let clusters: Vec<Value> = self
                    .targets
                    .iter()
                    .map(|(version, weight)| {
                        let mut cluster = json!({"name": cluster_name(service, version), "weight": weight});
                        merge(&mut cluster, self.clusters.clone());
                        cluster
                    })
                    .collect();
                action["weighted_clusters"] = json!({"clusters": clusters});
            }
            route["route"] = action;
        }
        for patch in self.patches {
            merge(&mut route, patch);
        }
        // A retry policy that was written off stays off: istiod sends none.
        if let Some(action) = route.get_mut("route")
            && let Some(timeout) = action.get("timeout").cloned()
        {
            action["max_grpc_timeout"] = timeout;
        }
        route
    }
}

/// A cluster of a service.
pub fn cluster(name: &str, endpoints: &[SocketAddr], http2: bool, patch: &Value) -> Value {
    let lb: Vec<Value> = endpoints
        .iter()
        .map(|at| json!({"endpoint": {"address": {"socket_address": {"address": at.ip().to_string(), "port_value": at.port()}}}}))
        .collect();
    let explicit = if http2 { json!({"http2_protocol_options": {}}) } else { json!({"http_protocol_options": {}}) };
    let most = 4_294_967_295_u32;
    let mut cluster = json!({
        "name": name,
        "type": "STATIC",
        "connect_timeout": "10s",
        "lb_policy": "LEAST_REQUEST",
        "load_assignment": {"cluster_name": name, "endpoints": [{"lb_endpoints": lb}]},
        "circuit_breakers": {"thresholds": [{
            "max_connections": most, "max_pending_requests": most, "max_requests": most, "max_retries": most,
            "track_remaining": true,
        }]},
        "common_lb_config": {},
        "typed_extension_protocol_options": {
            "envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {
                "@type": "type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions",
                "explicit_http_config": explicit,
            },
        },
    });
    merge(&mut cluster, patch.clone());
    cluster
}

/// The chain of a service as a listener of its own.
pub fn listener(scenario: &Scenario, at: SocketAddr, log: &Path) -> Value {
    let Scenario { name: service, routes, filters, last_filters, manager, .. } = scenario;
    let routes =
        if routes.is_empty() { vec![all().to("").with(json!({"name": "default"})).into_json(service)] } else { routes.clone() };
    let plain = |name: &str, kind: &str| filter(name, kind, json!({}));
    let name = cluster_name(service, "");
    let mut filters = filters.clone();
    filters.extend([
        plain("envoy.filters.http.grpc_stats", "grpc_stats.v3.FilterConfig"),
        plain("envoy.filters.http.fault", "fault.v3.HTTPFault"),
        plain("envoy.filters.http.cors", "cors.v3.Cors"),
    ]);
    filters.extend(last_filters.iter().cloned());
    filters.push(plain("envoy.filters.http.router", "router.v3.Router"));
    let mut listener = json!({
        "name": name,
        "address": {"socket_address": {"address": at.ip().to_string(), "port_value": at.port()}},
        "filter_chains": [{"filters": [{
            "name": "envoy.filters.network.http_connection_manager",
            "typed_config": {
                "@type": "type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
                "stat_prefix": name,
                "server_name": "istio-envoy",
                "use_remote_address": false,
                "generate_request_id": true,
                "normalize_path": true,
                "stream_idle_timeout": "0s",
                "proxy_100_continue": true,
                "upgrade_configs": [{"upgrade_type": "websocket"}],
                "access_log": access_logs(scenario, log),
                "http_filters": filters,
                "route_config": {
                    "name": name,
                    "validate_clusters": false,
                    "max_direct_response_body_size_bytes": 1_048_576,
                    "virtual_hosts": [{
                        "name": "inbound|http|80",
                        "domains": ["*"],
                        "include_request_attempt_count": true,
                        "routes": routes,
                    }],
                },
            },
        }]}],
    });
    let hcm = &mut listener["filter_chains"][0]["filters"][0]["typed_config"];
    merge(hcm, path_options(scenario.paths));
    merge(hcm, manager.clone());
    listener
}

/// What a mode of `pathNormalization` is to the connection manager.
fn path_options(paths: Paths) -> Value {
    match paths {
        Paths::None => json!({"normalize_path": false}),
        Paths::Base => json!({}),
        Paths::Merge => json!({"merge_slashes": true}),
        Paths::DecodeAndMerge => json!({"merge_slashes": true, "path_with_escaped_slashes_action": "UNESCAPE_AND_FORWARD"}),
    }
}

/// The line of every request, after those of the scenario: once it is there, they are.
fn access_logs(scenario: &Scenario, path: &Path) -> Value {
    let formatter = |name: &str, kind: &str| json!({"name": name, "typed_config": {"@type": format!("type.googleapis.com/envoy.extensions.formatter.{kind}")}});
    // istiod adds those that a format asks for.
    let formatters = json!([
        formatter("envoy.formatter.req_without_query", "req_without_query.v3.ReqWithoutQuery"),
        formatter("envoy.formatter.cel", "cel.v3.Cel"),
    ]);
    let logger = |mut format: Value, when: Option<&str>| {
        format["formatters"] = formatters.clone();
        let mut logger = json!({
            "name": "envoy.access_loggers.file",
            "typed_config": {
                "@type": "type.googleapis.com/envoy.extensions.access_loggers.file.v3.FileAccessLog",
                "path": path,
                "log_format": format,
            },
        });
        if let Some(expression) = when {
            logger["filter"] = json!({"extension_filter": {"name": "cel", "typed_config": {
                "@type": "type.googleapis.com/envoy.extensions.access_loggers.filters.cel.v3.ExpressionFilter",
                "expression": expression,
            }}});
        }
        logger
    };
    let mut all: Vec<Value> = Vec::new();
    for (n, (format, when)) in scenario.lines.iter().enumerate() {
        let format = match line_format(n, format) {
            Value::String(text) => json!({"text_format_source": {"inline_string": text + "\n"}}),
            object => json!({"json_format": object}),
        };
        all.push(logger(format, *when));
    }
    let mut usual = json!({
        "request_id": "%REQ(X-REQUEST-ID)%",
        "path": "%REQ(X-ENVOY-ORIGINAL-PATH?:PATH)%",
        "response_flags": "%RESPONSE_FLAGS%",
        "response_code_details": "%RESPONSE_CODE_DETAILS%",
    });
    if !scenario.tags.is_empty() {
        usual["tags"] = json!({
            "response_code": "%RESPONSE_CODE%", "response_flags": "%RESPONSE_FLAGS%",
            "grpc_response_status": "%GRPC_STATUS_NUMBER%",
        });
        for (name, expression) in &scenario.tags {
            usual["tags"][name] = format!("%CEL({expression})%").into();
        }
    }
    all.push(logger(json!({"json_format": usual}), None));
    all.into()
}

/// A line of the access log by which the suite finds it: text begins with `LINE`, the number of the format and the request's
/// id, an object has both.
pub fn line_format(number: usize, format: &Value) -> Value {
    match format {
        Value::String(text) => format!("LINE {number} %REQ(X-REQUEST-ID)% {text}").into(),
        object => {
            let mut object = object.clone();
            merge(&mut object, json!({"line": number.to_string(), "line_of": "%REQ(X-REQUEST-ID)%"}));
            object
        }
    }
}

/// Everything together.
pub fn bootstrap(listeners: Vec<Value>, clusters: Vec<Value>, admin: SocketAddr) -> Value {
    json!({
        "admin": {"address": {"socket_address": {"address": admin.ip().to_string(), "port_value": admin.port()}}},
        "static_resources": {"listeners": listeners, "clusters": clusters},
        "overload_manager": {"resource_monitors": [{
            "name": "envoy.resource_monitors.global_downstream_max_connections",
            "typed_config": {
                "@type": "type.googleapis.com/envoy.extensions.resource_monitors.downstream_connections.v3.DownstreamConnectionsConfig",
                "max_active_downstream_connections": 100_000,
            },
        }]},
    })
}
