//! Messages: reading a question, writing an answer.
use super::Transport;
use hickory_proto::op::{Edns, Message, MessageType, Metadata, OpCode, Query, ResponseCode};
use hickory_proto::rr::rdata::{A, AAAA, CNAME};
use hickory_proto::rr::{DNSClass, Name, RData, Record, RecordType};
use std::net::IpAddr;

/// Seconds an answer may be kept (node-agent §1.11).
const TTL: u32 = 30;
/// Length of a message's header.
const HEADER: usize = 12;
/// What one may send over UDP without having been told more (RFC 1035).
const PLAIN_UDP: u16 = 512;
/// The most we send over UDP, whatever we are told: larger datagrams are cut to pieces and lost.
const MOST_UDP: u16 = 4096;

/// A message that asks something.
#[derive(Debug)]
pub struct Asked {
    /// What, as the mesh looks for it.
    pub question: Question,
    metadata: Metadata,
    query: Query,
    edns: Option<Edns>,
    /// Most bytes the client takes in a datagram of ours.
    datagram: u16,
}

/// One question.
#[derive(Debug, PartialEq, Eq)]
pub struct Question {
    /// The name, lower case, without the final dot.
    pub name: Box<str>,
    kind: RecordType,
}

impl Question {
    /// Whether it asks for IPv6 addresses (or IPv4 ones); nothing if for neither.
    pub fn family(&self) -> Option<bool> {
        match self.kind {
            RecordType::A => Some(false),
            RecordType::AAAA => Some(true),
            _ => None,
        }
    }

    /// As metrics call it. Clients make numbers up: those share one name.
    pub fn kind(&self) -> &'static str {
        match self.kind {
            RecordType::Unknown(_) => "OTHER",
            known => known.into(),
        }
    }
}

/// Reads a message. The error is what to reply to one that is no question: a word about it, or nothing to what is not even that.
pub fn read(bytes: &[u8]) -> Result<Asked, Option<Vec<u8>>> {
    let Ok(message) = Message::from_vec(bytes) else { return Err(malformed(bytes)) };
    if message.metadata.message_type != MessageType::Query {
        // Answering answers is how two servers keep each other busy for ever.
        return Err(None);
    }
    let refuse = |code| Err(Message::error_msg(message.metadata.id, message.metadata.op_code, code).to_vec().ok());
    if message.metadata.op_code != OpCode::Query {
        return refuse(ResponseCode::NotImp);
    }
    let [query] = &*message.queries else { return refuse(ResponseCode::FormErr) };
    if query.query_class != DNSClass::IN {
        return refuse(ResponseCode::Refused);
    }
    let name = query.name.to_ascii().to_ascii_lowercase();
    Ok(Asked {
        question: Question { name: name.strip_suffix('.').unwrap_or(&name).into(), kind: query.query_type },
        metadata: message.metadata,
        query: query.clone(),
        datagram: message.max_payload().clamp(PLAIN_UDP, MOST_UDP),
        edns: message.edns,
    })
}

/// FORMERR to what has the head of a query.
fn malformed(bytes: &[u8]) -> Option<Vec<u8>> {
    let (id, flags) = (bytes.first_chunk::<2>()?, *bytes.get(2)?);
    let is_query = bytes.len() >= HEADER && flags & 0x80 == 0;
    is_query.then(|| Message::error_msg(u16::from_be_bytes(*id), OpCode::Query, ResponseCode::FormErr).to_vec().ok())?
}

/// The mesh's answer: these addresses, of `alias_of` if the name asked for is an alias. None at all is an answer too.
pub fn with_addresses(asked: &Asked, alias_of: Option<&str>, addresses: &[IpAddr], transport: Transport) -> Vec<u8> {
    let mut message = response(asked, ResponseCode::NoError);
    message.metadata.authoritative = true;
    let mut name = asked.query.name.clone();
    if let Some(target) = alias_of.and_then(|target| Name::from_ascii(format!("{target}.")).ok()) {
        message.add_answer(Record::from_rdata(name, TTL, RData::CNAME(CNAME(target.clone()))));
        name = target;
    }
    for ip in addresses {
        let data = match ip {
            IpAddr::V4(ip) => RData::A(A(*ip)),
            IpAddr::V6(ip) => RData::AAAA(AAAA(*ip)),
        };
        message.add_answer(Record::from_rdata(name.clone(), TTL, data));
    }
    let most = match transport {
        Transport::Udp => usize::from(asked.datagram),
        Transport::Tcp => usize::from(u16::MAX),
    };
    match message.to_vec() {
        Ok(bytes) if bytes.len() <= most => bytes,
        // Asked again over TCP.
        Ok(_) => message.truncate().to_vec().unwrap_or_default(),
        Err(_) => failed(asked),
    }
}

/// SERVFAIL.
pub fn failed(asked: &Asked) -> Vec<u8> {
    // Nothing but the question is in it, and that was read from such a message.
    response(asked, ResponseCode::ServFail).to_vec().unwrap_or_default()
}

fn response(asked: &Asked, code: ResponseCode) -> Message {
    let mut message = Message::response(asked.metadata.id, OpCode::Query);
    message.metadata = Metadata::response_from_request(&asked.metadata);
    message.metadata.recursion_available = true;
    message.metadata.response_code = code;
    message.add_query(asked.query.clone());
    if let Some(theirs) = &asked.edns {
        let mut edns = Edns::new();
        edns.set_max_payload(MOST_UDP).set_dnssec_ok(theirs.flags().dnssec_ok);
        message.set_edns(edns);
    }
    message
}
