//! One pod's redirection, from attaching to detaching.
//!
//! The order matters. Attaching: routes; then listeners in their slots, and meanwhile every place on a hook, taken by a program that
//! passes everything; then the programs proper in its place, first what receives, then what turns packets around, so that no packet is
//! ever handed to a place that does not know it. Detaching is the reverse. To take a place has the kernel wait for all its readers,
//! some ten milliseconds each; to replace a program does not, so both ends are put in force at one moment.
use std::{
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
    sync::Arc,
    thread,
};

use aya::programs::{SkLookup, links::FdLink};
use ebpf_common::{Config, MARK_AGENT, MARK_LOCAL, Slot, map, program};

use crate::{
    early::{self, Early, Unsettled},
    error::{RedirectError, map_error, program_error},
    listener::{self, NetnsCookie},
    netlink::Netlink,
    netns::{self, beside, joined},
    object::{self, Instance, Maps, Programs, Source, Traffic},
    pins::{Hook, Owner, PinRoot, PodPins},
    places::{hooks, put_in_force, take_place},
    plumbing::{Frames, Interface, LO_INDEX, Plumbing, Setting, interfaces},
};

/// The pod to capture.
#[derive(Debug)]
pub struct PodSpec<'a> {
    /// Its network namespace, as a file of `/proc/<pid>/ns/net` or a bind mount of it.
    pub netns: BorrowedFd<'a>,
    /// The interfaces to capture on; `None` for every Ethernet interface besides `lo`, up or not, and every other that is up: tunnel
    /// devices are captured on, and one of which the frames cannot be read is closed.
    pub interfaces: Option<Vec<String>>,
    /// What the programs do; see [`Redirect::set_config`].
    pub config: Config,
    /// Where the redirection is kept, so that it outlives this process; `None` ends it with the process. What an earlier
    /// agent kept there for the pod is taken over.
    pub pins: Option<&'a PinRoot>,
    /// Whose it is: kept with the pins, for [`PinRoot::sweep_but`].
    pub owner: Owner<'a>,
}

/// The agent's listeners of the pod; see the crate's documentation for what they must be.
#[derive(Clone, Copy, Debug)]
pub struct Listeners<'a> {
    /// Accepts what the pod dials.
    pub outbound: BorrowedFd<'a>,
    /// Accepts what others dial at the pod, except HBONE.
    pub inbound: BorrowedFd<'a>,
    /// Accepts HBONE.
    pub hbone: BorrowedFd<'a>,
}

/// A pod's redirection. Dropping it detaches, and so does the kernel when the process ends; one with pins stays until
/// [`Redirect::detach`] or [`PinRoot::sweep`].
#[derive(Debug)]
pub struct Redirect {
    // `None` once detached.
    attached: Option<(Attachment, Plumbing)>,
    maps: Maps,
    netns: OwnedFd,
    cookie: NetnsCookie,
    interfaces: Vec<String>,
    indexes: Vec<u32>,
    unsettled: Unsettled,
}

/// The routes of captured packets alone, for rules that mark them as the programs do ([`crate::MARK_CAPTURE`]). They stay until
/// [`CaptureRoutes::remove`], and do nothing without marks.
#[derive(Debug)]
pub struct CaptureRoutes {
    plumbing: Plumbing,
    netns: OwnedFd,
}

impl CaptureRoutes {
    /// Makes them in a pod's namespace, or takes over those an earlier agent made.
    pub fn install(netns: BorrowedFd<'_>) -> Result<Self, RedirectError> {
        let own = netns.try_clone_to_owned().map_err(RedirectError::Namespace)?;
        // Rules reroute what the pod sends to `lo`, where IPv4 may want to see the mark before it believes the source.
        let lo = [(LO_INDEX, Setting::AcceptLocal), (LO_INDEX, Setting::SourceByMark)];
        let plumbing = netns::within(netns, || {
            let mut netlink = open_netlink()?;
            // Filters of an agent that redirected by programs, and died, know nothing of rules.
            let indexes: Vec<_> = interfaces(&mut netlink)?.iter().map(|interface| interface.index).collect();
            early::remove_filters(&indexes)?;
            Plumbing::install(&mut netlink, &lo)
        })?;
        Ok(Self { plumbing, netns: own })
    }

    /// Takes them away.
    pub fn remove(self) -> Result<(), RedirectError> {
        let plumbing = self.plumbing;
        netns::within(self.netns.as_fd(), move || plumbing.remove(&mut open_netlink()?))
    }
}

fn open_netlink() -> Result<Netlink, RedirectError> {
    Netlink::open().map_err(|source| RedirectError::Netlink { what: "open a netlink socket", source })
}

/// What keeps the programs attached.
#[derive(Debug)]
enum Attachment {
    /// The descriptors of the links, in the order of detaching.
    Held { _links: Vec<FdLink> },
    /// The pod's directory.
    Pinned(PodPins),
}

impl Redirect {
    /// Captures the pod's TCP traffic. On an error nothing is left behind but what was there.
    ///
    /// Connections that exist already stay as they are. Takes tens of milliseconds and blocks, mostly in the verifier.
    pub fn attach(spec: &PodSpec<'_>, listeners: &Listeners<'_>) -> Result<Self, RedirectError> {
        let listeners = *listeners;
        let netns = spec.netns.try_clone_to_owned().map_err(RedirectError::Namespace)?;
        netns::within(spec.netns, move || {
            let cookie = NetnsCookie::current().map_err(RedirectError::Namespace)?;
            check(listeners, cookie)?;
            let mut netlink = open_netlink()?;
            let chosen = choose(interfaces(&mut netlink)?, spec.interfaces.as_deref())?;
            let pins = spec.pins.map(|root| root.pod(cookie));
            let found = pins.as_ref().map(PodPins::create).transpose()?.unwrap_or(false);
            // What is turned around comes in with the pod's own address.
            let settings: Vec<_> = chosen.iter().map(|interface| (interface.index, Setting::AcceptLocal)).collect();
            let plumbing = Plumbing::install(&mut netlink, &settings)?;
            let hooks = hooks(&chosen);
            // Places that an earlier agent has are kept; filters of one are replaced like any other.
            let early = pins.clone().filter(|pins| !(found && pins.has_places()) && early::possible(&mut netlink, &hooks));
            let (config, pins_of) = (spec.config.with_token(cookie.token()), pins.as_ref());
            let attached = match early {
                Some(pins) => attach_early(&netns, &mut netlink, config, listeners, (hooks.clone(), pins)).or_else(|error| {
                    tracing::info!(%error, "filters do not do for a pod; it is given its lasting places at once");
                    let attached = attach_programs(netns.as_fd(), config, listeners, &hooks, pins_of)?;
                    early::unmake(&hooks);
                    Ok(attached)
                }),
                None => attach_programs(netns.as_fd(), config, listeners, &hooks, pins_of),
            };
            let attached = attached.and_then(|attached| match &pins {
                Some(pins) => pins.own(spec.owner).map(|()| attached),
                None => Ok(attached),
            });
            match attached {
                Ok(Attached { links, maps, early }) => {
                    let attachment = pins.map_or(Attachment::Held { _links: links }, Attachment::Pinned);
                    let (indexes, interfaces) = chosen.into_iter().map(|i| (i.index, i.name)).unzip();
                    let unsettled = Unsettled::new(early);
                    Ok(Self { attached: Some((attachment, plumbing)), maps, netns, cookie, interfaces, indexes, unsettled })
                }
                Err(e) if found => {
                    // What an earlier agent left goes on dropping what nobody carries.
                    Err(e)
                }
                Err(e) => {
                    early::unmake(&hooks);
                    let undone = pins.map_or(Ok(()), |pins| pins.remove()).and(plumbing.remove(&mut netlink));
                    if let Err(second) = undone {
                        tracing::warn!(error = %second, "cannot undo what was made for a pod that could not be captured");
                    }
                    Err(e)
                }
            }
        })
    }

    /// What the programs count, since they were first attached.
    pub fn traffic(&self) -> Arc<Traffic> {
        Arc::clone(&self.maps.traffic)
    }

    /// Changes what the programs do, from the next packet on.
    pub fn set_config(&mut self, config: Config) -> Result<(), RedirectError> {
        self.maps.set_config(config.with_token(self.cookie.token()))
    }

    /// Drops what comes from these, from the next connection attempt on, in the place of what was said before (also by an agent
    /// whose pins were taken over). At most [`ebpf_common::MAX_SOURCES`].
    pub fn set_sources(&mut self, sources: &[Source]) -> Result<(), RedirectError> {
        self.maps.set_sources(sources)
    }

    /// Puts other listeners in the place of the present ones, from the next connection on. Accept what is left in the old
    /// ones' queues before closing them.
    pub fn replace_listeners(&mut self, listeners: &Listeners<'_>) -> Result<(), RedirectError> {
        check(*listeners, self.cookie)?;
        fill_slots(&mut self.maps, *listeners)
    }

    /// The namespace redirected in.
    pub fn netns(&self) -> NetnsCookie {
        self.cookie
    }

    /// Whether the namespace has an interface that is not captured on, among those that [`PodSpec::interfaces`] `None` means.
    pub fn is_outdated(&self) -> Result<bool, RedirectError> {
        netns::within(self.netns.as_fd(), || {
            let mut netlink = open_netlink()?;
            Ok(choose(interfaces(&mut netlink)?, None)?.iter().any(|i| !self.indexes.contains(&i.index)))
        })
    }

    /// The interfaces captured on.
    pub fn interfaces(&self) -> &[String] {
        &self.interfaces
    }

    /// What gives the pod its lasting places, which one that was captured for the first time does not have yet.
    pub fn unsettled(&self) -> Unsettled {
        self.unsettled.clone()
    }

    /// Ends the capture and removes what was made in the pod's namespace. Close the captured connections first.
    pub fn detach(mut self) -> Result<(), RedirectError> {
        self.undo()
    }

    fn undo(&mut self) -> Result<(), RedirectError> {
        let Some((attachment, plumbing)) = self.attached.take() else { return Ok(()) };
        // Nothing goes on with it; filters may be there all the same, where it was left to an agent that never came.
        self.unsettled.leave();
        let filters = netns::within(self.netns.as_fd(), || early::remove_filters(&self.indexes));
        let detached = match attachment {
            Attachment::Held { .. } => {
                drop(attachment);
                Ok(())
            }
            Attachment::Pinned(pins) => pins.remove(),
        };
        let unmade = netns::within(self.netns.as_fd(), || plumbing.remove(&mut open_netlink()?));
        filters.and(detached).and(unmade)
    }
}

impl Drop for Redirect {
    fn drop(&mut self) {
        if matches!(self.attached, Some((Attachment::Pinned(_), _))) {
            self.unsettled.leave();
            return;
        }
        if let Err(e) = self.undo() {
            tracing::warn!(error = %e, "a pod's redirection left something behind in its namespace");
        }
    }
}

fn check(listeners: Listeners<'_>, cookie: NetnsCookie) -> Result<(), RedirectError> {
    let foreign = listener::Addresses::Foreign;
    let all: [(_, _, &[u32], _); 3] = [
        ("outbound", listeners.outbound, &[MARK_LOCAL, MARK_AGENT], foreign),
        ("inbound", listeners.inbound, &[MARK_AGENT], foreign),
        ("HBONE", listeners.hbone, &[MARK_AGENT], listener::Addresses::Own),
    ];
    for (which, listener, marks, addresses) in all {
        listener::check(listener, marks, addresses, cookie).map_err(|fault| RedirectError::Listener { which, fault })?;
    }
    Ok(())
}

/// The interfaces to attach to.
fn choose(all: Vec<Interface>, wanted: Option<&[String]>) -> Result<Vec<Interface>, RedirectError> {
    if !all.iter().any(|i| i.index == LO_INDEX && i.up) {
        return Err(RedirectError::LoopbackDown);
    }
    let (others, mut chosen) = (all.into_iter().filter(|i| i.index != LO_INDEX), Vec::new());
    match wanted {
        None => {
            for interface in others {
                match interface.frames() {
                    Frames::Ethernet => chosen.push(interface),
                    // The tunnel devices some kernels put in every namespace.
                    _ if !interface.up => {}
                    Frames::Bare => chosen.push(interface),
                    Frames::Unknown => {
                        tracing::warn!(reason = %interface.unsupported(), "an interface of a pod is closed");
                        chosen.push(interface);
                    }
                }
            }
        }
        Some(names) => {
            let mut others: Vec<_> = others.collect();
            for name in names {
                let at = others.iter().position(|i| i.name == *name);
                let interface = others.swap_remove(at.ok_or_else(|| RedirectError::UnknownInterface(name.clone()))?);
                if interface.frames() == Frames::Unknown {
                    return Err(interface.unsupported());
                }
                chosen.push(interface);
            }
        }
    }
    if chosen.is_empty() { Err(RedirectError::NoInterface) } else { Ok(chosen) }
}

/// What attaching makes.
struct Attached {
    /// In the order of detaching; pinned ones stay out.
    links: Vec<FdLink>,
    maps: Maps,
    /// Where the lasting places have yet to be taken.
    early: Option<Early>,
}

/// Attaches, or takes over, every program.
fn attach_programs(
    netns: BorrowedFd<'_>,
    config: Config,
    listeners: Listeners<'_>,
    hooks: &[Hook],
    pins: Option<&PodPins>,
) -> Result<Attached, RedirectError> {
    if let Some(pins) = pins
        && pins.are_whole(object::digest(), hooks)
    {
        // The very programs, where they belong: the verifier has nothing to say that it did not say before.
        let mut maps = Maps::pinned(pins)?;
        maps.set_config(config)?;
        fill_slots(&mut maps, listeners)?;
        return Ok(Attached { links: Vec::new(), maps, early: None });
    }
    if let Some(pins) = pins {
        pins.unmark()?;
    }
    let mut links = Vec::new();
    let maps = thread::scope(|scope| {
        // Everything else has its time while the kernel waits.
        let taken = beside(scope, || hooks.iter().map(|hook| take_place(hook, pins)).collect::<Result<Vec<_>, _>>())?;
        let (mut instance, mut maps) = Instance::load(pins)?;
        maps.set_config(config)?;
        fill_slots(&mut maps, listeners)?;
        let Programs { steer_lookup, mut classifiers } = instance.programs()?;
        classifiers.verify(hooks)?;
        links.extend(attach_lookup(steer_lookup, netns, pins)?);
        for (hook, place) in hooks.iter().zip(joined(taken)?) {
            let link = put_in_force(&mut classifiers, hook, place)?;
            // Our descriptor of a pinned one may close.
            links.extend(pins.is_none().then_some(link));
        }
        Ok::<_, RedirectError>(maps)
    })?;
    // Those of an agent that died before it had its places.
    early::remove_filters(&early::indexes(hooks))?;
    if let Some(pins) = pins {
        pins.keep_only(hooks)?;
        pins.mark(object::digest())?;
    }
    links.reverse();
    Ok(Attached { links, maps, early: None })
}

/// Attaches every program in a way that is taken at once; see [`crate::early`].
fn attach_early(
    netns: &OwnedFd,
    netlink: &mut Netlink,
    config: Config,
    listeners: Listeners<'_>,
    (hooks, pins): (Vec<Hook>, PodPins),
) -> Result<Attached, RedirectError> {
    let (mut instance, mut maps) = Instance::load(Some(&pins))?;
    maps.set_config(config)?;
    fill_slots(&mut maps, listeners)?;
    let Programs { steer_lookup, mut classifiers } = instance.programs()?;
    classifiers.verify(&hooks)?;
    attach_lookup(steer_lookup, netns.as_fd(), Some(&pins))?;
    early::filter(netlink, &hooks, &mut classifiers)?;
    let netns = netns.try_clone().map_err(RedirectError::Namespace)?;
    let early = Early { netns, instance, hooks, pins, places: Vec::new() };
    Ok(Attached { links: Vec::new(), maps, early: Some(early) })
}

/// The link, unless it is pinned.
fn attach_lookup(lookup: &mut SkLookup, netns: BorrowedFd<'_>, pins: Option<&PodPins>) -> Result<Option<FdLink>, RedirectError> {
    let failed = program_error(program::STEER_LOOKUP);
    lookup.load().map_err(&failed)?;
    let id = lookup.attach(netns).map_err(&failed)?;
    let link = FdLink::from(lookup.take_link(id).map_err(&failed)?);
    match pins {
        // A namespace may have several; the old one goes when the new one takes its name.
        Some(pins) => pins.pin(link, program::STEER_LOOKUP).map(|_| None),
        None => Ok(Some(link)),
    }
}

fn fill_slots(maps: &mut Maps, listeners: Listeners<'_>) -> Result<(), RedirectError> {
    let slots = [(Slot::Out, listeners.outbound), (Slot::In, listeners.inbound), (Slot::Hbone, listeners.hbone)];
    for (slot, listener) in slots {
        maps.socks.set(slot as u32, &listener.as_raw_fd(), 0).map_err(|e| map_error(map::SOCKS, e))?;
    }
    Ok(())
}

/// Does once, in the calling thread's scratch namespace, what [`Redirect::attach`] would do in a pod's.
pub(crate) fn rehearse(netns: BorrowedFd<'_>) -> Result<(), RedirectError> {
    let mut netlink = open_netlink()?;
    crate::plumbing::raise_lo(&mut netlink)?;
    let lo = [Interface::loopback()];
    let plumbing = Plumbing::install(&mut netlink, &[(LO_INDEX, Setting::AcceptLocal)])?;
    let (mut instance, mut maps) = Instance::load(None)?;
    maps.set_config(Config::DEFAULT)?;
    let Programs { steer_lookup, mut classifiers } = instance.programs()?;
    let hooks = hooks(&lo);
    classifiers.verify(&hooks)?;
    for hook in &hooks {
        drop(put_in_force(&mut classifiers, hook, take_place(hook, None)?)?);
    }
    drop(attach_lookup(steer_lookup, netns, None)?);
    plumbing.remove(&mut netlink)
}
