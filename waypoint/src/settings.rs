//! Process settings: flags and environment, each documented where it is defined (`waypoint proxy --help`).
//!
//! Order: default < environment < flag. Names follow Istio's proxies where they have the setting, else they start with
//! `CULVERT_`.
use clap::Args;
use mesh_identity::crl_file::CrlFile;
use mesh_identity::crypto::Compliance;
use mesh_identity::federation::{Federated, Federation};
use mesh_identity::revocation::Unknown;
use mesh_model::l7::path::PathNormalization;
use mesh_runtime::control_plane::{Roots, Token};
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

/// Settings of `waypoint proxy`.
#[derive(Args, Clone, Debug)]
pub struct Settings {
    /// Folder of Kubernetes, Istio and Gateway API YAML that describes the mesh; watched for changes.
    #[arg(long, env = "CULVERT_MESH_DIR", value_name = "DIR")]
    pub mesh_dir: Option<PathBuf>,
    /// Read the mesh from the Kubernetes API instead, as the service account of this pod or as `--kubeconfig` says. Secrets and
    /// ConfigMaps are read in this pod's namespace only, but for MeshConfig.
    #[arg(long, env = "CULVERT_KUBERNETES", conflicts_with = "mesh_dir")]
    pub kubernetes: bool,
    /// Kubeconfig file, of which the current context is used, for processes outside a pod.
    #[arg(long, env = "KUBECONFIG", value_name = "FILE")]
    pub kubeconfig: Option<PathBuf>,
    /// Or Consul does.
    #[command(flatten)]
    pub consul: mesh_sources::consul::Flags,
    /// A control plane tells a part of it, and issues certificates.
    #[command(flatten)]
    pub control: ControlSettings,
    /// Namespace of this pod.
    #[arg(long, env = "POD_NAMESPACE", default_value = "default")]
    pub namespace: String,
    /// Name of this pod; with its namespace it says which workload of the mesh this process is.
    #[arg(long, env = "POD_NAME", default_value = "")]
    pub pod: String,
    /// Address of this pod, when its name does not say which workload it is.
    #[arg(long, env = "INSTANCE_IP")]
    pub instance_ip: Option<IpAddr>,
    /// Serve tunnels from other networks, as a Gateway of the class `istio-east-west` does: to the services that are for them (label
    /// `istio.io/global: "true"`), and to nothing else.
    #[arg(long, env = "CULVERT_EAST_WEST")]
    pub east_west: bool,
    /// Name of the Gateway object this process serves, in its own namespace: its listeners other than HBONE are listened on.
    #[arg(long, env = "GATEWAY", default_value = "")]
    pub gateway: String,
    /// Service account whose identity this process has.
    #[arg(long, env = "SERVICE_ACCOUNT", default_value = "default")]
    pub service_account: String,
    /// Directory of the built-in development CA, which issues certificates where no other authority is named; created when
    /// absent.
    #[arg(long, env = "CULVERT_CA_DIR", default_value = "/var/lib/culvert/ca", value_name = "DIR")]
    pub ca_dir: PathBuf,
    /// Somebody else issues the certificate, and puts it here: `tls.crt`, `tls.key` and `ca.crt` (PEM), as cert-manager and its CSI driver
    /// do. Looked at every second; it must be for this pod's service account. Wins over every authority.
    #[arg(long, env = "CULVERT_CERTIFICATE_DIR", value_name = "DIR")]
    pub certificate_dir: Option<PathBuf>,
    /// SPIRE issues the certificate: the socket of the SPIFFE Workload API, `unix:///path`. By itself Istio's,
    /// `/var/run/secrets/workload-spiffe-uds/socket`, where there is one; empty: not SPIRE.
    #[arg(long, env = "SPIFFE_ENDPOINT_SOCKET", value_name = "SOCKET")]
    pub spiffe_socket: Option<String>,
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
    /// Name of this cluster.
    #[arg(long, env = "CLUSTER_ID", default_value = "Kubernetes")]
    pub cluster_id: String,
    /// Network of this pod; empty for the default network.
    #[arg(long, env = "NETWORK", default_value = "")]
    pub network: String,
    /// Node this pod runs on: where locality preferences count from.
    #[arg(long, env = "NODE_NAME", default_value = "")]
    pub node: String,
    /// Istio's root namespace.
    #[arg(long, env = "CULVERT_ROOT_NAMESPACE", default_value = "istio-system")]
    pub root_namespace: String,
    /// Address tunnels of node agents arrive at.
    #[arg(long, env = "CULVERT_HBONE_ADDR", default_value = "[::]:15008")]
    pub hbone_addr: SocketAddr,
    /// IP address the Gateway's own listeners are bound to.
    #[arg(long, env = "CULVERT_LISTEN_IP", default_value = "::")]
    pub listen_ip: IpAddr,
    /// Address of the admin server (`/config_dump`, `/clusters`, `/listeners`, `/streams`, `/logging`, `/stats/prometheus`).
    #[arg(long, env = "CULVERT_ADMIN_ADDR", default_value = "127.0.0.1:15000")]
    pub admin_addr: SocketAddr,
    /// Address of the metrics server (`/metrics`, `/stats/prometheus`).
    #[arg(long, env = "CULVERT_STATS_ADDR", default_value = "[::]:15020")]
    pub stats_addr: SocketAddr,
    /// Where Envoy would show its own metrics (`/stats/prometheus`): the same page once more, for scrape jobs that know no
    /// other port.
    #[arg(long, env = "CULVERT_ENVOY_STATS_ADDR", default_value = "[::]:15090")]
    pub envoy_stats_addr: SocketAddr,
    /// Address of the readiness server (`/healthz/ready`).
    #[arg(long, env = "CULVERT_READINESS_ADDR", default_value = "[::]:15021")]
    pub readiness_addr: SocketAddr,
    /// Data threads: a number, a percentage of the cores (`50%`), or 0 for all cores.
    #[arg(long, env = "CULVERT_WORKER_THREADS")]
    pub worker_threads: Option<String>,
    /// Lifetime of issued certificates.
    #[arg(long, env = "SECRET_TTL", default_value = "1h", value_parser = duration)]
    pub secret_ttl: Duration,
    /// How long requests and connections may live on after SIGTERM.
    #[arg(long, env = "TERMINATION_DRAIN_DURATION", default_value = "5s", value_parser = duration)]
    pub termination_deadline: Duration,
    /// TCP connect timeout where no DestinationRule says otherwise.
    #[arg(long, env = "CULVERT_CONNECT_TIMEOUT", default_value = "10s", value_parser = duration)]
    pub connect_timeout: Duration,
    /// Limit for a TLS handshake, an HTTP/2 handshake and a CONNECT answer, each.
    #[arg(long, env = "CULVERT_HANDSHAKE_TIMEOUT", default_value = "10s", value_parser = duration)]
    pub handshake_timeout: Duration,
    /// Handshakes in progress at once.
    #[arg(long, env = "CULVERT_MAX_HANDSHAKES", default_value_t = 512)]
    pub max_handshakes: usize,
    /// How long a connection whose protocol nobody declared is watched for the client's first bytes before the endpoint is
    /// connected, so that a protocol in which the server speaks first does not stall.
    #[arg(long, env = "CULVERT_PROTOCOL_SNIFF_TIMEOUT", default_value = "100ms", value_parser = duration)]
    pub sniff_timeout: Duration,
    /// How long an HTTP connection from a client may be without a request; 0 for no limit.
    #[arg(long, env = "CULVERT_HTTP_IDLE_TIMEOUT", default_value = "1h", value_parser = duration)]
    pub http_idle_timeout: Duration,
    /// Limit for the head of an HTTP/1 request to arrive in whole once it has begun; 0 for none.
    #[arg(long, env = "CULVERT_REQUEST_HEADERS_TIMEOUT", default_value = "10s", value_parser = duration)]
    pub headers_timeout: Duration,
    /// Idle limit of TCP connections; 0 (the default) for none.
    #[arg(long, env = "CULVERT_TCP_IDLE_TIMEOUT", default_value = "0s", value_parser = duration)]
    pub tcp_idle_timeout: Duration,
    /// How long a connection of which one direction has ended may be silent before it is given up; 0 for no limit.
    #[arg(long, env = "CULVERT_HALF_CLOSED_TIMEOUT", default_value = "1h", value_parser = duration)]
    pub half_closed_timeout: Duration,
    /// Streams at once one node agent's tunnel may have open.
    #[arg(long, env = "CULVERT_MAX_STREAMS", default_value_t = 10_000)]
    pub max_streams: u32,
    /// Streams in one tunnel to an endpoint's agent before another is opened.
    #[arg(long, env = "POOL_MAX_STREAMS_PER_CONNECTION", default_value_t = 100)]
    pub pool_max_streams: usize,
    /// How long an unused tunnel is kept.
    #[arg(long, env = "POOL_UNUSED_RELEASE_TIMEOUT", default_value = "5m", value_parser = duration)]
    pub pool_unused_release: Duration,
    /// Bytes that grown windows may hold in this process, all tunnels together.
    #[arg(long, env = "CULVERT_WINDOW_BUDGET", default_value_t = 64 * 1024 * 1024)]
    pub window_budget: usize,
    /// Most bytes of a request body that are kept to send it again; a larger one is not retried.
    #[arg(long, env = "CULVERT_RETRY_BUFFER", default_value_t = 64 * 1024)]
    pub retry_buffer: usize,
    /// Append the client's address to `x-forwarded-for`.
    #[arg(long, env = "CULVERT_FORWARD_CLIENT_ADDRESS", default_value_t = true, action = clap::ArgAction::Set)]
    pub forward_client_address: bool,
    /// Proxies between clients and this one that are trusted to append to `x-forwarded-for` (Istio's `numTrustedProxies`): what
    /// policies call the remote address is that many entries from the right. 0: whoever connected.
    #[arg(long = "num-trusted-proxies", env = "CULVERT_NUM_TRUSTED_PROXIES", default_value_t = 0)]
    pub trusted_proxies: usize,
    /// Tell the endpoint the client's identity in `x-forwarded-client-cert` (upstream: annotation
    /// `ambient.istio.io/xfcc-include-client-identity`). What the client sent under that name is removed either way.
    #[arg(long, env = "CULVERT_FORWARD_CLIENT_IDENTITY", default_value_t = false, action = clap::ArgAction::Set)]
    pub forward_client_identity: bool,
    /// Path normalisation before routing and policy: `none`, `base`, `merge-slashes` or `decode-and-merge-slashes`. Left out: what
    /// MeshConfig says (`pathNormalization`), else `base`.
    #[arg(long, env = "CULVERT_PATH_NORMALIZATION")]
    pub path_normalization: Option<PathNormalization>,
    /// Time between two fetches of the same JWKS; a token with an unknown key id is reason for one in between.
    #[arg(long = "jwks-refresh-interval", env = "PILOT_JWT_PUB_KEY_REFRESH_INTERVAL", default_value = "20m", value_parser = duration)]
    pub jwks_refresh: Duration,
    /// Write the access log.
    #[arg(long, env = "CULVERT_ACCESS_LOG", default_value_t = true, action = clap::ArgAction::Set)]
    pub access_log: bool,
    /// Levels of the log, such as `info` or `info,upstream=debug`.
    #[arg(long, env = "RUST_LOG", value_name = "LEVELS")]
    pub log_levels: Option<String>,
    /// Format of the log: `plain` or `json`.
    #[arg(long, env = "LOG_FORMAT", value_name = "FORMAT")]
    pub log_format: Option<String>,
    /// What was asked for on Istio's own command line and has no effect here.
    #[arg(skip)]
    pub notes: Vec<String>,
}

/// Settings of the control plane.
#[derive(Args, Clone, Debug)]
pub struct ControlSettings {
    /// istiod tells services, workloads and policies of layer 4, the Kubernetes API everything else: istiod's address,
    /// `https://host:port` (or `http://` for plaintext).
    #[arg(long, env = "XDS_ADDRESS", value_name = "URL", conflicts_with = "mesh_dir")]
    pub xds_address: Option<String>,
    /// Whom to believe that it is istiod: a PEM file (read at every connection), `SYSTEM`, or the PEM itself.
    #[arg(long, env = "XDS_ROOT_CA", default_value = "./var/run/secrets/istio/root-cert.pem", value_name = "ROOTS")]
    pub xds_root_ca: Roots,
    /// A second name istiod's certificate may have.
    #[arg(long, env = "ALT_XDS_HOSTNAME", value_name = "HOST")]
    pub alt_xds_hostname: Option<String>,
    /// istiod issues the certificate: its address. By itself where it tells a part of the mesh; empty: the built-in development
    /// CA does.
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
}

fn duration(s: &str) -> Result<Duration, String> {
    mesh_runtime::settings::parse_duration(s).map_err(|e| e.to_string())
}
