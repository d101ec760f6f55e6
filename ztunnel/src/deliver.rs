//! Handing a connection to the application inside the pod, with the client's own address as source.
//!
//! Upstream: `inbound`, `passthrough`. Downstream: sockets in the pod's namespace.
use crate::dialer::{connect_refusal, local_mark};
use crate::pod::Pod;
use mesh_model::{Reason, Refusal};
use mesh_runtime::sockets::{ConnectOptions, connect};
use std::net::{IpAddr, SocketAddr};
use tokio::net::TcpStream;

/// Connects to `dst` in the pod, from the address of `client`.
pub async fn deliver(pod: &Pod, client: SocketAddr, dst: SocketAddr) -> Result<TcpStream, Refusal> {
    // Without a namespace of its own the pod is on loopback, where there is nobody else's address to keep. A client of
    // the other family has no address that could be kept.
    let source = (pod.netns.is_some() && client.is_ipv4() == dst.is_ipv4()).then(|| client.ip());
    from(pod, source, dst).await
}

/// Connects to `dst` in the pod from the pod's own address (application tunnels on loopback).
pub async fn local(pod: &Pod, dst: SocketAddr) -> Result<TcpStream, Refusal> {
    from(pod, None, dst).await
}

async fn from(pod: &Pod, source: Option<IpAddr>, dst: SocketAddr) -> Result<TcpStream, Refusal> {
    pod.refuse_own(dst)?;
    let options = ConnectOptions {
        netns: pod.netns.clone(),
        mark: pod.netns.is_some().then(|| local_mark(&pod.shared.settings)),
        // Ports no client uses for its own connections: see the loader's contract.
        ports: source.map(|_| ebpf_loader::DELIVERY_PORTS),
        source,
        stream: pod.shared.settings.tcp.stream_options(),
        timeout: pod.shared.settings.connect_timeout,
    };
    pod.shared.metrics.connect_to_applications.time(connect(dst, &options)).await.map_err(|e| connect_refusal(dst, &e))
}

/// Where a connection to `dst` of the agent's pod is delivered: to its metrics at `metrics`, or nowhere.
///
/// # Errors
/// Something else was asked for.
pub fn only_metrics(dst: SocketAddr, metrics: SocketAddr) -> Result<SocketAddr, Refusal> {
    if dst.port() == metrics.port() {
        return Ok(metrics);
    }
    let detail = format!("{dst}: of the agent itself only its metrics are served (port {})", metrics.port());
    Err(Refusal::new(Reason::NoSuchPort, detail))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::Ipv4Addr;

    #[test]
    fn of_the_agent_only_metrics_are_delivered() {
        let metrics = "127.0.0.1:15020".parse().unwrap();
        assert_eq!(only_metrics("10.0.0.1:15020".parse().unwrap(), metrics), Ok(metrics));
        for port in [15000, 15021, 80] {
            let dst = SocketAddr::new(Ipv4Addr::LOCALHOST.into(), port);
            assert_eq!(only_metrics(dst, metrics).unwrap_err().reason, Reason::NoSuchPort, "{port}");
        }
    }
}
