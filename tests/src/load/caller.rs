//! One client of a [`super::Load`]: a connection it keeps, in one version of HTTP.
use std::io::{BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, ensure};
use bytes::Bytes;
use h2::client::SendRequest;
use http::Request;
use tokio::runtime::Runtime;
use tokio::time::timeout;

use super::{LIMIT, Tally};
use crate::http::{Answer, read_answer};
use crate::topology::Place;

/// What a caller sends.
#[derive(Clone, Debug)]
pub(super) struct Speech {
    /// Whom it calls.
    pub to: SocketAddr,
    /// Path.
    pub path: String,
    /// With a body of so many bytes: PUT, which may be sent again as GET may (RFC 9110 §9.2.2). 0: GET.
    pub body: usize,
    /// In HTTP/2.
    pub http2: bool,
}
impl Speech {
    fn method(&self) -> &'static str {
        if self.body == 0 { "GET" } else { "PUT" }
    }
}

pub(super) struct Caller {
    place: Arc<Place>,
    speech: Speech,
    body: String,
    open: Open,
    pub tally: Tally,
}

/// The connection that is kept.
enum Open {
    One(Option<BufReader<TcpStream>>),
    Two(Runtime, Option<SendRequest<Bytes>>),
}

impl Caller {
    pub fn new(place: Arc<Place>, speech: Speech) -> anyhow::Result<Self> {
        let open = if speech.http2 {
            Open::Two(tokio::runtime::Builder::new_current_thread().enable_all().build()?, None)
        } else {
            Open::One(None)
        };
        Ok(Self { place, body: "b".repeat(speech.body), speech, open, tally: Tally::default() })
    }

    /// One request.
    pub fn call(&mut self) {
        let begun = Instant::now();
        let answered = match &mut self.open {
            Open::One(kept) => {
                let kept = kept.take();
                self.answered(kept)
            }
            Open::Two(..) => self.answered_in_two(),
        };
        match answered.and_then(|answer| self.name(answer)) {
            Ok(()) => {}
            Err(error) => self.tally.errors.push(format!("{error:#}")),
        }
        self.tally.slowest = self.tally.slowest.max(begun.elapsed());
    }

    /// Counts an answer; what was sent must be in the server's echo.
    fn name(&mut self, answer: Answer) -> anyhow::Result<()> {
        if answer.status == 200 {
            let echo: serde_json::Value = serde_json::from_str(&answer.body).unwrap_or_default();
            ensure!(self.body.is_empty() || echo["body"] == self.body, "another body arrived: {echo}");
            *self.tally.names.entry(echo["name"].as_str().unwrap_or_default().to_owned()).or_default() += 1;
        } else {
            self.tally.bodies.push(answer.body);
        }
        *self.tally.statuses.entry(answer.status).or_default() += 1;
        Ok(())
    }

    fn written(&self) -> String {
        let Speech { to, path, body, .. } = &self.speech;
        let length = if *body == 0 { String::new() } else { format!("content-length: {body}\r\n") };
        format!("{} {path} HTTP/1.1\r\nhost: {}\r\n{length}\r\n{}", self.speech.method(), to.ip(), self.body)
    }

    fn answered(&mut self, kept: Option<BufReader<TcpStream>>) -> anyhow::Result<Answer> {
        let Some(mut kept) = kept else { return self.fresh() };
        let sent = kept.get_mut().write_all(self.written().as_bytes());
        // Nothing at all came back: it was closed while this was on its way.
        if sent.is_err() || !kept.fill_buf().is_ok_and(|bytes| !bytes.is_empty()) {
            self.tally.again += 1;
            return self.fresh();
        }
        self.read(kept)
    }

    fn fresh(&mut self) -> anyhow::Result<Answer> {
        let mut stream = connect(&self.place, self.speech.to, &mut self.tally)?;
        stream.write_all(self.written().as_bytes()).context("send")?;
        self.read(BufReader::new(stream))
    }

    fn read(&mut self, mut reader: BufReader<TcpStream>) -> anyhow::Result<Answer> {
        let answer = read_answer(&mut reader, false)?;
        self.open = Open::One((!answer.closes()).then_some(reader));
        Ok(answer)
    }

    fn answered_in_two(&mut self) -> anyhow::Result<Answer> {
        let Self { place, speech, body, open: Open::Two(runtime, open), tally } = self else {
            anyhow::bail!("this caller speaks HTTP/1");
        };
        runtime.block_on(async {
            // A connection that ended, or says it will, while nothing was under way is replaced.
            if let Some(kept) = open.take()
                && let Ok(mut kept) = kept.ready().await
            {
                match ask(&mut kept, speech, body).await {
                    Ok(answer) => {
                        *open = Some(kept);
                        return Ok(answer);
                    }
                    Err(_ended) => tally.again += 1,
                }
            }
            let stream = connect(place, speech.to, tally)?;
            stream.set_nonblocking(true)?;
            let (kept, connection) = h2::client::handshake(tokio::net::TcpStream::from_std(stream)?).await?;
            tokio::spawn(connection);
            let mut kept = kept.ready().await?;
            let answer = ask(&mut kept, speech, body).await?;
            *open = Some(kept);
            Ok(answer)
        })
    }
}

fn connect(place: &Place, to: SocketAddr, tally: &mut Tally) -> anyhow::Result<TcpStream> {
    let stream = place.netns.connect(to, LIMIT).context("connect")?;
    stream.set_read_timeout(Some(LIMIT))?;
    stream.set_nodelay(true)?;
    tally.connections += 1;
    Ok(stream)
}

/// One request in HTTP/2.
async fn ask(open: &mut SendRequest<Bytes>, speech: &Speech, body: &str) -> anyhow::Result<Answer> {
    let url = format!("http://{}{}", speech.to.ip(), speech.path);
    let request = Request::builder().method(speech.method()).uri(url).body(())?;
    let whole = async {
        let (response, mut send) = open.send_request(request, body.is_empty())?;
        if !body.is_empty() {
            send.send_data(Bytes::copy_from_slice(body.as_bytes()), true)?;
        }
        let (head, mut body) = response.await?.into_parts();
        let mut all = Vec::new();
        while let Some(data) = body.data().await {
            let data = data?;
            body.flow_control().release_capacity(data.len())?;
            all.extend_from_slice(&data);
        }
        anyhow::Ok(Answer { status: head.status.as_u16(), headers: Vec::new(), body: String::from_utf8_lossy(&all).into_owned() })
    };
    timeout(LIMIT, whole).await.context("no answer in time")?
}
