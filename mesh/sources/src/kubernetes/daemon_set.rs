//! The DaemonSet that a process is one of, asked about when the process ends: is it replaced, or is all of it uninstalled?
//!
//! Whoever uninstalls takes the rights to ask away too, mostly before the last process is told to end. That the account may not ask (403)
//! is no answer, nor is it that the server does not know the token (401): a token goes with its pod, and who deletes that alone leaves
//! the DaemonSet. But first the one and then the other is: rights do not go with a pod.
//! Upstream: the agent, at its end. Downstream: the API server.

use std::time::Duration;

use super::Access;
use super::client::{Client, Why};
use crate::SourceError;

/// How long after an answer that says nothing it is asked again. API servers believe a token for ten seconds without looking.
const AGAIN: Duration = Duration::from_secs(1);

/// A DaemonSet. Needs the right to `get` that one.
#[derive(Clone, Debug)]
pub struct DaemonSet {
    client: Client,
    path: String,
}

impl DaemonSet {
    /// The one of this name, which is not asked about yet.
    ///
    /// # Errors
    /// There is no way to the API server.
    pub fn new(access: &Access, namespace: &str, name: &str) -> Result<Self, SourceError> {
        let client = Client::new(access).map_err(SourceError::Access)?;
        Ok(Self { client, path: format!("/apis/apps/v1/namespaces/{namespace}/daemonsets/{name}") })
    }

    /// Whether it is gone or being deleted. Asks until that is known, for as long as `within`.
    ///
    /// # Errors
    /// What the server answered last instead, or why it did not.
    pub async fn is_uninstalled(&self, within: Duration) -> Result<bool, String> {
        let mut last = "the API server does not answer".to_owned();
        let asking = async {
            let mut was_forbidden = false;
            loop {
                match self.client.get(&self.path).await {
                    Ok(object) => return !object["metadata"]["deletionTimestamp"].is_null(),
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
        };
        tokio::time::timeout(within, asking).await.map_err(|_| last)
    }
}
