//! Keeps a place among the programs of a tc hook, so that the others are put in force all at once.
use aya_ebpf::{bindings::TC_ACT_UNSPEC, macros::classifier, programs::TcContext};

#[classifier]
pub fn idle(_: TcContext) -> i32 {
    TC_ACT_UNSPEC
}
