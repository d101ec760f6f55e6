//! One instance of a service, as Consul tells it, and what our convention reads out of its registration.
//!
//! Owns the words of the convention (README, "From Consul"). Refuses an instance alone, with the key that is wrong and what to
//! write. Pure. Upstream: the answer of `/v1/health/service/NAME`. Downstream: [`super::catalog`].

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

use serde_json::Value;

/// What begins the keys of a service's meta that mean something here.
const OURS: &str = "culvert-";
const NAMESPACE: &str = "culvert-namespace";
const ACCOUNT: &str = "culvert-service-account";
const MODE: &str = "culvert-dataplane-mode";
const NETNS: &str = "culvert-netns";
const PORT: &str = "culvert-port";
const ADDRESS: &str = "culvert-address";
const KNOWN: [&str; 6] = [NAMESPACE, ACCOUNT, MODE, NETNS, PORT, ADDRESS];
/// Keys of a node's meta.
const LOCALITY: [&str; 3] = ["culvert-region", "culvert-zone", "culvert-subzone"];

/// An instance.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Instance {
    /// Its id on its node.
    pub id: Arc<str>,
    pub node: Arc<str>,
    /// An address, or a name.
    pub address: Arc<str>,
    /// 0: none.
    pub port: u16,
    /// Of tags, valid as labels of Kubernetes.
    pub labels: BTreeMap<String, String>,
    pub namespace: Arc<str>,
    pub account: Arc<str>,
    /// It is a part of the mesh: an agent carries its traffic.
    pub ambient: bool,
    /// Where it lives on its node.
    pub netns: Option<Arc<str>>,
    /// Port of its service, where that is not the instance's own.
    pub service_port: Option<u16>,
    /// Address of its service.
    pub vip: Option<IpAddr>,
    pub healthy: bool,
    /// Share of the traffic.
    pub weight: u32,
    /// `region/zone/subzone`.
    pub locality: String,
    pub datacenter: Arc<str>,
}

/// What is wrong with a registration.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Fault {
    /// `ID on NODE`.
    pub instance: String,
    /// Such as `Service.Meta["culvert-port"]`.
    pub field: String,
    pub message: String,
    pub fix: &'static str,
    /// Whether it is the reason for which the instance is refused.
    pub fatal: bool,
}

/// Reads one element of the answer. `None`: a part of Consul's own mesh, which is no workload of ours.
pub(super) fn read(service: &str, element: &Value, faults: &mut Vec<Fault>) -> Result<Option<Instance>, Fault> {
    let (node, registered) = (&element["Node"], &element["Service"]);
    let instance = format!("{} on {}", text(registered, "ID"), text(node, "Node"));
    let wrong = |field: &str, message: String, fix: &'static str| Fault {
        instance: instance.clone(),
        field: field.to_owned(),
        message,
        fix,
        fatal: true,
    };
    if !matches!(text(registered, "Kind"), "" | "typical") {
        return Ok(None);
    }
    for (key, what) in [("Namespace", "namespaces"), ("Partition", "admin partitions"), ("PeerName", "cluster peers")] {
        if !matches!(text(registered, key), "" | "default") {
            let message = format!("{what} of Consul are not understood ({})", text(registered, key));
            return Err(wrong(&format!("Service.{key}"), message, "register it in the default one"));
        }
    }
    let address = [text(registered, "Address"), text(node, "Address")].into_iter().find(|a| !a.is_empty());
    let address = address.ok_or_else(|| wrong("Service.Address", "no address".into(), "register it with an address"))?;
    let meta = &registered["Meta"];
    let said = |key: &str| meta[key].as_str().filter(|value| !value.is_empty());
    let at = |key: &str| format!("Service.Meta[\"{key}\"]");
    let name = |key: &'static str, default: &str| match said(key) {
        None => Ok(Arc::from(default)),
        Some(value) if is_name(value) => Ok(Arc::from(value)),
        Some(value) => Err(wrong(&at(key), format!("`{value}` is not a name"), "use lower-case letters, digits, `-` and `.`")),
    };
    let ambient = match said(MODE) {
        None | Some("none") => false,
        Some("ambient") if address.parse::<IpAddr>().is_ok() => true,
        Some("ambient") => {
            return Err(wrong("Service.Address", format!("`{address}` is no IP address"), "members of the mesh need one"));
        }
        Some(value) => return Err(wrong(&at(MODE), format!("`{value}` is no mode"), "write `ambient` or `none`")),
    };
    let service_port = match said(PORT) {
        None => None,
        Some(value) => {
            let port = value.parse::<u16>().ok().filter(|port| *port != 0);
            Some(port.ok_or_else(|| wrong(&at(PORT), format!("`{value}` is no port"), "write a number up to 65535"))?)
        }
    };
    // Consul gives services of its mesh an address.
    let of_consul = registered["TaggedAddresses"]["consul-virtual"]["Address"].as_str().and_then(|a| a.parse().ok());
    let vip = match said(ADDRESS) {
        None => of_consul,
        Some(value) => {
            let ip = value.parse::<IpAddr>();
            Some(ip.map_err(|_| wrong(&at(ADDRESS), format!("`{value}` is no address"), "write an IP address"))?)
        }
    };
    for key in meta.as_object().into_iter().flat_map(serde_json::Map::keys) {
        if key.starts_with(OURS) && !KNOWN.contains(&key.as_str()) {
            let message = "not a key that is understood; it has no effect".to_owned();
            let fix = "correct the key, or remove it";
            faults.push(Fault { fatal: false, ..wrong(&at(key), message, fix) });
        }
    }
    let (healthy, weight) = health(registered, &element["Checks"]);
    let port = &registered["Port"];
    let port = u16::try_from(port.as_u64().unwrap_or(0)).map_err(|_| wrong("Service.Port", format!("{port} is no port"), ""))?;
    Ok(Some(Instance {
        id: text(registered, "ID").into(),
        node: text(node, "Node").into(),
        address: address.into(),
        port,
        labels: registered["Tags"].as_array().into_iter().flatten().filter_map(|tag| label(tag.as_str()?)).collect(),
        namespace: name(NAMESPACE, "default")?,
        account: name(ACCOUNT, service)?,
        ambient,
        netns: said(NETNS).map(Arc::from),
        service_port,
        vip,
        healthy,
        weight,
        locality: LOCALITY.map(|key| text(&node["Meta"], key)).join("/").trim_end_matches('/').to_owned(),
        datacenter: text(node, "Datacenter").into(),
    }))
}

/// Whether it may be sent traffic, and how much: the worst of its own and its node's checks counts, as in Consul.
fn health(registered: &Value, checks: &Value) -> (bool, u32) {
    let checks = || checks.as_array().into_iter().flatten().map(|check| text(check, "Status"));
    let weight = |key: &str| registered["Weights"][key].as_u64().and_then(|w| u32::try_from(w).ok()).unwrap_or(1);
    if checks().any(|status| !matches!(status, "passing" | "warning")) {
        return (false, 1);
    }
    let weight = weight(if checks().any(|status| status == "warning") { "Warning" } else { "Passing" });
    (weight > 0, weight.max(1))
}

pub(super) fn text<'v>(value: &'v Value, key: &str) -> &'v str {
    value[key].as_str().unwrap_or_default()
}

/// Whether Kubernetes would take it for a name.
pub(super) fn is_name(text: &str) -> bool {
    let good = |b: u8| matches!(b, b'a'..=b'z' | b'0'..=b'9' | b'-' | b'.');
    text.len() <= 63 && text.bytes().all(good) && text.bytes().next().is_some_and(|b| b.is_ascii_alphanumeric())
}

/// The label that a tag is: `key=value`, or `key` for `key=true`. Tags that no label can be are for somebody else.
fn label(tag: &str) -> Option<(String, String)> {
    let (key, value) = tag.split_once('=').unwrap_or((tag, "true"));
    let good = |text: &str, more: &[u8]| {
        text.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.') || more.contains(&b))
    };
    let whole = !key.is_empty() && key.len() <= 253 && value.len() <= 63;
    (whole && good(key, b"/") && good(value, b"")).then(|| (key.to_owned(), value.to_owned()))
}
