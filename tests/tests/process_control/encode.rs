//! A mesh as istiod would tell it: the model's objects written as messages. The reverse of what the source does, so that the
//! same folder can be read directly and through a control plane.
use std::net::IpAddr;

use bytes::Bytes;
use ipnet::IpNet;
use mesh_model::gateway::{GatewayDestination, GatewayRef};
use mesh_model::policy::{Action, Match, Policy, PolicyBody, Scope, TextMatch};
use mesh_model::service::{AppProtocol, HealthPolicy, IpFamilies, LbMode, LbScope, Service, Visibility};
use mesh_model::snapshot::Snapshot;
use mesh_model::workload::{ApplicationTunnel, Health, NetworkMode, Protocol, Workload};
use mesh_proto::istio::security::{self, Authorization, Group, Rules, StringMatch, string_match::MatchType};
use mesh_proto::istio::workload::{
    self as wire, Address, GatewayAddress, NamespacedHostname, NetworkAddress, Port, PortList, WeightedWaypoint, address,
    application_tunnel, gateway_address, load_balancing, service,
};
use mesh_proto::{ADDRESS_TYPE, AUTHORIZATION_TYPE, Message};

/// Everything of a snapshot that istiod tells agents, by type and name.
pub(crate) fn resources(snapshot: &Snapshot) -> Vec<(&'static str, String, Vec<u8>)> {
    let address = |name: String, address| (ADDRESS_TYPE, name, Address { r#type: Some(address) }.encode_to_vec());
    let workloads = snapshot.workloads().map(|w| address(w.uid.to_string(), address::Type::Workload(workload(w))));
    let services = snapshot.services().map(|s| address(s.key.to_string(), address::Type::Service(service(s))));
    let policies = snapshot.policies().map(|p| (AUTHORIZATION_TYPE, p.key.to_string(), policy(p).encode_to_vec()));
    workloads.chain(services).chain(policies).collect()
}

fn octets(ip: IpAddr) -> Bytes {
    match ip {
        IpAddr::V4(ip) => Bytes::copy_from_slice(&ip.octets()),
        IpAddr::V6(ip) => Bytes::copy_from_slice(&ip.octets()),
    }
}

fn gateway(at: &GatewayRef) -> GatewayAddress {
    let destination = match &at.destination {
        GatewayDestination::Service(key) => gateway_address::Destination::Hostname(NamespacedHostname {
            namespace: key.namespace.to_string(),
            hostname: key.hostname.to_string(),
        }),
        GatewayDestination::Address(network, ip) => gateway_address::Destination::Address(NetworkAddress {
            network: network.as_str().into(),
            address: octets(*ip),
            length: None,
        }),
    };
    GatewayAddress { destination: Some(destination), hbone_mtls_port: at.hbone_port.into() }
}

pub(crate) fn workload(w: &Workload) -> wire::Workload {
    let port =
        |(service, target): &(u16, u16)| Port { service_port: (*service).into(), target_port: (*target).into(), app_protocol: 0 };
    wire::Workload {
        name: w.name.to_string(),
        namespace: w.namespace.to_string(),
        addresses: w.ips.iter().copied().map(octets).collect(),
        network: w.network.as_str().into(),
        tunnel_protocol: match w.protocol {
            Protocol::Tcp => wire::TunnelProtocol::None,
            Protocol::Hbone => wire::TunnelProtocol::Hbone,
        } as i32,
        // Elided where it is the default.
        trust_domain: Some(w.trust_domain.as_str()).filter(|td| *td != "cluster.local").unwrap_or_default().into(),
        service_account: w.service_account.to_string(),
        waypoint: w.waypoint.as_deref().map(gateway),
        node: w.node.to_string(),
        canonical_name: w.canonical_name.to_string(),
        canonical_revision: w.canonical_revision.to_string(),
        workload_type: match &*w.workload_type {
            "deployment" => wire::WorkloadType::Deployment,
            "cronjob" => wire::WorkloadType::Cronjob,
            "job" => wire::WorkloadType::Job,
            _ => wire::WorkloadType::Pod,
        } as i32,
        workload_name: w.workload_name.to_string(),
        native_tunnel: w.native_tunnel,
        authorization_policies: w.policies.iter().map(ToString::to_string).collect(),
        status: match w.health {
            Health::Healthy => wire::WorkloadStatus::Healthy,
            Health::Unhealthy => wire::WorkloadStatus::Unhealthy,
        } as i32,
        cluster_id: w.cluster.to_string(),
        network_gateway: w.network_gateway.as_deref().map(gateway),
        uid: w.uid.to_string(),
        hostname: w.hostname.as_deref().unwrap_or_default().into(),
        services: w
            .services
            .iter()
            .map(|(key, ports)| (key.to_string(), PortList { ports: ports.iter().map(port).collect() }))
            .collect(),
        application_tunnel: w.application_tunnel.map(|ApplicationTunnel::Proxy(port)| wire::ApplicationTunnel {
            protocol: application_tunnel::Protocol::Proxy as i32,
            port: port.unwrap_or(0).into(),
        }),
        locality: Some(wire::Locality {
            region: w.locality.region.to_string(),
            zone: w.locality.zone.to_string(),
            subzone: w.locality.subzone.to_string(),
        }),
        network_mode: match w.network_mode {
            NetworkMode::Standard => wire::NetworkMode::Standard,
            NetworkMode::HostNetwork => wire::NetworkMode::HostNetwork,
        } as i32,
        extensions: Vec::new(),
        capacity: Some(w.capacity),
    }
}

pub(crate) fn service(s: &Service) -> wire::Service {
    let vip = |network: &str, ip, length| NetworkAddress { network: network.into(), address: octets(ip), length };
    let vips = s.vips.iter().map(|at| vip(at.network.as_str(), at.ip, None));
    let ranges = s.cidr_vips.iter().map(|(network, net)| vip(network.as_str(), net.addr(), Some(net.prefix_len().into())));
    let scope = |scope: &LbScope| {
        (match scope {
            LbScope::Region => load_balancing::Scope::Region,
            LbScope::Zone => load_balancing::Scope::Zone,
            LbScope::Subzone => load_balancing::Scope::Subzone,
            LbScope::Node => load_balancing::Scope::Node,
            LbScope::Cluster => load_balancing::Scope::Cluster,
            LbScope::Network => load_balancing::Scope::Network,
        }) as i32
    };
    let (waypoint, weighted) = match s.waypoints.as_slice() {
        [only] if only.weight == 100 => (Some(gateway(&only.waypoint)), Vec::new()),
        several => (
            None,
            several.iter().map(|w| WeightedWaypoint { destination: Some(gateway(&w.waypoint)), weight: w.weight }).collect(),
        ),
    };
    wire::Service {
        name: s.name.to_string(),
        namespace: s.key.namespace.to_string(),
        hostname: s.key.hostname.to_string(),
        addresses: vips.chain(ranges).collect(),
        ports: s
            .ports
            .iter()
            .map(|p| Port {
                service_port: p.port.into(),
                target_port: p.target.into(),
                app_protocol: (match p.protocol {
                    AppProtocol::Unknown => wire::AppProtocol::Unknown,
                    AppProtocol::Http11 => wire::AppProtocol::Http11,
                    AppProtocol::Http2 => wire::AppProtocol::Http2,
                    AppProtocol::Grpc => wire::AppProtocol::Grpc,
                    AppProtocol::Tls => wire::AppProtocol::Tls,
                    AppProtocol::Tcp => wire::AppProtocol::Tcp,
                }) as i32,
            })
            .collect(),
        subject_alt_names: s.sans.iter().map(ToString::to_string).collect(),
        waypoint,
        load_balancing: Some(wire::LoadBalancing {
            routing_preference: s.lb.scopes.iter().map(scope).collect(),
            mode: (match s.lb.mode {
                LbMode::Any => load_balancing::Mode::UnspecifiedMode,
                LbMode::Strict => load_balancing::Mode::Strict,
                LbMode::Failover => load_balancing::Mode::Failover,
                LbMode::Passthrough => load_balancing::Mode::Passthrough,
            }) as i32,
            health_policy: (match s.lb.health {
                HealthPolicy::OnlyHealthy => load_balancing::HealthPolicy::OnlyHealthy,
                HealthPolicy::AllowAll => load_balancing::HealthPolicy::AllowAll,
            }) as i32,
        }),
        ip_families: (match s.ip_families {
            IpFamilies::Automatic => wire::IpFamilies::Automatic,
            IpFamilies::V4 => wire::IpFamilies::Ipv4Only,
            IpFamilies::V6 => wire::IpFamilies::Ipv6Only,
            IpFamilies::Dual => wire::IpFamilies::Dual,
        }) as i32,
        extensions: Vec::new(),
        canonical: s.canonical,
        ingress_use_waypoint: false,
        weighted_waypoints: weighted,
        visibility: (match s.visibility {
            Visibility::Public => service::Visibility::Public,
            Visibility::Namespace => service::Visibility::Namespace,
        }) as i32,
    }
}

pub(crate) fn policy(p: &Policy) -> Authorization {
    let (action, dry_run, rules) = match &p.body {
        PolicyBody::Rules { action, dry_run, rules } => (*action, *dry_run, rules.as_slice()),
        PolicyBody::Unusable { .. } => (Action::Deny, false, &[][..]),
    };
    let clause = |c: &mesh_model::policy::Clause| Rules { matches: c.matches.iter().map(one_match).collect() };
    Authorization {
        name: p.key.name.to_string(),
        namespace: p.key.namespace.to_string(),
        scope: (match p.scope {
            Scope::Global => security::Scope::Global,
            Scope::Namespace => security::Scope::Namespace,
            Scope::Selector => security::Scope::WorkloadSelector,
        }) as i32,
        action: (match action {
            Action::Allow => security::Action::Allow,
            Action::Deny => security::Action::Deny,
        }) as i32,
        groups: rules.iter().map(|rule| Group { rules: rule.clauses.iter().map(clause).collect() }).collect(),
        dry_run,
        extensions: Vec::new(),
    }
}

fn one_match(m: &Match) -> security::Match {
    let texts = |list: &[TextMatch]| {
        let one = |t: &TextMatch| match t {
            TextMatch::Exact(t) => MatchType::Exact(t.to_string()),
            TextMatch::Prefix(t) => MatchType::Prefix(t.to_string()),
            TextMatch::Suffix(t) => MatchType::Suffix(t.to_string()),
            TextMatch::Presence => MatchType::Presence(()),
        };
        list.iter().map(|t| StringMatch { match_type: Some(one(t)) }).collect()
    };
    let ranges = |list: &[IpNet]| {
        list.iter().map(|net| security::Address { address: octets(net.addr()), length: net.prefix_len().into() }).collect()
    };
    let accounts = |list: &[(std::sync::Arc<str>, std::sync::Arc<str>)]| {
        let one = |(namespace, name): &(std::sync::Arc<str>, std::sync::Arc<str>)| security::ServiceAccountMatch {
            namespace: namespace.to_string(),
            service_account: name.to_string(),
        };
        list.iter().map(one).collect()
    };
    let ports = |list: &[u16]| list.iter().copied().map(u32::from).collect();
    assert!(m.trust_domains.is_empty(), "istiod has no word for trust domains");
    security::Match {
        namespaces: texts(m.namespaces.any()),
        not_namespaces: texts(m.namespaces.none()),
        principals: texts(m.principals.any()),
        not_principals: texts(m.principals.none()),
        source_ips: ranges(m.source_ips.any()),
        not_source_ips: ranges(m.source_ips.none()),
        destination_ips: ranges(m.destination_ips.any()),
        not_destination_ips: ranges(m.destination_ips.none()),
        destination_ports: ports(m.destination_ports.any()),
        not_destination_ports: ports(m.destination_ports.none()),
        service_accounts: accounts(m.service_accounts.any()),
        not_service_accounts: accounts(m.service_accounts.none()),
        extensions: Vec::new(),
    }
}
