//! How a destination is reached: DestinationRule (spec/waypoint §3.3) and BackendTLSPolicy, merged and resolved per port
//! and subset when translated.
use crate::gateway::ServiceKey;
use crate::l7::session::Session;
use crate::labels::Labels;
use crate::origin::Origin;
use crate::service::AppProtocol;
use http::header::HeaderName;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

/// Everything said about reaching one service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Destination {
    /// Service.
    pub key: ServiceKey,
    /// For ports and subsets that say nothing of their own.
    pub policy: Arc<TrafficPolicy>,
    /// By port.
    pub ports: BTreeMap<u16, Arc<TrafficPolicy>>,
    /// By name.
    pub subsets: BTreeMap<Arc<str>, Subset>,
    /// The objects it was made from.
    pub origins: Vec<Arc<Origin>>,
    /// Set when an object for this host could not be understood: traffic to it is refused (503) with this text.
    pub broken: Option<Arc<str>>,
}
/// A named part of a service's endpoints.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Subset {
    /// Labels its endpoints have.
    pub labels: Labels,
    /// For ports that say nothing of their own.
    pub policy: Arc<TrafficPolicy>,
    /// By port.
    pub ports: BTreeMap<u16, Arc<TrafficPolicy>>,
}
impl Destination {
    /// The policy for a port, in a subset or not. An unknown subset has none: it has no endpoints either.
    pub fn policy(&self, subset: Option<&str>, port: u16) -> Option<&Arc<TrafficPolicy>> {
        match subset {
            None => Some(self.ports.get(&port).unwrap_or(&self.policy)),
            Some(name) => {
                let subset = self.subsets.get(name)?;
                Some(subset.ports.get(&port).unwrap_or(&subset.policy))
            }
        }
    }
}

/// How to balance, how much to open, when to eject, what to speak.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TrafficPolicy {
    /// Balancing.
    pub balance: Balance,
    /// Locality preferences.
    pub locality: LocalityPolicy,
    /// Slow start of new endpoints.
    pub warmup: Option<Warmup>,
    /// Pool limits.
    pub pool: PoolLimits,
    /// Ejection of misbehaving endpoints.
    pub outlier: Option<OutlierPolicy>,
    /// TLS towards the endpoint (inside the mesh's tunnel where there is one).
    pub tls: Option<Arc<UpstreamTls>>,
    /// PROXY protocol header in front of the connection.
    pub proxy_protocol: Option<ProxyVersion>,
    /// Retry budget.
    pub retry_budget: Option<RetryBudget>,
    /// The endpoints are proxies that carry connections of bytes on.
    pub tunnel: Option<ForwardTunnel>,
    /// Requests of a session stay with its endpoint, where the route says nothing of sessions.
    pub session: Option<Arc<Session>>,
}
impl TrafficPolicy {
    /// Whether connections made under `other` are as this policy wants them and may carry its requests. Where they are not they
    /// take no more, as those of a cluster that Envoy replaces: so a changed limit counts for all connections at once.
    pub fn has_connections_of(&self, other: &Self) -> bool {
        self.pool == other.pool && self.proxy_protocol == other.proxy_protocol && self.tls == other.tls
    }
    /// Retries that may be under way while so many requests count: by the budget where there is one, else `maxRetries`.
    pub fn most_retries(&self, requests: u32) -> u32 {
        self.retry_budget.as_ref().map_or(self.pool.max_retries, |budget| budget.allowed(requests))
    }
}
/// Balancing algorithm.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub enum Balance {
    /// Least requests of two drawn endpoints (Istio's default; also `LEAST_CONN`).
    #[default]
    LeastRequest,
    /// In turn, weighted.
    RoundRobin,
    /// Drawn, weighted.
    Random,
    /// The destination the client addressed.
    Passthrough,
    /// By a hash of the request.
    Hash {
        /// Which ring.
        algorithm: HashAlgorithm,
        /// What is hashed; the first that is there counts.
        key: HashKey,
    },
}
/// Consistent hashing table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HashAlgorithm {
    /// Ring with at least this many points (Istio's default 1024).
    Ring(u32),
    /// Maglev with this table size, a prime (Istio's default 65537).
    Maglev(u32),
}
/// What a consistent hash is taken of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum HashKey {
    /// A header.
    Header(HeaderName),
    /// A cookie, set by us when it is missing and `ttl` is given.
    Cookie {
        /// Name.
        name: Arc<str>,
        /// Path attribute.
        path: Option<Arc<str>>,
        /// Lifetime; zero: a session cookie. `None`: never made by us.
        ttl: Option<Duration>,
        /// More attributes of the cookie we make, each after `; `.
        attributes: Arc<str>,
    },
    /// The client's address.
    SourceIp,
    /// A query parameter.
    Query(Arc<str>),
}
/// Locality preferences of a DestinationRule (the Service's own are in [`crate::service::LoadBalancing`]).
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct LocalityPolicy {
    /// `enabled: false`: all endpoints alike, whatever the mesh says.
    pub disabled: bool,
    /// `distribute`: from our locality (may end in `*`) to shares per locality, which sum to 100.
    pub distribute: Vec<(Arc<str>, Shares)>,
    /// `failover`: from region, to region.
    pub failover: Vec<(Arc<str>, Arc<str>)>,
    /// `failoverPriority`: labels, or `label=value`, in order.
    pub priority: Vec<(Arc<str>, Option<Arc<str>>)>,
    /// MeshConfig's: the service's own word goes before it.
    pub mesh_wide: bool,
}
/// Localities (may end in `*`) and their percentages.
pub type Shares = Vec<(Arc<str>, u32)>;
/// Slow start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Warmup {
    /// Until the full share.
    pub duration: Duration,
    /// Share at the start, percent (10 by default).
    pub minimum_percent: u32,
    /// Curve × 1000 (1000: linear).
    pub aggression_milli: u32,
}
/// Limits of the connections and requests towards one destination, for the whole process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PoolLimits {
    /// Connections; `u32::MAX`: no limit.
    pub max_connections: u32,
    /// TCP connect limit (10 s).
    pub connect_timeout: Duration,
    /// Keepalive probes, idle time, interval; `None`: the kernel's.
    pub keepalive: Option<TcpKeepalive>,
    /// A connection is not used for longer than this.
    pub max_connection_duration: Option<Duration>,
    /// Idle limit of TCP connections through us; `None`: no limit (Envoy: one hour, which cuts long-lived connections).
    pub tcp_idle_timeout: Option<Duration>,
    /// Requests that may wait for a connection.
    pub max_pending: u32,
    /// Requests under way.
    pub max_requests: u32,
    /// Requests per connection; 0: no limit.
    pub max_requests_per_connection: u32,
    /// Retries under way.
    pub max_retries: u32,
    /// Idle limit of pooled HTTP connections (one hour).
    pub http_idle_timeout: Option<Duration>,
    /// `h2UpgradePolicy: UPGRADE`: HTTP/2 towards the endpoint whatever the client spoke.
    pub h2_upgrade: bool,
    /// The same of ports that are declared as HTTP (MeshConfig's `h2UpgradePolicy`).
    pub h2_upgrade_of_http: bool,
    /// `useClientProtocol`.
    pub use_client_protocol: bool,
    /// Streams per HTTP/2 connection.
    pub max_concurrent_streams: u32,
    /// PINGs on HTTP/2 connections; `None`: none.
    pub http2_keepalive: Option<Http2Keepalive>,
}
impl Default for PoolLimits {
    fn default() -> Self {
        Self {
            max_connections: u32::MAX,
            connect_timeout: Duration::from_secs(10),
            keepalive: None,
            max_connection_duration: None,
            tcp_idle_timeout: None,
            max_pending: u32::MAX,
            max_requests: u32::MAX,
            max_requests_per_connection: 0,
            max_retries: u32::MAX,
            http_idle_timeout: Some(Duration::from_hours(1)),
            h2_upgrade: false,
            h2_upgrade_of_http: false,
            use_client_protocol: false,
            max_concurrent_streams: (1 << 31) - 1,
            http2_keepalive: None,
        }
    }
}
impl PoolLimits {
    /// Whether HTTP/2 is spoken to the endpoint: as the client did, or asked for, or declared by the service's port.
    pub fn speaks_http2(&self, declared: AppProtocol, client_did: bool) -> bool {
        if self.use_client_protocol {
            return client_did;
        }
        if self.h2_upgrade {
            return true;
        }
        match declared {
            AppProtocol::Http2 | AppProtocol::Grpc => true,
            AppProtocol::Http11 => self.h2_upgrade_of_http,
            // Not declared: what the client chose was chosen for the endpoint (Istio's protocol detection).
            AppProtocol::Unknown | AppProtocol::Tls | AppProtocol::Tcp => client_did,
        }
    }
}
/// `http2KeepAlive`: PINGs on a connection to an endpoint, whether there are requests on it or not.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Http2Keepalive {
    /// Silence of the endpoint before one is sent.
    pub interval: Duration,
    /// How long its answer may take before the connection is given up.
    pub timeout: Duration,
}
/// TCP keepalive.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TcpKeepalive {
    /// Probes before giving up.
    pub probes: u32,
    /// Idle time before the first.
    pub time: Duration,
    /// Between probes.
    pub interval: Duration,
}
/// Outlier detection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OutlierPolicy {
    /// Answers of 5xx (and what counts as one) in a row that eject; 0: off.
    pub consecutive_5xx: u32,
    /// 502, 503, 504 in a row; 0: off.
    pub consecutive_gateway: u32,
    /// Failures of our own making (connect, reset, timeout) in a row, when `split_external_local`; 0: off.
    pub consecutive_local: u32,
    /// Failures of our own making are counted apart.
    pub split_external_local: bool,
    /// How often ejected hosts are looked at.
    pub interval: Duration,
    /// Times the number of ejections is how long one lasts.
    pub base_ejection: Duration,
    /// Longest ejection (Envoy: 300 s, or the base if that is longer).
    pub max_ejection: Duration,
    /// Share of the hosts that may be ejected at a time, percent; one always may.
    pub max_ejection_percent: u32,
    /// Below this share of healthy hosts (percent) ejection is ignored; 0: never.
    pub min_health_percent: u32,
    /// Statuses of HTTP that are errors, and no others; empty: those of 5xx.
    pub error_statuses: Vec<u16>,
}
impl Default for OutlierPolicy {
    fn default() -> Self {
        Self {
            consecutive_5xx: 5,
            consecutive_gateway: 0,
            consecutive_local: 5,
            split_external_local: false,
            interval: Duration::from_secs(10),
            base_ejection: Duration::from_secs(30),
            max_ejection: Duration::from_mins(5),
            max_ejection_percent: 10,
            min_health_percent: 0,
            error_statuses: Vec::new(),
        }
    }
}
/// TLS towards an endpoint.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct UpstreamTls {
    /// SNI and, unless `sans` says otherwise, the name to verify; `None`: the host of the request.
    pub sni: Option<Arc<str>>,
    /// Accepted names of the peer; empty: `sni`.
    pub sans: Vec<Arc<str>>,
    /// Whom to trust.
    pub roots: Roots,
    /// Certificates that were taken back. Where there are lists, each certificate of a chain must be on none of them, and each
    /// issuer must have one that is in date (Envoy: `crl`).
    pub crl: Option<RevocationLists>,
    /// Our certificate, for mutual TLS.
    pub client: Option<ClientCertificate>,
    /// `insecureSkipVerify`.
    pub skip_verify: bool,
    /// ALPN to offer; empty: by what is spoken.
    pub alpn: Vec<Arc<str>>,
}
/// Whom TLS trusts.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Roots {
    /// The system's.
    System,
    /// A PEM file.
    File(Arc<str>),
    /// PEM text (a ConfigMap's `ca.crt`, a Secret's).
    Pem(Arc<str>),
    /// The CA that is named is not there: nothing is trusted, and the text says why.
    Missing(Arc<str>),
}
/// Lists of certificates that were taken back.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum RevocationLists {
    /// A file: PEM, or the DER of one list.
    File(Arc<str>),
    /// PEM text, from a Secret.
    Pem(Arc<str>),
}
/// A client certificate.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum ClientCertificate {
    /// Paths of PEM files.
    Files {
        /// Certificate chain.
        chain: Arc<str>,
        /// Key.
        key: Arc<str>,
    },
    /// PEM text, from a Secret.
    Pem(KeyPair),
    /// What is named is not there.
    Missing(Arc<str>),
}
/// A certificate chain and its key as PEM text.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct KeyPair {
    /// Certificate chain.
    pub chain: Arc<str>,
    /// Private key.
    pub key: Arc<str>,
}
impl std::fmt::Debug for KeyPair {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // Never the key.
        f.debug_struct("KeyPair").field("chain_bytes", &self.chain.len()).finish_non_exhaustive()
    }
}
/// PROXY protocol version.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ProxyVersion {
    /// Text.
    V1,
    /// Binary.
    V2,
}
/// What a proxy is asked for, for each connection of bytes; requests go to it as to any endpoint (as in Istio).
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct ForwardTunnel {
    /// Host and port it is to connect to, as an authority.
    pub target: Arc<str>,
    /// By POST, not by CONNECT.
    pub post: bool,
}
/// Retries under way, at most this share of the requests under way, or of those that came lately where that is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RetryBudget {
    /// How long a request counts from its beginning at least; `None`: until it is over.
    pub interval: Option<Duration>,
    /// Percent × 100 (2000: 20 %).
    pub percent_hundredths: u32,
    /// Always allowed (3).
    pub min_concurrency: u32,
}
impl RetryBudget {
    /// Retries that may be under way while so many requests count.
    pub fn allowed(&self, requests: u32) -> u32 {
        let share = u64::from(requests) * u64::from(self.percent_hundredths) / 10_000;
        u32::try_from(share).unwrap_or(u32::MAX).max(self.min_concurrency)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A policy that can be told from others by its limit.
    fn policy(limit: u32) -> Arc<TrafficPolicy> {
        let pool = PoolLimits { max_connections: limit, ..PoolLimits::default() };
        Arc::new(TrafficPolicy { pool, ..TrafficPolicy::default() })
    }

    #[test]
    fn the_port_of_the_subset_then_the_subset_and_never_another_level() {
        let subset = |own: u32, ports: &[(u16, u32)]| Subset {
            labels: Labels::default(),
            policy: policy(own),
            ports: ports.iter().map(|(port, limit)| (*port, policy(*limit))).collect(),
        };
        let destination = Destination {
            key: ServiceKey { namespace: "a".into(), hostname: "api.a.svc.cluster.local".into() },
            policy: policy(1),
            ports: BTreeMap::from([(80, policy(2))]),
            subsets: BTreeMap::from([("v1".into(), subset(3, &[(80, 4)])), ("v2".into(), subset(5, &[]))]),
            origins: Vec::new(),
            broken: None,
        };
        for (name, port, want) in [
            (None, 80, Some(2)),
            (None, 81, Some(1)),
            (Some("v1"), 80, Some(4)),
            (Some("v1"), 81, Some(3)),
            // Joined when translated: the port of the whole service is not looked at again.
            (Some("v2"), 80, Some(5)),
            (Some("v2"), 81, Some(5)),
            (Some("v3"), 80, None),
            (Some(""), 80, None),
        ] {
            assert_eq!(destination.policy(name, port).map(|p| p.pool.max_connections), want, "{name:?} {port}");
        }
    }
    #[test]
    fn nothing_said_is_istios_default() {
        let policy = TrafficPolicy::default();
        assert_eq!(policy.balance, Balance::LeastRequest);
        assert!(policy.outlier.is_none() && policy.tls.is_none() && policy.warmup.is_none() && policy.retry_budget.is_none());
        let pool = policy.pool;
        let limits = [pool.max_connections, pool.max_pending, pool.max_requests, pool.max_retries];
        assert_eq!(limits, [u32::MAX; 4]);
        assert_eq!((pool.max_requests_per_connection, pool.max_concurrent_streams), (0, (1 << 31) - 1));
        assert_eq!((pool.connect_timeout.as_secs(), pool.http_idle_timeout.map(|t| t.as_secs())), (10, Some(3600)));
        // Not Envoy's hour: it cuts connections that live on.
        assert_eq!((pool.tcp_idle_timeout, pool.http2_keepalive), (None, None));
        let outlier = OutlierPolicy::default();
        let counts =
            [outlier.consecutive_5xx, outlier.consecutive_gateway, outlier.max_ejection_percent, outlier.min_health_percent];
        assert_eq!(counts, [5, 0, 10, 0]);
        assert_eq!([outlier.interval, outlier.base_ejection, outlier.max_ejection].map(|t| t.as_secs()), [10, 30, 300]);
    }
    #[test]
    fn what_connections_are_made_of_ends_them_when_it_changes() {
        let base = TrafficPolicy::default();
        let pool = |edit: fn(&mut PoolLimits)| {
            let mut policy = TrafficPolicy::default();
            edit(&mut policy.pool);
            policy
        };
        let second = Duration::from_secs(1);
        let keepalive = TcpKeepalive { probes: 1, time: second, interval: second };
        let tls = UpstreamTls {
            sni: None,
            sans: Vec::new(),
            roots: Roots::System,
            crl: None,
            client: None,
            skip_verify: false,
            alpn: Vec::new(),
        };
        for (policy, kept) in [
            (TrafficPolicy::default(), true),
            (TrafficPolicy { balance: Balance::Random, ..TrafficPolicy::default() }, true),
            (TrafficPolicy { outlier: Some(OutlierPolicy::default()), ..TrafficPolicy::default() }, true),
            (
                TrafficPolicy {
                    retry_budget: Some(RetryBudget { interval: None, percent_hundredths: 1, min_concurrency: 1 }),
                    ..TrafficPolicy::default()
                },
                true,
            ),
            (pool(|p| p.max_connections = 1), false),
            (pool(|p| p.max_requests_per_connection = 1), false),
            (pool(|p| p.max_concurrent_streams = 1), false),
            (pool(|p| p.http_idle_timeout = None), false),
            (pool(|p| p.max_connection_duration = Some(Duration::from_secs(1))), false),
            (TrafficPolicy { pool: PoolLimits { keepalive: Some(keepalive), ..PoolLimits::default() }, ..base.clone() }, false),
            (
                pool(|p| {
                    let second = Duration::from_secs(1);
                    p.http2_keepalive = Some(Http2Keepalive { interval: second, timeout: second });
                }),
                false,
            ),
            (TrafficPolicy { proxy_protocol: Some(ProxyVersion::V1), ..TrafficPolicy::default() }, false),
            (TrafficPolicy { tls: Some(Arc::new(tls)), ..TrafficPolicy::default() }, false),
        ] {
            assert_eq!(policy.has_connections_of(&base), kept, "{policy:?}");
            assert_eq!(base.has_connections_of(&policy), kept, "{policy:?}");
        }
    }
    #[test]
    fn retry_budgets() {
        let budget = |percent_hundredths, min_concurrency| RetryBudget { interval: None, percent_hundredths, min_concurrency };
        for (budget, requests, allowed) in [
            (budget(2000, 3), 0, 3),
            (budget(2000, 3), 15, 3),
            (budget(2000, 3), 19, 3),
            (budget(2000, 3), 20, 4),
            (budget(2000, 3), 1000, 200),
            (budget(0, 0), 1000, 0),
            (budget(0, 1), 1000, 1),
            (budget(1, 0), 9_999, 0),
            (budget(1, 0), 10_000, 1),
            (budget(10_000, 0), u32::MAX, u32::MAX),
            (budget(u32::MAX, 0), u32::MAX, u32::MAX),
        ] {
            assert_eq!(budget.allowed(requests), allowed, "{budget:?} {requests}");
        }
    }
    #[test]
    fn a_budget_takes_the_place_of_the_number() {
        for (most, budget, requests, allowed) in [
            (u32::MAX, None, 0, u32::MAX),
            (2, None, 1000, 2),
            (0, None, 1000, 0),
            (0, Some((2000, 3)), 1000, 200),
            (1000, Some((0, 0)), 1000, 0),
        ] {
            let policy = TrafficPolicy {
                pool: PoolLimits { max_retries: most, ..PoolLimits::default() },
                retry_budget: budget.map(|(percent_hundredths, min_concurrency)| RetryBudget {
                    interval: None,
                    percent_hundredths,
                    min_concurrency,
                }),
                ..TrafficPolicy::default()
            };
            assert_eq!(policy.most_retries(requests), allowed, "{most} {budget:?} {requests}");
        }
    }
    #[test]
    fn the_version_an_endpoint_is_spoken_to_in() {
        use AppProtocol::{Grpc, Http2, Http11, Tcp, Tls, Unknown};
        // By what is declared: when the client spoke HTTP/1, and when HTTP/2.
        for (client, upgrade, declared, of_one, of_two) in [
            (false, false, Http11, false, false),
            (false, false, Http2, true, true),
            (false, false, Grpc, true, true),
            (false, false, Unknown, false, true),
            (false, false, Tls, false, true),
            (false, false, Tcp, false, true),
            (false, true, Http11, true, true),
            (false, true, Unknown, true, true),
            (true, false, Http11, false, true),
            (true, false, Http2, false, true),
            // The client's own version is asked for more expressly.
            (true, true, Http11, false, true),
        ] {
            let pool = PoolLimits { use_client_protocol: client, h2_upgrade: upgrade, ..PoolLimits::default() };
            let got = [false, true].map(|client_did| pool.speaks_http2(declared, client_did));
            assert_eq!(got, [of_one, of_two], "{client} {upgrade} {declared:?}");
        }
        for (client, declared, of_one) in
            [(false, Http11, true), (false, Http2, true), (false, Unknown, false), (false, Tcp, false), (true, Http11, false)]
        {
            let pool = PoolLimits { use_client_protocol: client, h2_upgrade_of_http: true, ..PoolLimits::default() };
            assert_eq!(pool.speaks_http2(declared, false), of_one, "of the mesh: {client} {declared:?}");
        }
    }
    #[test]
    fn a_key_is_never_shown() {
        let pair = KeyPair { chain: "chain".into(), key: "secret".into() };
        let shown = format!("{pair:?} {:?}", ClientCertificate::Pem(pair.clone()));
        assert!(!shown.contains("secret") && shown.contains("chain_bytes: 5"), "{shown}");
    }
}
