//! A folder of YAML as a source: read at start, watched, re-read by document.
//!
//! Owns the files and what was last good of them. Only files that were touched are looked at where the system tells which,
//! and of those only documents whose text changed are parsed again; a document that cannot be parsed costs nothing but itself, and objects its file had before stay as they were. A document that looks
//! like a security policy and cannot be parsed denies in its namespace; at start, when there is no last good state,
//! everywhere if not even the namespace can be read. Of two objects with one name the first in path order counts; of two
//! policies with one name that differ, neither: what they bind is denied until one is left.
//! Upstream: the operator. Downstream: [`crate::translate`].

mod ahead;
mod few;
mod shelf;
mod walk;
mod watch;

use std::collections::{BTreeMap, BTreeSet};
use std::hash::BuildHasher;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use mesh_model::snapshot::Viewpoint;
use mesh_model::{Change, Origin};

use crate::diagnostics::{Problem, Severity};
use crate::translate::{Object, ObjectId, Reader, Settings, Translator, conflict};
use crate::yaml::{self, Document, Node, YamlError};
use shelf::Shelf;

pub(crate) use walk::read as read_text;
pub use walk::{Found, Listing, Stamp, list};
pub use watch::FolderSource;
pub(crate) use watch::{Outcome, follow, on_thread};

/// What may have changed since a folder was read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Touched {
    /// Anything.
    All,
    /// What has these names, as seen from the folder, and nothing else. None at all: what a listing left to be looked at.
    Names(BTreeSet<PathBuf>),
    /// What is not as this listing of the folder says.
    Listed(Listing),
}

type HashMap<K, V> = std::collections::HashMap<K, V, foldhash::fast::RandomState>;
type HashSet<K> = std::collections::HashSet<K, foldhash::fast::RandomState>;

/// Documents from which on a file is worth several threads.
const MANY: usize = 512;
/// Files that are looked at in one go because a listing shows them otherwise than they were read: a change that is told of
/// meanwhile waits for no more.
const FEW: usize = 64;
/// Largest file read.
pub const MAX_FILE: u64 = 64 << 20;

/// One document as it was last read.
#[derive(Debug)]
struct Doc {
    hash: u64,
    /// Line it started on when it was read, and starts on now.
    read_line: u32,
    line: u32,
    ids: Box<[ObjectId]>,
    problems: Box<[Problem]>,
    /// Objects it names and that are refused.
    refused: Box<[ObjectId]>,
    /// Its policies, to compare with others of their names. One word, as most documents have none.
    policies: Option<Box<Policies>>,
    /// It does not parse.
    broken: bool,
}
#[derive(Debug)]
struct Policies(Box<[Object]>);
#[derive(Debug, Default)]
struct File {
    place: Arc<str>,
    stamp: Option<Stamp>,
    /// Hash of its text, while it could be read.
    text: Option<u64>,
    docs: Vec<Doc>,
    /// Some document has problems.
    troubled: bool,
    /// Objects of documents that no longer parse, kept as they were.
    kept: Vec<ObjectId>,
    /// The file as a whole could not be read.
    problem: Option<Problem>,
}
/// A document: number of its file, number in the file.
type At = (usize, usize);
/// Objects read in this pass, by file and document.
type Fresh = HashMap<At, Vec<Object>>;

/// One reading of the folder, or of some of its files.
#[derive(Default)]
struct Pass {
    /// By path.
    files: Vec<(PathBuf, File)>,
    fresh: Fresh,
    /// Anything is not as it was.
    changed: bool,
    /// Numbers of the files that say something else than before.
    read: Vec<usize>,
    /// The objects that these named before, and those that are gone.
    before: Vec<ObjectId>,
    /// Problems of files are not as they were.
    complained: bool,
}
/// A file after it was read.
enum Reading {
    /// With the text it had.
    Same(File),
    Changed(File),
}

/// Which document an object in force came from.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Held {
    place: Arc<str>,
    hash: u64,
}
impl Held {
    /// No document: several say different things.
    fn conflict() -> Self {
        Self { place: "".into(), hash: 0 }
    }
    fn is_conflict(&self) -> bool {
        self.place.is_empty()
    }
}

/// The folder as a state machine without watching and threads.
#[derive(Debug)]
pub struct Folder {
    shelf: Shelf,
    translator: Translator,
    root_namespace: Arc<str>,
    /// By path.
    files: Vec<(PathBuf, File)>,
    /// A link is among what the folder shows: what a name means may change without it.
    linked: bool,
    /// Names of what a listing showed otherwise than it was read, and that was not looked at again yet.
    doubtful: BTreeSet<PathBuf>,
    held: HashMap<ObjectId, Held>,
    hasher: foldhash::fast::FixedState,
    loaded: bool,
    /// Every object is written once and readable, as of the last reading, and in force as written: what changes follows from
    /// the files that did.
    plain: bool,
    /// How many names of objects the last reading compared.
    compared: usize,
    /// What could not be listed.
    unlisted: Vec<Problem>,
    /// Of objects that are there several times.
    doubled: Vec<Problem>,
    problems: Vec<Problem>,
    /// They are to be put together anew.
    complained: bool,
    /// They were, and nobody has been told.
    untold: bool,
}

impl Folder {
    /// A folder not read yet.
    pub fn new(root: impl Into<PathBuf>, view: Viewpoint, settings: &Settings) -> Self {
        Self::of(Shelf::Disk(root.into()), view, settings)
    }
    /// A folder whose texts are handed over ([`Self::put`]).
    pub(crate) fn in_memory(view: Viewpoint, settings: &Settings) -> Self {
        Self::of(Shelf::Memory(BTreeMap::new()), view, settings)
    }
    fn of(shelf: Shelf, view: Viewpoint, settings: &Settings) -> Self {
        Self {
            shelf,
            root_namespace: Arc::clone(&view.root_namespace),
            translator: Translator::new(view, settings),
            files: Vec::new(),
            linked: false,
            doubtful: BTreeSet::new(),
            held: HashMap::default(),
            hasher: foldhash::fast::FixedState::default(),
            loaded: false,
            plain: false,
            compared: 0,
            unlisted: Vec::new(),
            doubled: Vec::new(),
            problems: Vec::new(),
            complained: false,
            untold: true,
        }
    }
    /// What is wrong, as of the last reading.
    pub fn problems(&self) -> &[Problem] {
        &self.problems
    }
    /// The same, when it is not what this told before.
    pub fn new_problems(&mut self) -> Option<&[Problem]> {
        std::mem::take(&mut self.untold).then_some(&self.problems)
    }
    /// Whether the folder has been read once.
    pub fn is_loaded(&self) -> bool {
        self.loaded
    }
    /// Whether there is something left to be looked at of what a listing showed.
    pub fn is_behind(&self) -> bool {
        !self.doubtful.is_empty()
    }

    /// Reads what changed. `None` when the folder itself cannot be listed: all stays as it is.
    pub fn reload(&mut self) -> Option<Vec<Change>> {
        let listing = match self.shelf.list() {
            Ok(listing) => listing,
            Err(e) => {
                let place: Arc<str> = self.root().display().to_string().into();
                self.problems.retain(|p| p.code != Some("folder"));
                self.problems.push(whole(&place, &format!("the folder cannot be listed: {e}"), "folder"));
                (self.complained, self.untold) = (true, true);
                return None;
            }
        };
        self.linked = listing.linked;
        self.doubtful.clear();
        let found = self.with_unseen(listing.files, &listing.unseen);
        let unlisted: Vec<Problem> = listing.unseen.into_iter().map(|(_, problem)| problem).collect();
        self.complained |= self.unlisted != unlisted;
        self.unlisted = unlisted;
        let mut old: BTreeMap<PathBuf, File> = std::mem::take(&mut self.files).into_iter().collect();
        let mut pass = Pass::default();
        for found in found {
            let before = old.remove(&found.path);
            self.reread(found, before, &mut pass);
        }
        for file in old.values() {
            pass.lose(file);
        }
        Some(self.finish(pass))
    }

    /// What was found, with what was known below a place that cannot be looked at now: it stays in force. At start that place
    /// itself stands for it, as a file that cannot be read: it may hold policies.
    fn with_unseen(&self, mut found: Vec<Found>, unseen: &[(PathBuf, Problem)]) -> Vec<Found> {
        if unseen.is_empty() {
            return found;
        }
        let before = self.files.iter().filter(|(path, _)| unseen.iter().any(|(place, _)| path.starts_with(place)));
        found.extend(before.map(|(path, file)| Found { path: path.clone(), stamp: file.stamp }));
        if !self.loaded {
            found.extend(unseen.iter().map(|(place, _)| Found { path: place.clone(), stamp: None }));
        }
        // Of two the one that was found, which comes first.
        found.sort_by(|a, b| a.path.cmp(&b.path));
        found.dedup_by(|a, b| a.path == b.path);
        found
    }

    /// [`Self::reload`], when it is known what may have changed: nothing else is looked at.
    pub fn reload_touched(&mut self, touched: &Touched) -> Option<Vec<Change>> {
        let seen = match touched {
            _ if !self.loaded || self.linked => None,
            Touched::Names(names) if !names.is_empty() => self.look(names),
            Touched::Names(_) => self.look_at_some(),
            Touched::Listed(listing) if self.unlisted.is_empty() && listing.is_plain() => {
                self.doubtful = self.others(listing);
                self.look_at_some()
            }
            Touched::Listed(_) | Touched::All => None,
        };
        let Some(seen) = seen else { return self.reload() };
        let mut pass = Pass { files: std::mem::take(&mut self.files), ..Pass::default() };
        let at = |files: &[(PathBuf, File)], path: &Path| files.binary_search_by(|(p, _)| (**p).cmp(path));
        // What came and what went first: a file keeps its number while files are read.
        let mut there = Vec::new();
        for (path, found) in seen {
            match (at(&pass.files, &path), found) {
                (Ok(at), None) => {
                    let (_, file) = pass.files.remove(at);
                    pass.lose(&file);
                }
                (Err(_), None) => {}
                (Ok(_), Some(found)) => there.push((found, true)),
                (Err(at), Some(found)) => {
                    pass.files.insert(at, (path, File::default()));
                    there.push((found, false));
                }
            }
        }
        for (found, known) in there {
            let Ok(at) = at(&pass.files, &found.path) else { continue };
            let Some((_, file)) = pass.files.get_mut(at) else { continue };
            let before = std::mem::take(file);
            let file = self.read_again(&found, known.then_some(before), at, &mut pass);
            if let Some(place) = pass.files.get_mut(at) {
                place.1 = file;
            }
        }
        Some(self.finish(pass))
    }

    /// The names of which a listing says something else than they were read with. It may be older than that: they are doubtful,
    /// no more.
    fn others(&self, listing: &Listing) -> BTreeSet<PathBuf> {
        let mut out = BTreeSet::new();
        let root = self.root();
        let mut doubt = |path: &Path| out.extend(path.strip_prefix(root).ok().map(Path::to_path_buf));
        // Both are in the order of paths.
        let mut known = self.files.iter().peekable();
        for found in &listing.files {
            while let Some((path, _)) =
                known.next_if(|(path, _)| path.as_os_str() != found.path.as_os_str() && *path < found.path)
            {
                doubt(path);
            }
            match known.next_if(|(path, _)| path.as_os_str() == found.path.as_os_str()) {
                Some((_, file)) if file.stamp.is_some() && file.stamp == found.stamp => {}
                _ => doubt(&found.path),
            }
        }
        known.for_each(|(path, _)| doubt(path));
        out
    }
    /// [`Self::look`] for some of what is doubtful.
    fn look_at_some(&mut self) -> Option<Vec<(PathBuf, Option<Found>)>> {
        let rest = self.doubtful.iter().nth(FEW).cloned().map(|first| self.doubtful.split_off(&first));
        let some = std::mem::replace(&mut self.doubtful, rest.unwrap_or_default());
        self.look(&some)
    }

    /// What stands under these names now, `None` for what is no file of ours; nothing at all when that alone does not tell
    /// what changed. Only without links: then a hidden name is nobody's, and every file has one name.
    fn look(&self, names: &BTreeSet<PathBuf>) -> Option<Vec<(PathBuf, Option<Found>)>> {
        let mut out = Vec::new();
        for name in names {
            let Some((path, seen)) = self.shelf.look(name) else { continue };
            let holds_files = || {
                let after = self.files.partition_point(|(p, _)| *p < path);
                self.files.get(after..).unwrap_or_default().iter().take(2).any(|(p, _)| *p != path && p.starts_with(&path))
            };
            match seen {
                walk::Seen::File(found) => out.push((path, Some(found))),
                walk::Seen::Nothing if holds_files() => return None,
                walk::Seen::Nothing => out.push((path, None)),
                walk::Seen::Else => return None,
            }
        }
        Some(out)
    }

    /// Takes a file of the listing into the pass: as it was, or read again.
    fn reread(&mut self, found: Found, before: Option<File>, pass: &mut Pass) {
        let at = pass.files.len();
        let file = self.read_again(&found, before, at, pass);
        pass.files.push((found.path, file));
    }
    fn read_again(&mut self, found: &Found, before: Option<File>, at: usize, pass: &mut Pass) -> File {
        let before = match before {
            Some(file) if file.stamp.is_some() && file.stamp == found.stamp => return file,
            before => before,
        };
        let before = before.unwrap_or_default();
        let (known, complaints) = (before.ids(), before.complaints());
        match self.read(found, before, at, &mut pass.fresh) {
            Reading::Same(file) => file,
            Reading::Changed(file) => {
                pass.changed = true;
                pass.read.push(at);
                pass.before.extend(known);
                pass.complained |= file.complaints() != complaints;
                file
            }
        }
    }

    /// Brings everything else in line with the files of this pass.
    fn finish(&mut self, mut pass: Pass) -> Vec<Change> {
        self.compared = 0;
        if pass.changed || !self.loaded {
            if let Some(gone) = self.few(&pass) {
                self.forget(&gone);
                self.take(&pass.files, pass.fresh, |_, _| true);
            } else {
                let doubled = self.settle(&mut pass.files, pass.fresh);
                self.complained |= self.doubled != doubled;
                self.doubled = doubled;
            }
        }
        self.files = pass.files;
        let changes = self.translator.flush();
        // Asked in any case: it is told once.
        let between_objects = self.translator.has_new_problems();
        self.complained |= pass.complained || between_objects || !self.loaded;
        self.loaded = true;
        // There may be one for each of many thousand objects: an agent has a note for each that is for waypoints.
        if std::mem::take(&mut self.complained) {
            self.untold = true;
            self.problems = self.unlisted.iter().chain(&self.doubled).cloned().collect();
            self.problems.extend(self.files.iter().flat_map(|(_, file)| file.complaints()));
            self.problems.extend(self.translator.problems().cloned());
        }
        changes
    }

    /// Reads one file, taking over the documents that are as they were.
    fn read(&mut self, found: &Found, before: File, index: usize, fresh: &mut Fresh) -> Reading {
        let place: Arc<str> = found.path.display().to_string().into();
        let text = match self.shelf.read(&found.path) {
            Ok(text) => text,
            Err(e) => {
                let problem = whole(
                    &place,
                    &format!("the file cannot be read: {e}; what it said before stays in force"),
                    "unreadable-file",
                );
                let (kept, problem) = (before.ids(), Some(problem));
                let mut file = File { place: Arc::clone(&place), kept, problem, ..File::default() };
                if !self.loaded {
                    // It may hold policies; without a last good state nothing says what they would have refused.
                    let mut r = self.translator.reader(Arc::clone(&place));
                    let object = r.unreadable(0, "", "the file cannot be read");
                    file.docs.push(Doc {
                        hash: 0,
                        read_line: 1,
                        line: 1,
                        ids: [object.id.clone()].into(),
                        problems: Box::default(),
                        refused: Box::default(),
                        policies: None,
                        broken: true,
                    });
                    self.take_first(vec![object], &place, 0);
                }
                return Reading::Changed(file);
            }
        };
        let hash = self.hasher.hash_one(&*text);
        if before.text == Some(hash) {
            // Touched, or read when it was so new that its date could not be relied on.
            return Reading::Same(File { stamp: found.stamp, ..before });
        }
        let known = before.ids();
        let mut reusable: HashMap<u64, Vec<Doc>> = HashMap::default();
        for d in before.docs.into_iter().rev().filter(|d| !d.broken) {
            reusable.entry(d.hash).or_default().push(d);
        }
        let mut file = File { place: Arc::clone(&place), stamp: found.stamp, text: Some(hash), ..File::default() };
        let docs = yaml::documents(&text);
        file.docs.reserve_exact(docs.len());
        // With much to take over there is little to parse.
        let worth_it = reusable.is_empty() && docs.len() >= MANY;
        ahead::in_order(&docs, worth_it, |doc, tree| {
            let hash = self.hasher.hash_one(doc.text);
            if let Some(mut same) = reusable.get_mut(&hash).and_then(Vec::pop) {
                same.line = doc.line;
                file.docs.push(same);
                return;
            }
            let (state, objects) = self.parse(doc, tree, hash, &place);
            if !self.loaded {
                self.take_first(objects, &place, hash);
            } else if !objects.is_empty() {
                fresh.insert((index, file.docs.len()), objects);
            }
            file.docs.push(state);
        });
        // Last good: all that is missing while a document does not parse, else what is there and refused.
        let broken = file.docs.iter().any(|d| d.broken);
        let refused: HashSet<&ObjectId> = file.docs.iter().flat_map(|d| d.refused.iter()).collect();
        if broken || !refused.is_empty() {
            let now: HashSet<&ObjectId> = file.docs.iter().flat_map(|d| d.ids.iter()).collect();
            let kept = known.into_iter().filter(|id| {
                id.kind != crate::translate::Kind::Unreadable && !now.contains(id) && (broken || refused.contains(id))
            });
            let kept = kept.collect();
            file.kept = kept;
        }
        file.troubled = file.docs.iter().any(|d| !d.problems.is_empty());
        Reading::Changed(file)
    }

    /// The first reading: files come in path order, so whoever comes first is in force, and nothing has to wait.
    fn take_first(&mut self, objects: Vec<Object>, place: &Arc<str>, hash: u64) {
        for o in objects {
            if let std::collections::hash_map::Entry::Vacant(free) = self.held.entry(o.id.clone()) {
                free.insert(Held { place: Arc::clone(place), hash });
                self.translator.upsert(o);
            }
        }
    }

    /// Reads the objects of one document; `tree` when it has been parsed already.
    fn parse(
        &mut self,
        doc: Document<'_>,
        tree: Option<Result<Node<'_>, YamlError>>,
        hash: u64,
        place: &Arc<str>,
    ) -> (Doc, Vec<Object>) {
        let first = !self.loaded;
        let mut r = self.translator.reader(Arc::clone(place));
        let mut objects = Vec::new();
        let mut listed = 0usize;
        let outcome = match tree {
            Some(tree) => tree,
            None => yaml::parse(doc, &mut |item| {
                listed += 1;
                objects.extend(r.object(&item));
            }),
        };
        let broken = outcome.is_err();
        match outcome {
            Ok(root) if Reader::is_list(&root) => {
                // Parsed ahead: the items are still in the tree.
                if let Some(Node { value: yaml::Value::Seq(items), .. }) = root.get("items") {
                    objects.extend(items.iter().filter_map(|i| r.object(i)));
                }
            }
            Ok(root) => {
                if listed > 0 {
                    objects.clear();
                    r.problems.clear();
                }
                objects.extend(r.object(&root));
            }
            Err(e) => {
                let (problem, object) = broken_document(&mut r, doc, &e, first);
                // Items read before the error are good, but their list is not: all of it stays as it was.
                objects.clear();
                r.problems.clear();
                r.problems.push(problem);
                objects.extend(object);
            }
        }
        let problems = std::mem::take(&mut r.problems);
        let refused = std::mem::take(&mut r.refused);
        let ids = objects.iter().map(|o| o.id.clone()).collect();
        let policies: Box<[Object]> = objects.iter().filter(|o| conflict::must_agree(o)).cloned().collect();
        let policies = (!policies.is_empty()).then(|| Box::new(Policies(policies)));
        let (problems, refused) = (problems.into(), refused.into());
        (Doc { hash, read_line: doc.line, line: doc.line, ids, problems, refused, policies, broken }, objects)
    }

    /// What goes, when the files that changed tell it ([`few::gone`]).
    fn few(&mut self, pass: &Pass) -> Option<Vec<ObjectId>> {
        if !self.plain {
            return None;
        }
        let now = || pass.read.iter().filter_map(|at| pass.files.get(*at)).map(|(_, file)| file);
        self.compared = pass.before.len() + now().map(|file| file.docs.iter().map(|d| d.ids.len()).sum::<usize>()).sum::<usize>();
        few::gone(&pass.before, now(), |id| self.held.contains_key(id))
    }
    fn forget(&mut self, gone: &[ObjectId]) {
        for id in gone {
            self.translator.remove(id);
            self.held.remove(id);
        }
    }

    /// Brings the translator in line with what the files say; returns the problems of objects that are there twice.
    fn settle(&mut self, files: &mut [(PathBuf, File)], mut fresh: Fresh) -> Vec<Problem> {
        // Which document of which file an object is taken from: the first in path order; kept ones come last.
        let mut winners: HashMap<&ObjectId, Option<At>> =
            HashMap::with_capacity_and_hasher(self.held.len(), foldhash::fast::RandomState::default());
        let mut doubles: Vec<(&ObjectId, At, At)> = Vec::new();
        for (f, (_, file)) in files.iter().enumerate() {
            for (d, doc) in file.docs.iter().enumerate() {
                for id in &*doc.ids {
                    if let Some(first) = winners.get(id).copied().flatten() {
                        doubles.push((id, first, (f, d)));
                    } else {
                        winners.insert(id, Some((f, d)));
                    }
                }
            }
        }
        let (conflicts, mut problems) = self.conflicts(files, doubles.iter().map(|(id, ..)| *id).collect());
        for (id, first, second) in doubles.into_iter().filter(|(id, ..)| !conflicts.contains_key(*id)) {
            let Some((_, file)) = files.get(second.0) else { continue };
            let line = file.docs.get(second.1).map_or(0, |d| d.line);
            let other = files.get(first.0).map_or("", |(_, f)| &f.place);
            problems.push(Problem {
                severity: Severity::Error,
                origin: Origin { place: Arc::clone(&file.place), line, object: id.to_string().into() },
                field: "metadata.name".into(),
                message: format!("the same object is already written in {other}; this one is not used").into(),
                fix: "remove one of them".into(),
                code: Some("duplicate"),
            });
        }
        for (_, file) in files.iter() {
            for id in &file.kept {
                if self.held.get(id).is_some_and(Held::is_conflict) {
                    // One side of it cannot be read now, which settles nothing.
                    winners.insert(id, None);
                } else {
                    winners.entry(id).or_insert(None);
                }
            }
        }
        // An object that moved to a document which was not read in this pass must be read from there.
        let mut again: Vec<At> = winners
            .iter()
            .filter(|(id, _)| !conflicts.contains_key(**id))
            .filter_map(|(id, at)| {
                let (f, d) = (*at)?;
                let (_, file) = files.get(f)?;
                let doc = file.docs.get(d)?;
                let held = self.held.get(*id);
                let same = held.is_some_and(|h| h.place == file.place && h.hash == doc.hash);
                (!same && !fresh.contains_key(&(f, d))).then_some((f, d))
            })
            .collect();
        again.sort_unstable();
        again.dedup();
        self.compared += winners.len();
        let gone: Vec<ObjectId> = self.held.keys().filter(|id| !winners.contains_key(*id)).cloned().collect();
        let taken: HashMap<ObjectId, At> = winners
            .iter()
            .filter(|(id, _)| !conflicts.contains_key(**id))
            .filter_map(|(id, at)| {
                at.filter(|at| fresh.contains_key(at) || again.binary_search(at).is_ok()).map(|at| ((*id).clone(), at))
            })
            .collect();
        drop(winners);
        self.plain = problems.is_empty() && conflicts.is_empty() && files.iter().all(|(_, file)| file.kept.is_empty());
        self.forget(&gone);
        for at in again {
            let Some((path, file)) = files.get(at.0) else { continue };
            let Some((line, hash)) = file.docs.get(at.1).map(|d| (d.line, d.hash)) else { continue };
            let place = Arc::clone(&file.place);
            let text = self.shelf.read(path).unwrap_or_default();
            let doc = yaml::documents(&text).into_iter().find(|d| d.line == line && self.hasher.hash_one(d.text) == hash);
            if let Some(doc) = doc {
                let (_, objects) = self.parse(doc, None, hash, &place);
                fresh.insert(at, objects);
            } else {
                // It is another text by now, which nobody has told of yet.
                self.plain = false;
            }
        }
        // A list can name an object twice.
        let mut done: HashSet<ObjectId> = HashSet::default();
        self.take(files, fresh, |at, id| taken.get(id) == Some(&at) && done.insert(id.clone()));
        for (id, closed) in conflicts {
            self.held.insert(id, Held::conflict());
            self.translator.upsert(closed);
        }
        problems
    }

    /// Takes in those of the objects read in this pass that are to be in force.
    fn take(&mut self, files: &[(PathBuf, File)], fresh: Fresh, mut in_force: impl FnMut(At, &ObjectId) -> bool) {
        let mut order: Vec<(At, Vec<Object>)> = fresh.into_iter().collect();
        order.sort_by_key(|(at, _)| *at);
        for (at, objects) in order {
            let Some((place, hash)) = files.get(at.0).and_then(|(_, f)| f.docs.get(at.1).map(|d| (Arc::clone(&f.place), d.hash)))
            else {
                continue;
            };
            for o in objects.into_iter().filter(|o| in_force(at, &o.id)) {
                self.held.insert(o.id.clone(), Held { place: Arc::clone(&place), hash });
                self.translator.upsert(o);
            }
        }
    }

    /// Of the objects that are there several times, the policies that do not say the same: what stands for them, and a
    /// complaint at each place.
    fn conflicts(&self, files: &[(PathBuf, File)], twice: HashSet<&ObjectId>) -> (HashMap<ObjectId, Object>, Vec<Problem>) {
        let (mut out, mut problems) = (HashMap::default(), Vec::new());
        if !twice.iter().any(|id| id.kind.is_security()) {
            return (out, problems);
        }
        let mut versions: BTreeMap<&ObjectId, Vec<(Origin, &Object)>> = BTreeMap::new();
        for doc in files.iter().flat_map(|(_, f)| &f.docs) {
            for o in doc.policies.iter().flat_map(|p| &*p.0).filter(|o| twice.contains(&o.id)) {
                let mut at = (*o.origin).clone();
                at.line = at.line.saturating_add(doc.line).saturating_sub(doc.read_line);
                versions.entry(&o.id).or_default().push((at, o));
            }
        }
        for (id, versions) in versions {
            let objects: Vec<&Object> = versions.iter().map(|(_, o)| *o).collect();
            if !conflict::disagree(&objects) {
                continue;
            }
            let places: Vec<String> = versions.iter().map(|(at, _)| format!("{}:{}", at.place, at.line)).collect();
            let why = format!("it is written several times with different content ({})", places.join(", "));
            if let Some(closed) = conflict::closed(&objects, &why, &self.root_namespace) {
                out.insert(id.clone(), closed);
                problems.extend(versions.into_iter().map(|(origin, _)| Problem {
                    severity: Severity::Error,
                    origin,
                    field: "metadata.name".into(),
                    message: format!("{why}; none of them counts, what they bind is closed until one is left").into(),
                    fix: "remove all but one of them".into(),
                    code: Some("conflict"),
                }));
            }
        }
        (out, problems)
    }

    /// Istio's root namespace, for tools.
    pub fn root_namespace(&self) -> &str {
        &self.root_namespace
    }
    /// The folder.
    pub fn root(&self) -> &Path {
        self.shelf.root()
    }
    /// Takes in texts by their names and forgets what is no text any more, of a folder in memory: what that changes.
    pub(crate) fn put(&mut self, texts: Vec<(PathBuf, Option<Result<String, String>>)>) -> Vec<Change> {
        let touched = self.shelf.put(texts);
        let changes = if touched.is_empty() && self.loaded { None } else { self.reload_touched(&Touched::Names(touched)) };
        changes.unwrap_or_default()
    }
}

impl Pass {
    /// A file is no more.
    fn lose(&mut self, file: &File) {
        self.changed = true;
        self.before.extend(file.ids());
        self.complained |= file.troubled || file.problem.is_some();
    }
}
impl File {
    fn ids(&self) -> Vec<ObjectId> {
        self.docs.iter().flat_map(|d| d.ids.iter()).chain(&self.kept).cloned().collect()
    }
    /// What is wrong with it, where it stands now.
    fn complaints(&self) -> Vec<Problem> {
        let of_docs = self.docs.iter().filter(|_| self.troubled).flat_map(|d| {
            d.problems.iter().cloned().map(|mut p| {
                p.origin.line = p.origin.line.saturating_add(d.line).saturating_sub(d.read_line);
                p
            })
        });
        self.problem.iter().cloned().chain(of_docs).collect()
    }
}

fn whole(place: &Arc<str>, message: &str, code: &'static str) -> Problem {
    Problem {
        severity: Severity::Error,
        origin: Origin { place: Arc::clone(place), line: 0, object: "file".into() },
        field: "".into(),
        message: message.into(),
        fix: "".into(),
        code: Some(code),
    }
}

/// What a document that does not parse means.
fn broken_document(r: &mut Reader<'_>, doc: Document<'_>, e: &YamlError, first: bool) -> (Problem, Option<Object>) {
    let security = ["AuthorizationPolicy", "PeerAuthentication", "security.istio.io"].iter().any(|w| doc.text.contains(w));
    let namespace = if security { namespace_in(doc.text) } else { None };
    let (object, effect) = match (security, namespace) {
        (false, _) => (None, "objects it held before stay as they were".to_owned()),
        (true, Some(ns)) => (
            Some(r.unreadable(doc.line, ns, &e.message)),
            format!("it holds a security policy, so until it is corrected namespace {ns} is denied"),
        ),
        (true, None) if first => (
            Some(r.unreadable(doc.line, "", &e.message)),
            "it holds a security policy of a namespace that cannot be read, so until it is corrected everything is denied"
                .to_owned(),
        ),
        (true, None) => (None, "it holds a security policy; what it said before stays in force".to_owned()),
    };
    let problem = Problem {
        severity: Severity::Error,
        origin: Origin { place: Arc::clone(&r.place), line: e.line, object: "document".into() },
        field: "".into(),
        message: format!("not valid YAML: {}; {effect}", e.message).into(),
        fix: "correct the syntax at this line".into(),
        code: Some("yaml"),
    };
    (problem, object)
}

/// The namespace of a document that does not parse, when its text leaves no doubt: the one value of `namespace:` lines
/// below `metadata:`.
fn namespace_in(text: &str) -> Option<&str> {
    let mut inside: Option<usize> = None;
    let mut found: Option<&str> = None;
    for line in text.lines() {
        let body = line.trim_start();
        if body.is_empty() || body.starts_with('#') {
            continue;
        }
        let indent = line.len() - body.len();
        if inside.is_some_and(|at| indent <= at) {
            inside = None;
        }
        if body.trim_end() == "metadata:" {
            inside = Some(indent);
            continue;
        }
        if inside.is_some()
            && let Some(value) = body.strip_prefix("namespace:")
        {
            let value = value.split('#').next().unwrap_or_default().trim().trim_matches(['"', '\'']);
            let good = !value.is_empty() && value.bytes().all(|b| matches!(b, b'a'..=b'z' | b'0'..=b'9' | b'-'));
            if !good || found.is_some_and(|f| f != value) {
                return None;
            }
            found = Some(value);
        }
    }
    found
}

#[cfg(test)]
mod tests;
