//! RequestAuthentications: whose request it is, by its token. The words of a refusal are the same to the letter.
use std::time::{SystemTime, UNIX_EPOCH};

use aws_lc_rs::{hmac, signature};
use serde_json::{Value, json};

use crate::case::{Case, Req, Scenario, case, get, grpc, request, scenario};
use crate::token::{KEYS, SECRET, all_kinds, base64, ec, forged, rs256, rs256_of_other, rsa, rsa_jwk, secret, token as signed};

/// The usual issuer, and another.
pub const ISSUER: &str = "https://issuer.example";
/// See [`ISSUER`].
pub const OTHER: &str = "accounts@other.example";

impl Scenario {
    /// A RequestAuthentication for the service with these rules; `providers`: what istiod makes of each.
    pub fn tokens(self, rules: &str, providers: &[Value]) -> Self {
        let name = |n: usize| format!("origins-{n}");
        let missing = json!({"allow_missing": {}});
        let by: Vec<Value> = (0..providers.len()).map(|n| json!({"provider_name": name(n)})).collect();
        let any = |list: Vec<Value>| json!({"requires_any": {"requirements": list}});
        // One rule: its token, or none. Several: a token of one of them, or each has none.
        let requires = if let [one] = by.as_slice() {
            any(vec![one.clone(), missing])
        } else {
            let each: Vec<Value> = by.iter().map(|one| any(vec![one.clone(), missing.clone()])).collect();
            let all = json!({"requires_all": {"requirements": each}});
            any(by.into_iter().chain([all]).collect())
        };
        let named: serde_json::Map<String, Value> = providers
            .iter()
            .enumerate()
            .map(|(n, provider)| {
                let mut provider = provider.clone();
                provider["payload_in_metadata"] = "payload".into();
                provider["normalize_payload_in_metadata"] = json!({"space_delimited_claims": ["scope", "permission"]});
                (name(n), provider)
            })
            .collect();
        self.object(&format!(
            "apiVersion: security.istio.io/v1\nkind: RequestAuthentication\nmetadata: {{ name: $NAME, namespace: d }}\nspec:\n  \
             targetRefs: [{{ group: '', kind: Service, name: $NAME }}]\n  jwtRules:\n{rules}"
        ))
        .filter(
            "envoy.filters.http.jwt_authn",
            "jwt_authn.v3.JwtAuthentication",
            json!({"providers": named, "rules": [{"match": {"prefix": "/"}, "requires": requires}], "bypass_cors_preflight": true}),
        )
    }
}

/// Keys written in the rule.
pub fn local(keys: &Value) -> Value {
    json!({"inline_string": keys.to_string()})
}
/// The key of the usual issuer, and of the other.
pub fn jwks() -> Value {
    json!({"keys": [rsa_jwk("one", &KEYS.rsa)]})
}
fn other_jwks() -> Value {
    json!({"keys": [rsa_jwk("two", &KEYS.other)]})
}
fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs()
}
/// Claims of a token that is good, with others in addition or instead; `null` takes one away.
pub fn claims(patch: Value) -> Value {
    let mut claims = json!({"iss": ISSUER, "sub": "ann", "aud": "shop", "exp": now() + 36_000, "iat": now()});
    crate::istiod::merge(&mut claims, patch);
    claims
}
fn header() -> Value {
    json!({"alg": "RS256", "typ": "JWT", "kid": "one"})
}
/// A token of the usual issuer with these claims.
pub fn token(patch: Value) -> String {
    signed(&header(), &claims(patch), rs256)
}
/// A token of the usual issuer whose header is patched.
fn headed(patch: Value) -> String {
    let mut header = header();
    crate::istiod::merge(&mut header, patch);
    signed(&header, &claims(json!({})), rs256)
}
/// A token of the other issuer.
pub fn other_token() -> String {
    signed(&json!({"alg": "RS256", "kid": "two"}), &claims(json!({"iss": OTHER, "sub": "bob"})), rs256_of_other)
}
/// With a token where tokens usually are.
pub fn bearing(request: Req, token: &str) -> Req {
    request.header("authorization", &format!("Bearer {token}"))
}
fn with(name: &'static str, token: &str) -> Case {
    case(name, bearing(get("/a/b?c=d"), token))
}

/// One issuer, tokens where they usually are.
fn usual() -> Scenario {
    let rules = format!("  - {{ issuer: '{ISSUER}', audiences: [shop, 'https://api.example'], jwks: '{}' }}\n", jwks());
    let provider = json!({"issuer": ISSUER, "audiences": ["shop", "https://api.example"], "local_jwks": local(&jwks())});
    let good = token(json!({}));
    let [head, body, sign] = good.split('.').collect::<Vec<_>>()[..] else { panic!("a token has three parts") };
    let odd = |part: usize, text: &str| {
        let mut parts = [head, body, sign];
        parts[part] = text;
        parts.join(".")
    };
    let expired = token(json!({"exp": now() - 900}));
    scenario("jwt")
        .tokens(&rules, &[provider])
        .gets(&[("no token", "/"), ("an empty one in the query", "/?access_token=")])
        .case(with("a good one", &good))
        .case(case("a good one by HTTP/2", bearing(get("/"), &good).h2()))
        .case(with("expired", &expired))
        .case(with("expired within the skew of clocks", &token(json!({"exp": now() - 20}))))
        .case(with("expires as a fraction", &token(json!({"exp": now() as f64 + 3600.5}))))
        .case(with("expires never", &token(json!({"exp": null}))))
        .case(with("expires in year 10^10", &token(json!({"exp": 300_000_000_000_000_u64}))))
        .case(with("expired before 1970", &token(json!({"exp": -1}))))
        .case(with("not yet valid", &token(json!({"nbf": now() + 900}))))
        .case(with("not yet valid within the skew of clocks", &token(json!({"nbf": now() + 20}))))
        .case(with("another issuer", &token(json!({"iss": "https://evil.example"}))))
        .case(with("the issuer and a slash", &token(json!({"iss": format!("{ISSUER}/")}))))
        .case(with("no issuer", &token(json!({"iss": null}))))
        .case(with("another audience", &token(json!({"aud": "bank"}))))
        .case(with("one of several audiences", &token(json!({"aud": ["bank", "shop"]}))))
        .case(with("an audience and a slash", &token(json!({"aud": "https://api.example/"}))))
        .case(with("no audience", &token(json!({"aud": null}))))
        .case(with("an empty list of audiences", &token(json!({"aud": []}))))
        .case(with("a forged signature", &signed(&header(), &claims(json!({})), forged)))
        .case(with("signed by another issuer", &signed(&header(), &claims(json!({})), rs256_of_other)))
        .case(with("claims changed afterwards", &odd(1, &base64(claims(json!({"sub": "root"})).to_string()))))
        .case(with("no signature", &format!("{head}.{body}.")))
        .case(with("an unknown key", &headed(json!({"kid": "none"}))))
        .case(with("no key named", &headed(json!({"kid": null}))))
        .case(with("a key that is no text", &headed(json!({"kid": 7}))))
        .case(with("garbage", "garbage"))
        .case(with("two parts", &format!("{head}.{body}")))
        .case(with("four parts", &format!("{good}.{sign}")))
        .case(with("alg none", &signed(&json!({"alg": "none"}), &claims(json!({})), |_| Vec::new())))
        .case(with("alg none with a signature", &headed(json!({"alg": "none"}))))
        .case(with("no alg", &headed(json!({"alg": null}))))
        .case(with("an alg nobody knows", &headed(json!({"alg": "RS1024"}))))
        .case(with("another alg of the same key", &headed(json!({"alg": "RS512"}))))
        .case(with(
            "the public key as a secret",
            &signed(
                &json!({"alg": "HS256", "kid": "one"}),
                &claims(json!({})),
                secret(hmac::HMAC_SHA256, jwks().to_string().as_bytes()),
            ),
        ))
        .case(with("a critical extension", &headed(json!({"crit": ["b64"], "b64": false}))))
        .case(with("a head that is no base64", &odd(0, "!!!")))
        .case(with("a head that is no JSON", &odd(0, &base64("{"))))
        .case(with("a head that is no object", &odd(0, &base64("[]"))))
        .case(with("a payload that is no base64", &odd(1, "!!!")))
        .case(with("a payload that is no JSON", &odd(1, &base64("{"))))
        .case(with("a signature that is no base64", &odd(2, "!!!")))
        .case(with("an issuer that is no text", &token(json!({"iss": 7}))))
        .case(with("a subject that is no text", &token(json!({"sub": 7}))))
        .case(with("an audience that is no text", &token(json!({"aud": 7}))))
        .case(with("an expiry that is no number", &token(json!({"exp": "tomorrow"}))))
        .case(with("a beginning that is no number", &token(json!({"nbf": "today"}))))
        .case(with("a beginning before 1970", &token(json!({"nbf": -1}))))
        .case(with("an expiry of more than 64 bits", &token(json!({"exp": 1e30}))))
        .case(with("issued at no number", &token(json!({"iat": "then"}))))
        .case(with("issued before 1970", &token(json!({"iat": -1}))))
        .case(with("issued tomorrow", &token(json!({"iat": now() + 86_400}))))
        .case(with("an id that is no text", &token(json!({"jti": 7}))))
        .case(with(
            "an expiry that is null",
            &odd(1, &base64(claims(json!({})).to_string().replace("\"exp\":", "\"exp\":null,\"x\":"))),
        ))
        .case(case("bearer in small letters", get("/").header("authorization", &format!("bearer {good}"))))
        .case(case("bearer without a token", get("/").header("authorization", "Bearer ")))
        .case(case("more spaces", get("/").header("authorization", &format!("Bearer   {good}"))))
        .case(case("something behind it", get("/").header("authorization", &format!("Bearer {good} x"))))
        .case(case("another scheme", get("/").header("authorization", "Basic YTpi")))
        .case(case("in the query", get(&format!("/q?access_token={good}&x=1"))))
        .case(case("in the query, expired", get(&format!("/q?x=1&access_token={expired}"))))
        .case(case("the same in two places", bearing(get(&format!("/q?access_token={good}")), &good)))
        .case(case("two that differ", bearing(get(&format!("/q?access_token={expired}")), &good)))
        .case(case(
            "a preflight with an expired one",
            bearing(request("OPTIONS", "/"), &expired)
                .header("origin", "http://a")
                .header("access-control-request-method", "PUT"),
        ))
        .case(case("HEAD, refused", bearing(request("HEAD", "/"), &expired)))
        .case(case("POST, refused", bearing(request("POST", "/").body(b"x"), &expired)))
        .case(case("a gRPC call, refused", bearing(grpc("/s/m"), &expired)))
        .case(case("by HTTP/2, refused", bearing(get("/"), &expired).h2()))
        .case(case("a long path, refused", bearing(get(&format!("/{}?q", "p".repeat(300))), &expired)))
        .case(case("a path that is normalised, refused", bearing(get("/a/../b"), &expired)))
        .case(case("another host, refused", bearing(get("/"), &expired).host("x.example:8080")))
}

/// Places of one's own.
fn places() -> Scenario {
    let rules = format!(
        "  - issuer: '{ISSUER}'\n    jwks: '{}'\n    fromHeaders: [{{ name: x-jwt }}, {{ name: x-prefixed, prefix: 'Token ' }}]\n    \
         fromParams: [tok]\n    fromCookies: [session]\n",
        jwks()
    );
    let provider = json!({
        "issuer": ISSUER, "local_jwks": local(&jwks()), "from_params": ["tok"], "from_cookies": ["session"],
        "from_headers": [{"name": "x-jwt"}, {"name": "x-prefixed", "value_prefix": "Token "}],
    });
    let (good, bad) = (token(json!({})), token(json!({"exp": now() - 900})));
    let cookie = |text: &str| get("/").header("cookie", &text.replace("GOOD", &good).replace("BAD", &bad));
    scenario("jwt-places")
        .tokens(&rules, &[provider])
        .case(case("a header", get("/").header("x-jwt", &good)))
        .case(case("a header, refused", get("/").header("x-jwt", &bad)))
        .case(case("a header with a prefix", get("/").header("x-prefixed", &format!("Token {good}"))))
        .case(case("a header without its prefix", get("/").header("x-prefixed", &good)))
        .case(case("where nobody looks", bearing(get("/"), &bad)))
        .case(case("a parameter nobody looks at", get(&format!("/?access_token={bad}"))))
        .case(case("a parameter", get(&format!("/p?a=1&tok={good}&b=2"))))
        .case(case("a parameter, refused", get(&format!("/p?tok={bad}"))))
        .case(case("a cookie", cookie("session=GOOD")))
        .case(case("a cookie, refused", cookie("session=BAD")))
        .case(case("a cookie among others", cookie("a=b; session=GOOD; c=d")))
        .case(case("a cookie of a longer name", cookie("mysession=BAD")))
        .case(case("an empty cookie", cookie("session=")))
        .case(case("a cookie in quotes", cookie("session=\"GOOD\"")))
        .case(case("a header that is empty", get("/").header("x-jwt", "")))
        .case(case("a header that comes twice", get("/").header("x-jwt", &good).header("x-jwt", &good)))
}

/// What the endpoint sees of a token that is true.
fn outputs() -> Scenario {
    let claims_to = ["sub", "number", "fraction", "yes", "deep.er", "list", "object", "nothing", "text", "empty", "absent"];
    let written: Vec<String> =
        claims_to.iter().map(|c| format!("{{ header: x-c-{}, claim: {c} }}", c.replace('.', "-"))).collect();
    let told: Vec<Value> =
        claims_to.iter().map(|c| json!({"header_name": format!("x-c-{}", c.replace('.', "-")), "claim_name": c})).collect();
    let rules = format!(
        "  - issuer: '{ISSUER}'\n    jwks: '{}'\n    forwardOriginalToken: true\n    outputPayloadToHeader: x-payload\n    \
         outputClaimToHeaders: [{}]\n",
        jwks(),
        written.join(", ")
    );
    let provider = json!({
        "issuer": ISSUER, "local_jwks": local(&jwks()), "forward": true, "forward_payload_header": "x-payload",
        "claim_to_headers": told,
    });
    let full = token(json!({
        "number": 12_345_678_901_u64, "fraction": 1.5, "yes": true, "deep": {"er": "inside"}, "list": ["a", "b"],
        "object": {"k": "v"}, "nothing": null, "text": "a, b; c", "empty": "",
    }));
    let spoofed = |request: Req| request.header("x-c-sub", "root").header("x-c-absent", "root").header("x-payload", "e30");
    scenario("jwt-outputs")
        .tokens(&rules, &[provider])
        .case(case("everything", bearing(get("/"), &full)))
        .case(case("nothing but the usual", bearing(get("/"), &token(json!({})))))
        .case(case("in the query, forwarded", get(&format!("/?access_token={full}"))))
        .case(case("headers a client makes up", spoofed(bearing(get("/"), &full))))
        .case(case("headers a client makes up, without a token", spoofed(get("/"))))
        .case(case("by HTTP/2", spoofed(bearing(get("/"), &full)).h2()))
}

/// Two issuers; the second has a header of its own, too.
fn issuers() -> Scenario {
    let rules = format!(
        "  - {{ issuer: '{ISSUER}', jwks: '{}' }}\n  - {{ issuer: '{OTHER}', jwks: '{}', fromHeaders: [{{ name: authorization, \
         prefix: 'Bearer ' }}, {{ name: x-other }}], outputClaimToHeaders: [{{ header: x-sub, claim: sub }}] }}\n",
        jwks(),
        other_jwks()
    );
    let one = json!({"issuer": ISSUER, "local_jwks": local(&jwks())});
    let two = json!({
        "issuer": OTHER, "local_jwks": local(&other_jwks()), "claim_to_headers": [{"header_name": "x-sub", "claim_name": "sub"}],
        "from_headers": [{"name": "authorization", "value_prefix": "Bearer "}, {"name": "x-other"}],
    });
    let (good, bad) = (token(json!({})), token(json!({"exp": now() - 900})));
    let by_the_other_key = signed(&json!({"alg": "RS256", "kid": "two"}), &claims(json!({})), rs256_of_other);
    scenario("jwt-issuers")
        .tokens(&rules, &[one, two])
        .gets(&[("no token", "/")])
        .case(with("the first", &good))
        .case(with("the second", &other_token()))
        .case(with("the first with the key of the second", &by_the_other_key))
        .case(with("neither", &token(json!({"iss": "https://third.example"}))))
        .case(with("the first, expired", &bad))
        .case(with("garbage", "garbage"))
        .case(case("the second in its own header", get("/").header("x-other", &other_token())))
        .case(case("the first in the header of the second", get("/").header("x-other", &good)))
        .case(case("both", bearing(get("/"), &good).header("x-other", &other_token())))
}

/// Algorithms.
fn algorithms() -> Scenario {
    let rules = format!("  - {{ issuer: '{ISSUER}', jwks: '{}' }}\n", all_kinds());
    let provider = json!({"issuer": ISSUER, "local_jwks": local(&all_kinds())});
    let keys = &*KEYS;
    let of = |alg: &str, kid: &str| json!({"alg": alg, "kid": kid});
    let good = |alg: &str, kid: &str, sign: &dyn Fn(&[u8]) -> Vec<u8>| signed(&of(alg, kid), &claims(json!({})), sign);
    let hidden = |how: hmac::Algorithm| secret(how, SECRET);
    scenario("jwt-algorithms")
        .tokens(&rules, &[provider])
        .case(with("RS256", &good("RS256", "rsa", &rsa(&keys.rsa, &signature::RSA_PKCS1_SHA256))))
        .case(with("RS384", &good("RS384", "rsa", &rsa(&keys.rsa, &signature::RSA_PKCS1_SHA384))))
        .case(with("RS512", &good("RS512", "rsa", &rsa(&keys.rsa, &signature::RSA_PKCS1_SHA512))))
        .case(with("PS256", &good("PS256", "rsa", &rsa(&keys.rsa, &signature::RSA_PSS_SHA256))))
        .case(with("PS384", &good("PS384", "rsa", &rsa(&keys.rsa, &signature::RSA_PSS_SHA384))))
        .case(with("PS512", &good("PS512", "rsa", &rsa(&keys.rsa, &signature::RSA_PSS_SHA512))))
        .case(with("ES256", &good("ES256", "p256", &ec(&keys.p256))))
        .case(with("ES384", &good("ES384", "p384", &ec(&keys.p384))))
        .case(with("ES512", &good("ES512", "p521", &ec(&keys.p521))))
        .case(with("EdDSA", &good("EdDSA", "ed25519", &|m| keys.ed25519.sign(m).as_ref().to_vec())))
        .case(with("HS256", &good("HS256", "secret", &hidden(hmac::HMAC_SHA256))))
        .case(with("HS384", &good("HS384", "secret", &hidden(hmac::HMAC_SHA384))))
        .case(with("HS512", &good("HS512", "secret", &hidden(hmac::HMAC_SHA512))))
        .case(with("RS256 said to be PS256", &good("PS256", "rsa", &rsa(&keys.rsa, &signature::RSA_PKCS1_SHA256))))
        .case(with("ES256 with the key of ES384", &good("ES256", "p384", &ec(&keys.p256))))
        .case(with("ES256 without a key named", &signed(&json!({"alg": "ES256"}), &claims(json!({})), ec(&keys.p256))))
        .case(with("HS256 with the wrong secret", &good("HS256", "secret", &secret(hmac::HMAC_SHA256, b"wrong"))))
        .case(with("EdDSA, forged", &good("EdDSA", "ed25519", &|m| forged(m)[..64].to_vec())))
}

pub fn all() -> Vec<Scenario> {
    vec![usual(), places(), outputs(), issuers(), algorithms()]
}
