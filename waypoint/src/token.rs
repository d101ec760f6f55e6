//! Keys of issuers and tokens already verified; what a token says, and whether it is true, is `mesh-tokens`' to say.
pub(crate) mod cache;
pub mod source;
