//! No cycles between the top-level modules of a crate. A cycle means that two modules are one, or that a third is missing.
//!
//! Edges are read from paths in the source (`crate::x`, `super::x`, also through names re-exported by the crate root);
//! tests are left out. Refuses to guess: paths inside macros of other crates are not seen.

use super::is_test_file;
use super::rust::{Token, tokens, without_comments_and_literals, without_test_modules};
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

/// One source file of a crate.
pub struct File {
    /// What to call it in messages.
    pub shown: String,
    /// Its path below `src`.
    pub inside: PathBuf,
    pub text: String,
}

type Edges = BTreeMap<String, BTreeMap<String, String>>;

/// Every cycle, described with the places that make it.
pub fn cycles(files: &[File]) -> Vec<String> {
    let edges = edges(files);
    groups(&edges)
        .into_iter()
        .map(|group| {
            let places: Vec<String> = group
                .iter()
                .flat_map(|from| edges[from].iter().map(move |(to, place)| (from, to, place)))
                .filter(|(_, to, _)| group.contains(*to))
                .map(|(from, to, place)| format!("\n    {from} → {to}  at {place}"))
                .collect();
            format!("modules use each other: {}{}", group.iter().cloned().collect::<Vec<_>>().join(", "), places.concat())
        })
        .collect()
}

/// Who uses whom among the top-level modules, with the first place that says so.
fn edges(files: &[File]) -> Edges {
    let files: Vec<&File> = files.iter().filter(|file| !is_test_file(&file.inside) && !file.inside.starts_with("bin")).collect();
    let names: BTreeSet<String> = files.iter().filter_map(|file| path_of(&file.inside)?.into_iter().next()).collect();
    let exported = exported_names(&files, &names);
    let mut edges: Edges = names.iter().map(|name| (name.clone(), BTreeMap::new())).collect();
    for file in &files {
        let Some(path) = path_of(&file.inside) else { continue };
        let Some(from) = path.first() else { continue };
        let code = without_comments_and_literals(&file.text);
        for (target, line) in targets(&without_test_modules(&tokens(&code)), path.len()) {
            let Some(to) = names.get(target).or_else(|| exported.get(target)) else { continue };
            if to != from {
                edges.entry(from.clone()).or_default().entry(to.clone()).or_insert_with(|| format!("{}:{line}", file.shown));
            }
        }
    }
    edges
}

/// `a/b.rs` → `[a, b]`; none for crate roots.
fn path_of(inside: &Path) -> Option<Vec<String>> {
    let path: Vec<String> =
        inside.with_extension("").components().map(|part| part.as_os_str().to_string_lossy().into_owned()).collect();
    (!matches!(path.iter().map(String::as_str).collect::<Vec<_>>()[..], ["lib" | "main" | "build"])).then_some(path)
}

/// Names at the crate root that are re-exports, with the module they come from.
fn exported_names(files: &[&File], names: &BTreeSet<String>) -> BTreeMap<String, String> {
    let mut exported = BTreeMap::new();
    for root in files.iter().filter(|file| path_of(&file.inside).is_none()) {
        let code = without_comments_and_literals(&root.text);
        let all = tokens(&code);
        for at in (0..all.len()).filter(|&at| all[at].text == "use") {
            for path in use_tree(&all, at + 1) {
                let mut path = &path[..];
                while let [first, tail @ ..] = path
                    && matches!(first.text, "crate" | "self")
                {
                    path = tail;
                }
                if let [module, .., last] = path
                    && names.contains(module.text)
                {
                    exported.insert(last.text.to_owned(), module.text.to_owned());
                }
            }
        }
    }
    exported
}

/// What a file at `depth` below the root uses of the crate root, with the line.
fn targets<'a>(all: &[Token<'a>], depth: usize) -> Vec<(&'a str, usize)> {
    let mut found = Vec::new();
    for at in 0..all.len() {
        let starts = matches!(all[at].text, "crate" | "super") && at.checked_sub(1).is_none_or(|before| all[before].text != "::");
        if !starts {
            continue;
        }
        for path in use_tree(all, at) {
            let supers = path.iter().take_while(|token| token.text == "super").count();
            let below = match path.first() {
                Some(first) if first.text == "crate" => &path[1..],
                _ if supers == depth => &path[supers..],
                _ => continue,
            };
            found.extend(below.first().map(|token| (token.text, token.line)));
        }
    }
    found
}

/// The paths of the tree that starts at this token: `a::{b, c::d}` gives `a::b` and `a::c::d`. `as` names replace the last word.
fn use_tree<'a>(all: &[Token<'a>], start: usize) -> Vec<Vec<Token<'a>>> {
    let mut paths = Vec::new();
    read_tree(all, start, &mut Vec::new(), &mut paths);
    paths
}

fn read_tree<'a>(all: &[Token<'a>], start: usize, before: &mut Vec<Token<'a>>, paths: &mut Vec<Vec<Token<'a>>>) -> usize {
    let kept = before.len();
    let mut at = start;
    while let Some(&token) = all.get(at) {
        if token.text == "{" && (at == start || all[at - 1].text == "::") {
            at += 1;
            while all.get(at).is_some_and(|token| token.text != "}") {
                let next = read_tree(all, at, before, paths);
                // A tree always takes a word; what is not one (`,`) is stepped over.
                at = next.max(at + 1);
            }
            before.truncate(kept);
            return at + 1;
        }
        if !token.text.starts_with(|c: char| c.is_alphanumeric() || c == '_' || c == '*') {
            break;
        }
        before.push(token);
        at += 1;
        if all.get(at).is_some_and(|token| token.text == "as") {
            if let (Some(last), Some(&alias)) = (before.last_mut(), all.get(at + 1)) {
                *last = alias;
            }
            at += 2;
        }
        if all.get(at).is_none_or(|token| token.text != "::") {
            break;
        }
        at += 1;
    }
    if before.len() > kept {
        paths.push(before.clone());
    }
    before.truncate(kept);
    at
}

/// Sets of modules that can all reach each other, larger than one.
fn groups(edges: &Edges) -> Vec<BTreeSet<String>> {
    let reach: BTreeMap<&String, BTreeSet<&String>> = edges.keys().map(|from| (from, reachable(edges, from))).collect();
    let mut groups = BTreeSet::new();
    for (from, reached) in &reach {
        let group: BTreeSet<String> =
            reached.iter().filter(|to| reach.get(*to).is_some_and(|back| back.contains(*from))).map(|to| (*to).clone()).collect();
        if group.len() > 1 {
            groups.insert(group);
        }
    }
    groups.into_iter().collect()
}

fn reachable<'a>(edges: &'a Edges, from: &'a String) -> BTreeSet<&'a String> {
    let mut seen = BTreeSet::new();
    let mut open = vec![from];
    while let Some(next) = open.pop() {
        open.extend(edges.get(next).into_iter().flat_map(BTreeMap::keys).filter(|to| seen.insert(*to)));
    }
    seen
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(inside: &str, text: &str) -> File {
        File { shown: inside.into(), inside: inside.into(), text: text.into() }
    }

    fn found(files: &[(&str, &str)]) -> Vec<String> {
        edges(&files.iter().map(|(inside, text)| file(inside, text)).collect::<Vec<_>>())
            .iter()
            .flat_map(|(from, to)| to.iter().map(move |(to, place)| format!("{from}→{to} {place}")))
            .collect()
    }

    #[test]
    fn edges_are_read_from_every_kind_of_path() {
        let others = [("b.rs", ""), ("c.rs", ""), ("d.rs", ""), ("e.rs", ""), ("f.rs", "")];
        let mut files = vec![
            ("lib.rs", "mod a; pub use e::{Name, inner::Other as Alias};"),
            ("a.rs", "use crate::{b::X, c::{Y, Z as W}};\nuse super::d;"),
            ("a/child.rs", "use super::sibling::f; use super::super::f::G;\nfn x() -> crate::Name { crate::Alias::<u8>::new() }"),
        ];
        files.extend(others);
        assert_eq!(found(&files), ["a→b a.rs:1", "a→c a.rs:1", "a→d a.rs:2", "a→e a/child.rs:2", "a→f a/child.rs:1"]);
    }

    #[test]
    fn tests_comments_and_strings_make_no_edges() {
        let files = [
            ("a.rs", "// crate::b\n#[cfg(test)]\nmod tests { use crate::b; }\nconst S: &str = \"crate::b\";"),
            ("a/tests.rs", "use crate::b;"),
            ("b.rs", "use crate::a;"),
            ("bin/tool.rs", "use crate::a;"),
        ];
        assert_eq!(found(&files), ["b→a b.rs:1"]);
    }

    #[test]
    fn a_cycle_is_found_and_told_where() {
        let files = [
            file("a.rs", "use crate::b;"),
            file("b.rs", "\nuse crate::c::X;"),
            file("c/deep.rs", "use crate::a;"),
            file("d.rs", "use crate::a;"),
        ];
        let told = cycles(&files);
        assert_eq!(
            told,
            ["modules use each other: a, b, c\n    a → b  at a.rs:1\n    b → c  at b.rs:2\n    c → a  at c/deep.rs:1"]
        );
    }

    #[test]
    fn a_tree_without_cycles_is_silent() {
        let files = [file("a.rs", "use crate::b; use crate::c;"), file("b.rs", "use crate::c;"), file("c.rs", "use crate::{};")];
        assert_eq!(cycles(&files), Vec::<String>::new());
    }
}
