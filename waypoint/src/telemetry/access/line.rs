//! What a line is about.
use crate::facts::Facts;
use crate::telemetry::{Noted, Record, TcpRecord};
use crate::upstream::{Cluster, Host};
use mesh_model::telemetry::AccessLog;
use mesh_model::{Reason, SpiffeId};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

/// What a line tells.
#[derive(Clone, Copy, Debug)]
pub struct Line<'a> {
    /// Of the connection it came over.
    pub facts: &'a Facts,
    /// What happened.
    pub told: Told<'a>,
    /// How long it took.
    pub took: Duration,
    /// Who we are.
    pub own: &'a SpiffeId,
}
/// What happened.
#[derive(Clone, Copy, Debug)]
pub enum Told<'a> {
    /// A request.
    Request(&'a Record),
    /// A connection carried as bytes.
    Connection {
        /// Its facts.
        record: &'a TcpRecord,
        /// Bytes from the client.
        received: u64,
        /// Bytes to the client.
        sent: u64,
    },
}

impl<'a> Line<'a> {
    /// The logs it belongs in; `None` when nobody says.
    pub(super) fn wanted(&self) -> Option<&'a [AccessLog]> {
        let told = match self.told {
            Told::Request(r) => &r.told,
            Told::Connection { record: r, .. } => &r.told,
        };
        told.as_ref()?.access.as_deref()
    }
    /// The request, if it is one.
    pub(super) fn request(&self) -> Option<&'a Record> {
        match self.told {
            Told::Request(r) => Some(r),
            Told::Connection { .. } => None,
        }
    }
    /// The endpoint.
    pub(super) fn host(&self) -> Option<&'a Arc<Host>> {
        match self.told {
            Told::Request(r) => r.host.as_ref(),
            Told::Connection { record: r, .. } => r.host.as_ref(),
        }
    }
    /// The cluster.
    pub(super) fn cluster(&self) -> Option<&'a Arc<Cluster>> {
        match self.told {
            Told::Request(r) => r.cluster.as_ref(),
            Told::Connection { record: r, .. } => r.cluster.as_ref(),
        }
    }
    /// When it began.
    pub(super) fn start(&self) -> SystemTime {
        match self.told {
            Told::Request(r) => r.start_time,
            Told::Connection { record: r, .. } => r.start_time,
        }
    }
    /// What policies said that enforce nothing.
    pub(super) fn noted(&self) -> &'a Noted {
        match self.told {
            Told::Request(r) => &r.noted,
            Told::Connection { record: r, .. } => &r.noted,
        }
    }
    /// Our own word for a refusal.
    pub(super) fn reason(&self) -> Option<Reason> {
        match self.told {
            Told::Request(r) => r.reason,
            Told::Connection { record: r, .. } => r.reason,
        }
    }
    /// Bytes from the client, to the client.
    pub(super) fn bytes(&self) -> (u64, u64) {
        match self.told {
            Told::Request(r) => (r.received.bytes(), r.sent),
            Told::Connection { received, sent, .. } => (received, sent),
        }
    }
}
