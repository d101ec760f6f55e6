//! PROXY protocol v2 towards application tunnels (sandwiched waypoints), with the source identity in TLV 0xD0.
//!
//! Facts: haproxy's `proxy-protocol.txt` §2.2; the TLV is Istio's (node-agent §1.5).
use mesh_model::SpiffeId;
use std::io;
use std::net::{IpAddr, SocketAddr};
use tokio::io::{AsyncWrite, AsyncWriteExt};

const SIGNATURE: [u8; 12] = *b"\r\n\r\n\0\r\nQUIT\n";
const VERSION_2_PROXY: u8 = 0x21;
const TCP4: u8 = 0x11;
const TCP6: u8 = 0x21;
/// Istio's TLV for the source's SPIFFE id.
const TLV_SOURCE_ID: u8 = 0xd0;

/// Writes the header: `src` as client, `dst` as the address it asked for.
pub async fn write_header(
    out: &mut (impl AsyncWrite + Unpin),
    src: SocketAddr,
    dst: SocketAddr,
    id: &SpiffeId,
) -> io::Result<()> {
    out.write_all(&header(src, dst, id)).await
}

fn header(src: SocketAddr, dst: SocketAddr, id: &SpiffeId) -> Vec<u8> {
    let mut body = Vec::with_capacity(64 + id.as_str().len());
    let family = match (src.ip().to_canonical(), dst.ip().to_canonical()) {
        (IpAddr::V4(s), IpAddr::V4(d)) => {
            body.extend(s.octets());
            body.extend(d.octets());
            TCP4
        }
        // Mixed families are written as IPv6, the IPv4 side mapped.
        (s, d) => {
            body.extend(as_v6(s));
            body.extend(as_v6(d));
            TCP6
        }
    };
    body.extend(src.port().to_be_bytes());
    body.extend(dst.port().to_be_bytes());
    let id = id.as_str().as_bytes();
    body.push(TLV_SOURCE_ID);
    // An id is at most 2048 bytes long.
    body.extend((id.len() as u16).to_be_bytes());
    body.extend(id);
    let mut out = Vec::with_capacity(16 + body.len());
    out.extend(SIGNATURE);
    out.push(VERSION_2_PROXY);
    out.push(family);
    out.extend((body.len() as u16).to_be_bytes());
    out.extend(body);
    out
}

fn as_v6(ip: IpAddr) -> [u8; 16] {
    match ip {
        IpAddr::V4(ip) => ip.to_ipv6_mapped().octets(),
        IpAddr::V6(ip) => ip.octets(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_header_is_as_the_specification_says() {
        let id: SpiffeId = "spiffe://cluster.local/ns/a/sa/b".parse().unwrap();
        let out = header("10.0.0.1:1234".parse().unwrap(), "10.0.0.2:80".parse().unwrap(), &id);
        assert_eq!(&out[..12], b"\r\n\r\n\0\r\nQUIT\n");
        assert_eq!(&out[12..16], &[0x21, 0x11, 0, 12 + 3 + 32]);
        assert_eq!(&out[16..28], &[10, 0, 0, 1, 10, 0, 0, 2, 0x04, 0xd2, 0, 80]);
        assert_eq!(&out[28..31], &[0xd0, 0, 32]);
        assert_eq!(&out[31..], id.as_str().as_bytes());
    }

    #[test]
    fn mixed_families_are_mapped() {
        let id: SpiffeId = "spiffe://cluster.local/ns/a/sa/b".parse().unwrap();
        let out = header("[2001:db8::1]:1".parse().unwrap(), "10.0.0.2:80".parse().unwrap(), &id);
        assert_eq!(out[13], 0x21);
        assert_eq!(&out[32..48], &"::ffff:10.0.0.2".parse::<std::net::Ipv6Addr>().unwrap().octets());
    }
}
