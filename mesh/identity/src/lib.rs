//! Who we are and who we believe: SVIDs, their rotation, the TLS configurations made from them, and the verification of peers.
//!
//! A byte stream goes in ([`tls::connect`], [`tls::accept`]), an authenticated stream and a [`tls::Peer`] come out; what is
//! tunnelled inside is nobody's business here. Every refusal carries a [`mesh_model::Reason`].
//!
//! Upstream: an [`source::IdentitySource`], made by [`authority`] (the built-in [`local_ca`], the client of istiod's, [`istio_ca`], or of
//! SPIRE's agent, [`spire`], or a folder that somebody else fills, [`mounted`]) issues certificates and publishes trust bundles. Downstream: the proxies keep a
//! [`cache::SvidHandle`] per pod and hand the [`svid::Svid`] it holds to `connect` and `accept`.
//!
//! One TLS state machine (rustls), two crypto libraries under it ([`crypto::Provider`]). Signing of the development
//! authority's own certificates always runs on aws-lc, whichever library carries the handshakes.
#![forbid(unsafe_code)]

#[cfg(not(any(feature = "tls-aws-lc", feature = "tls-boring")))]
compile_error!("mesh-identity needs a crypto provider: feature `tls-aws-lc` or `tls-boring`");

pub mod arrival;
pub mod authority;
pub mod bundle;
pub mod cache;
pub mod clock;
pub mod crl_file;
pub mod crypto;
pub mod error;
pub mod federation;
pub mod forwarded;
mod handshakes;
pub mod istio_ca;
pub mod live;
pub mod local_ca;
mod look;
pub mod mounted;
mod pem;
mod read_ahead;
pub mod revocation;
pub mod source;
mod span;
pub mod spire;
pub mod svid;
#[cfg(test)]
mod testing;
pub mod tls;
pub mod verify;

pub use authority::Authority;
pub use bundle::TrustBundles;
pub use cache::{SvidCache, SvidHandle};
pub use error::IdentityError;
pub use read_ahead::ReadAhead;
pub use source::{Facts, IdentitySource, IssuedSvid, SourceSettings};
pub use svid::{Svid, TlsContext};
pub use tls::{Peer, TlsError};
