//! Levels per scope, as `RUST_LOG` and `POST /logging` write them: `info,xds=debug,hickory_server=off`.

use std::collections::BTreeMap;
use std::fmt;

use tracing::level_filters::LevelFilter;
use tracing_subscriber::filter::Targets;

/// A text that is no list of levels.
#[derive(Clone, Debug, thiserror::Error, PartialEq, Eq)]
#[error("Invalid level provided: {0:?}")]
pub struct BadLevel(String);

/// A global level and exceptions by scope.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Directives {
    global: LevelFilter,
    scopes: BTreeMap<String, LevelFilter>,
}

impl Default for Directives {
    /// `info`.
    fn default() -> Self {
        Self { global: LevelFilter::INFO, scopes: BTreeMap::new() }
    }
}

impl Directives {
    /// Reads directives; the global level is `info` unless the text says otherwise.
    pub fn parse(text: &str) -> Result<Self, BadLevel> {
        Self::default().with(text)
    }

    /// These directives with those of `text` laid over them: `level`, `scope=level`, or `scope` alone for everything.
    pub fn with(&self, text: &str) -> Result<Self, BadLevel> {
        let bad = || BadLevel(text.to_owned());
        let mut next = self.clone();
        let mut any = false;
        for directive in text.split(',').map(str::trim).filter(|directive| !directive.is_empty()) {
            any = true;
            match directive.split_once('=') {
                Some((scope, level)) if is_scope(scope.trim()) => {
                    next.scopes.insert(scope.trim().to_owned(), level_of(level.trim()).ok_or_else(bad)?);
                }
                Some(_) => return Err(bad()),
                None => match level_of(directive) {
                    Some(level) => next.global = level,
                    // A bare scope must at least look like one of several words, else "inof" would be a scope.
                    None if directive.contains("::") && is_scope(directive) => {
                        next.scopes.insert(directive.to_owned(), LevelFilter::TRACE);
                    }
                    None => return Err(bad()),
                },
            }
        }
        if any { Ok(next) } else { Err(bad()) }
    }

    /// The level of a scope: the longest matching prefix, else the global level.
    pub fn level_of(&self, scope: &str) -> LevelFilter {
        let within = |outer: &str| scope.strip_prefix(outer).is_some_and(|rest| rest.is_empty() || rest.starts_with("::"));
        (self.scopes.iter().filter(|(outer, _)| within(outer)).max_by_key(|(outer, _)| outer.len()))
            .map_or(self.global, |(_, level)| *level)
    }

    /// The filter for `tracing`. A scope is what log lines show, so it also stands for the target it was shortened from.
    pub(super) fn targets(&self, own_crate: &str) -> Targets {
        let mut targets = Targets::new().with_default(self.global);
        for (scope, level) in &self.scopes {
            for target in [format!("{own_crate}::{scope}"), format!("{HOUSE}{scope}"), scope.clone()] {
                targets = targets.with_target(target, *level);
            }
        }
        targets
    }
}

/// Prefix of the library crates of the house.
pub(super) const HOUSE: &str = "mesh_";

fn is_scope(text: &str) -> bool {
    !text.is_empty() && text.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '_' | ':' | '-' | '.'))
}

fn level_of(text: &str) -> Option<LevelFilter> {
    // `LevelFilter` also parses digits and the empty text; people mean names.
    let known = ["off", "error", "warn", "info", "debug", "trace"];
    known.iter().any(|name| name.eq_ignore_ascii_case(text)).then(|| text.parse().ok())?
}

impl fmt::Display for Directives {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (scope, level) in &self.scopes {
            write!(f, "{scope}={level},")?;
        }
        write!(f, "{}", self.global)
    }
}
