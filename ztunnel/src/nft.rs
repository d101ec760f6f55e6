//! Rules of nftables in a pod's namespace: what hands DNS to the agent's proxy, and, where the eBPF programs cannot be had, TCP to
//! its listeners.
//!
//! Owns one table per pod, put there whole in one step and taken away whole, by the `nft` program. The table stays when the agent
//! ends: a pod whose TCP it captures is closed until the next agent is there. Upstream: `pods`. Downstream: the kernel.
use crate::ports::Ports;
use ebpf_loader::Tally;
use ebpf_loader::netlink::{find_attribute, u16_at, u32_at};
use mesh_runtime::sockets::{NetnsFd, NetnsId};
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, netlink, recv, send, socket_with};
use std::collections::{HashMap, HashSet};
use std::fmt::Write as _;
use std::hash::{DefaultHasher, Hasher as _};
use std::io::{self, Write as _};
use std::net::IpAddr;
use std::path::Path;
use std::process::{Command, Stdio};

/// UDP to port 53 goes to the proxy. Rules of NAT turn connection tracking on in the namespace; tunnels, which carry the bulk, are
/// left out of it. Ports in capitals are those of the agent's sockets in the pod.
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
    oifname != "lo" meta nfproto ipv4 udp dport 53 meta mark & 0xfff != 0x539 redirect to :DNS4
    oifname != "lo" meta nfproto ipv6 udp dport 53 meta mark & 0xfff != 0x539 redirect to :DNS6
  }
"#;

/// TCP by TPROXY, with the marks and routes of the eBPF programs. What the pod sends is marked and so routed back to `lo`, where the
/// agent's socket of that connection takes it, or the outbound listener; what comes in belongs to a socket of the agent, or is a new
/// connection for the inbound listener. What no listener takes is dropped, and so are protocols that could carry a connection past it.
/// HBONE comes to one port and is the agent's wherever its listener is bound: what else listens there, or took the port while no agent
/// ran, gets nothing. What is left of the tunnels of an agent that is gone is reset.
const TCP: &str = r#"
  set denied4 { type ipv4_addr; flags interval; }
  set denied6 { type ipv6_addr; flags interval; }
  chain out {
    type route hook output priority mangle;
    oifname "lo" accept
    meta mark & 0xfff == 0x539 counter name agent_egress accept
    tcp flags & (syn | ack | rst) == syn counter name outbound_captured meta mark set meta mark & 0xfffff000 | 0x53a accept
    meta l4proto tcp counter name outbound_owned meta mark set meta mark & 0xfffff000 | 0x53a accept
    # udp out
    meta l4proto { icmp, igmp, icmpv6 } counter name other_passed accept
    counter name refused_protocol drop
  }
  chain hbone {
    socket mark & 0xfff == 0x539 counter name inbound_hbone accept
    meta l4proto tcp tproxy to :HBONE counter name inbound_hbone accept
    counter name inbound_no_listener drop
  }
  chain in {
    type filter hook prerouting priority mangle;
    iifname "lo" meta mark & 0xfff == 0x53a meta l4proto tcp tproxy to :OUTBOUND accept
    iifname "lo" meta mark & 0xfff == 0x53a counter name outbound_no_listener drop
    iifname "lo" accept
    tcp flags & (syn | ack | rst) == syn ip saddr @denied4 counter name denied_source drop
    tcp flags & (syn | ack | rst) == syn ip6 saddr @denied6 counter name denied_source drop
    tcp dport 15008 tcp flags & (syn | ack | rst) == syn jump hbone
    tcp dport 15008 socket mark & 0xfff == 0x539 counter name inbound_tunnel accept
    tcp dport 15008 tproxy to :HBONE counter name inbound_tunnel accept
    tcp dport 15008 counter name inbound_no_listener reject with tcp reset
    meta l4proto tcp socket mark & 0xfff == 0x539 counter name inbound_known accept
    meta l4proto tcp tproxy to :PLAIN counter name inbound_assigned accept
    meta l4proto tcp counter name inbound_no_listener drop
    # udp in
    meta l4proto { icmp, igmp, icmpv6 } counter name other_passed accept
    counter name refused_protocol drop
  }
"#;

/// Counters of those rules, by the names that the eBPF programs count under.
const COUNTERS: [&str; 14] = [
    "agent_egress",
    "denied_source",
    "dns_passed",
    "inbound_assigned",
    "inbound_hbone",
    "inbound_known",
    "inbound_no_listener",
    "inbound_tunnel",
    "other_passed",
    "outbound_captured",
    "outbound_no_listener",
    "outbound_owned",
    "refused_protocol",
    "udp_passed",
];
/// The one of UDP that is refused.
const REFUSED_UDP: &str = "refused_udp";

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
    /// Where the agent listens in the pod.
    pub ports: Ports,
}

impl Table {
    /// That of the agent which keeps its redirections in `pins`: two that share neither share no rules. It captures all.
    pub fn of(pins: &Path) -> Self {
        let plain = |c: char| if c.is_ascii_alphanumeric() || c == '-' { c } else { '_' };
        let name = format!("culvert{}", pins.to_string_lossy().chars().map(plain).take(200).collect::<String>());
        Self { name, tcp: true, dns: true, refuse_udp: false, ports: Ports::USUAL }
    }

    /// Puts the rules into the pod, in the place of those an earlier agent put there; what those counted is counted on.
    ///
    /// # Errors
    /// There is no `nft`, or its own words.
    pub fn load(&self, netns: &NetnsFd) -> io::Result<()> {
        // Rules that capture TCP are what a pod is judged by: those are put there anew, whatever is there.
        if !self.tcp && netns.run_in(|| self.is_there()).unwrap_or(false) {
            return Ok(());
        }
        let seen = if self.tcp { self.traffic(netns).unwrap_or_default() } else { Vec::new() };
        run(netns, &[], &self.definition(&seen))
    }

    /// What the rules that capture TCP count, by the names of the eBPF programs' counters. Bytes are without link-layer headers.
    ///
    /// # Errors
    /// The namespace cannot be entered, or there are no such rules.
    pub fn traffic(&self, netns: &NetnsFd) -> io::Result<Vec<(&'static str, Tally)>> {
        netns.run_in(|| counters(&self.name))
    }

    /// Drops new connections from these (each a first and a last address), and from nowhere else.
    ///
    /// # Errors
    /// As for [`Table::load`].
    pub fn deny(&self, netns: &NetnsFd, sources: &[(IpAddr, IpAddr)]) -> io::Result<()> {
        let mut script = String::new();
        for (set, v4) in [("denied4", true), ("denied6", false)] {
            let ranges = sources.iter().filter(|(first, _)| first.is_ipv4() == v4);
            let elements: Vec<_> =
                ranges.map(|(first, last)| if first == last { first.to_string() } else { format!("{first}-{last}") }).collect();
            let _ = writeln!(script, "flush set inet {} {set}", self.name);
            if !elements.is_empty() {
                let _ = writeln!(script, "add element inet {} {set} {{ {} }}", self.name, elements.join(", "));
            }
        }
        run(netns, &[], &script)
    }

    /// Whether the calling thread's namespace has the table as an agent with the same rules put it there.
    fn is_there(&self) -> io::Result<bool> {
        let (version, told) = (self.version(), self.ask()?);
        Ok(told.is_some_and(|table| table.windows(version.len()).any(|part| part == version.as_bytes())))
    }

    /// What the kernel says of the table in the calling thread's namespace, if it is there. No program is started for that.
    fn ask(&self) -> io::Result<Option<Vec<u8>>> {
        let netlink = socket_with(AddressFamily::NETLINK, SocketType::RAW, SocketFlags::CLOEXEC, Some(netlink::NETFILTER))?;
        send(&netlink, &question(GET_TABLE, 0, &self.name), SendFlags::empty())?;
        // The answer is there when `send` returns.
        let mut answer = vec![0; 2048];
        let (length, _) = recv(&netlink, &mut answer[..], RecvFlags::DONTWAIT)?;
        answer.truncate(length);
        Ok((u16_at(&answer, 4) == Some(NEW_TABLE)).then_some(answer))
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
        run(&NetnsFd::current()?, &["--check"], &self.definition(&[]))
    }

    fn definition(&self, seen: &[(&str, Tally)]) -> String {
        let (name, version, rules) = (&self.name, self.version(), self.rules());
        let mut counters = String::new();
        for counter in COUNTERS.into_iter().chain([REFUSED_UDP]).filter(|_| self.tcp) {
            let Tally { packets, bytes } =
                seen.iter().find(|(of, _)| *of == counter).map_or_else(Tally::default, |(_, tally)| *tally);
            let _ = write!(counters, "\n  counter {counter} {{ packets {packets} bytes {bytes} }}");
        }
        format!("table inet {name}\ndelete table inet {name}\ntable inet {name} {{\n  comment \"{version}\"{counters}{rules}}}\n")
    }

    fn rules(&self) -> String {
        // Questions that are captured come by here before NAT takes them.
        let dns_out = if self.dns { "udp dport 53 accept" } else { "udp dport 53 counter name dns_passed accept" };
        let dns_in = if self.dns { "" } else { "udp sport 53 counter name dns_passed accept\n    " };
        let (ours, others) = if self.refuse_udp {
            ("meta l4proto udp socket mark & 0xfff == 0x539 accept\n    ", "meta l4proto udp counter name refused_udp drop")
        } else {
            ("", "meta l4proto udp counter name udp_passed accept")
        };
        let tcp = TCP.replace("# udp out", &format!("{dns_out}\n    {others}"));
        let tcp = tcp.replace("# udp in", &format!("{ours}{dns_in}{others}"));
        let rules = format!("{}{}", if self.tcp { &*tcp } else { "" }, if self.dns { DNS } else { "" });
        let Ports { outbound, plain, hbone, dns: [dns4, dns6] } = self.ports;
        let ports = [("OUTBOUND", outbound), ("PLAIN", plain), ("HBONE", hbone), ("DNS4", dns4), ("DNS6", dns6)];
        ports.iter().fold(rules, |rules, (name, port)| rules.replace(&format!("to :{name}"), &format!("to :{port}")))
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
            if !keep.contains(&id) && self.is_in(&netns).unwrap_or(false) {
                self.unload(&netns)?;
                swept += 1;
            }
        }
        Ok(swept)
    }

    fn is_in(&self, netns: &NetnsFd) -> io::Result<bool> {
        netns.run_in(|| Ok(self.ask()?.is_some()))
    }
}

/// `NFNL_SUBSYS_NFTABLES` with `NFT_MSG_NEWTABLE`, `NFT_MSG_GETTABLE` and `NFT_MSG_GETOBJ` (`linux/netfilter/nf_tables.h`).
const NEW_TABLE: u16 = 10 << 8;
const GET_TABLE: u16 = NEW_TABLE | 1;
const GET_OBJECT: u16 = NEW_TABLE | 0x13;
const NLM_F_REQUEST: u16 = 1;
const NLM_F_DUMP: u16 = 0x300;
/// Of a request or an answer: `struct nlmsghdr`, `struct nfgenmsg`.
const HEADERS: usize = 16 + 4;

/// A request about a table of both families. `NFTA_TABLE_NAME` and `NFTA_OBJ_TABLE` are one number.
fn question(kind: u16, flags: u16, name: &str) -> Vec<u8> {
    const NAME: u16 = 1;
    const NFPROTO_INET: u8 = 1;
    let attribute = 4 + name.len() + 1;
    let mut bytes = Vec::with_capacity(HEADERS + attribute.next_multiple_of(4));
    // A name is at most 200 and some bytes long.
    bytes.extend_from_slice(&((HEADERS + attribute.next_multiple_of(4)) as u32).to_ne_bytes());
    bytes.extend_from_slice(&kind.to_ne_bytes());
    bytes.extend_from_slice(&(NLM_F_REQUEST | flags).to_ne_bytes());
    bytes.extend_from_slice(&[0; 8]); // sequence and port id
    bytes.extend_from_slice(&[NFPROTO_INET, 0, 0, 0]);
    bytes.extend_from_slice(&(attribute as u16).to_ne_bytes());
    bytes.extend_from_slice(&NAME.to_ne_bytes());
    bytes.extend_from_slice(name.as_bytes());
    bytes.resize(HEADERS + attribute.next_multiple_of(4), 0);
    bytes
}

/// What the counters of a table in the calling thread's namespace say.
fn counters(table: &str) -> io::Result<Vec<(&'static str, Tally)>> {
    const NLMSG_ERROR: u16 = 2;
    const NLMSG_DONE: u16 = 3;
    let netlink = socket_with(AddressFamily::NETLINK, SocketType::RAW, SocketFlags::CLOEXEC, Some(netlink::NETFILTER))?;
    send(&netlink, &question(GET_OBJECT, NLM_F_DUMP, table), SendFlags::empty())?;
    let (mut seen, mut answer) = (Vec::new(), vec![0; 32 * 1024]);
    // As many parts as there are counters, some to a message, would be many.
    for _ in 0..COUNTERS.len() + 2 {
        let (length, _) = recv(&netlink, &mut answer[..], RecvFlags::DONTWAIT)?;
        let mut rest = answer.get(..length).unwrap_or_default();
        while let (Some(size), Some(kind)) = (u32_at(rest, 0), u16_at(rest, 4)) {
            match kind {
                NLMSG_DONE => return if seen.is_empty() { Err(io::ErrorKind::NotFound.into()) } else { Ok(seen) },
                NLMSG_ERROR => return Err(io::ErrorKind::NotFound.into()),
                _ => seen.extend(rest.get(HEADERS..size as usize).and_then(counter)),
            }
            rest = rest.get((size as usize).next_multiple_of(4).max(HEADERS)..).unwrap_or_default();
        }
    }
    Err(io::ErrorKind::InvalidData.into())
}

/// A counter among the objects of a table.
fn counter(attributes: &[u8]) -> Option<(&'static str, Tally)> {
    const NFTA_OBJ_NAME: u16 = 2;
    const NFTA_OBJ_DATA: u16 = 4;
    const NFTA_COUNTER_BYTES: u16 = 1;
    const NFTA_COUNTER_PACKETS: u16 = 2;
    let name = find_attribute(attributes, NFTA_OBJ_NAME)?.strip_suffix(b"\0")?;
    let known = COUNTERS.into_iter().chain([REFUSED_UDP]).find(|known| known.as_bytes() == name)?;
    let data = find_attribute(attributes, NFTA_OBJ_DATA)?;
    let number = |kind| Some(u64::from_be_bytes(find_attribute(data, kind)?.try_into().ok()?));
    Some((known, Tally { packets: number(NFTA_COUNTER_PACKETS)?, bytes: number(NFTA_COUNTER_BYTES)? }))
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

#[cfg(test)]
mod tests {
    use super::TCP;

    /// An image has no `/etc/protocols`.
    #[test]
    fn protocols_have_the_names_that_nft_knows_by_itself() {
        let named = TCP.split("l4proto ").skip(1).flat_map(|rest| match rest.strip_prefix("{ ") {
            Some(set) => set.split_once(" }").unwrap().0.split(", ").collect::<Vec<_>>(),
            None => rest.split(' ').take(1).collect(),
        });
        for name in named {
            assert!(["tcp", "udp", "icmp", "igmp", "icmpv6"].contains(&name), "{name}");
        }
    }
}
