//! What `meshctl why` says about a request, and what the waypoint then does with it.
use anyhow::{Context as _, ensure};
use mesh_tests::meshctl::{Why, why_of_folder, why_of_process};

use crate::mesh::{Mesh, OTHER, WEB, curl};

const OBJECTS: &str = r#"
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: { name: readers, namespace: t }
spec:
  targetRefs: [{ kind: Service, group: "", name: web }]
  rules:
  - from: [{ source: { principals: ["cluster.local/ns/t/sa/client"] } }]
    to: [{ operation: { methods: [GET], notPaths: ["/closed", "/closed/*"] } }]
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: { name: no-secrets, namespace: t }
spec:
  targetRefs: [{ kind: Service, group: "", name: web }]
  action: DENY
  rules:
  - to: [{ operation: { paths: ["/secret/{*}"] } }]
  - when: [{ key: "request.headers[x-evil]", values: ["*"] }]
---
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: { name: web, namespace: t }
spec:
  hosts: [web]
  http:
  - name: moved
    match: [{ uri: { prefix: /old } }]
    redirect: { uri: /new }
  - name: second
    match: [{ headers: { canary: { exact: "true" } } }]
    route: [{ destination: { host: web, subset: v2, port: { number: 80 } } }]
  - name: nobody
    match: [{ uri: { exact: /nobody } }]
    route: [{ destination: { host: web, subset: v9, port: { number: 80 } } }]
  - name: main
    match: [{ uri: { prefix: / } }]
    route: [{ destination: { host: web, subset: v1, port: { number: 80 } } }]
---
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: { name: other, namespace: t }
spec:
  hosts: [other]
  http:
  - match: [{ uri: { exact: /only } }]
    route: [{ destination: { host: other } }]
"#;

/// Address and name called, curl's arguments, meshctl's; status, name of the route, word of the refusal.
type Case<'a> = (&'a str, &'a str, &'a str, &'a [&'a str], &'a [&'a str], u16, Option<&'a str>, Option<&'a str>);

pub(crate) fn meshctl_why_says_what_the_waypoint_does(mesh: &mut Mesh) -> anyhow::Result<()> {
    let _objects = mesh.objects("explained", OBJECTS)?;
    let cases: &[Case<'_>] = &[
        (WEB, "web", "/", &[], &[], 200, Some("main"), None),
        (WEB, "web", "/", &["-H", "canary: true"], &["--header", "canary=true"], 200, Some("second"), None),
        (WEB, "web", "/old/x", &[], &[], 301, Some("moved"), None),
        (WEB, "web", "/x", &["-X", "PUT"], &["--method", "PUT"], 403, Some("main"), Some("not_allowed")),
        (WEB, "web", "/closed/a", &[], &[], 403, Some("main"), Some("not_allowed")),
        (WEB, "web", "/secret/a", &[], &[], 403, Some("main"), Some("policy_denied")),
        (WEB, "web", "/secret/a/b", &[], &[], 200, Some("main"), None),
        (WEB, "web", "/y/../secret/a", &["--path-as-is"], &[], 403, Some("main"), Some("policy_denied")),
        (WEB, "web", "/x", &["-H", "x-evil: 1"], &["--header", "x-evil=1"], 403, Some("main"), Some("policy_denied")),
        (WEB, "web", "/nobody", &[], &[], 503, Some("nobody"), None),
        (OTHER, "other", "/only", &[], &[], 200, Some(""), None),
        (OTHER, "other", "/not", &[], &[], 404, None, None),
    ];
    for (address, name, path, curl, meshctl, status, route, reason) in cases {
        let case = format!("{name}{path} {curl:?}");
        let to = format!("{name}:80");
        let args = [&["--from", "t/client", "--to", &to, "--path", path, "--host", address][..], meshctl].concat();
        for (whom, why) in
            [("the folder", why_of_folder(mesh.dir.path(), &args)), ("the waypoint", why_of_process(mesh.proxy("wp"), &args))]
        {
            let why = why.with_context(|| format!("{whom} about {case}"))?;
            let told = status_of(&why)?;
            ensure!(told == *status && why.allowed == (*status < 400), "{whom} about {case}: {}", why.report);
            ensure!(why.reason() == *reason, "{whom} about {case}: {}", why.report);
            ensure!(route_of(&why) == *route, "{whom} about {case}: {}", why.report);
        }
        // An agent knows no routes: it says who decides, and refuses nothing.
        let agent = why_of_process(mesh.proxy("node-a"), &args)?;
        ensure!(agent.allowed && agent.report["decision"] == "elsewhere", "the agent about {case}: {}", agent.report);
        let url = format!("http://{address}{path}");
        let got = mesh.call(&[*curl, &[&*url]].concat())?;
        ensure!(got.status == *status, "{case}: {got:?}");
        ensure!(got.header("x-culvert-reason") == *reason, "{case}: {got:?}");
    }
    from_outside(mesh)
}

/// Through the gateway, where the host decides.
fn from_outside(mesh: &Mesh) -> anyhow::Result<()> {
    let (outside, gateway) = (mesh.topology.host("outside"), mesh.pod("gw").v4);
    let who = outside.v4.to_string();
    for (host, path, status) in [("web.example", "/shop/x", 200), ("web.example", "/other", 404), ("other.example", "/shop", 404)]
    {
        let args = ["--from", &who, "--to", "t/gw:80", "--host", host, "--path", path];
        for why in [why_of_folder(mesh.dir.path(), &args)?, why_of_process(mesh.proxy("gw"), &args)?] {
            let told = status_of(&why)?;
            ensure!(told == status && why.allowed == (status < 400), "{host}{path}: {}", why.report);
        }
        let got = curl(outside, &["-H", &format!("host: {host}"), &format!("http://{gateway}{path}")])?;
        ensure!(got.status == status, "{host}{path}: {got:?}");
    }
    Ok(())
}

/// The status that is foretold; the application answers with 200 here.
fn status_of(why: &Why) -> anyhow::Result<u16> {
    let answer = why.report["answer"].as_str().context("an answer")?;
    if answer == "what the application answers" {
        return Ok(200);
    }
    answer.get(..3).and_then(|s| s.parse().ok()).with_context(|| format!("a status in {answer:?}"))
}
fn route_of(why: &Why) -> Option<&str> {
    why.report["steps"].as_array()?.iter().find_map(|s| s["route"]["name"].as_str())
}
