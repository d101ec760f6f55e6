//! Endpoints that are found by name: every address is an endpoint of its own, for as long as the answer says.
use std::collections::BTreeSet;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::ensure;
use mesh_tests::dns::Dns;
use mesh_tests::wait;
use mesh_tests::web::Web;

use crate::destinations::{different, names};
use crate::mesh::{Mesh, PORT};

const VIP: &str = "10.96.2.40";
const ENTRY: &str = r"
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: { name: many, namespace: t, labels: { istio.io/use-waypoint: wp } }
spec:
  hosts: [ many.name.example ]
  addresses: [ 10.96.2.40 ]
  location: MESH_EXTERNAL
  resolution: RESOLUTION
  ports: [ { number: 80, name: http, protocol: HTTP, targetPort: 8080 } ]
---
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: { name: many, namespace: t }
spec:
  host: many.name.example
  trafficPolicy:
    loadBalancer: { simple: ROUND_ROBIN }
    outlierDetection: { consecutive5xxErrors: 2, interval: 200ms, baseEjectionTime: 1s, maxEjectionPercent: 100 }
";

/// Who answered.
fn reached(mesh: &Mesh, calls: usize) -> anyhow::Result<Vec<String>> {
    names(mesh, calls, |_| ["-H", "host: many.name.example", &format!("http://{VIP}/")].map(str::to_owned).to_vec())
}

/// Waits until these answer, and nobody else.
fn wait_reached(mesh: &Mesh, want: &[&str]) -> anyhow::Result<()> {
    let want: BTreeSet<&str> = want.iter().copied().collect();
    wait::until_true(&format!("calls to reach {want:?}"), || reached(mesh, 6).is_ok_and(|got| different(&got) == want))
}

/// Endpoints of the destination, as the waypoint counts them.
fn endpoints(mesh: &Mesh) -> String {
    let page = mesh.proxy("wp").metrics();
    page.map_or_else(
        |error| error.to_string(),
        |page| page.sum("envoy_cluster_membership_total", &[("cluster_name", "outbound|80||many.name.example")]).to_string(),
    )
}

pub(crate) fn every_address_of_a_name_is_an_endpoint(mesh: &mut Mesh) -> anyhow::Result<()> {
    let (outside, other) = (Arc::clone(mesh.topology.host("outside")), Arc::clone(mesh.pod("wp2")));
    let (first, second) = (Web::start(&outside, PORT)?, Web::start(&other, PORT)?);
    let said: Arc<Mutex<Option<Vec<IpAddr>>>> = Arc::default();
    let say = |ips: Option<Vec<IpAddr>>| *said.lock().unwrap_or_else(PoisonError::into_inner) = ips;
    let serve = || {
        let said = Arc::clone(&said);
        let of =
            move |name: &str| said.lock().unwrap_or_else(PoisonError::into_inner).clone().filter(|_| name == "many.name.example");
        Dns::start(mesh.pod("wp"), of)
    };
    say(Some(vec![outside.v4.into(), other.v4.into()]));
    let dns = serve()?;
    let entry = mesh.objects("resolved", &ENTRY.replace("RESOLUTION", "DNS"))?;
    mesh.proxy("node-a").wait_config("the service", |dump| dump["services"].to_string().contains(VIP))?;
    // The first request does not wait for others to look the name up.
    ensure!(reached(mesh, 1)?.len() == 1);
    wait_reached(mesh, &["outside", "wp2"])?;
    let got = reached(mesh, 12)?;
    let of_first = got.iter().filter(|name| *name == "outside").count();
    ensure!((5..=7).contains(&of_first) && endpoints(mesh) == "2", "in turn: {got:?}");

    // Each has its own health.
    first.behave(503);
    for _ in 0..6 {
        mesh.call(&["-H", "host: many.name.example", &format!("http://{VIP}/")])?;
    }
    first.behave(0);
    let before = first.requests();
    ensure!(different(&reached(mesh, 3)?) == BTreeSet::from(["wp2"]) && first.requests() == before, "one is ejected");
    wait_reached(mesh, &["outside", "wp2"])?;

    // Nobody listens at one address any more: the other is tried instead.
    first.die();
    drop(first);
    wait_reached(mesh, &["wp2"])?;
    let first = Web::start(&outside, PORT)?;

    // Another answer, of the other family, counts when the time of the one before is over.
    say(Some(vec![outside.v6.into()]));
    wait_reached(mesh, &["outside"])?;
    wait::until_true("the one address of the new answer", || endpoints(mesh) == "1")?;
    ensure!(first.seen("/").last().is_some_and(|echo| echo["peer"] == mesh.pod("wp").v6.to_string()), "over IPv6");

    // Servers that do not answer take nothing away.
    drop(dns);
    std::thread::sleep(Duration::from_secs(3));
    ensure!(different(&reached(mesh, 3)?) == BTreeSet::from(["outside"]), "what was known last");
    say(None);
    let _dns = wait::until("the name server again", Duration::from_secs(10), || serve().ok())?;
    // That there is no such name is an answer.
    wait::until_true("no endpoint", || {
        let got = mesh.call(&["-H", "host: many.name.example", &format!("http://{VIP}/")]);
        got.is_ok_and(|got| got.status == 503 && got.body == "no healthy upstream")
    })?;

    // All addresses together are one endpoint where that is asked for.
    say(Some(vec![outside.v4.into(), other.v4.into()]));
    drop(entry);
    let _entry = mesh.objects("resolved", &ENTRY.replace("RESOLUTION", "DNS_ROUND_ROBIN"))?;
    mesh.proxy("node-a").wait_config("the service", |dump| dump["services"].to_string().contains(VIP))?;
    wait::until_true("an answer", || reached(mesh, 1).is_ok())?;
    std::thread::sleep(Duration::from_secs(2));
    ensure!(reached(mesh, 2)?.len() == 2 && endpoints(mesh) == "1", "{}", endpoints(mesh));
    drop(second);
    Ok(())
}
