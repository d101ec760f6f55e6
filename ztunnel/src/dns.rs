//! The DNS proxy of one pod (node-agent §1.11): names of the mesh are answered from the snapshot, everything else goes to the pod's
//! own name servers, through the pod's namespace, and comes back as they said it.
//!
//! Owns what a question costs at most: places, sizes and time are bounded, and what is no question is no reason to stop.
//! Decides no name (`model::names`). Upstream: the pod's queries on 15053, and its TCP to port 53. Downstream: the pod's name
//! servers ([`forward`]), found in its own `resolv.conf` ([`crate::resolv`]).
mod answer;
mod forward;
#[cfg(test)]
mod tests;

use crate::metrics::DnsMetrics;
use crate::pod::Pod;
use crate::resolv::ResolvConf;
use answer::Asked;
use mesh_model::names;
use mesh_model::wanted::Wanted;
use mesh_runtime::drain::DrainWatch;
use mesh_runtime::sockets::BoundListener;
use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpStream, UdpSocket};

/// The port that is captured.
pub const CAPTURED: u16 = 53;

/// Longest query over UDP we read.
const LONGEST_DATAGRAM: usize = 4096;
/// Pause after an error of a socket, so that one that stays does not spin.
const AFTER_ERROR: Duration = Duration::from_millis(10);
/// How long istiod may take to say what a name is.
const ON_DEMAND: Duration = Duration::from_secs(1);
/// How long a TCP connection may be silent.
const SILENCE: Duration = Duration::from_secs(5);

/// How a question came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transport {
    /// One datagram.
    Udp,
    /// A stream of messages, each after its length.
    Tcp,
}

impl Transport {
    /// As metrics call it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Udp => "udp",
            Self::Tcp => "tcp",
        }
    }
}

/// Answers datagrams until `stop` drains.
///
/// # Errors
/// The socket cannot be used.
pub async fn run_udp(pod: Arc<Pod>, socket: std::net::UdpSocket, stop: DrainWatch) -> io::Result<()> {
    let socket = Arc::new(UdpSocket::from_std(socket)?);
    let mut buffer = [0; LONGEST_DATAGRAM];
    let stop = stop.draining();
    tokio::pin!(stop);
    loop {
        let (length, client) = tokio::select! {
            biased;
            came = socket.recv_from(&mut buffer) => match came {
                Ok(came) => came,
                // What ICMP says about an earlier answer, or too little memory for now.
                Err(error) => {
                    tracing::debug!(%error, pod = %pod.uid, "DNS socket");
                    tokio::time::sleep(AFTER_ERROR).await;
                    continue;
                }
            },
            _ = &mut stop => return Ok(()),
        };
        let Ok(place) = Arc::clone(&pod.dns.questions).try_acquire_owned() else { continue };
        let query = buffer.get(..length).unwrap_or_default().to_vec();
        let (pod, socket) = (Arc::clone(&pod), Arc::clone(&socket));
        tokio::spawn(async move {
            if let Some(reply) = reply(&pod, query, Transport::Udp).await {
                // A client that is gone does not want it any more.
                let _ = socket.send_to(&reply, client).await;
            }
            drop(place);
        });
    }
}

/// Accepts TCP until `stop` drains.
///
/// # Errors
/// The listener cannot be used.
pub async fn run_tcp(pod: Arc<Pod>, listener: BoundListener, stop: DrainWatch) -> io::Result<()> {
    let listener = listener.into_listener()?;
    let stop = stop.draining();
    tokio::pin!(stop);
    loop {
        let (raw, _) = tokio::select! {
            biased;
            accepted = listener.accept() => accepted?,
            _ = &mut stop => return Ok(()),
        };
        if let Ok(tcp) = raw.into_tcp() {
            let pod = Arc::clone(&pod);
            tokio::spawn(async move { serve_tcp(&pod, tcp).await });
        }
    }
}

/// Answers the questions of one connection, until it ends, is silent for too long, or the pod ends.
pub async fn serve_tcp(pod: &Arc<Pod>, tcp: TcpStream) {
    let Ok(_place) = pod.dns.connections.try_acquire() else { return };
    tokio::select! {
        served = questions(pod, tcp) => {
            if let Err(error) = served {
                tracing::debug!(%error, pod = %pod.uid, "DNS over TCP");
            }
        }
        () = pod.drain.expired() => {}
    }
}

async fn questions(pod: &Arc<Pod>, mut tcp: TcpStream) -> io::Result<()> {
    loop {
        let read = async {
            let mut query = vec![0; usize::from(tcp.read_u16().await?)];
            tcp.read_exact(&mut query).await?;
            io::Result::Ok(query)
        };
        let query = match tokio::time::timeout(SILENCE, read).await {
            Ok(Ok(query)) => query,
            Ok(Err(error)) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(()),
            Ok(Err(error)) => return Err(error),
            Err(_silence) => return Ok(()),
        };
        let Some(reply) = reply(pod, query, Transport::Tcp).await else { return Ok(()) };
        let reply = framed(&reply);
        tokio::time::timeout(SILENCE, tcp.write_all(&reply)).await.map_err(|_| io::ErrorKind::TimedOut)??;
    }
}

/// A message after its length, as TCP carries it. Longer than 65535 bytes none can be: `answer` and `forward` see to it.
fn framed(message: &[u8]) -> Vec<u8> {
    let length = u16::try_from(message.len()).unwrap_or(u16::MAX);
    [&length.to_be_bytes(), message].concat()
}

/// The reply to one message; none to what is not a question at all.
async fn reply(pod: &Arc<Pod>, query: Vec<u8>, transport: Transport) -> Option<Vec<u8>> {
    let asked = match answer::read(&query) {
        Ok(asked) => asked,
        Err(refusal) => return refusal,
    };
    let place = pod.netns.as_ref().map(|netns| netns.id());
    let conf = pod.dns.conf(place, &pod.namespace, &pod.shared.settings).await;
    ask_for(pod, &conf, &asked).await;
    let metrics = {
        let snap = pod.shared.mesh.load();
        let client = pod.workload(&snap).ok();
        let metrics = pod.shared.metrics.dns(asked.question.kind(), transport.name(), client.map(|w| &**w));
        metrics.requests.inc();
        if let Some(client) = client
            && let Some(v6) = asked.question.family()
            && let Some(found) = names::find_name(&snap, client, &conf.search, &asked.question.name)
        {
            let addresses = names::addresses_of(&snap, client, found.service, v6, rand::random());
            tracing::debug!(target: "dns", pod = %pod.uid, name = &*asked.question.name, ?addresses, "answered");
            return Some(answer::with_addresses(&asked, found.alias_of, &addresses, transport));
        }
        metrics
    };
    Some(ask_others(pod, &conf, &query, &asked, transport, &metrics).await)
}

/// Where the mesh is told on demand: the services a name may stand for. What does not come in time is asked of name servers.
async fn ask_for(pod: &Pod, conf: &ResolvConf, asked: &Asked) {
    let mesh = &pod.shared.mesh;
    let lacking = mesh.demand().map_or_else(Vec::new, |demand| {
        let snap = mesh.load();
        let Some(client) = pod.workload(&snap).ok().filter(|_| asked.question.family().is_some()) else { return Vec::new() };
        match names::find_name(&snap, client, &conf.search, &asked.question.name) {
            Some(found) => {
                demand.touch(&Wanted::Service(found.service.key.clone()));
                Vec::new()
            }
            None => names::unknown(&snap, client, &conf.search, &asked.question.name),
        }
    });
    let lacking: Vec<Wanted> = lacking.into_iter().map(Wanted::Service).collect();
    futures_util::future::join_all(lacking.iter().map(|wanted| mesh.fetch(wanted, ON_DEMAND))).await;
}

/// What the pod's name servers say, the first of them that says anything.
async fn ask_others(
    pod: &Pod,
    conf: &ResolvConf,
    query: &[u8],
    asked: &Asked,
    transport: Transport,
    metrics: &DnsMetrics,
) -> Vec<u8> {
    metrics.upstream_requests.inc();
    let began = Instant::now();
    let answer = forward::ask(pod, &conf.servers, query, transport).await;
    metrics.upstream_duration.observe_duration(began.elapsed());
    answer.unwrap_or_else(|why| {
        metrics.upstream_failures.inc();
        tracing::debug!(target: "dns", pod = %pod.uid, name = &*asked.question.name, servers = ?conf.servers, why, "no answer");
        answer::failed(asked)
    })
}
