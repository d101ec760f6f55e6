//! A gateway that goes through the waypoint of a service (`istio.io/ingress-use-waypoint`), and one that goes around it.
use std::sync::Arc;

use anyhow::ensure;
use mesh_tests::meshctl::{why_of_folder, why_of_process};
use mesh_tests::program::{Client, Server};
use mesh_tests::wait;

use crate::mesh::{Got, MORE, Mesh, curl};

/// The service, with these labels.
fn service(labels: &str) -> String {
    format!(
        "apiVersion: v1\nkind: Service\nmetadata: {{ name: fronted, namespace: t, labels: {{ {labels} }} }}\n\
         spec:\n  selector: {{ app: web1 }}\n  clusterIP: 10.96.0.27\n  ports:\n  \
         - {{ name: http, port: 80, targetPort: 8080, protocol: TCP }}\n  \
         - {{ name: tcp-more, port: 92, targetPort: {MORE}, protocol: TCP }}\n"
    )
}

const RULES: &str = r#"
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: { name: fronted-outside, namespace: t }
spec:
  parentRefs: [ { name: gw } ]
  hostnames: [ fronted.example ]
  rules: [ { backendRefs: [ { name: fronted, port: 80 } ] } ]
---
apiVersion: gateway.networking.k8s.io/v1alpha2
kind: TCPRoute
metadata: { name: fronted-bytes, namespace: t }
spec:
  parentRefs: [ { name: gw, sectionName: bytes } ]
  rules: [ { backendRefs: [ { name: fronted, port: 92 } ] } ]
---
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: { name: fronted-inside, namespace: t }
spec:
  parentRefs: [ { kind: Service, group: "", name: fronted, port: 80 } ]
  rules:
  - filters: [ { type: ResponseHeaderModifier, responseHeaderModifier: { add: [ { name: x-by, value: waypoint } ] } } ]
    backendRefs: [ { name: fronted, port: 80 } ]
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: { name: fronted, namespace: t }
spec:
  targetRefs: [ { kind: Service, group: "", name: fronted } ]
  rules:
  - from: [ { source: { principals: [ "cluster.local/ns/t/sa/gw" ] } } ]
    to: [ { operation: { notPaths: [ /closed ] } } ]
---
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: { name: fronted, namespace: t }
spec:
  host: fronted
  trafficPolicy: { loadBalancer: { consistentHash: { httpCookie: { name: user, ttl: 0s } } } }
"#;

pub(crate) fn a_gateway_goes_through_the_waypoint_where_that_is_wanted(mesh: &mut Mesh) -> anyhow::Result<()> {
    let outside = Arc::clone(mesh.topology.host("outside"));
    let gateway = mesh.pod("gw").v4;
    let get = |path: &str| curl(&outside, &["-H", "host: fronted.example", &format!("http://{gateway}{path}")]);
    let by_waypoint = |got: &Got| got.header("x-by") == Some("waypoint");
    let why = |path: &str| -> anyhow::Result<Vec<_>> {
        let who = outside.v4.to_string();
        let args = ["--from", &who, "--to", "t/gw:80", "--host", "fronted.example", "--path", path];
        Ok(vec![why_of_folder(mesh.dir.path(), &args)?, why_of_process(mesh.proxy("gw"), &args)?])
    };
    let _rules = mesh.objects("fronted-rules", RULES)?;
    {
        let _service = mesh.objects("fronted", &service("istio.io/use-waypoint: wp"))?;
        let got = get("/closed")?;
        ensure!(got.status == 200 && !by_waypoint(&got), "nobody asked for it: straight to the endpoint: {got:?}");
    }
    let wanted = "istio.io/use-waypoint: wp, istio.io/ingress-use-waypoint: 'true'";
    let _service = mesh.objects("fronted", &service(wanted))?;
    let mark = mesh.proxy("wp").mark();
    let got = get("/open")?;
    ensure!(got.status == 200 && by_waypoint(&got), "{got:?}");
    ensure!(got.head.matches("set-cookie").count() == 1, "endpoints are the waypoint's to choose: {got:?}");
    ensure!(got.echo()?["headers"]["x-forwarded-for"].as_str().is_some_and(|f| f.contains(&outside.v4.to_string())), "{got:?}");
    let log = || mesh.proxy("wp").log_since(mark);
    wait::until_true("the waypoint tells of it", || log().lines().any(|l| l.contains("/open") && l.contains("response_code")))?;
    let got = get("/closed")?;
    ensure!(got.status == 403 && got.header("x-culvert-reason") == Some("not_allowed"), "{got:?}");
    for why in why("/open")? {
        ensure!(why.allowed && why.report["decision"] == "elsewhere", "{}", why.report);
        ensure!(why.report["steps"].to_string().contains("istio.io/ingress-use-waypoint"), "{}", why.report);
    }
    // Connections of bytes go the same way; there the policy, of paths, allows nobody.
    let _raw = Server::start(mesh.pod("web1"), MORE)?;
    ensure!(Client::who(&outside, (gateway, 9000).into()).is_err(), "the waypoint judges bytes too");
    {
        let _bytes = mesh.objects("fronted-bytes", BYTES)?;
        let (mut client, who) = Client::who(&outside, (gateway, 9000).into())?;
        ensure!(who.name == "web1", "{who:?}");
        client.ping("bytes")?;
    }

    // One that is declared and is not there, or has no instance: nothing goes around it.
    for (labels, what) in [
        ("istio.io/use-waypoint: gone, istio.io/ingress-use-waypoint: 'true'", "does not exist"),
        ("istio.io/use-waypoint: idle, istio.io/ingress-use-waypoint: 'true'", "no healthy endpoint of"),
    ] {
        let _idle = mesh.objects("idle", IDLE)?;
        let _service = mesh.instead("objects-fronted.yaml", &service(labels))?;
        let mark = mesh.proxy("gw").mark();
        let got = get("/refused")?;
        ensure!(got.status == 503 && got.header("x-culvert-reason") == Some("no_waypoint"), "{labels}: {got:?}");
        wait::until_true("the gateway says why", || {
            let log = mesh.proxy("gw").log_since(mark);
            log.lines().any(|l| l.contains("/refused") && l.contains(what) && l.contains("UH"))
        })?;
        for why in why("/refused")? {
            ensure!(!why.allowed && why.reason() == Some("no_waypoint"), "{}", why.report);
        }
        let mark = mesh.proxy("gw").mark();
        ensure!(Client::who(&outside, (gateway, 9000).into()).is_err(), "{labels}");
        wait::until_true("of bytes too", || mesh.proxy("gw").log_since(mark).contains("no_waypoint"))?;
    }
    ensure!(by_waypoint(&get("/open")?), "and back");
    Ok(())
}

const BYTES: &str = r#"
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: { name: fronted-bytes, namespace: t }
spec:
  targetRefs: [ { kind: Service, group: "", name: fronted } ]
  rules:
  - from: [ { source: { principals: [ "cluster.local/ns/t/sa/gw" ] } } ]
    to: [ { operation: { ports: [ "92" ] } } ]
"#;

/// A waypoint without instances.
const IDLE: &str = "
apiVersion: gateway.networking.k8s.io/v1
kind: Gateway
metadata: { name: idle, namespace: t }
spec:
  gatewayClassName: istio-waypoint
  listeners: [ { name: mesh, port: 15008, protocol: HBONE } ]
status:
  addresses: [ { type: Hostname, value: idle.t.svc.cluster.local } ]
---
apiVersion: v1
kind: Service
metadata: { name: idle, namespace: t }
spec:
  selector: { app: idle }
  clusterIP: 10.96.0.28
  ports: [ { name: hbone, port: 15008, protocol: TCP } ]
";
