//! The agent as a workload of its own: its metrics over HBONE, for whoever scrapes them from inside the mesh (node-agent §1.1).
//!
//! Owns who the agent is (Istio's `POD_NAMESPACE`, `POD_NAME` and `SERVICE_ACCOUNT`) and the listener in its own network namespace. What comes
//! is served as it is for a pod: by a proven identity, by the policies that bind the agent's workload, and judged again with every
//! version (I6). It refuses every port but that of the metrics, and before the mesh knows the agent's workload everything. Nobody's
//! readiness waits for it: pods are served without. Upstream: `app`. Downstream: `accept`, `inbound`.
use crate::enrolment::Enrolled;
use crate::pod::{Pod, Shared};
use crate::settings::Settings;
use crate::{accept, inbound, ports};
use mesh_model::snapshot::Viewpoint;
use mesh_model::{Reason, Refusal};
use mesh_runtime::drain::{self, DrainMode, DrainWatch};
use mesh_runtime::sockets::{BoundListener, ListenerOptions};
use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

/// How long after a failure the port is asked for again.
const RETRY: Duration = Duration::from_secs(5);
/// How long a scrape under way may take once the agent ends. Scrapers keep their connections: they are not waited for any longer.
const LAST_SCRAPE: Duration = Duration::from_secs(1);

/// Who the agent is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Own {
    namespace: String,
    name: String,
    account: String,
}

impl Own {
    /// As the pod of the agent is told by its DaemonSet; nobody unless all three variables are there.
    pub fn of_environment(env: impl IntoIterator<Item = (String, String)>) -> Option<Self> {
        let mut env: BTreeMap<String, String> = env.into_iter().filter(|(_, value)| !value.is_empty()).collect();
        Some(Self {
            namespace: env.remove("POD_NAMESPACE")?,
            name: env.remove("POD_NAME")?,
            account: env.remove("SERVICE_ACCOUNT")?,
        })
    }

    fn enrolled(&self, view: &Viewpoint) -> Enrolled {
        Enrolled::agent(view, &self.namespace, &self.name, &self.account)
    }
}

/// Where the agent's metrics are, seen from itself.
fn metrics_at(settings: &Settings) -> SocketAddr {
    let addr = settings.face(settings.stats_addr);
    let ip = match addr.ip() {
        // It takes both families.
        ip if ip == Ipv6Addr::UNSPECIFIED || ip == Ipv4Addr::UNSPECIFIED => Ipv4Addr::LOCALHOST.into(),
        ip => ip,
    };
    SocketAddr::new(ip, addr.port())
}

/// Serves the agent's metrics over HBONE until `faces` go, or the agent.
pub async fn serve(own: Own, shared: Arc<Shared>, faces: DrainWatch, agent: DrainWatch) {
    let _held = agent.guard();
    tokio::select! {
        () = shared.mesh.synced() => {}
        _ = faces.draining() => return,
    }
    let enrolled = own.enrolled(shared.mesh.load().view());
    let identity = match enrolled.identity.clone() {
        Ok(identity) => identity,
        Err(error) => return tracing::error!(agent = enrolled.label(), error, "metrics are not served over HBONE: no identity"),
    };
    let listener = tokio::select! {
        listener = bind(&shared.settings) => listener,
        _ = faces.draining() => return,
    };
    shared.svids.introduce(&identity, &enrolled.key, &enrolled.facts);
    shared.svids.prefetch(&identity);
    let (ending, watch) = drain::channel();
    let metrics = metrics_at(&shared.settings);
    let pod = Pod::agent(&shared, &enrolled, identity, metrics, watch);
    tracing::info!(id = %pod.identity, %metrics, "metrics are served over HBONE");
    let accepting = accept::run(Arc::clone(&pod), listener, faces.clone(), inbound::serve_conn);
    shared.threads.pick(None).spawn(async move {
        if let Err(error) = accepting.await {
            tracing::error!(%error, "metrics are not served over HBONE any more: the listener failed");
        }
    });
    let mut versions = shared.mesh.watch();
    let mut bundles = shared.svids.tls().bundles();
    let finished = ending.finished();
    tokio::pin!(finished);
    loop {
        tokio::select! {
            _ = &mut finished => break,
            _ = faces.draining(), if !ending.is_draining() => ending.start(DrainMode::Graceful { deadline: LAST_SCRAPE }),
            Ok(()) = versions.changed() => {
                let snap = shared.mesh.load_full();
                let cut = pod.conns.rejudge(&snap, pod.workload(&snap).ok().map(|w| &**w));
                shared.metrics.cut.add(cut as u64);
            }
            Ok(()) = bundles.changed() => {
                let bundles = bundles.borrow_and_update().clone();
                pod.tunnels.rejudge(&bundles);
            }
        }
    }
    pod.conns.close(&Refusal::new(Reason::Draining, "the agent is shutting down, or another took over"));
}

/// The HBONE port of the agent's own namespace. The agent before this one may be in the same, and serves until it is released.
async fn bind(settings: &Settings) -> BoundListener {
    let addr = settings.face(SocketAddr::new(IpAddr::V6(Ipv6Addr::UNSPECIFIED), ports::HBONE));
    let options = ListenerOptions { stream: settings.tcp.stream_options(), reuse_port: true, ..ListenerOptions::new(addr) };
    let mut told = false;
    loop {
        match options.bind() {
            Ok(listener) => return listener,
            Err(error) if !told => {
                told = true;
                tracing::warn!(%error, %addr, "metrics are not served over HBONE, trying again");
            }
            Err(_) => {}
        }
        tokio::time::sleep(RETRY).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Settings;
    use clap::Parser;

    #[derive(Parser)]
    struct Flags {
        #[command(flatten)]
        settings: Settings,
    }

    fn own(names: &[&str]) -> Option<Own> {
        Own::of_environment(names.iter().map(|name| ((*name).to_owned(), name.to_lowercase())))
    }

    #[test]
    fn the_agent_is_somebody_where_all_three_names_are_told() {
        let all = ["POD_NAMESPACE", "POD_NAME", "SERVICE_ACCOUNT"];
        let Own { namespace, name, account } = own(&all).unwrap();
        assert_eq!((&*namespace, &*name, &*account), ("pod_namespace", "pod_name", "service_account"));
        for left_out in all {
            let rest: Vec<&str> = all.into_iter().filter(|name| *name != left_out).collect();
            assert_eq!(own(&rest), None, "{left_out}");
        }
        let empty = all.map(|name| (name.to_owned(), if name == "SERVICE_ACCOUNT" { String::new() } else { "x".into() }));
        assert_eq!(Own::of_environment(empty), None);
    }

    #[test]
    fn metrics_are_where_they_are_listened_for() {
        let at = |flags: &[&str]| metrics_at(&Flags::parse_from(["ztunnel"].iter().chain(flags)).settings).to_string();
        assert_eq!(at(&[]), "127.0.0.1:15020");
        assert_eq!(at(&["--ipv6", "false"]), "127.0.0.1:15020");
        assert_eq!(at(&["--stats-addr", "[::1]:9000"]), "[::1]:9000");
    }
}
