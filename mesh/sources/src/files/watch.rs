//! The folder's thread: waits for changes, lets them settle, reads, hands over. What only looks for changes nobody told of is
//! done beside it.

use std::collections::{BTreeSet, HashSet};
use std::io;
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, TryRecvError, channel};
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use mesh_model::snapshot::Viewpoint;
use notify::event::{AccessKind, AccessMode, EventKind, ModifyKind};
use notify::{RecommendedWatcher, RecursiveMode, Watcher};

use super::{Folder, Listing, Touched, list};
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
                if let Some(problems) = folder.new_problems() {
                    diagnostics.replace(problems.to_vec());
                }
                let read = Some(if folder.is_behind() { Outcome::Behind } else { Outcome::Read });
                match changes {
                    Some(changes) if !changes.is_empty() || !sink.has_told() => {
                        let large = changes.len() > LARGE;
                        let sent = sink.send_blocking(changes).ok().and(read);
                        if large {
                            // Texts and trees of a large load are several times what stays.
                            mesh_runtime::allocator::return_free_pages();
                        }
                        sent
                    }
                    Some(_) => read,
                    None => Some(Outcome::Unreadable),
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

/// What a reading came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// It was read.
    Read,
    /// There is more to be looked at, when nothing else is to be done.
    Behind,
    /// It cannot be read.
    Unreadable,
}

/// Calls `reload` now and whenever `root` (a file or folder), or something below it, may have changed, until it says to
/// stop (`None`) or `closed`. `reload` is told what may have changed, and answers what came of it.
pub(crate) fn follow(root: &Path, closed: impl Fn() -> bool, reload: impl FnMut(&Touched) -> Option<Outcome>) {
    follow_every(PATROL, root, closed, reload);
}
fn follow_every(every: Duration, root: &Path, closed: impl Fn() -> bool, mut reload: impl FnMut(&Touched) -> Option<Outcome>) {
    let (tx, rx) = channel();
    let mut lookout = Lookout { root: root.to_path_buf(), wake: tx.clone(), under_way: None };
    // As events name it; a folder that is gone while the process starts is found by looking.
    let root = &std::path::absolute(root).unwrap_or_else(|_| root.to_path_buf());
    let names = Arc::new(ArcSwap::from_pointee(names_of(root)));
    let mut watcher = watcher(tx, Arc::clone(&names));
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
        let Some(outcome) = reload(&touched) else { return };
        watching &= outcome != Outcome::Unreadable;
        if outcome == Outcome::Unreadable {
            patrol = Instant::now() + RETRY.min(every);
        } else if touched == Touched::All {
            patrol = Instant::now() + every;
        }
        // Under changes without end a folder is read half of the time at most. The first change after a start or a look waits
        // for nothing.
        let rested = Instant::now() + if changed { started.elapsed() } else { Duration::ZERO };
        changed = false;
        touched = loop {
            if let Some(seen) = lookout.seen() {
                break seen;
            }
            let now = Instant::now();
            if now >= patrol {
                patrol = now + every;
                if outcome == Outcome::Unreadable || !lookout.start() {
                    break Touched::All;
                }
            }
            match wait(&rx, if outcome == Outcome::Behind { now } else { patrol }, rested, &closed) {
                None => return,
                Some(Woken::Changed(paths)) => {
                    changed = !paths.is_empty();
                    break touched_by(root, &paths);
                }
                Some(Woken::Idle) if outcome == Outcome::Behind => break Touched::Names(BTreeSet::new()),
                Some(Woken::Idle) => {}
            }
        };
    }
}

/// Tells of the changes of what has these names; `None` where that does not work.
fn watcher(tx: Sender<Sign>, names: Arc<ArcSwap<Vec<PathBuf>>>) -> Option<RecommendedWatcher> {
    let made = notify::recommended_watcher(move |event: notify::Result<notify::Event>| {
        if event.as_ref().map_or(true, |e| concerns(e, &names.load())) {
            let _ = tx.send(event.map_or(Sign::Done(Vec::new()), Sign::of));
        }
    });
    match made {
        Ok(w) => Some(w),
        Err(e) => {
            tracing::warn!(error = %e, "no file watching; changes are found by looking every {PATROL:?}");
            None
        }
    }
}

/// Looks at all of a folder on a thread of its own: of ten thousand files that takes longer than a change may wait.
struct Lookout {
    root: PathBuf,
    wake: Sender<Sign>,
    under_way: Option<Receiver<io::Result<Listing>>>,
}
impl Lookout {
    /// Begins to look, or leaves it at the look under way; whether there is one.
    fn start(&mut self) -> bool {
        if self.under_way.is_some() {
            return true;
        }
        let (done, seen) = channel();
        let (root, wake) = (self.root.clone(), self.wake.clone());
        let started = std::thread::Builder::new().name("mesh-folder-look".into()).spawn(move || {
            let _ = done.send(list(&root));
            let _ = wake.send(Sign::Looked);
        });
        self.under_way = started.is_ok().then_some(seen);
        started.is_ok()
    }
    /// What was seen, once it was.
    fn seen(&mut self) -> Option<Touched> {
        let seen = match self.under_way.as_ref()?.try_recv() {
            Err(TryRecvError::Empty) => return None,
            Ok(Ok(listing)) => Touched::Listed(listing),
            // No folder, or none that can be listed: whoever reads it knows what to say.
            Ok(Err(_)) | Err(TryRecvError::Disconnected) => Touched::All,
        };
        self.under_way = None;
        Some(seen)
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
    /// The look at all of them is over.
    Looked,
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

/// Why there is something to do.
#[derive(Debug, PartialEq, Eq)]
enum Woken {
    /// These changed; none at all: nobody knows what.
    Changed(Vec<PathBuf>),
    /// Nothing did, and it is late enough, or a look is over.
    Idle,
}

/// Waits for a burst of events to end and for `rested`, or until `latest`. `None` when it is time to stop.
fn wait(rx: &Receiver<Sign>, latest: Instant, rested: Instant, closed: &impl Fn() -> bool) -> Option<Woken> {
    let mut sign = loop {
        // Short steps, so that the thread ends soon after the process wants it to.
        let left = latest.saturating_duration_since(Instant::now()).min(Duration::from_millis(500));
        if closed() {
            return None;
        }
        match rx.recv_timeout(left) {
            Ok(Sign::Looked) => return Some(Woken::Idle),
            Ok(sign) => break sign,
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => std::thread::sleep(left),
        }
        if Instant::now() >= latest {
            return Some(Woken::Idle);
        }
    };
    let latest = Instant::now() + BURST;
    let mut written: HashSet<PathBuf> = HashSet::new();
    let (mut named, mut lost) = (Vec::new(), false);
    loop {
        let over = Instant::now() >= latest;
        match sign {
            Sign::Looked => {}
            Sign::Writing(paths) => {
                lost |= paths.is_empty();
                named.extend_from_slice(&paths);
                written.extend(paths);
            }
            Sign::Done(paths) => {
                lost |= paths.is_empty();
                written.retain(|path| !paths.contains(path));
                named.extend(paths);
            }
        }
        if over {
            break;
        }
        let quiet = if written.is_empty() { SETTLE } else { WRITING };
        let quiet = quiet.max(rested.saturating_duration_since(Instant::now()).min(BURST));
        sign = match rx.recv_timeout(quiet) {
            Ok(next) => next,
            Err(_) => break,
        };
    }
    Some(Woken::Changed(if lost { Vec::new() } else { named }))
}

#[cfg(test)]
mod tests;
