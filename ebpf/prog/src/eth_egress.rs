//! tc egress of the pod's interfaces: what the pod sends.
//!
//! A connection attempt is turned around, to where [`crate::captured`] gives it to the agent; so are the later segments of a
//! connection the agent owns, both the application's side of a captured dial and its answers to the agent's delivery with the
//! client's address. Everything else that is TCP is older than the enrolment. The way back is the interface's own: a hook of `lo`
//! would do as well, but to attach to one more has the kernel wait for all its readers once more.
use aya_ebpf::{
    bindings::{BPF_F_INGRESS, TC_ACT_SHOT, TC_ACT_UNSPEC},
    helpers::bpf_redirect,
    macros::classifier,
    programs::TcContext,
};
use ebpf_common::{Counter, MARK_AGENT, MARK_LOCAL, MARK_MASK, Slot};

use crate::{
    assign::{Owner, owner},
    maps::{Listener, config, count},
    parse::{BARE, ETHERNET, Packet, classify},
    udp,
};

#[classifier]
pub fn eth_egress(ctx: TcContext) -> i32 {
    egress::<ETHERNET>(&ctx)
}

/// The same on an interface whose packets have no header but IP's.
#[classifier]
pub fn ip_egress(ctx: TcContext) -> i32 {
    egress::<BARE>(&ctx)
}

#[inline(always)]
fn egress<const AT: usize>(ctx: &TcContext) -> i32 {
    // SAFETY: the kernel hands every classifier a valid `__sk_buff`.
    let mark = unsafe { (*ctx.skb.skb).mark } & MARK_MASK;
    if mark == MARK_AGENT {
        count(ctx, Counter::AgentEgress);
        return TC_ACT_UNSPEC;
    }
    let config = config();
    let segment = match classify::<AT>(ctx, &config) {
        Packet::Tcp(segment) => segment,
        Packet::Udp(tuple) => return udp::leaving(ctx, &config, &tuple),
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
    if segment.opens() && mark == MARK_LOCAL {
        // To deliver to an address that the pod does not have would begin anew with its capture.
        count(ctx, Counter::LoopbackOnWire);
        return TC_ACT_SHOT;
    }
    if segment.opens() {
        // Looked for here too: once turned around the packet could no longer leave (`fail_open`).
        let Some(listener) = Listener::find(Slot::Out) else {
            return if config.fail_open() {
                count(ctx, Counter::OutboundFailOpen);
                TC_ACT_UNSPEC
            } else {
                count(ctx, Counter::OutboundNoListener);
                TC_ACT_SHOT
            };
        };
        listener.release();
        count(ctx, Counter::OutboundCaptured);
    } else if owner(ctx, &segment.tuple) == Owner::Connection {
        count(ctx, Counter::OutboundOwned);
    } else if config.reset_existing() {
        count(ctx, Counter::OutboundExistingReset);
    } else {
        count(ctx, Counter::OutboundExisting);
        return TC_ACT_UNSPEC;
    }
    ctx.set_mark(config.capture_mark());
    // SAFETY: the kernel hands every classifier a valid `__sk_buff`; the rest are plain numbers.
    unsafe { bpf_redirect((*ctx.skb.skb).ifindex, u64::from(BPF_F_INGRESS)) as i32 }
}
