use std::net::SocketAddr;

use rcgen::{ExtendedKeyUsagePurpose, SanType};
use rustls::ServerConfig;
use rustls_pki_types::CertificateDer;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio_rustls::TlsAcceptor;

use super::*;
use crate::pem;
use crate::testing::{Bundles, TestCa, leaf_params};

const FAR: &str = "far.example";
const SERVER: &str = "spiffe://far.example/spire/server";

/// A bundle endpoint whose answers the test chooses.
struct Far {
    at: SocketAddr,
    answer: Arc<Mutex<(u16, String)>>,
}

impl Far {
    /// With a certificate of `ca` for this machine and, if any, this id.
    async fn start(ca: &TestCa, id: Option<&str>) -> Self {
        let mut params = leaf_params(&Vec::from_iter(id));
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        params.subject_alt_names.push(SanType::IpAddress([127, 0, 0, 1].into()));
        let issued = ca.sign(&params);
        let crypto = TlsSettings::default().crypto().unwrap();
        let builder = ServerConfig::builder_with_provider(crypto).with_safe_default_protocol_versions().unwrap();
        let config = builder.with_no_client_auth().with_single_cert(issued.chain, issued.key).unwrap();
        let (acceptor, listener) = (TlsAcceptor::from(Arc::new(config)), TcpListener::bind("127.0.0.1:0").await.unwrap());
        let far = Self { at: listener.local_addr().unwrap(), answer: Arc::new(Mutex::new((503, String::new()))) };
        let answer = Arc::clone(&far.answer);
        tokio::spawn(async move {
            while let Ok((tcp, _)) = listener.accept().await {
                let (acceptor, answer) = (acceptor.clone(), Arc::clone(&answer));
                tokio::spawn(async move {
                    let Ok(mut tls) = acceptor.accept(tcp).await else { return };
                    let mut head = Vec::new();
                    while !head.ends_with(b"\r\n\r\n") {
                        let mut byte = [0];
                        if tls.read_exact(&mut byte).await.is_err() {
                            return;
                        }
                        head.push(byte[0]);
                    }
                    assert!(
                        head.starts_with(b"GET /bundle?for=us HTTP/1.1\r\nhost: 127.0.0.1:"),
                        "{}",
                        String::from_utf8_lossy(&head)
                    );
                    let (status, body) = answer.lock().clone();
                    let text =
                        format!("HTTP/1.1 {status} So\r\ncontent-length: {}\r\nconnection: close\r\n\r\n{body}", body.len());
                    let _ = tls.write_all(text.as_bytes()).await;
                    let _ = tls.shutdown().await;
                });
            }
        });
        far
    }
    fn says(&self, status: u16, text: &str) {
        *self.answer.lock() = (status, text.to_owned());
    }
    fn federation(&self, web: &TestCa, id: Option<&str>) -> Federation {
        let id = id.map(|id| format!("={id}")).unwrap_or_default();
        Federation {
            domains: vec![format!("{FAR}=https://{}/bundle?for=us{id}", self.at).parse().unwrap()],
            roots: Roots::Pem(pem::certificate(&web.der)),
            keep: None,
            tls: TlsSettings::default(),
        }
    }
}

fn bundle(roots: &[&TestCa]) -> String {
    let key = |ca: &&TestCa| {
        format!(r#"{{"kty":"EC","use":"x509-svid","crv":"P-256","x":"","y":"","x5c":["{}"]}}"#, pem::base64(&ca.der))
    };
    let keys: Vec<String> = roots.iter().map(key).chain([r#"{"kty":"RSA","use":"jwt-svid","kid":"k"}"#.to_owned()]).collect();
    format!(r#"{{"keys":[{}],"spiffe_sequence":3,"spiffe_refresh_hint":1}}"#, keys.join(","))
}

fn ours() -> Arc<Bundles> {
    Arc::new(Bundles::of(TrustBundles::new(TrustDomain::default(), vec![TestCa::new("ours").der]).unwrap()))
}

fn start(source: &Arc<Bundles>, federation: Federation) -> (Arc<dyn IdentitySource>, Registry) {
    let registry = Registry::new();
    let source: Arc<dyn IdentitySource> = Arc::clone(source) as _;
    (over(source, federation, &Handle::current(), &registry).unwrap(), registry)
}

fn believed(source: &Arc<dyn IdentitySource>) -> Option<Vec<CertificateDer<'static>>> {
    source.bundle().borrow().find(FAR).map(|bundle| bundle.roots().to_vec())
}

async fn wait(what: &str, is_so: impl Fn() -> bool) {
    for _ in 0..400 {
        if is_so() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(25)).await;
    }
    panic!("in vain: {what}");
}

fn is_up(registry: &Registry, value: u8) -> bool {
    registry.encode().contains(&format!("culvert_federation_up{{trust_domain=\"{FAR}\"}} {value}\n"))
}

#[tokio::test]
async fn what_an_endpoint_of_the_web_tells_counts_for_its_domain_and_stays() {
    let (web, first, second) = (TestCa::new("web"), TestCa::new("first"), TestCa::new("second"));
    let far = Far::start(&web, None).await;
    let base = ours();
    let (source, registry) = start(&base, far.federation(&web, None));
    wait("the failure to be told", || is_up(&registry, 0)).await;
    assert_eq!(believed(&source), None, "nobody of it is believed");
    far.says(200, &bundle(&[&first]));
    wait("its root", || believed(&source) == Some(vec![first.der.clone()])).await;
    wait("the metric", || is_up(&registry, 1)).await;
    assert!(!registry.encode().contains(&format!("culvert_federation_fetched_timestamp_seconds{{trust_domain=\"{FAR}\"}} 0\n")));
    // Rotation, as soon as the document asks to be fetched again; and roots of ours that change meanwhile.
    far.says(200, &bundle(&[&first, &second]));
    wait("both roots", || believed(&source) == Some(vec![first.der.clone(), second.der.clone()])).await;
    let new = TrustBundles::new(TrustDomain::default(), vec![second.der.clone()]).unwrap();
    base.0.send_replace(Arc::new(new));
    wait("our root", || source.bundle().borrow().find("cluster.local").is_some_and(|own| own.roots() == [second.der.clone()]))
        .await;
    assert_eq!(believed(&source).map(|roots| roots.len()), Some(2));
    // What cannot be had or read takes nothing away.
    let two = bundle(&[&first, &second]);
    let redirect = bundle(&[]);
    for (status, text) in
        [(503, ""), (302, &*redirect), (200, "{}"), (200, &two.replace("x5c\":[\"", "x5c\":[\"AAAA\",\"")), (200, "[]")]
    {
        far.says(200, &two);
        wait("it to be well", || is_up(&registry, 1)).await;
        far.says(status, text);
        wait(text, || is_up(&registry, 0)).await;
        assert_eq!(believed(&source).map(|roots| roots.len()), Some(2), "{status} {text}");
    }
    // It may take all of its authorities back.
    far.says(200, &bundle(&[]));
    wait("none", || believed(&source) == Some(Vec::new())).await;
}

#[tokio::test]
async fn an_endpoint_of_the_web_that_is_somebody_else_is_not_heard() {
    let (web, other) = (TestCa::new("web"), TestCa::new("other"));
    let far = Far::start(&other, None).await;
    far.says(200, &bundle(&[&other]));
    let (source, registry) = start(&ours(), far.federation(&web, None));
    wait("the failure to be told", || is_up(&registry, 0)).await;
    tokio::time::sleep(Duration::from_millis(200)).await;
    assert_eq!(believed(&source), None);
}

#[tokio::test]
async fn an_endpoint_of_spiffe_proves_itself_by_the_bundle_that_was_known() {
    let (web, first, second) = (TestCa::new("web"), TestCa::new("first"), TestCa::new("second"));
    let far = Far::start(&first, Some(SERVER)).await;
    far.says(200, &bundle(&[&first, &second]));
    // Nothing is known of the domain yet, or another is expected, or it is of another authority.
    let folder = tempfile::tempdir().unwrap();
    let keep = |text: &str| std::fs::write(folder.path().join("far.example.json"), text).unwrap();
    let with = |id: &str| Federation { keep: Some(folder.path().into()), ..far.federation(&web, Some(id)) };
    for (kept, id, had) in [
        (None, SERVER, None),
        (Some(bundle(&[&first])), "spiffe://far.example/another", Some(1)),
        (Some(bundle(&[&second])), SERVER, Some(1)),
    ] {
        if let Some(kept) = &kept {
            keep(kept);
        }
        let (source, registry) = start(&ours(), with(id));
        tokio::time::sleep(Duration::from_millis(300)).await;
        assert!(is_up(&registry, 0), "{id} {kept:?}");
        assert_eq!(believed(&source).map(|roots| roots.len()), had, "{id} {kept:?}");
    }
    keep(&bundle(&[&first]));
    let (source, registry) = start(&ours(), with(SERVER));
    wait("both roots", || believed(&source) == Some(vec![first.der.clone(), second.der.clone()])).await;
    wait("the metric", || is_up(&registry, 1)).await;
    // The next start knows them before anybody is asked.
    drop(source);
    let nowhere = Federation {
        domains: vec![format!("{FAR}=https://127.0.0.1:9/=spiffe://far.example/spire/server").parse().unwrap()],
        ..with(SERVER)
    };
    wait("it to be kept", || {
        std::fs::read_to_string(folder.path().join("far.example.json")).is_ok_and(|text| text.matches("x509").count() == 2)
    })
    .await;
    let (source, _) = start(&ours(), nowhere);
    assert_eq!(believed(&source).map(|roots| roots.len()), Some(2));
}

#[tokio::test]
async fn our_own_domain_is_nobodys_to_tell() {
    let over_it = |domains: &[&str]| {
        let domains = domains.iter().map(|text| text.parse().unwrap()).collect();
        let federation = Federation { domains, roots: Roots::System, keep: None, tls: TlsSettings::default() };
        let source: Arc<dyn IdentitySource> = ours();
        over(source, federation, &Handle::current(), &Registry::new()).err().map(|error| error.to_string())
    };
    assert!(over_it(&["cluster.local=https://x/"]).unwrap().contains("our own"));
    assert!(over_it(&["a.b=https://x/", "a.b=https://y/"]).unwrap().contains("twice"));
}

/// SPIRE's first bundle has no aliases yet.
#[test]
fn a_name_that_becomes_ours_is_nobodys_to_tell_any_more() {
    let base = TrustBundles::new(TrustDomain::default(), Vec::new()).unwrap();
    let domain = TrustDomain::parse(FAR).unwrap();
    let told = Told::from([(domain.clone(), usable(&domain, &bundle(&[&TestCa::new("far")])).unwrap())]);
    let roots = |base: &TrustBundles| merged(base, &told).find(FAR).unwrap().roots().len();
    assert_eq!(roots(&base), 1);
    assert_eq!(roots(&base.with_alias(domain)), 0, "ours, which are none here");
}

#[test]
fn endpoints_are_written_like_this() {
    let read = |text: &str| text.parse::<Federated>();
    assert_eq!(read("a.b=https://x/").unwrap(), read("a.b=https://x:443").unwrap());
    assert_ne!(read("a.b=https://x/").unwrap(), read("a.b=https://x/=spiffe://a.b/s").unwrap());
    assert!(read("a.b=https://x/?q=1&r==spiffe://a.b/s").is_ok());
    for bad in ["a.b", "a.b=http://x/", "A B=https://x/", "a.b=x", "a.b=https://x/=spiffe://a.b", "a.b=https://x/=spiffe:///s"] {
        assert!(read(bad).is_err(), "{bad}");
    }
}
