//! PROXY protocol headers towards endpoints that ask for them (haproxy's `proxy-protocol.txt` §2.1 and §2.2).
use mesh_model::l7::destination::ProxyVersion;
use std::fmt::Write as _;
use std::net::{IpAddr, SocketAddr};

const SIGNATURE: [u8; 12] = *b"\r\n\r\n\0\r\nQUIT\n";

/// The header for a connection of `client` to `to`; without a client it says that there is none.
pub(super) fn header(version: ProxyVersion, client: Option<SocketAddr>, to: SocketAddr) -> Vec<u8> {
    let pair = client.map(|client| match (client.ip().to_canonical(), to.ip().to_canonical()) {
        (IpAddr::V4(c), IpAddr::V4(t)) => (IpAddr::V4(c), IpAddr::V4(t)),
        // Mixed families are written as IPv6, the IPv4 side mapped.
        (c, t) => (IpAddr::V6(as_v6(c)), IpAddr::V6(as_v6(t))),
    });
    let ports = (client.map_or(0, |c| c.port()), to.port());
    match version {
        ProxyVersion::V1 => text(pair, ports),
        ProxyVersion::V2 => binary(pair, ports),
    }
}

fn text(pair: Option<(IpAddr, IpAddr)>, (from, to): (u16, u16)) -> Vec<u8> {
    let Some((client, server)) = pair else { return b"PROXY UNKNOWN\r\n".to_vec() };
    let family = if client.is_ipv4() { "TCP4" } else { "TCP6" };
    let mut out = String::with_capacity(107);
    // Writing to a String does not fail.
    let _ = write!(out, "PROXY {family} {client} {server} {from} {to}\r\n");
    out.into_bytes()
}

fn binary(pair: Option<(IpAddr, IpAddr)>, (from, to): (u16, u16)) -> Vec<u8> {
    let mut out = SIGNATURE.to_vec();
    match pair {
        // LOCAL, unspecified, no addresses.
        None => out.extend([0x20, 0x00, 0, 0]),
        Some((IpAddr::V4(client), IpAddr::V4(server))) => {
            out.extend([0x21, 0x11, 0, 12]);
            out.extend(client.octets());
            out.extend(server.octets());
            out.extend(from.to_be_bytes());
            out.extend(to.to_be_bytes());
        }
        Some((client, server)) => {
            out.extend([0x21, 0x21, 0, 36]);
            out.extend(as_v6(client).octets());
            out.extend(as_v6(server).octets());
            out.extend(from.to_be_bytes());
            out.extend(to.to_be_bytes());
        }
    }
    out
}

fn as_v6(ip: IpAddr) -> std::net::Ipv6Addr {
    match ip {
        IpAddr::V4(ip) => ip.to_ipv6_mapped(),
        IpAddr::V6(ip) => ip,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(text: &str) -> SocketAddr {
        text.parse().unwrap()
    }

    #[test]
    fn text_and_binary_are_as_the_specification_says() {
        let (v4, v6) = (at("10.0.0.1:1234"), at("[2001:db8::1]:1"));
        let to = at("10.0.0.2:80");
        assert_eq!(header(ProxyVersion::V1, Some(v4), to), b"PROXY TCP4 10.0.0.1 10.0.0.2 1234 80\r\n");
        assert_eq!(header(ProxyVersion::V1, Some(v6), to), b"PROXY TCP6 2001:db8::1 ::ffff:10.0.0.2 1 80\r\n");
        assert_eq!(header(ProxyVersion::V1, None, to), b"PROXY UNKNOWN\r\n");
        let out = header(ProxyVersion::V2, Some(v4), to);
        assert_eq!(&out[..12], b"\r\n\r\n\0\r\nQUIT\n");
        assert_eq!(&out[12..], &[0x21, 0x11, 0, 12, 10, 0, 0, 1, 10, 0, 0, 2, 0x04, 0xd2, 0, 80]);
        let out = header(ProxyVersion::V2, Some(v6), to);
        assert_eq!((out[13], out.len()), (0x21, 16 + 36));
        assert_eq!(&header(ProxyVersion::V2, None, to)[12..], &[0x20, 0, 0, 0]);
    }
}
