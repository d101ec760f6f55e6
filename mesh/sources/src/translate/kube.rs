//! Reading core Kubernetes objects. Unknown fields are tolerated: these objects come out of a cluster with many more
//! fields than the mesh needs.

use std::net::IpAddr;
use std::sync::Arc;

use mesh_model::service::{AppProtocol, IpFamilies};
use mesh_model::workload::Locality;

use super::intern::{Interner, Labels};
use super::object::{EndpointSlice, KubeService, Namespace, Pod, Port, Reader, Target};
use super::read::{self, Bad, Read};
use crate::yaml::Node;

/// Annotation with traffic preferences of a Service or Namespace.
const DISTRIBUTION: &str = "networking.istio.io/traffic-distribution";
const CANARY_WEIGHT: &str = "istio.io/use-waypoint-canary-weight";

static NOTHING: Node<'static> = Node { line: 0, tag: None, value: crate::yaml::Value::Null };
/// The mapping below `key`, or one without entries.
pub(super) fn section<'p>(node: &'p Node<'p>, key: &str) -> Read<'p, &'p Node<'p>> {
    Ok(read::map(node, key)?.unwrap_or(&NOTHING))
}
/// Host name of a Service.
pub(super) fn service_host(name: &str, namespace: &str, domain: &str) -> String {
    format!("{name}.{namespace}.svc.{domain}")
}
pub(super) fn annotation(r: &mut Reader<'_>, meta: &Node<'_>, name: &str) -> Option<Arc<str>> {
    read::annotation(meta, name).map(|t| r.pool.text(t))
}
pub(super) fn distribution(r: &mut Reader<'_>, meta: &Node<'_>) -> Option<Arc<str>> {
    annotation(r, meta, DISTRIBUTION)
}
pub(super) fn canary_weight(r: &mut Reader<'_>, meta: &Node<'_>) -> Option<Arc<str>> {
    annotation(r, meta, CANARY_WEIGHT)
}
pub(super) fn redirected(meta: &Node<'_>) -> bool {
    read::annotation(meta, "ambient.istio.io/redirection") == Some("enabled")
}

pub(super) fn namespace<'p>(r: &mut Reader<'_>, node: &'p Node<'p>) -> Read<'p, Namespace> {
    let meta = section(node, "metadata")?;
    Ok(Namespace {
        labels: read::labels(meta, "labels", r.pool)?,
        distribution: distribution(r, meta),
        canary_weight: canary_weight(r, meta),
    })
}

pub(super) fn node<'p>(r: &mut Reader<'_>, node: &'p Node<'p>) -> Read<'p, Locality> {
    let labels = read::labels(section(node, "metadata")?, "labels", r.pool)?;
    let get = |k: &str| labels.get(k).cloned().unwrap_or_default();
    Ok(Locality {
        region: get("topology.kubernetes.io/region"),
        zone: get("topology.kubernetes.io/zone"),
        subzone: get("topology.istio.io/subzone"),
    })
}

pub(super) fn pod<'p>(r: &mut Reader<'_>, node: &'p Node<'p>) -> Read<'p, Pod> {
    let meta = section(node, "metadata")?;
    let spec = section(node, "spec")?;
    let status = section(node, "status")?;
    let labels = read::labels(meta, "labels", r.pool)?;
    let mut ips = Vec::new();
    for entry in read::list(status, "podIPs")? {
        if let Some(n) = entry.get("ip") {
            ips.push(read::ip(n)?);
        }
    }
    if ips.is_empty()
        && let Some(n) = status.get("podIP")
    {
        ips.push(read::ip(n)?);
    }
    let finished = matches!(read::text_or_empty(status, "phase")?, "Succeeded" | "Failed");
    let mut ready = false;
    for c in read::list(status, "conditions")? {
        if read::text_or_empty(c, "type")? == "Ready" {
            ready = read::text_or_empty(c, "status")? == "True";
        }
    }
    let mut ports = Vec::new();
    for (list, only_sidecars) in [("containers", false), ("initContainers", true)] {
        for c in read::list(spec, list)? {
            if only_sidecars && read::text_or_empty(c, "restartPolicy")? != "Always" {
                continue;
            }
            for p in read::list(c, "ports")? {
                if let (Some(name), Some(port)) = (read::text(p, "name")?, p.get("containerPort"))
                    && tcp(p)?
                {
                    ports.push((r.pool.text(name), read::port(port)?));
                }
            }
        }
    }
    Ok(Pod {
        workload_name: owner(r, meta, &labels)?,
        service_account: r.pool.text(read::text_or_empty(spec, "serviceAccountName")?),
        node: r.pool.text(read::text_or_empty(spec, "nodeName")?),
        netns: annotation(r, meta, "culvert.dev/netns"),
        uid: read::text(meta, "uid")?.map(uid),
        finished,
        ips: ips.into(),
        ready: ready && meta.get("deletionTimestamp").is_none(),
        host_network: read::flag(spec, "hostNetwork")?,
        redirected: redirected(meta),
        sidecar: read::annotation(meta, "sidecar.istio.io/status").is_some(),
        ports: r.pool.named_ports(ports),
        labels,
    })
}

/// Kubernetes uids are UUIDs; as numbers they take no allocation.
fn uid(t: &str) -> [u8; 16] {
    let hex: String = t.chars().filter(|c| *c != '-').collect();
    if let Ok(n) = u128::from_str_radix(&hex, 16) {
        return n.to_be_bytes();
    }
    // Mirror pods and hand-written files: any stable number serves, it is only compared.
    use std::hash::{Hash, Hasher};
    let mut h = std::hash::DefaultHasher::new();
    t.hash(&mut h);
    u128::from(h.finish()).to_be_bytes()
}

fn tcp<'p>(port: &'p Node<'p>) -> Read<'p, bool> {
    Ok(matches!(read::text_or_empty(port, "protocol")?, "" | "TCP"))
}

/// Name of the thing that made the pod: the Deployment behind a ReplicaSet, the CronJob behind a Job.
fn owner<'p>(r: &mut Reader<'_>, meta: &'p Node<'p>, labels: &Labels) -> Read<'p, Arc<str>> {
    for o in read::list(meta, "ownerReferences")? {
        if !read::flag(o, "controller")? {
            continue;
        }
        let (kind, name) = (read::text_or_empty(o, "kind")?, read::text_or_empty(o, "name")?);
        let short = match kind {
            "ReplicaSet" => {
                labels.get("pod-template-hash").and_then(|h| name.strip_suffix(&**h)).and_then(|n| n.strip_suffix('-'))
            }
            "Job" => name
                .rsplit_once('-')
                .filter(|(n, t)| !n.is_empty() && (8..=10).contains(&t.len()) && t.bytes().all(|b| b.is_ascii_digit()))
                .map(|(n, _)| n),
            "ReplicationController" => labels.get("deploymentconfig").map(|d| &**d),
            _ => None,
        };
        let name = short.unwrap_or(name);
        if !name.is_empty() {
            return Ok(r.pool.text(name));
        }
    }
    Ok(r.pool.text(read::text_or_empty(meta, "name")?))
}

pub(super) fn service<'p>(r: &mut Reader<'_>, node: &'p Node<'p>) -> Read<'p, KubeService> {
    let meta = section(node, "metadata")?;
    let spec = section(node, "spec")?;
    let mut vips: Vec<IpAddr> = Vec::new();
    for n in read::list(spec, "clusterIPs")?.iter().chain(spec.get("clusterIP")) {
        if !matches!(read::scalar(n)?, "None" | "") {
            let ip = read::ip(n)?;
            if !vips.contains(&ip) {
                vips.push(ip);
            }
        }
    }
    let mut ports = Vec::new();
    for p in read::list(spec, "ports")? {
        if !tcp(p)? {
            continue;
        }
        let port = read::port_at(p, "port")?;
        let name = read::text_or_empty(p, "name")?;
        let target = match p.get("targetPort") {
            None => Target::Number(port),
            Some(n) => match read::scalar(n)? {
                // The API server writes 0 for "same as port" on headless services of old clients.
                "0" => Target::Number(port),
                t if t.bytes().all(|b| b.is_ascii_digit()) => Target::Number(read::port(n)?),
                t => Target::Name(r.pool.text(t)),
            },
        };
        ports.push(Port {
            name: r.pool.text(name),
            port,
            target,
            explicit_target: p.get("targetPort").is_some(),
            app: app_protocol(read::text_or_empty(p, "appProtocol")?, name, port),
        });
    }
    let mut families = Vec::new();
    for f in read::list(spec, "ipFamilies")? {
        families.push(read::scalar(f)?);
    }
    Ok(KubeService {
        labels: read::labels(meta, "labels", r.pool)?,
        selector: read::labels(spec, "selector", r.pool)?,
        ports,
        vips,
        external_name: read::text_or_empty(spec, "type")? == "ExternalName",
        local_only: read::text_or_empty(spec, "internalTrafficPolicy")? == "Local",
        spec_distribution: read::text(spec, "trafficDistribution")?.map(|t| r.pool.text(t)),
        distribution: distribution(r, meta),
        not_ready: read::flag(spec, "publishNotReadyAddresses")?,
        families: match families.as_slice() {
            ["IPv4"] => IpFamilies::V4,
            ["IPv6"] => IpFamilies::V6,
            [_, _] => IpFamilies::Dual,
            _ => IpFamilies::Automatic,
        },
        canary_weight: canary_weight(r, meta),
    })
}

/// Declared protocol: `appProtocol`, else the prefix of the port's name, else what is customary on the port.
pub(super) fn app_protocol(declared: &str, name: &str, port: u16) -> AppProtocol {
    let parse = |t: &str| match t.to_ascii_lowercase().as_str() {
        "http" | "kubernetes.io/ws" => Some(AppProtocol::Http11),
        "http2" | "kubernetes.io/h2c" => Some(AppProtocol::Http2),
        "grpc" => Some(AppProtocol::Grpc),
        "tls" | "https" | "kubernetes.io/wss" => Some(AppProtocol::Tls),
        "tcp" => Some(AppProtocol::Tcp),
        "grpc-web" | "udp" | "mongo" | "redis" | "mysql" => Some(AppProtocol::Unknown),
        _ => None,
    };
    if let Some(p) = parse(declared) {
        return p;
    }
    if name.to_ascii_lowercase().starts_with("grpc-web") {
        return AppProtocol::Unknown;
    }
    let prefix = name.split_once('-').map_or(name, |(p, _)| p);
    parse(prefix).unwrap_or(match port {
        // Server-first protocols: sniffing them would stall.
        25 | 53 | 3306 | 27017 => AppProtocol::Tcp,
        _ => AppProtocol::Unknown,
    })
}

pub(super) fn endpoint_slice<'p>(r: &mut Reader<'_>, node: &'p Node<'p>) -> Read<'p, EndpointSlice> {
    let labels = read::labels(section(node, "metadata")?, "labels", r.pool)?;
    let mut slice = EndpointSlice {
        service: labels.get("kubernetes.io/service-name").cloned().unwrap_or_default(),
        ..EndpointSlice::default()
    };
    if read::text_or_empty(node, "addressType")? == "FQDN" || slice.service.is_empty() {
        return Ok(slice);
    }
    let mut ports = Vec::new();
    for p in read::list(node, "ports")? {
        if let (Some(name), Some(port)) = (read::text(p, "name")?, p.get("port"))
            && tcp(p)?
        {
            ports.push((r.pool.text(name), read::port(port)?));
        }
    }
    slice.ports = r.pool.named_ports(ports);
    for e in read::list(node, "endpoints")? {
        let target = section(e, "targetRef")?;
        if read::text_or_empty(target, "kind")? == "Pod" {
            let name = read::text(target, "name")?.ok_or_else(|| Bad::missing(target, "name", "a targetRef names its pod"))?;
            slice.pods.push((r.pool.text(name), read::text(target, "uid")?.map(uid)));
            continue;
        }
        let ready = match section(e, "conditions")?.get("ready") {
            None => true,
            Some(n) => read::scalar(n)? == "true",
        };
        for a in read::list(e, "addresses")? {
            slice.others.push((read::ip(a)?, ready));
        }
    }
    Ok(slice)
}

impl Interner {
    /// Shared named ports.
    pub(super) fn named_ports(&mut self, ports: Vec<(Arc<str>, u16)>) -> Arc<[(Arc<str>, u16)]> {
        if let Some(have) = self.named.get(ports.as_slice()) {
            return Arc::clone(have);
        }
        let new: Arc<[(Arc<str>, u16)]> = ports.into();
        self.named.insert(Arc::clone(&new));
        new
    }
}
