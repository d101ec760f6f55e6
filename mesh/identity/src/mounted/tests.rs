use mesh_model::TrustDomain;
use tokio::io::{AsyncReadExt, AsyncWriteExt, duplex};
use tokio::time::Instant;

use super::*;
use crate::cache::{CacheSettings, SvidCache};
use crate::clock::SystemClock;
use crate::pem;
use crate::svid::{Svid, TlsContext};
use crate::testing::{TestCa, hours, id, leaf_params};
use crate::tls::{accept, connect};
use std::time::Duration;

const WP: &str = "spiffe://cluster.local/ns/shop/sa/wp";
const OTHER: &str = "spiffe://cluster.local/ns/shop/sa/other";

/// A folder as the kubelet mounts one: what is read are links into a folder that is swapped.
struct Folder {
    dir: tempfile::TempDir,
    written: std::cell::Cell<u32>,
}

impl Folder {
    fn new() -> Self {
        let folder = Self { dir: tempfile::tempdir().unwrap(), written: std::cell::Cell::new(0) };
        for name in [CHAIN, KEY, ROOTS] {
            std::os::unix::fs::symlink(format!("..data/{name}"), folder.dir.path().join(name)).unwrap();
        }
        folder
    }
    fn write(&self, issued: &IssuedSvid, root: &TestCa) {
        let chain: String = issued.chain.iter().map(|der| pem::certificate(der)).collect();
        let key = pem::certificate(issued.key.secret_der()).replace("CERTIFICATE", "PRIVATE KEY");
        self.put([&chain, &key, &pem::certificate(&root.der)]);
    }
    fn put(&self, contents: [&str; 3]) {
        let n = self.written.replace(self.written.get() + 1);
        let at = self.dir.path();
        fs::create_dir(at.join(format!("..{n}"))).unwrap();
        for (name, content) in [CHAIN, KEY, ROOTS].into_iter().zip(contents) {
            fs::write(at.join(format!("..{n}")).join(name), content).unwrap();
        }
        std::os::unix::fs::symlink(format!("..{n}"), at.join("..tmp")).unwrap();
        fs::rename(at.join("..tmp"), at.join("..data")).unwrap();
    }
    fn source(&self) -> Arc<Mounted> {
        let trust_domain = TrustDomain::default();
        let settings = SourceSettings {
            trust_domain,
            trust_domain_aliases: Vec::new(),
            lifetime: hours(1),
            unknown: crate::revocation::Unknown::Deny,
        };
        Arc::new(Mounted::start(self.dir.path().into(), settings, Arc::new(SystemClock), &Handle::current()).unwrap())
    }
}

fn tls(source: &Mounted) -> TlsContext {
    TlsContext::new(&TlsSettings::default(), source, Arc::new(SystemClock)).unwrap()
}
fn refusal(source: &Mounted, who: &str) -> String {
    source.shared.issue(&id(who)).unwrap_err().to_string()
}
async fn until(what: &str, holds: impl Fn() -> bool) {
    let begun = Instant::now();
    while !holds() {
        assert!(begun.elapsed() < Duration::from_secs(20), "waited in vain for {what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test]
async fn a_new_certificate_is_proved_by_new_connections_and_old_ones_stay() {
    let (root, folder) = (TestCa::new("root"), Folder::new());
    let first = root.sign(&leaf_params(&[WP]));
    folder.write(&first, &root);
    let source = folder.source();
    let context = tls(&source);
    let cache = SvidCache::start(source.clone(), context.clone(), &CacheSettings::default(), &Handle::current());
    let handle = cache.handle(&id(WP));
    let before = handle.fetch().await.unwrap();
    // Whoever is connected by the first certificate…
    let peer = Svid::new(&id(OTHER), root.sign(&leaf_params(&[OTHER])), &context).unwrap();
    let (a, b) = duplex(64 * 1024);
    let (expect, soon) = ([id(WP)], Instant::now() + Duration::from_secs(10));
    let (client, server) = tokio::join!(connect(&peer, a, &expect, soon), accept(&before, b, soon));
    let ((mut client, _), (mut server, _)) = (client.unwrap(), server.unwrap());
    folder.write(&root.sign(&leaf_params(&[WP])), &root);
    until("the new one", || handle.load().is_some_and(|svid| svid.serial != before.serial)).await;
    // …stays so.
    client.write_all(b"still here").await.unwrap();
    client.flush().await.unwrap();
    let mut read = [0; 10];
    server.read_exact(&mut read).await.unwrap();
    assert_eq!(&read, b"still here");
}

#[tokio::test]
async fn what_cannot_be_used_is_told_and_the_last_good_one_stays() {
    let (root, folder) = (TestCa::new("root"), Folder::new());
    let source = folder.source();
    assert!(refusal(&source, WP).contains("tls.crt"), "{}", refusal(&source, WP));
    let good = root.sign(&leaf_params(&[WP]));
    folder.write(&good, &root);
    until("the files to come", || source.shared.issue(&id(WP)).is_ok()).await;
    assert!(refusal(&source, OTHER).contains(WP));
    let is_good = || source.shared.issue(&id(WP)).is_ok_and(|issued| issued.chain == good.chain);
    let mut expired = leaf_params(&[WP]);
    expired.not_after = (SystemTime::now() - Duration::from_secs(5)).into();
    let mut early = leaf_params(&[WP]);
    early.not_before = (SystemTime::now() + hours(1)).into();
    early.not_after = (SystemTime::now() + hours(2)).into();
    let foreign = IssuedSvid { key: root.sign(&leaf_params(&[WP])).key, ..root.sign(&leaf_params(&[WP])) };
    let bad = [
        ("has expired", root.sign(&expired)),
        ("not valid yet", root.sign(&early)),
        ("not the key", foreign),
        ("it is for", root.sign(&leaf_params(&[OTHER]))),
    ];
    assert!(is_good());
    for (why, issued) in bad {
        folder.write(&issued, &root);
        let told = source.shared.read(Some(&id(WP))).err().unwrap();
        assert!(told.contains(why), "{told}");
        source.shared.look(false);
        assert!(is_good(), "{why}");
    }
    for contents in [["", "", ""], ["-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n", "x", "y"]] {
        folder.put(contents);
        source.shared.look(false);
        assert!(is_good());
    }
    fs::remove_file(folder.dir.path().join("..data")).unwrap();
    source.shared.look(false);
    assert!(is_good(), "the files went");
}

#[tokio::test]
async fn roots_are_believed_as_the_file_says() {
    let (old, new, folder) = (TestCa::new("old"), TestCa::new("new"), Folder::new());
    folder.write(&old.sign(&leaf_params(&[WP])), &old);
    let source = folder.source();
    let mut bundles = source.bundle();
    let roots = |bundles: &watch::Receiver<Arc<TrustBundles>>| -> Vec<CertificateDer<'static>> {
        bundles.borrow().all().flat_map(|(_, bundle)| bundle.roots().to_vec()).collect()
    };
    assert_eq!(roots(&bundles), std::slice::from_ref(&old.der));
    let issued = new.sign(&leaf_params(&[WP]));
    let chain: String = issued.chain.iter().map(|der| pem::certificate(der)).collect();
    let key = pem::certificate(issued.key.secret_der()).replace("CERTIFICATE", "PRIVATE KEY");
    folder.put([&chain, &key, &format!("{}{}", pem::certificate(&old.der), pem::certificate(&new.der))]);
    tokio::time::timeout(Duration::from_secs(20), bundles.changed()).await.unwrap().unwrap();
    assert_eq!(roots(&bundles), [old.der, new.der]);
}
