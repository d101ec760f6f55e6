//! The CNI plugin (`ztunnel::cni`): a program of its own, because the container runtime starts it on the node for every pod.
#![forbid(unsafe_code)]
use std::process::ExitCode;

fn main() -> ExitCode {
    ztunnel::cni::plugin::main()
}
