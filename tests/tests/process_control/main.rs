//! Ring 2: the istiod source and the certificate client against a control plane that misbehaves on command.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs, reason = "tests")]

mod ca;
mod encode;
mod fixture;
mod same;
mod xds;
