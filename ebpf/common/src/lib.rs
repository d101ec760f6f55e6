//! The one definition of what kernel programs and the agent share.
