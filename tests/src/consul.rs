//! A Consul agent as far as the catalog, the key-value store, intentions and blocking queries go, that can be told to misbehave:
//! refuse, fail, answer nonsense, leave out what a token may not read, forget its index, be away.
//!
//! Written from the HTTP API's documentation. Owns its port and threads, which end with it.
use std::collections::BTreeMap;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Value, json};

#[derive(Debug, Default)]
struct Store {
    index: u64,
    /// By service, node and id: what `/v1/catalog/register` was given.
    instances: BTreeMap<String, BTreeMap<(String, String), Value>>,
    /// As of which index each service is.
    services: BTreeMap<String, u64>,
    names: u64,
    keys: BTreeMap<String, String>,
    keys_index: u64,
    intentions: Vec<Value>,
    intentions_index: u64,
    denied: bool,
    /// By how a path begins: what is answered instead.
    instead: BTreeMap<String, (u16, String)>,
    /// Whether tokens are asked for, and something was left out.
    acl: bool,
    filtered: bool,
    /// Requests by path, without their query.
    asked: BTreeMap<String, usize>,
    token: Option<String>,
    away: bool,
}

#[derive(Debug, Default)]
struct State {
    store: Mutex<Store>,
    changed: Condvar,
}
impl State {
    fn lock(&self) -> MutexGuard<'_, Store> {
        self.store.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What suites do with a Consul, this one or a real one.
pub trait Registry {
    /// Registers an instance with one check, as `/v1/catalog/register` takes it.
    fn register(&self, registration: &Value) -> anyhow::Result<()>;
    /// Writes a key; `None` removes it.
    fn put(&self, key: &str, value: Option<&str>) -> anyhow::Result<()>;
    /// All intentions, and whether what they do not name is denied.
    fn intend(&self, intentions: Vec<Value>, denied: bool) -> anyhow::Result<()>;
    /// Whether it is gone; what it knows stays.
    fn away(&self, away: bool) -> anyhow::Result<()>;
}
impl Registry for Consul {
    fn register(&self, registration: &Value) -> anyhow::Result<()> {
        Self::register(self, registration);
        Ok(())
    }
    fn put(&self, key: &str, value: Option<&str>) -> anyhow::Result<()> {
        Self::put(self, key, value);
        Ok(())
    }
    fn intend(&self, intentions: Vec<Value>, denied: bool) -> anyhow::Result<()> {
        Self::intend(self, intentions, denied);
        Ok(())
    }
    fn away(&self, away: bool) -> anyhow::Result<()> {
        Self::away(self, away);
        Ok(())
    }
}

/// The agent.
#[derive(Debug)]
pub struct Consul {
    state: Arc<State>,
    addr: SocketAddr,
}

impl Consul {
    /// Starts it on a free port of this process's own network namespace.
    ///
    /// # Errors
    /// No port.
    pub fn start() -> anyhow::Result<Self> {
        Self::serve(TcpListener::bind("127.0.0.1:0")?)
    }
    /// Serves on a listener.
    ///
    /// # Errors
    /// No thread.
    pub fn serve(listener: TcpListener) -> anyhow::Result<Self> {
        let addr = listener.local_addr()?;
        let store = Store { index: 10, names: 10, keys_index: 10, intentions_index: 10, ..Store::default() };
        let state = Arc::new(State { store: Mutex::new(store), ..State::default() });
        let serving = Arc::clone(&state);
        thread::Builder::new().name("consul".into()).spawn(move || {
            for stream in listener.incoming() {
                let (Ok(stream), state) = (stream, Arc::clone(&serving)) else { continue };
                let _thread = thread::Builder::new().spawn(move || {
                    let mut reader = BufReader::new(stream);
                    while let Ok(true) = serve_one(&state, &mut reader) {}
                });
            }
        })?;
        Ok(Self { state, addr })
    }
    /// Its URL.
    pub fn url(&self) -> String {
        format!("http://{}", self.addr)
    }
    fn edit(&self, change: impl FnOnce(&mut Store, u64)) {
        let mut store = self.state.lock();
        store.index += 1;
        let index = store.index;
        change(&mut store, index);
        drop(store);
        self.state.changed.notify_all();
    }

    /// Registers an instance, as `/v1/catalog/register` takes it.
    pub fn register(&self, registration: &Value) {
        self.edit(|store, index| store.register(registration, index));
    }
    /// Forgets an instance.
    pub fn deregister(&self, service: &str, node: &str, id: &str) {
        self.edit(|store, index| {
            let left = store.instances.get_mut(service).map(|all| {
                all.remove(&(node.to_owned(), id.to_owned()));
                all.len()
            });
            if left == Some(0) {
                store.instances.remove(service);
                store.names = index;
            }
            store.services.insert(service.to_owned(), index);
        });
    }
    /// Writes a key; `None` removes it.
    pub fn put(&self, key: &str, value: Option<&str>) {
        self.edit(|store, index| {
            match value {
                Some(value) => drop(store.keys.insert(key.to_owned(), value.to_owned())),
                None => drop(store.keys.remove(key)),
            }
            store.keys_index = index;
        });
    }
    /// All intentions, and whether what they do not name is denied.
    pub fn intend(&self, intentions: Vec<Value>, denied: bool) {
        self.edit(|store, index| (store.intentions, store.denied, store.intentions_index) = (intentions, denied, index));
    }
    /// Answers like this where a path begins so; `None`: as it should again.
    pub fn answer(&self, path: &str, instead: Option<(u16, &str)>) {
        self.edit(|store, _| match instead {
            Some((status, body)) => drop(store.instead.insert(path.to_owned(), (status, body.to_owned()))),
            None => drop(store.instead.remove(path)),
        });
    }
    /// Whether it has ACLs, and leaves something out of what it answers to a token.
    pub fn acl(&self, on: bool, filtered: bool) {
        self.edit(|store, _| (store.acl, store.filtered) = (on, filtered));
    }
    /// Starts to count from the beginning, as after a restore.
    pub fn forget_index(&self) {
        self.edit(|store, _| {
            store.index = 3;
            (store.names, store.keys_index, store.intentions_index) = (3, 3, 3);
            store.services.values_mut().for_each(|index| *index = 3);
        });
    }
    /// Whether it closes every connection without an answer.
    pub fn away(&self, away: bool) {
        self.edit(|store, _| store.away = away);
    }
    /// How often a path was asked for.
    pub fn asked(&self, path: &str) -> usize {
        self.state.lock().asked.get(path).copied().unwrap_or(0)
    }
    /// The token of the last request.
    pub fn token(&self) -> Option<String> {
        self.state.lock().token.clone()
    }
}

impl Store {
    fn register(&mut self, registration: &Value, index: u64) {
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let service = &registration["Service"];
        let name = text(&service["Service"]);
        let id = if service["ID"].is_null() { name.clone() } else { text(&service["ID"]) };
        let all = self.instances.entry(name.clone()).or_insert_with(|| {
            self.names = index;
            BTreeMap::new()
        });
        all.insert((text(&registration["Node"]), id), registration.clone());
        self.services.insert(name, index);
    }

    /// Status, index, body.
    fn look(&self, path: &str, query: &BTreeMap<&str, &str>) -> (u16, Option<u64>, String) {
        if let Some((_, (status, body))) = self.instead.iter().find(|(begin, _)| path.starts_with(begin.as_str())) {
            return (*status, (*status < 300).then_some(self.index), body.clone());
        }
        if path == "/v1/acl/token/self" {
            return if self.acl {
                (200, None, json!({ "AccessorID": "anonymous" }).to_string())
            } else {
                (401, None, "ACL support disabled".into())
            };
        }
        let ok = |index: u64, body: Value| (200, Some(index), body.to_string());
        if path == "/v1/catalog/services" {
            let names: BTreeMap<&String, Value> = self.instances.keys().map(|name| (name, json!([]))).collect();
            return ok(self.names, json!(names));
        }
        if let Some(name) = path.strip_prefix("/v1/health/service/") {
            let all: Vec<Value> = self.instances.get(name).into_iter().flatten().map(|((_, id), r)| healthy(r, id)).collect();
            return ok(self.services.get(name).copied().unwrap_or(self.names), json!(all));
        }
        if let Some(prefix) = path.strip_prefix("/v1/kv/") {
            let key = |(key, value): (&String, &String)| json!({ "Key": key, "Value": STANDARD.encode(value), "Flags": 0 });
            let all: Vec<Value> = self.keys.iter().filter(|(name, _)| name.starts_with(prefix)).map(key).collect();
            return if all.is_empty() { (404, Some(self.keys_index), String::new()) } else { ok(self.keys_index, json!(all)) };
        }
        match path {
            "/v1/connect/intentions" => ok(self.intentions_index, json!(self.intentions)),
            "/v1/connect/intentions/check" => (200, None, json!({ "Allowed": !self.denied }).to_string()),
            "/v1/config/service-defaults" => ok(10, json!([])),
            _ => (404, None, format!("no {path} {query:?}")),
        }
    }
}

/// An element of `/v1/health/service/NAME`.
fn healthy(registration: &Value, id: &str) -> Value {
    let mut service = registration["Service"].clone();
    service["ID"] = json!(id);
    let node = json!({
        "Node": registration["Node"], "Address": registration["Address"], "Datacenter": "dc1", "Meta": registration["NodeMeta"],
    });
    json!({ "Node": node, "Service": service, "Checks": registration["Checks"].as_array().cloned().unwrap_or_default() })
}

fn serve_one(state: &State, reader: &mut BufReader<TcpStream>) -> io::Result<bool> {
    let mut line = String::new();
    if reader.read_line(&mut line)? == 0 || state.lock().away {
        return Ok(false);
    }
    let mut words = line.split_whitespace();
    let (method, target) = (words.next().unwrap_or_default().to_owned(), words.next().unwrap_or_default().to_owned());
    let (mut length, mut token) = (0, None);
    loop {
        let mut header = String::new();
        reader.read_line(&mut header)?;
        let Some((name, value)) = header.split_once(':') else { break };
        match name.to_ascii_lowercase().as_str() {
            "content-length" => length = value.trim().parse().unwrap_or(0),
            "authorization" => token = Some(value.trim().to_owned()),
            _ => {}
        }
    }
    let mut body = vec![0; length];
    reader.read_exact(&mut body)?;
    let (path, query) = target.split_once('?').unwrap_or((&target, ""));
    let query: BTreeMap<&str, &str> = query.split('&').filter_map(|pair| pair.split_once('=')).collect();
    if method != "GET" {
        return answer(reader.get_mut(), 405, None, false, "not here");
    }
    let index: u64 = query.get("index").and_then(|index| index.parse().ok()).unwrap_or(0);
    let wait = query.get("wait").and_then(|wait| wait.strip_suffix("ms")).and_then(|wait| wait.parse().ok());
    let until = Instant::now() + Duration::from_millis(wait.unwrap_or(300_000));
    let mut store = state.lock();
    *store.asked.entry(path.to_owned()).or_default() += 1;
    let filtered = store.filtered && token.is_some();
    store.token = token;
    let (status, now, body) = loop {
        let (status, now, body) = store.look(path, &query);
        let left = until.saturating_duration_since(Instant::now());
        if store.away {
            return Ok(false);
        }
        if index == 0 || now.is_none_or(|now| now != index) || left.is_zero() {
            break (status, now, body);
        }
        store = state.changed.wait_timeout(store, left).unwrap_or_else(PoisonError::into_inner).0;
    };
    drop(store);
    answer(reader.get_mut(), status, now, filtered, &body)
}

fn answer(out: &mut TcpStream, status: u16, index: Option<u64>, filtered: bool, body: &str) -> io::Result<bool> {
    let index = index.map(|index| format!("X-Consul-Index: {index}\r\n")).unwrap_or_default();
    let filtered = if filtered { "X-Consul-Results-Filtered-By-ACLs: true\r\n" } else { "" };
    let length = body.len();
    let head = format!("HTTP/1.1 {status} x\r\ncontent-type: application/json\r\ncontent-length: {length}\r\n{index}{filtered}");
    out.write_all(format!("{head}\r\n{body}").as_bytes())?;
    Ok(true)
}
