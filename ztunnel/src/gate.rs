//! The gate before handshakes: how many may be in progress, in all and per client address.
//!
//! A client that opens thousands of half-made handshakes uses up its own share, not everyone's. Connections that never
//! send a byte do not get here: the accept path waits for the first byte without a place (see `inbound`).
use parking_lot::Mutex;
use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::Arc;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Share of all places one client address may hold: one in this many, at least [`LEAST`].
const SHARE: usize = 4;
const LEAST: usize = 16;

/// The gate. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Gate {
    places: Arc<Semaphore>,
    per_client: usize,
    clients: Arc<Mutex<HashMap<IpAddr, usize>>>,
}

impl Gate {
    /// A gate with `places` in all.
    pub fn new(places: usize) -> Self {
        let places = places.max(1);
        Self {
            places: Arc::new(Semaphore::new(places)),
            per_client: (places / SHARE).max(LEAST),
            clients: Arc::default(),
        }
    }
    /// A place for a handshake with `client`. `None` at once when this client holds its share; waits when all places
    /// are taken. Cancel safe.
    pub async fn enter(&self, client: IpAddr) -> Option<Place> {
        {
            let mut clients = self.clients.lock();
            let held = clients.entry(client).or_insert(0);
            if *held >= self.per_client {
                return None;
            }
            *held += 1;
        }
        // From here on the share is returned by the drop of `Share`, also when this future is dropped while waiting.
        let share = Share { client, clients: Arc::clone(&self.clients) };
        let permit = Arc::clone(&self.places).acquire_owned().await.ok()?;
        Some(Place { _permit: permit, _share: share })
    }
}

/// A place; dropped when the handshake is over, however it ended.
#[derive(Debug)]
pub struct Place {
    _permit: OwnedSemaphorePermit,
    _share: Share,
}

#[derive(Debug)]
struct Share {
    client: IpAddr,
    clients: Arc<Mutex<HashMap<IpAddr, usize>>>,
}
impl Drop for Share {
    fn drop(&mut self) {
        let mut clients = self.clients.lock();
        if let Some(held) = clients.get_mut(&self.client) {
            *held -= 1;
            if *held == 0 {
                clients.remove(&self.client);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn one_client_cannot_take_every_place() {
        let gate = Gate::new(64);
        let greedy = IpAddr::from([192, 0, 2, 1]);
        let other = IpAddr::from([192, 0, 2, 2]);
        let mut held = Vec::new();
        while let Some(place) = gate.enter(greedy).await {
            held.push(place);
            assert!(held.len() <= 16);
        }
        assert_eq!(held.len(), 16);
        assert!(gate.enter(other).await.is_some());
        held.pop();
        assert!(gate.enter(greedy).await.is_some(), "a place came back");
    }

    #[tokio::test]
    async fn a_waiter_that_gives_up_returns_its_share() {
        let gate = Gate::new(1);
        let a = IpAddr::from([192, 0, 2, 1]);
        let first = gate.enter(a).await;
        let waiting = tokio::time::timeout(std::time::Duration::from_millis(5), gate.enter(a)).await;
        assert!(waiting.is_err());
        drop(first);
        assert!(gate.clients.lock().is_empty());
        assert!(gate.enter(a).await.is_some());
    }
}
