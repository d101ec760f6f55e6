//! The environment variables of istio/ztunnel (node-agent §1.16), each of them: which setting of ours it is, or why not.
//!
//! Owns the table that everything about them follows from: what a start refuses or warns of ([`check`]), and `ENVIRONMENT.md`
//! ([`page`]). What a flag means and is by default is written once, at the flag. Unknown variables are nobody's business.
//! Upstream: the process's environment. Downstream: `app`.
use clap::{Arg, ArgAction, Args as _, Command};
use std::fmt::Write as _;

/// What becomes of a variable.
#[derive(Clone, Copy, Debug)]
pub enum Effect {
    /// It is this flag's.
    Flag(&'static str),
    /// It is read where it is needed: what it means, and what holds without it.
    Read(&'static str, &'static str),
    /// Any other value than these ends the start.
    Refused(&'static [&'static str], &'static str),
}
use Effect::{Flag, Read, Refused};

/// Every variable of istio/ztunnel. A name that ends with `*` is a prefix.
pub const VARIABLES: &[(&str, Effect)] = &[
    // Who we are.
    ("NODE_NAME", Flag("node")),
    ("CLUSTER_ID", Flag("cluster-id")),
    ("ISTIO_META_CLUSTER_ID", Read("name of this cluster, where `CLUSTER_ID` is not there; and node metadata", "")),
    ("CLUSTER_DOMAIN", Flag("cluster-domain")),
    ("NETWORK", Flag("network")),
    ("TRUST_DOMAIN", Flag("trust-domain")),
    ("POD_NAME", Read("the agent's pod, in its node id and identity", "")),
    ("POD_NAMESPACE", Read("its namespace, in both", "")),
    ("INSTANCE_IP", Read("its address, in the node id", "1.1.1.1")),
    (
        "SERVICE_ACCOUNT",
        Read("its account: with both of the above its metrics are served over HBONE too, to whom policies allow it", ""),
    ),
    ("ISTIO_META_*", Read("node metadata", "")),
    ("ISTIO_METAJSON_*", Read("node metadata, as JSON", "")),
    // What describes the mesh.
    ("XDS_ADDRESS", Flag("xds-address")),
    ("XDS_ROOT_CA", Flag("xds-root-ca")),
    ("ALT_XDS_HOSTNAME", Flag("alt-xds-hostname")),
    ("XDS_HEADER_*", Read("headers of the requests to istiod", "")),
    ("XDS_ON_DEMAND", Flag("xds-on-demand")),
    ("LOCAL_XDS_PATH", Flag("local-xds-path")),
    ("LOCAL_XDS", Read("what `LOCAL_XDS_PATH` would contain", "")),
    ("KUBERNETES_SERVICE_HOST", Read("we are in a pod of Kubernetes, so istiod has its usual address", "")),
    ("PROXY_CONFIG", Refused(&[""], PROXY_CONFIG)),
    // Who issues certificates, and what they are good for.
    ("CA_ADDRESS", Flag("ca-address")),
    ("CA_ROOT_CA", Flag("ca-root-ca")),
    ("ALT_CA_HOSTNAME", Flag("alt-ca-hostname")),
    ("CA_HEADER_*", Read("headers of the requests to the CA", "")),
    ("AUTH_TOKEN", Flag("auth-token")),
    ("SECRET_TTL", Flag("secret-ttl")),
    (
        "FAKE_CA",
        Refused(&["", "false"], "no certificate is made up; for development leave `CA_ADDRESS` empty and set `CULVERT_CA_DIR`"),
    ),
    ("CRL_PATH", Flag("crl-path")),
    ("COMPLIANCE_POLICY", Flag("compliance")),
    ("TLS12_ENABLED", Refused(&["", "false"], "peers speak TLS 1.3")),
    // Which pods, and their sockets.
    ("PROXY_MODE", Refused(&["", "shared"], "an agent serves the pods of its node, never a single workload")),
    ("PROXY_WORKLOAD_INFO", Refused(&[""], "an agent serves the pods of its node, never a single workload")),
    ("ENABLE_PROXY", Refused(&["", "true"], "an agent that carries no connections is none; its DNS is of the pods it serves")),
    ("INPOD_ENABLED", Flag("inpod")),
    ("INPOD_UDS", Flag("zds")),
    ("INPOD_PORT_REUSE", Flag("inpod-port-reuse")),
    ("PACKET_MARK", Refused(&["", "1337"], "rules and programs that redirect pods know the agent by this mark")),
    ("ENABLE_ORIG_SRC", Refused(&["", "true"], "applications always see their clients' addresses")),
    ("IPV6_ENABLED", Flag("ipv6")),
    ("UNSTABLE_ENABLE_SOCKS5", Refused(&["", "false"], "connections are captured; there is no SOCKS proxy")),
    (
        "LOCALHOST_APP_TUNNEL",
        Refused(&["", "true"], "application tunnels end on the pod's loopback, where nobody else can pretend to be the agent"),
    ),
    ("ISTIO_META_DNS_CAPTURE", Flag("dns-capture")),
    (
        "ISTIO_META_DNS_PROXY_ADDR",
        Refused(&[""], "DNS is answered on port 15053 of each pod's loopback, where the redirection brings it"),
    ),
    ("PREFERED_SERVICE_NAMESPACE", Flag("preferred-namespace")),
    // How connections are carried.
    ("POOL_MAX_STREAMS_PER_CONNECTION", Flag("pool-max-streams")),
    ("POOL_UNUSED_RELEASE_TIMEOUT", Flag("pool-unused-release")),
    ("HTTP2_STREAM_WINDOW_SIZE", Flag("stream-window")),
    ("HTTP2_CONNECTION_WINDOW_SIZE", Flag("connection-window")),
    ("HTTP2_FRAME_SIZE", Flag("frame-size")),
    ("KEEPALIVE_ENABLED", Flag("keepalive")),
    ("KEEPALIVE_TIME", Flag("keepalive-time")),
    ("KEEPALIVE_INTERVAL", Flag("keepalive-interval")),
    ("KEEPALIVE_RETRIES", Flag("keepalive-retries")),
    ("USER_TIMEOUT_ENABLED", Flag("user-timeout")),
    ("ENABLE_RESPONSE_BAGGAGE", Flag("response-baggage")),
    // The process.
    ("ZTUNNEL_WORKER_THREADS", Flag("worker-threads")),
    ("ZTUNNEL_CPU_LIMIT", Flag("cores")),
    ("ZTUNNEL_RESOURCE_CPU_LIMIT", Flag("cpu-limit")),
    ("ZTUNNEL_RESOURCE_CPU_REQUEST", Flag("cpu-request")),
    ("CONNECTION_TERMINATION_DEADLINE", Flag("termination-deadline")),
    ("TERMINATION_GRACE_PERIOD_SECONDS", Flag("grace-period")),
    ("RUST_LOG", Read("levels of the log, by part", "`hickory_server=off,info`")),
    ("LOG_FORMAT", Read("`json`, or lines of text", "text")),
    ("AUTHZ_POLICY_INFO_LOGGING", Flag("log-allowed")),
];

const PROXY_CONFIG: &str = "say `discoveryAddress` by `XDS_ADDRESS`, `proxyAdminPort` by `CULVERT_ADMIN_ADDR`, `statusPort` by \
    `CULVERT_STATS_ADDR`, `concurrency` by `ZTUNNEL_WORKER_THREADS`, `proxyMetadata` by its own variables";

/// A variable that asks for what this agent does not do.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{variable}={value}: {because}")]
pub struct Unusable {
    variable: &'static str,
    value: String,
    because: &'static str,
}

/// Looks at an environment before anything starts.
///
/// # Errors
/// Something in it asks for another agent than this one.
pub fn check(environment: impl Iterator<Item = (String, String)>) -> Result<(), Unusable> {
    for (name, value) in environment {
        let Some(&(variable, effect)) = VARIABLES.iter().find(|(known, _)| *known == name) else { continue };
        let Refused(fine, because) = effect else { continue };
        if !fine.iter().any(|fine| value.trim().eq_ignore_ascii_case(fine)) {
            return Err(Unusable { variable, value, because });
        }
    }
    Ok(())
}

/// The flags of `ztunnel proxy`.
fn flags() -> Command {
    crate::Settings::augment_args(Command::new("proxy"))
}

/// `ENVIRONMENT.md`.
pub fn page() -> String {
    let command = flags();
    let flag = |name: &str| command.get_arguments().find(|arg| arg.get_long() == Some(name));
    let mut out = String::from(HEAD);
    for (name, effect) in VARIABLES {
        let (here, meaning, default) = match effect {
            Flag(long) => {
                let arg = flag(long);
                (format!("`--{long}`"), arg.map_or_else(String::new, meaning), arg.map_or_else(String::new, default))
            }
            Read(meaning, default) => ("read".to_owned(), (*meaning).to_owned(), (*default).to_owned()),
            Refused(fine, because) => (format!("**refused**{}", but(fine)), (*because).to_owned(), String::new()),
        };
        row(&mut out, &[&format!("`{name}`"), &here, &meaning, &default]);
    }
    out.push_str(OURS);
    let known = |arg: &&Arg| VARIABLES.iter().any(|(_, effect)| matches!(effect, Flag(long) if arg.get_long() == Some(long)));
    for arg in command.get_arguments().filter(|arg| !known(arg) && !arg.is_hide_set()) {
        if let (Some(variable), Some(long)) = (arg.get_env().and_then(|name| name.to_str()), arg.get_long()) {
            row(&mut out, &[&format!("`{variable}`"), &format!("`--{long}`"), &meaning(arg), &default(arg)]);
        }
    }
    out
}

const HEAD: &str = "\
# Environment variables of the agent

Made from the code (`ztunnel/src/environment.rs`): `CULVERT_WRITE_DOCS=1 cargo test -p ztunnel environment` writes it anew, and the same test fails where
it is not up to date. A flag wins over its variable.

## istio/ztunnel's

Every variable that istio/ztunnel reads. One that is *refused* ends the start, with the reason; variables that are not listed are passed over.

| variable | here | meaning, or why not | by itself |
|---|---|---|---|
";
const OURS: &str = "
## Ours

| variable | flag | meaning | by itself |
|---|---|---|---|
";

fn row(out: &mut String, cells: &[&str; 4]) {
    // Writing to a string cannot fail.
    let _ = writeln!(out, "| {} |", cells.map(|cell| cell.replace('|', "\\|")).join(" | "));
}

fn but(fine: &[&str]) -> String {
    let said: Vec<String> = fine.iter().filter(|value| !value.is_empty()).map(|value| format!("`{value}`")).collect();
    if said.is_empty() { String::new() } else { format!(", but {}", said.join(", ")) }
}

fn meaning(arg: &Arg) -> String {
    arg.get_long_help().or_else(|| arg.get_help()).map_or_else(String::new, |text| text.to_string().replace('\n', " "))
}

fn default(arg: &Arg) -> String {
    let values: Vec<&str> = arg.get_default_values().iter().filter_map(|value| value.to_str()).collect();
    match values.join(",") {
        text if !text.is_empty() && matches!(arg.get_action(), ArgAction::Set | ArgAction::Append) => format!("`{text}`"),
        _ => String::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(name: &str, value: &str) -> Result<(), Unusable> {
        check([(name.to_owned(), value.to_owned())].into_iter())
    }

    #[test]
    fn every_flag_of_the_table_reads_its_variable_and_every_variable_is_in_the_table() {
        let command = flags();
        for (name, effect) in VARIABLES {
            let Flag(long) = effect else { continue };
            let arg = command.get_arguments().find(|arg| arg.get_long() == Some(long)).unwrap_or_else(|| panic!("no --{long}"));
            assert_eq!(arg.get_env().unwrap().to_str(), Some(*name), "--{long}");
        }
        for arg in command.get_arguments() {
            let Some(variable) = arg.get_env().and_then(|name| name.to_str()) else { continue };
            let listed = VARIABLES.iter().any(|(name, effect)| *name == variable && matches!(effect, Flag(_)));
            let others = variable == "KUBECONFIG" || variable.starts_with("CONSUL_");
            assert!(listed || variable.starts_with("CULVERT_") || others, "{variable}");
        }
        let mut names: Vec<&str> = VARIABLES.iter().map(|(name, _)| *name).collect();
        names.sort_unstable();
        assert!(names.windows(2).all(|pair| pair[0] != pair[1]), "a name twice");
        assert!(
            command.get_arguments().all(|arg| arg.get_long().is_none() || arg.is_hide_set() || !meaning(arg).is_empty()),
            "a flag without words"
        );
    }

    #[test]
    fn what_asks_for_another_agent_ends_the_start() {
        for (name, effect) in VARIABLES {
            match effect {
                Refused(fine, because) => {
                    assert!(fine.iter().all(|value| of(name, value) == Ok(())), "{name}");
                    let refusal = of(name, "anything else").unwrap_err().to_string();
                    assert_eq!(refusal, format!("{name}=anything else: {because}"));
                }
                Flag(_) | Read(..) => assert_eq!(of(name, "anything"), Ok(())),
            }
        }
        assert_eq!(of("TLS12_ENABLED", "False"), Ok(()));
        assert_eq!(of("SOMEBODY_ELSES", "true"), Ok(()));
    }

    #[test]
    fn the_page_is_what_the_table_says() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/ENVIRONMENT.md");
        let page = page();
        if std::env::var_os("CULVERT_WRITE_DOCS").is_some() {
            std::fs::write(path, &page).unwrap();
        }
        let written = std::fs::read_to_string(path).unwrap();
        assert!(written == page, "{path} is not up to date: write it with CULVERT_WRITE_DOCS=1");
    }
}
