//! `tests/README.md` names the tests of every phase and rule: a test that is renamed or removed must not leave a claim behind, and
//! no phase comes without a row.

use anyhow::{Context as _, Result};
use std::collections::BTreeSet;
use std::path::Path;

/// Where the tables are.
const TABLES: &str = "tests/README.md";
/// Where the phases are declared.
const PHASES: &str = "waypoint/src/phase.rs";

/// Every name in the tables that is of no function, and every phase that has no row. `sources`: files and their texts.
pub fn check<'a>(root: &Path, sources: impl IntoIterator<Item = (&'a Path, &'a str)>) -> Result<Vec<String>> {
    let tables = std::fs::read_to_string(root.join(TABLES)).context(TABLES)?;
    let phases = std::fs::read_to_string(root.join(PHASES)).context(PHASES)?;
    let known: BTreeSet<String> = sources.into_iter().flat_map(|(file, text)| functions(file, text)).collect();
    let unknown = named(&tables).filter(|name| !known.contains(*name)).map(|name| format!("{TABLES}: there is no test {name}"));
    let declared = phases.lines().filter_map(|line| line.strip_prefix("pub(crate) mod ")?.strip_suffix(';'));
    let bare = declared.filter(|phase| !tables.contains(&format!("\n| `{phase}` |")));
    Ok(unknown.chain(bare.map(|phase| format!("{TABLES}: the phase {phase} has no row"))).collect())
}

/// `file::function` of all functions of a file; those of `tests.rs` go by the folder it is in.
fn functions(file: &Path, text: &str) -> Vec<String> {
    let stem = |path: &Path| path.file_stem().map(|stem| stem.to_string_lossy().into_owned());
    let own = stem(file).filter(|stem| stem != "tests").or_else(|| stem(file.parent()?)).unwrap_or_default();
    let names = text.split("fn ").skip(1).filter_map(|rest| rest.split(['(', '<']).next());
    names.filter(|name| is_word(name)).map(|name| format!("{own}::{name}")).collect()
}

/// Names of tests in a text: in backticks, of two words.
fn named(text: &str) -> impl Iterator<Item = &str> {
    let quoted = text.split('`').skip(1).step_by(2);
    quoted.filter(|quoted| quoted.split_once("::").is_some_and(|(file, name)| is_word(file) && is_word(name)))
}

fn is_word(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_found_and_looked_up() {
        let text = "| `a` | `a::b_c`, `x` and `A::b`\n| `d::e2` |";
        assert_eq!(named(text).collect::<Vec<_>>(), ["a::b_c", "d::e2"]);
        let of = |file: &str| functions(Path::new(file), "fn b_c() {}\nasync fn one<T>(x: fn (u8)) {}");
        assert_eq!(of("m/src/a.rs"), ["a::b_c", "a::one"]);
        assert_eq!(of("m/src/a/tests.rs"), of("m/src/a.rs"));
    }
}
