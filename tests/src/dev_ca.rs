//! Certificates for foreign peers: signed with the key of the development authority that the agents share, or with the key
//! of an authority nobody trusts. Owns only test credentials. Downstream: `ca.pem` (key and certificate) in the agents'
//! `--ca-dir`.
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, ensure};
use rcgen::{
    BasicConstraints, CertificateParams, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose, PKCS_ECDSA_P256_SHA256,
    SanType,
};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};

/// Something that signs.
#[derive(Debug)]
pub struct TestCa {
    issuer: Issuer<'static, KeyPair>,
    root_pem: String,
}

/// A certificate, its key and its root, as PEM.
#[derive(Clone, Debug)]
pub struct Credentials {
    /// Leaf.
    pub cert: String,
    /// Key of the leaf.
    pub key: String,
    /// Root of the authority which signed it.
    pub root: String,
}

/// The PEM blocks of `text` with this label.
fn blocks(text: &str, label: &str) -> Vec<String> {
    let (begin, end) = (format!("-----BEGIN {label}-----"), format!("-----END {label}-----"));
    text.split(begin.as_str())
        .skip(1)
        .filter_map(|rest| rest.split_once(end.as_str()))
        .map(|(body, _)| format!("{begin}{body}{end}\n"))
        .collect()
}

impl TestCa {
    /// The development authority in an agent's `--ca-dir`.
    pub fn of_dir(dir: &Path) -> anyhow::Result<Self> {
        let path = dir.join("ca.pem");
        let text = fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))?;
        let keys = blocks(&text, "PRIVATE KEY");
        let certs = blocks(&text, "CERTIFICATE");
        ensure!(keys.len() == 1 && certs.len() == 1, "{} does not hold one key and one certificate", path.display());
        let key = KeyPair::from_pem(&keys[0]).context("the authority's key")?;
        let issuer = Issuer::from_ca_cert_pem(&certs[0], key).context("the authority's certificate")?;
        Ok(Self { issuer, root_pem: certs[0].clone() })
    }

    /// A new authority that no agent trusts.
    pub fn unknown() -> anyhow::Result<Self> {
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let root_pem = params.self_signed(&key)?.pem();
        Ok(Self { issuer: Issuer::new(params, key), root_pem })
    }

    /// A certificate whose only name is this SPIFFE id.
    pub fn issue(&self, spiffe: &str) -> anyhow::Result<Credentials> {
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
        let mut params = CertificateParams::default();
        params.subject_alt_names = vec![SanType::URI(spiffe.try_into()?)];
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth, ExtendedKeyUsagePurpose::ServerAuth];
        params.not_before = rcgen::date_time_ymd(2024, 1, 1);
        params.not_after = rcgen::date_time_ymd(2035, 1, 1);
        let cert = params.signed_by(&key, &self.issuer)?;
        Ok(Credentials { cert: cert.pem(), key: key.serialize_pem(), root: self.root_pem.clone() })
    }
}

impl Credentials {
    /// Writes `<name>.crt`, `<name>.key` and `<name>.root` for programs that take files.
    pub fn write(&self, dir: &Path, name: &str) -> anyhow::Result<[PathBuf; 3]> {
        let paths = ["crt", "key", "root"].map(|suffix| dir.join(format!("{name}.{suffix}")));
        for (path, text) in paths.iter().zip([&self.cert, &self.key, &self.root]) {
            fs::write(path, text)?;
        }
        Ok(paths)
    }

    /// For rustls.
    pub fn der(&self) -> anyhow::Result<(CertificateDer<'static>, PrivateKeyDer<'static>)> {
        Ok((CertificateDer::from_pem_slice(self.cert.as_bytes())?, PrivateKeyDer::from_pem_slice(self.key.as_bytes())?))
    }
}
