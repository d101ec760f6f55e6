//! An HTTP/2 server for pods that answers as gRPC servers do, and says GOAWAY when told to.
//!
//! `/svc/STATUS` answers `grpc-status: STATUS` in trailers, after the request's own bytes; the head says who answered
//! (`x-name`), under which authority (`x-authority`) and on which connection (`x-connection`). What it says to a message can
//! be another thing ([`Grpc::answering`]).
//! Owns: a thread with a runtime. Refuses: HTTP/1.
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Response};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

use crate::topology::Place;

/// The server. Ends when dropped.
#[derive(Debug)]
pub struct Grpc {
    stop: watch::Sender<bool>,
    goaway_after: Arc<AtomicUsize>,
    connections: Arc<AtomicUsize>,
}

impl Grpc {
    /// Listens in a pod.
    pub fn start(place: &Arc<Place>, port: u16) -> anyhow::Result<Self> {
        Self::answering(place, port, |_, body| body)
    }

    /// Listens in a pod. `answer`: of a path and the bytes of a request the bytes of the answer.
    pub fn answering(
        place: &Arc<Place>,
        port: u16,
        answer: impl Fn(&str, Vec<u8>) -> Vec<u8> + Send + Sync + 'static,
    ) -> anyhow::Result<Self> {
        let answer: Arc<Answer> = Arc::new(answer);
        let listener = place.listen(port)?;
        listener.set_nonblocking(true)?;
        let (stop, mut stopped) = watch::channel(false);
        let goaway_after = Arc::new(AtomicUsize::new(usize::MAX));
        let connections = Arc::new(AtomicUsize::new(0));
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let (name, limit, count) = (place.name.clone(), Arc::clone(&goaway_after), Arc::clone(&connections));
        thread::spawn(move || {
            runtime.block_on(async {
                let Ok(listener) = TcpListener::from_std(listener) else { return };
                loop {
                    let accepted = tokio::select! {
                        accepted = listener.accept() => accepted,
                        _ = stopped.changed() => return,
                    };
                    let Ok((stream, _)) = accepted else { continue };
                    let number = count.fetch_add(1, Ordering::Relaxed);
                    let (name, limit, answer) = (name.clone(), Arc::clone(&limit), Arc::clone(&answer));
                    tokio::spawn(async move {
                        let _client_went = serve(stream, name, number, limit, answer).await;
                    });
                }
            });
        });
        Ok(Self { stop, goaway_after, connections })
    }

    /// Connections say GOAWAY after so many requests.
    pub fn goaway_after(&self, requests: usize) {
        self.goaway_after.store(requests, Ordering::Relaxed);
    }

    /// Connections so far.
    pub fn connections(&self) -> usize {
        self.connections.load(Ordering::Relaxed)
    }
}

impl Drop for Grpc {
    fn drop(&mut self) {
        let _gone_already = self.stop.send(true);
    }
}

type Answer = dyn Fn(&str, Vec<u8>) -> Vec<u8> + Send + Sync;

async fn serve(
    stream: TcpStream,
    name: String,
    number: usize,
    limit: Arc<AtomicUsize>,
    answer: Arc<Answer>,
) -> Result<(), h2::Error> {
    let mut connection = h2::server::handshake(stream).await?;
    let mut requests = 0;
    while let Some(accepted) = connection.accept().await {
        let (request, mut respond) = accepted?;
        requests += 1;
        let (name, says) = (name.clone(), Arc::clone(&answer));
        tokio::spawn(async move {
            let authority = request.uri().authority().map(ToString::to_string).unwrap_or_default();
            let status = request.uri().path().rsplit('/').next().and_then(|s| s.parse::<u16>().ok()).unwrap_or(0);
            let path = request.uri().path().to_owned();
            let mut body = request.into_body();
            let mut all = Vec::new();
            while let Some(Ok(data)) = body.data().await {
                let _window = body.flow_control().release_capacity(data.len());
                all.extend_from_slice(&data);
            }
            let mut answer = Response::new(());
            let headers = answer.headers_mut();
            headers.insert("content-type", HeaderValue::from_static("application/grpc"));
            for (key, value) in [("x-name", name), ("x-authority", authority), ("x-connection", number.to_string())] {
                if let Ok(value) = HeaderValue::try_from(value) {
                    headers.insert(key, value);
                }
            }
            let Ok(mut send) = respond.send_response(answer, false) else { return };
            let _client_went = send.send_data(Bytes::from(says(&path, all)), false);
            let mut trailers = HeaderMap::new();
            trailers.insert("grpc-status", HeaderValue::from(status));
            let _client_went = send.send_trailers(trailers);
        });
        if requests >= limit.load(Ordering::Relaxed) {
            connection.graceful_shutdown();
        }
    }
    Ok(())
}
