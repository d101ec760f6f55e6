//! The phases of one exchange, one file each; `exchange::run` has their order.
pub(crate) mod admit;
pub(crate) mod attempt;
pub(crate) mod cors;
pub(crate) mod expose;
pub(crate) mod fault;
pub(crate) mod forward;
pub(crate) mod mirror;
pub(crate) mod replay;
pub(crate) mod respond;
pub(crate) mod rewrite;
pub(crate) mod route;
