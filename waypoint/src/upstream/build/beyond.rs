//! Endpoints on other networks. As in Istio they are not told apart: each instance of their network's gateway is one endpoint for all
//! of one locality behind it, with what they weigh together.
use super::super::host::{self, Lead, Target};
use super::Listed;
use http::HeaderValue;
use mesh_model::known::Known;
use mesh_model::lb::Endpoint;
use mesh_model::plan::Beyond;
use mesh_model::service::Service;
use mesh_model::workload::{Protocol, Workload};
use mesh_model::{HboneAuthority, Network};
use std::sync::Arc;

/// The ways to other networks, and whom they lead to.
pub(super) struct Far<'a> {
    /// Usable ways, and what is asked for there.
    ways: Vec<(&'a Beyond, Arc<Lead>)>,
    /// What every weight is multiplied by, so that gateways can share evenly.
    scale: u32,
    listed: Vec<Listed>,
}

impl<'a> Far<'a> {
    pub fn new(service: &Service, port: u16, ways: &'a [Beyond], own: &Network) -> Self {
        let from = ways.first().and_then(|_| network_of(own));
        let asked = |way: &Beyond| {
            let authority = HboneAuthority::Name { host: Arc::clone(&service.key.hostname), port };
            let (expect, from) = (Arc::clone(&way.expect), from.clone());
            Arc::new(Lead::Network(host::Beyond { authority, expect, from, by_waypoint: false }))
        };
        let ways: Vec<_> = ways.iter().filter(|way| way.entrances.is_ok()).map(|way| (way, asked(way))).collect();
        let scale = ways.iter().fold(1, |scale, (way, _)| least_common_multiple(scale, count(way)));
        Self { ways, scale, listed: Vec::new() }
    }

    /// What an endpoint weighs beside gateways.
    pub fn weigh(&self, w: &Workload) -> u32 {
        w.capacity.max(1).saturating_mul(self.scale)
    }

    /// An endpoint on another network; without a way to it, it is left out.
    pub fn add(&mut self, endpoint: &Endpoint, priority: u32, share: u32) {
        let w = endpoint.workload();
        let leads = |way: &Beyond| way.network == w.network && w.network_gateway.as_deref() == Some(&way.gateway);
        let Some((way, asked)) = self.ways.iter().find(|(way, _)| leads(way)) else { return };
        let weight = self.weigh(w) / count(way);
        let known = everybody(w);
        for entrance in way.entrances.iter().flatten() {
            let same = |at: &&mut Listed| at.target.addr == entrance.dial && at.known.uid() == known.uid();
            if let Some(at) = self.listed.iter_mut().find(same) {
                at.weight = at.weight.saturating_add(weight);
                at.priority = at.priority.min(priority);
                continue;
            }
            let (expect, lead) = (Arc::clone(&entrance.expect), Some(Arc::clone(asked)));
            let target = Target { addr: entrance.dial, name: None, hbone: true, expect, lead };
            self.listed.push(Listed { known: Arc::clone(&known), target, weight, priority, share, named: None });
        }
    }

    pub fn listed(self) -> Vec<Listed> {
        self.listed
    }
}

/// Our own network as others are told of it. One whose name is no header value is told to nobody.
pub(super) fn network_of(own: &Network) -> Option<HeaderValue> {
    HeaderValue::from_str(own.as_str()).ok()
}

/// Who is behind a gateway in the locality of one of them: nobody in particular, so that none is named in metrics and logs.
fn everybody(w: &Workload) -> Arc<Known> {
    let l = &w.locality;
    let uid = format!("SplitHorizon/{}/{}/{}/{}", w.network.as_str(), l.region, l.zone, l.subzone);
    let mut everybody = Workload::new(uid.trim_end_matches('/'), "", &w.namespace);
    (everybody.canonical_revision, everybody.workload_type) = ("".into(), "".into());
    (everybody.network, everybody.locality) = (w.network.clone(), l.clone());
    everybody.protocol = Protocol::Hbone;
    everybody.network_gateway.clone_from(&w.network_gateway);
    Arc::new(Known::new(Arc::new(everybody)))
}

fn count(way: &Beyond) -> u32 {
    way.entrances.as_ref().map_or(0, Vec::len).try_into().unwrap_or(u32::MAX).max(1)
}

fn least_common_multiple(a: u32, b: u32) -> u32 {
    let (mut x, mut y) = (a, b);
    while y != 0 {
        (x, y) = (y, x % y);
    }
    (a / x.max(1)).saturating_mul(b)
}
