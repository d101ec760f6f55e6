//! The compiled programs, and one loaded instance of them: its maps and its not yet attached programs.
//!
//! Every pod has an instance of its own, so that its maps say nothing about other pods and vanish with it.
use std::{
    fmt,
    sync::{Arc, LazyLock, Mutex, PoisonError},
};

use aya::{
    Ebpf, EbpfLoader,
    maps::{Array, Map, MapData, MapError, PerCpuArray, SockMap},
    programs::{Program, ProgramError, SchedClassifier, SkLookup},
};
use ebpf_common::{Config, Counter, map};

use crate::{error::RedirectError, pins::PodPins};

static OBJECT: &[u8] = aya::include_bytes_aligned!("../obj/redirect.bpf.o");

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
    pub(crate) counters: Arc<PacketCounters>,
}

impl fmt::Debug for Maps {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Maps").finish_non_exhaustive()
    }
}

impl Maps {
    pub(crate) fn set_config(&mut self, config: Config) -> Result<(), RedirectError> {
        self.config.set(0, ConfigValue(config), 0).map_err(|e| map_error(map::CONFIG, e))
    }
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

pub(crate) fn map_error(name: &'static str, source: MapError) -> RedirectError {
    RedirectError::Map { name, source: Box::new(source) }
}

pub(crate) fn program_error(name: &'static str) -> impl Fn(ProgramError) -> RedirectError {
    move |source| RedirectError::Program { name, source: Box::new(source) }
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
                for name in [map::SOCKS, map::CONFIG, map::COUNTERS, map::STEER] {
                    loader.map_pin_path(name, pins.map(name));
                }
                loader.load(OBJECT)
            }
        }
        .map_err(Box::new)?;
        let maps = Maps {
            socks: take(&mut ebpf, map::SOCKS)?,
            config: take(&mut ebpf, map::CONFIG)?,
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
