//! The DaemonSet that a process is one of, asked about when the process ends: is it replaced, or is all of it uninstalled?
//!
//! Whoever uninstalls takes the rights to ask and the account away too, at once and mostly before the last process is told to end. So it
//! is watched while the process lives ([`DaemonSet::follow`]): a watch that is open is told of the end all the same. To who asks afterwards, that
//! the account may not (403) is no answer, nor is it that the server does not know the token (401): a token goes with its pod, and who
//! deletes that alone leaves the DaemonSet. But first the one and then the other is: rights do not go with a pod.
//! Upstream: the agent, at its end. Downstream: the API server.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use serde_json::Value;

use super::Access;
use super::client::{Client, Failure, Why};
use crate::SourceError;
use crate::dial::{escaped, spread};

/// How long after an answer that says nothing it is asked again. API servers believe a token for ten seconds without looking.
const AGAIN: Duration = Duration::from_secs(1);
/// The server ends a watch after this long; one that is silent for longer than that and [`GRACE`] is lost.
const WATCH: Duration = Duration::from_secs(290);
const GRACE: Duration = Duration::from_secs(30);
/// Rest, at most, between two watches.
const REST: Duration = Duration::from_secs(5);

/// A DaemonSet. Needs the rights to `get` and `watch` that one.
#[derive(Clone, Debug)]
pub struct DaemonSet {
    client: Client,
    /// Of those of its namespace, and its name there.
    all: String,
    name: String,
    /// What the watch told last.
    is_gone: Arc<AtomicBool>,
}

impl DaemonSet {
    /// The one of this name, which is not asked about yet.
    ///
    /// # Errors
    /// There is no way to the API server.
    pub fn new(access: &Access, namespace: &str, name: &str) -> Result<Self, SourceError> {
        let client = Client::new(access).map_err(SourceError::Access)?;
        let all = format!("/apis/apps/v1/namespaces/{namespace}/daemonsets");
        Ok(Self { client, all, name: name.to_owned(), is_gone: Arc::default() })
    }

    /// Watches it, for as long as this is polled.
    pub async fn follow(&self) {
        loop {
            if let Err(failure) = self.watch().await {
                tracing::debug!(why = failure.message, "the DaemonSet is not watched");
            }
            tokio::time::sleep(spread(REST)).await;
        }
    }

    /// One watch, to its end. Where no version is named, it begins with the object as it is.
    async fn watch(&self) -> Result<(), Failure> {
        let Self { all, name, .. } = self;
        let path = format!(
            "{all}?watch=true&fieldSelector={}&timeoutSeconds={}",
            escaped(&format!("metadata.name={name}")),
            WATCH.as_secs()
        );
        let mut events = self.client.watch(&path, WATCH + GRACE).await?;
        while let Some(event) = events.next().await? {
            let object = &event["object"];
            match event["type"].as_str() {
                Some("ADDED" | "MODIFIED") => self.is_gone.store(is_going(object), Ordering::Release),
                Some("DELETED") => self.is_gone.store(true, Ordering::Release),
                Some("ERROR") => return Err(Failure::of_status(object, 500)),
                _ => {}
            }
        }
        Ok(())
    }

    /// Whether it is gone or being deleted. Asks until that is known, for as long as `within`.
    ///
    /// # Errors
    /// What the server answered last instead, or why it did not.
    pub async fn is_uninstalled(&self, within: Duration) -> Result<bool, String> {
        let mut last = "the API server does not answer".to_owned();
        let path = format!("{}/{}", self.all, self.name);
        let asking = async {
            let mut was_forbidden = false;
            while !self.is_gone.load(Ordering::Acquire) {
                match self.client.get(&path).await {
                    Ok(object) => return is_going(&object),
                    Err(failure) => match failure.why {
                        Why::Missing => return true,
                        Why::Unauthorized if was_forbidden => return true,
                        why => {
                            was_forbidden |= why == Why::Forbidden;
                            last = failure.message;
                        }
                    },
                }
                tokio::time::sleep(AGAIN).await;
            }
            true
        };
        tokio::time::timeout(within, asking).await.map_err(|_| last)
    }
}

fn is_going(object: &Value) -> bool {
    !object["metadata"]["deletionTimestamp"].is_null()
}
