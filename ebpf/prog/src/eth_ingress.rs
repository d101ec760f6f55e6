//! tc ingress of the pod's interfaces: what others send to the pod, and what [`crate::eth_egress`] turned around.
//!
//! A connection attempt goes to the agent's inbound listener, keeping both addresses, or to that of HBONE, which need not have the
//! port: what listens there may be a program of the pod. What policy denies for its source alone is dropped before that. Segments of
//! known connections pass to their sockets.
use aya_ebpf::{
    bindings::{TC_ACT_SHOT, TC_ACT_UNSPEC},
    macros::classifier,
    programs::TcContext,
};
use ebpf_common::{Counter, MARK_AGENT, MARK_CAPTURE, MARK_LOCAL, MARK_MASK, Slot};

use crate::{
    assign::{Outcome, Owner, open, owner, stray},
    captured,
    maps::{config, count, is_denied},
    parse::{BARE, ETHERNET, Packet, classify},
    udp,
};

#[classifier]
pub fn eth_ingress(ctx: TcContext) -> i32 {
    ingress::<ETHERNET>(&ctx)
}

/// The same on an interface whose packets have no header but IP's.
#[classifier]
pub fn ip_ingress(ctx: TcContext) -> i32 {
    ingress::<BARE>(&ctx)
}

#[inline(always)]
fn ingress<const AT: usize>(ctx: &TcContext) -> i32 {
    // SAFETY: the kernel hands every classifier a valid `__sk_buff`.
    let mark = unsafe { (*ctx.skb.skb).mark };
    let config = config();
    let turned_around = mark == config.capture_mark();
    // A mark from outside the pod (a node that redirects straight into it) must not pass for ours.
    if !turned_around && matches!(mark & MARK_MASK, MARK_AGENT | MARK_CAPTURE | MARK_LOCAL) {
        ctx.set_mark(0);
    }
    let segment = match classify::<AT>(ctx, &config) {
        Packet::Tcp(segment) => segment,
        Packet::Udp(tuple) => return udp::arriving(ctx, &config, &tuple),
        Packet::OddUdp => return udp::odd(ctx, &config),
        Packet::Pass(what) => {
            count(ctx, what);
            return TC_ACT_UNSPEC;
        }
        Packet::Drop(why) => {
            count(ctx, why);
            return TC_ACT_SHOT;
        }
    };
    if turned_around {
        return captured::deliver(ctx, &config, &segment);
    }
    let hbone = segment.tuple.dport() == config.hbone_port();
    let (slot, known) =
        if hbone { (Slot::Hbone, Counter::InboundTunnel) } else { (Slot::In, Counter::InboundKnown) };
    let outcome = if segment.opens() {
        // Whoever it is and whatever it wants: the address alone decides, for tunnels too, whose source is their own.
        if is_denied(&segment.tuple) {
            count(ctx, Counter::DeniedSource);
            return TC_ACT_SHOT;
        }
        let outcome = open(ctx, &segment.tuple, slot);
        if matches!(outcome, Outcome::Given) {
            count(ctx, if hbone { Counter::InboundHbone } else { Counter::InboundAssigned });
        }
        outcome
    } else {
        let whose = if segment.acknowledges() { owner(ctx, &segment.tuple) } else { Owner::Connection };
        if whose == Owner::Connection {
            count(ctx, known);
            return TC_ACT_UNSPEC;
        }
        // Under a SYN flood our listener answers with cookies and keeps no socket; the client's acknowledgement must come
        // back to the same listener, not to the application's, which would take it as its own.
        match stray(ctx, slot) {
            // The tunnels of an agent that is gone end at once: nobody has them, so the kernel resets them.
            Outcome::Absent if hbone && whose == Owner::Nobody => {
                count(ctx, known);
                return TC_ACT_UNSPEC;
            }
            Outcome::Given => {
                count(ctx, Counter::InboundStray);
                Outcome::Given
            }
            other => other,
        }
    };
    match outcome {
        Outcome::Given => TC_ACT_UNSPEC,
        Outcome::Absent if config.fail_open() => {
            count(ctx, Counter::InboundFailOpen);
            TC_ACT_UNSPEC
        }
        Outcome::Absent => {
            count(ctx, Counter::InboundNoListener);
            TC_ACT_SHOT
        }
        Outcome::Failed => {
            count(ctx, Counter::AssignFailed);
            TC_ACT_SHOT
        }
    }
}
