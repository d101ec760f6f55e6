//! Ring 2: the istiod source and the certificate clients against servers that misbehave on command.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs, reason = "tests")]

mod ca;
mod demand;
mod encode;
mod fixture;
mod joined;
mod same;
mod spire;
mod xds;
