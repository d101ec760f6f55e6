//! Host names of endpoints that have no address (ServiceEntry with DNS resolution): looked up when dialled, cached briefly.
//!
//! Uses the node's resolver. Owns the cache; refuses to hand out a family the client cannot use when it has a choice.
use parking_lot::Mutex;
use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How long an answer is used. Short, because the system resolver does not tell the record's own lifetime.
const TTL: Duration = Duration::from_secs(5);
/// Names remembered at most; beyond it the oldest answers go.
const CAPACITY: usize = 4096;
/// Longest wait for an answer.
const TIMEOUT: Duration = Duration::from_secs(5);

/// When an answer came, and what it was.
type Answer = (Instant, Arc<[IpAddr]>);

/// The cache.
#[derive(Debug, Default)]
pub struct Resolver {
    answers: Mutex<HashMap<Arc<str>, Answer>>,
}

impl Resolver {
    /// Addresses of `host`, or the resolver's own words.
    pub async fn lookup(&self, host: &Arc<str>) -> Result<Arc<[IpAddr]>, String> {
        if let Some((at, ips)) = self.answers.lock().get(host)
            && at.elapsed() < TTL
        {
            return Ok(Arc::clone(ips));
        }
        let found = tokio::time::timeout(TIMEOUT, tokio::net::lookup_host((&**host, 0)))
            .await
            .map_err(|_| format!("{host}: no answer in {} s", TIMEOUT.as_secs()))?
            .map_err(|e| format!("{host}: {e}"))?;
        let mut ips: Vec<IpAddr> = found.map(|a: SocketAddr| a.ip().to_canonical()).collect();
        ips.dedup();
        if ips.is_empty() {
            return Err(format!("{host}: no addresses"));
        }
        let ips: Arc<[IpAddr]> = ips.into();
        let mut answers = self.answers.lock();
        if answers.len() >= CAPACITY {
            answers.retain(|_, (at, _)| at.elapsed() < TTL);
            if answers.len() >= CAPACITY {
                answers.clear();
            }
        }
        answers.insert(Arc::clone(host), (Instant::now(), Arc::clone(&ips)));
        Ok(ips)
    }
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
mod tests {
    use super::*;

    #[test]
    fn the_clients_family_is_preferred() {
        let v4: IpAddr = "192.0.2.1".parse().unwrap();
        let v6: IpAddr = "2001:db8::1".parse().unwrap();
        for draw in 0..5 {
            assert_eq!(choose(&[v6, v4], v4, draw), Some(v4));
            assert_eq!(choose(&[v6], v4, draw), Some(v6));
        }
        assert_eq!(choose(&[], v4, 0), None);
    }

    #[tokio::test]
    async fn an_address_resolves_to_itself_and_nonsense_does_not() {
        let resolver = Resolver::default();
        assert_eq!(&*resolver.lookup(&"127.0.0.1".into()).await.unwrap(), &[IpAddr::from([127, 0, 0, 1])]);
        assert!(resolver.lookup(&"no such name".into()).await.is_err());
    }
}
