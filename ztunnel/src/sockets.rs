//! The agent's own sockets in one pod.
use crate::dialer::{MARK, local_mark};
use crate::enrolment::Enrolled;
use crate::ports::{self, Ports};
use crate::settings::Settings;
use mesh_runtime::sockets::{BoundListener, ListenerOptions, NetnsFd, bind_udp};
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

/// The sockets of a pod, bound and not yet accepting.
#[derive(Debug)]
pub struct Sockets {
    pub(crate) outbound: BoundListener,
    pub(crate) plain: BoundListener,
    pub(crate) hbone: BoundListener,
    /// The DNS proxy's, one pair per address family; none if it is off.
    pub(crate) dns: Vec<DnsSockets>,
}

/// What the DNS proxy of a pod is asked through, at one address.
#[derive(Debug)]
pub struct DnsSockets {
    pub(crate) udp: UdpSocket,
    pub(crate) tcp: BoundListener,
}

/// What is to be done about a port that somebody has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Taken {
    /// Nothing can be.
    Fail,
    /// Another one is as good.
    Any,
}

impl Sockets {
    /// Where they are bound.
    ///
    /// # Errors
    /// The kernel does not say.
    pub(crate) fn ports(&self) -> io::Result<Ports> {
        let port = |listener: &BoundListener| listener.local_addr().map(|at| at.port());
        let mut dns = Ports::USUAL.dns;
        for sockets in &self.dns {
            let at = sockets.udp.local_addr()?;
            let [v4, v6] = &mut dns;
            *(if at.is_ipv4() { v4 } else { v6 }) = at.port();
        }
        Ok(Ports { outbound: port(&self.outbound)?, plain: port(&self.plain)?, hbone: port(&self.hbone)?, dns })
    }

    /// Their descriptors, in one fixed order.
    pub(crate) fn each(&self) -> Vec<BorrowedFd<'_>> {
        let tcp = [&self.outbound, &self.plain, &self.hbone].map(AsFd::as_fd);
        tcp.into_iter().chain(self.dns.iter().flat_map(|dns| [dns.udp.as_fd(), dns.tcp.as_fd()])).collect()
    }

    /// From the descriptors of [`Sockets::each`]; nothing if there cannot be as many.
    pub(crate) fn from_each(fds: Vec<OwnedFd>) -> Option<Self> {
        let mut fds = fds.into_iter();
        let mut listener = || fds.next().map(BoundListener::from);
        let (outbound, plain, hbone) = (listener()?, listener()?, listener()?);
        let mut dns = Vec::new();
        while let Some(udp) = fds.next() {
            dns.push(DnsSockets { udp: udp.into(), tcp: fds.next()?.into() });
        }
        Some(Self { outbound, plain, hbone, dns })
    }

    /// Second descriptors of the same sockets.
    pub(crate) fn try_clone(&self) -> io::Result<Self> {
        let copy = BoundListener::try_clone;
        let dns = |s: &DnsSockets| Ok(DnsSockets { udp: s.udp.try_clone()?, tcp: s.tcp.try_clone()? });
        Ok(Self {
            outbound: copy(&self.outbound)?,
            plain: copy(&self.plain)?,
            hbone: copy(&self.hbone)?,
            dns: self.dns.iter().map(dns).collect::<io::Result<_>>()?,
        })
    }

    /// In the pod's namespace, or on its first address where it shares the agent's.
    pub(crate) fn bind(enrolled: &Enrolled, netns: Option<&NetnsFd>, settings: &Settings) -> io::Result<Self> {
        Self::bind_or(enrolled, netns, settings, Taken::Fail)
    }

    /// The same where programs of the pod have some of the ports: others do as well, since it is our own programs or rules that say
    /// where connections go. Nothing if it is not.
    pub(crate) fn bind_elsewhere(enrolled: &Enrolled, netns: Option<&NetnsFd>, settings: &Settings) -> Option<io::Result<Self>> {
        (netns.is_some() && settings.zds.is_none()).then(|| Self::bind_or(enrolled, netns, settings, Taken::Any))
    }

    fn bind_or(enrolled: &Enrolled, netns: Option<&NetnsFd>, settings: &Settings, taken: Taken) -> io::Result<Self> {
        // In its own namespace the pod has all addresses to itself; on a shared loopback each pod binds its own.
        let ip = match netns {
            Some(_) if settings.ipv6 => Ipv6Addr::UNSPECIFIED.into(),
            Some(_) => Ipv4Addr::UNSPECIFIED.into(),
            None => enrolled.address.ok_or_else(|| io::Error::other("the pod has no address"))?,
        };
        let reuse_port = settings.zds.is_some() && settings.inpod_port_reuse;
        let bind = || {
            let listener = |port, transparent, mark| {
                let mut options = ListenerOptions::new(SocketAddr::new(ip, port));
                options.stream = settings.tcp.stream_options();
                if netns.is_some() {
                    options.mark = Some(mark);
                    options.transparent = transparent;
                    options.reuse_port = reuse_port;
                }
                or_elsewhere(taken, options.addr, |addr| ListenerOptions { addr, ..options.clone() }.bind())
            };
            Ok(Self {
                outbound: listener(ports::OUTBOUND, true, local_mark(settings))?,
                plain: listener(ports::INBOUND_PLAIN, true, MARK)?,
                hbone: listener(ports::HBONE, true, MARK)?,
                dns: if netns.is_some() && settings.dns_capture {
                    bind_dns(taken, reuse_port, settings.ipv6)?
                } else {
                    Vec::new()
                },
            })
        };
        match netns {
            Some(netns) => netns.run_in(bind),
            None => bind(),
        }
    }
}

/// Binds at `addr`, or at another port if that one is taken and need not be it.
fn or_elsewhere<T>(taken: Taken, addr: SocketAddr, bind: impl Fn(SocketAddr) -> io::Result<T>) -> io::Result<T> {
    match bind(addr) {
        Err(e) if taken == Taken::Any && e.kind() == io::ErrorKind::AddrInUse => bind(SocketAddr::new(addr.ip(), 0)),
        bound => bound,
    }
}

/// On the pod's loopback only: nobody outside has anything to ask here.
fn bind_dns(taken: Taken, reuse_port: bool, ipv6: bool) -> io::Result<Vec<DnsSockets>> {
    let at = |ip: IpAddr| -> io::Result<DnsSockets> {
        let addr = SocketAddr::new(ip, ports::DNS);
        let mut options = ListenerOptions::new(addr);
        options.mark = Some(MARK);
        options.reuse_port = reuse_port;
        let udp = or_elsewhere(taken, addr, |addr| bind_udp(addr, options.mark, reuse_port))?;
        let tcp = or_elsewhere(taken, addr, |addr| ListenerOptions { addr, ..options.clone() }.bind())?;
        Ok(DnsSockets { udp, tcp })
    };
    let mut sockets = vec![at(Ipv4Addr::LOCALHOST.into())?];
    if !ipv6 {
        return Ok(sockets);
    }
    match at(Ipv6Addr::LOCALHOST.into()) {
        Ok(v6) => sockets.push(v6),
        // The pod has no IPv6.
        Err(e) if matches!(e.kind(), io::ErrorKind::AddrNotAvailable | io::ErrorKind::Unsupported) => {}
        Err(e) => return Err(e),
    }
    Ok(sockets)
}
