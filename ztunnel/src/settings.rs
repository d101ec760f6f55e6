//! Process settings: flags and environment, each documented where it is defined (`ztunnel proxy --help`).
//!
//! Order: default < environment < flag. Names follow Istio's node agent where it has the setting (node-agent §1.16), else
//! they start with `CULVERT_`.
use crate::access::AccessLog;
use crate::cni::Unreachable;
use crate::trace::TracingSettings;
use clap::Args;
use mesh_identity::crl_file::CrlFile;
use mesh_identity::crypto::Compliance;
use mesh_identity::federation::{Federated, Federation};
use mesh_identity::revocation::Unknown;
use mesh_model::snapshot::MissingWaypoint;
use mesh_runtime::control_plane::{Roots, Token};
use mesh_runtime::sockets::{Keepalive, StreamOptions};
use mesh_runtime::threads::{BadWorkerCount, cores, worker_count};
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Settings of `ztunnel proxy`.
#[derive(Args, Clone, Debug)]
pub struct Settings {
    /// What Istio's chart says this process is.
    #[arg(hide = true, value_parser = ["ztunnel"])]
    pub role: Option<String>,
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
    /// Or Consul does.
    #[command(flatten)]
    pub consul: mesh_sources::consul::Flags,
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
    /// Other trust domains that are believed, by SPIFFE federation: `DOMAIN=URL` of a bundle endpoint that proves itself as the web
    /// does (`https_web`), `DOMAIN=URL=SPIFFE-ID` of one that proves itself by a certificate with that id (`https_spiffe`).
    #[arg(long, env = "CULVERT_FEDERATION", value_delimiter = ',', value_name = "DOMAIN=URL")]
    pub federation: Vec<Federated>,
    /// Whom to believe that it is a bundle endpoint of the web: a PEM file, `SYSTEM`, or PEM.
    #[arg(long, env = "CULVERT_FEDERATION_ROOTS", default_value = "SYSTEM", value_name = "FILE")]
    pub federation_roots: Roots,
    /// Folder that keeps the last bundle of each federated domain (`DOMAIN.json`), which is what counts until it is fetched; the
    /// first one of a domain that proves itself by SPIFFE is put there by hand.
    #[arg(long, env = "CULVERT_FEDERATION_DIR", value_name = "DIR")]
    pub federation_dir: Option<PathBuf>,
    /// Rules that the cryptography must obey: `pqc` (no key exchange but X25519MLKEM768) or `fips-140-2` (a library's module for FIPS
    /// 140 and what is approved of it: a program built with `--features tls-fips`, else the start is refused).
    #[arg(long, env = "COMPLIANCE_POLICY", default_value = "", hide_default_value = true)]
    pub compliance: Compliance,
    /// DNS domain of Kubernetes services.
    #[arg(long, env = "CLUSTER_DOMAIN", default_value = "cluster.local")]
    pub cluster_domain: String,
    /// Name of this cluster, as istiod has it.
    #[arg(long, env = "CLUSTER_ID", default_value_t = cluster())]
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
    /// Listen and answer on IPv6 too.
    #[arg(long, env = "IPV6_ENABLED", default_value_t = true, action = clap::ArgAction::Set)]
    pub ipv6: bool,
    /// How many data threads there are.
    #[command(flatten)]
    pub workers: Workers,
    /// Lifetime of issued certificates.
    #[arg(long, env = "SECRET_TTL", default_value = "1h", value_parser = duration)]
    pub secret_ttl: Duration,
    /// How long connections may live on after SIGTERM. By itself 5 seconds less than the pod's grace period, or 5 seconds.
    #[arg(long, env = "CONNECTION_TERMINATION_DEADLINE", value_parser = duration)]
    pub termination_deadline: Option<Duration>,
    /// Seconds the kubelet waits before it kills this pod (`terminationGracePeriodSeconds`).
    #[arg(long, env = "TERMINATION_GRACE_PERIOD_SECONDS", value_name = "SECONDS")]
    pub grace_period: Option<u64>,
    /// TCP connect timeout, total per attempt.
    #[arg(long, env = "CULVERT_CONNECT_TIMEOUT", default_value = "10s", value_parser = duration)]
    pub connect_timeout: Duration,
    /// Limit for a TLS handshake, an HTTP/2 handshake and a CONNECT answer, each.
    #[arg(long, env = "CULVERT_HANDSHAKE_TIMEOUT", default_value = "10s", value_parser = duration)]
    pub handshake_timeout: Duration,
    /// How TCP notices that nobody is there any more.
    #[command(flatten)]
    pub tcp: Tcp,
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
    /// Log which policy allows a connection at level info instead of debug. (Who is refused is in the access log at any level.)
    #[arg(long, env = "AUTHZ_POLICY_INFO_LOGGING", default_value_t = false, action = clap::ArgAction::Set)]
    pub log_allowed: bool,
    /// Socket of Istio's CNI agent, which then says which pods are served, and whose rules redirect them. Without it the mesh
    /// says so (`istio.io/dataplane-mode`, `culvert.dev/netns`), and `--redirect` tells how.
    #[arg(long, env = "INPOD_UDS", value_name = "SOCKET", num_args = 0..=1, default_missing_value = ZDS)]
    pub zds: Option<PathBuf>,
    /// Istio's CNI agent says which pods are served, at its usual socket (`/var/run/ztunnel/ztunnel.sock`), where neither `--zds` nor
    /// `--enrol` says otherwise: as Istio's chart starts its node agent.
    #[arg(long, env = "INPOD_ENABLED", default_value_t = false, action = clap::ArgAction::Set)]
    pub inpod: bool,
    /// With `--zds`: bind the listeners in a pod so that another node agent may have them too, which is how istio/ztunnel is
    /// replaced without a gap (`SO_REUSEPORT`).
    #[arg(long, env = "INPOD_PORT_REUSE", default_value_t = true, action = clap::ArgAction::Set)]
    pub inpod_port_reuse: bool,
    /// Answer the DNS questions of pods that the mesh can answer, and pass on the others. Needs the program `nft` unless `--zds`.
    #[arg(long, env = "ISTIO_META_DNS_CAPTURE", default_value_t = true, action = clap::ArgAction::Set)]
    pub dns_capture: bool,
    /// Namespace whose service a name means where several have it, none of them the asking pod's own nor marked as canonical.
    #[arg(long, env = "PREFERED_SERVICE_NAMESPACE", default_value = "", hide_default_value = true)]
    pub preferred_namespace: String,
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
    /// Directory of the socket through which the next agent of this node takes the pods over. By itself that of the CNI agent's
    /// socket (`--zds`), which the node's agents share, else `/run/culvert`.
    #[arg(long, env = "CULVERT_RUN_DIR", value_name = "DIR")]
    pub run_dir: Option<PathBuf>,
    /// Whether pods are held back until they are captured.
    #[command(flatten)]
    pub cni: CniSettings,
    /// Which connections are told of, and what.
    #[command(flatten)]
    pub access_log: AccessLog,
    /// Which connections are told of as spans, and to whom.
    #[command(flatten)]
    pub tracing: TracingSettings,
    /// Where redirections are kept.
    #[command(flatten)]
    pub pins: Pins,
}

impl Settings {
    /// Where revocation lists are read, if they are.
    pub fn crl_file(&self) -> Option<CrlFile> {
        self.crl_path.clone().map(|path| CrlFile { path, unknown: self.crl_unknown })
    }
    /// Which other trust domains are asked for their roots, if any.
    pub fn federation(&self) -> Option<Federation> {
        (!self.federation.is_empty()).then(|| Federation {
            domains: self.federation.clone(),
            roots: self.federation_roots.clone(),
            keep: self.federation_dir.clone(),
            tls: self.compliance.into(),
        })
    }
    /// How long connections may live on after SIGTERM.
    pub fn deadline(&self) -> Duration {
        let grace = self.grace_period.map(|seconds| Duration::from_secs(seconds.saturating_sub(5)));
        self.termination_deadline.or(grace).unwrap_or(Duration::from_secs(5))
    }
    /// `addr`; without IPv6, all addresses are those of IPv4.
    pub fn face(&self, addr: SocketAddr) -> SocketAddr {
        let all = addr.ip() == Ipv6Addr::UNSPECIFIED;
        if all && !self.ipv6 { SocketAddr::new(Ipv4Addr::UNSPECIFIED.into(), addr.port()) } else { addr }
    }
}

/// Settings of TCP connections to applications and peers, and of those accepted.
#[derive(Args, Clone, Debug)]
pub struct Tcp {
    /// Ask whether the other side is still there.
    #[arg(long, env = "KEEPALIVE_ENABLED", default_value_t = true, action = clap::ArgAction::Set)]
    pub keepalive: bool,
    /// Silence before the first question.
    #[arg(long, env = "KEEPALIVE_TIME", default_value = "180s", value_parser = duration)]
    pub keepalive_time: Duration,
    /// Time between questions.
    #[arg(long, env = "KEEPALIVE_INTERVAL", default_value = "180s", value_parser = duration)]
    pub keepalive_interval: Duration,
    /// Questions without an answer after which the connection is dead.
    #[arg(long, env = "KEEPALIVE_RETRIES", default_value_t = 9)]
    pub keepalive_retries: u32,
    /// Data that was sent may stay unacknowledged no longer than all these questions take (TCP_USER_TIMEOUT).
    #[arg(long, env = "USER_TIMEOUT_ENABLED", default_value_t = false, action = clap::ArgAction::Set)]
    pub user_timeout: bool,
}

impl Tcp {
    /// For a socket.
    pub fn stream_options(&self) -> StreamOptions {
        let (time, interval, retries) = (self.keepalive_time, self.keepalive_interval, self.keepalive_retries);
        StreamOptions {
            keepalive: self.keepalive.then_some(Keepalive { time, interval, retries }),
            nodelay: true,
            user_timeout: self.user_timeout.then(|| time.saturating_add(interval.saturating_mul(retries))),
        }
    }
}

/// Settings of the data threads.
#[derive(Args, Clone, Debug)]
pub struct Workers {
    /// Data threads: a number, a percentage of the cores (`50%`), or 0 for all cores. By itself as many as the pod may use cores
    /// (its limit), else a quarter of the machine's, and no fewer than 2 or than it asks for.
    #[arg(long, env = "ZTUNNEL_WORKER_THREADS", value_name = "THREADS")]
    pub worker_threads: Option<String>,
    /// Cores of which a percentage or 0 counts, instead of those of the machine.
    #[arg(long, env = "ZTUNNEL_CPU_LIMIT", value_name = "CORES")]
    pub cores: Option<usize>,
    /// Cores the pod may use (`limits.cpu`: `2`, `500m`).
    #[arg(long, env = "ZTUNNEL_RESOURCE_CPU_LIMIT", value_name = "CORES", value_parser = whole_cores)]
    pub cpu_limit: Option<usize>,
    /// Cores the pod asks for (`requests.cpu`).
    #[arg(long, env = "ZTUNNEL_RESOURCE_CPU_REQUEST", value_name = "CORES", value_parser = whole_cores)]
    pub cpu_request: Option<usize>,
}

impl Workers {
    /// How many threads that is (node-agent §1.1).
    ///
    /// # Errors
    /// `worker_threads` is no such number.
    pub fn count(&self) -> Result<usize, BadWorkerCount> {
        let said = self.worker_threads.as_deref().filter(|text| !text.trim().is_empty());
        let asked = self.cpu_request.unwrap_or(0);
        match (said, self.cpu_limit) {
            (None, Some(limit)) => Ok(limit.max(asked).max(1)),
            _ => worker_count(said, self.cores.unwrap_or_else(cores)).map(|n| if said.is_none() { n.max(asked) } else { n }),
        }
    }
}

/// A quantity of Kubernetes (`1500m`, `1.5`, `2`) in whole cores, rounded up.
fn whole_cores(text: &str) -> Result<usize, String> {
    let (number, per) = text.strip_suffix('m').map_or((text, 1.0), |number| (number, 1000.0));
    let cores = number.parse::<f64>().ok().map(|n| (n / per).ceil());
    // More than any machine has is a typing error.
    cores.filter(|n| (0.0..=1024.0).contains(n)).map(|n| n as usize).ok_or_else(|| "not a quantity of cores (`2`, `500m`)".into())
}

/// Istio's own chart says the name of the cluster as node metadata.
fn cluster() -> String {
    std::env::var("ISTIO_META_CLUSTER_ID").ok().filter(|id| !id.is_empty()).unwrap_or_else(|| "Kubernetes".into())
}

/// Settings of the CNI plugin.
#[derive(Args, Clone, Debug)]
pub struct CniSettings {
    /// Hold every pod back until it is captured: a CNI plugin of ours is put on the node, chained behind the first of the network
    /// configurations in this folder (`/etc/cni/net.d` of the node) and kept there. For pods that Kubernetes enrols.
    #[arg(long, env = "CULVERT_CNI_CONF_DIR", value_name = "DIR", requires = "cni_bin_dir")]
    pub cni_conf_dir: Option<PathBuf>,
    /// Where the node's container runtime finds CNI plugins (`/opt/cni/bin` of the node).
    #[arg(long, env = "CULVERT_CNI_BIN_DIR", value_name = "DIR")]
    pub cni_bin_dir: Option<PathBuf>,
    /// What a pod meets that starts while no agent answers: `refuse` keeps it from starting until one does, `allow` lets it start, direct
    /// until it is enrolled. Namespaces that are never enrolled (`kube-system`, the root namespace) do not ask.
    #[arg(long, env = "CULVERT_CNI_UNREACHABLE", default_value = "refuse")]
    pub cni_unreachable: Unreachable,
    /// The DaemonSet whose agent this is. When it ends and the DaemonSet is gone or being deleted, it takes the plugin with it, without
    /// which pods of the node could not start any more. By itself the plugin stays (`ztunnel cleanup` removes it).
    #[arg(long, env = "CULVERT_CNI_DAEMON_SET", value_name = "NAMESPACE/NAME", value_parser = names, requires = "cni_conf_dir")]
    pub cni_daemon_set: Option<(String, String)>,
}

/// A namespace and a name in it.
fn names(text: &str) -> Result<(String, String), String> {
    let is_name = |part: &str| !part.is_empty() && part.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'.');
    let both = text.split_once('/').filter(|(namespace, name)| is_name(namespace) && is_name(name));
    both.map(|(namespace, name)| (namespace.to_owned(), name.to_owned())).ok_or_else(|| "not NAMESPACE/NAME".into())
}

/// Settings of the control plane.
#[derive(Args, Clone, Debug)]
pub struct ControlSettings {
    /// istiod describes the mesh: its address, `host:port` or `https://host:port` (or `http://` for plaintext). In a pod of Kubernetes where
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
    /// A pod is asked for by what is known of it (`k8s:ns`, `k8s:sa`, name, node, uid, labels, owners, containers and images); its entry must say
    /// `spiffe://<trust domain>/ns/<namespace>/sa/<account>`.
    #[arg(long, env = "CULVERT_SPIRE_ADMIN_SOCKET", value_name = "SOCKET", conflicts_with = "ca_address")]
    pub spire_admin_socket: Option<String>,
    /// istiod is asked only for what is needed: the pods of this node, and the destinations they call. The first connection to each
    /// waits for istiod's answer.
    #[arg(long, env = "XDS_ON_DEMAND", default_value_t = false, action = clap::ArgAction::Set)]
    pub xds_on_demand: bool,
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

/// Where Istio's CNI agent listens.
const ZDS: &str = "/var/run/ztunnel/ztunnel.sock";

impl Settings {
    /// These, with what `--inpod` stands for.
    #[must_use]
    pub fn spelled_out(mut self) -> Self {
        if self.inpod && self.enrol.is_none() {
            self.zds = self.zds.or_else(|| Some(ZDS.into()));
        }
        self
    }
    /// Where agents of this node meet.
    pub fn run_dir(&self) -> &Path {
        let by_cni = || self.zds.as_deref().and_then(Path::parent).filter(|dir| !dir.as_os_str().is_empty());
        self.run_dir.as_deref().or_else(by_cni).unwrap_or(Path::new("/run/culvert"))
    }
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

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Flags {
        #[command(flatten)]
        settings: Settings,
    }
    pub(crate) fn parse(args: &[&str]) -> Result<Settings, String> {
        let args = std::iter::once("ztunnel").chain(args.iter().copied());
        Flags::try_parse_from(args).map(|flags| flags.settings).map_err(|e| e.to_string())
    }

    #[test]
    fn threads_are_as_many_as_the_pod_may_use() {
        let count = |args: &[&str]| parse(args).map(|s| s.workers.count().unwrap());
        assert_eq!(count(&["--cpu-limit", "2500m"]), Ok(3));
        assert_eq!(count(&["--cpu-limit", "500m", "--cpu-request", "2"]), Ok(2));
        assert_eq!(count(&["--cores", "64"]), Ok(16));
        assert_eq!(count(&["--cores", "4", "--cpu-request", "3"]), Ok(3));
        assert_eq!(count(&["--cores", "64", "--worker-threads", "50%", "--cpu-limit", "1"]), Ok(32), "what is said wins");
        assert_eq!(count(&["--cores", "6", "--worker-threads", "0"]), Ok(6));
        for wrong in ["-1", "many", "1e9", "NaN", ""] {
            assert!(parse(&[&format!("--cpu-limit={wrong}")]).is_err(), "{wrong}");
        }
    }

    #[test]
    fn the_end_comes_before_the_kubelet_does() {
        let deadline = |args: &[&str]| parse(args).unwrap().deadline();
        assert_eq!(deadline(&[]), Duration::from_secs(5));
        assert_eq!(deadline(&["--grace-period", "30"]), Duration::from_secs(25));
        assert_eq!(deadline(&["--grace-period", "3"]), Duration::ZERO);
        assert_eq!(deadline(&["--grace-period", "30", "--termination-deadline", "2s"]), Duration::from_secs(2));
    }

    #[test]
    fn istio_s_own_arguments_are_understood() {
        assert!(parse(&["ztunnel"]).is_ok());
        assert!(parse(&["sidecar"]).is_err());
    }

    #[test]
    fn tcp_asks_as_it_is_told() {
        let options = |args: &[&str]| parse(args).unwrap().tcp.stream_options();
        assert_eq!(options(&[]), StreamOptions::default());
        assert_eq!(options(&["--keepalive", "false"]).keepalive, None);
        let args =
            ["--keepalive-time", "10s", "--keepalive-interval", "2s", "--keepalive-retries", "3", "--user-timeout", "true"];
        let told = options(&args);
        assert_eq!(
            told.keepalive.map(|k| (k.time, k.interval, k.retries)),
            Some((Duration::from_secs(10), Duration::from_secs(2), 3))
        );
        assert_eq!(told.user_timeout, Some(Duration::from_secs(16)));
    }

    #[test]
    fn without_ipv6_all_addresses_are_those_of_ipv4() {
        let all = "[::]:15020".parse().unwrap();
        assert_eq!(parse(&[]).unwrap().face(all), all);
        let s = parse(&["--ipv6", "false"]).unwrap();
        assert_eq!(s.face(all), "0.0.0.0:15020".parse().unwrap());
        assert_eq!(s.face("127.0.0.1:15000".parse().unwrap()), "127.0.0.1:15000".parse().unwrap());
    }

    #[test]
    fn istios_chart_means_istios_cni_agent() {
        let socket = |args: &[&str]| parse(args).unwrap().spelled_out().zds;
        assert_eq!(socket(&["--inpod", "true"]), Some("/var/run/ztunnel/ztunnel.sock".into()));
        assert_eq!(socket(&["--inpod", "true", "--zds", "/a"]), Some("/a".into()));
        assert_eq!(socket(&["--inpod", "true", "--enrol", "mesh"]), None);
        assert_eq!(socket(&[]), None);
    }
}
