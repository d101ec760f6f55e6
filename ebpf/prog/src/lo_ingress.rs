//! tc ingress of the pod's `lo`: what [`crate::eth_egress`] handed over.
//!
//! Unmarked packets are the pod's own local traffic and are none of our business.
use aya_ebpf::{
    bindings::{TC_ACT_SHOT, TC_ACT_UNSPEC},
    macros::classifier,
    programs::TcContext,
};
use ebpf_common::{Counter, MARK_CAPTURE, MARK_MASK, Slot};

use crate::{
    assign::{Outcome, open},
    maps::{config, count},
    parse::{Packet, classify},
};

const PACKET_HOST: u32 = 0;

#[classifier]
pub fn lo_ingress(ctx: TcContext) -> i32 {
    // SAFETY: the kernel hands every classifier a valid `__sk_buff`.
    if unsafe { (*ctx.skb.skb).mark } & MARK_MASK != MARK_CAPTURE {
        return TC_ACT_UNSPEC;
    }
    // The frame carries the MAC address of the interface's next hop, so it would count as somebody else's.
    if ctx.change_type(PACKET_HOST).is_err() {
        count(Counter::AssignFailed);
        return TC_ACT_SHOT;
    }
    let segment = match classify(&ctx, &config()) {
        Packet::Tcp(segment) => segment,
        // Only plain TCP is handed over; a process that marks its own packets like this gets no further.
        Packet::Pass => return TC_ACT_SHOT,
        Packet::Drop(why) => {
            count(why);
            return TC_ACT_SHOT;
        }
    };
    if !segment.opens() {
        return TC_ACT_UNSPEC;
    }
    match open(&ctx, &segment.tuple, Slot::Out) {
        Outcome::Given => {
            count(Counter::OutboundAssigned);
            TC_ACT_UNSPEC
        }
        Outcome::Absent => {
            count(Counter::OutboundNoListener);
            TC_ACT_SHOT
        }
        Outcome::Failed => {
            count(Counter::AssignFailed);
            TC_ACT_SHOT
        }
    }
}
