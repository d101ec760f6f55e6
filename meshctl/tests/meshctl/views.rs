//! The views of a dump.
use super::meshctl;

const DUMP: &str = r#"{
  "workloads": [
    { "uid": "c//Pod/shop/api-0", "name": "api-0", "namespace": "shop", "workloadIps": ["10.0.0.1"], "node": "n1",
      "waypoint": null, "protocol": "HBONE", "status": "Healthy" },
    { "uid": "c//Pod/other/x", "name": "x", "namespace": "other", "workloadIps": ["10.0.0.2"], "node": "n2",
      "waypoint": null, "protocol": "TCP", "status": "Unhealthy" }
  ],
  "services": [
    { "name": "api", "namespace": "shop", "hostname": "api.shop.svc.cluster.local", "vips": ["/10.96.0.1"],
      "waypoint": { "destination": "shop/wp.shop.svc.cluster.local", "hboneMtlsPort": 15008 },
      "endpoints": { "c//Pod/shop/api-0": {}, "c//Pod/other/x": {} } },
    { "name": "wp", "namespace": "shop", "hostname": "wp.shop.svc.cluster.local", "vips": ["/10.96.0.2"], "waypoint": null,
      "endpoints": {} }
  ],
  "policies": [ { "name": "p", "namespace": "shop", "action": "Deny", "unusable": "bad", "scope": "Namespace" } ],
  "certificates": [ { "identity": "spiffe://td/ns/shop/sa/api", "state": "Available",
    "certChain": [ { "serialNumber": "7", "validFrom": "2026-01-01T00:00:00Z", "expirationTime": "2026-01-01T01:00:00Z" } ],
    "rootCerts": [] } ],
  "workloadState": { "c//Pod/shop/api-0": { "state": "Up", "info": { "name": "api-0", "namespace": "shop" },
    "tunnels": { "outbound": [ { "dial": "10.0.0.2:15008", "expect": ["spiffe://td/ns/other/sa/x"], "streams": [3, 1], "dialing": false } ],
                 "inbound": ["spiffe://td/ns/other/sa/x"] } } }
}"#;

#[test]
fn tables_have_istios_columns() {
    let dir = tempfile::tempdir().expect("a folder");
    let file = dir.path().join("dump.json");
    std::fs::write(&file, DUMP).expect("a file");
    let file = file.to_str().expect("text");
    for (view, lines) in [
        (
            "workloads",
            &[
                "NAMESPACE   POD NAME   ADDRESS    NODE   WAYPOINT   PROTOCOL",
                "other       x          10.0.0.2   n2     None       TCP",
            ][..],
        ),
        (
            "services",
            &[
                "NAMESPACE   SERVICE NAME   SERVICE VIP   WAYPOINT   ENDPOINTS",
                "shop        api            10.96.0.1     wp         1/2",
            ],
        ),
        (
            "policies",
            &["NAMESPACE   POLICY NAME   ACTION            SCOPE", "shop        p             Deny (unusable)   Namespace"],
        ),
        ("certificates", &["spiffe://td/ns/shop/sa/api   Leaf   Available", "2026-01-01T01:00:00Z   2026-01-01T00:00:00Z"]),
        ("tunnels", &["shop/api-0   Inbound", "shop/api-0   Outbound    10.0.0.2:15008   spiffe://td/ns/other/sa/x   [3,1]"]),
    ] {
        let ran = meshctl(&[view, "--file", file]);
        assert_eq!(ran.code, 0, "{}", ran.err);
        for line in lines {
            assert!(ran.out.contains(line), "{view}: `{line}` is missing in\n{}", ran.out);
        }
    }
    let ran = meshctl(&["workloads", "--file", file, "-n", "shop", "-o", "json"]);
    let value: serde_json::Value = serde_json::from_str(&ran.out).expect("JSON");
    assert!(value.as_array().is_some_and(|all| all.len() == 1 && all[0]["name"] == "api-0"), "{}", ran.out);
}

#[test]
fn what_is_no_dump_is_said() {
    let dir = tempfile::tempdir().expect("a folder");
    let file = dir.path().join("dump.json");
    std::fs::write(&file, "{}").expect("a file");
    let ran = meshctl(&["workloads", "--file", file.to_str().expect("text")]);
    assert!(ran.code == 2 && ran.err.contains("not a node agent's"), "{}", ran.err);
    assert_eq!(meshctl(&["tunnels", "--admin", "127.0.0.1:1"]).code, 2);
}
