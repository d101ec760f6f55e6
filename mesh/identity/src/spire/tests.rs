use std::time::Duration;

use mesh_proto::spiffe::delegated::{SpiffeId as Named, X509svid, X509svidWithKey};
use mesh_proto::spiffe::workload;
use rcgen::{CertificateRevocationListParams, KeyIdMethod, RevokedCertParams, SerialNumber};

use super::*;
use crate::clock::{SystemClock, TokioClock};
use crate::testing::{TestCa, hours, id, leaf_params};

const WEB: &str = "spiffe://cluster.local/ns/shop/sa/web";
const ASKED: &str = "k8s:ns:shop, k8s:sa:web";
const OURS: &str = "spiffe://cluster.local";

fn shared() -> (Shared, mpsc::UnboundedReceiver<SpiffeId>) {
    shared_by(Arc::new(SystemClock))
}

fn shared_by(clock: Arc<dyn Clock>) -> (Shared, mpsc::UnboundedReceiver<SpiffeId>) {
    let settings = SourceSettings {
        trust_domain: TrustDomain::default(),
        trust_domain_aliases: vec![TrustDomain::parse("old.local").unwrap()],
        lifetime: hours(1),
        unknown: crate::revocation::Unknown::Deny,
    };
    let (renewed, renewals) = mpsc::unbounded_channel();
    let nobody = TrustBundles::new(TrustDomain::default(), Vec::new()).unwrap();
    let bundles = watch::Sender::new(Arc::new(nobody));
    (Shared { settings, clock, state: Mutex::default(), bundles, renewed }, renewals)
}

fn known(shared: &Shared) -> watch::Receiver<Said> {
    shared.state.lock().known.entry(id(WEB)).or_insert_with(|| Known::of(&NOBODY.into())).said().subscribe()
}

/// What a delegate hears: this id, and a certificate for that one.
fn told(ca: &TestCa, name: &str, of: &str, ends: Duration) -> SubscribeToX509sviDsResponse {
    let mut params = leaf_params(&[of]);
    params.not_after = (SystemTime::now() + ends).into();
    let issued = ca.sign(&params);
    let (trust_domain, path) = name.trim_start_matches("spiffe://").split_once('/').unwrap();
    let named = Named { trust_domain: trust_domain.into(), path: format!("/{path}") };
    let svid = X509svid { cert_chain: vec![issued.chain[0].to_vec().into()], id: Some(named), ..X509svid::default() };
    let svid = X509svidWithKey { x509_svid: Some(svid), x509_svid_key: issued.key.secret_der().to_vec().into() };
    SubscribeToX509sviDsResponse { x509_svids: vec![svid], federates_with: Vec::new() }
}

fn error(said: &watch::Receiver<Said>) -> String {
    match &*said.borrow() {
        Said::Failed(error) => error.to_string(),
        Said::Nothing => "nothing".into(),
        Said::Issued(_) => "issued".into(),
    }
}

#[test]
fn only_what_was_asked_for_is_taken() {
    let (shared, mut renewals) = shared();
    let (said, ca) = (known(&shared), TestCa::new("spire"));
    let other = WEB.replace("web", "other");
    let refused = shared.delegated(&id(WEB), NOBODY, ASKED, told(&ca, WEB, &other, hours(1))).unwrap_err();
    assert!(refused.contains("sa/other instead of spiffe://cluster.local/ns/shop/sa/web"), "{refused}");
    assert_eq!(error(&said), "nothing");
    shared.delegated(&id(WEB), NOBODY, ASKED, told(&ca, &other, &other, hours(1))).unwrap();
    assert!(
        error(&said).contains("SPIRE's entries for this pod are spiffe://cluster.local/ns/shop/sa/other"),
        "{}",
        error(&said)
    );
    shared.delegated(&id(WEB), NOBODY, ASKED, SubscribeToX509sviDsResponse::default()).unwrap();
    assert!(error(&said).contains("no entry for k8s:ns:shop, k8s:sa:web"), "{}", error(&said));
    assert!(shared.delegated(&id(WEB), NOBODY, ASKED, told(&ca, WEB, WEB, hours(1))).is_ok());
    assert_eq!(error(&said), "issued");
    assert_eq!(renewals.try_recv().unwrap(), id(WEB), "who was refused before is told");
}

#[tokio::test(start_paused = true)]
async fn news_are_told_once_and_failures_spare_what_is_good() {
    let (shared, mut renewals) = shared_by(Arc::new(TokioClock::starting_at(SystemTime::now())));
    let (said, ca) = (known(&shared), TestCa::new("spire"));
    let first = told(&ca, WEB, WEB, hours(2));
    for _ in 0..2 {
        shared.delegated(&id(WEB), NOBODY, ASKED, first.clone()).unwrap();
    }
    assert!(renewals.try_recv().is_err(), "who asked waits for the first, and the second was the same");
    shared.delegated(&id(WEB), NOBODY, ASKED, told(&ca, WEB, WEB, hours(1))).unwrap();
    assert_eq!(renewals.try_recv().unwrap(), id(WEB));
    shared.fail_all(&IdentityError::Unavailable("away".into()));
    assert_eq!(error(&said), "issued");
    tokio::time::advance(hours(1)).await;
    shared.fail_all(&IdentityError::Unavailable("away".into()));
    assert!(error(&said).contains("away"));
}

/// An entry may name one pod: what it gives is the account's, and with several the one that lasts longest.
#[tokio::test(start_paused = true)]
async fn pods_of_one_identity_share_what_lasts_longest() {
    let (shared, mut renewals) = shared_by(Arc::new(TokioClock::starting_at(SystemTime::now())));
    let (said, ca) = (known(&shared), TestCa::new("spire"));
    let hear = |pod: &str, news| shared.delegated(&id(WEB), pod, ASKED, news).unwrap();
    let ends = || match &*said.borrow() {
        Said::Issued(kept) => kept.not_after.duration_since(SystemTime::now()).unwrap().as_secs().div_ceil(3600),
        _ => 0,
    };
    for pod in ["a", "b"] {
        shared.state.lock().known.get_mut(&id(WEB)).unwrap().put(&pod.into(), Heard::default());
    }
    shared.state.lock().known.get_mut(&id(WEB)).unwrap().remove(NOBODY);
    hear("a", SubscribeToX509sviDsResponse::default());
    assert_eq!(error(&said), "nothing", "the other pod may have one");
    hear("b", SubscribeToX509sviDsResponse::default());
    assert!(error(&said).contains("no entry for k8s:ns:shop, k8s:sa:web"), "{}", error(&said));
    hear("b", told(&ca, WEB, WEB, hours(2)));
    assert_eq!((ends(), renewals.try_recv().unwrap()), (2, id(WEB)));
    hear("a", told(&ca, WEB, WEB, hours(1)));
    assert_eq!((ends(), renewals.try_recv().is_err()), (2, true), "it ends sooner");
    hear("stranger", told(&ca, WEB, WEB, hours(3)));
    assert_eq!(ends(), 2, "nobody asked for that pod");
    // A pod whose entry is gone keeps what it has; one that left takes it along.
    hear("b", SubscribeToX509sviDsResponse::default());
    assert_eq!(ends(), 2);
    shared.hear(&id(WEB), |known, now| {
        known.remove("b");
        known.settle(now)
    });
    assert_eq!((ends(), renewals.try_recv().unwrap()), (1, id(WEB)), "what the other one has");
}

#[test]
fn a_pod_is_asked_for_by_all_that_is_known_of_it() {
    let labels = mesh_model::labels::Labels::of(vec![("app".into(), "web".into()), ("a/b".into(), "".into())]);
    let mut facts = Facts { uid: Some("u-1".into()), name: "web-0".into(), node: "n".into(), labels, making: None };
    let asked = |facts: Option<&Facts>| {
        selectors(&id(WEB), facts).into_iter().map(|s| format!("{}:{}", s.r#type, s.value)).collect::<Vec<_>>().join(" ")
    };
    assert_eq!(
        asked(Some(&facts)),
        "k8s:ns:shop k8s:sa:web k8s:pod-uid:u-1 k8s:pod-name:web-0 k8s:node-name:n k8s:pod-label:a/b: k8s:pod-label:app:web"
    );
    facts.uid = None;
    assert!(!asked(Some(&facts)).contains("uid"));
    let container =
        |name: &str, image: &str, image_id: &str| Container { name: name.into(), image: image.into(), image_id: image_id.into() };
    let owner = Owner { kind: "ReplicaSet".into(), name: "web-1".into(), uid: "r-1".into() };
    let making = Making {
        owners: vec![owner],
        containers: vec![container("app", "reg/web:1", "reg/web@sha256:ab"), container("side", "reg/web:1", "")],
        init_containers: vec![container("init", "reg/init:1", "")],
    };
    let before = asked(Some(&facts));
    facts.making = Some(Arc::new(making));
    let with = asked(Some(&facts));
    assert_eq!(
        with.strip_prefix(&before),
        Some(
            " k8s:container-image:reg/init:1 k8s:container-image:reg/web:1 k8s:container-image:reg/web@sha256:ab \
             k8s:container-name:app k8s:container-name:init k8s:container-name:side k8s:pod-image-count:2 \
             k8s:pod-image:reg/web:1 k8s:pod-image:reg/web@sha256:ab k8s:pod-init-image-count:1 k8s:pod-init-image:reg/init:1 \
             k8s:pod-owner-uid:ReplicaSet:r-1 k8s:pod-owner:ReplicaSet:web-1"
        )
    );
    assert_eq!(asked(None), "k8s:ns:shop k8s:sa:web");
}

fn believed(shared: &Shared, domain: &str) -> usize {
    shared.bundles.borrow().find(domain).map_or(0, |bundle| bundle.roots().len())
}

#[test]
fn each_trust_domain_is_believed_by_its_own_roots() {
    let (shared, _renewals) = shared();
    let [a, b, c] = ["a", "b", "c"].map(|name| TestCa::new(name).der.to_vec());
    let both = [a.clone(), b].concat();
    let news = |ours: &[u8], foreign: &[(&str, &[u8])]| {
        let one = |(domain, der): (&str, &[u8])| (domain.to_owned(), der.to_vec().into());
        let all = foreign.iter().copied().chain([(OURS, ours)]).map(one);
        SubscribeToX509BundlesResponse { ca_certificates: all.collect() }
    };
    shared.roots(&news(&both, &[("spiffe://far.example", &c)])).unwrap();
    let counts = |shared: &Shared| ["cluster.local", "old.local", "far.example", "other.example"].map(|d| believed(shared, d));
    assert_eq!(counts(&shared), [2, 2, 1, 0]);
    assert_eq!(shared.bundles.borrow().find("far.example").unwrap().roots()[0].as_ref(), c);
    // Ours in pieces, or not at all: all stays as it was.
    assert!(shared.roots(&news(&both[..both.len() - 1], &[])).unwrap_err().contains("our roots"));
    let without =
        SubscribeToX509BundlesResponse { ca_certificates: [("spiffe://far.example".to_owned(), c.clone().into())].into() };
    assert!(shared.roots(&without).unwrap_err().contains("cluster.local"));
    assert_eq!(counts(&shared), [2, 2, 1, 0]);
    // A foreign one in pieces is believed no more; the others are.
    shared
        .roots(&news(&a, &[("spiffe://far.example", &c[1..]), ("spiffe://other.example", &c), ("spiffe://not/a/domain", &c)]))
        .unwrap();
    assert_eq!(counts(&shared), [1, 1, 0, 1]);
    // One that is federated under the name of an alias vouches for that name, and ours no more.
    shared.roots(&news(&both, &[("spiffe://old.local", &c)])).unwrap();
    assert_eq!(counts(&shared), [2, 1, 0, 0]);
}

#[test]
fn who_is_given_another_name_is_told_which() {
    let (shared, _renewals) = shared();
    let (said, ca) = (known(&shared), TestCa::new("spire"));
    let elsewhere = "spiffe://far.example/ns/shop/sa/web";
    let issued = ca.sign(&leaf_params(&[elsewhere]));
    let svid = workload::X509svid {
        spiffe_id: elsewhere.into(),
        x509_svid: issued.chain[0].to_vec().into(),
        x509_svid_key: issued.key.secret_der().to_vec().into(),
        bundle: ca.der.to_vec().into(),
        hint: String::new(),
    };
    let why = shared.own(&X509svidResponse { svids: vec![svid], ..X509svidResponse::default() }).unwrap_err();
    assert!(why.contains("no roots of our trust domain cluster.local, but of far.example"), "{why}");
    assert!(error(&said).contains(elsewhere), "{}", error(&said));
    assert_eq!(believed(&shared, "far.example"), 0);
}

/// A list of `ca` with these numbers on it, which counts for so long.
fn list(ca: &TestCa, revoked: &[u64], ends: Duration) -> Vec<u8> {
    let now = SystemTime::now();
    let revoked = revoked.iter().map(|serial| RevokedCertParams {
        serial_number: SerialNumber::from(*serial),
        revocation_time: now.into(),
        reason_code: None,
        invalidity_date: None,
    });
    let params = CertificateRevocationListParams {
        this_update: (now - hours(2)).into(),
        next_update: (now + ends).into(),
        crl_number: SerialNumber::from(1),
        issuing_distribution_point: None,
        revoked_certs: revoked.collect(),
        key_identifier_method: KeyIdMethod::Sha256,
    };
    params.signed_by(ca.issuer()).unwrap().der().to_vec()
}

#[tokio::test(start_paused = true)]
async fn what_is_taken_back_is_as_spire_said_last_that_could_be_read() {
    let (shared, _renewals) = shared_by(Arc::new(TokioClock::starting_at(SystemTime::now())));
    let ca = TestCa::new("spire");
    let bundles = shared.bundles.subscribe();
    let lists = || bundles.borrow().lists().map(|lists| lists.count());
    let tell = |crl: &[Vec<u8>], roots: &[u8]| {
        let svid = workload::X509svid { spiffe_id: WEB.into(), bundle: roots.to_vec().into(), ..workload::X509svid::default() };
        let crl = crl.iter().map(|der| der.clone().into()).collect();
        shared.own(&X509svidResponse { svids: vec![svid], crl, ..X509svidResponse::default() })
    };
    let good = list(&ca, &[7], hours(1));
    let _no_certificate = tell(&[], &ca.der);
    assert_eq!(lists(), None, "none was ever sent");
    let _no_certificate = tell(std::slice::from_ref(&good), &ca.der);
    assert_eq!(lists(), Some(1));
    // Garbage takes nothing away, and neither do new roots, nor such as cannot be read.
    let _no_certificate = tell(&[good.clone(), b"garbage".to_vec()], &ca.der);
    assert_eq!(lists(), Some(1));
    let _no_certificate = tell(std::slice::from_ref(&good), &TestCa::new("next").der);
    assert_eq!(lists(), Some(1));
    assert!(tell(&[good.clone(), list(&ca, &[8], hours(3))], b"garbage").is_err());
    assert_eq!(lists(), Some(2));
    tokio::time::advance(hours(2)).await;
    shared.age();
    assert_eq!(lists(), Some(1), "one is out of date");
    let _no_certificate = tell(&[], &ca.der);
    assert_eq!(lists(), None, "SPIRE says that there are none");
    let _no_certificate = tell(&[b"garbage".to_vec()], &ca.der);
    assert_eq!(lists(), Some(0), "without any list in force nobody is known to be good");
}
