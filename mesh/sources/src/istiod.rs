//! istiod as a source: workloads, services and L4 policies over delta ADS (node-agent §1.9).
//!
//! One stream for both types; every response is answered, with the names and reasons of what is refused in it while the rest
//! counts. Nothing is told before both types have been, so a process that becomes ready knows the whole mesh; afterwards each
//! response is one version. When the stream ends, the last state serves, and the next stream resumes from the versions held.
//! A workload that newly names a policy that is not there waits [`PATIENCE`] for it, and so does a policy's removal that workloads
//! still name ([`held`]): istiod sends the two types apart, and cutting live connections in between would be an outage. Everything
//! else goes on. Large responses are converted on a helper thread.
//! On demand ([`Settings::demand`]) addresses are told as somebody asks for them, and those of our own node; policies are told all.
//! Upstream: istiod, through [`mesh_runtime::control_plane`]. Downstream: [`crate::publisher`].

mod convert;
mod held;
pub mod node;
mod state;

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use http::uri::PathAndQuery;
use mesh_model::Change;
use mesh_model::policy::{Action, Policy, PolicyBody, PolicyKey, Scope};
use mesh_model::snapshot::Viewpoint;
use mesh_proto::envoy::config::core::v3::Node;
use mesh_proto::envoy::service::discovery::v3::{DeltaDiscoveryRequest, DeltaDiscoveryResponse};
use mesh_proto::google::rpc::Status;
use mesh_runtime::control_plane::{ControlError, ControlPlane, chain};
use mesh_runtime::metrics::{Counter, Family, Gauge, MetricError, Registry};
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep, sleep_until, timeout};
use tonic::Code;
use tonic_prost::ProstCodec;

use crate::demand::Demand;
use crate::diagnostics::Diagnostics;
use crate::publisher::{ChangeSink, Closed};
use crate::translate::at_most;
use crate::{Source, SourceError};
use state::{Kind, Received, State};

/// How long a workload waits for the policies it names.
const PATIENCE: Duration = Duration::from_secs(1);
/// Limit for the first answers of a stream; istiod answers every subscription, with nothing if there is nothing.
const FIRST_ANSWERS: Duration = Duration::from_mins(1);
/// Rest after a lost stream: doubled up to the second (node-agent §1.9).
const BACKOFF: (Duration, Duration) = (Duration::from_millis(10), Duration::from_secs(15));
/// A stream that lived this long was a good one: the next loss starts with the shortest rest.
const GOOD_LIFE: Duration = Duration::from_secs(5);
/// Largest message we take (node-agent §1.9).
const MOST_BYTES: usize = 200 << 20;
/// Resources above which a response is converted on a helper thread.
const LARGE: usize = 500;
/// How often what nobody uses is looked for.
const SWEEP: Duration = Duration::from_secs(1);
/// How often the services in use are asked for anew: of one that was asked for, istiod tells what becomes of the endpoints it told,
/// and nothing of those that come later.
const REFRESH: Duration = Duration::from_secs(5);
/// Names of nothing: each request on demand after the first asks for one and gives the other up. istiod answers only where the
/// names asked for change, and to a request that gives names up and asks for none it answers that everything asked for is gone.
const NUDGES: [&str; 2] = ["/0.0.0.0", "/0.0.0.1"];
/// Answers a server may leave unread.
const UNREAD: usize = 1024;
const PATH: &str = "/envoy.service.discovery.v3.AggregatedDiscoveryService/DeltaAggregatedResources";

/// What is done about a policy that a workload names and that does not come.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum MissingPolicy {
    /// The workload refuses until it comes: plaintext where only that can be meant ([`at_most`]), else everything.
    #[default]
    Deny,
    /// It does not count, as in istio/ztunnel.
    Ignore,
}

/// How istiod is asked.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Where it is.
    pub control_plane: ControlPlane,
    /// Who we are.
    pub node: Node,
    /// What a policy that does not come means.
    pub missing_policy: MissingPolicy,
    /// What is asked for, where addresses are told on demand; `None`: all are told.
    pub demand: Option<Demand>,
    /// What is counted.
    pub metrics: Metrics,
}

/// Metrics of the stream, under istio/ztunnel's names where it has them (node-agent §1.12).
#[derive(Clone, Debug)]
pub struct Metrics {
    terminations: Family<Counter>,
    messages: Family<Counter>,
    bytes: Family<Counter>,
    refused: Family<Counter>,
    connected: Arc<Gauge>,
    missing: Arc<Gauge>,
    demanded: Arc<Gauge>,
}

impl Metrics {
    /// Registers them.
    pub fn new(registry: &Registry) -> Result<Self, MetricError> {
        let gauge = |name, help| -> Result<Arc<Gauge>, MetricError> {
            Ok(registry.family(Family::<Gauge>::new(name, help, &[]))?.pin(&[]))
        };
        let counter = |name, help, label: &'static [&'static str]| registry.family(Family::<Counter>::new(name, help, label));
        Ok(Self {
            terminations: counter("istio_xds_connection_terminations_total", "Streams that ended, by reason", &["reason"])?,
            messages: counter("istio_xds_message_total", "Responses of the control plane", &["url"])?,
            bytes: counter("istio_xds_message_bytes_total", "Bytes of their resources", &["url"])?,
            refused: counter("culvert_xds_refused_total", "Resources refused (NACK)", &["url"])?,
            connected: gauge("culvert_xds_connected", "1 while the control plane is heard; the last state serves otherwise")?,
            missing: gauge("culvert_xds_missing_policies", "Policies that workloads name and that are not there")?,
            demanded: gauge("culvert_xds_demanded", "Names asked for, where the mesh is told on demand")?,
        })
    }
}

/// istiod as a source.
#[derive(Debug)]
pub struct IstiodSource {
    /// How it is asked.
    pub settings: Settings,
    /// Where we stand.
    pub view: Viewpoint,
    /// Where refused resources are listed.
    pub diagnostics: Diagnostics,
}

impl Source for IstiodSource {
    fn name(&self) -> &'static str {
        "istiod"
    }

    async fn run(self, sink: ChangeSink) -> Result<(), SourceError> {
        let (node, on_demand) = (Arc::clone(&self.view.node), self.settings.demand.is_some());
        let mut session = Session {
            source: self,
            sink,
            state: State::new(node, on_demand),
            told: BTreeSet::new(),
            pending: Vec::new(),
            waiting: HashMap::new(),
            accepted: HashSet::new(),
        };
        let mut rest = BACKOFF.0;
        loop {
            let begun = Instant::now();
            let lost = session.stream().await;
            let metrics = &session.source.settings.metrics;
            metrics.connected.set(0);
            let why = match lost {
                Lost::Closed => return Ok(()),
                Lost::Defect => return Err(SourceError::Died),
                Lost::Ended(reason, why) => {
                    metrics.terminations.get(&[reason]).inc();
                    why
                }
            };
            // What waited when the stream was lost waits no longer.
            if !session.waiting.is_empty() && session.flush(false).await.is_err() {
                return Ok(());
            }
            if begun.elapsed() > GOOD_LIFE {
                rest = BACKOFF.0;
            }
            let address = session.source.settings.control_plane.address();
            tracing::warn!(address, why, again_in = ?rest, synced = session.sink.has_told(), "the control plane is not heard");
            sleep(rest.mul_f64(rand::random_range(0.8..=1.2))).await;
            rest = (rest * 2).min(BACKOFF.1);
        }
    }
}

/// Why a stream is over.
enum Lost {
    /// The process is ending.
    Closed,
    /// A conversion panicked; the state is gone with it.
    Defect,
    /// With the word of the metric, and why.
    Ended(&'static str, String),
}

impl From<Closed> for Lost {
    fn from(_: Closed) -> Self {
        Self::Closed
    }
}
impl From<ControlError> for Lost {
    fn from(error: ControlError) -> Self {
        Self::Ended("ConnectionError", error.to_string())
    }
}
impl From<tonic::Status> for Lost {
    fn from(status: tonic::Status) -> Self {
        // What a restart or a rebalancing of istiod looks like from here.
        let reason = match status.code() {
            Code::Unknown | Code::Cancelled | Code::DeadlineExceeded | Code::Ok => "Reconnect",
            _ => "Error",
        };
        Self::Ended(reason, format!("{:?}: {}", status.code(), chain(&status)))
    }
}

/// What outlives a stream.
struct Session {
    source: IstiodSource,
    sink: ChangeSink,
    state: State,
    /// Types that were told at least once.
    told: BTreeSet<Kind>,
    /// Changes not handed over yet.
    pending: Vec<Change>,
    /// Missing policies that are waited for, and until when.
    waiting: HashMap<PolicyKey, Instant>,
    /// Missing policies the published state knows to be missing.
    accepted: HashSet<PolicyKey>,
}

impl Session {
    /// One stream, to its end.
    async fn stream(&mut self) -> Lost {
        match self.try_stream().await {
            Err(lost) => lost,
            Ok(()) => Lost::Ended("Complete", "it ended the stream".into()),
        }
    }

    async fn try_stream(&mut self) -> Result<(), Lost> {
        let Settings { control_plane, metrics, demand, .. } = self.source.settings.clone();
        let channel = control_plane.connect().await?;
        let (requests, outgoing) = mpsc::channel(UNREAD);
        for kind in Kind::ALL {
            // The queue has room for more than these.
            let _ = requests.try_send(self.first(kind));
        }
        let outgoing = futures_util::stream::unfold(outgoing, |mut outgoing| async {
            outgoing.recv().await.map(|request: DeltaDiscoveryRequest| (request, outgoing))
        });
        let request = control_plane.request(outgoing)?;
        let mut grpc = tonic::client::Grpc::new(channel).max_decoding_message_size(MOST_BYTES);
        let late = || Lost::Ended("Error", format!("it does not answer within {FIRST_ANSWERS:?}"));
        let unready = |e: tonic::transport::Error| Lost::Ended("ConnectionError", chain(&e));
        grpc.ready().await.map_err(unready)?;
        let opening = grpc.streaming(request, PathAndQuery::from_static(PATH), ProstCodec::default());
        let mut incoming = timeout(FIRST_ANSWERS, opening).await.map_err(|_| late())??.into_inner();
        let (mut answered, answers_by) = (BTreeSet::new(), Instant::now() + FIRST_ANSWERS);
        let unread = |_| Lost::Ended("Error", "it does not read what it is answered".into());
        let (mut sweep, mut refreshed, mut nudges) = (tokio::time::interval(SWEEP), Instant::now(), NUDGES);
        loop {
            let until = self.waiting.values().min().copied();
            let response: Option<DeltaDiscoveryResponse> = tokio::select! {
                message = incoming.message() => message?,
                () = sleep_until(answers_by), if !self.is_all(&answered) => return Err(late()),
                names = asked(demand.as_ref()) => {
                    requests.try_send(address(Subscription { names, ..Subscription::default() }, &mut nudges)).map_err(unread)?;
                    continue;
                }
                _ = sweep.tick(), if demand.is_some() => {
                    let mut next = Subscription { given_up: self.sweep().await?, ..Subscription::default() };
                    if refreshed.elapsed() >= REFRESH {
                        refreshed = Instant::now();
                        (next.names, next.versions) = self.in_use();
                    }
                    if !next.names.is_empty() || !next.given_up.is_empty() {
                        requests.try_send(address(next, &mut nudges)).map_err(unread)?;
                    }
                    continue;
                }
                () = sleep_until(until.unwrap_or(answers_by)), if until.is_some() => {
                    self.flush(true).await?;
                    continue;
                }
            };
            let Some(response) = response else { return Ok(()) };
            let Some(kind) = Kind::of(&response.type_url) else {
                tracing::debug!(url = response.type_url, "a response of a type nobody asked for");
                continue;
            };
            metrics.connected.set(1);
            if answered.insert(kind) && self.is_all(&answered) {
                tracing::info!(address = control_plane.address(), "the control plane is heard");
            }
            let answer = self.receive(kind, response).await?;
            requests.try_send(answer).map_err(unread)?;
        }
    }

    /// What a stream begins with: everything is asked for, or what was asked for before. That both `*` is subscribed to and given up
    /// is how istiod learns that nothing else is wanted; a subscription to nothing would mean everything.
    fn first(&self, kind: Kind) -> DeltaDiscoveryRequest {
        let Settings { node, demand, .. } = &self.source.settings;
        let everything = "*".to_owned();
        let (subscribe, give_up) = match demand {
            Some(demand) if kind == Kind::Address => ([demand.resume(), vec![everything.clone()]].concat(), vec![everything]),
            _ => (vec![everything], Vec::new()),
        };
        DeltaDiscoveryRequest {
            node: Some(node.clone()),
            type_url: kind.url().to_owned(),
            resource_names_subscribe: subscribe,
            resource_names_unsubscribe: give_up,
            initial_resource_versions: self.state.versions(kind),
            ..DeltaDiscoveryRequest::default()
        }
    }

    /// Whether every type is among these that is told without being asked for.
    fn is_all(&self, told: &BTreeSet<Kind>) -> bool {
        let on_demand = self.source.settings.demand.is_some();
        Kind::ALL.iter().all(|kind| told.contains(kind) || (on_demand && *kind == Kind::Address))
    }

    /// On demand: forgets what nobody uses. Gives the names that need not be told any more.
    async fn sweep(&mut self) -> Result<Vec<String>, Closed> {
        let Settings { demand, metrics, .. } = &self.source.settings;
        let Some(demand) = demand else { return Ok(Vec::new()) };
        let mut stale = demand.stale();
        if !stale.is_empty() {
            // Nobody touches a waypoint by its name.
            let gateways = self.state.gateways();
            stale.retain(|wanted| !gateways.contains(wanted));
        }
        demand.give_up(&stale);
        metrics.demanded.set(demand.count() as i64);
        if stale.is_empty() {
            return Ok(Vec::new());
        }
        let (names, changes) = self.state.forget(|wanted| demand.has(wanted));
        self.pending.extend(changes);
        if !self.pending.is_empty() && self.is_all(&self.told) {
            self.flush(true).await?;
        }
        Ok(stale.iter().map(ToString::to_string).chain(names).collect())
    }

    /// On demand: the services somebody used of late, and what is known of them and their endpoints, by version.
    fn in_use(&self) -> (Vec<String>, BTreeMap<String, String>) {
        let Some(demand) = &self.source.settings.demand else { return Default::default() };
        self.state.services_with(|wanted| demand.is_used(wanted, REFRESH + SWEEP))
    }

    /// Takes a response in; gives the answer to it.
    async fn receive(&mut self, kind: Kind, response: DeltaDiscoveryResponse) -> Result<DeltaDiscoveryRequest, Lost> {
        let metrics = &self.source.settings.metrics;
        let sizes = response.resources.iter().filter_map(|r| r.resource.as_ref()).map(|any| any.value.len() as u64);
        metrics.messages.get(&[kind.url()]).inc();
        metrics.bytes.get(&[kind.url()]).add(sizes.sum());
        let (begun, nonce) = (Instant::now(), response.nonce.clone());
        let Received { changes, refused, count, present, absent, unknown } = if response.resources.len() > LARGE {
            let mut state = std::mem::take(&mut self.state);
            let converting = tokio::task::spawn_blocking(move || {
                let received = state.receive(kind, response);
                (state, received)
            });
            let (state, received) = converting.await.map_err(|_| Lost::Defect)?;
            self.state = state;
            received
        } else {
            self.state.receive(kind, response)
        };
        tracing::debug!(?kind, resources = count, refused = refused.len(), took = ?begun.elapsed(), "a response of the control plane");
        metrics.refused.get(&[kind.url()]).add(refused.len() as u64);
        self.source.diagnostics.replace(self.state.problems());
        self.told.insert(kind);
        self.pending.extend(changes);
        if let (Some(demand), Kind::Address) = (&self.source.settings.demand, kind) {
            demand.settle(&present, &absent, unknown.iter().map(String::as_str));
        }
        if self.is_all(&self.told) {
            self.flush(true).await?;
        }
        let error_detail = (!refused.is_empty()).then(|| {
            let said: Vec<String> = refused.iter().map(|(name, why)| format!("{name}: {why}")).collect();
            Status { code: Code::InvalidArgument as i32, message: said.join(", "), details: Vec::new() }
        });
        Ok(DeltaDiscoveryRequest {
            type_url: kind.url().to_owned(),
            response_nonce: nonce,
            error_detail,
            ..DeltaDiscoveryRequest::default()
        })
    }

    /// Hands over what there is, but for what has to `wait` for a policy; the first time all of it waits, so that who becomes ready
    /// knows the whole mesh.
    async fn flush(&mut self, wait: bool) -> Result<(), Closed> {
        let (missing, now) = (self.state.missing(), Instant::now());
        let is_over = !wait || self.waiting.values().any(|until| *until <= now);
        for key in missing.difference(&self.accepted) {
            self.waiting.entry(key.clone()).or_insert(now + PATIENCE);
        }
        self.waiting.retain(|key, until| wait && *until > now && missing.contains(key));
        if !self.waiting.is_empty() && !self.sink.has_told() && !is_over {
            return Ok(());
        }
        let Settings { missing_policy: effect, ref metrics, .. } = self.source.settings;
        let known: HashSet<PolicyKey> = missing.iter().filter(|key| !self.waiting.contains_key(key)).cloned().collect();
        let new: Vec<&PolicyKey> = known.difference(&self.accepted).collect();
        if !new.is_empty() {
            let names: Vec<String> = new.iter().take(10).map(ToString::to_string).collect();
            tracing::warn!(policies = names.join(", "), ?effect, "workloads name policies that did not come");
        }
        let (mut changes, held) = held::split(std::mem::take(&mut self.pending), |key| self.waiting.contains_key(key));
        for key in new {
            if let Some(body) = stand_in(key, effect) {
                let key = key.clone();
                changes.push(Change::Policy(Arc::new(Policy { key, scope: Scope::Selector, body, origin: None })));
            }
        }
        let over = self.accepted.difference(&known).filter(|key| !self.state.has_policy(key));
        changes.extend(over.filter(|key| stand_in(key, effect).is_some()).cloned().map(Change::PolicyGone));
        metrics.missing.set(missing.len() as i64);
        (self.accepted, self.pending) = (known, held);
        if changes.is_empty() && !self.pending.is_empty() {
            return Ok(());
        }
        self.sink.send(changes).await
    }
}

/// The names of new questions; never, where everything is told.
async fn asked(demand: Option<&Demand>) -> Vec<String> {
    match demand {
        Some(demand) => demand.asked().await,
        None => std::future::pending().await,
    }
}

/// A change of what addresses are asked for.
#[derive(Debug, Default)]
struct Subscription {
    names: Vec<String>,
    given_up: Vec<String>,
    /// Of what is held already: it is told again only where it changed.
    versions: BTreeMap<String, String>,
}

/// As a request; the [`NUDGES`] change places.
fn address(change: Subscription, nudges: &mut [&str; 2]) -> DeltaDiscoveryRequest {
    let Subscription { mut names, mut given_up, versions } = change;
    let [asked, over] = *nudges;
    *nudges = [over, asked];
    names.push(asked.to_owned());
    given_up.push(over.to_owned());
    DeltaDiscoveryRequest {
        type_url: Kind::Address.url().to_owned(),
        resource_names_subscribe: names,
        resource_names_unsubscribe: given_up,
        initial_resource_versions: versions,
        ..DeltaDiscoveryRequest::default()
    }
}

/// What counts while a policy that is named does not come; without, what names it refuses everything.
fn stand_in(key: &PolicyKey, effect: MissingPolicy) -> Option<PolicyBody> {
    match effect {
        // istiod names conversions of PeerAuthentications that it never makes (an inherited STRICT meets port modes): what they
        // could say at most is known, and costs the callers of the mesh nothing.
        MissingPolicy::Deny => at_most(key),
        // What matches nothing and denies what it matches does nothing.
        MissingPolicy::Ignore => Some(PolicyBody::Rules { action: Action::Deny, dry_run: false, rules: Vec::new() }),
    }
}
