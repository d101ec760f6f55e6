//! The kernel side of the redirection: programs in one pod's network namespace, one file each.
//!
//! Upstream: the pod's packets. Downstream: the agent's listeners in `SOCKS`. The contract is `ebpf-common`; the reasoning
//! behind the hooks is in each file's first lines. What cannot be decided is dropped and counted, never passed around the agent.
#![no_std]
#![no_main]

mod assign;
mod captured;
mod closed;
mod eth_egress;
mod eth_ingress;
mod idle;
mod maps;
mod parse;
mod steer_lookup;
mod udp;

#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}

#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 11] = *b"Apache-2.0\0";
