//! Bounded waiting on a condition. Owns the only polling loop of the harness; refuses to wait without an end.
use std::time::{Duration, Instant};

/// How long most conditions may take on a busy two-core machine.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// Asks `probe` until it yields a value or `limit` is over. The pause between two looks grows from 2 ms to 40 ms, so a
/// quick answer is seen quickly and a slow one costs little. The error names what was waited for.
pub fn until<T>(what: &str, limit: Duration, mut probe: impl FnMut() -> Option<T>) -> anyhow::Result<T> {
    let start = Instant::now();
    let mut pause = Duration::from_millis(2);
    loop {
        if let Some(value) = probe() {
            return Ok(value);
        }
        if start.elapsed() >= limit {
            anyhow::bail!("waited {} ms in vain for: {what}", start.elapsed().as_millis());
        }
        std::thread::sleep(pause);
        pause = (pause * 2).min(Duration::from_millis(40));
    }
}

/// [`until`] for a yes-or-no condition, with the usual [`PATIENCE`].
pub fn until_true(what: &str, mut probe: impl FnMut() -> bool) -> anyhow::Result<()> {
    until(what, PATIENCE, || probe().then_some(()))
}
