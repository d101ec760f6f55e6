//! The messages against bytes put together by hand, so that a wrong number cannot hide behind our own encoder.
use super::envoy::config::core::v3::socket_address::PortSpecifier;
use super::envoy::config::core::v3::{self as node, HeaderValueOption, Locality as NodeLocality, Node, SocketAddress};
use super::envoy::service::auth::v3::attribute_context::{self, HttpRequest, Peer};
use super::envoy::service::auth::v3::{
    AttributeContext, CheckRequest, CheckResponse, DeniedHttpResponse, HttpStatus, OkHttpResponse, check_response,
};
use super::envoy::service::discovery::v3::{DeltaDiscoveryRequest, DeltaDiscoveryResponse, Resource};
use super::google::rpc::Status;
use super::istio::security::{self, Authorization, Group, Match, Rules, ServiceAccountMatch, StringMatch, string_match};
use super::istio::v1::auth::{IstioCertificateRequest, IstioCertificateResponse};
use super::istio::workload::zds::{self, workload_request, workload_response};
use super::istio::workload::{
    self, Address, AppProtocol, ApplicationTunnel, Extension, GatewayAddress, LoadBalancing, Locality, NamespacedHostname,
    NetworkAddress, Port, PortList, Service, TunnelProtocol, WeightedWaypoint, Workload, address, gateway_address,
};
use super::opentelemetry::proto::collector::trace::v1::{
    ExportTracePartialSuccess, ExportTraceServiceRequest, ExportTraceServiceResponse,
};
use super::opentelemetry::proto::common::v1::{AnyValue, InstrumentationScope, KeyValue, any_value};
use super::opentelemetry::proto::resource::v1::Resource as OtlpResource;
use super::opentelemetry::proto::trace::v1::{self as otlp, ResourceSpans, ScopeSpans, Span};
use super::well_known::{Any, Duration, Struct, Timestamp, Value, value};
use super::{ADDRESS_TYPE, Message};
use bytes::Bytes;
use std::collections::BTreeMap;
use std::fmt::Debug;

fn varint(mut n: u64) -> Vec<u8> {
    let mut out = Vec::new();
    while n >= 0x80 {
        out.push(n as u8 | 0x80);
        n >>= 7;
    }
    out.push(n as u8);
    out
}
/// A number field.
fn n(field: u64, value: u64) -> Vec<u8> {
    [varint(field << 3), varint(value)].concat()
}
/// A text, bytes, message or packed field.
fn b(field: u64, value: impl AsRef<[u8]>) -> Vec<u8> {
    let value = value.as_ref();
    [varint(field << 3 | 2), varint(value.len() as u64), value.to_vec()].concat()
}

/// The message is exactly these bytes, and these bytes exactly the message.
fn same<M: Message + Default + PartialEq + Debug>(message: M, wire: &[Vec<u8>]) {
    let wire = wire.concat();
    assert_eq!(M::decode(wire.as_slice()).expect("decodes"), message);
    assert_eq!(message.encode_to_vec(), wire);
}

fn any() -> (Any, Vec<u8>) {
    let any = Any { type_url: "t/x".into(), value: vec![8, 1] };
    (any, [b(1, "t/x"), b(2, [8, 1])].concat())
}
fn extension() -> (Extension, Vec<u8>) {
    let (config, wire) = any();
    (Extension { name: "e".into(), config: Some(config) }, [b(1, "e"), b(2, wire)].concat())
}
fn by_host() -> (GatewayAddress, Vec<u8>) {
    let hostname = NamespacedHostname { namespace: "ns".into(), hostname: "wp.ns.svc".into() };
    let gateway = GatewayAddress { destination: Some(gateway_address::Destination::Hostname(hostname)), hbone_mtls_port: 15008 };
    (gateway, [b(1, [b(1, "ns"), b(2, "wp.ns.svc")].concat()), n(3, 15008)].concat())
}
fn by_address() -> (GatewayAddress, Vec<u8>) {
    let address = NetworkAddress { network: "n1".into(), address: Bytes::from_static(&[1, 2, 3, 4]), length: None };
    let gateway = GatewayAddress { destination: Some(gateway_address::Destination::Address(address)), hbone_mtls_port: 15008 };
    (gateway, [b(2, [b(1, "n1"), b(2, [1, 2, 3, 4])].concat()), n(3, 15008)].concat())
}
fn string(value: &str) -> Value {
    Value { kind: Some(value::Kind::StringValue(value.into())) }
}

#[test]
fn bytes_written_out() {
    // ZdsHello{version: V1} and DelWorkload{uid: "u"} as a packet, without any helper.
    same(zds::ZdsHello { version: zds::Version::V1 as i32 }, &[vec![0x08, 0x01]]);
    let del = zds::WorkloadRequest { payload: Some(workload_request::Payload::Del(zds::DelWorkload { uid: "u".into() })) };
    same(del, &[vec![0x12, 0x03, 0x12, 0x01, b'u']]);
}

#[test]
fn every_field_of_a_workload() {
    let ((waypoint, waypoint_wire), (gateway, gateway_wire), (extension, extension_wire)) =
        (by_host(), by_address(), extension());
    let ports = PortList { ports: vec![Port { service_port: 80, target_port: 8080, app_protocol: AppProtocol::Grpc as i32 }] };
    let workload = Workload {
        name: "web-0".into(),
        namespace: "ns".into(),
        addresses: vec![Bytes::from_static(&[10, 0, 0, 1]), Bytes::from_static(&[0xfd; 16])],
        network: "n1".into(),
        tunnel_protocol: TunnelProtocol::Hbone as i32,
        trust_domain: "td".into(),
        service_account: "sa".into(),
        waypoint: Some(waypoint),
        node: "node".into(),
        canonical_name: "web".into(),
        canonical_revision: "v2".into(),
        workload_type: workload::WorkloadType::Pod as i32,
        workload_name: "web".into(),
        native_tunnel: true,
        authorization_policies: vec!["ns/a".into(), "ns/b".into()],
        status: workload::WorkloadStatus::Unhealthy as i32,
        cluster_id: "c1".into(),
        network_gateway: Some(gateway),
        uid: "c1//Pod/ns/web-0".into(),
        hostname: "h".into(),
        services: BTreeMap::from([("ns/web.ns.svc".into(), ports)]),
        application_tunnel: Some(ApplicationTunnel {
            protocol: workload::application_tunnel::Protocol::Proxy as i32,
            port: 15088,
        }),
        locality: Some(Locality { region: "r".into(), zone: "z".into(), subzone: "s".into() }),
        network_mode: workload::NetworkMode::HostNetwork as i32,
        extensions: vec![extension],
        capacity: Some(7),
    };
    let wire = [
        b(1, "web-0"),
        b(2, "ns"),
        b(3, [10, 0, 0, 1]),
        b(3, [0xfd; 16]),
        b(4, "n1"),
        n(5, 1),
        b(6, "td"),
        b(7, "sa"),
        b(8, waypoint_wire),
        b(9, "node"),
        b(10, "web"),
        b(11, "v2"),
        n(12, 2),
        b(13, "web"),
        n(14, 1),
        b(16, "ns/a"),
        b(16, "ns/b"),
        n(17, 1),
        b(18, "c1"),
        b(19, gateway_wire),
        b(20, "c1//Pod/ns/web-0"),
        b(21, "h"),
        b(22, [b(1, "ns/web.ns.svc"), b(2, b(1, [n(1, 80), n(2, 8080), n(3, 3)].concat()))].concat()),
        b(23, [n(1, 1), n(2, 15088)].concat()),
        b(24, [b(1, "r"), b(2, "z"), b(3, "s")].concat()),
        n(25, 1),
        b(26, extension_wire),
        b(27, n(1, 7)),
    ];
    same(workload.clone(), &wire);
    same(Address { r#type: Some(address::Type::Workload(workload)) }, &[b(1, wire.concat())]);
}

#[test]
fn every_field_of_a_service() {
    let ((waypoint, waypoint_wire), (extension, extension_wire)) = (by_host(), extension());
    let service = Service {
        name: "web".into(),
        namespace: "ns".into(),
        hostname: "web.ns.svc".into(),
        addresses: vec![NetworkAddress { network: "n1".into(), address: Bytes::from_static(&[10, 96, 0, 0]), length: Some(0) }],
        ports: vec![Port { service_port: 443, target_port: 0, app_protocol: AppProtocol::Tls as i32 }],
        subject_alt_names: vec!["spiffe://td/ns/x/sa/y".into()],
        waypoint: Some(waypoint.clone()),
        load_balancing: Some(LoadBalancing {
            routing_preference: vec![
                workload::load_balancing::Scope::Network as i32,
                workload::load_balancing::Scope::Region as i32,
            ],
            mode: workload::load_balancing::Mode::Failover as i32,
            health_policy: workload::load_balancing::HealthPolicy::AllowAll as i32,
        }),
        ip_families: workload::IpFamilies::Dual as i32,
        extensions: vec![extension],
        canonical: true,
        ingress_use_waypoint: true,
        weighted_waypoints: vec![WeightedWaypoint { destination: Some(waypoint), weight: 90 }],
        visibility: workload::service::Visibility::Namespace as i32,
    };
    let wire = [
        b(1, "web"),
        b(2, "ns"),
        b(3, "web.ns.svc"),
        // A length of zero is a range, no length is an address: presence is on the wire.
        b(4, [b(1, "n1"), b(2, [10, 96, 0, 0]), n(3, 0)].concat()),
        b(5, [n(1, 443), n(3, 5)].concat()),
        b(6, "spiffe://td/ns/x/sa/y"),
        b(7, &waypoint_wire),
        b(8, [b(1, [6, 1]), n(2, 2), n(3, 1)].concat()),
        n(9, 3),
        b(10, extension_wire),
        n(11, 1),
        n(12, 1),
        b(13, [b(1, waypoint_wire), n(2, 90)].concat()),
        n(14, 1),
    ];
    same(service.clone(), &wire);
    same(Address { r#type: Some(address::Type::Service(service)) }, &[b(2, wire.concat())]);
}

#[test]
fn every_field_of_an_authorization() {
    let matcher = |match_type| vec![StringMatch { match_type: Some(match_type) }];
    let account = |name: &str| vec![ServiceAccountMatch { namespace: "ns".into(), service_account: name.into() }];
    let range = |last: u8| vec![security::Address { address: Bytes::copy_from_slice(&[10, 0, 0, last]), length: 24 }];
    let range_wire = |last: u8| [b(1, [10, 0, 0, last]), n(2, 24)].concat();
    let (extension, extension_wire) = extension();
    let all = Match {
        namespaces: matcher(string_match::MatchType::Exact("a".into())),
        not_namespaces: matcher(string_match::MatchType::Prefix("b".into())),
        principals: matcher(string_match::MatchType::Suffix("c".into())),
        not_principals: matcher(string_match::MatchType::Presence(())),
        source_ips: range(5),
        not_source_ips: range(6),
        destination_ips: range(7),
        not_destination_ips: range(8),
        destination_ports: vec![80, 443],
        not_destination_ports: vec![8080],
        service_accounts: account("x"),
        not_service_accounts: account("y"),
        extensions: vec![extension.clone()],
    };
    let all_wire = [
        b(1, b(1, "a")),
        b(2, b(2, "b")),
        b(3, b(3, "c")),
        b(4, b(4, "")),
        b(5, range_wire(5)),
        b(6, range_wire(6)),
        b(7, range_wire(7)),
        b(8, range_wire(8)),
        b(9, [varint(80), varint(443)].concat()),
        b(10, varint(8080)),
        b(11, [b(1, "ns"), b(2, "x")].concat()),
        b(12, [b(1, "ns"), b(2, "y")].concat()),
        b(13, &extension_wire),
    ];
    let policy = Authorization {
        name: "p".into(),
        namespace: "ns".into(),
        scope: security::Scope::WorkloadSelector as i32,
        action: security::Action::Deny as i32,
        groups: vec![Group { rules: vec![Rules { matches: vec![all] }] }],
        dry_run: true,
        extensions: vec![extension],
    };
    let groups = b(5, b(1, b(2, all_wire.concat())));
    same(policy, &[b(1, "p"), b(2, "ns"), n(3, 2), n(4, 1), groups, n(6, 1), b(7, extension_wire)]);
}

#[test]
fn the_certificate_api() {
    let identity = "spiffe://td/ns/x/sa/y";
    let request = IstioCertificateRequest {
        csr: "PEM".into(),
        validity_duration: 86_400,
        metadata: Some(Struct { fields: BTreeMap::from([("ImpersonatedIdentity".into(), string(identity))]) }),
    };
    let metadata = b(1, [b(1, "ImpersonatedIdentity"), b(2, b(3, identity))].concat());
    same(request, &[b(1, "PEM"), n(3, 86_400), b(4, metadata)]);
    same(IstioCertificateResponse { cert_chain: vec!["leaf".into(), "root".into()] }, &[b(1, "leaf"), b(1, "root")]);
}

#[test]
fn enrolment() {
    let request = |payload| zds::WorkloadRequest { payload: Some(payload) };
    let info = zds::WorkloadInfo { name: "web-0".into(), namespace: "ns".into(), service_account: "sa".into() };
    let add = zds::AddWorkload { uid: "u".into(), workload_info: Some(info) };
    let add_wire = [b(1, "u"), b(2, [b(1, "web-0"), b(2, "ns"), b(3, "sa")].concat())].concat();
    same(request(workload_request::Payload::Add(add)), &[b(1, add_wire)]);
    same(request(workload_request::Payload::Del(zds::DelWorkload { uid: "u".into() })), &[b(2, b(2, "u"))]);
    same(request(workload_request::Payload::SnapshotSent(zds::SnapshotSent {})), &[b(3, "")]);
    same(request(workload_request::Payload::Keep(zds::KeepWorkload { uid: "u".into() })), &[b(5, b(1, "u"))]);
    let ack =
        |error: &str| zds::WorkloadResponse { payload: Some(workload_response::Payload::Ack(zds::Ack { error: error.into() })) };
    same(ack(""), &[b(1, "")]);
    same(ack("no"), &[b(1, b(1, "no"))]);
}

#[test]
fn spans() {
    let tag = |value| KeyValue { key: "k".into(), value: Some(AnyValue { value: Some(value) }) };
    let tag_wire = |value: Vec<u8>| [b(1, "k"), b(2, value)].concat();
    let span = Span {
        trace_id: Bytes::from_static(&[1; 16]),
        span_id: Bytes::from_static(&[2; 8]),
        trace_state: "a=1".into(),
        parent_span_id: Bytes::from_static(&[3; 8]),
        name: "n".into(),
        kind: otlp::span::SpanKind::Client as i32,
        start_time_unix_nano: 1,
        end_time_unix_nano: 2,
        attributes: vec![tag(any_value::Value::StringValue("v".into()))],
        status: Some(otlp::Status { message: "m".into(), code: otlp::status::StatusCode::Error as i32 }),
        flags: 1,
    };
    // Fixed width: 64 bits are wire type 1, 32 bits type 5.
    let fixed64 = |field: u64, value: u64| [varint(field << 3 | 1), value.to_le_bytes().to_vec()].concat();
    let span_wire = [
        b(1, [1; 16]),
        b(2, [2; 8]),
        b(3, "a=1"),
        b(4, [3; 8]),
        b(5, "n"),
        n(6, 3),
        fixed64(7, 1),
        fixed64(8, 2),
        b(9, tag_wire(b(1, "v"))),
        b(15, [b(2, "m"), n(3, 2)].concat()),
        [varint(16 << 3 | 5), 1u32.to_le_bytes().to_vec()].concat(),
    ];
    let scope = InstrumentationScope { name: "s".into(), version: "1".into() };
    let resource = OtlpResource { attributes: vec![tag(any_value::Value::IntValue(5))] };
    let of_scope = ScopeSpans { scope: Some(scope), spans: vec![span] };
    let request = ExportTraceServiceRequest {
        resource_spans: vec![ResourceSpans { resource: Some(resource), scope_spans: vec![of_scope] }],
    };
    let scope_wire = b(2, [b(1, [b(1, "s"), b(2, "1")].concat()), b(2, span_wire.concat())].concat());
    same(request, &[b(1, [b(1, b(1, tag_wire(n(3, 5)))), scope_wire].concat())]);
    let partial = ExportTracePartialSuccess { rejected_spans: 2, error_message: "e".into() };
    same(ExportTraceServiceResponse { partial_success: Some(partial) }, &[b(1, [n(1, 2), b(2, "e")].concat())]);
}

#[test]
fn delta_discovery() {
    let node = Node {
        id: "ztunnel~1.1.1.1~p.ns~ns.svc".into(),
        cluster: "c".into(),
        metadata: Some(Struct { fields: BTreeMap::from([("NODE_NAME".into(), string("n"))]) }),
        locality: Some(NodeLocality { region: "r".into(), zone: "z".into(), sub_zone: "s".into() }),
        user_agent_name: "culvert".into(),
        user_agent_version_type: None,
    };
    let node_wire = [
        b(1, "ztunnel~1.1.1.1~p.ns~ns.svc"),
        b(2, "c"),
        b(3, b(1, [b(1, "NODE_NAME"), b(2, b(3, "n"))].concat())),
        b(4, [b(1, "r"), b(2, "z"), b(3, "s")].concat()),
        b(6, "culvert"),
    ];
    let request = DeltaDiscoveryRequest {
        node: Some(node),
        type_url: ADDRESS_TYPE.into(),
        resource_names_subscribe: vec!["*".into()],
        resource_names_unsubscribe: vec!["gone".into()],
        initial_resource_versions: BTreeMap::from([("a".into(), "1".into()), ("b".into(), "2".into())]),
        response_nonce: "n1".into(),
        error_detail: Some(Status { code: 3, message: "bad".into(), details: vec![any().0] }),
    };
    same(
        request,
        &[
            b(1, node_wire.concat()),
            b(2, "type.googleapis.com/istio.workload.Address"),
            b(3, "*"),
            b(4, "gone"),
            b(5, [b(1, "a"), b(2, "1")].concat()),
            b(5, [b(1, "b"), b(2, "2")].concat()),
            b(6, "n1"),
            b(7, [n(1, 3), b(2, "bad"), b(3, any().1)].concat()),
        ],
    );
    let resource = Resource {
        version: "7".into(),
        resource: Some(any().0),
        name: "ns/web".into(),
        aliases: vec!["n1/10.96.0.1".into()],
        ttl: Some(Duration { seconds: 3, nanos: 0 }),
        cache_control: None,
    };
    let resource_wire = [b(1, "7"), b(2, any().1), b(3, "ns/web"), b(4, "n1/10.96.0.1"), b(6, n(1, 3))];
    let response = DeltaDiscoveryResponse {
        system_version_info: "v".into(),
        resources: vec![resource],
        type_url: ADDRESS_TYPE.into(),
        nonce: "n2".into(),
        removed_resources: vec!["old".into()],
        control_plane: None,
    };
    same(response, &[b(1, "v"), b(2, resource_wire.concat()), b(4, ADDRESS_TYPE), b(5, "n2"), b(6, "old")]);
}

#[test]
fn external_authorization() {
    let port = Some(PortSpecifier::PortValue(80));
    let address = SocketAddress { address: "1.2.3.4".into(), port_specifier: port };
    let address = node::Address { address: Some(node::address::Address::SocketAddress(address)) };
    let peer = Peer { address: Some(address), principal: "spiffe://td/x".into() };
    let peer_wire = [b(1, b(1, [b(2, "1.2.3.4"), n(3, 80)].concat())), b(4, "spiffe://td/x")].concat();
    let http = HttpRequest {
        id: "i".into(),
        method: "GET".into(),
        headers: BTreeMap::from([("a".into(), "1".into())]),
        path: "/p?q".into(),
        host: "h".into(),
        scheme: "http".into(),
        size: 7,
        protocol: "HTTP/2".into(),
        body: "b".into(),
        raw_body: Bytes::from_static(b"r"),
    };
    let http_wire = [
        b(1, "i"),
        b(2, "GET"),
        b(3, [b(1, "a"), b(2, "1")].concat()),
        b(4, "/p?q"),
        b(5, "h"),
        b(6, "http"),
        n(9, 7),
        b(10, "HTTP/2"),
        b(11, "b"),
        b(12, "r"),
    ];
    let request = attribute_context::Request { time: Some(Timestamp { seconds: 5, nanos: 0 }), http: Some(http) };
    let request_wire = [b(1, n(1, 5)), b(2, http_wire.concat())].concat();
    let attributes = AttributeContext { source: Some(peer.clone()), destination: Some(peer), request: Some(request) };
    let wire = [b(1, peer_wire.clone()), b(2, peer_wire), b(4, request_wire)].concat();
    same(CheckRequest { attributes: Some(attributes) }, &[b(1, wire)]);

    let option = |append| HeaderValueOption {
        header: Some(node::HeaderValue { key: "k".into(), value: "v".into(), raw_value: Bytes::from_static(b"r") }),
        append,
        append_action: 2,
    };
    let header_wire = b(1, [b(1, "k"), b(2, "v"), b(3, "r")].concat());
    let option_wire = [header_wire.clone(), n(3, 2)].concat();
    let appended_wire = [header_wire, b(2, n(1, 1)), n(3, 2)].concat();
    let ok = OkHttpResponse {
        headers: vec![option(None)],
        headers_to_remove: vec!["x".into()],
        response_headers_to_add: vec![option(Some(true))],
        query_parameters_to_set: vec![node::QueryParameter { key: "q".into(), value: "1".into() }],
        query_parameters_to_remove: vec!["p".into()],
    };
    let ok_wire =
        [b(2, option_wire.clone()), b(3, "x"), b(6, appended_wire), b(7, [b(1, "q"), b(2, "1")].concat()), b(8, "p")].concat();
    let status = |code| Some(Status { code, ..Status::default() });
    let agreed = CheckResponse { status: status(0), http_response: Some(check_response::HttpResponse::OkResponse(ok)) };
    same(agreed, &[b(1, ""), b(3, ok_wire)]);
    let denied = DeniedHttpResponse { status: Some(HttpStatus { code: 401 }), headers: vec![option(None)], body: "no".into() };
    let denied_wire = [b(1, n(1, 401)), b(2, option_wire), b(3, "no")].concat();
    let refused = CheckResponse { status: status(7), http_response: Some(check_response::HttpResponse::DeniedResponse(denied)) };
    same(refused, &[b(1, n(1, 7)), b(2, denied_wire)]);
}

#[test]
fn what_we_do_not_know_is_passed_over_and_what_is_broken_refused() {
    // A field of a later Istio.
    let newer = [b(1, "p"), n(99, 5), b(98, "later")].concat();
    assert_eq!(Authorization::decode(newer.as_slice()).expect("decodes").name, "p");
    // An enum value of a later Istio stays what it is, so that the reader can refuse it.
    let scope = Authorization::decode(n(3, 9).as_slice()).expect("decodes").scope;
    assert_eq!((scope, security::Scope::try_from(scope).is_err()), (9, true));
    for broken in [&[0x0a, 0x05, b'x'][..], &[0x0a, 0x01, 0xff], &[0x0b], &[0xff; 11]] {
        assert!(Authorization::decode(broken).is_err(), "{broken:?}");
    }
}
