//! RequestAuthentication: which tokens are believed, compiled (spec/waypoint §3.5). Verification is the waypoint's.
//!
//! A request without a token passes and has no principal: refusing it is a policy's business. One that could not be
//! understood is a value that refuses what it is bound to. Upstream: `mesh-sources`. Downstream: the waypoint's `authenticate`
//! phase, which reads keys and clocks.
use crate::origin::Origin;
use crate::policy::PolicyKey;
use http::header::HeaderName;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::Arc;
use std::time::Duration;

/// One RequestAuthentication.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RequestAuth {
    /// Key.
    pub key: PolicyKey,
    /// What it says, or why it cannot be used.
    pub body: AuthBody,
    /// Where the object came from.
    pub origin: Option<Arc<Origin>>,
}
/// The content; unusable content is a value that refuses.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum AuthBody {
    /// Usable.
    Rules(Box<[Arc<TokenRule>]>),
    /// Could not be understood: everything it binds is refused, with this text.
    Unusable {
        /// What was wrong, for the operator.
        why: Arc<str>,
    },
}

/// Which header gets which claim, by its path.
pub type ClaimsTo = Box<[(HeaderName, Box<[Arc<str>]>)]>;

/// One issuer whose tokens are believed (`jwtRules[]`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TokenRule {
    /// `iss`, compared whole.
    pub issuer: Arc<str>,
    /// Any of these must be in `aud`; empty: any audience.
    pub audiences: Box<[Arc<str>]>,
    /// Its keys.
    pub keys: KeySource,
    /// Where its tokens are looked for.
    pub places: Box<[TokenPlace]>,
    /// `outputPayloadToHeader`: the payload, base64url.
    pub payload_to: Option<HeaderName>,
    /// `outputClaimToHeaders`: a claim by its path.
    pub claims_to: ClaimsTo,
    /// `forwardOriginalToken`: the token stays in the request.
    pub forward: bool,
    /// Claims whose text is a list separated by spaces, `scope` and `permission` among them.
    pub space_delimited: Box<[Arc<str>]>,
}
impl TokenRule {
    /// Whether tokens of these audiences are meant for us. A `/` at the end makes no difference (as Envoy has it).
    pub fn accepts_audience<'a>(&self, mut audiences: impl Iterator<Item = &'a str>) -> bool {
        fn bare(audience: &str) -> &str {
            audience.strip_suffix('/').unwrap_or(audience)
        }
        self.audiences.is_empty() || audiences.any(|of_token| self.audiences.iter().any(|ours| bare(ours) == bare(of_token)))
    }
    /// Headers only we may set: what a client sends under these names is removed.
    pub fn outputs(&self) -> impl Iterator<Item = &HeaderName> {
        self.payload_to.iter().chain(self.claims_to.iter().map(|(name, _)| name))
    }
}
/// Where keys come from.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum KeySource {
    /// `jwks`: written there.
    Inline(Jwks),
    /// `jwksUri`: fetched.
    Remote {
        /// `http` or `https`.
        uri: Arc<str>,
        /// Limit of one fetch.
        timeout: Duration,
    },
    /// Neither: the issuer's own metadata names the place (OpenID Connect discovery).
    Discovered {
        /// The issuer, a URL.
        issuer: Arc<str>,
        /// Limit of each of the two fetches.
        timeout: Duration,
    },
}
/// Keys written in a policy. What looks them up goes by a number made of the text when the policy was read: no request reads
/// all of it.
#[derive(Clone, Debug)]
pub struct Jwks {
    text: Arc<str>,
    digest: u64,
}
impl Jwks {
    /// Of a JWKS.
    pub fn new(text: &str) -> Self {
        let mut hasher = DefaultHasher::new();
        text.hash(&mut hasher);
        Self { text: text.into(), digest: hasher.finish() }
    }
    /// The JWKS.
    pub fn text(&self) -> &str {
        &self.text
    }
}
impl PartialEq for Jwks {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.text, &other.text) || (self.digest == other.digest && self.text == other.text)
    }
}
impl Eq for Jwks {}
impl Hash for Jwks {
    fn hash<H: Hasher>(&self, state: &mut H) {
        state.write_u64(self.digest);
    }
}
/// Where a token may be.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum TokenPlace {
    /// A header, behind a prefix.
    Header(HeaderName, Arc<str>),
    /// A query parameter.
    Param(Arc<str>),
    /// A cookie.
    Cookie(Arc<str>),
}
impl TokenPlace {
    /// Where tokens are looked for when no place is named: `Authorization: Bearer` and `access_token`.
    pub fn usual() -> Box<[Self]> {
        let bearer = Self::Header(http::header::AUTHORIZATION, "Bearer ".into());
        Box::new([bearer, Self::Param("access_token".into())])
    }
}

/// All RequestAuthentications of one target, by key.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RequestAuths(Box<[Arc<RequestAuth>]>);
impl RequestAuths {
    /// Those of a target, in any order.
    pub fn new(mut all: Vec<Arc<RequestAuth>>) -> Self {
        all.sort_by(|a, b| a.key.cmp(&b.key));
        Self(all.into())
    }
    /// All of them, by key.
    pub fn iter(&self) -> impl Iterator<Item = &Arc<RequestAuth>> {
        self.0.iter()
    }
    /// The rules of those that can be used.
    pub fn rules(&self) -> impl Iterator<Item = &Arc<TokenRule>> + Clone {
        self.0.iter().flat_map(|a| match &a.body {
            AuthBody::Rules(rules) => &rules[..],
            AuthBody::Unusable { .. } => &[],
        })
    }
    /// The first that cannot be used, and why.
    pub fn unusable(&self) -> Option<(&PolicyKey, &str)> {
        self.0.iter().find_map(|a| match &a.body {
            AuthBody::Unusable { why } => Some((&a.key, &**why)),
            AuthBody::Rules(_) => None,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rule(audiences: &[&str]) -> TokenRule {
        TokenRule {
            issuer: "https://issuer".into(),
            audiences: audiences.iter().map(|a| (*a).into()).collect(),
            keys: KeySource::Inline(Jwks::new("{}")),
            places: TokenPlace::usual(),
            payload_to: Some(HeaderName::from_static("x-payload")),
            claims_to: Box::new([(HeaderName::from_static("x-role"), Box::new(["role".into()]))]),
            forward: false,
            space_delimited: Box::default(),
        }
    }
    #[test]
    fn an_audience_is_one_of_ours_but_for_a_slash() {
        let check = |ours: &[&str], theirs: &[&str]| rule(ours).accepts_audience(theirs.iter().copied());
        assert!(check(&[], &[]) && check(&[], &["x"]));
        assert!(check(&["a", "b"], &["c", "b"]));
        assert!(check(&["https://api"], &["https://api/"]) && check(&["https://api/"], &["https://api"]));
        assert!(!check(&["a"], &[]) && !check(&["a"], &["A"]) && !check(&["a"], &["ab"]) && !check(&["a/"], &["a//"]));
    }
    #[test]
    fn written_keys_are_known_by_their_text() {
        let hash = |keys: &Jwks| {
            let mut hasher = DefaultHasher::new();
            keys.hash(&mut hasher);
            hasher.finish()
        };
        let (one, same, other) = (Jwks::new("{1}"), Jwks::new("{1}"), Jwks::new("{2}"));
        assert!(one == same && one == one.clone() && hash(&one) == hash(&same));
        assert!(one != other && hash(&one) != hash(&other));
        // Two texts of one number are still two.
        assert_ne!(Jwks { digest: one.digest, ..other }, one);
    }
    #[test]
    fn of_several_the_first_unusable_one_speaks() {
        let key = |name| PolicyKey::new("ns", name);
        let usable = RequestAuth { key: key("a"), body: AuthBody::Rules(Box::new([Arc::new(rule(&[]))])), origin: None };
        let broken = RequestAuth { key: key("b"), body: AuthBody::Unusable { why: "typo".into() }, origin: None };
        let both = RequestAuths::new(vec![Arc::new(broken), Arc::new(usable.clone())]);
        assert_eq!(both.unusable(), Some((&key("b"), "typo")));
        assert_eq!(both.rules().count(), 1);
        assert_eq!(both.rules().flat_map(|r| r.outputs()).map(HeaderName::as_str).collect::<Vec<_>>(), ["x-payload", "x-role"]);
        assert_eq!(RequestAuths::new(vec![Arc::new(usable)]).unusable(), None);
    }
}
