//! As little of a node agent as the redirection needs: accept, note the addresses, dial, relay.
use std::{
    io,
    net::{Shutdown, SocketAddr, TcpListener, TcpStream},
    os::fd::{AsFd, AsRawFd},
    sync::mpsc::{Receiver, Sender, channel},
    thread,
    time::Duration,
};

use ebpf_loader::{Config, Listeners, Owner, PinRoot, PodSpec, Redirect, RedirectError};

use crate::{net::Netns, sock};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    Out,
    In,
    Hbone,
}

/// A connection the agent was given.
#[derive(Debug)]
pub struct Captured {
    pub direction: Direction,
    pub peer: SocketAddr,
    pub local: SocketAddr,
    /// Why its dial failed, if it did.
    pub refused: Option<io::ErrorKind>,
}

/// Whose the pods of these tests are.
pub const OWNER: Owner<'static> = Owner { kind: "test", name: "pod" };

pub struct Agent {
    pub redirect: Option<Redirect>,
    pub captured: Receiver<Captured>,
    listeners: Vec<TcpListener>,
}

impl Agent {
    pub fn start(pod: &Netns) -> Self {
        Self::start_with(pod, Config::default()).expect("attach")
    }

    pub fn start_with(pod: &Netns, config: Config) -> Result<Self, RedirectError> {
        Self::start_whole(pod, config, None)
    }

    /// One whose redirection outlives it, in its lasting places.
    pub fn start_pinned(pod: &Netns, pins: &PinRoot) -> Self {
        let agent = Self::start_early(pod, pins);
        agent.settle();
        agent
    }

    /// The same, which does not have them yet.
    pub fn start_early(pod: &Netns, pins: &PinRoot) -> Self {
        Self::start_whole(pod, Config::default(), Some(pins)).expect("attach")
    }

    /// Takes them.
    pub fn settle(&self) {
        let unsettled = self.redirect.as_ref().expect("attached").unsettled();
        while unsettled.settle().expect("settle") {}
        assert!(!unsettled.is_unsettled());
    }

    fn start_whole(pod: &Netns, config: Config, pins: Option<&PinRoot>) -> Result<Self, RedirectError> {
        let (out, inbound) = pod.run(|| (sock::listen(sock::TO_APPLICATION, 15001), sock::listen(sock::GOOD, 15006)));
        let (out, inbound) = (out.expect("listen"), inbound.expect("listen"));
        // Another port: the programs of the pod may have HBONE's.
        let hbone = pod.run(|| sock::listen(sock::ListenerKind { transparent: false, ..sock::GOOD }, 0)).expect("listen");
        let (sender, captured) = channel();
        for (listener, direction) in [(&out, Direction::Out), (&inbound, Direction::In), (&hbone, Direction::Hbone)] {
            serve(pod, listener.try_clone().expect("descriptor"), direction, sender.clone());
        }
        let spec = PodSpec { netns: pod.fd(), interfaces: None, config, pins, owner: OWNER };
        let redirect =
            Redirect::attach(&spec, &Listeners { outbound: out.as_fd(), inbound: inbound.as_fd(), hbone: hbone.as_fd() })?;
        Ok(Self { redirect: Some(redirect), captured, listeners: vec![out, inbound, hbone] })
    }

    pub fn redirect(&mut self) -> &mut Redirect {
        self.redirect.as_mut().expect("attached")
    }

    pub fn listeners(&self) -> Listeners<'_> {
        let [outbound, inbound, hbone] = [0, 1, 2].map(|n| self.listeners[n].as_fd());
        Listeners { outbound, inbound, hbone }
    }

    /// The next captured connection.
    pub fn next(&self) -> Captured {
        self.captured.recv_timeout(Duration::from_secs(5)).expect("a captured connection")
    }

    pub fn nothing_captured(&self) -> bool {
        self.captured.try_recv().is_err()
    }

    /// Every counter that is not zero.
    pub fn all_counts(&self) -> Vec<(&'static str, u64)> {
        let counters = self.redirect.as_ref().expect("attached").traffic().read().expect("counters");
        counters.into_iter().map(|(name, seen)| (name, seen.packets)).filter(|(_, packets)| *packets > 0).collect()
    }

    pub fn count(&self, name: &str) -> u64 {
        let counters = self.redirect.as_ref().expect("attached").traffic().read().expect("counters");
        counters.into_iter().find(|(n, _)| *n == name).unwrap_or_else(|| panic!("no counter {name}")).1.packets
    }

    /// Closes the listeners, leaving the programs attached, as when an agent is stuck without them.
    pub fn stop_listening(&mut self) {
        for listener in self.listeners.drain(..) {
            // SAFETY: plain numbers. Ends the accepting thread, which drops the last descriptor.
            unsafe { libc::shutdown(listener.as_raw_fd(), libc::SHUT_RDWR) };
        }
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        self.stop_listening();
    }
}

fn serve(pod: &Netns, listener: TcpListener, direction: Direction, captured: Sender<Captured>) {
    let file = pod.file();
    pod.spawn(move || {
        while let Ok((stream, _)) = listener.accept() {
            let (file, captured) = (file.try_clone().expect("descriptor"), captured.clone());
            thread::spawn(move || {
                nix::sched::setns(file.as_fd(), nix::sched::CloneFlags::CLONE_NEWNET).expect("setns");
                drop(file);
                let Ok(peer) = stream.peer_addr() else { return };
                let (peer, local) = (sock::plain(peer), sock::plain(stream.local_addr().expect("local address")));
                let dialled = match direction {
                    Direction::Out => sock::dial_marked(local),
                    Direction::In | Direction::Hbone => sock::dial_as(peer.ip(), local),
                };
                let refused = dialled.as_ref().err().map(io::Error::kind);
                let _ = captured.send(Captured { direction, peer, local, refused });
                match dialled {
                    Ok(upstream) => relay(stream, upstream),
                    // A reset is what the client would have got.
                    Err(_) => drop(sock::set(&stream, libc::SOL_SOCKET, libc::SO_LINGER, &[1, 0, 0, 0, 0, 0, 0, 0])),
                }
            });
        }
    });
}

/// Both ways, until both are done; a half-closed side stays half-closed.
fn relay(mut a: TcpStream, mut b: TcpStream) {
    let (mut a2, mut b2) = (a.try_clone().expect("descriptor"), b.try_clone().expect("descriptor"));
    let forth = thread::spawn(move || {
        let _ = io::copy(&mut a2, &mut b2);
        let _ = b2.shutdown(Shutdown::Write);
    });
    let _ = io::copy(&mut b, &mut a);
    let _ = a.shutdown(Shutdown::Write);
    let _ = forth.join();
}
