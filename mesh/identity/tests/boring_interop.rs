//! BoringSSL under rustls is a real alternative: it speaks with aws-lc in both directions, with itself, and refuses the same.
#![allow(clippy::unwrap_used, reason = "a test")]

use std::sync::Arc;
use std::time::Duration;

use mesh_identity::clock::SystemClock;
use mesh_identity::crypto::{KeyExchange, Provider, TlsSettings};
use mesh_identity::local_ca::{LocalCa, LocalCaSettings};
use mesh_identity::{IdentitySource, Peer, Svid, TlsContext, TlsError, TrustBundles, tls};
use mesh_model::{Reason, SpiffeId, TrustDomain};
use rustls::NamedGroup;
use tokio::io::{AsyncReadExt, AsyncWriteExt, duplex};
use tokio::time::Instant;

const WEB: &str = "spiffe://cluster.local/ns/shop/sa/web";
const CART: &str = "spiffe://cluster.local/ns/shop/sa/cart";

struct Authority {
    ca: LocalCa,
    _directory: tempfile::TempDir,
}

impl Authority {
    fn new(trust_domain: &str) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let settings = LocalCaSettings {
            directory: directory.path().join("ca"),
            trust_domain: trust_domain.into(),
            ..LocalCaSettings::default()
        };
        Self { ca: LocalCa::open(&settings, Arc::new(SystemClock)).unwrap(), _directory: directory }
    }

    async fn svid(&self, id: &str, provider: Provider, key_exchange: KeyExchange) -> Svid {
        let id: SpiffeId = id.parse().unwrap();
        let tls = TlsContext::new(&TlsSettings { provider, key_exchange, fips: false }, &self.ca, Arc::new(SystemClock)).unwrap();
        Svid::new(&id, self.ca.issue(&id).await.unwrap(), &tls).unwrap()
    }
}

/// Shakes hands, sends a megabyte each way, and returns the key exchange group and who the client saw.
async fn talk(client: &Svid, server: &Svid) -> Result<(NamedGroup, Peer), (Option<TlsError>, Option<TlsError>)> {
    let (a, b) = duplex(64 * 1024);
    let deadline = Instant::now() + Duration::from_secs(30);
    let expect = [server.id.clone()];
    let (connected, accepted) = tokio::join!(tls::connect(client, a, &expect, deadline), tls::accept(server, b, deadline));
    let ((near, seen), (far, by)) = match (connected, accepted) {
        (Ok(near), Ok(far)) => (near, far),
        (near, far) => return Err((near.err(), far.err())),
    };
    assert_eq!((&seen.id, &by.id), (&server.id, &client.id));
    let group = near.get_ref().1.negotiated_key_exchange_group().unwrap().name();
    let sent: Vec<u8> = (0..1024 * 1024).map(|i: u32| (i / 251) as u8).collect();
    let (mut near_read, mut near_write) = tokio::io::split(near);
    let (mut far_read, mut far_write) = tokio::io::split(far);
    let (mut there, mut back) = (vec![0; sent.len()], vec![0; sent.len()]);
    let there_and_back = async {
        tokio::try_join!(
            async { near_write.write_all(&sent).await.and(near_write.flush().await) },
            async { far_write.write_all(&sent).await.and(far_write.flush().await) },
            near_read.read_exact(&mut back),
            far_read.read_exact(&mut there),
        )
    };
    there_and_back.await.unwrap();
    assert!(there == sent && back == sent);
    Ok((group, seen))
}

#[tokio::test]
async fn each_library_speaks_with_each() {
    let authority = Authority::new("cluster.local");
    let bundles = Arc::clone(&authority.ca.bundle().borrow());
    let strangers = TrustBundles::new(TrustDomain::default(), Vec::new()).unwrap();
    for client in [Provider::AwsLc, Provider::Boring] {
        for server in [Provider::AwsLc, Provider::Boring] {
            for (wanted, group) in [
                (KeyExchange::Classical, NamedGroup::X25519),
                (KeyExchange::PreferHybrid, NamedGroup::X25519MLKEM768),
                (KeyExchange::RequireHybrid, NamedGroup::X25519MLKEM768),
            ] {
                let near = authority.svid(WEB, client, wanted).await;
                // The accepting side takes what the connecting side prefers.
                let far = authority.svid(CART, server, KeyExchange::Classical).await;
                let (negotiated, peer) = talk(&near, &far).await.unwrap();
                assert_eq!(negotiated, group, "{client:?} to {server:?}, {wanted:?}");
                assert!(peer.still_trusted(&bundles) && !peer.still_trusted(&strangers));
            }
            // A peer that insists on the hybrid is understood by one that prefers the classical exchange.
            let near = authority.svid(WEB, client, KeyExchange::Classical).await;
            let far = authority.svid(CART, server, KeyExchange::RequireHybrid).await;
            assert_eq!(talk(&near, &far).await.unwrap().0, NamedGroup::X25519MLKEM768);
        }
    }
}

#[tokio::test]
async fn boring_refuses_what_aws_lc_refuses() {
    let (ours, theirs) = (Authority::new("cluster.local"), Authority::new("strange.example"));
    let impostor = Authority::new("cluster.local");
    let near = ours.svid(WEB, Provider::Boring, KeyExchange::Classical).await;
    let strange = theirs.svid("spiffe://strange.example/ns/a/sa/b", Provider::AwsLc, KeyExchange::Classical).await;
    let (refusal, _) = talk(&near, &strange).await.unwrap_err();
    assert_eq!(refusal.unwrap().reason, Reason::TrustDomain);
    let fake = impostor.svid(CART, Provider::AwsLc, KeyExchange::Classical).await;
    let (refusal, _) = talk(&near, &fake).await.unwrap_err();
    assert_eq!(refusal.unwrap().reason, Reason::TlsFailure);
}
