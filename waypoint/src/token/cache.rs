//! Tokens this data thread has verified: a signature is checked once for as long as token and keys stay the same.
//!
//! Only verified tokens are kept, with the very keys that verified them, in two generations: when the younger is full it becomes
//! the older, and what nobody asked for since is gone. Time, audience and issuer are judged again for each request.
use foldhash::quality::RandomState;
use mesh_tokens::{Jwt, KeySet};
use std::cell::RefCell;
use std::collections::HashMap;
use std::sync::Arc;

/// Bytes of token text of one generation. What was read of a token costs a few times as much.
const GENERATION: usize = 1 << 20;
/// Longest token that is kept.
const LONGEST: usize = 16 << 10;

/// A token and the keys that verified it.
#[derive(Clone)]
pub(crate) struct Known {
    pub jwt: Arc<Jwt>,
    pub keys: Arc<KeySet>,
}

#[derive(Default)]
struct Cache {
    young: HashMap<Box<str>, Known, RandomState>,
    old: HashMap<Box<str>, Known, RandomState>,
    bytes: usize,
}
impl Cache {
    fn get(&mut self, text: &str) -> Option<Known> {
        if let Some(known) = self.young.get(text) {
            return Some(known.clone());
        }
        let known = self.old.remove(text)?;
        self.put(known.clone());
        Some(known)
    }
    fn put(&mut self, known: Known) {
        let text = known.jwt.text();
        if text.len() > LONGEST {
            return;
        }
        if self.bytes + text.len() > GENERATION {
            self.old = std::mem::take(&mut self.young);
            self.bytes = 0;
        }
        let (text, length) = (text.into(), text.len());
        if self.young.insert(text, known).is_none() {
            self.bytes += length;
        }
    }
}

thread_local! {
    static CACHE: RefCell<Cache> = RefCell::default();
}

/// What this thread knows of a token.
pub(crate) fn get(text: &str) -> Option<Known> {
    CACHE.with_borrow_mut(|cache| cache.get(text))
}
/// Remembers a token that was verified just now.
pub(crate) fn put(jwt: Arc<Jwt>, keys: Arc<KeySet>) {
    CACHE.with_borrow_mut(|cache| cache.put(Known { jwt, keys }));
}

#[cfg(test)]
mod tests {
    use super::*;
    use base64::Engine as _;

    fn known(n: usize) -> Known {
        let part = |json: String| base64::prelude::BASE64_URL_SAFE_NO_PAD.encode(json);
        let text = format!(
            "{}.{}.c2ln",
            part(r#"{"alg":"RS256"}"#.into()),
            part(format!(r#"{{"iss":"i","n":{n},"pad":"{}"}}"#, "x".repeat(1000)))
        );
        let keys = KeySet::parse(br#"{"keys":[{"kty":"oct","k":"AAAA"}]}"#).expect("a set");
        Known { jwt: Arc::new(Jwt::parse(&text).expect("a token")), keys: Arc::new(keys) }
    }
    #[test]
    fn what_is_used_stays_and_the_size_is_bounded() {
        let mut cache = Cache::default();
        let first = known(0);
        cache.put(first.clone());
        for n in 1..5000 {
            cache.put(known(n));
            assert!(cache.get(first.jwt.text()).is_some(), "asked for all the time, still there after {n}");
        }
        let bytes = |map: &HashMap<Box<str>, Known, RandomState>| map.keys().map(|k| k.len()).sum::<usize>();
        assert!(bytes(&cache.young) <= GENERATION && bytes(&cache.old) <= GENERATION);
        assert_eq!(bytes(&cache.young), cache.bytes);
        assert!(cache.get(known(1).jwt.text()).is_none(), "never asked for");
        assert!(cache.get(known(4999).jwt.text()).is_some());
    }
}
