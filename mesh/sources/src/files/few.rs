//! What a few files that changed mean, told without looking at the others.
//!
//! Owns the rule when that is possible: every object of the folder was written once and is in force as written (the caller
//! knows), and so it is with what these files say now. Then what they no longer name goes, what was read anew is taken in, and
//! nothing else is touched: the same that comparing the names of all objects would say (property test), at the cost of what
//! changed. Refuses everything else, which is [`super::Folder::settle`]'s.

use super::{File, HashSet};
use crate::translate::ObjectId;

/// The objects that go. `before`: what the files that changed or went named; `now`: those that are there; `held`: whether an
/// object is in force. `None` when an object is there twice now, or something cannot be read: all files have to be asked.
pub(super) fn gone<'a>(
    before: &[ObjectId],
    now: impl Iterator<Item = &'a File>,
    held: impl Fn(&ObjectId) -> bool,
) -> Option<Vec<ObjectId>> {
    let before: HashSet<&ObjectId> = before.iter().collect();
    let mut named: HashSet<&ObjectId> = HashSet::default();
    for file in now {
        if file.problem.is_some() || !file.kept.is_empty() {
            return None;
        }
        for id in file.docs.iter().flat_map(|doc| &*doc.ids) {
            // In force and not from here: another file has it.
            if !named.insert(id) || (!before.contains(id) && held(id)) {
                return None;
            }
        }
    }
    Some(before.into_iter().filter(|id| !named.contains(*id)).cloned().collect())
}

#[cfg(test)]
mod tests;
