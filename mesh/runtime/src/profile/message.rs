//! The format of profiles (`profile.proto` of google/pprof), and the names of the addresses in them.
//!
//! Owns the tables of a profile. Names come from the program's own symbols and line tables, which are read for the profile only
//! and given back. Upstream: [`super`].

use std::collections::HashMap;
use std::ffi::c_void;
use std::time::{Duration, SystemTime};

use prost::Message;

/// What is counted.
#[derive(Clone, Copy, Debug)]
pub struct Kind {
    pub name: &'static str,
    pub unit: &'static str,
}

/// A profile being filled.
pub struct Profile {
    wire: wire::Profile,
    texts: HashMap<String, i64>,
    functions: HashMap<(i64, i64), u64>,
    locations: HashMap<usize, u64>,
}

impl Profile {
    pub fn new<const N: usize>(kinds: [Kind; N], period_kind: Kind, period: u64) -> Self {
        let mut this =
            Self { wire: wire::Profile::default(), texts: HashMap::new(), functions: HashMap::new(), locations: HashMap::new() };
        // The first text must be empty.
        this.text("");
        this.wire.sample_type = kinds.map(|kind| this.kind(kind)).into();
        this.wire.period_type = Some(this.kind(period_kind));
        this.wire.period = period as i64;
        this
    }

    /// When it began, and how long it took.
    pub fn lasted(&mut self, begin: SystemTime, took: Duration) {
        let since = begin.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        self.wire.time_nanos = since.as_nanos() as i64;
        self.wire.duration_nanos = took.as_nanos() as i64;
    }

    /// Adds stacks (innermost first) with their counts.
    pub fn add<const N: usize>(&mut self, stacks: impl IntoIterator<Item = (Box<[usize]>, [u64; N])>) {
        for (stack, counts) in stacks {
            let location_id = stack.iter().map(|at| self.location(*at)).collect();
            self.wire.sample.push(wire::Sample { location_id, value: counts.map(|count| count as i64).into() });
        }
        backtrace::clear_symbol_cache();
    }

    pub fn encode(self) -> Vec<u8> {
        self.wire.encode_to_vec()
    }

    fn kind(&mut self, kind: Kind) -> wire::ValueType {
        wire::ValueType { r#type: self.text(kind.name), unit: self.text(kind.unit) }
    }

    fn text(&mut self, text: &str) -> i64 {
        if let Some(known) = self.texts.get(text) {
            return *known;
        }
        let new = self.wire.string_table.len() as i64;
        self.wire.string_table.push(text.to_owned());
        self.texts.insert(text.to_owned(), new);
        new
    }

    fn function(&mut self, name: &str, file: &str) -> u64 {
        let (name, filename) = (self.text(name), self.text(file));
        let new = self.wire.function.len() as u64 + 1;
        *self.functions.entry((name, filename)).or_insert_with(|| {
            self.wire.function.push(wire::Function { id: new, name, system_name: name, filename });
            new
        })
    }

    fn location(&mut self, at: usize) -> u64 {
        if let Some(known) = self.locations.get(&at) {
            return *known;
        }
        let mut line = Vec::new();
        // Several where functions were inlined, innermost first, which is how the format wants them.
        backtrace::resolve(at as *mut c_void, |symbol| {
            // Without the hash that the compiler appends.
            let name = symbol.name().map_or_else(|| format!("{at:#x}"), |name| format!("{name:#}"));
            let file = symbol.filename().map(|file| file.to_string_lossy().into_owned()).unwrap_or_default();
            let function_id = self.function(&name, &file);
            line.push(wire::Line { function_id, line: symbol.lineno().unwrap_or_default().into() });
        });
        let id = self.wire.location.len() as u64 + 1;
        self.wire.location.push(wire::Location { id, address: at as u64, line });
        self.locations.insert(at, id);
        id
    }
}

/// The messages, as far as they are used.
pub mod wire {
    #[derive(Clone, PartialEq, prost::Message)]
    pub struct Profile {
        #[prost(message, repeated, tag = "1")]
        pub sample_type: Vec<ValueType>,
        #[prost(message, repeated, tag = "2")]
        pub sample: Vec<Sample>,
        #[prost(message, repeated, tag = "4")]
        pub location: Vec<Location>,
        #[prost(message, repeated, tag = "5")]
        pub function: Vec<Function>,
        #[prost(string, repeated, tag = "6")]
        pub string_table: Vec<String>,
        #[prost(int64, tag = "9")]
        pub time_nanos: i64,
        #[prost(int64, tag = "10")]
        pub duration_nanos: i64,
        #[prost(message, optional, tag = "11")]
        pub period_type: Option<ValueType>,
        #[prost(int64, tag = "12")]
        pub period: i64,
    }
    #[derive(Clone, Copy, PartialEq, prost::Message)]
    pub struct ValueType {
        #[prost(int64, tag = "1")]
        pub r#type: i64,
        #[prost(int64, tag = "2")]
        pub unit: i64,
    }
    #[derive(Clone, PartialEq, prost::Message)]
    pub struct Sample {
        #[prost(uint64, repeated, tag = "1")]
        pub location_id: Vec<u64>,
        #[prost(int64, repeated, tag = "2")]
        pub value: Vec<i64>,
    }
    #[derive(Clone, PartialEq, prost::Message)]
    pub struct Location {
        #[prost(uint64, tag = "1")]
        pub id: u64,
        #[prost(uint64, tag = "3")]
        pub address: u64,
        #[prost(message, repeated, tag = "4")]
        pub line: Vec<Line>,
    }
    #[derive(Clone, Copy, PartialEq, prost::Message)]
    pub struct Line {
        #[prost(uint64, tag = "1")]
        pub function_id: u64,
        #[prost(int64, tag = "2")]
        pub line: i64,
    }
    #[derive(Clone, Copy, PartialEq, prost::Message)]
    pub struct Function {
        #[prost(uint64, tag = "1")]
        pub id: u64,
        #[prost(int64, tag = "2")]
        pub name: i64,
        #[prost(int64, tag = "3")]
        pub system_name: i64,
        #[prost(int64, tag = "4")]
        pub filename: i64,
    }
}
