//! Rules of nftables in a pod's namespace: what hands DNS to the agent's proxy, and, where the eBPF programs cannot be had, TCP to
//! its listeners.
//!
//! Owns one table per pod, put there whole in one step and taken away whole, by the `nft` program. The table stays when the agent
//! ends: a pod whose TCP it captures is closed until the next agent is there. Upstream: `pods`. Downstream: the kernel.
use mesh_runtime::sockets::{NetnsFd, NetnsId};
use std::collections::{HashMap, HashSet};
use std::io::{self, Write as _};
use std::path::Path;
use std::process::{Command, Stdio};

/// UDP to port 53 goes to the proxy. Rules of NAT turn connection tracking on in the namespace; tunnels, which carry the bulk, are
/// left out of it.
const DNS: &str = r#"
  chain untracked_out {
    type filter hook output priority raw;
    tcp dport 15008 notrack
    tcp sport 15008 notrack
  }
  chain untracked_in {
    type filter hook prerouting priority raw;
    tcp dport 15008 notrack
    tcp sport 15008 notrack
  }
  chain dns {
    type nat hook output priority -100;
    oifname != "lo" udp dport 53 meta mark & 0xfff != 0x539 redirect to :15053
  }
"#;

/// TCP by TPROXY, with the marks and routes of the eBPF programs. What the pod sends is marked and so routed back to `lo`, where the
/// agent's socket of that connection takes it, or the outbound listener; what comes in belongs to a socket of the agent, or is a new
/// connection for the inbound listener. What could open another is dropped, and so are protocols that could carry a connection past it.
const TCP: &str = r#"
  chain out {
    type route hook output priority mangle;
    meta mark & 0xfff == 0x539 accept
    oifname "lo" accept
    meta l4proto tcp meta mark set meta mark & 0xfffff000 | 0x53a accept
    meta l4proto != { icmp, igmp, udp, ipv6-icmp } drop
  }
  chain in {
    type filter hook prerouting priority mangle;
    iifname "lo" meta mark & 0xfff == 0x53a meta l4proto tcp tproxy to :15001 accept
    iifname "lo" meta mark & 0xfff == 0x53a drop
    iifname "lo" accept
    tcp dport 15008 accept
    meta l4proto tcp socket mark & 0xfff == 0x539 accept
    meta l4proto tcp tproxy to :15006 accept
    tcp flags & (syn | ack) == syn drop
    meta l4proto != { icmp, igmp, udp, ipv6-icmp } drop
  }
"#;

/// The table of one agent. Others may be beside it: not every machine is one node.
#[derive(Clone, Debug)]
pub struct Table {
    name: String,
    /// Whether it captures TCP.
    pub tcp: bool,
    /// Whether it captures DNS over UDP.
    pub dns: bool,
}

impl Table {
    /// That of the agent which keeps its redirections in `pins`: two that share neither share no rules. It captures all.
    pub fn of(pins: &Path) -> Self {
        let plain = |c: char| if c.is_ascii_alphanumeric() || c == '-' { c } else { '_' };
        let name = format!("culvert{}", pins.to_string_lossy().chars().map(plain).take(200).collect::<String>());
        Self { name, tcp: true, dns: true }
    }

    /// Puts the rules into the pod, in the place of those an earlier agent put there.
    ///
    /// # Errors
    /// There is no `nft`, or its own words.
    pub fn load(&self, netns: &NetnsFd) -> io::Result<()> {
        run(netns, &[], &self.definition())
    }

    /// Whether this machine would take the rules. Nothing is changed.
    ///
    /// # Errors
    /// As for [`Table::load`].
    pub fn probe(&self) -> io::Result<()> {
        run(&NetnsFd::current()?, &["--check"], &self.definition())
    }

    fn definition(&self) -> String {
        let Self { name, tcp, dns } = self;
        let (tcp, dns) = (if *tcp { TCP } else { "" }, if *dns { DNS } else { "" });
        format!("table inet {name}\ndelete table inet {name}\ntable inet {name} {{{tcp}{dns}}}\n")
    }

    /// Takes them away.
    ///
    /// # Errors
    /// As for [`Table::load`].
    pub fn unload(&self, netns: &NetnsFd) -> io::Result<()> {
        let name = &self.name;
        run(netns, &[], &format!("table inet {name}\ndelete table inet {name}\n"))
    }

    /// Takes them away from every namespace of this machine (whose `/proc` is `proc_dir`) but those in `keep`; how many those were.
    /// For pods that left the mesh while no agent ran.
    ///
    /// # Errors
    /// As for [`Table::load`].
    pub fn sweep(&self, proc_dir: &Path, keep: &HashSet<NetnsId>) -> io::Result<usize> {
        let mut swept = 0;
        for (id, netns) in namespaces(proc_dir) {
            if !keep.contains(&id) && self.is_in(&netns)? {
                self.unload(&netns)?;
                swept += 1;
            }
        }
        Ok(swept)
    }

    fn is_in(&self, netns: &NetnsFd) -> io::Result<bool> {
        let mut nft = Command::new("nft");
        nft.args(["list", "table", "inet", &self.name]).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        // Made inside, as a child is where its parent's thread was.
        Ok(netns.run_in(|| nft.spawn())?.wait()?.success())
    }
}

/// Every network namespace that a process is in or that has a name.
fn namespaces(proc_dir: &Path) -> HashMap<NetnsId, NetnsFd> {
    let list = |dir: &Path| std::fs::read_dir(dir).into_iter().flatten().flatten().map(|entry| entry.path());
    let processes = list(proc_dir).map(|process| process.join("ns/net"));
    let named = list(Path::new("/run/netns"));
    processes.chain(named).filter_map(|path| NetnsFd::open(path).ok()).map(|netns| (netns.id(), netns)).collect()
}

fn run(netns: &NetnsFd, flags: &[&str], rules: &str) -> io::Result<()> {
    let mut nft = Command::new("nft");
    nft.args(flags).args(["-f", "-"]).stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::piped());
    let mut child = netns.run_in(|| nft.spawn())?;
    if let Some(mut stdin) = child.stdin.take() {
        stdin.write_all(rules.as_bytes())?;
    }
    let out = child.wait_with_output()?;
    if out.status.success() {
        return Ok(());
    }
    Err(io::Error::other(format!("nft: {}", String::from_utf8_lossy(&out.stderr).lines().next().unwrap_or_default())))
}
