//! Istio's CNI agent as a node agent sees it: a `SOCK_SEQPACKET` server that names pods, hands their network namespaces over, and
//! waits for each answer; and the rules it puts into a pod. Written from the protocol (node-agent §1.2), down to the bytes.
//!
//! Owns the socket and the messages, right and wrong ones. Knows nothing of the product's own code.
use std::io::{IoSlice, Read as _};
use std::os::fd::{AsRawFd as _, RawFd};
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use nix::sys::socket::{ControlMessage, MsgFlags, UnixAddr, sendmsg};
use socket2::{Domain, SockAddr, Socket, Type};

use crate::netns::{Netns, ip_batch};

/// How long the other side may take: a node agent comes back after 15 s at most.
const COMES_BACK: Duration = Duration::from_secs(20);
/// What a node agent of version 1 says first.
const HELLO: [u8; 2] = [0x08, 0x01];

/// The server.
#[derive(Debug)]
pub struct CniAgent(Socket);

/// One node agent's connection.
#[derive(Debug)]
pub struct Connection(Socket);

impl CniAgent {
    /// Listens at `path`, in the place of what was there.
    pub fn listen(path: &Path) -> anyhow::Result<Self> {
        let _gone_already = std::fs::remove_file(path);
        let socket = Socket::new(Domain::UNIX, Type::SEQPACKET, None)?;
        socket.bind(&SockAddr::unix(path)?)?;
        socket.listen(8)?;
        socket.set_read_timeout(Some(COMES_BACK))?;
        Ok(Self(socket))
    }

    /// The next node agent, which must greet in the right version.
    pub fn accept(&self) -> anyhow::Result<Connection> {
        let (socket, _) = self.0.accept().context("no node agent connects")?;
        socket.set_read_timeout(Some(COMES_BACK))?;
        let connection = Connection(socket);
        let hello = connection.hear()?.context("the node agent went without a word")?;
        ensure!(hello == HELLO, "the node agent greets with {hello:02x?}");
        Ok(connection)
    }
}

/// A pod as the CNI agent names it.
#[derive(Clone, Copy, Debug)]
pub struct CniPod<'a> {
    /// The Pod's uid.
    pub uid: &'a str,
    /// Its name.
    pub name: &'a str,
    /// Its Kubernetes namespace.
    pub namespace: &'a str,
    /// Its service account.
    pub service_account: &'a str,
}

impl Connection {
    /// Adds a pod. The error the node agent answers with, empty if none.
    pub fn add(&self, pod: &CniPod<'_>, netns: &Netns) -> anyhow::Result<String> {
        let file = std::fs::File::open(netns.path())?;
        self.ask(&add_request(pod), &[file.as_raw_fd()])
    }
    /// Removes a pod.
    pub fn remove(&self, uid: &str) -> anyhow::Result<String> {
        self.ask(&field(2, &field(2, uid.as_bytes())), &[])
    }
    /// Names a pod whose namespace is lost.
    pub fn keep(&self, uid: &str) -> anyhow::Result<String> {
        self.ask(&field(5, &field(1, uid.as_bytes())), &[])
    }
    /// Says that all pods have been named.
    pub fn snapshot_sent(&self) -> anyhow::Result<String> {
        self.ask(&field(3, &[]), &[])
    }
    /// Sends a request and waits for the answer.
    pub fn ask(&self, request: &[u8], fds: &[RawFd]) -> anyhow::Result<String> {
        let rights = [ControlMessage::ScmRights(fds)];
        let control = if fds.is_empty() { &[][..] } else { &rights[..] };
        sendmsg::<UnixAddr>(self.0.as_raw_fd(), &[IoSlice::new(request)], control, MsgFlags::MSG_NOSIGNAL, None)?;
        let answer = self.hear()?.context("the node agent went instead of answering")?;
        // A WorkloadResponse whose field 1 is an Ack, whose field 1 is the error.
        let ack = read_field(1, &answer).with_context(|| format!("no acknowledgement: {answer:02x?}"))?;
        Ok(String::from_utf8_lossy(read_field(1, ack).unwrap_or_default()).into_owned())
    }
    /// Closes the connection.
    pub fn close(&self) {
        let _gone_already = self.0.shutdown(std::net::Shutdown::Both);
    }
    /// Whether the node agent closes the connection.
    pub fn is_closed(&self) -> anyhow::Result<bool> {
        Ok(self.hear()?.is_none())
    }
    fn hear(&self) -> anyhow::Result<Option<Vec<u8>>> {
        let mut packet = [0; 4096];
        let length = (&self.0).read(&mut packet).context("the node agent says nothing")?;
        Ok((length > 0).then(|| packet[..length].to_vec()))
    }
}

/// A request to add a pod; it wants a namespace beside it.
pub fn add_request(pod: &CniPod<'_>) -> Vec<u8> {
    let info = [field(1, pod.name.as_bytes()), field(2, pod.namespace.as_bytes()), field(3, pod.service_account.as_bytes())];
    field(1, &[field(1, pod.uid.as_bytes()), field(2, &info.concat())].concat())
}

/// A length-delimited field of a protobuf message.
pub fn field(number: u8, value: &[u8]) -> Vec<u8> {
    let mut bytes = vec![number << 3 | 2];
    let mut length = value.len();
    while length >= 0x80 {
        bytes.push(length as u8 | 0x80);
        length >>= 7;
    }
    bytes.push(length as u8);
    bytes.extend(value);
    bytes
}

/// The value of a message's first field, if it is this one.
fn read_field(number: u8, message: &[u8]) -> Option<&[u8]> {
    let (tag, rest) = message.split_first()?;
    let (mut length, mut rest, mut shift) = (0usize, rest, 0);
    while let Some((byte, after)) = rest.split_first() {
        length |= usize::from(byte & 0x7f) << shift;
        (rest, shift) = (after, shift + 7);
        if byte & 0x80 == 0 {
            return (*tag == (number << 3 | 2)).then(|| rest.get(..length)).flatten();
        }
        if shift > 21 {
            return None;
        }
    }
    None
}

/// How Istio's CNI agent redirects a pod (node-agent §1.2), in the words of `nft`.
const RULES: &str = r#"
table inet istio {
  chain mangle_prerouting {
    type filter hook prerouting priority mangle;
    meta mark & 0xfff == 0x539 ct mark set ct mark & 0xfffff000 | 0x111
  }
  chain mangle_output {
    type route hook output priority mangle;
    ct mark & 0xfff == 0x111 meta mark set ct mark
  }
  chain nat_output {
    type nat hook output priority -100;
    ip daddr 169.254.7.127 meta l4proto tcp accept
    udp dport 53 oifname != "lo" meta mark & 0xfff != 0x539 redirect to :15053
    tcp dport 53 ip daddr != 127.0.0.1 meta mark & 0xfff != 0x539 redirect to :15053
    tcp dport 53 ip6 daddr != ::1 meta mark & 0xfff != 0x539 redirect to :15053
    meta mark & 0xfff == 0x111 accept
    oifname "lo" ip daddr != 127.0.0.1 accept
    oifname "lo" ip6 daddr != ::1 accept
    meta l4proto tcp ip daddr != 127.0.0.1 meta mark & 0xfff != 0x539 redirect to :15001
    meta l4proto tcp ip6 daddr != ::1 meta mark & 0xfff != 0x539 redirect to :15001
  }
  chain nat_prerouting {
    type nat hook prerouting priority -100;
    ip saddr 169.254.7.127 meta l4proto tcp accept
    meta l4proto tcp ip daddr != 127.0.0.1 tcp dport != 15008 meta mark & 0xfff != 0x539 redirect to :15006
    meta l4proto tcp ip6 daddr != ::1 tcp dport != 15008 meta mark & 0xfff != 0x539 redirect to :15006
  }
}
"#;

/// Puts the rules and routes of Istio's CNI agent into a pod.
pub fn redirect(netns: &Netns) -> anyhow::Result<()> {
    use std::io::Write as _;
    use std::process::{Command, Stdio};
    let mut nft = netns.spawn(Command::new("nft").args(["-f", "-"]).stdin(Stdio::piped()).stderr(Stdio::piped()))?;
    nft.stdin.take().context("a pipe")?.write_all(RULES.as_bytes())?;
    let out = nft.wait_with_output()?;
    ensure!(out.status.success(), "nft: {}", String::from_utf8_lossy(&out.stderr));
    ip_batch(
        netns,
        &["rule add fwmark 0x111/0xfff pref 32764 lookup 100".into(), "route add local 0.0.0.0/0 dev lo table 100".into()],
    )?;
    let v6 = ["rule add fwmark 0x111/0xfff pref 32764 lookup 100", "route add local ::/0 dev lo table 100"];
    for line in v6 {
        let out = netns.output(Command::new("ip").arg("-6").args(line.split(' ')))?;
        ensure!(out.status.success(), "ip -6 {line}: {}", String::from_utf8_lossy(&out.stderr));
    }
    Ok(())
}
