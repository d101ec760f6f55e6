//! Tokens of requests (JWT, RFC 7519): what one says, what is wrong with it in Envoy's words, and the claims that policies and
//! routes ask for.
//!
//! Owns reading and believing; nothing read here is true before [`KeySet::verify`] said so. The algorithm is the key's to choose,
//! never the token's. No clock, no I/O: where keys come from and what time it is, the caller says. Upstream: the waypoint's
//! `authenticate` phase, `meshctl why`. Downstream: `keys`, `places`.
#![forbid(unsafe_code)]

mod keys;
mod places;

pub use keys::KeySet;
pub use places::{behind, named, presented};

use base64::Engine as _;
use base64::alphabet::URL_SAFE;
use base64::engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig};
use http::{HeaderMap, StatusCode};
use keys::Algorithm;
use mesh_model::authz_l7::Token;
use mesh_model::explain::Believed;
use mesh_model::l7::StringMatch;
use mesh_model::l7::request_auth::TokenRule;
use mesh_model::l7::route::Claims;
use serde_json::{Map, Value};
use std::hash::{Hash as _, Hasher};
use std::sync::Arc;

/// base64url with or without padding, as Envoy reads it.
const BASE64: GeneralPurpose = GeneralPurpose::new(
    &URL_SAFE,
    GeneralPurposeConfig::new().with_encode_padding(false).with_decode_padding_mode(DecodePaddingMode::Indifferent),
);
/// How far clocks may differ, in seconds (Envoy's default).
const CLOCK_SKEW: u64 = 60;

macro_rules! faults {
    ($( $name:ident = $text:literal, )*) => {
        /// What is wrong with a token, in Envoy's words; the last two are ours.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum Fault { $( #[doc = $text] $name, )* }
        impl Fault {
            /// The body of the answer.
            pub fn text(self) -> &'static str { match self { $( Self::$name => $text, )* } }
        }
    };
}
faults! {
    Shape = "Jwt is not in the form of Header.Payload.Signature with two dots and 3 sections",
    HeaderBase64 = "Jwt header is an invalid Base64url encoded",
    HeaderJson = "Jwt header is an invalid JSON",
    NoAlgorithm = "Jwt header [alg] field is required and must be a string",
    UnknownAlgorithm = "Jwt header [alg] is not supported",
    KeyId = "Jwt header [kid] field is not a string",
    PayloadBase64 = "Jwt payload is an invalid Base64url encoded",
    PayloadJson = "Jwt payload is an invalid JSON",
    Issuer = "Jwt payload [iss] field is not a string",
    Subject = "Jwt payload [sub] field is not a string",
    IssuedAt = "Jwt payload [iat] field is not an integer",
    IssuedAtRange = "Jwt payload [iat] field is not a positive 64 bit integer",
    NotBefore = "Jwt payload [nbf] field is not an integer",
    NotBeforeRange = "Jwt payload [nbf] field is not a positive 64 bit integer",
    Expiry = "Jwt payload [exp] field is not an integer",
    ExpiryRange = "Jwt payload [exp] field is not a positive 64 bit integer",
    Id = "Jwt payload [jti] field is not a string",
    Audience = "Jwt payload [aud] field is not a string or string list",
    SignatureBase64 = "Jwt signature is an invalid Base64url encoded",
    UnknownIssuer = "Jwt issuer is not configured",
    NotYetValid = "Jwt not yet valid",
    Expired = "Jwt is expired",
    WrongAudience = "Audiences in Jwt are not allowed",
    NoKeys = "Jwks remote fetch is failed",
    NoSuchKey = "Jwks doesn't have key to match kid or alg from Jwt",
    Forged = "Jwt verification fails",
    Several = "Jwt is not the only one in the request",
    Critical = "Jwt header [crit] is not supported",
}
impl Fault {
    /// The status of the answer.
    pub fn status(self) -> StatusCode {
        if self == Self::WrongAudience { StatusCode::FORBIDDEN } else { StatusCode::UNAUTHORIZED }
    }
}

/// A token that was read, and not yet believed.
#[derive(Debug)]
pub struct Jwt {
    text: Box<str>,
    /// Where the payload and the signature begin in `text`.
    payload: usize,
    signature: usize,
    algorithm: Algorithm,
    key_id: Option<Box<str>>,
    not_before: Option<u64>,
    expires: Option<u64>,
    claims: Map<String, Value>,
}
impl Jwt {
    /// Reads a token.
    ///
    /// # Errors
    /// It is none.
    pub fn parse(text: &str) -> Result<Self, Fault> {
        let (header, rest) = text.split_once('.').ok_or(Fault::Shape)?;
        let (payload, signature) = rest.split_once('.').ok_or(Fault::Shape)?;
        if header.is_empty() || payload.is_empty() || signature.is_empty() || signature.contains('.') {
            return Err(Fault::Shape);
        }
        let json = |part: &str, base64: Fault, json: Fault| -> Result<Map<String, Value>, Fault> {
            serde_json::from_slice(&BASE64.decode(part).map_err(|_| base64)?).map_err(|_| json)
        };
        let head = json(header, Fault::HeaderBase64, Fault::HeaderJson)?;
        let name = head.get("alg").and_then(Value::as_str).ok_or(Fault::NoAlgorithm)?;
        let algorithm = Algorithm::parse(name).ok_or(Fault::UnknownAlgorithm)?;
        let key_id = optional_text(&head, "kid", Fault::KeyId)?.map(Into::into);
        // RFC 7515 §4.1.11: who does not know an extension that is critical may not accept the token. Envoy ignores it.
        if head.contains_key("crit") {
            return Err(Fault::Critical);
        }
        let claims = json(payload, Fault::PayloadBase64, Fault::PayloadJson)?;
        optional_text(&claims, "iss", Fault::Issuer)?;
        optional_text(&claims, "sub", Fault::Subject)?;
        seconds(&claims, "iat", [Fault::IssuedAt, Fault::IssuedAtRange])?;
        let not_before = seconds(&claims, "nbf", [Fault::NotBefore, Fault::NotBeforeRange])?;
        let expires = seconds(&claims, "exp", [Fault::Expiry, Fault::ExpiryRange])?;
        optional_text(&claims, "jti", Fault::Id)?;
        match claims.get("aud") {
            None | Some(Value::String(_)) => {}
            Some(Value::Array(all)) if all.iter().all(Value::is_string) => {}
            Some(_) => return Err(Fault::Audience),
        }
        if BASE64.decode(signature).is_err() {
            return Err(Fault::SignatureBase64);
        }
        let at = |part: &str| text.len() - part.len();
        let (payload, signature) = (at(rest), at(signature));
        Ok(Self { text: text.into(), payload, signature, algorithm, key_id, not_before, expires, claims })
    }
    /// Whether it says which key signed it.
    pub fn names_key(&self) -> bool {
        self.key_id.is_some()
    }
    /// Whether now, in seconds since 1970, is within its time.
    ///
    /// # Errors
    /// It is not.
    pub fn check_time(&self, now: u64) -> Result<(), Fault> {
        if self.not_before.is_some_and(|nbf| now.saturating_add(CLOCK_SKEW) < nbf) {
            return Err(Fault::NotYetValid);
        }
        if self.expires.is_some_and(|exp| now > exp.saturating_add(CLOCK_SKEW)) {
            return Err(Fault::Expired);
        }
        Ok(())
    }
    /// What is signed.
    fn message(&self) -> &[u8] {
        self.text.as_bytes().get(..self.signature - 1).unwrap_or_default()
    }
    /// The signature, base64url.
    fn signature(&self) -> &str {
        self.text.get(self.signature..).unwrap_or_default()
    }
    /// The payload, base64url.
    pub fn payload(&self) -> &str {
        self.text.get(self.payload..self.signature - 1).unwrap_or_default()
    }
    /// As it was presented.
    pub fn text(&self) -> &str {
        &self.text
    }
    /// `iss`.
    pub fn issuer(&self) -> &str {
        self.text_of("iss")
    }
    /// `aud`.
    pub fn audiences(&self) -> impl Iterator<Item = &str> {
        let (one, many) = match self.claims.get("aud") {
            Some(Value::String(one)) => (Some(one.as_str()), &[][..]),
            Some(Value::Array(many)) => (None, many.as_slice()),
            _ => (None, &[][..]),
        };
        one.into_iter().chain(many.iter().filter_map(Value::as_str))
    }
    fn text_of(&self, claim: &str) -> &str {
        self.claims.get(claim).and_then(Value::as_str).unwrap_or_default()
    }
    fn claim(&self, path: &[Arc<str>]) -> Option<&Value> {
        let (first, rest) = path.split_first()?;
        rest.iter().try_fold(self.claims.get(&**first)?, |value, name| value.as_object()?.get(&**name))
    }
    /// A claim as a header has it: text, numbers and booleans as they are, lists and objects as base64url of their JSON; none of
    /// an empty text.
    pub fn claim_text(&self, path: &[Arc<str>]) -> Option<String> {
        match self.claim(path)? {
            Value::Null => None,
            Value::String(text) => Some(text.clone()).filter(|text| !text.is_empty()),
            value @ (Value::Bool(_) | Value::Number(_)) => Some(value.to_string()),
            value => Some(BASE64.encode(value.to_string())),
        }
    }
}
fn optional_text<'m>(map: &'m Map<String, Value>, name: &str, fault: Fault) -> Result<Option<&'m str>, Fault> {
    map.get(name).map(|v| v.as_str().ok_or(fault)).transpose()
}
/// A NumericDate: seconds, a fraction is cut off. Faults: it is no number, or not one of this time.
fn seconds(claims: &Map<String, Value>, name: &str, [kind, range]: [Fault; 2]) -> Result<Option<u64>, Fault> {
    let read = |v: &Value| match (v.as_u64(), v.as_f64()) {
        (Some(whole), _) => Ok(whole),
        // 2^64: no number of 64 bits is as large.
        (None, Some(number)) if (0.0..18_446_744_073_709_551_616.0).contains(&number) => Ok(number as u64),
        (None, Some(_)) => Err(range),
        (None, None) => Err(kind),
    };
    claims.get(name).map(read).transpose()
}

/// A token that was verified, by the rule that let it pass.
#[derive(Clone, Debug)]
pub struct Verified {
    /// The token.
    pub jwt: Arc<Jwt>,
    /// The rule.
    pub rule: Arc<TokenRule>,
}
impl Claims for Verified {
    fn matches(&self, path: &[Arc<str>], what: &StringMatch) -> bool {
        // Any value is not the empty one (Istio asks for `.+`).
        let holds = |text: &str| if *what == StringMatch::Present { !text.is_empty() } else { what.matches(text) };
        match self.jwt.claim(path) {
            Some(Value::String(text)) => {
                let is_list = |name: &Arc<str>| self.rule.space_delimited.contains(name);
                if let [name] = path
                    && is_list(name)
                {
                    return text.split(' ').filter(|t| !t.is_empty()).any(holds);
                }
                holds(text)
            }
            Some(Value::Array(list)) => list.iter().filter_map(Value::as_str).any(holds),
            _ => false,
        }
    }
    fn hash_claim(&self, path: &[Arc<str>], mut hasher: &mut dyn Hasher) {
        self.jwt.issuer().hash(&mut hasher);
        self.jwt.claim(path).hash(&mut hasher);
    }
}
impl Token for Verified {
    fn issuer(&self) -> &str {
        self.jwt.issuer()
    }
    fn subject(&self) -> &str {
        self.jwt.text_of("sub")
    }
}

/// What the keys of a rule say of a token; `U`: what may know better later.
#[derive(Debug)]
pub enum Signed<U> {
    /// One of them signed it.
    Yes,
    /// None of them did.
    No(Fault),
    /// These do not know.
    Unknown(Fault, U),
}
/// What came of believing a token.
#[derive(Debug)]
pub enum Belief<U> {
    /// It is true.
    Verified(Verified),
    /// It is not.
    Refused(Fault),
    /// It is not by the keys there are; newer ones may know better.
    Unknown(Fault, U),
}
/// Whether one of the rules believes the token of a request: its issuer, its place, its time (`now`, in seconds since 1970), its
/// audience, and then what `signed` says of its keys.
pub fn believe<'r, U>(
    jwt: &Arc<Jwt>,
    (headers, query): (&HeaderMap, &str),
    rules: impl Iterator<Item = &'r Arc<TokenRule>>,
    now: u64,
    mut signed: impl FnMut(&'r Arc<TokenRule>) -> Signed<U>,
) -> Belief<U> {
    let mut belief = Belief::Refused(Fault::UnknownIssuer);
    for rule in rules.filter(|rule| *rule.issuer == *jwt.issuer() && places::looks_there(rule, headers, query)) {
        let fault = match jwt.check_time(now) {
            Err(fault) => fault,
            Ok(()) if !rule.accepts_audience(jwt.audiences()) => Fault::WrongAudience,
            Ok(()) => match signed(rule) {
                Signed::Yes => return Belief::Verified(Verified { jwt: Arc::clone(jwt), rule: Arc::clone(rule) }),
                Signed::No(fault) => fault,
                Signed::Unknown(fault, later) => {
                    belief = Belief::Unknown(fault, later);
                    continue;
                }
            },
        };
        if !matches!(belief, Belief::Unknown(..)) {
            belief = Belief::Refused(fault);
        }
    }
    belief
}

/// What becomes of the token of a request that somebody only asks about, by the keys at hand.
pub fn suppose(
    headers: &HeaderMap,
    query: &str,
    rules: &[&Arc<TokenRule>],
    now: u64,
    signed: impl Fn(&TokenRule, &Jwt) -> Result<(), Fault>,
) -> Believed {
    let look = || -> Result<Option<Verified>, Fault> {
        let Some(text) = presented(headers, query, rules.iter().copied())? else { return Ok(None) };
        let jwt = Arc::new(Jwt::parse(text)?);
        let signed = |rule: &Arc<TokenRule>| match signed(rule, &jwt) {
            Ok(()) => Signed::Yes,
            Err(fault) => Signed::<()>::No(fault),
        };
        match believe(&jwt, (headers, query), rules.iter().copied(), now, signed) {
            Belief::Verified(verified) => Ok(Some(verified)),
            Belief::Refused(fault) | Belief::Unknown(fault, ()) => Err(fault),
        }
    };
    match look() {
        Ok(None) => Believed::Absent,
        Ok(Some(verified)) => Believed::True(Box::new(verified)),
        Err(fault) => Believed::False { status: fault.status().as_u16(), text: fault.text() },
    }
}

#[cfg(test)]
mod tests;
