//! A SPIRE agent for tests: the SPIFFE Workload API and the Delegated Identity API on a Unix socket, over entries a test makes.
//!
//! Every open stream hears of every change. Owns: an authority per trust domain, the entries, what was asked.
use std::collections::BTreeMap;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use anyhow::Context as _;
use bytes::Bytes;
use mesh_proto::spiffe::delegated::{
    SpiffeId, SubscribeToX509BundlesRequest, SubscribeToX509BundlesResponse, SubscribeToX509sviDsRequest,
    SubscribeToX509sviDsResponse, X509svid, X509svidWithKey,
};
use mesh_proto::spiffe::workload::{self, X509svidRequest, X509svidResponse};
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose, SanType,
    SerialNumber,
};
use tokio::sync::watch;

use crate::revocation;
use crate::rpc::{Call, Door, Rpc};

const DELEGATED: &str = "/spire.api.agent.delegatedidentity.v1.DelegatedIdentity/";

struct Authority {
    der: Bytes,
    issuer: Issuer<'static, KeyPair>,
}

impl Authority {
    fn make(name: &str) -> anyhow::Result<Self> {
        let key = KeyPair::generate()?;
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let der = Bytes::copy_from_slice(params.self_signed(&key)?.der());
        Ok(Self { der, issuer: Issuer::new(params, key) })
    }
}

/// A certificate and its key, DER.
#[derive(Clone, Debug)]
struct Svid {
    der: Bytes,
    key: Bytes,
    serial: u64,
}

#[derive(Default)]
struct World {
    /// By SPIFFE id; for the Workload API all of them are the caller's.
    entries: BTreeMap<String, Svid>,
    /// Signing first.
    authorities: Vec<Authority>,
    federated: BTreeMap<String, Bytes>,
    /// Lists of what was taken back, as the Workload API sends them.
    crl: Vec<Bytes>,
    refuse: bool,
    asked: Vec<Vec<(String, String)>>,
    without_header: usize,
    open: usize,
}

struct Shared {
    world: Mutex<World>,
    domain: String,
    changed: watch::Sender<u64>,
}

impl Shared {
    fn world(&self) -> MutexGuard<'_, World> {
        self.world.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The agent. Ends when dropped.
pub struct Spire {
    shared: Arc<Shared>,
    rpc: Rpc,
}

impl std::fmt::Debug for Spire {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Spire").field("rpc", &self.rpc).finish_non_exhaustive()
    }
}

impl Spire {
    /// Listens at `socket` for a trust domain.
    pub fn start(socket: &Path, domain: &str) -> anyhow::Result<Self> {
        let world = World { authorities: vec![Authority::make("spire root")?], ..World::default() };
        let shared = Arc::new(Shared { world: Mutex::new(world), domain: domain.into(), changed: watch::channel(0).0 });
        let serving = Arc::clone(&shared);
        let rpc = Rpc::start(Door::Unix(UnixListener::bind(socket)?), move |call| serve(Arc::clone(&serving), call))?;
        Ok(Self { shared, rpc })
    }
    /// Registers an identity, or issues it a new certificate.
    pub fn issue(&self, id: &str, lifetime: Duration) -> anyhow::Result<()> {
        {
            let mut world = self.shared.world();
            let authority = world.authorities.first().context("an authority")?;
            let svid = sign(authority, id, lifetime)?;
            world.entries.insert(id.to_owned(), svid);
        }
        self.tell();
        Ok(())
    }
    /// Takes an entry away.
    pub fn remove(&self, id: &str) {
        self.shared.world().entries.remove(id);
        self.tell();
    }
    /// A list, DER, of the certificates that these identities have now.
    pub fn list(&self, identities: &[&str]) -> anyhow::Result<Bytes> {
        let world = self.shared.world();
        let serials = identities.iter().filter_map(|id| world.entries.get(*id)).map(|svid| svid.serial);
        let authority = world.authorities.first().context("an authority")?;
        Ok(Bytes::copy_from_slice(revocation::list(serials, &authority.issuer)?.der()))
    }
    /// Sends these as lists of what was taken back.
    pub fn send_lists(&self, crl: Vec<Bytes>) {
        self.shared.world().crl = crl;
        self.tell();
    }
    /// The root of another trust domain, DER.
    pub fn federate(&self, domain: &str, root: Bytes) {
        self.shared.world().federated.insert(domain.to_owned(), root);
        self.tell();
    }
    /// The root that signs, DER.
    pub fn root(&self) -> Bytes {
        self.shared.world().authorities.first().map(|a| a.der.clone()).unwrap_or_default()
    }
    /// Signs with a new root from now on; the old one is still told.
    pub fn rotate_root(&self) -> anyhow::Result<()> {
        let next = Authority::make("next spire root")?;
        self.shared.world().authorities.insert(0, next);
        self.tell();
        Ok(())
    }
    /// Tells of the signing root only.
    pub fn forget_old_roots(&self) {
        self.shared.world().authorities.truncate(1);
        self.tell();
    }
    /// Refuses callers, or no longer.
    pub fn refuse(&self, refuse: bool) {
        self.shared.world().refuse = refuse;
        self.rpc.kick();
    }
    /// Is not there, or is again.
    pub fn away(&self, away: bool) {
        self.rpc.away(away);
    }
    /// The selectors delegates asked with, in order.
    pub fn asked(&self) -> Vec<Vec<(String, String)>> {
        self.shared.world().asked.clone()
    }
    /// Streams of certificates open now.
    pub fn open(&self) -> usize {
        self.shared.world().open
    }
    /// Workload API calls without the header the specification demands.
    pub fn without_header(&self) -> usize {
        self.shared.world().without_header
    }
    fn tell(&self) {
        self.shared.changed.send_modify(|n| *n += 1);
    }
}

fn sign(authority: &Authority, id: &str, lifetime: Duration) -> anyhow::Result<Svid> {
    static SERIAL: AtomicU64 = AtomicU64::new(1);
    let key = KeyPair::generate()?;
    let mut params = CertificateParams::default();
    let serial = SERIAL.fetch_add(1, Ordering::Relaxed);
    params.serial_number = Some(SerialNumber::from(serial));
    let now = SystemTime::now();
    params.not_before = (now - Duration::from_secs(1)).into();
    params.not_after = (now + lifetime).into();
    params.subject_alt_names = vec![SanType::URI(id.try_into()?)];
    params.is_ca = IsCa::ExplicitNoCa;
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
    let leaf = params.signed_by(&key, &authority.issuer)?;
    Ok(Svid { der: Bytes::copy_from_slice(leaf.der()), key: Bytes::from(key.serialize_der()), serial })
}

async fn serve(shared: Arc<Shared>, mut call: Call) -> anyhow::Result<()> {
    if shared.world().refuse {
        return call.end(7, "not an authorized delegate");
    }
    let method = call.path.strip_prefix(DELEGATED).map(str::to_owned);
    match method.as_deref() {
        Some("SubscribeToX509SVIDs") => {
            let request = call.message::<SubscribeToX509sviDsRequest>().await?.context("a request")?;
            let selectors: Vec<_> = request.selectors.into_iter().map(|s| (s.r#type, s.value)).collect();
            shared.world().asked.push(selectors.clone());
            let _open = Open::new(&shared);
            tell_changes(&shared, call, |shared| delegated(shared, &selectors)).await
        }
        Some("SubscribeToX509Bundles") => {
            call.message::<SubscribeToX509BundlesRequest>().await?.context("a request")?;
            tell_changes(&shared, call, bundles).await
        }
        _ if call.path == "/SpiffeWorkloadAPI/FetchX509SVID" => {
            if call.header("workload.spiffe.io") != Some("true") {
                shared.world().without_header += 1;
                return call.end(3, "security header missing from request");
            }
            call.message::<X509svidRequest>().await?.context("a request")?;
            tell_changes(&shared, call, own).await
        }
        _ => call.end(12, "no such method"),
    }
}

struct Open<'a>(&'a Shared);
impl<'a> Open<'a> {
    fn new(shared: &'a Shared) -> Self {
        shared.world().open += 1;
        Self(shared)
    }
}
impl Drop for Open<'_> {
    fn drop(&mut self) {
        self.0.world().open -= 1;
    }
}

/// The state of now, and again after every change, until the client goes.
async fn tell_changes<M: mesh_proto::Message>(
    shared: &Shared,
    mut call: Call,
    state: impl Fn(&Shared) -> M,
) -> anyhow::Result<()> {
    let mut changed = shared.changed.subscribe();
    loop {
        call.send(&state(shared))?;
        tokio::select! {
            _ = changed.changed() => {}
            () = call.gone() => return Ok(()),
        }
    }
}

fn delegated(shared: &Shared, selectors: &[(String, String)]) -> SubscribeToX509sviDsResponse {
    let value = |prefix: &str| {
        let found = selectors.iter().find_map(|(kind, value)| value.strip_prefix(prefix).filter(|_| kind == "k8s"));
        found.unwrap_or_default().to_owned()
    };
    let path = format!("/ns/{}/sa/{}", value("ns:"), value("sa:"));
    let world = shared.world();
    let x509_svids = world
        .entries
        .get(&format!("spiffe://{}{path}", shared.domain))
        .map(|svid| X509svidWithKey {
            x509_svid: Some(X509svid {
                cert_chain: vec![svid.der.clone()],
                id: Some(SpiffeId { trust_domain: shared.domain.clone(), path }),
                ..X509svid::default()
            }),
            x509_svid_key: svid.key.clone(),
        })
        .into_iter()
        .collect();
    SubscribeToX509sviDsResponse { x509_svids, federates_with: Vec::new() }
}

fn own_roots(world: &World) -> Bytes {
    world.authorities.iter().flat_map(|a| a.der.iter().copied()).collect::<Vec<u8>>().into()
}

fn bundles(shared: &Shared) -> SubscribeToX509BundlesResponse {
    let world = shared.world();
    let mut ca_certificates: BTreeMap<String, Bytes> =
        world.federated.iter().map(|(domain, root)| (format!("spiffe://{domain}"), root.clone())).collect();
    ca_certificates.insert(format!("spiffe://{}", shared.domain), own_roots(&world));
    SubscribeToX509BundlesResponse { ca_certificates }
}

fn own(shared: &Shared) -> X509svidResponse {
    let world = shared.world();
    let svids = world.entries.iter().map(|(id, svid)| workload::X509svid {
        spiffe_id: id.clone(),
        x509_svid: svid.der.clone(),
        x509_svid_key: svid.key.clone(),
        bundle: own_roots(&world),
        hint: String::new(),
    });
    let federated_bundles = world.federated.iter().map(|(domain, root)| (format!("spiffe://{domain}"), root.clone())).collect();
    X509svidResponse { svids: svids.collect(), crl: world.crl.clone(), federated_bundles }
}
