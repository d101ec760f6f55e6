//! `envoy.filters.http.local_ratelimit`: its buckets as limits. Descriptors come first, as Envoy asks them first.

use std::sync::Arc;

use http::{Method, StatusCode};
use mesh_model::l7::limit::{Counts, KeyPart, Limit, Point, Rate, Which};

use super::super::http_text::name;
use super::super::object::{ObjectId, Reader};
use super::super::read::{self, Bad, Read};
use super::super::traffic_policy;
use super::{INSTEAD, always, flag, get, header_of, list, number, only, refused, text};
use crate::yaml::Node;

/// Its limits. `patch`: its number in the object, which tells its buckets from those of another patch.
pub(super) fn read<'p>(r: &mut Reader<'_>, n: &'p Node<'p>, id: &ObjectId, patch: usize, point: Point) -> Read<'p, Vec<Limit>> {
    only(
        n,
        &[
            "stat_prefix",
            "status",
            "token_bucket",
            "filter_enabled",
            "filter_enforced",
            "response_headers_to_add",
            "descriptors",
            "rate_limits",
            "enable_x_ratelimit_headers",
            "always_consume_default_token_bucket",
            "local_rate_limit_per_downstream_connection",
        ],
    )?;
    for field in ["filter_enabled", "filter_enforced"] {
        let Some(at) = get(n, field) else {
            return Err(refused(n, format!("without `{field}` Envoy limits nothing"), "write it with 100 %"));
        };
        if !always(at)? {
            return Err(refused(at, "a limit that is not always in force is none", "write 100 %"));
        }
    }
    if flag(n, "local_rate_limit_per_downstream_connection")? == Some(true) {
        return Err(refused(n, "buckets of one connection are not kept", INSTEAD));
    }
    let mut limits =
        Limits { r, id, prefix: format!("patch {patch}"), point, tells: tells(n)?, answer: answer(n)?, out: Vec::new() };
    let mut conditions = false;
    let actions = list(n, "rate_limits")?;
    for (i, descriptor) in list(n, "descriptors")?.iter().enumerate() {
        only(descriptor, &["entries", "token_bucket"])?;
        let (which, key) = descriptor_key(descriptor, actions)?;
        conditions |= which != Which::default();
        let rate = rate(descriptor)?;
        limits.add(&format!("descriptor {i}"), which, key, rate);
    }
    let all_described = !limits.out.is_empty() && !conditions;
    match flag(n, "always_consume_default_token_bucket")? {
        // Only for what no descriptor is for.
        Some(false) if all_described => {}
        Some(false) if !limits.out.is_empty() => {
            return Err(refused(n, "a bucket for what no descriptor matches is not kept", INSTEAD));
        }
        _ => limits.add("all", Which::default(), Vec::new(), rate(n)?),
    }
    Ok(limits.out)
}
type Answer = (StatusCode, Vec<(http::HeaderName, http::HeaderValue)>);

struct Limits<'a, 'b> {
    r: &'a mut Reader<'b>,
    id: &'a ObjectId,
    prefix: String,
    point: Point,
    tells: bool,
    answer: Answer,
    out: Vec<Limit>,
}
impl Limits<'_, '_> {
    fn add(&mut self, name: &str, which: Which, key: Vec<KeyPart>, rate: Rate) {
        let name = self.r.pool.text(&format!("{} {name}", self.prefix));
        let policy: Arc<str> = self.id.to_string().into();
        let counts = Counts { policy, name, which, key, rate };
        let (status, headers) = self.answer.clone();
        self.out.push(Limit::new(counts, self.point, self.tells, status, headers));
    }
}

fn tells<'p>(n: &'p Node<'p>) -> Read<'p, bool> {
    match text(n, "enable_x_ratelimit_headers")? {
        None | Some("OFF") => Ok(false),
        Some("DRAFT_VERSION_03") => Ok(true),
        Some(other) => Err(refused(n, format!("{other} is not known"), "write DRAFT_VERSION_03")),
    }
}
fn answer<'p>(n: &'p Node<'p>) -> Read<'p, Answer> {
    let mut status = StatusCode::TOO_MANY_REQUESTS;
    if let Some(at) = get(n, "status") {
        only(at, &["code"])?;
        if let Some(code) = get(at, "code") {
            // Envoy does not take less than 400.
            status = if code.text() == Some("TooManyRequests") { status } else { traffic_policy::refusal_status(code)? };
        }
    }
    let headers = list(n, "response_headers_to_add")?.iter().map(|h| header_of(h).map(|(_, header)| header));
    Ok((status, headers.collect::<Read<'p, _>>()?))
}
fn rate<'p>(n: &'p Node<'p>) -> Read<'p, Rate> {
    let Some(bucket) = get(n, "token_bucket") else { return Err(Bad::missing(n, "token_bucket", "a limit has a bucket")) };
    let fields = ["max_tokens", "tokens_per_fill", "fill_interval"];
    only(bucket, &fields)?;
    traffic_policy::token_bucket(bucket, fields.map(|f| (f, get(bucket, f))))
}

/// Which requests have a descriptor, and what tells them apart: by the first actions that make its entries.
fn descriptor_key<'p>(descriptor: &'p Node<'p>, actions: &'p [Node<'p>]) -> Read<'p, (Which, Vec<KeyPart>)> {
    let entries = list(descriptor, "entries")?;
    for element in actions {
        only(element, &["actions"])?;
        let actions = list(element, "actions")?;
        let mut made = Vec::with_capacity(actions.len());
        for action in actions {
            made.push(Action::read(action)?);
        }
        let same = |(entry, action): (&Node<'p>, &Action<'p>)| get(entry, "key").and_then(Node::text) == Some(action.key);
        if made.len() != entries.len() || !entries.iter().zip(&made).all(same) {
            continue;
        }
        let (mut which, mut key) = (Which::default(), Vec::new());
        for (entry, action) in entries.iter().zip(made) {
            only(entry, &["key", "value"])?;
            action.apply(entry, text(entry, "value")?.filter(|v| !v.is_empty()), &mut which, &mut key)?;
        }
        return Ok((which, key));
    }
    Err(refused(descriptor, "no `rate_limits` of this filter make these entries, so they never match", "add the actions"))
}
/// One action of `rate_limits`: the entry it makes.
struct Action<'p> {
    key: &'p str,
    makes: Makes<'p>,
}
enum Makes<'p> {
    Address { v4: u8, v6: u8 },
    Header(&'p Node<'p>, &'p str),
    Constant(&'p str),
}
impl<'p> Action<'p> {
    fn read(n: &'p Node<'p>) -> Read<'p, Self> {
        only(n, &["remote_address", "masked_remote_address", "request_headers", "generic_key"])?;
        let [e] = read::entries(n)? else { return Err(Bad::value(n, "an action is one field", "")) };
        let body = &e.node;
        Ok(match super::snake(&e.key).as_str() {
            // The whole of an IPv6 host's network: who has one address has them all.
            "remote_address" => Self { key: "remote_address", makes: Makes::Address { v4: 32, v6: 64 } },
            "masked_remote_address" => {
                only(body, &["v4_prefix_mask_len", "v6_prefix_mask_len"])?;
                let bits = |field, default: u32| match get(body, field).map(number).transpose()?.unwrap_or(default) {
                    bits if bits <= default => Ok(bits as u8),
                    _ => Err(Bad::value(body, format!("a prefix has at most {default} bits"), "")),
                };
                let makes = Makes::Address { v4: bits("v4_prefix_mask_len", 32)?, v6: bits("v6_prefix_mask_len", 128)? };
                Self { key: "masked_remote_address", makes }
            }
            "request_headers" => {
                only(body, &["header_name", "descriptor_key", "skip_if_absent"])?;
                let Some(header) = get(body, "header_name") else {
                    return Err(Bad::missing(body, "header_name", "which header"));
                };
                Self {
                    key: text(body, "descriptor_key")?.unwrap_or_default(),
                    makes: Makes::Header(header, read::scalar(header)?),
                }
            }
            _ => {
                only(body, &["descriptor_key", "descriptor_value"])?;
                let value = text(body, "descriptor_value")?.unwrap_or_default();
                Self { key: text(body, "descriptor_key")?.unwrap_or("generic_key"), makes: Makes::Constant(value) }
            }
        })
    }
    /// Adds what its entry tells apart, or, with a value, which requests it is for.
    fn apply(self, entry: &'p Node<'p>, value: Option<&'p str>, which: &mut Which, key: &mut Vec<KeyPart>) -> Read<'p, ()> {
        match (self.makes, value) {
            (Makes::Address { v4, v6 }, None) => key.push(KeyPart::SourceIp { v4, v6 }),
            (Makes::Header(_, ":path"), None) => key.push(KeyPart::Path),
            (Makes::Header(_, ":authority"), None) => key.push(KeyPart::Authority),
            (Makes::Header(_, ":method"), Some(value)) => {
                let method = Method::from_bytes(value.as_bytes());
                which.methods.push(method.map_err(|_| Bad::value(entry, format!("`{value}` is not a method"), ""))?);
            }
            (Makes::Header(at, header), None) if !header.starts_with(':') => key.push(KeyPart::Header(name(at, header)?)),
            (Makes::Header(at, header), Some(value)) if !header.starts_with(':') => {
                which.headers.push((name(at, header)?, value.into()));
            }
            (Makes::Constant(constant), value) if value.is_none_or(|v| v == constant) => {}
            _ => return Err(refused(entry, "this entry is not done here", INSTEAD)),
        }
        Ok(())
    }
}
