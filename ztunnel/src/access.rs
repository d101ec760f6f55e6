//! What an operator wants of the access log: which connections, and which of their fields.
use crate::record::FIELDS;
use clap::Args;

/// Settings of the access log. What went wrong is told whatever they say.
#[derive(Args, Clone, Debug)]
pub struct AccessLog {
    /// Share of the connections that ended well whose line is written, from 0 to 1. The others' lines always are.
    #[arg(long = "access-log-sampling", env = "CULVERT_ACCESS_LOG_SAMPLING", default_value = "1", value_parser = share)]
    pub sampling: f64,
    /// Fields of a line, by Istio's names (`src.workload,dst.service,duration`); all if none is named. `error` and `reason` are
    /// always among them.
    #[arg(long = "access-log-fields", env = "CULVERT_ACCESS_LOG_FIELDS", value_delimiter = ',', value_parser = FIELDS)]
    pub fields: Vec<String>,
}

impl AccessLog {
    /// Whether a connection that ended well is told of.
    pub fn draws(&self) -> bool {
        self.sampling >= 1.0 || rand::random::<f64>() < self.sampling
    }
    /// Whether lines have this field.
    pub fn has(&self, field: &str) -> bool {
        self.fields.is_empty() || matches!(field, "error" | "reason") || self.fields.iter().any(|f| f == field)
    }
}

fn share(text: &str) -> Result<f64, String> {
    let share: f64 = text.parse().map_err(|_| "not a number".to_owned())?;
    if (0.0..=1.0).contains(&share) { Ok(share) } else { Err("not from 0 to 1".into()) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser, Debug)]
    struct Flags {
        #[command(flatten)]
        log: AccessLog,
    }
    fn parse(args: &[&str]) -> Result<AccessLog, String> {
        let args = std::iter::once("ztunnel").chain(args.iter().copied());
        Flags::try_parse_from(args).map(|flags| flags.log).map_err(|e| e.to_string())
    }

    #[test]
    fn all_is_told_unless_somebody_says_otherwise() {
        let all = parse(&[]).unwrap();
        assert!(all.draws() && FIELDS.iter().all(|field| all.has(field)));
        let some = parse(&["--access-log-sampling", "0.25", "--access-log-fields", "src.workload,duration"]).unwrap();
        assert!(some.has("src.workload") && some.has("duration") && some.has("error") && some.has("reason"));
        assert!(!some.has("src.addr"));
        let drawn = (0..10_000).filter(|_| some.draws()).count();
        assert!((2_200..2_800).contains(&drawn), "{drawn}");
        assert!(!parse(&["--access-log-sampling", "0"]).unwrap().draws());
    }

    #[test]
    fn what_means_nothing_is_refused() {
        for wrong in ["1.5", "-1", "NaN", "all"] {
            assert!(parse(&["--access-log-sampling", wrong]).is_err(), "{wrong}");
        }
        assert!(parse(&["--access-log-fields", "src.color"]).unwrap_err().contains("src.workload"), "the choices are named");
    }
}
