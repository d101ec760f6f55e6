//! When pods are given their lasting places on the hooks of their interfaces.
//!
//! Each has the kernel wait for all its readers with the lock of all interfaces held, some ten milliseconds in which no other pod can be
//! enrolled. Pods are captured without (`ebpf_loader::Unsettled`), so that is done one by one when none is being enrolled; but not put off
//! for ever.
use ebpf_loader::Unsettled;
use std::time::Duration;
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;

/// How long no pod may have been enrolled for.
const QUIET: Duration = Duration::from_millis(100);
/// How long that is waited for.
const PATIENCE: Duration = Duration::from_secs(10);
/// How often it is tried again where the kernel would not, and when.
const TRIES: u32 = 3;
const AGAIN: Duration = Duration::from_secs(1);

/// Who captures pods tells it.
#[derive(Clone, Debug)]
pub(super) struct Settler {
    queue: mpsc::UnboundedSender<(String, Unsettled)>,
    enrolling: watch::Sender<Enrolments>,
}

/// How many are under way, and when the last one ended.
#[derive(Clone, Copy, Debug)]
struct Enrolments {
    count: usize,
    last: Instant,
}

/// While there is one, nothing is settled.
pub(super) struct Enrolling(watch::Sender<Enrolments>);

impl Drop for Enrolling {
    fn drop(&mut self) {
        self.0.send_modify(|now| *now = Enrolments { count: now.count.saturating_sub(1), last: Instant::now() });
    }
}

impl Settler {
    /// Ends when the last of these is gone.
    pub(super) fn start() -> Self {
        let (queue, pods) = mpsc::unbounded_channel();
        let (enrolling, count) = watch::channel(Enrolments { count: 0, last: Instant::now() });
        tokio::spawn(run(pods, count));
        Self { queue, enrolling }
    }

    /// Says that a pod is being enrolled.
    pub(super) fn enrolling(&self) -> Enrolling {
        self.enrolling.send_modify(|now| now.count += 1);
        Enrolling(self.enrolling.clone())
    }

    /// Has it settled, in its turn.
    pub(super) fn add(&self, pod: &str, unsettled: Unsettled) {
        // With nobody there to take it the agent is at its end, and the next one does it.
        let _ = self.queue.send((pod.to_owned(), unsettled));
    }
}

async fn run(mut pods: mpsc::UnboundedReceiver<(String, Unsettled)>, mut enrolling: watch::Receiver<Enrolments>) {
    while let Some((pod, unsettled)) = pods.recv().await {
        let (mut more, mut failures) = (unsettled.is_unsettled(), 0);
        while more {
            let _ = tokio::time::timeout(PATIENCE, quiet(&mut enrolling)).await;
            let place = unsettled.clone();
            more = match tokio::task::spawn_blocking(move || place.settle()).await {
                Ok(Ok(more)) => more,
                Ok(Err(error)) if failures < TRIES && unsettled.is_unsettled() => {
                    tracing::debug!(pod, %error, "a lasting place could not be taken, trying again");
                    failures += 1;
                    tokio::time::sleep(AGAIN).await;
                    true
                }
                Ok(Err(error)) => {
                    // The namespace is usually gone together with everything in it.
                    tracing::info!(pod, %error, "the pod goes on being captured by filters of its interfaces, which its administrators may remove");
                    false
                }
                Err(_) => false,
            };
        }
    }
}

/// Waits until no pod has been enrolled for a while.
async fn quiet(enrolling: &mut watch::Receiver<Enrolments>) {
    while let Ok(until) = enrolling.wait_for(|now| now.count == 0).await.map(|now| now.last + QUIET) {
        match tokio::time::timeout_at(until, enrolling.changed()).await {
            Ok(Ok(())) => {}
            // Nobody enrols any more, or nobody did.
            Ok(Err(_)) | Err(_) => return,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn nothing_is_settled_while_a_pod_is_enrolled() {
        let (sender, mut count) = watch::channel(Enrolments { count: 0, last: Instant::now() });
        let settler = Settler { queue: mpsc::unbounded_channel().0, enrolling: sender };
        let one = settler.enrolling();
        assert!(tokio::time::timeout(Duration::from_secs(5), quiet(&mut count)).await.is_err(), "one is under way");
        drop(one);
        let began = Instant::now();
        quiet(&mut count).await;
        assert_eq!(began.elapsed(), QUIET);
        quiet(&mut count).await;
        assert_eq!(began.elapsed(), QUIET, "once it is quiet nobody waits");
        // A burst of them puts it off.
        let burst = async {
            for _ in 0..10 {
                drop(settler.enrolling());
                tokio::time::sleep(QUIET / 2).await;
            }
        };
        let began = Instant::now();
        tokio::join!(burst, quiet(&mut count));
        assert!(began.elapsed() >= QUIET * 5);
        drop(settler);
        quiet(&mut count).await;
    }
}
