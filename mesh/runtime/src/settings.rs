//! Process settings from four places: defaults < file < environment < flags.
//!
//! Each module of the house owns its `Settings` struct (serde, `deny_unknown_fields`, defaults); this one owns the order, the
//! parsing of environment values and the error that says *where* a wrong value came from. A process with a wrong setting does
//! not start: guessing what a security setting meant is not an option.

mod duration_text;

use std::collections::BTreeMap;
use std::fmt;
use std::marker::PhantomData;

use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Number, Value};

pub use duration_text::{BadDuration, duration, format_duration, optional_duration, parse_duration};

/// The environment; of what is not Unicode nothing is ours.
pub fn variables() -> impl Iterator<Item = (String, String)> {
    std::env::vars_os().filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)))
}

/// How the text of an environment variable or flag is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// As it is.
    Text,
    /// `true` or `false`, `1` or `0`, `yes` or `no`, `on` or `off`, in any case.
    Bool,
    /// A whole number.
    Integer,
    /// A number.
    Float,
    /// `5m`, `100ms`, `1h30m`; a bare number is seconds.
    Duration,
    /// Comma-separated texts; spaces around them are dropped, empty ones too.
    List,
    /// JSON.
    Json,
}

/// One environment variable and the setting it means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EnvKey {
    /// Name of the variable.
    pub name: &'static str,
    /// Dotted path of the setting, in the names serde uses.
    pub path: &'static str,
    /// How its text is read.
    pub kind: Kind,
}

/// A setting that cannot be used.
#[derive(Clone, Debug, thiserror::Error, PartialEq, Eq)]
#[error("{origin}: setting {path:?}: {reason}")]
pub struct SettingsError {
    /// Where the value came from: `file /etc/x.yaml`, `environment variable X`, `flag --x`.
    pub origin: String,
    /// Dotted path of the setting; empty when the error concerns the whole.
    pub path: String,
    /// What is wrong with it.
    pub reason: String,
}

/// The settings `T` being put together. Later layers win over earlier ones, so call in the order file, env, flags.
///
/// Objects are merged key by key, everything else is replaced.
#[derive(Clone, Debug)]
pub struct Overlay<T> {
    value: Value,
    origins: BTreeMap<String, String>,
    of: PhantomData<fn() -> T>,
}

impl<T: Default + Serialize + DeserializeOwned> Overlay<T> {
    /// The defaults.
    pub fn new() -> Result<Self, SettingsError> {
        let value = serde_json::to_value(T::default()).map_err(|error| SettingsError {
            origin: "defaults".into(),
            path: String::new(),
            reason: error.to_string(),
        })?;
        Ok(Self { value, origins: BTreeMap::new(), of: PhantomData })
    }

    /// Lays the parsed content of a file over what is there. A `null` document is an empty one.
    pub fn file(self, name: &str, content: &Value) -> Result<Self, SettingsError> {
        let origin = format!("file {name}");
        match content {
            Value::Null => Ok(self),
            Value::Object(_) => self.layer(&origin, leaves(content)),
            _ => Err(SettingsError { origin, path: String::new(), reason: "expected a map of settings".into() }),
        }
    }

    /// Lays the environment over what is there. Variables that are unset or empty change nothing. `lookup` is
    /// `|name| std::env::var(name).ok()` outside of tests.
    pub fn env(self, keys: &[EnvKey], lookup: impl Fn(&str) -> Option<String>) -> Result<Self, SettingsError> {
        keys.iter().try_fold(self, |overlay, key| match lookup(key.name) {
            Some(text) if !text.is_empty() => {
                overlay.one(&format!("environment variable {}", key.name), key.path, key.kind, &text)
            }
            _ => Ok(overlay),
        })
    }

    /// Lays one flag over what is there; `flag` is its name as typed, with dashes.
    pub fn flag(self, flag: &str, path: &str, kind: Kind, text: &str) -> Result<Self, SettingsError> {
        self.one(&format!("flag {flag}"), path, kind, text)
    }

    /// The settings.
    pub fn finish(self) -> Result<T, SettingsError> {
        serde_json::from_value(self.value).map_err(|error| SettingsError {
            origin: "settings".into(),
            path: String::new(),
            reason: error.to_string(),
        })
    }

    /// Dotted path of every setting that is not a default, and where it came from.
    pub fn origins(&self) -> &BTreeMap<String, String> {
        &self.origins
    }

    /// Everything as laid so far, for the configuration dump.
    pub fn value(&self) -> &Value {
        &self.value
    }

    fn one(self, origin: &str, path: &str, kind: Kind, text: &str) -> Result<Self, SettingsError> {
        let value =
            read(kind, text).map_err(|reason| SettingsError { origin: origin.to_owned(), path: path.to_owned(), reason })?;
        let path = path.split('.').map(str::to_owned).collect();
        self.layer(origin, vec![(path, value)])
    }

    /// The whole layer at once, because settings may depend on each other; only when that fails one by one, to name
    /// the culprit.
    fn layer(mut self, origin: &str, leaves: Vec<(Vec<String>, Value)>) -> Result<Self, SettingsError> {
        let error = |path: &[String], reason: String| SettingsError { origin: origin.to_owned(), path: path.join("."), reason };
        let mut whole = self.value.clone();
        for (path, value) in &leaves {
            put(&mut whole, path, value.clone()).map_err(|reason| error(path, reason))?;
        }
        if let Err(combined) = T::deserialize(&whole) {
            for (path, value) in &leaves {
                let mut alone = self.value.clone();
                put(&mut alone, path, value.clone()).map_err(|reason| error(path, reason))?;
                T::deserialize(&alone).map_err(|reason| error(path, reason.to_string()))?;
            }
            return Err(error(&[], combined.to_string()));
        }
        self.value = whole;
        self.origins.extend(leaves.into_iter().map(|(path, _)| (path.join("."), origin.to_owned())));
        Ok(self)
    }
}

/// Every value of an object with its path. Empty objects count as values.
fn leaves(value: &Value) -> Vec<(Vec<String>, Value)> {
    fn walk(value: &Value, path: &mut Vec<String>, out: &mut Vec<(Vec<String>, Value)>) {
        match value {
            Value::Object(map) if !map.is_empty() => {
                for (key, value) in map {
                    path.push(key.clone());
                    walk(value, path, out);
                    path.pop();
                }
            }
            _ if path.is_empty() => {}
            _ => out.push((path.clone(), value.clone())),
        }
    }
    let mut out = Vec::new();
    walk(value, &mut Vec::new(), &mut out);
    out
}

fn put(root: &mut Value, path: &[String], value: Value) -> Result<(), String> {
    let mut at = root;
    for key in path {
        if at.is_null() {
            // An optional section that was absent.
            *at = Value::Object(Map::new());
        }
        at = match at {
            Value::Object(map) => map.entry(key.as_str()).or_insert(Value::Null),
            _ => return Err(format!("{key:?} lies below something that is not a section")),
        };
    }
    match (at, value) {
        // `section: {}` in a file says nothing, it does not empty the section.
        (Value::Object(_), Value::Object(empty)) if empty.is_empty() => {}
        (at, value) => *at = value,
    }
    Ok(())
}

fn read(kind: Kind, text: &str) -> Result<Value, String> {
    let trimmed = text.trim();
    match kind {
        Kind::Text => Ok(Value::String(text.to_owned())),
        Kind::Bool => match trimmed.to_ascii_lowercase().as_str() {
            "true" | "1" | "yes" | "on" | "t" => Ok(Value::Bool(true)),
            "false" | "0" | "no" | "off" | "f" => Ok(Value::Bool(false)),
            _ => Err(format!("{text:?} is neither true nor false")),
        },
        Kind::Integer => (trimmed.parse::<u64>().map(Number::from))
            .or_else(|_| trimmed.parse::<i64>().map(Number::from))
            .map(Value::Number)
            .map_err(|_| format!("{text:?} is not a whole number")),
        Kind::Float => (trimmed.parse::<f64>().ok().and_then(Number::from_f64))
            .map(Value::Number)
            .ok_or_else(|| format!("{text:?} is not a number")),
        Kind::Duration => match parse_duration(trimmed) {
            Ok(duration) => Ok(Value::String(format_duration(duration))),
            Err(error) => Err(error.to_string()),
        },
        Kind::List => {
            let items = trimmed.split(',').map(str::trim).filter(|item| !item.is_empty());
            Ok(Value::Array(items.map(|item| Value::String(item.to_owned())).collect()))
        }
        Kind::Json => serde_json::from_str(trimmed).map_err(|error| format!("not JSON: {error}")),
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Text => "text",
            Self::Bool => "true or false",
            Self::Integer => "whole number",
            Self::Float => "number",
            Self::Duration => "duration",
            Self::List => "comma-separated list",
            Self::Json => "JSON",
        })
    }
}

#[cfg(test)]
mod tests;
