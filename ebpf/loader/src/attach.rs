//! One pod's redirection, from attaching to detaching.
//!
//! The order matters. Attaching: routes, then listeners in their slots, then the receiving end on `lo`, then what sends
//! traffic there, and what makes the agent deliver to the application last, so that no packet is ever handed to a place that
//! does not know it. Detaching is the reverse.
use std::{
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
    sync::Arc,
    thread,
};

use aya::programs::{LinkOrder, SchedClassifier, SkLookup, TcAttachType, links::FdLink, tc::TcAttachOptions};
use ebpf_common::{Config, Slot, map, program};

use crate::{
    error::{RedirectError, map_error, program_error},
    listener::{self, NetnsCookie},
    netlink::Netlink,
    netns::{self, beside, joined},
    object::{self, Instance, Maps, Programs, Source, Traffic},
    pins::{Hook, PinRoot, PodPins},
    plumbing::{Interface, LO_INDEX, Plumbing, interfaces},
};

/// The pod to capture.
#[derive(Debug)]
pub struct PodSpec<'a> {
    /// Its network namespace, as a file of `/proc/<pid>/ns/net` or a bind mount of it.
    pub netns: BorrowedFd<'a>,
    /// The interfaces to capture on; `None` for every Ethernet interface besides `lo`, up or not. With `None`, an interface
    /// that is up and not Ethernet is an error, because what passes through it would not be captured.
    pub interfaces: Option<Vec<String>>,
    /// What the programs do; see [`Redirect::set_config`].
    pub config: Config,
    /// Where the redirection is kept, so that it outlives this process; `None` ends it with the process. What an earlier
    /// agent kept there for the pod is taken over.
    pub pins: Option<&'a PinRoot>,
}

/// The agent's listeners of the pod; see the crate's documentation for what they must be.
#[derive(Clone, Copy, Debug)]
pub struct Listeners<'a> {
    /// Accepts what the pod dials.
    pub outbound: BorrowedFd<'a>,
    /// Accepts what others dial at the pod, except HBONE.
    pub inbound: BorrowedFd<'a>,
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
        let plumbing = netns::within(netns, || Plumbing::install(&mut open_netlink()?))?;
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
            let plumbing = Plumbing::install(&mut netlink)?;
            match attach_programs(netns.as_fd(), spec.config, listeners, &chosen, pins.as_ref()) {
                Ok((links, maps)) => {
                    let attachment = pins.map_or(Attachment::Held { _links: links }, Attachment::Pinned);
                    let (indexes, interfaces) = chosen.into_iter().map(|i| (i.index, i.name)).unzip();
                    Ok(Self { attached: Some((attachment, plumbing)), maps, netns, cookie, interfaces, indexes })
                }
                Err(e) if found => {
                    // What an earlier agent left goes on dropping what nobody carries.
                    Err(e)
                }
                Err(e) => {
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
        self.maps.set_config(config)
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
            let mut netlink =
                Netlink::open().map_err(|source| RedirectError::Netlink { what: "open a netlink socket", source })?;
            Ok(choose(interfaces(&mut netlink)?, None)?.iter().any(|i| !self.indexes.contains(&i.index)))
        })
    }

    /// The interfaces captured on.
    pub fn interfaces(&self) -> &[String] {
        &self.interfaces
    }

    /// Ends the capture and removes what was made in the pod's namespace. Close the captured connections first.
    pub fn detach(mut self) -> Result<(), RedirectError> {
        self.undo()
    }

    fn undo(&mut self) -> Result<(), RedirectError> {
        let Some((attachment, plumbing)) = self.attached.take() else { return Ok(()) };
        match attachment {
            Attachment::Held { .. } => drop(attachment),
            Attachment::Pinned(pins) => pins.remove()?,
        }
        netns::within(self.netns.as_fd(), || {
            let mut netlink =
                Netlink::open().map_err(|source| RedirectError::Netlink { what: "open a netlink socket", source })?;
            plumbing.remove(&mut netlink)
        })
    }
}

impl Drop for Redirect {
    fn drop(&mut self) {
        if matches!(self.attached, Some((Attachment::Pinned(_), _))) {
            return;
        }
        if let Err(e) = self.undo() {
            tracing::warn!(error = %e, "a pod's redirection left something behind in its namespace");
        }
    }
}

fn check(listeners: Listeners<'_>, cookie: NetnsCookie) -> Result<(), RedirectError> {
    for (which, listener) in [("outbound", listeners.outbound), ("inbound", listeners.inbound)] {
        listener::check(listener, cookie).map_err(|fault| RedirectError::Listener { which, fault })?;
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
                // Down and not Ethernet: the tunnel devices some kernels put in every namespace.
                if interface.up {
                    interface.require_ethernet()?;
                }
                if interface.ethernet() {
                    chosen.push(interface);
                }
            }
        }
        Some(names) => {
            let mut others: Vec<_> = others.collect();
            for name in names {
                let at = others.iter().position(|i| i.name == *name);
                let interface = others.swap_remove(at.ok_or_else(|| RedirectError::UnknownInterface(name.clone()))?);
                interface.require_ethernet()?;
                chosen.push(interface);
            }
        }
    }
    if chosen.is_empty() { Err(RedirectError::NoInterface) } else { Ok(chosen) }
}

/// Every hook of the classifiers, and the name of its link's pin.
fn hooks(interfaces: &[Interface]) -> Vec<Hook<'_>> {
    let ends = [(program::ETH_EGRESS, TcAttachType::Egress), (program::ETH_INGRESS, TcAttachType::Ingress)];
    let of = |interface: &'_ Interface| ends.map(|(name, direction)| (format!("{name}-{}", interface.index), direction));
    let lo = Hook { pin: program::LO_INGRESS.to_owned(), interface: "lo", direction: TcAttachType::Ingress };
    let others = interfaces
        .iter()
        .flat_map(|interface| of(interface).map(|(pin, direction)| Hook { pin, interface: &interface.name, direction }));
    std::iter::once(lo).chain(others).collect()
}

/// Attaches, or takes over, every program. The links come in the order of detaching; pinned ones stay out.
fn attach_programs(
    netns: BorrowedFd<'_>,
    config: Config,
    listeners: Listeners<'_>,
    interfaces: &[Interface],
    pins: Option<&PodPins>,
) -> Result<(Vec<FdLink>, Maps), RedirectError> {
    if let Some(pins) = pins
        && pins.are_whole(object::digest(), &hooks(interfaces))
    {
        // The very programs, where they belong: the verifier has nothing to say that it did not say before.
        let mut maps = Maps::pinned(pins)?;
        maps.set_config(config)?;
        fill_slots(&mut maps, listeners)?;
        return Ok((Vec::new(), maps));
    }
    if let Some(pins) = pins {
        pins.unmark()?;
    }
    let (mut instance, mut maps) = Instance::load(pins)?;
    maps.set_config(config)?;
    fill_slots(&mut maps, listeners)?;

    let mut links = Vec::new();
    let Programs { lo_ingress, steer_lookup, eth_egress, eth_ingress } = instance.programs()?;
    // The kernel lets every reader pass before an attachment is done: some ten milliseconds of waiting each, in which the verifier
    // has done with the next program.
    thread::scope(|scope| {
        let lo = verified(lo_ingress, program::LO_INGRESS)?;
        let egress = beside(scope, || verified(eth_egress, program::ETH_EGRESS))?;
        let pin = pins.map(|pins| (pins, program::LO_INGRESS));
        links.extend(attach_classifier(lo, program::LO_INGRESS, "lo", TcAttachType::Ingress, pin)?);
        links.extend(attach_lookup(steer_lookup, netns, pins)?);
        let egress = joined(egress)?;
        let ingress = beside(scope, || verified(eth_ingress, program::ETH_INGRESS))?;
        links.extend(attach_all(egress, program::ETH_EGRESS, TcAttachType::Egress, interfaces, pins)?);
        // Ingress last: what the application answers to the agent's deliveries must already find its way back.
        links.extend(attach_all(joined(ingress)?, program::ETH_INGRESS, TcAttachType::Ingress, interfaces, pins)?);
        Ok::<_, RedirectError>(())
    })?;
    if let Some(pins) = pins {
        pins.mark(object::digest())?;
    }
    links.reverse();
    Ok((links, maps))
}

/// Has the verifier look at a program.
fn verified<'a>(classifier: &'a mut SchedClassifier, name: &'static str) -> Result<&'a mut SchedClassifier, RedirectError> {
    classifier.load().map_err(program_error(name))?;
    Ok(classifier)
}

/// Attaches to, or takes over on, every interface.
fn attach_all(
    classifier: &mut SchedClassifier,
    name: &'static str,
    direction: TcAttachType,
    interfaces: &[Interface],
    pins: Option<&PodPins>,
) -> Result<Vec<FdLink>, RedirectError> {
    let mut links = Vec::new();
    for interface in interfaces {
        let pin = format!("{name}-{}", interface.index);
        links.extend(attach_classifier(classifier, name, &interface.name, direction, pins.map(|p| (p, &*pin)))?);
    }
    Ok(links)
}

/// The link, unless it is pinned.
fn attach_lookup(lookup: &mut SkLookup, netns: BorrowedFd<'_>, pins: Option<&PodPins>) -> Result<Option<FdLink>, RedirectError> {
    let failed = program_error(program::STEER_LOOKUP);
    lookup.load().map_err(&failed)?;
    let id = lookup.attach(netns).map_err(&failed)?;
    let link = FdLink::from(lookup.take_link(id).map_err(&failed)?);
    match pins {
        // A namespace may have several; the old one goes when the new one takes its name.
        Some(pins) => pins.pin(link, program::STEER_LOOKUP).map(|()| None),
        None => Ok(Some(link)),
    }
}

/// Attaches before any other program on the hook: one of those could pass a packet on for good. The link, unless it is pinned.
fn attach_classifier(
    classifier: &mut SchedClassifier,
    name: &'static str,
    interface: &str,
    direction: TcAttachType,
    pin: Option<(&PodPins, &str)>,
) -> Result<Option<FdLink>, RedirectError> {
    if let Some((pins, pin)) = pin
        && pins.take_over(classifier, pin).map_err(program_error(name))?
    {
        return Ok(None);
    }
    let options = TcAttachOptions::TcxOrder(LinkOrder::first());
    let id = classifier.attach_with_options(interface, direction, options).map_err(program_error(name))?;
    let link = classifier.take_link(id).map_err(program_error(name))?;
    // Only the older way of attaching, which `LinkOrder` excludes, gives anything else.
    let link = FdLink::try_from(link).map_err(|e| program_error(name)(io::Error::other(e).into()))?;
    match pin {
        Some((pins, pin)) => pins.pin(link, pin).map(|()| None),
        None => Ok(Some(link)),
    }
}

fn fill_slots(maps: &mut Maps, listeners: Listeners<'_>) -> Result<(), RedirectError> {
    for (slot, listener) in [(Slot::Out, listeners.outbound), (Slot::In, listeners.inbound)] {
        maps.socks.set(slot as u32, &listener.as_raw_fd(), 0).map_err(|e| map_error(map::SOCKS, e))?;
    }
    Ok(())
}

/// Does once, in the calling thread's scratch namespace, what [`Redirect::attach`] would do in a pod's.
pub(crate) fn rehearse(netns: BorrowedFd<'_>) -> Result<(), RedirectError> {
    let mut netlink = Netlink::open().map_err(|source| RedirectError::Netlink { what: "open a netlink socket", source })?;
    crate::plumbing::raise_lo(&mut netlink)?;
    let plumbing = Plumbing::install(&mut netlink)?;
    let (mut instance, mut maps) = Instance::load(None)?;
    maps.set_config(Config::DEFAULT)?;
    let Programs { lo_ingress, steer_lookup, eth_egress, eth_ingress } = instance.programs()?;
    for (classifier, name, direction) in [
        (lo_ingress, program::LO_INGRESS, TcAttachType::Ingress),
        (eth_ingress, program::ETH_INGRESS, TcAttachType::Ingress),
        (eth_egress, program::ETH_EGRESS, TcAttachType::Egress),
    ] {
        drop(attach_classifier(verified(classifier, name)?, name, "lo", direction, None)?);
    }
    drop(attach_lookup(steer_lookup, netns, None)?);
    plumbing.remove(&mut netlink)
}
