//! The built-in development authority: a root in a directory, leaves on demand. For laptops, tests and demonstrations.
//!
//! Owns one file, `ca.pem` (key and certificate together, mode 0600), and a public copy of the certificate, `root-cert.pem`.
//! Several processes may share the directory: the file is written aside and linked into place, so exactly one root wins and
//! nobody ever sees half of it. Refuses a key others can read, a directory others can write, a root of another trust domain,
//! and anything it cannot read — it never replaces an existing root.
//!
//! It issues any identity of its trust domain to whoever holds the directory: that is what makes it a *development* authority.
//! Signing runs on aws-lc (through rcgen) whichever crypto library carries the handshakes.

use std::fmt;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use mesh_model::{SpiffeId, TrustDomain};
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, PKCS_ECDSA_P256_SHA256, PublicKeyData, SanType,
};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use serde::{Deserialize, Serialize};
use time::OffsetDateTime;
use tokio::sync::watch;
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::{FromDer, X509Certificate};

use crate::bundle::TrustBundles;
use crate::clock::{Clock, date};
use crate::error::IdentityError;
use crate::source::{BoxFuture, IdentitySource, IssuedSvid};

/// Key and certificate of the root.
const CA_FILE: &str = "ca.pem";
/// The certificate alone, for other tools.
const PUBLIC_FILE: &str = "root-cert.pem";
/// Larger files are not ours.
const MOST_BYTES: u64 = 64 * 1024;
/// Certificates start this much in the past: clocks of two machines differ.
const BACKDATE: Duration = Duration::from_mins(1);
const ROOT_LIFETIME: Duration = Duration::from_hours(10 * 365 * 24);

/// Settings of the development authority.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
pub struct LocalCaSettings {
    /// Where the root is kept; created with mode 0700.
    pub directory: PathBuf,
    /// The trust domain it issues for.
    pub trust_domain: String,
    /// Other names of the trust domain, accepted from peers and issued.
    pub trust_domain_aliases: Vec<String>,
    /// How long a workload's certificate is valid; at least a minute.
    #[serde(with = "crate::span")]
    pub lifetime: Duration,
}

impl Default for LocalCaSettings {
    fn default() -> Self {
        Self {
            directory: "./var/culvert-ca".into(),
            trust_domain: TrustDomain::default().as_str().to_owned(),
            trust_domain_aliases: Vec::new(),
            lifetime: Duration::from_hours(1),
        }
    }
}

/// The development authority.
pub struct LocalCa {
    issuer: Issuer<'static, KeyPair>,
    root_not_after: SystemTime,
    lifetime: Duration,
    clock: Arc<dyn Clock>,
    bundles: watch::Sender<Arc<TrustBundles>>,
}

impl LocalCa {
    /// Opens the authority in `settings.directory`, creating it when there is none. Blocks on file I/O.
    ///
    /// # Errors
    /// [`IdentityError::Storage`] naming the file, what is wrong with it and what to do.
    pub fn open(settings: &LocalCaSettings, clock: Arc<dyn Clock>) -> Result<Self, IdentityError> {
        let directory = settings.directory.as_path();
        let domain = |name: &str| {
            TrustDomain::parse(name)
                .map_err(|error| storage(directory, format!("trust domain {name:?} of the settings: {error}")))
        };
        let trust_domain = domain(&settings.trust_domain)?;
        if settings.lifetime < Duration::from_mins(1) {
            return Err(storage(directory, "a certificate lifetime below one minute only produces load"));
        }
        prepare_directory(directory)?;
        let path = directory.join(CA_FILE);
        let text = if let Some(text) = read_private(&path)? {
            text
        } else {
            let text = generate_root(&trust_domain, clock.now()).map_err(|error| storage(&path, error.to_string()))?;
            if create_whole(&path, &text).map_err(|error| storage(&path, error.to_string()))? {
                tracing::info!(path = %path.display(), %trust_domain, "created a development certificate authority");
                text
            } else {
                // Another process was faster: its root is the root.
                read_private(&path)?.ok_or_else(|| storage(&path, "it appeared and vanished again"))?
            }
        };
        let root = Root::read(&text, &trust_domain, clock.now()).map_err(|why| storage(&path, why))?;
        publish_certificate(directory, &root.der).map_err(|error| storage(&directory.join(PUBLIC_FILE), error.to_string()))?;

        let mut bundles = TrustBundles::new(trust_domain, vec![root.der])?;
        for alias in &settings.trust_domain_aliases {
            bundles = bundles.with_alias(domain(alias)?);
        }
        Ok(Self {
            issuer: root.issuer,
            root_not_after: root.not_after,
            lifetime: settings.lifetime,
            clock,
            bundles: watch::Sender::new(Arc::new(bundles)),
        })
    }

    /// Adds roots of a foreign trust domain (federation by hand).
    pub fn federate(&self, domain: TrustDomain, roots: Vec<CertificateDer<'static>>) -> Result<(), IdentityError> {
        let bundles = TrustBundles::clone(&self.bundles.borrow()).with_domain(domain, roots)?;
        self.bundles.send_replace(Arc::new(bundles));
        Ok(())
    }

    fn sign(&self, id: &SpiffeId) -> Result<IssuedSvid, IdentityError> {
        {
            let bundles = self.bundles.borrow();
            let ours = std::iter::once(bundles.ours()).chain(bundles.aliases());
            if !ours.into_iter().any(|domain| domain.as_str() == id.trust_domain()) {
                let why = format!("the development authority issues for trust domain {}", bundles.ours());
                return Err(IdentityError::Refused { id: id.to_string(), why });
            }
        }
        let now = self.clock.now();
        let not_after = (now + self.lifetime).min(self.root_not_after);
        self.try_sign(id, now - BACKDATE, not_after)
            .map_err(|error| IdentityError::Unusable { id: id.to_string(), why: error.to_string() })
    }

    fn try_sign(&self, id: &SpiffeId, not_before: SystemTime, not_after: SystemTime) -> Result<IssuedSvid, rcgen::Error> {
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.not_before = OffsetDateTime::from(not_before);
        params.not_after = OffsetDateTime::from(not_after);
        params.subject_alt_names = vec![SanType::URI(id.as_str().try_into()?)];
        params.is_ca = IsCa::ExplicitNoCa;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        params.use_authority_key_identifier_extension = true;
        let leaf = params.signed_by(&key, &self.issuer)?;
        Ok(IssuedSvid {
            chain: vec![leaf.der().clone()],
            key: PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der())),
        })
    }
}

impl fmt::Debug for LocalCa {
    /// Without the key.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LocalCa").field("lifetime", &self.lifetime).finish_non_exhaustive()
    }
}

impl IdentitySource for LocalCa {
    fn issue<'a>(&'a self, id: &'a SpiffeId) -> BoxFuture<'a, Result<IssuedSvid, IdentityError>> {
        // About 100 µs of CPU and no I/O: not worth another thread.
        Box::pin(std::future::ready(self.sign(id)))
    }

    fn bundle(&self) -> watch::Receiver<Arc<TrustBundles>> {
        self.bundles.subscribe()
    }
}

/// The root, read back and checked.
struct Root {
    issuer: Issuer<'static, KeyPair>,
    der: CertificateDer<'static>,
    not_after: SystemTime,
}

impl Root {
    fn read(text: &str, trust_domain: &TrustDomain, now: SystemTime) -> Result<Self, String> {
        let der = CertificateDer::from_pem_slice(text.as_bytes()).map_err(|error| format!("no certificate in it: {error}"))?;
        let key = PrivatePkcs8KeyDer::from_pem_slice(text.as_bytes()).map_err(|error| format!("no PKCS#8 key in it: {error}"))?;
        let key = KeyPair::from_pkcs8_der_and_sign_algo(&key, &PKCS_ECDSA_P256_SHA256)
            .map_err(|error| format!("its key is not an ECDSA P-256 key: {error}"))?;
        let not_after = {
            let (_, certificate) =
                X509Certificate::from_der(&der).map_err(|error| format!("its certificate cannot be read: {error}"))?;
            if certificate.public_key().raw != key.subject_public_key_info() {
                return Err("key and certificate do not belong together".into());
            }
            let names = certificate.subject_alternative_name().map_err(|error| error.to_string())?;
            let own = format!("spiffe://{trust_domain}");
            let found = names.iter().flat_map(|names| &names.value.general_names).find_map(|name| match name {
                GeneralName::URI(uri) => Some(*uri),
                _ => None,
            });
            if found != Some(own.as_str()) {
                return Err(format!(
                    "this root is for {}, the settings say {own}: use another directory or the right trust domain",
                    found.unwrap_or("no trust domain")
                ));
            }
            date(certificate.validity().not_after.timestamp())
        };
        if not_after <= now {
            return Err("this root has expired: remove it to get a new one, and restart all agents".into());
        }
        let issuer = Issuer::from_ca_cert_der(&der, key).map_err(|error| error.to_string())?;
        Ok(Self { issuer, der, not_after })
    }
}

/// Key and certificate of a new root, as PEM.
fn generate_root(trust_domain: &TrustDomain, now: SystemTime) -> Result<String, rcgen::Error> {
    let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::OrganizationName, trust_domain.as_str());
    params.distinguished_name.push(DnType::CommonName, "Culvert development root");
    params.not_before = OffsetDateTime::from(now - BACKDATE);
    params.not_after = OffsetDateTime::from(now + ROOT_LIFETIME);
    // SPIFFE X.509-SVID §2: the signing certificate names its trust domain, without a path.
    params.subject_alt_names = vec![SanType::URI(format!("spiffe://{trust_domain}").try_into()?)];
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    let certificate = params.self_signed(&key)?;
    Ok(format!("{}{}", key.serialize_pem(), certificate.pem()))
}

fn storage(path: &Path, why: impl Into<String>) -> IdentityError {
    IdentityError::Storage { path: path.to_owned(), why: why.into() }
}

/// Creates the directory with mode 0700; an existing one must not be writable by others, who could swap the root.
fn prepare_directory(directory: &Path) -> Result<(), IdentityError> {
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(directory)
        .map_err(|error| storage(directory, format!("cannot create the directory: {error}")))?;
    let metadata = fs::metadata(directory).map_err(|error| storage(directory, error.to_string()))?;
    let mode = metadata.permissions().mode() & 0o777;
    if mode & 0o022 != 0 {
        return Err(storage(
            directory,
            format!("mode {mode:04o} lets others replace the root key: chmod 0700 it, or use another directory"),
        ));
    }
    Ok(())
}

/// Reads a private file; `None` when there is none.
fn read_private(path: &Path) -> Result<Option<String>, IdentityError> {
    let failed = |error: io::Error| storage(path, format!("cannot read it: {error}"));
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(failed(error)),
    };
    // Of the open file, so that nobody can swap it between check and read.
    let metadata = file.metadata().map_err(failed)?;
    let mode = metadata.permissions().mode() & 0o777;
    if !metadata.is_file() {
        return Err(storage(path, "it is not a regular file"));
    }
    // A Secret that Kubernetes mounted for the group of a pod that does not run as root (`fsGroup`).
    let is_mounted = mode == 0o440 && metadata.uid() == 0;
    if mode & 0o077 != 0 && !is_mounted {
        return Err(storage(
            path,
            format!("mode {mode:04o} lets others use the root key: consider it stolen (remove it), or chmod 0600 it"),
        ));
    }
    let mut text = String::new();
    file.take(MOST_BYTES).read_to_string(&mut text).map_err(failed)?;
    Ok(Some(text))
}

/// Creates `path` with all of `text` or not at all; `false` when it exists already.
fn create_whole(path: &Path, text: &str) -> io::Result<bool> {
    let aside = write_aside(path, text)?;
    // link(2) fails when the target exists: the one atomic "create, complete, exclusively" of POSIX.
    let linked = fs::hard_link(&aside, path);
    fs::remove_file(&aside)?;
    match linked {
        Ok(()) => {
            if let Some(directory) = path.parent() {
                File::open(directory)?.sync_all()?;
            }
            Ok(true)
        }
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(false),
        Err(error) => Err(error),
    }
}

/// Writes the public copy when it is missing or stale.
fn publish_certificate(directory: &Path, der: &CertificateDer<'_>) -> io::Result<()> {
    let path = directory.join(PUBLIC_FILE);
    let pem = crate::pem::certificate(der);
    if fs::read_to_string(&path).is_ok_and(|present| present == pem) {
        return Ok(());
    }
    let aside = write_aside(&path, &pem)?;
    fs::rename(&aside, &path)
}

/// A complete, synced, private file beside `path`, under a name nobody else uses.
fn write_aside(path: &Path, text: &str) -> io::Result<PathBuf> {
    let aside = path.with_extension(format!("{:016x}.tmp", rand::random::<u64>()));
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&aside)?;
    let written = file.write_all(text.as_bytes()).and_then(|()| file.sync_all());
    if let Err(error) = written {
        let _ = fs::remove_file(&aside);
        return Err(error);
    }
    Ok(aside)
}

#[cfg(test)]
mod tests;
