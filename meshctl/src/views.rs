//! What a running agent knows, as tables: its `/config_dump` in the columns of `istioctl ztunnel-config`.
//!
//! Owns columns. With `-o json|yaml` the part of the dump is printed as it is. Upstream: `admin`, or a saved dump.
use crate::admin;
use crate::output::{self, Format, table};
use anyhow::{Context, Result};
use clap::Args as ClapArgs;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::PathBuf;

/// Whom to ask.
#[derive(ClapArgs, Clone, Debug)]
pub struct Args {
    /// Admin address of the agent.
    #[arg(long, value_name = "ADDR", default_value = admin::DEFAULT)]
    pub admin: String,
    /// A saved `/config_dump` instead of a running agent.
    #[arg(long, value_name = "FILE", conflicts_with = "admin")]
    pub file: Option<PathBuf>,
    /// Only this namespace.
    #[arg(short, long)]
    pub namespace: Option<String>,
}
/// Options of `meshctl version`.
#[derive(ClapArgs, Clone, Debug)]
pub struct VersionArgs {
    /// Admin address of a running agent or waypoint.
    #[arg(long, value_name = "ADDR")]
    pub admin: Option<String>,
}

/// Part of a dump.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum View {
    /// Workloads.
    Workloads,
    /// Services.
    Services,
    /// Policies of layer 4.
    Policies,
    /// Certificates.
    Certificates,
    /// Tunnels.
    Tunnels,
}

/// Prints one part of what a process knows.
pub fn show(view: View, args: &Args, format: Format) -> Result<()> {
    let dump = match &args.file {
        None => admin::get(&args.admin, "/config_dump")?,
        Some(file) => {
            let text = std::fs::read_to_string(file).with_context(|| format!("cannot read {}", file.display()))?;
            serde_json::from_str(&text).with_context(|| format!("{} is no dump", file.display()))?
        }
    };
    let part = match view {
        View::Workloads => "workloads",
        View::Services => "services",
        View::Policies => "policies",
        View::Certificates => "certificates",
        View::Tunnels => "workloadState",
    };
    let Some(mut shown) = dump.get(part).filter(|v| v.is_array() || v.is_object()).cloned() else {
        anyhow::bail!("the dump has no list of {part}: it is not a node agent's");
    };
    if let Some(namespace) = &args.namespace {
        keep(&mut shown, namespace);
    }
    output::print(format, &shown, |shown| match view {
        View::Workloads => workloads(&dump, shown),
        View::Services => services(&dump, shown),
        View::Policies => policies(shown),
        View::Certificates => certificates(shown),
        View::Tunnels => tunnels(shown),
    })
}

/// Leaves what is of a namespace.
fn keep(shown: &mut Value, namespace: &str) {
    let identity = format!("/ns/{namespace}/");
    let of =
        |v: &Value| v["namespace"] == namespace || v["info"]["namespace"] == namespace || text(v, "identity").contains(&identity);
    match shown {
        Value::Array(all) => all.retain(of),
        Value::Object(all) => all.retain(|_, v| of(v)),
        _ => {}
    }
}

/// Prints versions.
pub fn version(args: &VersionArgs, format: Format) -> Result<()> {
    let mut all = json!({ "meshctl": env!("CARGO_PKG_VERSION") });
    if let Some(addr) = &args.admin {
        all["process"] = admin::get(addr, "/version")?;
    }
    output::print(format, &all, |all| {
        let mut out = vec![format!("meshctl {}", text(all, "meshctl"))];
        if let Some(process) = all["process"].as_object() {
            let parts: Vec<String> =
                process.iter().map(|(k, v)| format!("{k} {}", v.as_str().map_or_else(|| v.to_string(), str::to_owned))).collect();
            out.push(format!("process: {}", parts.join(", ")));
        }
        out.join("\n")
    })
}

fn text<'v>(v: &'v Value, key: &str) -> &'v str {
    v[key].as_str().unwrap_or_default()
}
fn each(v: &Value) -> impl Iterator<Item = &Value> {
    v.as_array().into_iter().flatten()
}
fn sorted<const N: usize>(mut rows: Vec<[String; N]>) -> Vec<[String; N]> {
    rows.sort();
    rows
}

/// The name a waypoint has: its service's, its workload's, or its address.
fn waypoint_name(dump: &Value, v: &Value) -> String {
    let destination = text(&v["waypoint"], "destination");
    if destination.is_empty() {
        return if v["waypointError"].is_string() { "unusable".into() } else { "None".into() };
    }
    let (place, name) = destination.split_once('/').unwrap_or(("", destination));
    let by_name = each(&dump["services"]).find(|s| s["hostname"] == name && s["namespace"] == place);
    let by_vip = || each(&dump["services"]).find(|s| each(&s["vips"]).any(|vip| vip == destination));
    let found = by_name.or_else(by_vip);
    found.map_or_else(|| name.to_owned(), |s| text(s, "name").to_owned())
}
fn workloads(dump: &Value, shown: &Value) -> String {
    let rows = each(shown).map(|w| {
        let address = w["workloadIps"][0].as_str().unwrap_or_else(|| text(w, "hostname"));
        [
            text(w, "namespace").into(),
            text(w, "name").into(),
            address.into(),
            text(w, "node").into(),
            waypoint_name(dump, w),
            text(w, "protocol").into(),
        ]
    });
    table(["NAMESPACE", "POD NAME", "ADDRESS", "NODE", "WAYPOINT", "PROTOCOL"], &sorted(rows.collect()))
}
fn services(dump: &Value, shown: &Value) -> String {
    let health: BTreeMap<&str, bool> =
        each(&dump["workloads"]).map(|w| (text(w, "uid"), text(w, "status") == "Healthy")).collect();
    let rows = each(shown).map(|s| {
        let endpoints: Vec<&str> = s["endpoints"].as_object().into_iter().flat_map(|e| e.keys().map(String::as_str)).collect();
        let healthy = endpoints.iter().filter(|uid| health.get(**uid) == Some(&true)).count();
        // `network/ip`: people know the address.
        let vips: Vec<&str> =
            each(&s["vips"]).filter_map(Value::as_str).map(|v| v.split_once('/').map_or(v, |(_, ip)| ip)).collect();
        [
            text(s, "namespace").into(),
            text(s, "name").into(),
            vips.join(","),
            waypoint_name(dump, s),
            format!("{healthy}/{}", endpoints.len()),
        ]
    });
    table(["NAMESPACE", "SERVICE NAME", "SERVICE VIP", "WAYPOINT", "ENDPOINTS"], &sorted(rows.collect()))
}
fn policies(shown: &Value) -> String {
    let rows = each(shown).map(|p| {
        let mut action = text(p, "action").to_owned();
        if p["unusable"].is_string() {
            action.push_str(" (unusable)");
        } else if p["dryRun"] == true {
            action.push_str(" (dry run)");
        }
        [text(p, "namespace").into(), text(p, "name").into(), action, text(p, "scope").into()]
    });
    table(["NAMESPACE", "POLICY NAME", "ACTION", "SCOPE"], &sorted(rows.collect()))
}
fn certificates(shown: &Value) -> String {
    let mut rows = Vec::new();
    for c in each(shown) {
        let all = each(&c["certChain"]).map(|x| ("Leaf", x)).chain(each(&c["rootCerts"]).map(|x| ("Root", x)));
        let mut any = false;
        for (kind, x) in all {
            any = true;
            let valid = x["valid"].as_bool().map_or("", |v| if v { "true" } else { "false" });
            rows.push([
                text(c, "identity").into(),
                kind.into(),
                text(c, "state").into(),
                valid.into(),
                text(x, "serialNumber").into(),
                text(x, "expirationTime").into(),
                text(x, "validFrom").into(),
            ]);
        }
        if !any {
            let empty = String::new;
            rows.push([text(c, "identity").into(), empty(), text(c, "state").into(), empty(), empty(), empty(), empty()]);
        }
    }
    let head = ["CERTIFICATE NAME", "TYPE", "STATUS", "VALID CERT", "SERIAL NUMBER", "NOT AFTER", "NOT BEFORE"];
    table(head, &sorted(rows))
}
fn tunnels(shown: &Value) -> String {
    let mut rows = Vec::new();
    for (uid, pod) in shown.as_object().into_iter().flatten() {
        let name = match (text(&pod["info"], "namespace"), text(&pod["info"], "name")) {
            ("", _) => uid.clone(),
            (ns, name) => format!("{ns}/{name}"),
        };
        for t in each(&pod["tunnels"]["outbound"]) {
            let expect: Vec<&str> = each(&t["expect"]).filter_map(Value::as_str).collect();
            rows.push([name.clone(), "Outbound".into(), text(t, "dial").into(), expect.join(","), t["streams"].to_string()]);
        }
        for identity in each(&pod["tunnels"]["inbound"]).filter_map(Value::as_str) {
            rows.push([name.clone(), "Inbound".into(), "-".into(), identity.into(), "-".into()]);
        }
    }
    table(["POD", "DIRECTION", "REMOTE", "IDENTITY", "TUNNELS"], &sorted(rows))
}
