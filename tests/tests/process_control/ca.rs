//! Certificates from istiod's authority, and its faults.
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use mesh_identity::cache::CacheSettings;
use mesh_identity::clock::SystemClock;
use mesh_identity::crypto::TlsSettings;
use mesh_identity::istio_ca::IstioCa;
use mesh_identity::svid::{Svid, TlsContext};
use mesh_identity::{IdentityError, IdentitySource, Peer, SourceSettings, SvidCache, tls};
use mesh_model::{SpiffeId, TrustDomain};
use mesh_tests::istiod::{CaManner, Istiod};
use tempfile::TempDir;
use tokio::runtime::Handle;

use crate::fixture::{PATIENCE, control_plane, until};

/// A node: its source and its cache.
struct Node {
    source: Arc<IstioCa>,
    cache: SvidCache,
    _files: TempDir,
}

fn id(account: &str) -> SpiffeId {
    format!("spiffe://cluster.local/ns/ns/sa/{account}").parse().unwrap()
}

fn node(istiod: &Istiod) -> Node {
    let files = tempfile::tempdir().unwrap();
    std::fs::write(files.path().join("root.pem"), istiod.root()).unwrap();
    std::fs::write(files.path().join("token"), "of the agent").unwrap();
    let settings = SourceSettings {
        trust_domain: TrustDomain::default(),
        trust_domain_aliases: Vec::new(),
        lifetime: Duration::from_hours(24),
        unknown: mesh_identity::revocation::Unknown::Deny,
    };
    let clock = Arc::new(SystemClock);
    let ca = IstioCa::new(settings, control_plane(istiod, &files), &TlsSettings::default(), clock.clone()).unwrap();
    let source = Arc::new(ca);
    let context = TlsContext::new(&TlsSettings::default(), &*source, clock).unwrap();
    let cache = SvidCache::start(source.clone(), context, &CacheSettings::default(), &Handle::current());
    Node { source, cache, _files: files }
}

/// Both sides' verdicts about a handshake.
pub(crate) async fn handshake(client: &Svid, server: &Svid) -> Result<(), String> {
    shake(client, server).await.map(drop)
}

/// What the server proved.
pub(crate) async fn shake(client: &Svid, server: &Svid) -> Result<Peer, String> {
    let (near, far) = tokio::io::duplex(1 << 16);
    let deadline = tokio::time::Instant::now() + PATIENCE;
    let expect = [server.id.clone()];
    let (connected, accepted) = tokio::join!(tls::connect(client, near, &expect, deadline), tls::accept(server, far, deadline));
    let (_, server) = connected.map_err(|e| format!("client: {e}"))?;
    accepted.map(|_| server).map_err(|e| format!("server: {e}"))
}

#[tokio::test]
async fn a_certificate_is_for_whom_it_was_asked_and_peers_believe_it() {
    let istiod = Istiod::local().unwrap();
    let (one, other) = (node(&istiod), node(&istiod));
    let (a, b) = (one.cache.fetch(&id("a")).await.unwrap(), other.cache.fetch(&id("b")).await.unwrap());
    assert_eq!((&a.id, &b.id), (&id("a"), &id("b")));
    handshake(&a, &b).await.unwrap();
    let seen = istiod.seen();
    assert_eq!(seen.identities, [id("a").to_string(), id("b").to_string()]);
    assert_eq!(seen.ca_headers[0], ("Bearer of the agent".into(), "c1".into()));
}

#[tokio::test]
async fn what_is_not_what_was_asked_for_is_refused() {
    let istiod = Istiod::local().unwrap();
    let node = node(&istiod);
    let wrong = [
        (CaManner { sign_as: Some(id("b").to_string()), ..CaManner::default() }, "it is for spiffe://cluster.local/ns/ns/sa/b"),
        (CaManner { foreign_roots: true, ..CaManner::default() }, "not valid"),
        (CaManner { no_roots: true, ..CaManner::default() }, "one element"),
    ];
    for (manner, why) in wrong {
        istiod.ca(manner.clone());
        let error = node.source.issue(&id("a")).await.unwrap_err();
        assert!(matches!(&error, IdentityError::Unusable { .. }) && error.to_string().contains(why), "{manner:?}: {error}");
        assert!(node.source.bundle().borrow().all().all(|(_, bundle)| bundle.roots().is_empty()), "{manner:?}: it is believed");
    }
    // The key is looked at where it is first used.
    istiod.ca(CaManner { foreign_key: true, ..CaManner::default() });
    let error = node.cache.fetch(&id("key")).await.unwrap_err();
    assert!(matches!(&error, IdentityError::Unusable { .. }), "{error}");
    istiod.ca(CaManner { refuse: Some((7, "not your node".into())), ..CaManner::default() });
    let error = node.source.issue(&id("a")).await.unwrap_err();
    assert!(matches!(&error, IdentityError::Refused { why, .. } if why.contains("not your node")), "{error}");
    istiod.ca(CaManner { refuse: Some((14, "come back later".into())), ..CaManner::default() });
    let error = node.source.issue(&id("a")).await.unwrap_err();
    assert!(matches!(&error, IdentityError::Unavailable(why) if why.contains("come back later")), "{error}");
    istiod.away(true);
    let error = node.source.issue(&id("a")).await.unwrap_err();
    assert!(matches!(&error, IdentityError::Unavailable(_)), "{error}");
    istiod.away(false);
    istiod.ca(CaManner::default());
    node.source.issue(&id("a")).await.expect("it is back, and so is the channel");
}

/// The certificate in use stays in use, and is renewed before it ends.
#[tokio::test]
async fn an_authority_that_is_away_for_half_a_life_is_not_missed() {
    let istiod = Istiod::local().unwrap();
    istiod.lifetime(Duration::from_secs(8));
    let node = node(&istiod);
    let handle = node.cache.handle(&id("a"));
    let first = handle.fetch().await.unwrap();
    istiod.away(true);
    let (begun, mut checks) = (Instant::now(), 0);
    while begun.elapsed() < Duration::from_millis(9500) {
        let svid = handle.load().unwrap_or_else(|| panic!("no certificate after {:?}", begun.elapsed()));
        handshake(&svid, &svid).await.unwrap();
        if begun.elapsed() > Duration::from_millis(5500) {
            istiod.away(false);
        }
        checks += 1;
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let last = handle.load().unwrap();
    assert!(checks > 10 && last.serial != first.serial && last.not_after > SystemTime::now());
}

/// Certificates of seconds change under handshakes, and none fails.
#[tokio::test]
async fn short_lived_certificates_rotate_under_load() {
    let istiod = Istiod::local().unwrap();
    istiod.lifetime(Duration::from_secs(4));
    let (one, other) = (node(&istiod), node(&istiod));
    let (a, b) = (one.cache.handle(&id("a")), other.cache.handle(&id("b")));
    a.fetch().await.unwrap();
    b.fetch().await.unwrap();
    let (begun, mut serials) = (Instant::now(), std::collections::BTreeSet::new());
    while begun.elapsed() < Duration::from_secs(8) {
        let (a, b) = (a.load().expect("a's certificate"), b.load().expect("b's certificate"));
        handshake(&a, &b).await.unwrap_or_else(|e| panic!("after {:?}: {e}", begun.elapsed()));
        serials.insert(a.serial.clone());
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert!(serials.len() >= 3, "only {} certificates", serials.len());
}

/// While istiod moves to another root, certificates of both are believed, old and new, in both directions; the old root goes
/// with the last certificate of it.
#[tokio::test]
async fn a_root_is_replaced_without_a_refused_handshake() {
    let istiod = Istiod::local().unwrap();
    let (one, other) = (node(&istiod), node(&istiod));
    let old = [one.cache.fetch(&id("a")).await.unwrap(), other.cache.fetch(&id("b")).await.unwrap()];
    // First the new root is announced with the old one, then it signs; here both at once is the hardest case for `a`, whose
    // node has not heard of it yet, so its next certificate tells.
    istiod.rotate_root(true).unwrap();
    let new = [one.cache.fetch(&id("c")).await.unwrap(), other.cache.fetch(&id("d")).await.unwrap()];
    for (client, server) in [(&old[0], &old[1]), (&new[0], &new[1]), (&old[0], &new[1]), (&new[0], &old[1])] {
        handshake(client, server).await.unwrap_or_else(|e| panic!("{} → {}: {e}", client.id, server.id));
    }
    let roots = |node: &Node| node.source.bundle().borrow().all().map(|(_, bundle)| bundle.roots().len()).sum::<usize>();
    assert_eq!((roots(&one), roots(&other)), (2, 2));
    // Without overlap: the new root alone is sent from now on, and the old ones are forgotten with their certificates.
    istiod.rotate_root(false).unwrap();
    for (node, names) in [(&one, ["a", "c"]), (&other, ["b", "d"])] {
        for name in names {
            node.source.issue(&id(name)).await.unwrap();
        }
    }
    until("the old roots to be forgotten", || roots(&one) == 1 && roots(&other) == 1).await;
    assert!(handshake(&old[0], &old[1]).await.is_err(), "a certificate of a root that is gone is believed");
}

/// The trust domain of an identity decides which roots vouch for it, also where settings name another.
#[tokio::test]
async fn identities_of_another_trust_domain_are_believed_by_their_own_roots() {
    let istiod = Istiod::local().unwrap();
    let (one, other) = (node(&istiod), node(&istiod));
    let there: SpiffeId = "spiffe://other.example/ns/ns/sa/x".parse().unwrap();
    let a = one.cache.fetch(&there).await.unwrap();
    handshake(&a, &a).await.unwrap();
    let b = other.cache.fetch(&id("b")).await.unwrap();
    assert!(handshake(&a, &b).await.is_err(), "a node without an identity of the domain believes it");
}
