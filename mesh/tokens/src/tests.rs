//! Tokens signed here, by every algorithm, and every way to be wrong.
use super::keys::KeySet;
use super::*;
use aws_lc_rs::rand::SystemRandom;
use aws_lc_rs::rsa::KeySize;
use aws_lc_rs::signature::{
    ECDSA_P256_SHA256_FIXED_SIGNING, ECDSA_P384_SHA384_FIXED_SIGNING, ECDSA_P521_SHA512_FIXED_SIGNING, EcdsaKeyPair,
    EcdsaSigningAlgorithm, Ed25519KeyPair, KeyPair as _, RSA_PKCS1_SHA256, RSA_PKCS1_SHA384, RSA_PKCS1_SHA512, RSA_PSS_SHA256,
    RSA_PSS_SHA384, RSA_PSS_SHA512, RsaEncoding, RsaKeyPair,
};
use mesh_model::l7::request_auth::{Jwks, KeySource, TokenPlace};
use serde_json::json;
use std::sync::LazyLock;

/// Two issuers' keys; making one takes a while.
static RSA: LazyLock<[RsaKeyPair; 2]> = LazyLock::new(|| [(); 2].map(|()| RsaKeyPair::generate(KeySize::Rsa2048).unwrap()));

fn token(header: &Value, payload: &Value, sign: impl FnOnce(&[u8]) -> Vec<u8>) -> String {
    let message = format!("{}.{}", BASE64.encode(header.to_string()), BASE64.encode(payload.to_string()));
    let signature = BASE64.encode(sign(message.as_bytes()));
    format!("{message}.{signature}")
}
fn rsa_jwk(key: &RsaKeyPair, id: &str) -> Value {
    let (n, e) = (key.public_key().modulus(), key.public_key().exponent());
    json!({"kty": "RSA", "kid": id, "n": BASE64.encode(n.big_endian_without_leading_zero()), "e": BASE64.encode(e.big_endian_without_leading_zero())})
}
fn rsa_sign(key: &RsaKeyPair, encoding: &'static dyn RsaEncoding, message: &[u8]) -> Vec<u8> {
    let mut signature = vec![0; key.public_modulus_len()];
    key.sign(encoding, &SystemRandom::new(), message, &mut signature).unwrap();
    signature
}
fn rs256(key: &RsaKeyPair, header: &Value, payload: &Value) -> String {
    token(header, payload, |m| rsa_sign(key, &RSA_PKCS1_SHA256, m))
}
fn set(keys: &[Value]) -> KeySet {
    KeySet::parse(json!({ "keys": keys }).to_string().as_bytes()).unwrap()
}
fn verdict(keys: &KeySet, token: &str) -> Result<(), Fault> {
    keys.verify(&Jwt::parse(token)?)
}

#[test]
fn every_algorithm_verifies_and_a_changed_byte_does_not() {
    let check = |name: &str, jwk: Value, sign: &dyn Fn(&[u8]) -> Vec<u8>| {
        let keys = set(&[jwk]);
        let good = token(&json!({"alg": name, "kid": "k"}), &json!({"iss": "i"}), sign);
        assert_eq!(verdict(&keys, &good), Ok(()), "{name}");
        let other = token(&json!({"alg": name, "kid": "k"}), &json!({"iss": "j"}), |_| Vec::new());
        let signature = good.rsplit_once('.').unwrap().1;
        assert_eq!(verdict(&keys, &format!("{other}{signature}")), Err(Fault::Forged), "{name}: another payload");
        assert_eq!(verdict(&keys, &good.replace(signature, "AAAA")), Err(Fault::Forged), "{name}: another signature");
    };
    let encodings: [(&str, &'static dyn RsaEncoding); 6] = [
        ("RS256", &RSA_PKCS1_SHA256),
        ("RS384", &RSA_PKCS1_SHA384),
        ("RS512", &RSA_PKCS1_SHA512),
        ("PS256", &RSA_PSS_SHA256),
        ("PS384", &RSA_PSS_SHA384),
        ("PS512", &RSA_PSS_SHA512),
    ];
    for (name, encoding) in encodings {
        check(name, rsa_jwk(&RSA[0], "k"), &|m| rsa_sign(&RSA[0], encoding, m));
    }
    let curves: [(&str, &str, &'static EcdsaSigningAlgorithm); 3] = [
        ("ES256", "P-256", &ECDSA_P256_SHA256_FIXED_SIGNING),
        ("ES384", "P-384", &ECDSA_P384_SHA384_FIXED_SIGNING),
        ("ES512", "P-521", &ECDSA_P521_SHA512_FIXED_SIGNING),
    ];
    for (name, curve, algorithm) in curves {
        let pair = EcdsaKeyPair::generate(algorithm).unwrap();
        let point = &pair.public_key().as_ref()[1..];
        let (x, y) = point.split_at(point.len() / 2);
        let jwk = json!({"kty": "EC", "kid": "k", "crv": curve, "x": BASE64.encode(x), "y": BASE64.encode(y)});
        check(name, jwk, &|m| pair.sign(&SystemRandom::new(), m).unwrap().as_ref().to_vec());
    }
    let pair = Ed25519KeyPair::generate().unwrap();
    let jwk = json!({"kty": "OKP", "kid": "k", "crv": "Ed25519", "x": BASE64.encode(pair.public_key().as_ref())});
    check("EdDSA", jwk, &|m| pair.sign(m).as_ref().to_vec());
    let secret = aws_lc_rs::hmac::Key::new(aws_lc_rs::hmac::HMAC_SHA256, b"a secret of thirty-two characters");
    let jwk = json!({"kty": "oct", "kid": "k", "k": BASE64.encode(b"a secret of thirty-two characters")});
    check("HS256", jwk, &|m| aws_lc_rs::hmac::sign(&secret, m).as_ref().to_vec());
}

#[test]
fn a_public_key_is_no_secret_and_none_is_no_algorithm() {
    let jwk = rsa_jwk(&RSA[0], "k");
    let keys = set(std::slice::from_ref(&jwk));
    let modulus = BASE64.decode(jwk["n"].as_str().unwrap()).unwrap();
    // What an attacker has: the public key, in each form a careless verifier may take for a secret.
    for secret in [modulus, jwk.to_string().into_bytes(), jwk["n"].as_str().unwrap().as_bytes().to_vec()] {
        let key = aws_lc_rs::hmac::Key::new(aws_lc_rs::hmac::HMAC_SHA256, &secret);
        for header in [json!({"alg": "HS256", "kid": "k"}), json!({"alg": "HS256"})] {
            let forged = token(&header, &json!({"iss": "i"}), |m| aws_lc_rs::hmac::sign(&key, m).as_ref().to_vec());
            assert_eq!(verdict(&keys, &forged), Err(Fault::Forged));
        }
    }
    for name in ["none", "None", "NONE", "nOnE", "", "RS128"] {
        let unsigned = token(&json!({"alg": name, "kid": "k"}), &json!({"iss": "i"}), |_| b"x".to_vec());
        assert_eq!(verdict(&keys, &unsigned), Err(Fault::UnknownAlgorithm), "{name}");
    }
    // Nor is the algorithm the token's to choose where the key names its own.
    let mut only = rsa_jwk(&RSA[0], "k");
    only["alg"] = "RS512".into();
    let by_another = rs256(&RSA[0], &json!({"alg": "RS256", "kid": "k"}), &json!({"iss": "i"}));
    assert_eq!(verdict(&set(&[only]), &by_another), Err(Fault::NoSuchKey));
}

#[test]
fn keys_are_chosen_by_id_or_all_are_tried() {
    let [ours, theirs] = &*RSA;
    let both = set(&[rsa_jwk(ours, "a"), rsa_jwk(theirs, "b")]);
    let payload = json!({"iss": "i"});
    for (key, id, want) in [
        (ours, Some("a"), Ok(())),
        (theirs, Some("b"), Ok(())),
        (theirs, None, Ok(())),
        (ours, Some("b"), Err(Fault::Forged)),
        (ours, Some("c"), Err(Fault::NoSuchKey)),
    ] {
        let header = id.map_or(json!({"alg": "RS256"}), |id| json!({"alg": "RS256", "kid": id}));
        assert_eq!(verdict(&both, &rs256(key, &header, &payload)), want, "{id:?}");
    }
    // The key of another issuer is not among this one's.
    let token = rs256(theirs, &json!({"alg": "RS256", "kid": "a"}), &payload);
    assert_eq!(verdict(&set(&[rsa_jwk(ours, "a")]), &token), Err(Fault::Forged));
    let token = rs256(theirs, &json!({"alg": "RS256"}), &payload);
    assert_eq!(verdict(&set(&[rsa_jwk(ours, "a")]), &token), Err(Fault::Forged));
}

#[test]
fn a_set_without_usable_keys_is_none() {
    let good = rsa_jwk(&RSA[0], "a");
    let with = |name: &str, value: &str| {
        let mut key = good.clone();
        key[name] = value.into();
        key
    };
    let small = json!({"kty": "RSA", "kid": "s", "n": BASE64.encode([0xff_u8; 128]), "e": "AQAB"});
    for key in [with("use", "enc"), with("alg", "RSA-OAEP"), with("kty", "XYZ"), small, json!({"kty": "RSA"}), json!(7)] {
        assert!(KeySet::parse(json!({"keys": [key]}).to_string().as_bytes()).is_err(), "{key}");
        assert_eq!(set(&[key, good.clone()]).len(), 1, "the others still count");
    }
    for text in ["", "{}", "[]", r#"{"keys":7}"#, r#"{"keys":[]}"#, "not json"] {
        assert!(KeySet::parse(text.as_bytes()).is_err(), "{text}");
    }
    let many: Vec<Value> = std::iter::repeat_n(good, 101).collect();
    assert!(KeySet::parse(json!({ "keys": many }).to_string().as_bytes()).is_err());
}

#[test]
fn what_is_malformed_is_told_in_envoys_words() {
    let part = |v: Value| BASE64.encode(v.to_string());
    let head = part(json!({"alg": "RS256"}));
    let of = |payload: Value| format!("{head}.{}.c2ln", part(payload));
    for (text, fault) in [
        (String::new(), Fault::Shape),
        ("a.b".into(), Fault::Shape),
        ("a.b.c.d".into(), Fault::Shape),
        ("..".into(), Fault::Shape),
        (format!("{head}..c2ln"), Fault::Shape),
        ("!.e30.c2ln".into(), Fault::HeaderBase64),
        (format!("{}.e30.c2ln", BASE64.encode("nonsense")), Fault::HeaderJson),
        (format!("{}.e30.c2ln", part(json!([]))), Fault::HeaderJson),
        (format!("{}.e30.c2ln", part(json!({}))), Fault::NoAlgorithm),
        (format!("{}.e30.c2ln", part(json!({"alg": 7}))), Fault::NoAlgorithm),
        (format!("{}.e30.c2ln", part(json!({"alg": "none"}))), Fault::UnknownAlgorithm),
        (format!("{}.e30.c2ln", part(json!({"alg": "RS256", "kid": 7}))), Fault::KeyId),
        (format!("{}.e30.c2ln", part(json!({"alg": "RS256", "crit": ["b64"]}))), Fault::Critical),
        (format!("{head}.!.c2ln"), Fault::PayloadBase64),
        (format!("{head}.{}.c2ln", BASE64.encode("nonsense")), Fault::PayloadJson),
        (of(json!({"iss": 7})), Fault::Issuer),
        (of(json!({"sub": []})), Fault::Subject),
        (of(json!({"nbf": "soon"})), Fault::NotBefore),
        (of(json!({"exp": "soon"})), Fault::Expiry),
        (of(json!({"exp": -1})), Fault::ExpiryRange),
        (of(json!({"nbf": 1e30})), Fault::NotBeforeRange),
        (of(json!({"iat": null})), Fault::IssuedAt),
        (of(json!({"jti": 7})), Fault::Id),
        (of(json!({"aud": [7]})), Fault::Audience),
        (of(json!({"aud": {}})), Fault::Audience),
        (format!("{head}.e30.!"), Fault::SignatureBase64),
        (format!("{head}.e30.c2ln\u{e9}"), Fault::SignatureBase64),
    ] {
        assert_eq!(Jwt::parse(&text).err(), Some(fault), "{text}");
    }
    assert_eq!(Fault::Shape.text(), "Jwt is not in the form of Header.Payload.Signature with two dots and 3 sections");
    assert_eq!((Fault::WrongAudience.status().as_u16(), Fault::Expired.status().as_u16()), (403, 401));
    // Nesting that would overflow a stack is refused by the parser.
    let deep = format!("{head}.{}.c2ln", BASE64.encode(format!("{{\"a\":{}", "[".repeat(100_000))));
    assert_eq!(Jwt::parse(&deep).err(), Some(Fault::PayloadJson));
}

#[test]
fn clocks_may_differ_by_a_minute() {
    let now = 1_000_000;
    let jwt = |claims: Value| {
        let head = BASE64.encode(json!({"alg": "RS256"}).to_string());
        Jwt::parse(&format!("{head}.{}.c2ln", BASE64.encode(claims.to_string()))).unwrap()
    };
    for (claims, want) in [
        (json!({}), Ok(())),
        (json!({"exp": now - 60}), Ok(())),
        (json!({"exp": now - 61}), Err(Fault::Expired)),
        (json!({"exp": 0}), Err(Fault::Expired)),
        (json!({"exp": 1e19}), Ok(())),
        (json!({"exp": (now as f64) - 60.5}), Err(Fault::Expired)),
        (json!({"nbf": now + 60}), Ok(())),
        (json!({"nbf": now + 61}), Err(Fault::NotYetValid)),
        (json!({"nbf": u64::MAX}), Err(Fault::NotYetValid)),
    ] {
        assert_eq!(jwt(claims.clone()).check_time(now), want, "{claims}");
    }
}

#[test]
fn claims_are_asked_for_as_text_lists_and_nested() {
    let claims = json!({
        "iss": "i", "sub": "s", "aud": ["a", "b"], "role": "admin", "groups": ["x", "y", 7], "scope": "read write", "words": "p q",
        "realm": {"access": {"roles": ["r1"]}, "name": "n"}, "number": 7, "yes": true, "none": null, "empty": ""
    });
    let head = BASE64.encode(json!({"alg": "RS256"}).to_string());
    let jwt = Arc::new(Jwt::parse(&format!("{head}.{}.c2ln", BASE64.encode(claims.to_string()))).unwrap());
    let rule = TokenRule {
        issuer: "i".into(),
        audiences: Box::default(),
        keys: KeySource::Inline(Jwks::new("")),
        places: TokenPlace::usual(),
        payload_to: None,
        claims_to: Box::default(),
        forward: false,
        space_delimited: ["scope".into()].into(),
    };
    let token = Verified { jwt: Arc::clone(&jwt), rule: Arc::new(rule) };
    let path = |p: &str| p.split('/').map(Arc::from).collect::<Vec<Arc<str>>>();
    let is = |p: &str, exact: &str| token.matches(&path(p), &StringMatch::Exact(exact.into()));
    assert!(is("role", "admin") && !is("role", "adm") && is("groups", "x") && is("groups", "y") && !is("groups", "z"));
    assert!(is("scope", "read") && is("scope", "write") && !is("scope", "read write"), "a list in a text");
    assert!(is("words", "p q") && !is("words", "p"), "not a list");
    assert!(is("realm/access/roles", "r1") && is("realm/name", "n") && !is("realm/access", "r1") && !is("role/x", "admin"));
    assert!(is("aud", "b") && !is("number", "7") && !is("yes", "true") && !is("missing", ""));
    assert!(token.matches(&path("role"), &StringMatch::Present) && !token.matches(&path("missing"), &StringMatch::Present));
    assert!(!token.matches(&path("empty"), &StringMatch::Present) && is("empty", ""));
    assert!(token.matches(&path("groups"), &StringMatch::Prefix("y".into())));
    assert_eq!((token.issuer(), token.subject()), ("i", "s"));
    assert_eq!(jwt.audiences().collect::<Vec<_>>(), ["a", "b"]);
    let text = |p: &str| jwt.claim_text(&path(p));
    assert_eq!(text("role").as_deref(), Some("admin"));
    assert_eq!((text("number").as_deref(), text("yes").as_deref()), (Some("7"), Some("true")));
    assert_eq!(text("realm/access/roles"), Some(BASE64.encode(r#"["r1"]"#)));
    assert_eq!((text("none"), text("missing"), text("empty")), (None, None, None));
}
