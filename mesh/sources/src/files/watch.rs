//! The folder's thread: waits for changes, lets them settle, reads, hands over.

use std::collections::HashSet;
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use mesh_model::snapshot::Viewpoint;
use notify::event::{AccessKind, AccessMode, EventKind, ModifyKind};
use notify::{RecommendedWatcher, RecursiveMode, Watcher};

use super::Folder;
use crate::diagnostics::Diagnostics;
use crate::publisher::ChangeSink;
use crate::translate::Settings;
use crate::{Source, SourceError};

/// Quiet time after which a burst of changes counts as finished, when every file in it was closed, renamed or removed.
const SETTLE: Duration = Duration::from_millis(3);
/// The same while a file was written to and not closed yet: half a file must not be read as the whole.
const WRITING: Duration = Duration::from_millis(100);
/// Longest time a burst is waited for.
const BURST: Duration = Duration::from_secs(1);
/// Without any sign of change the folder is looked at this often: watches can be lost (queue overflow, network
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
            follow(&root, sink.closed_probe(), || {
                let changes = folder.reload();
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
/// stop (`None`) or `closed`. `reload` answers whether `root` could be read.
pub(crate) fn follow(root: &Path, closed: impl Fn() -> bool, mut reload: impl FnMut() -> Option<bool>) {
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
    loop {
        let now = names_of(root);
        if now != **names.load() {
            // A link leads elsewhere now: what is there is not watched yet.
            names.store(Arc::new(now));
            watching = false;
        }
        if !watching {
            watching = watch(watcher.as_mut(), root);
        }
        let started = Instant::now();
        let Some(readable) = reload() else { return };
        watching &= readable;
        // Under changes without end a folder is read half of the time at most.
        let rested = Instant::now() + started.elapsed();
        if !wait(&rx, if readable { PATROL } else { RETRY }, rested, &closed) {
            return;
        }
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

/// What an event says of the files it names.
#[derive(Debug, PartialEq, Eq)]
enum Sign {
    /// Somebody may be writing them.
    Writing(Vec<PathBuf>),
    /// They are as they are meant to be, for now.
    Done(Vec<PathBuf>),
}
impl Sign {
    fn of(event: notify::Event) -> Self {
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

/// Waits for a burst of events to end and for `rested`, or for `most`. False when it is time to stop.
fn wait(rx: &Receiver<Sign>, most: Duration, rested: Instant, closed: &impl Fn() -> bool) -> bool {
    let until = Instant::now() + most;
    let first = loop {
        // Short steps, so that the thread ends soon after the process wants it to.
        let left = until.saturating_duration_since(Instant::now()).min(Duration::from_millis(500));
        if closed() {
            return false;
        }
        match rx.recv_timeout(left) {
            Ok(sign) => break sign,
            Err(RecvTimeoutError::Timeout) if Instant::now() < until => {}
            Err(RecvTimeoutError::Timeout) => return true,
            Err(RecvTimeoutError::Disconnected) => std::thread::sleep(left),
        }
        if Instant::now() >= until {
            return true;
        }
    };
    let latest = Instant::now() + BURST;
    let mut written: HashSet<PathBuf> = HashSet::new();
    let mut sign = first;
    while Instant::now() < latest {
        match sign {
            Sign::Writing(paths) => written.extend(paths),
            Sign::Done(paths) => written.retain(|path| !paths.contains(path)),
        }
        let quiet = if written.is_empty() { SETTLE } else { WRITING };
        let quiet = quiet.max(rested.saturating_duration_since(Instant::now()).min(BURST));
        match rx.recv_timeout(quiet) {
            Ok(next) => sign = next,
            Err(_) => return true,
        }
    }
    true
}

#[cfg(test)]
mod tests;
