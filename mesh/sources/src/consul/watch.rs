//! Blocking queries, for as long as the process lives.
//!
//! Owns the index of each, the pauses between attempts, and how many questions are open at once: the instances of services are
//! asked for over a fixed number of connections (an agent takes 200 from one address by itself). As long as there are no more
//! services than that, each has one and a change is told at once; beyond that they take turns, each waiting so long that every
//! service had its turn within [`ROUND`]. Upstream: [`super::client`]. Downstream: [`super::state`].

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use serde_json::{Value, json};
use tokio::sync::{Notify, mpsc, watch};

use super::Retry;
use super::client::{Client, Failure};
use crate::dial::{escaped, spread};

/// How long a question may wait for a change.
const WAIT: Duration = Duration::from_mins(5);
/// Within this every service had its turn, where there are more than connections.
const ROUND: Duration = Duration::from_secs(30);
/// Connections for the instances of services.
const CONNECTIONS: usize = 48;
/// Least time between two changes of one thing.
const GAP: Duration = Duration::from_millis(100);

/// What is followed as a whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Which {
    /// Names of services.
    Services,
    /// Their defaults: protocols.
    Defaults,
    /// Keys with objects.
    Keys,
    /// Who may call whom.
    Intentions,
}
impl Which {
    /// All of them, with intentions or without.
    pub fn all(intentions: bool) -> Vec<Self> {
        let needed = [Self::Services, Self::Defaults, Self::Keys];
        needed.into_iter().chain(intentions.then_some(Self::Intentions)).collect()
    }
    /// For messages and metrics.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Services => "services",
            Self::Defaults => "service-defaults",
            Self::Keys => "keys",
            Self::Intentions => "intentions",
        }
    }
    /// Whether not knowing any of it may let something through that would have been refused.
    pub fn closes(self) -> bool {
        matches!(self, Self::Keys | Self::Intentions)
    }
}

/// What a watch tells.
#[derive(Debug)]
pub(super) enum Told {
    /// All of it, as it is now.
    Whole(Which, Value),
    /// The instances of a service.
    Instances(Arc<str>, Value),
    /// It did not work; it is tried again.
    Failed(Which, Failure),
    /// The same of a service's instances.
    InstancesFailed(Arc<str>, Failure),
}

/// What is asked, and how.
#[derive(Clone, Debug)]
pub(super) struct Questions {
    /// Keys below this hold objects.
    pub prefix: String,
    /// Of which datacenter, if not the agent's own.
    pub datacenter: Option<String>,
    pub retry: Retry,
}

impl Questions {
    fn path(&self, base: &str, index: u64, wait: Duration) -> String {
        let joint = if base.contains('?') { '&' } else { '?' };
        let center = self.datacenter.as_ref().map(|dc| format!("&dc={}", escaped(dc))).unwrap_or_default();
        if index == 0 {
            // At once.
            return format!("{base}{joint}index=0{center}");
        }
        format!("{base}{joint}index={index}&wait={}ms{center}", wait.as_millis())
    }
    fn whole(&self, which: Which) -> String {
        match which {
            Which::Services => "/v1/catalog/services".to_owned(),
            Which::Defaults => "/v1/config/service-defaults".to_owned(),
            Which::Intentions => "/v1/connect/intentions".to_owned(),
            Which::Keys => {
                let parts: Vec<String> = self.prefix.split('/').map(escaped).collect();
                format!("/v1/kv/{}?recurse=true", parts.join("/"))
            }
        }
    }
}

/// Where to ask from the next time. An index that went back says that all may be different.
fn next(index: u64, answered: u64) -> u64 {
    if answered < index { 0 } else { answered }
}

/// Follows one thing until nobody listens.
pub(super) async fn follow(mut client: Client, questions: Questions, which: Which, told: mpsc::Sender<Told>) {
    let (base, retry) = (questions.whole(which), questions.retry);
    let (mut index, mut pause) = (0, retry.least);
    loop {
        let answer = ask(&mut client, &questions, &questions.path(&base, index, WAIT), which, index).await;
        let what = match answer {
            // Nothing but time passed; were it none, somebody between us would not wait.
            Ok((same, _)) if same == index => {
                tokio::time::sleep(GAP).await;
                continue;
            }
            Ok((answered, body)) => {
                let is_first = index == 0;
                (index, pause) = (next(index, answered), retry.least);
                if !is_first {
                    tokio::time::sleep(GAP).await;
                }
                Ok(Told::Whole(which, body))
            }
            // What it is now is told as soon as it can be, whether it changed meanwhile or not.
            Err(failure) => {
                index = 0;
                Err(Told::Failed(which, failure))
            }
        };
        let failed = what.is_err();
        let (Ok(what) | Err(what)) = what;
        if told.send(what).await.is_err() {
            return;
        }
        if failed {
            tokio::time::sleep(spread(pause)).await;
            pause = (pause * 2).min(retry.most);
        }
    }
}

async fn ask(client: &mut Client, questions: &Questions, path: &str, which: Which, index: u64) -> Result<(u64, Value), Failure> {
    if index == 0 && which.closes() && !client.has_token() {
        nobody_is_left_in_the_dark(client).await?;
    }
    let answer = match client.get(path, WAIT).await {
        // A Consul without its own mesh has no intentions, and does not hold such an answer back.
        Err(failure) if which == Which::Intentions && failure.message.contains("Connect must be enabled") => {
            if index != 0 {
                tokio::time::sleep(questions.retry.most).await;
            }
            return Ok((1, json!({ "Allowed": true })));
        }
        answer => answer?,
    };
    if answer.filtered && which.closes() {
        return Err(Failure::refused("our token may read only some of it, and the rest may refuse something"));
    }
    if answer.filtered && which == Which::Services && index == 0 {
        tracing::warn!("Consul leaves out services that our token may not read: they are no part of the mesh");
    }
    if which != Which::Intentions {
        return Ok((answer.index, answer.body));
    }
    // Nobody's intention: what is left is Consul's default.
    let path = questions.path("/v1/connect/intentions/check?source=culvert-nobody&destination=culvert-nobody", 0, WAIT);
    let allowed = match client.get(&path, Duration::ZERO).await {
        Ok(default) => default.body["Allowed"].as_bool().unwrap_or(false),
        Err(failure) if failure.refused => false,
        Err(failure) => return Err(failure),
    };
    Ok((answer.index, json!({ "Intentions": answer.body, "Allowed": allowed })))
}

/// Without a token Consul leaves out what may not be read, and does not say so: only an agent without ACLs is believed then.
async fn nobody_is_left_in_the_dark(client: &mut Client) -> Result<(), Failure> {
    match client.get("/v1/acl/token/self", Duration::ZERO).await {
        Err(failure) if failure.message.contains("ACL support disabled") => Ok(()),
        Err(failure) if !failure.refused => Err(failure),
        Ok(_) | Err(_) => Err(Failure::refused(
            "Consul has ACLs and we have no token: what may not be read would be left out without a word; set CONSUL_HTTP_TOKEN",
        )),
    }
}

/// Whose turn it is.
#[derive(Debug)]
pub(super) struct Turns {
    state: Mutex<State>,
    more: Notify,
    /// Whether there are more services than connections.
    crowded: watch::Sender<bool>,
}
#[derive(Debug, Default)]
struct State {
    waiting: VecDeque<Turn>,
    /// Services that are followed, and since when.
    known: HashMap<Arc<str>, u64>,
    born: u64,
}
#[derive(Clone, Debug)]
struct Turn {
    service: Arc<str>,
    born: u64,
    index: u64,
}

impl Turns {
    pub fn new() -> Self {
        Self { state: Mutex::default(), more: Notify::new(), crowded: watch::channel(false).0 }
    }
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Follows these services and no others. New ones come first.
    pub fn set<'n>(&self, names: impl Iterator<Item = &'n Arc<str>>) {
        let mut state = self.lock();
        let mut old = std::mem::take(&mut state.known);
        for name in names {
            if let Some(born) = old.remove(name) {
                state.known.insert(Arc::clone(name), born);
                continue;
            }
            state.born += 1;
            let born = state.born;
            state.known.insert(Arc::clone(name), born);
            state.waiting.push_front(Turn { service: Arc::clone(name), born, index: 0 });
        }
        self.crowded.send_replace(state.known.len() > CONNECTIONS);
        drop(state);
        self.more.notify_one();
    }

    /// The next service, and how long its question may wait.
    async fn next(&self) -> (Turn, Duration) {
        loop {
            {
                let mut state = self.lock();
                while let Some(turn) = state.waiting.pop_front() {
                    if state.known.get(&turn.service) != Some(&turn.born) {
                        continue;
                    }
                    if !state.waiting.is_empty() {
                        self.more.notify_one();
                    }
                    let all = state.known.len();
                    let wait = if all <= CONNECTIONS {
                        WAIT
                    } else {
                        ROUND * CONNECTIONS as u32 / u32::try_from(all).unwrap_or(u32::MAX)
                    };
                    return (turn, wait);
                }
            }
            self.more.notified().await;
        }
    }
    fn back(&self, turn: Turn) {
        self.lock().waiting.push_back(turn);
        self.more.notify_one();
    }
}

/// Asks for the instances of services, over all connections, until nobody listens.
pub(super) fn follow_services(
    client: &Client,
    questions: &Questions,
    turns: &Arc<Turns>,
    told: &mpsc::Sender<Told>,
    tasks: &mut tokio::task::JoinSet<()>,
) {
    for _ in 0..CONNECTIONS {
        tasks.spawn(take_turns(client.another(), questions.clone(), Arc::clone(turns), told.clone()));
    }
}

async fn take_turns(mut client: Client, questions: Questions, turns: Arc<Turns>, told: mpsc::Sender<Told>) {
    let mut pause = questions.retry.least;
    let mut crowded = turns.crowded.subscribe();
    loop {
        let (mut turn, wait) = turns.next().await;
        let path = questions.path(&format!("/v1/health/service/{}", escaped(&turn.service)), turn.index, wait);
        let answer = tokio::select! {
            answer = client.get(&path, wait) => answer,
            // Others wait: it does not keep its place for minutes.
            _ = crowded.wait_for(|crowded| *crowded), if wait == WAIT => {
                turns.back(turn);
                continue;
            }
        };
        let (service, index) = (Arc::clone(&turn.service), turn.index);
        match answer {
            Ok(answer) => {
                turn.index = next(index, answer.index);
                pause = questions.retry.least;
                if answer.index != index && told.send(Told::Instances(service, answer.body)).await.is_err() {
                    return;
                }
                if index != 0 && (answer.index != index || wait == WAIT) {
                    tokio::time::sleep(GAP).await;
                }
                turns.back(turn);
            }
            Err(failure) => {
                turn.index = 0;
                turns.back(turn);
                if told.send(Told::InstancesFailed(service, failure)).await.is_err() {
                    return;
                }
                tokio::time::sleep(spread(pause)).await;
                pause = (pause * 2).min(questions.retry.most);
            }
        }
    }
}
