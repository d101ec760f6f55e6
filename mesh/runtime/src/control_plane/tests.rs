use super::*;
use rcgen::{CertificateParams, KeyPair};

fn settings(address: &str) -> Settings {
    Settings { address: address.into(), roots: Roots::System, alt_hostname: None, token: Token::None, headers: Vec::new() }
}
fn crypto() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::aws_lc_rs::default_provider())
}

#[test]
fn addresses_are_https_http_or_a_socket() {
    let plane = |address: &str| ControlPlane::new(settings(address), crypto());
    for good in [
        "https://istiod.istio-system.svc:15012",
        "istiod.istio-system.svc:15012",
        "http://localhost:15010",
        "https://[::1]:15012",
        "unix:/run/a.sock",
        "unix:///run/a.sock",
    ] {
        plane(good).unwrap_or_else(|e| panic!("{good}: {e}"));
    }
    for bad in ["", "ftp://x:1", "unix:relative", "https://", "https://a b:1"] {
        assert!(matches!(plane(bad), Err(ControlError::Setting(_))), "{bad:?}");
    }
    let at = |address: &str| match &plane(address).unwrap().inner.to {
        Address::Unix(path) => path.display().to_string(),
        Address::Tcp { host, port, tls, .. } => format!("{host} {port} {}", tls.is_some()),
    };
    assert_eq!(at("unix:///run/a.sock"), "/run/a.sock");
    assert_eq!(at("https://a.b"), "a.b 443 true");
    assert_eq!(at("istiod:15012"), "istiod 15012 true", "as Istio writes it");
    assert_eq!(at("http://[::1]:5"), "[::1] 5 false");
}

#[test]
fn a_token_is_read_for_every_request_and_never_shown() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("token");
    let with = |token| ControlPlane::new(Settings { token, ..settings("http://x:1") }, crypto()).unwrap();
    let sent = |plane: &ControlPlane| {
        plane.request(()).map(|r| r.metadata().get("authorization").map(|v| v.to_str().unwrap().to_owned()))
    };
    let (must, may) = (with(Token::File(path.clone())), with(Token::IfThere(path.clone())));
    assert!(matches!(sent(&must), Err(ControlError::Token(_))));
    assert_eq!(sent(&may), Ok(None));
    for text in ["one", "two"] {
        std::fs::write(&path, format!("{text}\n")).unwrap();
        assert_eq!(sent(&must), Ok(Some(format!("Bearer {text}"))));
        assert_eq!(sent(&may), Ok(Some(format!("Bearer {text}"))));
    }
    std::fs::write(&path, "a\u{7}b").unwrap();
    assert!(matches!(sent(&must), Err(ControlError::Token(_))));
    let literal = with(Token::Literal("secret".into()));
    assert_eq!(sent(&literal), Ok(Some("Bearer secret".into())));
    assert!(!format!("{literal:?}").contains("secret"));
}

#[test]
fn headers_that_cannot_be_sent_are_refused_at_start() {
    for (key, value) in [("a b", "x"), ("", "x"), ("x", "a\nb")] {
        let settings = Settings { headers: vec![(key.into(), value.into())], ..settings("http://x:1") };
        assert!(ControlPlane::new(settings, crypto()).is_err(), "{key:?}: {value:?}");
    }
    let settings = Settings { headers: vec![("X_Foo".into(), "v".into())], ..settings("http://x:1") };
    let request = ControlPlane::new(settings, crypto()).unwrap().request(()).unwrap();
    assert_eq!(request.metadata().get("x_foo").unwrap(), "v");
}

#[test]
fn roots_are_a_file_a_text_or_the_machines() {
    let key = KeyPair::generate().unwrap();
    let pem = CertificateParams::new(["x".into()]).unwrap().self_signed(&key).unwrap().pem();
    assert_eq!("SYSTEM".parse(), Ok(Roots::System));
    assert_eq!(pem.parse(), Ok(Roots::Pem(pem.clone())));
    assert_eq!("./a.pem".parse(), Ok(Roots::File("./a.pem".into())));
    assert_eq!(Roots::Pem(format!("{pem}{pem}")).load().unwrap().len(), 2);
    for bad in [Roots::Pem("-----BEGIN".into()), Roots::Pem(pem.replace("CERT", "KEY")), Roots::File("/not/there".into())] {
        assert!(matches!(bad.load(), Err(ControlError::Roots(_))), "{bad:?}");
    }
}

#[test]
fn a_server_is_believed_by_the_name_dialled_or_the_alternative() {
    let root_key = KeyPair::generate().unwrap();
    let mut params = CertificateParams::default();
    params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    let root = params.self_signed(&root_key).unwrap();
    let issuer = rcgen::Issuer::new(params, root_key);
    let key = KeyPair::generate().unwrap();
    let leaf = CertificateParams::new(["istiod.svc".into()]).unwrap().signed_by(&key, &issuer).unwrap();
    let mut roots = RootCertStore::empty();
    roots.add(root.der().clone()).unwrap();
    let verifier = WebPkiServerVerifier::builder_with_provider(Arc::new(roots), crypto()).build().unwrap();
    let judge = |dialled: &'static str, alt: Option<&'static str>| {
        let verifier = EitherName { verifier: Arc::clone(&verifier), alt: alt.map(|alt| ServerName::try_from(alt).unwrap()) };
        let name = ServerName::try_from(dialled).unwrap();
        verifier.verify_server_cert(leaf.der(), &[], &name, &[], UnixTime::now()).is_ok()
    };
    assert!(judge("istiod.svc", None) && judge("istiod.svc", Some("other")));
    assert!(judge("localhost", Some("istiod.svc")));
    assert!(!judge("localhost", None) && !judge("localhost", Some("other")));
}
