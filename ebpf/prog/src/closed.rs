//! Hooks of interfaces whose frames nobody here can read: nothing passes, in or out.
use aya_ebpf::{bindings::TC_ACT_SHOT, macros::classifier, programs::TcContext};
use ebpf_common::Counter;

use crate::maps::count;

#[classifier]
pub fn closed_egress(ctx: TcContext) -> i32 {
    drop_it(&ctx)
}

#[classifier]
pub fn closed_ingress(ctx: TcContext) -> i32 {
    drop_it(&ctx)
}

#[inline(always)]
fn drop_it(ctx: &TcContext) -> i32 {
    count(ctx, Counter::RefusedFrame);
    TC_ACT_SHOT
}
