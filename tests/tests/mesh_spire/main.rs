//! Ring 3, and the long form in `cargo xtask e2e`: a mesh whose certificates come from a real SPIRE, agents as its delegates and a
//! waypoint by its Workload API. Where SPIRE is not installed all of it is skipped.
use std::collections::BTreeSet;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use mesh_identity::cache::CacheSettings;
use mesh_identity::clock::SystemClock;
use mesh_identity::crypto::TlsSettings;
use mesh_identity::spire::{Api, reach};
use mesh_identity::{Authority, Facts, SourceSettings, Svid, SvidCache, TlsContext, tls};
use mesh_model::making::{Container, Making, Owner};
use mesh_model::{SpiffeId, TrustDomain};
use mesh_tests::agent::{Agent, AgentSpec, find_program};
use mesh_tests::load::{Load, Pace};
use mesh_tests::mesh_dir::MeshDir;
use mesh_tests::real_spire::{self, RealSpire};
use mesh_tests::suite::{self, CannotRun, Test, test};
use mesh_tests::topology::{Plan, Topology};
use mesh_tests::web::Web;
use mesh_tests::{http, netns, skip, wait};
use serde_json::Value;
use tempfile::TempDir;
use tokio::runtime::Handle;

const PORT: u16 = 8080;
const VIP: ([u8; 4], u16) = ([10, 96, 0, 20], 80);
const FAR: &str = "far.example";

const TESTS: &[Test<World>] = &[
    test("calls_carry_certificates_of_spire", calls_carry_certificates_of_spire),
    test("a_pod_is_served_once_it_has_an_entry", a_pod_is_served_once_it_has_an_entry),
    test("an_entry_may_be_one_pods", an_entry_may_be_one_pods),
    test("certificates_rotate_under_load", certificates_rotate_under_load),
    test("federated_domains_are_believed_by_their_bundle", federated_domains_are_believed_by_their_bundle),
];

fn main() -> ExitCode {
    let cannot = skip::netns_unavailable().or_else(real_spire::missing);
    suite::run("mesh_spire", cannot, set_up, TESTS)
}

/// How long certificates last, and for how many of their lives the load does.
fn lives() -> (Duration, u32) {
    skip::soak_minutes().map_or((Duration::from_secs(12), 2), |minutes| (Duration::from_mins(1), minutes))
}

const OBJECTS: &str = r"
apiVersion: v1
kind: Namespace
metadata: { name: t, labels: { istio.io/dataplane-mode: ambient } }
---
apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: { name: default, namespace: istio-system }
spec: { mtls: { mode: STRICT } }
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: { name: web, namespace: t }
spec:
  selector: { matchLabels: { app: web } }
  rules:
  - from: [ { source: { principals: [cluster.local/ns/t/sa/wp] } } ]
---
apiVersion: gateway.networking.k8s.io/v1
kind: Gateway
metadata: { name: wp, namespace: t }
spec:
  gatewayClassName: istio-waypoint
  listeners:
  - { name: mesh, port: 15008, protocol: HBONE }
status:
  addresses:
  - { type: Hostname, value: wp.t.svc.cluster.local }
---
apiVersion: v1
kind: Service
metadata: { name: wp, namespace: t }
spec:
  selector: { app: wp }
  clusterIP: 10.96.0.9
  ports:
  - { name: hbone, port: 15008, protocol: TCP }
---
apiVersion: v1
kind: Service
metadata: { name: web, namespace: t, labels: { istio.io/use-waypoint: wp } }
spec:
  selector: { app: web }
  clusterIP: 10.96.0.20
  ports:
  - { name: http, port: 80, targetPort: 8080, protocol: TCP }
";

/// Dropped in this order.
struct World {
    agents: Vec<Agent>,
    _web: Web,
    spire: RealSpire,
    topology: Topology,
    files: TempDir,
    _dir: MeshDir,
}

fn set_up() -> anyhow::Result<World> {
    let find = |program| find_program(program).map_err(|error| CannotRun(format!("{error:#}")));
    let (ztunnel, waypoint) = (find("ztunnel")?, find("waypoint")?);
    let labels = ["gateway.networking.k8s.io/gateway-name=wp", "networking.istio.io/tunnel=http", "istio.io/dataplane-mode=none"];
    let topology = Plan::default()
        .node("node-a", "zone-1")
        .node("node-b", "zone-1")
        .pod("node-a", "t", "client", "client", &[])
        .pod("node-a", "t", "late", "late", &[])
        .pod("node-b", "t", "web", "web", &[])
        .pod("node-b", "t", "wp", "wp", &labels)
        .build()?;
    let (dir, files) = (MeshDir::empty()?, netns::scratch("spire")?);
    dir.put("00-base.yaml", OBJECTS)?;
    dir.put("01-nodes.yaml", &topology.nodes_yaml())?;
    for pod in &topology.plan().pods {
        dir.put(&format!("pod-{}.yaml", pod.name), &topology.pod_yaml(&pod.name, &[]))?;
    }
    let web = Web::start(topology.pod("web"), PORT)?;
    let spire = RealSpire::start(&files.path().join("spire"), "cluster.local")?;
    let by_path = |program: &Path| format!("unix:path:{}", program.display());
    let (life, _) = lives();
    for program in [ztunnel, std::env::current_exe()?] {
        spire.entry("/delegate", &[&by_path(&program.canonicalize()?)], life, &[])?;
    }
    spire.entry("/ns/t/sa/wp", &[&by_path(&waypoint.canonicalize()?)], life, &[])?;
    for account in ["client", "web"] {
        spire.entry(&format!("/ns/t/sa/{account}"), &["k8s:ns:t", &format!("k8s:sa:{account}")], life, &[])?;
    }
    // Tunnels do not outlive a call by much, so that certificates are shown all the time.
    let spec = |spec: AgentSpec| spec.env("POOL_UNUSED_RELEASE_TIMEOUT", "1ms").env("POOL_MAX_STREAMS_PER_CONNECTION", "1");
    let (mesh, no_ca) = (dir.path(), files.path().join("no-ca"));
    let mut agents = Vec::new();
    for node in ["node-a", "node-b"] {
        let agent = AgentSpec::new(node, mesh, &no_ca, files.path()).env("CULVERT_SPIRE_ADMIN_SOCKET", &spire.admin());
        agents.push(spec(agent).start(topology.node(node))?);
    }
    let waypoint = AgentSpec::waypoint(("t", "wp"), "wp", "wp", mesh, &no_ca, files.path());
    let waypoint = spec(waypoint.env("SPIFFE_ENDPOINT_SOCKET", &spire.workload_api()));
    agents.push(waypoint.start(topology.pod("wp"))?);
    for agent in &agents {
        agent.wait_ready(Duration::from_secs(30)).with_context(|| spire.logs())?;
    }
    ensure!(!no_ca.exists(), "somebody made a development CA");
    Ok(World { agents, _web: web, spire, topology, files, _dir: dir })
}

impl World {
    /// GET through the waypoint.
    fn call(&self, pod: &str) -> anyhow::Result<Value> {
        let answer = http::get(&self.topology.pod(pod).netns, VIP.into(), "/")?;
        ensure!(answer.status == 200, "{}: {}", answer.status, answer.body);
        Ok(serde_json::from_str(&answer.body)?)
    }
    fn wait_call(&self, pod: &str) -> anyhow::Result<()> {
        wait::until_true(&format!("an answer for {pod}"), || self.call(pod).is_ok()).with_context(|| self.spire.logs())
    }
    /// The serial numbers of the certificates all processes have now.
    fn serials(&self) -> anyhow::Result<BTreeSet<String>> {
        let mut all = BTreeSet::new();
        for agent in &self.agents {
            let dump = agent.config_dump()?;
            let chains = dump["certificates"].as_array().into_iter().flatten().filter_map(|one| one["certChain"].as_array());
            all.extend(chains.flatten().filter_map(|one| Some(one["serialNumber"].as_str()?.to_owned())));
        }
        Ok(all)
    }
}

fn calls_carry_certificates_of_spire(world: &mut World) -> anyhow::Result<()> {
    let agent = &world.agents[0];
    let mark = agent.mark();
    world.wait_call("client")?;
    let id = |account: &str| format!("spiffe://cluster.local/ns/t/sa/{account}");
    agent.wait_access("of the call", mark, |line| {
        line["src.identity"] == id("client").as_str() && line["dst.identity"] == id("wp").as_str() && line["error"].is_null()
    })?;
    // The policy of `web` names the waypoint only.
    let around = http::get(&world.topology.pod("client").netns, world.topology.pod("web").at(PORT), "/");
    ensure!(around.is_err(), "an answer around the waypoint: {around:?}");
    let roots = world.spire.roots()?;
    let root = roots.split_inclusive("-----END CERTIFICATE-----").next().context("a root")?.trim();
    for agent in &world.agents {
        let dump = agent.config_dump()?;
        let available: Vec<&Value> =
            dump["certificates"].as_array().into_iter().flatten().filter(|one| one["state"] == "Available").collect();
        ensure!(!available.is_empty(), "{}", dump["certificates"]);
        for one in available {
            let pem = BASE64.decode(one["rootCerts"][0]["pem"].as_str().context("a root")?)?;
            let pem = String::from_utf8(pem)?;
            ensure!(pem.split_whitespace().eq(root.split_whitespace()), "{}: {pem} is not {root}", agent.node());
        }
    }
    Ok(())
}

fn a_pod_is_served_once_it_has_an_entry(world: &mut World) -> anyhow::Result<()> {
    ensure!(world.call("late").is_err(), "without an identity");
    world.agents[0].wait_config("the reason", |dump| dump.to_string().contains("no entry for k8s:ns:t, k8s:sa:late"))?;
    // What the agent knows of the pod besides its account.
    world.spire.entry("/ns/t/sa/late", &["k8s:pod-name:late", "k8s:node-name:node-a"], Duration::from_hours(1), &[])?;
    world.wait_call("late")
}

/// As spire-controller-manager makes them: by the pod's uid alone; or by all that Kubernetes tells of a pod.
fn an_entry_may_be_one_pods(world: &mut World) -> anyhow::Result<()> {
    let (uid, spire) = ("0a1b2c3d-1111-2222-3333-444455556666", &world.spire);
    spire.entry("/ns/t/sa/single", &[&format!("k8s:pod-uid:{uid}")], Duration::from_hours(1), &[])?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let cache = source(Api::Delegated, &spire.admin(), "cluster.local")?;
        let id: SpiffeId = "spiffe://cluster.local/ns/t/sa/single".parse()?;
        let pod = |uid: &str, name: &str| Facts { uid: Some(uid.into()), name: name.into(), ..Facts::default() };
        let wait = async |handle: &mesh_identity::SvidHandle| -> anyhow::Result<()> {
            let begun = Instant::now();
            while handle.load().is_none() {
                ensure!(begun.elapsed() < wait::PATIENCE, "{}", spire.logs());
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
            Ok(())
        };
        cache.introduce(&id, &"other".into(), &pod("0a1b2c3d-1111-2222-3333-444455557777", "other"));
        let handle = cache.handle(&id);
        let error = handle.fetch().await.err().context("a certificate by the uid of another pod")?;
        ensure!(error.to_string().contains("no entry for k8s:ns:t, k8s:sa:single, k8s:pod-uid:"), "{error}");
        // The pod comes, and with it what its account has here.
        cache.introduce(&id, &"single".into(), &pod(uid, "single"));
        wait(&handle).await?;
        // By what its containers are and whose it is.
        let of: SpiffeId = "spiffe://cluster.local/ns/t/sa/imaged".parse()?;
        let container = |name: &str, image: &str| Container { name: name.into(), image: image.into(), image_id: "".into() };
        let owner = Owner { kind: "StatefulSet".into(), name: "imaged".into(), uid: "s-1".into() };
        let containers = vec![container("app", "reg/imaged:1"), container("side", "reg/side:1")];
        let making = Making { owners: vec![owner], containers, init_containers: Vec::new() };
        let handle = cache.handle(&of);
        cache.introduce(&of, &"imaged".into(), &Facts { making: Some(Arc::new(making)), ..pod("s-2", "imaged") });
        ensure!(handle.fetch().await.is_err(), "it has no entry yet");
        let selectors = ["k8s:ns:t", "k8s:container-name:app", "k8s:container-image:reg/imaged:1", "k8s:pod-image-count:2"];
        let selectors = [&selectors[..], &["k8s:pod-owner:StatefulSet:imaged", "k8s:pod-owner-uid:StatefulSet:s-1"]].concat();
        spire.entry("/ns/t/sa/imaged", &selectors, Duration::from_hours(1), &[])?;
        wait(&handle).await
    })
}

/// Requests go on over several lives of the certificates of all ends, while SPIRE's agent is away for a quarter of one.
fn certificates_rotate_under_load(world: &mut World) -> anyhow::Result<()> {
    let (life, lives) = lives();
    world.wait_call("client")?;
    let client = Arc::clone(world.topology.pod("client"));
    let pace = Arc::new(Pace::new(200));
    let load = Load::at_pace(&client, VIP.into(), "/", 16, &pace);
    let (begun, mut serials, mut restarted) = (Instant::now(), BTreeSet::new(), false);
    // Over as many lives, and the quarter.
    while begun.elapsed() < life * lives + life / 4 {
        serials.extend(world.serials()?);
        if !restarted && begun.elapsed() > life {
            world.spire.kill_agent();
            std::thread::sleep(life / 4);
            world.spire.restart_agent()?;
            restarted = true;
        }
        std::thread::sleep(Duration::from_millis(500));
    }
    let seconds = usize::try_from(begun.elapsed().as_secs())?;
    let tally = load.finish(seconds * 10)?;
    tally.all_well(seconds * 10, 0).with_context(|| world.spire.logs())?;
    let offered = pace.judge(tally.requests(), skip::soak_minutes().is_some())?;
    // Client, server and waypoint; on node A the pod `late` has one that lasts.
    let least = 1 + 3 * (1 + usize::try_from(lives)?);
    ensure!(serials.len() >= least, "{} certificates in {seconds} s, of {} s", serials.len(), life.as_secs());
    println!("{offered}; the slowest took {:?}; {} certificates of {} s", tally.slowest, serials.len(), life.as_secs());
    Ok(())
}

fn federated_domains_are_believed_by_their_bundle(world: &mut World) -> anyhow::Result<()> {
    let far = RealSpire::start(&world.files.path().join("far"), FAR)?;
    let myself = format!("unix:path:{}", std::env::current_exe()?.canonicalize()?.display());
    let (hour, near) = (Duration::from_hours(1), &world.spire);
    near.entry("/ns/t/sa/traveller", &["k8s:ns:t", "k8s:sa:traveller"], hour, &[])?;
    far.entry("/ns/t/sa/host", &[&myself], hour, &[])?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let here = source(Api::Delegated, &near.admin(), "cluster.local")?;
        let there = source(Api::Workload, &far.workload_api(), FAR)?;
        let (traveller, host) = ("spiffe://cluster.local/ns/t/sa/traveller", "spiffe://far.example/ns/t/sa/host");
        let (traveller, host) = (fetched(&here, traveller).await?, fetched(&there, host).await?);
        let strangers = handshake(&traveller, &host).await;
        ensure!(strangers.is_err(), "believed without a bundle");
        near.federate(FAR, &far.bundle()?)?;
        far.federate("cluster.local", &near.bundle()?)?;
        // SPIRE tells a node of the trust domains that an entry of it names.
        near.entry("/ns/t/sa/other", &["k8s:ns:t", "k8s:sa:other"], hour, &[FAR])?;
        far.entry("/ns/t/sa/another", &[&myself], hour, &["cluster.local"])?;
        let begun = Instant::now();
        while let Err(error) = both_ways(&traveller, &host).await {
            ensure!(begun.elapsed() < wait::PATIENCE, "{error:#}\n{}\n{}", near.logs(), far.logs());
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        Ok(())
    })
}

fn source(api: Api, socket: &str, domain: &str) -> anyhow::Result<SvidCache> {
    let settings = SourceSettings {
        trust_domain: TrustDomain::parse(domain)?,
        trust_domain_aliases: Vec::new(),
        lifetime: Duration::from_hours(1),
        unknown: mesh_identity::revocation::Unknown::Deny,
    };
    let source = Authority::Spire(api, reach(socket, &TlsSettings::default())?).open(settings)?;
    let context = TlsContext::new(&TlsSettings::default(), &*source, Arc::new(SystemClock))?;
    Ok(SvidCache::start(source, context, &CacheSettings::default(), &Handle::current()))
}

/// The certificate, once SPIRE's agent has heard of the entry.
async fn fetched(cache: &SvidCache, id: &str) -> anyhow::Result<Arc<Svid>> {
    let (id, begun): (SpiffeId, _) = (id.parse()?, Instant::now());
    loop {
        match cache.fetch(&id).await {
            Ok(svid) => return Ok(svid),
            Err(error) if begun.elapsed() > wait::PATIENCE => return Err(error.into()),
            Err(_) => tokio::time::sleep(Duration::from_millis(100)).await,
        }
    }
}

async fn both_ways(one: &Svid, other: &Svid) -> anyhow::Result<()> {
    handshake(one, other).await?;
    handshake(other, one).await
}

async fn handshake(client: &Svid, server: &Svid) -> anyhow::Result<()> {
    let (near, far) = tokio::io::duplex(1 << 16);
    let deadline = tokio::time::Instant::now() + Duration::from_secs(5);
    let expect = [server.id.clone()];
    let (connected, accepted) = tokio::join!(tls::connect(client, near, &expect, deadline), tls::accept(server, far, deadline));
    connected.context("client")?;
    accepted.context("server")?;
    Ok(())
}
