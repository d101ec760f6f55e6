//! What [`crate::eth_egress`] turned around, when it comes in again on the same interface.
use aya_ebpf::{
    bindings::{TC_ACT_SHOT, TC_ACT_UNSPEC},
    programs::TcContext,
};
use ebpf_common::{Config, Counter, Slot};

use crate::{
    assign::{Outcome, Owner, open, owner, stray},
    maps::count,
    parse::Segment,
};

const PACKET_HOST: u32 = 0;

/// Hands it to the agent's socket, or to its outbound listener.
#[inline(always)]
pub fn deliver(ctx: &TcContext, config: &Config, segment: &Segment) -> i32 {
    // The frame carries the MAC address of the interface's next hop, so it would count as somebody else's.
    if ctx.change_type(PACKET_HOST).is_err() {
        count(ctx, Counter::AssignFailed);
        return TC_ACT_SHOT;
    }
    let outcome = if segment.opens() {
        let outcome = open(ctx, &segment.tuple, Slot::Out);
        if matches!(outcome, Outcome::Given) {
            count(ctx, Counter::OutboundAssigned);
        }
        outcome
    } else if config.reset_existing() && segment.acknowledges() && owner(ctx, &segment.tuple) != Owner::Connection {
        // The listener resets it, from the address the application thinks it talks to; or knows its own SYN cookie.
        stray(ctx, Slot::Out)
    } else {
        return TC_ACT_UNSPEC;
    };
    match outcome {
        Outcome::Given => TC_ACT_UNSPEC,
        Outcome::Absent => {
            count(ctx, Counter::OutboundNoListener);
            TC_ACT_SHOT
        }
        Outcome::Failed => {
            count(ctx, Counter::AssignFailed);
            TC_ACT_SHOT
        }
    }
}
