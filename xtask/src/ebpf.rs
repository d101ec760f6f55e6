//! `cargo xtask ebpf [--check] [--no-setup]`: builds the kernel programs, or checks that the committed object is what they say.
//!
//! Owns the pinned toolchain and the flags that make the object the same bytes wherever it is built. The object and the
//! digests of everything it was made from are committed (`ebpf/loader/obj`), so that `cargo build` needs none of this and a
//! forgotten rebuild shows without it. The digest file is in `sha256sum --check` format, from the repository's root.
use crate::shell::{self, Root};
use anyhow::{Context as _, Result, bail, ensure};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

const OBJECT: &str = "ebpf/loader/obj/redirect.bpf.o";
const DIGESTS: &str = "ebpf/loader/obj/redirect.sha256";

/// What an object is made from, besides the files below `SOURCE_FOLDERS`.
const SOURCES: [&str; 3] = ["ebpf/common/Cargo.toml", "ebpf/prog/Cargo.toml", "ebpf/prog/Cargo.lock"];
const SOURCE_FOLDERS: [&str; 2] = ["ebpf/common/src", "ebpf/prog/src"];

/// Debian 12's build of the compiler is the one with a `core` for BPF; a new version means a new object.
const PACKAGES: [(&str, &str); 4] = [
    ("rustc-web", "1.96.0+dfsg1-1~deb12u2"),
    ("cargo-web", "1.96.0+dfsg1-1~deb12u2"),
    ("libstd-rust-web-dev-bpf", "1.96.0+dfsg1-1~deb12u2"),
    ("llvm-22-dev", "1:22.1.8-1~deb12u1"),
];
/// Needed to build the linker; its version does not show in the object.
const COMPILER: &str = "g++";
const LINKER_VERSION: &str = "0.13.0";
const LLVM: &str = "/usr/lib/llvm-22";
const RUSTC: &str = "/usr/bin/rustc";
const CARGO: &str = "/usr/bin/cargo";

const USAGE: &str = "\
cargo xtask ebpf [--check] [--no-setup]
  builds ebpf/prog and writes the object that ebpf-loader embeds, with the digests of its sources
  --check      writes nothing: compares the digests, and rebuilds and compares the object where the toolchain is installed
  --no-setup   installs nothing; without the toolchain a build fails";

/// Runs the command.
pub fn run(args: &[String]) -> Result<()> {
    let (mut check, mut setup) = (false, true);
    for arg in args {
        match arg.as_str() {
            "--check" => check = true,
            "--no-setup" => setup = false,
            "-h" | "--help" => {
                println!("{USAGE}");
                return Ok(());
            }
            other => bail!("unknown argument {other}\n{USAGE}"),
        }
    }
    if check { self::check() } else { build_and_write(setup) }
}

fn build_and_write(setup: bool) -> Result<()> {
    let linker = match toolchain() {
        Ok(linker) => linker,
        Err(_) if setup => install()?,
        Err(missing) => return Err(missing),
    };
    let root = shell::root();
    let built = build(&linker)?;
    fs::create_dir_all(root.join(OBJECT).parent().context("the object has a folder")?)?;
    fs::copy(&built, root.join(OBJECT)).with_context(|| format!("cannot write {OBJECT}"))?;
    fs::write(root.join(DIGESTS), digests(&root)?).with_context(|| format!("cannot write {DIGESTS}"))?;
    println!("{OBJECT} and {DIGESTS} are up to date");
    Ok(())
}

fn check() -> Result<()> {
    let root = shell::root();
    let recorded = fs::read_to_string(root.join(DIGESTS)).with_context(|| format!("cannot read {DIGESTS}"))?;
    let changed = difference(&recorded, &digests(&root)?);
    ensure!(
        changed.is_empty(),
        "the eBPF object is older than its sources, run `cargo xtask ebpf`; changed: {}",
        changed.join(", ")
    );
    match toolchain() {
        Err(missing) => eprintln!("SKIPPED: ebpf rebuild: {missing:#}"),
        Ok(linker) => {
            let built = build(&linker)?;
            ensure!(
                fs::read(&built)? == fs::read(root.join(OBJECT))?,
                "{OBJECT} is not what its sources build to; run `cargo xtask ebpf` and look at what changed"
            );
            println!("{OBJECT} was rebuilt, byte for byte the same");
        }
    }
    Ok(())
}

/// The digest file as it should be: the toolchain, then one line per source and for the object.
fn digests(root: &Path) -> Result<String> {
    let mut files: Vec<PathBuf> = SOURCES.iter().map(PathBuf::from).collect();
    for folder in SOURCE_FOLDERS {
        collect(root, Path::new(folder), &mut files)?;
    }
    files.sort();
    files.push(OBJECT.into());
    let sums = shell::output(Command::new("sha256sum").current_dir(root).arg("--").args(&files))?;
    Ok(format!("{}{sums}", header()))
}

/// Lines that `sha256sum --check` takes for comments.
fn header() -> String {
    let packages = PACKAGES.map(|(package, version)| format!("# {package} {version}\n"));
    format!("# bpf-linker {LINKER_VERSION}\n{}", packages.concat())
}

fn collect(root: &Path, folder: &Path, files: &mut Vec<PathBuf>) -> Result<()> {
    let path = root.join(folder);
    for entry in fs::read_dir(&path).with_context(|| format!("cannot read {}", path.display()))? {
        let entry = entry?;
        let name = folder.join(entry.file_name());
        if entry.file_type()?.is_dir() {
            collect(root, &name, files)?;
        } else {
            files.push(name);
        }
    }
    Ok(())
}

/// The last words of lines that are in only one of the two texts, each once: file names, or a package's version.
fn difference(recorded: &str, actual: &str) -> Vec<String> {
    let only =
        |a: &str, b: &str| a.lines().filter(|line| !b.lines().any(|other| other == *line)).map(str::to_owned).collect::<Vec<_>>();
    let mut names: Vec<String> = only(recorded, actual)
        .into_iter()
        .chain(only(actual, recorded))
        .map(|line| line.strip_prefix("# ").unwrap_or(line.rsplit(' ').next().unwrap_or(&line)).to_owned())
        .collect();
    names.sort();
    names.dedup();
    names
}

/// Where the linker is, if everything is there in the right version.
fn toolchain() -> Result<PathBuf> {
    let missing: Vec<_> = missing_packages().into_iter().map(|(package, version)| format!("{package}={version}")).collect();
    ensure!(missing.is_empty(), "not installed: {}", missing.join(", "));
    linker().with_context(|| format!("bpf-linker {LINKER_VERSION} is neither in BPF_LINKER, target/bpf-tools nor PATH"))
}

fn missing_packages() -> Vec<(&'static str, &'static str)> {
    let installed = |package: &str| {
        let output = Command::new("dpkg-query").args(["-W", "-f=${db:Status-Status} ${Version}", package]).output().ok()?;
        String::from_utf8(output.stdout).ok()
    };
    PACKAGES.into_iter().filter(|(package, version)| installed(package) != Some(format!("installed {version}"))).collect()
}

fn tools_folder() -> PathBuf {
    shell::root().join("target/bpf-tools")
}

fn linker() -> Option<PathBuf> {
    let candidates = [
        std::env::var_os("BPF_LINKER").map(PathBuf::from),
        Some(tools_folder().join("bin/bpf-linker")),
        shell::find_program("bpf-linker"),
    ];
    candidates.into_iter().flatten().find(|path| {
        let version = Command::new(path).arg("--version").output();
        version.is_ok_and(|output| String::from_utf8_lossy(&output.stdout).trim() == format!("bpf-linker {LINKER_VERSION}"))
    })
}

/// Installs what is missing; the linker takes minutes to build.
fn install() -> Result<PathBuf> {
    let missing = missing_packages();
    if !missing.is_empty() || shell::find_program(COMPILER).is_none() {
        let root = shell::find_root();
        ensure!(
            shell::find_program("apt-get").is_some() && root != Root::No,
            "cannot install the eBPF toolchain: it needs Debian 12's apt-get and root; the committed object works without it"
        );
        let apt = |args: &[String]| {
            let mut command = shell::as_root(root, Path::new("apt-get"));
            shell::run(command.env("DEBIAN_FRONTEND", "noninteractive").args(args))
        };
        apt(&["update".to_owned(), "-qq".to_owned()])?;
        let mut args: Vec<String> = ["install", "-y", "-qq", "--no-install-recommends", COMPILER].map(str::to_owned).to_vec();
        args.extend(missing.iter().map(|(package, version)| format!("{package}={version}")));
        apt(&args)
            .context("the pinned packages could not be installed; if Debian moved on, pin the new versions here and rebuild")?;
    }
    if linker().is_none() {
        let mut command = shell::cargo();
        command.env("LLVM_PREFIX", LLVM).args(["install", "bpf-linker", "--version", LINKER_VERSION, "--locked"]);
        command.args(["--no-default-features", "--features", "llvm-22", "--root"]).arg(tools_folder());
        shell::run(&mut command)?;
    }
    toolchain()
}

/// Builds the programs and says where the object is.
fn build(linker: &Path) -> Result<PathBuf> {
    let root = shell::root();
    let target = root.join("target/ebpf");
    let cargo_home = std::env::var_os("CARGO_HOME")
        .map(PathBuf::from)
        .or_else(|| Some(PathBuf::from(std::env::var_os("HOME")?).join(".cargo")));
    // No debug information (so no BTF, which these maps do not need) and no paths: nothing in the object tells where it was built.
    let mut flags = vec![
        "--cfg=bpf_target_arch=\"x86_64\"".to_owned(),
        "-Cdebuginfo=0".to_owned(),
        format!("--remap-path-prefix={}=/culvert", root.display()),
    ];
    flags.extend(cargo_home.map(|home| format!("--remap-path-prefix={}=/cargo", home.display())));

    let mut command = Command::new(CARGO);
    command.current_dir(root.join("ebpf/prog"));
    // Neither what cargo set for xtask nor the developer's own flags may show in the object.
    for (name, _) in std::env::vars_os() {
        let name_text = name.to_string_lossy();
        let ours = ["CARGO_HOME", "CARGO_HTTP_", "CARGO_NET_", "CARGO_REGISTRIES_", "CARGO_SOURCE_"];
        if (name_text.starts_with("CARGO") && !ours.iter().any(|prefix| name_text.starts_with(prefix)))
            || name_text.starts_with("RUST")
        {
            command.env_remove(&name);
        }
    }
    command
        .env("RUSTC", RUSTC)
        // aya-ebpf uses inline assembly, unstable on this target; naming the crate keeps it to that one.
        .env("RUSTC_BOOTSTRAP", "aya_ebpf")
        .env("CARGO_ENCODED_RUSTFLAGS", flags.join("\u{1f}"))
        .env("CARGO_TARGET_DIR", &target)
        .env("CARGO_TARGET_BPFEL_UNKNOWN_NONE_LINKER", linker)
        .args(["build", "--quiet", "--locked", "--release", "--target", "bpfel-unknown-none"]);
    shell::run(&mut command)?;
    Ok(target.join("bpfel-unknown-none/release/redirect"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_difference_is_named_once() {
        let recorded = "# rustc-web 1\naaaa  ebpf/prog/src/main.rs\nbbbb  ebpf/prog/src/old.rs\ncccc  same\n";
        let actual = "# rustc-web 2\nabab  ebpf/prog/src/main.rs\ncccc  same\n";
        assert_eq!(difference(recorded, actual), ["ebpf/prog/src/main.rs", "ebpf/prog/src/old.rs", "rustc-web 1", "rustc-web 2"]);
        assert!(difference(actual, actual).is_empty());
    }

    #[test]
    fn the_committed_object_is_as_old_as_its_sources() {
        let root = shell::root();
        let recorded = fs::read_to_string(root.join(DIGESTS)).unwrap();
        assert_eq!(difference(&recorded, &digests(&root).unwrap()), Vec::<String>::new());
    }
}
