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

/// Of these a server fails to say what is not in its zone; all others do not exist.
const FAILING: [&str; 3] = ["broken.example.", "half.example.", "localhost."];

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
        // The other fails.
        (("half.example.", RecordType::A), vec![(50, a(9))]),
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
        None if FAILING.contains(&name.as_str()) => message.metadata.response_code = ResponseCode::ServFail,
        None => message.metadata.response_code = ResponseCode::NXDomain,
    }
    let bytes = message.to_vec().unwrap();
    if bytes.len() <= most { bytes } else { message.truncate().to_vec().unwrap() }
}

/// A name server on loopback, over both transports.
async fn server(zone: Arc<Mutex<Zone>>) -> SocketAddr {
    let tcp = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let on = tcp.local_addr().unwrap();
    let udp = UdpSocket::bind(on).await.unwrap();
    let of_udp = Arc::clone(&zone);
    tokio::spawn(async move {
        let mut buffer = [0; 512];
        while let Ok((length, from)) = udp.recv_from(&mut buffer).await {
            let told = answer(&buffer[..length], &of_udp.lock(), 512);
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
            let told = answer(&query, &zone.lock(), usize::from(u16::MAX));
            stream.write_u16(told.len() as u16).await.unwrap();
            stream.write_all(&told).await.unwrap();
        }
    });
    on
}

#[tokio::test]
async fn name_servers_say_addresses_and_how_long_they_count() {
    let server = server(Arc::new(Mutex::new(zone()))).await;
    // One that is not there is passed over.
    let gone = UdpSocket::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    let servers = [gone, server];
    let told = |host: &'static str| async move { asked(host, &servers).await };
    let whole = |ips: Vec<IpAddr>, ttl| Ok(Some(Found { ips, lifetime: Duration::from_secs(ttl), untold: None }));
    for (host, ips, ttl) in [("a.example", "192.0.2.1 192.0.2.2 2001:db8::1", 20), ("b.example", "192.0.2.3", 7)] {
        assert_eq!(told(host).await, whole(addresses(ips), ttl), "{host}");
    }
    let many = told("many.example").await.unwrap().unwrap();
    assert_eq!((many.ips.len(), many.lifetime.as_secs()), (100, 9), "what does not fit comes over TCP");
    assert_eq!(told("none.example").await, Ok(None), "no addresses is an answer");
    assert_eq!(told("unknown.example").await, Ok(None), "no name too");
    let error = told("broken.example").await.unwrap_err();
    assert!(error.starts_with("broken.example: "), "{error}");
    let half = told("half.example").await.unwrap().unwrap();
    let (family, why) = half.untold.unwrap();
    assert_eq!((half.ips, half.lifetime.as_secs(), family), (addresses("192.0.2.9"), 50, Family::V6));
    assert!(why.starts_with("half.example: "), "{why}");
}

fn addresses(text: &str) -> Vec<IpAddr> {
    text.split_whitespace().map(|ip| ip.parse().unwrap()).collect()
}

/// Look-ups of one name, one after another.
#[test]
fn what_was_known_of_a_family_outlives_servers_that_fail() {
    let (resolver, host) = (Resolver::default(), Arc::<str>::from("a.example"));
    let found = |ips: &str, untold: Option<Family>| {
        Ok(Found {
            ips: addresses(ips),
            lifetime: Duration::from_mins(1),
            untold: untold.map(|family| (family, "why".to_owned())),
        })
    };
    let fails = || Err("all fail".to_owned());
    // What is found, what is then known, for how many seconds, and whether it is what a failure left.
    let steps = [
        (fails(), Err("all fail"), 0, false),
        (found("", Some(Family::V6)), Err("why"), 0, false),
        (found("192.0.2.1", Some(Family::V6)), Ok("192.0.2.1"), 5, false),
        (found("2001:db8::1", Some(Family::V4)), Ok("192.0.2.1 2001:db8::1"), 5, false),
        (found("192.0.2.2", Some(Family::V6)), Ok("192.0.2.2 2001:db8::1"), 5, false),
        (fails(), Ok("192.0.2.2 2001:db8::1"), 5, true),
        // That there are none of one family is said; of the other nothing is.
        (found("", Some(Family::V6)), Ok("2001:db8::1"), 5, false),
        (found("192.0.2.3", None), Ok("192.0.2.3"), 60, false),
        // No such name.
        (found("", None), Ok(""), 60, false),
        (fails(), Err("all fail"), 0, false),
    ];
    for (n, (found, want, seconds, failing)) in steps.into_iter().enumerate() {
        let begun = Instant::now();
        let got = resolver.learn(&host, found);
        match want {
            Err(why) => assert_eq!(got, Err(why.to_owned()), "step {n}"),
            Ok(ips) => {
                let got = got.unwrap();
                assert_eq!(*got.ips, *addresses(ips), "step {n}");
                let lifetime = (got.until - begun).as_secs_f64();
                assert!((lifetime - f64::from(seconds)).abs() < 1.0, "step {n}: {lifetime}");
                assert_eq!(resolver.known.lock()[&host].failing, failing, "step {n}");
            }
        }
    }
}

/// A real server that answers for both families, then for one, then for neither.
#[tokio::test]
async fn a_family_whose_servers_fail_keeps_its_addresses() {
    let a = |last| RData::A(A([192, 0, 2, last].into()));
    let aaaa = RData::AAAA(AAAA("2001:db8::1".parse().unwrap()));
    let says = Arc::new(Mutex::new(Zone::default()));
    let server = server(Arc::clone(&says)).await;
    // A name of this machine, too, for when it is asked instead of the server.
    let (resolver, host) = (Resolver::default(), Arc::<str>::from("localhost"));
    let look = async || {
        let found = asked(&host, &[server]).await.map(|found| found.unwrap_or_else(|| Found::whole(Vec::new())));
        resolver.learn(&host, found).map(|answer| answer.ips.to_vec())
    };
    says.lock().extend([(("localhost.", RecordType::A), vec![(9, a(1))]), (("localhost.", RecordType::AAAA), vec![(9, aaaa)])]);
    assert_eq!(look().await, Ok(addresses("192.0.2.1 2001:db8::1")));
    *says.lock() = Zone::from([(("localhost.", RecordType::A), vec![(9, a(2))])]);
    assert_eq!(look().await, Ok(addresses("192.0.2.2 2001:db8::1")), "one family fails");
    says.lock().clear();
    assert_eq!(look().await, Ok(addresses("192.0.2.2 2001:db8::1")), "both fail");
    // Nobody waits now, also when the time of what is known is over; meanwhile it is looked up again.
    resolver.known.lock().get_mut(&host).unwrap().answer.until = Instant::now();
    assert_eq!(resolver.lookup(&host).await.unwrap().to_vec(), addresses("192.0.2.2 2001:db8::1"));
    let own = async || {
        while !resolver.lookup(&host).await.unwrap()[0].is_loopback() {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(Duration::from_secs(10), own()).await.expect("the new answer");
}
