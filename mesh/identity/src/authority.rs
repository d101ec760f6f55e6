//! Which authority a process has its certificates from. Owns the choice, so that every program makes its source in one way;
//! what the settings of a program mean is the program's.

use std::path::PathBuf;
use std::sync::Arc;

use mesh_runtime::control_plane::ControlPlane;
use tokio::runtime::Handle;

use crate::clock::SystemClock;
use crate::crypto::TlsSettings;
use crate::error::IdentityError;
use crate::istio_ca::IstioCa;
use crate::local_ca::{LocalCa, LocalCaSettings};
use crate::mounted::Mounted;
use crate::source::{IdentitySource, SourceSettings};
use crate::spire::{Api, Spire};

/// Who issues certificates.
#[derive(Debug)]
pub enum Authority {
    /// The built-in development authority, in this directory.
    Development(PathBuf),
    /// istiod, reached like this.
    Istio(ControlPlane),
    /// Somebody else, who puts the one certificate of this process into a folder ([`crate::mounted`]).
    Mounted(PathBuf),
    /// SPIRE, whose agent is reached like this ([`crate::spire::reach`]).
    Spire(Api, ControlPlane),
}

impl Authority {
    /// The source; what it does by itself runs on the current runtime. Blocks on files, where the authority is in some; otherwise
    /// nothing is waited for.
    ///
    /// # Errors
    /// What no retry can mend: an unusable directory, settings that make no sense.
    pub fn open(self, settings: SourceSettings) -> Result<Arc<dyn IdentitySource>, IdentityError> {
        let clock = Arc::new(SystemClock);
        Ok(match self {
            Self::Development(directory) => {
                let settings = LocalCaSettings {
                    directory,
                    trust_domain: settings.trust_domain.as_str().to_owned(),
                    trust_domain_aliases: settings.trust_domain_aliases.iter().map(|alias| alias.as_str().to_owned()).collect(),
                    lifetime: settings.lifetime,
                };
                Arc::new(LocalCa::open(&settings, clock)?)
            }
            Self::Mounted(directory) => Arc::new(Mounted::start(directory, settings, clock, &Handle::current())?),
            Self::Istio(control_plane) => Arc::new(IstioCa::new(settings, control_plane, &TlsSettings::default(), clock)?),
            Self::Spire(api, control_plane) => Arc::new(Spire::start(api, control_plane, settings, clock, Handle::current())?),
        })
    }
}
