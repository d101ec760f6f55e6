//! Where the API server is and who we are to it: a pod's service account, or a kubeconfig file.
//!
//! Owns the reading of both. Refuses what it does not do (credential plugins, password files, servers whose certificate is
//! not to be checked) rather than going on without it. Downstream: [`super::client`].

use std::path::{Path, PathBuf};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;

use crate::dial::{Server, Text};
use crate::yaml::{self, Document, Node};

/// Where Kubernetes mounts a pod's token and the roots of the API server.
const ACCOUNT: &str = "/var/run/secrets/kubernetes.io/serviceaccount";

/// How the API server is reached.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Access {
    /// A kubeconfig file, of which the current context is used; without one, the service account of this pod.
    pub kubeconfig: Option<PathBuf>,
}

impl Access {
    pub(super) fn server(&self) -> Result<Server, String> {
        match &self.kubeconfig {
            Some(path) => {
                let text = std::fs::read_to_string(path).map_err(|e| format!("{}: {e}", path.display()))?;
                let folder = path.parent().unwrap_or(Path::new(""));
                from_kubeconfig(&text, folder).map_err(|e| format!("{}: {e}", path.display()))
            }
            None => in_cluster(|name| std::env::var(name).ok()),
        }
    }
}

/// The server of the cluster this pod runs in.
fn in_cluster(variable: impl Fn(&str) -> Option<String>) -> Result<Server, String> {
    let get = |name: &str| variable(name).ok_or_else(|| format!("{name} is not set: not in a pod, and no --kubeconfig"));
    let account = |name: &str| Text::File(Path::new(ACCOUNT).join(name));
    Ok(Server {
        host: get("KUBERNETES_SERVICE_HOST")?,
        port: get("KUBERNETES_SERVICE_PORT")?.parse().map_err(|_| "KUBERNETES_SERVICE_PORT is no port".to_owned())?,
        prefix: String::new(),
        tls: true,
        name: None,
        roots: Some(account("ca.crt")),
        token: Some(account("token")),
        certificate: None,
    })
}

fn from_kubeconfig(text: &str, folder: &Path) -> Result<Server, String> {
    let document = yaml::documents(text).into_iter().next().unwrap_or(Document { text: "", line: 1 });
    let root = yaml::parse_whole(document).map_err(|e| e.to_string())?;
    let current = string(&root, "current-context").ok_or("no current-context")?;
    let context = named(&root, "contexts", "context", current)?;
    let cluster = named(&root, "clusters", "cluster", string(context, "cluster").unwrap_or_default())?;
    let nobody = Node { line: 0, tag: None, value: yaml::Value::Null };
    let user = match string(context, "user") {
        Some(user) => named(&root, "users", "user", user)?,
        None => &nobody,
    };
    for (from, what) in [(user, "exec"), (user, "auth-provider"), (user, "username"), (cluster, "proxy-url")] {
        if from.get(what).is_some() {
            return Err(format!("`{what}` is not understood here; use a token or a client certificate"));
        }
    }
    if string(cluster, "insecure-skip-tls-verify") == Some("true") {
        return Err("`insecure-skip-tls-verify` is refused: name the roots of the server in `certificate-authority`".into());
    }
    let server = string(cluster, "server").ok_or("the cluster names no server")?;
    let (chain, key) = (inline(user, "client-certificate", folder)?, inline(user, "client-key", folder)?);
    let token = match (string(user, "token"), string(user, "tokenFile")) {
        (Some(token), _) => Some(Text::Here(token.to_owned())),
        (None, Some(file)) => Some(Text::File(folder.join(file))),
        (None, None) => None,
    };
    Ok(Server {
        name: string(cluster, "tls-server-name").map(str::to_owned),
        roots: inline(cluster, "certificate-authority", folder)?,
        token,
        certificate: chain.zip(key),
        ..Server::at(server)?
    })
}

fn string<'n>(node: &'n Node<'_>, key: &str) -> Option<&'n str> {
    node.get(key)?.text().filter(|t| !t.is_empty())
}
/// The element of `list` that is called `name`, as far as it is below `what`.
fn named<'n, 'i>(root: &'n Node<'i>, list: &str, what: &str, name: &str) -> Result<&'n Node<'i>, String> {
    let items = match root.get(list).map(|n| &n.value) {
        Some(yaml::Value::Seq(items)) => items.as_slice(),
        _ => &[],
    };
    let found = items.iter().find(|item| string(item, "name") == Some(name)).and_then(|item| item.get(what));
    found.ok_or_else(|| format!("no `{name}` among {list}"))
}
/// `KEY-data` in base64, else the file that `KEY` names.
fn inline(node: &Node<'_>, key: &str, folder: &Path) -> Result<Option<Text>, String> {
    let data = format!("{key}-data");
    if let Some(encoded) = string(node, &data) {
        let decoded = STANDARD.decode(encoded.trim()).ok().and_then(|bytes| String::from_utf8(bytes).ok());
        return decoded.map(|text| Some(Text::Here(text))).ok_or_else(|| format!("`{data}` is not base64 of a text"));
    }
    Ok(string(node, key).map(|file| Text::File(folder.join(file))))
}

#[cfg(test)]
mod tests;
