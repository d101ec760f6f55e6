//! What SPIRE said of one identity: of each pod that has it by a stream of its own, and which of that counts. An entry of SPIRE may
//! name one pod, and a pod's certificates are its account's here: the one that lasts longest serves all of them.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::SystemTime;

use rustls_pki_types::CertificateDer;
use tokio::sync::watch;

use super::stream::Listener;
use crate::error::IdentityError;

/// One identity; its streams end with it.
#[derive(Default)]
pub(super) struct Known {
    said: watch::Sender<Said>,
    /// By pod.
    heard: BTreeMap<Arc<str>, Heard>,
}

/// What was said of one pod, and by which stream, where it has one of its own.
#[derive(Default)]
pub(super) struct Heard {
    said: Said,
    _listener: Option<Listener>,
}

#[derive(Clone, Default)]
pub(super) enum Said {
    #[default]
    Nothing,
    /// Why there is none.
    Failed(IdentityError),
    Issued(Arc<Kept>),
}

#[derive(PartialEq, Eq)]
pub(super) struct Kept {
    pub(super) chain: Vec<CertificateDer<'static>>,
    pub(super) key: Vec<u8>,
    pub(super) not_after: SystemTime,
}

impl Heard {
    /// Nothing yet.
    pub(super) fn by(listener: Listener) -> Self {
        Self { said: Said::Nothing, _listener: Some(listener) }
    }
}

impl Said {
    fn valid(&self, now: SystemTime) -> Option<&Arc<Kept>> {
        match self {
            Self::Issued(kept) if kept.not_after > now => Some(kept),
            _ => None,
        }
    }
}

impl Known {
    /// Of this one pod nothing was said yet.
    pub(super) fn of(key: &Arc<str>) -> Self {
        let mut this = Self::default();
        this.put(key, Heard::default());
        this
    }

    /// What counts.
    pub(super) fn said(&self) -> &watch::Sender<Said> {
        &self.said
    }

    /// Whether SPIRE is asked about nobody.
    pub(super) fn is_empty(&self) -> bool {
        self.heard.is_empty()
    }

    /// Asks about this pod, or otherwise; what was said of it before counts until something else is.
    pub(super) fn put(&mut self, key: &Arc<str>, mut heard: Heard) {
        if let Some(before) = self.heard.remove(key) {
            heard.said = before.said;
        }
        self.heard.insert(Arc::clone(key), heard);
    }

    /// Asks about it no more.
    pub(super) fn remove(&mut self, key: &str) {
        self.heard.remove(key);
    }

    /// Takes what was said of a pod, and whether that makes a newer certificate than the one that counted. A certificate that is
    /// still good is not lost by a failure.
    pub(super) fn hear(&mut self, key: &str, said: Said, now: SystemTime) -> bool {
        let Some(heard) = self.heard.get_mut(key) else { return false };
        if matches!(said, Said::Issued(_)) || heard.said.valid(now).is_none() {
            heard.said = said;
        }
        self.settle(now)
    }

    /// Decides what counts, and whether that is a newer certificate.
    pub(super) fn settle(&mut self, now: SystemTime) -> bool {
        let best = self.heard.values().filter_map(|heard| heard.said.valid(now)).max_by_key(|kept| kept.not_after);
        let Some(best) = best.map(Arc::clone) else {
            self.said.send_replace(self.none());
            return false;
        };
        match self.said.send_replace(Said::Issued(Arc::clone(&best))) {
            // SPIRE repeats itself when anything else of the stream changed.
            Said::Issued(before) => before != best,
            Said::Failed(_) => true,
            // Whoever asked first waits for it, unless he has lost patience.
            Said::Nothing => self.said.receiver_count() == 0,
        }
    }

    /// Why there is no certificate. While SPIRE has yet to speak of one of the pods, that is worth waiting for.
    fn none(&self) -> Said {
        let all = || self.heard.values().map(|heard| &heard.said);
        let failed = all().find(|said| matches!(said, Said::Failed(_)));
        failed.filter(|_| !all().any(|said| matches!(said, Said::Nothing))).cloned().unwrap_or_default()
    }
}
