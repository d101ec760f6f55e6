//! The allocator's two habits that a node agent cannot have: huge pages nobody asked for, and memory kept after a peak.
//!
//! Owns the calls that change them; the programs choose the allocator itself (`#[global_allocator]` in their `main.rs`).
//! One of the modules of the crate with `unsafe`: the allocator has no safe interface for this.

/// Turns transparent huge pages off for this process: with them a few scattered small allocations hold 2 MiB each.
///
/// # Errors
/// Kernels without `PR_SET_THP_DISABLE`; the process only uses more memory then.
pub fn refuse_huge_pages() -> std::io::Result<()> {
    nix::sys::prctl::set_thp_disable(true).map_err(Into::into)
}

/// Gives pages that are free back to the kernel. Left alone, an idle process keeps the peak of its start-up for ever (the
/// kernel's type information, read once to load programs, is 20 MiB), because freed pages are returned in passing, by later
/// allocations. Concerns the calling thread's own heap and what is shared. A few hundred microseconds: for a slow timer, and
/// for a data thread only after many of its connections ended.
pub fn return_free_pages() {
    // SAFETY: may be called at any time from any thread; it touches only the allocator's own state.
    unsafe { libmimalloc_sys::mi_collect(true) }
}
