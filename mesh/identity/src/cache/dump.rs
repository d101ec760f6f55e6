//! The cache as the configuration dump shows it (node-agent §1.14): what `istioctl ztunnel-config certificate` reads.

use std::time::SystemTime;

use serde::Serialize;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use x509_parser::prelude::{FromDer, X509Certificate};

use super::SvidCache;
use crate::clock::date;
use crate::pem;

/// One identity.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct IdentityDump {
    /// The SPIFFE id.
    pub identity: String,
    /// `Available`, `Initializing`, or `Unavailable: ` and why.
    pub state: String,
    /// Leaf first; empty unless available.
    pub cert_chain: Vec<CertificateDump>,
    /// The roots that vouch for our trust domain.
    pub root_certs: Vec<CertificateDump>,
}

/// One certificate.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct CertificateDump {
    /// The PEM text, base64 once more.
    pub pem: String,
    /// Decimal.
    pub serial_number: String,
    /// RFC 3339.
    pub valid_from: String,
    /// RFC 3339.
    pub expiration_time: String,
}

impl CertificateDump {
    fn of(der: &[u8]) -> Self {
        let mut dump = Self {
            pem: pem::base64(pem::certificate(der).as_bytes()),
            serial_number: String::new(),
            valid_from: String::new(),
            expiration_time: String::new(),
        };
        // Unreadable ones cannot get here except as a root; then the text alone must do.
        if let Ok((_, certificate)) = X509Certificate::from_der(der) {
            dump.serial_number = certificate.tbs_certificate.serial.to_string();
            dump.valid_from = rfc3339(date(certificate.validity().not_before.timestamp()));
            dump.expiration_time = rfc3339(date(certificate.validity().not_after.timestamp()));
        }
        dump
    }
}

fn rfc3339(date: SystemTime) -> String {
    OffsetDateTime::from(date).format(&Rfc3339).unwrap_or_default()
}

impl SvidCache {
    /// Every identity of the cache, in order of its id. For the admin page: costs encoding, not for the data path.
    pub fn dump(&self) -> Vec<IdentityDump> {
        let mut entries: Vec<_> = self.shared.entries.read().values().cloned().collect();
        entries.sort_by(|a, b| a.id.cmp(&b.id));
        let bundles = self.shared.tls.bundles();
        let bundles = std::sync::Arc::clone(&bundles.borrow());
        let dump_all = |ders: &[rustls_pki_types::CertificateDer<'_>]| ders.iter().map(|der| CertificateDump::of(der)).collect();
        entries
            .iter()
            .map(|entry| {
                let svid = entry.load(&self.shared.tls);
                let state = match (&svid, &*entry.failure.lock()) {
                    (Some(_), _) => "Available".to_owned(),
                    (None, Some(error)) => format!("Unavailable: {error}"),
                    (None, None) => "Initializing".to_owned(),
                };
                IdentityDump {
                    identity: entry.id.to_string(),
                    state,
                    cert_chain: svid.map_or_else(Vec::new, |svid| dump_all(&svid.chain)),
                    root_certs: bundles.find(entry.id.trust_domain()).map_or_else(Vec::new, |bundle| dump_all(bundle.roots())),
                }
            })
            .collect()
    }
}
