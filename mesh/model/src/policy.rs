//! L4 authorization policies as the agent evaluates them (node-agent §1.7), and the policy that could not be read.
use crate::origin::Origin;
use ipnet::IpNet;
use std::fmt;
use std::sync::Arc;

/// `namespace/name`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PolicyKey {
    /// Namespace the policy lives in.
    pub namespace: Arc<str>,
    /// Name.
    pub name: Arc<str>,
}
impl PolicyKey {
    /// A key from its parts.
    pub fn new(namespace: &str, name: &str) -> Self {
        Self { namespace: namespace.into(), name: name.into() }
    }
}
impl fmt::Display for PolicyKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}
/// Which workloads a policy binds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Scope {
    /// All workloads (root namespace, no selector).
    Global,
    /// All workloads of its namespace.
    Namespace,
    /// The workloads that name it in `Workload::policies`.
    Selector,
}
/// What a match means.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Action {
    /// Lets through.
    Allow,
    /// Refuses.
    Deny,
}
/// One policy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Policy {
    /// Key.
    pub key: PolicyKey,
    /// Scope.
    pub scope: Scope,
    /// What it says, or why it cannot be used.
    pub body: PolicyBody,
    /// Where the object came from.
    pub origin: Option<Arc<Origin>>,
}
/// The content of a policy. Unusable content is a value that denies, so that fail-open cannot be written by accident.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PolicyBody {
    /// Usable.
    Rules {
        /// ALLOW or DENY.
        action: Action,
        /// Only logged, never enforced (`istio.io/dry-run`).
        dry_run: bool,
        /// OR over rules; none never matches.
        rules: Vec<Rule>,
    },
    /// The object could not be understood: every connection to a workload in scope is refused, with this text.
    Unusable {
        /// What was wrong, for the operator.
        why: Arc<str>,
    },
}
/// AND over clauses; a rule without clauses matches.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct Rule {
    /// The clauses (`to`, `from`, each `when`).
    pub clauses: Vec<Clause>,
}
/// OR over matches; a clause without matches matches (Istio: `[[]]` and `[[[]]]` allow all).
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct Clause {
    /// The alternatives.
    pub matches: Vec<Match>,
}
/// AND over kinds; in a kind (no positive values or any of them) and none of the negative ones. A match with no
/// field at all never matches, so a clause made only of such matches is false (node-agent §1.7).
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct Match {
    /// Source namespaces.
    pub namespaces: Values<TextMatch>,
    /// Source service accounts, exact `namespace/name`, any trust domain.
    pub service_accounts: Values<(Arc<str>, Arc<str>)>,
    /// Source principals, without `spiffe://`.
    pub principals: Values<TextMatch>,
    /// Source trust domains (Istio's `trustDomains`, which istiod drops).
    pub trust_domains: Values<TextMatch>,
    /// Source addresses.
    pub source_ips: Values<IpNet>,
    /// Destination addresses.
    pub destination_ips: Values<IpNet>,
    /// Destination ports (the application's port).
    pub destination_ports: Values<u16>,
}
impl Match {
    /// No field at all.
    pub fn is_empty(&self) -> bool {
        self.namespaces.is_empty()
            && self.service_accounts.is_empty()
            && self.principals.is_empty()
            && self.trust_domains.is_empty()
            && self.source_ips.is_empty()
            && self.destination_ips.is_empty()
            && self.destination_ports.is_empty()
    }
}
/// Positive and negative values of one kind.
///
/// One pointer wide: of the seven kinds of a match mostly one is used, and there may be 100 000 matches.
#[derive(Clone, PartialEq, Eq)]
pub struct Values<T>(Option<Box<Both<T>>>);
/// Positive, then negative values; never both empty, so that equal values have one form.
type Both<T> = (Box<[T]>, Box<[T]>);
impl<T> Default for Values<T> {
    fn default() -> Self {
        Self(None)
    }
}
impl<T: fmt::Debug> fmt::Debug for Values<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Values").field("any", &self.any()).field("none", &self.none()).finish()
    }
}
impl<T> Values<T> {
    /// Values from their parts.
    pub fn new(any: Vec<T>, none: Vec<T>) -> Self {
        let empty = any.is_empty() && none.is_empty();
        Self((!empty).then(|| Box::new((any.into(), none.into()))))
    }
    /// Any of these must match, when there are any.
    pub fn any(&self) -> &[T] {
        self.0.as_ref().map_or(&[], |both| &both.0)
    }
    /// None of these may match.
    pub fn none(&self) -> &[T] {
        self.0.as_ref().map_or(&[], |both| &both.1)
    }
    /// Replaces the positive values.
    pub fn set_any(&mut self, any: Vec<T>) {
        let none = self.0.take().map_or_else(Vec::new, |both| both.1.into_vec());
        *self = Self::new(any, none);
    }
    /// Replaces the negative values.
    pub fn set_none(&mut self, none: Vec<T>) {
        let any = self.0.take().map_or_else(Vec::new, |both| both.0.into_vec());
        *self = Self::new(any, none);
    }
    /// No values at all: the kind does not constrain.
    pub fn is_empty(&self) -> bool {
        self.0.is_none()
    }
}
/// Istio's string match.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum TextMatch {
    /// Equal.
    Exact(Arc<str>),
    /// Starts with.
    Prefix(Arc<str>),
    /// Ends with.
    Suffix(Arc<str>),
    /// Present and not empty (`*`).
    Presence,
}
impl TextMatch {
    /// Istio's short form: `*` presence, `*x` suffix, `x*` prefix, else exact. `None` for the empty text, which
    /// upstream turns into "no constraint".
    pub fn parse(s: &str) -> Option<Self> {
        if s.is_empty() {
            None
        } else if s == "*" {
            Some(Self::Presence)
        } else if let Some(rest) = s.strip_prefix('*') {
            Some(Self::Suffix(rest.into()))
        } else if let Some(rest) = s.strip_suffix('*') {
            Some(Self::Prefix(rest.into()))
        } else {
            Some(Self::Exact(s.into()))
        }
    }
    /// Whether a value matches; `None` is "the connection has no such value", which no positive match accepts.
    pub fn matches(&self, value: Option<&str>) -> bool {
        let Some(v) = value else { return false };
        match self {
            Self::Exact(x) => v == &**x,
            Self::Prefix(x) => v.starts_with(&**x),
            Self::Suffix(x) => v.ends_with(&**x),
            Self::Presence => !v.is_empty(),
        }
    }
}
