//! Policies of layer 7, bound to a service, a gateway or the waypoint class by `targetRefs` (spec/waypoint §3.4). The verdict is
//! made by [`crate::authz_l7`].
//!
//! A policy that could not be understood is a value that denies what it is bound to. Upstream: `mesh-sources`.
use crate::gateway::ServiceKey;
use crate::l7::gateway::GatewayKey;
use crate::origin::Origin;
use crate::policy::{Match, PolicyKey, TextMatch, Values};
use http::header::HeaderName;
use ipnet::IpNet;
use std::sync::Arc;

/// What a policy is bound to.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum L7Target {
    /// A Service or ServiceEntry of the policy's namespace, by the object's name. Where both have one name, both are bound.
    Service {
        /// Namespace.
        namespace: Arc<str>,
        /// Name of the object.
        name: Arc<str>,
    },
    /// A Gateway: everything that passes it.
    Gateway(GatewayKey),
    /// Every waypoint (GatewayClass `istio-waypoint`, policies of the root namespace only).
    Waypoints,
}
/// What a match means.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum L7Action {
    /// Lets through.
    Allow,
    /// Refuses.
    Deny,
    /// Only marks.
    Audit,
    /// Asks somebody else. Nobody is asked yet: what it matches is refused.
    Custom,
}
/// One policy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct L7Policy {
    /// Key.
    pub key: PolicyKey,
    /// What it is bound to.
    pub targets: Vec<L7Target>,
    /// What it says, or why it cannot be used.
    pub body: L7Body,
    /// Where the object came from.
    pub origin: Option<Arc<Origin>>,
}
/// The content of a policy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum L7Body {
    /// Understood.
    Rules {
        /// Action.
        action: L7Action,
        /// Only logged.
        dry_run: bool,
        /// OR over rules; none never matches.
        rules: Vec<L7Rule>,
    },
    /// Not understood: what it is bound to is refused, with this text.
    Unusable {
        /// What was wrong.
        why: Arc<str>,
    },
}
/// AND over its three parts; an empty part holds.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct L7Rule {
    /// Any of these sources.
    pub from: Vec<L7Source>,
    /// Any of these operations.
    pub to: Vec<L7Operation>,
    /// All of these conditions.
    pub when: Vec<L7Condition>,
}
/// A source: all of its fields.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct L7Source {
    /// What layer 4 knows too.
    pub peer: Match,
    /// `issuer/subject` of a verified token.
    pub request_principals: Values<TextMatch>,
    /// Client address as `x-forwarded-for` tells it.
    pub remote_ips: Values<IpNet>,
}
/// An operation: all of its fields.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct L7Operation {
    /// Hosts, lower case, with or without port.
    pub hosts: Values<TextMatch>,
    /// Methods.
    pub methods: Values<TextMatch>,
    /// Normalised paths without query.
    pub paths: Values<PathPattern>,
    /// Ports of the service.
    pub ports: Values<u16>,
}
/// One `when`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum L7Condition {
    /// About the peer or the destination.
    Peer(Match),
    /// `remote.ip`.
    RemoteIp(Values<IpNet>),
    /// `connection.sni`.
    Sni(Values<TextMatch>),
    /// `request.headers[name]`.
    Header(HeaderName, Values<TextMatch>),
    /// `request.auth.*`: of a verified token.
    Token(Arc<str>, Values<TextMatch>),
}
/// How a path is written in a policy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PathPattern {
    /// Exact, prefix, suffix or anything.
    Text(TextMatch),
    /// Segments with `{*}` (one segment) and at most one `{**}` (any number, also none).
    Template(Arc<[Segment]>),
}
/// One segment of a template.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Segment {
    /// This text.
    Text(Arc<str>),
    /// One segment, not empty.
    One,
    /// Any number of segments.
    Any,
}
impl PathPattern {
    /// Parses a path of a policy; `None` when it is neither text nor a template.
    pub fn parse(text: &str) -> Option<Self> {
        if !text.contains(['{', '}']) {
            return TextMatch::parse(text).map(Self::Text);
        }
        let rest = text.strip_prefix('/')?;
        let segments = rest.split('/').map(|s| match s {
            "{*}" => Some(Segment::One),
            "{**}" => Some(Segment::Any),
            s if s.contains(['{', '}', '*']) => None,
            s => Some(Segment::Text(s.into())),
        });
        let segments: Vec<Segment> = segments.collect::<Option<_>>()?;
        (segments.iter().filter(|s| **s == Segment::Any).count() <= 1).then(|| Self::Template(segments.into()))
    }
    /// Whether a path matches.
    pub fn matches(&self, path: &str) -> bool {
        match self {
            Self::Text(text) => text.matches(Some(path)),
            Self::Template(segments) => {
                let Some(rest) = path.strip_prefix('/') else { return false };
                let count = rest.split('/').count();
                match segments.iter().position(|s| *s == Segment::Any) {
                    None => count == segments.len() && segments.iter().zip(rest.split('/')).all(|(s, have)| s.takes(have)),
                    Some(at) => {
                        let (head, tail) = (segments.get(..at).unwrap_or_default(), segments.get(at + 1..).unwrap_or_default());
                        count >= head.len() + tail.len()
                            && head.iter().zip(rest.split('/')).all(|(s, have)| s.takes(have))
                            && tail.iter().rev().zip(rest.rsplit('/')).all(|(s, have)| s.takes(have))
                    }
                }
            }
        }
    }
}
impl Segment {
    fn takes(&self, have: &str) -> bool {
        match self {
            Self::Text(text) => **text == *have,
            Self::One => !have.is_empty(),
            Self::Any => true,
        }
    }
}

impl L7Target {
    /// The target a service is; `name` is that of its object.
    pub fn of_service(key: &ServiceKey, name: &Arc<str>) -> Self {
        Self::Service { namespace: Arc::clone(&key.namespace), name: Arc::clone(name) }
    }
}
