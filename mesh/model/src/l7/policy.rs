//! Policies of layer 7: AuthorizationPolicies bound by `targetRefs` to a service, a gateway, or all waypoints, compiled. The
//! verdict is made by [`crate::authz_l7`].
//!
//! A policy that could not be understood is a value that refuses what it binds; one of which not even the targets could be
//! read refuses in its namespace. Selector policies are the node agent's ([`crate::authz`]) and never apply here. Policies
//! are grouped by target when they are published, so that a request looks at those of its own target. Upstream:
//! `mesh-sources`.
use crate::gateway::ServiceKey;
use crate::l7::gateway::GatewayKey;
use crate::l7::text::StringMatch;
use crate::origin::Origin;
use crate::policy::{Match, PolicyKey, TextMatch, Values};
use hashbrown::Equivalent;
use http::header::HeaderName;
use ipnet::IpNet;
use std::fmt;
use std::sync::Arc;

/// What policies are bound to.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum PolicyTarget {
    /// A Service, or a host of a ServiceEntry, of the policy's namespace.
    Service(ServiceKey),
    /// A Gateway (a waypoint is one too) of the policy's namespace.
    Gateway(GatewayKey),
    /// GatewayClass `istio-waypoint`: every waypoint. From the root namespace only.
    Waypoints,
    /// Every gateway of a namespace that is no waypoint. Only of what names no target and is meant for gateways too.
    GatewaysOf(Arc<str>),
    /// Every gateway that is no waypoint; the same of the root namespace.
    Gateways,
    /// Every service and gateway of a namespace. Only of policies whose own targets could not be read.
    Namespace(Arc<str>),
    /// Everything. Only of policies of the root namespace, or of no readable one, whose targets could not be read.
    Mesh,
}
impl fmt::Display for PolicyTarget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Service(key) => write!(f, "service {key}"),
            Self::Gateway(key) => write!(f, "gateway {key}"),
            Self::Waypoints => f.write_str("all waypoints"),
            Self::GatewaysOf(ns) => write!(f, "the gateways of namespace {ns}"),
            Self::Gateways => f.write_str("all gateways"),
            Self::Namespace(ns) => write!(f, "namespace {ns}"),
            Self::Mesh => f.write_str("everything"),
        }
    }
}
/// A borrowed [`PolicyTarget`], of the same hash: a request makes no key.
#[derive(Clone, Copy, Debug, Hash)]
pub enum TargetRef<'a> {
    /// A service.
    Service(&'a ServiceKey),
    /// A gateway.
    Gateway(&'a GatewayKey),
    /// Every waypoint.
    Waypoints,
    /// The gateways of a namespace.
    GatewaysOf(&'a str),
    /// Every gateway.
    Gateways,
    /// A namespace.
    Namespace(&'a str),
    /// Everything.
    Mesh,
}
impl Equivalent<PolicyTarget> for TargetRef<'_> {
    fn equivalent(&self, key: &PolicyTarget) -> bool {
        match (self, key) {
            (Self::Service(a), PolicyTarget::Service(b)) => *a == b,
            (Self::Gateway(a), PolicyTarget::Gateway(b)) => *a == b,
            (Self::Namespace(a), PolicyTarget::Namespace(b)) | (Self::GatewaysOf(a), PolicyTarget::GatewaysOf(b)) => **a == **b,
            (Self::Waypoints, PolicyTarget::Waypoints)
            | (Self::Gateways, PolicyTarget::Gateways)
            | (Self::Mesh, PolicyTarget::Mesh) => true,
            _ => false,
        }
    }
}

/// One policy, compiled.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct L7Policy {
    /// Key.
    pub key: PolicyKey,
    /// What it says, or why it cannot be used.
    pub body: L7Body,
    /// Where the object came from.
    pub origin: Option<Arc<Origin>>,
}
/// The content of a policy; unusable content is a value that refuses.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum L7Body {
    /// Usable.
    Rules {
        /// What a match means.
        action: L7Action,
        /// Only told, never enforced (`istio.io/dry-run`).
        dry_run: bool,
        /// OR over rules, in the order of the object; none never matches.
        rules: Vec<L7Rule>,
    },
    /// Could not be understood: everything it binds is refused, with this text.
    Unusable {
        /// What was wrong, for the operator.
        why: Arc<str>,
    },
}
/// What a match means.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum L7Action {
    /// Lets through.
    Allow,
    /// Refuses.
    Deny,
    /// Marks, nothing else.
    Audit,
    /// Asks an external authorizer.
    Custom {
        /// `provider.name`; empty when not written.
        provider: Arc<str>,
    },
}
/// One rule: some source, some operation, every condition. An empty list holds.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct L7Rule {
    pub(crate) from: Vec<L7Source>,
    pub(crate) to: Vec<Operation>,
    pub(crate) when: Vec<Condition>,
    /// Says something that only a request shows.
    http: bool,
}
impl L7Rule {
    /// A rule from its parts.
    pub fn new(from: Vec<L7Source>, to: Vec<Operation>, when: Vec<Condition>) -> Self {
        let http = from.iter().any(|s| !s.request_principals.is_empty())
            || to.iter().any(|o| !(o.methods.is_empty() && o.hosts.is_empty() && o.paths.is_empty()))
            || when.iter().any(Condition::needs_http);
        Self { from, to, when, http }
    }
    /// Whether it says something that only a request shows. On a TCP connection such a rule of an ALLOW policy allows
    /// nothing; of any other policy those attributes count as matching (Istio's rule: narrower, and broader).
    pub fn needs_http(&self) -> bool {
        self.http
    }
}
/// One `source`: every field must hold.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct L7Source {
    /// What the connection shows: principals, namespaces, service accounts, trust domains, `ipBlocks`.
    pub peer: Match,
    /// `remoteIpBlocks`: the client's address behind the trusted proxies.
    pub remote_ips: Values<IpNet>,
    /// `requestPrincipals`.
    pub request_principals: Values<TextMatch>,
}
/// One `operation`: every field must hold.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Operation {
    /// Ports of the service (not of the endpoint).
    pub ports: Values<u16>,
    /// Methods.
    pub methods: Values<TextMatch>,
    /// Hosts, in any case; one without a port is meant with every port.
    pub hosts: Values<TextMatch>,
    /// Paths.
    pub paths: Values<PathPattern>,
}
/// How a path is matched: normalised, without the query.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum PathPattern {
    /// Text, `*` at one end.
    Text(TextMatch),
    /// With `{*}` or `{**}`.
    Template(Template),
}
impl PathPattern {
    /// The pattern of a text as policies have it.
    pub fn parse(s: &str) -> Result<Self, TemplateError> {
        if s.contains(['{', '}']) {
            return Template::parse(s).map(Self::Template);
        }
        match TextMatch::parse(s).ok_or(TemplateError::Empty)? {
            TextMatch::Exact(t) | TextMatch::Prefix(t) | TextMatch::Suffix(t) if t.contains('*') => Err(TemplateError::Star),
            text => Ok(Self::Text(text)),
        }
    }
    /// Whether it matches.
    pub fn matches(&self, path: &str) -> bool {
        match self {
            Self::Text(text) => text.matches(Some(path)),
            Self::Template(template) => template.matches(path),
        }
    }
}
/// A path template: `{*}` is one segment that is not empty, `{**}` is any text, also none and also with slashes.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Template {
    /// Segments up to the first `{**}`, or all of them.
    head: Box<[Segment]>,
    /// What the path must end with, when there is a `{**}`: the text behind it.
    tail: Option<Box<str>>,
}
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Segment {
    Text(Box<str>),
    One,
}
/// As policies write it.
impl fmt::Display for Template {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for segment in &self.head {
            match segment {
                Segment::Text(text) => write!(f, "/{text}")?,
                Segment::One => f.write_str("/{*}")?,
            }
        }
        self.tail.as_ref().map_or(Ok(()), |tail| write!(f, "/{{**}}{tail}"))
    }
}
/// Why a path is none that can be matched.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TemplateError {
    /// Nothing written.
    #[error("an empty path matches nothing")]
    Empty,
    /// A `*` elsewhere than at one end.
    #[error("a `*` may only stand at one end of a path, or be written `{{*}}`")]
    Star,
    /// A template begins with `/`.
    #[error("a path template begins with `/`")]
    NotAbsolute,
    /// `{*}` and `*` in one path.
    #[error("`*` and `{{*}}` cannot be mixed in one path")]
    Mixed,
    /// Something else than `{*}` or `{**}` in braces, or text beside them.
    #[error("in a path template a segment is text, `{{*}}` or `{{**}}`, nothing beside it")]
    Segment,
    /// Something variable after `{**}`.
    #[error("nothing variable may follow `{{**}}` in a path template")]
    AfterRest,
}
impl Template {
    fn parse(s: &str) -> Result<Self, TemplateError> {
        if s.replace("{**}", "").replace("{*}", "").contains('*') {
            return Err(TemplateError::Mixed);
        }
        let rest = s.strip_prefix('/').ok_or(TemplateError::NotAbsolute)?;
        let mut head = Vec::new();
        let mut after = rest;
        loop {
            let (segment, more) = after.split_once('/').map_or((after, None), |(s, m)| (s, Some(m)));
            match segment {
                "{*}" => head.push(Segment::One),
                "{**}" => {
                    let tail = more.map(|m| format!("/{m}")).unwrap_or_default();
                    if tail.contains("{*}") || tail.contains("{**}") {
                        return Err(TemplateError::AfterRest);
                    }
                    if tail.contains(['{', '}']) {
                        return Err(TemplateError::Segment);
                    }
                    return Ok(Self { head: head.into(), tail: Some(tail.into()) });
                }
                text if text.contains(['{', '}']) => return Err(TemplateError::Segment),
                text => head.push(Segment::Text(text.into())),
            }
            match more {
                Some(more) => after = more,
                None => return Ok(Self { head: head.into(), tail: None }),
            }
        }
    }
    fn matches(&self, path: &str) -> bool {
        let Some(mut rest) = path.strip_prefix('/') else { return false };
        let last = self.head.len().saturating_sub(1);
        for (i, segment) in self.head.iter().enumerate() {
            let ends = self.tail.is_none() && i == last;
            let (found, more) = match rest.split_once('/') {
                Some(_) if ends => return false,
                Some((found, more)) => (found, more),
                None if ends => (rest, ""),
                None => return false,
            };
            let fits = match segment {
                Segment::Text(text) => found == &**text,
                Segment::One => !found.is_empty(),
            };
            if !fits {
                return false;
            }
            rest = more;
        }
        self.tail.as_ref().is_none_or(|tail| rest.ends_with(&**tail))
    }
}

/// One `when`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Condition {
    /// `source.ip`, `source.namespace`, `source.principal`, `source.serviceAccount`, `source.trustDomain`,
    /// `destination.ip`, `destination.port`.
    Peer(Match),
    /// `remote.ip`.
    RemoteIp(Values<IpNet>),
    /// `connection.sni`.
    Sni(Values<TextMatch>),
    /// `request.headers[name]`.
    Header(HeaderKey, Values<TextMatch>),
    /// `request.auth.principal`.
    RequestPrincipal(Values<TextMatch>),
    /// `request.auth.claims[a][b]`, `request.auth.audiences` (`aud`), `request.auth.presenter` (`azp`).
    Claim(Vec<Arc<str>>, Values<StringMatch>),
}
impl Condition {
    fn needs_http(&self) -> bool {
        matches!(self, Self::Header(..) | Self::RequestPrincipal(_) | Self::Claim(..))
    }
}
/// A header a condition may ask for. Three have another place in HTTP/2 and are meant whatever the version.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum HeaderKey {
    /// An ordinary one.
    Name(HeaderName),
    /// `host`, `:authority`.
    Authority,
    /// `:method`.
    Method,
}
impl HeaderKey {
    /// The header of a name; `None` for what is no name, and for pseudo-headers that have attributes of their own.
    pub fn parse(name: &str) -> Option<Self> {
        match name.to_ascii_lowercase().as_str() {
            "host" | ":authority" => Some(Self::Authority),
            ":method" => Some(Self::Method),
            other => HeaderName::try_from(other).ok().map(Self::Name),
        }
    }
}

/// All policies of one target.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct L7Policies {
    /// By key.
    pub(crate) all: Box<[Arc<L7Policy>]>,
    /// The first that cannot be used, by position.
    unusable: Option<usize>,
    /// Some are dry runs.
    pub(crate) dry_runs: bool,
}
impl L7Policies {
    /// The policies of a target, in any order.
    pub fn new(mut all: Vec<Arc<L7Policy>>) -> Self {
        all.sort_by(|a, b| a.key.cmp(&b.key));
        let unusable = all.iter().position(|p| matches!(p.body, L7Body::Unusable { .. }));
        Self { unusable, dry_runs: all.iter().any(|p| matches!(p.body, L7Body::Rules { dry_run: true, .. })), all: all.into() }
    }
    /// All of them, by key.
    pub fn iter(&self) -> impl Iterator<Item = &Arc<L7Policy>> {
        self.all.iter()
    }
    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.all.is_empty()
    }
    /// The first that cannot be used.
    pub(crate) fn unusable(&self) -> Option<&L7Policy> {
        self.all.get(self.unusable?).map(|p| &**p)
    }
}
