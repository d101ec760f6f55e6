//! tc egress of the pod's interfaces: what the pod sends.
//!
//! A connection attempt goes to `lo`, where [`crate::lo_ingress`] gives it to the agent; so do the later segments of a
//! connection the agent owns, both the application's side of a captured dial and its answers to the agent's delivery with the
//! client's address. Everything else that is TCP is older than the enrolment.
use aya_ebpf::{
    bindings::{BPF_F_INGRESS, TC_ACT_SHOT, TC_ACT_UNSPEC},
    helpers::bpf_redirect,
    macros::classifier,
    programs::TcContext,
};
use ebpf_common::{Counter, MARK_AGENT, MARK_CAPTURE, MARK_MASK, Slot};

use crate::{
    assign::{Owner, owner},
    maps::{Listener, config, count},
    parse::{Packet, classify},
    udp,
};

/// The loopback interface has this index in every network namespace.
const LO_IFINDEX: u32 = 1;

#[classifier]
pub fn eth_egress(ctx: TcContext) -> i32 {
    // SAFETY: the kernel hands every classifier a valid `__sk_buff`.
    if unsafe { (*ctx.skb.skb).mark } & MARK_MASK == MARK_AGENT {
        count(&ctx, Counter::AgentEgress);
        return TC_ACT_UNSPEC;
    }
    let config = config();
    let segment = match classify(&ctx, &config) {
        Packet::Tcp(segment) => segment,
        Packet::Udp(tuple) => return udp::leaving(&ctx, &config, &tuple),
        Packet::OddUdp => return udp::odd(&ctx, &config),
        Packet::Pass(what) => {
            count(&ctx, what);
            return TC_ACT_UNSPEC;
        }
        Packet::Drop(why) => {
            count(&ctx, why);
            return TC_ACT_SHOT;
        }
    };
    if segment.opens() {
        // Looked for here, not only on `lo`: from there the packet could no longer leave (`fail_open`).
        let Some(listener) = Listener::find(Slot::Out) else {
            return if config.fail_open() {
                count(&ctx, Counter::OutboundFailOpen);
                TC_ACT_UNSPEC
            } else {
                count(&ctx, Counter::OutboundNoListener);
                TC_ACT_SHOT
            };
        };
        listener.release();
        count(&ctx, Counter::OutboundCaptured);
    } else if owner(&ctx, &segment.tuple) == Owner::Connection {
        count(&ctx, Counter::OutboundOwned);
    } else if config.reset_existing() {
        count(&ctx, Counter::OutboundExistingReset);
    } else {
        count(&ctx, Counter::OutboundExisting);
        return TC_ACT_UNSPEC;
    }
    ctx.set_mark(MARK_CAPTURE);
    // SAFETY: plain numbers.
    unsafe { bpf_redirect(LO_IFINDEX, u64::from(BPF_F_INGRESS)) as i32 }
}
