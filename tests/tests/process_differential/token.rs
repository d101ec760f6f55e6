//! Tokens and the keys they are signed with, of every kind an issuer may have.
use std::sync::LazyLock;

use aws_lc_rs::rand::SystemRandom;
use aws_lc_rs::rsa::KeySize;
use aws_lc_rs::signature::{self, EcdsaKeyPair, Ed25519KeyPair, KeyPair as _, RsaEncoding, RsaKeyPair};
use aws_lc_rs::{digest, hmac};
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD as BASE64;
use serde_json::{Value, json};

/// A secret both sides know.
pub const SECRET: &[u8] = b"a secret of sixty-four bytes, which is as much as HS512 asks for.";

/// All keys, made once.
pub struct Keys {
    /// RSA.
    pub rsa: RsaKeyPair,
    /// RSA, of another issuer.
    pub other: RsaKeyPair,
    /// P-256.
    pub p256: EcdsaKeyPair,
    /// P-384.
    pub p384: EcdsaKeyPair,
    /// P-521.
    pub p521: EcdsaKeyPair,
    /// Ed25519.
    pub ed25519: Ed25519KeyPair,
}
/// The keys of this run.
pub static KEYS: LazyLock<Keys> = LazyLock::new(|| Keys {
    rsa: RsaKeyPair::generate(KeySize::Rsa2048).expect("a key"),
    other: RsaKeyPair::generate(KeySize::Rsa2048).expect("a key"),
    p256: EcdsaKeyPair::generate(&signature::ECDSA_P256_SHA256_FIXED_SIGNING).expect("a key"),
    p384: EcdsaKeyPair::generate(&signature::ECDSA_P384_SHA384_FIXED_SIGNING).expect("a key"),
    p521: EcdsaKeyPair::generate(&signature::ECDSA_P521_SHA512_FIXED_SIGNING).expect("a key"),
    ed25519: Ed25519KeyPair::generate().expect("a key"),
});

/// base64url.
pub fn base64(bytes: impl AsRef<[u8]>) -> String {
    BASE64.encode(bytes)
}

/// The public half of an RSA key, under an id.
pub fn rsa_jwk(id: &str, key: &RsaKeyPair) -> Value {
    let public = key.public_key();
    let [n, e] = [public.modulus(), public.exponent()].map(|part| base64(part.big_endian_without_leading_zero()));
    json!({"kty": "RSA", "use": "sig", "kid": id, "n": n, "e": e})
}
fn ec_jwk(id: &str, curve: &str, key: &EcdsaKeyPair) -> Value {
    let point = &key.public_key().as_ref()[1..];
    let (x, y) = point.split_at(point.len() / 2);
    json!({"kty": "EC", "crv": curve, "kid": id, "x": base64(x), "y": base64(y)})
}
/// One of each kind, by the name of its kind.
pub fn all_kinds() -> Value {
    let keys = &*KEYS;
    json!({"keys": [
        rsa_jwk("rsa", &keys.rsa),
        ec_jwk("p256", "P-256", &keys.p256),
        ec_jwk("p384", "P-384", &keys.p384),
        ec_jwk("p521", "P-521", &keys.p521),
        {"kty": "OKP", "crv": "Ed25519", "kid": "ed25519", "x": base64(keys.ed25519.public_key())},
        {"kty": "oct", "kid": "secret", "k": base64(SECRET)},
    ]})
}

/// A token with this header and these claims, signed as `signature` does.
pub fn token(header: &Value, claims: &Value, signature: impl Fn(&[u8]) -> Vec<u8>) -> String {
    let message = format!("{}.{}", base64(header.to_string()), base64(claims.to_string()));
    let signature = base64(signature(message.as_bytes()));
    format!("{message}.{signature}")
}
/// Signs with an RSA key.
pub fn rsa<'k>(key: &'k RsaKeyPair, how: &'static dyn RsaEncoding) -> impl Fn(&[u8]) -> Vec<u8> + use<'k> {
    move |message| {
        let mut signature = vec![0; key.public_modulus_len()];
        key.sign(how, &SystemRandom::new(), message, &mut signature).expect("signed");
        signature
    }
}
/// RS256 with the key `rsa` of the usual issuer.
pub fn rs256(message: &[u8]) -> Vec<u8> {
    rsa(&KEYS.rsa, &signature::RSA_PKCS1_SHA256)(message)
}
/// RS256 with the key of the other issuer.
pub fn rs256_of_other(message: &[u8]) -> Vec<u8> {
    rsa(&KEYS.other, &signature::RSA_PKCS1_SHA256)(message)
}
/// Signs with a key of an elliptic curve.
pub fn ec(key: &EcdsaKeyPair) -> impl Fn(&[u8]) -> Vec<u8> {
    move |message| key.sign(&SystemRandom::new(), message).expect("signed").as_ref().to_vec()
}
/// Signs with a secret.
pub fn secret(how: hmac::Algorithm, secret: &[u8]) -> impl Fn(&[u8]) -> Vec<u8> {
    let key = hmac::Key::new(how, secret);
    move |message| hmac::sign(&key, message).as_ref().to_vec()
}
/// Nobody's signature.
pub fn forged(message: &[u8]) -> Vec<u8> {
    digest::digest(&digest::SHA256, message).as_ref().repeat(8)
}
