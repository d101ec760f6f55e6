//! What can go wrong, said so that an operator knows where to look.
use std::{io, path::PathBuf};

use thiserror::Error;

pub(crate) fn map_error(name: &'static str, source: aya::maps::MapError) -> RedirectError {
    RedirectError::Map { name, source: Box::new(source) }
}

pub(crate) fn program_error(name: &'static str) -> impl Fn(aya::programs::ProgramError) -> RedirectError {
    move |source| RedirectError::Program { name, source: Box::new(source) }
}

/// Why a pod's traffic could not be redirected, or the redirection not be changed or removed.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum RedirectError {
    /// The pod's network namespace could not be entered.
    #[error("cannot enter the pod's network namespace (CAP_SYS_ADMIN is needed): {0}")]
    Namespace(#[source] io::Error),
    /// The namespace has no interface to capture on.
    #[error("the pod has no Ethernet interface besides lo")]
    NoInterface,
    /// A named interface does not exist in the namespace.
    #[error("the pod has no interface named {0}")]
    UnknownInterface(String),
    /// An interface's frames begin with neither an Ethernet header nor IP's, so the programs cannot read them.
    #[error(
        "interface {name} of the pod has link type {kind}, neither Ethernet nor a tunnel of IP; traffic through it could not be captured"
    )]
    UnsupportedInterface {
        /// The interface's name.
        name: String,
        /// Its `ARPHRD_*` number.
        kind: u16,
    },
    /// The loopback interface is down; nothing can be handed to the agent through it.
    #[error("lo is down in the pod's network namespace")]
    LoopbackDown,
    /// A listening socket breaks the contract in the crate's documentation.
    #[error("the {which} listener {fault}")]
    Listener {
        /// `outbound` or `inbound`.
        which: &'static str,
        /// What is wrong with it.
        fault: ListenerFault,
    },
    /// A routing rule, route or interface setting could not be read, made or removed.
    #[error("cannot {what}: {source}")]
    Netlink {
        /// What was tried.
        what: &'static str,
        /// The kernel's answer.
        source: io::Error,
    },
    /// The kernel refused the object's maps.
    #[error("cannot load the redirection object: {0}")]
    Object(#[from] Box<aya::EbpfError>),
    /// The kernel refused a program, or to attach it.
    #[error("cannot load or attach program {name}: {source}")]
    Program {
        /// The program.
        name: &'static str,
        /// The kernel's answer, with the verifier's log where there is one.
        source: Box<aya::programs::ProgramError>,
    },
    /// A map could not be read or written.
    #[error("cannot use map {name}: {source}")]
    Map {
        /// The map.
        name: &'static str,
        /// The kernel's answer.
        source: Box<aya::maps::MapError>,
    },
    /// What should outlive the agent could not be kept in a BPF filesystem.
    #[error("cannot {what} {path}: {source}")]
    Pins {
        /// What was tried.
        what: &'static str,
        /// The directory.
        path: PathBuf,
        /// The kernel's answer.
        source: io::Error,
    },
    /// The object does not have what this build expects; it was built from other sources.
    #[error("the redirection object has no {0}; rebuild it with `cargo xtask ebpf`")]
    Incomplete(&'static str),
}

/// How a listener breaks the contract.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum ListenerFault {
    /// It could not be asked.
    #[error("cannot be inspected: {0}")]
    Unreadable(#[source] io::Error),
    /// It is not a TCP socket of family `AF_INET6`.
    #[error("is not an IPv6 TCP socket")]
    NotTcp6,
    /// It accepts IPv6 only.
    #[error("has IPV6_V6ONLY set, so IPv4 could not be captured")]
    V6Only,
    /// It does not listen.
    #[error("is not listening")]
    NotListening,
    /// Its connections would be captured again.
    #[error("does not carry the mark it must (SO_MARK 0x539; only what accepts the pod's dials may have 0x53b)")]
    Unmarked,
    /// It could not answer from foreign addresses.
    #[error("is not transparent (IP_TRANSPARENT)")]
    NotTransparent,
    /// The kernel would choose within the group.
    #[error("has SO_REUSEPORT set, which would override the redirection's choice of socket")]
    ReusePort,
    /// It belongs to another namespace, so the kernel would refuse every connection.
    #[error("is not in the pod's network namespace")]
    ForeignNamespace,
}

/// What this machine lacks for the redirection.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum Unsupported {
    /// Programs attach through tcx links, which came with Linux 6.6.
    #[error("the kernel is {release}; redirection needs Linux 6.6 or newer (tcx links)")]
    Kernel {
        /// `uname -r`.
        release: String,
    },
    /// A capability is missing from the effective set.
    #[error("the process lacks {0}")]
    Capability(&'static str),
    /// A step failed in a scratch namespace.
    #[error("redirection does not work on this machine: {0}")]
    Trial(#[from] RedirectError),
}
