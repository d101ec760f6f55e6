//! The program as a pipeline uses it: arguments in, text and exit code out. Folders are in `shop` (a mesh that works) and
//! `faulty` (one of each fault); what is printed about them is in `golden`. `CULVERT_BLESS=1` writes the golden files anew.
#![expect(clippy::expect_used, reason = "a suite: what is not there fails it")]
use std::path::{Path, PathBuf};
use std::process::Command;

mod analyze;
mod views;
mod why;

/// What a run gave.
#[derive(Debug)]
struct Ran {
    code: i32,
    out: String,
    err: String,
}

fn workspace() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the crate is in the workspace")
}
/// A folder of this suite, as it is printed.
const SHOP: &str = "meshctl/tests/meshctl/shop";
const FAULTY: &str = "meshctl/tests/meshctl/faulty";
const ZAMAZ: &str = "manifests/examples/zamaz";

/// Runs the program in the root of the workspace, with nothing of the caller's settings.
fn meshctl(args: &[&str]) -> Ran {
    let mut command = Command::new(env!("CARGO_BIN_EXE_meshctl"));
    let kept = std::env::var_os("LLVM_PROFILE_FILE");
    command.args(args).current_dir(workspace()).env_clear();
    if let Some(kept) = kept {
        command.env("LLVM_PROFILE_FILE", kept);
    }
    let output = command.output().expect("the program runs");
    Ran {
        code: output.status.code().expect("it ends by itself"),
        out: String::from_utf8(output.stdout).expect("text"),
        err: String::from_utf8(output.stderr).expect("text"),
    }
}

/// Compares with a golden file, or writes it.
fn golden(name: &str, text: &str) {
    let path: PathBuf = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/meshctl/golden").join(name);
    if std::env::var_os("CULVERT_BLESS").is_some() {
        std::fs::write(&path, text).expect("write the golden file");
        return;
    }
    let want = std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}; run with CULVERT_BLESS=1", path.display()));
    assert!(want == text, "{name} differs; CULVERT_BLESS=1 writes it anew\n--- wanted\n{want}\n--- got\n{text}");
}

#[test]
fn help_and_usage() {
    let help = meshctl(&["--help"]);
    assert_eq!(help.code, 0);
    for command in ["why", "analyze", "workloads", "services", "policies", "certificates", "tunnels", "version"] {
        assert!(help.out.contains(command), "{command} is not in the help");
    }
    assert_eq!(meshctl(&["nonsense"]).code, 2);
    assert_eq!(meshctl(&["why"]).code, 2, "no source and no destination");
    assert_eq!(meshctl(&["version"]).out.trim(), concat!("meshctl ", env!("CARGO_PKG_VERSION")));
}
