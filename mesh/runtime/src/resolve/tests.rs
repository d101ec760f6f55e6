use super::*;
use hickory_proto::op::{Message, ResponseCode};
use hickory_proto::rr::rdata::{A, AAAA, CNAME};
use hickory_proto::rr::{Name, RData, Record, RecordType};
use std::collections::HashMap;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, UdpSocket};

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

#[test]
fn files_of_the_node() {
    let hosts = "127.0.0.1 localhost\n# 192.0.2.9 a.example\n192.0.2.1\ta.example. A2 # b.example\n2001:db8::1 x A.EXAMPLE\nnonsense a.example\n";
    for (host, want) in [("a.example", "192.0.2.1 2001:db8::1"), ("a2", "192.0.2.1"), ("b.example", ""), ("example", "")] {
        let want: Vec<IpAddr> = want.split_whitespace().map(|ip| ip.parse().unwrap()).collect();
        assert_eq!(in_hosts(hosts, host), want, "{host}");
    }
    let conf = "search a b\nnameserver 192.0.2.1\nnameserver fe80::1%eth0\nnameserver 2001:db8::1 \noptions ndots:5\nnameserver 192.0.2.2\nnameserver 192.0.2.3\n";
    let servers: Vec<String> = name_servers(conf).iter().map(ToString::to_string).collect();
    assert_eq!(servers, ["192.0.2.1:53", "[2001:db8::1]:53", "192.0.2.2:53"]);
}

#[tokio::test]
async fn an_address_resolves_to_itself_and_nonsense_does_not() {
    let resolver = Resolver::default();
    assert_eq!(&*resolver.lookup(&"127.0.0.1".into()).await.unwrap(), &[IpAddr::from([127, 0, 0, 1])]);
    assert!(resolver.lookup(&"no such name".into()).await.is_err());
}

/// What a server says: of a name and type its records and their lifetimes.
type Zone = HashMap<(&'static str, RecordType), Vec<(u32, RData)>>;

fn zone() -> Zone {
    let a = |last| RData::A(A([192, 0, 2, last].into()));
    let aaaa = |last| RData::AAAA(AAAA(std::net::Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, last)));
    let alias = RData::CNAME(CNAME(Name::from_ascii("c.example.").unwrap()));
    Zone::from([
        (("a.example.", RecordType::A), vec![(30, a(1)), (20, a(2))]),
        (("a.example.", RecordType::AAAA), vec![(60, aaaa(1))]),
        // One family only; through another name that is forgotten sooner.
        (("b.example.", RecordType::A), vec![(7, alias), (300, a(3))]),
        (("b.example.", RecordType::AAAA), vec![]),
        (("none.example.", RecordType::A), vec![]),
        (("none.example.", RecordType::AAAA), vec![]),
        // More than a datagram holds.
        (("many.example.", RecordType::A), (1..=100).map(|last| (9, a(last))).collect()),
        (("many.example.", RecordType::AAAA), vec![]),
    ])
}

fn answer(query: &[u8], zone: &Zone, most: usize) -> Vec<u8> {
    let query = Message::from_vec(query).unwrap();
    let asked = query.queries[0].clone();
    let name = asked.name.to_ascii();
    let mut message = Message::response(query.metadata.id, query.metadata.op_code);
    message.add_query(asked.clone());
    match zone.get(&(name.as_str(), asked.query_type)) {
        Some(records) => {
            for (ttl, data) in records {
                message.add_answer(Record::from_rdata(asked.name.clone(), *ttl, data.clone()));
            }
        }
        None if name.starts_with("broken") => message.metadata.response_code = ResponseCode::ServFail,
        None => message.metadata.response_code = ResponseCode::NXDomain,
    }
    let bytes = message.to_vec().unwrap();
    if bytes.len() <= most { bytes } else { message.truncate().to_vec().unwrap() }
}

/// A name server on loopback, over both transports.
async fn server() -> SocketAddr {
    let tcp = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let on = tcp.local_addr().unwrap();
    let udp = UdpSocket::bind(on).await.unwrap();
    tokio::spawn(async move {
        let mut buffer = [0; 512];
        while let Ok((length, from)) = udp.recv_from(&mut buffer).await {
            let told = answer(&buffer[..length], &zone(), 512);
            // What somebody else might send in its place comes first.
            let mut forged = told.clone();
            forged[0] ^= 1;
            udp.send_to(&forged, from).await.unwrap();
            udp.send_to(&told, from).await.unwrap();
        }
    });
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = tcp.accept().await {
            let mut query = vec![0; usize::from(stream.read_u16().await.unwrap())];
            stream.read_exact(&mut query).await.unwrap();
            let told = answer(&query, &zone(), usize::from(u16::MAX));
            stream.write_u16(told.len() as u16).await.unwrap();
            stream.write_all(&told).await.unwrap();
        }
    });
    on
}

#[tokio::test]
async fn name_servers_say_addresses_and_how_long_they_count() {
    let server = server().await;
    // One that is not there is passed over.
    let gone = UdpSocket::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    let servers = [gone, server];
    let told = |host: &'static str| async move { ask::addresses(host, &servers).await };
    for (host, ips, ttl) in [("a.example", "192.0.2.1 192.0.2.2 2001:db8::1", 20), ("b.example", "192.0.2.3", 7)] {
        let ips: Vec<IpAddr> = ips.split_whitespace().map(|ip| ip.parse().unwrap()).collect();
        assert_eq!(told(host).await, Ok(Some((ips, ttl))), "{host}");
    }
    let (many, ttl) = told("many.example").await.unwrap().unwrap();
    assert_eq!((many.len(), ttl), (100, 9), "what does not fit comes over TCP");
    assert_eq!(told("none.example").await, Ok(None), "no addresses is an answer");
    assert_eq!(told("unknown.example").await, Ok(None), "no name too");
    let error = told("broken.example").await.unwrap_err();
    assert!(error.starts_with("broken.example: "), "{error}");
}
