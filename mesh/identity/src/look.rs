//! Files that somebody else renews, as Kubernetes does with mounted ones: it swaps links, so that their folder tells nothing, and
//! they are looked at instead.
//! Upstream: the file system. Downstream: [`crate::crl_file`], [`crate::mounted`].

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::{Duration, SystemTime};

use tokio::time::{Interval, MissedTickBehavior};

/// How often they are looked at.
pub(crate) const LOOK: Duration = Duration::from_secs(1);

/// What tells one content of a file from another without reading it: its date, length and inode. `None`: it is not there.
pub(crate) type Stamp = Option<(SystemTime, u64, u64)>;

/// The stamp of a file as it is now.
pub(crate) fn stamp(path: &Path) -> Stamp {
    let found = fs::metadata(path).ok()?;
    Some((found.modified().ok()?, found.len(), found.ino()))
}

/// Ticks when it is time to look; late ticks are not made up for.
pub(crate) fn looks() -> Interval {
    let mut tick = tokio::time::interval(LOOK);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    tick
}
