//! Revocation lists of authorities that tests play.
use std::time::{Duration, SystemTime};

use rcgen::{
    CertificateRevocationList, CertificateRevocationListParams, Issuer, KeyIdMethod, KeyPair, RevokedCertParams, SerialNumber,
};

/// The list of what has these numbers, which counts for an hour.
///
/// # Errors
/// It cannot be signed.
pub(crate) fn list(
    serials: impl IntoIterator<Item = u64>,
    authority: &Issuer<'_, KeyPair>,
) -> Result<CertificateRevocationList, rcgen::Error> {
    let now = SystemTime::now();
    let revoked = serials.into_iter().map(|serial| RevokedCertParams {
        serial_number: SerialNumber::from(serial),
        revocation_time: now.into(),
        reason_code: None,
        invalidity_date: None,
    });
    let params = CertificateRevocationListParams {
        this_update: (now - Duration::from_mins(1)).into(),
        next_update: (now + Duration::from_hours(1)).into(),
        crl_number: SerialNumber::from(1),
        issuing_distribution_point: None,
        revoked_certs: revoked.collect(),
        key_identifier_method: KeyIdMethod::Sha256,
    };
    params.signed_by(authority)
}
