//! Process settings: flags and environment, each documented where it is defined (`ztunnel proxy --help`).
//!
//! Order: default < environment < flag. Names follow Istio's node agent where it has the setting (node-agent §1.16), else
//! they start with `CULVERT_`.
use crate::access::AccessLog;
use clap::Args;
use mesh_identity::crl_file::CrlFile;
use mesh_identity::crypto::Compliance;
use mesh_identity::revocation::Unknown;
use mesh_model::snapshot::MissingWaypoint;
use mesh_runtime::control_plane::{Roots, Token};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

/// Settings of `ztunnel proxy`.
#[derive(Args, Clone, Debug)]
pub struct Settings {
    /// Folder of Kubernetes, Istio and Gateway API YAML that describes the mesh; watched for changes.
    #[arg(long, env = "CULVERT_MESH_DIR", value_name = "DIR")]
    pub mesh_dir: Option<PathBuf>,
    /// File in istio/ztunnel's own local format, instead of a folder.
    #[arg(long, env = "LOCAL_XDS_PATH", value_name = "FILE")]
    pub local_xds_path: Option<PathBuf>,
    /// Read the mesh from the Kubernetes API instead, as the service account of this pod or as `--kubeconfig` says.
    #[arg(long, env = "CULVERT_KUBERNETES", conflicts_with_all = ["mesh_dir", "local_xds_path"])]
    pub kubernetes: bool,
    /// Kubeconfig file, of which the current context is used, for processes outside a pod.
    #[arg(long, env = "KUBECONFIG", value_name = "FILE")]
    pub kubeconfig: Option<PathBuf>,
    /// Or a control plane does.
    #[command(flatten)]
    pub control: ControlSettings,
    /// Who enrols this node's pods: `kubernetes` watches them and their namespaces, finds each by its cgroup and marks it
    /// (`ambient.istio.io/redirection`); `mesh` takes what the folder says. By default the one that describes the mesh.
    #[arg(long, env = "CULVERT_ENROL", conflicts_with = "zds")]
    pub enrol: Option<Enrol>,
    /// The machine's `/proc`, where pods' processes are looked for.
    #[arg(long, env = "CULVERT_PROC_DIR", default_value = "/proc", value_name = "DIR")]
    pub proc_dir: PathBuf,
    /// Name of the node this agent serves: it takes the enrolled pods whose `spec.nodeName` is this.
    #[arg(long = "node", env = "NODE_NAME", default_value = "")]
    pub node: String,
    /// Directory of the built-in development CA; created when absent. Agents of one mesh share it.
    #[arg(long, env = "CULVERT_CA_DIR", default_value = "/var/lib/culvert/ca", value_name = "DIR")]
    pub ca_dir: PathBuf,
    /// Trust domain of this mesh.
    #[arg(long, env = "TRUST_DOMAIN", default_value = "cluster.local")]
    pub trust_domain: String,
    /// Other names of the same trust domain, accepted from peers and in policies.
    #[arg(long, env = "CULVERT_TRUST_DOMAIN_ALIASES", value_delimiter = ',')]
    pub trust_domain_aliases: Vec<String>,
    /// Certificate revocation lists of the mesh's authorities: a file of PEM (or DER of one), looked at every second. They count
    /// for new and for live tunnels.
    #[arg(long, env = "CRL_PATH", value_name = "FILE")]
    pub crl_path: Option<PathBuf>,
    /// What a certificate means of which no list in force speaks: `deny` refuses it, `allow` believes it and lists beyond their
    /// date too, as istio/ztunnel does.
    #[arg(long, env = "CULVERT_CRL_UNKNOWN", default_value = "deny")]
    pub crl_unknown: Unknown,
    /// Rules that the cryptography must obey: `pqc` (no key exchange but X25519MLKEM768) or `fips-140-2` (refused where the library
    /// is not validated).
    #[arg(long, env = "COMPLIANCE_POLICY", default_value = "", hide_default_value = true)]
    pub compliance: Compliance,
    /// DNS domain of Kubernetes services.
    #[arg(long, env = "CLUSTER_DOMAIN", default_value = "cluster.local")]
    pub cluster_domain: String,
    /// Name of this cluster.
    #[arg(long, env = "CLUSTER_ID", default_value = "Kubernetes")]
    pub cluster_id: String,
    /// Network of this node; empty for the default network.
    #[arg(long, env = "NETWORK", default_value = "")]
    pub network: String,
    /// Istio's root namespace: policies there without a selector are global.
    #[arg(long, env = "CULVERT_ROOT_NAMESPACE", default_value = "istio-system")]
    pub root_namespace: String,
    /// Address of the admin server (`/config_dump`, `/logging`).
    #[arg(long, env = "CULVERT_ADMIN_ADDR", default_value = "127.0.0.1:15000")]
    pub admin_addr: SocketAddr,
    /// Address of the metrics server (`/metrics`, `/stats/prometheus`).
    #[arg(long, env = "CULVERT_STATS_ADDR", default_value = "[::]:15020")]
    pub stats_addr: SocketAddr,
    /// Address of the readiness server (`/healthz/ready`).
    #[arg(long, env = "CULVERT_READINESS_ADDR", default_value = "[::]:15021")]
    pub readiness_addr: SocketAddr,
    /// Data threads: a number, a percentage of the cores (`50%`), or 0 for all cores.
    #[arg(long, env = "ZTUNNEL_WORKER_THREADS")]
    pub worker_threads: Option<String>,
    /// Lifetime of issued certificates.
    #[arg(long, env = "SECRET_TTL", default_value = "1h", value_parser = duration)]
    pub secret_ttl: Duration,
    /// How long connections may live on after SIGTERM.
    #[arg(long, env = "CONNECTION_TERMINATION_DEADLINE", default_value = "5s", value_parser = duration)]
    pub termination_deadline: Duration,
    /// TCP connect timeout, total per attempt.
    #[arg(long, env = "CULVERT_CONNECT_TIMEOUT", default_value = "10s", value_parser = duration)]
    pub connect_timeout: Duration,
    /// Limit for a TLS handshake, an HTTP/2 handshake and a CONNECT answer, each.
    #[arg(long, env = "CULVERT_HANDSHAKE_TIMEOUT", default_value = "10s", value_parser = duration)]
    pub handshake_timeout: Duration,
    /// Handshakes in progress at once, over all pods; further ones wait for a place until they time out.
    #[arg(long, env = "CULVERT_MAX_HANDSHAKES", default_value_t = 512)]
    pub max_handshakes: usize,
    /// How long a connection of which one direction has ended may be silent before it is given up; 0 for no limit.
    #[arg(long, env = "CULVERT_HALF_CLOSED_TIMEOUT", default_value = "1h", value_parser = duration)]
    pub half_closed_timeout: Duration,
    /// Streams in one tunnel before another is opened to the same destination.
    #[arg(long, env = "POOL_MAX_STREAMS_PER_CONNECTION", default_value_t = 100)]
    pub pool_max_streams: usize,
    /// How long an unused tunnel is kept.
    #[arg(long, env = "POOL_UNUSED_RELEASE_TIMEOUT", default_value = "5m", value_parser = duration)]
    pub pool_unused_release: Duration,
    /// Most bytes one stream's window may grow to for a reader that keeps up.
    #[arg(long, env = "HTTP2_STREAM_WINDOW_SIZE", default_value_t = 4 * 1024 * 1024)]
    pub stream_window: u32,
    /// HTTP/2 connection window in bytes.
    #[arg(long, env = "HTTP2_CONNECTION_WINDOW_SIZE", default_value_t = 16 * 1024 * 1024)]
    pub connection_window: u32,
    /// Largest HTTP/2 frame we accept, in bytes.
    #[arg(long, env = "HTTP2_FRAME_SIZE", default_value_t = 1024 * 1024)]
    pub frame_size: u32,
    /// Bytes that grown windows may hold in this process, all tunnels together.
    #[arg(long, env = "CULVERT_WINDOW_BUDGET", default_value_t = 64 * 1024 * 1024)]
    pub window_budget: usize,
    /// Answer CONNECT with the destination's baggage.
    #[arg(long, env = "ENABLE_RESPONSE_BAGGAGE", default_value_t = true, action = clap::ArgAction::Set)]
    pub response_baggage: bool,
    /// Socket of Istio's CNI agent, which then says which pods are served, and whose rules redirect them. Without it the mesh
    /// says so (`istio.io/dataplane-mode`, `culvert.dev/netns`), and `--redirect` tells how.
    #[arg(long, env = "INPOD_UDS", value_name = "SOCKET", num_args = 0..=1, default_missing_value = "/var/run/ztunnel/ztunnel.sock")]
    pub zds: Option<PathBuf>,
    /// With `--zds`: bind the listeners in a pod so that another node agent may have them too, which is how istio/ztunnel is
    /// replaced without a gap (`SO_REUSEPORT`).
    #[arg(long, env = "INPOD_PORT_REUSE", default_value_t = true, action = clap::ArgAction::Set)]
    pub inpod_port_reuse: bool,
    /// Answer the DNS questions of pods that the mesh can answer, and pass on the others. Needs the program `nft` unless `--zds`.
    #[arg(long, env = "ISTIO_META_DNS_CAPTURE", default_value_t = true, action = clap::ArgAction::Set)]
    pub dns_capture: bool,
    /// Redirection: `ebpf`, `nftables` (TPROXY), `auto` for the first of them that this machine allows, or `none` for tests that
    /// bring connections to the listeners themselves.
    #[arg(long, env = "CULVERT_REDIRECT", default_value = "auto")]
    pub redirect: RedirectMode,
    /// What new connections of this node's pods meet while no agent runs: `closed` drops them, `open` lets them go around
    /// the mesh, in plaintext and unjudged.
    #[arg(long, env = "CULVERT_ON_AGENT_DEATH", default_value = "closed")]
    pub on_agent_death: OnAgentDeath,
    /// What becomes of traffic to what declares a waypoint that does not exist, is not ready or does not take it: `refuse`, or
    /// `direct` around it, unjudged by it, as Istio does (told in the log, counted in `culvert_waypoint_bypassed_total`).
    #[arg(long, env = "CULVERT_ON_MISSING_WAYPOINT", default_value = "refuse")]
    pub on_missing_waypoint: MissingWaypoint,
    /// UDP of pods other than DNS, which is not carried over the mesh: `allow` leaves it to the network, `refuse` drops it, in and out.
    #[arg(long, env = "CULVERT_UDP", default_value = "allow")]
    pub udp: Udp,
    /// Connections that a pod had before it was enrolled: `keep` leaves them as they are, unjudged, until they end; `reset` ends them
    /// with their next segment. (Rules of nftables always reset them.)
    #[arg(long, env = "CULVERT_OLDER_CONNECTIONS", default_value = "keep")]
    pub older_connections: OlderConnections,
    /// Drop connections from sources that DENY policies name by address alone in the kernel: counted per pod, but without a line
    /// in the log, and their clients wait in vain. Needs eBPF; otherwise they are refused like any others.
    #[arg(long, env = "CULVERT_PREFILTER", default_value_t = true, action = clap::ArgAction::Set)]
    pub prefilter: bool,
    /// What becomes of plaintext that processes of the node itself (the kubelet's health probes) send to its pods where policies
    /// refuse it: `allow` lets it through all the same, `judge` does not. What the node only forwards is always judged.
    #[arg(long, env = "CULVERT_NODE_PROBES", default_value = "allow")]
    pub node_probes: NodeProbes,
    /// Network namespace of the node, where the kubelet is. By itself that of the first process in `--proc-dir`.
    #[arg(long, env = "CULVERT_NODE_NETNS", value_name = "FILE")]
    pub node_netns: Option<PathBuf>,
    /// Directory of the socket through which the next agent of this node takes the pods over.
    #[arg(long, env = "CULVERT_RUN_DIR", default_value = "/run/culvert", value_name = "DIR")]
    pub run_dir: PathBuf,
    /// Which connections are told of, and what.
    #[command(flatten)]
    pub access_log: AccessLog,
    /// Where redirections are kept.
    #[command(flatten)]
    pub pins: Pins,
}

impl Settings {
    /// Where revocation lists are read, if they are.
    pub fn crl_file(&self) -> Option<CrlFile> {
        self.crl_path.clone().map(|path| CrlFile { path, unknown: self.crl_unknown })
    }
}

/// Settings of the control plane.
#[derive(Args, Clone, Debug)]
pub struct ControlSettings {
    /// istiod describes the mesh: its address, `https://host:port` (or `http://` for plaintext). In a pod of Kubernetes where
    /// nothing else describes the mesh: `https://istiod.istio-system.svc:15012`.
    #[arg(long, env = "XDS_ADDRESS", value_name = "URL")]
    pub xds_address: Option<String>,
    /// Whom to believe that it is istiod: a PEM file (read at every connection), `SYSTEM`, or the PEM itself.
    #[arg(long, env = "XDS_ROOT_CA", default_value = "./var/run/secrets/istio/root-cert.pem", value_name = "ROOTS")]
    pub xds_root_ca: Roots,
    /// A second name istiod's certificate may have.
    #[arg(long, env = "ALT_XDS_HOSTNAME", value_name = "HOST")]
    pub alt_xds_hostname: Option<String>,
    /// istiod issues the certificates: its address. By itself where it describes the mesh; empty: the built-in
    /// development CA does.
    #[arg(long, env = "CA_ADDRESS", value_name = "URL")]
    pub ca_address: Option<String>,
    /// Whom to believe that it is the authority, as for `--xds-root-ca`.
    #[arg(long, env = "CA_ROOT_CA", default_value = "./var/run/secrets/istio/root-cert.pem", value_name = "ROOTS")]
    pub ca_root_ca: Roots,
    /// A second name the authority's certificate may have.
    #[arg(long, env = "ALT_CA_HOSTNAME", value_name = "HOST")]
    pub alt_ca_hostname: Option<String>,
    /// Token for istiod: a file (read for every request) or the token itself. By itself the pod's
    /// `./var/run/secrets/tokens/istio-token`, where it is there.
    #[arg(long, env = "AUTH_TOKEN", hide_env_values = true, value_name = "TOKEN")]
    pub auth_token: Option<Token>,
    /// SPIRE issues the certificates: the admin socket of its agent, `unix:///path`, where this process is an authorized delegate.
    /// A pod is asked for by `k8s:ns` and `k8s:sa`, and its entry must say `spiffe://<trust domain>/ns/<namespace>/sa/<account>`.
    #[arg(long, env = "CULVERT_SPIRE_ADMIN_SOCKET", value_name = "SOCKET", conflicts_with = "ca_address")]
    pub spire_admin_socket: Option<String>,
    /// What a policy means that a workload names and that does not come within a second: `deny` refuses the workload's
    /// connections until it comes, `ignore` leaves it out as istio/ztunnel does.
    #[arg(long, env = "CULVERT_MISSING_POLICY", default_value = "deny")]
    pub missing_policy: Missing,
}

/// What a policy that does not come means.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Missing {
    /// The workload refuses.
    Deny,
    /// Nothing.
    Ignore,
}

impl Settings {
    /// Whether the Kubernetes API says which pods are served.
    pub fn is_enrolled_by_kubernetes(&self) -> bool {
        self.zds.is_none() && self.enrol.map_or(self.kubernetes, |by| by == Enrol::Kubernetes)
    }
}

/// Who enrols pods.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Enrol {
    /// The objects of the mesh: labels, and where each pod lives.
    Mesh,
    /// The Kubernetes API.
    Kubernetes,
}

/// Where redirections are kept that outlive the agent.
#[derive(Args, Clone, Debug)]
pub struct Pins {
    /// Directory in a BPF filesystem that keeps the redirection of each pod, so that it outlives the agent; mounted and
    /// created when absent. Each node has a directory of its own in it.
    #[arg(long, env = "CULVERT_BPF_DIR", default_value = "/sys/fs/bpf/culvert", value_name = "DIR")]
    pub bpf_dir: PathBuf,
}

impl Pins {
    /// The directory of this node. A dot may not occur in it.
    pub fn of_node(&self, node: &str) -> PathBuf {
        let node = if node.is_empty() { "node".to_owned() } else { node.replace('.', "_") };
        self.bpf_dir.join(node)
    }
}

/// What happens to new connections without an agent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum OnAgentDeath {
    /// They are dropped until an agent is back.
    Closed,
    /// They are direct: the redirection ends with the agent.
    Open,
}

/// What becomes of a pod's UDP.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Udp {
    /// It is none of our business.
    Allow,
    /// It is dropped.
    Refuse,
}

/// What becomes of connections that are older than a pod's enrolment.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum OlderConnections {
    /// They stay.
    Keep,
    /// They end.
    Reset,
}

/// What policies mean to the node's own processes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum NodeProbes {
    /// Nothing.
    Allow,
    /// What they mean to anybody without an identity.
    Judge,
}

/// How connections reach the listeners.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum RedirectMode {
    /// Whichever can be had, `ebpf` first.
    Auto,
    /// tc programs in the pod's namespace.
    Ebpf,
    /// Rules in the pod's namespace, loaded by the program `nft`.
    Nftables,
    /// Not at all: the listeners are there, nothing is captured.
    None,
}

fn duration(s: &str) -> Result<Duration, String> {
    mesh_runtime::settings::parse_duration(s).map_err(|e| e.to_string())
}
