//! What of a redirection outlives the agent: maps and links pinned in a BPF filesystem.
//!
//! One directory per pod, named by its network namespace's cookie, which the kernel gives once per boot. While an agent is
//! gone the pinned programs find no listener and drop every new connection; the next agent fills the listeners in and puts
//! its own programs in the place of the old ones, link by link, without a moment in which neither is there.
//!
//! A pod's directory holds its maps under their own names, its links as `steer_lookup`,
//! `eth_egress-<interface>`, `eth_ingress-<interface>`, and `object-<digest>` once all of them are attached: the next agent with that
//! very object need not load and replace what is there. Names in a BPF filesystem have no dots.
use std::{
    collections::HashSet,
    fs, io,
    path::{Path, PathBuf},
};

use aya::{
    maps::MapData,
    programs::{
        SchedClassifier, TcAttachType,
        links::{FdLink, PinnedLink},
    },
};
use ebpf_common::{map, program};
use nix::{
    mount::{MsFlags, mount},
    sys::statfs::statfs,
};

use crate::{
    error::{RedirectError, map_error},
    listener::NetnsCookie,
};

/// Where a BPF filesystem is by convention; one is mounted here when it is missing.
const BPFFS: &str = "/sys/fs/bpf";
const BPF_FS_MAGIC: i64 = 0xcafe_4a11;

/// A directory of pinned redirections, of one agent.
#[derive(Clone, Debug)]
pub struct PinRoot {
    dir: PathBuf,
}

impl PinRoot {
    /// Creates `dir` in a BPF filesystem. Where there is none, one is mounted: on `/sys/fs/bpf` for what lies below it, else
    /// on `dir` itself. No part of `dir` below the mount may contain a dot.
    pub fn open(dir: &Path) -> Result<Self, RedirectError> {
        let fail = |what, source| RedirectError::Pins { what, path: dir.to_owned(), source };
        let mount_point = if dir.starts_with(BPFFS) { Path::new(BPFFS) } else { dir };
        if mount_point == dir {
            fs::create_dir_all(dir).map_err(|e| fail("create", e))?;
        }
        let found = statfs(mount_point).map_err(|e| fail("inspect", e.into()))?;
        #[allow(clippy::useless_conversion, reason = "the type of the field differs between architectures")]
        let magic = i64::from(found.filesystem_type().0);
        if magic != BPF_FS_MAGIC {
            mount(
                Some("bpf"),
                mount_point,
                Some("bpf"),
                MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC,
                None::<&str>,
            )
            .map_err(|e| fail("mount a BPF filesystem for", e.into()))?;
        }
        fs::create_dir_all(dir).map_err(|e| fail("create", e))?;
        Ok(Self { dir: dir.to_owned() })
    }

    /// The directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Every pod's.
    pub(crate) fn pods(&self) -> Result<Vec<PodPins>, RedirectError> {
        let listing = fs::read_dir(&self.dir).map_err(|source| {
            let path = self.dir.clone();
            RedirectError::Pins { what: "list", path, source }
        })?;
        Ok(listing.filter_map(Result::ok).map(|entry| PodPins { dir: entry.path() }).collect())
    }

    pub(crate) fn pod(&self, netns: NetnsCookie) -> PodPins {
        PodPins { dir: self.dir.join(netns.to_string()) }
    }
}

/// The maps of a pod, by the names of their pins.
pub(crate) const MAPS: [&str; 5] = [map::SOCKS, map::CONFIG, map::TRAFFIC, map::STEER, map::SOURCES];

/// The programs of hooks, which begin the names of their links' pins.
pub(crate) const INGRESS: [&str; 3] = [program::ETH_INGRESS, program::IP_INGRESS, program::CLOSED_INGRESS];
pub(crate) const EGRESS: [&str; 3] = [program::ETH_EGRESS, program::IP_EGRESS, program::CLOSED_EGRESS];

/// Begins the name of the mark that says of which object the programs in the links are.
const OBJECT: &str = "object-";

/// Whose a pod is: a name that does not change with the agent, among names of one kind.
#[derive(Clone, Copy, Debug)]
pub struct Owner<'a> {
    /// Of letters only.
    pub kind: &'a str,
    /// Anything.
    pub name: &'a str,
}

/// Begins the name of the mark that says whose the pod is.
const OWNER: &str = "of-";

/// That mark. Agents of every version make the same of the same name (FNV-1a).
fn owner_mark(owner: Owner<'_>) -> String {
    let hash =
        owner.name.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3));
    format!("{}{hash:016x}", owner_kind(owner.kind))
}

/// What that mark begins with for owners of one kind.
fn owner_kind(kind: &str) -> String {
    format!("{OWNER}{kind}-")
}

fn is_mark(entry: &fs::DirEntry) -> bool {
    entry.file_name().to_string_lossy().starts_with(OBJECT)
}

/// Where a classifier belongs.
#[derive(Clone, Debug)]
pub(crate) struct Hook {
    /// The name of what belongs there.
    pub(crate) program: &'static str,
    /// Its link's pin.
    pub(crate) pin: String,
    pub(crate) interface: String,
    pub(crate) index: u32,
    pub(crate) direction: TcAttachType,
}

/// The pins of one pod.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct PodPins {
    dir: PathBuf,
}

impl PodPins {
    /// Makes the directory; answers whether it was there.
    pub(crate) fn create(&self) -> Result<bool, RedirectError> {
        match fs::create_dir(&self.dir) {
            Ok(()) => Ok(false),
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => Ok(true),
            Err(e) => Err(self.error("create", e)),
        }
    }

    pub(crate) fn map(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    /// The pinned link of a hook, if its program is where it belongs. (That of an interface that is gone stays, and has none.)
    pub(crate) fn link(&self, hook: &Hook) -> Option<FdLink> {
        let link = FdLink::from(PinnedLink::from_pin(self.dir.join(&hook.pin)).ok()?);
        let program = link.info().ok()?.program_id();
        let (_, there) = SchedClassifier::query_tcx(&hook.interface, hook.direction).ok()?;
        there.iter().any(|at| at.id() == program).then_some(link)
    }

    /// Whether every link is of the object `digest` and its program is where it belongs. What cannot be told is not so.
    pub(crate) fn are_whole(&self, digest: &str, hooks: &[Hook]) -> bool {
        let there = |name: &str| self.dir.join(name).exists();
        there(&format!("{OBJECT}{digest}"))
            && there(program::STEER_LOOKUP)
            && MAPS.into_iter().all(there)
            && hooks.iter().all(|hook| self.link(hook).is_some())
    }

    /// Says that every link is of the object `digest`. (A BPF filesystem holds nothing but maps, links and programs.)
    pub(crate) fn mark(&self, digest: &str) -> Result<(), RedirectError> {
        let config = MapData::from_pin(self.map(map::CONFIG)).map_err(|e| map_error(map::CONFIG, e))?;
        config.pin(self.dir.join(format!("{OBJECT}{digest}"))).map_err(|e| self.error("pin in", io::Error::other(e)))
    }

    /// Says whose the pod is.
    pub(crate) fn own(&self, owner: Owner<'_>) -> Result<(), RedirectError> {
        let mark = self.dir.join(owner_mark(owner));
        if mark.exists() {
            return Ok(());
        }
        let listing = fs::read_dir(&self.dir).map_err(|e| self.error("list", e))?;
        for entry in listing.filter_map(Result::ok).filter(|entry| entry.file_name().to_string_lossy().starts_with(OWNER)) {
            match fs::remove_file(entry.path()) {
                // Two agents may do so at a time.
                Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(self.error("remove from", e)),
                _ => {}
            }
        }
        let config = MapData::from_pin(self.map(map::CONFIG)).map_err(|e| map_error(map::CONFIG, e))?;
        match config.pin(&mark) {
            Err(e) if !mark.exists() => Err(self.error("pin in", io::Error::other(e))),
            _ => Ok(()),
        }
    }

    /// Whether it is known whose the pod is, an owner's of this kind, and that it is none of these. What cannot be told is not so.
    pub(crate) fn is_of_others(&self, kind: &str, names: &[&str]) -> bool {
        let marks: HashSet<String> = names.iter().map(|name| owner_mark(Owner { kind, name })).collect();
        let Ok(listing) = fs::read_dir(&self.dir) else { return false };
        let there: io::Result<Vec<_>> = listing.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned())).collect();
        let (kind, there) = (owner_kind(kind), there.unwrap_or_default());
        there.iter().any(|name| name.starts_with(&kind)) && !there.iter().any(|name| marks.contains(name))
    }

    /// Says so no longer, of any object.
    pub(crate) fn unmark(&self) -> Result<(), RedirectError> {
        let listing = fs::read_dir(&self.dir).map_err(|e| self.error("list", e))?;
        let mut marks = listing.filter_map(Result::ok).filter(is_mark);
        marks.try_for_each(|entry| fs::remove_file(entry.path())).map_err(|e| self.error("remove from", e))
    }

    /// Pins `link` as `name`, in the place of what is there.
    pub(crate) fn pin(&self, link: FdLink, name: &str) -> Result<FdLink, RedirectError> {
        let (path, new) = (self.dir.join(name), self.dir.join(format!("{name}-new")));
        // From an agent that died between the two steps below.
        let _ = fs::remove_file(&new);
        let pinned = link.pin(&new).map_err(|e| self.error("pin a link in", io::Error::other(e)))?;
        fs::rename(new, path).map_err(|e| self.error("pin a link in", e))?;
        Ok(pinned.into())
    }

    /// Removes what is neither of these hooks nor of the pod as such: hooks of interfaces that are gone, and what agents of other
    /// versions had.
    pub(crate) fn keep_only(&self, hooks: &[Hook]) -> Result<(), RedirectError> {
        let listing = fs::read_dir(&self.dir).map_err(|e| self.error("list", e))?;
        for entry in listing.filter_map(Result::ok) {
            let name = entry.file_name();
            let known = hooks.iter().any(|hook| name == *hook.pin) || MAPS.iter().any(|map| name == **map);
            let known = known || name.to_string_lossy().starts_with(OWNER);
            if !known && name != program::STEER_LOOKUP {
                fs::remove_file(entry.path()).map_err(|e| self.error("remove from", e))?;
            }
        }
        Ok(())
    }

    /// Whether there is the link of a hook, of whatever interface.
    pub(crate) fn has_places(&self) -> bool {
        let is_place = |entry: io::Result<fs::DirEntry>| {
            let of = |name: &str| INGRESS.iter().chain(&EGRESS).any(|program| name.starts_with(program));
            entry.is_ok_and(|entry| of(&entry.file_name().to_string_lossy()))
        };
        fs::read_dir(&self.dir).is_ok_and(|mut listing| listing.any(is_place))
    }

    /// Whether it is said of which object the links are.
    pub(crate) fn is_marked(&self) -> bool {
        fs::read_dir(&self.dir).is_ok_and(|mut listing| listing.any(|entry| entry.is_ok_and(|entry| is_mark(&entry))))
    }

    /// Detaches and removes everything, in the order of [`crate::attach`]. What is no longer there is as it should be.
    pub(crate) fn remove(&self) -> Result<(), RedirectError> {
        let listing = match fs::read_dir(&self.dir) {
            Ok(listing) => listing,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(e) => return Err(self.error("list", e)),
        };
        let mut names: Vec<_> = listing.filter_map(Result::ok).map(|entry| entry.file_name()).collect();
        let order: [&[&str]; 3] = [&EGRESS, &INGRESS, &[program::STEER_LOOKUP]];
        names.sort_by_key(|name| {
            let name = name.to_string_lossy();
            order.iter().position(|programs| programs.iter().any(|program| name.starts_with(program))).unwrap_or(order.len())
        });
        for name in names {
            fs::remove_file(self.dir.join(name)).map_err(|e| self.error("remove", e))?;
        }
        fs::remove_dir(&self.dir).map_err(|e| self.error("remove", e))
    }

    fn error(&self, what: &'static str, source: io::Error) -> RedirectError {
        RedirectError::Pins { what, path: self.dir.clone(), source }
    }
}
