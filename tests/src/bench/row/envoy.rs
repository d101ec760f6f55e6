//! The row's mesh as Envoy has it: a listener and a cluster in plain, and in the HBONE shape the chain of Istio's waypoint
//! (`connect_terminate` → `main_internal` → `connect_originate`, spec/waypoint §2.1), static and with nothing but the router.
use std::path::PathBuf;

use serde_json::{Value, json};

use super::{Filters, ISSUER, PORT, SERVER, Size, endpoint, path};

/// Port of the admin server.
pub(super) const ADMIN: u16 = 15000;

fn typed(kind: &str, mut value: Value) -> Value {
    value["@type"] = format!("type.googleapis.com/envoy.{kind}").into();
    value
}
fn named(name: &str, kind: &str, value: Value) -> Value {
    json!({"name": name, "typed_config": typed(kind, value)})
}
fn socket(address: &str, port: u16) -> Value {
    json!({"socket_address": {"address": address, "port_value": port}})
}
fn internal(listener: &str) -> Value {
    json!({"envoy_internal_address": {"server_listener_name": listener}})
}

/// The bootstrap. `tls`: certificate, key and root, for the HBONE shape.
pub(super) fn config(tls: Option<&[PathBuf; 3]>, size: Size, filters: Option<&Filters>) -> Value {
    let http = manager("http", routes(size), &filters.map_or_else(|| json!({}), filtered));
    let (listeners, clusters) = match tls {
        None => {
            let to: Vec<Value> = (0..=size.endpoints)
                .map(|n| if n == 0 { socket(&SERVER.to_string(), PORT) } else { socket(&endpoint(n).to_string(), PORT) })
                .collect();
            (
                json!([{"name": "http", "address": socket("0.0.0.0", PORT), "filter_chains": [{"filters": [http]}]}]),
                json!([cluster("server", to, "http_protocol_options", &json!({}))]),
            )
        }
        Some(tls) => hbone(&http, tls),
    };
    json!({
        "admin": {"address": socket("127.0.0.1", ADMIN)},
        "bootstrap_extensions": [named("envoy.bootstrap.internal_listener", "extensions.bootstrap.internal_listener.v3.InternalListener", json!({}))],
        "static_resources": {"listeners": listeners, "clusters": clusters},
    })
}

fn router() -> Value {
    named("envoy.filters.http.router", "extensions.filters.http.router.v3.Router", json!({}))
}

/// What istiod makes of [`Filters::yaml`], and the text of Istio's JSON log as far as both have it.
fn filtered(filters: &Filters) -> Value {
    let payload = "payload";
    let claim = |path: &[&str], text: &str| {
        let path: Vec<Value> = path.iter().map(|key| json!({"key": key})).collect();
        let value = json!({"string_match": {"exact": text}});
        json!({"metadata": {"filter": "envoy.filters.http.jwt_authn", "path": path, "value": value}})
    };
    let header = |name: &str, matcher: Value| json!({"header": {"name": name, "string_match": matcher}});
    let tokens = json!({
        "providers": {"tokens": {
            "issuer": ISSUER,
            "audiences": ["bench"],
            "local_jwks": {"inline_string": filters.jwks},
            "forward": true,
            "payload_in_metadata": payload,
        }},
        "rules": [{"match": {"prefix": "/"}, "requires": {"requires_any": {"requirements": [
            {"provider_name": "tokens"}, {"allow_missing": {}},
        ]}}}],
    });
    let rule = |permission: Value, principal: Value| json!({"permissions": [permission], "principals": [principal]});
    let policies = json!({
        "rule[0]": rule(
            json!({"and_rules": {"rules": [
                header(":method", json!({"exact": "POST"})),
                {"url_path": {"path": {"prefix": "/admin/"}}},
            ]}}),
            json!({"any": true}),
        ),
        "rule[1]": rule(
            header(":method", json!({"exact": "GET"})),
            json!({"and_ids": {"ids": [
                claim(&[payload, "iss"], ISSUER), claim(&[payload, "sub"], "load"), claim(&[payload, "role"], "reader"),
            ]}}),
        ),
    });
    let fields = json!({
        "authority": "%REQ(:AUTHORITY)%", "bytes_received": "%BYTES_RECEIVED%", "bytes_sent": "%BYTES_SENT%",
        "downstream_local_address": "%DOWNSTREAM_LOCAL_ADDRESS%", "downstream_remote_address": "%DOWNSTREAM_REMOTE_ADDRESS%",
        "duration": "%DURATION%", "method": "%REQ(:METHOD)%", "path": "%REQ(X-ENVOY-ORIGINAL-PATH?:PATH)%",
        "protocol": "%PROTOCOL%", "request_id": "%REQ(X-REQUEST-ID)%", "response_code": "%RESPONSE_CODE%",
        "response_code_details": "%RESPONSE_CODE_DETAILS%", "response_flags": "%RESPONSE_FLAGS%", "route_name": "%ROUTE_NAME%",
        "start_time": "%START_TIME%", "upstream_cluster": "%UPSTREAM_CLUSTER%", "upstream_host": "%UPSTREAM_HOST%",
        "upstream_local_address": "%UPSTREAM_LOCAL_ADDRESS%", "user_agent": "%REQ(USER-AGENT)%",
        "x_forwarded_for": "%REQ(X-FORWARDED-FOR)%",
    });
    json!({
        "http_filters": [
            named("envoy.filters.http.jwt_authn", "extensions.filters.http.jwt_authn.v3.JwtAuthentication", tokens),
            named("envoy.filters.http.rbac", "extensions.filters.http.rbac.v3.RBAC", json!({"rules": {"policies": policies}})),
            router(),
        ],
        "access_log": [named(
            "envoy.access_loggers.file",
            "extensions.access_loggers.file.v3.FileAccessLog",
            json!({"path": "/dev/stdout", "log_format": {"json_format": fields}}),
        )],
    })
}

fn routes(size: Size) -> Value {
    let to = |prefix: Value| json!({"match": prefix, "route": {"cluster": "server", "timeout": "0s"}});
    let mut all: Vec<Value> = (0..size.routes).map(|n| to(json!({"path_separated_prefix": path(n)}))).collect();
    all.push(to(json!({"prefix": "/"})));
    all.into()
}

fn manager(name: &str, routes: Value, more: &Value) -> Value {
    let mut config = json!({
        "stat_prefix": name,
        "server_name": "istio-envoy",
        "normalize_path": true,
        "use_remote_address": name == "http",
        "stream_idle_timeout": "0s",
        "route_config": {"name": name, "virtual_hosts": [{"name": name, "domains": ["*"], "routes": routes}]},
        "http_filters": [router()],
    });
    for (key, value) in more.as_object().into_iter().flatten() {
        config[key] = value.clone();
    }
    named(
        "envoy.filters.network.http_connection_manager",
        "extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
        config,
    )
}

fn cluster(name: &str, to: Vec<Value>, protocol: &str, more: &Value) -> Value {
    let to: Vec<Value> = to.into_iter().map(|address| json!({"endpoint": {"address": address}})).collect();
    let most =
        json!({"max_connections": 100_000, "max_pending_requests": 100_000, "max_requests": 100_000, "max_retries": 100_000});
    let kind = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions";
    let mut cluster = json!({
        "name": name,
        "type": "STATIC",
        "lb_policy": "LEAST_REQUEST",
        "load_assignment": {"cluster_name": name, "endpoints": [{"lb_endpoints": to}]},
        "circuit_breakers": {"thresholds": [most]},
        "typed_extension_protocol_options": {kind: {
            "@type": format!("type.googleapis.com/{kind}"),
            "explicit_http_config": {protocol: {}},
        }},
    });
    for (key, value) in more.as_object().into_iter().flatten() {
        cluster[key] = value.clone();
    }
    cluster
}

fn hbone(http: &Value, tls: &[PathBuf; 3]) -> (Value, Value) {
    let [cert, key, root] = tls;
    let common = json!({
        "alpn_protocols": ["h2"],
        "tls_params": {"tls_minimum_protocol_version": "TLSv1_3", "tls_maximum_protocol_version": "TLSv1_3"},
        "tls_certificates": [{"certificate_chain": {"filename": cert}, "private_key": {"filename": key}}],
        "validation_context": {
            "trusted_ca": {"filename": root},
            "match_typed_subject_alt_names": [{"san_type": "URI", "matcher": {"prefix": "spiffe://cluster.local/"}}],
        },
    });
    let security = |name: &str, value: Value| {
        named("envoy.transport_sockets.tls", &format!("extensions.transport_sockets.tls.v3.{name}"), value)
    };
    let terminate = manager(
        "connect_terminate",
        json!([{
            "match": {"connect_matcher": {}},
            "route": {"cluster": "main_internal", "timeout": "0s", "upgrade_configs": [{"upgrade_type": "CONNECT", "connect_config": {}}]},
        }]),
        &json!({"http2_protocol_options": {"allow_connect": true}, "upgrade_configs": [{"upgrade_type": "CONNECT"}]}),
    );
    let originate = named(
        "envoy.filters.network.tcp_proxy",
        "extensions.filters.network.tcp_proxy.v3.TcpProxy",
        json!({
            "stat_prefix": "connect_originate",
            "cluster": "agent",
            "tunneling_config": {"hostname": format!("{SERVER}:{PORT}")},
        }),
    );
    let listeners = json!([
        {
            "name": "connect_terminate",
            "address": socket("0.0.0.0", 15008),
            "filter_chains": [{
                "filters": [terminate],
                "transport_socket": security("DownstreamTlsContext", json!({"common_tls_context": common, "require_client_certificate": true})),
            }],
        },
        {"name": "main_internal", "internal_listener": {}, "filter_chains": [{"filters": [http]}]},
        {"name": "connect_originate", "internal_listener": {}, "filter_chains": [{"filters": [originate]}]},
    ]);
    let raw = named("raw", "extensions.transport_sockets.raw_buffer.v3.RawBuffer", json!({}));
    let inner = json!({"transport_socket": named(
        "envoy.transport_sockets.internal_upstream",
        "extensions.transport_sockets.internal_upstream.v3.InternalUpstreamTransport",
        json!({"transport_socket": raw}),
    )});
    let clusters = json!([
        cluster("main_internal", vec![internal("main_internal")], "http_protocol_options", &inner),
        cluster("server", vec![internal("connect_originate")], "http_protocol_options", &inner),
        cluster(
            "agent",
            vec![socket(&SERVER.to_string(), 15008)],
            "http2_protocol_options",
            &json!({"transport_socket": security("UpstreamTlsContext", json!({"common_tls_context": common}))}),
        ),
    ]);
    (listeners, clusters)
}
