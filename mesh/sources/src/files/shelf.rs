//! Where the texts of a folder are: in files, or in memory where somebody else fetches them.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::{Path, PathBuf};

use super::walk::{self, Found, Listing, Seen};

/// Texts under names.
#[derive(Debug)]
pub(super) enum Shelf {
    /// The files below a folder.
    Disk(PathBuf),
    /// What was handed over; an error is a text that is there and cannot be had.
    Memory(BTreeMap<PathBuf, Result<String, String>>),
}

impl Shelf {
    /// The name of all of it.
    pub fn root(&self) -> &Path {
        match self {
            Self::Disk(root) => root,
            Self::Memory(_) => Path::new(""),
        }
    }
    /// All there is.
    pub fn list(&self) -> io::Result<Listing> {
        match self {
            Self::Disk(root) => walk::list(root),
            Self::Memory(texts) => {
                let files = texts.keys().map(|path| Found { path: path.clone(), stamp: None }).collect();
                Ok(Listing { files, ..Listing::default() })
            }
        }
    }
    /// What is under a name now; `None` for a name that never counts.
    pub fn look(&self, name: &Path) -> Option<(PathBuf, Seen)> {
        match self {
            Self::Disk(_) if walk::is_hidden(name) => None,
            Self::Disk(root) => {
                let path = root.join(name);
                let seen = walk::look(&path, name);
                Some((path, seen))
            }
            Self::Memory(texts) if texts.contains_key(name) => {
                let path = name.to_path_buf();
                Some((path.clone(), Seen::File(Found { path, stamp: None })))
            }
            Self::Memory(_) => Some((name.to_path_buf(), Seen::Nothing)),
        }
    }
    /// A text.
    pub fn read(&self, path: &Path) -> io::Result<String> {
        match self {
            Self::Disk(_) => walk::read(path),
            Self::Memory(texts) => match texts.get(path) {
                Some(Ok(text)) => Ok(text.clone()),
                Some(Err(why)) => Err(io::Error::other(why.clone())),
                None => Err(io::ErrorKind::NotFound.into()),
            },
        }
    }
    /// Takes in texts, and forgets those that are none any more: the names under which something changed.
    pub fn put(&mut self, new: Vec<(PathBuf, Option<Result<String, String>>)>) -> BTreeSet<PathBuf> {
        let Self::Memory(texts) = self else { return BTreeSet::new() };
        let mut touched = BTreeSet::new();
        for (path, text) in new {
            let changed = match text {
                Some(text) if texts.get(&path) == Some(&text) => false,
                Some(text) => {
                    texts.insert(path.clone(), text);
                    true
                }
                None => texts.remove(&path).is_some(),
            };
            if changed {
                touched.insert(path);
            }
        }
        touched
    }
}
