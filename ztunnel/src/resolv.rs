//! The pod's own `resolv.conf`, read through a process that lives in the pod's network namespace.
//!
//! Kubernetes writes it for each pod (`dnsPolicy`, `dnsConfig`), and only there is it seen. Where no process can be looked at (the
//! agent does not see the machine's, or the pod has none yet) the node's name servers are asked and the search domains are those Kubernetes
//! gives by default.
//!
//! Owns what is remembered of a pod between its questions. Upstream: `dns`. Downstream: `/proc`.
use crate::settings::Settings;
use mesh_runtime::sockets::NetnsId;
use rustix::fs::{FileType, Mode, OFlags, ResolveFlags, fstat, openat2, stat};
use std::fs::File;
use std::io::Read as _;
use std::net::IpAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::{Mutex, Semaphore};

/// Longest file that is read.
const LONGEST: u64 = 64 * 1024;
/// Name servers that are used, as many as glibc does.
const SERVERS: usize = 3;
/// Search domains that are used, as many as Kubernetes allows.
const DOMAINS: usize = 32;

/// Questions of one pod under way at once. Further ones over UDP are not answered, and asked again by whoever wants to know.
const QUESTIONS: usize = 256;
/// TCP connections of one pod at once.
const CONNECTIONS: usize = 64;
/// How long a pod's `resolv.conf` is believed.
const FRESH: Duration = Duration::from_mins(1);

/// What one pod's proxy keeps between questions.
#[derive(Debug)]
pub struct PodDns {
    conf: Mutex<Option<(Instant, Arc<ResolvConf>)>>,
    /// Places for questions under way.
    pub questions: Arc<Semaphore>,
    /// Places for TCP connections.
    pub connections: Arc<Semaphore>,
}

impl Default for PodDns {
    fn default() -> Self {
        Self {
            conf: Mutex::default(),
            questions: Arc::new(Semaphore::new(QUESTIONS)),
            connections: Arc::new(Semaphore::new(CONNECTIONS)),
        }
    }
}

impl PodDns {
    /// The pod's `resolv.conf`. Whoever comes while it is being read waits.
    pub async fn conf(&self, netns: Option<NetnsId>, namespace: &Arc<str>, settings: &Settings) -> Arc<ResolvConf> {
        let mut known = self.conf.lock().await;
        if let Some((at, conf)) = &*known
            && at.elapsed() < FRESH
        {
            return Arc::clone(conf);
        }
        let (namespace, domain, processes) = (Arc::clone(namespace), settings.cluster_domain.clone(), settings.proc_dir.clone());
        let read = move || of_pod(netns, &processes, &namespace, &domain);
        let conf = Arc::new(tokio::task::spawn_blocking(read).await.unwrap_or_default());
        *known = Some((Instant::now(), Arc::clone(&conf)));
        conf
    }
}

/// What matters of a `resolv.conf`.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct ResolvConf {
    /// Name servers, in the order they are asked.
    pub servers: Vec<IpAddr>,
    /// Search domains, lower case, without final dots.
    pub search: Box<[Box<str>]>,
}

impl ResolvConf {
    /// Reads the text. Of several `search` or `domain` lines the last counts (resolv.conf(5)).
    pub fn parse(text: &str) -> Self {
        let mut conf = Self::default();
        for line in text.lines() {
            let mut words = line.split_whitespace();
            match words.next() {
                Some("nameserver") if conf.servers.len() < SERVERS => {
                    // With a zone (`fe80::1%eth0`) it could not be reached from another namespace's number for it.
                    conf.servers.extend(words.next().and_then(|ip| ip.parse::<IpAddr>().ok()));
                }
                Some("search" | "domain") => {
                    let domain = |word: &str| word.trim_end_matches('.').to_ascii_lowercase().into_boxed_str();
                    conf.search = words.map(domain).filter(|d| !d.is_empty()).take(DOMAINS).collect();
                }
                _ => {}
            }
        }
        conf
    }
}

/// What the pod in this network namespace uses; else what a pod of `namespace` would on this node.
fn of_pod(netns: Option<NetnsId>, proc_dir: &Path, namespace: &str, cluster_domain: &str) -> ResolvConf {
    if let Some(conf) = netns.and_then(|netns| of_process(netns, proc_dir)) {
        return conf;
    }
    let mut conf = ResolvConf::parse(&std::fs::read_to_string("/etc/resolv.conf").unwrap_or_default());
    // A stub resolver of the node is not there in the pod.
    conf.servers.retain(|ip| !ip.is_loopback());
    let domains = [format!("{namespace}.svc.{cluster_domain}"), format!("svc.{cluster_domain}"), cluster_domain.to_owned()];
    conf.search = domains.map(String::into_boxed_str).into();
    conf
}

/// The first process in the namespace whose file names a server.
fn of_process(netns: NetnsId, proc_dir: &Path) -> Option<ResolvConf> {
    std::fs::read_dir(proc_dir).ok()?.flatten().find_map(|entry| {
        let (process, name) = (entry.path(), entry.file_name());
        name.to_str().filter(|name| name.bytes().all(|b| b.is_ascii_digit()))?;
        let own = stat(process.join("ns/net")).ok()?;
        if (own.st_dev, own.st_ino) != (netns.dev, netns.inode) {
            return None;
        }
        let conf = ResolvConf::parse(&read_in_root(&process)?);
        (!conf.servers.is_empty()).then_some(conf)
    })
}

/// The file as the process sees it. Links in it are followed inside the process's root only, and nothing but a plain file is read:
/// what is in a container is its owner's to choose.
fn read_in_root(process: &Path) -> Option<String> {
    let root = File::open(process.join("root")).ok()?;
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let fd = openat2(&root, "etc/resolv.conf", flags, Mode::empty(), ResolveFlags::IN_ROOT).ok()?;
    if FileType::from_raw_mode(fstat(&fd).ok()?.st_mode) != FileType::RegularFile {
        return None;
    }
    let mut text = Vec::new();
    File::from(fd).take(LONGEST).read_to_end(&mut text).ok()?;
    Some(String::from_utf8_lossy(&text).into_owned())
}
