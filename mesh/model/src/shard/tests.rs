use super::*;
use std::collections::HashMap;

#[test]
fn behaves_as_a_map_and_keeps_old_versions() {
    let mut shards: Shards<u32, u32> = Shards::default();
    let mut model = HashMap::new();
    let mut kept = Vec::new();
    let mut x: u32 = 7;
    for step in 0..20_000_u32 {
        x = x.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        let key = (x >> 8) % 3000;
        if x.is_multiple_of(3) {
            assert_eq!(shards.remove(&key), model.remove(&key));
        } else {
            assert_eq!(shards.insert(key, step), model.insert(key, step));
        }
        if step % 5000 == 0 {
            kept.push((shards.clone(), model.clone()));
        }
    }
    kept.push((shards, model));
    for (s, m) in kept {
        assert_eq!(s.len(), m.len());
        assert_eq!(s.iter().map(|(k, v)| (*k, *v)).collect::<HashMap<_, _>>(), m);
        assert!((0..3000).all(|k| s.get(&k) == m.get(&k)));
    }
}

/// A key whose hash is always the same: the trie must neither recurse for ever nor lose entries.
#[derive(Clone, PartialEq, Eq, Debug)]
struct Collides(u32);
impl Hash for Collides {
    fn hash<H: std::hash::Hasher>(&self, h: &mut H) {
        h.write_u8(0);
    }
}

#[test]
fn full_collisions_stay_correct() {
    let mut s = Shards::default();
    for i in 0..200 {
        s.insert(Collides(i), i);
    }
    assert_eq!(s.len(), 200);
    assert!((0..200).all(|i| s.get(&Collides(i)) == Some(&i)));
    for i in 0..200 {
        assert_eq!(s.remove(&Collides(i)), Some(i));
    }
    assert!(s.is_empty() && s.iter().next().is_none());
}

#[test]
fn edit_creates_changes_and_removes() {
    let mut s: Shards<u8, Vec<u8>> = Shards::default();
    s.edit(&1, |v| {
        v.push(1);
        Keep::Yes
    });
    let before = s.clone();
    s.edit(&1, |v| {
        v.push(2);
        Keep::Yes
    });
    assert_eq!((before.get(&1), s.get(&1)), (Some(&vec![1]), Some(&vec![1, 2])));
    s.edit(&1, |_| Keep::No);
    s.edit(&9, |_| Keep::No);
    assert!(s.is_empty());
}
