//! The folder: what a change of files changes, what a mistake costs, and the whole way to a published mesh.

use std::collections::BTreeSet;
use std::fs;
use std::time::Duration;

use mesh_model::l7::policy::L7Body;
use mesh_model::policy::{PolicyBody, Scope};
use tempfile::TempDir;

use super::*;
use crate::{Mesh, Origin as From};

fn view() -> Viewpoint {
    Viewpoint { cluster: "c".into(), node: "n".into(), ..Viewpoint::default() }
}
struct Dir {
    dir: TempDir,
    folder: Folder,
}
impl Dir {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let folder = Folder::new(dir.path(), view(), &Settings::default());
        Self { dir, folder }
    }
    /// As a waypoint reads it.
    fn layer7() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let folder = Folder::new(dir.path(), view(), &Settings { layer7: true, ..Settings::default() });
        Self { dir, folder }
    }
    fn put(&self, name: &str, text: &str) -> &Self {
        let path = self.dir.path().join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
        self
    }
    /// Reloads and names what changed: `+` upserts, `-` removals.
    fn reload(&mut self) -> Vec<String> {
        let changes = self.folder.reload().unwrap();
        Self::told(changes)
    }
    /// The same, told that these names may have changed.
    fn touch(&mut self, names: &[&str]) -> Vec<String> {
        let names = names.iter().map(PathBuf::from).collect();
        let changes = self.folder.reload_touched(&Touched::Names(names)).unwrap();
        Self::told(changes)
    }
    fn told(changes: Vec<Change>) -> Vec<String> {
        let mut out: Vec<String> = changes
            .into_iter()
            .map(|c| match c {
                Change::Workload(w) => format!("+{}", w.name),
                Change::WorkloadGone(u) => format!("-{u}"),
                Change::Service(s) => format!("+{}", s.key),
                Change::ServiceGone(k) => format!("-{k}"),
                Change::Policy(p) => match &p.body {
                    PolicyBody::Unusable { .. } => format!("!{:?} {}", p.scope, p.key.namespace),
                    PolicyBody::Rules { .. } => format!("+{}", p.key),
                },
                Change::PolicyGone(k) => {
                    if k.name.starts_with("unreadable:") {
                        format!("-! {}", k.namespace)
                    } else {
                        format!("-{k}")
                    }
                }
                Change::Routes(k, t) => format!("{}routes {k}", if t.broken.is_some() { "!" } else { "+" }),
                Change::RoutesGone(k) => format!("-routes {k}"),
                Change::Destination(d) => format!("{}destination {}", if d.broken.is_some() { "!" } else { "+" }, d.key),
                Change::DestinationGone(k) => format!("-destination {k}"),
                Change::Gateway(g) => format!("+gateway {}", g.key),
                Change::GatewayGone(k) => format!("-gateway {k}"),
                Change::L7Policies(t, all) => {
                    let closed = all.iter().any(|p| matches!(p.body, L7Body::Unusable { .. }));
                    format!("{}policies of {t}", if closed { "!" } else { "+" })
                }
                Change::L7PoliciesGone(t) => format!("-policies of {t}"),
                Change::RequestAuths(t, _) => format!("+request authentication of {t}"),
                Change::RequestAuthsGone(t) => format!("-request authentication of {t}"),
                Change::Telemetry(_) => "telemetry".into(),
                Change::Treatment(target, _) => format!("treatment of {target}"),
                Change::TreatmentGone(target) => format!("-treatment of {target}"),
                Change::Authorizers(_) => "authorizers".into(),
                Change::Defaults(_) => "defaults".into(),
                Change::OwnLocality(_) => "locality".into(),
                Change::OwnNetwork(_) => "network".into(),
                Change::Unread(_) => "unread".into(),
            })
            .collect();
        out.sort();
        out
    }
    fn codes(&self) -> BTreeSet<&'static str> {
        self.folder.problems().iter().filter_map(|p| p.code).collect()
    }
}
fn pod(name: &str, ip: &str) -> String {
    format!(
        "apiVersion: v1\nkind: Pod\nmetadata:\n  name: {name}\n  namespace: a\nspec: {{nodeName: n}}\nstatus: {{podIP: {ip}}}\n"
    )
}
fn ap(name: &str, spec: &str) -> String {
    format!(
        "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata:\n  name: {name}\n  namespace: a\nspec: {spec}\n"
    )
}

#[test]
fn documents_change_one_by_one() {
    let mut d = Dir::new();
    d.put("b/pods.yaml", &[pod("p1", "10.0.0.1"), pod("p2", "10.0.0.2"), pod("p3", "10.0.0.3")].join("---\n"));
    d.put(
        "x.json",
        r#"{"apiVersion":"v1","kind":"Service","metadata":{"name":"s","namespace":"a"},"spec":{"clusterIP":"10.1.0.1"}}"#,
    );
    d.put(".hidden.yaml", &pod("no", "10.0.0.9")).put("notes.txt", "kind: Pod");
    assert_eq!(d.reload(), ["+a/s.a.svc.cluster.local", "+p1", "+p2", "+p3"]);
    assert_eq!(d.reload(), [""; 0]);
    // One document edited, lines inserted above it.
    let text =
        ["# a comment\n\n".to_owned() + &pod("p1", "10.0.0.1"), pod("p2", "10.0.0.22"), pod("p3", "10.0.0.3")].join("---\n");
    d.put("b/pods.yaml", &text);
    let changed = d.reload();
    assert!(changed.contains(&"+p2".to_owned()) && !changed.contains(&"+p3".to_owned()), "{changed:?}");
    fs::remove_file(d.dir.path().join("x.json")).unwrap();
    assert_eq!(d.reload(), ["-a/s.a.svc.cluster.local"]);
    d.put("b/pods.yaml", "");
    assert_eq!(d.reload().len(), 3);
}

#[test]
fn only_what_was_touched_is_looked_at() {
    let mut d = Dir::new();
    d.put("a.yaml", &pod("a", "10.0.0.1")).put("b.yaml", &pod("b", "10.0.0.2")).put("sub/c.yaml", &pod("c", "10.0.0.3"));
    assert_eq!(d.touch(&["a.yaml"]), ["+a", "+b", "+c"], "the first reading is of everything");
    // One of two changes is told.
    d.put("a.yaml", &pod("a", "10.0.1.1")).put("b.yaml", &pod("b", "10.0.1.2"));
    assert_eq!(d.touch(&["a.yaml"]), ["+a"]);
    assert_eq!(d.touch(&[".a.yaml.new", "notes.txt", "nowhere.yaml", ".hidden/b.yaml"]), [""; 0]);
    assert_eq!(d.touch(&["sub/c.yaml", "b.yaml"]), ["+b"]);
    // Files come and go.
    d.put("0.yaml", &pod("zero", "10.0.0.9"));
    assert_eq!(d.touch(&["0.yaml"]), ["+zero"]);
    d.put("z.yaml", &pod("zero", "10.0.0.8"));
    assert_eq!((d.touch(&["z.yaml"]), d.codes()), (vec![], BTreeSet::from(["duplicate"])));
    fs::remove_file(d.dir.path().join("0.yaml")).unwrap();
    assert_eq!((d.touch(&["0.yaml"]), d.codes()), (vec!["+zero".to_owned()], BTreeSet::new()));
    // A mistake in one file is told until it is corrected, whatever else is touched.
    d.put("b.yaml", "kind: [");
    assert_eq!((d.touch(&["b.yaml"]), d.codes()), (vec![], BTreeSet::from(["yaml"])));
    d.put("a.yaml", &pod("a", "10.0.2.1"));
    assert_eq!((d.touch(&["a.yaml"]), d.codes()), (vec!["+a".to_owned()], BTreeSet::from(["yaml"])));
    d.put("b.yaml", &pod("b", "10.0.1.2"));
    assert_eq!((d.touch(&["b.yaml"]), d.codes()), (vec![], BTreeSet::new()));
    // A folder is more than its name.
    fs::rename(d.dir.path().join("sub"), d.dir.path().join("sup")).unwrap();
    d.put("sup/c.yaml", &pod("c", "10.0.3.3"));
    assert_eq!(d.touch(&["sub", "sup"]), ["+c"]);
    fs::remove_dir_all(d.dir.path().join("sup")).unwrap();
    assert_eq!(d.touch(&["sup"]), ["-c//Pod/a/c"]);
    // All of that is what one reading of everything says, too.
    assert_eq!(d.reload(), [""; 0]);
}

#[test]
fn what_a_listing_shows_is_looked_at_a_few_at_a_time() {
    let mut d = Dir::new();
    let name = |n: usize| format!("{n:03}.yaml");
    let put = |d: &Dir, n: usize, version: u8| {
        d.put(&name(n), &pod(&name(n), &format!("10.0.{version}.{}", n % 256)));
    };
    let all = 3 * FEW;
    (0..all).for_each(|n| put(&d, n, 1));
    d.reload();
    let old = list(d.dir.path()).unwrap();
    (0..all).for_each(|n| put(&d, n, 2));
    fs::remove_file(d.dir.path().join(name(0))).unwrap();
    d.put("zz.yaml", &pod("new", "10.0.9.9"));
    let now = list(d.dir.path()).unwrap();
    let listed = |d: &mut Dir, listing: &Listing| {
        let changes = d.folder.reload_touched(&Touched::Listed(listing.clone())).unwrap();
        Dir::told(changes)
    };
    let first = listed(&mut d, &now);
    assert!(first.len() == FEW && first.contains(&format!("-c//Pod/a/{}", name(0))) && d.folder.is_behind(), "{first:?}");
    // Whoever is told of does not wait for the rest, and stays as it is when its turn comes.
    put(&d, all - 1, 3);
    assert_eq!(d.touch(&[&name(all - 1)]), [format!("+{}", name(all - 1))]);
    let mut rest = 0;
    while d.folder.is_behind() {
        rest += d.touch(&[]).len();
    }
    assert_eq!(rest, all + 1 - FEW - 1);
    // A listing that is older than what was read takes nothing back.
    assert_eq!((listed(&mut d, &old), d.folder.is_behind()), (vec![], true));
    while d.folder.is_behind() {
        assert_eq!(d.touch(&[]), [""; 0]);
    }
    assert_eq!(d.reload(), [""; 0]);
}

#[test]
fn with_a_link_every_touch_looks_at_everything() {
    let mut d = Dir::new();
    d.put("..one/a.yaml", &pod("a", "10.0.0.1")).put("..two/a.yaml", &pod("a", "10.0.0.2"));
    let at = |name: &str| d.dir.path().join(name);
    std::os::unix::fs::symlink("..one", at("..data")).unwrap();
    std::os::unix::fs::symlink("..data/a.yaml", at("a.yaml")).unwrap();
    std::os::unix::fs::symlink("..two", at("..next")).unwrap();
    let (next, data) = (at("..next"), at("..data"));
    assert_eq!(d.touch(&["a.yaml"]), ["+a"]);
    // As Kubernetes swaps a volume.
    fs::rename(next, data).unwrap();
    assert_eq!(d.touch(&["..next", "..data"]), ["+a"]);
}

#[test]
fn lists_are_read_item_by_item() {
    let mut d = Dir::new();
    let item = |n: &str, ip: &str| {
        format!("- apiVersion: v1\n  kind: Pod\n  metadata: {{name: {n}, namespace: a}}\n  status: {{podIP: {ip}}}\n")
    };
    d.put(
        "l.yaml",
        &format!("apiVersion: v1\nitems:\n{}{}{}kind: List\n", item("p", "10.0.0.1"), item("q", "oops"), item("r", "10.0.0.3")),
    );
    assert_eq!(d.reload(), ["+p", "+r"]);
    let p = &d.folder.problems()[0];
    assert_eq!((p.origin.line, &*p.origin.object, &*p.field), (10, "Pod a/q", "status.podIP"));
    d.put("l.yaml", &format!("apiVersion: v1\nitems:\n{}{}kind: List\n", item("p", "10.0.0.1"), item("r", "10.0.0.4")));
    let changed = d.reload();
    assert!(changed.contains(&"+r".to_owned()) && !changed.contains(&"+p".to_owned()), "{changed:?}");
}

#[test]
fn a_broken_document_costs_only_itself_and_keeps_what_was() {
    let mut d = Dir::new();
    let (p1, p2) = (pod("p1", "10.0.0.1"), pod("p2", "10.0.0.2"));
    d.put("f.yaml", &format!("{p1}---\n{p2}---\n{}", ap("x", "{rules: [{}]}")));
    assert_eq!(d.reload(), ["+a/x", "+p1", "+p2"]);
    // The first breaks: what it held stays, the others are read.
    d.put(
        "f.yaml",
        &format!("{}---\n{}---\n{}", p1.replace("metadata:", "metadata: ["), pod("p2", "10.0.0.3"), ap("x", "{rules: [{}]}")),
    );
    assert_eq!(d.reload(), ["+p2"]);
    let p = d.folder.problems().iter().find(|p| p.code == Some("yaml")).unwrap();
    assert!(p.origin.line >= 3 && p.origin.line <= 8, "{p}");
    // The policy breaks: its namespace is denied until it is well again, and what it said stays.
    d.put("f.yaml", &format!("{p1}---\n{}---\n{}", pod("p2", "10.0.0.3"), ap("x", "{rules: [{}")));
    assert_eq!(d.reload(), ["!Namespace a"]);
    d.put("f.yaml", &format!("{p1}---\n{}---\n{}", pod("p2", "10.0.0.3"), ap("x", "{action: DENY}")));
    assert_eq!(d.reload(), ["+a/x", "-! a"]);
    assert_eq!(d.codes(), BTreeSet::from(["no-rules"]));
    // Unreadable namespace: later, the last good state; at start, everything is denied.
    let unreadable = "kind: AuthorizationPolicy\nmetadata: {namespace: a\n";
    d.put("f.yaml", unreadable);
    assert_eq!(d.reload(), [""; 0]);
    let mut e = Dir::new();
    e.put("f.yaml", unreadable).put("g.yaml", &p1);
    assert_eq!(e.reload(), ["!Global istio-system", "+p1"]);
    e.put("f.yaml", "");
    assert_eq!(e.reload(), ["-! istio-system"]);
}

#[test]
fn a_refused_object_stays_as_it_was_until_it_goes() {
    let mut d = Dir::new();
    let (p, q) = (pod("p", "10.0.0.1"), pod("q", "10.0.0.2"));
    d.put("f.yaml", &format!("{p}---\n{q}"));
    assert_eq!(d.reload(), ["+p", "+q"]);
    d.put("f.yaml", &format!("{}---\n{q}", pod("p", "oops")));
    assert_eq!(d.reload(), [""; 0]);
    assert_eq!(d.codes(), BTreeSet::from(["bad-value"]));
    d.put("f.yaml", &pod("p", "oops"));
    assert_eq!(d.reload(), ["-c//Pod/a/q"], "what is removed goes");
    d.put("f.yaml", &pod("p", "10.0.0.3"));
    assert_eq!(d.reload(), ["+p"]);
    d.put("f.yaml", "");
    assert_eq!(d.reload(), ["-c//Pod/a/p"]);
}

#[test]
fn routes_that_cannot_be_read_stay_as_they_were_or_close_their_host() {
    let service =
        "apiVersion: v1\nkind: Service\nmetadata: {name: s, namespace: a}\nspec: {clusterIP: 10.1.0.1, ports: [{port: 80}]}\n";
    let vs = |rule: &str| {
        format!(
            "apiVersion: networking.istio.io/v1\nkind: VirtualService\nmetadata: {{name: v, namespace: a}}\nspec: {{hosts: [s], http: [{rule}]}}\n"
        )
    };
    let dr = |policy: &str| {
        format!(
            "apiVersion: networking.istio.io/v1\nkind: DestinationRule\nmetadata: {{name: d, namespace: a}}\nspec: {{host: s, trafficPolicy: {policy}}}\n"
        )
    };
    let (good, bad) = (vs("{directResponse: {status: 200}}"), vs("{directResponse: {status: x}}"));
    let (fine, wrong) = (dr("{loadBalancer: {simple: RANDOM}}"), dr("{loadBalancer: {simple: ODD}}"));
    let key = "a/s.a.svc.cluster.local";
    let mut d = Dir::layer7();
    d.put("s.yaml", service).put("v.yaml", &format!("{good}---\n{fine}"));
    assert_eq!(d.reload(), [format!("+{key}"), format!("+destination {key}"), format!("+routes {key}")]);
    // Edited badly: as it was, and told.
    d.put("v.yaml", &format!("{bad}---\n{wrong}"));
    assert_eq!(d.reload(), [""; 0]);
    assert_eq!(d.codes(), BTreeSet::from(["bad-value"]));
    assert_eq!(d.folder.problems().len(), 2);
    // Moved while it cannot be read: still as it was.
    fs::remove_file(d.dir.path().join("v.yaml")).unwrap();
    d.put("w.yaml", &format!("{bad}---\n{wrong}"));
    assert_eq!(d.reload(), [""; 0]);
    // Broken YAML around it.
    d.put("w.yaml", "{");
    assert_eq!(d.reload(), [""; 0]);
    d.put("w.yaml", "");
    assert_eq!(d.reload(), [format!("-destination {key}"), format!("-routes {key}")]);
    // Never read: its host is closed until it is corrected.
    d.put("w.yaml", &format!("{bad}---\n{wrong}"));
    assert_eq!(d.reload(), [format!("!destination {key}"), format!("!routes {key}")]);
    d.put("w.yaml", &format!("{good}---\n{fine}"));
    assert_eq!(d.reload(), [format!("+destination {key}"), format!("+routes {key}")]);
    // So it is at start.
    let mut e = Dir::layer7();
    e.put("a.yaml", &format!("{service}---\n{bad}---\n{wrong}"));
    assert_eq!(e.reload(), [format!("!destination {key}"), format!("!routes {key}"), format!("+{key}")]);
    // The agent takes no notice.
    let mut agent = Dir::new();
    agent.put("a.yaml", &format!("{service}---\n{bad}---\n{wrong}"));
    assert_eq!(agent.reload(), [format!("+{key}")]);
    assert_eq!(agent.codes(), BTreeSet::from(["not-for-agent"]));
}

#[test]
fn duplicate_keys_in_a_policy_deny() {
    let mut d = Dir::new();
    d.put("f.yaml", &ap("x", "\n  action: DENY\n  action: ALLOW"));
    assert_eq!(d.reload(), ["!Namespace a"]);
    let p = &d.folder.problems()[0];
    assert_eq!((p.origin.line, p.code), (8, Some("yaml")));
    assert!(p.message.contains("`action` is written twice"), "{p}");
}

#[test]
fn the_first_of_two_objects_counts_and_the_second_takes_over() {
    let mut d = Dir::new();
    d.put("a.yaml", &pod("p", "10.0.0.1")).put("b.yaml", &format!("{}---\n{}", pod("o", "10.0.0.9"), pod("p", "10.0.0.2")));
    assert_eq!(d.reload(), ["+o", "+p"]);
    let ip = |d: &Dir| {
        d.folder
            .held
            .iter()
            .find(|(id, _)| &*id.name == "p")
            .map(|(_, h)| h.place.rsplit('/').next().unwrap().to_owned())
            .unwrap()
    };
    assert_eq!(ip(&d), "a.yaml");
    let p = d.folder.problems().iter().find(|p| p.code == Some("duplicate")).unwrap();
    assert_eq!((p.origin.line, p.origin.place.ends_with("b.yaml")), (9, true));
    fs::remove_file(d.dir.path().join("a.yaml")).unwrap();
    assert_eq!(d.reload(), ["+p"]);
    assert_eq!((ip(&d), d.codes().len()), ("b.yaml".into(), 0));
    d.put("a.yaml", &pod("p", "10.0.0.3"));
    assert_eq!(d.reload(), ["+p"]);
    assert_eq!(ip(&d), "a.yaml");
}

#[test]
fn files_that_cannot_be_read_fail_closed_at_start_only() {
    let mut d = Dir::new();
    fs::write(d.dir.path().join("bad.yaml"), [0xff, 0xfe, 0x00, 0x80]).unwrap();
    d.put("good.yaml", &pod("p", "10.0.0.1"));
    assert_eq!(d.reload(), ["!Global istio-system", "+p"]);
    assert_eq!(d.codes(), BTreeSet::from(["unreadable-file"]));
    d.put("bad.yaml", &pod("q", "10.0.0.2"));
    assert_eq!(d.reload(), ["+q", "-! istio-system"]);
    fs::write(d.dir.path().join("bad.yaml"), [0xff, 0xfe, 0x00, 0x80]).unwrap();
    assert_eq!(d.reload(), [""; 0], "what it said stays");
    let mut gone = Folder::new(d.dir.path().join("nowhere"), view(), &Settings::default());
    assert!(gone.reload().is_none() && !gone.is_loaded() && gone.problems()[0].code == Some("folder"));
}

/// A link to itself is what the system refuses to look at, whoever asks.
#[test]
fn a_folder_that_cannot_be_looked_at_takes_nothing_away_and_closes_at_start() {
    let mut d = Dir::new();
    let (place, aside) = (d.dir.path().join("more"), d.dir.path().join(".aside"));
    d.put("a.yaml", &pod("a", "10.0.0.1")).put("more/deep/p.yaml", &ap("p", "{}"));
    assert_eq!(d.reload(), ["+a", "+a/p"]);
    // Sixteen are as many as may be above each other.
    for _ in 0..20 {
        fs::rename(&place, &aside).unwrap();
        std::os::unix::fs::symlink(&place, &place).unwrap();
        assert_eq!(d.reload(), [""; 0], "what it said stays in force");
        assert!(d.codes().contains("folder"), "{:?}", d.codes());
        fs::remove_file(&place).unwrap();
        fs::rename(&aside, &place).unwrap();
        assert_eq!(d.reload(), [""; 0]);
        assert_eq!(d.codes(), BTreeSet::new());
    }
    fs::rename(&place, &aside).unwrap();
    std::os::unix::fs::symlink(&place, &place).unwrap();
    let mut late = Folder::new(d.dir.path(), view(), &Settings::default());
    assert_eq!(Dir::told(late.reload().unwrap()), ["!Global istio-system", "+a"], "nobody knows what it holds");
    assert!(late.reload().unwrap().is_empty(), "still nobody knows");
    fs::remove_file(&place).unwrap();
    fs::rename(&aside, &place).unwrap();
    let now = Dir::told(late.reload().unwrap());
    assert!(now.iter().any(|c| c == "+a/p") && now.iter().any(|c| c == "-! istio-system"), "{now:?}");
    fs::remove_dir_all(&place).unwrap();
    assert_eq!(d.reload(), ["-a/p"]);
}

#[test]
fn policies_that_contradict_each_other_deny_until_one_is_left() {
    let (allow, deny) = (ap("x", "{rules: [{}]}"), ap("x", "{action: DENY, rules: [{}]}"));
    // At start and later, in two files, in one, and in a list.
    let mut d = Dir::new();
    d.put("a.yaml", &allow).put("b.yaml", &format!("# one\n{deny}"));
    assert_eq!(d.reload(), ["!Namespace a"]);
    assert_eq!(d.codes(), BTreeSet::from(["conflict"]));
    let at: Vec<_> = d.folder.problems().iter().map(|p| (p.origin.place.rsplit('/').next().unwrap(), p.origin.line)).collect();
    assert_eq!(at, [("a.yaml", 1), ("b.yaml", 2)]);
    assert!(d.folder.problems().iter().all(|p| p.message.contains("a.yaml:1") && p.message.contains("b.yaml:2")));
    assert_eq!(d.reload(), [""; 0]);
    d.put("c.yaml", &pod("p", "10.0.0.1"));
    assert_eq!((d.reload(), d.codes()), (vec!["+p".to_owned()], BTreeSet::from(["conflict"])));
    // One side breaks so that even its namespace is lost: that settles nothing.
    d.put("b.yaml", "kind: AuthorizationPolicy\nmetadata: {namespace: a\n");
    assert_eq!(d.reload(), [""; 0]);
    d.put("b.yaml", &deny);
    d.reload();
    fs::remove_file(d.dir.path().join("b.yaml")).unwrap();
    assert_eq!((d.reload(), d.codes().len()), (vec!["+a/x".to_owned()], 0));
    // The same again, written differently: no conflict.
    d.put("b.yaml", &allow.replace("{rules: [{}]}", "\n  rules:\n  - {}"));
    assert_eq!((d.reload(), d.codes()), (vec![], BTreeSet::from(["duplicate"])));
    d.put("b.yaml", &deny);
    assert_eq!(d.reload(), ["!Namespace a"]);
    d.put("b.yaml", "").put("a.yaml", &format!("{allow}---\n{deny}"));
    d.reload();
    assert_eq!(d.codes(), BTreeSet::from(["conflict"]));
    d.put("a.yaml", &deny);
    assert_eq!(d.reload(), ["+a/x"]);
    let item = |action: &str| {
        format!(
            "- apiVersion: security.istio.io/v1\n  kind: AuthorizationPolicy\n  metadata: {{name: x, namespace: a}}\n  spec: {{action: {action}, rules: [{{}}]}}\n"
        )
    };
    d.put("a.yaml", &format!("apiVersion: v1\nkind: List\nitems:\n{}{}", item("ALLOW"), item("DENY")));
    assert_eq!(d.reload(), ["!Namespace a"]);
    // What binds nobody does not matter; where they agree on whom they bind, only those are closed.
    let dry = |spec: &str| ap("x", spec).replace("  name: x\n", "  name: x\n  annotations: {istio.io/dry-run: 'true'}\n");
    d.put("a.yaml", &dry("{rules: [{}]}")).put("b.yaml", &dry("{action: DENY, rules: [{}]}"));
    assert_eq!((d.reload(), d.codes()), (vec!["+a/x".to_owned()], BTreeSet::from(["duplicate"])));
    let one = |action: &str| ap("x", &format!("{{selector: {{matchLabels: {{a: b}}}}, action: {action}, rules: [{{}}]}}"));
    d.put("a.yaml", &one("ALLOW")).put("b.yaml", &one("DENY"));
    assert_eq!(d.reload(), ["!Selector a"]);

    // Of waypoints: closed wherever a copy was bound; the agent has nothing to close.
    let to = |target: &str| ap("x", &format!("{{targetRefs: [{{kind: Service, name: {target}}}], action: DENY, rules: [{{}}]}}"));
    for (mut w, layer7) in [(Dir::layer7(), true), (Dir::new(), false)] {
        w.put("a.yaml", &to("s")).put("b.yaml", &to("t"));
        let closed = ["!policies of service a/s.a.svc.cluster.local", "!policies of service a/t.a.svc.cluster.local"];
        assert_eq!(w.reload(), if layer7 { &closed[..] } else { &[] });
        assert_eq!(w.codes().contains("conflict"), layer7);
        fs::remove_file(w.dir.path().join("b.yaml")).unwrap();
        let left = ["+policies of service a/s.a.svc.cluster.local", "-policies of service a/t.a.svc.cluster.local"];
        assert_eq!(w.reload(), if layer7 { &left[..] } else { &[] });
    }

    let pa = |mode: &str| {
        format!(
            "apiVersion: security.istio.io/v1\nkind: PeerAuthentication\nmetadata: {{name: d, namespace: a}}\nspec: {{mtls: {{mode: {mode}}}}}\n"
        )
    };
    let mut e = Dir::new();
    e.put("a.yaml", &pa("PERMISSIVE")).put("b.yaml", &pa("STRICT")).put("p.yaml", &pod("p", "10.0.0.1"));
    let changes = e.folder.reload().unwrap();
    let strict = |changes: &[Change]| {
        changes.iter().find_map(|c| match c {
            Change::Workload(w) => Some(!w.policies.is_empty()),
            _ => None,
        })
    };
    assert_eq!((strict(&changes), e.codes()), (Some(true), BTreeSet::from(["conflict"])));
    fs::remove_file(e.dir.path().join("b.yaml")).unwrap();
    assert_eq!(strict(&e.folder.reload().unwrap()), Some(false));
}

#[test]
fn lines_of_problems_follow_the_text() {
    let mut d = Dir::new();
    let bad = ap("x", "{rules: [{from: [{source: {ipBlocks: [nope]}}]}]}");
    d.put("f.yaml", &format!("{}---\n{bad}", pod("p", "10.0.0.1")));
    d.reload();
    let line = |d: &Dir| d.folder.problems().iter().find(|p| p.code == Some("bad-value")).unwrap().origin.line;
    assert_eq!(line(&d), 14);
    d.put("f.yaml", &format!("# one\n# two\n{}---\n{bad}", pod("p", "10.0.0.1")));
    d.reload();
    assert_eq!(line(&d), 16);
}

#[test]
fn namespaces_are_only_read_where_they_are_certain() {
    for (text, want) in [
        ("metadata:\n  name: x\n  namespace: a # c\nspec: [", Some("a")),
        ("metadata:\n  namespace: 'a'\n", Some("a")),
        ("metadata:\n  name: x\nspec:\n  namespace: b\n", None),
        ("metadata:\n  namespace: a\n---x\nmetadata:\n  namespace: b\n", None),
        ("metadata: {namespace: a}\n", None),
        ("metadata:\n  namespace: [a\n", None),
    ] {
        assert_eq!(namespace_in(text), want, "{text}");
    }
}

async fn until(mesh: &Mesh, what: &str, ok: impl Fn(&mesh_model::Snapshot) -> bool) {
    let mut versions = mesh.watch();
    tokio::time::timeout(Duration::from_secs(20), async {
        while !ok(&mesh.load()) {
            versions.changed().await.unwrap();
        }
    })
    .await
    .unwrap_or_else(|_| panic!("not seen: {what}"));
}

#[tokio::test]
async fn hot_reload_reaches_the_mesh() {
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("..one");
    fs::create_dir(&data).unwrap();
    fs::write(data.join("p.yaml"), pod("p", "10.0.0.1")).unwrap();
    // As a ConfigMap is mounted: file links through a `..data` link that is swapped.
    std::os::unix::fs::symlink("..one", dir.path().join("..data")).unwrap();
    std::os::unix::fs::symlink("..data/p.yaml", dir.path().join("p.yaml")).unwrap();
    let (mesh, diagnostics) = crate::start(From::Folder(dir.path().into()), view());
    tokio::time::timeout(Duration::from_secs(20), mesh.synced()).await.unwrap();
    assert_eq!(mesh.load().local_workloads().count(), 1);
    let has = |ip: &'static str| move |s: &mesh_model::Snapshot| s.find_workload_by_ip(&"".into(), ip.parse().unwrap()).is_some();
    assert!(has("10.0.0.1")(&mesh.load()));

    let next = dir.path().join("..two");
    fs::create_dir(&next).unwrap();
    fs::write(next.join("p.yaml"), pod("p", "10.0.0.2")).unwrap();
    std::os::unix::fs::symlink("..two", dir.path().join("..tmp")).unwrap();
    fs::rename(dir.path().join("..tmp"), dir.path().join("..data")).unwrap();
    until(&mesh, "the swap", has("10.0.0.2")).await;

    fs::create_dir(dir.path().join("sub")).unwrap();
    fs::write(dir.path().join("sub/ap.yaml"), ap("x", "{rules: [{oops: 1}]}")).unwrap();
    until(&mesh, "the policy", |s| {
        s.policies().any(|p| p.scope == Scope::Namespace && matches!(p.body, PolicyBody::Unusable { .. }))
    })
    .await;
    assert_eq!(diagnostics.counts()[0], 1);
    fs::remove_file(dir.path().join("sub/ap.yaml")).unwrap();
    until(&mesh, "its removal", |s| s.policies().count() == 0).await;
}

#[tokio::test]
async fn an_empty_folder_is_in_sync_and_a_late_one_comes() {
    let dir = tempfile::tempdir().unwrap();
    let (mesh, _) = crate::start(From::Folder(dir.path().into()), view());
    tokio::time::timeout(Duration::from_secs(20), mesh.synced()).await.unwrap();
    let late = dir.path().join("late");
    let (mesh, diagnostics) = crate::start(From::Folder(late.clone()), view());
    assert!(tokio::time::timeout(Duration::from_millis(200), mesh.synced()).await.is_err());
    assert_eq!(diagnostics.list()[0].code, Some("folder"));
    fs::create_dir(&late).unwrap();
    fs::write(late.join("p.yaml"), pod("p", "10.0.0.1")).unwrap();
    tokio::time::timeout(Duration::from_secs(20), mesh.synced()).await.unwrap();
}

#[tokio::test]
async fn local_xds_reaches_the_mesh() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("x.yaml");
    fs::write(&file, "workloads: [{uid: a, namespace: n, workloadIps: [10.0.0.1]}]").unwrap();
    let (mesh, _) = crate::start(From::LocalXds(file.clone()), view());
    until(&mesh, "the file", |s| s.workloads().count() == 1).await;
    fs::write(&file, "workloads: [{uid: a, namespace: n}, {uid: b, namespace: n}]").unwrap();
    until(&mesh, "its change", |s| s.workloads().count() == 2).await;
    let (mesh, _) = crate::start(From::LocalXdsText("workloads: [{uid: a, namespace: n}]".into()), view());
    until(&mesh, "the text", |s| s.workloads().count() == 1).await;
}
