//! `meshctl why`: a hypothetical call, answered by a folder or by a running process, and told.
//!
//! Owns the words of the answer. Refuses to judge: the answer is `mesh_model::explain`'s, here or in the process that was
//! asked. Upstream: `folder`, `admin`. Downstream: `output`.
use crate::objects::{self, Objects, items};
use crate::output::{self, Format};
use crate::{Verdict, admin, folder};
use anyhow::{Context, Result, anyhow, bail};
use clap::Args as ClapArgs;
use http::HeaderMap;
use mesh_model::explain::{
    Decision, Destination, Effect, HttpQuestion, PassedOver, Place, PolicyTold, Question, Report, Route, Settings, Step, why,
};
use mesh_model::l7::path::PathNormalization;
use mesh_model::l7::request_auth::{KeySource, TokenRule};
use mesh_tokens::{Fault, Jwt, KeySet};
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

/// Options of `meshctl why`.
#[derive(ClapArgs, Clone, Debug)]
#[command(after_help = "Examples:
  meshctl why --mesh-dir mesh --from shop/frontend --to api.shop:80 --path /api/orders
  meshctl why --mesh-dir mesh --from shop/frontend/frontend-7d4b --to postgres.shop:5432
  meshctl why --mesh-dir mesh --from 203.0.113.7 --to shop/api:80
  meshctl why --admin 127.0.0.1:15000 --from shop/frontend --to api.shop:80")]
pub struct Args {
    /// Who calls: namespace/service-account, namespace/service-account/pod, or an IP address (a client outside the mesh).
    #[arg(long, value_name = "WHO")]
    pub from: String,
    /// What is called: service:port as the client would name it, namespace/service:port, namespace/pod:port, or ip:port.
    #[arg(long, value_name = "WHAT")]
    pub to: String,
    /// Method of the request.
    #[arg(long, default_value = "GET")]
    pub method: String,
    /// Path of the request, with its query.
    #[arg(long, default_value = "/")]
    pub path: String,
    /// Host of the request; what is called, if not given.
    #[arg(long)]
    pub host: Option<String>,
    /// A header of the request; may be given several times.
    #[arg(long = "header", value_name = "NAME=VALUE", value_parser = header)]
    pub headers: Vec<(String, String)>,
    /// Folder of objects that describes the mesh.
    #[arg(long, env = "CULVERT_MESH_DIR", value_name = "DIR")]
    pub mesh_dir: Option<PathBuf>,
    /// Admin address of a running agent or waypoint, which answers by what it knows at this moment; goes before --mesh-dir.
    #[arg(long, value_name = "ADDR")]
    pub admin: Option<String>,
    /// How the waypoint normalises paths: `none`, `base`, `merge-slashes` or `decode-and-merge-slashes`, where it is not MeshConfig
    /// that says so (a running process knows itself).
    #[arg(long, env = "CULVERT_PATH_NORMALIZATION")]
    pub path_normalization: Option<PathNormalization>,
    /// A token (JWT) the request carries as `Authorization: Bearer`, to be looked at as the waypoint would.
    #[arg(long, value_name = "FILE")]
    pub jwt: Option<PathBuf>,
    /// Keys (JWKS) of issuers whose RequestAuthentication says where they are and not which; a running process has fetched them.
    #[arg(long, value_name = "FILE")]
    pub jwks: Option<PathBuf>,
    #[command(flatten)]
    pub view: folder::View,
}
fn header(text: &str) -> Result<(String, String), String> {
    let (name, value) = text.split_once('=').ok_or("write NAME=VALUE")?;
    if name.is_empty() {
        return Err("a header has a name".into());
    }
    Ok((name.to_owned(), value.to_owned()))
}

/// Asks and tells.
pub fn run(args: &Args, format: Format) -> Result<Verdict> {
    let report = match (&args.admin, &args.mesh_dir) {
        (Some(addr), _) => of_process(args, addr)?,
        (None, Some(dir)) => of_folder(args, dir)?,
        (None, None) => bail!("which mesh? give --mesh-dir DIR (a folder of objects) or --admin ADDR (a running process)"),
    };
    output::print(format, &report, told)?;
    Ok(match report.decision {
        Decision::Allowed | Decision::Elsewhere => Verdict::Fine,
        Decision::Denied | Decision::Partly => Verdict::Wrong,
    })
}

fn question(args: &Args) -> Result<Question> {
    let mut headers = args.headers.clone();
    if let Some(file) = &args.jwt {
        let token = fs::read_to_string(file).with_context(|| format!("the token in {}", file.display()))?;
        headers.push(("authorization".into(), format!("Bearer {}", token.trim())));
    }
    let http = HttpQuestion { method: args.method.clone(), path: args.path.clone(), host: args.host.clone(), headers };
    // Nothing said about a request: whether there is one follows from the port.
    let http = (http != HttpQuestion::default()).then_some(http);
    Ok(Question { from: args.from.clone(), to: args.to.clone(), http })
}

/// Keys as far as a folder has them: written in the policy, or given.
struct Keys(Option<KeySet>);
impl Keys {
    fn given(args: &Args) -> Result<Self> {
        let Some(file) = &args.jwks else { return Ok(Self(None)) };
        let text = fs::read(file).with_context(|| format!("the keys in {}", file.display()))?;
        let keys = KeySet::parse(&text).map_err(|why| anyhow!("{}: {why}", file.display()))?;
        Ok(Self(Some(keys)))
    }
    fn verify(&self, rule: &TokenRule, jwt: &Jwt) -> Result<(), Fault> {
        match (&rule.keys, &self.0) {
            (KeySource::Inline(text), _) => KeySet::parse(text.text().as_bytes()).map_err(|_| Fault::NoKeys)?.verify(jwt),
            (_, Some(given)) => given.verify(jwt),
            (_, None) => Err(Fault::NoKeys),
        }
    }
}

fn of_folder(args: &Args, dir: &Path) -> Result<Report> {
    let question = question(args)?;
    let keys = Keys::given(args)?;
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |t| t.as_secs());
    let verify = |headers: &HeaderMap, query: &str, rules: &[&Arc<TokenRule>]| {
        mesh_tokens::suppose(headers, query, rules, now, |rule, jwt| keys.verify(rule, jwt))
    };
    let settings = Settings { normalization: args.path_normalization, verify: Some(&verify), ..Settings::default() };
    let view = args.view.viewpoint()?;
    let loaded = folder::load(dir, view.clone())?;
    let mut report = why(&loaded.mesh, &question, &settings)?;
    if let Some(node) = report.call.node.clone() {
        // The agent of the client's node prefers endpoints by where it is.
        let there = mesh_model::snapshot::Viewpoint { node: node.as_str().into(), ..view };
        report = why(&folder::load(dir, there)?.mesh, &question, &settings)?;
    }
    let texts = objects::read(dir)?;
    point_at_rules(&mut report, &Objects::of(&texts));
    let wrong = loaded.problems.iter().filter(|p| p.severity != mesh_sources::Severity::Note).count();
    if report.detail == Fault::NoKeys.text() && args.jwks.is_none() {
        report
            .notes
            .push("the keys of this issuer are not in the folder: give them with --jwks, or ask a waypoint with --admin".into());
    }
    if wrong > 0 {
        report.notes.push(format!("{wrong} objects or fields of the folder are wrong: run `meshctl analyze {}`", dir.display()));
    }
    Ok(report)
}

/// The mesh keeps the line of a policy; a reader looks for that of the rule.
fn point_at_rules(report: &mut Report, objects: &Objects<'_>) {
    for policy in report.steps.iter_mut().flat_map(|s| &mut s.policies) {
        let (Some(place), Some(rule)) = (&mut policy.place, policy.rule) else { continue };
        let written = objects.iter().find(|o| *o.file == place.file && o.node.line == place.line && o.name() == place.object);
        let rules = written.and_then(|o| o.at(&["spec"])).map(|spec| items(spec, "rules")).unwrap_or_default();
        if let Some(rule) = rules.get(rule) {
            place.line = rule.line;
        }
    }
}

fn of_process(args: &Args, addr: &str) -> Result<Report> {
    let body = serde_json::to_string(&question(args)?)?;
    let answer = admin::post(addr, "/why", &body)?;
    serde_json::from_value(answer).context("the process answers in a form this meshctl does not know: are they of one version?")
}

/// The answer for people.
fn told(report: &Report) -> String {
    let mut out = String::new();
    let call = &report.call;
    // Writing to a String does not fail, here and below.
    let _ = writeln!(out, "{} ({})", call.from, call.identity.as_deref().unwrap_or("no identity"));
    let _ = writeln!(out, "  -> {} ({})", call.to, call.address);
    if let Some(request) = &call.request {
        let _ = writeln!(out, "  {request}");
    }
    let word = match report.decision {
        Decision::Allowed => "ALLOWED",
        Decision::Denied => "DENIED",
        Decision::Partly => "PARTLY DENIED",
        Decision::Elsewhere => "NOT REFUSED SO FAR",
    };
    let _ = write!(out, "\n{word}");
    match (&report.reason, report.detail.as_str()) {
        (Some(reason), detail) => {
            let _ = writeln!(out, "  {reason}: {detail}");
        }
        (None, "") => out.push('\n'),
        (None, detail) => {
            let _ = writeln!(out, "  {detail}");
        }
    }
    let _ = writeln!(out, "the client sees: {}", report.answer);
    if !report.hint.is_empty() && !report.detail.contains(&report.hint) {
        let _ = writeln!(out, "look at: {}", report.hint);
    }
    out.push('\n');
    for (number, step) in report.steps.iter().enumerate() {
        tell_step(&mut out, number + 1, step);
    }
    for note in &report.notes {
        let _ = writeln!(out, "note: {note}");
    }
    out
}

fn tell_step(out: &mut String, number: usize, step: &Step) {
    let _ = writeln!(out, "{number}. {}: {}", step.at, if step.passes { "passes" } else { "REFUSES" });
    let reason = step.reason.as_ref().map(|r| format!("{r}: ")).unwrap_or_default();
    let _ = writeln!(out, "   {reason}{}", step.text);
    if let Some(route) = &step.route {
        tell_route(out, route);
    }
    for policy in &step.policies {
        tell_policy(out, policy);
    }
}
fn tell_route(out: &mut String, route: &Route) {
    let rule = route.rule.map(|n| format!(", rule {n}")).unwrap_or_default();
    let _ = writeln!(
        out,
        "   route {}{rule}{}",
        if route.name.is_empty() { "(no name)" } else { &route.name },
        at(route.place.as_ref())
    );
    let _ = match (route.rule, route.conditions.is_empty()) {
        (None, _) => writeln!(out, "     no routes are written for it: the service itself"),
        (_, true) => writeln!(out, "     takes every request"),
        (_, false) => writeln!(out, "     because: {}", route.conditions.join(", ")),
    };
    let _ = writeln!(out, "     {}", route.action);
    for d in &route.destinations {
        tell_destination(out, d);
    }
    for PassedOver { rule, name, failed, place } in &route.passed_over {
        let name = if name.is_empty() { String::new() } else { format!(" ({name})") };
        let _ = writeln!(out, "     not rule {rule}{name}: wants {}{}", failed.join(", "), at(place.as_ref()));
    }
}
fn tell_destination(out: &mut String, d: &Destination) {
    let subset = d.subset.as_ref().map(|s| format!(" subset {s}")).unwrap_or_default();
    let endpoints = match d.endpoints.as_slice() {
        [] => "no endpoint".to_owned(),
        all if all.len() > 4 => format!("{} endpoints", all.len()),
        all => all.join(", "),
    };
    let policies: String = d.policies.iter().map(|p| at(Some(p))).collect();
    let _ = writeln!(out, "     {} % (weight {}) to {}{subset}: {endpoints}{policies}", d.percent, d.weight, d.to);
}
fn tell_policy(out: &mut String, p: &PolicyTold) {
    let effect = match p.effect {
        Effect::Matched => "matches",
        Effect::Unusable => "unusable",
        Effect::Missing => "missing",
        Effect::NearlyMatched => "nearly matches",
        Effect::NotMatched => "does not match",
        Effect::Never => "can never apply",
    };
    let rule = p.rule.map(|n| format!(" rule {n}")).unwrap_or_default();
    let dry = if p.dry_run { " (dry run)" } else { "" };
    let _ = writeln!(out, "   {effect}: {} {}{rule}{dry}{}", p.action, p.policy, at(p.place.as_ref()));
    for failed in &p.failed {
        let _ = writeln!(out, "     {failed}");
    }
}
/// Where something was written.
fn at(place: Option<&Place>) -> String {
    match place {
        None => String::new(),
        Some(p) if p.line == 0 => format!("  [{} in {}]", p.object, p.file),
        Some(p) => format!("  [{} in {}:{}]", p.object, p.file, p.line),
    }
}
