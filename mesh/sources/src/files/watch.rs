//! The folder's thread: waits for changes, lets them settle, reads, hands over.

use std::collections::{BTreeSet, HashSet};
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use mesh_model::snapshot::Viewpoint;
use notify::event::{AccessKind, AccessMode, EventKind, ModifyKind};
use notify::{RecommendedWatcher, RecursiveMode, Watcher};

use super::{Folder, Touched};
use crate::diagnostics::Diagnostics;
use crate::publisher::ChangeSink;
use crate::translate::Settings;
use crate::{Source, SourceError};

/// Quiet time after which a burst of changes counts as finished, when every file in it was closed, renamed or removed.
const SETTLE: Duration = Duration::from_millis(1);
/// The same while a file was written to and not closed yet: half a file must not be read as the whole.
const WRITING: Duration = Duration::from_millis(100);
/// Longest time a burst is waited for.
const BURST: Duration = Duration::from_secs(1);
/// Whatever the signs of change, all of the folder is looked at this often: watches can be lost (queue overflow, network
/// file systems). Files whose stamp is as it was are not read.
const PATROL: Duration = Duration::from_secs(10);
/// Changes whose texts and trees are worth giving back to the system.
const LARGE: usize = 200;
/// How often a missing folder is tried.
const RETRY: Duration = Duration::from_secs(1);

/// A folder of objects as a source.
#[derive(Debug)]
pub struct FolderSource {
    /// The folder.
    pub root: PathBuf,
    /// From where the mesh is seen.
    pub view: Viewpoint,
    /// Translation.
    pub settings: Settings,
    /// Where problems go.
    pub diagnostics: Diagnostics,
}

impl Source for FolderSource {
    fn name(&self) -> &'static str {
        "folder"
    }
    async fn run(self, sink: ChangeSink) -> Result<(), SourceError> {
        let mut folder = Folder::new(self.root, self.view, &self.settings);
        let diagnostics = self.diagnostics;
        on_thread("mesh-folder", sink, move |sink| {
            let root = folder.root().to_path_buf();
            follow(&root, sink.closed_probe(), |touched| {
                let changes = folder.reload_touched(touched);
                diagnostics.replace(folder.problems().to_vec());
                match changes {
                    Some(changes) if !changes.is_empty() || !sink.has_told() => {
                        let large = changes.len() > LARGE;
                        let sent = sink.send_blocking(changes).is_ok().then_some(true);
                        if large {
                            // Texts and trees of a large load are several times what stays.
                            mesh_runtime::allocator::return_free_pages();
                        }
                        sent
                    }
                    Some(_) => Some(true),
                    None => Some(false),
                }
            });
        })
        .await
    }
}

/// Runs `work` on its own thread: parsing a large folder must not stop the control thread.
pub(crate) async fn on_thread(
    name: &str,
    mut sink: ChangeSink,
    work: impl FnOnce(&mut ChangeSink) + Send + 'static,
) -> Result<(), SourceError> {
    let (done, ended) = tokio::sync::oneshot::channel::<()>();
    std::thread::Builder::new().name(name.into()).spawn(move || {
        work(&mut sink);
        let _ = done.send(());
    })?;
    ended.await.map_err(|_| SourceError::Died)
}

/// Calls `reload` now and whenever `root` (a file or folder), or something below it, may have changed, until it says to
/// stop (`None`) or `closed`. `reload` is told what may have changed, and answers whether `root` could be read.
pub(crate) fn follow(root: &Path, closed: impl Fn() -> bool, mut reload: impl FnMut(&Touched) -> Option<bool>) {
    // As events name it; a folder that is gone while the process starts is found by looking.
    let root = &std::path::absolute(root).unwrap_or_else(|_| root.to_path_buf());
    let names = Arc::new(ArcSwap::from_pointee(names_of(root)));
    let (tx, rx) = channel();
    let told = Arc::clone(&names);
    let mut watcher = match notify::recommended_watcher(move |event: notify::Result<notify::Event>| {
        if event.as_ref().map_or(true, |e| concerns(e, &told.load())) {
            let _ = tx.send(event.map_or(Sign::Done(Vec::new()), Sign::of));
        }
    }) {
        Ok(w) => Some(w),
        Err(e) => {
            tracing::warn!(error = %e, "no file watching; changes are found by looking every {PATROL:?}");
            None
        }
    };
    let mut watching = false;
    let mut touched = Touched::All;
    let mut patrol = Instant::now();
    // Whether somebody changed something, or only time passed.
    let mut changed = false;
    loop {
        let now = names_of(root);
        if now != **names.load() {
            // A link leads elsewhere now: what is there is not watched yet.
            names.store(Arc::new(now));
            watching = false;
        }
        if !watching {
            watching = watch(watcher.as_mut(), root);
            touched = Touched::All;
        }
        let started = Instant::now();
        if started >= patrol {
            touched = Touched::All;
        }
        let Some(readable) = reload(&touched) else { return };
        watching &= readable;
        if touched == Touched::All {
            patrol = Instant::now() + if readable { PATROL } else { RETRY };
        }
        // Under changes without end a folder is read half of the time at most. The first change after a start or a look waits
        // for nothing.
        let rested = Instant::now() + if changed { started.elapsed() } else { Duration::ZERO };
        let Some(paths) = wait(&rx, patrol, rested, &closed) else { return };
        changed = !paths.is_empty();
        touched = touched_by(root, &paths);
    }
}

/// What may have changed when these paths did; none at all says that nobody knows.
fn touched_by(root: &Path, paths: &[PathBuf]) -> Touched {
    let below = |path: &PathBuf| path.strip_prefix(root).ok().filter(|name| !name.as_os_str().is_empty()).map(Path::to_path_buf);
    match paths.iter().map(below).collect::<Option<BTreeSet<PathBuf>>>() {
        Some(names) if !names.is_empty() => Touched::Names(names),
        _ => Touched::All,
    }
}

/// Paths whose change is a change of `root`: itself, where it leads in the end, and, when it is a link, what that link
/// goes through beside it (a single file of a Kubernetes volume leads through `..data`, which is swapped).
fn names_of(root: &Path) -> Vec<PathBuf> {
    let mut out = vec![root.to_path_buf()];
    out.extend(root.canonicalize().ok().filter(|real| real != root));
    let through = root.read_link().ok().and_then(|to| match to.components().next() {
        Some(Component::Normal(first)) => root.parent().map(|p| p.join(first)),
        _ => None,
    });
    out.extend(through);
    out
}

/// What an event says of the files it names. Without a name it says that events were lost.
#[derive(Debug, PartialEq, Eq)]
enum Sign {
    /// Somebody may be writing them.
    Writing(Vec<PathBuf>),
    /// They are as they are meant to be, for now.
    Done(Vec<PathBuf>),
}
impl Sign {
    fn of(event: notify::Event) -> Self {
        if event.need_rescan() {
            return Self::Done(Vec::new());
        }
        match event.kind {
            EventKind::Create(_) | EventKind::Modify(ModifyKind::Data(_)) => Self::Writing(event.paths),
            _ => Self::Done(event.paths),
        }
    }
}

/// Whether an event may be a change of what `names` name. The parent is watched too and may be a busy place.
fn concerns(event: &notify::Event, names: &[PathBuf]) -> bool {
    // Reading a file is not a change; counting it would make every reload cause the next. What was written is closed.
    if event.kind.is_access() && event.kind != EventKind::Access(AccessKind::Close(AccessMode::Write)) {
        return false;
    }
    // An event without paths says that events were lost.
    event.paths.is_empty() || event.need_rescan() || event.paths.iter().any(|p| names.iter().any(|n| p.starts_with(n)))
}

fn watch(watcher: Option<&mut RecommendedWatcher>, root: &Path) -> bool {
    let Some(watcher) = watcher else { return true };
    // The parent too: the folder itself may be a link that is swapped.
    if let Some(parent) = root.parent().filter(|p| !p.as_os_str().is_empty()) {
        let _ = watcher.watch(parent, RecursiveMode::NonRecursive);
    }
    match watcher.watch(root, RecursiveMode::Recursive) {
        Ok(()) => true,
        Err(e) => {
            tracing::debug!(error = %e, root = %root.display(), "not watched yet");
            false
        }
    }
}

/// Waits for a burst of events to end and for `rested`, or until `latest`: the paths it named, none if that does not tell
/// what changed. `None` when it is time to stop.
fn wait(rx: &Receiver<Sign>, latest: Instant, rested: Instant, closed: &impl Fn() -> bool) -> Option<Vec<PathBuf>> {
    let first = loop {
        // Short steps, so that the thread ends soon after the process wants it to.
        let left = latest.saturating_duration_since(Instant::now()).min(Duration::from_millis(500));
        if closed() {
            return None;
        }
        match rx.recv_timeout(left) {
            Ok(sign) => break sign,
            Err(RecvTimeoutError::Timeout) if Instant::now() < latest => {}
            Err(RecvTimeoutError::Timeout) => return Some(Vec::new()),
            Err(RecvTimeoutError::Disconnected) => std::thread::sleep(left),
        }
        if Instant::now() >= latest {
            return Some(Vec::new());
        }
    };
    let latest = Instant::now() + BURST;
    let mut written: HashSet<PathBuf> = HashSet::new();
    let (mut named, mut lost) = (Vec::new(), false);
    let mut sign = first;
    loop {
        let (Sign::Writing(paths) | Sign::Done(paths)) = &sign;
        lost |= paths.is_empty();
        named.extend_from_slice(paths);
        match sign {
            Sign::Writing(paths) => written.extend(paths),
            Sign::Done(paths) => written.retain(|path| !paths.contains(path)),
        }
        let quiet = if written.is_empty() { SETTLE } else { WRITING };
        let quiet = quiet.max(rested.saturating_duration_since(Instant::now()).min(BURST));
        sign = match rx.recv_timeout(quiet) {
            Ok(next) if Instant::now() < latest => next,
            Ok(next) => {
                let (Sign::Writing(paths) | Sign::Done(paths)) = next;
                lost |= paths.is_empty();
                named.extend(paths);
                break;
            }
            Err(_) => break,
        };
    }
    Some(if lost { Vec::new() } else { named })
}

#[cfg(test)]
mod tests;
