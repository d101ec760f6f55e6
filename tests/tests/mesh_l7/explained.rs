//! What `meshctl why` says about a request, and what the waypoint then does with it.
use anyhow::{Context as _, ensure};
use mesh_tests::issuer::{KeyServer, SigningKey, jwks, now};
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

pub(crate) fn meshctl_why_looks_at_tokens_as_the_waypoint_does(mesh: &mut Mesh) -> anyhow::Result<()> {
    let (a, b) = (SigningKey::make("a")?, SigningKey::make("b")?);
    let server = KeyServer::start(mesh.topology.host("outside"), 8101, None)?;
    server.publish(&[&b]);
    let objects = format!(
        "apiVersion: security.istio.io/v1\nkind: RequestAuthentication\nmetadata: {{ name: tokens, namespace: t }}\n\
         spec:\n  targetRefs: [ {{ kind: Service, group: '', name: web }} ]\n  jwtRules:\n  - {{ issuer: first, audiences: [ shop ], jwks: '{}' }}\n  - {{ issuer: second, jwksUri: 'http://{}:8101/jwks' }}\n---\n\
         apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {{ name: admins, namespace: t }}\n\
         spec:\n  targetRefs: [ {{ kind: Service, group: '', name: web }} ]\n  action: DENY\n  rules:\n  - to: [ {{ operation: {{ paths: [ /admin ] }} }} ]\n    when: [ {{ key: 'request.auth.claims[roles]', notValues: [ admin ] }} ]\n",
        jwks(&[&a]),
        mesh.topology.host("outside").v4,
    );
    let _objects = mesh.objects("explained-tokens", &objects)?;
    let of = |issuer: &str, roles: &[&str], expires: u64| serde_json::json!({ "iss": issuer, "sub": "ann", "aud": "shop", "roles": roles, "exp": expires });
    let later = now() + 3600;
    let keys = mesh.logs.path().join("second.jwks");
    std::fs::write(&keys, jwks(&[&b]))?;
    let keys = keys.to_str().context("a path")?;
    let file = mesh.logs.path().join("token.jwt");
    let name = file.to_str().context("a path")?;
    let mut other = of("first", &[], later);
    other["aud"] = "else".into();
    for (case, token, path, status, reason) in [
        ("a true one", a.token(&of("first", &[], later))?, "/", 200, None),
        ("of an admin", a.token(&of("first", &["user", "admin"], later))?, "/admin", 200, None),
        ("of somebody", a.token(&of("first", &["user"], later))?, "/admin", 403, Some("policy_denied")),
        ("of an issuer elsewhere", b.token(&of("second", &["admin"], later))?, "/admin", 200, None),
        ("an old one", a.token(&of("first", &["admin"], now() - 90))?, "/admin", 401, Some("token_refused")),
        ("for somebody else", a.token(&other)?, "/", 403, Some("token_refused")),
        ("of another key", b.token(&of("first", &[], later))?, "/", 401, Some("token_refused")),
        ("of nobody known", a.token(&of("third", &[], later))?, "/", 401, Some("token_refused")),
        ("none at all", "garbage".to_owned(), "/", 401, Some("token_refused")),
    ] {
        std::fs::write(&file, &token)?;
        let args = ["--from", "t/client", "--to", "web:80", "--path", path, "--jwt", name];
        // What the waypoint knows it has fetched: it is asked for real first.
        let bearer = format!("authorization: Bearer {token}");
        let got = mesh.call(&["-H", &bearer, &format!("http://{WEB}{path}")])?;
        ensure!(got.status == status && got.header("x-culvert-reason") == reason, "{case}: {got:?}");
        let folder = why_of_folder(mesh.dir.path(), &[&args[..], &["--jwks", keys]].concat());
        for (whom, why) in [("the folder", folder), ("the waypoint", why_of_process(mesh.proxy("wp"), &args))] {
            let why = why.with_context(|| format!("{whom} about {case}"))?;
            ensure!(status_of(&why)? == status && why.reason() == reason, "{whom} about {case}: {}", why.report);
            if reason == Some("token_refused") {
                ensure!(why.report["answer"].as_str().is_some_and(|a| a.contains(&got.body)), "{case}: {} {got:?}", why.report);
            }
        }
    }
    // Without the keys of an issuer that are elsewhere nothing is supposed.
    std::fs::write(&file, b.token(&of("second", &[], later))?)?;
    let why = why_of_folder(mesh.dir.path(), &["--from", "t/client", "--to", "web:80", "--jwt", name])?;
    ensure!(why.reason() == Some("token_refused") && why.report["notes"].to_string().contains("--jwks"), "{}", why.report);
    Ok(())
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
