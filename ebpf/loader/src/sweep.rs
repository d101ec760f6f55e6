//! What agents left for pods that nobody captures any more.
use std::collections::HashSet;

use crate::{
    error::RedirectError,
    listener::NetnsCookie,
    object::Maps,
    pins::{PinRoot, PodPins},
};

impl PinRoot {
    /// Removes every redirection but those of the namespaces `held`; the traffic of the others is direct from then on. Answers
    /// how many there were.
    pub fn sweep(&self, held: impl IntoIterator<Item = NetnsCookie>) -> Result<usize, RedirectError> {
        self.remove(held, |_| true)
    }

    /// The same while pods of these owners ([`crate::PodSpec::owner`]) have yet to be captured again, who knows where: what is theirs stays,
    /// and what is not known whose it is, by a name of this kind.
    pub fn sweep_but(
        &self,
        held: impl IntoIterator<Item = NetnsCookie>,
        kind: &str,
        waiting: &[&str],
    ) -> Result<usize, RedirectError> {
        self.remove(held, |pod| pod.is_of_others(kind, waiting))
    }

    fn remove(
        &self,
        held: impl IntoIterator<Item = NetnsCookie>,
        is_left: impl Fn(&PodPins) -> bool,
    ) -> Result<usize, RedirectError> {
        let held: HashSet<PodPins> = held.into_iter().map(|netns| self.pod(netns)).collect();
        let mut removed = 0;
        for pod in self.pods()?.iter().filter(|pod| !held.contains(pod) && is_left(pod)) {
            let_go(pod);
            pod.remove()?;
            removed += 1;
        }
        Ok(removed)
    }
}

/// What was attached by an agent that died before it had its lasting places ([`crate::early`]) stays attached without pins: has it pass
/// everything.
fn let_go(pod: &PodPins) {
    if !pod.is_marked()
        && let Err(error) = Maps::pinned(pod).and_then(|mut maps| maps.let_go())
    {
        tracing::debug!(%error, "what an agent left half attached may drop packets");
    }
}
