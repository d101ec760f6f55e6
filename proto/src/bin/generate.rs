//! `cargo xtask proto [--check]`: the Rust of the messages, from `defs/`, one file per protobuf package.
//!
//! Needs no protoc: the definitions are compiled in Rust. With `--check` nothing is written and a difference fails.
//! Upstream: `defs/`. Downstream: `src/istio`, `src/envoy`, `src/spiffe`, `src/google`,
//! `src/opentelemetry`, which are committed.
#![forbid(unsafe_code)]

use std::collections::{BTreeMap, BTreeSet};
use std::error::Error;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::{env, fs};

use protox::prost::Message as _;

/// Everything else comes in by import.
const ROOTS: [&str; 8] = [
    "istio/security.proto",
    "istio/ca.proto",
    "istio/zds.proto",
    "envoy/discovery.proto",
    "envoy/auth.proto",
    "spiffe/delegated.proto",
    "spiffe/workload.proto",
    "opentelemetry/collector.proto",
];

fn main() -> ExitCode {
    let check = env::args().nth(1).as_deref() == Some("--check");
    match run(check) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(check: bool) -> Result<(), Box<dyn Error>> {
    let home = Path::new(env!("CARGO_MANIFEST_DIR"));
    let (source, wanted) = (home.join("src"), generate(&home.join("defs"))?);
    if !check {
        for (file, text) in &wanted {
            let path = source.join(file);
            if let Some(folder) = path.parent() {
                fs::create_dir_all(folder)?;
            }
            fs::write(path, text)?;
        }
        println!("{} files are up to date", wanted.len());
        return Ok(());
    }
    let stale: Vec<String> = wanted
        .iter()
        .filter(|(file, text)| fs::read_to_string(source.join(file)).ok().as_ref() != Some(*text))
        .map(|(file, _)| file.display().to_string())
        .collect();
    if stale.is_empty() {
        println!("{} files are what their definitions say", wanted.len());
        return Ok(());
    }
    Err(format!("older than the definitions: {}; run `cargo xtask proto` and look at what changed", stale.join(", ")).into())
}

/// The text of each file below `src`.
fn generate(defs: &Path) -> Result<BTreeMap<PathBuf, String>, Box<dyn Error>> {
    let mut set = protox::compile(ROOTS, [defs])?;
    // The definitions' own comments are about the wire; the Rust is read beside them, not instead.
    for file in &mut set.file {
        file.source_code_info = None;
    }
    // The two crates may differ in their version of the descriptors: bytes are what they share.
    let set = prost_types::FileDescriptorSet::decode(set.encode_to_vec().as_slice())?;
    let mut packages: BTreeSet<String> = set.file.iter().map(|file| file.package().to_owned()).collect();
    // Those are in `prost-types`.
    packages.remove("google.protobuf");
    let modules =
        set.file.into_iter().map(|file| (prost_build::Module::from_protobuf_package_name(file.package()), file)).collect();
    let mut config = prost_build::Config::new();
    // Shared bytes of the received frame; maps in an order of their own, so that equal messages are equal bytes.
    config.bytes(["."]).btree_map(["."]);
    let generated = config.generate(modules)?;
    let file = |name: &str| PathBuf::from(name.replace('.', "/")).with_extension("rs");
    let mut out = BTreeMap::new();
    for (module, body) in generated {
        let package = module.parts().collect::<Vec<_>>().join(".");
        if !packages.contains(&package) {
            continue;
        }
        let head = format!(
            "//! Package `{package}`: made by `cargo xtask proto`, not by hand.\n\
             #![allow(missing_docs, clippy::all, clippy::pedantic, reason = \"generated\")]\n\n"
        );
        let children: String = packages
            .iter()
            .filter_map(|other| other.strip_prefix(&format!("{package}.")))
            .filter(|child| !child.contains('.'))
            .map(|child| format!("\npub mod {child};\n"))
            .collect();
        out.insert(file(&package), head + &body + &children);
    }
    Ok(out)
}
