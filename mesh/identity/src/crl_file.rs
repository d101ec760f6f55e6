//! The file that revocation lists are read from, again whenever it changes.
//!
//! The lists travel with the trust bundles ([`over`]), so that whatever follows a change of roots follows theirs too: the next
//! handshake, and the judgement of live tunnels ([`crate::live`]). Refuses to lose lists: a file that goes, or cannot be read,
//! leaves those it had in force, until their date: then what was accepted by them is judged anew, without them.
//! Upstream: the operator, a source. Downstream: whoever asks the source for its bundles.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::SystemTime;

use tokio::runtime::Handle;
use tokio::sync::watch;

use crate::bundle::TrustBundles;
use crate::look::{Stamp, looks, stamp};
use crate::revocation::{Revocation, Unknown};
use crate::source::{IdentitySource, WithBundles};

/// Where lists are read.
#[derive(Clone, Debug)]
pub struct CrlFile {
    /// The file.
    pub path: PathBuf,
    /// What is done with certificates it does not speak of.
    pub unknown: Unknown,
}

/// `source`, with the lists of a file in its bundles. Reads the file once before it returns and follows it on `control`.
pub fn over(source: Arc<dyn IdentitySource>, file: CrlFile, control: &Handle) -> Arc<dyn IdentitySource> {
    let (stamp, lists) = (stamp(&file.path), read(&file));
    let follow = Follow { lists: Arc::new(lists.unwrap_or_else(|| Revocation::none(file.unknown))), stamp, file };
    let bundles = source.bundle();
    let with = follow.apply(&bundles.borrow());
    let sender = watch::Sender::new(with);
    let receiver = sender.subscribe();
    control.spawn(follow.run(bundles, sender));
    Arc::new(WithBundles { source, bundles: receiver })
}

/// The lists of the file; `None`, and a word in the log, where they cannot be read.
fn read(file: &CrlFile) -> Option<Revocation> {
    let read = std::fs::read(&file.path).map_err(|error| error.to_string());
    match read.and_then(|bytes| Revocation::read(&bytes, file.unknown)) {
        Ok(lists) => {
            tracing::info!(path = %file.path.display(), lists = lists.count(), "certificate revocation lists read");
            Some(lists)
        }
        Err(why) => {
            tracing::error!(
                path = %file.path.display(), why, unknown = ?file.unknown,
                "certificate revocation lists cannot be read: those read before stay in force"
            );
            None
        }
    }
}

struct Follow {
    file: CrlFile,
    stamp: Stamp,
    lists: Arc<Revocation>,
}

impl Follow {
    fn apply(&self, bundles: &TrustBundles) -> Arc<TrustBundles> {
        // The source may have lists of its own.
        let lists = bundles.revocation().map_or_else(|| Arc::clone(&self.lists), |others| Arc::new(self.lists.and(others)));
        Arc::new(bundles.clone().with_revocation(lists))
    }

    /// Until nobody asks any more, or the source is gone.
    async fn run(mut self, mut bundles: watch::Receiver<Arc<TrustBundles>>, sender: watch::Sender<Arc<TrustBundles>>) {
        let mut tick = looks();
        loop {
            tokio::select! {
                () = sender.closed() => return,
                changed = bundles.changed() => if changed.is_err() { return },
                _ = tick.tick() => {
                    let read = self.look().await;
                    if !self.age() && !read { continue }
                }
            }
            let now = Arc::clone(&bundles.borrow_and_update());
            sender.send_replace(self.apply(&now));
        }
    }

    /// Whether a list has gone out of date; it is left out then, because proofs that are kept and live tunnels are judged again
    /// by new bundles only.
    fn age(&mut self) -> bool {
        let Some(left) = self.lists.aged(SystemTime::now()) else { return false };
        tracing::error!(
            path = %self.file.path.display(), left = left.count(),
            "certificate revocation lists are out of date: certificates that need them are refused"
        );
        self.lists = Arc::new(left);
        true
    }

    /// Whether the file says something else now.
    async fn look(&mut self) -> bool {
        let (file, before) = (self.file.clone(), self.stamp);
        // Lists of large authorities have megabytes.
        let looked = tokio::task::spawn_blocking(move || {
            let now = stamp(&file.path);
            (now, (now != before).then(|| read(&file)).flatten())
        });
        let Ok((now, lists)) = looked.await else { return false };
        self.stamp = now;
        let Some(lists) = lists else { return false };
        self.lists = Arc::new(lists);
        true
    }
}

#[cfg(test)]
mod tests;
