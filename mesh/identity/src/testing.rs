//! Authorities for tests: one that signs whatever a test asks for, and sources that fail, hang or count on command.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, SystemTime};

use mesh_model::{SpiffeId, TrustDomain};
use parking_lot::Mutex;
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose, SanType,
    SerialNumber,
};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use tokio::sync::{Notify, mpsc, watch};

use crate::bundle::TrustBundles;
use crate::clock::{Clock, SystemClock};
use crate::crypto::TlsSettings;
use crate::error::IdentityError;
use crate::source::{BoxFuture, IdentitySource, IssuedSvid};
use crate::svid::{Svid, TlsContext};
use crate::verify::Leaf;

pub(crate) fn id(text: &str) -> SpiffeId {
    text.parse().unwrap()
}

pub(crate) fn domain(text: &str) -> TrustDomain {
    TrustDomain::parse(text).unwrap()
}

pub(crate) fn hours(n: u64) -> Duration {
    Duration::from_secs(n * 3600)
}

/// A root that signs anything.
pub(crate) struct TestCa {
    pub(crate) der: CertificateDer<'static>,
    issuer: Issuer<'static, KeyPair>,
}

impl TestCa {
    pub(crate) fn new(name: &str) -> Self {
        let key = KeyPair::generate().unwrap();
        let params = ca_params(name);
        let der = params.self_signed(&key).unwrap().der().clone();
        Self { der, issuer: Issuer::new(params, key) }
    }

    /// What it signs with.
    pub(crate) fn issuer(&self) -> &Issuer<'static, KeyPair> {
        &self.issuer
    }

    /// An authority below this one.
    pub(crate) fn intermediate(&self, name: &str) -> Self {
        self.intermediate_numbered(name, 1)
    }

    /// An authority below this one, with this serial number.
    pub(crate) fn intermediate_numbered(&self, name: &str, serial: u64) -> Self {
        let key = KeyPair::generate().unwrap();
        let mut params = ca_params(name);
        params.serial_number = Some(SerialNumber::from(serial));
        let der = params.signed_by(&key, &self.issuer).unwrap().der().clone();
        Self { der, issuer: Issuer::new(params, key) }
    }

    /// An authority below this one that ends early.
    pub(crate) fn intermediate_until(&self, end: SystemTime) -> Self {
        let key = KeyPair::generate().unwrap();
        let mut params = ca_params("short-lived");
        params.not_after = end.into();
        let der = params.signed_by(&key, &self.issuer).unwrap().der().clone();
        Self { der, issuer: Issuer::new(params, key) }
    }

    /// A certificate as `params` say, with its key.
    pub(crate) fn sign(&self, params: &CertificateParams) -> IssuedSvid {
        let key = KeyPair::generate().unwrap();
        let leaf = params.signed_by(&key, &self.issuer).unwrap();
        IssuedSvid { chain: vec![leaf.der().clone()], key: PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der())) }
    }
}

fn ca_params(name: &str) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name.push(DnType::CommonName, name);
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params
}

/// A good workload certificate around now; tests break it.
pub(crate) fn leaf_params(uris: &[&str]) -> CertificateParams {
    let now = SystemTime::now();
    let mut params = CertificateParams::default();
    params.subject_alt_names = uris.iter().map(|uri| SanType::URI((*uri).try_into().unwrap())).collect();
    params.not_before = (now - hours(1)).into();
    params.not_after = (now + hours(1)).into();
    params.is_ca = IsCa::ExplicitNoCa;
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
    params
}

/// How a [`Scripted`] source answers one request.
#[derive(Clone, Debug)]
pub(crate) enum Act {
    Issue,
    Fail(IdentityError),
    Hang,
    Panic,
    /// Issues when told.
    Gate(Arc<Notify>),
}

/// A source that follows a script and keeps count; past the end of the script it issues.
pub(crate) struct Scripted {
    ca: TestCa,
    clock: Arc<dyn Clock>,
    bundles: watch::Sender<Arc<TrustBundles>>,
    pub(crate) script: Mutex<VecDeque<Act>>,
    pub(crate) asked: Mutex<Vec<SpiffeId>>,
    pub(crate) running: AtomicUsize,
    pub(crate) most_running: AtomicUsize,
    /// Set before the cache starts: this source tells of renewals.
    pub(crate) renewals: Mutex<Option<mpsc::UnboundedReceiver<SpiffeId>>>,
}

impl Scripted {
    pub(crate) fn new(clock: Arc<dyn Clock>, script: impl IntoIterator<Item = Act>) -> Arc<Self> {
        let ca = TestCa::new("scripted");
        let bundles = TrustBundles::new(TrustDomain::default(), vec![ca.der.clone()]).unwrap();
        Arc::new(Self {
            ca,
            clock,
            bundles: watch::Sender::new(Arc::new(bundles)),
            script: Mutex::new(script.into_iter().collect()),
            asked: Mutex::default(),
            running: AtomicUsize::new(0),
            most_running: AtomicUsize::new(0),
            renewals: Mutex::default(),
        })
    }

    pub(crate) fn count(&self) -> usize {
        self.asked.lock().len()
    }
}

struct Running<'a>(&'a AtomicUsize);
impl Drop for Running<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

impl IdentitySource for Scripted {
    fn issue<'a>(&'a self, id: &'a SpiffeId) -> BoxFuture<'a, Result<IssuedSvid, IdentityError>> {
        Box::pin(async move {
            self.asked.lock().push(id.clone());
            let running = self.running.fetch_add(1, Ordering::SeqCst) + 1;
            let _running = Running(&self.running);
            self.most_running.fetch_max(running, Ordering::SeqCst);
            let act = self.script.lock().pop_front().unwrap_or(Act::Issue);
            match act {
                Act::Issue => {}
                Act::Fail(error) => return Err(error),
                Act::Hang => std::future::pending().await,
                Act::Panic => panic!("the script says so"),
                Act::Gate(gate) => gate.notified().await,
            }
            let now = self.clock.now();
            let mut params = leaf_params(&[id.as_str()]);
            params.not_before = now.into();
            params.not_after = (now + hours(1)).into();
            Ok(self.ca.sign(&params))
        })
    }

    fn bundle(&self) -> watch::Receiver<Arc<TrustBundles>> {
        self.bundles.subscribe()
    }

    fn renewals(&self) -> Option<mpsc::UnboundedReceiver<SpiffeId>> {
        self.renewals.lock().take()
    }
}

/// Bundles without an issuer, for verification and TLS tests.
pub(crate) struct Bundles(pub(crate) watch::Sender<Arc<TrustBundles>>);

impl Bundles {
    pub(crate) fn of(bundles: TrustBundles) -> Self {
        Self(watch::Sender::new(Arc::new(bundles)))
    }

    pub(crate) fn context(&self) -> TlsContext {
        TlsContext::new(&TlsSettings::default(), self, Arc::new(SystemClock)).unwrap()
    }
}

impl IdentitySource for Bundles {
    fn issue<'a>(&'a self, id: &'a SpiffeId) -> BoxFuture<'a, Result<IssuedSvid, IdentityError>> {
        let refused = IdentityError::Refused { id: id.to_string(), why: "bundles only".into() };
        Box::pin(std::future::ready(Err(refused)))
    }

    fn bundle(&self) -> watch::Receiver<Arc<TrustBundles>> {
        self.0.subscribe()
    }
}

/// An SVID around any certificate, however bad, claiming to be `id`.
pub(crate) fn unchecked(id: &SpiffeId, issued: IssuedSvid, tls: &TlsContext) -> Svid {
    let now = tls.clock().now();
    let leaf = Leaf { id: id.clone(), not_before: now, not_after: now + hours(1), serial: "0".into() };
    Svid::assemble(leaf, issued, tls).unwrap()
}
