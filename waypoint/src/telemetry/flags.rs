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
    /// `DPE`: the client broke the protocol.
    DownstreamProtocolError,
    /// `DC`: the client went.
    DownstreamConnectionTermination,
    /// `DR`: the client reset the stream.
    DownstreamRemoteReset,
}
/// In the order in which Envoy comes to set them, which is the order it writes them in.
const NAMES: [&str; 18] =
    ["DI", "FI", "NR", "NC", "RL", "UAEX", "URX", "UO", "UH", "UF", "UC", "UR", "UPE", "UT", "SI", "DPE", "DC", "DR"];

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
