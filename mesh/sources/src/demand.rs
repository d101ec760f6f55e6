//! What was asked of a control plane that tells only what it is asked for (istiod with `XDS_ON_DEMAND`).
//!
//! Owns which parts of the mesh were asked for, what was said to each, and when each was last of use. One question is asked for all
//! who wait for its answer; how many there are is bounded, those of no use are given up, and that there is nothing is believed for
//! a short time only. Refuses a question more than there may be. Upstream: connections, through [`crate::Mesh::fetch`].
//! Downstream: the stream of istiod.

use std::collections::HashMap;
use std::collections::hash_map::Entry as Place;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use mesh_model::wanted::Wanted;
use parking_lot::RwLock;
use tokio::sync::{Notify, watch};
use tokio::time::Instant;

/// How much is remembered, and for how long.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Most parts of the mesh asked for at a time.
    pub most: usize,
    /// How long one is kept that nobody uses.
    pub idle: Duration,
    /// How long it is believed that there is nothing, while the control plane is heard.
    pub absent: Duration,
}

impl Default for Limits {
    /// 10 000 parts, ten minutes, ten seconds.
    fn default() -> Self {
        Self { most: 10_000, idle: Duration::from_mins(10), absent: Duration::from_secs(10) }
    }
}

/// How a question ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fetched {
    /// It is in the mesh.
    Found,
    /// There is no such thing.
    Absent,
    /// Nobody said in time, or too much is asked for already.
    Unanswered,
}

/// What is asked for. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Demand {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    limits: Limits,
    began: Instant,
    asked: RwLock<Asked>,
    /// Something was added to [`Asked::new`].
    added: Notify,
    /// Something was said to be absent.
    settled: watch::Sender<()>,
}

#[derive(Debug, Default)]
struct Asked {
    entries: HashMap<Wanted, Entry>,
    /// The same by their names on the wire.
    names: HashMap<String, Wanted>,
    /// Not sent yet.
    new: Vec<Wanted>,
}

#[derive(Debug)]
struct Entry {
    answer: Answer,
    /// When it was last of use: milliseconds since the beginning.
    used: AtomicU64,
}

/// What was said to a question.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Answer {
    /// Nothing yet.
    Awaited,
    /// The thing itself.
    Present,
    /// That there is nothing.
    Absent(Instant),
}

/// What is to be done after a question was noted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Noted {
    /// Wait for the mesh.
    Wait,
    /// There is nothing.
    Absent,
    /// There are too many.
    Full,
}

impl Demand {
    /// Nothing asked for yet.
    pub fn new(limits: Limits) -> Self {
        let inner = Inner {
            limits,
            began: Instant::now(),
            asked: RwLock::default(),
            added: Notify::new(),
            settled: watch::Sender::new(()),
        };
        Self { inner: Arc::new(inner) }
    }

    fn now(&self) -> u64 {
        self.inner.began.elapsed().as_millis() as u64
    }

    /// Says that a part of the mesh was of use, if it was asked for.
    pub fn touch(&self, wanted: &Wanted) {
        if let Some(entry) = self.inner.asked.read().entries.get(wanted) {
            entry.used.store(self.now(), Ordering::Relaxed);
        }
    }

    /// Notes a question, unless it was asked already.
    pub(crate) fn ask(&self, wanted: &Wanted) -> Noted {
        self.touch(wanted);
        let known = self.inner.asked.read().entries.get(wanted).map(|entry| entry.answer);
        match known {
            Some(Answer::Absent(_)) => return Noted::Absent,
            Some(Answer::Awaited | Answer::Present) => return Noted::Wait,
            None => {}
        }
        let mut asked = self.inner.asked.write();
        let full = asked.entries.len() >= self.inner.limits.most;
        match asked.entries.entry(wanted.clone()) {
            Place::Occupied(_) => return Noted::Wait,
            Place::Vacant(_) if full => return Noted::Full,
            Place::Vacant(place) => {
                place.insert(Entry { answer: Answer::Awaited, used: AtomicU64::new(self.now()) });
            }
        }
        asked.names.insert(wanted.to_string(), wanted.clone());
        asked.new.push(wanted.clone());
        drop(asked);
        self.inner.added.notify_one();
        Noted::Wait
    }

    /// Tells when something was said to be absent.
    pub(crate) fn settled(&self) -> watch::Receiver<()> {
        self.inner.settled.subscribe()
    }

    /// The names of new questions; resolves when there are some.
    pub(crate) async fn asked(&self) -> Vec<String> {
        loop {
            let new = std::mem::take(&mut self.inner.asked.write().new);
            if !new.is_empty() {
                return new.iter().map(ToString::to_string).collect();
            }
            self.inner.added.notified().await;
        }
    }

    /// The names of everything asked for: what a new stream begins with.
    pub(crate) fn resume(&self) -> Vec<String> {
        let mut asked = self.inner.asked.write();
        asked.new.clear();
        asked.names.keys().cloned().collect()
    }

    /// Takes down what was said: of these things that they are there, of those that they are not, by themselves or by name.
    pub(crate) fn settle<'a>(&self, present: &[Wanted], absent: &[Wanted], unknown: impl IntoIterator<Item = &'a str>) {
        let mut asked = self.inner.asked.write();
        let asked = &mut *asked;
        let gone = Answer::Absent(Instant::now());
        let named = unknown.into_iter().filter_map(|name| asked.names.get(name));
        for wanted in named.chain(absent) {
            if let Some(entry) = asked.entries.get_mut(wanted) {
                entry.answer = gone;
            }
        }
        for wanted in present {
            if let Some(entry) = asked.entries.get_mut(wanted) {
                entry.answer = Answer::Present;
            }
        }
        self.inner.settled.send_replace(());
    }

    /// What is of no use any more, and what is too much: the longest unused first. Called while the control plane is heard.
    pub(crate) fn stale(&self) -> Vec<Wanted> {
        let (now, Limits { most, idle, absent }) = (self.now(), self.inner.limits);
        let asked = self.inner.asked.read();
        let since = |entry: &Entry| Duration::from_millis(now.saturating_sub(entry.used.load(Ordering::Relaxed)));
        let (mut stale, mut kept) = (Vec::new(), Vec::new());
        for (wanted, entry) in &asked.entries {
            let over = match entry.answer {
                Answer::Absent(at) => at.elapsed() >= absent,
                Answer::Awaited | Answer::Present => since(entry) >= idle,
            };
            if over {
                stale.push(wanted.clone());
            } else {
                kept.push((since(entry), wanted));
            }
        }
        // A tenth is left for new ones.
        let room = most - most / 10;
        if kept.len() > room {
            kept.sort_unstable_by_key(|(since, _)| *since);
            stale.extend(kept.into_iter().skip(room).map(|(_, wanted)| wanted.clone()));
        }
        stale
    }

    /// Gives questions up.
    pub(crate) fn give_up(&self, stale: &[Wanted]) {
        let mut asked = self.inner.asked.write();
        for wanted in stale {
            asked.entries.remove(wanted);
            asked.names.remove(&wanted.to_string());
        }
        asked.new.retain(|wanted| !stale.contains(wanted));
    }

    /// Whether it is asked for and was of use within this time.
    pub(crate) fn is_used(&self, wanted: &Wanted, within: Duration) -> bool {
        let since = self.now().saturating_sub(within.as_millis() as u64);
        self.inner.asked.read().entries.get(wanted).is_some_and(|entry| entry.used.load(Ordering::Relaxed) >= since)
    }

    /// Whether it is asked for.
    pub(crate) fn has(&self, wanted: &Wanted) -> bool {
        self.inner.asked.read().entries.contains_key(wanted)
    }

    /// How much is asked for.
    pub(crate) fn count(&self) -> usize {
        self.inner.asked.read().entries.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use mesh_model::service::ServiceKey;

    fn wanted(name: &str) -> Wanted {
        Wanted::Service(ServiceKey::new("ns", name))
    }

    #[tokio::test(start_paused = true)]
    async fn a_question_is_asked_once_and_its_answer_is_remembered_for_a_while() {
        let demand = Demand::new(Limits::default());
        assert_eq!((demand.ask(&wanted("a")), demand.ask(&wanted("a"))), (Noted::Wait, Noted::Wait));
        assert_eq!(demand.asked().await, ["ns/a"]);
        demand.settle(&[], &[], ["ns/a", "ns/nobody-asked"]);
        assert_eq!(demand.ask(&wanted("a")), Noted::Absent);
        assert!(demand.stale().is_empty());
        tokio::time::advance(Duration::from_secs(10)).await;
        demand.touch(&wanted("a"));
        assert_eq!(demand.stale(), [wanted("a")], "that there is nothing is not believed for ever");
        demand.give_up(&demand.stale());
        assert_eq!((demand.count(), demand.ask(&wanted("a"))), (0, Noted::Wait), "it is asked again");
        assert_eq!(demand.resume(), ["ns/a"]);
    }

    #[tokio::test(start_paused = true)]
    async fn what_nobody_uses_is_given_up_and_there_is_a_bound() {
        let demand = Demand::new(Limits { most: 10, ..Limits::default() });
        for name in ["a", "b", "c", "d", "e", "f", "g", "h", "i", "j"] {
            assert_eq!(demand.ask(&wanted(name)), Noted::Wait);
            demand.settle(&[wanted(name)], &[], []);
            tokio::time::advance(Duration::from_secs(1)).await;
        }
        assert_eq!(demand.ask(&wanted("k")), Noted::Full);
        demand.touch(&wanted("a"));
        let stale = demand.stale();
        assert_eq!(stale, [wanted("b")], "the longest unused makes room");
        demand.give_up(&stale);
        assert_eq!(demand.ask(&wanted("k")), Noted::Wait);
        tokio::time::advance(Duration::from_secs(599)).await;
        demand.touch(&wanted("c"));
        tokio::time::advance(Duration::from_secs(2)).await;
        let stale = demand.stale();
        assert!(stale.len() == 9 && !stale.contains(&wanted("c")), "{stale:?}");
    }
}
