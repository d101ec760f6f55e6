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
