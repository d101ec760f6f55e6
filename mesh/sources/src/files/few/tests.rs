//! A few changed files and all of them say the same, and the few cost the few.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use mesh_model::Change;
use mesh_model::snapshot::Viewpoint;
use proptest::prelude::*;

use crate::files::{Folder, Touched};
use crate::translate::Settings;

fn folder(root: &Path) -> Folder {
    Folder::new(root, Viewpoint::default(), &Settings { layer7: true, ..Settings::default() })
}
fn pod(name: usize, version: usize) -> String {
    format!(
        "apiVersion: v1\nkind: Pod\nmetadata: {{name: p{name}, namespace: a}}\nstatus: {{podIP: 10.{version}.{}.{}}}\n",
        name >> 8,
        name & 255
    )
}
fn touched(names: &[&str]) -> Touched {
    Touched::Names(names.iter().map(PathBuf::from).collect())
}

#[test]
fn what_a_change_compares_follows_from_the_change() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let mut all = folder(dir.path());
    for n in 0..500 {
        fs::write(at(&format!("{n}.yaml")), pod(n, 1)).unwrap();
    }
    all.reload().unwrap();
    let mut compared = |names: &[&str]| (all.reload_touched(&touched(names)).unwrap().len(), all.compared);
    fs::write(at("7.yaml"), pod(7, 2)).unwrap();
    assert_eq!(compared(&["7.yaml"]), (1, 2), "one that changed");
    fs::write(at("new.yaml"), pod(500, 1) + "---\n" + &pod(501, 1)).unwrap();
    assert_eq!(compared(&["new.yaml"]), (2, 2), "two that came");
    fs::rename(at("new.yaml"), at("newer.yaml")).unwrap();
    assert_eq!(compared(&["new.yaml", "newer.yaml"]), (2, 4), "two that moved");
    fs::remove_file(at("newer.yaml")).unwrap();
    assert_eq!(compared(&["newer.yaml"]), (2, 2), "two that went");
    assert_eq!(compared(&["7.yaml"]), (0, 0), "nothing");
    // What is there twice concerns any file.
    fs::write(at("twice.yaml"), pod(8, 3)).unwrap();
    assert!(compared(&["twice.yaml"]).1 >= 500);
    fs::remove_file(at("twice.yaml")).unwrap();
    assert!(compared(&["twice.yaml"]).1 >= 500);
    fs::remove_file(at("7.yaml")).unwrap();
    assert_eq!(compared(&["7.yaml"]), (1, 1), "and then no more");
}

/// Changes, in an order of their own.
fn told(changes: Option<Vec<Change>>) -> Vec<String> {
    let mut all: Vec<String> = changes.unwrap().iter().map(|change| format!("{change:?}")).collect();
    all.sort();
    all
}
/// A document of one of a few objects; some say the same as others, some cannot be used.
fn document(n: usize) -> String {
    let (kind, name, version) = (n % 5, n / 5 % 4, n / 20 % 3);
    let policy = |spec: &str| {
        format!(
            "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {{name: x{name}, namespace: a}}\nspec: {spec}\n"
        )
    };
    match (kind, version) {
        (0 | 1, _) => pod(name, version),
        (2, 0) => policy("{rules: [{}]}"),
        (2, 1) => policy("{action: DENY, rules: [{}]}"),
        (2, _) => policy("{rules: [{}"),
        (3, 0) => format!("kind: Pod\nmetadata: {{name: p{name}, namespace: a}}\nstatus: {{podIP: oops}}\n"),
        (3, 1) => "kind: [\n".into(),
        (3, _) => String::new(),
        (_, _) => format!(
            "apiVersion: v1\nkind: List\nitems:\n- {{apiVersion: v1, kind: Pod, metadata: {{name: p{name}, namespace: a}}, status: {{podIP: 10.9.9.{version}}}}}\n\
             - {{apiVersion: v1, kind: Service, metadata: {{name: s{name}, namespace: a}}, spec: {{clusterIP: 10.1.0.{version}}}}}\n"
        ),
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 150, failure_persistence: None, ..ProptestConfig::default() })]
    /// `steps`: a file, and the documents it has from now on (it goes with `None`), or the file it becomes.
    #[test]
    fn a_few_and_all_say_the_same(
        steps in proptest::collection::vec(
            (0..5_usize, proptest::option::of(proptest::collection::vec(0..60_usize, 0..4)), proptest::option::weighted(0.2, 0..5_usize)),
            1..12,
        ),
        calm in any::<bool>(),
    ) {
        let dir = tempfile::tempdir().unwrap();
        let (mut few, mut all) = (folder(dir.path()), folder(dir.path()));
        prop_assert_eq!(told(few.reload()), told(all.reload()));
        for (file, documents, becomes) in steps {
            let name = |n: usize| format!("{n}.yaml");
            let path = dir.path().join(name(file));
            let mut names = vec![name(file)];
            match (documents, becomes) {
                (_, Some(other)) => {
                    let _unless_it_is_there = fs::rename(&path, dir.path().join(name(other)));
                    names.push(name(other));
                }
                (None, None) => {
                    let _unless_it_is_there = fs::remove_file(&path);
                }
                // Half of the time nothing is there twice: each file has names of its own.
                (Some(documents), None) => {
                    let own = |n: &usize| if calm { pod(file * 60 + n, n % 3) } else { document(*n) };
                    let documents: BTreeSet<String> = documents.iter().map(own).collect();
                    fs::write(&path, documents.into_iter().collect::<Vec<_>>().join("---\n")).unwrap();
                }
            }
            // As if it did not know that everything is in order.
            (all.plain, all.complained) = (false, true);
            let names: Vec<&str> = names.iter().map(String::as_str).collect();
            let touched = touched(&names);
            prop_assert_eq!(told(few.reload_touched(&touched)), told(all.reload_touched(&touched)));
            prop_assert_eq!(&few.held, &all.held);
            prop_assert_eq!(few.problems(), all.problems());
            prop_assert!(few.plain || !all.plain, "it would never know again");
        }
    }
}
