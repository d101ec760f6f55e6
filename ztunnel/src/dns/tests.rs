use super::answer::{read, with_addresses};
use super::forward::answers;
use super::*;
use crate::resolv::ResolvConf;
use hickory_proto::op::{Edns, Message, MessageType, OpCode, Query, ResponseCode};
use hickory_proto::rr::{Name, RData, RecordType};
use std::net::{IpAddr, Ipv4Addr};

fn query(name: &str, kind: RecordType) -> Message {
    let mut message = Message::new(77, MessageType::Query, OpCode::Query);
    message.metadata.recursion_desired = true;
    message.add_query(Query::query(Name::from_ascii(name).unwrap(), kind));
    message
}
fn many(n: u8) -> Vec<IpAddr> {
    (0..n).map(|i| IpAddr::from([10, 0, 0, i])).collect()
}

#[test]
fn a_question_is_read_and_answered() {
    let asked = read(&query("Web.Shop.", RecordType::A).to_vec().unwrap()).unwrap();
    assert_eq!((&*asked.question.name, asked.question.family(), asked.question.kind()), ("web.shop", Some(false), "A"));
    let reply = with_addresses(&asked, Some("api.example.com"), &[Ipv4Addr::new(10, 0, 0, 1).into()], Transport::Udp);
    let reply = Message::from_vec(&reply).unwrap();
    assert_eq!((reply.metadata.id, reply.metadata.message_type), (77, MessageType::Response));
    assert!(reply.metadata.authoritative && reply.metadata.recursion_desired && reply.metadata.recursion_available);
    assert_eq!(reply.queries[0].name.to_ascii(), "Web.Shop.", "the question comes back as it was asked");
    assert!(matches!(&reply.answers[0].data, RData::CNAME(target) if target.0.to_ascii() == "api.example.com."));
    assert_eq!((reply.answers[1].name.to_ascii(), reply.answers[1].ttl), ("api.example.com.".into(), 30));
    // No addresses of this family: an answer, not an error.
    let none = Message::from_vec(&with_addresses(&asked, None, &[], Transport::Udp)).unwrap();
    assert_eq!((none.metadata.response_code, none.answers.len()), (ResponseCode::NoError, 0));
}

#[test]
fn what_does_not_fit_is_truncated_over_udp_only() {
    let plain = read(&query("db.", RecordType::A).to_vec().unwrap()).unwrap();
    let cut = with_addresses(&plain, None, &many(60), Transport::Udp);
    let parsed = Message::from_vec(&cut).unwrap();
    assert!(cut.len() <= 512 && parsed.metadata.truncation && parsed.answers.is_empty());
    assert_eq!(Message::from_vec(&with_addresses(&plain, None, &many(60), Transport::Tcp)).unwrap().answers.len(), 60);

    let mut larger = query("db.", RecordType::A);
    let mut edns = Edns::new();
    edns.set_max_payload(1232).set_dnssec_ok(true);
    larger.set_edns(edns);
    let larger = read(&larger.to_vec().unwrap()).unwrap();
    let whole = Message::from_vec(&with_addresses(&larger, None, &many(60), Transport::Udp)).unwrap();
    assert_eq!(whole.answers.len(), 60);
    assert!(whole.edns.is_some_and(|edns| edns.flags().dnssec_ok));
}

#[test]
fn what_is_no_question_is_refused_or_ignored() {
    let code = |bytes: &[u8]| read(bytes).unwrap_err().map(|r| Message::from_vec(&r).unwrap().metadata.response_code);
    assert_eq!(code(&[]), None);
    assert_eq!(code(&[1, 2, 0, 0]), None);
    assert_eq!(code(&[0xff; 40]), None, "the bit of an answer is set");
    assert_eq!(code(&[0, 1, 0, 0, 0xff, 0xff, 0, 0, 0, 0, 0, 0, 0xc0]), Some(ResponseCode::FormErr));
    let mut answer = query("a.", RecordType::A);
    answer.metadata.message_type = MessageType::Response;
    assert_eq!(code(&answer.to_vec().unwrap()), None);
    let mut update = query("a.", RecordType::A);
    update.metadata.op_code = OpCode::Update;
    assert!(matches!(code(&update.to_vec().unwrap()), Some(ResponseCode::NotImp | ResponseCode::FormErr)));
    let mut two = query("a.", RecordType::A);
    two.add_query(Query::query(Name::from_ascii("b.").unwrap(), RecordType::A));
    assert_eq!(code(&two.to_vec().unwrap()), Some(ResponseCode::FormErr));
    // Every prefix and every flipped byte of a good query: an answer or silence, never a panic.
    let good = query("web.shop.svc.cluster.local.", RecordType::AAAA).to_vec().unwrap();
    for at in 0..good.len() {
        let _ = read(&good[..at]);
        for value in [0, 0x3f, 0x40, 0x80, 0xc0, 0xff] {
            let mut bad = good.clone();
            bad[at] = value;
            if let Ok(asked) = read(&bad) {
                with_addresses(&asked, None, &many(3), Transport::Udp);
            }
        }
    }
}

#[test]
fn only_the_answer_to_the_question_is_taken() {
    let asked = query("a.example.", RecordType::A).to_vec().unwrap();
    let answer_of = |name: &str, id: u16| {
        let mut message = query(name, RecordType::A);
        message.metadata.id = id;
        message.metadata.message_type = MessageType::Response;
        message.to_vec().unwrap()
    };
    assert!(answers(&asked, &answer_of("a.example.", 77)));
    assert!(answers(&asked, &answer_of("A.Example.", 77)), "servers may spell it their way");
    assert!(!answers(&asked, &answer_of("a.example.", 78)));
    assert!(!answers(&asked, &answer_of("b.example.", 77)));
    assert!(!answers(&asked, &asked), "a question is no answer");
    assert!(!answers(&asked, &[]));
}

#[test]
fn resolv_conf_is_read_as_glibc_does() {
    let conf = ResolvConf::parse(
        "# by hand\nsearch old.test\nnameserver 10.96.0.10\nnameserver fe80::1%eth0\nnameserver fd00::10\n\
         search Shop.svc.cluster.local. svc.cluster.local\noptions ndots:5\nnameserver 1.1.1.1\nnameserver 2.2.2.2\n",
    );
    assert_eq!(conf.servers, ["10.96.0.10", "fd00::10", "1.1.1.1"].map(|ip| ip.parse::<IpAddr>().unwrap()));
    assert_eq!(conf.search.iter().map(|d| &**d).collect::<Vec<_>>(), ["shop.svc.cluster.local", "svc.cluster.local"]);
    assert_eq!(ResolvConf::parse("\u{0}garbage nameserver\nnameserver\nnameserver x\n"), ResolvConf::default());
}
