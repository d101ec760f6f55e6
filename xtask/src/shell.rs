//! Running other programs: what is shown, from where, as whom, for how long. Every command of xtask goes through here.

use anyhow::{Context as _, Result, bail};
use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// A failure whose last word has been said: the summary line of a suite stays the last line.
#[derive(Debug)]
pub struct Told;

impl std::fmt::Display for Told {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("failed, as told above")
    }
}

impl std::error::Error for Told {}

/// The root of the repository.
pub fn root() -> PathBuf {
    // Set by `cargo run`; the compiled-in value serves a binary that is started by hand.
    let manifest =
        std::env::var_os("CARGO_MANIFEST_DIR").map_or_else(|| PathBuf::from(env!("CARGO_MANIFEST_DIR")), PathBuf::from);
    manifest.parent().map_or_else(|| manifest.clone(), Path::to_path_buf)
}

/// The cargo that runs us.
pub fn cargo() -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(root());
    // What `cargo run` set for xtask itself would make the inner cargo rebuild crates that read it.
    for (name, _) in std::env::vars_os() {
        let name_text = name.to_string_lossy();
        if name_text.starts_with("CARGO_PKG_") || name_text.starts_with("CARGO_MANIFEST_") || name_text == "CARGO_BIN_NAME" {
            command.env_remove(&name);
        }
    }
    command
}

/// Shows and runs a command; an exit code other than zero is an error.
pub fn run(command: &mut Command) -> Result<()> {
    eprintln!("$ {}", line(command));
    let status = command.status().with_context(|| format!("cannot start {}", command.get_program().to_string_lossy()))?;
    if !status.success() {
        bail!("`{}` ended with {status}", line(command));
    }
    Ok(())
}

/// Runs a command without a word of it; an exit code other than zero is an error.
pub fn run_quietly(command: &mut Command) -> Result<()> {
    output(command).map(drop)
}

/// Runs a command quietly and gives its standard output.
pub fn output(command: &mut Command) -> Result<String> {
    let output = command
        .stderr(Stdio::inherit())
        .output()
        .with_context(|| format!("cannot start {}", command.get_program().to_string_lossy()))?;
    if !output.status.success() {
        bail!("`{}` ended with {}", line(command), output.status);
    }
    String::from_utf8(output.stdout).context("output is not UTF-8")
}

/// True if the command can be started and succeeds; shows nothing.
pub fn succeeds(command: &mut Command) -> bool {
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).status().is_ok_and(|status| status.success())
}

/// The command as a reader would type it.
pub fn line(command: &Command) -> String {
    let name = Path::new(command.get_program()).file_name().unwrap_or(command.get_program());
    std::iter::once(name).chain(command.get_args()).map(OsStr::to_string_lossy).collect::<Vec<_>>().join(" ")
}

/// Where `name` is in `PATH` (or in the sbin folders, which a plain user's `PATH` may lack).
pub fn find_program(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(["/usr/sbin", "/sbin", "/usr/local/sbin"].map(PathBuf::from))
        .map(|folder| folder.join(name))
        .find(|file| file.is_file())
}

/// How we can act as root.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Root {
    /// We are root.
    Already,
    /// `sudo` answers without a password.
    Sudo,
    /// Neither.
    No,
}

/// Finds out how we can act as root.
pub fn find_root() -> Root {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    if effective_uid(&status) == Some(0) {
        Root::Already
    } else if succeeds(Command::new("sudo").args(["-n", "true"])) {
        Root::Sudo
    } else {
        Root::No
    }
}

fn effective_uid(proc_status: &str) -> Option<u32> {
    let uids = proc_status.lines().find_map(|line| line.strip_prefix("Uid:"))?;
    uids.split_whitespace().nth(1)?.parse().ok()
}

/// A command that runs `program` as root if we can, as ourselves otherwise.
pub fn as_root(root: Root, program: &Path) -> Command {
    match root {
        Root::Already | Root::No => Command::new(program),
        Root::Sudo => {
            let mut command = Command::new("sudo");
            // PATH is named on its own: sudo's secure_path wins over -E.
            command.args(["-n", "-E", "env"]).arg(format!("PATH={}", std::env::var("PATH").unwrap_or_default())).arg(program);
            command
        }
    }
}

/// Named durations, in the order they were taken.
#[derive(Default)]
pub struct Laps(Vec<(String, Duration)>);

impl Laps {
    /// Runs `work` and notes how long it took.
    pub fn time<T>(&mut self, name: &str, work: impl FnOnce() -> T) -> T {
        let start = Instant::now();
        let value = work();
        self.add(name, start.elapsed());
        value
    }

    /// Adds to the lap called `name`.
    pub fn add(&mut self, name: &str, took: Duration) {
        match self.0.iter_mut().find(|(known, _)| known == name) {
            Some((_, sum)) => *sum += took,
            None => self.0.push((name.to_owned(), took)),
        }
    }

    /// One line per lap and the sum.
    pub fn print(&self) {
        for (name, took) in &self.0 {
            println!("{:>8.1} s  {name}", took.as_secs_f64());
        }
        println!("{:>8.1} s  in all", self.0.iter().map(|(_, took)| took.as_secs_f64()).sum::<f64>());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn effective_uid_is_the_second_number() {
        assert_eq!(effective_uid("Name:\tx\nUid:\t1000\t0\t1000\t1000\nGid:\t1\n"), Some(0));
        assert_eq!(effective_uid("Uid:\t1000\t1000\t1000\t1000\n"), Some(1000));
        assert_eq!(effective_uid("Name:\tx\n"), None);
    }

    #[test]
    fn laps_of_one_name_are_summed() {
        let mut laps = Laps::default();
        laps.add("a", Duration::from_secs(1));
        laps.add("b", Duration::from_secs(5));
        laps.add("a", Duration::from_secs(2));
        assert_eq!(laps.0, vec![("a".into(), Duration::from_secs(3)), ("b".into(), Duration::from_secs(5))]);
    }
}
