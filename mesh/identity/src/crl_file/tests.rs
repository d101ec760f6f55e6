use std::time::{Duration, SystemTime};

use mesh_model::{Reason, TrustDomain};
use rcgen::{CertificateRevocationListParams, KeyIdMethod, RevokedCertParams, SerialNumber};
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex};
use tokio::time::Instant;

use super::*;
use crate::clock::SystemClock;
use crate::crypto::TlsSettings;
use crate::live::LivePeers;
use crate::look::LOOK;
use crate::svid::{Svid, TlsContext};
use crate::testing::{Bundles, TestCa, hours, id, leaf_params};
use crate::tls::{ClientStream, Peer, ServerStream, TlsError, accept, connect};

const WEB: &str = "spiffe://cluster.local/ns/shop/sa/web";
const CART: &str = "spiffe://cluster.local/ns/shop/sa/cart";
const WEB_NO: u64 = 11;
const CART_NO: u64 = 12;
const MIDDLE_NO: u64 = 13;

type Client = Result<(ClientStream<DuplexStream>, Peer), TlsError>;
type Server = Result<(ServerStream<DuplexStream>, Peer), TlsError>;

/// A root, an authority below it that signs workloads, and a file for their lists.
struct Fixture {
    root: TestCa,
    middle: TestCa,
    source: Arc<Bundles>,
    dir: tempfile::TempDir,
}

impl Fixture {
    fn new() -> Self {
        let root = TestCa::new("root");
        let middle = root.intermediate_numbered("middle", MIDDLE_NO);
        let source = Arc::new(Bundles::of(TrustBundles::new(TrustDomain::default(), vec![root.der.clone()]).unwrap()));
        Self { root, middle, source, dir: tempfile::tempdir().unwrap() }
    }
    fn path(&self) -> PathBuf {
        self.dir.path().join("crl.pem")
    }
    fn write(&self, text: &str) {
        std::fs::write(self.dir.path().join("next"), text).unwrap();
        std::fs::rename(self.dir.path().join("next"), self.path()).unwrap();
    }
    /// TLS that follows the file.
    fn tls(&self, unknown: Unknown) -> TlsContext {
        let source = over(self.source.clone(), CrlFile { path: self.path(), unknown }, &Handle::current());
        TlsContext::new(&TlsSettings::default(), source.as_ref(), Arc::new(SystemClock)).unwrap()
    }
    fn svid(&self, uri: &str, serial: u64, tls: &TlsContext) -> Svid {
        let mut params = leaf_params(&[uri]);
        params.serial_number = Some(SerialNumber::from(serial));
        let mut issued = self.middle.sign(&params);
        issued.chain.push(self.middle.der.clone());
        Svid::new(&id(uri), issued, tls).unwrap()
    }
    async fn shake(&self, tls: &TlsContext) -> (Client, Server) {
        let (web, cart) = (self.svid(WEB, WEB_NO, tls), self.svid(CART, CART_NO, tls));
        let (a, b) = duplex(64 * 1024);
        let (expect, soon) = ([id(CART)], Instant::now() + Duration::from_secs(10));
        tokio::join!(connect(&web, a, &expect, soon), accept(&cart, b, soon))
    }
}

fn list(ca: &TestCa, revoked: &[u64], valid: bool) -> String {
    let now = SystemTime::now();
    list_until(ca, revoked, if valid { now + hours(1) } else { now - hours(1) })
}

fn list_until(ca: &TestCa, revoked: &[u64], until: SystemTime) -> String {
    let now = SystemTime::now();
    let revoked = revoked.iter().map(|serial| RevokedCertParams {
        serial_number: SerialNumber::from(*serial),
        revocation_time: now.into(),
        reason_code: None,
        invalidity_date: None,
    });
    let params = CertificateRevocationListParams {
        this_update: (now - hours(2)).into(),
        next_update: until.into(),
        crl_number: SerialNumber::from(1),
        issuing_distribution_point: None,
        revoked_certs: revoked.collect(),
        key_identifier_method: KeyIdMethod::Sha256,
    };
    params.signed_by(ca.issuer()).unwrap().pem().unwrap()
}

/// Who refuses: nobody, the side that connects, or the one that accepts.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Refuses {
    Nobody,
    Client,
    Server,
}

fn outcome(client: &Client, server: &Server) -> Refuses {
    let reason = |error: &TlsError| error.reason;
    match (client.as_ref().err().map(reason), server.as_ref().err().map(reason)) {
        (None, None) => Refuses::Nobody,
        (Some(Reason::CertRevoked), Some(Reason::TlsFailure)) => Refuses::Client,
        (None, Some(Reason::CertRevoked)) => Refuses::Server,
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn every_certificate_of_the_chain_is_looked_up() {
    use Unknown::{Allow, Deny};
    let f = Fixture::new();
    let lists = |root: &[u64], middle: &[u64], valid| list(&f.root, root, valid) + &list(&f.middle, middle, valid);
    let stranger = list(&TestCa::new("middle"), &[CART_NO], true);
    let cases = [
        ("all lists, nothing in them", lists(&[], &[], true), Deny, Refuses::Nobody),
        ("others are revoked", lists(&[CART_NO], &[MIDDLE_NO], true), Deny, Refuses::Nobody),
        ("the server is", lists(&[], &[CART_NO], true), Deny, Refuses::Client),
        ("the server is, and unknown is allowed", lists(&[], &[CART_NO], true), Allow, Refuses::Client),
        ("the client is", lists(&[], &[WEB_NO], true), Deny, Refuses::Server),
        ("the authority is", lists(&[MIDDLE_NO], &[], true), Deny, Refuses::Client),
        ("no list of the root", list(&f.middle, &[], true), Deny, Refuses::Client),
        ("no list of the root, allowed", list(&f.middle, &[], true), Allow, Refuses::Nobody),
        ("out of date", lists(&[], &[], false), Deny, Refuses::Client),
        ("out of date, allowed", lists(&[], &[], false), Allow, Refuses::Nobody),
        ("out of date, and the server is in it", lists(&[], &[CART_NO], false), Allow, Refuses::Client),
        ("not read", "no list at all".into(), Deny, Refuses::Client),
        ("not read, allowed", "no list at all".into(), Allow, Refuses::Nobody),
        // Somebody else's word, under the authority's name.
        ("forged", lists(&[], &[], true) + &stranger, Deny, Refuses::Nobody),
    ];
    for (name, text, unknown, expected) in cases {
        f.write(&text);
        let (client, server) = f.shake(&f.tls(unknown)).await;
        assert_eq!(outcome(&client, &server), expected, "{name}: {:?}", client.err());
    }
}

#[tokio::test]
async fn the_file_is_followed_and_ends_live_connections() {
    let f = Fixture::new();
    f.write(&(list(&f.root, &[], true) + &list(&f.middle, &[], true)));
    let tls = f.tls(Unknown::Deny);
    let (client, server) = f.shake(&tls).await;
    let ((client, cart), (mut server, web)) = (client.unwrap(), server.unwrap());
    let (peers, callers) = (Arc::new(LivePeers::default()), LivePeers::default());
    let mut held = peers.hold(client, cart, &tls).unwrap();
    let (_, not_cut) = callers.admit(Arc::new(web));
    server.write_all(b"before").await.unwrap();
    let mut bytes = [0; 6];
    held.read_exact(&mut bytes).await.unwrap();
    assert_eq!((&bytes, peers.list().len()), (b"before", 1));

    let mut bundles = tls.bundles();
    bundles.mark_unchanged();
    let reader = tokio::spawn(async move { held.read(&mut [0; 1]).await.map_err(|error| error.kind()) });
    f.write(&(list(&f.root, &[], true) + &list(&f.middle, &[CART_NO], true)));
    tokio::time::timeout(Duration::from_secs(10), bundles.changed()).await.expect("the file is read again").unwrap();
    let now = tls.trusted();
    assert_eq!((peers.rejudge(&now), callers.rejudge(&now)), (1, 0), "only the server's certificate was taken back");
    assert_eq!(reader.await.unwrap(), Err(std::io::ErrorKind::ConnectionAborted));
    assert!(peers.list().is_empty(), "a dropped stream is no peer");
    assert!(tokio::time::timeout(Duration::from_millis(20), not_cut.notified()).await.is_err());
    let (client, server) = f.shake(&tls).await;
    assert_eq!(outcome(&client, &server), Refuses::Client);

    // What cannot be read, or went, takes nothing out of force.
    f.write("no list at all");
    tokio::time::sleep(LOOK * 2).await;
    std::fs::remove_file(f.path()).unwrap();
    tokio::time::sleep(LOOK * 2).await;
    let (client, server) = f.shake(&tls).await;
    assert_eq!(outcome(&client, &server), Refuses::Client);
    // New roots come with the lists of now.
    let bundles = TrustBundles::clone(&f.source.0.borrow());
    f.source.0.send_replace(Arc::new(bundles));
    let mut seen = tls.bundles();
    tokio::time::timeout(Duration::from_secs(10), seen.changed()).await.expect("the new bundles").unwrap();
    let (client, server) = f.shake(&tls).await;
    assert_eq!(outcome(&client, &server), Refuses::Client);
}

#[tokio::test]
async fn a_list_that_goes_out_of_date_ends_what_it_let_in() {
    let f = Fixture::new();
    let soon = SystemTime::now() + Duration::from_secs(4);
    f.write(&(list(&f.root, &[], true) + &list_until(&f.middle, &[], soon)));
    let (deny, allow) = (f.tls(Unknown::Deny), f.tls(Unknown::Allow));
    let (client, server) = f.shake(&deny).await;
    let ((_client, cart), (_server, web)) = (client.unwrap(), server.unwrap());
    let peers = LivePeers::default();
    peers.admit(Arc::new(cart));
    peers.admit(Arc::new(web));
    let mut bundles = deny.bundles();
    bundles.mark_unchanged();
    assert_eq!(peers.rejudge(&deny.trusted()), 0);
    tokio::time::timeout(Duration::from_secs(15), bundles.changed()).await.expect("its date is noticed").unwrap();
    assert_eq!(peers.rejudge(&deny.trusted()), 2);
    let (client, server) = f.shake(&deny).await;
    assert_eq!(outcome(&client, &server), Refuses::Client, "the proof of before is not used again");
    let (client, server) = f.shake(&allow).await;
    assert_eq!(outcome(&client, &server), Refuses::Nobody);

    bundles.mark_unchanged();
    f.write(&(list(&f.root, &[], true) + &list(&f.middle, &[], true)));
    tokio::time::timeout(Duration::from_secs(10), bundles.changed()).await.expect("the next list is read").unwrap();
    let (client, server) = f.shake(&deny).await;
    assert_eq!(outcome(&client, &server), Refuses::Nobody);
}

#[tokio::test]
async fn a_peer_that_lost_trust_during_its_handshake_is_not_held() {
    let f = Fixture::new();
    let nobody = TrustBundles::new(TrustDomain::default(), Vec::new()).unwrap();
    let tls = TlsContext::new(&TlsSettings::default(), f.source.as_ref(), Arc::new(SystemClock)).unwrap();
    let (client, _server) = f.shake(&tls).await;
    let (stream, peer) = client.unwrap();
    f.source.0.send_replace(Arc::new(nobody));
    let peers = Arc::new(LivePeers::default());
    assert_eq!(peers.hold(stream, peer, &tls).unwrap_err().reason, Reason::Revoked);
    assert!(peers.list().is_empty());
}

#[test]
fn words() {
    assert_eq!(("deny".parse(), "allow".parse()), (Ok(Unknown::Deny), Ok(Unknown::Allow)));
    assert!("".parse::<Unknown>().is_err() && "DENY".parse::<Unknown>().is_err());
}
