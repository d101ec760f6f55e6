//! Where mesh knowledge comes from: a folder of YAML today; every source ends in changes for one publisher.
#![forbid(unsafe_code)]
pub mod diagnostics;
pub mod translate;
pub mod yaml;
