//! A gateway's own listeners: HTTP, HTTPS, TLS and TCP from outside the mesh.
//!
//! Upstream: `app`. Downstream: `http`, `tcp`.
use crate::conn::{Conn, Shared};
use crate::detect::{self, Detector, Spoken};
use crate::facts::{Facts, Scope};
use crate::http::{self, Version};
use crate::listen::accept_all;
use crate::listen::certificates::Certificates;
use crate::tcp;
use ::http::HeaderValue;
use mesh_hbone::relay::endpoint::Bytewise;
use mesh_identity::forwarded::forwarded;
use mesh_model::hosts::best;
use mesh_model::l7::gateway::ListenerTls;
use mesh_model::l7::gateway::{Listener, ListenerProtocol};
use mesh_model::{Reason, Refusal};
use mesh_runtime::drain::{self, Drain, DrainMode, DrainWatch};
use mesh_runtime::sockets::ListenerOptions;
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::TcpStream;
use tokio_rustls::TlsAcceptor;

/// What is listened on, kept in step with the Gateway object.
#[derive(Default)]
pub struct Listeners {
    /// By port; the drain ends a listener that went.
    open: BTreeMap<u16, (Drain, Arc<PortProtocol>)>,
    certificates: Arc<Certificates>,
}
/// Whether bytes or requests come in on a port.
#[derive(Debug, PartialEq, Eq)]
enum PortProtocol {
    Http,
    /// HTTPS and TLS listeners may share a port: the name in the hello chooses.
    Tls,
    Tcp,
}

impl Listeners {
    /// Opens what is new, closes what went, loads certificates. `drain`: of the process. On the control thread.
    pub fn reconcile(&mut self, shared: &Arc<Shared>, drain: &DrainWatch) {
        let snap = shared.mesh.load_full();
        let listeners = snap.find_gateway(&shared.gateway).map_or(&[][..], |g| &g.listeners[..]);
        self.certificates.load(listeners);
        let mut wanted: BTreeMap<u16, PortProtocol> = BTreeMap::new();
        for l in listeners.iter().filter(|l| l.broken.is_none()) {
            let protocol = match l.protocol {
                ListenerProtocol::Http => PortProtocol::Http,
                ListenerProtocol::Https | ListenerProtocol::Tls => PortProtocol::Tls,
                ListenerProtocol::Tcp => PortProtocol::Tcp,
            };
            // Two kinds on one port are refused when translated; the first stands should it happen all the same.
            wanted.entry(l.port).or_insert(protocol);
        }
        self.open.retain(|port, (ending, protocol)| {
            let stays = wanted.get(port) == Some(&**protocol);
            if !stays {
                tracing::info!(port, "gateway listener closed");
                ending.start(DrainMode::Graceful { deadline: shared.settings.termination_deadline });
            }
            stays
        });
        for (port, protocol) in wanted {
            if self.open.contains_key(&port) {
                continue;
            }
            let addr = SocketAddr::new(shared.settings.listen_ip, port);
            match self.open_port(shared, addr, protocol, drain) {
                Ok(opened) => {
                    tracing::info!(%addr, "gateway listener opened");
                    self.open.insert(port, opened);
                }
                // Tried again with the next change or tick.
                Err(error) => tracing::error!(%addr, %error, "gateway listener cannot be opened"),
            }
        }
    }

    fn open_port(
        &self,
        shared: &Arc<Shared>,
        addr: SocketAddr,
        protocol: PortProtocol,
        process: &DrainWatch,
    ) -> std::io::Result<(Drain, Arc<PortProtocol>)> {
        let bound = ListenerOptions::new(addr).bind()?;
        let (ending, watch) = drain::channel();
        let protocol = Arc::new(protocol);
        let serve = {
            let (protocol, certificates, process) = (Arc::clone(&protocol), Arc::clone(&self.certificates), process.clone());
            move |shared: Arc<Shared>, tcp: TcpStream, peer: SocketAddr, drain: DrainWatch| {
                let (protocol, certificates, process) = (Arc::clone(&protocol), Arc::clone(&certificates), process.clone());
                async move {
                    // The process waits for this connection too when it ends.
                    let held = process.guard();
                    serve(shared, tcp, peer, drain, &protocol, &certificates).await;
                    drop(held);
                }
            }
        };
        accept_all(shared, &bound, &watch, serve)?;
        Ok((ending, protocol))
    }

    /// Ends every listener with the process.
    pub fn drain(&self, deadline: Duration) {
        for (ending, _) in self.open.values() {
            ending.start(DrainMode::Graceful { deadline });
        }
    }
}

/// Serves one connection from outside the mesh.
async fn serve(
    shared: Arc<Shared>,
    tcp: TcpStream,
    client: SocketAddr,
    drain: DrainWatch,
    protocol: &PortProtocol,
    certificates: &Certificates,
) {
    let Ok(local) = tcp.local_addr() else { return };
    let limit = shared.settings.headers_timeout;
    let conn = |listener: Option<Arc<str>>, secure: bool, sni: Option<Arc<str>>| {
        let facts = Facts {
            scope: Scope::Gateway { port: local.port(), listener, secure },
            client,
            local,
            identity: None,
            source: None,
            trace: None,
            sni,
            plain: None,
        };
        Conn::new(Arc::clone(&shared), facts, drain.clone())
    };
    match protocol {
        PortProtocol::Http => match peek(&tcp, limit).await {
            Spoken::Unclear => {}
            Spoken::Http2 => http::serve(Arc::new(conn(None, false, None)), tcp, Version::Http2).await,
            _ => http::serve(Arc::new(conn(None, false, None)), tcp, Version::Http1).await,
        },
        PortProtocol::Tcp => Box::pin(tcp::serve_outside(&conn(None, false, None), tcp)).await,
        PortProtocol::Tls => {
            let Spoken::Tls(sni) = peek(&tcp, limit).await else { return };
            let refuse = |why: &'static str| {
                let detail = format!("{why} (port {}, name {})", local.port(), sni.as_deref().unwrap_or("none"));
                shared.telemetry.tunnel_refused(client, None, &Refusal::new(Reason::NotBound, detail));
            };
            let found = {
                let snap = shared.mesh.load();
                let tls = |l: &Listener| matches!(l.protocol, ListenerProtocol::Https | ListenerProtocol::Tls);
                best(&shared.gateway, &snap, local.port(), sni.as_deref().unwrap_or_default(), tls)
                    .map(|l| (Arc::clone(&l.name), l.protocol, matches!(l.tls, Some(ListenerTls::Passthrough))))
            };
            let Some((name, protocol, passthrough)) = found else { return refuse("no listener for this name") };
            let conn = conn(Some(Arc::clone(&name)), true, sni.clone());
            if passthrough {
                return Box::pin(tcp::serve_outside(&conn, tcp)).await;
            }
            let Some(config) = certificates.find(&name) else { return refuse("the listener has no usable certificate") };
            let handshake = tokio::time::timeout(shared.settings.handshake_timeout, TlsAcceptor::from(config).accept(tcp));
            let tls = match handshake.await {
                Ok(Ok(tls)) => tls,
                Ok(Err(error)) => return tracing::debug!(%client, listener = %name, %error, "TLS handshake failed"),
                Err(_) => return tracing::debug!(%client, listener = %name, "TLS handshake took too long"),
            };
            let Ok(conn) = presented(conn, tls.get_ref().1) else { return refuse("the client's certificate cannot be told of") };
            if protocol == ListenerProtocol::Tls {
                return Box::pin(tcp::serve_outside(&conn, Bytewise::new(tls))).await;
            }
            let version = if tls.get_ref().1.alpn_protocol() == Some(b"h2") { Version::Http2 } else { Version::Http1 };
            http::serve(Arc::new(conn), tls, version).await;
        }
    }
}

/// The connection with what is to be told of the certificate its client proved, if it was asked for one. (Always, as Istio's
/// gateways do; identities of the mesh are another matter.)
fn presented(conn: Conn, tls: &rustls::ServerConnection) -> Result<Conn, ()> {
    let Some(certificate) = tls.peer_certificates().and_then(<[_]>::first) else { return Ok(conn) };
    let told = forwarded(certificate).ok().and_then(|text| HeaderValue::try_from(text).ok());
    told.map(|told| conn.presenting(told)).ok_or(())
}

/// What a client's first bytes say, left in the socket.
async fn peek(tcp: &TcpStream, limit: Duration) -> Spoken {
    let looking = async {
        let (mut seen, mut detector) = (vec![0; 1024], Detector::default());
        let mut before = 0;
        loop {
            let n = match tcp.peek(&mut seen).await {
                Ok(0) | Err(_) => return Spoken::Unclear,
                Ok(n) => n,
            };
            match detector.judge(seen.get(..n).unwrap_or_default()) {
                Spoken::Unclear if n < detect::LIMIT => {}
                Spoken::Unclear => return Spoken::Other,
                spoken => return spoken,
            }
            if n == seen.len() {
                seen.resize((n * 2).min(detect::LIMIT), 0);
            } else if n == before {
                // The socket stays readable while the same bytes lie in it: look again a little later.
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
            before = n;
        }
    };
    if limit.is_zero() { looking.await } else { tokio::time::timeout(limit, looking).await.unwrap_or(Spoken::Unclear) }
}
