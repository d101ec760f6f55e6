//! `sk_lookup` of the pod's namespace: names our listener for a connection attempt that tc left to the kernel.
//!
//! Runs whenever the kernel looks for a listener, and has an opinion only on the tuples in `STEER` (see [`crate::assign`]):
//! the kernel found the old socket in TIME_WAIT, agreed that the SYN is a new connection, and now asks who accepts it.
use aya_ebpf::{
    EbpfContext as _,
    bindings::bpf_sk_lookup,
    helpers::{bpf_ktime_get_ns, bpf_sk_assign},
    macros::sk_lookup,
    programs::SkLookupContext,
};
use ebpf_common::{Counter, Slot, SteerKey};

use crate::maps::{Listener, STEER, tally};

const SK_DROP: u32 = 0;
const SK_PASS: u32 = 1;
const AF_INET6: u32 = 10;
const IPPROTO_TCP: u32 = 6;
const IN: u32 = Slot::In as u32;
const HBONE: u32 = Slot::Hbone as u32;

#[sk_lookup]
pub fn steer_lookup(ctx: SkLookupContext) -> u32 {
    // SAFETY: the kernel hands the program a valid `bpf_sk_lookup`.
    let lookup = unsafe { &*ctx.lookup };
    if lookup.protocol != IPPROTO_TCP {
        return SK_PASS;
    }
    // Both ports as they are on the wire; the kernel gives the local one in host order.
    let ports = u32::from_ne_bytes({
        let remote = (lookup.remote_port as u16).to_ne_bytes();
        let local = (lookup.local_port as u16).to_be_bytes();
        [remote[0], remote[1], local[0], local[1]]
    });
    let key = if lookup.family == AF_INET6 {
        SteerKey { tuple: addresses6(lookup, ports), version: 6 }
    } else {
        SteerKey { tuple: [lookup.remote_ip4, lookup.local_ip4, ports, 0, 0, 0, 0, 0, 0], version: 4 }
    };
    // SAFETY: the value is copied out before anything could remove it.
    let Some(steer) = (unsafe { STEER.get(&key) }) else { return SK_PASS };
    let (until, slot) = (steer.until, steer.slot);
    let _ = STEER.remove(&key);
    // SAFETY: takes no arguments.
    if unsafe { bpf_ktime_get_ns() } > until {
        return SK_PASS;
    }
    let slot = match slot {
        HBONE => Slot::Hbone,
        IN => Slot::In,
        _ => Slot::Out,
    };
    let Some(listener) = Listener::find(slot) else { return SK_DROP };
    // SAFETY: the socket is referenced and the context is the kernel's.
    let refused = unsafe { bpf_sk_assign(ctx.as_ptr(), listener.as_ptr(), 0) };
    listener.release();
    if refused != 0 {
        tally(Counter::AssignFailed, 0);
        return SK_DROP;
    }
    tally(Counter::TupleReused, 0);
    SK_PASS
}

/// Word by word: the verifier knows context fields, not pointers to them.
#[inline(always)]
fn addresses6(lookup: &bpf_sk_lookup, ports: u32) -> [u32; 9] {
    macro_rules! word {
        ($field:ident, $n:literal) => {
            // SAFETY: in bounds of the array; volatile keeps the load from being merged into a copy of the array.
            unsafe { (&raw const lookup.$field[$n]).read_volatile() }
        };
    }
    [
        word!(remote_ip6, 0),
        word!(remote_ip6, 1),
        word!(remote_ip6, 2),
        word!(remote_ip6, 3),
        word!(local_ip6, 0),
        word!(local_ip6, 1),
        word!(local_ip6, 2),
        word!(local_ip6, 3),
        ports,
    ]
}
