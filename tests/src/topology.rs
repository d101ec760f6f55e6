//! A small cluster as data: nodes (a bridge and an uplink each), pods (a namespace with IPv4 and IPv6 addresses each),
//! hosts outside the mesh, one network joining nodes and hosts, and the routes between them.
//!
//! Owns: the address plan, the wiring, and the YAML of the Kubernetes objects that describe the same thing to an agent.
//! Refuses: any interface, address or route in the machine's own network namespace; nothing outside changes.
//! Upstream: suites, demo, benches. Downstream: [`crate::netns`].
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use anyhow::{Context, ensure};

use crate::netns::{self, Netns};

/// A node to make.
#[derive(Clone, Debug)]
pub struct NodeSpec {
    /// Kubernetes name.
    pub name: String,
    /// Zone label.
    pub zone: String,
    /// Address on the network between nodes.
    pub v4: Ipv4Addr,
    /// Its IPv6 twin.
    pub v6: Ipv6Addr,
    /// The node's pods are in this /24 …
    pub pods_v4: Ipv4Addr,
    /// … and in this /64.
    pub pods_v6: Ipv6Addr,
}

/// A pod to make.
#[derive(Clone, Debug)]
pub struct PodSpec {
    /// Kubernetes name.
    pub name: String,
    /// Kubernetes namespace.
    pub namespace: String,
    /// Name of its node.
    pub node: String,
    /// Service account.
    pub service_account: String,
    /// Labels.
    pub labels: BTreeMap<String, String>,
    /// Its address.
    pub v4: Ipv4Addr,
    /// Its IPv6 address.
    pub v6: Ipv6Addr,
}

/// A host which is not part of the mesh.
#[derive(Clone, Debug)]
pub struct HostSpec {
    /// Name.
    pub name: String,
    /// Address on the network between nodes.
    pub v4: Ipv4Addr,
    /// Its IPv6 twin.
    pub v6: Ipv6Addr,
}

/// What to build. The builder methods hand out addresses; [`Plan::from_manifests`] reads them from YAML instead.
#[derive(Clone, Debug, Default)]
pub struct Plan {
    /// Nodes.
    pub nodes: Vec<NodeSpec>,
    /// Pods.
    pub pods: Vec<PodSpec>,
    /// Hosts outside.
    pub hosts: Vec<HostSpec>,
}

/// Network between the nodes: documentation ranges, so no test can ever reach a real machine.
const LINK_V4: [u8; 3] = [192, 0, 2];
const LINK_V6: [u16; 4] = [0x2001, 0xdb8, 0x100, 0];

fn link_v4(host: usize) -> Ipv4Addr {
    Ipv4Addr::new(LINK_V4[0], LINK_V4[1], LINK_V4[2], host as u8)
}
fn link_v6(host: usize) -> Ipv6Addr {
    Ipv6Addr::new(LINK_V6[0], LINK_V6[1], LINK_V6[2], LINK_V6[3], 0, 0, 0, host as u16)
}
fn nth_v4(net: Ipv4Addr, host: usize) -> Ipv4Addr {
    let [a, b, c, _] = net.octets();
    Ipv4Addr::new(a, b, c, host as u8)
}
fn nth_v6(net: Ipv6Addr, host: usize) -> Ipv6Addr {
    let [a, b, c, d, ..] = net.segments();
    Ipv6Addr::new(a, b, c, d, 0, 0, 0, host as u16)
}

impl Plan {
    /// Adds a node.
    #[must_use]
    pub fn node(mut self, name: &str, zone: &str) -> Self {
        let n = self.nodes.len() + 1;
        self.nodes.push(NodeSpec {
            name: name.into(),
            zone: zone.into(),
            v4: link_v4(n),
            v6: link_v6(n),
            pods_v4: Ipv4Addr::new(10, 244, n as u8, 0),
            pods_v6: Ipv6Addr::new(0xfd00, 0x244, n as u16, 0, 0, 0, 0, 0),
        });
        self
    }

    /// Adds a pod with label `app: <name>` and any others given as `key=value`. The node must have been added before.
    ///
    /// # Panics
    /// On an unknown node: the plan of a test is wrong.
    #[must_use]
    #[expect(clippy::expect_used, reason = "a plan naming an unknown node is a bug in the test that holds it")]
    pub fn pod(mut self, node: &str, namespace: &str, name: &str, service_account: &str, labels: &[&str]) -> Self {
        let on = self.nodes.iter().find(|spec| spec.name == node).expect("the pod's node is in the plan");
        let number = 11 + self.pods.iter().filter(|pod| pod.node == node).count();
        let mut all: BTreeMap<String, String> = BTreeMap::from([("app".into(), name.into())]);
        all.extend(labels.iter().filter_map(|label| label.split_once('=')).map(|(k, v)| (k.into(), v.into())));
        self.pods.push(PodSpec {
            name: name.into(),
            namespace: namespace.into(),
            node: node.into(),
            service_account: service_account.into(),
            labels: all,
            v4: nth_v4(on.pods_v4, number),
            v6: nth_v6(on.pods_v6, number),
        });
        self
    }

    /// Adds a host outside the mesh.
    #[must_use]
    pub fn host(mut self, name: &str) -> Self {
        let number = 100 + self.hosts.len();
        self.hosts.push(HostSpec { name: name.into(), v4: link_v4(number), v6: link_v6(number) });
        self
    }

    /// Reads Nodes (their addresses and pod ranges) and Pods (addresses, node) from a folder of Kubernetes YAML, so that the
    /// wiring is exactly what the manifests say. Objects of other kinds are not looked at.
    pub fn from_manifests(dir: &Path) -> anyhow::Result<Self> {
        let mut plan = Self::default();
        for object in crate::mesh_dir::read_objects(dir)? {
            match object["kind"].as_str() {
                Some("Node") => {
                    plan.nodes.push(node_from(&object).with_context(|| format!("Node {}", object["metadata"]["name"]))?);
                }
                Some("Pod") => plan.pods.push(pod_from(&object).with_context(|| format!("Pod {}", object["metadata"]["name"]))?),
                _ => {}
            }
        }
        ensure!(!plan.nodes.is_empty() && !plan.pods.is_empty(), "{} holds no Node or no Pod", dir.display());
        Ok(plan)
    }

    /// Makes it all.
    pub fn build(self) -> anyhow::Result<Topology> {
        Topology::build(self)
    }
}

/// First address of each family in a list of JSON strings.
fn two_families<'a>(values: impl Iterator<Item = &'a str>) -> anyhow::Result<(Ipv4Addr, Ipv6Addr)> {
    let (mut v4, mut v6) = (None, None);
    for text in values {
        match text.split('/').next().unwrap_or(text).parse::<IpAddr>().with_context(|| format!("address `{text}`"))? {
            IpAddr::V4(ip) => v4 = v4.or(Some(ip)),
            IpAddr::V6(ip) => v6 = v6.or(Some(ip)),
        }
    }
    Ok((v4.context("no IPv4 address")?, v6.context("no IPv6 address")?))
}

fn strings<'a>(list: &'a serde_json::Value, field: Option<&'a str>) -> impl Iterator<Item = &'a str> {
    list.as_array().into_iter().flatten().filter_map(move |entry| match field {
        Some(field) => entry[field].as_str(),
        None => entry.as_str(),
    })
}

fn node_from(object: &serde_json::Value) -> anyhow::Result<NodeSpec> {
    let internal: Vec<serde_json::Value> = object["status"]["addresses"]
        .as_array()
        .into_iter()
        .flatten()
        .filter(|address| address["type"] == "InternalIP")
        .cloned()
        .collect();
    let (v4, v6) = two_families(strings(&serde_json::Value::Array(internal), Some("address"))).context("status.addresses")?;
    let (pods_v4, pods_v6) = two_families(strings(&object["spec"]["podCIDRs"], None)).context("spec.podCIDRs")?;
    Ok(NodeSpec {
        name: object["metadata"]["name"].as_str().context("metadata.name")?.into(),
        zone: object["metadata"]["labels"]["topology.kubernetes.io/zone"].as_str().unwrap_or_default().into(),
        v4,
        v6,
        pods_v4,
        pods_v6,
    })
}

fn pod_from(object: &serde_json::Value) -> anyhow::Result<PodSpec> {
    let (v4, v6) = two_families(strings(&object["status"]["podIPs"], Some("ip"))).context("status.podIPs")?;
    let labels = object["metadata"]["labels"].as_object().into_iter().flatten();
    Ok(PodSpec {
        name: object["metadata"]["name"].as_str().context("metadata.name")?.into(),
        namespace: object["metadata"]["namespace"].as_str().context("metadata.namespace")?.into(),
        node: object["spec"]["nodeName"].as_str().context("spec.nodeName")?.into(),
        service_account: object["spec"]["serviceAccountName"].as_str().unwrap_or("default").into(),
        labels: labels.map(|(key, value)| (key.clone(), value.as_str().unwrap_or_default().to_owned())).collect(),
        v4,
        v6,
    })
}

/// A pod or host that exists: its namespace and its addresses.
#[derive(Debug)]
pub struct Place {
    /// Name of the pod or host.
    pub name: String,
    /// Its network namespace.
    pub netns: Netns,
    /// Its address.
    pub v4: Ipv4Addr,
    /// Its IPv6 address.
    pub v6: Ipv6Addr,
}

impl Place {
    /// IPv4 socket address.
    pub fn at(&self, port: u16) -> SocketAddr {
        (self.v4, port).into()
    }
    /// Listens on both families.
    pub fn listen(&self, port: u16) -> anyhow::Result<TcpListener> {
        let on = SocketAddr::from((Ipv6Addr::UNSPECIFIED, port));
        self.netns.listen(on).with_context(|| format!("port {port} of {}", self.name))
    }
    /// IPv6 socket address.
    pub fn at6(&self, port: u16) -> SocketAddr {
        (self.v6, port).into()
    }
}

/// A cluster that exists. Dropping it removes everything.
#[derive(Debug)]
pub struct Topology {
    plan: Plan,
    prefix: String,
    pods: Vec<Arc<Place>>,
    hosts: Vec<Arc<Place>>,
    nodes: Vec<Arc<Place>>,
    _link: Netns,
}

static BUILT: AtomicUsize = AtomicUsize::new(0);

impl Topology {
    fn build(plan: Plan) -> anyhow::Result<Self> {
        netns::sweep_leftovers();
        let prefix = format!("{}{}-", netns::own_prefix(), BUILT.fetch_add(1, Ordering::Relaxed));
        let link = Netns::create(&format!("{prefix}link"))?;
        netns::ip_batch(&link, &["link add br0 type bridge".into(), "link set br0 up".into()])?;

        let mut nodes = Vec::new();
        for (n, spec) in plan.nodes.iter().enumerate() {
            let place = uplink(&prefix, &link, &format!("n{n}"), &spec.name, spec.v4, spec.v6)?;
            place.netns.sysctl(&[("ipv4/ip_forward", "1"), ("ipv6/conf/all/forwarding", "1")])?;
            netns::ip_batch(
                &place.netns,
                &[
                    "link add br0 type bridge".into(),
                    "link set br0 up".into(),
                    format!("addr add {}/24 dev br0", nth_v4(spec.pods_v4, 1)),
                    format!("addr add {}/64 dev br0 nodad", nth_v6(spec.pods_v6, 1)),
                ],
            )?;
            nodes.push(place);
        }
        let mut hosts = Vec::new();
        for (n, spec) in plan.hosts.iter().enumerate() {
            hosts.push(uplink(&prefix, &link, &format!("h{n}"), &spec.name, spec.v4, spec.v6)?);
        }
        // Every node and host knows the way to the pods of every (other) node.
        for place in nodes.iter().chain(&hosts) {
            let routes: Vec<String> = plan
                .nodes
                .iter()
                .filter(|node| node.name != place.name)
                .flat_map(|node| {
                    [
                        format!("route add {}/24 via {}", node.pods_v4, node.v4),
                        format!("route add {}/64 via {}", node.pods_v6, node.v6),
                    ]
                })
                .collect();
            netns::ip_batch(&place.netns, &routes)?;
        }
        let mut pods = Vec::new();
        for (n, spec) in plan.pods.iter().enumerate() {
            let number = plan.nodes.iter().position(|node| node.name == spec.node);
            let number = number.with_context(|| format!("pod {} is on unknown node {}", spec.name, spec.node))?;
            let (node, on) = (&plan.nodes[number], &nodes[number]);
            let ns = Netns::create(&format!("{prefix}{}", spec.name))?;
            netns::ip_batch(
                &on.netns,
                &[format!("link add v{n} type veth peer name eth0 netns {}", ns.name()), format!("link set v{n} master br0 up")],
            )?;
            netns::ip_batch(
                &ns,
                &[
                    format!("addr add {}/24 dev eth0", spec.v4),
                    format!("addr add {}/64 dev eth0 nodad", spec.v6),
                    "link set eth0 up".into(),
                    format!("route add default via {}", nth_v4(node.pods_v4, 1)),
                    format!("route add ::/0 via {}", nth_v6(node.pods_v6, 1)),
                ],
            )?;
            pods.push(Arc::new(Place { name: spec.name.clone(), netns: ns, v4: spec.v4, v6: spec.v6 }));
        }
        Ok(Self { plan, prefix, pods, hosts, nodes, _link: link })
    }

    /// A pod by name.
    ///
    /// # Panics
    /// When the plan has none: a bug in the test.
    pub fn pod(&self, name: &str) -> &Arc<Place> {
        by_name(&self.pods, name)
    }
    /// A host outside by name.
    ///
    /// # Panics
    /// When the plan has none: a bug in the test.
    pub fn host(&self, name: &str) -> &Arc<Place> {
        by_name(&self.hosts, name)
    }
    /// A node by name.
    ///
    /// # Panics
    /// When the plan has none: a bug in the test.
    pub fn node(&self, name: &str) -> &Arc<Place> {
        by_name(&self.nodes, name)
    }
    /// Leaves everything in place when this value goes (`demo --keep`).
    pub fn leave_in_place(self) {
        std::mem::forget(self);
    }
    /// The prefix of all namespace names.
    pub fn prefix(&self) -> &str {
        &self.prefix
    }
    /// What was built.
    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    /// The Pod object of a pod of the plan, as an agent in folder mode takes it; `labels` are added to the planned ones.
    ///
    /// # Panics
    /// When the plan has no such pod: a bug in the test.
    #[expect(clippy::expect_used, reason = "a test asking for a pod it did not plan is a bug in that test")]
    pub fn pod_yaml(&self, name: &str, labels: &[(&str, &str)]) -> String {
        let spec = self.plan.pods.iter().find(|pod| pod.name == name).expect("the pod is in the plan");
        let mut all = spec.labels.clone();
        all.extend(labels.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())));
        let mut text =
            format!("apiVersion: v1\nkind: Pod\nmetadata:\n  name: {}\n  namespace: {}\n  labels:\n", spec.name, spec.namespace);
        for (key, value) in &all {
            let _infallible = writeln!(text, "    {key}: \"{value}\"");
        }
        let _infallible = write!(
            text,
            "  annotations:\n    culvert.dev/netns: {}\nspec:\n  nodeName: {}\n  serviceAccountName: {}\n  containers:\n  - name: main\n    image: none\n\
             status:\n  phase: Running\n  podIP: {v4}\n  podIPs:\n  - ip: {v4}\n  - ip: \"{v6}\"\n  conditions:\n  - type: Ready\n    status: \"True\"\n",
            self.pod(name).netns.path().display(),
            spec.node,
            spec.service_account,
            v4 = spec.v4,
            v6 = spec.v6,
        );
        text
    }

    /// The Node objects.
    pub fn nodes_yaml(&self) -> String {
        let mut text = String::new();
        for node in &self.plan.nodes {
            let _infallible = write!(
                text,
                "---\napiVersion: v1\nkind: Node\nmetadata:\n  name: {}\n  labels:\n    topology.kubernetes.io/region: region-1\n    \
                 topology.kubernetes.io/zone: {}\n",
                node.name, node.zone
            );
        }
        text
    }
}

/// Makes a namespace with `eth0` on the network between nodes.
fn uplink(prefix: &str, link: &Netns, port: &str, name: &str, v4: Ipv4Addr, v6: Ipv6Addr) -> anyhow::Result<Arc<Place>> {
    let ns = Netns::create(&format!("{prefix}{name}"))?;
    netns::ip_batch(
        link,
        &[format!("link add {port} type veth peer name eth0 netns {}", ns.name()), format!("link set {port} master br0 up")],
    )?;
    netns::ip_batch(
        &ns,
        &[format!("addr add {v4}/24 dev eth0"), format!("addr add {v6}/64 dev eth0 nodad"), "link set eth0 up".into()],
    )?;
    Ok(Arc::new(Place { name: name.into(), netns: ns, v4, v6 }))
}

#[expect(clippy::panic, reason = "a test asking for a place it did not plan is a bug in that test")]
fn by_name<'a>(places: &'a [Arc<Place>], name: &str) -> &'a Arc<Place> {
    places.iter().find(|place| place.name == name).unwrap_or_else(|| panic!("`{name}` is not in the plan"))
}
