//! Rules of a GRPCRoute.

use std::sync::Arc;

use mesh_model::l7::route::{GrpcMatch, HttpMatch};

use super::super::object::Reader;
use super::super::read::{self, Bad, Read};
use super::filter::{self, Place};
use super::reference::Owner;
use super::route::{self, PathKind, Rank, Written};
use super::session;
use crate::yaml::Node;

/// Reads one rule of an object.
pub(super) fn rule<'p>(r: &mut Reader<'_>, object: Owner<'_, 'p>, rule: &'p Node<'p>) -> Read<'p, Written> {
    read::only(rule, &["name", "matches", "filters", "backendRefs", "sessionPersistence"])?;
    let mut matches = Vec::new();
    for m in read::list(rule, "matches")? {
        matches.push(one_match(r, m)?);
    }
    if matches.is_empty() {
        matches.push((Rank::new(PathKind::Any, 0, true, 0, 0), Arc::default()));
    }
    let filters = filter::read(r, object, rule, Place::Grpc, false)?;
    let backends = route::backends(r, object, rule, Some(Place::Grpc), false)?;
    let session = session::read(r, object.root, rule, "/")?;
    Ok(Written { name: route::rule_name(r, rule)?, matches, filters, backends, timeout: None, retry: None, session })
}

/// A match, ranked like the path it stands for: `/service/method` exact, `/service/` a prefix, all else a pattern.
fn one_match<'p>(r: &mut Reader<'_>, m: &'p Node<'p>) -> Read<'p, (Rank, Arc<HttpMatch>)> {
    read::only(m, &["method", "headers"])?;
    let headers = route::header_matches(r, m)?;
    let (mut kind, mut length, mut grpc) = (PathKind::Any, 0, None);
    if let Some(method) = read::map(m, "method")? {
        read::only(method, &["type", "service", "method"])?;
        let part = |key: &str| method.get(key).filter(|n| n.text() != Some(""));
        let (service, name) = (part("service"), part("method"));
        if service.is_none() && name.is_none() {
            return Err(Bad::missing(method, "service", "a method match has a service or a method"));
        }
        let exact = read::text(method, "type")?.is_none_or(|t| t == "Exact");
        kind = match (exact, service, name) {
            (true, Some(_), Some(_)) => PathKind::Exact,
            (true, Some(_), None) => PathKind::Prefix,
            _ => PathKind::Regex,
        };
        length = [service, name].into_iter().flatten().filter_map(|n| n.text()).map(|t| t.len() + 1).sum();
        length += usize::from(kind == PathKind::Prefix);
        grpc = Some(GrpcMatch {
            service: service.map(|n| route::typed(r, method.get("type"), n)).transpose()?,
            method: name.map(|n| route::typed(r, method.get("type"), n)).transpose()?,
        });
    }
    let rank = Rank::new(kind, length, true, headers.len(), 0);
    Ok((rank, Arc::new(HttpMatch { headers, grpc, ..HttpMatch::default() })))
}
