//! Retries: which outcome of an attempt is worth another, and how long to wait (Envoy's retry state).
//!
//! A client's own wishes (`x-envoy-retry-on`, `x-envoy-max-retries`, `x-envoy-upstream-rq-*`) are not honoured: whoever may
//! send requests may not choose how much load one of them makes. How many, and whether the whole time is up, is the
//! caller's business.
use crate::l7::failure::Failure;
use crate::l7::route::{RetryOn, RetryPolicy};
use crate::lb::below;
use std::time::Duration;

/// How an attempt ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The upstream answered; nothing of the answer has gone to the client.
    Answered {
        /// Status.
        status: u16,
        /// `grpc-status` of the response headers (an answer without a body; one in trailers comes too late).
        grpc_status: Option<u32>,
        /// `x-envoy-ratelimited` is there: another proxy limited the request.
        rate_limited: bool,
    },
    /// It did not.
    Failed(Failure),
}

/// Whether the policy wants another attempt after this outcome.
///
/// Any failure of the endpoint counts as a 5xx, because it would become one: `5xx`, `gateway-error` and `reset` cover them
/// all, an attempt's time limit included (when the time of the whole request is up nothing is tried). Istio's default names
/// none of the three, so a time limit per attempt is not retried by it (spec/waypoint §10).
pub fn worth_retry(policy: &RetryPolicy, outcome: &Outcome) -> bool {
    let on = policy.on;
    match *outcome {
        Outcome::Answered { rate_limited: true, .. } => on.has(RetryOn::ENVOY_RATELIMITED),
        Outcome::Answered { status, grpc_status, rate_limited: false } => {
            on.has(RetryOn::FIVE_XX) && (500..600).contains(&status)
                || on.has(RetryOn::GATEWAY_ERROR) && matches!(status, 502..=504)
                || on.has(RetryOn::RETRIABLE_4XX) && status == 409
                || on.has(RetryOn::STATUS_CODES) && policy.statuses.contains(&status)
                || grpc_status.and_then(grpc_condition).is_some_and(|c| on.has(c))
        }
        // Nothing was sent, and another attempt would be one more; or nobody waits for it.
        Outcome::Failed(
            Failure::Overflow | Failure::NoCluster | Failure::NoHealthy | Failure::ClientGone | Failure::ClientProtocol,
        ) => false,
        Outcome::Failed(failure) => {
            let named = match failure {
                Failure::Connect | Failure::ConnectTimeout => Some(RetryOn::CONNECT_FAILURE),
                Failure::Refused => Some(RetryOn::REFUSED_STREAM),
                _ => None,
            };
            // Nothing of the request went out.
            let unsent = matches!(failure, Failure::Connect | Failure::ConnectTimeout | Failure::ResetBeforeRequest);
            [RetryOn::FIVE_XX, RetryOn::GATEWAY_ERROR, RetryOn::RESET].into_iter().chain(named).any(|c| on.has(c))
                || unsent && on.has(RetryOn::RESET_BEFORE_REQUEST)
        }
    }
}

/// The condition a gRPC status falls under.
fn grpc_condition(status: u32) -> Option<RetryOn> {
    Some(match status {
        1 => RetryOn::CANCELLED,
        4 => RetryOn::DEADLINE_EXCEEDED,
        8 => RetryOn::RESOURCE_EXHAUSTED,
        13 => RetryOn::INTERNAL,
        14 => RetryOn::UNAVAILABLE,
        _ => return None,
    })
}

/// How many attempts it takes until the priorities of those before are left out (Istio's `update_frequency`).
const LEAVE_AFTER: usize = 2;

/// Of the priorities of the endpoints tried so far, in order, those the next attempt keeps away from (Envoy's
/// `previous_priorities`, which Istio's `retryRemoteLocalities` is): after every second attempt all that were tried; once that
/// would leave none (`some_left` says so), everything is forgotten and begins anew.
pub fn left_out(tried: &[u32], some_left: impl Fn(&[u32]) -> bool) -> &[u32] {
    let (mut from, mut to) = (0, 0);
    for now in 1..=tried.len() {
        if (now - from).is_multiple_of(LEAVE_AFTER) {
            if !some_left(tried.get(from..now).unwrap_or_default()) {
                from = now;
            }
            to = now;
        }
    }
    tried.get(from..to).unwrap_or_default()
}

/// How long to wait before the `attempt`-th retry (from 1): uniform below `base · 2ⁿ⁻¹`, the bound never above the largest
/// interval (Envoy's fully jittered exponential back-off).
pub fn backoff(policy: &RetryPolicy, attempt: u32, draw: u64) -> Duration {
    let factor = 1_u32.checked_shl(attempt.saturating_sub(1)).unwrap_or(u32::MAX);
    let bound = policy.base_backoff.saturating_mul(factor).min(policy.max_backoff.max(policy.base_backoff));
    Duration::from_nanos(below(draw, u64::try_from(bound.as_nanos()).unwrap_or(u64::MAX)))
}

/// Reads `retryOn`: Envoy's names, and numbers that are HTTP statuses (Istio), which also switch
/// `retriable-status-codes` on. Empty parts are skipped.
///
/// # Errors
/// The first word that is neither, as Istio's validation has it.
pub fn parse_retry_on(text: &str) -> Result<(RetryOn, Vec<u16>), &str> {
    let (mut on, mut statuses) = (RetryOn::default(), Vec::new());
    for name in text.split(',').map(str::trim).filter(|name| !name.is_empty()) {
        on = on.with(match name {
            "5xx" => RetryOn::FIVE_XX,
            "gateway-error" => RetryOn::GATEWAY_ERROR,
            "connect-failure" => RetryOn::CONNECT_FAILURE,
            "refused-stream" => RetryOn::REFUSED_STREAM,
            "reset" => RetryOn::RESET,
            "reset-before-request" => RetryOn::RESET_BEFORE_REQUEST,
            "retriable-4xx" => RetryOn::RETRIABLE_4XX,
            "retriable-status-codes" => RetryOn::STATUS_CODES,
            "cancelled" => RetryOn::CANCELLED,
            "deadline-exceeded" => RetryOn::DEADLINE_EXCEEDED,
            "internal" => RetryOn::INTERNAL,
            "resource-exhausted" => RetryOn::RESOURCE_EXHAUSTED,
            "unavailable" => RetryOn::UNAVAILABLE,
            "envoy-ratelimited" => RetryOn::ENVOY_RATELIMITED,
            "http3-post-connect-failure" => RetryOn::HTTP3,
            // Which headers it would be cannot be written in an Istio object, so it never applies.
            "retriable-headers" => RetryOn::default(),
            number => match number.parse::<u16>() {
                Ok(status @ 100..=599) => {
                    if !statuses.contains(&status) {
                        statuses.push(status);
                    }
                    RetryOn::STATUS_CODES
                }
                _ => return Err(number),
            },
        });
    }
    Ok((on, statuses))
}

#[cfg(test)]
mod tests;
