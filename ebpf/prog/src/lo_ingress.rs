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
    assign::{Outcome, Owner, open, owner, stray},
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
    let config = config();
    let segment = match classify(&ctx, &config) {
        Packet::Tcp(segment) => segment,
        // Only plain TCP is handed over, but what the kernel says about it may carry its mark (`fwmark_reflect`).
        Packet::Pass => return TC_ACT_UNSPEC,
        Packet::Drop(why) => {
            count(why);
            return TC_ACT_SHOT;
        }
    };
    let outcome = if segment.opens() {
        let outcome = open(&ctx, &segment.tuple, Slot::Out);
        if matches!(outcome, Outcome::Given) {
            count(Counter::OutboundAssigned);
        }
        outcome
    } else if config.reset_existing() && segment.acknowledges() && owner(&ctx, &segment.tuple) == Owner::Nobody {
        // The listener resets it, from the address the application thinks it talks to; or knows its own SYN cookie.
        stray(&ctx, Slot::Out)
    } else {
        return TC_ACT_UNSPEC;
    };
    match outcome {
        Outcome::Given => TC_ACT_UNSPEC,
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
