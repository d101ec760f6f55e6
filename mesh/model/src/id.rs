//! SPIFFE identities and trust domains. Parsing is strict: what is not exactly an Istio-shaped SPIFFE id is refused.
use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

/// The trust domain of a SPIFFE id, e.g. `cluster.local`. Lower case letters, digits, `.`, `-`, `_` (SPIFFE-ID §2.1).
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TrustDomain(Arc<str>);

impl TrustDomain {
    /// Parses a trust domain name (no scheme, no path, 1 to 255 bytes).
    pub fn parse(s: &str) -> Result<Self, IdError> {
        if s.is_empty() {
            return Err(IdError::Empty("trust domain"));
        }
        if s.len() > 255 {
            return Err(IdError::TooLong);
        }
        match s.bytes().find(|b| !matches!(b, b'a'..=b'z' | b'0'..=b'9' | b'.' | b'-' | b'_')) {
            Some(b) => Err(IdError::BadByte { segment: "trust domain", byte: b }),
            None => Ok(Self(s.into())),
        }
    }
    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}
impl Default for TrustDomain {
    /// Istio's default, `cluster.local`.
    fn default() -> Self {
        Self("cluster.local".into())
    }
}
impl fmt::Display for TrustDomain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// `spiffe://<trust domain>/ns/<namespace>/sa/<service account>`: the only shape Istio gives to workloads.
///
/// Stored as one string so that comparing, hashing and printing cost no assembly; clones share it.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SpiffeId {
    /// The whole URI, `spiffe://` included.
    uri: Arc<str>,
    /// Byte offsets into `uri`: end of the trust domain, start and end of the namespace, start of the service account.
    td_end: u16,
    ns_end: u16,
}

const SCHEME: &str = "spiffe://";

impl SpiffeId {
    /// Builds an id from its three parts; each part is validated.
    pub fn new(td: &TrustDomain, namespace: &str, service_account: &str) -> Result<Self, IdError> {
        segment("namespace", namespace)?;
        segment("service account", service_account)?;
        let td_end = SCHEME.len() + td.as_str().len();
        let ns_end = td_end + "/ns/".len() + namespace.len();
        let uri = format!("{SCHEME}{td}/ns/{namespace}/sa/{service_account}");
        if uri.len() > 2048 {
            return Err(IdError::TooLong);
        }
        Ok(Self { uri: uri.into(), td_end: td_end as u16, ns_end: ns_end as u16 })
    }
    /// The whole URI.
    pub fn as_str(&self) -> &str {
        &self.uri
    }
    /// The URI without `spiffe://`: the form principals in policies are written in.
    pub fn principal(&self) -> &str {
        self.uri.get(SCHEME.len()..).unwrap_or_default()
    }
    /// The trust domain's name.
    pub fn trust_domain(&self) -> &str {
        self.uri.get(SCHEME.len()..usize::from(self.td_end)).unwrap_or_default()
    }
    /// The namespace segment.
    pub fn namespace(&self) -> &str {
        self.uri.get(usize::from(self.td_end) + 4..usize::from(self.ns_end)).unwrap_or_default()
    }
    /// The service account segment.
    pub fn service_account(&self) -> &str {
        self.uri.get(usize::from(self.ns_end) + 4..).unwrap_or_default()
    }
}
impl FromStr for SpiffeId {
    type Err = IdError;
    /// Strict: exactly the five-segment Istio form, no query, no fragment, no empty or dot segment.
    fn from_str(s: &str) -> Result<Self, IdError> {
        if s.len() > 2048 {
            return Err(IdError::TooLong);
        }
        let rest = s.strip_prefix(SCHEME).ok_or(IdError::Scheme)?;
        let mut it = rest.split('/');
        let td = it.next().unwrap_or_default();
        match (it.next(), it.next(), it.next(), it.next(), it.next()) {
            (Some("ns"), Some(ns), Some("sa"), Some(sa), None) => Self::new(&TrustDomain::parse(td)?, ns, sa),
            _ => Err(IdError::Shape),
        }
    }
}
impl fmt::Display for SpiffeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.uri)
    }
}
impl fmt::Debug for SpiffeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.uri)
    }
}

fn segment(what: &'static str, s: &str) -> Result<(), IdError> {
    if s.is_empty() {
        return Err(IdError::Empty(what));
    }
    if s == "." || s == ".." {
        return Err(IdError::Dots(what));
    }
    match s.bytes().find(|b| !matches!(b, b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'.' | b'-' | b'_')) {
        Some(byte) => Err(IdError::BadByte { segment: what, byte }),
        None => Ok(()),
    }
}

/// Why a text is not a SPIFFE id.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum IdError {
    /// Does not start with `spiffe://`.
    #[error("a SPIFFE id starts with spiffe://")]
    Scheme,
    /// Not `td/ns/NS/sa/SA`.
    #[error("expected spiffe://<trust domain>/ns/<namespace>/sa/<service account>")]
    Shape,
    /// A part is empty.
    #[error("the {0} is empty")]
    Empty(&'static str),
    /// `.` or `..` as a segment.
    #[error("the {0} is a dot segment")]
    Dots(&'static str),
    /// Over 2048 bytes, or a trust domain over 255.
    #[error("longer than SPIFFE allows")]
    TooLong,
    /// A byte SPIFFE does not allow there.
    #[error("byte {byte:#04x} is not allowed in the {segment}")]
    BadByte {
        /// Which part.
        segment: &'static str,
        /// The byte.
        byte: u8,
    },
}
