//! What is made of the measurements of two proxies: a table, and the ratios of ours to the other's, round by round, since only
//! what ran side by side can be compared.
use std::fmt::Write as _;

use serde_json::{Value, json};

use super::report::{Sample, Spread, write_rows};

/// CPU per unit of ours must be at most this part of Envoy's.
pub const CPU_MUST: f64 = 0.6;
/// The time of the slowest request of a hundred must be at most this part of Envoy's, where requests come at a fixed rate.
pub const P99_MUST: f64 = 1.0;
/// MiB our idle waypoint may take.
pub const IDLE_MUST: f64 = 25.0;
/// The same with 10 000 routes and endpoints.
pub const LARGE_MUST: f64 = 100.0;

/// A single value somebody measured beside the cases.
#[derive(Clone, Debug)]
pub struct Fact {
    /// Whose.
    pub peer: &'static str,
    /// What, in words.
    pub what: String,
    /// How much.
    pub value: f64,
    /// In which unit.
    pub unit: &'static str,
    /// At most this, if there is a line.
    pub must: Option<f64>,
}

impl Fact {
    /// `pass`, `MISSED`, or nothing where there is no line.
    pub fn verdict(&self) -> &'static str {
        match self.must {
            None => "",
            Some(must) if self.value <= must => "pass",
            Some(_) => "MISSED",
        }
    }
}

/// All that was measured.
#[derive(Clone, Debug, Default)]
pub struct Versus {
    /// Runs of cases. The first CPU of each is the proxy's, the others are its neighbours'.
    pub samples: Vec<Sample>,
    /// Single values.
    pub facts: Vec<Fact>,
    /// What went wrong, in words.
    pub problems: Vec<String>,
}

impl Versus {
    fn spread(&self, peer: &str, case: &str, value: impl Fn(&Sample) -> Option<f64>) -> Option<Spread> {
        Spread::of(self.samples.iter().filter(|sample| sample.peer == peer && sample.case == case).filter_map(value))
    }

    /// `value` of ours over that of the other, for each round in which both have it.
    fn ratio(&self, ours: &str, other: &str, case: &str, value: impl Fn(&Sample) -> Option<f64>) -> Option<Spread> {
        let of = |peer: &str, round: usize| {
            self.samples.iter().find(|s| s.peer == peer && s.case == case && s.round == round).and_then(&value)
        };
        let rounds = self.samples.iter().map(|sample| sample.round).max().map_or(0, |last| last + 1);
        Spread::of((0..rounds).filter_map(|round| Some(of(ours, round)? / of(other, round)?)))
    }

    /// The table of all cases and peers.
    pub fn table(&self, cases: &[&'static str], peers: &[&'static str]) -> String {
        let head = ["case", "peer", "rate /s", "p50 us", "p99 us", "CPU s/100k", "neighbours", "PSI %"];
        let mut rows = vec![head.map(str::to_owned)];
        for case in cases {
            for peer in peers {
                let show = |spread: Option<Spread>, digits: usize| Spread::show(spread, digits);
                rows.push([
                    (*case).into(),
                    (*peer).into(),
                    show(self.spread(peer, case, |s| Some(s.rate)), 0),
                    show(self.spread(peer, case, |s| s.line["p50_us"].as_f64()), 0),
                    show(self.spread(peer, case, |s| s.line["p99_us"].as_f64()), 0),
                    show(self.spread(peer, case, own_cpu), 2),
                    show(self.spread(peer, case, |s| (s.cpu.len() > 1).then(|| s.cpu.iter().skip(1).sum())), 2),
                    show(self.spread(peer, case, |s| s.pressure), 0),
                ]);
            }
        }
        let mut out = String::new();
        write_rows(&mut out, &rows);
        out
    }

    /// Ours against the other, one row a case: median and spread of the ratios of the rounds.
    pub fn ratios(&self, cases: &[&'static str], ours: &'static str, other: &'static str) -> String {
        let mut rows = vec![
            ["case", "CPU ratio", "must", "verdict", "rate ratio", "p50 ratio", "p99 ratio", "must", "verdict"]
                .map(str::to_owned),
        ];
        for case in cases {
            let cpu = self.ratio(ours, other, case, own_cpu);
            let Some(median) = cpu.map(|spread| spread.median) else { continue };
            let verdict = |passes: bool| (if passes { "pass" } else { "MISSED" }).to_owned();
            let p99 = self.ratio(ours, other, case, |s| s.line["p99_us"].as_f64());
            // As fast as it goes, each waits for itself: only a fixed rate says what it is like to be served.
            let at_fixed_rate = p99.as_ref().filter(|_| case.contains("rate")).map(|spread| spread.median);
            rows.push([
                (*case).into(),
                Spread::show(cpu, 2),
                format!("≤ {CPU_MUST}"),
                verdict(median <= CPU_MUST),
                Spread::show(self.ratio(ours, other, case, |s| Some(s.rate)), 2),
                Spread::show(self.ratio(ours, other, case, |s| s.line["p50_us"].as_f64()), 2),
                Spread::show(p99, 2),
                at_fixed_rate.map_or_else(|| "-".into(), |_| format!("≤ {P99_MUST}")),
                at_fixed_rate.map_or_else(String::new, |median| verdict(median <= P99_MUST)),
            ]);
        }
        let mut out = String::new();
        write_rows(&mut out, &rows);
        out
    }

    /// The single values.
    pub fn told(&self) -> String {
        let mut rows = vec![["what", "peer", "value", "must", "verdict"].map(str::to_owned)];
        rows.extend(self.facts.iter().map(|fact| {
            [
                fact.what.clone(),
                fact.peer.into(),
                format!("{:.1} {}", fact.value, fact.unit),
                fact.must.map_or_else(|| "-".into(), |must| format!("≤ {must}")),
                fact.verdict().into(),
            ]
        }));
        let mut out = String::new();
        write_rows(&mut out, &rows);
        for problem in &self.problems {
            let _infallible = writeln!(out, "PROBLEM: {problem}");
        }
        out
    }

    /// Everything, to be kept.
    pub fn json(&self, about: Value) -> Value {
        let samples: Vec<Value> = self.samples.iter().map(Sample::json).collect();
        let facts: Vec<Value> = self
            .facts
            .iter()
            .map(|f| json!({"peer": f.peer, "what": f.what, "value": f.value, "unit": f.unit, "must": f.must, "verdict": f.verdict()}))
            .collect();
        json!({"about": about, "samples": samples, "facts": facts, "problems": self.problems})
    }
}

fn own_cpu(sample: &Sample) -> Option<f64> {
    sample.cpu.first().copied()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(peer: &str, round: usize, cpu: f64) -> Sample {
        let line = json!({"p50_us": 10.0, "p99_us": 100.0 * cpu});
        Sample { peer: peer.into(), case: "http16", round, cpu: vec![cpu, 9.0], rate: 5.0, pressure: None, line }
    }

    #[test]
    fn ratios_are_of_rounds_not_of_medians() {
        let mut versus = Versus::default();
        // A loaded second round, in which both cost three times as much.
        for (round, factor) in [(0, 1.0), (1, 3.0), (2, 1.0)] {
            versus.samples.push(sample("culvert", round, 1.0 * factor));
            versus.samples.push(sample("envoy", round, 2.0 * factor));
        }
        // Only one of the two ran.
        versus.samples.push(sample("culvert", 3, 50.0));
        let ratios = versus.ratios(&["http16", "none"], "culvert", "envoy");
        assert!(ratios.contains("0.50 [0.50..0.50]") && ratios.contains("pass") && !ratios.contains("none"), "{ratios}");
        let table = versus.table(&["http16"], &["culvert", "envoy"]);
        assert!(table.contains("2.00 [2.00..6.00]") && table.contains("9.00 [9.00..9.00]"), "{table}");
    }

    #[test]
    fn the_slowest_count_at_a_fixed_rate() {
        let mut versus = Versus::default();
        for (peer, slowest) in [("culvert", 1.1), ("envoy", 1.0)] {
            let line = json!({"p50_us": 1.0, "p99_us": slowest});
            versus.samples.push(Sample { case: "rate2000", cpu: vec![1.0, 9.0], line, ..sample(peer, 0, 1.0) });
            versus.samples.push(sample(peer, 0, 0.5 * slowest));
        }
        let ratios = versus.ratios(&["rate2000"], "culvert", "envoy");
        assert!(ratios.contains("1.10 [1.10..1.10]  ≤ 1   MISSED"), "{ratios}");
        let ratios = versus.ratios(&["http16"], "culvert", "envoy");
        assert!(ratios.lines().nth(1).is_some_and(|row| row.contains("1.10") && row.contains("  -")), "{ratios}");
    }

    #[test]
    fn facts_have_verdicts() {
        let fact = |value, must| Fact { peer: "culvert", what: "idle".into(), value, unit: "MiB", must };
        assert_eq!(
            [fact(25.0, Some(25.0)), fact(25.1, Some(25.0)), fact(1.0, None)].map(|f| f.verdict()),
            ["pass", "MISSED", ""]
        );
    }
}
