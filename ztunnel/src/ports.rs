//! Ports of the agent's own sockets in a pod: those everybody knows (node-agent §1.1), and where they are in fact.

/// Outbound capture.
pub const OUTBOUND: u16 = 15001;
/// Inbound plaintext.
pub const INBOUND_PLAIN: u16 = 15006;
/// Inbound HBONE.
pub const HBONE: u16 = 15008;
/// DNS, on the pod's loopback: where queries over UDP and redirected TCP arrive.
pub const DNS: u16 = 15053;

/// Where the sockets of a pod are bound. They are elsewhere where a program of the pod has the usual port, and nobody has to know but
/// our own programs or rules, which say where connections go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ports {
    /// Outbound capture.
    pub outbound: u16,
    /// Inbound plaintext.
    pub plain: u16,
    /// HBONE; what is for it comes to [`HBONE`] all the same.
    pub hbone: u16,
    /// DNS over UDP, of IPv4 and of IPv6.
    pub dns: [u16; 2],
}

impl Ports {
    /// The usual ones.
    pub const USUAL: Self = Self { outbound: OUTBOUND, plain: INBOUND_PLAIN, hbone: HBONE, dns: [DNS; 2] };

    /// Whether a connection to that port of the pod would be one to the agent itself.
    pub fn are_own(&self, port: u16) -> bool {
        [OUTBOUND, INBOUND_PLAIN, HBONE, self.outbound, self.plain, self.hbone].contains(&port)
    }
}
