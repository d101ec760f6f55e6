//! Rules of nftables in a pod's namespace: what hands DNS to the agent's proxy, and, where the eBPF programs cannot be had, TCP to
//! its listeners.
//!
//! Owns one table per pod, put there whole in one step and taken away whole, by the `nft` program. The table stays when the agent
//! ends: a pod whose TCP it captures is closed until the next agent is there. Upstream: `pods`. Downstream: the kernel.
use mesh_runtime::sockets::{NetnsFd, NetnsId};
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, netlink, recv, send, socket_with};
use std::collections::{HashMap, HashSet};
use std::hash::{DefaultHasher, Hasher as _};
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
    # udp out
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
    # udp in
    meta l4proto != { icmp, igmp, udp, ipv6-icmp } drop
  }
"#;

/// In the places marked `udp` above: only DNS and what is the agent's. NAT takes the pod's questions of DNS later.
const NO_UDP: [(&str, &str); 2] = [
    ("# udp out", "udp dport 53 accept\n    meta l4proto udp drop"),
    ("# udp in", "meta l4proto udp socket mark & 0xfff == 0x539 accept\n    # dns in\n    meta l4proto udp drop"),
];
/// Answers to questions of DNS that are not captured.
const DNS_IN: (&str, &str) = ("# dns in", "udp sport 53 accept");

/// The table of one agent. Others may be beside it: not every machine is one node.
#[derive(Clone, Debug)]
pub struct Table {
    name: String,
    /// Whether it captures TCP.
    pub tcp: bool,
    /// Whether it captures DNS over UDP.
    pub dns: bool,
    /// Whether, where it captures TCP, it drops UDP other than DNS.
    pub refuse_udp: bool,
}

impl Table {
    /// That of the agent which keeps its redirections in `pins`: two that share neither share no rules. It captures all.
    pub fn of(pins: &Path) -> Self {
        let plain = |c: char| if c.is_ascii_alphanumeric() || c == '-' { c } else { '_' };
        let name = format!("culvert{}", pins.to_string_lossy().chars().map(plain).take(200).collect::<String>());
        Self { name, tcp: true, dns: true, refuse_udp: false }
    }

    /// Puts the rules into the pod, in the place of those an earlier agent put there.
    ///
    /// # Errors
    /// There is no `nft`, or its own words.
    pub fn load(&self, netns: &NetnsFd) -> io::Result<()> {
        // Rules that capture TCP are what a pod is judged by: those are put there anew, whatever is there.
        if !self.tcp && netns.run_in(|| self.is_there()).unwrap_or(false) {
            return Ok(());
        }
        run(netns, &[], &self.definition())
    }

    /// Whether the calling thread's namespace has the table as an agent with the same rules put it there.
    fn is_there(&self) -> io::Result<bool> {
        let netlink = socket_with(AddressFamily::NETLINK, SocketType::RAW, SocketFlags::CLOEXEC, Some(netlink::NETFILTER))?;
        send(&netlink, &question(&self.name), SendFlags::empty())?;
        // The answer is there when `send` returns.
        let mut answer = [0; 2048];
        let (length, _) = recv(&netlink, &mut answer[..], RecvFlags::DONTWAIT)?;
        let version = self.version();
        let told =
            answer.get(..length).is_some_and(|answer| answer.windows(version.len()).any(|part| part == version.as_bytes()));
        Ok(told && answer.get(4..6) == Some(&NEW_TABLE.to_ne_bytes()))
    }

    /// What the rules are told from others by, in the table's comment.
    fn version(&self) -> String {
        let mut hasher = DefaultHasher::new();
        hasher.write(self.rules().as_bytes());
        format!("{:016x}", hasher.finish())
    }

    /// Whether this machine would take the rules. Nothing is changed.
    ///
    /// # Errors
    /// As for [`Table::load`].
    pub fn probe(&self) -> io::Result<()> {
        run(&NetnsFd::current()?, &["--check"], &self.definition())
    }

    fn definition(&self) -> String {
        let (name, version, rules) = (&self.name, self.version(), self.rules());
        format!("table inet {name}\ndelete table inet {name}\ntable inet {name} {{\n  comment \"{version}\"{rules}}}\n")
    }

    fn rules(&self) -> String {
        let no_udp = NO_UDP.into_iter().filter(|_| self.refuse_udp).chain(Some(DNS_IN).filter(|_| !self.dns));
        let all_tcp = no_udp.fold(TCP.to_owned(), |rules, (place, rule)| rules.replace(place, rule));
        let (tcp, dns) = (if self.tcp { &*all_tcp } else { "" }, if self.dns { DNS } else { "" });
        format!("{tcp}{dns}")
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

/// `NFNL_SUBSYS_NFTABLES` with `NFT_MSG_NEWTABLE` and `NFT_MSG_GETTABLE` (`linux/netfilter/nf_tables.h`).
const NEW_TABLE: u16 = 10 << 8;
const GET_TABLE: u16 = NEW_TABLE | 1;

/// Asks for a table of both families.
fn question(name: &str) -> Vec<u8> {
    const NLM_F_REQUEST: u16 = 1;
    const NFTA_TABLE_NAME: u16 = 1;
    const NFPROTO_INET: u8 = 1;
    const HEADERS: usize = 16 + 4;
    let attribute = 4 + name.len() + 1;
    let mut bytes = Vec::with_capacity(HEADERS + attribute.next_multiple_of(4));
    // A name is at most 200 and some bytes long.
    bytes.extend_from_slice(&((HEADERS + attribute.next_multiple_of(4)) as u32).to_ne_bytes());
    bytes.extend_from_slice(&GET_TABLE.to_ne_bytes());
    bytes.extend_from_slice(&NLM_F_REQUEST.to_ne_bytes());
    bytes.extend_from_slice(&[0; 8]); // sequence and port id
    bytes.extend_from_slice(&[NFPROTO_INET, 0, 0, 0]);
    bytes.extend_from_slice(&(attribute as u16).to_ne_bytes());
    bytes.extend_from_slice(&NFTA_TABLE_NAME.to_ne_bytes());
    bytes.extend_from_slice(name.as_bytes());
    bytes.resize(HEADERS + attribute.next_multiple_of(4), 0);
    bytes
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
