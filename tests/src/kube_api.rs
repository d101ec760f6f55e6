//! A Kubernetes API server as far as list, watch and merge patch go, that can be told to misbehave: refuse or not serve a
//! resource, forget what it said ("410 Gone"), drop its watches, stop answering.
//!
//! Objects are kept as given, but for `metadata.resourceVersion`. Lists come in pages of what the client asks for; watches
//! send what happened since the version they name, and bookmarks. Owns its port and threads, which end with it.
use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use anyhow::Context;
use serde_json::{Value, json};

/// A resource: group, version, name in paths, kind, whether its objects are in namespaces.
type Resource = (&'static str, &'static str, &'static str, &'static str, bool);

/// What is served at the start: what a cluster with Istio and the Gateway API has, each in one version only.
pub const RESOURCES: &[Resource] = &[
    ("", "v1", "namespaces", "Namespace", false),
    ("", "v1", "nodes", "Node", false),
    ("", "v1", "pods", "Pod", true),
    ("", "v1", "services", "Service", true),
    ("", "v1", "secrets", "Secret", true),
    ("", "v1", "configmaps", "ConfigMap", true),
    ("apps", "v1", "daemonsets", "DaemonSet", true),
    ("discovery.k8s.io", "v1", "endpointslices", "EndpointSlice", true),
    ("networking.istio.io", "v1", "serviceentries", "ServiceEntry", true),
    ("networking.istio.io", "v1", "workloadentries", "WorkloadEntry", true),
    ("networking.istio.io", "v1", "virtualservices", "VirtualService", true),
    // An older Istio.
    ("networking.istio.io", "v1beta1", "destinationrules", "DestinationRule", true),
    ("networking.istio.io", "v1alpha3", "envoyfilters", "EnvoyFilter", true),
    ("security.istio.io", "v1", "authorizationpolicies", "AuthorizationPolicy", true),
    ("security.istio.io", "v1", "peerauthentications", "PeerAuthentication", true),
    ("security.istio.io", "v1", "requestauthentications", "RequestAuthentication", true),
    ("telemetry.istio.io", "v1", "telemetries", "Telemetry", true),
    ("gateway.networking.k8s.io", "v1", "gateways", "Gateway", true),
    ("gateway.networking.k8s.io", "v1", "gatewayclasses", "GatewayClass", false),
    ("gateway.networking.k8s.io", "v1", "httproutes", "HTTPRoute", true),
    ("gateway.networking.k8s.io", "v1", "grpcroutes", "GRPCRoute", true),
    ("gateway.networking.k8s.io", "v1beta1", "referencegrants", "ReferenceGrant", true),
    ("culvert.dev", "v1alpha1", "trafficpolicies", "TrafficPolicy", true),
];

/// Namespace and name.
type Key = (String, String);

#[derive(Debug)]
struct Event {
    version: u64,
    plural: &'static str,
    kind: &'static str,
    object: Value,
}

#[derive(Debug, Default)]
struct Store {
    version: u64,
    objects: BTreeMap<&'static str, BTreeMap<Key, Value>>,
    log: Vec<Event>,
    /// Versions up to this are forgotten.
    forgotten: u64,
    /// Statuses instead of answers.
    refused: BTreeMap<&'static str, u16>,
    missing: BTreeSet<&'static str>,
    /// Whose watches are told nothing for now.
    held: BTreeSet<&'static str>,
    /// Counts up when all watches are to end.
    dropped: u64,
    /// Requests for lists, by resource.
    lists: BTreeMap<&'static str, usize>,
    watches: BTreeMap<&'static str, usize>,
    /// `group/namespace/resource` of every list, served or not.
    asked: BTreeSet<String>,
    stopped: bool,
}

#[derive(Debug, Default)]
struct State {
    store: Mutex<Store>,
    changed: Condvar,
    silent: AtomicBool,
}
impl State {
    fn lock(&self) -> MutexGuard<'_, Store> {
        self.store.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The server.
#[derive(Debug)]
pub struct KubeApi {
    state: Arc<State>,
    addr: SocketAddr,
}

impl KubeApi {
    /// Starts it on a free port of this process's own network namespace.
    pub fn start() -> anyhow::Result<Self> {
        Self::serve(TcpListener::bind("127.0.0.1:0")?)
    }

    /// Serves on a listener.
    pub fn serve(listener: TcpListener) -> anyhow::Result<Self> {
        let addr = listener.local_addr()?;
        let state = Arc::new(State { store: Mutex::new(Store { version: 1, ..Store::default() }), ..State::default() });
        let serving = Arc::clone(&state);
        thread::Builder::new().name("kube-api".into()).spawn(move || {
            for stream in listener.incoming() {
                if serving.lock().stopped {
                    return;
                }
                let (Ok(stream), state) = (stream, Arc::clone(&serving)) else { continue };
                let _thread = thread::Builder::new().spawn(move || serve(&state, stream));
            }
        })?;
        Ok(Self { state, addr })
    }

    /// Writes a kubeconfig for it into `dir`.
    pub fn kubeconfig(&self, dir: &Path) -> anyhow::Result<PathBuf> {
        let path = dir.join("kubeconfig");
        let text = format!(
            "apiVersion: v1\nkind: Config\ncurrent-context: fake\nclusters:\n- name: fake\n  cluster: {{ server: \"http://{}\" }}\n\
             contexts:\n- name: fake\n  context: {{ cluster: fake, user: fake }}\nusers:\n- name: fake\n  user: {{ token: fake }}\n",
            self.addr
        );
        std::fs::write(&path, text).with_context(|| format!("write {}", path.display()))?;
        Ok(path)
    }

    /// Creates or replaces an object.
    pub fn apply(&self, object: Value) {
        let mut store = self.state.lock();
        store.put(object);
        self.state.changed.notify_all();
    }

    /// Creates or replaces every object of a stream of YAML documents.
    pub fn apply_yaml(&self, text: &str) -> anyhow::Result<()> {
        for object in documents(text)? {
            self.apply(object);
        }
        Ok(())
    }

    /// Removes an object; `false` when there is none.
    pub fn delete(&self, plural: &'static str, namespace: &str, name: &str) -> bool {
        let mut store = self.state.lock();
        let key = (namespace.to_owned(), name.to_owned());
        let Some(object) = store.objects.get_mut(plural).and_then(|all| all.remove(&key)) else { return false };
        store.tell(plural, "DELETED", object);
        self.state.changed.notify_all();
        true
    }

    /// An object as it is now.
    pub fn get(&self, plural: &str, namespace: &str, name: &str) -> Option<Value> {
        self.state.lock().objects.get(plural)?.get(&(namespace.to_owned(), name.to_owned())).cloned()
    }

    /// Answers this status for a resource from now on, and ends its watches; 0 ends that.
    pub fn refuse(&self, plural: &'static str, status: u16) {
        let mut store = self.state.lock();
        match status {
            0 => store.refused.remove(plural),
            _ => store.refused.insert(plural, status),
        };
        store.dropped += 1;
        self.state.changed.notify_all();
    }

    /// Whether a resource is served, as if its CRD were removed or installed.
    pub fn serve_resource(&self, plural: &'static str, served: bool) {
        let mut store = self.state.lock();
        if served {
            store.missing.remove(plural)
        } else {
            store.missing.insert(plural)
        };
        store.dropped += 1;
        self.state.changed.notify_all();
    }

    /// Watches of a resource are told nothing from now on, or again, as when a server's cache is behind; lists have everything.
    pub fn hold(&self, plural: &'static str, held: bool) {
        let mut store = self.state.lock();
        if held {
            store.held.insert(plural)
        } else {
            store.held.remove(plural)
        };
        self.state.changed.notify_all();
    }

    /// Ends every watch.
    pub fn drop_watches(&self) {
        self.state.lock().dropped += 1;
        self.state.changed.notify_all();
    }

    /// Forgets what happened so far, and ends every watch: their clients meet "410 Gone". `quietly`: what happens while it
    /// runs is not told to anybody either.
    pub fn forget(&self, quietly: impl FnOnce(&mut Quiet<'_>)) {
        let mut store = self.state.lock();
        quietly(&mut Quiet(&mut store));
        store.version += 1;
        store.forgotten = store.version;
        store.log.clear();
        store.dropped += 1;
        self.state.changed.notify_all();
    }

    /// Closes every connection without an answer, or no longer.
    pub fn silence(&self, silent: bool) {
        self.state.silent.store(silent, Ordering::Release);
        self.drop_watches();
    }

    /// `group/namespace/resource` of all that was listed, also where it is not served; the namespace is empty for all.
    pub fn asked(&self) -> BTreeSet<String> {
        self.state.lock().asked.clone()
    }
    /// Lists that were asked for, of a resource.
    pub fn lists(&self, plural: &str) -> usize {
        self.state.lock().lists.get(plural).copied().unwrap_or_default()
    }
    /// Watches that were asked for, of a resource.
    pub fn watches(&self, plural: &str) -> usize {
        self.state.lock().watches.get(plural).copied().unwrap_or_default()
    }
}

impl Drop for KubeApi {
    fn drop(&mut self) {
        self.state.lock().stopped = true;
        self.state.changed.notify_all();
        let _wakes_the_accept_loop = TcpStream::connect_timeout(&self.addr, Duration::from_secs(1));
    }
}

/// Changes that nobody is told.
#[derive(Debug)]
pub struct Quiet<'a>(&'a mut Store);
impl Quiet<'_> {
    /// Creates or replaces an object.
    pub fn apply(&mut self, object: Value) {
        self.0.put(object);
    }
    /// Removes an object.
    pub fn delete(&mut self, plural: &'static str, namespace: &str, name: &str) {
        if let Some(all) = self.0.objects.get_mut(plural) {
            all.remove(&(namespace.to_owned(), name.to_owned()));
        }
    }
}

/// The objects of a stream of YAML documents.
pub fn documents(text: &str) -> anyhow::Result<Vec<Value>> {
    let mut objects = Vec::new();
    for part in format!("\n{text}").split("\n---") {
        if part.lines().all(|line| line.trim().is_empty() || line.trim_start().starts_with('#')) {
            continue;
        }
        let object: Value = serde_saphyr::from_str(part).with_context(|| format!("not YAML:\n{part}"))?;
        objects.push(object);
    }
    Ok(objects)
}

impl Store {
    fn put(&mut self, mut object: Value) {
        let kind = object["kind"].as_str().unwrap_or_default();
        let Some((_, _, plural, _, namespaced)) = RESOURCES.iter().find(|r| r.3 == kind) else { return };
        let name = object["metadata"]["name"].as_str().unwrap_or_default().to_owned();
        let namespace = match object["metadata"]["namespace"].as_str() {
            Some(namespace) if *namespaced => namespace.to_owned(),
            _ if *namespaced => "default".to_owned(),
            _ => String::new(),
        };
        if *namespaced {
            object["metadata"]["namespace"] = json!(namespace);
        }
        let known = self.objects.entry(plural).or_default().contains_key(&(namespace.clone(), name.clone()));
        object["metadata"]["resourceVersion"] = json!((self.version + 1).to_string());
        self.objects.entry(plural).or_default().insert((namespace, name), object.clone());
        self.tell(plural, if known { "MODIFIED" } else { "ADDED" }, object);
    }

    fn tell(&mut self, plural: &'static str, kind: &'static str, mut object: Value) {
        self.version += 1;
        object["metadata"]["resourceVersion"] = json!(self.version.to_string());
        self.log.push(Event { version: self.version, plural, kind, object });
    }
}

/// What a request asks for.
#[derive(Debug)]
struct Asked {
    resource: Resource,
    namespace: Option<String>,
    name: Option<String>,
    query: BTreeMap<String, String>,
}

impl Asked {
    fn parse(target: &str) -> Option<Self> {
        let (path, query) = target.split_once('?').unwrap_or((target, ""));
        let mut parts: Vec<&str> = path.trim_matches('/').split('/').collect();
        let (group, version) = if parts.first() == Some(&"api") {
            parts.remove(0);
            ("", parts.remove(0))
        } else if parts.first() == Some(&"apis") && parts.len() >= 4 {
            parts.remove(0);
            (parts.remove(0), parts.remove(0))
        } else {
            return None;
        };
        let mut namespace = None;
        if parts.first() == Some(&"namespaces") && parts.len() >= 3 {
            namespace = Some(parts[1].to_owned());
            parts.drain(..2);
        }
        let plural = parts.first()?;
        let resource = *RESOURCES.iter().find(|r| r.0 == group && r.1 == version && r.2 == *plural)?;
        let query = query
            .split('&')
            .filter_map(|pair| pair.split_once('='))
            .map(|(key, value)| (key.to_owned(), value.replace("%3D", "=").replace("%2C", ",").replace("%21", "!")))
            .collect();
        Some(Self { resource, namespace, name: parts.get(1).map(|n| (*n).to_owned()), query })
    }

    fn wants(&self, object: &Value) -> bool {
        let field = |path: &str| path.split('.').fold(object, |at, key| &at[key]).as_str().unwrap_or_default().to_owned();
        let selected = |selector: &String| {
            selector.split(',').filter_map(|term| term.split_once('=')).all(|(path, value)| field(path) == value)
        };
        self.namespace.as_ref().is_none_or(|ns| object["metadata"]["namespace"] == **ns)
            && self.query.get("fieldSelector").is_none_or(selected)
    }
}

/// `group/namespace/resource` of a list.
fn asked_for(target: &str) -> Option<String> {
    let (path, query) = target.split_once('?')?;
    if query.contains("watch=true") {
        return None;
    }
    let parts: Vec<&str> = path.trim_matches('/').split('/').collect();
    match parts.as_slice() {
        ["api", _, plural] => Some(format!("//{plural}")),
        ["api", _, "namespaces", namespace, plural] => Some(format!("/{namespace}/{plural}")),
        ["apis", group, _, plural] => Some(format!("{group}//{plural}")),
        ["apis", group, _, "namespaces", namespace, plural] => Some(format!("{group}/{namespace}/{plural}")),
        _ => None,
    }
}

fn serve(state: &State, stream: TcpStream) {
    let _best_effort = stream.set_read_timeout(Some(Duration::from_secs(30)));
    let mut reader = BufReader::new(stream);
    while let Ok(true) = serve_one(state, &mut reader) {}
}

/// One request; `true` when the connection can take another.
fn serve_one(state: &State, reader: &mut BufReader<TcpStream>) -> io::Result<bool> {
    let mut line = String::new();
    if reader.read_line(&mut line)? == 0 || state.silent.load(Ordering::Acquire) {
        return Ok(false);
    }
    let mut words = line.split_whitespace();
    let (method, target) = (words.next().unwrap_or_default().to_owned(), words.next().unwrap_or_default().to_owned());
    let mut length = 0;
    loop {
        let mut header = String::new();
        reader.read_line(&mut header)?;
        if header.trim().is_empty() {
            break;
        }
        if let Some((name, value)) = header.split_once(':')
            && name.eq_ignore_ascii_case("content-length")
        {
            length = value.trim().parse().unwrap_or(0);
        }
    }
    let mut body = vec![0; length];
    reader.read_exact(&mut body)?;
    let out = reader.get_mut();
    if let Some(what) = asked_for(&target) {
        state.lock().asked.insert(what);
    }
    let Some(asked) = Asked::parse(&target) else {
        return failure(out, 404, "the server could not find the requested resource");
    };
    let plural = asked.resource.2;
    {
        let store = state.lock();
        if store.missing.contains(plural) {
            return failure(out, 404, "the server could not find the requested resource");
        }
        if let Some(status) = store.refused.get(plural) {
            let message = format!("{plural} is forbidden: User \"fake\" cannot list resource \"{plural}\"");
            return failure(out, *status, &message);
        }
    }
    match (method.as_str(), &asked.name) {
        ("GET", None) if asked.query.get("watch").is_some_and(|w| w == "true" || w == "1") => watch(state, out, &asked),
        ("GET", None) => list(state, out, &asked),
        ("GET", Some(name)) => one(state, out, &asked, name),
        ("PATCH", Some(name)) => patch(state, out, &asked, name, &body),
        _ => failure(out, 405, "not here"),
    }
}

fn answer(out: &mut TcpStream, status: u16, body: &Value) -> io::Result<bool> {
    let body = body.to_string();
    write!(out, "HTTP/1.1 {status} x\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n{body}", body.len())?;
    Ok(true)
}
fn failure(out: &mut TcpStream, status: u16, message: &str) -> io::Result<bool> {
    answer(out, status, &status_object(status, message))
}
fn status_object(code: u16, message: &str) -> Value {
    let reason = match code {
        401 => "Unauthorized",
        403 => "Forbidden",
        404 => "NotFound",
        410 => "Expired",
        _ => "InternalError",
    };
    json!({ "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure", "message": message, "reason": reason, "code": code })
}

fn list(state: &State, out: &mut TcpStream, asked: &Asked) -> io::Result<bool> {
    let (group, version, plural, kind, _) = asked.resource;
    let mut store = state.lock();
    *store.lists.entry(plural).or_default() += 1;
    let all: Vec<Value> = store
        .objects
        .get(plural)
        .into_iter()
        .flat_map(|all| all.values())
        .filter(|o| asked.wants(o))
        .cloned()
        .map(|mut object| {
            // As a real one: what the list says, its items do not repeat.
            if let Some(map) = object.as_object_mut() {
                map.remove("kind");
                map.remove("apiVersion");
            }
            object
        })
        .collect();
    let from: usize = asked.query.get("continue").and_then(|c| c.parse().ok()).unwrap_or(0);
    let limit: usize = asked.query.get("limit").and_then(|l| l.parse().ok()).filter(|l| *l > 0).unwrap_or(usize::MAX);
    let page: Vec<Value> = all.iter().skip(from).take(limit).cloned().collect();
    let next = from.saturating_add(page.len());
    let mut metadata = json!({ "resourceVersion": store.version.to_string() });
    if next < all.len() {
        metadata["continue"] = json!(next.to_string());
    }
    drop(store);
    let api_version = if group.is_empty() { version.to_owned() } else { format!("{group}/{version}") };
    answer(out, 200, &json!({ "kind": format!("{kind}List"), "apiVersion": api_version, "metadata": metadata, "items": page }))
}

fn one(state: &State, out: &mut TcpStream, asked: &Asked, name: &str) -> io::Result<bool> {
    let key = (asked.namespace.clone().unwrap_or_default(), name.to_owned());
    let object = state.lock().objects.get(asked.resource.2).and_then(|all| all.get(&key)).cloned();
    match object {
        Some(object) => answer(out, 200, &object),
        None => failure(out, 404, &format!("{} \"{name}\" not found", asked.resource.2)),
    }
}

fn patch(state: &State, out: &mut TcpStream, asked: &Asked, name: &str, body: &[u8]) -> io::Result<bool> {
    let key = (asked.namespace.clone().unwrap_or_default(), name.to_owned());
    let mut store = state.lock();
    let object = store.objects.get(asked.resource.2).and_then(|all| all.get(&key)).cloned();
    let (Some(mut object), Ok(change)) = (object, serde_json::from_slice::<Value>(body)) else {
        drop(store);
        return failure(out, 404, &format!("{} \"{name}\" not found", asked.resource.2));
    };
    let wanted = &change["metadata"]["uid"];
    if !wanted.is_null() && *wanted != object["metadata"]["uid"] {
        drop(store);
        return failure(out, 409, "the uid is another");
    }
    merge(&mut object, &change);
    store.put(object.clone());
    state.changed.notify_all();
    drop(store);
    answer(out, 200, &object)
}

/// RFC 7386.
fn merge(target: &mut Value, change: &Value) {
    let Some(change) = change.as_object() else { return *target = change.clone() };
    if !target.is_object() {
        *target = json!({});
    }
    for (key, value) in change {
        if value.is_null() {
            target.as_object_mut().map(|map| map.remove(key));
        } else {
            merge(&mut target[key], value);
        }
    }
}

fn watch(state: &State, out: &mut TcpStream, asked: &Asked) -> io::Result<bool> {
    let (group, version, plural, kind, _) = asked.resource;
    let mut from: u64 = asked.query.get("resourceVersion").and_then(|v| v.parse().ok()).unwrap_or(0);
    write!(out, "HTTP/1.1 200 x\r\ncontent-type: application/json\r\nconnection: close\r\n\r\n")?;
    let mut store = state.lock();
    *store.watches.entry(plural).or_default() += 1;
    if from < store.forgotten {
        drop(store);
        writeln!(out, "{}", json!({ "type": "ERROR", "object": status_object(410, "too old resource version") }))?;
        return Ok(false);
    }
    let born = store.dropped;
    loop {
        while store.held.contains(plural) && store.dropped == born && !store.stopped {
            store = state.changed.wait(store).unwrap_or_else(PoisonError::into_inner);
        }
        let lines: Vec<String> = store
            .log
            .iter()
            .filter(|e| e.version > from && e.plural == plural && asked.wants(&e.object))
            .map(|e| json!({ "type": e.kind, "object": e.object }).to_string())
            .collect();
        let moved = store.version > from;
        from = store.version;
        if store.dropped != born || store.stopped {
            return Ok(false);
        }
        drop(store);
        for line in lines {
            writeln!(out, "{line}")?;
        }
        if moved {
            let api_version = if group.is_empty() { version.to_owned() } else { format!("{group}/{version}") };
            let mark = json!({ "kind": kind, "apiVersion": api_version, "metadata": { "resourceVersion": from.to_string() } });
            writeln!(out, "{}", json!({ "type": "BOOKMARK", "object": mark }))?;
        }
        store = state.lock();
        // Nothing may have come between the copy and the lock.
        if store.version == from && store.dropped == born && !store.stopped {
            store = state.changed.wait(store).unwrap_or_else(PoisonError::into_inner);
        }
    }
}
