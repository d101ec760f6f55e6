//! Envoy's format language (`%REQ(X-USER)%`, `%START_TIME(%s)%`, …), compiled: for access logs.
//!
//! A format is read once, with its object; an operator nobody knows is an error there. Writing a line walks a list of
//! literal texts and fields. Semantics: "Access logging" in Envoy's documentation; the defaults are Istio's.

use super::expression::Expression;
use http::HeaderName;

/// Istio's default text format (`accessLogFormat` unset), without its line break.
pub const ISTIO_TEXT: &str = "[%START_TIME%] \"%REQ(:METHOD)% %REQ(X-ENVOY-ORIGINAL-PATH?:PATH)% %PROTOCOL%\" %RESPONSE_CODE% \
    %RESPONSE_FLAGS% %RESPONSE_CODE_DETAILS% %CONNECTION_TERMINATION_DETAILS% \"%UPSTREAM_TRANSPORT_FAILURE_REASON%\" \
    %BYTES_RECEIVED% %BYTES_SENT% %DURATION% %RESP(X-ENVOY-UPSTREAM-SERVICE-TIME)% \"%REQ(X-FORWARDED-FOR)%\" \
    \"%REQ(USER-AGENT)%\" \"%REQ(X-REQUEST-ID)%\" \"%REQ(:AUTHORITY)%\" \"%UPSTREAM_HOST%\" %UPSTREAM_CLUSTER_RAW% \
    %UPSTREAM_LOCAL_ADDRESS% %DOWNSTREAM_LOCAL_ADDRESS% %DOWNSTREAM_REMOTE_ADDRESS% %REQUESTED_SERVER_NAME% %ROUTE_NAME%";
/// Istio's default JSON format.
const ISTIO_JSON: [(&str, &str); 24] = [
    ("start_time", "%START_TIME%"),
    ("route_name", "%ROUTE_NAME%"),
    ("method", "%REQ(:METHOD)%"),
    ("path", "%REQ(X-ENVOY-ORIGINAL-PATH?:PATH)%"),
    ("protocol", "%PROTOCOL%"),
    ("response_code", "%RESPONSE_CODE%"),
    ("response_flags", "%RESPONSE_FLAGS%"),
    ("response_code_details", "%RESPONSE_CODE_DETAILS%"),
    ("connection_termination_details", "%CONNECTION_TERMINATION_DETAILS%"),
    ("bytes_received", "%BYTES_RECEIVED%"),
    ("bytes_sent", "%BYTES_SENT%"),
    ("duration", "%DURATION%"),
    ("upstream_service_time", "%RESP(X-ENVOY-UPSTREAM-SERVICE-TIME)%"),
    ("x_forwarded_for", "%REQ(X-FORWARDED-FOR)%"),
    ("user_agent", "%REQ(USER-AGENT)%"),
    ("request_id", "%REQ(X-REQUEST-ID)%"),
    ("authority", "%REQ(:AUTHORITY)%"),
    ("upstream_host", "%UPSTREAM_HOST%"),
    ("upstream_cluster", "%UPSTREAM_CLUSTER_RAW%"),
    ("upstream_local_address", "%UPSTREAM_LOCAL_ADDRESS%"),
    ("downstream_local_address", "%DOWNSTREAM_LOCAL_ADDRESS%"),
    ("downstream_remote_address", "%DOWNSTREAM_REMOTE_ADDRESS%"),
    ("requested_server_name", "%REQUESTED_SERVER_NAME%"),
    ("upstream_transport_failure_reason", "%UPSTREAM_TRANSPORT_FAILURE_REASON%"),
];

/// A line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Format {
    /// Text. What has no value is `-`.
    Text(Template),
    /// A JSON object. What has no value is `null`, or left out.
    Json(Object),
}
/// A JSON object, in the order of its keys as written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Object {
    /// Keys and values.
    pub entries: Box<[(Box<str>, Json)]>,
}
/// A value in a JSON object.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Json {
    /// A field alone: a number stays a number.
    Field {
        /// The field.
        field: Field,
        /// Left out, key and all, when it has no value.
        optional: bool,
    },
    /// Text with fields in it: always a string.
    Text(Template),
    /// A number or a truth value, as written.
    Verbatim(Box<str>),
    /// An object.
    Object(Object),
}
/// Texts and fields in turn.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Template(pub Box<[Part]>);
/// A part of a template.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Part {
    /// As it is.
    Text(Box<str>),
    /// The value of a field.
    Field(Field),
}

/// A field: what an operator stands for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Field {
    /// What.
    pub of: Of,
    /// At most so many characters of it (`:Z`).
    pub most: Option<usize>,
}
/// What a field is of, named after Envoy's operators.
#[derive(Clone, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "each variant is Envoy's operator of its name")]
pub enum Of {
    StartTime(TimeFormat),
    /// `%REQ(X?Y)%`.
    Request(HeaderRef),
    /// `%REQ_WITHOUT_QUERY(X?Y)%`.
    RequestWithoutQuery(HeaderRef),
    /// `%RESP(X?Y)%`.
    Response(HeaderRef),
    /// `%RESP(X-ENVOY-UPSTREAM-SERVICE-TIME)%`: known without the headers.
    UpstreamServiceTime,
    /// `%TRAILER(X?Y)%`, of the response.
    Trailer(HeaderRef),
    Protocol,
    ResponseCode,
    ResponseCodeDetails,
    ResponseFlags,
    ConnectionTerminationDetails,
    UpstreamTransportFailureReason,
    BytesReceived,
    BytesSent,
    Duration,
    GrpcStatus(GrpcStatus),
    UpstreamHost,
    UpstreamRemoteAddress(Address),
    UpstreamCluster,
    UpstreamLocalAddress,
    UpstreamPeerUriSan,
    UpstreamRequestAttemptCount,
    DownstreamLocalAddress(Address),
    DownstreamRemoteAddress(Address),
    DownstreamPeerUriSan,
    DownstreamLocalUriSan,
    RequestedServerName,
    RouteName,
    TraceId,
    SpanId,
    Cel(Expression),
    /// Our own word for a refusal (`%CULVERT_REASON%`).
    Reason,
    /// How dry-run policies would have refused it (`%CULVERT_DRY_RUN%`).
    DryRun,
    /// The AUDIT policy that matched (`%CULVERT_AUDIT%`).
    Audit,
}
impl Of {
    fn reads_response_headers(&self) -> bool {
        match self {
            Self::Response(_) => true,
            Self::Cel(expression) => expression.reads_response_headers(),
            _ => false,
        }
    }
}
/// How an address is shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Address {
    /// With its port.
    Whole,
    /// Without.
    Ip,
    /// The port alone.
    Port,
}
/// How a gRPC status is shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GrpcStatus {
    /// `NotFound`.
    Camel,
    /// `NOT_FOUND`.
    Snake,
    /// `5`.
    Number,
}
/// A header, or another where that is not there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HeaderRef {
    /// The header.
    pub name: Name,
    /// The other one.
    pub or: Option<Name>,
}
/// The name of a header.
#[derive(Clone, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "the pseudo-headers of HTTP/2 by name")]
pub enum Name {
    Method,
    Path,
    Authority,
    Scheme,
    Status,
    /// Any other.
    Header(HeaderName),
}

/// A moment's format: strftime's letters and Envoy's fractions.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TimeFormat {
    /// `2024-01-31T12:00:00.123Z`.
    Default,
    /// As written.
    Parts(Box<[TimePart]>),
}
/// A part of a moment's format.
#[derive(Clone, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "the letters of strftime")]
pub enum TimePart {
    Text(Box<str>),
    Year,
    YearOfCentury,
    Month,
    MonthName,
    Day,
    Weekday,
    Hour,
    Minute,
    Second,
    /// So many digits of the second's fraction (`%3f`).
    Fraction(u8),
    /// Seconds since 1970 (`%s`).
    Epoch,
}

/// Why a format cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct FormatError(pub String);

/// What formats ask of the process: its environment.
pub type Environment<'e> = &'e dyn Fn(&str) -> Option<String>;

impl Format {
    /// A text format. A line break at its end is one already.
    pub fn text(format: &str, env: Environment<'_>) -> Result<Self, FormatError> {
        Template::parse(format.trim_end_matches('\n'), env).map(Self::Text)
    }
    /// Istio's default text.
    pub fn istio_text() -> Self {
        // Parses: a test holds it to that.
        Self::text(ISTIO_TEXT, &|_| None).unwrap_or_else(|_| Self::Text(Template(Box::default())))
    }
    /// Istio's default JSON, and ours where there is something to tell.
    pub fn istio_json() -> Self {
        let entries =
            ISTIO_JSON.iter().filter_map(|(key, text)| Some(((*key).into(), Json::parse(text, false, &|_| None).ok()?)));
        let ours = [("reason", Of::Reason), ("dry_run", Of::DryRun), ("audit", Of::Audit)]
            .map(|(key, of)| (key.into(), Json::Field { field: of.into(), optional: true }));
        Self::Json(Object { entries: entries.chain(ours).collect() })
    }
    /// Whether a field is of the response's headers.
    pub fn reads_response_headers(&self) -> bool {
        self.any(&Of::reads_response_headers)
    }
    /// Whether a field is of the response's trailers.
    pub fn reads_trailers(&self) -> bool {
        self.any(&|of| matches!(of, Of::Trailer(_)))
    }
    fn any(&self, is: &dyn Fn(&Of) -> bool) -> bool {
        match self {
            Self::Text(template) => template.any(is),
            Self::Json(object) => object.any(is),
        }
    }
}
impl Object {
    fn any(&self, is: &dyn Fn(&Of) -> bool) -> bool {
        self.entries.iter().any(|(_, value)| match value {
            Json::Field { field, .. } => is(&field.of),
            Json::Text(template) => template.any(is),
            Json::Object(object) => object.any(is),
            Json::Verbatim(_) => false,
        })
    }
}
impl Json {
    /// A string of a JSON format. `omit_empty`: a field without a value is left out.
    pub fn parse(text: &str, omit_empty: bool, env: Environment<'_>) -> Result<Self, FormatError> {
        let template = Template::parse(text, env)?;
        Ok(match &*template.0 {
            [Part::Field(field)] => Self::Field { field: field.clone(), optional: omit_empty },
            _ => Self::Text(template),
        })
    }
}
impl From<Of> for Field {
    fn from(of: Of) -> Self {
        Self { of, most: None }
    }
}

impl Template {
    /// Reads literal text and operators.
    pub fn parse(format: &str, env: Environment<'_>) -> Result<Self, FormatError> {
        let mut parts = Vec::new();
        let mut text = String::new();
        let mut rest = format;
        while let Some((before, after)) = rest.split_once('%') {
            text.push_str(before);
            if let Some(after) = after.strip_prefix('%') {
                text.push('%');
                rest = after;
                continue;
            }
            let (name, argument, most, after) = operator(after)?;
            rest = after;
            match (name, argument) {
                ("ENVIRONMENT", Some(variable)) => text.push_str(&env(variable).unwrap_or_else(|| "-".to_owned())),
                ("HOSTNAME", None) => text.push_str(&env("HOSTNAME").unwrap_or_else(|| "-".to_owned())),
                _ => {
                    if !text.is_empty() {
                        parts.push(Part::Text(std::mem::take(&mut text).into()));
                    }
                    parts.push(Part::Field(Field { of: of(name, argument)?, most }));
                }
            }
        }
        text.push_str(rest);
        if !text.is_empty() {
            parts.push(Part::Text(text.into()));
        }
        Ok(Self(parts.into()))
    }
    /// Whether a field is of the response's headers.
    pub fn reads_response_headers(&self) -> bool {
        self.any(&Of::reads_response_headers)
    }
    /// Whether a field is of the response's trailers.
    pub fn reads_trailers(&self) -> bool {
        self.any(&|of| matches!(of, Of::Trailer(_)))
    }
    fn any(&self, is: &dyn Fn(&Of) -> bool) -> bool {
        self.0.iter().any(|p| matches!(p, Part::Field(field) if is(&field.of)))
    }
}

/// Name, argument, `:Z`, and what follows the closing `%`.
type Operator<'a> = (&'a str, Option<&'a str>, Option<usize>, &'a str);
/// Takes one operator apart, after its `%`.
fn operator(text: &str) -> Result<Operator<'_>, FormatError> {
    let open = || {
        FormatError(format!(
            "`%{}` does not end with `%`; a `%` of its own is written `%%`",
            text.chars().take(40).collect::<String>()
        ))
    };
    let end = text.find(|c: char| !(c.is_ascii_uppercase() || c.is_ascii_digit() || c == '_')).ok_or_else(open)?;
    let (name, mut rest) = text.split_at(end);
    let mut argument = None;
    if let Some(inner) = rest.strip_prefix('(') {
        // The argument of CEL has parentheses of its own, that of START_TIME percent signs: it ends at `)%` or `):`.
        let close = inner.match_indices(')').map(|(at, _)| at).find(|at| {
            let after = inner.get(at + 1..).unwrap_or_default();
            after.starts_with('%')
                || after.starts_with(':') && after.get(1..).is_some_and(|d| d.starts_with(|c: char| c.is_ascii_digit()))
        });
        let (inside, after) = inner.split_at(close.ok_or_else(open)?);
        argument = Some(inside);
        rest = after.strip_prefix(')').unwrap_or(after);
    }
    let mut most = None;
    if let Some(length) = rest.strip_prefix(':') {
        let (digits, after) = length.split_once('%').ok_or_else(open)?;
        most = Some(digits.parse().map_err(|_| FormatError(format!("`:{digits}` after {name} is no length")))?);
        return Ok((name, argument, most, after));
    }
    let rest = rest.strip_prefix('%').ok_or_else(open)?;
    Ok((name, argument, most, rest))
}

fn of(name: &str, argument: Option<&str>) -> Result<Of, FormatError> {
    let needs = |what: &str| FormatError(format!("%{name}(…)% needs {what}"));
    let header = || header_ref(argument.ok_or_else(|| needs("the name of a header"))?);
    let found = match name {
        "START_TIME" => return time(argument).map(Of::StartTime),
        "REQ" => return header().map(Of::Request),
        "REQ_WITHOUT_QUERY" => return header().map(Of::RequestWithoutQuery),
        "RESP" if argument.is_some_and(|a| a.eq_ignore_ascii_case("x-envoy-upstream-service-time")) => {
            return Ok(Of::UpstreamServiceTime);
        }
        "RESP" => return header().map(Of::Response),
        "TRAILER" => return header().map(Of::Trailer),
        "CEL" => {
            let source = argument.ok_or_else(|| needs("an expression"))?;
            return Expression::parse(source).map(Of::Cel).map_err(|e| FormatError(format!("%CEL({source})%: {e}")));
        }
        "GRPC_STATUS" => match argument {
            None | Some("" | "CAMEL_STRING") => return Ok(Of::GrpcStatus(GrpcStatus::Camel)),
            Some("SNAKE_STRING") => return Ok(Of::GrpcStatus(GrpcStatus::Snake)),
            Some("NUMBER") => return Ok(Of::GrpcStatus(GrpcStatus::Number)),
            Some(other) => return Err(FormatError(format!("%GRPC_STATUS({other})%: CAMEL_STRING, SNAKE_STRING or NUMBER"))),
        },
        "GRPC_STATUS_NUMBER" => Of::GrpcStatus(GrpcStatus::Number),
        "PROTOCOL" => Of::Protocol,
        "RESPONSE_CODE" => Of::ResponseCode,
        "RESPONSE_CODE_DETAILS" => Of::ResponseCodeDetails,
        "RESPONSE_FLAGS" => Of::ResponseFlags,
        "CONNECTION_TERMINATION_DETAILS" => Of::ConnectionTerminationDetails,
        "UPSTREAM_TRANSPORT_FAILURE_REASON" => Of::UpstreamTransportFailureReason,
        "BYTES_RECEIVED" => Of::BytesReceived,
        "BYTES_SENT" => Of::BytesSent,
        "DURATION" => Of::Duration,
        "UPSTREAM_HOST" => Of::UpstreamHost,
        "UPSTREAM_REMOTE_ADDRESS" => Of::UpstreamRemoteAddress(Address::Whole),
        "UPSTREAM_REMOTE_ADDRESS_WITHOUT_PORT" => Of::UpstreamRemoteAddress(Address::Ip),
        "UPSTREAM_REMOTE_PORT" => Of::UpstreamRemoteAddress(Address::Port),
        "UPSTREAM_CLUSTER" | "UPSTREAM_CLUSTER_RAW" => Of::UpstreamCluster,
        "UPSTREAM_LOCAL_ADDRESS" => Of::UpstreamLocalAddress,
        "UPSTREAM_PEER_URI_SAN" => Of::UpstreamPeerUriSan,
        "UPSTREAM_REQUEST_ATTEMPT_COUNT" => Of::UpstreamRequestAttemptCount,
        "DOWNSTREAM_LOCAL_ADDRESS" => Of::DownstreamLocalAddress(Address::Whole),
        "DOWNSTREAM_LOCAL_ADDRESS_WITHOUT_PORT" => Of::DownstreamLocalAddress(Address::Ip),
        "DOWNSTREAM_LOCAL_PORT" => Of::DownstreamLocalAddress(Address::Port),
        "DOWNSTREAM_REMOTE_ADDRESS" | "DOWNSTREAM_DIRECT_REMOTE_ADDRESS" => Of::DownstreamRemoteAddress(Address::Whole),
        "DOWNSTREAM_REMOTE_ADDRESS_WITHOUT_PORT" | "DOWNSTREAM_DIRECT_REMOTE_ADDRESS_WITHOUT_PORT" => {
            Of::DownstreamRemoteAddress(Address::Ip)
        }
        "DOWNSTREAM_REMOTE_PORT" | "DOWNSTREAM_DIRECT_REMOTE_PORT" => Of::DownstreamRemoteAddress(Address::Port),
        "DOWNSTREAM_PEER_URI_SAN" => Of::DownstreamPeerUriSan,
        "DOWNSTREAM_LOCAL_URI_SAN" => Of::DownstreamLocalUriSan,
        "REQUESTED_SERVER_NAME" => Of::RequestedServerName,
        "ROUTE_NAME" => Of::RouteName,
        "TRACE_ID" => Of::TraceId,
        "SPAN_ID" => Of::SpanId,
        "CULVERT_REASON" => Of::Reason,
        "CULVERT_DRY_RUN" => Of::DryRun,
        "CULVERT_AUDIT" => Of::Audit,
        "ENVIRONMENT" => return Err(needs("the name of a variable")),
        _ => return Err(FormatError(format!("there is no operator %{name}%, or not here"))),
    };
    match argument {
        None => Ok(found),
        Some(argument) => Err(FormatError(format!("%{name}% takes no argument (`{argument}`)"))),
    }
}

fn header_ref(argument: &str) -> Result<HeaderRef, FormatError> {
    let name = |text: &str| {
        Ok(match text.to_ascii_lowercase().as_str() {
            ":method" => Name::Method,
            ":path" => Name::Path,
            ":authority" | "host" => Name::Authority,
            ":scheme" => Name::Scheme,
            ":status" => Name::Status,
            other => Name::Header(
                HeaderName::from_bytes(other.as_bytes()).map_err(|_| FormatError(format!("`{text}` is no name of a header")))?,
            ),
        })
    };
    match argument.split_once('?') {
        None => Ok(HeaderRef { name: name(argument)?, or: None }),
        Some((first, other)) => Ok(HeaderRef { name: name(first)?, or: Some(name(other)?) }),
    }
}

fn time(argument: Option<&str>) -> Result<TimeFormat, FormatError> {
    let Some(format) = argument.filter(|f| !f.is_empty()) else { return Ok(TimeFormat::Default) };
    let mut parts = Vec::new();
    let mut chars = format.chars();
    let mut text = String::new();
    while let Some(c) = chars.next() {
        if c != '%' {
            text.push(c);
            continue;
        }
        let letter = chars.next();
        let simple: &[TimePart] = match letter {
            Some('%') => {
                text.push('%');
                continue;
            }
            Some('z') => {
                text.push_str("+0000");
                continue;
            }
            Some('Z') => {
                text.push_str("UTC");
                continue;
            }
            Some('Y') => &[TimePart::Year],
            Some('y') => &[TimePart::YearOfCentury],
            Some('m') => &[TimePart::Month],
            Some('b' | 'h') => &[TimePart::MonthName],
            Some('d') => &[TimePart::Day],
            Some('a') => &[TimePart::Weekday],
            Some('H') => &[TimePart::Hour],
            Some('M') => &[TimePart::Minute],
            Some('S') => &[TimePart::Second],
            Some('s') => &[TimePart::Epoch],
            Some('f') => &[TimePart::Fraction(9)],
            Some(digit @ '1'..='9') if chars.next() == Some('f') => {
                flush(&mut text, &mut parts);
                parts.push(TimePart::Fraction(digit as u8 - b'0'));
                continue;
            }
            Some('F') => {
                flush(&mut text, &mut parts);
                let dash = || TimePart::Text("-".into());
                parts.extend([TimePart::Year, dash(), TimePart::Month, dash(), TimePart::Day]);
                continue;
            }
            Some('T') => {
                flush(&mut text, &mut parts);
                let colon = || TimePart::Text(":".into());
                parts.extend([TimePart::Hour, colon(), TimePart::Minute, colon(), TimePart::Second]);
                continue;
            }
            other => {
                return Err(FormatError(format!(
                    "`%{}` of a time is not known here",
                    other.map(String::from).unwrap_or_default()
                )));
            }
        };
        flush(&mut text, &mut parts);
        parts.extend_from_slice(simple);
    }
    flush(&mut text, &mut parts);
    Ok(TimeFormat::Parts(parts.into()))
}
fn flush(text: &mut String, parts: &mut Vec<TimePart>) {
    if !text.is_empty() {
        parts.push(TimePart::Text(std::mem::take(text).into()));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(format: &str) -> Result<Vec<Part>, FormatError> {
        let env = |name: &str| (name == "HOSTNAME").then(|| "wp-0".to_owned());
        Template::parse(format, &env).map(|t| t.0.into_vec())
    }
    fn field(of: Of) -> Part {
        Part::Field(of.into())
    }
    fn text(text: &str) -> Part {
        Part::Text(text.into())
    }
    fn header(name: &'static str) -> Name {
        Name::Header(HeaderName::from_static(name))
    }

    #[test]
    fn operators_and_text_alternate() {
        let got = parse("a %PROTOCOL%%RESPONSE_CODE% 100%% %REQ(X-User?:PATH):10%!\n").expect("a format");
        let user = Of::Request(HeaderRef { name: header("x-user"), or: Some(Name::Path) });
        let want = [
            text("a "),
            field(Of::Protocol),
            field(Of::ResponseCode),
            text(" 100% "),
            Part::Field(Field { of: user, most: Some(10) }),
            text("!\n"),
        ];
        assert_eq!(got, want);
        assert_eq!(parse("%ENVIRONMENT(X)%-%HOSTNAME%").expect("a format"), [text("--wp-0")]);
    }
    #[test]
    fn arguments_may_have_signs_of_their_own() {
        let got = parse("%START_TIME(%Y/%m/%dT%H:%M:%S.%3f%z (%s))% %CEL(size(request.path) > 3)%").expect("a format");
        let Part::Field(Field { of: Of::StartTime(TimeFormat::Parts(parts)), .. }) = &got[0] else { panic!("{got:?}") };
        assert_eq!(parts.len(), 16, "{parts:?}");
        assert_eq!(parts[12], TimePart::Fraction(3));
        assert!(
            matches!(&got[2], Part::Field(Field { of: Of::Cel(e), .. }) if e.source() == "size(request.path) > 3"),
            "{got:?}"
        );
    }
    #[test]
    fn what_is_not_known_is_an_error() {
        for (format, part) in [
            ("%NOPE%", "no operator %NOPE%"),
            ("50% off", "does not end with `%`"),
            ("%REQ%", "needs the name of a header"),
            ("%REQ(a b)%", "no name of a header"),
            ("%PROTOCOL(x)%", "takes no argument"),
            ("%START_TIME(%Q)%", "`%Q` of a time"),
            ("%REQ(X):ten%", "does not end"),
            ("%DYNAMIC_METADATA(a:b)%", "no operator"),
            ("%CEL(a b)%", "not a CEL expression"),
            ("%GRPC_STATUS(x)%", "CAMEL_STRING"),
        ] {
            let error = parse(format).expect_err(format);
            assert!(error.0.contains(part), "{format}: {error}");
        }
    }
    #[test]
    fn istios_own_formats_are_whole() {
        let Format::Text(Template(parts)) = Format::istio_text() else { panic!("text") };
        assert_eq!(parts.iter().filter(|p| matches!(p, Part::Field(_))).count(), 24);
        let Format::Json(object) = Format::istio_json() else { panic!("JSON") };
        assert_eq!(object.entries.len(), ISTIO_JSON.len() + 3);
        assert!(object.entries.iter().all(|(_, v)| matches!(v, Json::Field { .. })));
    }
    #[test]
    fn what_must_be_kept_for_a_format_is_known() {
        let reads = |format: &str| {
            let format = Format::text(format, &|_| None).expect(format);
            (format.reads_response_headers(), format.reads_trailers())
        };
        assert_eq!(reads("%RESP(X-A)%"), (true, false));
        assert_eq!(reads("%TRAILER(grpc-message)%"), (false, true));
        assert_eq!(reads("%CEL(response.headers['a'])%"), (true, false));
        assert_eq!(reads(ISTIO_TEXT), (false, false));
    }
}
