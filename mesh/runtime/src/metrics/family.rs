//! Series keyed by label values, resolved once and expired when unused.

use std::fmt::Write;
use std::hash::BuildHasher;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use hashbrown::{DefaultHashBuilder, HashTable};
use parking_lot::RwLock;

use super::exposition::{Expose, float, head, label};

/// A kind of series.
pub trait Series: std::fmt::Debug + Send + Sync + 'static {
    /// What a new series needs to know (bucket bounds); the same for all series of a family.
    type Shape: Clone + std::fmt::Debug + Send + Sync;
    /// `counter`, `gauge` or `histogram`.
    const KIND: &'static str;
    /// A series at zero.
    fn new(shape: &Self::Shape) -> Self;
    /// Writes the lines of this series. `labels` is `a="1",b="2"`, possibly empty.
    fn write(&self, name: &str, labels: &str, out: &mut String);
}

/// A monotonic counter. Incrementing is one relaxed atomic add.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Adds one.
    pub fn inc(&self) {
        self.add(1);
    }

    /// Adds `n`, for example bytes.
    pub fn add(&self, n: u64) {
        self.0.fetch_add(n, Ordering::Relaxed);
    }

    /// The count.
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

impl Series for Counter {
    type Shape = ();
    const KIND: &'static str = "counter";

    fn new((): &()) -> Self {
        Self::default()
    }

    fn write(&self, name: &str, labels: &str, out: &mut String) {
        line(out, name, "", labels, None);
        let _ = writeln!(out, "{}", self.get());
    }
}

/// A value that goes up and down.
#[derive(Debug, Default)]
pub struct Gauge(AtomicI64);

impl Gauge {
    /// Sets the value.
    pub fn set(&self, value: i64) {
        self.0.store(value, Ordering::Relaxed);
    }

    /// Adds `n`, which may be negative.
    pub fn add(&self, n: i64) {
        self.0.fetch_add(n, Ordering::Relaxed);
    }

    /// Adds one.
    pub fn inc(&self) {
        self.add(1);
    }

    /// Takes one.
    pub fn dec(&self) {
        self.add(-1);
    }

    /// The value.
    pub fn get(&self) -> i64 {
        self.0.load(Ordering::Relaxed)
    }
}

impl Series for Gauge {
    type Shape = ();
    const KIND: &'static str = "gauge";

    fn new((): &()) -> Self {
        Self::default()
    }

    fn write(&self, name: &str, labels: &str, out: &mut String) {
        line(out, name, "", labels, None);
        let _ = writeln!(out, "{}", self.get());
    }
}

/// A histogram with fixed bucket bounds.
#[derive(Debug)]
pub struct Histogram {
    bounds: Arc<[f64]>,
    /// One per bound and one for what is above the last. Not cumulative.
    buckets: Box<[AtomicU64]>,
    /// Bits of an `f64`.
    sum: AtomicU64,
}

impl Histogram {
    /// Counts one observation. NaN is ignored.
    pub fn observe(&self, value: f64) {
        if value.is_nan() {
            return;
        }
        let index = self.bounds.partition_point(|bound| *bound < value);
        if let Some(bucket) = self.buckets.get(index) {
            bucket.fetch_add(1, Ordering::Relaxed);
        }
        let _ =
            self.sum.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |bits| Some((f64::from_bits(bits) + value).to_bits()));
    }

    /// Counts a duration in seconds.
    pub fn observe_duration(&self, duration: Duration) {
        self.observe(duration.as_secs_f64());
    }

    /// Waits for `doing`, and counts how long it took if it succeeds.
    pub async fn time<T, E>(&self, doing: impl Future<Output = Result<T, E>>) -> Result<T, E> {
        let begun = Instant::now();
        let done = doing.await?;
        self.observe_duration(begun.elapsed());
        Ok(done)
    }

    /// Number of observations.
    pub fn count(&self) -> u64 {
        self.buckets.iter().map(|bucket| bucket.load(Ordering::Relaxed)).sum()
    }

    /// Sum of the observations.
    pub fn sum(&self) -> f64 {
        f64::from_bits(self.sum.load(Ordering::Relaxed))
    }
}

impl Series for Histogram {
    /// Upper bounds in rising order, without `+Inf`.
    type Shape = Arc<[f64]>;
    const KIND: &'static str = "histogram";

    fn new(bounds: &Arc<[f64]>) -> Self {
        let buckets = (0..=bounds.len()).map(|_| AtomicU64::new(0)).collect();
        Self { bounds: Arc::clone(bounds), buckets, sum: AtomicU64::new(0f64.to_bits()) }
    }

    fn write(&self, name: &str, labels: &str, out: &mut String) {
        let mut total = 0;
        let bounds = self.bounds.iter().copied().chain([f64::INFINITY]);
        for (bucket, bound) in self.buckets.iter().zip(bounds) {
            total += bucket.load(Ordering::Relaxed);
            line(out, name, "_bucket", labels, Some(bound));
            let _ = writeln!(out, "{total}");
        }
        line(out, name, "_sum", labels, None);
        float(out, self.sum());
        out.push('\n');
        line(out, name, "_count", labels, None);
        let _ = writeln!(out, "{total}");
    }
}

/// `name_suffix{labels,le="bound"} `
fn line(out: &mut String, name: &str, suffix: &str, labels: &str, bound: Option<f64>) {
    out.push_str(name);
    out.push_str(suffix);
    if !labels.is_empty() || bound.is_some() {
        out.push('{');
        out.push_str(labels);
        if let Some(bound) = bound {
            if !labels.is_empty() {
                out.push(',');
            }
            out.push_str("le=\"");
            float(out, bound);
            out.push('"');
        }
        out.push('}');
    }
    out.push(' ');
}

/// All series of one metric name. Cheap to clone.
///
/// A handle is an [`Arc`]: while anyone holds it, its series stays. Resolve it once per connection and keep it.
#[derive(Debug)]
pub struct Family<S: Series> {
    inner: Arc<Inner<S>>,
}

impl<S: Series> Clone for Family<S> {
    fn clone(&self) -> Self {
        Self { inner: Arc::clone(&self.inner) }
    }
}

#[derive(Debug)]
struct Inner<S: Series> {
    name: &'static str,
    help: &'static str,
    label_names: &'static [&'static str],
    shape: S::Shape,
    hasher: DefaultHashBuilder,
    table: RwLock<HashTable<Entry<S>>>,
    /// Times a series was asked for and not made: the table was full.
    lost: AtomicU64,
}

#[derive(Debug)]
struct Entry<S> {
    values: Values,
    series: Arc<S>,
    used: Used,
}

#[derive(Debug)]
enum Used {
    At(Instant),
    /// Never expires.
    Pinned,
}

impl<S: Series<Shape = ()>> Family<S> {
    /// A family of counters or gauges. `name` is the exposed name, with its `_total`.
    pub fn new(name: &'static str, help: &'static str, label_names: &'static [&'static str]) -> Self {
        Self::with_shape(name, help, label_names, ())
    }
}

impl Family<Histogram> {
    /// A family of histograms; `bounds` in rising order, without `+Inf`.
    pub fn with_buckets(name: &'static str, help: &'static str, label_names: &'static [&'static str], bounds: &[f64]) -> Self {
        Self::with_shape(name, help, label_names, bounds.into())
    }
}

/// How long TCP connects take; `reporter` says whose they are. Both programs have it.
pub fn connect_times() -> Family<Histogram> {
    let help = "Time of TCP connects that succeeded, in seconds";
    let bounds = [0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0];
    Family::with_buckets("culvert_tcp_connect_seconds", help, &["reporter"], &bounds)
}

impl<S: Series> Family<S> {
    fn with_shape(name: &'static str, help: &'static str, label_names: &'static [&'static str], shape: S::Shape) -> Self {
        let hasher = DefaultHashBuilder::default();
        let table = RwLock::new(HashTable::new());
        Self { inner: Arc::new(Inner { name, help, label_names, shape, hasher, table, lost: AtomicU64::new(0) }) }
    }

    /// Exposed name.
    pub fn name(&self) -> &'static str {
        self.inner.name
    }

    /// Names of the labels, in the order of the values.
    pub fn label_names(&self) -> &'static [&'static str] {
        self.inner.label_names
    }

    /// The series with these label values, made if new. Values beyond the label names are ignored, missing ones are
    /// empty, and a label with an empty value is not exposed.
    ///
    /// Costs a hash of all values and a read lock: once per connection, not per event.
    pub fn get(&self, values: &[&str]) -> Arc<S> {
        self.resolve(values, &[], false)
    }

    /// Like [`Self::get`], with labels of the series' own beside those of the family: name and value each. The names must be
    /// names of labels, and none of the family's.
    pub fn get_tagged(&self, values: &[&str], tags: &[(&str, &str)]) -> Arc<S> {
        self.resolve(values, tags, false)
    }

    /// Like [`Self::get`], for a series that never expires.
    pub fn pin(&self, values: &[&str]) -> Arc<S> {
        self.resolve(values, &[], true)
    }

    /// Number of series.
    pub fn len(&self) -> usize {
        self.inner.table.read().len()
    }

    /// Whether there is no series.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Drops the series for which `gone` answers yes, given its label values in order: call it when a workload is
    /// removed. Handles still held go on counting, unseen. Returns how many were dropped.
    pub fn expire(&self, mut gone: impl FnMut(&[&str]) -> bool) -> usize {
        let mut table = self.inner.table.write();
        let before = table.len();
        table.retain(|entry| !gone(&entry.values.iter().collect::<Vec<_>>()));
        before - table.len()
    }

    /// Drops the series that nobody holds and that nobody asked for, as seen by these calls, for `older_than`.
    pub fn sweep(&self, older_than: Duration) -> usize {
        self.inner.sweep_at(Instant::now(), older_than)
    }

    #[cfg(test)]
    pub(super) fn sweep_at(&self, now: Instant, older_than: Duration) -> usize {
        self.inner.sweep_at(now, older_than)
    }

    pub(super) fn exposed(&self) -> Arc<dyn Expose> {
        Arc::clone(&self.inner) as Arc<dyn Expose>
    }

    fn resolve(&self, values: &[&str], tags: &[(&str, &str)], pinned: bool) -> Arc<S> {
        let inner = &*self.inner;
        let count = inner.label_names.len();
        let tags = || tags.iter().flat_map(|(name, value)| [*name, *value]);
        let values = || values.iter().copied().chain(std::iter::repeat("")).take(count).chain(tags()).map(cut);
        let hash = hash_values(&inner.hasher, values());
        if !pinned && let Some(entry) = inner.table.read().find(hash, |entry| entry.values.iter().eq(values())) {
            return Arc::clone(&entry.series);
        }
        let mut table = inner.table.write();
        if !pinned && table.len() >= MOST_SERIES && table.find(hash, |entry| entry.values.iter().eq(values())).is_none() {
            inner.lost.fetch_add(1, Ordering::Relaxed);
            return Arc::new(S::new(&inner.shape));
        }
        let rehash = |entry: &Entry<S>| hash_values(&inner.hasher, entry.values.iter());
        let used = if pinned { Used::Pinned } else { Used::At(Instant::now()) };
        let mut slot = table.entry(hash, |entry| entry.values.iter().eq(values()), rehash).or_insert_with(|| Entry {
            values: Values::new(values()),
            series: Arc::new(S::new(&inner.shape)),
            used: Used::At(Instant::now()),
        });
        let entry = slot.get_mut();
        if !matches!(entry.used, Used::Pinned) {
            entry.used = used;
        }
        Arc::clone(&entry.series)
    }
}

impl<S: Series> Inner<S> {
    fn sweep_at(&self, now: Instant, older_than: Duration) -> usize {
        let mut table = self.table.write();
        let before = table.len();
        table.retain(|entry| match &mut entry.used {
            Used::Pinned => true,
            // A handle is only given out under the lock, so this count cannot rise meanwhile. Looking at who holds it
            // here is what keeps the counting itself free of bookkeeping.
            Used::At(used) if Arc::strong_count(&entry.series) > 1 => {
                *used = now;
                true
            }
            Used::At(used) => now.saturating_duration_since(*used) < older_than,
        });
        let dropped = before - table.len();
        if table.capacity() > 4 * table.len().max(16) {
            table.shrink_to_fit(|entry| hash_values(&self.hasher, entry.values.iter()));
        }
        dropped
    }
}

impl<S: Series> Expose for Inner<S> {
    fn expose(&self, out: &mut String) {
        let table = self.table.read();
        if table.is_empty() {
            return;
        }
        head(out, self.name, self.help, S::KIND);
        let mut labels = String::new();
        for entry in table.iter() {
            labels.clear();
            let mut put = |name: &str, value: &str| {
                if !value.is_empty() {
                    if !labels.is_empty() {
                        labels.push(',');
                    }
                    label(&mut labels, name, value);
                }
            };
            let mut values = entry.values.iter();
            for (name, value) in self.label_names.iter().zip(values.by_ref()) {
                put(name, value);
            }
            while let (Some(name), Some(value)) = (values.next(), values.next()) {
                put(name, value);
            }
            entry.series.write(self.name, &labels, out);
        }
    }

    fn sweep(&self, older_than: Duration) -> usize {
        self.sweep_at(Instant::now(), older_than)
    }

    fn lost(&self) -> u64 {
        self.lost.load(Ordering::Relaxed)
    }
}

/// Label values in one allocation: the texts one after another, and where each ends.
#[derive(Debug)]
struct Values {
    text: Box<str>,
    ends: Box<[u32]>,
}

/// Most series of a family: labels may be made of what clients send. What comes beyond counts unseen until others expire.
const MOST_SERIES: usize = 100_000;
/// Longest label value kept, in bytes; what a peer sends must not grow the table without bound.
const LONGEST_VALUE: usize = 1024;

impl Values {
    fn new<'a>(values: impl Iterator<Item = &'a str>) -> Self {
        let mut text = String::new();
        let mut ends = Vec::new();
        for value in values {
            text.push_str(value);
            // Cannot overflow: label names are static and `cut` bounds each value.
            ends.push(text.len() as u32);
        }
        Self { text: text.into(), ends: ends.into() }
    }

    fn iter(&self) -> impl Iterator<Item = &str> {
        let mut start = 0usize;
        self.ends.iter().map(move |end| {
            let value = self.text.get(start..*end as usize).unwrap_or_default();
            start = *end as usize;
            value
        })
    }
}

fn hash_values<'a>(hasher: &DefaultHashBuilder, values: impl Iterator<Item = &'a str>) -> u64 {
    use std::hash::{Hash, Hasher};
    let mut state = hasher.build_hasher();
    for value in values {
        value.hash(&mut state);
    }
    state.finish()
}

/// `value`, or its beginning when it is absurdly long.
fn cut(value: &str) -> &str {
    value.get(..value.floor_char_boundary(LONGEST_VALUE)).unwrap_or_default()
}
