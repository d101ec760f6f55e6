//! The hash of a request, which consistent balancing takes for its place on the ring (Envoy's hash policies).
use crate::l7::cookie;
use crate::l7::destination::HashKey;
use crate::l7::route::RequestFacts;
use crate::l7::select::query_value;
use std::net::IpAddr;

/// What a request's hash is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum HashOutcome {
    /// This.
    Hash(u64),
    /// The cookie was not there and we make it: this hash, and the response sets the cookie so that the next request has it.
    Cookie {
        /// Hash of the new cookie's value.
        hash: u64,
        /// Value of `Set-Cookie`.
        set_cookie: String,
    },
    /// There is nothing to hash: any endpoint will do.
    Nothing,
}

/// Hashes what `key` names, with XXH64 and seed 0 as Envoy does. `fresh` makes the value of a new cookie.
pub fn request_hash(key: &HashKey, req: &RequestFacts<'_>, client_ip: IpAddr, fresh: u64) -> HashOutcome {
    let found = match key {
        HashKey::Header(name) => {
            let mut values: Vec<&[u8]> = req.headers.get_all(name).iter().map(http::HeaderValue::as_bytes).collect();
            // Several values are one thing, in whatever order they came.
            values.sort_unstable();
            (!values.is_empty()).then(|| values.into_iter().fold(0, |seed, value| xxh64(value, seed)))
        }
        HashKey::Cookie { name, path, ttl, attributes } => match (cookie::find(req.headers, name), ttl) {
            (Some(value), _) => Some(xxh64(value.as_bytes(), 0)),
            (None, Some(ttl)) => {
                let value = format!("{fresh:016x}");
                let set_cookie = cookie::set(name, &value, *ttl, path.as_deref(), attributes);
                return HashOutcome::Cookie { hash: xxh64(value.as_bytes(), 0), set_cookie };
            }
            (None, None) => None,
        },
        HashKey::SourceIp => Some(address_hash(client_ip)),
        HashKey::Query(name) => query_value(req.query, name).map(|value| xxh64(value.as_bytes(), 0)),
    };
    found.map_or(HashOutcome::Nothing, HashOutcome::Hash)
}

/// The hash of a client's address (`useSourceIp`), for requests and connections of bytes alike.
pub fn address_hash(client: IpAddr) -> u64 {
    xxh64(client.to_canonical().to_string().as_bytes(), 0)
}

const P1: u64 = 0x9E37_79B1_85EB_CA87;
const P2: u64 = 0xC2B2_AE3D_27D4_EB4F;
const P3: u64 = 0x1656_67B1_9E37_79F9;
const P4: u64 = 0x85EB_CA77_C2B2_AE63;
const P5: u64 = 0x27D4_EB2F_1656_67C5;

/// XXH64 (xxHash specification 0.1.1): what Envoy hashes requests and ring points with.
pub fn xxh64(data: &[u8], seed: u64) -> u64 {
    let round = |acc: u64, lane: u64| acc.wrapping_add(lane.wrapping_mul(P2)).rotate_left(31).wrapping_mul(P1);
    let (stripes, mut rest) = data.as_chunks::<32>();
    let mut h = if stripes.is_empty() {
        seed.wrapping_add(P5)
    } else {
        let mut acc = [seed.wrapping_add(P1).wrapping_add(P2), seed.wrapping_add(P2), seed, seed.wrapping_sub(P1)];
        for stripe in stripes {
            for (acc, lane) in acc.iter_mut().zip(stripe.as_chunks::<8>().0) {
                *acc = round(*acc, u64::from_le_bytes(*lane));
            }
        }
        let [a, b, c, d] = acc;
        let sum = a.rotate_left(1).wrapping_add(b.rotate_left(7)).wrapping_add(c.rotate_left(12)).wrapping_add(d.rotate_left(18));
        acc.into_iter().fold(sum, |h, acc| (h ^ round(0, acc)).wrapping_mul(P1).wrapping_add(P4))
    };
    h = h.wrapping_add(data.len() as u64);
    while let Some((lane, after)) = rest.split_first_chunk::<8>() {
        h = (h ^ round(0, u64::from_le_bytes(*lane))).rotate_left(27).wrapping_mul(P1).wrapping_add(P4);
        rest = after;
    }
    if let Some((lane, after)) = rest.split_first_chunk::<4>() {
        h = (h ^ u64::from(u32::from_le_bytes(*lane)).wrapping_mul(P1)).rotate_left(23).wrapping_mul(P2).wrapping_add(P3);
        rest = after;
    }
    for byte in rest {
        h = (h ^ u64::from(*byte).wrapping_mul(P5)).rotate_left(11).wrapping_mul(P1);
    }
    h = (h ^ (h >> 33)).wrapping_mul(P2);
    h = (h ^ (h >> 29)).wrapping_mul(P3);
    h ^ (h >> 32)
}

#[cfg(test)]
mod tests;
