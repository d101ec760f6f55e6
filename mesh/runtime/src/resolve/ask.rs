//! Questions to name servers (RFC 1035): both families of one name, over UDP, and over TCP what does not fit.
//!
//! Believes only what repeats the question, with its number, from the server's own address. Knows no search domains.
use hickory_proto::op::{Message, MessageType, OpCode, Query, ResponseCode};
use hickory_proto::rr::{Name, RData, RecordType};
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpStream, UdpSocket};
use tokio::time::{Instant, timeout_at};

/// How long one server may take before the next is asked.
const ONE: Duration = Duration::from_secs(2);
/// How long all of them may take for one family: the other may have an answer by then.
const ALL: Duration = Duration::from_secs(4);
/// The largest message over UDP of which nothing else was agreed.
const PLAIN_UDP: usize = 512;

/// Addresses and the least lifetime of the records that lead to them; none where a server says that there are none.
pub(super) type Told = Option<(Vec<IpAddr>, u32)>;

/// What the first of `servers` that answers says of each family of `host`, or why none did: IPv4, IPv6.
pub(super) async fn addresses(host: &str, servers: &[SocketAddr]) -> [Result<Told, String>; 2] {
    let name = match Name::from_ascii(host) {
        Ok(mut name) => {
            name.set_fqdn(true);
            name
        }
        Err(error) => return [0, 1].map(|_| Err(format!("{host}: {error}"))),
    };
    let of = async |kind| of_kind(Query::query(name.clone(), kind), servers).await.map_err(|why| format!("{host}: {why}"));
    tokio::join!(of(RecordType::A), of(RecordType::AAAA)).into()
}

async fn of_kind(query: Query, servers: &[SocketAddr]) -> Result<Told, String> {
    let (mut why, deadline) = (String::new(), Instant::now() + ALL);
    // Twice, as a datagram may be lost.
    for server in servers.iter().chain(servers) {
        let now = Instant::now();
        if now >= deadline {
            break;
        }
        match timeout_at(deadline.min(now + ONE), exchange(*server, &query)).await {
            Ok(Ok(answer)) => match answer.metadata.response_code {
                ResponseCode::NoError => return Ok(told(&answer)),
                ResponseCode::NXDomain => return Ok(None),
                code => why = format!("{}: {code}", server.ip()),
            },
            Ok(Err(error)) => why = format!("{}: {error}", server.ip()),
            Err(_) => why = format!("{}: no answer in time", server.ip()),
        }
    }
    Err(why)
}

fn told(answer: &Message) -> Told {
    let mut ips = Vec::new();
    for record in &answer.answers {
        match &record.data {
            RData::A(a) => ips.push(IpAddr::V4(a.0)),
            RData::AAAA(aaaa) => ips.push(IpAddr::V6(aaaa.0).to_canonical()),
            // The names it stands for, on the way.
            _ => {}
        }
    }
    let ttl = answer.answers.iter().map(|record| record.ttl).min()?;
    (!ips.is_empty()).then_some((ips, ttl))
}

async fn exchange(server: SocketAddr, query: &Query) -> io::Result<Message> {
    let mut message = Message::new(rand::random(), MessageType::Query, OpCode::Query);
    message.metadata.recursion_desired = true;
    message.add_query(query.clone());
    let bytes = message.to_vec().map_err(io::Error::other)?;
    let answer = by_udp(server, &message, &bytes).await?;
    if answer.metadata.truncation { by_tcp(server, &message, &bytes).await } else { Ok(answer) }
}

async fn by_udp(server: SocketAddr, asked: &Message, bytes: &[u8]) -> io::Result<Message> {
    let any = if server.is_ipv4() { IpAddr::V4(Ipv4Addr::UNSPECIFIED) } else { IpAddr::V6(Ipv6Addr::UNSPECIFIED) };
    let socket = UdpSocket::bind((any, 0)).await?;
    socket.connect(server).await?;
    socket.send(bytes).await?;
    let mut buffer = [0; PLAIN_UDP];
    loop {
        let length = socket.recv(&mut buffer).await?;
        if let Some(answer) = answer_to(asked, buffer.get(..length).unwrap_or_default()) {
            return Ok(answer);
        }
    }
}

async fn by_tcp(server: SocketAddr, asked: &Message, bytes: &[u8]) -> io::Result<Message> {
    let mut tcp = TcpStream::connect(server).await?;
    let length = u16::try_from(bytes.len()).map_err(io::Error::other)?;
    tcp.write_all(&[&length.to_be_bytes()[..], bytes].concat()).await?;
    let mut answer = vec![0; usize::from(tcp.read_u16().await?)];
    tcp.read_exact(&mut answer).await?;
    answer_to(asked, &answer).ok_or_else(|| io::ErrorKind::InvalidData.into())
}

fn answer_to(asked: &Message, bytes: &[u8]) -> Option<Message> {
    let answer = Message::from_vec(bytes).ok()?;
    let is_answer = answer.metadata.message_type == MessageType::Response && answer.metadata.id == asked.metadata.id;
    // One that only says what went wrong may leave the question out.
    (is_answer && (answer.queries.is_empty() || answer.queries == asked.queries)).then_some(answer)
}
