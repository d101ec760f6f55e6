//! What load clients and servers say to each other: nine bytes of header, then bytes whose value is known at every offset,
//! so that loss, duplication, reordering and corruption on the way all show.
use std::sync::LazyLock;

/// What the server does with the connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Sends back what it gets.
    Echo,
    /// Takes the pattern to the end of the client's half, then answers a [`Receipt`].
    Sink,
    /// Sends this many bytes of the pattern, then closes.
    Source(u64),
}

/// Length of a header.
pub const HEADER: usize = 9;

impl Mode {
    /// On the wire.
    pub fn header(self) -> [u8; HEADER] {
        let (kind, number) = match self {
            Self::Echo => (b'E', 0),
            Self::Sink => (b'S', 0),
            Self::Source(bytes) => (b'D', bytes),
        };
        let mut header = [kind; HEADER];
        header[1..].copy_from_slice(&number.to_be_bytes());
        header
    }

    /// From the wire; none if this is not our protocol.
    pub fn read(header: [u8; HEADER]) -> Option<Self> {
        let [kind, number @ ..] = header;
        match kind {
            b'E' => Some(Self::Echo),
            b'S' => Some(Self::Sink),
            b'D' => Some(Self::Source(u64::from_be_bytes(number))),
            _ => None,
        }
    }
}

/// What a sink saw.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Receipt {
    /// Bytes after the header.
    pub bytes: u64,
    /// Reads with a byte that was not the expected one.
    pub mismatches: u64,
}

/// Length of a receipt on the wire.
pub const RECEIPT: usize = 16;

impl Receipt {
    /// On the wire.
    pub fn to_bytes(self) -> [u8; RECEIPT] {
        let mut out = [0; RECEIPT];
        out[..8].copy_from_slice(&self.bytes.to_be_bytes());
        out[8..].copy_from_slice(&self.mismatches.to_be_bytes());
        out
    }

    /// From the wire.
    pub fn from_bytes(bytes: [u8; RECEIPT]) -> Self {
        let number = u128::from_be_bytes(bytes);
        Self { bytes: (number >> 64) as u64, mismatches: number as u64 }
    }
}

/// The most that is written or read at once.
pub const CHUNK: usize = 256 * 1024;
/// The pattern repeats after this many bytes: a prime, so that no buffer size of anyone divides it.
const PERIOD: usize = 65_521;

static PATTERN: LazyLock<Vec<u8>> = LazyLock::new(|| {
    // A xorshift generator: no short repetition that a shifted copy could match.
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let period: Vec<u8> = std::iter::repeat_with(|| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 32) as u8
    })
    .take(PERIOD)
    .collect();
    period.iter().copied().cycle().take(PERIOD + CHUNK).collect()
});

/// The pattern from `offset` on, at most [`CHUNK`] bytes of it.
pub fn pattern(offset: u64, length: usize) -> &'static [u8] {
    let start = (offset % PERIOD as u64) as usize;
    &PATTERN[start..start + length.min(CHUNK)]
}

/// Follows a stream of the pattern.
#[derive(Clone, Copy, Debug, Default)]
pub struct Checker(Receipt);

impl Checker {
    /// Takes the next bytes (at most [`CHUNK`]).
    pub fn take(&mut self, bytes: &[u8]) {
        self.0.mismatches += u64::from(pattern(self.0.bytes, bytes.len()) != bytes);
        self.0.bytes += bytes.len() as u64;
    }

    /// What was seen.
    pub fn receipt(self) -> Receipt {
        self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_and_receipts_survive_the_wire() {
        for mode in [Mode::Echo, Mode::Sink, Mode::Source(u64::MAX)] {
            assert_eq!(Mode::read(mode.header()), Some(mode));
        }
        assert_eq!(Mode::read(*b"GET / HTT"), None);
        let receipt = Receipt { bytes: 1 << 40, mismatches: 7 };
        assert_eq!(Receipt::from_bytes(receipt.to_bytes()), receipt);
    }

    #[test]
    fn the_checker_sees_damage_at_any_cut() {
        let whole: Vec<u8> = pattern(0, CHUNK).iter().chain(pattern(CHUNK as u64, CHUNK)).copied().collect();
        let receipt = |bytes: &[u8]| {
            let mut checker = Checker::default();
            bytes.chunks(1400).for_each(|piece| checker.take(piece));
            checker.receipt()
        };
        assert_eq!(receipt(&whole), Receipt { bytes: 2 * CHUNK as u64, mismatches: 0 });
        let mut damaged = whole.clone();
        damaged[100_000] ^= 1;
        assert_eq!(receipt(&damaged).mismatches, 1);
        assert!(receipt(&whole[1400..]).mismatches > 300, "a lost piece shows in everything after it");
    }
}
