//! The command line and environment Istio starts its own waypoints and gateways with, in this program's words.
//!
//! `proxy waypoint --domain … PROXY_CONFIG=…` (istiod's templates, 1.31) becomes our flags, so that a Deployment made by istiod
//! needs another image only. What means the same is taken over; what has no meaning here is told in the log; what would change
//! who is believed or who we are, and cannot be done, ends the start. Our own variables win over what is translated.
//! Pure. Upstream: `main`. Downstream: [`crate::Settings`].
use serde_json::Value;
use std::collections::BTreeMap;

/// Where Kubernetes writes the labels of the pod (volume `istio-podinfo`).
pub const LABELS: &str = "./etc/istio/pod/labels";
/// istiod, where nobody says otherwise.
const ISTIOD: &str = "istiod.istio-system.svc:15012";
const GATEWAY_NAME: &str = "gateway.networking.k8s.io/gateway-name";
/// Which of istiod's controllers made the pod, and the one of gateways between networks.
const MANAGED: &str = "gateway.istio.io/managed";
const EAST_WEST: &str = "istio.io-eastwest-controller";

/// A stock command line, understood.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Translated {
    /// Our flags.
    pub flags: Vec<String>,
    /// What has no effect, each with the reason.
    pub notes: Vec<String>,
}

/// Why a process started like this would not be what its Deployment asks for.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{what}: {why}")]
pub struct Refused {
    /// Argument or variable.
    pub what: String,
    /// Reason, and what to do.
    pub why: &'static str,
}

fn refused(what: &str, why: &'static str) -> Refused {
    Refused { what: what.to_owned(), why }
}

/// Arguments that mean nothing here.
const NO_EFFECT: &[(&str, &str)] = &[
    ("serviceCluster", "names Envoy's own cluster; here the Gateway and the service account name the process"),
    ("proxyComponentLogLevel", "names components of Envoy; RUST_LOG has ours"),
    ("outlierLogPath", "ejections are in the metrics and in /clusters, not in a file"),
    ("meshConfig", "MeshConfig is read from its ConfigMap"),
    ("profiling", "the admin page always has a profiler"),
    ("log_caller", "lines have no callers"),
    ("log_stacktrace_level", "lines have no stacks"),
    ("log_target", "the log goes to standard output"),
    ("vklog", "it is of Istio's agent"),
];
/// Arguments that change what the process is.
const REFUSED: &[(&str, &str)] = &[
    ("stsPort", "there is no token service in this process: leave it out"),
    ("tokenManagerPlugin", "there is no token service in this process: leave it out"),
    ("templateFile", "there is no bootstrap of Envoy to make: leave it out"),
];
/// Variables of Istio's agent that change who is believed or how identities are had, with the values that ask for what is
/// done here anyway.
const VARIABLES: &[(&str, &[&str], &str)] = &[
    ("CA_PROVIDER", &["", "Citadel"], "only istiod's certificate API is spoken"),
    ("FILE_MOUNTED_CERTS", &["", "false"], "name their folder by CULVERT_CERTIFICATE_DIR instead"),
    ("PROV_CERT", &[""], "istiod is asked with the pod's token, not with a certificate"),
    ("OUTPUT_CERTS", &[""], "keys are not written to files"),
    ("JWT_POLICY", &["", "third-party-jwt"], "the token of istiod's audience is used, not the pod's own"),
    ("XDS_AUTH_PROVIDER", &[""], "istiod is asked with the pod's token"),
    ("CREDENTIAL_FETCHER_TYPE", &["", "JWT"], "istiod is asked with the pod's token"),
    ("ISTIO_META_CERT_SIGNER", &[""], "signers of Kubernetes are not asked"),
];
/// The same for settings without consequences for trust.
const QUIET_VARIABLES: &[(&str, &[&str], &str)] = &[
    (
        "PILOT_CERT_PROVIDER",
        &["", "istiod"],
        "roots are read from ./var/run/secrets/istio/root-cert.pem, or where CA_ROOT_CA says",
    ),
    ("SECRET_GRACE_PERIOD_RATIO", &["", "0.5"], "certificates are renewed before half of their life is over"),
    ("WORKLOAD_RSA_KEY_SIZE", &["", "2048"], "keys are P-256"),
    ("ECC_SIGNATURE_ALGORITHM", &["", "ECDSA"], "keys are P-256"),
    ("ECC_CURVE", &["", "P256"], "keys are P-256"),
    ("PKCS8_KEY", &["", "false", "true"], "keys do not leave the process"),
    ("EXIT_ON_ZERO_ACTIVE_CONNECTIONS", &["", "true"], "a drain ends with the last connection, or at its limit"),
    ("MINIMUM_DRAIN_DURATION", &["", "0s"], "a drain ends with the last connection, or at its limit"),
    ("ISTIO_META_DNS_CAPTURE", &["", "false"], "nothing of this pod is captured"),
    ("DISABLE_ENVOY", &["", "false"], "there is none"),
    ("ENVOY_STATUS_PORT", &["", "15021"], "CULVERT_READINESS_ADDR says where readiness is told"),
    ("ENVOY_PROMETHEUS_PORT", &["", "15090"], "CULVERT_ENVOY_STATS_ADDR says where metrics are shown"),
];
/// Fields of PROXY_CONFIG that mean nothing here; the rest is read by [`Words::proxy_config`].
const CONFIG_NO_EFFECT: &[(&str, &str)] = &[
    ("proxyMetadata", ""),
    ("image", ""),
    ("holdApplicationUntilProxyStarts", ""),
    ("configPath", ""),
    ("binaryPath", ""),
    ("serviceCluster", ""),
    ("statNameLength", ""),
    ("controlPlaneAuthPolicy", ""),
    ("drainDuration", "connections end with terminationDrainDuration"),
    ("tracing", "the Telemetry API and MeshConfig say what is traced"),
    ("proxyStatsMatcher", "the Telemetry API says which metrics there are"),
    ("extraStatTags", "the Telemetry API says which labels there are"),
    ("proxyHeaders", "headers are Envoy's by default"),
    ("envoyAccessLogService", "access logs go to standard output, as MeshConfig says"),
    ("envoyMetricsService", "metrics are scraped"),
    ("readinessProbe", "it is of sidecars"),
    ("runtimeValues", "they are of Envoy"),
];
/// Fields that change how identities are had.
const CONFIG_REFUSED: &[(&str, &str)] = &[
    ("privateKeyProvider", "keys are made in this process and do not leave it"),
    ("caCertificatesPem", "roots come with the certificates of the authority"),
];

/// Our flags for the arguments after `proxy`, when they are Istio's (`waypoint` or `router` comes first); `None` otherwise.
/// `labels`: the content of [`LABELS`].
pub fn translate(
    arguments: &[String],
    environment: &BTreeMap<String, String>,
    labels: Option<&str>,
) -> Result<Option<Translated>, Refused> {
    let Some(("waypoint" | "router", rest)) = arguments.split_first().map(|(first, rest)| (first.as_str(), rest)) else {
        return Ok(None);
    };
    let mut words = Words { environment, out: Translated::default(), level: None };
    words.arguments(rest)?;
    words.variables()?;
    let address = words.proxy_config()?.unwrap_or_else(|| ISTIOD.to_owned());
    if let Some(namespace) = namespace(&address) {
        words.flag("--root-namespace", "CULVERT_ROOT_NAMESPACE", Some(namespace));
    }
    words.flag("--kubernetes", "CULVERT_KUBERNETES", None);
    words.flag("--xds-address", "XDS_ADDRESS", Some(&address));
    if let Some(ca) = environment.get("CA_ADDR").filter(|ca| !ca.is_empty()) {
        words.flag("--ca-address", "CA_ADDRESS", Some(ca));
    }
    let given = [
        ("--node", "NODE_NAME", "ISTIO_META_NODE_NAME"),
        ("--cluster-id", "CLUSTER_ID", "ISTIO_META_CLUSTER_ID"),
        ("--network", "NETWORK", "ISTIO_META_NETWORK"),
        ("--service-account", "SERVICE_ACCOUNT", "ISTIO_META_SERVICE_ACCOUNT"),
        ("--alt-xds-hostname", "ALT_XDS_HOSTNAME", "ISTIOD_SAN"),
        ("--alt-ca-hostname", "ALT_CA_HOSTNAME", "ISTIOD_SAN"),
        ("--worker-threads", "CULVERT_WORKER_THREADS", "ISTIO_CPU_LIMIT"),
    ];
    for (flag, ours, theirs) in given {
        if let Some(value) = environment.get(theirs).filter(|value| !value.is_empty() && !words.has(flag)) {
            words.flag(flag, ours, Some(value));
        }
    }
    match labels.and_then(|text| label(text, GATEWAY_NAME)) {
        Some(name) => words.flag("--gateway", "GATEWAY", Some(&name)),
        None if environment.contains_key("GATEWAY") => {}
        None => return Err(refused(LABELS, "it does not say which Gateway this pod is of; set GATEWAY")),
    }
    if labels.and_then(|text| label(text, MANAGED)).is_some_and(|by| by == EAST_WEST) {
        words.flag("--east-west", "CULVERT_EAST_WEST", None);
    }
    if let Some(level) = words.level {
        words.flag("--log-levels", "RUST_LOG", Some(level));
    }
    Ok(Some(words.out))
}

/// The translation under way.
struct Words<'a> {
    environment: &'a BTreeMap<String, String>,
    out: Translated,
    /// The most verbose level asked for.
    level: Option<&'static str>,
}

impl Words<'_> {
    /// Adds a flag unless our own variable says it.
    fn flag(&mut self, flag: &str, variable: &str, value: Option<&str>) {
        if !self.environment.contains_key(variable) {
            self.out.flags.push(flag.to_owned());
            self.out.flags.extend(value.map(ToOwned::to_owned));
        }
    }
    fn has(&self, flag: &str) -> bool {
        self.out.flags.iter().any(|had| had == flag)
    }
    fn note(&mut self, what: &str, why: &str) {
        self.out.notes.push(format!("{what}: {why}"));
    }

    fn arguments(&mut self, arguments: &[String]) -> Result<(), Refused> {
        let mut rest = arguments.iter();
        while let Some(argument) = rest.next() {
            let name =
                argument.strip_prefix("--").ok_or_else(|| refused(argument, "it is not an argument of Istio's proxies"))?;
            let (name, attached) = name.split_once('=').map_or((name, None), |(name, value)| (name, Some(value.to_owned())));
            if name == "log_as_json" {
                if attached.is_none_or(|value| value != "false") {
                    self.flag("--log-format", "LOG_FORMAT", Some("json"));
                }
                continue;
            }
            if matches!(name, "profiling" | "log_caller" | "vklog") && attached.is_none() {
                continue;
            }
            let value = match attached {
                Some(value) => value,
                None => rest.next().cloned().ok_or_else(|| refused(argument, "its value is missing"))?,
            };
            self.argument(argument, name, &value)?;
        }
        Ok(())
    }

    fn argument(&mut self, argument: &str, name: &str, value: &str) -> Result<(), Refused> {
        let told = |table: &[(&str, &'static str)]| table.iter().find(|(known, _)| *known == name).map(|(_, why)| *why);
        match name {
            "domain" => {
                let (_, domain) = value
                    .split_once(".svc.")
                    .filter(|(_, domain)| !domain.is_empty())
                    .ok_or_else(|| refused(argument, "it is `<namespace>.svc.<domain of the cluster>`"))?;
                self.flag("--cluster-domain", "CLUSTER_DOMAIN", Some(domain));
            }
            "concurrency" => self.flag("--worker-threads", "CULVERT_WORKER_THREADS", Some(value)),
            "proxyLogLevel" => self.raise(level(value).ok_or_else(|| refused(argument, "it is no level of Envoy"))?),
            "log_output_level" => {
                for scope in value.split(',') {
                    match scope.split_once(':') {
                        None => self.raise(level(scope).ok_or_else(|| refused(argument, "it is no level of Istio's agent"))?),
                        Some(("default" | "all", of)) => {
                            self.raise(level(of).ok_or_else(|| refused(argument, "it is no level of Istio's agent"))?);
                        }
                        Some(_) => self.note(scope, "a scope of Istio's agent; RUST_LOG has ours"),
                    }
                }
            }
            _ => match (told(NO_EFFECT), told(REFUSED)) {
                (Some(why), _) if !value.is_empty() => self.note(argument, why),
                (_, Some(why)) if !matches!(value, "" | "0") => return Err(refused(argument, why)),
                (Some(_), _) | (_, Some(_)) => {}
                (None, None) => return Err(refused(argument, "it is not known here; the image of Istio's proxy may know it")),
            },
        }
        Ok(())
    }

    /// Both of Istio's programs write one log here, so the more verbose of their levels holds.
    fn raise(&mut self, level: &'static str) {
        let rank = |level| ["off", "error", "warn", "info", "debug", "trace"].iter().position(|l| *l == level);
        if self.level.is_none_or(|had| rank(had) < rank(level)) {
            self.level = Some(level);
        }
    }

    fn variables(&mut self) -> Result<(), Refused> {
        let other = |name: &str, fine: &[&str]| self.environment.get(name).is_some_and(|value| !fine.contains(&value.as_str()));
        for (name, fine, why) in VARIABLES {
            if other(name, fine) {
                return Err(refused(name, why));
            }
        }
        for (name, fine, why) in QUIET_VARIABLES {
            if other(name, fine) {
                self.note(name, why);
            }
        }
        Ok(())
    }

    /// Reads PROXY_CONFIG; the address of istiod in it.
    fn proxy_config(&mut self) -> Result<Option<String>, Refused> {
        let Some(text) = self.environment.get("PROXY_CONFIG").map(|text| text.trim()).filter(|text| !text.is_empty()) else {
            return Ok(None);
        };
        let config: serde_json::Map<String, Value> =
            serde_json::from_str(text).map_err(|_| refused("PROXY_CONFIG", "it is not the JSON istiod writes"))?;
        let mut address = None;
        for (name, value) in &config {
            let what = format!("PROXY_CONFIG {name}");
            let number = || value.as_u64().map(|n| n.to_string()).ok_or_else(|| refused(&what, "it is not a number"));
            let told = |table: &[(&str, &'static str)]| table.iter().find(|(known, _)| *known == name).map(|(_, why)| *why);
            match name.as_str() {
                "discoveryAddress" => address = value.as_str().filter(|text| !text.is_empty()).map(ToOwned::to_owned),
                "terminationDrainDuration" => {
                    let text = value.as_str().ok_or_else(|| refused(&what, "it is not a duration"))?;
                    self.flag("--termination-deadline", "TERMINATION_DRAIN_DURATION", Some(text));
                }
                "concurrency" if !self.has("--worker-threads") => {
                    self.flag("--worker-threads", "CULVERT_WORKER_THREADS", Some(&number()?));
                }
                "concurrency" => {}
                "proxyAdminPort" => {
                    self.flag("--admin-addr", "CULVERT_ADMIN_ADDR", Some(&format!("127.0.0.1:{}", number()?)));
                }
                "statusPort" => self.flag("--stats-addr", "CULVERT_STATS_ADDR", Some(&format!("[::]:{}", number()?))),
                "gatewayTopology" => self.topology(value)?,
                _ => match (told(CONFIG_NO_EFFECT), told(CONFIG_REFUSED)) {
                    (Some(""), _) => {}
                    (Some(why), _) => self.note(&what, why),
                    (_, Some(why)) => return Err(refused(&what, why)),
                    (None, None) => self.note(&what, "it is not known here"),
                },
            }
        }
        Ok(address)
    }

    fn topology(&mut self, topology: &Value) -> Result<(), Refused> {
        for (name, value) in topology.as_object().into_iter().flatten() {
            let what = format!("PROXY_CONFIG gatewayTopology.{name}");
            match name.as_str() {
                "numTrustedProxies" => {
                    let count = value.as_u64().ok_or_else(|| refused(&what, "it is not a number"))?;
                    self.flag("--num-trusted-proxies", "CULVERT_NUM_TRUSTED_PROXIES", Some(&count.to_string()));
                }
                "proxyProtocol" => return Err(refused(&what, "listeners do not read PROXY headers: leave it out")),
                _ => self.note(&what, "x-forwarded-client-cert is as CULVERT_FORWARD_CLIENT_IDENTITY says"),
            }
        }
        Ok(())
    }
}

/// Our word for a level of Envoy or of Istio's agent.
fn level(text: &str) -> Option<&'static str> {
    Some(match text {
        "trace" => "trace",
        "debug" => "debug",
        "info" | "" => "info",
        "warning" | "warn" => "warn",
        "error" | "critical" | "fatal" => "error",
        "off" | "none" => "off",
        _ => return None,
    })
}

/// istiod's namespace, by its address: the root namespace, unless MeshConfig makes it another.
fn namespace(address: &str) -> Option<&str> {
    let mut parts = address.split([':', '.']);
    let (_, namespace, svc) = (parts.next()?, parts.next()?, parts.next()?);
    (svc == "svc").then_some(namespace)
}

/// The value of a label in a file of the downward API (`key="value"`, the value as Go quotes it).
fn label(text: &str, wanted: &str) -> Option<String> {
    let quoted = text.lines().find_map(|line| line.strip_prefix(wanted)?.strip_prefix('='))?;
    // Values of labels need no escapes.
    let value = quoted.strip_prefix('"')?.strip_suffix('"')?;
    (!value.is_empty()).then(|| value.to_owned())
}

#[cfg(test)]
mod tests;
