//! From where this process looks at the mesh. Upstream: settings. Downstream: ranks, lookups, trust-domain aliases.
use crate::addr::Network;
use crate::id::TrustDomain;
use crate::workload::Locality;
use std::str::FromStr;
use std::sync::Arc;

/// From where this process looks at the mesh. Fixed for the life of the process, but for `locality` and `network`, which
/// [`crate::change::Change::OwnLocality`] and [`crate::change::Change::OwnNetwork`] set.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Viewpoint {
    /// Our network.
    pub network: Network,
    /// Our cluster.
    pub cluster: Arc<str>,
    /// Our node's name; empty for a waypoint.
    pub node: Arc<str>,
    /// Where the node is.
    pub locality: Locality,
    /// `cluster.local`: the DNS domain of Kubernetes services.
    pub cluster_domain: Arc<str>,
    /// Istio's root namespace.
    pub root_namespace: Arc<str>,
    /// Our trust domain.
    pub trust_domain: TrustDomain,
    /// Other names of our trust domain, accepted from peers and in policies.
    pub trust_domain_aliases: Vec<TrustDomain>,
    /// What becomes of traffic whose declared waypoint is missing.
    pub missing_waypoint: MissingWaypoint,
    /// Whose service a host name means that several namespaces have, none of them the client's or canonical; empty: nobody's.
    pub preferred_namespace: Arc<str>,
}

/// What becomes of traffic to a service or workload that declares a waypoint which does not exist, is not ready, does not
/// let it attach or does not serve its kind of traffic. A waypoint that is there and has no healthy instance is not
/// missing: nothing goes around it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum MissingWaypoint {
    /// It is refused.
    #[default]
    Refuse,
    /// It goes straight to the endpoint, as in Istio: what the waypoint would have judged is not judged.
    Direct,
}
impl FromStr for MissingWaypoint {
    type Err = &'static str;
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "refuse" => Ok(Self::Refuse),
            "direct" => Ok(Self::Direct),
            _ => Err("neither `refuse` nor `direct`"),
        }
    }
}
impl Default for Viewpoint {
    fn default() -> Self {
        Self {
            network: Network::default(),
            cluster: "Kubernetes".into(),
            node: "".into(),
            locality: Locality::default(),
            cluster_domain: "cluster.local".into(),
            root_namespace: "istio-system".into(),
            trust_domain: TrustDomain::default(),
            trust_domain_aliases: Vec::new(),
            missing_waypoint: MissingWaypoint::default(),
            preferred_namespace: "".into(),
        }
    }
}
impl Viewpoint {
    /// Whether a trust domain is ours, by its own name or an alias. `cluster.local` is no alias unless listed.
    pub fn is_own_trust_domain(&self, trust_domain: &str) -> bool {
        self.own_trust_domains().any(|td| td == trust_domain)
    }
    /// Our trust domain, then its aliases.
    pub fn own_trust_domains(&self) -> impl Iterator<Item = &str> {
        std::iter::once(&self.trust_domain).chain(&self.trust_domain_aliases).map(TrustDomain::as_str)
    }
}
