//! Rate limits: which requests one counts, by what it tells them apart, and how many it lets through.
//!
//! A bucket belongs to one limit and one value of its key, in one process. Where buckets are kept is [`table`], the
//! arithmetic is [`rate`]; time comes in from outside. Upstream: `mesh-sources` (TrafficPolicy, EnvoyFilter). Downstream: the
//! waypoint's phase of this name.
use crate::addr::without_port;
use crate::l7::policy::PathPattern;
use crate::l7::route::RequestFacts;
use http::Method;
use http::header::{HeaderName, HeaderValue};
use std::hash::{Hash, Hasher};
use std::net::IpAddr;
use std::sync::Arc;

pub mod rate;
pub mod table;

pub use rate::{Rate, Taken, Ticks};

/// One limit, compiled.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Limit {
    /// What it counts; see there.
    pub counts: Counts,
    /// When in the order of things it counts.
    pub point: Point,
    /// Whether answers to the requests it counts say how much is left (`x-ratelimit-*`, Envoy's DRAFT_VERSION_03), and then
    /// the text of `x-ratelimit-limit`.
    pub tells: Option<HeaderValue>,
    /// Status of the refusal.
    pub status: http::StatusCode,
    /// Set on the refusal.
    pub headers: Vec<(HeaderName, HeaderValue)>,
    /// Of `counts`: two limits that count alike share their buckets, and a bucket outlives every change of anything else.
    id: u64,
}
/// What a limit counts: everything that makes its buckets its own.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Counts {
    /// The object it was written in (`TrafficPolicy ns/name`), for logs.
    pub policy: Arc<str>,
    /// Its name there.
    pub name: Arc<str>,
    /// Which requests; none of a kind: all.
    pub which: Which,
    /// What tells buckets apart; empty: one bucket for all.
    pub key: Vec<KeyPart>,
    /// How much.
    pub rate: Rate,
}
/// Which requests are counted. Every kind must hold.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Which {
    /// Methods.
    pub methods: Vec<Method>,
    /// Paths: any of them.
    pub paths: Vec<PathPattern>,
    /// Headers of which some value is this text: all of them.
    pub headers: Vec<(HeaderName, Arc<str>)>,
}
/// When a limit counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Point {
    /// Before anything else: refused callers count too, and cost nothing more (an EnvoyFilter inserted first, or before the
    /// connection manager's filters).
    BeforeAuthentication,
    /// Only what was allowed: nobody else can use up a bucket (an EnvoyFilter inserted before the router).
    AfterAuthorization,
}
/// One part of a key. What a request does not have is a value of its own, shared by all that lack it: leaving a header away
/// is no way around a limit.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum KeyPart {
    /// Address of the client as the connection shows it, cut to a prefix.
    SourceIp {
        /// Bits kept of an IPv4 address, at most 32.
        v4: u8,
        /// Bits kept of an IPv6 address, at most 128: who has one address has its whole /64.
        v6: u8,
    },
    /// Values of a header, in their order.
    Header(HeaderName),
    /// Path without query, normalised.
    Path,
    /// The host of the authority, however the client wrote it.
    Authority,
    /// A claim of the verified token by its path, together with the token's issuer: another issuer's user of the same name is
    /// somebody else. Known after authentication.
    Claim(Box<[Arc<str>]>),
}

impl Limit {
    /// A limit that counts this.
    pub fn new(
        counts: Counts,
        point: Point,
        tells: bool,
        status: http::StatusCode,
        headers: Vec<(HeaderName, HeaderValue)>,
    ) -> Self {
        use std::hash::BuildHasher as _;
        // The same content has the same id in every version.
        let id = foldhash::fast::FixedState::default().hash_one(&counts);
        let tells = tells.then(|| HeaderValue::from(counts.rate.most()));
        Self { counts, point, tells, status, headers, id }
    }
    /// Whether it counts this request.
    pub fn concerns(&self, facts: &RequestFacts<'_>) -> bool {
        let which = &self.counts.which;
        (which.methods.is_empty() || which.methods.contains(facts.method))
            && (which.paths.is_empty() || which.paths.iter().any(|p| p.matches(facts.path)))
            && which
                .headers
                .iter()
                .all(|(name, text)| facts.headers.get_all(name).iter().any(|v| v.as_bytes() == text.as_bytes()))
    }
    /// Feeds what tells the bucket of this request from others. Whoever chooses the hasher must seed it: with a known hash a
    /// client could choose whose bucket it uses up.
    pub fn hash_key(&self, facts: &RequestFacts<'_>, client: IpAddr, hasher: &mut impl Hasher) {
        self.id.hash(hasher);
        for part in &self.counts.key {
            match part {
                KeyPart::SourceIp { v4, v6 } => masked(client, *v4, *v6).hash(hasher),
                KeyPart::Header(name) => {
                    let mut count = 0_u32;
                    for value in facts.headers.get_all(name) {
                        value.as_bytes().hash(hasher);
                        count += 1;
                    }
                    count.hash(hasher);
                }
                KeyPart::Path => facts.path.hash(hasher),
                KeyPart::Authority => {
                    let host = without_port(facts.authority).unwrap_or(facts.authority);
                    host.strip_suffix('.').unwrap_or(host).bytes().for_each(|b| hasher.write_u8(b.to_ascii_lowercase()));
                    hasher.write_u8(0);
                }
                KeyPart::Claim(path) => {
                    facts.claims.is_some().hash(hasher);
                    if let Some(claims) = facts.claims {
                        claims.hash_claim(path, hasher);
                    }
                }
            }
        }
    }
    /// The bucket of newcomers for whom the table has no place.
    pub fn hash_overflow(&self, hasher: &mut impl Hasher) {
        self.id.hash(hasher);
        "overflow".hash(hasher);
    }
}

/// The first bits of an address, the others zero.
fn masked(ip: IpAddr, v4: u8, v6: u8) -> IpAddr {
    match ip.to_canonical() {
        IpAddr::V4(ip) => {
            let mask = u32::MAX.checked_shl(32 - u32::from(v4.min(32))).unwrap_or(0);
            IpAddr::V4((u32::from(ip) & mask).into())
        }
        IpAddr::V6(ip) => {
            let mask = u128::MAX.checked_shl(128 - u32::from(v6.min(128))).unwrap_or(0);
            IpAddr::V6((u128::from(ip) & mask).into())
        }
    }
}

#[cfg(test)]
mod tests;
