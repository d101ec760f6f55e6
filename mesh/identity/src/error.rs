//! Why there is no certificate. The data path sees all of these as [`Reason::NoCertificate`]; the text is for the operator.

use std::path::PathBuf;
use std::time::Duration;

use mesh_model::{Reason, Refusal};

/// A certificate could not be obtained or used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum IdentityError {
    /// The authority cannot be reached, or answered with an error of its own; worth retrying.
    #[error("the certificate authority is unavailable: {0}")]
    Unavailable(String),
    /// The authority does not give this identity to us.
    #[error("the certificate authority refuses {id}: {why}")]
    Refused {
        /// Who was asked for.
        id: String,
        /// What the authority said.
        why: String,
    },
    /// The authority is well and knows nobody of this name: not until somebody registers it.
    #[error("the certificate authority does not know {id}: {why}")]
    Unregistered {
        /// Who was asked for.
        id: String,
        /// What it knows instead.
        why: String,
    },
    /// A certificate, key or bundle came and cannot be used.
    #[error("unusable certificate for {id}: {why}")]
    Unusable {
        /// Who it was meant for.
        id: String,
        /// What is wrong with it.
        why: String,
    },
    /// The directory of the development authority is not usable.
    #[error("{}: {why}", path.display())]
    Storage {
        /// The file or directory at fault.
        path: PathBuf,
        /// What is wrong with it and what to do.
        why: String,
    },
    /// The chosen crypto library cannot do what the settings ask for.
    #[error("crypto settings: {0}")]
    Crypto(String),
    /// The authority did not answer in time.
    #[error("no certificate for {id} within {after:?}")]
    Timeout {
        /// Who was asked for.
        id: String,
        /// How long we waited.
        after: Duration,
    },
}

impl IdentityError {
    /// The word for logs, metrics and answers.
    pub fn reason(&self) -> Reason {
        Reason::NoCertificate
    }
}

impl From<IdentityError> for Refusal {
    fn from(error: IdentityError) -> Self {
        Refusal::new(error.reason(), error.to_string())
    }
}
