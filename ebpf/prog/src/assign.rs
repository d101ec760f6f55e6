//! Gives a segment to one of the agent's listeners, or leaves it to a socket that already has its tuple.
//!
//! `bpf_sk_assign` on a SYN skips the kernel's own lookup. That is right for a new tuple and wrong for one that still has a
//! socket: the second socket is refused without an answer and the client waits in vain (TIME_WAIT on our side and a client that
//! reuses its port; a retransmitted SYN; a rebooted client). Such a SYN is therefore left to the kernel, which knows what to
//! do, and is remembered in `STEER` so that, should the kernel come to look for a listener after all, `steer_lookup` names ours.
use aya_ebpf::{
    bindings::BPF_F_CURRENT_NETNS,
    helpers::{bpf_ktime_get_ns, bpf_sk_assign, bpf_sk_release, bpf_skc_lookup_tcp},
    programs::TcContext,
};
use ebpf_common::{Counter, Slot, Steer, SteerKey};

use crate::{
    maps::{Listener, STEER, count},
    parse::Tuple,
};

/// Longer than any packet takes from tc to the socket lookup, much shorter than any port is reused after.
const STEER_NS: u64 = 100_000_000;

const TCP_LISTEN: u32 = 10;

/// Which socket the kernel would find for a segment.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Owner {
    /// One with exactly this tuple, in whatever state.
    Connection,
    /// Only a listener, whose it may ever be.
    Listener,
    /// None at all.
    Nobody,
}

/// Looks the segment's own tuple up among this namespace's sockets.
#[inline(always)]
pub fn owner(ctx: &TcContext, tuple: &Tuple) -> Owner {
    let mut copy = tuple.words;
    // SAFETY: the tuple is on the stack and `len` is one of the two sizes the helper takes.
    let sk = unsafe {
        bpf_skc_lookup_tcp(ctx.skb.skb.cast(), (&raw mut copy).cast(), tuple.len(), BPF_F_CURRENT_NETNS as i64 as u64, 0)
    };
    if sk.is_null() {
        return Owner::Nobody;
    }
    // SAFETY: not null, and referenced until the release below.
    let state = unsafe { (*sk).state };
    // SAFETY: as above.
    unsafe { bpf_sk_release(sk.cast()) };
    // An application's wildcard listener matches any address: finding one says nothing about who owns the connection.
    if state == TCP_LISTEN { Owner::Listener } else { Owner::Connection }
}

/// Whether the packet may go on after [`open`] or [`stray`].
pub enum Outcome {
    Given,
    Absent,
    Failed,
}

/// Gives a connection attempt to the listener in `slot`.
#[inline(always)]
pub fn open(ctx: &TcContext, tuple: &Tuple, slot: Slot) -> Outcome {
    let Some(listener) = Listener::find(slot) else { return Outcome::Absent };
    if owner(ctx, tuple) == Owner::Connection {
        listener.release();
        count(ctx, Counter::TupleInUse);
        let key = SteerKey { tuple: tuple.words, version: if tuple.v6 { 6 } else { 4 } };
        // SAFETY: takes no arguments.
        let until = unsafe { bpf_ktime_get_ns() } + STEER_NS;
        return match STEER.insert(&key, &Steer { until, slot: slot as u32, reserved: 0 }, 0) {
            Ok(()) => Outcome::Given,
            Err(_) => Outcome::Failed,
        };
    }
    give(ctx, listener)
}

/// Gives a segment that belongs to no connection to the listener in `slot`.
#[inline(always)]
pub fn stray(ctx: &TcContext, slot: Slot) -> Outcome {
    match Listener::find(slot) {
        Some(listener) => give(ctx, listener),
        None => Outcome::Absent,
    }
}

#[inline(always)]
fn give(ctx: &TcContext, listener: Listener) -> Outcome {
    // SAFETY: the socket is referenced and the context is the kernel's.
    let refused = unsafe { bpf_sk_assign(ctx.skb.skb.cast(), listener.as_ptr(), 0) };
    listener.release();
    if refused == 0 { Outcome::Given } else { Outcome::Failed }
}
