//! Dialling: the hops of a plan, one after the other.
//!
//! Owns how each kind of plan is carried out. Upstream: `outbound`. Downstream: `dialer`, the pools of the pod.
use crate::dialer::PodDialer;
use crate::pod::Pod;
use mesh_hbone::{ConnectRequest, HboneError, HboneStream, Pool, PoolKey};
use mesh_model::plan::{Dial, Hop, NamedDial};
use mesh_model::{DialAddr, HboneAuthority, Reason, Refusal, SpiffeId};
use mesh_runtime::resolve;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use tokio::net::TcpStream;

/// An opened path to the destination.
pub enum Reached {
    /// Plain TCP.
    Tcp(TcpStream),
    /// A stream of a tunnel to the one the plan names.
    Tunnel(HboneStream),
    /// A stream through a gateway: who answered behind it is only known now.
    Beyond {
        /// The stream.
        stream: HboneStream,
        /// Identity of the inner peer.
        peer: SpiffeId,
        /// How it describes itself.
        baggage: Option<http::HeaderValue>,
    },
}

/// Turns a plan whose address must be resolved into one that can be dialled.
pub async fn resolve_name(pod: &Pod, dial: Dial, client: IpAddr, draw: u64) -> Result<Dial, Refusal> {
    let Dial::Name { host, port, then } = dial else { return Ok(dial) };
    let ips = pod.shared.resolver.lookup(&host).await.map_err(|e| Refusal::new(Reason::DnsFailure, e))?;
    let ip =
        resolve::choose(&ips, client, draw).ok_or_else(|| Refusal::new(Reason::DnsFailure, format!("{host}: no addresses")))?;
    Ok(match then {
        NamedDial::Plain => Dial::Plain(DialAddr::from(SocketAddr::new(ip, port))),
        NamedDial::Hbone { hbone_port, authority, expect, role } => Dial::Hbone(Hop {
            dial: DialAddr::from(SocketAddr::new(ip, hbone_port)),
            authority: authority.unwrap_or(HboneAuthority::Addr(SocketAddr::new(ip, port))),
            expect,
            role,
        }),
    })
}

/// Carries out a plan. `request` makes the CONNECT for an authority.
pub async fn reach(
    pod: &Pod,
    dial: &Dial,
    client: IpAddr,
    request: impl Fn(&HboneAuthority) -> ConnectRequest,
) -> Result<Reached, HboneError> {
    let dialer =
        PodDialer::new(&pod.shared.settings, &pod.shared.metrics, pod.netns.clone(), pod.svid.clone(), Arc::clone(&pod.reached));
    match dial {
        Dial::Passthrough(to) | Dial::Plain(to) => Ok(Reached::Tcp(dialer.tcp(to.0).await.map_err(HboneError::from)?)),
        Dial::Hbone(hop) => {
            let (stream, _) = pool(pod)?.open(&key(pod, hop, client), &request(&hop.authority)).await?;
            Ok(Reached::Tunnel(stream))
        }
        Dial::DoubleHbone { outer, inner } => {
            // The inner tunnel is made for this connection alone: pooled, all connections would stick to one remote
            // workload behind the gateway (node-agent §1.4 G).
            let (key, through) = (key(pod, outer, client), request(&outer.authority));
            let secure = |io| dialer.tls(io, &inner.expect);
            let nested = pool(pod)?.open_within(&key, &through, secure, &request(&inner.authority)).await?;
            Ok(Reached::Beyond { stream: nested.stream, peer: nested.peer, baggage: nested.head.baggage().cloned() })
        }
        Dial::Name { host, .. } => Err(HboneError::new(Reason::Internal, format!("{host} was not resolved before dialling"))),
    }
}

fn pool(pod: &Pod) -> Result<&Pool<PodDialer>, HboneError> {
    pod.pool().ok_or_else(|| HboneError::new(Reason::Internal, "not on a data thread"))
}

fn key(pod: &Pod, hop: &Hop, client: IpAddr) -> PoolKey {
    PoolKey::new(pod.identity.clone(), Arc::clone(&hop.expect), client, hop.dial.0)
}
