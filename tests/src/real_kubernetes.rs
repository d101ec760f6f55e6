//! Kubernetes' own API server with its etcd, in the network namespace of a node, and `kubectl`'s part of it done with `curl`.
//!
//! Owns both processes and their data. Whoever has a token here is a user of RBAC by the name of a service account.
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use serde_json::{Value, json};

use crate::skip::find_peer;
use crate::topology::Place;
use crate::wait;

/// Who may do everything.
pub const ADMIN: &str = "admin";

/// Why it cannot be had, if it cannot.
pub fn missing() -> Option<String> {
    ["etcd", "kube-apiserver"].into_iter().find_map(|program| find_peer(program).err())
}

/// An API server.
#[derive(Debug)]
pub struct KubeServer {
    place: Arc<Place>,
    dir: PathBuf,
    etcd: Child,
    api: Option<Child>,
    /// What makes objects of objects, and gives pods a node.
    controllers: Vec<Child>,
    real_accounts: bool,
}

impl KubeServer {
    /// Starts it in `place`, empty. `accounts`: namespace and name of the service accounts that have a token, which is their name;
    /// with none they are given out as in a cluster, and pods need one.
    ///
    /// # Errors
    /// It is not installed, or not ready in time.
    pub fn start(place: &Arc<Place>, dir: &Path, accounts: &[(&str, &str)]) -> anyhow::Result<Self> {
        let dir = dir.to_path_buf();
        let key = rcgen::KeyPair::generate()?;
        fs::write(dir.join("accounts.key"), key.serialize_pem())?;
        fs::write(dir.join("accounts.pub"), key.public_key_pem())?;
        let mut tokens = format!("{ADMIN},{ADMIN},{ADMIN},\"system:masters\"\n");
        for (namespace, name) in accounts {
            tokens.push_str(&["", name, ",system:serviceaccount:", namespace, ":", name, ",", name, "\n"].concat());
        }
        fs::write(dir.join("tokens.csv"), tokens)?;
        let mut etcd = Command::new(find_peer("etcd").map_err(anyhow::Error::msg)?);
        etcd.arg("--data-dir").arg(dir.join("etcd")).args(["--unsafe-no-fsync", "--log-level=error"]);
        let etcd = run(place, &dir, "etcd", &mut etcd)?;
        let mut server =
            Self { place: Arc::clone(place), dir, etcd, api: None, controllers: Vec::new(), real_accounts: accounts.is_empty() };
        server.resume()?;
        Ok(server)
    }

    /// Starts the controllers and the scheduler: a cluster that waits for nodes, which take [`Self::kubeconfig`] of [`ADMIN`].
    ///
    /// # Errors
    /// They are not installed.
    pub fn control(&mut self) -> anyhow::Result<()> {
        let kubeconfig = self.kubeconfig(ADMIN)?;
        for (name, flags) in [
            (
                "kube-controller-manager",
                &["--service-account-private-key-file=accounts.key", "--root-ca-file=certs/apiserver.crt"][..],
            ),
            ("kube-scheduler", &[]),
        ] {
            let mut command = Command::new(find_peer(name).map_err(anyhow::Error::msg)?);
            command.current_dir(&self.dir).args(flags).args(["--leader-elect=false", "--bind-address=127.0.0.1"]);
            command.arg("--kubeconfig").arg(&kubeconfig);
            self.controllers.push(run(&self.place, &self.dir, name, &mut command)?);
        }
        Ok(())
    }

    fn url(&self) -> String {
        format!("https://{}:6443", self.place.v4)
    }

    /// Starts the API server again on what is stored.
    ///
    /// # Errors
    /// As for [`Self::start`].
    pub fn resume(&mut self) -> anyhow::Result<()> {
        let mut api = Command::new(find_peer("kube-apiserver").map_err(anyhow::Error::msg)?);
        let key = self.dir.join("accounts.key");
        api.arg("--etcd-servers=http://127.0.0.1:2379")
            .arg(format!("--bind-address={}", self.place.v4))
            .arg(format!("--advertise-address={}", self.place.v4))
            .args(["--authorization-mode=RBAC", "--service-account-issuer=https://kubernetes.default.svc"])
            // Names of nodes are known to nobody.
            .args(["--service-cluster-ip-range=10.96.0.0/16", "--kubelet-preferred-address-types=InternalIP"])
            .arg("--cert-dir")
            .arg(self.dir.join("certs"))
            .arg("--token-auth-file")
            .arg(self.dir.join("tokens.csv"))
            .arg("--service-account-key-file")
            .arg(self.dir.join("accounts.pub"))
            .arg("--service-account-signing-key-file")
            .arg(&key);
        if !self.real_accounts {
            api.arg("--disable-admission-plugins=ServiceAccount");
        }
        self.api = Some(run(&self.place, &self.dir, "kube-apiserver", &mut api)?);
        let ready = || self.curl("GET", "/readyz", None).is_ok_and(|out| out.0 == 200).then_some(());
        wait::until("the API server", Duration::from_secs(90), ready).with_context(|| self.log())
    }

    /// Ends the API server; what it stored stays.
    pub fn stop(&mut self) {
        end(self.api.take());
    }

    fn log(&self) -> String {
        let text = fs::read_to_string(self.dir.join("kube-apiserver.log")).unwrap_or_default();
        text.lines().rev().take(15).collect::<Vec<_>>().join("\n")
    }

    /// A kubeconfig for a service account that has a token.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn kubeconfig(&self, account: &str) -> anyhow::Result<PathBuf> {
        let path = self.dir.join(format!("{account}.kubeconfig"));
        let text = format!(
            "apiVersion: v1\nkind: Config\ncurrent-context: it\nclusters:\n- name: it\n  cluster: {{ server: \"{}\", certificate-authority: certs/apiserver.crt }}\n\
             contexts:\n- name: it\n  context: {{ cluster: it, user: it }}\nusers:\n- name: it\n  user: {{ token: {account} }}\n",
            self.url()
        );
        fs::write(&path, text)?;
        Ok(path)
    }

    /// One request of the administrator: status and answer.
    fn curl(&self, method: &str, path: &str, body: Option<(&str, &Value)>) -> anyhow::Result<(u16, String)> {
        let mut command = Command::new("curl");
        command.args(["-sS", "--noproxy", "*", "--max-time", "20", "-X", method, "-w", "\n%{http_code}", "--cacert"]);
        command
            .arg(self.dir.join("certs/apiserver.crt"))
            .args(["-H", "authorization: Bearer admin"])
            .arg(format!("{}{path}", self.url()));
        if let Some((kind, body)) = body {
            let file = self.dir.join("body.json");
            fs::write(&file, body.to_string())?;
            command.args(["-H", &format!("content-type: {kind}"), "--data-binary", &format!("@{}", file.display())]);
        }
        let out = self.place.netns.output(&mut command)?;
        ensure!(out.status.success(), "curl {path}: {}", String::from_utf8_lossy(&out.stderr));
        let text = String::from_utf8(out.stdout)?;
        let (body, status) = text.rsplit_once('\n').context("no status")?;
        Ok((status.parse()?, body.to_owned()))
    }

    /// `kubectl apply --server-side`, unknown fields refused; with `dry_run` nothing is stored. The object as it is then.
    ///
    /// # Errors
    /// What the server says against it.
    pub fn apply(&self, object: &Value, dry_run: bool) -> anyhow::Result<Value> {
        let only = if dry_run { "&dryRun=All" } else { "" };
        let path = format!("{}?fieldManager=test&force=true&fieldValidation=Strict{only}", self.path(object)?);
        let (status, body) = self.curl("PATCH", &path, Some(("application/apply-patch+yaml", object)))?;
        ensure!(status < 300, "{} {}: {status} {body}", object["kind"], object["metadata"]["name"]);
        Ok(serde_json::from_str(&body)?)
    }

    /// Merges something into the status of an object, as a kubelet does.
    ///
    /// # Errors
    /// What the server says against it.
    pub fn status(&self, object: &Value, status: &Value) -> anyhow::Result<()> {
        let path = format!("{}/status", self.path(object)?);
        let (code, body) = self.curl("PATCH", &path, Some(("application/merge-patch+json", &json!({ "status": status }))))?;
        ensure!(code < 300, "{path}: {code} {body}");
        Ok(())
    }

    /// An object as it is now.
    ///
    /// # Errors
    /// It is not there.
    pub fn get(&self, object: &Value) -> anyhow::Result<Value> {
        let (status, body) = self.curl("GET", &self.path(object)?, None)?;
        ensure!(status == 200, "{status} {body}");
        Ok(serde_json::from_str(&body)?)
    }

    /// Removes an object, as `kubectl delete` does; what is of it goes after it.
    ///
    /// # Errors
    /// It is not there.
    pub fn delete(&self, object: &Value) -> anyhow::Result<()> {
        let (status, body) = self.curl("DELETE", &self.path(object)?, None)?;
        ensure!(status < 300, "{status} {body}");
        Ok(())
    }

    /// What the pods are that match a query (`labelSelector=app%3Dztunnel`) in a namespace.
    ///
    /// # Errors
    /// The server says something against it.
    pub fn pods(&self, namespace: &str, query: &str) -> anyhow::Result<Vec<Value>> {
        let (status, body) = self.curl("GET", &format!("/api/v1/namespaces/{namespace}/pods?{query}"), None)?;
        ensure!(status == 200, "{status} {body}");
        let mut list: Value = serde_json::from_str(&body)?;
        Ok(list["items"].as_array_mut().map(std::mem::take).unwrap_or_default())
    }

    /// What a pod's container wrote.
    ///
    /// # Errors
    /// Nothing can be had of it.
    pub fn output(&self, namespace: &str, pod: &str) -> anyhow::Result<String> {
        let (status, body) = self.curl("GET", &format!("/api/v1/namespaces/{namespace}/pods/{pod}/log"), None)?;
        ensure!(status == 200, "{status} {body}");
        Ok(body)
    }

    /// Where an object is, by what the server says of its kind.
    fn path(&self, object: &Value) -> anyhow::Result<String> {
        let (version, kind) = (object["apiVersion"].as_str().unwrap_or_default(), object["kind"].as_str().unwrap_or_default());
        let root = if version.contains('/') { format!("/apis/{version}") } else { format!("/api/{version}") };
        let found = || {
            let (_, body) = self.curl("GET", &root, None).ok()?;
            let all: Value = serde_json::from_str(&body).ok()?;
            let is_it = |r: &&Value| r["kind"] == kind && r["name"].as_str().is_some_and(|name| !name.contains('/'));
            let resource = all["resources"].as_array()?.iter().find(is_it)?;
            Some((resource["name"].as_str()?.to_owned(), resource["namespaced"] == true))
        };
        // A CRD is served some moments after it was stored.
        let (plural, namespaced) = wait::until(&format!("{version} {kind} is served"), Duration::from_secs(20), found)?;
        let metadata = &object["metadata"];
        let name = metadata["name"].as_str().context("no name")?;
        Ok(match metadata["namespace"].as_str() {
            Some(namespace) if namespaced => format!("{root}/namespaces/{namespace}/{plural}/{name}"),
            _ => format!("{root}/{plural}/{name}"),
        })
    }
}

impl Drop for KubeServer {
    fn drop(&mut self) {
        for child in self.controllers.drain(..) {
            end(Some(child));
        }
        self.stop();
        let _gone = self.etcd.kill();
        let _gone = self.etcd.wait();
    }
}

fn end(child: Option<Child>) {
    if let Some(mut child) = child {
        let _gone = child.kill();
        let _gone = child.wait();
    }
}

fn run(place: &Arc<Place>, dir: &Path, name: &str, command: &mut Command) -> anyhow::Result<Child> {
    let log = fs::File::options().create(true).append(true).open(dir.join(format!("{name}.log")))?;
    command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
    place.netns.spawn(command).with_context(|| format!("start {name}"))
}
