//! One agent hands the pods of its node to the next: the listening sockets themselves, so that no connection attempt ever
//! finds nobody.
//!
//! The new agent connects to the old one's Unix socket (`SOCK_SEQPACKET`), gets one message per pod with the pod's
//! sockets attached, serves them beside the old one, asks again as the old one goes on enrolling meanwhile, and says when it serves them all.
//! Only then does the old one stop accepting, and hang up; its connections live on in it. A new agent that dies before that word changes
//! nothing: the old one puts its listeners where they were.
//!
//! Owns the protocol. Refuses peers of another user. Upstream: `app`. Downstream: `pods`, which answers what is [`Ask`]ed.
use crate::sockets::Sockets;
use crate::unix::{check_peer, listen_at, seqpacket};
use anyhow::{Context, Result, bail, ensure};
use mesh_model::workload::WorkloadUid;
use parking_lot::Mutex;
use rustix::io::Errno;
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags,
    SocketAddrUnix, SocketFlags, accept_with, connect, recv, recvmsg, send, sendmsg,
};
use std::collections::HashMap;
use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use tokio::sync::{mpsc, oneshot};

/// What a new agent says first; the number changes with the protocol.
const HELLO: &[u8] = b"culvert handover 2";
/// Ends the list of pods.
const END: &[u8] = b"end";
/// The new agent wants the list once more.
const AGAIN: &[u8] = b"again";
/// The new agent serves every pod.
const READY: &[u8] = b"ready";
/// Before the id of a pod.
const POD: &[u8] = b"pod ";
/// Longer than any id of a workload.
const LONGEST: usize = 4096;
/// Sockets of one pod: three listeners, and two of the DNS proxy for each address family.
const MOST_SOCKETS: usize = 7;
/// How often it is looked whether the agent before this one is still there.
const LOOK: Duration = Duration::from_millis(250);
/// How long it may take to stop accepting: it may be beginning pods.
const MOST_PATIENCE: Duration = Duration::from_mins(1);
/// How long one answer may take.
const PATIENCE: Duration = Duration::from_secs(5);

/// Listeners received from the agent before this one.
pub type Inherited = HashMap<WorkloadUid, Sockets>;

/// What the agent is asked when it is to be replaced.
#[derive(Debug)]
pub enum Ask {
    /// Copies of the listeners of every pod it serves.
    Listeners(oneshot::Sender<Vec<(WorkloadUid, Sockets)>>),
    /// To stop accepting: the next agent serves them all. Answered when it is done.
    Release(oneshot::Sender<()>),
    /// To go on: who was to take over hung up, and may have put its own listeners in the place of these.
    Stay,
}

/// The agent before this one, still serving, and enrolling pods until it is released.
#[derive(Debug)]
pub struct Predecessor {
    path: PathBuf,
    line: Mutex<Line>,
    was_lost: AtomicBool,
}

#[derive(Debug)]
enum Line {
    Open(OwnedFd),
    /// Asking again failed; it may be there all the same.
    Lost,
    /// Whoever answers at its path from now on is not it.
    Released,
}

impl Predecessor {
    /// Asks the agent behind `path` for its listeners. `None` when nobody is there.
    ///
    /// # Errors
    /// Somebody is there and does not keep to the protocol in time.
    pub fn find(path: &Path) -> Result<Option<(Self, Inherited)>> {
        let found = greet(path)?;
        Ok(found.map(|(socket, pods)| {
            (Self { path: path.to_owned(), line: Mutex::new(Line::Open(socket)), was_lost: AtomicBool::new(false) }, pods)
        }))
    }

    /// Asks again, for the listeners of one pod; `None` if it does not serve it, or is gone or released. Blocks for as long as the
    /// answer takes.
    pub(crate) fn sockets_of(&self, pod: &str) -> Option<Sockets> {
        match self.pods() {
            Ok(pods) => pods?.remove(pod),
            Err(error) => {
                tracing::warn!(pod, error = format!("{error:#}"), "the agent before this one was asked for the pod's listeners");
                None
            }
        }
    }

    /// Asks again for all listeners; `None` if it is gone or released. Blocks for as long as the answer takes.
    ///
    /// # Errors
    /// It does not answer in time.
    pub fn pods(&self) -> Result<Option<Inherited>> {
        let mut line = self.line.lock();
        // What asking it fails with is as good as lost: one of an older version hangs up.
        match std::mem::replace(&mut *line, Line::Lost) {
            Line::Released => {
                *line = Line::Released;
                return Ok(None);
            }
            Line::Open(socket) => {
                if let Ok(pods) = ask_again(&socket) {
                    *line = Line::Open(socket);
                    return Ok(Some(pods));
                }
            }
            Line::Lost => {}
        }
        Ok(self.greet_again()?.map(|(socket, pods)| {
            *line = Line::Open(socket);
            pods
        }))
    }

    fn greet_again(&self) -> Result<Option<(OwnedFd, Inherited)>> {
        self.was_lost.store(true, Ordering::Relaxed);
        greet(&self.path)
    }

    /// Whether it may have taken this agent for gone at some time.
    pub(crate) fn was_lost(&self) -> bool {
        self.was_lost.load(Ordering::Relaxed)
    }

    /// Whether it has ended without a word: nobody is left to tell when to stop. Not while it is being asked something, nor once it was
    /// released. One that only hung up is asked again, which may block for as long as the answer takes.
    fn is_gone(&self) -> bool {
        let Some(mut line) = self.line.try_lock() else { return false };
        match &*line {
            Line::Released => return false,
            Line::Open(socket) if !has_hung_up(socket) => return false,
            Line::Open(_) | Line::Lost => {}
        }
        *line = Line::Lost;
        match self.greet_again() {
            Ok(Some((socket, _))) => *line = Line::Open(socket),
            Ok(None) => return true,
            Err(error) => tracing::debug!(error = format!("{error:#}"), "the agent before this one hung up"),
        }
        false
    }

    /// Resolves when it has ended without being released.
    pub async fn gone(self: &Arc<Self>) {
        let mut tick = tokio::time::interval(LOOK);
        loop {
            tick.tick().await;
            let agent = Arc::clone(self);
            if tokio::task::spawn_blocking(move || agent.is_gone()).await.unwrap_or(false) {
                return;
            }
        }
    }

    /// Tells it to stop accepting, and waits until it has. Blocks while it is being asked, and while it has yet to begin pods.
    ///
    /// # Errors
    /// It is gone, which comes to the same; or it is there and did not answer for long.
    pub fn release(&self) -> Result<()> {
        let mut line = self.line.lock();
        let end = Instant::now() + MOST_PATIENCE;
        loop {
            let told = match std::mem::replace(&mut *line, Line::Released) {
                Line::Open(socket) => tell_ready(&socket, end),
                Line::Lost => match self.greet_again() {
                    Ok(Some((socket, _))) => tell_ready(&socket, end),
                    Ok(None) => bail!("nobody is there any more"),
                    Err(error) => Err(error),
                },
                Line::Released => return Ok(()),
            };
            match told {
                Err(error) if Instant::now() < end => {
                    tracing::debug!(error = format!("{error:#}"), "the agent before this one is told again to stop accepting");
                    *line = Line::Lost;
                    std::thread::sleep(LOOK);
                }
                told => return told,
            }
        }
    }
}

/// Says that every pod is served, and waits until it hangs up, which it does when it has stopped accepting.
fn tell_ready(socket: &OwnedFd, end: Instant) -> Result<()> {
    let left = end.saturating_duration_since(Instant::now()).max(PATIENCE);
    set_socket_timeout(socket, Timeout::Recv, Some(left))?;
    send(socket, READY, SendFlags::NOSIGNAL)?;
    recv(socket, &mut [0], RecvFlags::empty()).context("it was told to stop accepting and does not answer")?;
    Ok(())
}

/// Whether the other end of a socket, which says nothing unless it is asked, is closed.
fn has_hung_up(socket: &OwnedFd) -> bool {
    let heard = recv(socket, &mut [0], RecvFlags::PEEK | RecvFlags::DONTWAIT);
    heard.map_or_else(|error| error != Errno::AGAIN, |(_, length)| length == 0)
}

/// Connects to the agent behind `path` and gets its listeners. `None` when nobody is there.
fn greet(path: &Path) -> Result<Option<(OwnedFd, Inherited)>> {
    let socket = seqpacket()?;
    if connect(&socket, &SocketAddrUnix::new(path)?).is_err() {
        return Ok(None);
    }
    check_peer(&socket)?;
    set_socket_timeout(&socket, Timeout::Recv, Some(PATIENCE))?;
    send(&socket, HELLO, SendFlags::NOSIGNAL)?;
    let inherited = receive_pods(&socket)?;
    Ok(Some((socket, inherited)))
}

/// The list once more, on the same connection.
fn ask_again(socket: &OwnedFd) -> Result<Inherited> {
    send(socket, AGAIN, SendFlags::NOSIGNAL)?;
    receive_pods(socket)
}

fn receive_pods(socket: &OwnedFd) -> Result<Inherited> {
    let mut inherited = Inherited::new();
    while let Some((uid, sockets)) = receive_pod(socket)? {
        inherited.insert(uid, sockets);
    }
    Ok(inherited)
}

/// Answers the next agent, on a thread of its own, until one has taken over. `released` resolves then.
///
/// # Errors
/// The socket cannot be made.
pub fn serve(path: &Path, asks: mpsc::Sender<Ask>, released: oneshot::Sender<()>) -> Result<()> {
    let listener = listen_at(path)?;
    std::thread::Builder::new().name("handover".to_owned()).spawn(move || {
        loop {
            match answer(&listener, &asks) {
                Ok(true) => break,
                Ok(false) => tracing::warn!("the agent that is to take over hung up; this one goes on"),
                Err(error) if asks.is_closed() => {
                    tracing::debug!(%error, "no more handover: the agent is ending");
                    return;
                }
                Err(error) => tracing::warn!(error = format!("{error:#}"), "handover failed, this agent goes on"),
            }
        }
        let _ = released.send(());
    })?;
    Ok(())
}

/// Where an agent of `node` waits for its successor.
pub fn path(run_dir: &Path, node: &str) -> PathBuf {
    run_dir.join(format!("{}.handover", if node.is_empty() { "node" } else { node }))
}

/// One successor, from its greeting to its word; whether it took over.
fn answer(listener: &OwnedFd, asks: &mpsc::Sender<Ask>) -> Result<bool> {
    let peer = accept_with(listener, SocketFlags::CLOEXEC)?;
    check_peer(&peer)?;
    set_socket_timeout(&peer, Timeout::Send, Some(PATIENCE))?;
    let hear = || -> Result<Vec<u8>> {
        let mut word = [0; 64];
        let (_, length) = recv(&peer, &mut word, RecvFlags::empty())?;
        Ok(word.get(..length).unwrap_or_default().to_vec())
    };
    ensure!(hear()? == HELLO, "the other side speaks another protocol");
    let mut told = false;
    let outcome = (|| {
        loop {
            send_pods(&peer, asks)?;
            told = true;
            // As long as it takes: both serve meanwhile.
            let word = hear()?;
            if word == READY {
                let (done, is_done) = oneshot::channel();
                asks.blocking_send(Ask::Release(done)).context("the agent is ending")?;
                is_done.blocking_recv().context("the agent is ending")?;
                return Ok(true);
            }
            if word != AGAIN {
                return Ok(false);
            }
        }
    })();
    if told && !matches!(outcome, Ok(true)) {
        asks.blocking_send(Ask::Stay).context("the agent is ending")?;
    }
    outcome
}

/// The listeners of every pod, one message each.
fn send_pods(peer: &OwnedFd, asks: &mpsc::Sender<Ask>) -> Result<()> {
    let (reply, pods) = oneshot::channel();
    asks.blocking_send(Ask::Listeners(reply)).context("the agent is ending")?;
    for (uid, sockets) in pods.blocking_recv().context("the agent is ending")? {
        let fds = sockets.each();
        let body = [POD, uid.as_bytes()].concat();
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MOST_SOCKETS))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        ensure!(control.push(SendAncillaryMessage::ScmRights(&fds)), "no room for all descriptors");
        sendmsg(peer, &[IoSlice::new(&body)], &mut control, SendFlags::NOSIGNAL)?;
    }
    send(peer, END, SendFlags::NOSIGNAL)?;
    Ok(())
}

/// The next pod of the list; `None` at its end.
fn receive_pod(socket: &OwnedFd) -> Result<Option<(WorkloadUid, Sockets)>> {
    let mut body = [0; LONGEST];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MOST_SOCKETS))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let message = recvmsg(socket, &mut [IoSliceMut::new(&mut body)], &mut control, RecvFlags::CMSG_CLOEXEC)
        .context("the agent before this one does not answer")?;
    let mut fds = Vec::new();
    for part in control.drain() {
        if let RecvAncillaryMessage::ScmRights(received) = part {
            fds.extend(received);
        }
    }
    ensure!(
        !message.flags.intersects(ReturnFlags::TRUNC | ReturnFlags::CTRUNC),
        "a message of the agent before this one is too long"
    );
    let body = body.get(..message.bytes).unwrap_or_default();
    if body == END {
        return Ok(None);
    }
    let Some(uid) = body.strip_prefix(POD) else { bail!("the agent before this one speaks another protocol") };
    let uid = std::str::from_utf8(uid).context("a pod's id is not text")?;
    Ok(Some((uid.into(), Sockets::from_each(fds).context("not the sockets of a pod")?)))
}
