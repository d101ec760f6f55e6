//! `cargo xtask test`: set-up, build, every ring, one line at the end.
//!
//! Owns which test binary belongs to which ring, who runs as root, and the time each may take. What the machine cannot run
//! is counted as skipped, never as passed.

use crate::libtest::{Outcome, Reader, Tally};
use crate::metadata::Metadata;
use crate::setup;
use crate::shell::{self, Laps, Root};
use anyhow::{Context as _, Result, bail};
use serde_json::Value;
use std::ffi::OsString;
use std::io::{BufRead as _, BufReader, Read, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::time::{Duration, Instant};

/// No test binary may take longer; the whole of ring 3 is meant to take three minutes.
const LIMIT: Duration = Duration::from_mins(15);
/// How long the pipes of a finished binary may stay open, held by a child it left behind.
const PIPES_CLOSE: Duration = Duration::from_secs(3);

/// `cargo xtask test`.
pub fn run(args: &[String]) -> Result<()> {
    let options = Options::parse(args)?;
    let mut laps = Laps::default();
    let tally = run_all(&options, &mut laps).unwrap_or_else(|error| {
        println!("FAILED before any test ran: {error:#}");
        Tally { failed: 1, ..Tally::default() }
    });
    println!();
    laps.print();
    tally.print();
    let _ = std::io::stdout().flush();
    if tally.failed > 0 {
        bail!(shell::Told);
    }
    Ok(())
}

/// What to run.
pub struct Options {
    filter: Vec<String>,
    ring: Option<u8>,
    /// Install what is missing.
    pub setup: bool,
    variants: bool,
    /// Where the programs of real peers are; the suites then run in their long form.
    pub peers: Option<PathBuf>,
    /// How many minutes that form takes.
    pub soak: u32,
}

impl Options {
    /// Reads the command line.
    pub fn parse(args: &[String]) -> Result<Self> {
        let mut options = Self { filter: Vec::new(), ring: None, setup: true, variants: true, peers: None, soak: 2 };
        let mut args = args.iter();
        while let Some(arg) = args.next() {
            match arg.as_str() {
                "--ring" => {
                    let ring = args.next().context("--ring needs a number")?;
                    options.ring = Some(ring.parse().ok().filter(|ring| *ring <= 3).context("--ring takes 0, 1, 2 or 3")?);
                }
                "--no-setup" => options.setup = false,
                "--no-variants" => options.variants = false,
                flag if flag.starts_with('-') => bail!("unknown flag {flag} (see `cargo xtask help`)"),
                name => options.filter.push(name.to_owned()),
            }
        }
        Ok(options)
    }
}

/// Runs everything and gives the sum. Fails only where nothing can be said about the tests at all: they do not build.
pub fn run_all(options: &Options, laps: &mut Laps) -> Result<Tally> {
    let metadata = Metadata::load()?;
    for needs in [setup::NETWORK, setup::METRICS] {
        if options.setup
            && let Err(error) = laps.time("set-up", || setup::ensure(needs))
        {
            eprintln!("note: {error:#}; what needs it will be skipped");
        }
    }
    // One build for programs and tests: features are united once, so no dependency is compiled twice.
    let binaries = laps.time("build", || build(&metadata, &["--workspace", "--bins", "--tests"]))?;
    let agent = agent(&metadata);
    let root = shell::find_root();
    if root == Root::No {
        eprintln!("note: neither root nor sudo without a password: ring 3 cannot run here and is counted as skipped");
    }
    let mut tally = Tally::default();
    for ring in 0..=3 {
        if options.ring.is_some_and(|wanted| wanted != ring) {
            continue;
        }
        let name = format!("ring {ring}");
        for binary in binaries.iter().filter(|binary| binary.ring == ring) {
            tally += laps.time(&name, || run_binary(binary, options, root, &agent));
        }
    }
    if options.ring.is_none() {
        tally += laps.time("documentation", || run_documentation(&metadata, options));
        if options.variants {
            tally += laps.time("variant tls-boring", || run_boring(&metadata, options));
        }
    }
    Ok(tally)
}

/// Builds test targets of the harness, with the programs, and runs one after the other.
pub fn run_targets(metadata: &Metadata, targets: &[&str], options: &Options, laps: &mut Laps) -> Result<Vec<Tally>> {
    let mut what = vec!["-p", "mesh-tests", "-p", "ztunnel", "-p", "waypoint", "-p", "meshctl", "-p", "xtask", "--bins"];
    what.extend(targets.iter().flat_map(|target| ["--test", target]));
    // One build: nothing that runs is replaced under it.
    let binaries = laps.time("build", || build(metadata, &what))?;
    let root = shell::find_root();
    let run = |target: &&str| {
        let mut tally = Tally::default();
        for binary in binaries.iter().filter(|binary| binary.target == *target) {
            tally += laps.time(target, || run_binary(binary, options, root, &agent(metadata)));
        }
        tally
    };
    Ok(targets.iter().map(run).collect())
}

struct Binary {
    package: String,
    target: String,
    folder: PathBuf,
    executable: PathBuf,
    ring: u8,
}

/// Builds test binaries and asks cargo where they are.
fn build(metadata: &Metadata, what: &[&str]) -> Result<Vec<Binary>> {
    let mut command = shell::cargo();
    command.args(["build", "--locked", "--message-format=json-render-diagnostics"]).args(what);
    eprintln!("$ {}", shell::line(&command));
    let text = shell::output(&mut command)?;
    let mut binaries: Vec<Binary> = text
        .lines()
        .filter_map(|line| serde_json::from_str::<Value>(line).ok())
        .filter_map(|message| {
            let executable = message["executable"].as_str()?;
            if message["reason"] != "compiler-artifact" || message["profile"]["test"] != true {
                return None;
            }
            let package = metadata.packages.get(message["package_id"].as_str()?)?;
            let target = message["target"]["name"].as_str()?;
            let integration = message["target"]["kind"][0] == "test";
            Some(Binary {
                package: package.name.clone(),
                target: target.to_owned(),
                folder: package.folder.clone(),
                executable: PathBuf::from(executable),
                ring: ring_of(&package.name, target, integration),
            })
        })
        .collect();
    binaries.sort_by(|a, b| (a.ring, &a.package, &a.target).cmp(&(b.ring, &b.package, &b.target)));
    Ok(binaries)
}

/// Which ring a test binary belongs to: pure code, in memory, in one process, in network namespaces.
fn ring_of(package: &str, target: &str, integration: bool) -> u8 {
    match (package, integration) {
        ("mesh-model" | "ebpf-common" | "xtask", _) => 0,
        // Suites of the harness say in their name when they need no namespaces.
        ("mesh-tests", true) if target.starts_with("fuzz") => 1,
        ("mesh-tests", true) if target.starts_with("process") => 2,
        ("mesh-tests" | "ebpf-loader", true) => 3,
        ("ztunnel" | "waypoint", true) => 2,
        _ => 1,
    }
}

/// Runs a binary, and once more, one after another, what failed of it: a machine that was too busy for a moment is not a
/// fault of the code. Which tests needed that is printed and counted, because a race shows itself in the same way.
fn run_binary(binary: &Binary, options: &Options, root: Root, agent: &Path) -> Tally {
    println!("--- ring {}: {} {}", binary.ring, binary.package, binary.target);
    let first = attempt(binary, options, root, agent, &options.filter);
    if first.tally.failed == 0 {
        return first.tally;
    }
    let mut only: Vec<String> = options.filter.clone();
    if first.failures_have_names() {
        only = ["--exact", "--test-threads=1"].map(str::to_owned).into_iter().chain(first.failed.iter().cloned()).collect();
    }
    println!("--- ring {}: {} {}: what failed, once more", binary.ring, binary.package, binary.target);
    let again = attempt(binary, options, root, agent, &only);
    for name in first.failed.iter().filter(|name| !again.failed.contains(name)) {
        println!("UNSTEADY: {} {name} failed at first", binary.target);
    }
    first.then(&again)
}

fn attempt(binary: &Binary, options: &Options, root: Root, agent: &Path, only: &[String]) -> Outcome {
    // The programs that were built with these tests, not whichever are newest; unless the caller wants to test another.
    let waypoint = std::env::var_os("CULVERT_WAYPOINT").unwrap_or_else(|| agent.with_file_name("waypoint").into());
    let meshctl = std::env::var_os("CULVERT_MESHCTL").unwrap_or_else(|| agent.with_file_name("meshctl").into());
    let agent = std::env::var_os("CULVERT_ZTUNNEL").unwrap_or_else(|| agent.into());
    let root = if binary.ring == 3 { root } else { Root::Already };
    let mut command = shell::as_root(root, &binary.executable);
    if let Some(peers) = &options.peers {
        command.arg("--include-ignored").env("CULVERT_PEERS", peers).env("CULVERT_SOAK", options.soak.to_string());
    }
    command
        .arg("--show-output")
        .args(only)
        .current_dir(&binary.folder)
        .env("CARGO_MANIFEST_DIR", &binary.folder)
        .env("CULVERT_ZTUNNEL", agent)
        .env("CULVERT_WAYPOINT", waypoint)
        .env("CULVERT_MESHCTL", meshctl)
        .env("CARGO", std::env::var_os("CARGO").unwrap_or_else(|| OsString::from("cargo")));
    count(&mut command, print)
}

/// The node agent as `cargo build` leaves it.
fn agent(metadata: &Metadata) -> PathBuf {
    metadata.target.join("debug/ztunnel")
}

fn run_documentation(metadata: &Metadata, options: &Options) -> Tally {
    let mut command = shell::cargo();
    command.args(["test", "--workspace", "--doc", "--locked", "--quiet"]);
    for package in metadata.members().values().filter(|package| !has_examples(package)) {
        // Linking an empty documentation test costs a second or more per crate.
        command.args(["--exclude", &package.name]);
    }
    if metadata.members().values().all(|package| !has_examples(package)) {
        return Tally::default();
    }
    println!("--- examples in the documentation");
    command.arg("--").args(&options.filter);
    count(&mut command, print).tally
}

fn has_examples(package: &crate::metadata::Package) -> bool {
    package.folder.join("src/lib.rs").is_file()
        && crate::tidy::rust_files(&package.folder.join("src"))
            .iter()
            .any(|file| std::fs::read_to_string(file).is_ok_and(|text| holds_example(&text)))
}

/// True if rustdoc would compile something in this file: a fenced block of a documentation comment that is Rust.
fn holds_example(source: &str) -> bool {
    let mut open = false;
    for line in source.lines().map(str::trim_start) {
        let Some(comment) = line.strip_prefix("///").or_else(|| line.strip_prefix("//!")) else {
            open = false;
            continue;
        };
        let Some(kind) = comment.trim_start().strip_prefix("```") else { continue };
        open = !open;
        let rust = |word: &str| matches!(word.trim(), "" | "rust" | "no_run" | "should_panic" | "compile_fail");
        if open && kind.split(',').all(rust) {
            return true;
        }
    }
    false
}

/// The suites of `mesh-identity` on BoringSSL instead of aws-lc.
fn run_boring(metadata: &Metadata, options: &Options) -> Tally {
    const PACKAGE: &str = "mesh-identity";
    const FEATURE: &str = "tls-boring";
    println!("--- {PACKAGE} with feature {FEATURE}");
    let skipped = |why: &str| skipped(&format!("{PACKAGE} with {FEATURE}"), why);
    if !metadata.members().get(PACKAGE).is_some_and(|package| package.features.iter().any(|feature| feature == FEATURE)) {
        return skipped("the crate has no such feature");
    }
    let ready = if options.setup { setup::ensure(setup::BORING) } else { setup::check(setup::BORING) };
    if let Err(error) = ready {
        return skipped(&format!("{error:#}"));
    }
    match build(metadata, &["-p", PACKAGE, "--tests", "--features", FEATURE]) {
        Ok(binaries) => {
            let mut tally = Tally::default();
            for binary in &binaries {
                tally += run_binary(binary, options, Root::Already, &agent(metadata));
            }
            tally
        }
        Err(error) => {
            println!("failed: {PACKAGE} with {FEATURE} does not build: {error:#}");
            Tally { failed: 1, ..Tally::default() }
        }
    }
}

fn skipped(what: &str, why: &str) -> Tally {
    println!("skipped: {what}: {why}");
    Tally { skipped: 1, ..Tally::default() }
}

/// The programs with aws-lc's module for FIPS 140, which the suite `e2e_fips` runs, and the unit tests of who uses cryptography.
/// They are built in a folder of their own: all that is above aws-lc is another build, which would take the place of the usual one.
pub fn run_fips(metadata: &Metadata, options: &Options) -> Tally {
    const FEATURE: &str = "tls-fips";
    if !options.filter.is_empty() && !options.filter.iter().any(|filter| filter.contains("fips")) {
        return Tally::default();
    }
    println!("--- programs and unit tests with feature {FEATURE}");
    let ready = if options.setup { setup::ensure(setup::FIPS) } else { setup::check(setup::FIPS) };
    if let Err(error) = ready {
        return skipped(FEATURE, &format!("{error:#}"));
    }
    let folder = metadata.target.join("fips");
    let folder = folder.to_string_lossy();
    let features = "mesh-identity/tls-fips,ztunnel/tls-fips,waypoint/tls-fips";
    let packages = ["-p", "mesh-identity", "-p", "mesh-tokens", "-p", "ztunnel", "-p", "waypoint"];
    let what = [&packages[..], &["--bins", "--tests", "--features", features, "--target-dir", &*folder]].concat();
    match build(metadata, &what) {
        Ok(binaries) => {
            let mut tally = Tally::default();
            for binary in
                binaries.iter().filter(|binary| ["mesh-identity", "mesh-tokens", "waypoint"].contains(&&*binary.package))
            {
                tally += run_binary(binary, options, Root::Already, &agent(metadata));
            }
            tally
        }
        Err(error) => {
            println!("failed: feature {FEATURE} does not build: {error:#}");
            Tally { failed: 1, ..Tally::default() }
        }
    }
}

enum Said {
    Out(String),
    Err(String),
}

/// How lines reach the reader of xtask's own output.
fn print(line: &Said) {
    match line {
        Said::Out(line) => println!("{line}"),
        Said::Err(line) => eprintln!("{line}"),
    }
}

/// Runs one program that talks like Rust's test runner, shows what is worth showing and counts.
fn count(command: &mut Command, show: fn(&Said)) -> Outcome {
    match command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn() {
        Ok(child) => follow(child, show),
        Err(error) => {
            show(&Said::Out(format!("cannot start {}: {error}", command.get_program().to_string_lossy())));
            Reader::default().end(false)
        }
    }
}

fn follow(mut child: Child, show: fn(&Said)) -> Outcome {
    let (sender, lines) = mpsc::channel();
    if let Some(out) = child.stdout.take() {
        forward(out, sender.clone(), Said::Out);
    }
    if let Some(err) = child.stderr.take() {
        forward(err, sender, Said::Err);
    }
    let mut reader = Reader::default();
    let end = Instant::now() + LIMIT;
    let mut pipes_end = None;
    let mut status = None;
    loop {
        match lines.recv_timeout(Duration::from_millis(100)) {
            Ok(said) => {
                let worth_showing = match &said {
                    Said::Out(line) => reader.line(line),
                    Said::Err(line) => {
                        reader.stderr_line(line);
                        true
                    }
                };
                if worth_showing {
                    show(&said);
                }
            }
            Err(RecvTimeoutError::Disconnected) => break,
            Err(RecvTimeoutError::Timeout) => {
                if status.is_none() {
                    status = child.try_wait().ok().flatten();
                }
                if status.is_some() && Instant::now() > *pipes_end.get_or_insert_with(|| Instant::now() + PIPES_CLOSE) {
                    break;
                }
            }
        }
        if status.is_none() && Instant::now() > end {
            show(&Said::Out(format!("killed: still running after {} s", LIMIT.as_secs())));
            let _ = child.kill();
            break;
        }
    }
    let status = status.or_else(|| child.wait().ok());
    if let Some(status) = status.filter(|status| !status.success() && status.code().is_none_or(|code| code != 101)) {
        show(&Said::Out(format!("ended with {status}")));
    }
    let outcome = reader.end(status.is_some_and(|status| status.success()));
    for reason in &outcome.reasons {
        show(&Said::Out(format!("skipped {reason}")));
    }
    outcome
}

fn forward(pipe: impl Read + Send + 'static, sender: Sender<Said>, wrap: fn(String) -> Said) {
    std::thread::spawn(move || {
        for line in BufReader::new(pipe).split(b'\n').map_while(Result::ok) {
            if sender.send(wrap(String::from_utf8_lossy(&line).into_owned())).is_err() {
                break;
            }
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    fn quiet(_line: &Said) {}

    fn options(args: &[&str]) -> Result<Options> {
        Options::parse(&args.iter().map(|&arg| arg.to_owned()).collect::<Vec<_>>())
    }

    #[test]
    fn options_are_read_or_refused() {
        let read = options(&["--ring", "3", "name", "--no-setup"]).unwrap();
        assert_eq!((read.ring, read.setup, read.variants, read.filter), (Some(3), false, true, vec!["name".to_owned()]));
        for bad in [&["--ring"][..], &["--ring", "4"], &["--rings"]] {
            assert!(options(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn rings() {
        assert_eq!(ring_of("mesh-model", "mesh_model", false), 0);
        assert_eq!(ring_of("mesh-hbone", "tunnel", true), 1);
        assert_eq!(ring_of("mesh-tests", "mesh_tests", false), 1);
        assert_eq!(ring_of("mesh-tests", "fuzz_smoke", true), 1);
        assert_eq!(ring_of("ztunnel", "proxy", true), 2);
        assert_eq!(ring_of("mesh-tests", "policy", true), 3);
    }

    #[test]
    fn examples_are_told_from_plain_blocks() {
        for example in ["/// ```\n/// f();\n/// ```", "//! ```rust,no_run\n", "/// ```text\n/// x\n/// ```\n/// ```\n"] {
            assert!(holds_example(example), "{example}");
        }
        for plain in ["/// ```text\n/// x\n/// ```\n", "/// ```yaml\n", "// ```\n", "let a = \"```\";", "/// ```ignore\n"] {
            assert!(!holds_example(plain), "{plain}");
        }
    }

    #[test]
    fn a_program_is_followed_to_its_end() {
        let mut shell = Command::new("sh");
        shell.args(["-c", "echo 'SKIPPED: on stderr' >&2; echo 'test result: ok. 2 passed; 0 failed; 1 ignored; 0 measured;'"]);
        assert_eq!(count(&mut shell, quiet).tally, Tally { passed: 1, skipped: 2, ..Tally::default() });
        assert_eq!(count(Command::new("sh").args(["-c", "kill -9 $$"]), quiet).tally, Tally { failed: 1, ..Tally::default() });
        assert_eq!(count(&mut Command::new("/nonexistent"), quiet).tally, Tally { failed: 1, ..Tally::default() });
    }

    #[test]
    fn a_child_that_keeps_the_pipe_does_not_keep_us() {
        let start = Instant::now();
        let tally = count(Command::new("sh").args(["-c", "sleep 60 & echo \"sleeper $!\"; exit 0"]), quiet).tally;
        assert_eq!(tally, Tally { passed: 1, ..Tally::default() });
        assert!(start.elapsed() < Duration::from_secs(30));
    }
}
