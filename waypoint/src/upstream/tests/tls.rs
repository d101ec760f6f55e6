//! TLS and PROXY protocol towards endpoints.
use super::*;
use mesh_model::l7::destination::{ClientCertificate, KeyPair as Pair, ProxyVersion, RevocationLists, Roots, UpstreamTls};
use rcgen::{BasicConstraints, CertificateParams, CertificateRevocationListParams, IsCa, Issuer, KeyIdMethod, KeyPair};
use rcgen::{RevokedCertParams, SanType};
use rustls::server::WebPkiClientVerifier;
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use tokio::io::AsyncReadExt as _;

struct Authority {
    pem: String,
    issuer: Issuer<'static, KeyPair>,
}
impl Authority {
    fn new() -> Self {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.distinguished_name.push(rcgen::DnType::CommonName, format!("authority {:x}", rand::random::<u64>()));
        let pem = params.self_signed(&key).unwrap().pem();
        Self { pem, issuer: Issuer::new(params, key) }
    }
    fn issue(&self, names: Vec<SanType>) -> Pair {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::default();
        params.subject_alt_names = names;
        params.serial_number = Some(SERIAL.into());
        let chain = params.signed_by(&key, &self.issuer).unwrap().pem();
        Pair { chain: chain.into(), key: key.serialize_pem().into() }
    }
    /// PEM of a list with this certificate, that is in date or no more.
    fn list(&self, serial: u64, in_date: bool) -> String {
        self.older_list(serial, 2, in_date)
    }
    /// The same, of so many hours ago.
    fn older_list(&self, serial: u64, hours: u32, in_date: bool) -> String {
        let (now, hour) = (std::time::SystemTime::now(), Duration::from_hours(1));
        let revoked = RevokedCertParams {
            serial_number: serial.into(),
            revocation_time: now.into(),
            reason_code: None,
            invalidity_date: None,
        };
        let params = CertificateRevocationListParams {
            this_update: (now - hour * hours).into(),
            next_update: if in_date { now + hour } else { now - hour }.into(),
            crl_number: 1u64.into(),
            issuing_distribution_point: None,
            revoked_certs: vec![revoked],
            key_identifier_method: KeyIdMethod::Sha256,
        };
        params.signed_by(&self.issuer).unwrap().pem().unwrap()
    }
}
/// Number of every certificate.
const SERIAL: u64 = 7;
fn dns(name: &str) -> SanType {
    SanType::DnsName(name.try_into().unwrap())
}

/// What a TLS server saw of the last handshake.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Seen {
    sni: Option<String>,
    alpn: Option<String>,
    client: bool,
}

/// An HTTPS server with a certificate for `web.example` and a SPIFFE id; asks for a client certificate when told.
async fn https(ca: &Authority, demand: bool) -> (SocketAddr, Arc<Mutex<Seen>>) {
    let uri = SanType::URI("spiffe://x/ns/a/sa/b".try_into().unwrap());
    let pair = ca.issue(vec![dns("web.example"), uri]);
    let chain: Vec<_> = CertificateDer::pem_slice_iter(pair.chain.as_bytes()).map(Result::unwrap).collect();
    let key = PrivateKeyDer::from_pem_slice(pair.key.as_bytes()).unwrap();
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let builder =
        rustls::ServerConfig::builder_with_provider(Arc::clone(&provider)).with_safe_default_protocol_versions().unwrap();
    let builder = if demand {
        let mut roots = rustls::RootCertStore::empty();
        roots.add(CertificateDer::from_pem_slice(ca.pem.as_bytes()).unwrap()).unwrap();
        builder.with_client_cert_verifier(WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider).build().unwrap())
    } else {
        builder.with_no_client_auth()
    };
    let mut config = builder.with_single_cert(chain, key).unwrap();
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    let acceptor = tokio_rustls::TlsAcceptor::from(Arc::new(config));
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addr = listener.local_addr().unwrap();
    let seen = Arc::<Mutex<Seen>>::default();
    let s = Arc::clone(&seen);
    tokio::spawn(async move {
        loop {
            let (tcp, _) = listener.accept().await.unwrap();
            let (acceptor, s) = (acceptor.clone(), Arc::clone(&s));
            tokio::spawn(async move {
                let Ok(tls) = acceptor.accept(tcp).await else { return };
                let of = tls.get_ref().1;
                *s.lock() = Seen {
                    sni: of.server_name().map(ToOwned::to_owned),
                    alpn: of.alpn_protocol().map(|p| String::from_utf8_lossy(p).into_owned()),
                    client: of.peer_certificates().is_some(),
                };
                let service = hyper::service::service_fn(|request: Request<Incoming>| async move {
                    Ok::<_, Infallible>(Response::new(Full::new(Bytes::from(format!("{:?}", request.version())))))
                });
                let builder = hyper_util::server::conn::auto::Builder::new(TokioExecutor::new());
                let _ = builder.serve_connection(TokioIo::new(tls), service).await;
            });
        }
    });
    (addr, seen)
}
fn simple(ca: &Authority) -> UpstreamTls {
    UpstreamTls {
        sni: Some("web.example".into()),
        sans: Vec::new(),
        roots: Roots::Pem(ca.pem.as_str().into()),
        crl: None,
        client: None,
        skip_verify: false,
        alpn: Vec::new(),
    }
}
async fn over(world: &mut World, tls: UpstreamTls, http2: bool) -> Result<Bytes, UpstreamError> {
    world.policy(TrafficPolicy { tls: Some(Arc::new(tls)), ..TrafficPolicy::default() });
    fetch(&world.cluster(), http2).await.map(|(_, body)| body)
}

#[tokio::test]
async fn both_protocols_are_offered_as_they_are_spoken() {
    let ca = Authority::new();
    let (addr, seen) = https(&ca, false).await;
    let mut world = World::new();
    world.endpoint("a", addr);
    assert_eq!(&over(&mut world, simple(&ca), false).await.unwrap()[..], b"HTTP/1.1");
    assert_eq!(*seen.lock(), Seen { sni: Some("web.example".into()), alpn: Some("http/1.1".into()), client: false });
    assert_eq!(&over(&mut world, simple(&ca), true).await.unwrap()[..], b"HTTP/2.0");
    assert_eq!(seen.lock().alpn.as_deref(), Some("h2"));
    // A raw stream offers nothing.
    let cluster = world.cluster();
    let stream = connect(&cluster, &pick(&cluster), None, None).await.unwrap();
    assert!(matches!(&stream, Carrier::Straight(Stream::Tls(io, _)) if io.get_ref().1.alpn_protocol().is_none()));
}

#[tokio::test]
async fn only_who_was_meant_is_believed() {
    let (ca, other) = (Authority::new(), Authority::new());
    let (addr, seen) = https(&ca, false).await;
    let mut world = World::new();
    world.endpoint("a", addr);
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("ca.pem");
    std::fs::write(&file, &ca.pem).unwrap();
    let of_file = Roots::File(file.to_str().unwrap().into());
    let named = |sni: &str| UpstreamTls { sni: Some(sni.into()), ..simple(&ca) };
    let sans = |names: &[&str]| UpstreamTls { sans: names.iter().map(|n| Arc::from(*n)).collect(), ..named("other.example") };
    let good = [
        UpstreamTls { roots: of_file, ..simple(&ca) },
        sans(&["nobody.example", "web.example"]),
        sans(&["spiffe://x/ns/a/sa/b"]),
        UpstreamTls { skip_verify: true, roots: Roots::System, ..named("other.example") },
    ];
    for tls in good {
        over(&mut world, tls.clone(), false).await.unwrap_or_else(|e| panic!("{tls:?}: {e}"));
    }
    let bad = [
        named("other.example"),
        named("not a name"),
        sans(&["nobody.example"]),
        sans(&["spiffe://x/ns/a/sa/c"]),
        UpstreamTls { roots: Roots::Pem(other.pem.as_str().into()), ..simple(&ca) },
        UpstreamTls { roots: Roots::System, ..simple(&ca) },
        UpstreamTls { roots: Roots::File("/no/such/file".into()), ..simple(&ca) },
        UpstreamTls { roots: Roots::Pem("nothing".into()), ..simple(&ca) },
        UpstreamTls { roots: Roots::Missing("ConfigMap ca is not there".into()), ..simple(&ca) },
        UpstreamTls { client: Some(ClientCertificate::Missing("Secret is not there".into())), ..simple(&ca) },
    ];
    *seen.lock() = Seen::default();
    for tls in bad {
        let error = over(&mut world, tls.clone(), false).await.expect_err(&format!("{tls:?}"));
        assert_eq!(error.failure, Failure::Connect, "{tls:?}");
        assert!(error.detail.starts_with("TLS error: "), "{error}");
    }
}

#[tokio::test]
async fn a_certificate_that_was_taken_back_is_not_believed() {
    let (ca, other) = (Authority::new(), Authority::new());
    let (addr, _) = https(&ca, false).await;
    let mut world = World::new();
    world.endpoint("a", addr);
    let dir = tempfile::tempdir().unwrap();
    let file = |name: &str, text: &str| {
        let path = dir.path().join(name);
        std::fs::write(&path, text).unwrap();
        RevocationLists::File(path.to_str().unwrap().into())
    };
    let pem = |text: String| RevocationLists::Pem(text.into());
    let with = |lists: RevocationLists| UpstreamTls { crl: Some(lists), ..simple(&ca) };
    let sans = |names: &[&str], tls: UpstreamTls| UpstreamTls { sans: names.iter().map(|n| Arc::from(*n)).collect(), ..tls };
    let good = ca.list(SERIAL + 1, true);
    let revoked = ca.list(SERIAL, true);
    for tls in [
        with(pem(good.clone())),
        with(file("good", &good)),
        with(pem(other.list(SERIAL, true) + &good)),
        with(pem(ca.older_list(SERIAL, 3, true) + &good)),
        sans(&["nobody.example", "web.example"], with(pem(good.clone()))),
        sans(&["spiffe://x/ns/a/sa/b"], with(pem(good.clone()))),
        UpstreamTls { skip_verify: true, ..with(pem(revoked.clone())) },
    ] {
        over(&mut world, tls.clone(), false).await.unwrap_or_else(|e| panic!("{tls:?}: {e}"));
    }
    for (tls, word) in [
        (with(pem(revoked.clone())), "Revoked"),
        (with(file("revoked", &revoked)), "Revoked"),
        (with(pem(ca.older_list(SERIAL + 1, 3, true) + &revoked)), "Revoked"),
        (sans(&["web.example"], with(pem(revoked.clone()))), "Revoked"),
        (sans(&["spiffe://x/ns/a/sa/b"], with(pem(revoked))), "Revoked"),
        (with(pem(ca.list(SERIAL + 1, false))), "CrlExpired"),
        (with(pem(other.list(SERIAL + 1, true))), "UnknownRevocationStatus"),
        (with(RevocationLists::File("/no/such/file".into())), "/no/such/file"),
        (with(file("empty", "")), "revocation lists"),
        (with(pem("nothing".into())), "revocation lists"),
        // And its name is asked for as ever.
        (UpstreamTls { sni: Some("other.example".into()), ..with(pem(good.clone())) }, "not valid for name"),
        (sans(&["nobody.example"], with(pem(good.clone()))), "NotValidForName"),
        (UpstreamTls { roots: Roots::Pem(other.pem.as_str().into()), ..with(pem(good)) }, "UnknownIssuer"),
    ] {
        let error = over(&mut world, tls.clone(), false).await.expect_err(&format!("{tls:?}"));
        assert_eq!(error.failure, Failure::Connect, "{tls:?}");
        assert!(error.detail.starts_with("TLS error: ") && error.detail.contains(word), "{word}: {error}");
    }
}

#[tokio::test]
async fn a_client_certificate_is_shown() {
    let ca = Authority::new();
    let (addr, seen) = https(&ca, true).await;
    let mut world = World::new();
    world.endpoint("a", addr);
    let client = ClientCertificate::Pem(ca.issue(vec![dns("us.example")]));
    over(&mut world, UpstreamTls { client: Some(client), ..simple(&ca) }, false).await.unwrap();
    assert!(seen.lock().client);
    // Without one the server ends the connection, in TLS 1.3 only after our side is done.
    assert!(over(&mut world, simple(&ca), false).await.is_err());
}

#[tokio::test]
async fn without_a_name_of_its_own_the_requests_host_is_the_name() {
    let ca = Authority::new();
    let (addr, seen) = https(&ca, false).await;
    let mut world = World::new();
    world.endpoint("a", addr);
    let tls = UpstreamTls { sni: None, ..simple(&ca) };
    world.policy(TrafficPolicy { tls: Some(Arc::new(tls)), ..TrafficPolicy::default() });
    let cluster = world.cluster();
    let ask = |host: &'static str| {
        let cluster = Arc::clone(&cluster);
        async move {
            let request = Request::get("/").header("host", host).body(Body::Empty).unwrap();
            send(&cluster, &pick(&cluster), request, SendOptions::default()).await.map(|r| r.status())
        }
    };
    ask("web.example:8443").await.unwrap();
    assert_eq!(seen.lock().sni.as_deref(), Some("web.example"));
    // Not on the connection of the first.
    assert_eq!(ask("other.example").await.unwrap_err().failure, Failure::Connect);
    // Whose certificate is believed is another question.
    let tls = UpstreamTls { sni: None, sans: vec!["web.example".into()], ..simple(&ca) };
    world.policy(TrafficPolicy { tls: Some(Arc::new(tls)), ..TrafficPolicy::default() });
    let request = Request::get("/").header("host", "tenant.example").body(Body::Empty).unwrap();
    let cluster = world.cluster();
    send(&cluster, &pick(&cluster), request, SendOptions::default()).await.unwrap();
    assert_eq!(seen.lock().sni.as_deref(), Some("tenant.example"));
}

#[tokio::test]
async fn the_proxy_protocol_comes_first_and_connections_are_not_shared_between_clients() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addr = listener.local_addr().unwrap();
    let heads = Arc::<Mutex<Vec<String>>>::default();
    let h = Arc::clone(&heads);
    tokio::spawn(async move {
        loop {
            let (mut tcp, _) = listener.accept().await.unwrap();
            let h = Arc::clone(&h);
            tokio::spawn(async move {
                let mut head = Vec::new();
                while !head.ends_with(b"\r\n") {
                    head.push(tcp.read_u8().await.unwrap());
                }
                h.lock().push(String::from_utf8(head).unwrap());
                let service = hyper::service::service_fn(|_: Request<Incoming>| async {
                    Ok::<_, Infallible>(Response::new(Full::new(Bytes::new())))
                });
                let _ = hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(tcp), service).await;
            });
        }
    });
    let mut world = World::new();
    world.endpoint("a", addr);
    world.policy(TrafficPolicy { proxy_protocol: Some(ProxyVersion::V1), ..TrafficPolicy::default() });
    let cluster = world.cluster();
    for client in ["10.0.0.1:1000", "10.0.0.1:1000", "10.0.0.2:2000"] {
        let how = SendOptions { client: Some(client.parse().unwrap()), ..SendOptions::default() };
        send(&cluster, &pick(&cluster), get(), how).await.unwrap();
        settle().await;
    }
    let (ip, port) = (addr.ip(), addr.port());
    let want = [format!("PROXY TCP4 10.0.0.1 {ip} 1000 {port}\r\n"), format!("PROXY TCP4 10.0.0.2 {ip} 2000 {port}\r\n")];
    assert_eq!(*heads.lock(), want);
}
