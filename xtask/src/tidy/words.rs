//! What must not be committed in any text file: paths of one person's machine, and marks of an unfinished merge.

use crate::shell;
use anyhow::Result;
use std::path::Path;
use std::process::Command;

/// Starts of paths that exist on one machine only. Written in halves so that this file does not hold them.
const PATHS: &[&[&str]] = &[&["/ho", "me/"], &["/Us", "ers/"], &["/wo", "rk/"], &["/ro", "ot/"], &["C:", "\\\\"]];
const MARKS: &[&[&str]] = &[&["<<<<", "<<< "], &[">>>>", ">>> "], &["FIX", "ME"], &["XX", "X:"]];
/// Generated or foreign text.
const NOT_OURS: &[&str] = &["LICENSE", "Cargo.lock"];
const LARGEST: u64 = 4 * 1024 * 1024;

/// Every banned word in every file that git tracks or would track.
pub fn check(root: &Path) -> Result<Vec<String>> {
    let list =
        shell::output(Command::new("git").args(["ls-files", "--cached", "--others", "--exclude-standard"]).current_dir(root))?;
    let mut faults = Vec::new();
    for name in list.lines().filter(|name| !NOT_OURS.iter().any(|skip| name.ends_with(skip))) {
        let path = root.join(name);
        let Ok(about) = std::fs::metadata(&path) else { continue };
        if about.len() > LARGEST {
            faults.push(format!("{name}: {} KiB is too large to commit", about.len() / 1024));
        } else if let Ok(text) = std::fs::read_to_string(&path) {
            faults.extend(faults_of(name, &text));
        }
    }
    Ok(faults)
}

fn faults_of(name: &str, text: &str) -> Vec<String> {
    let whole = |list: &[&[&str]]| list.iter().map(|halves| halves.concat()).collect::<Vec<_>>();
    let (paths, marks) = (whole(PATHS), whole(MARKS));
    let mut faults = Vec::new();
    for (number, line) in text.lines().enumerate() {
        // A path of a machine starts at a word boundary: one inside a URL does not.
        let at_start = |path: &String| {
            line.match_indices(path.as_str())
                .any(|(at, _)| !line[..at].ends_with(|c: char| c.is_alphanumeric() || matches!(c, '_' | '-' | '.' | '}' | ')')))
        };
        let hit = paths.iter().find(|path| at_start(path)).or_else(|| marks.iter().find(|mark| line.contains(mark.as_str())));
        faults.extend(hit.map(|word| format!("{name}:{}: holds `{word}`", number + 1)));
    }
    faults
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn machine_paths_and_marks_are_found() {
        let home = ["/ho", "me/someone"].concat();
        let mark = ["FIX", "ME later"].concat();
        let text = format!("fine\nsee {home}\nhttps://example.org{home}\n// {mark}\n");
        assert_eq!(faults_of("a.md", &text).len(), 2, "{:?}", faults_of("a.md", &text));
    }
}
