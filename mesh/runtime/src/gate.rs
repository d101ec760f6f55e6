//! The gate before handshakes: how many may be in progress, in all and per client, and who gives way when it is full.
//!
//! A client that opens thousands of half-made handshakes uses up its own share, not everyone's. When many clients together
//! fill the gate, the oldest handshake gives way to a new one: an honest one takes milliseconds. Connections that never send
//! a byte do not get here: the accept path waits for the first byte without a place (see `inbound`).
use parking_lot::Mutex;
use std::collections::{BTreeMap, HashMap};
use std::net::{IpAddr, Ipv6Addr};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore};

/// Share of all places one client may hold: one in this many, at least [`LEAST`].
const SHARE: usize = 4;
const LEAST: usize = 16;
/// A handshake younger than this does not give way: it may be about to finish.
const PATIENCE: Duration = Duration::from_millis(250);

/// The gate. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Gate {
    places: Arc<Semaphore>,
    per_client: usize,
    table: Arc<Mutex<Table>>,
}

#[derive(Debug, Default)]
struct Table {
    /// Places held or waited for, by client.
    clients: HashMap<IpAddr, usize>,
    /// Handshakes in progress, oldest first.
    running: BTreeMap<u64, (Instant, Arc<Notify>)>,
    next: u64,
}

impl Gate {
    /// A gate with `places` in all.
    pub fn new(places: usize) -> Self {
        let places = places.max(1);
        Self { places: Arc::new(Semaphore::new(places)), per_client: (places / SHARE).max(LEAST), table: Arc::default() }
    }
    /// A place for a handshake with `client`. `None` at once when this client holds its share; when all places are taken the
    /// oldest handshake gives way, or this waits. Cancel safe.
    pub async fn enter(&self, client: IpAddr) -> Option<Place> {
        let client = network(client);
        {
            let mut table = self.table.lock();
            let held = table.clients.entry(client).or_insert(0);
            if *held >= self.per_client {
                return None;
            }
            *held += 1;
        }
        // From here on the share is returned by the drop of `Share`, also when this future is dropped while waiting.
        let share = Share { client, table: Arc::clone(&self.table) };
        let permit = loop {
            if let Ok(permit) = Arc::clone(&self.places).try_acquire_owned() {
                break permit;
            }
            self.make_room();
            let freed = Arc::clone(&self.places).acquire_owned();
            match tokio::time::timeout(PATIENCE, freed).await {
                Ok(permit) => break permit.ok()?,
                Err(_still_full) => {}
            }
        };
        let give_way = Arc::new(Notify::new());
        let id = {
            let mut table = self.table.lock();
            table.next += 1;
            let id = table.next;
            table.running.insert(id, (Instant::now(), Arc::clone(&give_way)));
            id
        };
        Some(Place { _permit: permit, share, id, give_way })
    }
    /// Tells the oldest handshake to give way, if it had its chance.
    fn make_room(&self) {
        let mut table = self.table.lock();
        let oldest = table.running.first_key_value().map(|(id, (since, _))| (*id, since.elapsed()));
        if let Some((id, age)) = oldest
            && age >= PATIENCE
            && let Some((_, give_way)) = table.running.remove(&id)
        {
            give_way.notify_one();
        }
    }
}

/// Whose share an address counts against: one host has a whole /64 of IPv6 addresses to itself.
fn network(client: IpAddr) -> IpAddr {
    match client.to_canonical() {
        IpAddr::V6(ip) => {
            let [a, b, c, d, ..] = ip.segments();
            Ipv6Addr::new(a, b, c, d, 0, 0, 0, 0).into()
        }
        v4 @ IpAddr::V4(_) => v4,
    }
}

/// A place; dropped when the handshake is over, however it ended.
#[derive(Debug)]
pub struct Place {
    _permit: OwnedSemaphorePermit,
    share: Share,
    id: u64,
    give_way: Arc<Notify>,
}

impl Place {
    /// Resolves when the place is needed for somebody else. Cancel safe.
    pub async fn lost(&self) {
        self.give_way.notified().await;
    }
}
impl Drop for Place {
    fn drop(&mut self) {
        self.share.table.lock().running.remove(&self.id);
    }
}

#[derive(Debug)]
struct Share {
    client: IpAddr,
    table: Arc<Mutex<Table>>,
}
impl Drop for Share {
    fn drop(&mut self) {
        let mut table = self.table.lock();
        if let Some(held) = table.clients.get_mut(&self.client) {
            *held -= 1;
            if *held == 0 {
                table.clients.remove(&self.client);
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
    async fn one_host_with_many_ipv6_addresses_is_one_client() {
        let gate = Gate::new(64);
        let mut held = Vec::new();
        for host in 0..20u16 {
            held.extend(gate.enter(Ipv6Addr::new(0x2001, 0xdb8, 0, 1, 0, 0, 0, host).into()).await);
        }
        assert_eq!(held.len(), 16);
        assert!(gate.enter(Ipv6Addr::new(0x2001, 0xdb8, 0, 2, 0, 0, 0, 1).into()).await.is_some());
    }

    #[tokio::test]
    async fn the_oldest_gives_way_when_all_places_are_taken() {
        let gate = Gate::new(16);
        let from = |host| IpAddr::from([192, 0, 2, host]);
        let mut held = Vec::new();
        for host in 0..16 {
            held.push(gate.enter(from(host)).await);
        }
        let oldest = held.remove(0).unwrap();
        let ends = tokio::spawn(async move {
            oldest.lost().await;
            drop(oldest);
        });
        let late = tokio::time::timeout(Duration::from_secs(5), gate.enter(from(99))).await;
        assert!(late.is_ok_and(|place| place.is_some()));
        ends.await.unwrap();
    }

    #[tokio::test]
    async fn a_waiter_that_gives_up_returns_its_share() {
        let gate = Gate::new(1);
        let a = IpAddr::from([192, 0, 2, 1]);
        let first = gate.enter(a).await;
        let waiting = tokio::time::timeout(Duration::from_millis(5), gate.enter(a)).await;
        assert!(waiting.is_err());
        drop(first);
        assert!(gate.table.lock().clients.is_empty());
        assert!(gate.enter(a).await.is_some());
    }
}
