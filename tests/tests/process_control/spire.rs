//! Certificates from SPIRE, by both of its APIs.
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use mesh_identity::cache::CacheSettings;
use mesh_identity::clock::SystemClock;
use mesh_identity::crypto::TlsSettings;
use mesh_identity::live::LivePeers;
use mesh_identity::spire::{Api, Spire as Source, reach};
use mesh_identity::svid::TlsContext;
use mesh_identity::{Facts, IdentityError, IdentitySource, SourceSettings, SvidCache};
use mesh_model::{SpiffeId, TrustDomain};
use mesh_tests::spire::Spire;
use tempfile::TempDir;
use tokio::runtime::Handle;

use crate::ca::{handshake, shake};
use crate::fixture::{PATIENCE, until};

const HOUR: Duration = Duration::from_hours(1);

struct Node {
    source: Arc<Source>,
    cache: SvidCache,
}

fn id(account: &str) -> SpiffeId {
    format!("spiffe://cluster.local/ns/ns/sa/{account}").parse().unwrap()
}

fn node(socket: &Path, api: Api) -> Node {
    let agent = reach(&format!("unix://{}", socket.display()), &TlsSettings::default()).unwrap();
    let settings = SourceSettings {
        trust_domain: TrustDomain::default(),
        trust_domain_aliases: Vec::new(),
        lifetime: Duration::from_hours(1),
        unknown: mesh_identity::revocation::Unknown::Deny,
    };
    let clock = Arc::new(SystemClock);
    let source = Arc::new(Source::start(api, agent, settings, clock.clone(), Handle::current()).unwrap());
    let context = TlsContext::new(&TlsSettings::default(), &*source, clock).unwrap();
    let cache = SvidCache::start(source.clone(), context, &CacheSettings::default(), &Handle::current());
    Node { source, cache }
}

fn started() -> (Spire, TempDir) {
    let dir = tempfile::tempdir().unwrap();
    let spire = Spire::start(&dir.path().join("agent.sock"), "cluster.local").unwrap();
    for account in ["a", "b"] {
        spire.issue(id(account).as_str(), HOUR).unwrap();
    }
    (spire, dir)
}

async fn fetched(node: &Node, account: &str) -> Arc<mesh_identity::Svid> {
    let svid = node.cache.fetch(&id(account)).await.unwrap_or_else(|e| panic!("{account}: {e}"));
    until("the roots", || node.source.bundle().borrow().all().any(|(_, bundle)| !bundle.roots().is_empty())).await;
    svid
}

#[tokio::test]
async fn a_delegate_gets_the_certificates_of_its_pods() {
    let (spire, dir) = started();
    let node = node(&dir.path().join("agent.sock"), Api::Delegated);
    let (a, b) = (fetched(&node, "a").await, fetched(&node, "b").await);
    handshake(&a, &b).await.unwrap();
    let selectors = |account: &str| vec![("k8s".to_owned(), "ns:ns".to_owned()), ("k8s".to_owned(), format!("sa:{account}"))];
    assert_eq!(spire.asked(), [selectors("a"), selectors("b")]);
    // A pod that left is not followed any more.
    node.cache.forget(&id("b"));
    until("its stream to end", || spire.open() == 1).await;
}

/// Entries may be for one pod: each pod of an identity is asked about, by what is known of it, for as long as it is there.
#[tokio::test]
async fn each_pod_is_asked_about_by_what_is_known_of_it() {
    let (spire, dir) = started();
    let node = node(&dir.path().join("agent.sock"), Api::Delegated);
    let facts =
        |name: &str| Facts { uid: Some(format!("uid-{name}").into()), name: name.into(), node: "n".into(), ..Facts::default() };
    node.cache.introduce(&id("a"), &"one".into(), &facts("one"));
    let _a = fetched(&node, "a").await;
    node.cache.introduce(&id("a"), &"two".into(), &facts("two"));
    node.cache.introduce(&id("a"), &"two".into(), &facts("two"));
    until("two streams", || spire.open() == 2).await;
    let selectors = |name: &str| {
        let values = [
            "ns:ns".to_owned(),
            "sa:a".to_owned(),
            format!("pod-uid:uid-{name}"),
            format!("pod-name:{name}"),
            "node-name:n".to_owned(),
        ];
        values.map(|value| ("k8s".to_owned(), value)).to_vec()
    };
    assert_eq!(spire.asked(), [selectors("one"), selectors("two")]);
    node.cache.dismiss(&id("a"), "one");
    until("one stream to end", || spire.open() == 1).await;
    assert!(node.cache.find(&id("a")).is_some(), "the other pod has one too");
    // The last one, and who comes after it under the same name.
    node.cache.dismiss(&id("a"), "two");
    node.cache.forget(&id("a"));
    node.cache.introduce(&id("a"), &"three".into(), &facts("three"));
    let _again = fetched(&node, "a").await;
    until("the stream of the last only", || spire.open() == 1).await;
    assert_eq!(spire.asked().last(), Some(&selectors("three")));
}

#[tokio::test]
async fn a_process_gets_its_own_certificate() {
    let (spire, dir) = started();
    let node = node(&dir.path().join("agent.sock"), Api::Workload);
    let (a, b) = (fetched(&node, "a").await, fetched(&node, "b").await);
    handshake(&a, &b).await.unwrap();
    assert_eq!(spire.without_header(), 0);
    let error = node.cache.fetch(&id("stranger")).await.unwrap_err();
    assert!(error.to_string().contains("stranger"), "{error}");
}

/// Lists that come with the certificates count for new connections and for those that are open.
#[tokio::test]
async fn what_spire_takes_back_is_refused_and_cut() {
    let (spire, dir) = started();
    let node = node(&dir.path().join("agent.sock"), Api::Workload);
    let (a, b) = (fetched(&node, "a").await, fetched(&node, "b").await);
    spire.send_lists(vec![spire.list(&[]).unwrap()]);
    let peers = LivePeers::default();
    let proof = shake(&a, &b).await.unwrap();
    let (_, cut) = peers.admit(Arc::new(proof));
    let refused = async || handshake(&a, &b).await.is_err();
    let rejudged = || peers.rejudge(&node.source.bundle().borrow());
    assert_eq!(rejudged(), 0);
    let list = spire.list(&[id("b").as_str()]).unwrap();
    spire.send_lists(vec![list.clone()]);
    let deadline = Instant::now() + PATIENCE;
    while !refused().await {
        assert!(Instant::now() < deadline, "it is still believed");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert_eq!(rejudged(), 1, "the one that is open");
    tokio::time::timeout(PATIENCE, cut.notified()).await.unwrap();
    // What cannot be read takes nothing away. A change that is seen says that it came.
    spire.send_lists(vec![list, "garbage".into()]);
    spire.federate("other.example", spire.root());
    until("the change", || node.source.bundle().borrow().find("other.example").is_some()).await;
    assert!(refused().await);
    spire.send_lists(Vec::new());
    let deadline = Instant::now() + PATIENCE;
    while refused().await {
        assert!(Instant::now() < deadline, "it is believed again");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// SPIRE renews by itself: what it pushes is in use at once, whatever the certificate's age.
#[tokio::test]
async fn what_spire_renews_is_in_use_at_once() {
    for api in [Api::Delegated, Api::Workload] {
        let (spire, dir) = started();
        let node = node(&dir.path().join("agent.sock"), api);
        let first = fetched(&node, "a").await;
        spire.issue(id("a").as_str(), HOUR).unwrap();
        until("the renewed one", || node.cache.find(&id("a")).is_some_and(|svid| svid.serial != first.serial)).await;
    }
}

#[tokio::test]
async fn an_entry_that_is_made_later_is_found() {
    let (spire, dir) = started();
    let node = node(&dir.path().join("agent.sock"), Api::Delegated);
    let handle = node.cache.handle(&id("late"));
    let error = handle.fetch().await.unwrap_err();
    assert!(
        matches!(&error, IdentityError::Unregistered { why, .. } if why.contains("no entry for k8s:ns:ns, k8s:sa:late")),
        "{error}"
    );
    spire.issue(id("late").as_str(), HOUR).unwrap();
    until("its certificate", || handle.load().is_some()).await;
}

#[tokio::test]
async fn while_spire_is_away_or_refuses_what_is_good_serves() {
    let (spire, dir) = started();
    let node = node(&dir.path().join("agent.sock"), Api::Delegated);
    let a = fetched(&node, "a").await;
    spire.away(true);
    tokio::time::sleep(Duration::from_millis(300)).await;
    handshake(&node.cache.find(&id("a")).expect("still there"), &a).await.unwrap();
    let error = node.cache.fetch(&id("b")).await.unwrap_err();
    assert!(matches!(&error, IdentityError::Unavailable(_)), "{error}");
    spire.away(false);
    spire.issue(id("a").as_str(), HOUR).unwrap();
    until("the renewal that was missed", || node.cache.find(&id("a")).is_some_and(|svid| svid.serial != a.serial)).await;
    until("the one that was not there", || node.cache.find(&id("b")).is_some()).await;
    spire.refuse(true);
    let _other = node.cache.handle(&id("other"));
    let told = || node.cache.dump().iter().any(|one| one.state.contains("PermissionDenied: not an authorized delegate"));
    until("the reason to be told", told).await;
    assert!(node.cache.find(&id("a")).is_some());
}

#[tokio::test]
async fn federated_domains_are_believed_by_their_own_roots() {
    let (spire, dir) = started();
    let abroad = Spire::start(&dir.path().join("abroad.sock"), "abroad.example").unwrap();
    let stranger: SpiffeId = "spiffe://abroad.example/ns/ns/sa/x".parse().unwrap();
    abroad.issue(stranger.as_str(), HOUR).unwrap();
    let (here, there) =
        (node(&dir.path().join("agent.sock"), Api::Delegated), node(&dir.path().join("abroad.sock"), Api::Workload));
    let a = fetched(&here, "a").await;
    let x = there.cache.fetch(&stranger).await.unwrap();
    assert!(handshake(&x, &a).await.is_err(), "strangers at first");
    spire.federate("abroad.example", abroad.root());
    abroad.federate("cluster.local", spire.root());
    let begun = Instant::now();
    while let Err(e) = handshake(&x, &a).await {
        assert!(begun.elapsed() < PATIENCE, "{e}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    handshake(&a, &x).await.unwrap();
}

/// A new certificate as soon as the one before is in use, and a root that is replaced on the way.
#[tokio::test]
async fn rotation_under_load_fails_no_handshake() {
    let (spire, dir) = started();
    let nodes = [Api::Delegated, Api::Workload].map(|api| node(&dir.path().join("agent.sock"), api));
    let [one, other] = &nodes;
    fetched(one, "a").await;
    fetched(other, "b").await;
    let mut handshakes = 0;
    for round in 0..8 {
        if round == 2 {
            // As SPIRE does: announced first, used later.
            spire.rotate_root().unwrap();
            for node in &nodes {
                until("both roots", || node.source.bundle().borrow().all().all(|(_, bundle)| bundle.roots().len() == 2)).await;
            }
        }
        let now = || {
            let (a, b) = (one.cache.find(&id("a")), other.cache.find(&id("b")));
            (a.expect("a's certificate"), b.expect("b's certificate"))
        };
        let (old_a, old_b) = now();
        for account in ["a", "b"] {
            spire.issue(id(account).as_str(), HOUR).unwrap();
        }
        let begun = Instant::now();
        loop {
            let (a, b) = now();
            handshake(&a, &b).await.unwrap_or_else(|e| panic!("round {round}, {handshakes} handshakes: {e}"));
            handshakes += 1;
            if a.serial != old_a.serial && b.serial != old_b.serial {
                break;
            }
            assert!(begun.elapsed() < PATIENCE, "round {round}: the renewed ones are not in use");
        }
    }
    spire.forget_old_roots();
    until("the old root to go", || one.source.bundle().borrow().all().all(|(_, bundle)| bundle.roots().len() == 1)).await;
}
