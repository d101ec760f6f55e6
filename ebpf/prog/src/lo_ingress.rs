//! tc ingress of the pod's `lo`: what [`crate::eth_egress`] handed over.
//!
//! Unmarked packets are the pod's own local traffic and are none of our business. The agent's lose their mark here.
use aya_ebpf::{
    bindings::{TC_ACT_SHOT, TC_ACT_UNSPEC},
    macros::classifier,
    programs::TcContext,
};
use ebpf_common::{Counter, MARK_AGENT, MARK_CAPTURE, MARK_MASK, Slot};

use crate::{
    assign::{Outcome, Owner, open, owner, stray},
    maps::{config, count},
    parse::{Packet, classify},
};

const PACKET_HOST: u32 = 0;

#[classifier]
pub fn lo_ingress(ctx: TcContext) -> i32 {
    // SAFETY: the kernel hands every classifier a valid `__sk_buff`.
    let mark = unsafe { (*ctx.skb.skb).mark };
    if mark & MARK_MASK != MARK_CAPTURE {
        if mark & MARK_MASK == MARK_AGENT {
            // The agent's mark ends where the application begins: with `tcp_fwmark_accept` or `fwmark_reflect` its answers
            // would carry it too and leave as the agent's own.
            ctx.set_mark(mark & !MARK_MASK);
        }
        return TC_ACT_UNSPEC;
    }
    // The frame carries the MAC address of the interface's next hop, so it would count as somebody else's.
    if ctx.change_type(PACKET_HOST).is_err() {
        count(&ctx, Counter::AssignFailed);
        return TC_ACT_SHOT;
    }
    let config = config();
    let segment = match classify(&ctx, &config) {
        Packet::Tcp(segment) => segment,
        // Only plain TCP is handed over, but what the kernel says about it may carry its mark (`fwmark_reflect`).
        Packet::Pass(_) | Packet::Udp(_) | Packet::OddUdp => return TC_ACT_UNSPEC,
        Packet::Drop(why) => {
            count(&ctx, why);
            return TC_ACT_SHOT;
        }
    };
    let outcome = if segment.opens() {
        let outcome = open(&ctx, &segment.tuple, Slot::Out);
        if matches!(outcome, Outcome::Given) {
            count(&ctx, Counter::OutboundAssigned);
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
            count(&ctx, Counter::OutboundNoListener);
            TC_ACT_SHOT
        }
        Outcome::Failed => {
            count(&ctx, Counter::AssignFailed);
            TC_ACT_SHOT
        }
    }
}
