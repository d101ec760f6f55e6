//! A real Consul: one server with its data in a folder, in the network namespace of a host.
//!
//! Owns the process. ACLs are off; what has no intention is allowed.
use std::fs::File;
use std::io::{Read as _, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context as _, bail, ensure};
use serde_json::{Value, json};

use crate::consul::Registry;
use crate::skip::find_peer;
use crate::topology::Place;
use crate::wait;

/// Port of its HTTP API.
const HTTP: u16 = 8500;
const LIMIT: Duration = Duration::from_secs(20);

/// Why it cannot be had, if it cannot.
pub fn missing() -> Option<String> {
    find_peer("consul").err()
}

/// The server.
#[derive(Debug)]
pub struct ConsulServer {
    place: Arc<Place>,
    dir: PathBuf,
    child: Mutex<Option<Child>>,
    /// Source and destination of the intentions there are.
    intentions: Mutex<Vec<(String, String)>>,
}

impl ConsulServer {
    /// Starts it, empty.
    ///
    /// # Errors
    /// It is not installed, or not ready in time.
    pub fn start(place: &Arc<Place>, dir: &Path) -> anyhow::Result<Self> {
        let server =
            Self { place: Arc::clone(place), dir: dir.to_path_buf(), child: Mutex::default(), intentions: Mutex::default() };
        server.resume()?;
        Ok(server)
    }

    /// Starts it on what is stored.
    fn resume(&self) -> anyhow::Result<()> {
        let address = self.place.v4.to_string();
        let log = File::options().create(true).append(true).open(self.dir.join("consul.log"))?;
        let mut command = Command::new(find_peer("consul").map_err(anyhow::Error::msg)?);
        command
            .args(["agent", "-server", "-bootstrap-expect=1", "-node=control", "-client=0.0.0.0", "-dns-port=-1"])
            .args(["-hcl", "connect { enabled = true }", "-hcl", "disable_update_check = true", "-log-level=warn"])
            .args(["-bind", &address, "-data-dir"])
            .arg(self.dir.join("consul-data"))
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log);
        *self.child() = Some(self.place.netns.spawn(&mut command)?);
        // A leader, and what it stores.
        let ready = || self.send("PUT", "/v1/kv/ready", Some("yes")).is_ok().then_some(());
        wait::until("Consul", Duration::from_secs(90), ready).with_context(|| self.log())
    }
    fn child(&self) -> std::sync::MutexGuard<'_, Option<Child>> {
        self.child.lock().unwrap_or_else(PoisonError::into_inner)
    }
    fn stop(&self) {
        if let Some(mut child) = self.child().take() {
            let _gone = child.kill();
            let _reaped = child.wait();
        }
    }
    fn log(&self) -> String {
        let text = std::fs::read_to_string(self.dir.join("consul.log")).unwrap_or_default();
        text.lines().rev().take(15).collect::<Vec<_>>().join("\n")
    }

    fn send(&self, method: &str, path: &str, body: Option<&str>) -> anyhow::Result<String> {
        let mut stream = self.place.netns.connect(self.place.at(HTTP), LIMIT)?;
        stream.set_read_timeout(Some(LIMIT))?;
        let body = body.unwrap_or_default();
        let length = body.len();
        write!(stream, "{method} {path} HTTP/1.0\r\nhost: consul\r\ncontent-length: {length}\r\n\r\n{body}")?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        ensure!(answer.split(' ').nth(1) == Some("200"), "{method} {path}: {answer}");
        Ok(answer)
    }
}

impl Registry for ConsulServer {
    fn register(&self, registration: &Value) -> anyhow::Result<()> {
        let mut registration = registration.clone();
        let service = registration["Service"]["ID"].clone();
        // One check of the service, which it belongs to.
        let checks = registration["Checks"].as_array_mut().context("no checks")?;
        let [check] = &mut checks[..] else { bail!("one check for each instance") };
        (check["Name"], check["CheckID"], check["ServiceID"]) = (json!("it"), json!(format!("it:{service}")), service);
        self.send("PUT", "/v1/catalog/register", Some(&registration.to_string())).map(drop)
    }
    fn put(&self, key: &str, value: Option<&str>) -> anyhow::Result<()> {
        let method = if value.is_some() { "PUT" } else { "DELETE" };
        self.send(method, &format!("/v1/kv/{key}"), value).map(drop)
    }
    fn intend(&self, mut intentions: Vec<Value>, denied: bool) -> anyhow::Result<()> {
        if denied {
            intentions.push(json!({ "SourceName": "*", "DestinationName": "*", "Action": "deny" }));
        }
        let mut known = self.intentions.lock().unwrap_or_else(PoisonError::into_inner);
        let path = |source: &str, to: &str| format!("/v1/connect/intentions/exact?source={source}&destination={to}");
        let old = std::mem::take(&mut *known);
        for intention in &intentions {
            let text = |key: &str| intention[key].as_str().unwrap_or_default().to_owned();
            let (source, to) = (text("SourceName"), text("DestinationName"));
            let body = json!({ "Action": intention["Action"], "SourceType": "consul" });
            self.send("PUT", &path(&source, &to), Some(&body.to_string()))?;
            known.push((source, to));
        }
        for (source, to) in old.iter().filter(|both| !known.contains(both)) {
            self.send("DELETE", &path(source, to), None)?;
        }
        Ok(())
    }
    fn away(&self, away: bool) -> anyhow::Result<()> {
        if away {
            self.stop();
            return Ok(());
        }
        self.resume()
    }
}

impl Drop for ConsulServer {
    fn drop(&mut self) {
        self.stop();
    }
}
