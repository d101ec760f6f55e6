//! How an attempt at an endpoint fails, and what comes of that (spec/waypoint §10): what the client is answered, and whether
//! the endpoint is to blame. Whether it is tried again is [`crate::l7::retry`]'s.
use crate::l7::outlier::Seen;
use crate::l7::route::Dialect;
use http::StatusCode;

/// What kind of failure.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Failure {
    /// The cluster is not known.
    NoCluster,
    /// It has no usable endpoint.
    NoHealthy,
    /// A limit of the destination is reached: nothing was sent.
    Overflow,
    /// No connection: TCP, TLS, or the tunnel to the endpoint.
    Connect,
    /// No connection in time.
    ConnectTimeout,
    /// The endpoint refused the stream before it looked at it (`REFUSED_STREAM`, GOAWAY).
    Refused,
    /// The connection ended before a response came, after the request had begun to go out.
    Reset,
    /// The endpoint reset the stream, not the connection.
    RemoteReset,
    /// As `Reset`, and nothing of the request had been sent.
    ResetBeforeRequest,
    /// The endpoint speaks no HTTP we understand.
    Protocol,
    /// It took too long: the attempt, or the whole request.
    Timeout,
    /// The client went while we waited.
    ClientGone,
    /// What the client sends as a body is none.
    ClientProtocol,
}

/// What the client is told of a failed last attempt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Told {
    /// Status.
    pub status: StatusCode,
    /// Body.
    pub text: &'static str,
    /// Envoy's response code details.
    pub details: &'static str,
}

/// What is told of a stream that broke before its answer.
macro_rules! reset {
    ($status:expr, $retried:expr, $word:literal, $text:literal) => {
        Told {
            status: $status,
            text: if $retried {
                concat!("upstream connect error or disconnect/reset before headers. retried and the latest reset reason: ", $text)
            } else {
                concat!("upstream connect error or disconnect/reset before headers. reset reason: ", $text)
            },
            details: concat!("upstream_reset_before_response_started{", $word, "}"),
        }
    };
}

impl Failure {
    /// The answer, for a route written in `dialect`. `retried`: it was not the first attempt.
    pub fn told(self, dialect: Dialect, retried: bool) -> Told {
        const UNAVAILABLE: StatusCode = StatusCode::SERVICE_UNAVAILABLE;
        let plain = |status, text, details| Told { status, text, details };
        match self {
            Self::NoCluster if dialect == Dialect::GatewayApi => {
                plain(StatusCode::INTERNAL_SERVER_ERROR, "", "cluster_not_found")
            }
            Self::NoCluster => plain(UNAVAILABLE, "", "cluster_not_found"),
            Self::NoHealthy => plain(UNAVAILABLE, "no healthy upstream", "no_healthy_upstream"),
            Self::Timeout => plain(StatusCode::GATEWAY_TIMEOUT, "upstream request timeout", "response_timeout"),
            // Nobody reads it.
            Self::ClientGone => plain(UNAVAILABLE, "", "downstream_remote_disconnect"),
            Self::ClientProtocol => plain(StatusCode::BAD_REQUEST, "Bad Request", "http1.codec_error"),
            Self::Overflow => reset!(UNAVAILABLE, retried, "overflow", "overflow"),
            Self::Connect => reset!(UNAVAILABLE, retried, "remote_connection_failure", "remote connection failure"),
            Self::ConnectTimeout => reset!(UNAVAILABLE, retried, "connection_timeout", "connection timeout"),
            Self::Refused => reset!(UNAVAILABLE, retried, "remote_refused_stream_reset", "remote refused stream reset"),
            Self::RemoteReset => reset!(UNAVAILABLE, retried, "remote_reset", "remote reset"),
            Self::Reset | Self::ResetBeforeRequest => {
                reset!(UNAVAILABLE, retried, "connection_termination", "connection termination")
            }
            Self::Protocol => reset!(StatusCode::BAD_GATEWAY, retried, "protocol_error", "protocol error"),
        }
    }
    /// What it says about the endpoint's health; `None`: it is not its doing.
    pub fn seen(self) -> Option<Seen> {
        match self {
            Self::Timeout => Some(Seen::Timeout),
            Self::Connect | Self::ConnectTimeout => Some(Seen::Unconnected),
            Self::Refused | Self::Reset | Self::RemoteReset | Self::ResetBeforeRequest | Self::Protocol => Some(Seen::Broken),
            Self::NoCluster | Self::NoHealthy | Self::Overflow | Self::ClientGone | Self::ClientProtocol => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_failure_has_envoys_answer_and_a_culprit() {
        use Failure::*;
        let (none, broken, slow) = (Some(Seen::Unconnected), Some(Seen::Broken), Some(Seen::Timeout));
        for (failure, status, reason, details, seen) in [
            (NoCluster, 503, None, "cluster_not_found", None),
            (NoHealthy, 503, Some("no healthy upstream"), "no_healthy_upstream", None),
            (Timeout, 504, Some("upstream request timeout"), "response_timeout", slow),
            (ClientGone, 503, None, "downstream_remote_disconnect", None),
            (ClientProtocol, 400, Some("Bad Request"), "http1.codec_error", None),
            (Overflow, 503, Some("overflow"), "overflow", None),
            (Connect, 503, Some("remote connection failure"), "remote_connection_failure", none),
            (ConnectTimeout, 503, Some("connection timeout"), "connection_timeout", none),
            (Refused, 503, Some("remote refused stream reset"), "remote_refused_stream_reset", broken),
            (RemoteReset, 503, Some("remote reset"), "remote_reset", broken),
            (Reset, 503, Some("connection termination"), "connection_termination", broken),
            (ResetBeforeRequest, 503, Some("connection termination"), "connection_termination", broken),
            (Protocol, 502, Some("protocol error"), "protocol_error", broken),
        ] {
            for (dialect, retried) in [(Dialect::Istio, false), (Dialect::GatewayApi, true)] {
                let told = failure.told(dialect, retried);
                // Only a backend that is not there is another thing to the Gateway API.
                let status = if failure == NoCluster && dialect == Dialect::GatewayApi { 500 } else { status };
                assert_eq!(told.status.as_u16(), status, "{failure:?} {dialect:?}");
                let reset =
                    told.details.strip_prefix("upstream_reset_before_response_started{").and_then(|d| d.strip_suffix('}'));
                assert_eq!(reset.unwrap_or(told.details), details, "{failure:?}");
                let before = match (reset, retried) {
                    (None, _) => "",
                    (_, false) => "upstream connect error or disconnect/reset before headers. reset reason: ",
                    (_, true) => {
                        "upstream connect error or disconnect/reset before headers. retried and the latest reset reason: "
                    }
                };
                assert_eq!(told.text, format!("{before}{}", reason.unwrap_or_default()), "{failure:?} {retried}");
            }
            assert_eq!(failure.seen(), seen, "{failure:?}");
        }
    }
}
