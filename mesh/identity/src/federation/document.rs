//! A trust bundle as it is told (SPIFFE Trust Domain and Bundle §4): a set of JSON Web Keys.

use std::sync::Arc;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use rustls_pki_types::CertificateDer;
use serde::Deserialize;

/// The keys whose `use` is this are authorities of X.509 certificates. Others are somebody else's.
const X509: &str = "x509-svid";

/// What a document says to us.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Document {
    /// Authorities; none means that none is to be believed.
    pub roots: Vec<CertificateDer<'static>>,
    /// Which version of the bundle it is.
    pub sequence: Option<u64>,
    /// How soon it is to be fetched again.
    pub refresh: Option<Duration>,
    /// Its words.
    pub text: Arc<str>,
}

#[derive(Deserialize)]
struct Told {
    keys: Vec<Key>,
    spiffe_sequence: Option<u64>,
    spiffe_refresh_hint: Option<u64>,
}

#[derive(Deserialize)]
struct Key {
    #[serde(rename = "use")]
    purpose: Option<String>,
    #[serde(default)]
    x5c: Vec<String>,
}

impl Document {
    /// Reads it in whole or not at all.
    pub(super) fn read(text: &str) -> Result<Self, String> {
        let told: Told = serde_json::from_str(text).map_err(|error| format!("no trust bundle: {error}"))?;
        let mut roots = Vec::new();
        for key in told.keys.iter().filter(|key| key.purpose.as_deref() == Some(X509)) {
            let [only] = key.x5c.as_slice() else {
                return Err(format!("an authority with {} certificates instead of one", key.x5c.len()));
            };
            roots.push(STANDARD.decode(only).map_err(|error| format!("a certificate that cannot be read: {error}"))?.into());
        }
        let refresh = told.spiffe_refresh_hint.filter(|seconds| *seconds > 0).map(Duration::from_secs);
        Ok(Self { roots, sequence: told.spiffe_sequence, refresh, text: text.into() })
    }
}
