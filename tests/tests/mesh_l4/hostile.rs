//! Peers and objects that mean harm, or are broken: garbage, forged certificates, silence.
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use mesh_tests::dev_ca::{Credentials, TestCa};
use mesh_tests::suite::CannotRun;
use mesh_tests::topology::Place;
use mesh_tests::{netns, wait};

use crate::mesh::{Mesh, PORT, WEB_VIP};

pub(crate) fn garbage_on_the_agents_ports_does_no_harm(mesh: &mut Mesh) -> anyhow::Result<()> {
    let noise: Vec<u8> = (0..4096_u32).map(|at| (at.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
    let web1 = mesh.pod("web1");
    for port in [15001, 15006, 15008] {
        for bytes in
            [noise.as_slice(), b"GET / HTTP/1.1\r\nhost: x\r\n\r\n", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"\x16\x03\x01\xff\xff"]
        {
            for (from, to) in [
                (mesh.outside(), web1.at(port)),
                (mesh.outside(), web1.at6(port)),
                (web1, web1.at(port)),
                (web1, SocketAddr::from(([127, 0, 0, 1], port))),
                (mesh.pod("client"), web1.at(port)),
            ] {
                // Refusing the connection is as good as cutting it after the first bytes; only an answer that makes no
                // sense (or a dead agent, below) would be wrong.
                let Ok(mut stream) = from.netns.connect(to, Duration::from_secs(2)) else { continue };
                stream.set_read_timeout(Some(Duration::from_millis(300)))?;
                let _refused_is_fine = stream.write_all(bytes);
                let mut answer = [0; 64];
                let _cut_is_fine = stream.read(&mut answer);
            }
        }
    }
    for agent in [mesh.a(), mesh.b()] {
        ensure!(agent.ended().is_none(), "agent of {} ended:\n{}", agent.node(), agent.log_tail(20));
        ensure!(!agent.whole_log().contains("panicked"), "agent of {} panicked", agent.node());
    }
    ensure!(mesh.call("client", web1.at(PORT))? == "web1");
    Ok(())
}

/// A TLS handshake with the inbound port as a peer with these credentials; true when it (and a first read) went through.
pub(crate) fn tls_accepted(from: &Place, to: SocketAddr, credentials: &Credentials) -> anyhow::Result<bool> {
    let (mut tls, mut stream) = tls_to(from, to, credentials)?;
    // In TLS 1.3 the client is done before the server has looked at the client's certificate: only reading tells.
    let mut session = rustls::Stream::new(&mut tls, &mut stream);
    if session.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0").is_err() {
        return Ok(false);
    }
    let mut byte = [0; 9];
    Ok(session.read_exact(&mut byte).is_ok())
}

pub(crate) fn tls_to(
    from: &Place,
    to: SocketAddr,
    credentials: &Credentials,
) -> anyhow::Result<(rustls::ClientConnection, TcpStream)> {
    let (cert, key) = credentials.der()?;
    let mut config = rustls::ClientConfig::builder()
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(AnyServer))
        .with_client_auth_cert(vec![cert], key)?;
    config.alpn_protocols = vec![b"h2".to_vec()];
    config.enable_sni = false;
    let name = rustls::pki_types::ServerName::IpAddress(to.ip().into());
    let tls = rustls::ClientConnection::new(Arc::new(config), name)?;
    let stream = from.netns.connect(to, Duration::from_secs(5))?;
    stream.set_read_timeout(Some(Duration::from_secs(5)))?;
    Ok((tls, stream))
}

/// This client examines the agent's judgement, not the agent's certificate.
#[derive(Debug)]
pub(crate) struct AnyServer;
impl rustls::client::danger::ServerCertVerifier for AnyServer {
    fn verify_server_cert(
        &self,
        _: &rustls::pki_types::CertificateDer<'_>,
        _: &[rustls::pki_types::CertificateDer<'_>],
        _: &rustls::pki_types::ServerName<'_>,
        _: &[u8],
        _: rustls::pki_types::UnixTime,
    ) -> Result<rustls::client::danger::ServerCertVerified, rustls::Error> {
        Ok(rustls::client::danger::ServerCertVerified::assertion())
    }
    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &rustls::pki_types::CertificateDer<'_>,
        _: &rustls::DigitallySignedStruct,
    ) -> Result<rustls::client::danger::HandshakeSignatureValid, rustls::Error> {
        Ok(rustls::client::danger::HandshakeSignatureValid::assertion())
    }
    fn verify_tls13_signature(
        &self,
        _: &[u8],
        _: &rustls::pki_types::CertificateDer<'_>,
        _: &rustls::DigitallySignedStruct,
    ) -> Result<rustls::client::danger::HandshakeSignatureValid, rustls::Error> {
        Ok(rustls::client::danger::HandshakeSignatureValid::assertion())
    }
    fn supported_verify_schemes(&self) -> Vec<rustls::SignatureScheme> {
        vec![
            rustls::SignatureScheme::ECDSA_NISTP256_SHA256,
            rustls::SignatureScheme::ECDSA_NISTP384_SHA384,
            rustls::SignatureScheme::ED25519,
        ]
    }
}

pub(crate) fn a_certificate_of_another_trust_domain_is_refused(mesh: &mut Mesh) -> anyhow::Result<()> {
    let ca = TestCa::of_dir(mesh.ca.path())?;
    let to = mesh.pod("web1").at(15008);
    for good in ["spiffe://test.local/ns/t/sa/client", "spiffe://cluster.local/ns/t/sa/client"] {
        ensure!(tls_accepted(mesh.outside(), to, &ca.issue(good)?)?, "the control: {good} is taken");
    }
    let mark = mesh.b().mark();
    // Signed by the right authority, but for somebody else's trust domain.
    ensure!(!tls_accepted(mesh.outside(), to, &ca.issue("spiffe://evil.example/ns/t/sa/client")?)?, "it was taken");
    wait::until_true("the refusal in the log", || mesh.b().log_since(mark).contains("trust_domain"))
}

pub(crate) fn a_certificate_of_an_unknown_authority_is_refused(mesh: &mut Mesh) -> anyhow::Result<()> {
    let mark = mesh.b().mark();
    let forged = TestCa::unknown()?.issue("spiffe://test.local/ns/t/sa/client")?;
    ensure!(!tls_accepted(mesh.outside(), mesh.pod("web1").at(15008), &forged)?, "it was taken");
    wait::until_true("the refusal in the log", || mesh.b().log_since(mark).contains("tls_failure"))
}

pub(crate) fn a_thousand_silent_connections_stop_nobody(mesh: &mut Mesh) -> anyhow::Result<()> {
    silent_connections(mesh, 1000)
}
pub(crate) fn ten_thousand_silent_connections_stop_nobody(mesh: &mut Mesh) -> anyhow::Result<()> {
    silent_connections(mesh, 10_000)
}

/// Half of them say nothing, half stop in the middle of a TLS hello. Meanwhile others must be served, and afterwards
/// descriptors and memory must come back.
pub(crate) fn silent_connections(mesh: &Mesh, count: usize) -> anyhow::Result<()> {
    let web1 = mesh.pod("web1").at(PORT);
    let (soft, hard) = nix::sys::resource::getrlimit(nix::sys::resource::Resource::RLIMIT_NOFILE)?;
    if soft < (count + 500) as u64 {
        nix::sys::resource::setrlimit(nix::sys::resource::Resource::RLIMIT_NOFILE, hard, hard)?;
        if hard < (count + 500) as u64 {
            bail!(CannotRun(format!("{count} connections need more than the {hard} open files allowed here")));
        }
    }
    mesh.call("client", web1)?;
    let (fds, rss) = (mesh.b().open_fds()?, mesh.b().rss_kib()?);
    let to = mesh.pod("web1").at(15008);
    let hello = [0x16, 3, 1, 2, 0, 1, 0, 1, 0xfc, 3, 3];
    let silent: Vec<TcpStream> = mesh.outside().netns.enter(|| -> anyhow::Result<Vec<TcpStream>> {
        let mut open = Vec::with_capacity(count);
        for number in 0..count {
            // The agent may stop accepting at its limit; then it must still serve, which is what is asked below.
            let Ok(mut stream) = TcpStream::connect_timeout(&to, Duration::from_secs(2)) else { break };
            if number % 2 == 0 {
                let _refused_is_fine = stream.write_all(&hello);
            }
            open.push(stream);
        }
        Ok(open)
    })?;
    ensure!(silent.len() >= count / 100 * 95, "only {} silent connections were possible", silent.len());
    let mut took = Vec::new();
    for _ in 0..20 {
        let begun = Instant::now();
        ensure!(mesh.call("client", web1)? == "web1");
        ensure!(mesh.call("client", WEB_VIP.into())?.starts_with("web"));
        took.push(begun.elapsed());
    }
    // A busy machine may be late now and then: most are judged.
    took.sort_unstable();
    ensure!(took[took.len() / 2] < Duration::from_secs(2), "two calls took so long beside the silent ones: {took:?}");
    // A new peer, which has no tunnel yet, must get through too.
    let ca = TestCa::of_dir(mesh.ca.path())?;
    let visitor = mesh.topology().host("visitor");
    ensure!(tls_accepted(visitor, to, &ca.issue("spiffe://test.local/ns/t/sa/client")?)?, "a new tunnel cannot be made");
    let made = silent.len();
    let peak = mesh.b().rss_kib()?;
    // They are not kept for ever: the agent itself ends them (its handshake timeout is 5 s here).
    wait::until("the agent to end silent connections", Duration::from_secs(20), || {
        mesh.b().open_fds().ok().filter(|now| *now <= fds + 8)
    })
    .with_context(|| format!("{fds} before, {:?} now, {made} were made", mesh.b().open_fds()))?;
    drop(silent);
    wait::until("descriptors to come back", Duration::from_secs(20), || mesh.b().open_fds().ok().filter(|now| *now <= fds + 8))
        .with_context(|| format!("{fds} before, {:?} now, {made} were made", mesh.b().open_fds()))?;
    // Allocators keep some of what they once had: what matters is that it is bounded and mostly given back.
    let allowed = rss + (8 * 1024).max(peak.saturating_sub(rss) / 2);
    wait::until("memory to come back", Duration::from_secs(30), || mesh.b().rss_kib().ok().filter(|now| *now <= allowed))
        .with_context(|| format!("{rss} KiB before, {peak} at the peak, {:?} now", mesh.b().rss_kib()))?;
    println!(
        "    {made} silent connections; fds {fds} → {}, RSS {rss} → {peak} → {} KiB",
        mesh.b().open_fds()?,
        mesh.b().rss_kib()?
    );
    Ok(())
}

/// One IPv6 host has as many addresses as it likes: shares counted by address alone would not hold it.
pub(crate) fn half_made_handshakes_from_many_addresses_stop_nobody(mesh: &mut Mesh) -> anyhow::Result<()> {
    let to = mesh.pod("web1").at6(15008);
    let sources: Vec<std::net::Ipv6Addr> =
        (0..40).map(|n| std::net::Ipv6Addr::new(0x2001, 0xdb8, 0x100, 0, 0, 0, 0xbad, n)).collect();
    let addresses: Vec<String> = sources.iter().map(|source| format!("addr add {source}/64 dev eth0 nodad")).collect();
    netns::ip_batch(&mesh.outside().netns, &addresses)?;
    let fds = mesh.b().open_fds()?;
    let hello = [0x16, 3, 1, 2, 0, 1, 0, 1, 0xfc, 3, 3];
    let held: Vec<TcpStream> = mesh.outside().netns.enter(|| -> anyhow::Result<Vec<TcpStream>> {
        let mut open = Vec::new();
        for source in &sources {
            for _ in 0..30 {
                let socket = socket2::Socket::new(socket2::Domain::IPV6, socket2::Type::STREAM, None)?;
                socket.bind(&SocketAddr::from((*source, 0)).into())?;
                if socket.connect_timeout(&to.into(), Duration::from_secs(2)).is_err() {
                    continue;
                }
                let mut stream = TcpStream::from(socket);
                let _refused_is_fine = stream.write_all(&hello);
                open.push(stream);
            }
        }
        Ok(open)
    })?;
    ensure!(held.len() > 600, "only {} half-made handshakes were possible", held.len());
    let good = TestCa::of_dir(mesh.ca.path())?.issue("spiffe://test.local/ns/t/sa/client")?;
    let begun = Instant::now();
    let accepted = tls_accepted(mesh.topology().host("visitor"), mesh.pod("web1").at(15008), &good)?;
    let took = begun.elapsed();
    drop(held);
    wait::until("descriptors to come back", Duration::from_secs(20), || mesh.b().open_fds().ok().filter(|now| *now <= fds + 8))?;
    // Whoever waits for a place gets one when the handshake timeout of five seconds ends another.
    ensure!(accepted && took < Duration::from_secs(4), "a new tunnel beside them: accepted {accepted} after {took:?}");
    Ok(())
}

pub(crate) fn a_peer_that_stops_after_tls_is_ended(mesh: &mut Mesh) -> anyhow::Result<()> {
    let good = TestCa::of_dir(mesh.ca.path())?.issue("spiffe://test.local/ns/t/sa/client")?;
    let (mut tls, mut stream) = tls_to(mesh.outside(), mesh.pod("web1").at(15008), &good)?;
    tls.complete_io(&mut stream)?;
    stream.set_read_timeout(Some(Duration::from_secs(15)))?;
    // No HTTP/2 preface follows. What the agent says first (session tickets, its settings) is read until it gives up.
    let begun = Instant::now();
    let mut buffer = [0; 4096];
    loop {
        match stream.read(&mut buffer) {
            Ok(0) => break,
            Ok(_) => ensure!(begun.elapsed() < Duration::from_secs(15), "it goes on talking"),
            Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => break,
            Err(error) => bail!("after {:?} it was still open: {error}", begun.elapsed()),
        }
    }
    Ok(())
}
