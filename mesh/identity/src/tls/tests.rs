use std::time::Duration;

use mesh_model::TrustDomain;
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex};

use super::*;
use crate::clock::SystemClock;
use crate::crypto::{Compliance, TlsSettings};
use crate::svid::TlsContext;
use crate::testing::{Bundles, TestCa, domain, id, leaf_params, unchecked};

const WEB: &str = "spiffe://cluster.local/ns/shop/sa/web";
const CART: &str = "spiffe://cluster.local/ns/shop/sa/cart";

struct Mesh {
    ca: TestCa,
    bundles: Bundles,
    tls: TlsContext,
}

impl Mesh {
    fn new() -> Self {
        let ca = TestCa::new("root");
        let bundles = Bundles::of(TrustBundles::new(TrustDomain::default(), vec![ca.der.clone()]).unwrap());
        let tls = bundles.context();
        Self { ca, bundles, tls }
    }

    fn svid(&self, uri: &str) -> Svid {
        Svid::new(&id(uri), self.ca.sign(&leaf_params(&[uri])), &self.tls).unwrap()
    }
}

fn soon() -> Instant {
    Instant::now() + Duration::from_secs(10)
}

type Both = (Result<(ClientStream<DuplexStream>, Peer), TlsError>, Result<(ServerStream<DuplexStream>, Peer), TlsError>);

async fn shake(client: &Svid, server: &Svid, expect: &[SpiffeId]) -> Both {
    let (a, b) = duplex(64 * 1024);
    // In TLS 1.3 the client is done first: it must not drop its end before the server has read everything.
    tokio::join!(connect(client, a, expect, soon()), accept(server, b, soon()))
}

#[tokio::test]
async fn both_sides_learn_who_the_other_is() {
    let mesh = Mesh::new();
    let (client, server) = shake(&mesh.svid(WEB), &mesh.svid(CART), &[id(WEB), id(CART)]).await;
    let ((mut client, cart), (mut server, web)) = (client.unwrap(), server.unwrap());
    assert_eq!((web.id.clone(), cart.id), (id(WEB), id(CART)));
    assert_eq!(web.chain.len(), 1);
    for (state, alpn) in [(client.get_ref().1.alpn_protocol(), "client"), (server.get_ref().1.alpn_protocol(), "server")] {
        assert_eq!(state, Some(b"h2".as_slice()), "{alpn}");
    }
    assert_eq!(client.get_ref().1.protocol_version(), Some(rustls::ProtocolVersion::TLSv1_3));
    assert_eq!(server.get_ref().1.server_name(), None);

    client.write_all(b"over the wall").await.unwrap();
    client.shutdown().await.unwrap();
    let mut read = Vec::new();
    server.read_to_end(&mut read).await.unwrap();
    assert_eq!(read, b"over the wall");
}

#[tokio::test]
async fn a_full_write_fits_the_outgoing_buffer() {
    let mesh = Mesh::new();
    let (client, server) = shake(&mesh.svid(WEB), &mesh.svid(CART), &[id(CART)]).await;
    let ((mut client, _), (server, _)) = (client.unwrap(), server.unwrap());
    // Nobody reads: what is taken is what the pipe and the buffer hold.
    let taken = client.write(&vec![0; 200 * 1024]).await.unwrap();
    assert!(taken > 64 * 1024, "{taken}");
    drop(server);
}

#[tokio::test]
async fn no_session_is_ever_resumed() {
    let mesh = Mesh::new();
    let (web, cart) = (mesh.svid(WEB), mesh.svid(CART));
    for _ in 0..3 {
        let (client, server) = shake(&web, &cart, &[id(CART)]).await;
        let ((mut client, _), (mut server, _)) = (client.unwrap(), server.unwrap());
        // A round trip, so that tickets would have arrived.
        server.write_all(b"x").await.unwrap();
        client.read_u8().await.unwrap();
        assert_eq!(client.get_ref().1.handshake_kind(), Some(rustls::HandshakeKind::Full));
    }
}

#[tokio::test]
async fn another_identity_than_expected_is_refused_before_any_byte() {
    let mesh = Mesh::new();
    let (client, server) = shake(&mesh.svid(WEB), &mesh.svid(CART), &[id(WEB)]).await;
    let error = client.unwrap_err();
    assert_eq!(error.reason, Reason::IdentityMismatch);
    assert!(error.detail.contains(WEB) && error.detail.contains(CART), "{error}");
    if let Ok((mut server, _)) = server {
        let mut read = Vec::new();
        let _ = server.read_to_end(&mut read).await;
        assert!(read.is_empty());
    }
}

#[tokio::test]
async fn expecting_nobody_trusts_nobody() {
    let mesh = Mesh::new();
    let (client, _) = shake(&mesh.svid(WEB), &mesh.svid(CART), &[]).await;
    assert_eq!(client.unwrap_err().reason, Reason::IdentityMismatch);
}

#[tokio::test]
async fn a_foreign_trust_domain_is_refused_on_both_sides() {
    let mesh = Mesh::new();
    let strange = "spiffe://strange.example/ns/shop/sa/web";
    let stranger = unchecked(&id(strange), mesh.ca.sign(&leaf_params(&[strange])), &mesh.tls);
    let (_, server) = shake(&stranger, &mesh.svid(CART), &[id(CART)]).await;
    assert_eq!(server.unwrap_err().reason, Reason::TrustDomain);
    let (client, server) = shake(&mesh.svid(WEB), &stranger, &[id(strange)]).await;
    let error = client.unwrap_err();
    assert_eq!(error.reason, Reason::TrustDomain);
    assert!(error.detail.contains("strange.example"), "{error}");
    // The other side hears of it by an alert.
    let error = server.unwrap_err();
    assert_eq!(error.reason, Reason::TlsFailure);
    assert!(error.detail.contains("alert"), "{error}");
}

#[tokio::test]
async fn bad_certificates_are_refused_with_words() {
    let mesh = Mesh::new();
    let other = TestCa::new("other");
    let mut expired = leaf_params(&[WEB]);
    expired.not_after = (SystemTime::now() - Duration::from_mins(1)).into();
    let cases = [
        ("xpired", mesh.ca.sign(&expired)),
        ("no URI", mesh.ca.sign(&leaf_params(&[]))),
        ("2 URI", mesh.ca.sign(&leaf_params(&[WEB, CART]))),
        ("UnknownIssuer", other.sign(&leaf_params(&[WEB]))),
    ];
    for (word, issued) in cases {
        let bad = unchecked(&id(WEB), issued, &mesh.tls);
        let (_, server) = shake(&bad, &mesh.svid(CART), &[id(CART)]).await;
        let error = server.unwrap_err();
        assert_eq!(error.reason, Reason::TlsFailure);
        assert!(error.detail.contains(word), "{word}: {error}");
        let (client, _) = shake(&mesh.svid(CART), &bad, &[id(WEB)]).await;
        assert_eq!(client.unwrap_err().reason, Reason::TlsFailure);
    }
}

#[tokio::test]
async fn the_client_learns_of_its_refusal_with_its_first_read() {
    let mesh = Mesh::new();
    let bad = unchecked(&id(WEB), mesh.ca.sign(&leaf_params(&[])), &mesh.tls);
    let (client, server) = shake(&bad, &mesh.svid(CART), &[id(CART)]).await;
    assert!(server.is_err());
    let (mut client, _) = client.unwrap();
    let (reason, detail) = explain(&client.read_u8().await.unwrap_err());
    assert_eq!(reason, Reason::TlsFailure);
    assert!(detail.contains("alert"), "{detail}");
}

#[tokio::test]
async fn a_client_without_a_certificate_is_refused() {
    let mesh = Mesh::new();
    let web = mesh.svid(WEB);
    let mut anonymous = rustls::ClientConfig::clone(&web.client);
    anonymous.client_auth_cert_resolver = Arc::new(NoCertificate);
    let (a, b) = duplex(64 * 1024);
    let name = ServerName::try_from("nobody").unwrap();
    let cart = mesh.svid(CART);
    let (_client, server) = tokio::join!(TlsConnector::from(Arc::new(anonymous)).connect(name, a), accept(&cart, b, soon()));
    assert_eq!(server.unwrap_err().reason, Reason::TlsFailure);
}

#[derive(Debug)]
struct NoCertificate;
impl rustls::client::ResolvesClientCert for NoCertificate {
    fn resolve(&self, _: &[&[u8]], _: &[rustls::SignatureScheme]) -> Option<Arc<rustls::sign::CertifiedKey>> {
        None
    }
    fn has_certs(&self) -> bool {
        false
    }
}

#[tokio::test(start_paused = true)]
async fn a_half_open_handshake_ends_at_its_deadline() {
    let mesh = Mesh::new();
    let deadline = Instant::now() + Duration::from_secs(3);
    let (a, _silent) = duplex(64 * 1024);
    let error = connect(&mesh.svid(WEB), a, &[id(CART)], deadline).await.unwrap_err();
    assert_eq!(error.reason, Reason::HandshakeTimeout);
    assert_eq!(Instant::now(), deadline);

    let deadline = Instant::now() + Duration::from_secs(3);
    let (mut half, b) = duplex(64 * 1024);
    // A record header that promises a ClientHello and never delivers.
    half.write_all(&[22, 3, 1, 2, 0, 1]).await.unwrap();
    let error = accept(&mesh.svid(CART), b, deadline).await.unwrap_err();
    assert_eq!(error.reason, Reason::HandshakeTimeout);
    assert_eq!(Instant::now(), deadline);
}

#[tokio::test]
async fn garbage_and_hang_ups_are_tls_failures() {
    let mesh = Mesh::new();
    let inputs: [&[u8]; 6] =
        [b"", b"GET / HTTP/1.1\r\n\r\n", &[0; 1024], &[0xff; 1024], &[22, 3, 1, 0, 4, 1, 0, 0, 0], &[21, 3, 3, 0, 2, 2, 40]];
    for input in inputs {
        let (mut peer, io) = duplex(64 * 1024);
        peer.write_all(input).await.unwrap();
        peer.shutdown().await.unwrap();
        let error = accept(&mesh.svid(CART), io, soon()).await.unwrap_err();
        assert_eq!(error.reason, Reason::TlsFailure, "{input:?}: {error}");

        let (mut peer, io) = duplex(64 * 1024);
        peer.write_all(input).await.unwrap();
        peer.shutdown().await.unwrap();
        let error = connect(&mesh.svid(WEB), io, &[id(CART)], soon()).await.unwrap_err();
        assert_eq!(error.reason, Reason::TlsFailure, "{input:?}: {error}");
    }
}

#[tokio::test]
async fn new_bundles_apply_to_old_configurations_and_old_peers() {
    let mesh = Mesh::new();
    let (web, cart) = (mesh.svid(WEB), mesh.svid(CART));
    let (client, server) = shake(&web, &cart, &[id(CART)]).await;
    let (as_seen_by_client, as_seen_by_server) = (client.unwrap().1, server.unwrap().1);

    let next = TestCa::new("next");
    let both = TrustBundles::new(TrustDomain::default(), vec![mesh.ca.der.clone(), next.der.clone()]).unwrap();
    assert!(as_seen_by_client.still_trusted(&both) && as_seen_by_server.still_trusted(&both));

    // The old root is withdrawn: live peers lose trust, and the configurations made before refuse new handshakes.
    let only_next = TrustBundles::new(TrustDomain::default(), vec![next.der.clone()]).unwrap();
    assert!(!as_seen_by_client.still_trusted(&only_next) && !as_seen_by_server.still_trusted(&only_next));
    mesh.bundles.0.send_replace(Arc::new(only_next));
    let (client, _) = shake(&web, &cart, &[id(CART)]).await;
    assert_eq!(client.unwrap_err().reason, Reason::TlsFailure);

    let renamed = TrustBundles::new(domain("renamed.example"), vec![mesh.ca.der.clone()]).unwrap();
    assert!(!as_seen_by_client.still_trusted(&renamed));
}

#[tokio::test]
async fn expiry_after_the_handshake_does_not_end_trust() {
    let mesh = Mesh::new();
    let (client, _server) = shake(&mesh.svid(WEB), &mesh.svid(CART), &[id(CART)]).await;
    let mut peer = client.unwrap().1;
    let bundles = Arc::clone(&mesh.bundles.0.borrow());
    assert!(peer.still_trusted(&bundles));
    // Judged by the date of the handshake only.
    peer.verified_at = peer.not_after + Duration::from_secs(1);
    assert!(!peer.still_trusted(&bundles));
}

/// Istio's `COMPLIANCE_POLICY`, from the word to the wire.
#[cfg(feature = "tls-aws-lc")]
mod compliance {
    use rustls::NamedGroup::{self, X25519, X25519MLKEM768};
    use rustls::{ClientConfig, RootCertStore};

    use super::*;

    fn under(mesh: &Mesh, policy: &str, uri: &str) -> Svid {
        let settings = TlsSettings::from(policy.parse::<Compliance>().unwrap());
        let tls = TlsContext::new(&settings, &mesh.bundles, Arc::new(SystemClock)).unwrap();
        Svid::new(&id(uri), mesh.ca.sign(&leaf_params(&[uri])), &tls).unwrap()
    }

    async fn agree(mesh: &Mesh, near: &str, far: &str, group: NamedGroup) {
        let (client, server) = shake(&under(mesh, near, WEB), &under(mesh, far, CART), &[id(CART)]).await;
        let (client, server) = (client.unwrap().0, server.unwrap().0);
        for agreed in [client.get_ref().1.negotiated_key_exchange_group(), server.get_ref().1.negotiated_key_exchange_group()] {
            assert_eq!(agreed.map(rustls::crypto::SupportedKxGroup::name), Some(group), "{near:?} to {far:?}");
        }
        assert_eq!(server.get_ref().1.protocol_version(), Some(rustls::ProtocolVersion::TLSv1_3));
        let approved = [(near, client.get_ref().1.fips()), (far, server.get_ref().1.fips())];
        assert!(approved.iter().all(|(policy, fips)| *policy != "fips-140-2" || *fips), "{approved:?}");
    }

    /// A peer that has nothing but X25519 is refused.
    async fn refuses_x25519(mesh: &Mesh, policy: &str) {
        let mut old = rustls::crypto::aws_lc_rs::default_provider();
        old.kx_groups = vec![rustls::crypto::aws_lc_rs::kx_group::X25519];
        let old = ClientConfig::builder_with_provider(Arc::new(old)).with_safe_default_protocol_versions().unwrap();
        let old = old.with_root_certificates(RootCertStore::empty()).with_no_client_auth();
        let (a, b) = duplex(64 * 1024);
        let name = ServerName::IpAddress(IpAddr::V4(Ipv4Addr::UNSPECIFIED).into());
        let cart = under(mesh, policy, CART);
        let (client, server) = tokio::join!(TlsConnector::from(Arc::new(old)).connect(name, a), accept(&cart, b, soon()));
        assert!(client.is_err());
        assert_eq!(server.unwrap_err().reason, Reason::TlsFailure);
    }

    #[tokio::test]
    async fn pqc_agrees_on_the_hybrid_with_everyone_or_not_at_all() {
        let mesh = Mesh::new();
        for (near, far) in [("pqc", "pqc"), ("pqc", ""), ("", "pqc")] {
            agree(&mesh, near, far, X25519MLKEM768).await;
        }
        agree(&mesh, "", "", X25519).await;
        refuses_x25519(&mesh, "pqc").await;
    }

    #[cfg(feature = "tls-fips")]
    #[tokio::test]
    async fn fips_agrees_on_what_is_approved_or_not_at_all() {
        let mesh = Mesh::new();
        for (near, far) in [("fips-140-2", "fips-140-2"), ("fips-140-2", ""), ("", "fips-140-2")] {
            agree(&mesh, near, far, NamedGroup::secp256r1).await;
        }
        for (near, far) in [("fips-140-2", "pqc"), ("pqc", "fips-140-2")] {
            agree(&mesh, near, far, X25519MLKEM768).await;
        }
        refuses_x25519(&mesh, "fips-140-2").await;
        let here = under(&mesh, "fips-140-2", WEB);
        assert!(here.client.fips() && here.server.fips());
        // Without the policy the build offers what every build offers.
        let elsewhere = under(&mesh, "", WEB);
        assert!(!elsewhere.client.fips() && !elsewhere.server.fips());
    }

    #[cfg(not(feature = "tls-fips"))]
    #[test]
    fn fips_is_refused_without_the_module() {
        let settings = TlsSettings::from("fips-140-2".parse::<Compliance>().unwrap());
        let error = settings.crypto().unwrap_err().to_string();
        assert!(error.contains("--features tls-fips"), "{error}");
    }

    #[test]
    fn words_are_istios() {
        assert!("fips".parse::<Compliance>().is_err() && "PQC".parse::<Compliance>().is_err());
    }
}
