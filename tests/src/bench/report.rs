//! What is made of the measurements: medians with their spread, a table, the targets, and everything as JSON.
//!
//! Refuses to rank: CPU per unit first, wall time second, the pressure on the machine beside both; the reader judges.
use std::fmt::Write as _;

use serde_json::{Value, json};

use super::case::{Case, IDLE_RSS, PER_CONNECTION, RELAY, RELAY_REFERENCE, TARGETS};

/// One run of one case.
#[derive(Clone, Debug)]
pub struct Sample {
    /// Who carried it.
    pub peer: String,
    /// Which case.
    pub case: &'static str,
    /// From 0.
    pub round: usize,
    /// CPU seconds per unit, of the client's agent and the server's (empty for the direct path); or of a waypoint, then its agents.
    pub cpu: Vec<f64>,
    /// Gbit/s or per second.
    pub rate: f64,
    /// Percent of the time somebody waited for a CPU.
    pub pressure: Option<f64>,
    /// The load generator's line.
    pub line: Value,
}

impl Sample {
    /// To be kept.
    pub(super) fn json(&self) -> Value {
        json!({"peer": self.peer, "case": self.case, "round": self.round, "cpu_per_unit": self.cpu,
            "rate": self.rate, "psi_percent": self.pressure, "load": self.line})
    }
}

/// Memory of a pair of agents.
#[derive(Clone, Debug)]
pub struct Memory {
    /// Whose.
    pub peer: String,
    /// Idle connections and the resident KiB of both agents with them; the first entry is without any.
    pub steps: Vec<(u64, Vec<u64>)>,
}

impl Memory {
    /// MiB of the larger agent without connections.
    pub fn idle_mib(&self) -> Option<f64> {
        self.steps.first()?.1.iter().max().map(|&kib| kib as f64 / 1024.0)
    }

    /// KiB each connection added on the side where it added more; none if memory shrank, which only says that the agents had
    /// not yet come to rest before.
    pub fn kib_per_connection(&self) -> Option<f64> {
        let ((_, first), (conns, last)) = (self.steps.first()?, self.steps.last().filter(|(conns, _)| *conns > 0)?);
        let per_side = first.iter().zip(last).map(|(&before, &after)| (after as f64 - before as f64) / *conns as f64);
        per_side.max_by(f64::total_cmp).filter(|&kib| kib > 0.0)
    }
}

/// The middle, the least and the most of some values.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Spread {
    /// Median.
    pub median: f64,
    /// Least.
    pub min: f64,
    /// Most.
    pub max: f64,
}

impl Spread {
    /// Of at least one value.
    pub fn of(values: impl IntoIterator<Item = f64>) -> Option<Self> {
        let mut values: Vec<f64> = values.into_iter().collect();
        values.sort_by(f64::total_cmp);
        let (&min, &max) = (values.first()?, values.last()?);
        let middle = values.len() / 2;
        let median = if values.len() % 2 == 1 { values[middle] } else { f64::midpoint(values[middle - 1], values[middle]) };
        Some(Self { median, min, max })
    }

    /// `1.41 [1.40..1.43]`
    pub(super) fn show(this: Option<Self>, digits: usize) -> String {
        this.map_or_else(
            || "-".into(),
            |spread| format!("{:.digits$} [{:.digits$}..{:.digits$}]", spread.median, spread.min, spread.max),
        )
    }
}

/// All that was measured.
#[derive(Clone, Debug, Default)]
pub struct Report {
    /// Runs of cases.
    pub samples: Vec<Sample>,
    /// Memory.
    pub memory: Vec<Memory>,
    /// What went wrong, in words.
    pub problems: Vec<String>,
}

impl Report {
    fn of<'a>(&'a self, peer: &'a str, case: &'a str) -> impl Iterator<Item = &'a Sample> {
        self.samples.iter().filter(move |sample| sample.peer == peer && sample.case == case)
    }

    fn quantile(&self, peer: &str, case: &str, key: &str) -> Option<Spread> {
        Spread::of(self.of(peer, case).filter_map(|sample| sample.line[key].as_f64()))
    }

    /// CPU per unit of both agents together.
    pub fn cpu(&self, peer: &str, case: &str) -> Option<Spread> {
        Spread::of(self.of(peer, case).filter(|sample| !sample.cpu.is_empty()).map(|sample| sample.cpu.iter().sum()))
    }

    /// The table of all cases and peers.
    pub fn table(&self, cases: &[Case], peers: &[String]) -> String {
        let mut out = String::new();
        let head = ["case", "peer", "rate", "p50 us", "p99 us", "client CPU", "server CPU", "both CPU", "PSI %"];
        let mut rows = vec![head.map(str::to_owned)];
        for case in cases {
            for peer in peers {
                let one = |at: usize| {
                    Spread::of(self.of(peer, case.name).filter_map(|sample| sample.cpu.get(at).copied()))
                        .map_or_else(|| "-".into(), |spread| format!("{:.2}", spread.median))
                };
                let middle = |key: &str| {
                    self.quantile(peer, case.name, key).map_or_else(|| "-".into(), |spread| format!("{:.0}", spread.median))
                };
                let both = self.cpu(peer, case.name);
                let bulk = case.unit == super::case::Unit::Gigabyte;
                let rate = Spread::of(self.of(peer, case.name).map(|sample| sample.rate));
                let unit = if both.is_some() { case.unit.cpu() } else { "" };
                rows.push([
                    case.name.into(),
                    peer.clone(),
                    format!("{} {}", Spread::show(rate, if bulk { 2 } else { 0 }), if bulk { "Gbit/s" } else { "/s" }),
                    middle("p50_us"),
                    middle("p99_us"),
                    one(0),
                    one(1),
                    format!("{} {unit}", Spread::show(both, 2)).trim_end().to_owned(),
                    Spread::of(self.of(peer, case.name).filter_map(|sample| sample.pressure))
                        .map_or_else(|| "-".into(), |spread| format!("{:.0}", spread.median)),
                ]);
            }
        }
        write_rows(&mut out, &rows);
        for memory in &self.memory {
            for (conns, kib) in &memory.steps {
                let both: Vec<String> = kib.iter().map(|&kib| format!("{:.1}", kib as f64 / 1024.0)).collect();
                let _infallible = writeln!(out, "memory  {}: {conns} idle connections: {} MiB", memory.peer, both.join(" / "));
            }
        }
        out
    }

    /// The measured value of a target, if it was measured.
    fn value_of(&self, peer: &str, name: &str) -> Option<f64> {
        let memory = self.memory.iter().find(|memory| memory.peer == peer);
        match name {
            IDLE_RSS => memory?.idle_mib(),
            PER_CONNECTION => memory?.kib_per_connection(),
            case => self.cpu(peer, case).map(|spread| spread.median),
        }
    }

    /// How much more CPU this machine takes for the same copying than the one on which the targets were set.
    pub fn machine_factor(&self) -> Option<f64> {
        self.cpu(RELAY, "upload").map(|spread| spread.median / RELAY_REFERENCE)
    }

    /// How a peer stands to the targets, one row each; CPU also as it would be if the relay cost here what it cost there.
    pub fn targets(&self, peer: &str) -> String {
        let head = ["target", "measured", "scaled", "unit", "ztunnel", "must", "goal", "verdict", "verdict, scaled"];
        let mut rows = vec![head.map(str::to_owned)];
        for target in TARGETS {
            let value = self.value_of(peer, target.name);
            let factor = self.machine_factor().filter(|_| target.unit.starts_with("s/"));
            let scaled = value.zip(factor).map(|(value, factor)| value / factor);
            rows.push([
                target.name.into(),
                value.map_or_else(|| "-".into(), |value| format!("{value:.2}")),
                scaled.map_or_else(|| "-".into(), |value| format!("{value:.2}")),
                target.unit.into(),
                target.reference.to_string(),
                format!("≤ {}", target.must),
                format!("≤ {}", target.goal),
                value.map_or("not measured", |value| target.verdict(value)).into(),
                scaled.map_or("-", |value| target.verdict(value)).into(),
            ]);
        }
        let mut out = String::new();
        write_rows(&mut out, &rows);
        out
    }

    /// The verdicts on what was measured on this machine, as it is.
    pub fn verdicts(&self, peer: &str) -> String {
        let judged = |target: &super::case::Target| self.value_of(peer, target.name).map(|value| target.verdict(value));
        TARGETS.iter().filter_map(judged).collect::<Vec<_>>().join(", ")
    }

    /// Everything, to be kept.
    pub fn json(&self, about: Value, peers: &[String]) -> Value {
        let samples: Vec<Value> = self.samples.iter().map(Sample::json).collect();
        let memory: Vec<Value> =
            self.memory.iter().map(|memory| json!({"peer": memory.peer, "idle_connections_and_rss_kib": memory.steps})).collect();
        let targets: Vec<Value> = peers
            .iter()
            .flat_map(|peer| TARGETS.iter().map(move |target| (peer, target)))
            .filter_map(|(peer, target)| {
                let value = self.value_of(peer, target.name)?;
                Some(json!({"peer": peer, "target": target.name, "unit": target.unit, "value": value, "must": target.must,
                    "goal": target.goal, "verdict": target.verdict(value)}))
            })
            .collect();
        json!({"about": about, "machine_factor": self.machine_factor(), "targets": targets, "samples": samples, "memory": memory, "problems": self.problems})
    }
}

/// Writes columns of equal width.
pub(super) fn write_rows<const N: usize>(out: &mut String, rows: &[[String; N]]) {
    let widths: [usize; N] = std::array::from_fn(|column| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0));
    for row in rows {
        let line: Vec<String> = row.iter().zip(widths).map(|(cell, width)| format!("{cell:width$}")).collect();
        let _infallible = writeln!(out, "{}", line.join("  ").trim_end());
    }
}

#[cfg(test)]
mod tests {
    use super::super::case;
    use super::*;

    fn sample(peer: &str, case: &'static str, cpu: &[f64]) -> Sample {
        let line = json!({"p50_us": 10.0, "p99_us": 20.0});
        Sample { peer: peer.into(), case, round: 0, cpu: cpu.to_vec(), rate: 5.0, pressure: Some(1.0), line }
    }

    #[test]
    fn spreads() {
        assert_eq!(Spread::of([]), None);
        assert_eq!(Spread::of([3.0, 1.0, 2.0]), Some(Spread { median: 2.0, min: 1.0, max: 3.0 }));
        assert_eq!(Spread::of([1.0, 2.0]).map(|spread| spread.median), Some(1.5));
    }

    #[test]
    fn memory_per_connection_is_that_of_the_dearer_side() {
        let memory = Memory { peer: "x".into(), steps: vec![(0, vec![10_240, 8192]), (1000, vec![14_240, 16_192])] };
        assert_eq!(memory.idle_mib(), Some(10.0));
        assert_eq!(memory.kib_per_connection(), Some(8.0));
    }

    #[test]
    fn the_report_tells_values_and_verdicts() {
        let report = Report {
            samples: vec![
                sample("culvert", "upload", &[0.4, 0.5]),
                sample("culvert", "upload", &[0.6, 0.7]),
                sample("direct", "upload", &[]),
            ],
            memory: Vec::new(),
            problems: Vec::new(),
        };
        let peers = ["direct".to_owned(), "culvert".to_owned()];
        let table = report.table(&case::all(true)[..1], &peers);
        assert!(table.contains("1.10 [0.90..1.30] s/GB"), "{table}");
        let row = |targets: &str, name: &str| -> Vec<String> {
            let line = targets.lines().find(|line| line.starts_with(name)).unwrap_or_default().to_owned();
            line.split("  ").map(str::trim).filter(|cell| !cell.is_empty()).map(str::to_owned).collect()
        };
        let targets = report.targets("culvert");
        assert_eq!(row(&targets, "upload")[6..], ["≤ 1", "pass", "-"], "{targets}");
        assert_eq!(row(&targets, "ping16").last().map(String::as_str), Some("-"));
        assert_eq!(report.verdicts("culvert"), "pass");
        let mut slow = report.clone();
        slow.samples.push(sample("relay", "upload", &[2.0 * RELAY_REFERENCE]));
        assert_eq!(row(&slow.targets("culvert"), "upload")[2..3], ["0.55"]);
        assert_eq!(row(&slow.targets("culvert"), "upload").last().map(String::as_str), Some("pass (goal)"));
        let json = report.json(json!({}), &peers);
        assert_eq!(json["targets"].as_array().map(Vec::len), Some(1));
    }
}
