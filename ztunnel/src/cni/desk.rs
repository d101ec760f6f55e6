//! Where the agent answers its CNI plugin: one thread accepts, one more for each pod that is starting.
//!
//! Owns the wait until the Kubernetes API has told of the pod (its object is often a little later than the call of the runtime)
//! and the question whether it is enrolled. Who is captured, and how, is the supervisor's. Upstream: [`super::plugin`].
//! Downstream: `pods`, by [`Arrival`].
use super::{Answer, Request};
use crate::enrolment::{Arrival, is_served};
use crate::unix::{check_peer, listen_at};
use anyhow::{Context, Result, ensure};
use mesh_runtime::sockets::NetnsFd;
use mesh_sources::kubernetes::{Lookup, NodePod, NodePods};
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendFlags, SocketFlags, accept_with, recvmsg, send,
};
use std::io::IoSliceMut;
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use tokio::runtime::Handle;
use tokio::sync::{mpsc, oneshot, watch};

/// How long the API server may take to tell of a pod whose containers are about to start.
const KNOWN_WITHIN: Duration = Duration::from_secs(10);
/// How long a plugin may take to ask.
const PATIENCE: Duration = Duration::from_secs(5);
/// Longest question.
const LONGEST: usize = 4096;

/// Who answers.
#[derive(Clone, Debug)]
pub struct Desk {
    /// The pods of this node.
    pub pods: watch::Receiver<Option<NodePods>>,
    /// Where it is asked about one that is not enrolled, as far as was told.
    pub lookup: Lookup,
    /// The supervisor.
    pub arrivals: mpsc::Sender<Arrival>,
    /// Where there is a clock.
    pub runtime: Handle,
}

impl Desk {
    /// Answers at `path` for as long as the process lives.
    ///
    /// # Errors
    /// The socket cannot be made.
    pub fn open(self, path: &Path) -> Result<()> {
        let listener = listen_at(path)?;
        std::thread::Builder::new().name("cni".to_owned()).spawn(move || self.serve(&listener))?;
        Ok(())
    }

    fn serve(&self, listener: &OwnedFd) {
        loop {
            let attended = accept_with(listener, SocketFlags::CLOEXEC).map_err(anyhow::Error::from).and_then(|peer| {
                let desk = self.clone();
                // It may wait for the API server, which is no reason for others to wait.
                std::thread::Builder::new().name("cni-pod".to_owned()).spawn(move || {
                    if let Err(error) = desk.attend(&peer) {
                        tracing::warn!(error = format!("{error:#}"), "a question of the CNI plugin is not answered");
                    }
                })?;
                Ok(())
            });
            if let Err(error) = attended {
                tracing::warn!(%error, "the CNI plugin cannot be heard");
                // Out of descriptors or threads: that does not pass at once.
                std::thread::sleep(Duration::from_millis(100));
            }
        }
    }

    fn attend(&self, peer: &OwnedFd) -> Result<()> {
        check_peer(peer)?;
        set_socket_timeout(peer, Timeout::Recv, Some(PATIENCE))?;
        set_socket_timeout(peer, Timeout::Send, Some(PATIENCE))?;
        let (request, netns) = hear(peer)?;
        let answer = self.answer(&request, netns);
        if let Answer::Refused { why, .. } = &answer {
            tracing::warn!(pod = %format!("{}/{}", request.namespace, request.name), why, "the pod is not let start");
        }
        send(peer, &serde_json::to_vec(&answer)?, SendFlags::NOSIGNAL)?;
        Ok(())
    }

    fn answer(&self, request: &Request, netns: NetnsFd) -> Answer {
        let refused = |why: String, later| Answer::Refused { why, later };
        let within =
            |what: &str| refused(format!("the API server has not told {what} within {} s", KNOWN_WITHIN.as_secs()), true);
        let Some(mut pod) = self.known(request, |_| true) else { return within("of it") };
        if !is_served(&pod.workload) {
            // The label of its namespace may be younger than what the watch has told.
            match self.now(request) {
                Ok(Some(true)) => {}
                Ok(Some(false)) => return Answer::NotEnrolled,
                Ok(None) => return refused("it is not of this node any more".into(), true),
                Err(why) => return refused(format!("whether it is enrolled: {why}"), true),
            }
            let Some(enrolled) = self.known(request, |pod| is_served(&pod.workload)) else {
                return within("that it is enrolled");
            };
            pod = enrolled;
        }
        let (done, outcome) = oneshot::channel();
        let arrival = Arrival { uid: Arc::clone(&pod.uid), netns, check: request.check, done };
        let gone = || refused("this agent is being replaced".into(), true);
        if self.arrivals.blocking_send(arrival).is_err() {
            return gone();
        }
        match outcome.blocking_recv() {
            Ok(Ok(())) => Answer::Captured,
            Ok(Err(why)) => refused(why, false),
            Err(_) => gone(),
        }
    }
}

impl Desk {
    /// The pod, once it is told of and is as `wanted`; `None` where that takes too long.
    fn known(&self, request: &Request, wanted: impl Fn(&NodePod) -> bool) -> Option<NodePod> {
        let mut pods = self.pods.clone();
        let found = async {
            let pods = pods.wait_for(|pods| find(pods.as_ref(), request).is_some_and(&wanted)).await.ok()?;
            find(pods.as_ref(), request).cloned()
        };
        self.runtime.block_on(async { tokio::time::timeout(KNOWN_WITHIN, found).await }).ok()?
    }

    /// Whether the pod is enrolled, by the API server's own word; `None` where it has no such pod.
    fn now(&self, request: &Request) -> Result<Option<bool>, String> {
        let asked = self.lookup.pod(&request.namespace, &request.name);
        let answer = self.runtime.block_on(async { tokio::time::timeout(KNOWN_WITHIN, asked).await });
        let pod = answer.map_err(|_| "the API server does not answer".to_owned())??;
        Ok(pod.filter(|pod| is_meant(pod, request)).map(|pod| is_served(&pod.workload)))
    }
}

/// The pod that is meant, as the API server tells of it. Of one that was made again under its name the object before does not count.
fn find<'p>(pods: Option<&'p NodePods>, request: &Request) -> Option<&'p NodePod> {
    pods.into_iter().flat_map(|pods| pods.iter()).find(|pod| is_meant(pod, request))
}

fn is_meant(pod: &NodePod, request: &Request) -> bool {
    *pod.workload.namespace == *request.namespace
        && *pod.workload.name == *request.name
        && request.uid.as_ref().is_none_or(|uid| *pod.cgroup == **uid)
}

fn hear(peer: &OwnedFd) -> Result<(Request, NetnsFd)> {
    let mut body = [0; LONGEST];
    // One more than there may be, so that too many are seen as that.
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let message = recvmsg(peer, &mut [IoSliceMut::new(&mut body)], &mut control, RecvFlags::CMSG_CLOEXEC)?;
    let mut fds = Vec::new();
    for part in control.drain() {
        if let RecvAncillaryMessage::ScmRights(received) = part {
            fds.extend(received);
        }
    }
    ensure!(!message.flags.intersects(ReturnFlags::TRUNC | ReturnFlags::CTRUNC), "it is too long");
    let request = serde_json::from_slice(body.get(..message.bytes).unwrap_or_default()).context("it cannot be read")?;
    let [fd] = <[OwnedFd; 1]>::try_from(fds).ok().context("it has not one network namespace with it")?;
    Ok((request, NetnsFd::from_fd(fd).context("network namespace")?))
}
