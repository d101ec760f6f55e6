//! Which crypto library carries the handshakes, and with which algorithms.
//!
//! Both libraries sit under the same rustls state machine and are narrowed to the same list: TLS 1.3 with AES-GCM (what
//! Istio's proxies offer, node-agent §1.5) and X25519, P-256 or the X25519MLKEM768 hybrid. Refuses a combination the library
//! lacks. Downstream: [`crate::svid`].

use std::str::FromStr;
use std::sync::Arc;

use rustls::crypto::CryptoProvider;
use rustls::{CipherSuite, NamedGroup};
use serde::{Deserialize, Serialize};

use crate::error::IdentityError;

/// The crypto library under rustls.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Provider {
    /// aws-lc-rs.
    #[cfg(feature = "tls-aws-lc")]
    AwsLc,
    /// BoringSSL.
    #[cfg(feature = "tls-boring")]
    Boring,
}

impl Default for Provider {
    /// Aws-lc, where it is built in.
    fn default() -> Self {
        #[cfg(feature = "tls-aws-lc")]
        return Self::AwsLc;
        #[cfg(not(feature = "tls-aws-lc"))]
        return Self::Boring;
    }
}

impl Provider {
    /// The name in settings, logs and the configuration dump.
    pub fn as_str(self) -> &'static str {
        match self {
            #[cfg(feature = "tls-aws-lc")]
            Self::AwsLc => "aws-lc",
            #[cfg(feature = "tls-boring")]
            Self::Boring => "boring",
        }
    }

    fn everything(self) -> CryptoProvider {
        match self {
            // Its own choice of groups is smaller in a build with the module of FIPS 140, which may run without that policy too.
            #[cfg(feature = "tls-aws-lc")]
            Self::AwsLc => CryptoProvider {
                kx_groups: rustls::crypto::aws_lc_rs::ALL_KX_GROUPS.to_vec(),
                ..rustls::crypto::aws_lc_rs::default_provider()
            },
            #[cfg(feature = "tls-boring")]
            Self::Boring => boring_rustls_provider::provider(),
        }
    }
}

/// Key exchange preference. The side that connects decides; the side that accepts takes whatever of the list is offered.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum KeyExchange {
    /// X25519 first; the hybrid is accepted from peers that insist on it. The cheapest: the hybrid adds about a kilobyte each
    /// way and a fifth to the CPU time of a handshake (`cargo bench -p mesh-identity`: about 90 µs of 410, both ends).
    #[default]
    Classical,
    /// X25519MLKEM768 first, X25519 for peers without it: protects recorded traffic from a future quantum computer.
    PreferHybrid,
    /// X25519MLKEM768 only (Istio's `COMPLIANCE_POLICY=pqc`).
    RequireHybrid,
}

/// The rules that all of a process's cryptography obeys: Istio's `COMPLIANCE_POLICY`, by its values.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Compliance {
    /// None but our own.
    #[default]
    Own,
    /// `pqc`: no key exchange without ML-KEM.
    PostQuantum,
    /// `fips-140-2`: the module of a library that is made for FIPS 140, and of that what is approved. Feature `tls-fips`.
    Fips,
}

impl FromStr for Compliance {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "" => Ok(Self::Own),
            "pqc" => Ok(Self::PostQuantum),
            "fips-140-2" => Ok(Self::Fips),
            _ => Err(format!("{text:?} is neither `pqc` nor `fips-140-2`")),
        }
    }
}

impl From<Compliance> for TlsSettings {
    fn from(compliance: Compliance) -> Self {
        match compliance {
            Compliance::Own => Self::default(),
            Compliance::PostQuantum => Self { key_exchange: KeyExchange::RequireHybrid, ..Self::default() },
            Compliance::Fips => Self { fips: true, ..Self::default() },
        }
    }
}

/// Settings of the TLS layer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
pub struct TlsSettings {
    /// The crypto library: `aws-lc` or `boring`, as far as compiled in.
    pub provider: Provider,
    /// `classical`, `prefer-hybrid` or `require-hybrid`.
    pub key_exchange: KeyExchange,
    /// Only by the module for FIPS 140 of the library (feature `tls-fips`): X25519 alone is left out then.
    pub fips: bool,
}

impl TlsSettings {
    /// The narrowed crypto provider of these settings.
    pub fn crypto(&self) -> Result<Arc<CryptoProvider>, IdentityError> {
        let mut crypto = self.provider.everything();
        let (small, large) = (CipherSuite::TLS13_AES_128_GCM_SHA256, CipherSuite::TLS13_AES_256_GCM_SHA384);
        // Both are offered and accepted, as istio/ztunnel does. Of two agents of ours the first counts: on processors with SHA
        // and AES instructions but without AVX-512 the small suite saves a tenth of a handshake (SHA-384 has no instructions
        // there) and a quarter of the encryption of bulk traffic. Who asks for post-quantum keys wants the large one.
        let suites = match self.key_exchange {
            KeyExchange::RequireHybrid => [large, small],
            KeyExchange::Classical | KeyExchange::PreferHybrid => [small, large],
        };
        crypto.cipher_suites =
            suites.iter().filter_map(|want| crypto.cipher_suites.iter().find(|have| have.suite() == *want).copied()).collect();
        let groups: &[NamedGroup] = match self.key_exchange {
            KeyExchange::Classical if self.fips => &[NamedGroup::secp256r1, NamedGroup::X25519MLKEM768],
            KeyExchange::PreferHybrid if self.fips => &[NamedGroup::X25519MLKEM768, NamedGroup::secp256r1],
            KeyExchange::Classical => &[NamedGroup::X25519, NamedGroup::secp256r1, NamedGroup::X25519MLKEM768],
            KeyExchange::PreferHybrid => &[NamedGroup::X25519MLKEM768, NamedGroup::X25519, NamedGroup::secp256r1],
            KeyExchange::RequireHybrid => &[NamedGroup::X25519MLKEM768],
        };
        crypto.kx_groups =
            groups.iter().filter_map(|want| crypto.kx_groups.iter().find(|have| have.name() == *want).copied()).collect();
        if crypto.cipher_suites.len() != suites.len() || crypto.kx_groups.len() != groups.len() {
            return Err(IdentityError::Crypto(format!("{} lacks an algorithm of {self:?}", self.provider.as_str())));
        }
        // What goes out of the mesh, and comes in at gateways, is by rustls' own choice of algorithms: it must be as approved.
        if self.fips && !(crypto.fips() && rustls::crypto::aws_lc_rs::default_provider().fips()) {
            return Err(IdentityError::Crypto(format!(
                "{} is built without its module for FIPS 140: build with `--features tls-fips`",
                self.provider.as_str()
            )));
        }
        Ok(Arc::new(crypto))
    }
}
