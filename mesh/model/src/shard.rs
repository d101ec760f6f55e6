//! A sharded copy-on-write map: cloning shares everything, a write copies one small shard and the path to it.
//!
//! Shards are the leaves of a shallow trie over the hash, so the number of shards grows with the map by splitting one
//! shard at a time: no write ever rehashes the whole table, and one write into 100 000 entries copies a few hundred
//! bytes. Within a batch a shard that nobody else holds is changed in place. Upstream: `snapshot`. Refuses: ordering.
use foldhash::quality::RandomState;
use hashbrown::Equivalent;
use std::fmt;
use std::hash::{BuildHasher, Hash};
use std::mem;
use std::sync::Arc;

/// Children of a branch; a power of two.
const FAN_OUT: usize = 8;
/// Hash bits one branch consumes.
const BITS: u32 = FAN_OUT.trailing_zeros();
/// Entries of a shard before it is split.
const SHARD_MAX: usize = 24;

/// The map. `K` and `V` should be cheap to clone (`Arc`s).
pub struct Shards<K, V> {
    root: Node<K, V>,
    len: usize,
    hasher: RandomState,
}

/// One entry with its hash, so that splitting a shard and rejecting a candidate touch no key.
#[derive(Clone)]
struct Slot<K, V> {
    hash: u64,
    key: K,
    value: V,
}
enum Node<K, V> {
    Empty,
    Shard(Arc<Vec<Slot<K, V>>>),
    Branch(Arc<[Node<K, V>; FAN_OUT]>),
}
impl<K, V> Clone for Node<K, V> {
    fn clone(&self) -> Self {
        match self {
            Self::Empty => Self::Empty,
            Self::Shard(s) => Self::Shard(Arc::clone(s)),
            Self::Branch(b) => Self::Branch(Arc::clone(b)),
        }
    }
}
impl<K, V> Clone for Shards<K, V> {
    fn clone(&self) -> Self {
        Self { root: self.root.clone(), len: self.len, hasher: self.hasher.clone() }
    }
}
impl<K, V> Default for Shards<K, V> {
    fn default() -> Self {
        Self { root: Node::Empty, len: 0, hasher: RandomState::default() }
    }
}
impl<K, V> fmt::Debug for Shards<K, V> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Shards({} entries)", self.len)
    }
}

/// The child of a branch a hash belongs to at a depth.
fn child(hash: u64, shift: u32) -> usize {
    // Masked to FAN_OUT - 1, so always a valid index of a branch.
    (hash.checked_shr(shift).unwrap_or(0) as usize) & (FAN_OUT - 1)
}

impl<K: Hash + Eq + Clone, V: Clone> Shards<K, V> {
    /// Number of entries.
    pub fn len(&self) -> usize {
        self.len
    }
    /// Whether there is no entry.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }
    /// The value of a key.
    pub fn get<Q: Hash + Equivalent<K> + ?Sized>(&self, key: &Q) -> Option<&V> {
        let hash = self.hasher.hash_one(key);
        let mut node = &self.root;
        let mut shift = 0;
        loop {
            match node {
                Node::Empty => return None,
                Node::Shard(s) => {
                    return s.iter().find(|s| s.hash == hash && key.equivalent(&s.key)).map(|s| &s.value);
                }
                Node::Branch(b) => {
                    node = b.get(child(hash, shift))?;
                    shift += BITS;
                }
            }
        }
    }
    /// The value of a key to change it; copies its shard when another version shares it.
    pub fn get_mut<Q: Hash + Equivalent<K> + ?Sized>(&mut self, key: &Q) -> Option<&mut V> {
        // Looked up first: a miss must not copy anything.
        self.get(key)?;
        let hash = self.hasher.hash_one(key);
        let mut node = &mut self.root;
        let mut shift = 0;
        loop {
            match node {
                Node::Empty => return None,
                Node::Shard(s) => {
                    let slot = Arc::make_mut(s).iter_mut().find(|s| s.hash == hash && key.equivalent(&s.key));
                    return slot.map(|s| &mut s.value);
                }
                Node::Branch(b) => {
                    node = Arc::make_mut(b).get_mut(child(hash, shift))?;
                    shift += BITS;
                }
            }
        }
    }
    /// Sets a value; returns the one it replaces.
    pub fn insert(&mut self, key: K, value: V) -> Option<V> {
        let hash = self.hasher.hash_one(&key);
        let old = insert(&mut self.root, 0, Slot { hash, key, value });
        self.len += usize::from(old.is_none());
        old
    }
    /// Removes a key; returns its value.
    pub fn remove<Q: Hash + Equivalent<K> + ?Sized>(&mut self, key: &Q) -> Option<V> {
        self.get(key)?;
        let hash = self.hasher.hash_one(key);
        let mut node = &mut self.root;
        let mut shift = 0;
        while let Node::Branch(b) = node {
            node = Arc::make_mut(b).get_mut(child(hash, shift))?;
            shift += BITS;
        }
        let Node::Shard(s) = node else { return None };
        let slots = Arc::make_mut(s);
        let at = slots.iter().position(|s| s.hash == hash && key.equivalent(&s.key))?;
        let old = slots.swap_remove(at);
        if slots.is_empty() {
            *node = Node::Empty;
        }
        self.len -= 1;
        Some(old.value)
    }
    /// Changes the value of a key in place, creating it from its default when missing and removing it when `f` says
    /// that nothing is left.
    pub fn edit(&mut self, key: &K, f: impl FnOnce(&mut V) -> Keep)
    where
        V: Default,
    {
        if let Some(v) = self.get_mut(key) {
            if f(v) == Keep::No {
                self.remove(key);
            }
            return;
        }
        let mut v = V::default();
        if f(&mut v) == Keep::Yes {
            self.insert(key.clone(), v);
        }
    }
    /// All entries, in no order.
    pub fn iter(&self) -> Iter<'_, K, V> {
        Iter { todo: vec![&self.root], slots: [].iter() }
    }
    /// All values, in no order.
    pub fn values(&self) -> impl Iterator<Item = &V> {
        self.iter().map(|(_, v)| v)
    }
}
impl<'a, K: Hash + Eq + Clone, V: Clone> IntoIterator for &'a Shards<K, V> {
    type Item = (&'a K, &'a V);
    type IntoIter = Iter<'a, K, V>;
    fn into_iter(self) -> Iter<'a, K, V> {
        self.iter()
    }
}

/// What [`Shards::edit`] does with the edited value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Keep {
    /// Store it.
    Yes,
    /// Remove the key.
    No,
}

fn insert<K: Eq + Clone, V: Clone>(node: &mut Node<K, V>, shift: u32, slot: Slot<K, V>) -> Option<V> {
    match node {
        Node::Empty => {
            *node = Node::Shard(Arc::new(vec![slot]));
            None
        }
        Node::Branch(b) => {
            let b = Arc::make_mut(b);
            insert(b.get_mut(child(slot.hash, shift))?, shift + BITS, slot)
        }
        Node::Shard(s) => {
            let slots = Arc::make_mut(s);
            if let Some(old) = slots.iter_mut().find(|o| o.hash == slot.hash && o.key == slot.key) {
                return Some(mem::replace(&mut old.value, slot.value));
            }
            // In small steps: shards are many, and the slack of doubling would be a third of the table.
            if slots.len() == slots.capacity() {
                slots.reserve_exact(4);
            }
            slots.push(slot);
            // Past the last hash bit a shard only grows: these are full 64-bit collisions.
            if slots.len() > SHARD_MAX && shift < u64::BITS {
                let mut parts: [Vec<Slot<K, V>>; FAN_OUT] = std::array::from_fn(|_| Vec::new());
                for slot in mem::take(slots) {
                    if let Some(p) = parts.get_mut(child(slot.hash, shift)) {
                        p.push(slot);
                    }
                }
                *node = Node::Branch(Arc::new(parts.map(|p| if p.is_empty() { Node::Empty } else { Node::Shard(Arc::new(p)) })));
            }
            None
        }
    }
}

/// Iterator over a [`Shards`].
pub struct Iter<'a, K, V> {
    todo: Vec<&'a Node<K, V>>,
    slots: std::slice::Iter<'a, Slot<K, V>>,
}
impl<'a, K, V> Iterator for Iter<'a, K, V> {
    type Item = (&'a K, &'a V);
    fn next(&mut self) -> Option<Self::Item> {
        loop {
            if let Some(s) = self.slots.next() {
                return Some((&s.key, &s.value));
            }
            match self.todo.pop()? {
                Node::Empty => {}
                Node::Shard(s) => self.slots = s.iter(),
                Node::Branch(b) => self.todo.extend(b.iter()),
            }
        }
    }
}

#[cfg(test)]
mod tests;
