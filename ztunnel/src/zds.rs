//! Enrolment by Istio's CNI agent ("ZDS"): it listens on a Unix socket and tells which pods of this node are in the mesh, each
//! with its network namespace as a descriptor.
//!
//! One message is one packet; every request is answered before the next one comes; after the list of pods comes a word that
//! it was all, and pods that were not named are ended then. A CNI agent that restarts finds its pods served: they are kept
//! until the next list is complete. What breaks the protocol is answered with what is wrong, and then the connection is made
//! anew; the pods stay served (istio/ztunnel ends its process instead).
//!
//! Owns the connection, on a thread of its own. Decides nothing about pods. Upstream: the CNI agent. Downstream: `pods`, which
//! carries out each [`Order`].
mod packet;

use mesh_proto::istio::workload::zds::workload_request::Payload;
use mesh_proto::istio::workload::zds::{AddWorkload, Version, WorkloadRequest, ZdsHello};
use mesh_runtime::readiness::{Readiness, ReadyTask};
use mesh_runtime::sockets::NetnsFd;
use packet::Packets;
use std::collections::HashSet;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{mpsc, oneshot};

/// First wait before the connection is tried again; doubled each time.
const FIRST_PAUSE: Duration = Duration::from_millis(20);
/// Longest wait (node-agent §1.2).
const LONGEST_PAUSE: Duration = Duration::from_secs(15);
/// What readiness waits for.
const PENDING: &str = "pods of the CNI agent";

/// What the CNI agent says of a pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Named {
    /// Name.
    pub name: String,
    /// Kubernetes namespace.
    pub namespace: String,
    /// Service account.
    pub service_account: String,
}

/// What the CNI agent wants, to be answered with how it went. An error is told to it, and is its to log; who is asked tries
/// again by himself.
#[derive(Debug)]
pub enum Order {
    /// Serve this pod.
    Add {
        /// The Pod's uid.
        uid: Arc<str>,
        /// Who it is.
        pod: Named,
        /// Where it is.
        netns: NetnsFd,
        /// How it went.
        done: Answer,
    },
    /// End this pod, if it is served.
    Remove {
        /// The Pod's uid.
        uid: Arc<str>,
        /// How it went.
        done: Answer,
    },
    /// All pods have been named: end every other one.
    Only {
        /// Uids.
        named: HashSet<Arc<str>>,
        /// How it went.
        done: Answer,
    },
}

/// How an order went.
pub type Answer = oneshot::Sender<Result<(), String>>;

/// Why a request was not carried out.
#[derive(Debug, PartialEq, Eq)]
enum Fault {
    /// The pod's own affair: the connection goes on.
    Pod(String),
    /// What came is not the protocol.
    Protocol(String),
}

/// Follows the CNI agent behind `path` until the receiver is dropped. Readiness waits while there is no connection with a
/// complete list of pods.
///
/// # Errors
/// No thread can be started.
pub fn follow(path: &Path, readiness: &Readiness) -> io::Result<mpsc::Receiver<Order>> {
    let (orders, receiver) = mpsc::channel(1);
    let client = Client { path: path.to_owned(), orders, readiness: readiness.clone() };
    let waiting = readiness.pending(PENDING);
    std::thread::Builder::new().name("zds".to_owned()).spawn(move || client.run(waiting))?;
    Ok(receiver)
}

struct Client {
    path: PathBuf,
    orders: mpsc::Sender<Order>,
    readiness: Readiness,
}

impl Client {
    fn run(&self, mut waiting: ReadyTask) {
        let mut pause = FIRST_PAUSE;
        while !self.orders.is_closed() {
            let mut session = Session { orders: &self.orders, named: HashSet::new(), complete: false };
            let error = match self.connect().and_then(|packets| session.serve(&packets, &waiting)) {
                Ok(()) => return,
                Err(error) => error,
            };
            if session.complete {
                waiting = self.readiness.pending(PENDING);
                pause = FIRST_PAUSE;
            }
            tracing::warn!(%error, path = %self.path.display(), again_in = ?pause, "no word from the CNI agent; its pods stay served");
            std::thread::sleep(pause);
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
    }

    fn connect(&self) -> io::Result<Packets> {
        let packets = Packets::connect(&self.path)?;
        packets.send(&ZdsHello { version: Version::V1.into() })?;
        tracing::info!(path = %self.path.display(), "connected to the CNI agent");
        Ok(packets)
    }
}

/// One connection.
struct Session<'a> {
    orders: &'a mpsc::Sender<Order>,
    /// Pods named so far.
    named: HashSet<Arc<str>>,
    /// Whether that was all.
    complete: bool,
}

impl Session<'_> {
    /// Answers requests until nobody carries them out any more (`Ok`) or the connection ends.
    fn serve(&mut self, packets: &Packets, waiting: &ReadyTask) -> io::Result<()> {
        loop {
            let outcome = match packets.receive::<WorkloadRequest>()? {
                packet::Heard::Nothing if self.orders.is_closed() => return Ok(()),
                packet::Heard::Nothing => continue,
                packet::Heard::Closed => return Err(io::ErrorKind::UnexpectedEof.into()),
                packet::Heard::Garbage(why) => Err(Fault::Protocol(why)),
                packet::Heard::Message(request, fds) => self.carry_out(request, fds),
            };
            match outcome {
                Ok(()) => packets.acknowledge("")?,
                Err(Fault::Pod(why)) => packets.acknowledge(&why)?,
                Err(Fault::Protocol(why)) => {
                    packets.acknowledge(&why)?;
                    return Err(io::Error::new(io::ErrorKind::InvalidData, why));
                }
            }
            if self.complete {
                waiting.ready();
            }
        }
    }

    fn carry_out(&mut self, request: WorkloadRequest, fds: Vec<OwnedFd>) -> Result<(), Fault> {
        let payload = request.payload.ok_or_else(|| Fault::Protocol("a request of a kind that is not known".into()))?;
        if !fds.is_empty() && !matches!(payload, Payload::Add(_)) {
            return Err(Fault::Protocol("a descriptor with a request that takes none".into()));
        }
        match payload {
            Payload::Add(add) => self.add(add, fds),
            Payload::Keep(_) | Payload::SnapshotSent(_) if self.complete => {
                Err(Fault::Protocol("the list of pods was already complete".into()))
            }
            Payload::Keep(keep) => {
                self.named.insert(keep.uid.into());
                Ok(())
            }
            Payload::Del(del) => {
                let uid = Arc::<str>::from(del.uid);
                self.named.remove(&uid);
                self.order(|done| Order::Remove { uid, done })
            }
            Payload::SnapshotSent(_) => {
                let named = std::mem::take(&mut self.named);
                self.order(|done| Order::Only { named, done })?;
                self.complete = true;
                Ok(())
            }
        }
    }

    fn add(&mut self, add: AddWorkload, fds: Vec<OwnedFd>) -> Result<(), Fault> {
        let Ok([fd]) = <[OwnedFd; 1]>::try_from(fds) else {
            return Err(Fault::Protocol(format!("pod {:?} without its one network namespace", add.uid)));
        };
        let Some(info) = add.workload_info else { return Err(Fault::Protocol(format!("pod {:?} without names", add.uid))) };
        let uid = Arc::<str>::from(add.uid);
        let netns = NetnsFd::from_fd(fd).map_err(|e| Fault::Pod(format!("network namespace: {e}")))?;
        let pod = Named { name: info.name, namespace: info.namespace, service_account: info.service_account };
        // Named even if it cannot be served now: it is tried again, and must not be taken for gone.
        self.named.insert(Arc::clone(&uid));
        self.order(|done| Order::Add { uid, pod, netns, done })
    }

    fn order(&self, order: impl FnOnce(Answer) -> Order) -> Result<(), Fault> {
        let (done, outcome) = oneshot::channel();
        let ending = || Fault::Pod("the agent is ending".into());
        self.orders.blocking_send(order(done)).map_err(|_| ending())?;
        outcome.blocking_recv().map_err(|_| ending())?.map_err(Fault::Pod)
    }
}
