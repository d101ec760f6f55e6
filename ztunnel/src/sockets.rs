//! The agent's own listeners in one pod.
use crate::dialer::stream_options;
use crate::enrolment::Enrolled;
use crate::pod::ports;
use crate::settings::Settings;
use mesh_runtime::sockets::{BoundListener, ListenerOptions, NetnsFd};
use std::io;
use std::net::{Ipv6Addr, SocketAddr};

/// The three listeners of a pod, bound and not yet accepting.
#[derive(Debug)]
pub struct Sockets {
    pub(crate) outbound: BoundListener,
    pub(crate) plain: BoundListener,
    pub(crate) hbone: BoundListener,
}

impl Sockets {
    /// In one fixed order.
    pub(crate) fn each(&self) -> [&BoundListener; 3] {
        [&self.outbound, &self.plain, &self.hbone]
    }

    /// In the order of [`Sockets::each`].
    pub(crate) fn from_each([outbound, plain, hbone]: [BoundListener; 3]) -> Self {
        Self { outbound, plain, hbone }
    }

    /// Second descriptors of the same sockets.
    pub(crate) fn try_clone(&self) -> io::Result<Self> {
        let copy = BoundListener::try_clone;
        Ok(Self { outbound: copy(&self.outbound)?, plain: copy(&self.plain)?, hbone: copy(&self.hbone)? })
    }

    /// In the pod's namespace, or on its first address where it shares the agent's.
    pub(crate) fn bind(enrolled: &Enrolled, netns: Option<&NetnsFd>, settings: &Settings) -> io::Result<Self> {
        // In its own namespace the pod has all addresses to itself; on a shared loopback each pod binds its own.
        let ip = match netns {
            Some(_) => Ipv6Addr::UNSPECIFIED.into(),
            None => enrolled.address.ok_or_else(|| io::Error::other("the pod has no address"))?,
        };
        let bind = || {
            let listener = |port, transparent| {
                let mut options = ListenerOptions::new(SocketAddr::new(ip, port));
                options.stream = stream_options();
                if netns.is_some() {
                    options.mark = Some(crate::dialer::MARK);
                    options.transparent = transparent;
                    options.reuse_port = settings.zds.is_some() && settings.inpod_port_reuse;
                }
                options.bind()
            };
            Ok(Self {
                outbound: listener(ports::OUTBOUND, true)?,
                plain: listener(ports::INBOUND_PLAIN, true)?,
                hbone: listener(ports::HBONE, false)?,
            })
        };
        match netns {
            Some(netns) => netns.run_in(bind),
            None => bind(),
        }
    }
}
