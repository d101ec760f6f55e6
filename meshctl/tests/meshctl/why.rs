//! `meshctl why` on folders.
use super::{FAULTY, Ran, SHOP, ZAMAZ, golden, meshctl};

fn shop(args: &[&str]) -> Ran {
    meshctl(&[&["why", "--mesh-dir", SHOP], args].concat())
}
const ZAMAZ_VIEW: [&str; 4] = ["--trust-domain", "zamaz.cluster.local", "--trust-domain-aliases", "cluster.local"];
fn zamaz(args: &[&str]) -> Ran {
    meshctl(&[&["why", "--mesh-dir", ZAMAZ][..], &ZAMAZ_VIEW, args].concat())
}

/// Source, destination, more arguments; exit code, what the answer says.
type Case<'a> = (&'a str, &'a str, &'a [&'a str], i32, &'a [&'a str]);

#[test]
fn calls_of_the_shop() {
    let cases: &[Case<'_>] = &[
        // Through the waypoint: routes, then policies, then the endpoint's agent, which sees the waypoint.
        (
            "shop/frontend",
            "api:80",
            &["--path", "/api/x"],
            0,
            &["ALLOWED", "route api, rule 3", "90 % (weight 90)", "shop/to-api allows it", "sa/wp may connect to port 8080"],
        ),
        (
            "shop/frontend",
            "api:80",
            &["--path", "/api/x", "--header", "preview=1"],
            0,
            &["route preview, rule 1", "header preview 1"],
        ),
        (
            "shop/frontend",
            "api:80",
            &["--path", "/api/x", "--method", "POST"],
            1,
            &["not_allowed", "403", "nearly matches: ALLOW shop/to-api rule 0", "the method is POST, wanted GET"],
        ),
        (
            "shop/batch",
            "api:80",
            &["--path", "/api/x"],
            1,
            &["not_allowed", "the source principal is cluster.local/ns/shop/sa/batch"],
        ),
        (
            "shop/frontend",
            "api:80",
            &["--path", "/api/admin/x"],
            1,
            &["policy_denied: shop/no-admin rule 0", "matches: DENY shop/no-admin rule 0"],
        ),
        (
            "shop/frontend",
            "api:80",
            &["--path", "/api/admin/x", "--header", "x-admin=yes"],
            0,
            &["nearly matches: DENY shop/no-admin"],
        ),
        // Dot segments are resolved before anything is matched.
        ("shop/frontend", "api:80", &["--path", "/api/y/../admin/x"], 1, &["policy_denied", "/api/admin/x"]),
        (
            "shop/frontend",
            "api:80",
            &["--path", "/elsewhere"],
            1,
            &["404 (route_not_found)", "the nearest asks for: path /old/*"],
        ),
        ("shop/frontend", "api:80", &["--path", "/old/x"], 0, &["301, a redirect of the route", "route moved, rule 0"]),
        ("shop/frontend", "api:80", &["--path", "/api/empty"], 1, &["no_healthy_endpoint", "subset v3", "503"]),
        // Bytes: HTTP attributes of an ALLOW allow nothing.
        ("shop/frontend", "api:90", &[], 0, &["matches: ALLOW shop/to-api rule 1", "carried as bytes", "port 9090"]),
        ("shop/frontend", "api:91", &[], 1, &["no_such_port"]),
        // Around the waypoint.
        (
            "shop/frontend",
            "shop/api-1:8080",
            &[],
            1,
            &["no waypoint stands in front of it", "not_allowed", "nearest is shop/waypoint-only"],
        ),
        ("shop/wp", "api:80", &[], 0, &["speaks HBONE itself", "sa/wp may connect to port 8080"]),
        // No waypoint: layer 4 alone.
        ("shop/api", "db:5432", &[], 0, &["shop/to-db allows it", "ALLOW shop/to-db rule 1"]),
        ("shop/batch", "db.shop:5432", &[], 1, &["not_allowed", "nearly matches: ALLOW shop/to-db rule 1"]),
        ("shop/api", "db-headless:5432", &[], 0, &["no virtual address", "shop/to-db allows it"]),
        // Plaintext.
        ("203.0.113.9", "shop/db:5432", &[], 1, &["plaintext_refused", "203.0.113.9 (no identity)"]),
        ("shop/frontend/old-0", "db:5432", &[], 1, &["is not enrolled in the mesh", "plaintext_refused"]),
        // Outside.
        ("shop/frontend", "198.51.100.1:443", &[], 0, &["passed through untouched"]),
        ("shop/frontend", "127.0.0.1:15008", &[], 1, &["recursion"]),
    ];
    for (from, to, more, code, words) in cases {
        let ran = shop(&[&["--from", from, "--to", to], *more].concat());
        assert_eq!(ran.code, *code, "{from} -> {to} {more:?}\n{}{}", ran.out, ran.err);
        for word in *words {
            assert!(ran.out.contains(word), "{from} -> {to} {more:?}: `{word}` is missing\n{}", ran.out);
        }
    }
}

#[test]
fn rules_are_pointed_at_by_their_line() {
    let ran = shop(&["--from", "shop/api", "--to", "db:5432"]);
    // The second rule of to-db: the first one cannot be judged by an agent, and keeps its number.
    assert!(
        ran.out.contains("rule 1  [AuthorizationPolicy shop/to-db in meshctl/tests/meshctl/shop/policies.yaml:40]"),
        "{}",
        ran.out
    );
}

#[test]
fn a_policy_nobody_asks_is_told() {
    let ran = meshctl(&["why", "--mesh-dir", FAULTY, "--from", "shop/api", "--to", "api:80"]);
    assert!(ran.out.contains("can never apply: ALLOW shop/l7"), "{}", ran.out);
    assert!(ran.out.contains("no waypoint stands in front of the service: nobody asks it"), "{}", ran.out);
    assert!(ran.out.contains("run `meshctl analyze"), "{}", ran.out);
}

#[test]
fn what_cannot_be_answered() {
    for (args, words) in [
        (&["--from", "shop", "--to", "api:80"][..], "names no source"),
        (&["--from", "shop/nobody", "--to", "api:80"], "no workload shop/nobody; there are: shop/api/api-1"),
        (&["--from", "shop/frontend", "--to", "api"], "names no destination"),
        (&["--from", "shop/frontend", "--to", "apo:80"], "no service or workload is called apo; there are: shop/api.shop"),
        (&["--from", "shop/frontend", "--to", "api:80", "--path", "no-slash"], "not"),
        (&["--from", "shop/frontend", "--to", "api:80", "--method", "NO GOOD"], "is not a method"),
    ] {
        let ran = shop(args);
        assert_eq!(ran.code, 2, "{args:?}: {}", ran.out);
        assert!(ran.err.contains(words), "{args:?}: {}", ran.err);
    }
    assert_eq!(meshctl(&["why", "--from", "a/b", "--to", "c:1"]).code, 2, "neither folder nor process");
    let ran = meshctl(&["why", "--mesh-dir", "no/such/folder", "--from", "a/b", "--to", "c:1"]);
    assert!(ran.code == 2 && ran.err.contains("no/such/folder"), "{}", ran.err);
    let ran = meshctl(&["why", "--admin", "127.0.0.1:1", "--from", "a/b", "--to", "c:1"]);
    assert!(ran.code == 2 && ran.err.contains("is the process running"), "{}", ran.err);
}

#[test]
fn forms_for_programs() {
    let args = ["--from", "shop/batch", "--to", "api:80", "--path", "/api/x"];
    let json = shop(&[&args[..], &["-o", "json"]].concat());
    let value: serde_json::Value = serde_json::from_str(&json.out).expect("JSON");
    assert_eq!((json.code, &value["decision"], &value["reason"]), (1, &"denied".into(), &"not_allowed".into()));
    assert_eq!(value["steps"][1]["route"]["destinations"][0]["percent"], "90");
    let yaml = shop(&[&args[..], &["-o", "yaml"]].concat());
    assert!(yaml.out.contains("\ndecision: denied\n"), "{}", yaml.out);
}

#[test]
fn the_example() {
    for (name, code, args) in [
        (
            "zamaz-allowed.txt",
            0,
            &["--from", "zamaz/zamaz-frontend-sa", "--to", "zamaz-api-service:80", "--path", "/api/orders"][..],
        ),
        ("zamaz-reports.txt", 1, &["--from", "zamaz/zamaz-reports-sa", "--to", "zamaz-api-service:80", "--path", "/api/orders"]),
        ("zamaz-around.txt", 1, &["--from", "zamaz/zamaz-frontend-sa", "--to", "zamaz/zamaz-api-stable:8080"]),
        ("zamaz-outside.txt", 1, &["--from", "203.0.113.7", "--to", "zamaz/zamaz-auth:80"]),
        ("zamaz-shop.txt", 0, &["--from", "203.0.113.7", "--to", "zamaz/zamaz-gateway:80", "--host", "shop.zamaz.example"]),
        ("zamaz-redis.txt", 0, &["--from", "zamaz/zamaz-api-sa/zamaz-api-stable", "--to", "redis.zamaz.example:6379"]),
    ] {
        let ran = zamaz(args);
        assert_eq!(ran.code, code, "{name}: {}{}", ran.out, ran.err);
        golden(name, &ran.out);
        if name == "zamaz-reports.txt" {
            let readme = std::fs::read_to_string(super::workspace().join("README.md")).expect("the README");
            assert!(readme.contains(ran.out.trim_end()), "the README shows another answer");
        }
    }
}
