//! `meshctl analyze`: what is wrong or without effect in a folder of objects.
//!
//! Owns the list of findings and their codes: what the proxies' own readers complain about, and checks that look at several
//! objects at once. Codes are Istio's where Istio has one for it (`istioctl analyze`), else a word of ours. Upstream: `folder`.
//! Downstream: `output`.
mod annotations;
mod codes;
mod finding;
mod gateways;
mod policies;
mod routes;
mod services;

use crate::objects::{self, Objects};
use crate::output::{self, Format, table};
use crate::{Verdict, folder};
use anyhow::Result;
use clap::{Args as ClapArgs, ValueEnum};
use finding::{Finding, Findings, Level};
use mesh_model::Snapshot;
use serde::Serialize;
use std::path::PathBuf;

/// Options of `meshctl analyze`.
#[derive(ClapArgs, Clone, Debug)]
#[command(after_help = "Codes that begin with IST are those of `istioctl analyze`; the others are Culvert's own.

Examples:
  meshctl analyze mesh
  meshctl analyze mesh --fail-on error --suppress IST0118 -o json")]
pub struct Args {
    /// Folder of objects.
    #[arg(value_name = "DIR", env = "CULVERT_MESH_DIR")]
    pub dir: PathBuf,
    /// Findings from which on the exit code is 1.
    #[arg(long, value_enum, default_value_t = FailOn::Warning)]
    pub fail_on: FailOn,
    /// Codes not to tell; may be given several times, or separated by commas.
    #[arg(long, value_name = "CODE", value_delimiter = ',')]
    pub suppress: Vec<String>,
    #[command(flatten)]
    pub view: folder::View,
}
/// Threshold of the exit code.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum FailOn {
    /// Errors only.
    Error,
    /// Warnings and errors.
    Warning,
    /// Everything.
    Note,
    /// Nothing.
    Never,
}

/// What checks look at.
struct Context<'a> {
    /// The mesh as the proxies understand it.
    mesh: &'a Snapshot,
    /// The objects as they are written.
    objects: &'a Objects<'a>,
}

/// All of the output.
#[derive(Serialize)]
struct Analysis {
    findings: Vec<Finding>,
}

/// Analyzes and tells.
pub fn run(args: &Args, format: Format) -> Result<Verdict> {
    let findings = analyze(args)?;
    let threshold = match args.fail_on {
        FailOn::Error => Some(Level::Error),
        FailOn::Warning => Some(Level::Warning),
        FailOn::Note => Some(Level::Note),
        FailOn::Never => None,
    };
    // Levels are ordered worst first.
    let wrong = findings.iter().any(|f| threshold.is_some_and(|t| f.level <= t));
    output::print(format, &Analysis { findings }, told)?;
    Ok(if wrong { Verdict::Wrong } else { Verdict::Fine })
}

fn analyze(args: &Args) -> Result<Vec<Finding>> {
    let loaded = folder::load(&args.dir, args.view.viewpoint()?)?;
    let texts = objects::read(&args.dir)?;
    let objects = Objects::of(&texts);
    let context = Context { mesh: &loaded.mesh, objects: &objects };
    let mut findings = Findings::default();
    for problem in &loaded.problems {
        findings.add(codes::of_problem(problem));
    }
    policies::check(&context, &mut findings);
    routes::check(&context, &mut findings);
    services::check(&context, &mut findings);
    gateways::check(&context, &mut findings);
    annotations::check(&context, &mut findings);
    Ok(findings.sorted(&args.suppress))
}

fn told(analysis: &Analysis) -> String {
    if analysis.findings.is_empty() {
        return "nothing found".into();
    }
    let rows: Vec<[String; 4]> = analysis
        .findings
        .iter()
        .map(|f| {
            let place = if f.line == 0 { f.file.clone() } else { format!("{}:{}", f.file, f.line) };
            let field = if f.field.is_empty() { String::new() } else { format!("{}: ", f.field) };
            let fix = if f.fix.is_empty() { String::new() } else { format!("; {}", f.fix) };
            [f.level.as_str().into(), f.code.clone(), place, format!("{}: {field}{}{fix}", f.object, f.message)]
        })
        .collect();
    let count = |level| analysis.findings.iter().filter(|f| f.level == level).count();
    format!(
        "{}\n\n{} errors, {} warnings, {} notes",
        table(["LEVEL", "CODE", "PLACE", "WHAT"], &rows),
        count(Level::Error),
        count(Level::Warning),
        count(Level::Note)
    )
}
