//! The maps of one pod, and the few ways the programs touch them.
use core::ffi::c_void;

use aya_ebpf::{
    bindings::bpf_sock,
    helpers::{bpf_map_lookup_elem, bpf_sk_release},
    macros::map,
    maps::{Array, LpmTrie, LruHashMap, PerCpuArray, SockMap, lpm_trie::Key},
    programs::TcContext,
};
use ebpf_common::{COUNTERS, Config, Counter, DENIED, MAX_SOURCES, SLOTS, Slot, Steer, SteerKey, Tally};

use crate::parse::Tuple;

/// Tries are allocated entry by entry.
const BPF_F_NO_PREALLOC: u32 = 1;

#[map]
pub static SOCKS: SockMap = SockMap::with_max_entries(SLOTS, 0);
#[map]
static CONFIG: Array<Config> = Array::with_max_entries(1, 0);
#[map]
static TRAFFIC: PerCpuArray<Tally> = PerCpuArray::with_max_entries(COUNTERS, 0);
// Entries live for the moment between tc and the socket lookup, so few are enough even for a burst.
#[map]
pub static STEER: LruHashMap<SteerKey, Steer> = LruHashMap::with_max_entries(512, 0);

#[map]
static SOURCES: LpmTrie<[u32; 4], u32> = LpmTrie::with_max_entries(MAX_SOURCES, BPF_F_NO_PREALLOC);

/// Whether no connection from the tuple's source is let in.
#[inline(always)]
pub fn is_denied(tuple: &Tuple) -> bool {
    SOURCES.get(&Key::new(128, tuple.source())).is_some_and(|verdict| *verdict == DENIED)
}

/// The pod's configuration.
#[inline(always)]
pub fn config() -> Config {
    match CONFIG.get(0) {
        Some(config) => *config,
        None => Config::DEFAULT,
    }
}

/// Counts the packet at hand.
#[inline(always)]
pub fn count(ctx: &TcContext, counter: Counter) {
    tally(counter, ctx.len());
}

/// Counts one packet of so many bytes.
#[inline(always)]
pub fn tally(counter: Counter, bytes: u32) {
    if let Some(tally) = TRAFFIC.get_ptr_mut(counter as u32) {
        // SAFETY: the pointer is this CPU's own slot, valid for the program's run.
        unsafe {
            (*tally).packets += 1;
            (*tally).bytes += u64::from(bytes);
        }
    }
}

/// A listener the kernel counted a reference for; must be given back with [`Listener::release`].
pub struct Listener(*mut c_void);

impl Listener {
    /// The listener in `slot`, if the agent put one there and it still listens.
    #[inline(always)]
    pub fn find(slot: Slot) -> Option<Self> {
        let key = slot as u32;
        // SAFETY: the map outlives the program and the key is a `u32` on the stack.
        let sk = unsafe { bpf_map_lookup_elem((&raw const SOCKS).cast_mut().cast(), (&raw const key).cast()) };
        if sk.is_null() { None } else { Some(Self(sk)) }
    }

    #[inline(always)]
    pub fn as_ptr(&self) -> *mut c_void {
        self.0
    }

    // Not `Drop`: the verifier wants the release at a place it can see on every path.
    #[inline(always)]
    pub fn release(self) {
        // SAFETY: `find` returned a referenced, non-null socket.
        unsafe { bpf_sk_release(self.0.cast::<bpf_sock>().cast()) };
    }
}
