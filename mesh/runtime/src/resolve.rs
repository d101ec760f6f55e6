//! Host names of endpoints that have no address (ServiceEntry with DNS resolution): looked up, and for how long the answer counts.
//!
//! `/etc/hosts` first; then the node's name servers are asked for the name as it is, so that the lifetime of its records is known;
//! a name they do not have is the system's resolver's, which tries search domains. A server that fails takes nothing away, of one
//! family or both: what was known last stays, and is asked for again soon. Owns the cache; refuses to hand out a family the client
//! cannot use when it has a choice.
mod ask;

use parking_lot::Mutex;
use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How long an answer counts that does not say so itself (of a file, of the system's resolver, that there is none), and after
/// what time a look-up that failed, if only for one family, is made again.
pub const UNTOLD: Duration = Duration::from_secs(5);
/// The least (Envoy's `dns_min_refresh_rate`), whatever the records say.
const LEAST: Duration = Duration::from_secs(1);
/// Names remembered at most; beyond it the oldest answers go.
const CAPACITY: usize = 4096;
/// Longest wait for an answer.
const TIMEOUT: Duration = Duration::from_secs(5);

/// What is known of a name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    /// Its addresses, sorted; none where whoever knows says that there are none.
    pub ips: Arc<[IpAddr]>,
    /// Until when that counts.
    pub until: Instant,
}

/// The cache.
#[derive(Clone, Debug, Default)]
pub struct Resolver {
    known: Arc<Mutex<HashMap<Arc<str>, Known>>>,
}
#[derive(Clone, Debug)]
struct Known {
    answer: Answer,
    /// The last look-up failed: this is what was known before.
    failing: bool,
}

impl Resolver {
    /// Addresses of `host`, at least one. Those of a name whose servers fail are what was known last, and nobody waits for the
    /// servers to fail again (Envoy: a cluster keeps its hosts until another answer comes).
    ///
    /// # Errors
    /// The resolver's own words.
    pub async fn lookup(&self, host: &Arc<str>) -> Result<Arc<[IpAddr]>, String> {
        let answer = match self.last_of_failing(host) {
            Some(answer) => answer,
            None => self.answer(host).await?,
        };
        if answer.ips.is_empty() { Err(format!("{host}: no addresses")) } else { Ok(answer.ips) }
    }

    /// What is known of `host`, which may be that it has no addresses.
    ///
    /// # Errors
    /// Nobody could say, now or before, in the words of the last that was asked.
    pub async fn answer(&self, host: &Arc<str>) -> Result<Answer, String> {
        if let Some(known) = self.known.lock().get(host)
            && Instant::now() < known.answer.until
        {
            return Ok(known.answer.clone());
        }
        let found = find(host).await;
        self.learn(host, found)
    }

    /// What was known before the servers of a name began to fail; they are asked again meanwhile, by one at a time.
    fn last_of_failing(&self, host: &Arc<str>) -> Option<Answer> {
        let mut all = self.known.lock();
        let known = all.get_mut(host).filter(|known| known.failing)?;
        let now = Instant::now();
        if now >= known.answer.until {
            known.answer.until = now + UNTOLD;
            let (resolver, host) = (self.clone(), Arc::clone(host));
            tokio::spawn(async move {
                let found = find(&host).await;
                // Still failing is what is known already.
                let _ = resolver.learn(&host, found);
            });
        }
        Some(known.answer.clone())
    }

    /// Keeps what was found, with what was known of a family that nobody could say anything of.
    fn learn(&self, host: &Arc<str>, found: Result<Found, String>) -> Result<Answer, String> {
        let mut all = self.known.lock();
        let last = all.get(host).map(|known| Arc::clone(&known.answer.ips)).unwrap_or_default();
        let (mut ips, lifetime, failing) = match found {
            Ok(Found { ips, lifetime, untold: None }) => (ips, lifetime, false),
            Ok(Found { mut ips, lifetime, untold: Some((family, why)) }) => {
                ips.extend(last.iter().filter(|ip| Family::of(ip) == family));
                if ips.is_empty() {
                    return Err(why);
                }
                (ips, lifetime.min(UNTOLD), false)
            }
            Err(why) if last.is_empty() => return Err(why),
            Err(error) => {
                tracing::debug!(%error, "what was known last goes on being used");
                (last.to_vec(), UNTOLD, true)
            }
        };
        ips.sort_unstable();
        ips.dedup();
        let now = Instant::now();
        let answer = Answer { ips: ips.into(), until: now + lifetime };
        if all.len() >= CAPACITY && !all.contains_key(host) {
            all.retain(|_, known| now < known.answer.until);
            if all.len() >= CAPACITY {
                all.clear();
            }
        }
        all.insert(Arc::clone(host), Known { answer: answer.clone(), failing });
        Ok(answer)
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Family {
    V4,
    V6,
}
impl Family {
    fn of(ip: &IpAddr) -> Self {
        if ip.is_ipv4() { Self::V4 } else { Self::V6 }
    }
}

/// What a look-up came to.
#[derive(Debug, PartialEq, Eq)]
struct Found {
    ips: Vec<IpAddr>,
    /// How long they count.
    lifetime: Duration,
    /// The family of which nobody could say anything, and why.
    untold: Option<(Family, String)>,
}
impl Found {
    fn whole(ips: Vec<IpAddr>) -> Self {
        Self { ips, lifetime: UNTOLD, untold: None }
    }
}

async fn find(host: &Arc<str>) -> Result<Found, String> {
    if let Ok(ip) = host.parse::<IpAddr>() {
        return Ok(Found::whole(vec![ip.to_canonical()]));
    }
    let name = Arc::clone(host);
    let files = tokio::task::spawn_blocking(move || {
        let read = |path| std::fs::read_to_string(path).unwrap_or_default();
        (in_hosts(&read("/etc/hosts"), &name), name_servers(&read("/etc/resolv.conf")))
    });
    let (own, servers) = files.await.map_err(|e| format!("{host}: {e}"))?;
    if !own.is_empty() {
        return Ok(Found::whole(own));
    }
    let none = if servers.is_empty() {
        false
    } else {
        let told = tokio::time::timeout(TIMEOUT, asked(host, &servers));
        if let Some(found) = told.await.map_err(|_| format!("{host}: no answer in {} s", TIMEOUT.as_secs()))?? {
            return Ok(found);
        }
        true
    };
    let found = tokio::time::timeout(TIMEOUT, tokio::net::lookup_host((&**host, 0))).await;
    match found.map_err(|_| format!("{host}: no answer in {} s", TIMEOUT.as_secs()))? {
        Ok(found) => Ok(Found::whole(found.map(|a: SocketAddr| a.ip().to_canonical()).collect())),
        Err(_) if none => Ok(Found::whole(Vec::new())),
        Err(e) => Err(format!("{host}: {e}")),
    }
}

/// What name servers say of `host`; none where there are no addresses of either family.
async fn asked(host: &str, servers: &[SocketAddr]) -> Result<Option<Found>, String> {
    let (told, untold) = match ask::addresses(host, servers).await {
        [Ok(None), Ok(None)] => return Ok(None),
        [Ok(v4), Ok(v6)] => ([v4, v6], None),
        [Ok(v4), Err(why)] => ([v4, None], Some((Family::V6, why))),
        [Err(why), Ok(v6)] => ([None, v6], Some((Family::V4, why))),
        [Err(why), Err(_)] => return Err(why),
    };
    let told = || told.iter().flatten();
    // A lifetime of nothing: not to be kept at all, but nor can everybody ask every time.
    let lifetime =
        told().map(|(_, ttl)| *ttl).min().filter(|ttl| *ttl > 0).map_or(UNTOLD, |ttl| Duration::from_secs(u64::from(ttl)));
    let ips = told().flat_map(|(ips, _)| ips.iter().copied()).collect();
    Ok(Some(Found { ips, lifetime: lifetime.max(LEAST), untold }))
}

/// What `/etc/hosts` says of a name.
fn in_hosts(text: &str, host: &str) -> Vec<IpAddr> {
    let of_line = |line: &str| {
        let mut words = line.split('#').next()?.split_whitespace();
        let ip = words.next()?.parse::<IpAddr>().ok()?;
        words.any(|name| name.trim_end_matches('.').eq_ignore_ascii_case(host)).then(|| ip.to_canonical())
    };
    text.lines().filter_map(of_line).collect()
}

/// The name servers of a `resolv.conf`, as many as glibc asks.
fn name_servers(text: &str) -> Vec<SocketAddr> {
    let of_line = |line: &str| line.strip_prefix("nameserver")?.split_whitespace().next()?.parse::<IpAddr>().ok();
    text.lines().filter_map(of_line).take(3).map(|ip| SocketAddr::new(ip, 53)).collect()
}

/// One of `ips`: of the client's own family if there is one, chosen by `draw`.
pub fn choose(ips: &[IpAddr], client: IpAddr, draw: u64) -> Option<IpAddr> {
    let same = |ip: &&IpAddr| ip.is_ipv4() == client.is_ipv4();
    let n = ips.iter().filter(same).count();
    if n > 0 {
        ips.iter().filter(same).nth((draw % n as u64) as usize).copied()
    } else {
        ips.get((draw % ips.len().max(1) as u64) as usize).copied()
    }
}

#[cfg(test)]
mod tests;
