//! `meshctl analyze` on folders.
use super::{FAULTY, SHOP, ZAMAZ, golden, meshctl};
use std::collections::BTreeSet;

#[test]
fn the_example_is_clean() {
    let ran = meshctl(&["analyze", ZAMAZ, "--trust-domain", "zamaz.cluster.local", "--trust-domain-aliases", "cluster.local"]);
    assert_eq!((ran.code, ran.out.trim()), (0, "nothing found"), "{}", ran.err);
}

#[test]
fn every_fault_is_found() {
    let ran = meshctl(&["analyze", FAULTY]);
    assert_eq!(ran.code, 1);
    golden("faulty.txt", &ran.out);
    let json = meshctl(&["analyze", FAULTY, "-o", "json"]);
    let value: serde_json::Value = serde_json::from_str(&json.out).expect("JSON");
    let codes: BTreeSet<&str> = value["findings"].as_array().expect("a list").iter().filter_map(|f| f["code"].as_str()).collect();
    let wanted = [
        "IST0101",
        "IST0106",
        "IST0108",
        "IST0109",
        "IST0112",
        "IST0118",
        "IST0127",
        "IST0128",
        "IST0130",
        "IST0131",
        "IST0134",
        "IST0145",
        "IST0149",
        "IST0161",
        "IST0166",
        "IST0167",
        "IST0171",
        "IST0173",
        "IST0174",
        "IST0177",
        "empty-waypoint",
        "no-endpoints",
        "service-port",
        "unknown-caller",
        "unused-waypoint",
        "waypoint-refused",
    ];
    let missing: Vec<&str> = wanted.into_iter().filter(|code| !codes.contains(code)).collect();
    assert!(missing.is_empty(), "not found: {missing:?} among {codes:?}");
}

#[test]
fn the_exit_code_follows_the_threshold() {
    let code = |args: &[&str]| meshctl(&[&["analyze"], args].concat()).code;
    // The shop works, but for a subset without endpoints and a rule an agent cannot judge.
    assert_eq!(code(&[SHOP]), 1);
    assert_eq!(code(&[SHOP, "--suppress", "IST0173,IST0167"]), 0);
    assert_eq!(code(&[SHOP, "--suppress", "IST0173", "--fail-on", "error"]), 0);
    assert_eq!(code(&[SHOP, "--fail-on", "never"]), 0);
    assert_eq!(code(&["no/such/folder"]), 2);
}

#[test]
fn a_list_is_looked_into() {
    let dir = tempfile::tempdir().expect("a folder");
    let list = "apiVersion: v1\nkind: List\nitems:\n- apiVersion: v1\n  kind: Service\n  metadata: { name: a, namespace: b, annotations: { istio.io/nonsense: x } }\n  spec: { ports: [ { name: http, port: 80 } ] }\n";
    std::fs::write(dir.path().join("list.yaml"), list).expect("a file");
    let ran = meshctl(&["analyze", dir.path().to_str().expect("text")]);
    assert!(ran.code == 1 && ran.out.contains("IST0108") && ran.out.contains("list.yaml:6"), "{}", ran.out);
}
