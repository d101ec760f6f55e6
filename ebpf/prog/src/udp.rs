//! UDP, which is not captured: counted and passed, or by choice refused in both directions.
//!
//! Refusing leaves the agent its own: what it sends carries its mark, what it is answered has a socket with the mark.
use aya_ebpf::{
    bindings::{BPF_F_CURRENT_NETNS, TC_ACT_SHOT, TC_ACT_UNSPEC},
    helpers::{bpf_sk_lookup_udp, bpf_sk_release},
    programs::TcContext,
};
use ebpf_common::{Config, Counter, DNS_PORT, MARK_AGENT, MARK_MASK};

use crate::{maps::count, parse::Tuple};

/// What the pod sends. (The agent's is known by its mark before it comes here.)
#[inline(always)]
pub fn leaving(ctx: &TcContext, config: &Config, tuple: &Tuple) -> i32 {
    verdict(ctx, config, tuple.dport() == DNS_PORT, false)
}

/// What others send to the pod.
#[inline(always)]
pub fn arriving(ctx: &TcContext, config: &Config, tuple: &Tuple) -> i32 {
    let ours = config.refuse_udp() && agents(ctx, tuple);
    verdict(ctx, config, tuple.sport() == DNS_PORT, ours)
}

/// What has no ports to tell by.
#[inline(always)]
pub fn odd(ctx: &TcContext, config: &Config) -> i32 {
    if config.refuse_udp() {
        count(ctx, Counter::RefusedUdp);
        return TC_ACT_SHOT;
    }
    count(ctx, Counter::OddOther);
    TC_ACT_UNSPEC
}

#[inline(always)]
fn verdict(ctx: &TcContext, config: &Config, dns: bool, ours: bool) -> i32 {
    // Captured DNS is not seen on an interface: what is there under its port is something else.
    if config.refuse_udp() && !ours && !(dns && !config.capture_dns()) {
        count(ctx, Counter::RefusedUdp);
        return TC_ACT_SHOT;
    }
    count(ctx, if dns { Counter::DnsPassed } else { Counter::UdpPassed });
    TC_ACT_UNSPEC
}

/// Whether it is for a socket of the agent.
#[inline(always)]
fn agents(ctx: &TcContext, tuple: &Tuple) -> bool {
    let mut copy = tuple.words;
    // SAFETY: the tuple is on the stack and `len` is one of the two sizes the helper takes.
    let sk = unsafe {
        bpf_sk_lookup_udp(ctx.skb.skb.cast(), (&raw mut copy).cast(), tuple.len(), BPF_F_CURRENT_NETNS as i64 as u64, 0)
    };
    if sk.is_null() {
        return false;
    }
    // SAFETY: not null, and referenced until the release below.
    let mark = unsafe { (*sk).mark };
    // SAFETY: as above.
    unsafe { bpf_sk_release(sk.cast()) };
    mark & MARK_MASK == MARK_AGENT
}
