//! A pod that is captured already and has yet to be given its lasting places on the hooks.
//!
//! [`crate::clsact`] serves it at once. Each lasting place, taken one at a time by [`Unsettled::settle`] when nobody else waits for the
//! kernel, is first held by a program that passes everything; when all are there, the programs proper are put in them and the filters go.
//! For that moment a packet may meet the same program twice, which counts it twice and decides the same.
//!
//! An agent that dies before leaves the filters: they drop what nobody accepts, as the lasting ones do. The next agent puts its programs in
//! their place, or, where a lasting place is taken already, takes them away when it has them all.
use std::{
    fmt, io,
    os::fd::{AsFd as _, OwnedFd},
    sync::{Arc, Mutex, PoisonError},
};

use aya::programs::{SchedClassifier, TcAttachType, tc::SchedClassifierLink};

use crate::{
    clsact,
    error::{RedirectError, program_error},
    netlink::Netlink,
    netns,
    object::{self, Classifiers, Instance, Programs},
    pins::{Hook, PodPins},
    places::{put_in_force, take_place},
};

/// Gives a captured pod its lasting places; see the module. Outlives the [`crate::Redirect`] it is of, and has nothing to do then.
#[derive(Clone)]
pub struct Unsettled(Arc<Mutex<Option<Early>>>);

impl fmt::Debug for Unsettled {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Unsettled").finish()
    }
}

/// What is needed for it.
pub(crate) struct Early {
    pub(crate) netns: OwnedFd,
    pub(crate) instance: Instance,
    pub(crate) hooks: Vec<Hook>,
    pub(crate) pins: PodPins,
    pub(crate) places: Vec<SchedClassifierLink>,
}

impl Unsettled {
    pub(crate) fn new(early: Option<Early>) -> Self {
        Self(Arc::new(Mutex::new(early)))
    }

    /// Takes the next place, or puts the programs in all of them; `false` when there is nothing left to do. Blocks for some ten
    /// milliseconds, in which nobody else changes interfaces. After an error the pod goes on being captured as it was.
    pub fn settle(&self) -> Result<bool, RedirectError> {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(mut early) = state.take() else { return Ok(false) };
        if let Some(hook) = early.hooks.get(early.places.len()) {
            let netns = early.netns.as_fd();
            let taken = netns::within(netns, || take_place(hook, Some(&early.pins)));
            let taken = taken.map(|place| early.places.push(place));
            *state = Some(early);
            return taken.map(|()| true);
        }
        early.complete().map(|()| false)
    }

    /// Has it stay as it is, for the next agent.
    pub fn leave(&self) {
        drop(self.0.lock().unwrap_or_else(PoisonError::into_inner).take());
    }

    /// Whether there is something to do.
    pub fn is_unsettled(&self) -> bool {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).is_some()
    }
}

impl Early {
    fn complete(self) -> Result<(), RedirectError> {
        let Self { netns, mut instance, hooks, pins, places } = self;
        let Programs { mut classifiers, .. } = instance.programs()?;
        for (hook, place) in hooks.iter().zip(places) {
            // Our descriptor of a pinned one may close.
            drop(put_in_force(&mut classifiers, hook, place)?);
        }
        netns::within(netns.as_fd(), || remove_filters(&indexes(&hooks)))?;
        pins.keep_only(&hooks)?;
        pins.mark(object::digest())
    }
}

/// Whether filters will do for a while: where somebody has programs of the newer kind, those come before filters, and may pass packets
/// on for good. The disciplines are made then.
pub(crate) fn possible(netlink: &mut Netlink, hooks: &[Hook]) -> bool {
    let alone =
        |hook: &Hook| SchedClassifier::query_tcx(&hook.interface, hook.direction).is_ok_and(|(_, programs)| programs.is_empty());
    hooks.iter().all(alone) && clsact::make(netlink, &indexes(hooks))
}

/// Has filters see what passes the hooks.
pub(crate) fn filter(netlink: &mut Netlink, hooks: &[Hook], classifiers: &mut Classifiers<'_>) -> Result<(), RedirectError> {
    for hook in hooks {
        let program = classifiers.of(hook)?.fd().map_err(program_error(hook.program))?.as_fd();
        clsact::add(netlink, hook.index, hook.direction, program)
            .map_err(|source| RedirectError::Netlink { what: "add a filter to an interface", source })?;
    }
    Ok(())
}

/// Takes back what [`possible`] made and [`filter`] added, in the calling thread's namespace.
pub(crate) fn unmake(hooks: &[Hook]) {
    if let Ok(mut netlink) = Netlink::open() {
        clsact::unmake(&mut netlink, &indexes(hooks));
    }
}

/// Takes filters of ours away, in the calling thread's namespace; from all these interfaces, whatever happens at one of them.
pub(crate) fn remove_filters(interfaces: &[u32]) -> Result<(), RedirectError> {
    let fail = |source| RedirectError::Netlink { what: "remove filters from an interface", source };
    let mut netlink = Netlink::open().map_err(fail)?;
    let removed: Vec<_> = interfaces.iter().map(|&interface| clsact::remove(&mut netlink, interface)).collect();
    removed.into_iter().collect::<io::Result<()>>().map_err(fail)
}

/// The interfaces, each once.
pub(crate) fn indexes(hooks: &[Hook]) -> Vec<u32> {
    hooks.iter().filter(|hook| matches!(hook.direction, TcAttachType::Ingress)).map(|hook| hook.index).collect()
}
