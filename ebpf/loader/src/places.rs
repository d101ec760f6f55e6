//! Places on the hooks of interfaces: whose they are, and what is put in them.
use std::io;

use aya::programs::{
    LinkOrder, ProgramError, SchedClassifier, TcAttachType,
    links::FdLink,
    tc::{SchedClassifierLink, TcAttachOptions},
};
use ebpf_common::program;
use nix::net::if_::if_indextoname;

use crate::{
    error::{RedirectError, program_error},
    object::{self, Classifiers},
    pins::{EGRESS, Hook, INGRESS, PodPins},
    plumbing::{Frames, Interface},
};

/// Every hook, in the order in which programs are put in force: all that receive, then all that turn packets around.
pub(crate) fn hooks(interfaces: &[Interface]) -> Vec<Hook> {
    let ends = [(INGRESS, TcAttachType::Ingress), (EGRESS, TcAttachType::Egress)];
    let of = |([ethernet, bare, closed], direction): ([&'static str; 3], TcAttachType)| {
        interfaces.iter().map(move |interface| {
            let program = match interface.frames() {
                Frames::Ethernet => ethernet,
                Frames::Bare => bare,
                Frames::Unknown => closed,
            };
            let pin = format!("{program}-{}", interface.index);
            Hook { program, pin, interface: interface.name.clone(), index: interface.index, direction }
        })
    };
    ends.into_iter().flat_map(of).collect()
}

/// The place that an earlier agent has on the hook, with its program, or a new one for `idle`: before any other program, as one of
/// those could pass a packet on for good.
pub(crate) fn take_place(hook: &Hook, pins: Option<&PodPins>) -> Result<SchedClassifierLink, RedirectError> {
    let failed = program_error(program::IDLE);
    if let Some(link) = pins.and_then(|pins| pins.link(hook)) {
        return SchedClassifierLink::try_from(link).map_err(|e| failed(io::Error::other(e).into()));
    }
    let options = TcAttachOptions::TcxOrder(LinkOrder::first());
    // It may have another name by now.
    let renamed = if_indextoname(hook.index).ok().and_then(|name| name.into_string().ok());
    let name = renamed.as_ref().unwrap_or(&hook.interface);
    let link = object::with_idle(|idle| {
        let id = idle.attach_with_options(name, hook.direction, options).map_err(&failed)?;
        idle.take_link(id).map_err(&failed)
    })?;
    let Some(pins) = pins else { return Ok(link) };
    let pinned = pins.pin(fd_link(link).map_err(&failed)?, &hook.pin)?;
    SchedClassifierLink::try_from(pinned).map_err(|e| failed(io::Error::other(e).into()))
}

/// Puts the hook's program in the place of the one that is in the link, from the next packet on.
pub(crate) fn put_in_force(
    classifiers: &mut Classifiers<'_>,
    hook: &Hook,
    place: SchedClassifierLink,
) -> Result<FdLink, RedirectError> {
    let put = |classifier: &mut SchedClassifier| {
        let id = classifier.attach_to_link(place)?;
        fd_link(classifier.take_link(id)?)
    };
    put(classifiers.of(hook)?).map_err(program_error(hook.program))
}

/// Only the older way of attaching, which `LinkOrder` excludes, gives anything else.
fn fd_link(link: SchedClassifierLink) -> Result<FdLink, ProgramError> {
    FdLink::try_from(link).map_err(|e| io::Error::other(e).into())
}
