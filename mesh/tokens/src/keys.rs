//! Keys of an issuer (JWKS, RFC 7517) and signatures made with them.
//!
//! A key verifies only what its own kind signs: a public RSA key is never an HMAC secret, whatever the token's header says.
use super::{BASE64, Fault, Jwt};
use aws_lc_rs::signature::{ECDSA_P521_SHA512_FIXED, UnparsedPublicKey};
use base64::Engine as _;
use jsonwebtoken::jwk::{AlgorithmParameters, EllipticCurve, Jwk, PublicKeyUse};
use jsonwebtoken::{Algorithm as Known, DecodingKey};
use serde::Deserialize;
use std::str::FromStr;

/// Most keys of a set: a token without `kid` is tried with all of them.
const MOST_KEYS: usize = 100;
/// Smallest RSA modulus, in bytes (RFC 7518 §3.3).
const SMALLEST_RSA: usize = 256;

/// An algorithm that is supported; `none` is not.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Algorithm {
    Known(Known),
    /// Not in `jsonwebtoken`.
    Es512,
}
impl Algorithm {
    pub fn parse(name: &str) -> Option<Self> {
        if name == "ES512" { Some(Self::Es512) } else { Known::from_str(name).ok().map(Self::Known) }
    }
}

/// The usable keys of an issuer.
#[derive(Debug)]
pub struct KeySet {
    keys: Box<[Key]>,
}
#[derive(Debug)]
struct Key {
    id: Option<String>,
    /// The only algorithm it is for, where it says so.
    only: Option<Algorithm>,
    material: Material,
}
#[derive(Debug)]
enum Material {
    /// With the algorithms of its kind.
    Known(DecodingKey, &'static [Known]),
    /// A point of P-521, uncompressed.
    P521(Box<[u8]>),
}

#[derive(Deserialize)]
struct Document {
    keys: Vec<serde_json::Value>,
}

impl KeySet {
    /// Reads a set. Keys that are of no use here (other kinds, for encryption) are left out.
    ///
    /// # Errors
    /// It is no JWKS, or none of its keys can be used.
    pub fn parse(text: &[u8]) -> Result<Self, String> {
        let document: Document = serde_json::from_slice(text).map_err(|e| format!("not a JWKS: {e}"))?;
        if document.keys.len() > MOST_KEYS {
            return Err(format!("{} keys, more than {MOST_KEYS}", document.keys.len()));
        }
        let keys: Box<[Key]> = document.keys.into_iter().filter_map(Key::read).collect();
        if keys.is_empty() { Err("no usable key in the JWKS".to_owned()) } else { Ok(Self { keys }) }
    }
    /// How many.
    #[allow(clippy::len_without_is_empty, reason = "never empty")]
    pub fn len(&self) -> usize {
        self.keys.len()
    }
    /// Whether one of the keys signed the token.
    ///
    /// # Errors
    /// None did, or none is meant for it.
    pub fn verify(&self, jwt: &Jwt) -> Result<(), Fault> {
        let mut fault = Fault::NoSuchKey;
        for key in &self.keys {
            let other = matches!((&jwt.key_id, &key.id), (Some(wanted), Some(id)) if **wanted != **id);
            if other || key.only.is_some_and(|only| only != jwt.algorithm) {
                continue;
            }
            fault = Fault::Forged;
            if key.signed(jwt) {
                return Ok(());
            }
        }
        Err(fault)
    }
}

impl Key {
    fn read(value: serde_json::Value) -> Option<Self> {
        // What `jsonwebtoken` has no word for is asked of the document itself.
        let only = match value.get("alg").and_then(serde_json::Value::as_str) {
            None => None,
            Some(name) => Some(Algorithm::parse(name)?),
        };
        let jwk: Jwk = serde_json::from_value(value).ok()?;
        if matches!(jwk.common.public_key_use, Some(PublicKeyUse::Encryption)) {
            return None;
        }
        let known = |algorithms| Some(Material::Known(DecodingKey::from_jwk(&jwk).ok()?, algorithms));
        let material = match &jwk.algorithm {
            AlgorithmParameters::RSA(rsa) => {
                let modulus = BASE64.decode(&rsa.n).ok()?;
                let bytes = modulus.iter().skip_while(|b| **b == 0).count();
                if bytes < SMALLEST_RSA {
                    return None;
                }
                known(&[Known::RS256, Known::RS384, Known::RS512, Known::PS256, Known::PS384, Known::PS512])
            }
            AlgorithmParameters::EllipticCurve(ec) => match ec.curve {
                EllipticCurve::P256 => known(&[Known::ES256]),
                EllipticCurve::P384 => known(&[Known::ES384]),
                EllipticCurve::P521 => {
                    let mut point = vec![4];
                    for coordinate in [&ec.x, &ec.y] {
                        point.extend(BASE64.decode(coordinate).ok()?);
                    }
                    Some(Material::P521(point.into()))
                }
                _ => None,
            },
            AlgorithmParameters::OctetKeyPair(pair) if matches!(pair.curve, EllipticCurve::Ed25519) => known(&[Known::EdDSA]),
            // With a secret of nothing anybody signs.
            AlgorithmParameters::OctetKey(key) if key.value.is_empty() => None,
            AlgorithmParameters::OctetKey(_) => known(&[Known::HS256, Known::HS384, Known::HS512]),
            _ => None,
        };
        Some(Self { id: jwk.common.key_id, only, material: material? })
    }
    fn signed(&self, jwt: &Jwt) -> bool {
        match (&self.material, jwt.algorithm) {
            (Material::Known(key, kind), Algorithm::Known(algorithm)) if kind.contains(&algorithm) => {
                jsonwebtoken::crypto::verify(jwt.signature(), jwt.message(), key, algorithm).unwrap_or(false)
            }
            (Material::P521(point), Algorithm::Es512) => BASE64
                .decode(jwt.signature())
                .is_ok_and(|s| UnparsedPublicKey::new(&ECDSA_P521_SHA512_FIXED, point).verify(jwt.message(), &s).is_ok()),
            _ => false,
        }
    }
}
