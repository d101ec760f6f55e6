//! Envoy's response flags: short words for what was special about an answer.
use std::fmt;

/// One flag.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Flag {
    /// `DC`: the client went.
    DownstreamConnectionTermination = 0,
    /// `DI`: a fault delayed it.
    DelayInjected,
    /// `DPE`: the client broke the protocol.
    DownstreamProtocolError,
    /// `FI`: a fault answered it.
    FaultInjected,
    /// `NC`: the cluster is not there.
    NoClusterFound,
    /// `NR`: no route.
    NoRouteFound,
    /// `RL`: rate limited here.
    RateLimited,
    /// `UAEX`: external authorization said no.
    UnauthorizedExternal,
    /// `UC`: the upstream ended the connection.
    UpstreamConnectionTermination,
    /// `UF`: no connection to the upstream.
    UpstreamConnectionFailure,
    /// `UH`: no healthy upstream.
    NoHealthyUpstream,
    /// `UO`: a limit of the destination.
    UpstreamOverflow,
    /// `UPE`: the upstream broke the protocol.
    UpstreamProtocolError,
    /// `UR`: the upstream reset the stream.
    UpstreamRemoteReset,
    /// `URX`: retries or connect attempts used up.
    UpstreamRetryLimitExceeded,
    /// `UT`: the upstream took too long.
    UpstreamRequestTimeout,
    /// `SI`: the stream was idle for too long.
    StreamIdleTimeout,
}
const NAMES: [&str; 17] =
    ["DC", "DI", "DPE", "FI", "NC", "NR", "RL", "UAEX", "UC", "UF", "UH", "UO", "UPE", "UR", "URX", "UT", "SI"];

/// A set of flags.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Flags(u32);
impl Flags {
    /// Adds one.
    pub fn set(&mut self, flag: Flag) {
        self.0 |= 1 << flag as u8;
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
