//! Host names of endpoints that have no address (ServiceEntry with DNS resolution): looked up, and for how long the answer counts.
//!
//! `/etc/hosts` first; then the node's name servers are asked for the name as it is, so that the lifetime of its records is known;
//! a name they do not have is the system's resolver's, which tries search domains. Owns the cache; refuses to hand out a family
//! the client cannot use when it has a choice.
mod ask;

use parking_lot::Mutex;
use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How long an answer counts that does not say so itself (of a file, of the system's resolver, that there is none), and after
/// what time a look-up that failed is made again.
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
#[derive(Debug, Default)]
pub struct Resolver {
    answers: Mutex<HashMap<Arc<str>, Answer>>,
}

impl Resolver {
    /// Addresses of `host`, at least one.
    ///
    /// # Errors
    /// The resolver's own words.
    pub async fn lookup(&self, host: &Arc<str>) -> Result<Arc<[IpAddr]>, String> {
        let answer = self.answer(host).await?;
        if answer.ips.is_empty() { Err(format!("{host}: no addresses")) } else { Ok(answer.ips) }
    }

    /// What is known of `host`, which may be that it has no addresses.
    ///
    /// # Errors
    /// Nobody could say, in the words of the last that was asked.
    pub async fn answer(&self, host: &Arc<str>) -> Result<Answer, String> {
        if let Some(answer) = self.answers.lock().get(host)
            && Instant::now() < answer.until
        {
            return Ok(answer.clone());
        }
        let (mut ips, lifetime) = find(host).await?;
        ips.sort_unstable();
        ips.dedup();
        let answer = Answer { ips: ips.into(), until: Instant::now() + lifetime };
        let mut answers = self.answers.lock();
        if answers.len() >= CAPACITY {
            let now = Instant::now();
            answers.retain(|_, answer| now < answer.until);
            if answers.len() >= CAPACITY {
                answers.clear();
            }
        }
        answers.insert(Arc::clone(host), answer.clone());
        Ok(answer)
    }
}

/// Addresses and how long they count.
async fn find(host: &Arc<str>) -> Result<(Vec<IpAddr>, Duration), String> {
    if let Ok(ip) = host.parse::<IpAddr>() {
        return Ok((vec![ip.to_canonical()], UNTOLD));
    }
    let name = Arc::clone(host);
    let files = tokio::task::spawn_blocking(move || {
        let read = |path| std::fs::read_to_string(path).unwrap_or_default();
        (in_hosts(&read("/etc/hosts"), &name), name_servers(&read("/etc/resolv.conf")))
    });
    let (own, servers) = files.await.map_err(|e| format!("{host}: {e}"))?;
    if !own.is_empty() {
        return Ok((own, UNTOLD));
    }
    let none = if servers.is_empty() {
        false
    } else {
        let told = tokio::time::timeout(TIMEOUT, ask::addresses(host, &servers));
        let told = told.await.map_err(|_| format!("{host}: no answer in {} s", TIMEOUT.as_secs()))??;
        if let Some((ips, ttl)) = told {
            // A lifetime of nothing: not to be kept at all, but nor can everybody ask every time.
            let lifetime = if ttl == 0 { UNTOLD } else { Duration::from_secs(u64::from(ttl)) };
            return Ok((ips, lifetime.max(LEAST)));
        }
        true
    };
    let found = tokio::time::timeout(TIMEOUT, tokio::net::lookup_host((&**host, 0))).await;
    match found.map_err(|_| format!("{host}: no answer in {} s", TIMEOUT.as_secs()))? {
        Ok(found) => Ok((found.map(|a: SocketAddr| a.ip().to_canonical()).collect(), UNTOLD)),
        Err(_) if none => Ok((Vec::new(), UNTOLD)),
        Err(e) => Err(format!("{host}: {e}")),
    }
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
