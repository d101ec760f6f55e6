//! Every difference from Envoy that there is, with its reason. A case that differs otherwise fails, and so does one that no
//! longer differs as listed. Where users should know, README and ARCHITECTURE say it too.
use std::net::IpAddr;

/// What differs in the same way in some cases.
#[derive(Debug)]
pub struct Difference {
    /// Why.
    pub reason: &'static str,
    /// In what.
    pub what: What,
    /// `scenario::case`
    pub cases: &'static [&'static str],
}

/// In what the sides differ.
#[derive(Clone, Copy, Debug)]
pub enum What {
    /// These aspects, in each of the cases; one that ends in `*` stands for all that begin so.
    Aspects(&'static [&'static str]),
    /// Ours answers the first status, Envoy the second; all else follows from that.
    Statuses(&'static str, &'static str),
}
use What::{Aspects, Statuses};

/// Whether a listed aspect is, or stands for, the one that was found.
pub fn is_aspect(listed: &str, found: &str) -> bool {
    listed.strip_suffix('*').map_or(listed == found, |prefix| found.starts_with(prefix))
}

/// What differs wherever it can.
pub struct Everywhere {
    /// How it is called.
    pub name: &'static str,
    /// Why.
    pub reason: &'static str,
    /// Whether this aspect with these values (ours, Envoy's) is it.
    pub is_it: fn(&str, Option<&str>, Option<&str>) -> bool,
}

/// In every case they can be in; at least one must show each.
pub const EVERYWHERE: &[Everywhere] = &[
    Everywhere {
        name: "the client's address is kept",
        reason: "Envoy's waypoint tells the endpoint nothing of the client (istio#56166), and a copy only its own address; ours \
                 appends the client to x-forwarded-for",
        is_it: |aspect, ours, envoy| {
            let Some((before, "127.0.0.1")) = ours.map(|ours| ours.rsplit_once(',').unwrap_or(("", ours))) else { return false };
            let envoy = envoy.unwrap_or_default();
            let (envoy_before, last) = envoy.rsplit_once(',').unwrap_or(("", envoy));
            let own = envoy_before == before && last.parse::<IpAddr>().is_ok();
            aspect.ends_with("header x-forwarded-for") && (envoy == before || own)
        },
    },
    Everywhere {
        name: "the reason of a refusal",
        reason: "a refusal says its word in x-culvert-reason, the same as in log and metric",
        is_it: |aspect, ours, envoy| aspect.ends_with("header x-culvert-reason") && ours.is_some() && envoy.is_none(),
    },
    Everywhere {
        name: "a tag without a value",
        reason: "a label whose expression has no value is left out of the metric; Istio writes `unknown`",
        is_it: |aspect, ours, envoy| aspect.starts_with("tag ") && ours.is_none() && envoy == Some("unknown"),
    },
    Everywhere {
        name: "a refused head is logged",
        reason: "what Envoy's parser refuses has no line in its log; ours has one for all it could read",
        is_it: |aspect, ours, envoy| match aspect {
            "log" => ours.is_none() && envoy == Some("nothing"),
            "flags" => ours == Some("DPE") && envoy.is_none(),
            "details" => ours.is_some_and(|ours| ours.starts_with("http")) && envoy.is_none(),
            _ => false,
        },
    },
];

/// In these cases.
pub const DIFFERENCES: &[Difference] = &[
    // Stricter.
    Difference {
        reason: "a request names exactly one host, without a user in it: policies and routes go by the host, and whoever joins \
                 or drops part of it sees another (RFC 9112 §3.2 asks for 400)",
        what: Statuses("400", "200"),
        cases: &["protocol::empty host", "protocol::two hosts", "protocol::host with a user"],
    },
    Difference {
        reason: "a header line that goes on in the next is refused, as RFC 9112 §5.2 allows; Envoy joins the lines",
        what: Statuses("400", "200"),
        cases: &["protocol::folded header"],
    },
    Difference {
        reason: "to who asked for a WebSocket in HTTP/2, 200 says that it is one: an endpoint that answers instead of switching has \
                 not made it (RFC 8441 §5)",
        what: Statuses("502", "200"),
        cases: &["protocol-connect::WebSocket by HTTP/2, an endpoint that is none"],
    },
    Difference {
        reason: "what anybody may write in x-forwarded-for is no address for policies: proxies are trusted by number \
                 (numTrustedProxies), none by default; Envoy's waypoint believes whoever wrote last",
        what: Statuses("200", "403"),
        cases: &["caller-remote-ip::the last told"],
    },
    // More lenient, where nothing is lost by it.
    Difference {
        reason: "a WebSocket asked for in HTTP/2 has no key, and servers of HTTP/1 answer nobody without one (RFC 6455 §4.2.1)",
        what: Aspects(&["arrival 1 header sec-websocket-key"]),
        cases: &[
            "protocol-connect::WebSocket by HTTP/2, refused",
            "protocol-connect::WebSocket by HTTP/2, an endpoint that is none",
        ],
    },
    Difference {
        reason: "HTTP/1.0 is served, as Istio does with PILOT_HTTP10",
        what: Statuses("200", "426"),
        cases: &["protocol::HTTP 1.0", "protocol::HTTP 1.0 without host"],
    },
    Difference {
        reason: "methods nobody registered pass in HTTP/1 as they do in HTTP/2; Envoy knows a list",
        what: Statuses("200", "400"),
        cases: &["protocol::unknown method"],
    },
    Difference {
        reason: "a length that is said twice alike, or beside chunks, does not split requests: what goes on is framed anew, by the \
                 chunks where there are any (RFC 9112 §6.3)",
        what: Statuses("200", "400"),
        cases: &["protocol::length and chunks", "protocol::two lengths that agree"],
    },
    Difference {
        reason: "a fragment in the target is dropped before anybody sees the path, rules and endpoint alike",
        what: Statuses("200", "400"),
        cases: &["match-path::fragment in the target"],
    },
    // What the HTTP library answers before we see a request.
    Difference {
        reason: "what is no HTTP/1.1 is answered by the parser: the same status, and no body",
        what: Aspects(&["body", "header content-length", "header content-type", "header server"]),
        cases: &[
            "protocol::no target",
            "protocol::not HTTP at all",
            "protocol::space before the colon",
            "protocol::header name with a space",
            "protocol::header without a colon",
            "protocol::control byte in a value",
            "protocol::two lengths that differ",
            "protocol::length that is no number",
            "protocol::length with a sign",
            "protocol::negative length",
            "protocol::101 header fields",
            "protocol::head of 70 KiB",
        ],
    },
    Difference {
        reason: "what is no HTTP/1.1 is answered by the parser, which knows 400 only",
        what: Statuses("400", "501"),
        cases: &["protocol::unknown transfer encoding", "protocol::chunked is not last"],
    },
    Difference {
        reason: "what is no HTTP/1.1 is answered by the parser, which knows 400 only",
        what: Statuses("400", "426"),
        cases: &["protocol::HTTP 2.0 in text"],
    },
    Difference {
        reason: "a head that does not arrive in time ends the connection without an answer",
        what: Statuses("none", "408"),
        cases: &["protocol-time::a head that takes too long"],
    },
    // Tokens.
    Difference {
        reason: "two different tokens in one request are refused: which of them the application would believe nobody can say",
        what: Statuses("401", "200"),
        cases: &["jwt-issuers::both"],
    },
    Difference {
        reason: "two different tokens in one request are refused: which of them the application would believe nobody can say",
        what: Aspects(&["body", "details", "header content-length", "header www-authenticate"]),
        cases: &["jwt::two that differ"],
    },
    Difference {
        reason: "who does not know a critical extension may not accept the token (RFC 7515 §4.1.11)",
        what: Statuses("401", "200"),
        cases: &["jwt::a critical extension"],
    },
    Difference {
        reason: "the answer does not repeat a token of the query, which may be good elsewhere",
        what: Aspects(&["header www-authenticate"]),
        cases: &["jwt::in the query, expired", "jwt::an empty one in the query", "jwt-places::a parameter, refused"],
    },
    Difference {
        reason: "a token is read as it stands; Envoy skips what cannot begin one, and white space within it",
        what: Aspects(&["body", "details", "header content-length"]),
        cases: &["jwt::a head that is no base64", "jwt::something behind it"],
    },
    Difference {
        reason: "a number of a claim is written as the token has it; Envoy writes six decimals",
        what: Aspects(&["arrival 1 header x-c-fraction"]),
        cases: &[
            "jwt-outputs::everything",
            "jwt-outputs::in the query, forwarded",
            "jwt-outputs::headers a client makes up",
            "jwt-outputs::by HTTP/2",
        ],
    },
    // Authorizers.
    Difference {
        reason: "how long an authorizer took is nothing its refusal tells the client",
        what: Aspects(&["header x-envoy-upstream-service-time"]),
        cases: &[
            "ask::agreed with another status",
            "ask::refused",
            "ask::refused with a body and headers",
            "ask::refused with two headers of a name",
            "ask::redirected",
            "ask::not found",
            "ask::too many",
            "ask::POST, refused",
            "ask::HEAD, refused",
            "ask::by HTTP/2, refused",
            "ask::a gRPC call, refused",
            "ask-first::refused, though allowed",
            "ask-first::refused and denied",
            "ask-first::a preflight",
            "ask-open-fails::the authorizer refuses",
        ],
    },
    Difference {
        reason: "how long an authorizer took is nothing its refusal tells the client",
        what: Aspects(&["1 header x-envoy-upstream-service-time"]),
        cases: &["ask::two on one connection"],
    },
    Difference {
        reason: "headers that came twice go on twice; Envoy joins them, which is the same (RFC 9110 §5.3)",
        what: Aspects(&["arrival 1 header x-shown"]),
        cases: &["ask::a header that comes twice"],
    },
    // Limits.
    Difference {
        reason: "what a request does not have is a value too: leaving a header away is no way around a limit",
        what: Aspects(&["1 header x-ratelimit-*", "2 *"]),
        cases: &["limit-header::without the header"],
    },
    Difference {
        reason: "a path is counted without its query: adding one is no way around a limit",
        what: Aspects(&["2 *"]),
        cases: &["limit-paths::a path with a query"],
    },
    Difference {
        reason: "the largest body is exact; Envoy's limit is a watermark, which one frame may pass",
        what: Statuses("413", "200"),
        cases: &["buffer::too much by HTTP/2"],
    },
    // Headers and compression of answers.
    Difference {
        reason: "`server` is a header like any other for a policy; Envoy writes its own after all filters",
        what: Aspects(&["header server"]),
        cases: &["dress-lua::of the endpoint", "dress-lua::over the endpoint's own", "dress-lua::of our own error"],
    },
    Difference {
        reason: "codings are compared without regard to case, and `x-gzip` is gzip (RFC 9110 §8.4.1)",
        what: Aspects(&["body", "header content-encoding", "header content-length", "header transfer-encoding"]),
        cases: &["compress::in capitals", "compress::the old name"],
    },
    Difference {
        reason: "headers that came twice go on twice; Envoy joins those it knows, which is the same (RFC 9110 §5.3)",
        what: Aspects(&["arrival 1 header accept-encoding"]),
        cases: &["compress::two headers"],
    },
    Difference {
        reason: "`*` holds all that can be said of what an answer varies by",
        what: Aspects(&["header vary"]),
        cases: &["compress::varies by everything"],
    },
    Difference {
        reason: "an answer without a body is none that could have been compressed",
        what: Aspects(&["header vary"]),
        cases: &["compress::nothing there"],
    },
    Difference {
        reason: "parts of what is compressed on its way cannot be had: nobody is told that they can",
        what: Aspects(&["header accept-ranges"]),
        cases: &["compress::ranges"],
    },
    Difference {
        reason: "a part of something stays as it is: its place in the whole is counted in bytes (RFC 9110 §14.4)",
        what: Aspects(&["body", "header content-encoding", "header content-length", "header transfer-encoding", "header vary"]),
        cases: &["compress::a part"],
    },
    Difference {
        reason: "a weak tag says that the content is the same, in whatever coding; only a strong one keeps it from being compressed",
        what: Aspects(&["body", "header content-encoding", "header content-length", "header transfer-encoding", "header vary"]),
        cases: &["compress-careful::a weak tag"],
    },
    Difference {
        reason: "of codings that a client likes as much the policy's first is taken, not the client's",
        what: Aspects(&["header content-encoding"]),
        cases: &["compress-own::both"],
    },
    // Lines of the log.
    Difference {
        reason: "an attempt is one at an endpoint; Envoy counts one that finds none",
        what: Aspects(&["line 1"]),
        cases: &["lines-empty::no endpoint"],
    },
    Difference {
        reason: "a request that was refused before it had a cluster has none in its line; Envoy names the one it would have had",
        what: Aspects(&["line *"]),
        cases: &["lines::refused by a policy", "lines::aborted"],
    },
    Difference {
        reason: "a header that came several times is told with all its values; Envoy tells the first",
        what: Aspects(&["line 0"]),
        cases: &["line-operators::headers of every kind", "line-operators::by HTTP/2", "line-operators::refused"],
    },
    Difference {
        reason: "control bytes are escaped in text too: no client can forge or hide a part of a line",
        what: Aspects(&["line 0"]),
        cases: &["line-operators::bytes of no known text"],
    },
    Difference {
        reason: "the status of gRPC is that of a call; Envoy's expressions have one for every request",
        what: Aspects(&["line 0"]),
        cases: &["line-special::no call", "line-special::no call, refused"],
    },
    Difference {
        reason: "expressions may join texts",
        what: Aspects(&["line 1"]),
        cases: &[
            "line-special::no call",
            "line-special::no call, refused",
            "line-special::a call",
            "line-special::a call without a status",
            "line-special::a call, refused",
        ],
    },
    // The connection after the answer.
    Difference {
        reason: "the rest of a request that is answered early is read and the connection kept; Envoy closes it",
        what: Aspects(&["header connection"]),
        cases: &[
            "redirect::POST with a body",
            "respond::POST with a body",
            "fault::abort of POST",
            "up-empty::no endpoint, POST",
            "policy-all-denied::all is denied, POST",
            "protocol::WebSocket that is refused",
            "jwt::POST, refused",
        ],
    },
    Difference {
        reason: "the rest of a request that is answered early is read and the connection kept; Envoy closes it",
        what: Aspects(&["2 header connection"]),
        cases: &["limit-post::one passes, the next is refused", "limit-own-match::POST alone"],
    },
    Difference {
        reason: "the rest of a request that is answered early is read and the connection kept; Envoy closes it",
        what: Aspects(&["1 header connection", "2 *"]),
        cases: &["respond::POST and then another on one connection"],
    },
    Difference {
        reason: "an answer to HEAD says no transfer-encoding (RFC 9110 §9.3.2: a server may leave it out)",
        what: Aspects(&["header transfer-encoding"]),
        cases: &["redirect::HEAD", "up-answers::HEAD, chunked", "ask::HEAD, refused"],
    },
    // Balancing.
    Difference {
        reason: "one endpoint may always be ejected, as Istio documents and Envoy did before 1.31; now Envoy ejects none of fewer \
                 than ten under the default of 10 %",
        what: Aspects(&["answers 200 - by good", "answers 503 - by bad"]),
        cases: &["eject-default-percent::one may always be ejected"],
    },
    // The log.
    Difference {
        reason: "an upgraded connection that both sides ended in order is no disconnect",
        what: Aspects(&["details", "flags"]),
        cases: &["protocol::WebSocket"],
    },
    Difference {
        reason: "the details of an invalid backend name it",
        what: Aspects(&["details"]),
        cases: &["gw-backends::backend that is not there"],
    },
];
