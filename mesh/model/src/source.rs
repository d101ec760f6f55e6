//! Whose a connection is, for labels of logs and metrics. Nothing is decided by it: that takes the identity alone.
use crate::id::SpiffeId;
use crate::snapshot::Snapshot;
use crate::workload::Workload;
use std::net::IpAddr;
use std::sync::Arc;

/// The workload behind a client's address. Over mTLS it must be of the identity the peer proved: labels do not lie.
pub fn find_source<'a>(snap: &'a Snapshot, client: IpAddr, id: Option<&SpiffeId>) -> Option<&'a Arc<Workload>> {
    let found = snap.find_workload_by_ip(&snap.view().network, client.to_canonical())?;
    let proven = id.is_none_or(|id| found.identity().is_ok_and(|own| own == *id));
    proven.then_some(found)
}

/// Whether a tunnel that says it is of the network `said` may speak for its client: it does not come from an address of that
/// client's but through a gateway of this network, as all do that come from others (node-agent §1.5). Whoever comes by itself is
/// known by its address, or not at all.
pub fn is_passed_on(snap: &Snapshot, client: IpAddr, said: &str) -> bool {
    let own = &snap.view().network;
    said != own.as_str() && snap.find_workload_by_ip(own, client.to_canonical()).is_some_and(|w| w.is_gateway())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixture::*;
    use crate::labels::Labels;

    #[test]
    fn an_address_tells_of_whom_the_certificate_names_and_of_nobody_else() {
        let snap = mesh(vec![pod("default", "client", "10.0.0.1").into()]);
        let named = |ip_: &str, account: Option<&str>| {
            let id = account.map(|account| id("cluster.local", "default", account));
            find_source(&snap, ip(ip_), id.as_ref()).map(|w| w.name.to_string())
        };
        assert_eq!(named("10.0.0.1", None).as_deref(), Some("client"));
        assert_eq!(named("::ffff:10.0.0.1", Some("client")).as_deref(), Some("client"));
        assert_eq!(named("10.0.0.1", Some("other")), None);
        assert_eq!(named("10.0.0.2", None), None);
    }

    #[test]
    fn only_a_gateway_passes_on_what_is_of_another_network() {
        let mut by_label = pod("default", "gw-a", "10.0.0.1");
        by_label.labels = Labels::of(vec![("gateway.networking.k8s.io/gateway-name".into(), "eastwest".into())]);
        // istiod tells no labels.
        let by_port = backs(pod("default", "gw-b", "10.0.0.2"), &key("default", "eastwest"), &[(15008, 15008)]);
        let web = backs(pod("default", "web", "10.0.0.3"), &key("default", "web"), &[(80, 8080)]);
        let snap = mesh(vec![by_label.into(), by_port.into(), web.into()]);
        let own = snap.view().network.as_str();
        for (from, network, passed) in [
            ("10.0.0.1", "west", true),
            ("10.0.0.2", "west", true),
            ("10.0.0.1", own, false),
            ("10.0.0.3", "west", false),
            ("10.0.0.9", "west", false),
        ] {
            assert_eq!(is_passed_on(&snap, ip(from), network), passed, "{from} {network}");
        }
    }
}
