//! Runs a piece of work inside a network namespace, on a thread that ends with it.
//!
//! A thread that changed its namespace must never serve anything else, so none is reused.
use std::{
    os::fd::BorrowedFd,
    panic,
    thread::{self, Scope, ScopedJoinHandle},
};

use nix::sched::{CloneFlags, setns, unshare};

use crate::error::RedirectError;

/// Runs `work` in the namespace behind `netns`; a panic in it continues here.
pub(crate) fn within<T: Send>(
    netns: BorrowedFd<'_>,
    work: impl FnOnce() -> Result<T, RedirectError> + Send,
) -> Result<T, RedirectError> {
    on_own_thread(move || {
        setns(netns, CloneFlags::CLONE_NEWNET).map_err(|e| RedirectError::Namespace(e.into()))?;
        work()
    })
}

/// Runs `work` in a new, empty namespace that ends with it.
pub(crate) fn within_scratch<T: Send>(work: impl FnOnce() -> Result<T, RedirectError> + Send) -> Result<T, RedirectError> {
    on_own_thread(move || {
        unshare(CloneFlags::CLONE_NEWNET).map_err(|e| RedirectError::Namespace(e.into()))?;
        work()
    })
}

fn on_own_thread<T: Send>(work: impl FnOnce() -> Result<T, RedirectError> + Send) -> Result<T, RedirectError> {
    thread::scope(|scope| joined(beside(scope, work)?))
}

/// Begins `work` on a thread of its own, in the calling thread's namespace.
pub(crate) fn beside<'scope, T: Send + 'scope>(
    scope: &'scope Scope<'scope, '_>,
    work: impl FnOnce() -> T + Send + 'scope,
) -> Result<ScopedJoinHandle<'scope, T>, RedirectError> {
    thread::Builder::new().name("pod-netns".to_owned()).spawn_scoped(scope, work).map_err(RedirectError::Namespace)
}

/// Its result; a panic in it continues here.
pub(crate) fn joined<T>(begun: ScopedJoinHandle<'_, T>) -> T {
    begun.join().unwrap_or_else(|payload| panic::resume_unwind(payload))
}
