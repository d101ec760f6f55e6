//! What the process still waits for before it may be called ready, by name.
//!
//! Owns the set of pending tasks and the answer to kubelet (`GET /healthz/ready`, port 15021). A task that is dropped
//! without saying so stays pending: something that died is not ready.

use std::collections::BTreeMap;
use std::sync::Arc;

use http::{Method, StatusCode};
use parking_lot::Mutex;
use tokio::sync::watch;

use crate::admin::{HttpServer, text};

/// The set of pending tasks. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Readiness {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    pending: Mutex<Pending>,
    state: watch::Sender<State>,
}

#[derive(Debug, Default)]
struct Pending {
    /// How many there are of each name.
    tasks: BTreeMap<Arc<str>, usize>,
    /// How many of all concern others than themselves.
    general: usize,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct State {
    ready: bool,
    ready_otherwise: bool,
}

impl Default for Readiness {
    fn default() -> Self {
        Self::new()
    }
}

impl Readiness {
    /// Nothing pending: ready.
    pub fn new() -> Self {
        let state = watch::Sender::new(State { ready: true, ready_otherwise: true });
        Self { inner: Arc::new(Inner { pending: Mutex::default(), state }) }
    }

    /// Adds a pending task. The same name may be pending several times; it is listed once.
    pub fn pending(&self, name: &str) -> ReadyTask {
        self.add(name, true)
    }

    /// Adds a pending task that keeps nothing else from being done: the process is not ready with it, but [otherwise](Self::ready_otherwise).
    pub fn pending_alone(&self, name: &str) -> ReadyTask {
        self.add(name, false)
    }

    fn add(&self, name: &str, general: bool) -> ReadyTask {
        let task = ReadyTask { inner: Arc::clone(&self.inner), name: name.into(), general, pending: Mutex::new(true) };
        self.inner.add(&task);
        task
    }

    /// Whether nothing is pending.
    pub fn is_ready(&self) -> bool {
        self.inner.pending.lock().tasks.is_empty()
    }

    /// Names of the pending tasks, sorted.
    pub fn pending_names(&self) -> Vec<Arc<str>> {
        self.inner.pending.lock().tasks.keys().cloned().collect()
    }

    /// Resolves once nothing is pending.
    pub async fn ready(&self) {
        self.becomes(|state| state.ready).await;
    }

    /// Resolves once nothing is pending but what was said to [concern nothing else](Self::pending_alone).
    pub async fn ready_otherwise(&self) {
        self.becomes(|state| state.ready_otherwise).await;
    }

    async fn becomes(&self, wanted: impl Fn(State) -> bool) {
        let mut rx = self.inner.state.subscribe();
        // The sender lives in `self`, so the only outcome is readiness.
        let _ = rx.wait_for(|state| wanted(*state)).await;
    }

    /// The status and body of `GET /healthz/ready`.
    pub fn answer(&self) -> (StatusCode, String) {
        let names = self.pending_names();
        if names.is_empty() {
            return (StatusCode::OK, "ready\n".to_owned());
        }
        let names: Vec<&str> = names.iter().map(AsRef::as_ref).collect();
        (StatusCode::INTERNAL_SERVER_ERROR, format!("not ready, pending: {}\n", names.join(", ")))
    }

    /// Adds `GET /healthz/ready` to a server.
    #[must_use]
    pub fn route(&self, server: HttpServer) -> HttpServer {
        let readiness = self.clone();
        server.route(Method::GET, "/healthz/ready", move |_| {
            let (status, body) = readiness.answer();
            text(status, body)
        })
    }
}

impl Inner {
    fn add(&self, task: &ReadyTask) {
        let mut pending = self.pending.lock();
        *pending.tasks.entry(Arc::clone(&task.name)).or_insert(0) += 1;
        pending.general += usize::from(task.general);
        self.tell(&pending);
    }

    fn remove(&self, task: &ReadyTask) {
        let mut pending = self.pending.lock();
        if let Some(count) = pending.tasks.get_mut(&task.name) {
            *count -= 1;
            if *count == 0 {
                pending.tasks.remove(&task.name);
            }
        }
        pending.general -= usize::from(task.general);
        self.tell(&pending);
    }

    fn tell(&self, pending: &Pending) {
        self.state.send_replace(State { ready: pending.tasks.is_empty(), ready_otherwise: pending.general == 0 });
    }
}

/// One thing the process waits for.
#[derive(Debug)]
#[must_use = "a dropped task stays pending for ever"]
pub struct ReadyTask {
    inner: Arc<Inner>,
    name: Arc<str>,
    general: bool,
    pending: Mutex<bool>,
}

impl ReadyTask {
    /// The task is done.
    pub fn ready(&self) {
        let mut pending = self.pending.lock();
        if std::mem::replace(&mut *pending, false) {
            self.inner.remove(self);
        }
    }

    /// The task waits again, for example for a lost connection.
    pub fn unready(&self) {
        let mut pending = self.pending.lock();
        if !std::mem::replace(&mut *pending, true) {
            self.inner.add(self);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn names_are_listed_sorted_and_once() {
        let readiness = Readiness::new();
        assert_eq!(readiness.answer(), (StatusCode::OK, "ready\n".to_owned()));
        let xds = readiness.pending("xds");
        let cni = readiness.pending("cni");
        let again = readiness.pending("cni");
        assert_eq!(readiness.answer(), (StatusCode::INTERNAL_SERVER_ERROR, "not ready, pending: cni, xds\n".to_owned()));
        xds.ready();
        xds.ready();
        cni.ready();
        assert_eq!(readiness.answer().1, "not ready, pending: cni\n");
        drop(again);
        assert!(!readiness.is_ready(), "a task that died is not ready");
    }

    #[tokio::test]
    async fn what_concerns_nothing_else_is_told_apart() {
        let readiness = Readiness::new();
        let (pod, mesh) = (readiness.pending_alone("pod a"), readiness.pending("mesh"));
        let otherwise = tokio::spawn({
            let readiness = readiness.clone();
            async move { readiness.ready_otherwise().await }
        });
        tokio::task::yield_now().await;
        assert!(!otherwise.is_finished());
        mesh.ready();
        otherwise.await.unwrap();
        assert_eq!(readiness.answer().1, "not ready, pending: pod a\n");
        pod.ready();
        assert!(readiness.is_ready());
    }

    #[tokio::test]
    async fn ready_resolves_and_can_be_lost_again() {
        let readiness = Readiness::new();
        let task = readiness.pending("xds");
        let waiter = tokio::spawn({
            let readiness = readiness.clone();
            async move { readiness.ready().await }
        });
        task.ready();
        waiter.await.unwrap();
        task.unready();
        assert!(!readiness.is_ready());
    }
}
