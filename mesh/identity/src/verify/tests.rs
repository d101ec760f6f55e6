use std::time::{Duration, SystemTime};

use mesh_model::{Reason, TrustDomain};
use rcgen::{BasicConstraints, CertificateParams, CustomExtension, ExtendedKeyUsagePurpose, IsCa, KeyUsagePurpose, SanType};

use super::*;
use crate::clock::unix;
use crate::crypto::TlsSettings;
use crate::testing::{TestCa, domain, hours, id, leaf_params};

const WEB: &str = "spiffe://cluster.local/ns/shop/sa/web";

fn judge(params: &CertificateParams, ca: &TestCa, bundles: &TrustBundles, role: PeerRole) -> Result<SpiffeId, VerifyError> {
    let chain = ca.sign(params).chain;
    judge_at(&chain, bundles, role, SystemTime::now())
}

fn judge_at(
    chain: &[CertificateDer<'_>],
    bundles: &TrustBundles,
    role: PeerRole,
    now: SystemTime,
) -> Result<SpiffeId, VerifyError> {
    let crypto = TlsSettings::default().crypto().unwrap();
    verify_chain(&chain[0], &chain[1..], role, bundles, &crypto.signature_verification_algorithms, unix(now))
}

fn ours(ca: &TestCa) -> TrustBundles {
    TrustBundles::new(TrustDomain::default(), vec![ca.der.clone()]).unwrap()
}

/// What a certificate broken by `change` is refused for, on both sides.
fn refusal(change: impl FnOnce(&mut CertificateParams)) -> VerifyError {
    let ca = TestCa::new("root");
    let mut params = leaf_params(&[WEB]);
    change(&mut params);
    let chain = ca.sign(&params).chain;
    let bundles = ours(&ca);
    let error = judge_at(&chain, &bundles, PeerRole::Client, SystemTime::now()).unwrap_err();
    assert!(judge_at(&chain, &bundles, PeerRole::Server, SystemTime::now()).is_err());
    error
}

#[test]
fn a_good_certificate_proves_its_id() {
    let ca = TestCa::new("root");
    for role in [PeerRole::Client, PeerRole::Server] {
        assert_eq!(judge(&leaf_params(&[WEB]), &ca, &ours(&ca), role), Ok(id(WEB)));
    }
}

#[test]
fn dns_names_beside_the_uri_are_ignored() {
    let ca = TestCa::new("root");
    let mut params = leaf_params(&[WEB]);
    params.subject_alt_names.insert(0, SanType::DnsName("web.shop.svc".try_into().unwrap()));
    assert_eq!(judge(&params, &ca, &ours(&ca), PeerRole::Client), Ok(id(WEB)));
}

#[test]
fn a_chain_over_an_intermediate() {
    let ca = TestCa::new("root");
    let below = ca.intermediate("below");
    let mut chain = below.sign(&leaf_params(&[WEB])).chain;
    assert!(matches!(
        judge_at(&chain, &ours(&ca), PeerRole::Client, SystemTime::now()),
        Err(VerifyError::Chain { error: webpki::Error::UnknownIssuer, .. })
    ));
    chain.push(below.der.clone());
    assert_eq!(judge_at(&chain, &ours(&ca), PeerRole::Client, SystemTime::now()), Ok(id(WEB)));
}

#[test]
fn the_uri_must_be_one_spiffe_id() {
    assert_eq!(refusal(|p| p.subject_alt_names.clear()), VerifyError::NoUri);
    let only_dns = refusal(|p| p.subject_alt_names = vec![SanType::DnsName("web".try_into().unwrap())]);
    assert_eq!(only_dns, VerifyError::NoUri);
    let two = refusal(|p| p.subject_alt_names.push(SanType::URI("spiffe://cluster.local/ns/a/sa/b".try_into().unwrap())));
    assert_eq!(two, VerifyError::SeveralUris(2));
    // The same id twice is still not one URI.
    let twice = refusal(|p| p.subject_alt_names.push(SanType::URI(WEB.try_into().unwrap())));
    assert_eq!(twice, VerifyError::SeveralUris(2));
    for uri in [
        "https://cluster.local/ns/a/sa/b",
        "spiffe://cluster.local/ns/a/sa/b/",
        "spiffe://cluster.local",
        "spiffe://Cluster.local/ns/a/sa/b",
    ] {
        let error = refusal(|p| p.subject_alt_names = vec![SanType::URI(uri.try_into().unwrap())]);
        assert!(matches!(error, VerifyError::BadId { .. }), "{uri}: {error}");
        assert_eq!(error.reason(), Reason::TlsFailure);
    }
}

#[test]
fn an_authority_is_not_a_workload() {
    let error = refusal(|p| p.is_ca = IsCa::Ca(BasicConstraints::Unconstrained));
    assert_eq!(error, VerifyError::Authority(id(WEB)));
    for sign in [KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign] {
        let error = refusal(|p| p.key_usages.push(sign));
        assert_eq!(error, VerifyError::Authority(id(WEB)));
    }
    let error = refusal(|p| p.key_usages = vec![KeyUsagePurpose::KeyEncipherment]);
    assert_eq!(error, VerifyError::KeyUsage(id(WEB)));
    assert_eq!(error.reason(), Reason::TlsFailure);
}

#[test]
fn each_side_needs_its_extended_key_usage() {
    let ca = TestCa::new("root");
    let mut params = leaf_params(&[WEB]);
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
    assert!(judge(&params, &ca, &ours(&ca), PeerRole::Server).is_ok());
    let error = judge(&params, &ca, &ours(&ca), PeerRole::Client).unwrap_err();
    assert!(matches!(error, VerifyError::Chain { error: webpki::Error::RequiredEkuNotFoundContext(_), .. }), "{error}");
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
    assert!(judge(&params, &ca, &ours(&ca), PeerRole::Client).is_ok());
    assert!(judge(&params, &ca, &ours(&ca), PeerRole::Server).is_err());
}

#[test]
fn dates_count() {
    let ca = TestCa::new("root");
    let chain = ca.sign(&leaf_params(&[WEB])).chain;
    let bundles = ours(&ca);
    let late = judge_at(&chain, &bundles, PeerRole::Client, SystemTime::now() + hours(2)).unwrap_err();
    assert!(matches!(late, VerifyError::Chain { error: webpki::Error::CertExpired { .. }, .. }), "{late}");
    let early = judge_at(&chain, &bundles, PeerRole::Client, SystemTime::now() - hours(2)).unwrap_err();
    assert!(matches!(early, VerifyError::Chain { error: webpki::Error::CertNotValidYet { .. }, .. }), "{early}");
    assert!(judge_at(&chain, &bundles, PeerRole::Client, SystemTime::UNIX_EPOCH - Duration::from_secs(1)).is_err());
}

#[test]
fn an_unknown_critical_extension_is_refused() {
    let error = refusal(|p| {
        let mut extension = CustomExtension::from_oid_content(&[1, 3, 6, 1, 4, 1, 99999, 1], vec![5, 0]);
        extension.set_criticality(true);
        p.custom_extensions.push(extension);
    });
    assert_eq!(error.reason(), Reason::TlsFailure);
}

#[test]
fn each_trust_domain_has_its_own_roots() {
    let (ca, partner) = (TestCa::new("ours"), TestCa::new("partner"));
    let theirs = "spiffe://partner.example/ns/shop/sa/web";
    let bundles = ours(&ca);

    let error = judge(&leaf_params(&[theirs]), &partner, &bundles, PeerRole::Client).unwrap_err();
    assert_eq!(error.reason(), Reason::TrustDomain);
    assert!(error.to_string().contains("partner.example") && error.to_string().contains("cluster.local"), "{error}");
    // Even when our own root signed it.
    let error = judge(&leaf_params(&[theirs]), &ca, &bundles, PeerRole::Client).unwrap_err();
    assert_eq!(error.reason(), Reason::TrustDomain);

    let federated = bundles.with_domain(domain("partner.example"), vec![partner.der.clone()]).unwrap();
    assert_eq!(judge(&leaf_params(&[theirs]), &partner, &federated, PeerRole::Client), Ok(id(theirs)));
    // A federated root does not vouch for us, nor our root for them.
    assert!(judge(&leaf_params(&[WEB]), &partner, &federated, PeerRole::Client).is_err());
    assert!(judge(&leaf_params(&[theirs]), &ca, &federated, PeerRole::Client).is_err());
}

#[test]
fn an_alias_is_vouched_for_by_our_roots() {
    let ca = TestCa::new("root");
    let old = "spiffe://old.example/ns/shop/sa/web";
    let bundles = ours(&ca).with_alias(domain("old.example"));
    assert_eq!(judge(&leaf_params(&[old]), &ca, &bundles, PeerRole::Server), Ok(id(old)));
    assert!(judge(&leaf_params(&[old]), &TestCa::new("other"), &bundles, PeerRole::Server).is_err());
    // A bundle of its own takes the name away from our roots.
    let split = bundles.with_domain(domain("old.example"), vec![TestCa::new("other").der]).unwrap();
    assert!(judge(&leaf_params(&[old]), &ca, &split, PeerRole::Server).is_err());
}

#[test]
fn no_roots_trust_nobody() {
    let ca = TestCa::new("root");
    let bundles = TrustBundles::new(TrustDomain::default(), Vec::new()).unwrap();
    assert!(judge(&leaf_params(&[WEB]), &ca, &bundles, PeerRole::Client).is_err());
}

#[test]
fn reading_is_total() {
    let good = TestCa::new("root").sign(&leaf_params(&[WEB])).chain.remove(0);
    assert_eq!(spiffe_id_of(&good), Ok(id(WEB)));
    for length in 0..good.len() {
        assert!(spiffe_id_of(&good[..length]).is_err());
    }
    let mut longer = good.to_vec();
    longer.push(0);
    assert!(matches!(spiffe_id_of(&longer), Err(VerifyError::Unreadable(_))));
    // Any single byte changed: no panic, whatever the outcome.
    for position in 0..good.len() {
        let mut broken = good.to_vec();
        broken[position] ^= 0xff;
        let _ = leaf_of(&broken);
    }
}

fn verifier(bundles: TrustBundles) -> (PeerVerifier, watch::Sender<Arc<TrustBundles>>) {
    let sender = watch::Sender::new(Arc::new(bundles));
    let algorithms = TlsSettings::default().crypto().unwrap().signature_verification_algorithms;
    (PeerVerifier::new(sender.subscribe(), algorithms), sender)
}

#[test]
fn a_proven_chain_is_believed_for_its_bytes_usage_bundles_and_dates_only() {
    let ca = TestCa::new("root");
    let below = ca.intermediate("below");
    let mut params = leaf_params(&[WEB]);
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
    let leaf = below.sign(&params).chain.remove(0);
    let over = [below.der.clone()];
    let (verifier, bundles) = verifier(ours(&ca));
    let now = unix(SystemTime::now());
    let proven = |role| verifier.proven.len(role);

    verifier.verify(&leaf, &over, PeerRole::Server, now).unwrap();
    let chain = [leaf.clone(), below.der.clone()];
    let first = verifier.find_proven(&chain, PeerRole::Server, now).unwrap().0;
    assert_eq!((first.leaf.id.clone(), first.chain.len()), (id(WEB), 2));
    verifier.verify(&leaf, &over, PeerRole::Server, now).unwrap();
    let second = verifier.find_proven(&chain, PeerRole::Server, now).unwrap().0;
    assert!(Arc::ptr_eq(&first, &second), "the second time nothing was proven anew");

    // Another usage.
    assert!(verifier.verify(&leaf, &over, PeerRole::Client, now).is_err());
    // Another chain.
    assert!(verifier.verify(&leaf, &[], PeerRole::Server, now).is_err());
    assert!(verifier.verify(&leaf, &[TestCa::new("below").der], PeerRole::Server, now).is_err());
    // Another byte.
    let mut forged = leaf.to_vec();
    *forged.last_mut().unwrap() ^= 1;
    assert!(verifier.verify(&forged.into(), &over, PeerRole::Server, now).is_err());
    // Another date.
    assert!(verifier.verify(&leaf, &over, PeerRole::Server, unix(SystemTime::now() + hours(2))).is_err());
    assert!(verifier.verify(&leaf, &over, PeerRole::Server, unix(SystemTime::now() - hours(2))).is_err());
    assert_eq!((proven(PeerRole::Server), proven(PeerRole::Client)), (1, 0), "failures are not kept");
    // Other roots.
    bundles.send_replace(Arc::new(ours(&TestCa::new("other"))));
    assert!(verifier.verify(&leaf, &over, PeerRole::Server, now).is_err());
    assert!(verifier.find_proven(&chain, PeerRole::Server, now).is_none());
    // Back again: proven anew.
    bundles.send_replace(Arc::new(ours(&ca)));
    verifier.verify(&leaf, &over, PeerRole::Server, now).unwrap();
    assert!(!Arc::ptr_eq(&first, &verifier.find_proven(&chain, PeerRole::Server, now).unwrap().0));
}

#[test]
fn an_expired_intermediate_ends_a_proof() {
    let ca = TestCa::new("root");
    let below = ca.intermediate_until(SystemTime::now() + hours(1) / 2);
    let leaf = below.sign(&leaf_params(&[WEB])).chain.remove(0);
    let (verifier, _bundles) = verifier(ours(&ca));
    let over = [below.der.clone()];
    verifier.verify(&leaf, &over, PeerRole::Client, unix(SystemTime::now())).unwrap();
    // The leaf is valid for a whole hour.
    assert!(verifier.verify(&leaf, &over, PeerRole::Client, unix(SystemTime::now() + hours(3) / 4)).is_err());
}

#[test]
fn proofs_are_bounded() {
    let ca = TestCa::new("root");
    let leaf = ca.sign(&leaf_params(&[WEB])).chain.remove(0);
    let chains = ProvenChains::default();
    let bundles = Arc::new(ours(&ca));
    for n in 0..proven::MOST + 10 {
        // As if each had been verified: the bytes differ in the signature, which reading does not check.
        let mut bytes = leaf.to_vec();
        let end = bytes.len();
        bytes[end - 2..].copy_from_slice(&(n as u16).to_be_bytes());
        chains.keep(&bytes.into(), &[], PeerRole::Client, &bundles);
        assert!(chains.len(PeerRole::Client) <= proven::MOST);
    }
    assert!(chains.len(PeerRole::Client) > 0);
}
