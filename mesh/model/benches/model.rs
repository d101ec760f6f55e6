//! Placeholder until the measurements below are written.
fn main() {}
