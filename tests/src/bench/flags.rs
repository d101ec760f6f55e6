//! `--name value` command lines, read strictly: an unknown or unread flag is an error, not a silently different measurement.
use std::collections::BTreeMap;
use std::str::FromStr;

use anyhow::{Context, bail};

/// The flags of one command line.
#[derive(Debug, Default)]
pub struct Flags(BTreeMap<String, String>);

impl Flags {
    /// Reads `--name value` pairs; the names in `switches` take no value.
    pub fn parse(args: impl IntoIterator<Item = String>, switches: &[&str]) -> anyhow::Result<Self> {
        let mut flags = BTreeMap::new();
        let mut args = args.into_iter();
        while let Some(arg) = args.next() {
            let name = arg.strip_prefix("--").with_context(|| format!("`{arg}` is not a flag"))?.to_owned();
            let value = if switches.contains(&name.as_str()) {
                String::from("true")
            } else {
                args.next().with_context(|| format!("--{name} needs a value"))?
            };
            if flags.insert(name.clone(), value).is_some() {
                bail!("--{name} is given twice");
            }
        }
        Ok(Self(flags))
    }

    /// Takes a flag that must be there.
    pub fn required<T: FromStr<Err: std::fmt::Display>>(&mut self, name: &str) -> anyhow::Result<T> {
        self.optional(name)?.with_context(|| format!("--{name} is missing"))
    }

    /// Takes a flag that may be there.
    pub fn optional<T: FromStr<Err: std::fmt::Display>>(&mut self, name: &str) -> anyhow::Result<Option<T>> {
        let Some(text) = self.0.remove(name) else { return Ok(None) };
        text.parse().map(Some).map_err(|error| anyhow::anyhow!("--{name} {text}: {error}"))
    }

    /// Takes a switch.
    pub fn switch(&mut self, name: &str) -> bool {
        self.0.remove(name).is_some()
    }

    /// An error if something was given that nobody took.
    pub fn end(self) -> anyhow::Result<()> {
        match self.0.into_keys().next() {
            Some(name) => bail!("unknown flag --{name}"),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn flags(line: &str) -> anyhow::Result<Flags> {
        Flags::parse(line.split_whitespace().map(str::to_owned), &["quick"])
    }

    #[test]
    fn values_and_switches() {
        let mut read = flags("--conns 16 --quick --to 127.0.0.1:80").unwrap();
        assert_eq!(read.required::<usize>("conns").unwrap(), 16);
        assert!(read.switch("quick"));
        assert_eq!(read.optional::<u8>("none").unwrap(), None);
        assert!(read.end().is_err(), "--to was not taken");
    }

    #[test]
    fn mistakes_are_errors() {
        for line in ["conns", "--conns", "--a 1 --a 2"] {
            assert!(flags(line).is_err(), "{line}");
        }
        assert!(flags("--n x").unwrap().required::<usize>("n").is_err());
        assert!(flags("").unwrap().required::<usize>("n").is_err());
    }
}
