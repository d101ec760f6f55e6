//! A control plane for tests: delta ADS and the certificate API of istiod over resources a test puts in, and faults on command.
//!
//! Speaks the wire by [`crate::rpc`] and the committed messages; decides by itself what a client lacks, as istiod does (the
//! versions a client names, an answer to every subscription, one unanswered response per type). Owns: resources with
//! versions, an authority with its roots, what clients said. A client that gives `*` up
//! is told what it names, by name or address, the endpoints of a service with it, and what is on its node.
use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::Context as _;
use mesh_proto::envoy::service::discovery::v3::{DeltaDiscoveryRequest, DeltaDiscoveryResponse, Resource};
use mesh_proto::istio::security::Authorization;
use mesh_proto::istio::v1::auth::{IstioCertificateRequest, IstioCertificateResponse};
use mesh_proto::istio::workload::{self, Address};
use mesh_proto::well_known::{Any, value};
use mesh_proto::{ADDRESS_TYPE, AUTHORIZATION_TYPE, Message};
use rcgen::{
    BasicConstraints, CertificateParams, CertificateSigningRequestParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, SanType, SerialNumber,
};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use tokio::sync::watch;

use crate::dev_ca::Credentials;
use crate::revocation;
use crate::rpc::{Call, Door, Rpc};

const ADS: &str = "/envoy.service.discovery.v3.AggregatedDiscoveryService/DeltaAggregatedResources";
const CA: &str = "/istio.v1.auth.IstioCertificateService/CreateCertificate";

/// A change of what the authority does.
#[derive(Clone, Debug, Default)]
pub struct CaManner {
    /// Answers with this status instead.
    pub refuse: Option<(u8, String)>,
    /// Does not answer at all.
    pub hang: bool,
    /// Signs this name instead of the one asked for.
    pub sign_as: Option<String>,
    /// Sends roots that did not sign.
    pub foreign_roots: bool,
    /// Ignores the key of the request and signs one of its own.
    pub foreign_key: bool,
    /// Leaves the roots out.
    pub no_roots: bool,
}

/// In which order what changed of a type is told.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Order {
    /// By name, in one response.
    #[default]
    Names,
    /// The other way round, in one response.
    Backwards,
    /// The other way round, each in a response of its own. What a stream begins with is told in one all the same.
    Apart,
}

/// What clients said.
#[derive(Clone, Debug, Default)]
pub struct Seen {
    /// Node ids of streams, in order.
    pub nodes: Vec<String>,
    /// Metadata of the last node.
    pub metadata: BTreeMap<String, String>,
    /// `authorization` of each stream.
    pub tokens: Vec<String>,
    /// Versions each stream began with, by type.
    pub initial: Vec<(String, BTreeMap<String, String>)>,
    /// Responses acknowledged.
    pub acks: usize,
    /// Responses refused: the type and the words.
    pub nacks: Vec<(String, String)>,
    /// Identities certificates were asked for, in order.
    pub identities: Vec<String>,
    /// `authorization` and `clusterid` of each request for a certificate.
    pub ca_headers: Vec<(String, String)>,
    /// Resources sent, by name, in order.
    pub sent: Vec<String>,
    /// Names asked for, in order, without `*`.
    pub asked: Vec<String>,
    /// Those given up.
    pub given_up: Vec<String>,
}

#[derive(Debug, Default)]
struct World {
    resources: BTreeMap<&'static str, BTreeMap<String, (u64, Vec<u8>)>>,
    serial: u64,
    /// What changed since the last time that everything may have, so that a client in step is told without a look at all.
    log: Vec<(&'static str, String)>,
    /// Counts those times.
    epoch: u64,
    withheld: BTreeSet<&'static str>,
    order: Order,
    stalled: bool,
    seen: Seen,
    ca: CaManner,
    /// Identities by the serial numbers of their certificates, which start at 1.
    issued: Vec<String>,
    lifetime: Option<Duration>,
}

struct Authority {
    der: CertificateDer<'static>,
    pem: String,
    issuer: Issuer<'static, KeyPair>,
}

impl Authority {
    fn make(name: &str) -> anyhow::Result<Self> {
        let key = KeyPair::generate()?;
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let cert = params.self_signed(&key)?;
        Ok(Self { der: cert.der().clone(), pem: cert.pem(), issuer: Issuer::new(params, key) })
    }
}

struct Shared {
    world: Mutex<World>,
    /// The signing authority first, then others still to be believed.
    authorities: Mutex<Vec<Authority>>,
    changed: watch::Sender<u64>,
}

impl World {
    /// Anything may have changed.
    fn restart_log(&mut self) {
        self.log.clear();
        self.epoch += 1;
    }
}

impl Shared {
    fn world(&self) -> MutexGuard<'_, World> {
        self.world.lock().unwrap_or_else(PoisonError::into_inner)
    }
    fn authorities(&self) -> MutexGuard<'_, Vec<Authority>> {
        self.authorities.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The control plane. Ends when dropped.
pub struct Istiod {
    shared: Arc<Shared>,
    rpc: Rpc,
    root: String,
}

impl Istiod {
    /// Serves on a listener, with a certificate for `names` of an authority of its own ([`Istiod::root`]).
    pub fn start(listener: std::net::TcpListener, names: &[&str]) -> anyhow::Result<Self> {
        let authority = Authority::make("istiod test root")?;
        let config = serving(&authority, names)?;
        let root = authority.pem.clone();
        let shared =
            Arc::new(Shared { world: Mutex::default(), authorities: Mutex::new(vec![authority]), changed: watch::channel(0).0 });
        let serving = Arc::clone(&shared);
        let rpc = Rpc::start(Door::Tls(listener, Arc::new(config)), move |call| serve(Arc::clone(&serving), call))?;
        Ok(Self { shared, rpc, root })
    }

    /// One on this machine, on a port of the kernel's choice.
    pub fn local() -> anyhow::Result<Self> {
        Self::start(std::net::TcpListener::bind("127.0.0.1:0")?, &["localhost"])
    }

    /// Where it listens.
    pub fn addr(&self) -> anyhow::Result<SocketAddr> {
        self.rpc.addr.context("it listens on TCP")
    }

    /// The root its own certificate is of, PEM.
    pub fn root(&self) -> &str {
        &self.root
    }

    /// Tells a workload; by its uid.
    pub fn workload(&self, workload: workload::Workload) {
        let name = workload.uid.clone();
        self.put(ADDRESS_TYPE, &name, Address { r#type: Some(workload::address::Type::Workload(workload)) }.encode_to_vec());
    }
    /// Tells a service.
    pub fn service(&self, service: workload::Service) {
        let name = format!("{}/{}", service.namespace, service.hostname);
        self.put(ADDRESS_TYPE, &name, Address { r#type: Some(workload::address::Type::Service(service)) }.encode_to_vec());
    }
    /// Tells a policy.
    pub fn policy(&self, policy: &Authorization) {
        self.put(AUTHORIZATION_TYPE, &format!("{}/{}", policy.namespace, policy.name), policy.encode_to_vec());
    }
    /// Tells these bytes, whatever they are.
    pub fn put(&self, url: &'static str, name: &str, bytes: Vec<u8>) {
        {
            let mut world = self.shared.world();
            if world.resources.get(url).and_then(|all| all.get(name)).is_some_and(|(_, had)| *had == bytes) {
                return;
            }
            world.serial += 1;
            let version = world.serial;
            world.resources.entry(url).or_default().insert(name.to_owned(), (version, bytes));
            world.log.push((url, name.to_owned()));
        }
        self.told();
    }
    /// Several at once, in one response; what is not named any more is removed.
    pub fn replace(&self, all: Vec<(&'static str, String, Vec<u8>)>) {
        {
            let mut world = self.shared.world();
            let mut next: BTreeMap<&'static str, BTreeMap<String, (u64, Vec<u8>)>> = BTreeMap::new();
            for (url, name, bytes) in all {
                let had = world.resources.get(url).and_then(|all| all.get(&name)).filter(|(_, had)| *had == bytes);
                let had = had.map(|(version, _)| *version);
                world.serial += u64::from(had.is_none());
                let version = had.unwrap_or(world.serial);
                next.entry(url).or_default().insert(name, (version, bytes));
            }
            world.resources = next;
            world.restart_log();
        }
        self.told();
    }
    /// Takes a resource back.
    pub fn remove(&self, url: &'static str, name: &str) {
        {
            let mut world = self.shared.world();
            if let Some(all) = world.resources.get_mut(url) {
                all.remove(name);
            }
            world.log.push((url, name.to_owned()));
        }
        self.told();
    }
    /// Gives every resource a new version without a change, as another replica with another hash would.
    pub fn jump_versions(&self) {
        {
            let mut world = self.shared.world();
            world.serial += 1000;
            let serial = world.serial;
            for (version, _) in world.resources.values_mut().flat_map(BTreeMap::values_mut) {
                *version += serial;
            }
            world.serial *= 3;
            world.restart_log();
        }
        self.told();
    }
    /// Sends nothing more, and answers no certificate request, or does again. Connections stay.
    pub fn stall(&self, stalled: bool) {
        self.shared.world().stalled = stalled;
        self.told();
    }
    /// Keeps a type back, or lets it out: the order of responses is the test's.
    pub fn withhold(&self, url: &'static str, withheld: bool) {
        {
            let mut world = self.shared.world();
            if withheld {
                world.withheld.insert(url);
            } else {
                world.withheld.remove(url);
            }
        }
        self.told();
    }
    /// Tells in this order from now on.
    pub fn order(&self, order: Order) {
        self.shared.world().order = order;
    }
    /// Cuts every connection.
    pub fn drop_connections(&self) {
        self.rpc.kick();
    }
    /// Is not there, or is again.
    pub fn away(&self, away: bool) {
        self.rpc.away(away);
    }
    /// How the authority answers.
    pub fn ca(&self, manner: CaManner) {
        self.shared.world().ca = manner;
    }
    /// How long certificates live; an hour by itself.
    pub fn lifetime(&self, lifetime: Duration) {
        self.shared.world().lifetime = Some(lifetime);
    }
    /// Signs with a new root; the old one is still sent along while `overlap` is.
    pub fn rotate_root(&self, overlap: bool) -> anyhow::Result<()> {
        let mut authorities = self.shared.authorities();
        let name = format!("istiod test root {}", authorities.len() + 1);
        authorities.insert(0, Authority::make(&name)?);
        if !overlap {
            authorities.truncate(1);
        }
        Ok(())
    }
    /// The list of what was taken back, PEM: every certificate that was issued for `identities` until now.
    pub fn revoked(&self, identities: &[&str]) -> anyhow::Result<String> {
        let issued = self.shared.world().issued.clone();
        let revoked = (1u64..).zip(&issued).filter(|(_, identity)| identities.contains(&identity.as_str()));
        let authorities = self.shared.authorities();
        Ok(revocation::list(revoked.map(|(serial, _)| serial), &authorities.first().context("an authority")?.issuer)?.pem()?)
    }
    /// A certificate for whom the test plays; counted among those issued.
    pub fn certificate(&self, identity: &str) -> anyhow::Result<Credentials> {
        let key = KeyPair::generate()?;
        let mut params = CertificateParams::default();
        params.subject_alt_names = vec![SanType::URI(identity.try_into()?)];
        let csr = params.serialize_request(&key)?.pem()?;
        let signed = sign(&self.shared, &csr, identity, &CaManner::default())?;
        let cert = signed.cert_chain.first().context("a certificate")?.clone();
        Ok(Credentials { cert, key: key.serialize_pem(), root: self.root().to_owned() })
    }
    /// Forgets what was refused until now, which was meant to be.
    pub fn forget_nacks(&self) {
        self.shared.world().seen.nacks.clear();
    }
    /// What clients said until now.
    pub fn seen(&self) -> Seen {
        self.shared.world().seen.clone()
    }

    fn told(&self) {
        self.shared.changed.send_modify(|n| *n += 1);
    }
}

impl std::fmt::Debug for Istiod {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Istiod").field("rpc", &self.rpc).finish_non_exhaustive()
    }
}

/// TLS of the server itself.
fn serving(authority: &Authority, names: &[&str]) -> anyhow::Result<rustls::ServerConfig> {
    let key = KeyPair::generate()?;
    let params = CertificateParams::new(names.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>())?;
    let chain = vec![params.signed_by(&key, &authority.issuer)?.der().clone()];
    let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der()));
    let crypto = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let builder = rustls::ServerConfig::builder_with_provider(crypto).with_safe_default_protocol_versions()?;
    let mut config = builder.with_no_client_auth().with_single_cert(chain, key)?;
    config.alpn_protocols = vec![b"h2".to_vec()];
    Ok(config)
}

async fn serve(shared: Arc<Shared>, call: Call) -> anyhow::Result<()> {
    match call.path.as_str() {
        ADS => discover(&shared, call).await,
        CA => certify(&shared, call).await,
        other => {
            let message = format!("no such method: {other}");
            call.end(12, &message)
        }
    }
}

/// What one client has of one type.
#[derive(Debug, Default)]
struct Held {
    /// The epoch this is of, and how much of its log was told; nothing before the first answer.
    told: Option<(u64, usize)>,
    versions: BTreeMap<String, String>,
    /// The nonce that was not answered yet.
    unanswered: Option<String>,
    /// A subscription is answered even when there is nothing.
    owed: bool,
    /// What it asks for, where that is not everything.
    demand: Option<Demand>,
}

/// What a client on demand asks for.
#[derive(Debug, Default)]
struct Demand {
    node: String,
    names: BTreeSet<String>,
    /// Of those, what was not answered yet.
    new: BTreeSet<String>,
    /// Names were given up and none was asked for: istiod then says that everything is gone.
    given_up_only: bool,
}

impl Demand {
    /// What it is to be told of all there is, where it has these versions: as from istiod, of a service no endpoints that came after
    /// it was asked for.
    fn of<'a>(&self, all: &'a BTreeMap<String, (u64, Vec<u8>)>, held: &BTreeMap<String, String>) -> BTreeSet<&'a String> {
        let decoded: Vec<(&String, workload::address::Type)> =
            all.iter().filter_map(|(name, (_, bytes))| Some((name, Address::decode(bytes.as_slice()).ok()?.r#type?))).collect();
        let services = |names: &BTreeSet<String>| -> BTreeSet<&String> {
            let is_asked = |(name, it): &&(&String, workload::address::Type)| {
                matches!(it, workload::address::Type::Service(_)) && names_of(name, it).iter().any(|n| names.contains(n))
            };
            decoded.iter().filter(is_asked).map(|(name, _)| *name).collect()
        };
        let (services, new) = (services(&self.names), services(&self.new));
        let is_told = |name: &&String, it: &workload::address::Type| match it {
            workload::address::Type::Service(_) => services.contains(*name),
            workload::address::Type::Workload(w) => {
                w.node == self.node
                    || held.contains_key(*name)
                    || w.services.keys().any(|service| new.contains(service))
                    || names_of(name, it).iter().any(|n| self.names.contains(n))
            }
        };
        decoded.iter().filter(|(name, it)| is_told(name, it)).map(|(name, _)| *name).collect()
    }
}

/// A resource's name and its aliases: `network/address` of each of its addresses.
fn names_of(name: &str, it: &workload::address::Type) -> Vec<String> {
    let text = |network: &str, bytes: &[u8]| {
        let ip = <[u8; 4]>::try_from(bytes).map(IpAddr::from).or_else(|_| <[u8; 16]>::try_from(bytes).map(IpAddr::from));
        ip.map(|ip| format!("{network}/{ip}")).ok()
    };
    let aliases: Vec<String> = match it {
        workload::address::Type::Workload(w) => w.addresses.iter().filter_map(|bytes| text(&w.network, bytes)).collect(),
        workload::address::Type::Service(s) => s.addresses.iter().filter_map(|a| text(&a.network, &a.address)).collect(),
    };
    std::iter::once(name.to_owned()).chain(aliases).collect()
}

async fn discover(shared: &Shared, mut call: Call) -> anyhow::Result<()> {
    let token = call.header("authorization").unwrap_or_default().to_owned();
    shared.world().seen.tokens.push(token);
    let mut changed = shared.changed.subscribe();
    let (mut held, mut nonces) = (BTreeMap::<&'static str, Held>::new(), 0u64);
    loop {
        let ready: Vec<&'static str> = held.iter().filter(|(_, held)| held.unanswered.is_none()).map(|(url, _)| *url).collect();
        for url in ready {
            let Some(held) = held.get_mut(url) else { continue };
            if let Some(mut response) = next(shared, url, held) {
                nonces += 1;
                response.nonce = format!("nonce-{nonces}");
                held.unanswered = Some(response.nonce.clone());
                held.owed = false;
                call.send(&response)?;
            }
        }
        tokio::select! {
            message = call.message::<DeltaDiscoveryRequest>() => match message? {
                Some(request) => take(shared, request, &mut held),
                None => return call.end(0, ""),
            },
            _ = changed.changed() => {}
        }
    }
}

/// What a client has not got.
fn next(shared: &Shared, url: &'static str, held: &mut Held) -> Option<DeltaDiscoveryResponse> {
    let mut world = shared.world();
    if world.stalled || world.withheld.contains(url) {
        return None;
    }
    let empty = BTreeMap::new();
    let all = world.resources.get(url).unwrap_or(&empty);
    let mut response = DeltaDiscoveryResponse { type_url: url.to_owned(), ..DeltaDiscoveryResponse::default() };
    let in_step = held.told.filter(|(epoch, _)| *epoch == world.epoch).and_then(|(_, told)| world.log.get(told..));
    let told = held.demand.as_ref().map(|demand| demand.of(all, &held.versions));
    let names: BTreeSet<String> = match in_step {
        _ if told.is_some() => told.iter().flatten().map(|name| (*name).clone()).chain(held.versions.keys().cloned()).collect(),
        Some(changed) => changed.iter().filter(|(of, _)| *of == url).map(|(_, name)| name.clone()).collect(),
        None => all.keys().chain(held.versions.keys()).cloned().collect(),
    };
    held.told = Some((world.epoch, world.log.len()));
    let is_apart = world.order == Order::Apart && !held.owed && held.demand.is_none();
    let in_order: Vec<String> =
        if world.order == Order::Names { names.into_iter().collect() } else { names.into_iter().rev().collect() };
    for name in in_order {
        if is_apart && response.resources.len() + response.removed_resources.len() > 0 {
            // The rest is looked for when this was answered.
            held.told = None;
            break;
        }
        let Some((version, bytes)) = all.get(&name) else {
            if held.versions.remove(&name).is_some() {
                response.removed_resources.push(name);
            }
            continue;
        };
        let version = version.to_string();
        if held.versions.get(&name) != Some(&version) {
            let any = Any { type_url: url.to_owned(), value: bytes.clone() };
            held.versions.insert(name.clone(), version.clone());
            response.resources.push(Resource { name, version, resource: Some(any), ..Resource::default() });
        }
    }
    if let Some(demand) = &mut held.demand {
        // What was asked for and is not there is said to be gone.
        let missing =
            |name: &String| Demand { names: [name.clone()].into(), ..Demand::default() }.of(all, &BTreeMap::new()).is_empty();
        response.removed_resources.extend(std::mem::take(&mut demand.new).into_iter().filter(missing));
        if std::mem::take(&mut demand.given_up_only) {
            response.removed_resources.extend(demand.names.iter().chain(held.versions.keys()).cloned());
        }
    }
    let sent: Vec<String> = response.resources.iter().map(|r| r.name.clone()).collect();
    world.seen.sent.extend(sent);
    (held.owed || !response.resources.is_empty() || !response.removed_resources.is_empty()).then_some(response)
}

/// A subscription, an acknowledgement or a refusal.
fn take(shared: &Shared, request: DeltaDiscoveryRequest, all: &mut BTreeMap<&'static str, Held>) {
    let Some(url) = [ADDRESS_TYPE, AUTHORIZATION_TYPE].into_iter().find(|url| *url == request.type_url) else { return };
    let mut world = shared.world();
    let node = request.node.as_ref().and_then(|node| node.metadata.as_ref()).and_then(|m| m.fields.get("NODE_NAME")).cloned();
    if let Some(node) = request.node {
        let text = |value: value::Kind| match value {
            value::Kind::StringValue(text) => text,
            other => format!("{other:?}"),
        };
        let fields = node.metadata.unwrap_or_default().fields;
        world.seen.metadata = fields.into_iter().map(|(key, value)| (key, value.kind.map(text).unwrap_or_default())).collect();
        world.seen.nodes.push(node.id);
    }
    let (begins, held) = (!all.contains_key(url), all.entry(url).or_default());
    let named = |names: &[String]| names.iter().filter(|name| *name != "*").cloned().collect::<Vec<_>>();
    let (asked, given_up) = (named(&request.resource_names_subscribe), named(&request.resource_names_unsubscribe));
    if begins || request.initial_resource_versions.is_empty() {
        // Else it asks what became of what it has.
        world.seen.asked.extend(asked.iter().cloned());
    }
    world.seen.given_up.extend(given_up.iter().cloned());
    if begins && request.resource_names_unsubscribe.iter().any(|name| name == "*") {
        let node = node.and_then(|value| if let Some(value::Kind::StringValue(node)) = value.kind { Some(node) } else { None });
        held.demand = Some(Demand { node: node.unwrap_or_default(), ..Demand::default() });
    }
    if let Some(demand) = &mut held.demand {
        let new = asked.iter().filter(|name| demand.names.insert((*name).clone())).count();
        let over = given_up.iter().filter(|name| demand.names.remove(*name) | held.versions.remove(*name).is_some()).count();
        // Without a change there is no answer.
        if new + over > 0 {
            demand.given_up_only = asked.is_empty() && !begins;
            demand.new.extend(asked);
        }
    }
    if begins {
        held.owed = request.resource_names_subscribe.iter().any(|name| name == "*");
        world.seen.initial.push((url.to_owned(), request.initial_resource_versions.clone()));
        held.versions = request.initial_resource_versions;
        held.told = None;
        return;
    }
    if held.unanswered.as_ref() == Some(&request.response_nonce) {
        held.unanswered = None;
    }
    match request.error_detail {
        Some(error) => world.seen.nacks.push((url.to_owned(), error.message)),
        None => world.seen.acks += 1,
    }
}

async fn certify(shared: &Shared, mut call: Call) -> anyhow::Result<()> {
    let request = call.message::<IstioCertificateRequest>().await?.context("a request")?;
    let named = request.metadata.unwrap_or_default().fields.remove("ImpersonatedIdentity");
    let Some(value::Kind::StringValue(identity)) = named.and_then(|value| value.kind) else {
        return call.end(3, "no identity");
    };
    let manner = {
        let headers = ["authorization", "clusterid"].map(|name| call.header(name).unwrap_or_default().to_owned());
        let mut world = shared.world();
        world.seen.identities.push(identity.clone());
        let [authorization, cluster] = headers;
        world.seen.ca_headers.push((authorization, cluster));
        CaManner { hang: world.ca.hang || world.stalled, ..world.ca.clone() }
    };
    if manner.hang {
        std::future::pending::<()>().await;
    }
    if let Some((code, why)) = &manner.refuse {
        return call.end(*code, why);
    }
    let response = sign(shared, &request.csr, &identity, &manner)?;
    call.send(&response)?;
    call.end(0, "")
}

fn sign(shared: &Shared, csr: &str, identity: &str, manner: &CaManner) -> anyhow::Result<IstioCertificateResponse> {
    let (lifetime, serial) = {
        let mut world = shared.world();
        world.issued.push(identity.to_owned());
        (world.lifetime.unwrap_or(Duration::from_hours(1)), world.issued.len() as u64)
    };
    let authorities = shared.authorities();
    let authority = authorities.first().context("an authority")?;
    let mut csr = CertificateSigningRequestParams::from_pem(csr)?;
    let asked: Vec<String> = csr
        .params
        .subject_alt_names
        .iter()
        .filter_map(|name| if let SanType::URI(uri) = name { Some(uri.as_str().to_owned()) } else { None })
        .collect();
    anyhow::ensure!(asked == [identity], "the request names {asked:?}, the metadata {identity}");
    let now = std::time::SystemTime::now();
    csr.params.serial_number = Some(SerialNumber::from(serial));
    csr.params.not_before = (now - Duration::from_secs(1)).into();
    csr.params.not_after = (now + lifetime).into();
    csr.params.key_usages = vec![KeyUsagePurpose::DigitalSignature, KeyUsagePurpose::KeyEncipherment];
    csr.params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
    if let Some(other) = &manner.sign_as {
        csr.params.subject_alt_names = vec![SanType::URI(other.as_str().try_into()?)];
    }
    let leaf = if manner.foreign_key {
        csr.params.signed_by(&KeyPair::generate()?, &authority.issuer)?.pem()
    } else {
        csr.signed_by(&authority.issuer)?.pem()
    };
    let mut cert_chain = vec![leaf];
    if manner.foreign_roots {
        cert_chain.push(Authority::make("nobody's root")?.pem);
    } else if !manner.no_roots {
        cert_chain.push(authorities.iter().map(|authority| authority.pem.as_str()).collect());
    }
    Ok(IstioCertificateResponse { cert_chain })
}

impl std::fmt::Debug for Authority {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Authority").field("certificate", &self.der.len()).finish_non_exhaustive()
    }
}
