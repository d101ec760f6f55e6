//! The node's own processes: above all the kubelet, whose health probes are plaintext.
//!
//! Owns the question whether a connection to a pod was opened on this node itself. The source address does not answer it: what
//! a node forwards (node ports, masquerading) comes with the node's address too. So the kernel is asked for the socket, in the
//! node's own network namespace, and only where policies said no. Upstream: `passthrough`. Downstream: `sock_diag`.
use crate::settings::{NodeProbes, Settings};
use mesh_runtime::sockets::{NetnsFd, SocketTable};
use std::net::{IpAddr, SocketAddr};

/// The sockets of the node, where its probes are let through.
#[derive(Debug)]
pub struct Node(Option<(NetnsFd, SocketTable)>);

impl Node {
    /// By these settings. Where the node's network namespace cannot be opened it is taken to be our own (`hostNetwork`).
    pub fn of(settings: &Settings) -> Self {
        if settings.node_probes == NodeProbes::Judge {
            return Self(None);
        }
        let path = settings.node_netns.clone().unwrap_or_else(|| settings.proc_dir.join("1/ns/net"));
        let opened = NetnsFd::open(&path).or_else(|error| {
            tracing::debug!(%error, path = %path.display(), "the node's network namespace is taken to be the agent's own");
            NetnsFd::current()
        });
        match opened.and_then(|netns| SocketTable::of(&netns).map(|table| (netns, table))) {
            Ok(found) => Self(Some(found)),
            Err(error) => {
                tracing::warn!(%error, "health probes of the node are judged like any plaintext");
                Self(None)
            }
        }
    }

    /// Whether a process of the node opened the connection from `client` to `dst`. What cannot be told is not so.
    pub fn opened(&self, client: SocketAddr, dst: SocketAddr) -> bool {
        self.0.as_ref().is_some_and(|(_, table)| table.opened(client, dst).unwrap_or(false))
    }

    /// The addresses its probes may come from; none where they are judged like any plaintext.
    pub fn addresses(&self) -> Vec<IpAddr> {
        self.0.as_ref().map_or_else(Vec::new, |(netns, _)| netns.addresses().unwrap_or_default())
    }
}
