//! What tokio counts of the data threads, under the names istio/ztunnel gives it.

use tokio::runtime::RuntimeMetrics;

use super::DataThreads;
use crate::metrics::{MetricError, Registry, Scrape};

/// Families of [`DataThreads::expose`].
const NAMES: [&str; 6] = [
    "tokio_num_workers",
    "tokio_global_queue_depth",
    "tokio_num_alive_tasks",
    "tokio_worker_total_busy_duration_seconds_total",
    "tokio_worker_park_count_total",
    "tokio_worker_park_unpark_count_total",
];

impl DataThreads {
    /// Shows what tokio counts: of all data threads together, and of each by its index (`worker`). Read at each scrape.
    ///
    /// # Errors
    /// A name is taken.
    pub fn expose(&self, registry: &Registry) -> Result<(), MetricError> {
        let all: Vec<_> = self.workers().iter().map(|worker| worker.handle().metrics()).collect();
        registry.on_scrape(&NAMES, move |page| write(page, &all))
    }
}

fn write(page: &mut Scrape<'_>, all: &[RuntimeMetrics]) {
    let [workers, queue, tasks, busy, parks, changes] = NAMES;
    let sum = |of: fn(&RuntimeMetrics) -> usize| all.iter().map(of).sum::<usize>() as u64;
    page.family(workers, "Data threads", "gauge").put(&[], all.len() as u64);
    let help = "Tasks other threads woke that wait for their data thread";
    page.family(queue, help, "gauge").put(&[], sum(RuntimeMetrics::global_queue_depth));
    page.family(tasks, "Tasks of the data threads that are alive", "gauge").put(&[], sum(RuntimeMetrics::num_alive_tasks));
    let numbered: Vec<_> = all.iter().enumerate().map(|(index, of)| (index.to_string(), of)).collect();
    let mut family = page.family(busy, "Time the thread was not waiting, in seconds", "counter");
    for (worker, of) in &numbered {
        family.put_seconds(&[("worker", worker)], of.worker_total_busy_duration(0));
    }
    let mut family = page.family(parks, "Times the thread had nothing to do", "counter");
    for (worker, of) in &numbered {
        family.put(&[("worker", worker)], of.worker_park_count(0));
    }
    let mut family = page.family(changes, "Times the thread began to wait or went on; odd: it waits", "counter");
    for (worker, of) in &numbered {
        family.put(&[("worker", worker)], of.worker_park_unpark_count(0));
    }
}
