//! The handshake: a byte stream in, an authenticated stream and a [`Peer`] out, within a deadline.
//!
//! Refuses, always with a [`Reason`]: a peer of an unknown trust domain, any other certificate or protocol problem, another
//! identity than the plan expects, and a handshake that does not finish in time. Knows nothing of tunnels.
//! Upstream: [`crate::svid`]. Downstream: the proxies' dial and accept.

use std::io;
use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;
use std::time::SystemTime;

use mesh_model::{Reason, Refusal, SpiffeId};
use rustls::crypto::WebPkiSupportedAlgorithms;
use rustls::{CertificateError, CommonState};
use rustls_pki_types::{CertificateDer, ServerName};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::time::{Instant, timeout_at};
use tokio_rustls::{TlsAcceptor, TlsConnector, client, server};

use crate::bundle::TrustBundles;
use crate::clock::unix;
use crate::read_ahead::ReadAhead;
use crate::svid::Svid;
use crate::verify::{PeerRole, VerifyError, leaf_of, verify_chain};

/// How many bytes a connection may hold in each of its two outgoing buffers (plaintext before, records after encryption).
/// rustls' own 64 KiB makes a relay with large reads stop four times as often.
pub const BUFFER_LIMIT: usize = 256 * 1024;

/// An authenticated stream we connected.
pub type ClientStream<IO> = client::TlsStream<ReadAhead<IO>>;
/// An authenticated stream we accepted.
pub type ServerStream<IO> = server::TlsStream<ReadAhead<IO>>;

/// Who is at the other end, as proved by the handshake.
#[derive(Clone, Debug)]
pub struct Peer {
    /// Its verified identity.
    pub id: SpiffeId,
    /// Its certificates, leaf first.
    pub chain: Arc<[CertificateDer<'static>]>,
    /// End of validity of its leaf.
    pub not_after: SystemTime,
    verified_at: SystemTime,
    role: PeerRole,
    algorithms: WebPkiSupportedAlgorithms,
    /// By what it was proven, where that was still in force when the handshake ended.
    proven_by: Option<Arc<TrustBundles>>,
}

impl Peer {
    /// Whether the chain would still be accepted under (newer) `bundles`. Judged at the date of the handshake: a connection
    /// does not end because a certificate that was valid then has expired meanwhile; only withdrawn roots or trust domains
    /// end it. Costs signature checks (about 100 µs): call it when the bundles change, not per request.
    pub fn still_trusted(&self, bundles: &TrustBundles) -> bool {
        self.chain.split_first().is_some_and(|(leaf, intermediates)| {
            verify_chain(leaf, intermediates, self.role, bundles, &self.algorithms, unix(self.verified_at)).is_ok()
        })
    }

    /// [`Self::still_trusted`], for nothing where `bundles` are those it was accepted by.
    pub fn is_trusted(&self, bundles: &Arc<TrustBundles>) -> bool {
        self.proven_by.as_ref().is_some_and(|by| Arc::ptr_eq(by, bundles)) || self.still_trusted(bundles)
    }

    fn of(state: &CommonState, role: PeerRole, svid: &Svid) -> Result<Self, TlsError> {
        let missing = || TlsError::new(Reason::Internal, "no peer certificate after a mutual handshake");
        let chain = state.peer_certificates().ok_or_else(missing)?;
        let verified_at = svid.clock.now();
        let (leaf, chain, proven_by) = if let Some((proven, by)) = svid.verifier.find_proven(chain, role, unix(verified_at)) {
            (proven.leaf.clone(), Arc::clone(&proven.chain), Some(by))
        } else {
            // Bundles changed since, or the memory was full. The verifier has read this leaf: failing here is ours.
            let leaf = leaf_of(chain.first().ok_or_else(missing)?)
                .map_err(|error| TlsError::new(Reason::Internal, error.to_string()))?;
            (leaf, chain.iter().cloned().collect(), None)
        };
        let algorithms = svid.verifier.algorithms();
        Ok(Self { id: leaf.id, chain, not_after: leaf.not_after, verified_at, role, algorithms, proven_by })
    }
}

/// A handshake that did not succeed.
#[derive(Debug, thiserror::Error)]
#[error("{reason}: {detail}")]
pub struct TlsError {
    /// The word.
    pub reason: Reason,
    /// The particulars.
    pub detail: String,
    /// The error below, if there is one.
    #[source]
    pub source: Option<io::Error>,
}

impl TlsError {
    fn new(reason: Reason, detail: impl Into<String>) -> Self {
        Self { reason, detail: detail.into(), source: None }
    }
}

impl From<io::Error> for TlsError {
    fn from(error: io::Error) -> Self {
        let (reason, detail) = explain(&error);
        Self { reason, detail, source: Some(error) }
    }
}

impl From<TlsError> for Refusal {
    fn from(error: TlsError) -> Self {
        Refusal::new(error.reason, error.detail)
    }
}

/// Reason and text for an error of a TLS stream. Also for errors *after* the handshake: in TLS 1.3 the connecting side learns
/// with its first read that the other side refused its certificate.
pub fn explain(error: &io::Error) -> (Reason, String) {
    let Some(tls) = error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>()) else {
        let detail = match error.kind() {
            io::ErrorKind::UnexpectedEof => "the peer closed the connection during TLS".to_owned(),
            _ => error.to_string(),
        };
        return (Reason::TlsFailure, detail);
    };
    match tls {
        rustls::Error::InvalidCertificate(CertificateError::Other(other)) => match other.0.downcast_ref::<VerifyError>() {
            Some(verify) => (verify.reason(), verify.to_string()),
            None => (Reason::TlsFailure, tls.to_string()),
        },
        rustls::Error::InvalidCertificate(CertificateError::Revoked) => (Reason::CertRevoked, "the peer's".into()),
        rustls::Error::AlertReceived(alert) => {
            (Reason::TlsFailure, format!("the peer refused the handshake with alert {alert:?}"))
        }
        _ => (Reason::TlsFailure, tls.to_string()),
    }
}

/// Connects as `svid` over `io` and makes sure that the peer is one of `expect` before any byte is sent. An empty `expect`
/// trusts nobody.
///
/// ALPN offers `h2` and tolerates a peer that does not choose.
pub async fn connect<IO>(
    svid: &Svid,
    io: IO,
    expect: &[SpiffeId],
    deadline: Instant,
) -> Result<(ClientStream<IO>, Peer), TlsError>
where
    IO: AsyncRead + AsyncWrite + Unpin,
{
    // Never sent (SNI is off) and never compared; rustls wants one.
    let nobody = ServerName::IpAddress(IpAddr::V4(Ipv4Addr::UNSPECIFIED).into());
    let handshake = TlsConnector::from(Arc::clone(&svid.client))
        .connect_with(nobody, ReadAhead::new(io), |connection| connection.set_buffer_limit(Some(BUFFER_LIMIT)));
    let begun = Instant::now();
    let stream = timeout_at(deadline, handshake).await.map_err(|_| late("connecting"))??;
    let peer = Peer::of(stream.get_ref().1, PeerRole::Server, svid)?;
    if !expect.contains(&peer.id) {
        return Err(TlsError::new(Reason::IdentityMismatch, mismatch(&peer.id, expect)));
    }
    svid.handshakes.dialled.observe_duration(begun.elapsed());
    Ok((stream, peer))
}

/// Accepts a mutual handshake over `io` as `svid`. Whether the peer may do what it asks for is policy, decided later.
pub async fn accept<IO>(svid: &Svid, io: IO, deadline: Instant) -> Result<(ServerStream<IO>, Peer), TlsError>
where
    IO: AsyncRead + AsyncWrite + Unpin,
{
    let handshake = TlsAcceptor::from(Arc::clone(&svid.server))
        .accept_with(ReadAhead::new(io), |connection| connection.set_buffer_limit(Some(BUFFER_LIMIT)));
    let begun = Instant::now();
    let stream = timeout_at(deadline, handshake).await.map_err(|_| late("accepting"))??;
    let peer = Peer::of(stream.get_ref().1, PeerRole::Client, svid)?;
    svid.handshakes.accepted.observe_duration(begun.elapsed());
    Ok((stream, peer))
}

fn late(doing: &str) -> TlsError {
    TlsError::new(Reason::HandshakeTimeout, format!("the TLS handshake did not finish in time ({doing})"))
}

fn mismatch(found: &SpiffeId, expect: &[SpiffeId]) -> String {
    match expect {
        [] => format!("the peer is {found}, and the plan names nobody it may be"),
        [one] => format!("the peer is {found}, expected {one}"),
        [one, rest @ ..] => format!("the peer is {found}, expected {one} or one of {} more", rest.len()),
    }
}

#[cfg(test)]
mod tests;
