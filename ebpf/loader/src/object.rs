//! The compiled programs, and one loaded instance of them: its maps and its not yet attached programs.
//!
//! Every pod has an instance of its own, so that its maps say nothing about other pods and vanish with it.
use std::{
    collections::{BTreeSet, HashMap},
    fmt,
    hash::{DefaultHasher, Hasher as _},
    io,
    net::{IpAddr, Ipv4Addr},
    os::fd::{AsFd as _, AsRawFd as _},
    sync::{Arc, LazyLock, Mutex, PoisonError},
};

use aya::{
    Ebpf, EbpfLoader,
    maps::{Array, LpmTrie, Map, MapData, MapError, SockMap, lpm_trie::Key},
    programs::{Program, ProgramError, SchedClassifier, SkLookup},
    util::nr_cpus,
};
use ebpf_common::{ASK, COUNTERS, Config, Counter, DENIED, Tally, map, program, source_bits};

use crate::{
    error::{RedirectError, map_error, program_error},
    pins::{EGRESS, Hook, INGRESS, MAPS, PodPins},
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
    pub(crate) traffic: Arc<Traffic>,
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
            traffic: Arc::new(Traffic::of(MapData::from_pin(pins.map(map::TRAFFIC)).map_err(|e| map_error(map::TRAFFIC, e))?)?),
        })
    }

    pub(crate) fn set_config(&mut self, config: Config) -> Result<(), RedirectError> {
        self.config.set(0, ConfigValue(config), 0).map_err(|e| map_error(map::CONFIG, e))
    }

    /// Has programs that nobody will serve again pass everything.
    pub(crate) fn let_go(&mut self) -> Result<(), RedirectError> {
        self.set_sources(&[])?;
        let ConfigValue(now) = self.config.get(&0, 0).map_err(|e| map_error(map::CONFIG, e))?;
        self.set_config(
            now.with_fail_open(true)
                .with_reset_existing(false)
                .with_refuse_udp(false)
                .with_refuse_exotic(false)
                .with_capture_dns(false),
        )
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
pub struct Traffic {
    map: MapData,
    cpus: usize,
}

impl fmt::Debug for Traffic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Traffic").finish_non_exhaustive()
    }
}

impl Traffic {
    fn of(map: MapData) -> Result<Self, RedirectError> {
        let cpus = nr_cpus().map_err(|(_, e)| map_error(map::TRAFFIC, MapError::IoError(e)))?;
        Ok(Self { map, cpus })
    }

    /// Every counter by name, with what all processors counted; see [`ebpf_common::Counter`]. One system call.
    pub fn read(&self) -> Result<Vec<(&'static str, Tally)>, RedirectError> {
        let values = self.values().map_err(|e| map_error(map::TRAFFIC, MapError::IoError(e)))?;
        let each = values.chunks_exact(self.cpus.max(1));
        let sum = |of: &[Tally]| {
            of.iter()
                .fold(Tally::default(), |sum, one| Tally { packets: sum.packets + one.packets, bytes: sum.bytes + one.bytes })
        };
        Ok(Counter::ALL.iter().zip(each).map(|(counter, of)| (counter.name(), sum(of))).collect())
    }

    /// All values, those of one counter after another.
    #[expect(unsafe_code, reason = "aya reads one value a call, which a node full of pods makes ten thousand calls a scrape of")]
    fn values(&self) -> io::Result<Vec<Tally>> {
        const BPF_MAP_LOOKUP_BATCH: libc::c_long = 24;
        /// The part of `union bpf_attr` (`linux/bpf.h`) for operations on several elements.
        #[repr(C)]
        struct Batch {
            in_batch: u64,
            out_batch: u64,
            keys: u64,
            values: u64,
            count: u32,
            map_fd: u32,
            elem_flags: u64,
            flags: u64,
        }
        let (mut keys, mut last) = ([0u32; COUNTERS as usize], 0u32);
        let mut values = vec![Tally::default(); COUNTERS as usize * self.cpus];
        let mut batch = Batch {
            in_batch: 0,
            out_batch: (&raw mut last) as u64,
            keys: keys.as_mut_ptr() as u64,
            values: values.as_mut_ptr() as u64,
            count: COUNTERS,
            map_fd: self.map.fd().as_fd().as_raw_fd().cast_unsigned(),
            elem_flags: 0,
            flags: 0,
        };
        // SAFETY: all four addresses are of memory that outlives the call, with room for `count` keys and for as many values of every
        // possible processor, each a multiple of eight bytes long; any bytes are a `Tally`.
        let failed = unsafe { libc::syscall(libc::SYS_bpf, BPF_MAP_LOOKUP_BATCH, &raw mut batch, size_of::<Batch>()) };
        if failed != 0 { Err(io::Error::last_os_error()) } else { Ok(values) }
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
                for name in MAPS {
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
            traffic: match ebpf.take_map(map::TRAFFIC) {
                Some(Map::PerCpuArray(traffic)) => Arc::new(Traffic::of(traffic)?),
                _ => return Err(RedirectError::Incomplete(map::TRAFFIC)),
            },
        };
        Ok((Self { ebpf }, maps))
    }

    /// Its programs, not yet loaded.
    pub(crate) fn programs(&mut self) -> Result<Programs<'_>, RedirectError> {
        fn of<'a, T>(all: &mut HashMap<&str, &'a mut Program>, name: &'static str) -> Result<T, RedirectError>
        where
            T: TryFrom<&'a mut Program, Error = ProgramError>,
        {
            all.remove(name).ok_or(RedirectError::Incomplete(name))?.try_into().map_err(program_error(name))
        }
        let mut all: HashMap<&str, &mut Program> = self.ebpf.programs_mut().collect();
        let steer_lookup = of(&mut all, program::STEER_LOOKUP)?;
        let classifiers = EGRESS
            .into_iter()
            .chain(INGRESS)
            .map(|name| Ok((name, of(&mut all, name)?)))
            .collect::<Result<_, RedirectError>>()?;
        Ok(Programs { steer_lookup, classifiers: Classifiers(classifiers) })
    }
}

/// The programs of an instance, by where they belong. Loading one is the verifier's work: some milliseconds.
pub(crate) struct Programs<'a> {
    pub(crate) steer_lookup: &'a mut SkLookup,
    pub(crate) classifiers: Classifiers<'a>,
}

/// Those of the hooks of interfaces, by name.
pub(crate) struct Classifiers<'a>(HashMap<&'static str, &'a mut SchedClassifier>);

impl Classifiers<'_> {
    /// The program of a hook.
    pub(crate) fn of(&mut self, hook: &Hook) -> Result<&mut SchedClassifier, RedirectError> {
        self.0.get_mut(hook.program).map(|program| &mut **program).ok_or(RedirectError::Incomplete(hook.program))
    }

    /// Has the verifier look at those that these hooks have.
    pub(crate) fn verify(&mut self, hooks: &[Hook]) -> Result<(), RedirectError> {
        let names: BTreeSet<&'static str> = hooks.iter().map(|hook| hook.program).collect();
        for hook in names.iter().filter_map(|name| hooks.iter().find(|hook| hook.program == *name)) {
            self.of(hook)?.load().map_err(program_error(hook.program))?;
        }
        Ok(())
    }
}

/// The program that passes everything, loaded once for all pods: it has no maps. One caller at a time has it, which costs nobody
/// anything: what it is wanted for is done under a lock of the kernel's.
pub(crate) fn with_idle<T>(work: impl FnOnce(&mut SchedClassifier) -> Result<T, RedirectError>) -> Result<T, RedirectError> {
    static KEPT: Mutex<Option<Ebpf>> = Mutex::new(None);
    fn of(ebpf: &mut Ebpf) -> Result<&mut SchedClassifier, RedirectError> {
        let idle = ebpf.program_mut(program::IDLE).ok_or(RedirectError::Incomplete(program::IDLE))?;
        idle.try_into().map_err(program_error(program::IDLE))
    }
    let mut kept = KEPT.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(ebpf) = &mut *kept {
        return work(of(ebpf)?);
    }
    let (Instance { mut ebpf }, _) = Instance::load(None)?;
    of(&mut ebpf)?.load().map_err(program_error(program::IDLE))?;
    work(of(kept.insert(ebpf))?)
}

fn take<T: TryFrom<Map, Error = MapError>>(ebpf: &mut Ebpf, name: &'static str) -> Result<T, RedirectError> {
    ebpf.take_map(name).ok_or(RedirectError::Incomplete(name))?.try_into().map_err(|e| map_error(name, e))
}
