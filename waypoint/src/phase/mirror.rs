//! Copies of requests to somewhere else, whose answers nobody waits for.
use crate::exchange::Exchange;

/// Sends the copies the route asks for.
pub(crate) fn copy(_ex: &mut Exchange<'_>) {}
