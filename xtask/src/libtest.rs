//! Reads what Rust's test runner prints and counts it: a test that said `SKIPPED:` did not pass, it was skipped.
//!
//! Owns the reading of `--show-output` text. Upstream: a test binary's standard output, line by line. Downstream: `suite`,
//! which shows the lines this module says are worth showing and adds the tallies.

use std::collections::BTreeSet;
use std::fmt;
use std::ops::AddAssign;

/// What a test prints, with a reason, when the machine cannot run it.
pub const SKIPPED: &str = "SKIPPED:";

/// How many tests ended how.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Tally {
    pub passed: usize,
    pub failed: usize,
    pub skipped: usize,
    /// Of the passed: those that failed at first, and passed when they were run again, alone.
    pub unsteady: usize,
}

impl AddAssign for Tally {
    fn add_assign(&mut self, other: Self) {
        self.passed += other.passed;
        self.failed += other.failed;
        self.skipped += other.skipped;
        self.unsteady += other.unsteady;
    }
}

impl Tally {
    /// The line every run of tests ends with, and before it the warning that some of them did not pass at once.
    pub fn print(&self) {
        if self.unsteady > 0 {
            println!("{} of the passed failed at first and passed when run again (UNSTEADY above)", self.unsteady);
        }
        println!("{self}");
    }
}

impl fmt::Display for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} passed, {} failed, {} skipped", self.passed, self.failed, self.skipped)
    }
}

/// What a test binary did, from its first line to its end.
#[derive(Debug, Default)]
pub struct Outcome {
    pub tally: Tally,
    /// Why tests were skipped.
    pub reasons: Vec<String>,
    /// The tests that failed, by name. Fewer than the tally says where the binary died, or its set-up failed.
    pub failed: Vec<String>,
}

impl Outcome {
    /// The same binary after its failed tests (all of its tests, where they have no names) were run once more: what passed
    /// now has passed, and is counted as unsteady.
    pub fn then(self, again: &Self) -> Tally {
        if !self.failures_have_names() {
            return Tally { unsteady: self.tally.failed.min(again.tally.passed), ..again.tally };
        }
        let mended = self.tally.failed.saturating_sub(again.tally.failed).min(again.tally.passed);
        Tally {
            passed: self.tally.passed + mended,
            failed: self.tally.failed - mended,
            unsteady: self.tally.unsteady + mended,
            ..self.tally
        }
    }

    /// Whether each failure is that of a named test.
    pub fn failures_have_names(&self) -> bool {
        self.failed.len() == self.tally.failed
    }
}

/// Counts one stream of test runner output.
#[derive(Debug, Default)]
pub struct Reader {
    tally: Tally,
    finished: bool,
    /// The runner says itself how many it skipped; the lines then only tell why.
    counts_skipped: bool,
    in_successes: bool,
    current: Option<String>,
    /// Tests, or lines without a known test, that said SKIPPED.
    skipped: BTreeSet<String>,
    reasons: Vec<String>,
    failed: Vec<String>,
}

impl Reader {
    /// Takes one line of standard output; false if it is only the captured noise of a test that passed.
    pub fn line(&mut self, line: &str) -> bool {
        match line {
            "successes:" | "failures:" => {
                self.in_successes = line == "successes:";
                self.current = None;
                return !self.in_successes;
            }
            _ => {}
        }
        if let Some(name) = line.strip_prefix("---- ").and_then(|rest| rest.strip_suffix(" stdout ----")) {
            self.current = Some(name.to_owned());
            return !self.in_successes;
        }
        if let Some(test) = &self.current {
            // What a test printed, whatever it looks like.
            if let Some(at) = line.find(SKIPPED).filter(|_| self.in_successes)
                && self.skipped.insert(test.clone())
            {
                let reason = line.get(at + SKIPPED.len()..).unwrap_or_default().trim();
                self.reasons.push(format!("{test}: {reason}"));
            }
            return !self.in_successes;
        }
        if let Some(result) = line.strip_prefix("test result: ") {
            self.finish(result);
            return true;
        }
        if let Some((name, _seconds)) = line.strip_prefix("test ").and_then(|test| test.split_once(" ... FAILED")) {
            self.failed.push(name.to_owned());
        }
        // The blank lines between sections say nothing on their own.
        !self.in_successes && !line.is_empty()
    }

    /// Takes one line of standard error. The runner does not capture what threads and children write there.
    pub fn stderr_line(&mut self, line: &str) {
        if let Some(reason) = line.trim_start().strip_prefix(SKIPPED)
            && self.skipped.insert(line.to_owned())
        {
            self.reasons.push(reason.trim().to_owned());
        }
    }

    /// `ok. 3 passed; 0 failed; 1 ignored; 0 measured; 0 filtered out; finished in 0.01s`, or with `1 skipped` from the
    /// runner of ring 3.
    fn finish(&mut self, result: &str) {
        let number =
            |what: &str| result.split(['.', ';']).find_map(|part| part.trim().strip_suffix(what)?.trim().parse::<usize>().ok());
        let passed = number("passed").unwrap_or_default();
        let said = std::mem::take(&mut self.skipped).len().min(passed);
        let own = number("skipped");
        self.counts_skipped |= own.is_some();
        let skipped = if own.is_some() { 0 } else { said };
        self.tally += Tally {
            passed: passed - skipped,
            failed: number("failed").unwrap_or_default(),
            skipped: number("ignored").unwrap_or_default() + own.unwrap_or_default() + skipped,
            unsteady: 0,
        };
        self.finished = true;
        self.in_successes = false;
        self.current = None;
    }

    /// The tally, given how the process ended: a runner that died early, or ended badly without naming a test, failed once.
    pub fn end(self, success: bool) -> Outcome {
        let mut tally = self.tally;
        // What was said on standard error may arrive after the result line.
        let late = if self.counts_skipped { 0 } else { self.skipped.len().min(tally.passed) };
        tally.passed -= late;
        tally.skipped += late;
        if !success && tally.failed == 0 {
            tally.failed = 1;
        }
        if success && !self.finished {
            // Not the standard runner (`harness = false`): the exit code is all there is.
            tally.passed += 1;
        }
        Outcome { tally, reasons: self.reasons, failed: self.failed }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str, success: bool) -> (Tally, Vec<String>, Vec<String>) {
        let mut reader = Reader::default();
        let shown = text.lines().filter(|line| reader.line(line)).map(str::to_owned).collect();
        let Outcome { tally, reasons, .. } = reader.end(success);
        (tally, reasons, shown)
    }

    const MIXED: &str = "
running 4 tests
test a ... ok
test b::c ... ok
test d ... FAILED
test e ... ignored

successes:

---- a stdout ----
some noise
SKIPPED: needs root
SKIPPED: said twice

---- b::c stdout ----
more noise
test result: ok. 7 passed; 0 failed; 0 ignored; 0 measured;

successes:
    a
    b::c

failures:

---- d stdout ----
thread panicked

failures:
    d

test result: FAILED. 2 passed; 1 failed; 1 ignored; 0 measured; 0 filtered out; finished in 0.01s
";

    #[test]
    fn a_test_that_said_skipped_is_not_passed() {
        let (tally, reasons, shown) = read(MIXED, false);
        assert_eq!(tally, Tally { passed: 1, failed: 1, skipped: 2, unsteady: 0 });
        assert_eq!(reasons, ["a: needs root"]);
        assert!(shown.iter().any(|line| line == "thread panicked"), "failures are shown");
        assert!(!shown.iter().any(|line| line.contains("noise")), "the output of passing tests is not");
    }

    #[test]
    fn results_add_up_over_several_runners() {
        let one = "test result: ok. 3 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.00s\n";
        assert_eq!(read(&one.repeat(2), true).0, Tally { passed: 6, failed: 0, skipped: 0, unsteady: 0 });
    }

    #[test]
    fn a_runner_that_dies_has_failed() {
        assert_eq!(read("running 2 tests\ntest a ... ok\n", false).0, Tally { passed: 0, failed: 1, skipped: 0, unsteady: 0 });
    }

    #[test]
    fn a_program_without_the_runner_counts_as_one() {
        assert_eq!(read("hello\n", true).0, Tally { passed: 1, failed: 0, skipped: 0, unsteady: 0 });
        assert_eq!(read("hello\n", false).0, Tally { passed: 0, failed: 1, skipped: 0, unsteady: 0 });
    }

    #[test]
    fn skips_on_standard_error_count_and_never_below_zero() {
        let mut reader = Reader::default();
        reader.stderr_line("SKIPPED: no eBPF here");
        reader.stderr_line("SKIPPED: no eBPF here");
        reader.stderr_line("SKIPPED: no sudo");
        reader.stderr_line("something else");
        reader.line("test result: ok. 1 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.00s");
        let Outcome { tally, reasons, .. } = reader.end(true);
        assert_eq!(tally, Tally { passed: 0, failed: 0, skipped: 1, unsteady: 0 });
        assert_eq!(reasons, ["no eBPF here", "no sudo"]);

        let mut late = Reader::default();
        late.line("test result: ok. 2 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.00s");
        late.stderr_line("SKIPPED: late");
        assert_eq!(late.end(true).tally, Tally { passed: 1, failed: 0, skipped: 1, unsteady: 0 });
    }

    #[test]
    fn a_runner_that_counts_its_skips_is_believed() {
        let mut reader = Reader::default();
        reader.stderr_line("SKIPPED: suite::a: no root");
        reader.line("test result: ok. 3 passed; 0 failed; 2 skipped; finished in 1.20s");
        reader.stderr_line("SKIPPED: suite::b: no root");
        let Outcome { tally, reasons, .. } = reader.end(true);
        assert_eq!(tally, Tally { passed: 3, failed: 0, skipped: 2, unsteady: 0 });
        assert_eq!(reasons, ["suite::a: no root", "suite::b: no root"]);
    }

    #[test]
    fn what_passes_when_run_again_is_passed_and_unsteady() {
        let outcome = |text: &str, success| {
            let mut reader = Reader::default();
            for line in text.lines() {
                reader.line(line);
            }
            reader.end(success)
        };
        let first = || {
            outcome(
                "test a ... ok\ntest b c ... FAILED (0.1s)\ntest d ... FAILED\ntest result: FAILED. 1 passed; 2 failed;",
                false,
            )
        };
        assert_eq!(first().failed, ["b c", "d"]);
        let one = outcome("test d ... FAILED\ntest result: FAILED. 1 passed; 1 failed;", false);
        assert_eq!(first().then(&one), Tally { passed: 2, failed: 1, skipped: 0, unsteady: 1 });
        let all = outcome("test result: ok. 2 passed; 0 failed;", true);
        assert_eq!(first().then(&all), Tally { passed: 3, failed: 0, skipped: 0, unsteady: 2 });
        // What did not run again, or died, has not passed.
        assert_eq!(first().then(&outcome("test result: ok. 0 passed; 0 failed;", true)).failed, 2);
        assert_eq!(first().then(&outcome("", false)).failed, 2);
        // A binary that died without a name was run whole.
        let died = outcome("test a ... ok", false);
        assert!(!died.failures_have_names());
        assert_eq!(died.then(&all), Tally { passed: 2, failed: 0, skipped: 0, unsteady: 1 });
        assert_eq!(outcome("", false).then(&outcome("", false)).failed, 1);
    }

    #[test]
    fn the_last_line_reads_as_promised() {
        assert_eq!(Tally { passed: 12, failed: 0, skipped: 3, unsteady: 0 }.to_string(), "12 passed, 0 failed, 3 skipped");
    }
}
