//! DestinationRule → how a service is reached (waypoint §3.3).
//!
//! Rules are looked for in the namespace of the service, then in the root namespace; there the one of exactly this host
//! counts, else the most specific wildcard. Several of one host and namespace are one: the oldest traffic policy, and the
//! subsets of all. A port's own settings replace the blocks they may speak of as a whole, also those they leave out.
//! What is not understood refuses the object; its host is then closed by a stand-in, unless it had been read before.
//! Upstream: [`super::object`]. Downstream: [`super::layer7`].

mod join;
mod mesh;
mod tls;

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use mesh_model::l7::destination::{
    Balance, ForwardTunnel, HashAlgorithm, HashKey, Http2Keepalive, LocalityPolicy, OutlierPolicy, PoolLimits, ProxyVersion,
    RetryBudget, TcpKeepalive, Warmup,
};
use mesh_model::labels::Labels;

pub(super) use join::{build, check, has_subset};
pub(super) use mesh::MeshTraffic;
use tls::TlsBlock;

use super::authorization::OBJECT_META;
use super::http_text::{self, resolve};
use super::istio::host_name;
use super::object::{ObjectId, Reader};
use super::read::{self, Bad, Read};
use crate::diagnostics::Severity;
use crate::yaml::Node;

/// A DestinationRule, compiled but for the Secrets it names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DestinationRule {
    /// Host it is for, resolved: exact, `*.suffix` or `*`.
    pub host: Arc<str>,
    /// Age.
    created: Arc<str>,
    /// Whom it is exported to.
    exports: Vec<Arc<str>>,
    /// It is for selected clients only, never for a waypoint.
    for_workloads: bool,
    policy: Option<Policy>,
    subsets: BTreeMap<Arc<str>, SubsetRule>,
    /// It could not be read: its host is closed with this text.
    pub broken: Option<Arc<str>>,
}
/// A `trafficPolicy`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Policy {
    blocks: Blocks,
    ports: BTreeMap<u16, Blocks>,
}
/// Its blocks; `None` where not written.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Blocks {
    balance: Option<Balancing>,
    pool: Option<Pool>,
    outlier: Option<OutlierPolicy>,
    tls: Option<TlsBlock>,
    proxy_protocol: Option<ProxyVersion>,
    retry_budget: Option<RetryBudget>,
    /// Alone of them never inherited by a subset.
    tunnel: Option<ForwardTunnel>,
}
/// A `loadBalancer`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Balancing {
    balance: Balance,
    locality: Option<LocalityPolicy>,
    warmup: Option<Warmup>,
}
/// A `connectionPool`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Pool {
    /// All but what MeshConfig may say where it does not.
    limits: PoolLimits,
    connect_timeout: Option<Duration>,
    keepalive: Option<Keepalive>,
    /// Not `DEFAULT`.
    h2_upgrade: Option<bool>,
}
/// A `tcpKeepalive`; `None` where not written, or zero.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Keepalive {
    probes: Option<u32>,
    time: Option<Duration>,
    interval: Option<Duration>,
}
#[derive(Clone, Debug, PartialEq, Eq)]
struct SubsetRule {
    labels: Labels,
    policy: Option<Policy>,
}

/// Reads a DestinationRule. One that cannot be read, but whose host can be told, comes as a stand-in with `broken` set.
pub(super) fn read<'p>(r: &mut Reader<'_>, node: &'p Node<'p>, id: &ObjectId) -> Read<'p, DestinationRule> {
    let mut bad = match content(r, node, &id.namespace) {
        Ok(rule) => return Ok(rule),
        Err(bad) => bad,
    };
    let host = node.get("spec").and_then(|s| s.get("host")).and_then(|h| resolve(r, h, &id.namespace, true).ok());
    let Some(host) = host else { return Err(bad) };
    let why = bad.why(node);
    bad.message.push_str("; until it is corrected, what it said before stays in force, or else traffic to its host is refused");
    r.report(node, &bad, Severity::Error);
    Ok(DestinationRule {
        host,
        created: r.pool.text(""),
        exports: Vec::new(),
        for_workloads: false,
        policy: None,
        subsets: BTreeMap::new(),
        broken: Some(format!("{id} cannot be used: {why}").into()),
    })
}

/// What is being read.
struct Dr<'a, 'b, 'p> {
    r: &'a mut Reader<'b>,
    root: &'p Node<'p>,
}

fn content<'p>(r: &mut Reader<'_>, node: &'p Node<'p>, namespace: &Arc<str>) -> Read<'p, DestinationRule> {
    read::only(node, &["apiVersion", "kind", "metadata", "spec", "status"])?;
    let meta = node.get("metadata").unwrap_or(node);
    read::only(meta, OBJECT_META)?;
    let Some(spec) = read::map(node, "spec")? else { return Err(Bad::missing(node, "spec", "a DestinationRule has a host")) };
    read::only(spec, &["host", "trafficPolicy", "subsets", "exportTo", "workloadSelector"])?;
    let Some(host) = spec.get("host") else { return Err(Bad::missing(spec, "host", "the host of a service")) };
    let mut rule = DestinationRule {
        host: resolve(r, host, namespace, true)?,
        created: r.pool.text(read::text_or_empty(meta, "creationTimestamp")?),
        exports: http_text::exports(r, spec, namespace)?,
        for_workloads: false,
        policy: None,
        subsets: BTreeMap::new(),
        broken: None,
    };
    let mut dr = Dr { r, root: node };
    if let Some(s) = read::map(spec, "workloadSelector")? {
        read::only(s, &["matchLabels"])?;
        let labels = read::labels(s, "matchLabels", dr.r.pool)?;
        rule.for_workloads = !labels.is_empty();
        if rule.for_workloads {
            dr.warn(
                s,
                "it is for the clients it selects, and a waypoint is none of them: not used",
                "remove the selector",
                "workload-selector",
            );
        }
    }
    rule.policy = read::map(spec, "trafficPolicy")?.map(|p| dr.policy(p)).transpose()?;
    for s in read::list(spec, "subsets")? {
        read::only(s, &["name", "labels", "trafficPolicy"])?;
        let name = match s.get("name") {
            None => return Err(Bad::missing(s, "name", "routes name subsets")),
            Some(n) => match read::scalar(n)? {
                "" => return Err(Bad::value(n, "a subset has a name", "")),
                t => dr.r.pool.text(t),
            },
        };
        if rule.subsets.contains_key(&name) {
            let at = s.get("name").unwrap_or(s);
            return Err(Bad::value(at, format!("the subset `{name}` is written twice"), "remove one of them"));
        }
        let labels = read::labels(s, "labels", dr.r.pool)?;
        let policy = read::map(s, "trafficPolicy")?.map(|p| dr.policy(p)).transpose()?;
        rule.subsets.insert(name, SubsetRule { labels, policy });
    }
    Ok(rule)
}

/// A duration of at least a millisecond.
fn at_least_1ms<'p>(n: &'p Node<'p>, key: &str) -> Read<'p, Option<Duration>> {
    let found = read::duration(n, key)?;
    if found.is_some_and(|d| d < Duration::from_millis(1)) {
        return Err(Bad::value(n.get(key).unwrap_or(n), "the duration is at least 1ms", "write for example `10s`"));
    }
    Ok(found)
}
/// A limit: a number; zero and what is not written mean `none`.
fn limit<'p>(n: &'p Node<'p>, key: &str, none: u32) -> Read<'p, u32> {
    Ok(read::number::<u32>(n, key)?.filter(|v| *v != 0).unwrap_or(none))
}
/// A share in whole percent.
fn percent<'p>(n: &'p Node<'p>, key: &str) -> Read<'p, Option<u32>> {
    let found = read::number::<u32>(n, key)?;
    if found.is_some_and(|p| p > 100) {
        return Err(Bad::value(n.get(key).unwrap_or(n), "a percentage is at most 100", "write a number from 0 to 100"));
    }
    Ok(found)
}

impl<'p> Dr<'_, '_, 'p> {
    fn warn(&mut self, at: &Node<'_>, message: &str, fix: &'static str, code: &'static str) {
        let bad = Bad { at, missing: None, message: message.into(), fix, code };
        self.r.report(self.root, &bad, Severity::Warning);
    }
    /// What is accepted and has no effect here.
    fn without_effect(&mut self, n: &Node<'_>, keys: &[&str]) {
        for at in keys.iter().filter_map(|k| n.get(k)) {
            self.warn(at, "this field has no effect", "remove it", "no-effect");
        }
    }

    fn policy(&mut self, n: &'p Node<'p>) -> Read<'p, Policy> {
        read::only(
            n,
            &[
                "loadBalancer",
                "connectionPool",
                "outlierDetection",
                "tls",
                "portLevelSettings",
                "tunnel",
                "proxyProtocol",
                "retryBudget",
            ],
        )?;
        if let (Some(t), Some(_)) = (n.get("tunnel"), n.get("proxyProtocol")) {
            return Err(Bad::value(t, "`tunnel` and `proxyProtocol` cannot both be written", "keep one of them"));
        }
        let mut blocks = self.blocks(n)?;
        blocks.proxy_protocol = match read::map(n, "proxyProtocol")? {
            None => None,
            Some(p) => {
                read::only(p, &["version"])?;
                Some(match p.get("version") {
                    None => ProxyVersion::V1,
                    Some(v) => match read::scalar(v)? {
                        "V1" => ProxyVersion::V1,
                        "V2" => ProxyVersion::V2,
                        t => {
                            return Err(Bad::value(v, format!("`{t}` is not a version of the PROXY protocol"), "write V1 or V2"));
                        }
                    },
                })
            }
        };
        blocks.retry_budget = read::map(n, "retryBudget")?.map(retry_budget).transpose()?;
        blocks.tunnel = read::map(n, "tunnel")?.map(tunnel).transpose()?;
        let mut ports = BTreeMap::new();
        for p in read::list(n, "portLevelSettings")? {
            read::only(p, &["port", "loadBalancer", "connectionPool", "outlierDetection", "tls"])?;
            let Some(port) = read::map(p, "port")? else { return Err(Bad::missing(p, "port", "the port they are for")) };
            read::only(port, &["number"])?;
            let number = read::port_at(port, "number")?;
            if ports.insert(number, self.blocks(p)?).is_some() {
                return Err(Bad::value(port, format!("port {number} is written twice"), "remove one of them"));
            }
        }
        Ok(Policy { blocks, ports })
    }
    /// The blocks a port has too.
    fn blocks(&mut self, n: &'p Node<'p>) -> Read<'p, Blocks> {
        Ok(Blocks {
            balance: read::map(n, "loadBalancer")?.map(|b| self.balancing(b)).transpose()?,
            pool: read::map(n, "connectionPool")?.map(Self::pool).transpose()?,
            outlier: read::map(n, "outlierDetection")?.map(|o| self.outlier(o)).transpose()?,
            tls: read::map(n, "tls")?.map(|t| self.tls(t)).transpose()?,
            proxy_protocol: None,
            retry_budget: None,
            tunnel: None,
        })
    }

    fn tls(&mut self, n: &'p Node<'p>) -> Read<'p, TlsBlock> {
        let block = tls::read(n)?;
        match &block {
            // No TLS of ours is there that they could speak of.
            TlsBlock::Off => self.without_effect(n, &["sni", "subjectAltNames", "insecureSkipVerify", "caCrl"]),
            // Nothing is verified.
            TlsBlock::Ready(tls) if tls.skip_verify => self.without_effect(n, &["caCrl"]),
            TlsBlock::Ready(_) | TlsBlock::Secret { .. } => {}
        }
        Ok(block)
    }

    fn balancing(&mut self, n: &'p Node<'p>) -> Read<'p, Balancing> {
        read::only(n, &["simple", "consistentHash", "localityLbSetting", "warmup", "warmupDurationSecs"])?;
        if let (Some(_), Some(hash)) = (n.get("simple"), n.get("consistentHash")) {
            return Err(Bad::value(hash, "`simple` and `consistentHash` cannot both be written", "keep one of them"));
        }
        let balance = match (n.get("simple"), read::map(n, "consistentHash")?) {
            (_, Some(hash)) => Self::hash(hash)?,
            (None, None) => Balance::LeastRequest,
            (Some(s), None) => match read::scalar(s)? {
                "UNSPECIFIED" | "LEAST_REQUEST" | "LEAST_CONN" => Balance::LeastRequest,
                "ROUND_ROBIN" => Balance::RoundRobin,
                "RANDOM" => Balance::Random,
                "PASSTHROUGH" => Balance::Passthrough,
                t => {
                    let fix = "write LEAST_REQUEST, ROUND_ROBIN, RANDOM or PASSTHROUGH";
                    return Err(Bad::value(s, format!("`{t}` is not a load balancer"), fix));
                }
            },
        };
        let locality = read::map(n, "localityLbSetting")?.map(|l| self.locality(l)).transpose()?;
        let warmup = match (read::map(n, "warmup")?, at_least_1ms(n, "warmupDurationSecs")?) {
            (Some(w), _) => Some(warmup(w)?),
            (None, Some(duration)) => Some(Warmup { duration, minimum_percent: 10, aggression_milli: 1000 }),
            (None, None) => None,
        };
        if warmup.is_some() && !matches!(balance, Balance::LeastRequest | Balance::RoundRobin) {
            self.warn(n, "warm-up only goes with LEAST_REQUEST and ROUND_ROBIN; it has no effect", "remove it", "no-effect");
        }
        Ok(Balancing { balance, locality, warmup })
    }
    fn hash(n: &'p Node<'p>) -> Read<'p, Balance> {
        read::only(
            n,
            &["httpHeaderName", "httpCookie", "useSourceIp", "httpQueryParameterName", "minimumRingSize", "ringHash", "maglev"],
        )?;
        let keys: Vec<&str> =
            ["httpHeaderName", "httpCookie", "httpQueryParameterName"].into_iter().filter(|k| n.get(k).is_some()).collect();
        let source = read::flag(n, "useSourceIp")?;
        if keys.len() + usize::from(source) != 1 {
            let fix = "write one of httpHeaderName, httpCookie, useSourceIp, httpQueryParameterName";
            return Err(Bad::value(n, "a consistent hash is of exactly one thing", fix));
        }
        let key = if let Some(h) = n.get("httpHeaderName") {
            HashKey::Header(http_text::name(h, read::scalar(h)?)?)
        } else if let Some(c) = read::map(n, "httpCookie")? {
            read::only(c, &["name", "path", "ttl", "attributes"])?;
            let name = match c.get("name") {
                None => return Err(Bad::missing(c, "name", "the cookie's name")),
                Some(at) => match read::scalar(at)? {
                    t if cookie_text(t) && !t.is_empty() && !t.contains('=') => t,
                    t => return Err(Bad::value(at, format!("`{t}` is not a cookie name"), "use letters, digits, `-` and `_`")),
                },
            };
            let path = read::text(c, "path")?.filter(|t| !t.is_empty());
            if path.is_some_and(|t| !cookie_text(t)) {
                return Err(Bad::value(c.get("path").unwrap_or(c), "not a path for a cookie", "write for example `/`"));
            }
            let ttl = read::duration(c, "ttl")?;
            HashKey::Cookie { name: name.into(), path: path.map(Arc::from), ttl, attributes: attributes(c)?.into() }
        } else if let Some(q) = n.get("httpQueryParameterName") {
            HashKey::Query(read::scalar(q)?.into())
        } else {
            HashKey::SourceIp
        };
        let old = read::number::<u32>(n, "minimumRingSize")?;
        let algorithm = match (read::map(n, "ringHash")?, read::map(n, "maglev")?) {
            (Some(_), Some(m)) => {
                return Err(Bad::value(m, "`ringHash` and `maglev` cannot both be written", "keep one of them"));
            }
            (None, Some(m)) => {
                read::only(m, &["tableSize"])?;
                let size = limit(m, "tableSize", 65_537)?;
                if size > MAX_MAGLEV || !prime(size) {
                    let message = format!("the size of a Maglev table is a prime up to {MAX_MAGLEV}");
                    return Err(Bad::value(m.get("tableSize").unwrap_or(m), message, "write for example 65537"));
                }
                HashAlgorithm::Maglev(size)
            }
            (ring, None) => {
                let at = ring.unwrap_or(n);
                if let Some(r) = ring {
                    read::only(r, &["minimumRingSize"])?;
                }
                let written = if ring.is_some() { read::number::<u32>(at, "minimumRingSize")? } else { old };
                let size = written.filter(|s| *s != 0).unwrap_or(1024);
                if size > MAX_RING {
                    let message = format!("a ring has at most {MAX_RING} points");
                    return Err(Bad::value(at.get("minimumRingSize").unwrap_or(at), message, "write a smaller number"));
                }
                HashAlgorithm::Ring(size)
            }
        };
        Ok(Balance::Hash { algorithm, key })
    }
    fn locality(&mut self, n: &'p Node<'p>) -> Read<'p, LocalityPolicy> {
        read::only(n, &["enabled", "distribute", "failover", "failoverPriority"])?;
        let mut out =
            LocalityPolicy { disabled: n.get("enabled").is_some() && !read::flag(n, "enabled")?, ..LocalityPolicy::default() };
        if let (Some(_), Some(f)) = (n.get("distribute"), n.get("failover").or(n.get("failoverPriority"))) {
            return Err(Bad::value(f, "`distribute` and failover cannot both be written", "keep one of them"));
        }
        for d in read::list(n, "distribute")? {
            read::only(d, &["from", "to"])?;
            let Some(from) = d.get("from") else { return Err(Bad::missing(d, "from", "a locality such as `region/zone/*`")) };
            let Some(to) = read::map(d, "to")? else { return Err(Bad::missing(d, "to", "localities and their percentages")) };
            let from = self.locality_name(from, read::scalar(from)?)?;
            let (mut shares, mut sum) = (Vec::new(), 0u32);
            for e in read::entries(to)? {
                let share = read::scalar(&e.node)?.parse::<u32>().ok().filter(|s| (1..=100).contains(s));
                let share = share.ok_or_else(|| Bad::value(&e.node, "a share is a number from 1 to 100", ""))?;
                sum += share;
                shares.push((self.locality_name(&e.node, &e.key)?, share));
            }
            if sum != 100 {
                return Err(Bad::value(to, format!("the shares sum to {sum}, not to 100"), "correct the shares"));
            }
            out.distribute.push((from, shares));
        }
        for f in read::list(n, "failover")? {
            read::only(f, &["from", "to"])?;
            let mut part = |key: &'static str| match f.get(key) {
                None => Err(Bad::missing(f, key, "a region")),
                Some(at) => match read::scalar(at)? {
                    t if t.is_empty() || t.contains(['/', '*']) => {
                        Err(Bad::value(at, format!("`{t}` is not a region"), "write the region alone"))
                    }
                    t => Ok(self.r.pool.text(t)),
                },
            };
            let (from, to) = (part("from")?, part("to")?);
            if from == to {
                return Err(Bad::value(f, "a region cannot fail over to itself", "name another region"));
            }
            out.failover.push((from, to));
        }
        for p in read::list(n, "failoverPriority")? {
            let text = read::scalar(p)?;
            let (label, value) = text.split_once('=').map_or((text, None), |(l, v)| (l, Some(v)));
            if label.is_empty() {
                return Err(Bad::value(p, "expected a label", "write `label` or `label=value`"));
            }
            out.priority.push((self.r.pool.text(label), value.map(|v| self.r.pool.text(v))));
        }
        Ok(out)
    }
    fn locality_name(&mut self, at: &'p Node<'p>, text: &str) -> Read<'p, Arc<str>> {
        let parts: Vec<&str> = text.split('/').collect();
        let star = parts.iter().position(|p| p.contains('*'));
        let ok = parts.len() <= 3
            && parts.iter().all(|p| !p.is_empty())
            && star.is_none_or(|i| i + 1 == parts.len() && parts.get(i) == Some(&"*"));
        if ok {
            Ok(self.r.pool.text(text))
        } else {
            Err(Bad::value(
                at,
                format!("`{text}` is not a locality"),
                "write `region`, `region/zone`, `region/zone/subzone` or `region/*`",
            ))
        }
    }

    fn pool(n: &'p Node<'p>) -> Read<'p, Pool> {
        read::only(n, &["tcp", "http"])?;
        let mut pool = Pool::default();
        let out = &mut pool.limits;
        if let Some(t) = read::map(n, "tcp")? {
            read::only(t, &["maxConnections", "connectTimeout", "tcpKeepalive", "maxConnectionDuration", "idleTimeout"])?;
            out.max_connections = limit(t, "maxConnections", u32::MAX)?;
            pool.connect_timeout = at_least_1ms(t, "connectTimeout")?;
            pool.keepalive = read::map(t, "tcpKeepalive")?.map(Keepalive::read).transpose()?;
            out.max_connection_duration = at_least_1ms(t, "maxConnectionDuration")?;
            if let Some(idle) = read::duration(t, "idleTimeout")? {
                out.tcp_idle_timeout = Some(idle).filter(|d| !d.is_zero());
                // Also of HTTP connections, unless those have their own.
                out.http_idle_timeout = out.tcp_idle_timeout;
            }
        }
        if let Some(h) = read::map(n, "http")? {
            read::only(
                h,
                &[
                    "http1MaxPendingRequests",
                    "http2MaxRequests",
                    "maxRequestsPerConnection",
                    "maxRetries",
                    "idleTimeout",
                    "h2UpgradePolicy",
                    "useClientProtocol",
                    "maxConcurrentStreams",
                    "http2KeepAlive",
                ],
            )?;
            if let Some(k) = read::map(h, "http2KeepAlive")? {
                read::only(k, &["interval", "timeout"])?;
                // Both are required, as Istio's validation has it.
                let need = |key: &'static str| -> Read<'p, Duration> {
                    at_least_1ms(k, key)?.ok_or_else(|| Bad::missing(k, key, "PINGs need an interval and a timeout"))
                };
                out.http2_keepalive = Some(Http2Keepalive { interval: need("interval")?, timeout: need("timeout")? });
            }
            out.max_pending = limit(h, "http1MaxPendingRequests", u32::MAX)?;
            out.max_requests = limit(h, "http2MaxRequests", u32::MAX)?;
            out.max_requests_per_connection = limit(h, "maxRequestsPerConnection", 0)?;
            out.max_retries = limit(h, "maxRetries", u32::MAX)?;
            if let Some(idle) = read::duration(h, "idleTimeout")? {
                out.http_idle_timeout = Some(idle).filter(|d| !d.is_zero());
            }
            pool.h2_upgrade = match h.get("h2UpgradePolicy") {
                None => None,
                Some(at) => match read::scalar(at)? {
                    "DEFAULT" => None,
                    "DO_NOT_UPGRADE" => Some(false),
                    "UPGRADE" => Some(true),
                    t => {
                        return Err(Bad::value(
                            at,
                            format!("`{t}` is not understood"),
                            "write DEFAULT, DO_NOT_UPGRADE or UPGRADE",
                        ));
                    }
                },
            };
            out.use_client_protocol = read::flag(h, "useClientProtocol")?;
            if let (Some(true), true, Some(at)) = (pool.h2_upgrade, out.use_client_protocol, h.get("useClientProtocol")) {
                return Err(Bad::value(at, "`useClientProtocol` cannot go with `h2UpgradePolicy: UPGRADE`", "keep one of them"));
            }
            out.max_concurrent_streams = limit(h, "maxConcurrentStreams", (1 << 31) - 1)?.min((1 << 31) - 1);
        }
        Ok(pool)
    }

    fn outlier(&mut self, n: &'p Node<'p>) -> Read<'p, OutlierPolicy> {
        read::only(
            n,
            &[
                "consecutive5xxErrors",
                "consecutiveGatewayErrors",
                "consecutiveErrors",
                "splitExternalLocalOriginErrors",
                "consecutiveLocalOriginFailures",
                "interval",
                "baseEjectionTime",
                "maxEjectionPercent",
                "minHealthPercent",
                "outlierDetectionHttpErrorCodes",
            ],
        )?;
        self.without_effect(n, &["consecutiveErrors"]);
        let mut out = OutlierPolicy::default();
        if let Some(v) = read::number(n, "consecutive5xxErrors")? {
            out.consecutive_5xx = v;
        }
        if let Some(v) = read::number(n, "consecutiveGatewayErrors")? {
            out.consecutive_gateway = v;
        }
        out.split_external_local = read::flag(n, "splitExternalLocalOriginErrors")?;
        if let Some(v) = read::number::<u32>(n, "consecutiveLocalOriginFailures")?.filter(|v| *v > 0) {
            out.consecutive_local = v;
        }
        if let Some(d) = at_least_1ms(n, "interval")? {
            out.interval = d;
        }
        if let Some(d) = at_least_1ms(n, "baseEjectionTime")? {
            out.base_ejection = d;
            out.max_ejection = out.max_ejection.max(d);
        }
        if let Some(p) = percent(n, "maxEjectionPercent")?.filter(|p| *p != 0) {
            out.max_ejection_percent = p;
        }
        out.min_health_percent = percent(n, "minHealthPercent")?.unwrap_or(0);
        for at in read::list(n, "outlierDetectionHttpErrorCodes")? {
            let text = read::scalar(at)?;
            let status = text.parse::<u16>().ok().filter(|status| (100..=599).contains(status));
            let bad = || Bad::value(at, format!("`{text}` is not a status of HTTP"), "write a number from 100 to 599");
            out.error_statuses.push(status.ok_or_else(bad)?);
        }
        Ok(out)
    }
}

impl Pool {
    /// The limits of a destination with this pool, or with none.
    fn limits(pool: Option<&Self>, mesh: &MeshTraffic) -> PoolLimits {
        let Some(pool) = pool.or(mesh.pool.as_deref()) else { return Self::default().joined(mesh) };
        pool.joined(mesh)
    }
    fn joined(&self, mesh: &MeshTraffic) -> PoolLimits {
        let connect_timeout = self.connect_timeout.or(mesh.connect_timeout).unwrap_or(self.limits.connect_timeout);
        let written = [self.keepalive, mesh.keepalive];
        PoolLimits {
            connect_timeout,
            keepalive: written.iter().any(Option::is_some).then(|| Keepalive::first(written.into_iter().flatten())),
            h2_upgrade: self.h2_upgrade == Some(true),
            h2_upgrade_of_http: self.h2_upgrade.is_none() && mesh.h2_upgrade,
            ..self.limits.clone()
        }
    }
}
impl Keepalive {
    fn read<'p>(n: &'p Node<'p>) -> Read<'p, Self> {
        read::only(n, &["probes", "time", "interval"])?;
        let seconds = |key: &str| -> Read<'p, Option<Duration>> {
            let found = read::duration(n, key)?.filter(|d| !d.is_zero());
            if found.is_some_and(|d| d < Duration::from_secs(1)) {
                return Err(Bad::value(n.get(key).unwrap_or(n), "the kernel counts in seconds", "write at least `1s`"));
            }
            Ok(found)
        };
        let probes = read::number::<u32>(n, "probes")?.filter(|v| *v != 0);
        Ok(Self { probes, time: seconds("time")?, interval: seconds("interval")? })
    }
    /// Each number of the first that says one; where nothing is said, Linux's own.
    fn first(written: impl Iterator<Item = Self> + Clone) -> TcpKeepalive {
        let seconds = |of: fn(Self) -> Option<Duration>, or| written.clone().find_map(of).unwrap_or(Duration::from_secs(or));
        TcpKeepalive {
            probes: written.clone().find_map(|k| k.probes).unwrap_or(9),
            time: seconds(|k| k.time, 7200),
            interval: seconds(|k| k.interval, 75),
        }
    }
}

/// Envoy's limits.
const MAX_RING: u32 = 8 << 20;
const MAX_MAGLEV: u32 = 5_000_011;
fn prime(n: u32) -> bool {
    n >= 2 && (2..=n.isqrt()).all(|d| !n.is_multiple_of(d))
}
/// Whether a text can stand in a `Set-Cookie` header.
pub(super) fn cookie_text(t: &str) -> bool {
    t.bytes().all(|b| b.is_ascii_graphic() && !matches!(b, b';' | b',' | b'"' | b'\\'))
}

/// More attributes of a cookie, as they stand in `Set-Cookie`.
fn attributes<'p>(cookie: &'p Node<'p>) -> Read<'p, String> {
    let mut out = String::new();
    for a in read::list(cookie, "attributes")? {
        read::only(a, &["name", "value"])?;
        let Some(at) = a.get("name") else { return Err(Bad::missing(a, "name", "an attribute has a name")) };
        let (name, value) = (read::scalar(at)?, read::text_or_empty(a, "value")?);
        if name.is_empty() || !cookie_text(name) || name.contains('=') {
            return Err(Bad::value(at, format!("`{name}` is not the name of an attribute"), "write for example `SameSite`"));
        }
        if !cookie_text(value) {
            return Err(Bad::value(a, format!("`{value}` is not the value of an attribute"), "write for example `Strict`"));
        }
        out.push_str("; ");
        out.push_str(name);
        if !value.is_empty() {
            out.push('=');
            out.push_str(value);
        }
    }
    Ok(out)
}

fn warmup<'p>(n: &'p Node<'p>) -> Read<'p, Warmup> {
    read::only(n, &["duration", "minimumPercent", "aggression"])?;
    let Some(duration) = at_least_1ms(n, "duration")? else { return Err(Bad::missing(n, "duration", "until when it is warm")) };
    let decimal = |key: &str, default: f64, least: f64, most: f64| -> Read<'p, f64> {
        let v = read::decimal(n, key)?.unwrap_or(default);
        if (least..=most).contains(&v) {
            Ok(v)
        } else {
            Err(Bad::value(n.get(key).unwrap_or(n), format!("`{v}` is not from {least} to {most}"), ""))
        }
    };
    Ok(Warmup {
        duration,
        // In range by the checks above.
        minimum_percent: decimal("minimumPercent", 10.0, 0.0, 100.0)?.round() as u32,
        aggression_milli: (decimal("aggression", 1.0, 1.0, 1000.0)? * 1000.0).round() as u32,
    })
}
/// What another proxy is asked for.
fn tunnel<'p>(n: &'p Node<'p>) -> Read<'p, ForwardTunnel> {
    read::only(n, &["protocol", "targetHost", "targetPort"])?;
    let post = match read::text_or_empty(n, "protocol")? {
        "" | "CONNECT" => false,
        "POST" => true,
        t => {
            let at = n.get("protocol").unwrap_or(n);
            return Err(Bad::value(at, format!("`{t}` is not a way to ask a proxy"), "write CONNECT or POST"));
        }
    };
    let Some(host) = n.get("targetHost") else {
        return Err(Bad::missing(n, "targetHost", "the proxy is asked for a host"));
    };
    let port = read::port_at(n, "targetPort")?;
    let target = match read::scalar(host)?.parse::<IpAddr>() {
        Ok(ip) => SocketAddr::new(ip, port).to_string(),
        Err(_) => format!("{}:{port}", host_name(host, false)?),
    };
    Ok(ForwardTunnel { target: target.into(), post })
}
fn retry_budget<'p>(n: &'p Node<'p>) -> Read<'p, RetryBudget> {
    read::only(n, &["percent", "minRetryConcurrency", "budgetInterval"])?;
    let percent = read::decimal(n, "percent")?.unwrap_or(20.0);
    if !(0.0..=100.0).contains(&percent) {
        return Err(Bad::value(
            n.get("percent").unwrap_or(n),
            format!("`{percent}` is not a percentage"),
            "write a number from 0 to 100",
        ));
    }
    Ok(RetryBudget {
        interval: read::duration(n, "budgetInterval")?.filter(|d| !d.is_zero()),
        // In range by the check above.
        percent_hundredths: (percent * 100.0).round() as u32,
        min_concurrency: read::number(n, "minRetryConcurrency")?.unwrap_or(3),
    })
}

#[cfg(test)]
mod tests;
