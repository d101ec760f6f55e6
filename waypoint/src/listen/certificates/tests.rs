use super::*;

fn pair(name: &str) -> KeyPair {
    let made = rcgen::generate_simple_self_signed([name.to_owned()]).expect("a certificate");
    KeyPair { chain: made.cert.pem().into(), key: made.signing_key.serialize_pem().into() }
}
fn listener(tls: ListenerTls) -> Listener {
    Listener {
        name: "https".into(),
        port: 443,
        protocol: mesh_model::l7::gateway::ListenerProtocol::Https,
        hostname: None,
        tls: Some(tls),
        clients: None,
        hosts: Vec::new(),
        broken: None,
    }
}

#[test]
fn a_pair_that_does_not_fit_keeps_what_was_there() {
    let certificates = Certificates::default();
    let good = pair("a.example");
    certificates.load(&[listener(ListenerTls::Terminate(vec![good.clone()]))]);
    let first = certificates.find("https").expect("loaded");
    let bad = KeyPair { chain: pair("b.example").chain, key: good.key };
    certificates.load(&[listener(ListenerTls::Terminate(vec![bad]))]);
    assert!(Arc::ptr_eq(&first, &certificates.find("https").expect("still there")));
    certificates.load(&[]);
    assert!(certificates.find("https").is_none());
}
#[test]
fn files_are_read_again() {
    let dir = tempfile::tempdir().expect("a folder");
    let (chain, key) = (dir.path().join("tls.crt"), dir.path().join("tls.key"));
    let write = |pair: &KeyPair| {
        std::fs::write(&chain, &*pair.chain).expect("written");
        std::fs::write(&key, &*pair.key).expect("written");
    };
    let text = |p: &std::path::Path| -> Arc<str> { p.to_str().expect("utf-8").into() };
    let files = [listener(ListenerTls::Files { chain: text(&chain), key: text(&key) })];
    let certificates = Certificates::default();
    certificates.load(&files);
    assert!(certificates.find("https").is_none(), "nothing there yet");
    write(&pair("a.example"));
    certificates.load(&files);
    let first = certificates.find("https").expect("loaded");
    certificates.load(&files);
    assert!(Arc::ptr_eq(&first, &certificates.find("https").expect("unchanged")), "unchanged files make no new configuration");
    write(&pair("a.example"));
    certificates.load(&files);
    assert!(!Arc::ptr_eq(&first, &certificates.find("https").expect("renewed")));
}

#[test]
fn what_clients_must_show_is_never_less_than_asked() {
    let certificates = Certificates::default();
    let own = listener(ListenerTls::Terminate(vec![pair("a.example")]));
    let asking = |roots: &str, crl: Option<&str>| {
        let clients = ClientCertificates { roots: roots.into(), crl: crl.map(Into::into), required: true };
        Listener { clients: Some(Arc::new(clients)), ..own.clone() }
    };
    certificates.load(std::slice::from_ref(&own));
    let open = certificates.find("https").expect("loaded");
    let root = pair("root").chain;
    let garbage = "-----BEGIN CERTIFICATE-----\naGVsbG8=\n-----END CERTIFICATE-----\n";
    for (roots, crl) in
        [("", None), (garbage, None), (&*root, Some("-----BEGIN X509 CRL-----\naGVsbG8=\n-----END X509 CRL-----\n"))]
    {
        certificates.load(&[asking(roots, crl)]);
        assert!(certificates.find("https").is_none(), "one that asks for nothing is not kept: {roots} {crl:?}");
        certificates.load(std::slice::from_ref(&own));
        assert!(certificates.find("https").is_some());
    }
    certificates.load(&[asking(&root, None)]);
    let asked = certificates.find("https").expect("loaded");
    assert!([&open, &asked].iter().all(|config| config.fips() == cfg!(feature = "tls-fips")));
    assert!(!Arc::ptr_eq(&open, &asked) && asked.send_tls13_tickets == 0 && !asked.session_storage.can_cache());
    certificates.load(&[asking(&root, None)]);
    assert!(Arc::ptr_eq(&asked, &certificates.find("https").expect("unchanged")));
    certificates.load(&[own]);
    assert!(!Arc::ptr_eq(&asked, &certificates.find("https").expect("asks for nothing again")));
}

/// A handshake in memory with a client that trusts `pair` and shows `own`: what the server says to it.
fn shake(server: Arc<ServerConfig>, pair: &KeyPair, own: Option<&KeyPair>) -> Result<(), rustls::Error> {
    let certificate = |pem: &str| CertificateDer::from_pem_slice(pem.as_bytes()).expect("a certificate");
    let mut roots = RootCertStore::empty();
    roots.add(certificate(&pair.chain)).expect("a root");
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let builder = rustls::ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions().expect("versions");
    let builder = builder.with_root_certificates(roots);
    let config = match own {
        None => builder.with_no_client_auth(),
        Some(own) => {
            let key = PrivateKeyDer::from_pem_slice(own.key.as_bytes()).expect("a key");
            builder.with_client_auth_cert(vec![certificate(&own.chain)], key).expect("a pair")
        }
    };
    let mut client = rustls::ClientConnection::new(Arc::new(config), "a.example".try_into().expect("a name")).expect("a client");
    let mut server = rustls::ServerConnection::new(server).expect("a server");
    while server.is_handshaking() {
        let mut bytes = Vec::new();
        while client.wants_write() {
            client.write_tls(&mut bytes).expect("written");
        }
        let mut rest = bytes.as_slice();
        while !rest.is_empty() {
            server.read_tls(&mut rest).expect("read");
            server.process_new_packets()?;
        }
        let mut bytes = Vec::new();
        while server.wants_write() {
            server.write_tls(&mut bytes).expect("written");
        }
        let mut rest = bytes.as_slice();
        while !rest.is_empty() {
            client.read_tls(&mut rest).expect("read");
            client.process_new_packets()?;
        }
    }
    Ok(())
}

#[test]
fn clients_are_believed_by_their_authority_and_its_list() {
    use rcgen::{
        BasicConstraints, CertificateParams, CertificateRevocationListParams, IsCa, Issuer, KeyIdMethod, KeyUsagePurpose,
    };
    use rcgen::{RevokedCertParams, SerialNumber};
    use rustls::{CertificateError, Error};
    use std::time::{Duration, SystemTime};

    let mut params = CertificateParams::default();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.distinguished_name.push(rcgen::DnType::CommonName, "clients");
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    let key = rcgen::KeyPair::generate().expect("a key");
    let root = params.self_signed(&key).expect("a root").pem();
    let ca = Issuer::new(params, key);
    let issued = |serial: u64| {
        let key = rcgen::KeyPair::generate().expect("a key");
        let mut params = CertificateParams::new([format!("client-{serial}.example")]).expect("names");
        params.serial_number = Some(SerialNumber::from(serial));
        KeyPair { chain: params.signed_by(&key, &ca).expect("signed").pem().into(), key: key.serialize_pem().into() }
    };
    let list = |in_date: bool| {
        let (now, hour) = (SystemTime::now(), Duration::from_hours(1));
        let revoked = RevokedCertParams {
            serial_number: SerialNumber::from(2u64),
            revocation_time: now.into(),
            reason_code: None,
            invalidity_date: None,
        };
        let params = CertificateRevocationListParams {
            this_update: (now - hour * 2).into(),
            next_update: if in_date { now + hour } else { now - hour }.into(),
            crl_number: SerialNumber::from(1u64),
            issuing_distribution_point: None,
            revoked_certs: vec![revoked],
            key_identifier_method: KeyIdMethod::Sha256,
        };
        params.signed_by(&ca).expect("signed").pem().expect("a list")
    };
    let (own, first, second, stranger) = (pair("a.example"), issued(1), issued(2), pair("client.example"));
    let certificates = Certificates::default();
    let outcome = |crl: Option<String>, required: bool, shown: Option<&KeyPair>| {
        let clients = ClientCertificates { roots: root.as_str().into(), crl: crl.map(Into::into), required };
        let listener = Listener { clients: Some(Arc::new(clients)), ..listener(ListenerTls::Terminate(vec![own.clone()])) };
        certificates.load(&[listener]);
        shake(certificates.find("https").expect("loaded"), &own, shown)
    };
    assert_eq!(outcome(None, true, None), Err(Error::NoCertificatesPresented));
    assert_eq!(outcome(None, false, None), Ok(()));
    for required in [true, false] {
        assert_eq!(outcome(None, required, Some(&first)), Ok(()));
        let unknown = outcome(None, required, Some(&stranger));
        assert!(matches!(unknown, Err(Error::InvalidCertificate(CertificateError::UnknownIssuer))), "{unknown:?}");
        assert_eq!(outcome(Some(list(true)), required, Some(&first)), Ok(()));
        let revoked = outcome(Some(list(true)), required, Some(&second));
        assert_eq!(revoked, Err(Error::InvalidCertificate(CertificateError::Revoked)));
        let late = outcome(Some(list(false)), required, Some(&first));
        assert!(
            matches!(late, Err(Error::InvalidCertificate(CertificateError::ExpiredRevocationListContext { .. }))),
            "{late:?}"
        );
    }
}
