//! One list and watch, for as long as the process lives.
//!
//! Owns the choice of the version a kind is served in, the place in its history, and the pauses between attempts. Lists page
//! by page, resumes a watch that ended where it was, lists anew when the server has forgotten that place (410). Upstream:
//! [`super::client`]. Downstream: [`super::cluster`].

use std::time::{Duration, Instant};

use serde_json::Value;
use tokio::sync::mpsc;

use super::Retry;
use super::client::{Client, Failure, Why};
use super::kinds::Watch;
use crate::dial::{escaped, spread};

/// Objects of one page.
const PAGE: usize = 500;
/// The server ends a watch after this long, more or less; then it is resumed.
const WATCH: Duration = Duration::from_secs(290);
/// A watch that is silent for so much longer is lost.
const GRACE: Duration = Duration::from_secs(30);
/// A watch that ended sooner than this did not end by itself.
const SHORT: Duration = Duration::from_secs(1);

/// What a watch tells.
#[derive(Debug)]
pub struct Told {
    /// Number of the watch.
    pub watch: usize,
    /// What.
    pub what: What,
}
/// Content of [`Told`].
#[derive(Debug)]
pub enum What {
    /// A list begins; what is not in it is gone once it is [`What::Complete`].
    Restarted,
    /// An object of the list, in this `apiVersion`.
    Listed(Box<Value>, &'static str),
    /// The list is whole.
    Complete,
    /// Changes are being told.
    Followed,
    /// An object is new or changed.
    Changed(Box<Value>, &'static str),
    /// An object is gone.
    Gone(Box<Value>),
    /// It did not work; it is tried again.
    Failed(Failure),
}

/// Nobody listens any more.
struct Deaf;
/// Why a version is left.
enum Left {
    /// It is not served, in these words.
    NotServed(String),
    Deaf,
}
impl From<Deaf> for Left {
    fn from(_: Deaf) -> Self {
        Self::Deaf
    }
}

/// Follows one watch until nobody listens.
pub async fn follow(client: Client, watch: Watch, number: usize, told: mpsc::Sender<Told>, retry: Retry) {
    let mut follower = Follower { client, watch, number, told, retry, pause: retry.least };
    loop {
        let mut message = String::new();
        for version in follower.watch.versions {
            match follower.follow_version(version).await {
                Left::NotServed(words) => message = words,
                Left::Deaf => return,
            }
        }
        if follower.tell(What::Failed(Failure { why: Why::Missing, message })).await.is_err() {
            return;
        }
        tokio::time::sleep(spread(retry.missing)).await;
    }
}

struct Follower {
    client: Client,
    watch: Watch,
    number: usize,
    told: mpsc::Sender<Told>,
    retry: Retry,
    /// The next one.
    pause: Duration,
}

impl Follower {
    async fn tell(&self, what: What) -> Result<(), Deaf> {
        self.told.send(Told { watch: self.number, what }).await.map_err(|_| Deaf)
    }

    /// Tells a failure and waits, longer each time.
    async fn fail(&mut self, failure: Failure) -> Result<(), Deaf> {
        self.tell(What::Failed(failure)).await?;
        let pause = self.pause;
        self.pause = (pause * 2).min(self.retry.most);
        tokio::time::sleep(spread(pause)).await;
        Ok(())
    }

    /// Follows it in one version, until the server says that it has no such thing.
    async fn follow_version(&mut self, version: &'static str) -> Left {
        loop {
            let outcome = match self.list(version).await {
                Ok(Ok(place)) => self.watch_from(version, place).await,
                Ok(Err(failure)) => Ok(Err(failure)),
                Err(deaf) => Err(deaf),
            };
            let again = match outcome {
                Ok(Ok(())) => Ok(()),
                Ok(Err(failure)) if failure.why == Why::Missing => return Left::NotServed(failure.message),
                Ok(Err(failure)) => self.fail(failure).await,
                Err(deaf) => Err(deaf),
            };
            if again.is_err() {
                return Left::Deaf;
            }
        }
    }

    /// Lists everything, and says from where on to watch.
    async fn list(&mut self, version: &'static str) -> Result<Result<String, Failure>, Deaf> {
        self.tell(What::Restarted).await?;
        let mut more = String::new();
        loop {
            let path = self.watch.path(version, &format!("limit={PAGE}{more}"));
            let mut page = match self.client.get(&path).await {
                Ok(page) => page,
                Err(failure) => return Ok(Err(failure)),
            };
            if let Value::Array(items) = page["items"].take() {
                for item in items {
                    self.tell(What::Listed(Box::new(item), version)).await?;
                }
            }
            match page["metadata"]["continue"].as_str() {
                Some(next) if !next.is_empty() => more = format!("&continue={}", escaped(next)),
                _ => {
                    self.tell(What::Complete).await?;
                    return Ok(Ok(page["metadata"]["resourceVersion"].as_str().unwrap_or_default().to_owned()));
                }
            }
        }
    }

    /// Watches from a place on, until that place is forgotten or the kind no longer served.
    async fn watch_from(&mut self, version: &'static str, mut place: String) -> Result<Result<(), Failure>, Deaf> {
        loop {
            let seconds = spread(WATCH).as_secs();
            let query = format!("watch=true&allowWatchBookmarks=true&timeoutSeconds={seconds}&resourceVersion={place}");
            let path = self.watch.path(version, &query);
            let started = Instant::now();
            let outcome = match self.client.watch(&path, WATCH + GRACE).await {
                Ok(mut events) => {
                    self.tell(What::Followed).await?;
                    loop {
                        match events.next().await {
                            Ok(Some(event)) => match self.event(event, version, &mut place).await? {
                                Ok(()) => {}
                                Err(failure) => break Err(failure),
                            },
                            Ok(None) => break Ok(()),
                            Err(failure) => break Err(failure),
                        }
                    }
                }
                Err(failure) => Err(failure),
            };
            match outcome {
                Ok(()) if started.elapsed() > SHORT => self.pause = self.retry.least,
                // Ended by something between us.
                Ok(()) => tokio::time::sleep(spread(self.retry.least)).await,
                Err(failure) if matches!(failure.why, Why::Missing | Why::Expired) => return Ok(Err(failure)),
                Err(failure) => self.fail(failure).await?,
            }
        }
    }

    async fn event(&mut self, mut event: Value, version: &'static str, place: &mut String) -> Result<Result<(), Failure>, Deaf> {
        let object = event["object"].take();
        let kind = event["type"].as_str().unwrap_or_default();
        if kind == "ERROR" {
            return Ok(Err(Failure::of_status(&object, 500)));
        }
        if let Some(now) = object["metadata"]["resourceVersion"].as_str() {
            now.clone_into(place);
        }
        self.pause = self.retry.least;
        match kind {
            "ADDED" | "MODIFIED" => self.tell(What::Changed(Box::new(object), version)).await?,
            "DELETED" => self.tell(What::Gone(Box::new(object))).await?,
            _ => {}
        }
        Ok(Ok(()))
    }
}
