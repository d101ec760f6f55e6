//! The compiled programs, and one loaded instance of them: its maps and its not yet attached programs.
//!
//! Every pod has an instance of its own, so that its maps say nothing about other pods and vanish with it.
use std::{
    collections::HashMap,
    fmt,
    hash::{DefaultHasher, Hasher as _},
    net::{IpAddr, Ipv4Addr},
    sync::{Arc, LazyLock, Mutex, PoisonError},
};

use aya::{
    Ebpf, EbpfLoader,
    maps::{Array, LpmTrie, Map, MapData, MapError, PerCpuArray, SockMap, lpm_trie::Key},
    programs::{Program, SchedClassifier, SkLookup},
};
use ebpf_common::{ASK, Config, Counter, DENIED, map, source_bits};

use crate::{
    error::{RedirectError, map_error, program_error},
    pins::PodPins,
};

static OBJECT: &[u8] = aya::include_bytes_aligned!("../obj/redirect.bpf.o");

/// What this object is told from others by.
pub(crate) fn digest() -> &'static str {
    static DIGEST: LazyLock<String> = LazyLock::new(|| {
        let mut hasher = DefaultHasher::new();
        hasher.write(OBJECT);
        format!("{:016x}", hasher.finish())
    });
    &DIGEST
}

// A new loader parses the kernel's type information, tens of milliseconds of work that these programs do not need.
static LOADER: LazyLock<Mutex<EbpfLoader<'static>>> = LazyLock::new(loader);
// A loader never forgets a path that it was given.
static PINNING_LOADER: LazyLock<Mutex<EbpfLoader<'static>>> = LazyLock::new(loader);

fn loader() -> Mutex<EbpfLoader<'static>> {
    let mut loader = EbpfLoader::new();
    loader.btf(None);
    Mutex::new(loader)
}

#[derive(Clone, Copy)]
#[repr(transparent)]
struct ConfigValue(Config);

#[expect(unsafe_code, reason = "aya asks for a promise about the value's bytes")]
// SAFETY: `Config` is `repr(C)` of plain integers without padding, asserted where it is defined.
unsafe impl aya::Pod for ConfigValue {}

/// The maps an agent talks to.
pub(crate) struct Maps {
    pub(crate) socks: SockMap<MapData>,
    config: Array<MapData, ConfigValue>,
    sources: LpmTrie<MapData, [u8; 16], u32>,
    pub(crate) counters: Arc<PacketCounters>,
}

impl fmt::Debug for Maps {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Maps").finish_non_exhaustive()
    }
}

impl Maps {
    /// Those an earlier agent made for a pod.
    pub(crate) fn pinned(pins: &PodPins) -> Result<Self, RedirectError> {
        fn open<T: TryFrom<Map, Error = MapError>>(pins: &PodPins, name: &'static str) -> Result<T, RedirectError> {
            let opened = MapData::from_pin(pins.map(name)).and_then(Map::from_map_data).and_then(T::try_from);
            opened.map_err(|e| map_error(name, e))
        }
        Ok(Self {
            socks: open(pins, map::SOCKS)?,
            config: open(pins, map::CONFIG)?,
            sources: open(pins, map::SOURCES)?,
            counters: Arc::new(PacketCounters(open(pins, map::COUNTERS)?)),
        })
    }

    pub(crate) fn set_config(&mut self, config: Config) -> Result<(), RedirectError> {
        self.config.set(0, ConfigValue(config), 0).map_err(|e| map_error(map::CONFIG, e))
    }

    /// Makes the map say these, from whatever it said. On the way it denies nothing that neither says.
    pub(crate) fn set_sources(&mut self, wanted: &[Source]) -> Result<(), RedirectError> {
        let fail = |e| map_error(map::SOURCES, e);
        let wanted = entries(wanted);
        let there = self.sources.iter().map(|entry| entry.map(|(key, verdict)| ((key.prefix_len(), key.data()), verdict)));
        let there: Entries = there.collect::<Result<_, _>>().map_err(fail)?;
        // Those of `these` with this verdict that are not in `others` like that, or not at all.
        let only = |these: &Entries, others: &Entries, verdict, known: fn(Option<&u32>, u32) -> bool| {
            let of = these.iter().filter(|(at, found)| **found == verdict && !known(others.get(*at), verdict));
            of.map(|((bits, data), _)| Key::new(*bits, *data)).collect::<Vec<_>>()
        };
        let gone = |verdict| only(&there, &wanted, verdict, |other, _| other.is_some());
        let new = |verdict| only(&wanted, &there, verdict, |other, verdict| other == Some(&verdict));
        // First what stops denying, then the exceptions that come and those that go, last what begins to deny.
        gone(DENIED).iter().try_for_each(|key| self.sources.remove(key)).map_err(fail)?;
        new(ASK).iter().try_for_each(|key| self.sources.insert(key, ASK, 0)).map_err(fail)?;
        gone(ASK).iter().try_for_each(|key| self.sources.remove(key)).map_err(fail)?;
        new(DENIED).iter().try_for_each(|key| self.sources.insert(key, DENIED, 0)).map_err(fail)
    }
}

/// Entries of the trie of sources, by length and address.
type Entries = HashMap<(u32, [u8; 16]), u32>;

/// Addresses of both families in one trie, in which IPv4 lies within IPv6: what is said of an IPv6 prefix is not said of those.
fn entries(wanted: &[Source]) -> Entries {
    let within_ipv4 = |s: &&Source| matches!(s.address, IpAddr::V6(v6) if s.prefix_len >= 96 && v6.to_ipv4_mapped().is_some());
    let entry = |s: &Source| {
        let bits = u32::from(s.prefix_len) + if s.address.is_ipv4() { 96 } else { 0 };
        ((bits, source_bits(s.address)), if s.denied { DENIED } else { ASK })
    };
    let mut entries: Entries = wanted.iter().filter(|s| !within_ipv4(s)).map(entry).collect();
    if !entries.is_empty() {
        entries.entry((96, source_bits(Ipv4Addr::UNSPECIFIED.into()))).or_insert(ASK);
    }
    entries
}

/// Where connections come from, and whether those are dropped before anybody looks at them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Source {
    /// The prefix's address.
    pub address: IpAddr,
    /// Its length in bits, as of the address's own family.
    pub prefix_len: u8,
    /// `false`: the agent decides, although a shorter prefix is denied.
    pub denied: bool,
}

/// What the programs of one pod count; stays readable when the redirection is gone.
pub struct PacketCounters(PerCpuArray<MapData, u64>);

impl fmt::Debug for PacketCounters {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PacketCounters").finish_non_exhaustive()
    }
}

impl PacketCounters {
    /// Every counter by name; see [`ebpf_common::Counter`]. One system call each.
    pub fn read(&self) -> Result<Vec<(&'static str, u64)>, RedirectError> {
        Counter::ALL
            .iter()
            .map(|counter| {
                let values = self.0.get(&(*counter as u32), 0).map_err(|e| map_error(map::COUNTERS, e))?;
                Ok((counter.name(), values.iter().sum()))
            })
            .collect()
    }
}

/// A loaded instance. Its programs live on through their links after it is dropped.
pub(crate) struct Instance {
    ebpf: Ebpf,
}

impl Instance {
    /// Creates the maps; with `pins`, in the pod's directory, or takes those that are there.
    pub(crate) fn load(pins: Option<&PodPins>) -> Result<(Self, Maps), RedirectError> {
        let lock = |loader: &'static LazyLock<Mutex<_>>| loader.lock().unwrap_or_else(PoisonError::into_inner);
        let mut ebpf = match pins {
            None => lock(&LOADER).load(OBJECT),
            Some(pins) => {
                let mut loader = lock(&PINNING_LOADER);
                for name in [map::SOCKS, map::CONFIG, map::COUNTERS, map::STEER, map::SOURCES] {
                    loader.map_pin_path(name, pins.map(name));
                }
                loader.load(OBJECT)
            }
        }
        .map_err(Box::new)?;
        let maps = Maps {
            socks: take(&mut ebpf, map::SOCKS)?,
            config: take(&mut ebpf, map::CONFIG)?,
            sources: take(&mut ebpf, map::SOURCES)?,
            counters: Arc::new(PacketCounters(take(&mut ebpf, map::COUNTERS)?)),
        };
        Ok((Self { ebpf }, maps))
    }

    /// A classifier, verified and ready to attach.
    pub(crate) fn classifier(&mut self, name: &'static str) -> Result<&mut SchedClassifier, RedirectError> {
        let program: &mut SchedClassifier = self.program(name)?.try_into().map_err(program_error(name))?;
        program.load().map_err(program_error(name))?;
        Ok(program)
    }

    /// A socket lookup program, verified and ready to attach.
    pub(crate) fn sk_lookup(&mut self, name: &'static str) -> Result<&mut SkLookup, RedirectError> {
        let program: &mut SkLookup = self.program(name)?.try_into().map_err(program_error(name))?;
        program.load().map_err(program_error(name))?;
        Ok(program)
    }

    fn program(&mut self, name: &'static str) -> Result<&mut Program, RedirectError> {
        self.ebpf.program_mut(name).ok_or(RedirectError::Incomplete(name))
    }
}

fn take<T: TryFrom<Map, Error = MapError>>(ebpf: &mut Ebpf, name: &'static str) -> Result<T, RedirectError> {
    ebpf.take_map(name).ok_or(RedirectError::Incomplete(name))?.try_into().map_err(|e| map_error(name, e))
}
