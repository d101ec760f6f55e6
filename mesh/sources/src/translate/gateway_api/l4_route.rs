//! Rules of TCPRoute and TLSRoute: weighted backends and nothing else.

use super::super::object::Reader;
use super::super::read::{self, Read};
use super::filter::Filters;
use super::reference::Owner;
use super::route::{self, Written};
use crate::yaml::Node;

/// Reads one rule of an object.
pub(super) fn rule<'p>(r: &mut Reader<'_>, object: Owner<'_, 'p>, rule: &'p Node<'p>) -> Read<'p, Written> {
    read::only(rule, &["name", "backendRefs"])?;
    Ok(Written {
        name: route::rule_name(r, rule)?,
        matches: Vec::new(),
        filters: Filters::default(),
        backends: route::backends(r, object, rule, None, false)?,
        timeout: None,
        retry: None,
        session: None,
    })
}
