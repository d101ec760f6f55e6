//! Parsing ahead of reading: trees are made on all cores and consumed in order on one.
//!
//! Owns the threads and how far they may run ahead, which bounds the memory of trees whatever the size of the file.
//! Refuses to guess: a document it does not parse is left to the consumer. Upstream and downstream: [`super`].

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use crate::yaml::{self, Document, Node, YamlError};

/// Documents that are claimed by a thread at once.
const PART: usize = 64;
/// Parts that may be ready or under way before the consumer has taken them.
const WINDOW: usize = 8;
/// Largest document parsed ahead; larger ones are lists, read item by item.
const SMALL: usize = 64 << 10;

/// A parsed document, or why it is none.
pub(super) type Tree<'t> = Result<Node<'t>, YamlError>;

#[derive(Default)]
struct Progress<'t> {
    /// Parts some thread has taken on, from the first.
    claimed: usize,
    /// Parts the consumer has taken.
    consumed: usize,
    ready: BTreeMap<usize, Vec<Option<Tree<'t>>>>,
    /// The consumer is done, or has panicked.
    over: bool,
}
struct Ahead<'t, 'd> {
    parts: Vec<&'d [Document<'t>]>,
    progress: Mutex<Progress<'t>>,
    changed: Condvar,
}
/// Lets the helpers go however the consumer ends.
struct Over<'a, 't, 'd>(&'a Ahead<'t, 'd>);
impl Drop for Over<'_, '_, '_> {
    fn drop(&mut self) {
        self.0.lock().over = true;
        self.0.changed.notify_all();
    }
}

impl<'t> Ahead<'t, '_> {
    fn lock(&self) -> MutexGuard<'_, Progress<'t>> {
        self.progress.lock().unwrap_or_else(PoisonError::into_inner)
    }
    fn wait<'g>(&self, guard: MutexGuard<'g, Progress<'t>>) -> MutexGuard<'g, Progress<'t>> {
        self.changed.wait(guard).unwrap_or_else(PoisonError::into_inner)
    }
    /// The next part to parse, when one is left and the window has room.
    fn claim(&self, progress: &mut Progress<'t>) -> Option<usize> {
        let at = progress.claimed;
        (at < self.parts.len() && at < progress.consumed + WINDOW).then(|| {
            progress.claimed += 1;
            at
        })
    }
    fn parse(&self, at: usize) {
        let part = self.parts.get(at).copied().unwrap_or_default();
        let parse = |d: &Document<'t>| (d.text.len() <= SMALL).then(|| yaml::parse_whole(*d));
        // A parser that panics leaves the part to the consumer, whose own panic is then seen where it always was.
        let trees = catch_unwind(AssertUnwindSafe(|| part.iter().map(parse).collect()))
            .unwrap_or_else(|_| part.iter().map(|_| None).collect());
        self.lock().ready.insert(at, trees);
        self.changed.notify_all();
    }
    fn help(&self) {
        loop {
            let mut progress = self.lock();
            let at = loop {
                if progress.over || progress.claimed >= self.parts.len() {
                    return;
                }
                match self.claim(&mut progress) {
                    Some(at) => break at,
                    None => progress = self.wait(progress),
                }
            };
            drop(progress);
            self.parse(at);
        }
    }
    /// The trees of a part: waits for whoever parses it, and parses too meanwhile.
    fn take(&self, at: usize) -> Vec<Option<Tree<'t>>> {
        let mut progress = self.lock();
        loop {
            if let Some(trees) = progress.ready.remove(&at) {
                progress.consumed = at + 1;
                self.changed.notify_all();
                return trees;
            }
            progress = if let Some(other) = self.claim(&mut progress) {
                drop(progress);
                self.parse(other);
                self.lock()
            } else {
                self.wait(progress)
            };
        }
    }
}

/// Hands the documents to `each` in order, with their trees when `worth_it` and there are cores for it.
pub(super) fn in_order<'t>(docs: &[Document<'t>], worth_it: bool, mut each: impl FnMut(Document<'t>, Option<Tree<'t>>)) {
    let threads = std::thread::available_parallelism().map_or(1, std::num::NonZero::get).min(4);
    if !worth_it || threads < 2 {
        for d in docs {
            each(*d, None);
        }
        return;
    }
    let ahead = Ahead { parts: docs.chunks(PART).collect(), progress: Mutex::default(), changed: Condvar::new() };
    std::thread::scope(|scope| {
        let _over = Over(&ahead);
        for _ in 1..threads {
            scope.spawn(|| ahead.help());
        }
        for (at, part) in ahead.parts.iter().enumerate() {
            let trees = ahead.take(at);
            part.iter().zip(trees).for_each(|(d, tree)| each(*d, tree));
        }
    });
}
