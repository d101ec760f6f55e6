//! Which files a folder has, and their text.

use std::fs;
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use super::{MAX_FILE, whole};
use crate::diagnostics::Problem;

/// Deepest folder looked into.
const MAX_DEPTH: usize = 16;
/// A file changed this recently may change again within one tick of its clock: it is read again next time.
const RACY: Duration = Duration::from_secs(2);

/// What tells that a file is as it was.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stamp {
    modified: SystemTime,
    len: u64,
    inode: u64,
    device: u64,
}
/// A file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Found {
    /// Path, below the folder as given.
    pub path: PathBuf,
    /// Its stamp; `None` when it cannot be trusted yet.
    pub stamp: Option<Stamp>,
}

/// What a folder shows.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Listing {
    /// The YAML and JSON files of it and its sub-folders, by path.
    pub files: Vec<Found>,
    /// What cannot be looked at, sub-folders as a rule, and why: nobody knows what is there.
    pub unseen: Vec<(PathBuf, Problem)>,
    /// A link is among its names.
    pub linked: bool,
}
impl Listing {
    /// Whether all of the folder could be looked at, and each file has one name.
    pub(super) fn is_plain(&self) -> bool {
        self.unseen.is_empty() && !self.linked
    }
}

/// The files of a folder. Hidden names are skipped, which also skips Kubernetes' `..data` folders; the links beside them are
/// followed.
pub fn list(root: &Path) -> io::Result<Listing> {
    let mut out = Listing::default();
    let mut open: Vec<(u64, u64)> = Vec::new();
    walk(root, &mut open, &mut out)?;
    out.files.sort_by(|a, b| a.path.cmp(&b.path));
    Ok(out)
}

/// What stands under a name by itself.
pub(super) enum Seen {
    /// A file that counts.
    File(Found),
    /// Nothing, or a file that does not count.
    Nothing,
    /// A folder, a link: more than the name says.
    Else,
}
/// Looks at one path of the folder; `name` is it as seen from the folder.
pub(super) fn look(path: &Path, name: &Path) -> Seen {
    match fs::symlink_metadata(path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Seen::Nothing,
        Ok(meta) if meta.is_file() && name.components().count() <= MAX_DEPTH => {
            if counts(path) {
                Seen::File(found(path.to_path_buf(), &meta))
            } else {
                Seen::Nothing
            }
        }
        Ok(_) | Err(_) => Seen::Else,
    }
}
/// Whether a name seen from the folder is hidden, or below a hidden one.
pub(super) fn is_hidden(name: &Path) -> bool {
    name.components().any(|part| part.as_os_str().as_encoded_bytes().starts_with(b"."))
}
fn counts(path: &Path) -> bool {
    path.extension().is_some_and(|e| e == "yaml" || e == "yml" || e == "json")
}
fn found(path: PathBuf, meta: &fs::Metadata) -> Found {
    let modified = meta.modified().ok();
    let settled = modified.filter(|m| SystemTime::now().duration_since(*m).is_ok_and(|age| age > RACY));
    let stamp = settled.map(|modified| Stamp { modified, len: meta.len(), inode: meta.ino(), device: meta.dev() });
    Found { path, stamp }
}

fn walk(dir: &Path, open: &mut Vec<(u64, u64)>, out: &mut Listing) -> io::Result<()> {
    let meta = fs::metadata(dir)?;
    let id = (meta.dev(), meta.ino());
    if open.contains(&id) {
        return Ok(());
    }
    if open.len() >= MAX_DEPTH {
        return Err(io::Error::other(format!("it is deeper than {MAX_DEPTH} folders")));
    }
    open.push(id);
    let listed = fs::read_dir(dir).and_then(|mut entries| entries.try_for_each(|entry| below(&entry?, open, out)));
    open.pop();
    listed
}
fn below(entry: &fs::DirEntry, open: &mut Vec<(u64, u64)>, out: &mut Listing) -> io::Result<()> {
    if entry.file_name().as_encoded_bytes().starts_with(b".") {
        return Ok(());
    }
    out.linked |= entry.file_type()?.is_symlink();
    let path = entry.path();
    // Follows links.
    let seen = fs::metadata(&path).and_then(|meta| {
        if meta.is_dir() {
            walk(&path, open, out)?;
        } else if meta.is_file() && counts(&path) {
            out.files.push(found(path.clone(), &meta));
        }
        Ok(())
    });
    match seen {
        // What went in the meantime, or a dangling link, is simply not there.
        Err(e) if e.kind() != io::ErrorKind::NotFound => {
            let place: Arc<str> = path.display().to_string().into();
            let problem = whole(&place, &format!("it cannot be listed: {e}; what it said before stays in force"), "folder");
            out.unseen.push((path, problem));
        }
        Ok(()) | Err(_) => {}
    }
    Ok(())
}

/// The text of a file.
pub fn read(path: &Path) -> io::Result<String> {
    let mut text = String::new();
    let file = fs::File::open(path)?;
    let len = file.metadata()?.len();
    if len > MAX_FILE {
        return Err(io::Error::other(format!("{len} bytes are more than {MAX_FILE}")));
    }
    text.reserve(usize::try_from(len).unwrap_or(0));
    file.take(MAX_FILE + 1).read_to_string(&mut text)?;
    if text.len() as u64 > MAX_FILE {
        return Err(io::Error::other(format!("it grew beyond {MAX_FILE} bytes")));
    }
    Ok(text)
}
