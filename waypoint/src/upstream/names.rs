//! Names of endpoints whose addresses are an endpoint each (Envoy's STRICT_DNS): looked up again whenever the answer's time is
//! over, as long as a cluster lists them.
//!
//! A look-up that fails changes nothing: what was known last goes on being used. That there is no such name is an answer like any other.
use super::state::State;
use super::transport::Reach;
use mesh_model::lb::addresses_of_name;
use mesh_model::service::IpFamilies;
use mesh_runtime::resolve;
use parking_lot::Mutex;
use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

/// Longest sleep of a watch: it ends so long after the last cluster with its name.
const LOOK: Duration = Duration::from_mins(1);

/// The names of all clusters.
#[derive(Debug, Default)]
pub(super) struct Names(Mutex<HashMap<Arc<str>, Weak<Name>>>);

#[derive(Debug)]
struct Name {
    host: Arc<str>,
    /// None before the first answer.
    addresses: Mutex<Option<Arc<[IpAddr]>>>,
    /// Clusters that list it.
    listed: Mutex<Vec<Weak<State>>>,
}

/// A name in one cluster.
#[derive(Debug)]
pub(super) struct Named {
    name: Arc<Name>,
    /// What we have addresses of ourselves.
    pub own: IpFamilies,
    /// What the service is for.
    pub service: IpFamilies,
}
impl Named {
    /// Addresses that can be used; `None` before the first answer.
    pub fn addresses(&self) -> Option<Vec<IpAddr>> {
        let known = self.name.addresses.lock().clone()?;
        Some(addresses_of_name(&known, self.own, self.service))
    }
}

impl Names {
    /// The name, watched from now on; `state` is told when its addresses change.
    pub fn follow(&self, host: &Arc<str>, state: &Arc<State>, own: IpFamilies, service: IpFamilies) -> Named {
        let mut names = self.0.lock();
        let name = names.get(host).and_then(Weak::upgrade).unwrap_or_else(|| {
            names.retain(|_, name| name.strong_count() > 0);
            let name = Arc::new(Name { host: Arc::clone(host), addresses: Mutex::default(), listed: Mutex::default() });
            names.insert(Arc::clone(host), Arc::downgrade(&name));
            if let Ok(runtime) = tokio::runtime::Handle::try_current() {
                runtime.spawn(watch(Arc::downgrade(&state.reach), Arc::downgrade(&name)));
            }
            name
        });
        drop(names);
        let mut listed = name.listed.lock();
        listed.retain(|listed| listed.strong_count() > 0);
        if !listed.iter().any(|listed| std::ptr::eq(listed.as_ptr(), Arc::as_ptr(state))) {
            listed.push(Arc::downgrade(state));
        }
        drop(listed);
        Named { name, own, service }
    }
}
impl Name {
    fn learn(&self, ips: Arc<[IpAddr]>) {
        if self.addresses.lock().as_ref() == Some(&ips) {
            return;
        }
        tracing::debug!(host = %self.host, ?ips, "addresses of an endpoint's name");
        *self.addresses.lock() = Some(ips);
        let listed: Vec<Arc<State>> = self.listed.lock().iter().filter_map(Weak::upgrade).collect();
        for state in listed {
            state.readdress();
        }
    }
}

async fn watch(reach: Weak<Reach>, name: Weak<Name>) {
    let host = |name: &Weak<Name>| name.upgrade().map(|name| Arc::clone(&name.host));
    while let (Some(reach), Some(host)) = (reach.upgrade(), host(&name)) {
        let answer = reach.resolver.answer(&host).await;
        drop(reach);
        let Some(name) = name.upgrade() else { return };
        let next = match answer {
            Ok(answer) => {
                // Off the data threads: tables may be made for it.
                let learner = Arc::clone(&name);
                let _done = tokio::task::spawn_blocking(move || learner.learn(answer.ips)).await;
                answer.until
            }
            Err(error) => {
                tracing::debug!(%error, "what was known last goes on being used");
                Instant::now() + resolve::UNTOLD
            }
        };
        drop(name);
        tokio::time::sleep_until(next.min(Instant::now() + LOOK).into()).await;
    }
}
