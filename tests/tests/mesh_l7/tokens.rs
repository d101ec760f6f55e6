//! Tokens: which are believed, what becomes of them, where their keys come from. The refusals are Envoy's, word by word.
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use mesh_tests::agent::Mark;
use mesh_tests::issuer::{KeyServer, Manner, SigningKey, hmac_token, jwks, now};
use mesh_tests::wait;
use serde_json::{Value, json};

use crate::mesh::{Got, KEYS, Mesh, OTHER, WEB, curl};

/// A RequestAuthentication on the service `web`.
fn authentication(rules: &str) -> String {
    format!(
        "apiVersion: security.istio.io/v1\nkind: RequestAuthentication\nmetadata: {{ name: tokens, namespace: t }}\n\
         spec:\n  targetRefs: [ {{ kind: Service, group: '', name: web }} ]\n  jwtRules:\n{rules}"
    )
}
/// A rule for the issuer `name` with the keys written in it.
fn inline(name: &str, keys: &[&SigningKey], more: &str) -> String {
    format!("  - {{ issuer: {name}, jwks: '{}'{more} }}\n", jwks(keys))
}
fn remote(uri: &str, more: &str) -> String {
    format!("  - {{ issuer: remote, jwksUri: '{uri}'{more} }}\n")
}
fn claims(issuer: &str) -> Value {
    json!({ "iss": issuer, "sub": "ann", "exp": now() + 3600 })
}
fn call(mesh: &Mesh, token: &str) -> anyhow::Result<Got> {
    mesh.call(&["-H", &format!("authorization: Bearer {token}"), &format!("http://{WEB}/a?x=1")])
}
/// Checks for a refusal as Envoy words it.
fn refused(got: &Got, status: u16, body: &str) -> anyhow::Result<()> {
    ensure!(got.status == status && got.body == body, "expected {status} {body:?}: {got:?}");
    let challenge = got.header("www-authenticate").unwrap_or_default();
    ensure!(challenge.starts_with(&format!("Bearer realm=\"http://{WEB}/")), "{got:?}");
    ensure!(challenge.ends_with(", error=\"invalid_token\""), "{got:?}");
    ensure!(got.header("x-culvert-reason") == Some("token_refused"), "{got:?}");
    Ok(())
}
const NO_KEY: &str = "Jwks doesn't have key to match kid or alg from Jwt";
const NO_FETCH: &str = "Jwks remote fetch is failed";
const FORGED: &str = "Jwt verification fails";

pub(crate) fn tokens_that_are_not_true_are_refused(mesh: &mut Mesh) -> anyhow::Result<()> {
    let (a, b) = (SigningKey::make("a")?, SigningKey::make("b")?);
    let rules = inline("first", &[&a], ", audiences: [ shop, 'https://api' ]") + &inline("second", &[&b], "");
    let _auth = mesh.objects("tokens", &authentication(&rules))?;
    let with = |name: &str, value: Value| {
        let mut c = claims("second");
        c[name] = value;
        c
    };
    let good = b.token(&claims("second"))?;
    ensure!(call(mesh, &good)?.status == 200, "a good token passes");
    ensure!(mesh.call(&[&format!("http://{WEB}/a")])?.status == 200, "no token passes");
    for (token, status, body) in [
        (b.token(&with("exp", json!(now() - 90)))?, 401, "Jwt is expired"),
        (b.token(&with("nbf", json!(now() + 3600)))?, 401, "Jwt not yet valid"),
        (b.token(&claims("third"))?, 401, "Jwt issuer is not configured"),
        (a.token(&claims("first"))?, 403, "Audiences in Jwt are not allowed"),
        ("garbage".into(), 401, "Jwt is not in the form of Header.Payload.Signature with two dots and 3 sections"),
        // The key of another issuer, named and not named.
        (a.token(&claims("second"))?, 401, NO_KEY),
        (a.token_with(&json!({ "alg": "RS256", "kid": "b" }), &claims("second"))?, 401, FORGED),
        (a.token_with(&json!({ "alg": "RS256" }), &claims("second"))?, 401, FORGED),
        // No signature, and the public key for a secret.
        (b.token_with(&json!({ "alg": "none" }), &claims("second"))?, 401, "Jwt header [alg] is not supported"),
        (hmac_token(&json!({ "alg": "HS256", "kid": "b" }), &claims("second"), b.jwk().to_string().as_bytes()), 401, FORGED),
        (b.token_with(&json!({ "alg": "RS256", "kid": "c" }), &claims("second"))?, 401, NO_KEY),
    ] {
        refused(&call(mesh, &token)?, status, body)?;
    }
    // Signed by the right key, and then changed.
    let (head, rest) = good.split_once('.').context("a token")?;
    let (_, signature) = rest.split_once('.').context("a token")?;
    let other = b.token(&with("sub", json!("root")))?;
    let other = other.split('.').nth(1).context("a token")?;
    refused(&call(mesh, &format!("{head}.{other}.{signature}"))?, 401, FORGED)?;
    // A minute between clocks is no lie; a slash at the end of an audience no difference.
    ensure!(call(mesh, &b.token(&with("exp", json!(now() - 30)))?)?.status == 200);
    let mut audience = claims("first");
    audience["aud"] = json!(["x", "https://api/"]);
    ensure!(call(mesh, &a.token(&audience)?)?.status == 200);
    Ok(())
}

pub(crate) fn a_token_leaves_and_its_claims_come(mesh: &mut Mesh) -> anyhow::Result<()> {
    let key = SigningKey::make("k")?;
    let outputs = ", outputPayloadToHeader: x-payload, outputClaimToHeaders: \
                   [ { header: x-user, claim: sub }, { header: x-role, claim: realm.role }, { header: x-age, claim: age } ]";
    let _auth = mesh.objects("tokens", &authentication(&inline("first", &[&key], outputs)))?;
    let mut c = claims("first");
    c["realm"] = json!({ "role": "admin" });
    let token = key.token(&c)?;
    let bearer = format!("authorization: Bearer {token}");
    let url = format!("http://{WEB}/a?x=1&access_token={token}&y=2");
    // A client's own word for any of these does not get through, with a token or without.
    let spoofed = ["-H", "x-user: root", "-H", "X-Role: root", "-H", "x-age: 99", "-H", "x-payload: root"];
    for (more, path) in [
        (vec!["-H", &bearer, &*format!("http://{WEB}/a?x=1")], "/a?x=1"),
        (vec![&*url], "/a?x=1&y=2"),
        (vec!["-H", &bearer, &*url], "/a?x=1&y=2"),
    ] {
        let args: Vec<&str> = spoofed.iter().copied().chain(more).collect();
        let echo = mesh.call(&args)?.echo()?;
        let headers = &echo["headers"];
        ensure!(headers["x-user"] == "ann" && headers["x-role"] == "admin" && headers["x-age"].is_null(), "{echo}");
        ensure!(headers["x-payload"] == token.split('.').nth(1).unwrap_or_default(), "{echo}");
        ensure!(headers["authorization"].is_null() && echo["path"] == path, "the token is gone: {echo}");
    }
    let bare = format!("http://{WEB}/a");
    let args: Vec<&str> = spoofed.iter().copied().chain([&*bare]).collect();
    let echo = mesh.call(&args)?.echo()?;
    for name in ["x-user", "x-role", "x-age", "x-payload"] {
        ensure!(echo["headers"][name].is_null(), "{name} of a client without a token: {echo}");
    }
    // Two tokens in one request: nobody can say which is meant.
    let other = key.token(&json!({ "iss": "first", "sub": "bob", "exp": now() + 3600 }))?;
    for args in [
        vec!["-H", &bearer, &*format!("http://{WEB}/a?access_token={other}")],
        vec!["-H", &bearer, "-H", &*format!("authorization: Bearer {other}"), &*format!("http://{WEB}/a")],
    ] {
        refused(&mesh.call(&args)?, 401, "Jwt is not the only one in the request")?;
    }
    // The log does not tell tokens either.
    let log = mesh.proxy("wp").log_since(Mark::default());
    ensure!(!log.contains(&token) && !log.contains(&other), "a token in the log");
    Ok(())
}

pub(crate) fn limits_count_by_claims(mesh: &mut Mesh) -> anyhow::Result<()> {
    let (a, b) = (SigningKey::make("a")?, SigningKey::make("b")?);
    let rules = inline("first", &[&a], "") + &inline("second", &[&b], "");
    let _auth = mesh.objects("tokens", &authentication(&rules))?;
    let limits = "apiVersion: culvert.dev/v1alpha1\nkind: TrafficPolicy\nmetadata: { name: users, namespace: t }\nspec:\n  targetRefs: [ { kind: Service, name: web } ]\n  rateLimits:\n  - { name: user, key: [ { claim: sub } ], tokenBucket: { maxTokens: 2, fillInterval: 1h } }\n";
    let _limits = mesh.objects("limits", limits)?;
    let of = |issuer: &str, name: &str| json!({ "iss": issuer, "sub": name, "exp": now() + 3600 });
    let (ann, bob, other) = (a.token(&of("first", "ann"))?, a.token(&of("first", "bob"))?, b.token(&of("second", "ann"))?);
    for (who, token, want) in [
        ("ann", &ann, 200),
        ("ann", &ann, 200),
        ("ann", &ann, 429),
        ("bob", &bob, 200),
        ("ann of another issuer", &other, 200),
        // Who is not who she says uses up nothing of hers, and is not counted either.
        ("a forger", &format!("{bob}x"), 401),
        ("bob", &bob, 200),
        ("bob", &bob, 429),
    ] {
        let got = call(mesh, token)?;
        ensure!(got.status == want, "{who}: {got:?}");
    }
    let bare = format!("http://{WEB}/a");
    for want in [200, 200, 429] {
        ensure!(mesh.call(&[&bare])?.status == want, "who has no token shares a bucket with those like it");
    }
    Ok(())
}

pub(crate) fn policies_and_routes_ask_for_claims(mesh: &mut Mesh) -> anyhow::Result<()> {
    let (a, b) = (SigningKey::make("a")?, SigningKey::make("b")?);
    let target = "targetRefs: [ { kind: Service, group: '', name: web } ]";
    let objects = [
        authentication(&(inline("https://first/x", &[&a], "") + &inline("second", &[&b], ", spaceDelimitedClaims: [ groups ]"))),
        format!(
            r#"
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {{ name: a-token, namespace: t }}
spec: {{ {target}, action: DENY, rules: [ {{ from: [ {{ source: {{ notRequestPrincipals: [ "*" ] }} }} ], to: [ {{ operation: {{ notPaths: [ /open ] }} }} ] }} ] }}
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {{ name: roles, namespace: t }}
spec:
  {target}
  rules:
  - to: [ {{ operation: {{ paths: [ /open ] }} }} ]
  - to: [ {{ operation: {{ paths: [ /admin ] }} }} ]
    when: [ {{ key: "request.auth.claims[realm][roles]", values: [ admin ] }} ]
  - to: [ {{ operation: {{ paths: [ /first ] }} }} ]
    from: [ {{ source: {{ requestPrincipals: [ "https://first/x/ann" ] }} }} ]
  - to: [ {{ operation: {{ paths: [ /aud ] }} }} ]
    when: [ {{ key: request.auth.audiences, values: [ shop ] }}, {{ key: request.auth.presenter, values: [ app ] }} ]
  - to: [ {{ operation: {{ paths: [ /scope ] }} }} ]
    when: [ {{ key: "request.auth.claims[scope]", values: [ write ] }}, {{ key: "request.auth.claims[groups]", values: [ g2 ] }} ]
  - to: [ {{ operation: {{ paths: [ /beta ] }} }} ]
---
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {{ name: web, namespace: t }}
spec:
  hosts: [ web ]
  http:
  - match: [ {{ uri: {{ exact: /beta }}, headers: {{ "@request.auth.claims.beta": {{ exact: "yes" }} }} }} ]
    route: [ {{ destination: {{ host: web, subset: v2 }} }} ]
  - route: [ {{ destination: {{ host: web, subset: v1 }} }} ]
"#
        ),
    ];
    let _objects = mesh.objects("tokens", &objects.join("\n---\n"))?;
    let first = a.token(&claims("https://first/x"))?;
    let of_second = |name: &str, value: Value| {
        let mut c = claims("second");
        c[name] = value;
        b.token(&c)
    };
    let mut all = claims("second");
    for (name, value) in [
        ("realm", json!({ "roles": [ "user", "admin" ] })),
        ("aud", json!("shop")),
        ("azp", json!("app")),
        ("scope", json!("read write")),
        ("groups", json!("g1 g2")),
        ("beta", json!("yes")),
    ] {
        all[name] = value;
    }
    let all = b.token(&all)?;
    let plain = b.token(&claims("second"))?;
    for (token, path, status) in [
        (None, "/open", 200),
        (None, "/admin", 403),
        (None, "/first", 403),
        (Some(&first), "/first", 200),
        (Some(&first), "/admin", 403),
        (Some(&plain), "/first", 403),
        (Some(&plain), "/admin", 403),
        (Some(&plain), "/aud", 403),
        (Some(&plain), "/scope", 403),
        (Some(&all), "/admin", 200),
        (Some(&all), "/aud", 200),
        (Some(&all), "/scope", 200),
        (Some(&all), "/first", 403),
        (Some(&of_second("realm", json!({ "roles": "administrator" }))?), "/admin", 403),
        (Some(&of_second("scope", json!("writer g2"))?), "/scope", 403),
    ] {
        let header = token.map(|t| format!("authorization: Bearer {t}"));
        let mut args = vec![];
        if let Some(header) = &header {
            args.extend(["-H", header]);
        }
        let url = format!("http://{WEB}{path}");
        args.push(&url);
        let got = mesh.call(&args)?;
        ensure!(got.status == status, "{path}, expected {status}: {got:?}");
    }
    for (token, version) in [(&all, "web2"), (&plain, "web1")] {
        let got = mesh.call(&["-H", &format!("authorization: Bearer {token}"), &format!("http://{WEB}/beta")])?;
        ensure!(got.echo()?["name"] == version, "routed by claim: {got:?}");
    }
    Ok(())
}

pub(crate) fn keys_are_fetched_rotate_and_outlive_their_server(mesh: &mut Mesh) -> anyhow::Result<()> {
    let (old, new) = (SigningKey::make("old")?, SigningKey::make("new")?);
    // A pod of the mesh, where nothing but mutual TLS gets in: the keys come through the mesh too.
    let server = KeyServer::start(mesh.pod("web2"), 8088, None)?;
    server.publish(&[&old]);
    let uri = format!("http://{KEYS}/jwks");
    let _auth = mesh.objects("tokens", &authentication(&remote(&uri, "")))?;
    let (by_old, by_new) = (old.token(&claims("remote"))?, new.token(&claims("remote"))?);
    let got = call(mesh, &by_old)?;
    ensure!(got.status == 200, "{got:?}; {}", mesh.proxy("wp").log_tail(20));
    ensure!(server.requests() == 1, "one fetch for all: {}", server.requests());

    // A token by a key nobody has heard of asks for newer keys, as often as the issuer can bear, not as often as clients like.
    server.publish(&[&new]);
    wait::until("the new key", wait::PATIENCE, || (call(mesh, &by_new).ok()?.status == 200).then_some(()))?;
    refused(&call(mesh, &by_old)?, 401, NO_KEY)?;
    let before = (server.requests(), Instant::now());
    let stranger = SigningKey::make("stranger")?;
    for n in 0..30 {
        let mut c = claims("remote");
        c["n"] = json!(n);
        refused(&call(mesh, &stranger.token(&c)?)?, 401, NO_KEY)?;
    }
    let fetched = server.requests() - before.0;
    let allowed = 1 + before.1.elapsed().as_secs() as usize / 5;
    ensure!(fetched <= allowed, "{fetched} fetches, at most {allowed} expected");

    // What was fetched stays in use while the server fails.
    for manner in [Manner::Status(500), Manner::With("<html>".into()), Manner::With(json!({ "keys": [] }).to_string())] {
        server.behave(manner);
        ensure!(call(mesh, &by_new)?.status == 200);
    }
    drop(server);
    ensure!(call(mesh, &by_new)?.status == 200);
    let dump = mesh.proxy("wp").config_dump()?;
    ensure!(
        dump["jwks"].as_array().is_some_and(|all| all.iter().any(|k| k["source"] == uri && k["keys"] == 1)),
        "{}",
        dump["jwks"]
    );
    Ok(())
}

pub(crate) fn keys_are_withdrawn_by_the_refresh(mesh: &mut Mesh) -> anyhow::Result<()> {
    let (old, new) = (SigningKey::make("old")?, SigningKey::make("new")?);
    let outside = mesh.topology.host("outside").clone();
    let server = KeyServer::start(&outside, 8443, Some(&mesh.authority))?;
    server.publish(&[&old]);
    let _auth = mesh.objects("tokens", &authentication(&remote(&format!("https://{}:8443/jwks", outside.v4), "")))?;
    let token = old.token(&claims("remote"))?;
    let got = call(mesh, &token)?;
    ensure!(got.status == 200, "over https, by the system's roots: {got:?}; {}", mesh.proxy("wp").log_tail(20));
    server.publish(&[&new]);
    // This mesh fetches every eight seconds. A verified token that is remembered is forgotten with its key.
    wait::until("the old key gone", wait::PATIENCE, || (call(mesh, &token).ok()?.status == 401).then_some(()))
}

pub(crate) fn keys_are_found_by_the_issuers_own_metadata(mesh: &mut Mesh) -> anyhow::Result<()> {
    let key = SigningKey::make("k")?;
    let outside = mesh.topology.host("outside").clone();
    let of = |issuer: &str| format!("  - {{ issuer: '{issuer}', timeout: 1s }}\n");
    let keys = KeyServer::start(&outside, 8096, None)?;
    keys.publish(&[&key]);
    let published = format!("http://{}:8096/jwks", outside.v4);
    // No metadata, none that names keys, and keys over a wire nobody vouches for, where the issuer itself is vouched for.
    for (port, secure, document, passes) in [
        (8097, false, json!({ "issuer": "x", "jwks_uri": published }).to_string(), true),
        (8098, false, "{}".to_owned(), false),
        (8099, false, json!({ "jwks_uri": 7 }).to_string(), false),
        (8100, false, json!({ "jwks_uri": "file:///etc/passwd" }).to_string(), false),
        (8445, true, json!({ "jwks_uri": published }).to_string(), false),
    ] {
        let metadata = KeyServer::start(&outside, port, secure.then_some(&mesh.authority))?;
        metadata.behave(Manner::With(document.clone()));
        let issuer = format!("http{}://{}:{port}", if secure { "s" } else { "" }, outside.v4);
        let before = keys.requests();
        let _auth = mesh.objects("tokens", &authentication(&of(&issuer)))?;
        let got = call(mesh, &key.token(&claims(&issuer))?)?;
        if passes {
            ensure!(got.status == 200, "{got:?}; {}", mesh.proxy("wp").log_tail(20));
            refused(&call(mesh, &SigningKey::make("k")?.token(&claims(&issuer))?)?, 401, FORGED)?;
        } else {
            refused(&got, 401, NO_FETCH).with_context(|| document.clone())?;
        }
        ensure!(metadata.requests() > 0 && (keys.requests() > before) == passes, "{document}");
    }
    Ok(())
}

pub(crate) fn a_selector_of_pods_closes_what_is_reached_through_a_waypoint(mesh: &mut Mesh) -> anyhow::Result<()> {
    let key = SigningKey::make("k")?;
    let selecting = |labels: &str| {
        authentication(&inline("first", &[&key], "")).replace(
            "targetRefs: [ { kind: Service, group: '', name: web } ]",
            &format!("selector: {{ matchLabels: {{ {labels} }} }}"),
        )
    };
    let (good, bad) = (key.token(&claims("first"))?, key.token(&claims("second"))?);
    {
        let _auth = mesh.objects("tokens", &selecting("tier: web"))?;
        for token in [&good, &bad] {
            let got = call(mesh, token)?;
            ensure!(got.status == 403 && got.header("x-culvert-reason") == Some("policy_unusable"), "{got:?}");
        }
        wait::until("the problem in the dump", wait::PATIENCE, || {
            let dump = mesh.proxy("wp").config_dump().ok()?;
            dump["problems"].to_string().contains("pods are not asked for tokens").then_some(())
        })?;
    }
    // The pods of a gateway are selected as in Istio.
    let _auth = mesh.objects("tokens", &selecting("gateway.networking.k8s.io/gateway-name: gw"))?;
    ensure!(call(mesh, &bad)?.status == 200, "others are unaffected");
    let (outside, gateway) = (mesh.topology.host("outside").clone(), mesh.pod("gw").clone());
    let ask = |token: &str| {
        let bearer = format!("authorization: Bearer {token}");
        curl(&outside, &["-H", "host: web.example", "-H", &bearer, &format!("http://{}/shop", gateway.v4)])
    };
    ensure!(ask(&good)?.status == 200);
    let got = ask(&bad)?;
    ensure!(got.status == 401 && got.body == "Jwt issuer is not configured", "{got:?}");
    Ok(())
}

pub(crate) fn a_bad_key_server_refuses_in_time(mesh: &mut Mesh) -> anyhow::Result<()> {
    let key = SigningKey::make("k")?;
    let outside = mesh.topology.host("outside").clone();
    let token = key.token(&claims("remote"))?;
    let bad = [Manner::Padded(300 << 10), Manner::Slowly(Duration::from_secs(8)), Manner::Status(404), Manner::With("{}".into())];
    for (port, manner) in (8090..).zip(bad) {
        let server = KeyServer::start(&outside, port, None)?;
        server.publish(&[&key]);
        server.behave(manner.clone());
        let uri = format!("http://{}:{port}/jwks", outside.v4);
        let _auth = mesh.objects("tokens", &authentication(&remote(&uri, ", timeout: 1s")))?;
        let begun = Instant::now();
        refused(&call(mesh, &token)?, 401, NO_FETCH).with_context(|| format!("{manner:?}"))?;
        ensure!(begun.elapsed() < Duration::from_secs(7), "{manner:?}: {:?}", begun.elapsed());
        ensure!(mesh.call(&[&format!("http://{WEB}/a")])?.status == 200, "without a token nothing is waited for");
        ensure!(mesh.call(&[&format!("http://{OTHER}/a")])?.status == 200, "others are unaffected");
    }
    // A server nobody vouches for is not asked.
    let stranger = mesh_tests::issuer::Authority::make()?;
    let server = KeyServer::start(&outside, 8444, Some(&stranger))?;
    server.publish(&[&key]);
    let _auth = mesh.objects("tokens", &authentication(&remote(&format!("https://{}:8444/jwks", outside.v4), "")))?;
    refused(&call(mesh, &token)?, 401, NO_FETCH)?;
    ensure!(server.requests() == 0, "the keys of a stranger were read");
    Ok(())
}

pub(crate) fn an_unreadable_authentication_closes_its_service(mesh: &mut Mesh) -> anyhow::Result<()> {
    let _auth = mesh.objects("tokens", &authentication("  - { issuer: first, jwksURI: 'https://x/y' }\n"))?;
    let got = mesh.call(&[&format!("http://{WEB}/a")])?;
    ensure!(got.status == 403 && got.header("x-culvert-reason") == Some("policy_unusable"), "{got:?}");
    ensure!(mesh.call(&[&format!("http://{OTHER}/a")])?.status == 200, "others are unaffected");
    wait::until("the problem in the dump", wait::PATIENCE, || {
        let dump = mesh.proxy("wp").config_dump().ok()?;
        dump["problems"].as_array()?.iter().any(|p| p.to_string().contains("jwksURI")).then_some(())
    })
}
