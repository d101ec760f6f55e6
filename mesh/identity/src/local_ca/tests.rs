use std::sync::Barrier;

use super::*;
use crate::clock::SystemClock;
use crate::crypto::TlsSettings;
use crate::svid::{Svid, TlsContext};
use crate::testing::id;

fn settings(directory: &Path) -> LocalCaSettings {
    LocalCaSettings { directory: directory.join("ca"), ..LocalCaSettings::default() }
}

fn open(settings: &LocalCaSettings) -> Result<LocalCa, IdentityError> {
    LocalCa::open(settings, Arc::new(SystemClock))
}

fn why(settings: &LocalCaSettings) -> String {
    match open(settings) {
        Err(error @ IdentityError::Storage { .. }) => error.to_string(),
        other => panic!("{other:?}"),
    }
}

fn mode(path: &Path) -> u32 {
    fs::metadata(path).unwrap().permissions().mode() & 0o777
}

fn root_of(ca: &LocalCa) -> CertificateDer<'static> {
    let bundles = ca.bundle();
    let bundles = bundles.borrow();
    bundles.find(bundles.ours().as_str()).unwrap().roots()[0].clone()
}

#[tokio::test]
async fn issues_a_workload_certificate() {
    let temporary = tempfile::tempdir().unwrap();
    let ca = open(&settings(temporary.path())).unwrap();
    let web = id("spiffe://cluster.local/ns/shop/sa/web");
    let issued = ca.issue(&web).await.unwrap();
    {
        let (_, leaf) = X509Certificate::from_der(&issued.chain[0]).unwrap();
        let names = &leaf.subject_alternative_name().unwrap().unwrap().value.general_names;
        assert_eq!(names, &vec![GeneralName::URI(web.as_str())]);
        assert_eq!(leaf.key_usage().unwrap().unwrap().value.flags, 1);
        let eku = leaf.extended_key_usage().unwrap().unwrap().value;
        assert!(eku.server_auth && eku.client_auth && !eku.any);
        assert_eq!(leaf.subject().iter().count(), 0);
        let life = leaf.validity().not_after.timestamp() - leaf.validity().not_before.timestamp();
        assert_eq!(life, 3660);
    }
    let tls = TlsContext::new(&TlsSettings::default(), &ca, Arc::new(SystemClock)).unwrap();
    let svid = Svid::new(&web, issued, &tls).unwrap();
    assert!(svid.not_before < SystemTime::now() - Duration::from_secs(58));
    assert!(svid.is_valid_at(SystemTime::now()));

    let again = ca.issue(&web).await.unwrap();
    assert_ne!(again.chain, svid.chain.to_vec());
    let other = id("spiffe://cluster.local/ns/shop/sa/other");
    assert!(matches!(Svid::new(&other, again, &tls), Err(IdentityError::Unusable { .. })));
}

#[tokio::test]
async fn foreign_trust_domains_are_not_issued() {
    let temporary = tempfile::tempdir().unwrap();
    let mut settings = settings(temporary.path());
    settings.trust_domain_aliases = vec!["old.example".into()];
    let ca = open(&settings).unwrap();
    assert!(ca.issue(&id("spiffe://old.example/ns/a/sa/b")).await.is_ok());
    let refused = ca.issue(&id("spiffe://new.example/ns/a/sa/b")).await.unwrap_err();
    assert!(matches!(refused, IdentityError::Refused { .. }), "{refused}");
    assert_eq!(refused.reason(), mesh_model::Reason::NoCertificate);
}

#[test]
fn the_root_is_private_and_survives_a_restart() {
    let temporary = tempfile::tempdir().unwrap();
    let settings = settings(temporary.path());
    let first = root_of(&open(&settings).unwrap());
    assert_eq!(mode(&settings.directory), 0o700);
    assert_eq!(mode(&settings.directory.join(CA_FILE)), 0o600);
    assert_eq!(root_of(&open(&settings).unwrap()), first);
    let public = fs::read(settings.directory.join(PUBLIC_FILE)).unwrap();
    assert_eq!(CertificateDer::from_pem_slice(&public).unwrap(), first);
    let names: Vec<_> = fs::read_dir(&settings.directory).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(names.len(), 2, "nothing is left behind: {names:?}");
}

#[test]
fn agents_starting_at_once_end_with_one_root() {
    for _ in 0..20 {
        let temporary = tempfile::tempdir().unwrap();
        let settings = settings(temporary.path());
        let barrier = Barrier::new(4);
        let roots: Vec<_> = std::thread::scope(|scope| {
            let starts: Vec<_> = (0..4)
                .map(|_| {
                    scope.spawn(|| {
                        barrier.wait();
                        root_of(&open(&settings).unwrap())
                    })
                })
                .collect();
            starts.into_iter().map(|start| start.join().unwrap()).collect()
        });
        assert!(roots.windows(2).all(|pair| pair[0] == pair[1]));
        assert_eq!(root_of(&open(&settings).unwrap()), roots[0]);
    }
}

#[test]
fn a_key_others_can_read_is_refused() {
    let temporary = tempfile::tempdir().unwrap();
    let settings = settings(temporary.path());
    open(&settings).unwrap();
    let file = settings.directory.join(CA_FILE);
    for bad in [0o644, 0o640, 0o604, 0o660] {
        fs::set_permissions(&file, fs::Permissions::from_mode(bad)).unwrap();
        let why = why(&settings);
        assert!(why.contains(&format!("{bad:04o}")) && why.contains("ca.pem") && why.contains("chmod 0600"), "{why}");
    }
    fs::set_permissions(&file, fs::Permissions::from_mode(0o440)).unwrap();
    let is_roots = std::os::unix::fs::MetadataExt::uid(&fs::metadata(&file).unwrap()) == 0;
    assert_eq!(open(&settings).is_ok(), is_roots, "as Kubernetes mounts a Secret");
    fs::set_permissions(&file, fs::Permissions::from_mode(0o600)).unwrap();
    assert!(open(&settings).is_ok());
}

#[test]
fn a_directory_others_can_write_is_refused() {
    let temporary = tempfile::tempdir().unwrap();
    let settings = settings(temporary.path());
    open(&settings).unwrap();
    fs::set_permissions(&settings.directory, fs::Permissions::from_mode(0o777)).unwrap();
    assert!(why(&settings).contains("0777"));
}

#[test]
fn what_is_there_is_never_replaced() {
    let temporary = tempfile::tempdir().unwrap();
    let settings = settings(temporary.path());
    open(&settings).unwrap();
    let file = settings.directory.join(CA_FILE);
    let good = fs::read_to_string(&file).unwrap();

    let elsewhere = LocalCaSettings { trust_domain: "other.example".into(), ..settings.clone() };
    assert!(why(&elsewhere).contains("spiffe://cluster.local"), "{}", why(&elsewhere));

    let certificate_at = good.find("-----BEGIN CERTIFICATE").unwrap();
    let (other_dir, key) = (tempfile::tempdir().unwrap(), &good[..certificate_at]);
    let other = self::settings(other_dir.path());
    open(&other).unwrap();
    let other = fs::read_to_string(other.directory.join(CA_FILE)).unwrap();
    let mixed = format!("{key}{}", &other[other.find("-----BEGIN CERTIFICATE").unwrap()..]);
    for broken in ["", "garbage", key, &good[certificate_at..], mixed.as_str()] {
        fs::write(&file, broken).unwrap();
        assert!(why(&settings).contains("ca.pem"));
        assert_eq!(fs::read_to_string(&file).unwrap(), broken);
    }
    fs::write(&file, good).unwrap();
    assert!(open(&settings).is_ok());
}

#[test]
fn bad_settings_are_refused() {
    let temporary = tempfile::tempdir().unwrap();
    let good = settings(temporary.path());
    why(&LocalCaSettings { trust_domain: "Not Valid".into(), ..good.clone() });
    why(&LocalCaSettings { trust_domain_aliases: vec![String::new()], ..good.clone() });
    why(&LocalCaSettings { lifetime: Duration::from_secs(1), ..good.clone() });
    fs::write(temporary.path().join("file"), "").unwrap();
    why(&LocalCaSettings { directory: temporary.path().join("file"), ..good });
}

#[test]
fn settings_read_as_written() {
    let read: LocalCaSettings = serde_json::from_str(r#"{"lifetime": "24h", "trustDomain": "a.b"}"#).unwrap();
    assert_eq!((read.lifetime, read.trust_domain.as_str()), (Duration::from_hours(24), "a.b"));
    assert_eq!(serde_json::from_str::<LocalCaSettings>(&serde_json::to_string(&read).unwrap()).unwrap(), read);
    assert!(serde_json::from_str::<LocalCaSettings>(r#"{"lifetme": "24h"}"#).is_err());
}

#[derive(Debug)]
struct Fixed(SystemTime);
impl Clock for Fixed {
    fn now(&self) -> SystemTime {
        self.0
    }
}

#[tokio::test]
async fn the_root_bounds_its_leaves_and_its_own_use() {
    let temporary = tempfile::tempdir().unwrap();
    let settings = settings(temporary.path());
    let now = SystemTime::now();
    open(&settings).unwrap();
    let nearly = Arc::new(Fixed(now + ROOT_LIFETIME - Duration::from_mins(10)));
    let ca = LocalCa::open(&settings, nearly).unwrap();
    let issued = ca.issue(&id("spiffe://cluster.local/ns/a/sa/b")).await.unwrap();
    let leaf = crate::verify::leaf_of(&issued.chain[0]).unwrap();
    assert!(leaf.not_after <= now + ROOT_LIFETIME);
    let error = LocalCa::open(&settings, Arc::new(Fixed(now + ROOT_LIFETIME + BACKDATE))).unwrap_err();
    assert!(error.to_string().contains("expired"), "{error}");
}
