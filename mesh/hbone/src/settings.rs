//! The numbers of a tunnel: windows, frames, limits, clocks.
//!
//! Owns the defaults and their reasons. The agent maps `HTTP2_STREAM_WINDOW_SIZE`, `HTTP2_CONNECTION_WINDOW_SIZE`,
//! `HTTP2_FRAME_SIZE`, `POOL_MAX_STREAMS_PER_CONNECTION` and `POOL_UNUSED_RELEASE_TIMEOUT` onto it; nothing here reads the
//! environment.

use std::time::Duration;

use mesh_runtime::memory::Budget;

/// Settings of tunnels, both directions. Sizes in bytes.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Receive window a stream starts with: what a reader that does not read can cost. Default 256 KiB.
    pub stream_window: u32,
    /// How far the stream window of a tunnel may grow while its readers keep up. Default 4 MiB.
    pub max_stream_window: u32,
    /// Smallest receive window of a connection. Default 16 MiB. It is raised with the number of streams so that stalled
    /// streams, which each hold one stream window, cannot starve the others.
    pub connection_window: u32,
    /// Largest frame we accept. Default 1 MiB. HTTP/2 allows 16 KiB to 16 MiB - 1. Our relays send at most 64 KiB.
    pub frame_size: u32,
    /// Bytes one stream may have queued towards the tunnel. Default 256 KiB.
    pub send_buffer: usize,
    /// Header list we accept as client (responses). Default 16 KiB.
    pub client_header_list: u32,
    /// Header list we accept as server (requests). Default 64 KiB.
    pub server_header_list: u32,
    /// Streams at once a client may have open to us. Default 200.
    pub server_max_streams: u32,
    /// Streams at once we open on one tunnel, if the peer allows as many. Default 100.
    pub client_max_streams: usize,
    /// Streams a peer may reset before we accepted them. Default 20; more closes the connection (rapid reset).
    pub max_pending_resets: usize,
    /// What unread DATA frames below 256 bytes may lack to 256 bytes each, over a connection, before h2 closes it
    /// (ENHANCE_YOUR_CALM). Default 32 MiB: more than one turn of a tunnel's driver can read, so that a relay, which merges
    /// small frames whenever it runs, always gets to run first.
    pub small_frame_budget: usize,
    /// Streams we ended early that are remembered for a second: what the peer had sent by then is passed over, where of forgotten
    /// ones it counts as breaking the protocol. Default 4096.
    pub remembered_resets: usize,
    /// Streams that break the protocol over a connection's life. Default 1024; more closes the connection.
    pub max_error_resets: usize,
    /// Streams per keepalive interval a client may reset before it got an answer. Default 4096; more closes the connection.
    pub max_early_resets: u32,
    /// HTTP/2 preface and SETTINGS must be exchanged within this. Default 10 s.
    pub handshake_timeout: Duration,
    /// A CONNECT must be answered within this. Default 10 s.
    pub connect_timeout: Duration,
    /// A ping goes out when nothing arrived for this long. Default 10 s.
    pub ping_interval: Duration,
    /// The connection is dead when nothing arrived for this long after a ping. Default 20 s.
    pub ping_timeout: Duration,
    /// A client tunnel without streams is closed after this. Default 5 min.
    pub unused_release: Duration,
    /// Tunnels to one key the pool opens on account of busyness (full tunnels are always supplemented). Default 4.
    pub max_parallel_tunnels: usize,
    /// Process-wide budget that window growth is reserved from; `None` lets windows grow unaccounted.
    pub budget: Option<Budget>,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            stream_window: 256 << 10,
            max_stream_window: 4 << 20,
            connection_window: 16 << 20,
            frame_size: 1 << 20,
            send_buffer: 256 << 10,
            client_header_list: 16 << 10,
            server_header_list: 64 << 10,
            server_max_streams: 200,
            client_max_streams: 100,
            max_pending_resets: 20,
            small_frame_budget: 32 << 20,
            remembered_resets: 4096,
            max_error_resets: 1024,
            max_early_resets: 4096,
            handshake_timeout: Duration::from_secs(10),
            connect_timeout: Duration::from_secs(10),
            ping_interval: Duration::from_secs(10),
            ping_timeout: Duration::from_secs(20),
            unused_release: Duration::from_mins(5),
            max_parallel_tunnels: 4,
            budget: None,
        }
    }
}

/// Largest window HTTP/2 knows (RFC 9113 §6.9.1).
const MAX_WINDOW: u32 = (1 << 31) - 1;

impl Settings {
    /// The same settings with every value inside what HTTP/2 and this crate can work with; an operator's odd number must
    /// not panic a tunnel.
    #[must_use]
    pub fn clamped(mut self) -> Self {
        self.stream_window = self.stream_window.clamp(16 << 10, 1 << 30);
        self.max_stream_window = self.max_stream_window.clamp(self.stream_window, 1 << 30);
        self.connection_window = self.connection_window.clamp(65_535, MAX_WINDOW);
        self.frame_size = self.frame_size.clamp(16 << 10, (1 << 24) - 1);
        self.send_buffer = self.send_buffer.clamp(16 << 10, 16 << 20);
        self.client_max_streams = self.client_max_streams.clamp(1, 1 << 20);
        self.server_max_streams = self.server_max_streams.clamp(1, 1 << 20);
        self.max_parallel_tunnels = self.max_parallel_tunnels.max(1);
        self.ping_interval = self.ping_interval.max(Duration::from_millis(100));
        self
    }

    /// Connection window for `streams` streams of window `window`.
    pub(crate) fn connection_target(&self, streams: usize, window: u32) -> u32 {
        let wanted = (streams as u64 + 1).saturating_mul(u64::from(window));
        self.connection_window.max(u32::try_from(wanted).unwrap_or(MAX_WINDOW)).min(MAX_WINDOW)
    }
}
