//! CEL expressions over what is known of a request: filters of access logs, tags of metrics and spans.
//!
//! Parsed and checked once, when an object is read: an attribute nobody knows is an error there, not a surprise later. What
//! can still fail is a value that is not there (a header not sent, an answer that never came). Attributes are Envoy's
//! ("Attributes" in Envoy's documentation), as far as they are known here.

use cel::common::ast::{CallExpr, EntryExpr, Expr, IdedExpr, LiteralValue, MapExpr, StructExpr};
use cel::common::types::{CelBool, CelDuration, CelInt, CelMap, CelMapKey, CelString, CelTimestamp};
use cel::common::value::{CowVal, Val};
use cel::context::VariableResolver;
use cel::{Context, Env};

use crate::l7::text::Pattern;
use http::HeaderMap;
use std::borrow::Cow;
use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, LazyLock};
use std::time::Duration;

/// Longest expression taken, in bytes.
const LONGEST: usize = 8 * 1024;

/// The value of an attribute.
#[derive(Clone, Debug)]
pub enum Attribute<'a> {
    /// Text.
    Text(Cow<'a, str>),
    /// A number.
    Int(i64),
    /// Yes or no.
    Bool(bool),
    /// A time span.
    Duration(Duration),
    /// A moment, since 1970.
    Time(Duration),
    /// Headers; several of one name are joined with `,`.
    Headers(&'a HeaderMap),
}

/// What an expression looks at.
pub trait Attributes: Send + Sync {
    /// The attribute of this name, one of [`NAMES`]; `None` when it has no value.
    fn find(&self, name: &str) -> Option<Attribute<'_>>;
}

/// Every attribute.
pub const NAMES: [&str; 49] = [
    "connection.mtls",
    "connection.requested_server_name",
    "connection.termination_details",
    "connection.uri_san_local_certificate",
    "connection.uri_san_peer_certificate",
    "destination.address",
    "destination.port",
    "downstream_peer.app",
    "downstream_peer.cluster",
    "downstream_peer.identity",
    "downstream_peer.name",
    "downstream_peer.namespace",
    "downstream_peer.service",
    "downstream_peer.version",
    "downstream_peer.workload",
    "request.duration",
    "request.headers",
    "request.host",
    "request.id",
    "request.method",
    "request.path",
    "request.protocol",
    "request.query",
    "request.referer",
    "request.scheme",
    "request.size",
    "request.time",
    "request.url_path",
    "request.useragent",
    "response.code",
    "response.code_details",
    "response.flags",
    "response.grpc_status",
    "response.headers",
    "response.size",
    "source.address",
    "source.port",
    "upstream.address",
    "upstream.port",
    "upstream.request_attempt_count",
    "upstream.transport_failure_reason",
    "upstream_peer.app",
    "upstream_peer.cluster",
    "upstream_peer.identity",
    "upstream_peer.name",
    "upstream_peer.namespace",
    "upstream_peer.service",
    "upstream_peer.version",
    "upstream_peer.workload",
];
/// Attributes that hold others under names of their own.
const MAPS: [&str; 2] = ["request.headers", "response.headers"];
/// Istio's documents write the peers with and without it.
const LONG: &str = "filter_state.";
/// What may stand in an expression beside attributes: CEL's types.
const TYPES: [&str; 13] =
    ["bool", "bytes", "double", "dyn", "google", "int", "list", "map", "null_type", "optional_type", "string", "type", "uint"];

/// Why an expression cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct ExpressionError {
    /// What is wrong.
    pub message: String,
    /// It is written in another language.
    pub jq: bool,
}

/// What a wrong expression should have been, when it looks like `jq`: the language people expect in a place that takes JSON.
pub const JQ_FIX: &str = "that is jq, and this field takes CEL; write for example: \
    request.url_path.startsWith(\"/api/auth/\") ? \"auth\" : request.url_path.startsWith(\"/api/admin/\") ? \"admin\" : \"user\"";

/// A checked expression.
#[derive(Clone)]
pub struct Expression {
    source: Arc<str>,
    root: Arc<IdedExpr>,
    /// Its regular expressions, by the numbers [`MATCHES`] is called with.
    patterns: Arc<[Pattern]>,
    /// It looks at headers of the response.
    reads_response_headers: bool,
}
impl PartialEq for Expression {
    fn eq(&self, other: &Self) -> bool {
        self.source == other.source
    }
}
impl Eq for Expression {}
impl fmt::Debug for Expression {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Expression({})", self.source)
    }
}

/// Why an expression gave nothing.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct EvaluationError(String);

impl Expression {
    /// Parses and checks an expression.
    pub fn parse(source: &str) -> Result<Self, ExpressionError> {
        let jq = looks_like_jq(source);
        let wrong = |message: String| ExpressionError { message, jq };
        if source.len() > LONGEST {
            return Err(wrong(format!("longer than {LONGEST} bytes")));
        }
        let mut root = cel::parser::Parser::new().parse(source).map_err(|errors| {
            let first = errors.errors.into_iter().next();
            wrong(first.map_or_else(
                || "not a CEL expression".to_owned(),
                |e| format!("not a CEL expression: column {}: {}", e.pos.1.max(0) + 1, e.msg),
            ))
        })?;
        let mut check = Check::default();
        check.expr(&mut root);
        match check.fault {
            Some(message) => Err(wrong(message)),
            None => Ok(Self {
                source: source.into(),
                root: Arc::new(root),
                patterns: check.patterns.into(),
                reads_response_headers: check.response_headers,
            }),
        }
    }
    /// As it was written.
    pub fn source(&self) -> &str {
        &self.source
    }
    /// Whether it looks at headers of the response.
    pub fn reads_response_headers(&self) -> bool {
        self.reads_response_headers
    }
    fn run(&self, over: &dyn Attributes) -> Result<cel::Value, EvaluationError> {
        static ENV: LazyLock<Arc<Env>> = LazyLock::new(|| Arc::new(Env::stdlib()));
        let resolver = Resolver(over);
        let mut context = Context::with_env(Arc::clone(&ENV));
        context.set_variable_resolver(&resolver);
        if !self.patterns.is_empty() {
            let patterns = Arc::clone(&self.patterns);
            let found = move |text: Arc<String>, number: i64| {
                usize::try_from(number).ok().and_then(|n| patterns.get(n)).is_some_and(|p| p.is_match(&text))
            };
            context.add_function(MATCHES, found).map_err(|e| EvaluationError(e.to_string()))?;
        }
        cel::Value::resolve(&self.root, &context).map_err(|e| EvaluationError(e.to_string()))
    }
    /// Whether it is true. An error counts as no, as in Envoy.
    pub fn holds(&self, over: &dyn Attributes) -> bool {
        matches!(self.run(over), Ok(cel::Value::Bool(true)))
    }
    /// Its value as text.
    pub fn text(&self, over: &dyn Attributes) -> Result<String, EvaluationError> {
        match self.run(over)? {
            cel::Value::String(text) => Ok(Arc::unwrap_or_clone(text)),
            cel::Value::Int(n) => Ok(n.to_string()),
            cel::Value::UInt(n) => Ok(n.to_string()),
            cel::Value::Float(n) => Ok(n.to_string()),
            cel::Value::Bool(b) => Ok(b.to_string()),
            cel::Value::Duration(d) => Ok(format!("{}s", d.as_seconds_f64())),
            cel::Value::Timestamp(t) => Ok(t.to_rfc3339()),
            other => Err(EvaluationError(format!("a {} is no text", other.type_of()))),
        }
    }
}

fn looks_like_jq(source: &str) -> bool {
    let source = source.trim_start();
    let piped = source.replace("||", "").contains('|');
    source.starts_with('.') || piped || (source.starts_with("if ") && source.contains(" then "))
}

/// `matches` with a pattern that is compiled: of a text and the pattern's number. No name that can be written.
const MATCHES: &str = "matches compiled";

/// The attribute's own name.
fn canonical(name: &str) -> &str {
    name.strip_prefix(LONG).unwrap_or(name)
}

/// Looks for names nobody knows, and replaces what would cost much with each evaluation: a look-up of one header by a name of
/// its own, so that no map is made for it, and a regular expression by its number.
#[derive(Default)]
struct Check {
    /// Variables of macros (`exists(x, …)`).
    bound: Vec<String>,
    fault: Option<String>,
    response_headers: bool,
    patterns: Vec<Pattern>,
}
impl Check {
    fn expr(&mut self, e: &mut IdedExpr) {
        if let Some(path) = path_of(&e.expr) {
            return self.path(&path);
        }
        if let Some(name) = header_of(&e.expr) {
            self.response_headers |= name.starts_with("response");
            e.expr = Expr::Ident(name);
            return;
        }
        match &mut e.expr {
            Expr::Call(call) => {
                self.pattern(call);
                let CallExpr { target, args, .. } = call;
                for part in target.iter_mut().map(|t| &mut **t).chain(args) {
                    self.expr(part);
                }
            }
            Expr::Select(select) => self.expr(&mut select.operand),
            Expr::List(list) => {
                for e in &mut list.elements {
                    self.expr(e);
                }
            }
            Expr::Map(MapExpr { entries }) | Expr::Struct(StructExpr { entries, .. }) => {
                for e in entries {
                    self.entry(&mut e.expr);
                }
            }
            Expr::Comprehension(c) => {
                self.expr(&mut c.iter_range);
                self.expr(&mut c.accu_init);
                let depth = self.bound.len();
                self.bound.extend([c.iter_var.clone(), c.accu_var.clone()]);
                self.bound.extend(c.iter_var2.clone());
                for part in [&mut c.loop_cond, &mut c.loop_step, &mut c.result] {
                    self.expr(part);
                }
                self.bound.truncate(depth);
            }
            Expr::Unspecified | Expr::Ident(_) | Expr::Literal(_) => {}
        }
    }
    /// Compiles the pattern of `text.matches("…")`.
    fn pattern(&mut self, call: &mut CallExpr) {
        let CallExpr { func_name, target, args } = call;
        if func_name != "matches" || args.len() + usize::from(target.is_some()) != 2 {
            return;
        }
        let Some(IdedExpr { expr: pattern @ Expr::Literal(LiteralValue::String(_)), .. }) = args.last_mut() else { return };
        let Expr::Literal(LiteralValue::String(text)) = &*pattern else { return };
        match Pattern::parse_search(text.inner()) {
            Ok(compiled) => self.patterns.push(compiled),
            Err(e) => {
                self.fault.get_or_insert_with(|| e.to_string());
                return;
            }
        }
        *pattern = Expr::Literal(LiteralValue::Int(CelInt::from(self.patterns.len() as i64 - 1)));
        MATCHES.clone_into(func_name);
        if let Some(text) = target.take() {
            args.insert(0, *text);
        }
    }
    fn entry(&mut self, e: &mut EntryExpr) {
        match e {
            EntryExpr::StructField(field) => self.expr(&mut field.value),
            EntryExpr::MapEntry(entry) => {
                self.expr(&mut entry.key);
                self.expr(&mut entry.value);
            }
        }
    }
    fn path(&mut self, path: &str) {
        let root = path.split('.').next().unwrap_or_default();
        if TYPES.contains(&root) || self.bound.iter().any(|b| b == root) {
            return;
        }
        let name = canonical(path);
        self.response_headers |= name.starts_with("response.headers") || name == "response";
        let below = |whole: &str, start: &str| whole.strip_prefix(start).is_some_and(|rest| rest.starts_with('.'));
        let known = NAMES.iter().any(|n| *n == name || below(n, name)) || MAPS.iter().any(|m| below(name, m));
        if known || self.fault.is_some() {
            return;
        }
        let siblings: Vec<&str> = NAMES.iter().copied().filter(|n| below(n, root)).collect();
        self.fault = Some(if siblings.is_empty() {
            format!(
                "unknown attribute `{path}`; there are request, response, source, destination, connection, upstream, downstream_peer, upstream_peer"
            )
        } else {
            format!("unknown attribute `{path}`; known: {}", siblings.join(", "))
        });
    }
}

/// The dotted name an expression spells.
fn path_of(e: &Expr) -> Option<String> {
    match e {
        Expr::Ident(name) => Some(name.clone()),
        Expr::Select(select) => Some(format!("{}.{}", path_of(&select.operand.expr)?, select.field)),
        _ => None,
    }
}
/// `request.headers["x"]` as a name of its own, of which [`Resolver`] knows.
fn header_of(e: &Expr) -> Option<String> {
    let Expr::Call(CallExpr { func_name, target: None, args }) = e else { return None };
    let [map, IdedExpr { expr: Expr::Literal(LiteralValue::String(key)), .. }] = args.as_slice() else { return None };
    let map = path_of(&map.expr).filter(|p| MAPS.contains(&p.as_str()))?;
    (func_name == cel::common::ast::operators::INDEX).then(|| format!("{map}[{}]", key.inner().to_ascii_lowercase()))
}

struct Resolver<'a>(&'a dyn Attributes);
impl VariableResolver for Resolver<'_> {
    fn resolve<'b>(&'b self, name: &str) -> Option<CowVal<'b, 'b>> {
        if let Some((map, header)) = name.strip_suffix(']').and_then(|n| n.split_once('[')) {
            let Some(Attribute::Headers(all)) = self.0.find(map) else { return None };
            return joined(all, header).map(|text| CowVal::owned(CelString::from(text)));
        }
        self.value(canonical(name)).map(CowVal::Owned)
    }
}
impl<'a> Resolver<'a> {
    fn value(&self, name: &str) -> Option<Box<dyn Val + 'a>> {
        if NAMES.contains(&name) {
            return Some(match self.0.find(name)? {
                Attribute::Text(text) => Box::new(CelString::from(text)),
                Attribute::Int(n) => Box::new(CelInt::from(n)),
                Attribute::Bool(b) => Box::new(CelBool::from(b)),
                Attribute::Duration(d) => Box::new(CelDuration::from(chrono::Duration::from_std(d).ok()?)),
                Attribute::Time(since) => {
                    let utc = chrono::DateTime::from_timestamp(since.as_secs().try_into().ok()?, since.subsec_nanos())?;
                    Box::new(CelTimestamp::from(utc.fixed_offset()))
                }
                Attribute::Headers(all) => {
                    let text = |name: &http::HeaderName| joined(all, name.as_str()).unwrap_or_default();
                    Box::new(map(all
                        .keys()
                        .map(|name| (name.to_string(), Box::new(CelString::from(text(name))) as Box<dyn Val + 'a>))))
                }
            });
        }
        // One that holds others: all of them that have a value.
        let mut below: Vec<&str> = NAMES
            .iter()
            .filter_map(|n| n.strip_prefix(name)?.strip_prefix('.'))
            .filter_map(|rest| rest.split('.').next())
            .collect();
        below.dedup();
        if below.is_empty() {
            return None;
        }
        let found = below.into_iter().filter_map(|part| Some((part.to_owned(), self.value(&format!("{name}.{part}"))?)));
        Some(Box::new(map(found)))
    }
}

fn map<'v>(entries: impl Iterator<Item = (String, Box<dyn Val + 'v>)>) -> CelMap<'v> {
    let entries = entries.map(|(key, value)| (CelMapKey::from(key), value));
    CelMap::from(entries.collect::<HashMap<_, _>>())
}

/// All values of a header, joined with `,` as Envoy shows them.
fn joined<'h>(headers: &'h HeaderMap, name: &str) -> Option<Cow<'h, str>> {
    let mut all = headers.get_all(name).iter().map(|v| String::from_utf8_lossy(v.as_bytes()));
    let first = all.next()?;
    Some(all.fold(first, |joined, next| Cow::Owned(format!("{joined},{next}"))))
}

#[cfg(test)]
mod tests {
    use super::*;

    struct World(HeaderMap);
    impl Attributes for World {
        fn find(&self, name: &str) -> Option<Attribute<'_>> {
            Some(match name {
                "request.url_path" => Attribute::Text("/api/auth/login".into()),
                "request.method" => Attribute::Text("POST".into()),
                "request.headers" => Attribute::Headers(&self.0),
                "request.duration" => Attribute::Duration(Duration::from_millis(120)),
                "request.time" => Attribute::Time(Duration::from_hours(24)),
                "response.code" => Attribute::Int(503),
                "connection.mtls" => Attribute::Bool(true),
                "upstream_peer.workload" => Attribute::Text("api-v1".into()),
                _ => return None,
            })
        }
    }
    fn world() -> World {
        let mut headers = HeaderMap::new();
        headers.append("x-user", "ann".parse().expect("a value"));
        headers.append("x-role", "a".parse().expect("a value"));
        headers.append("x-role", "b".parse().expect("a value"));
        World(headers)
    }
    fn text(source: &str) -> Result<String, String> {
        let parsed = Expression::parse(source).map_err(|e| format!("parse: {e}"))?;
        parsed.text(&world()).map_err(|e| e.to_string())
    }

    #[test]
    fn expressions_of_the_reference_mesh() {
        let cases = [
            (r#"request.url_path.startsWith("/api/auth/") ? "auth" : "user""#, "auth"),
            (r#"response.code >= 500 ? "server" : response.code >= 400 ? "client" : """#, "server"),
            (
                r#"request.duration < duration("100ms") ? "fast" : request.duration < duration("1s") ? "medium" : "slow""#,
                "medium",
            ),
            (r#"request.headers["X-User"]"#, "ann"),
            (r#"request.headers["x-role"]"#, "a,b"),
            (r#"has(request.headers.x) ? "yes" : "no""#, "no"),
            (r#""x-user" in request.headers ? request.headers["x-user"] : "nobody""#, "ann"),
            (r#"request.method + " " + string(response.code)"#, "POST 503"),
            ("upstream_peer.workload", "api-v1"),
            ("filter_state.upstream_peer.workload", "api-v1"),
            ("response.code", "503"),
            ("connection.mtls", "true"),
            (r#"request.url_path.matches("^/api/[a-z]+/.*$") ? "api" : "other""#, "api"),
            (r#"matches(request.method, "O") && !request.method.matches("^O") ? "in" : "out""#, "in"),
            (r#"["^P", "^Q"].exists(p, request.method.matches(p)) ? "1" : "2""#, "1"),
            (r#"request.headers["x-user"].matches("n{2}") ? "1" : "2""#, "1"),
            (r#"response.code.matches("5") ? "1" : "2""#, ""),
            (r#"["a", "b"].exists(x, x == request.method.substring(0)) ? "1" : "2""#, ""),
            ("request.time", "1970-01-02T00:00:00+00:00"),
        ];
        for (source, value) in cases {
            match text(source) {
                Ok(found) => assert_eq!(found, value, "{source}"),
                Err(why) => assert!(value.is_empty(), "{source}: {why}"),
            }
        }
    }
    /// Not with each request.
    #[test]
    fn patterns_are_compiled_when_they_are_read() {
        let e = Expression::parse(r#"request.method.matches("^P") && !matches(request.url_path, "x")"#).expect("an expression");
        let written: Vec<&str> = e.patterns.iter().map(Pattern::source).collect();
        assert_eq!(written, ["^P", "x"]);
        assert!(!format!("{:?}", e.root).contains(r#""matches""#), "{:?}", e.root);
    }
    #[test]
    fn filters_are_true_or_not() {
        let holds = |source: &str| Expression::parse(source).expect(source).holds(&world());
        assert!(holds("response.code >= 400 && connection.mtls"));
        assert!(!holds("response.code == 200"));
        assert!(!holds("!has(response.code)"));
        assert!(holds("!has(response.grpc_status)"));
        assert!(!holds("response.grpc_status == 0"), "no value: an error, so no");
        assert!(!holds("request.method"), "not a yes or no");
    }
    #[test]
    fn what_has_no_value_is_an_error_of_the_request() {
        for source in ["request.headers['x-none']", "response.grpc_status", "1 / 0", "[1]", "request"] {
            assert!(Expression::parse(source).expect(source).text(&world()).is_err(), "{source}");
        }
    }
    #[test]
    fn what_nobody_knows_is_an_error_of_the_object() {
        for (source, part) in [
            ("request.urlpath", "unknown attribute `request.urlpath`; known: request.duration"),
            ("foo.bar == 1", "unknown attribute `foo.bar`"),
            ("request.path ==", "not a CEL expression: column"),
            ("", "not a CEL expression"),
            ("['a'].exists(y, y == z)", "unknown attribute `z`"),
            ("request.path.matches('(')", "not a regular expression (RE2): "),
        ] {
            let error = Expression::parse(source).expect_err(source);
            assert!(error.message.contains(part) && !error.jq, "{source}: {error:?}");
        }
        assert!(Expression::parse(&"(".repeat(3000)).is_err());
        assert!(Expression::parse(&"-".repeat(LONGEST + 1)).is_err());
    }
    #[test]
    fn jq_is_told_from_cel() {
        for source in [
            r#".request.url_path | if startswith("/api/auth/") then "auth" else "user" end"#,
            r#"request.url_path | split("/")[2]"#,
            r#"if request.path == "/" then "root" end"#,
        ] {
            assert!(Expression::parse(source).expect_err(source).jq, "{source}");
        }
        assert!(Expression::parse(JQ_FIX.split_once("example: ").expect("an example").1).is_ok());
    }
    #[test]
    fn headers_of_the_response_are_known_to_be_needed() {
        let reads = |source: &str| Expression::parse(source).expect(source).reads_response_headers();
        assert!(reads("response.headers['x-a']") && reads("has(response.headers.x)") && reads("'x' in response.headers"));
        assert!(!reads("response.code == 200") && !reads("request.headers['x']"));
    }
    #[test]
    fn names_are_sorted_and_distinct() {
        assert!(NAMES.windows(2).all(|w| w[0] < w[1]));
    }
}
