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

/// The YAML and JSON files of a folder and its sub-folders, by path. Hidden names are skipped, which also skips
/// Kubernetes' `..data` folders; the links beside them are followed.
pub fn list(root: &Path) -> io::Result<(Vec<Found>, Vec<Problem>)> {
    let (mut out, mut problems) = (Vec::new(), Vec::new());
    let mut open: Vec<(u64, u64)> = Vec::new();
    walk(root, &mut open, &mut out, &mut problems)?;
    out.sort_by(|a, b| a.path.cmp(&b.path));
    Ok((out, problems))
}

fn walk(dir: &Path, open: &mut Vec<(u64, u64)>, out: &mut Vec<Found>, problems: &mut Vec<Problem>) -> io::Result<()> {
    let meta = fs::metadata(dir)?;
    let id = (meta.dev(), meta.ino());
    if open.contains(&id) || open.len() >= MAX_DEPTH {
        return Ok(());
    }
    open.push(id);
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        if entry.file_name().as_encoded_bytes().starts_with(b".") {
            continue;
        }
        let path = entry.path();
        // Follows links; a file that went in the meantime, or a dangling link, is simply not there.
        let Ok(meta) = fs::metadata(&path) else { continue };
        if meta.is_dir() {
            if let Err(e) = walk(&path, open, out, problems) {
                let place: Arc<str> = path.display().to_string().into();
                problems.push(whole(&place, &format!("the folder cannot be listed: {e}"), "folder"));
            }
        } else if meta.is_file() && path.extension().is_some_and(|e| e == "yaml" || e == "yml" || e == "json") {
            let modified = meta.modified().ok();
            let settled = modified.filter(|m| SystemTime::now().duration_since(*m).is_ok_and(|age| age > RACY));
            let stamp = settled.map(|modified| Stamp { modified, len: meta.len(), inode: meta.ino(), device: meta.dev() });
            out.push(Found { path, stamp });
        }
    }
    open.pop();
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
