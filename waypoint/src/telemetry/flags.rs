//! Envoy's response flags: short words for what was special about an answer.
use std::fmt;

/// One flag.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Flag {
    /// `DI`: a fault delayed it.
    DelayInjected = 0,
    /// `FI`: a fault answered it.
    FaultInjected,
    /// `NR`: no route.
    NoRouteFound,
    /// `NC`: the cluster is not there.
    NoClusterFound,
    /// `RL`: rate limited here.
    RateLimited,
    /// `UAEX`: external authorization said no.
    UnauthorizedExternal,
    /// `URX`: retries or connect attempts used up.
    UpstreamRetryLimitExceeded,
    /// `UO`: a limit of the destination.
    UpstreamOverflow,
    /// `UH`: no healthy upstream.
    NoHealthyUpstream,
    /// `UF`: no connection to the upstream.
    UpstreamConnectionFailure,
    /// `UC`: the upstream ended the connection.
    UpstreamConnectionTermination,
    /// `UR`: the upstream reset the stream.
    UpstreamRemoteReset,
    /// `UPE`: the upstream broke the protocol.
    UpstreamProtocolError,
    /// `UT`: the upstream took too long.
    UpstreamRequestTimeout,
    /// `SI`: the stream was idle for too long.
    StreamIdleTimeout,
    /// `DT`: the connection lasted as long as it may.
    DurationTimeout,
    /// `DPE`: the client broke the protocol.
    DownstreamProtocolError,
    /// `DC`: the client went.
    DownstreamConnectionTermination,
    /// `DR`: the client reset the stream.
    DownstreamRemoteReset,
}
/// In the order in which Envoy comes to set them, which is the order it writes them in.
const NAMES: [&str; 19] =
    ["DI", "FI", "NR", "NC", "RL", "UAEX", "URX", "UO", "UH", "UF", "UC", "UR", "UPE", "UT", "SI", "DT", "DPE", "DC", "DR"];

/// Each flag's bit in Envoy's vector of them, in the same order.
const BITS: [u8; 19] = [9, 10, 8, 24, 11, 12, 15, 7, 1, 5, 6, 4, 23, 2, 16, 22, 18, 14, 28];

/// A set of flags.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Flags(u32);
impl Flags {
    /// Adds one.
    pub fn set(&mut self, flag: Flag) {
        self.0 |= 1 << flag as u8;
    }
    /// As Envoy's vector of bits (the attribute `response.flags`).
    pub fn bits(self) -> u32 {
        BITS.iter().enumerate().filter(|(i, _)| self.0 & (1 << i) != 0).map(|(_, bit)| 1 << bit).sum()
    }
}
impl fmt::Display for Flags {
    /// `-` when none, else the words joined with `,` (`%RESPONSE_FLAGS%`).
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0 == 0 {
            return f.write_str("-");
        }
        let mut first = true;
        for (i, name) in NAMES.iter().enumerate() {
            if self.0 & (1 << i) != 0 {
                if !first {
                    f.write_str(",")?;
                }
                first = false;
                f.write_str(name)?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bits_are_envoys() {
        let mut flags = Flags::default();
        assert_eq!((flags.bits(), flags.to_string()), (0, "-".to_owned()));
        flags.set(Flag::UpstreamConnectionTermination);
        assert_eq!(flags.bits(), 0x40, "as measured");
        flags.set(Flag::UpstreamRetryLimitExceeded);
        assert_eq!((flags.bits(), flags.to_string()), (0x8040, "URX,UC".to_owned()));
    }
}
