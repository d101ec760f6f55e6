//! istiod's certificate authority as a source (node-agent §1.8).
//!
//! The key is made here and never leaves; a request names the identity twice, in the CSR and as the one impersonated, and
//! what comes back is checked before anybody uses it: the roots are the last element of the chain, the leaf is for that
//! identity and that key, and leads to those roots. Believed are all roots that came with the certificates this node has in
//! use: while istiod moves from one root to another, both are, until the last certificate of the old one has been renewed
//! or has expired. Retries, priorities and time limits are [`crate::cache`]'s.
//! Upstream: istiod, through [`mesh_runtime::control_plane`].

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use std::time::SystemTime;

use mesh_model::{SpiffeId, TrustDomain};
use mesh_proto::istio::v1::auth::{IstioCertificateRequest, IstioCertificateResponse};
use mesh_proto::well_known::{Struct, Value, value::Kind};
use mesh_runtime::control_plane::{ControlPlane, chain};
use parking_lot::Mutex;
use rcgen::{CertificateParams, DistinguishedName, KeyPair, PKCS_ECDSA_P256_SHA256, SanType};
use rustls::crypto::WebPkiSupportedAlgorithms;
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use tokio::sync::watch;
use tonic::transport::Channel;
use tonic::{Code, Status};
use tonic_prost::ProstCodec;

use crate::bundle::TrustBundles;
use crate::clock::{Clock, unix};
use crate::crypto::TlsSettings;
use crate::error::IdentityError;
use crate::source::{BoxFuture, IdentitySource, IssuedSvid, SourceSettings};
use crate::verify::{PeerRole, leaf_of, verify_chain};

const PATH: &str = "/istio.v1.auth.IstioCertificateService/CreateCertificate";
/// The metadata that names whom a node agent asks for.
const IMPERSONATED: &str = "ImpersonatedIdentity";

/// istiod's authority.
pub struct IstioCa {
    settings: SourceSettings,
    control_plane: ControlPlane,
    channel: Channel,
    algorithms: WebPkiSupportedAlgorithms,
    clock: Arc<dyn Clock>,
    in_use: Mutex<BTreeMap<SpiffeId, InUse>>,
    bundles: watch::Sender<Arc<TrustBundles>>,
}

/// The roots that came with a certificate, and until when it is valid.
struct InUse {
    not_after: SystemTime,
    roots: Vec<CertificateDer<'static>>,
}

impl IstioCa {
    /// A client; nothing is connected until a certificate is asked for. Until the first one came nobody is believed.
    pub fn new(
        settings: SourceSettings,
        control_plane: ControlPlane,
        tls: &TlsSettings,
        clock: Arc<dyn Clock>,
    ) -> Result<Self, IdentityError> {
        let channel = control_plane.connect_lazily().map_err(|e| IdentityError::Unavailable(e.to_string()))?;
        let algorithms = tls.crypto()?.signature_verification_algorithms;
        let bundles = watch::Sender::new(Arc::new(bundles_of(&settings, &BTreeMap::new())?));
        Ok(Self { settings, control_plane, channel, algorithms, clock, in_use: Mutex::default(), bundles })
    }

    async fn ask(&self, id: &SpiffeId) -> Result<IssuedSvid, IdentityError> {
        let unusable = |why: String| IdentityError::Unusable { id: id.to_string(), why };
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).map_err(|e| unusable(e.to_string()))?;
        let csr = signing_request(id, &key).map_err(|e| unusable(e.to_string()))?;
        let whom = Value { kind: Some(Kind::StringValue(id.to_string())) };
        let message = IstioCertificateRequest {
            csr,
            validity_duration: i64::try_from(self.settings.lifetime.as_secs()).unwrap_or(i64::MAX),
            metadata: Some(Struct { fields: BTreeMap::from([(IMPERSONATED.to_owned(), whom)]) }),
        };
        let unavailable = |why: String| IdentityError::Unavailable(format!("{}: {why}", self.control_plane.address()));
        let request = self.control_plane.request(message).map_err(|e| unavailable(e.to_string()))?;
        let mut grpc = tonic::client::Grpc::new(self.channel.clone());
        grpc.ready().await.map_err(|e| unavailable(chain(&e)))?;
        let path = http::uri::PathAndQuery::from_static(PATH);
        let answer: Result<tonic::Response<IstioCertificateResponse>, Status> =
            grpc.unary(request, path, ProstCodec::default()).await;
        let response = answer.map_err(|status| match status.code() {
            Code::PermissionDenied | Code::Unauthenticated | Code::InvalidArgument => {
                IdentityError::Refused { id: id.to_string(), why: format!("{:?}: {}", status.code(), status.message()) }
            }
            code => unavailable(format!("{code:?}: {}", chain(&status))),
        })?;
        let (chain, used) = self.check(id, &response.into_inner().cert_chain).map_err(unusable)?;
        self.believe(id, used)?;
        Ok(IssuedSvid { chain, key: PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der())) })
    }

    /// The chain that came back, if it is what was asked for; and what it brings to believe. Whether the key fits is looked at
    /// where the TLS configurations are made of both.
    fn check(&self, id: &SpiffeId, answer: &[String]) -> Result<(Vec<CertificateDer<'static>>, InUse), String> {
        let [certificates @ .., roots] = answer else { return Err("the answer is empty".into()) };
        let (chain, roots) = (certificates_of(certificates)?, certificates_of(std::slice::from_ref(roots))?);
        let Some((leaf, intermediates)) = chain.split_first() else {
            return Err("the answer has one element; a certificate and its roots are two".into());
        };
        if roots.is_empty() {
            return Err("the answer has no roots".into());
        }
        let read = leaf_of(leaf).map_err(|e| e.to_string())?;
        if read.id != *id {
            return Err(format!("it is for {}", read.id));
        }
        let domain = TrustDomain::parse(id.trust_domain()).map_err(|e| e.to_string())?;
        let theirs = TrustBundles::new(domain, roots.clone()).map_err(|e| e.to_string())?;
        let now = unix(self.clock.now());
        for role in [PeerRole::Client, PeerRole::Server] {
            verify_chain(leaf, intermediates, role, &theirs, &self.algorithms, now).map_err(|e| e.to_string())?;
        }
        Ok((chain, InUse { not_after: read.not_after, roots }))
    }

    /// Believes the roots of a new certificate, and no longer those only former ones came with.
    fn believe(&self, id: &SpiffeId, new: InUse) -> Result<(), IdentityError> {
        let mut in_use = self.in_use.lock();
        let now = self.clock.now();
        in_use.retain(|_, used| used.not_after > now);
        in_use.insert(id.clone(), new);
        let next = bundles_of(&self.settings, &in_use)?;
        self.bundles.send_if_modified(|current| {
            let changed = !current.has_roots_of(&next);
            if changed {
                tracing::info!(roots = next.all().map(|(_, bundle)| bundle.roots().len()).sum::<usize>(), "trust bundle changed");
                *current = Arc::new(next);
            }
            changed
        });
        Ok(())
    }
}

fn signing_request(id: &SpiffeId, key: &KeyPair) -> Result<String, rcgen::Error> {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.subject_alt_names = vec![SanType::URI(id.as_str().try_into()?)];
    params.serialize_request(key)?.pem()
}

/// All certificates in some PEM texts.
fn certificates_of(texts: &[String]) -> Result<Vec<CertificateDer<'static>>, String> {
    texts
        .iter()
        .flat_map(|text| CertificateDer::pem_slice_iter(text.as_bytes()))
        .collect::<Result<_, _>>()
        .map_err(|e| format!("a certificate of the answer cannot be read: {e}"))
}

/// The roots in use, per trust domain: an identity of a domain is vouched for by what came with identities of that domain.
fn bundles_of(settings: &SourceSettings, in_use: &BTreeMap<SpiffeId, InUse>) -> Result<TrustBundles, IdentityError> {
    // An identity under another name of our domain is ours.
    let ours = |name: &str| {
        let aliases = settings.trust_domain_aliases.iter();
        aliases.chain([&settings.trust_domain]).any(|domain| domain.as_str() == name)
    };
    let mut domains: BTreeMap<&str, BTreeMap<&[u8], &CertificateDer<'static>>> = BTreeMap::new();
    for (id, used) in in_use {
        let domain = Some(id.trust_domain()).filter(|name| !ours(name)).unwrap_or(settings.trust_domain.as_str());
        domains.entry(domain).or_default().extend(used.roots.iter().map(|root| (root.as_ref(), root)));
    }
    let mut bundles = TrustBundles::new(settings.trust_domain.clone(), Vec::new())?;
    for alias in &settings.trust_domain_aliases {
        bundles = bundles.with_alias(alias.clone());
    }
    for (name, roots) in domains {
        let domain = TrustDomain::parse(name).map_err(|e| IdentityError::Unusable { id: name.to_owned(), why: e.to_string() })?;
        bundles = bundles.with_domain(domain, roots.into_values().cloned().collect())?;
    }
    Ok(bundles)
}

impl fmt::Debug for IstioCa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("IstioCa").field("address", &self.control_plane.address()).finish_non_exhaustive()
    }
}

impl IdentitySource for IstioCa {
    fn issue<'a>(&'a self, id: &'a SpiffeId) -> BoxFuture<'a, Result<IssuedSvid, IdentityError>> {
        Box::pin(self.ask(id))
    }

    fn bundle(&self) -> watch::Receiver<Arc<TrustBundles>> {
        self.bundles.subscribe()
    }
}
