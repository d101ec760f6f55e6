//! The cases of the node agent's benchmark: what each puts through the pair of agents, in which unit its CPU is told, and
//! the targets it has to meet.
use serde_json::Value;

/// What the CPU time is divided by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unit {
    /// 10^9 payload bytes.
    Gigabyte,
    /// 100 000 round trips or connections.
    HundredThousand,
}

impl Unit {
    /// How CPU per unit is written.
    pub fn cpu(self) -> &'static str {
        match self {
            Self::Gigabyte => "s/GB",
            Self::HundredThousand => "s/100k",
        }
    }
}

/// One case.
#[derive(Clone, Debug)]
pub struct Case {
    /// Its name in tables and with `--only`.
    pub name: &'static str,
    /// What the load generator is asked.
    pub load: Vec<String>,
    /// What CPU is told by.
    pub unit: Unit,
}

impl Case {
    fn new(name: &'static str, unit: Unit, load: String) -> Self {
        Self { name, load: load.split(' ').map(str::to_owned).collect(), unit }
    }

    /// How many units a run moved.
    pub fn units(&self, line: &Value) -> f64 {
        match self.unit {
            Unit::Gigabyte => line["bytes"].as_f64().unwrap_or_default() / 1e9,
            Unit::HundredThousand => line["count"].as_f64().unwrap_or_default() / 1e5,
        }
    }

    /// How fast it was, in the unit of its kind: Gbit/s or operations per second.
    pub fn rate(&self, line: &Value) -> f64 {
        let key = if self.unit == Unit::Gigabyte { "gbit_s" } else { "rate" };
        line[key].as_f64().unwrap_or_default()
    }
}

/// All cases. Together they stay below 12 000 connections, past which the kernel's own search for a free port is measured.
pub fn all(quick: bool) -> Vec<Case> {
    let gigabytes = if quick { 1 } else { 4 };
    let seconds = if quick { 2 } else { 5 };
    let connections = if quick { 3000 } else { 8000 };
    let stream =
        |streams: u32, direction: &str| format!("stream --streams {streams} --bytes {gigabytes}000000000 --dir {direction}");
    let ping = |conns: u32| format!("ping --conns {conns} --secs {seconds}");
    vec![
        Case::new("upload", Unit::Gigabyte, stream(1, "up")),
        Case::new("download", Unit::Gigabyte, stream(1, "down")),
        Case::new("upload8", Unit::Gigabyte, stream(8, "up")),
        Case::new("download8", Unit::Gigabyte, stream(8, "down")),
        Case::new("ping1", Unit::HundredThousand, ping(1)),
        Case::new("ping16", Unit::HundredThousand, ping(16)),
        Case::new("ping64", Unit::HundredThousand, ping(64)),
        Case::new("rate3000", Unit::HundredThousand, format!("rate --conns 16 --rps 3000 --secs {seconds}")),
        Case::new("churn16", Unit::HundredThousand, format!("churn --conc 16 --count {connections}")),
    ]
}

/// Blocks of connections from one source to one service, in one namespace's life: 24 000 in all, twice as many as a kernel has
/// ports for before its searches get long. What a block costs an agent must not depend on how many came before it; the direct
/// path's rate falls all the same, as the application's own connect searches too.
pub fn cliff() -> Vec<Case> {
    ["block1", "block2", "block3", "block4", "block5", "block6"]
        .map(|name| Case::new(name, Unit::HundredThousand, "churn --conc 16 --count 4000".into()))
        .into()
}

/// One row of the targets: what istio/ztunnel costs on the same kind of machine, what we must reach, what we aim at.
#[derive(Clone, Copy, Debug)]
pub struct Target {
    /// What is measured; for CPU rows the name of the case.
    pub name: &'static str,
    /// In which unit.
    pub unit: &'static str,
    /// istio/ztunnel.
    pub reference: f64,
    /// At most this.
    pub must: f64,
    /// Better than this is what we aim at.
    pub goal: f64,
}

/// What a plain relay with 256 KiB reads cost per GB, in CPU seconds, on the machine on which the targets were set.
pub const RELAY_REFERENCE: f64 = 0.645;
/// What the name of the relay is among the peers.
pub const RELAY: &str = "relay";

/// Idle memory of the larger agent.
pub const IDLE_RSS: &str = "idle RSS";
/// Memory per idle connection and side.
pub const PER_CONNECTION: &str = "idle connection";

/// The targets.
pub const TARGETS: &[Target] = &[
    Target { name: "upload", unit: "s/GB", reference: 1.41, must: 1.5, goal: 1.0 },
    Target { name: "ping16", unit: "s/100k", reference: 4.8, must: 5.0, goal: 2.4 },
    Target { name: "churn16", unit: "s/100k", reference: 24.7, must: 25.0, goal: 10.0 },
    Target { name: IDLE_RSS, unit: "MiB", reference: 17.0, must: 18.0, goal: 10.0 },
    Target { name: PER_CONNECTION, unit: "KiB", reference: 5.1, must: 4.0, goal: 2.0 },
];

impl Target {
    /// How a measured value stands to it.
    pub fn verdict(&self, value: f64) -> &'static str {
        if value <= self.goal {
            "pass (goal)"
        } else if value <= self.must {
            "pass"
        } else {
            "MISSED"
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_round_stays_below_the_port_cliff() {
        let churn = all(false).into_iter().find(|case| case.name == "churn16").unwrap();
        let count: u64 = churn.load.last().unwrap().parse().unwrap();
        assert!(count < 11_000);
    }

    #[test]
    fn every_cpu_target_has_its_case_and_unit() {
        let cases = all(true);
        for target in TARGETS.iter().filter(|target| target.unit.starts_with("s/")) {
            let case = cases.iter().find(|case| case.name == target.name).unwrap();
            assert_eq!(case.unit.cpu(), target.unit);
        }
    }

    #[test]
    fn verdicts() {
        let target = TARGETS[0];
        assert_eq!([1.0, 1.5, 1.51].map(|value| target.verdict(value)), ["pass (goal)", "pass", "MISSED"]);
    }
}
