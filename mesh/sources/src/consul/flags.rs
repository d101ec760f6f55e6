//! Settings of Consul, the same for every program: its own environment variables, and a few flags.

use std::path::PathBuf;

use clap::Args;

use super::{Access, Metrics, Retry, Scope, Secret};

/// Settings of Consul.
#[derive(Args, Clone, Debug)]
#[group(id = "consul_settings")]
pub struct Flags {
    /// Consul describes the mesh: services and instances its catalog, everything else objects in its key-value store. The URL of
    /// an agent's HTTP API; without one `CONSUL_HTTP_ADDR`, else `http://127.0.0.1:8500`.
    #[arg(long, env = "CULVERT_CONSUL", value_name = "URL", num_args = 0..=1, default_missing_value = "")]
    pub consul: Option<String>,
    #[arg(long = "consul-http-addr", env = "CONSUL_HTTP_ADDR", hide = true)]
    consul_http_addr: Option<String>,
    /// File with our token for Consul, read for every request.
    #[arg(long, env = "CONSUL_HTTP_TOKEN_FILE", value_name = "FILE")]
    consul_token_file: Option<PathBuf>,
    /// Our token for Consul.
    #[arg(long, env = "CONSUL_HTTP_TOKEN", hide_env_values = true, value_name = "TOKEN")]
    consul_token: Option<String>,
    /// Whom to believe that it is Consul (PEM); needed for `https`.
    #[arg(long, env = "CONSUL_CACERT", value_name = "FILE")]
    consul_ca_file: Option<PathBuf>,
    /// Our certificate for Consul (PEM).
    #[arg(long, env = "CONSUL_CLIENT_CERT", value_name = "FILE", requires = "consul_client_key")]
    consul_client_cert: Option<PathBuf>,
    /// Its key (PEM).
    #[arg(long, env = "CONSUL_CLIENT_KEY", value_name = "FILE", requires = "consul_client_cert")]
    consul_client_key: Option<PathBuf>,
    /// Which of Consul's datacenters is read, if not the agent's own.
    #[arg(long, env = "CULVERT_CONSUL_DATACENTER", value_name = "NAME")]
    consul_datacenter: Option<String>,
    /// Below this key of Consul objects are written.
    #[arg(long, env = "CULVERT_CONSUL_PREFIX", value_name = "KEY", default_value = "culvert/")]
    consul_prefix: String,
    /// Domain of Consul's DNS.
    #[arg(long, env = "CULVERT_CONSUL_DOMAIN", value_name = "DOMAIN", default_value = "consul")]
    consul_domain: String,
    /// What Consul's intentions mean: `enforce` what they deny, with Consul's default where there is none, or `ignore` them.
    #[arg(long, env = "CULVERT_CONSUL_INTENTIONS", default_value = "enforce")]
    consul_intentions: IntentionMode,
    #[arg(long = "consul-http-ssl", env = "CONSUL_HTTP_SSL", hide = true)]
    consul_http_ssl: Option<String>,
    #[arg(long = "consul-http-ssl-verify", env = "CONSUL_HTTP_SSL_VERIFY", hide = true)]
    consul_http_ssl_verify: Option<String>,
    #[arg(long = "consul-http-auth", env = "CONSUL_HTTP_AUTH", hide = true, hide_env_values = true)]
    consul_http_auth: Option<String>,
    #[arg(long = "consul-namespace", env = "CONSUL_NAMESPACE", hide = true)]
    consul_namespace: Option<String>,
    #[arg(long = "consul-partition", env = "CONSUL_PARTITION", hide = true)]
    consul_partition: Option<String>,
}

/// What becomes of intentions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum IntentionMode {
    /// What they deny is denied.
    Enforce,
    /// They are not read.
    Ignore,
}

fn some(value: Option<&String>) -> Option<&str> {
    value.map(String::as_str).filter(|value| !value.is_empty())
}
fn is_true(value: &str) -> bool {
    matches!(value, "1" | "t" | "T" | "TRUE" | "true" | "True")
}

impl Flags {
    /// Whether Consul's own environment says where it is, which counts where nothing else describes the mesh.
    pub fn is_there(&self) -> bool {
        some(self.consul_http_addr.as_ref()).is_some()
    }

    /// What is read.
    ///
    /// # Errors
    /// A setting that is not understood, or that cannot be.
    pub fn scope(&self, metrics: Metrics) -> Result<Scope, String> {
        for (set, what) in [(&self.consul_namespace, "CONSUL_NAMESPACE"), (&self.consul_partition, "CONSUL_PARTITION")] {
            if some(set.as_ref()).is_some_and(|value| value != "default") {
                return Err(format!(
                    "{what}: namespaces and partitions of Consul are not understood; one mesh is in the default ones"
                ));
            }
        }
        if some(self.consul_http_ssl_verify.as_ref()).is_some_and(|value| !is_true(value)) {
            return Err(
                "CONSUL_HTTP_SSL_VERIFY: a Consul that proves nothing is not believed; name its roots in CONSUL_CACERT".into()
            );
        }
        if some(self.consul_http_auth.as_ref()).is_some() {
            return Err("CONSUL_HTTP_AUTH: passwords are not understood; use a token".into());
        }
        let prefix = self.consul_prefix.trim_matches('/');
        if prefix.is_empty() {
            return Err("--consul-prefix: objects are below a key of their own".into());
        }
        let url = some(self.consul.as_ref()).or_else(|| some(self.consul_http_addr.as_ref())).unwrap_or("http://127.0.0.1:8500");
        let tls = some(self.consul_http_ssl.as_ref()).is_some_and(is_true);
        let url = if url.contains("://") { url.to_owned() } else { format!("{}://{url}", if tls { "https" } else { "http" }) };
        let access = Access {
            url,
            token_file: self.consul_token_file.clone(),
            token: some(self.consul_token.as_ref()).map(|token| Secret(token.to_owned())),
            roots: self.consul_ca_file.clone(),
            certificate: self.consul_client_cert.clone().zip(self.consul_client_key.clone()),
        };
        access.check()?;
        Ok(Scope {
            access,
            prefix: format!("{prefix}/"),
            domain: self.consul_domain.trim_matches('.').to_owned(),
            datacenter: some(self.consul_datacenter.as_ref()).map(str::to_owned),
            intentions: self.consul_intentions == IntentionMode::Enforce,
            retry: Retry::default(),
            metrics,
        })
    }
}
