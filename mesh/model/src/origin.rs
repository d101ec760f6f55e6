//! Where the objects of the mesh were read from, so that a refusal can point at the place.
use std::fmt;
use std::sync::Arc;

/// Where an object came from, for operators.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Origin {
    /// File path or source name (`istiod`).
    pub place: Arc<str>,
    /// Line of the object in that file, 1-based; 0 when it has no lines.
    pub line: u32,
    /// `Kind namespace/name`.
    pub object: Arc<str>,
}
impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.line == 0 {
            write!(f, "{} ({})", self.object, self.place)
        } else {
            write!(f, "{} ({}:{})", self.object, self.place, self.line)
        }
    }
}
