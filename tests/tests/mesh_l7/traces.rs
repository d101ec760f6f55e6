//! Traces: a request's span between its caller's and its endpoint's, told to a collector that is a service of the mesh; and the
//! spans of the connections around it, told by the agents.
use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use mesh_tests::agent::is_clean;
use mesh_tests::otlp::{Collector, Span};
use mesh_tests::program::Client;
use mesh_tests::wait;
use mesh_tests::web::Web;
use serde_json::Value;

use crate::bytes::{RAW, raw_service};
use crate::mesh::{MORE, Mesh, WEB};

const PORT: u16 = 4317;
const TRACE: &str = "0af7651916cd43dd8448eb211c80319c";
const CALLER: &str = "b7ad6b7169203331";

/// The collector's service, the provider, and who is traced how.
fn traced(share: &str, limit: &str) -> String {
    format!(
        r#"
apiVersion: v1
kind: Service
metadata: {{ name: otel, namespace: t }}
spec:
  selector: {{ app: web2 }}
  clusterIP: 10.96.0.41
  ports:
  - {{ name: grpc-otlp, port: 4317, targetPort: {PORT}, protocol: TCP }}
---
apiVersion: v1
kind: ConfigMap
metadata: {{ name: istio, namespace: istio-system }}
data:
  mesh: |
    accessLogFile: /dev/stdout
    defaultConfig: {{ tracing: {{ sampling: 0.01 }} }}
    defaultProviders: {{ tracing: [ otel ] }}
    extensionProviders:
    - name: otel
      opentelemetry: {{ service: otel.t.svc.cluster.local, port: 4317, grpc: {{ timeout: {limit} }} }}
---
apiVersion: telemetry.istio.io/v1
kind: Telemetry
metadata: {{ name: traces, namespace: t }}
spec:
  tracing:
  - randomSamplingPercentage: {share}
    customTags:
      environment: {{ literal: {{ value: test }} }}
      user: {{ header: {{ name: x-user-id, defaultValue: nobody }} }}
      kind: {{ formatter: {{ value: '%CEL(request.url_path.startsWith("/api/") ? "api" : "page")%' }} }}
      fails: {{ formatter: {{ value: "%CEL(request.headers['x-not-sent'])%" }} }}
      answered_as: {{ formatter: {{ value: "%RESP(content-type)%" }} }}
"#
    )
}
const ROUTE: &str = r"
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: { name: web, namespace: t }
spec:
  hosts: [ web ]
  http:
  - match: [ { uri: { prefix: /fail } } ]
    retries: { attempts: 2, retryOn: 5xx }
    route: [ { destination: { host: web, subset: v1 } } ]
  - match: [ { uri: { prefix: /mirrored } } ]
    mirror: { host: web, subset: v2 }
    route: [ { destination: { host: web, subset: v1 } } ]
  - route: [ { destination: { host: web, subset: v1 } } ]
";

fn url(path: &str) -> String {
    format!("http://{WEB}{path}")
}
/// `traceparent` as an endpoint saw it: trace, span, flags.
fn context(echo: &Value) -> anyhow::Result<(String, String, String)> {
    let header = echo["headers"]["traceparent"].as_str().with_context(|| format!("no traceparent: {echo}"))?;
    let fields: Vec<&str> = header.split('-').collect();
    ensure!(fields.len() == 4 && fields[0] == "00", "{header}");
    Ok((fields[1].to_owned(), fields[2].to_owned(), fields[3].to_owned()))
}
fn find(collector: &Collector, span: &str) -> anyhow::Result<Span> {
    wait::until("the span", wait::PATIENCE, || collector.spans().into_iter().find(|s| s.span == span))
}

pub(crate) fn a_request_is_a_span_between_its_caller_and_its_endpoint(mesh: &mut Mesh) -> anyhow::Result<()> {
    let collector = Collector::start(mesh.pod("web2"), PORT)?;
    let _objects = mesh.objects("traces", &format!("{}---{ROUTE}", traced("100", "5s")))?;

    // The caller's span is the parent, the endpoint's caller is the waypoint's span.
    let w3c = format!("traceparent: 00-{TRACE}-{CALLER}-01");
    let got = mesh.call(&["-H", &w3c, "-H", "tracestate: v=1", "-H", "x-user-id: ann", &url("/api/traced?a=b")])?;
    let echo = got.echo()?;
    let (trace, span, flags) = context(&echo)?;
    ensure!(trace == TRACE && span != CALLER && flags == "01" && echo["headers"]["tracestate"] == "v=1", "{echo}");
    let name = "web.t.svc.cluster.local:80/*";
    ensure!(got.header("x-envoy-decorator-operation") == Some(name), "{got:?}");
    let told = find(&collector, &span)?;
    ensure!(told.trace == TRACE && told.parent == CALLER && told.name == name && told.kind == 2, "{told:?}");
    ensure!(told.time.0 > 1_700_000_000_000_000_000 && told.time.1 > told.time.0, "{told:?}");
    ensure!(told.resource["service.name"] == "wp.t", "{told:?}");
    for (key, value) in [
        ("http.method", "GET"),
        ("http.status_code", "200"),
        ("http.url", &*format!("http://{WEB}/api/traced?a=b")),
        ("upstream_cluster", "inbound-vip|80|http/v1|web.t.svc.cluster.local"),
        ("response_flags", "-"),
        ("component", "proxy"),
        ("istio.source_workload", "client"),
        ("istio.destination_workload", "web1"),
        ("istio.namespace", "t"),
        ("istio.mesh_id", "test.local"),
        ("environment", "test"),
        ("user", "ann"),
        ("kind", "api"),
        ("answered_as", "application/json"),
        // An expression without a value costs its tag, not the request or the span.
        ("fails", ""),
    ] {
        ensure!(told.tag(key) == value, "{key}: {told:?}");
    }

    // B3 in both shapes.
    let single = format!("b3: {TRACE}-{CALLER}-1");
    let echo = mesh.call(&["-H", &single, &url("/b3")])?.echo()?;
    let (_, span, _) = context(&echo)?;
    ensure!(echo["headers"]["b3"] == format!("{TRACE}-{span}-1-{CALLER}"), "{echo}");
    ensure!(find(&collector, &span)?.parent == CALLER);
    let (id, parent) = (format!("x-b3-traceid: {TRACE}"), format!("x-b3-spanid: {CALLER}"));
    let echo = mesh.call(&["-H", &id, "-H", &parent, "-H", "x-b3-sampled: 1", &url("/b3")])?.echo()?;
    let (_, span, _) = context(&echo)?;
    let headers = &echo["headers"];
    ensure!(
        headers["x-b3-spanid"] == *span && headers["x-b3-parentspanid"] == CALLER && headers["x-b3-sampled"] == "1",
        "{echo}"
    );
    ensure!(find(&collector, &span)?.parent == CALLER);

    // A caller that is not told of is not told of here, and the endpoint hears that.
    let silent = format!("traceparent: 00-{TRACE}-{CALLER}-00");
    let echo = mesh.call(&["-H", &silent, &url("/silent")])?.echo()?;
    let (trace, not_told, flags) = context(&echo)?;
    ensure!(trace == TRACE && not_told != CALLER && flags == "00", "{echo}");

    // Attempts share the span; a copy has one of its own, not told of.
    let got = mesh.call(&[&url("/fail/1/traced")])?;
    ensure!(got.status == 200, "{got:?}");
    let attempts = mesh.web["web1"].seen("/fail/1/traced").iter().map(context).collect::<Result<BTreeSet<_>, _>>()?;
    ensure!(mesh.web["web1"].seen("/fail/1/traced").len() == 2 && attempts.len() == 1, "{attempts:?}");
    let echo = mesh.call(&[&url("/mirrored/traced")])?.echo()?;
    let (trace, span, flags) = context(&echo)?;
    let copy = wait::until("the copy", wait::PATIENCE, || mesh.web["web2"].seen("/mirrored/traced").pop())?;
    let (of_copy, other, unsampled) = context(&copy)?;
    ensure!(of_copy == trace && other != span && flags == "01" && unsampled == "00", "{echo} {copy}");

    // A trace that begins here is marked in the id of the request; a refusal is a span, too.
    let told = find(&collector, &span)?;
    ensure!(told.parent.is_empty() && told.tag("guid:x-request-id").as_bytes().get(14) == Some(&b'9'), "{told:?}");
    ensure!(mesh.call(&[&url("/status/503")])?.status == 503);
    let failed = wait::until("the failure", wait::PATIENCE, || {
        collector.spans().into_iter().find(|s| s.tag("http.status_code") == "503")
    })?;
    ensure!(failed.tag("error") == "true", "{failed:?}");
    ensure!(collector.spans().iter().all(|s| s.span != not_told && s.span != other));
    Ok(())
}

/// An authorizer, and policies that enforce nothing.
const ASKED: &str = r"
apiVersion: v1
kind: Service
metadata: { name: ext, namespace: t }
spec:
  selector: { version: v1 }
  clusterIP: 10.96.0.31
  ports:
  - { name: http, port: 8000, targetPort: 9092, protocol: TCP }
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: { name: custom, namespace: t }
spec:
  targetRefs: [ { kind: Service, group: '', name: web } ]
  action: CUSTOM
  provider: { name: ext }
  rules: [ { to: [ { operation: { paths: [ '/asked*' ] } } ] } ]
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: { name: dry-deny, namespace: t, annotations: { istio.io/dry-run: 'true' } }
spec:
  targetRefs: [ { kind: Service, group: '', name: web } ]
  action: DENY
  rules: [ { to: [ { operation: { paths: [ /other ] } } ] }, { to: [ { operation: { methods: [ GET ] } } ] } ]
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: { name: dry-allow, namespace: t, annotations: { istio.io/dry-run: 'true' } }
spec:
  targetRefs: [ { kind: Service, group: '', name: web } ]
  rules: [ { to: [ { operation: { methods: [ PUT ] } } ] } ]
";

/// What becomes of a request before it is carried: the call to an authorizer is a span under the request's, and what dry-run
/// policies say are tags of it, in Istio's words.
pub(crate) fn authorizers_and_dry_runs_are_told(mesh: &mut Mesh) -> anyhow::Result<()> {
    let collector = Collector::start(mesh.pod("web2"), PORT)?;
    // Any server that answers 200 agrees.
    let authorizer = Web::start(mesh.pod("web1"), MORE)?;
    let provider = "    extensionProviders:\n    - { name: ext, envoyExtAuthzHttp: { service: ext.t.svc.cluster.local, port: 8000, timeout: 2s } }\n";
    let traced = traced("100", "5s").replace("    extensionProviders:\n", provider);
    let _objects = mesh.objects("traces", &format!("{traced}---{ROUTE}---{ASKED}"))?;
    let with = |flags: &str| format!("traceparent: 00-{TRACE}-{CALLER}-{flags}");

    let counted = || -> anyhow::Result<[u64; 2]> {
        let page = mesh.proxy("wp").metrics()?;
        Ok(["deny", "allow"].map(|action| {
            let labels = [("authz_dry_run_action", action), ("authz_dry_run_result", "denied")];
            page.sum("envoy_http_inbound_rbac", &labels) as u64
        }))
    };
    let before = counted()?;
    let echo = mesh.call(&["-H", &with("01"), &url("/asked/a")])?.echo()?;
    let (_, span, _) = context(&echo)?;
    let told = find(&collector, &span)?;
    let asked = authorizer.seen("/asked/a").pop().context("nobody was asked")?;
    let (trace, of_call, flags) = context(&asked)?;
    ensure!(trace == TRACE && of_call != span && of_call != CALLER && flags == "01", "{asked}");
    let call = find(&collector, &of_call)?;
    let cluster = "outbound|8000||ext.t.svc.cluster.local";
    ensure!(call.trace == TRACE && call.parent == span && call.kind == 3, "{call:?}");
    ensure!(call.name == format!("async {cluster} egress") && call.tag("upstream_cluster") == cluster, "{call:?}");
    ensure!(call.tag("http.status_code") == "200" && call.tag("error").is_empty(), "{call:?}");
    ensure!(told.time.0 <= call.time.0 && call.time.1 <= told.time.1, "{told:?} {call:?}");

    let tag = |action: &str, what: &str| told.tag(&format!("istio.authorization.dry_run.{action}_policy.{what}"));
    ensure!(tag("deny", "name") == "ns[t]-policy[dry-deny]-rule[1]" && tag("deny", "result") == "denied", "{told:?}");
    ensure!(tag("allow", "name").is_empty() && tag("allow", "result") == "denied", "{told:?}");
    ensure!(counted()? == before.map(|count| count + 1), "{before:?}, {:?} now", counted()?);

    // One that nobody answers is a failed span; one of a request that is not told of is none.
    authorizer.die();
    drop(authorizer);
    wait::until_true("the authorizer gone", || mesh.call(&[&url("/asked/b")]).is_ok_and(|got| got.status == 403))?;
    let failed = wait::until("the failed call", wait::PATIENCE, || {
        collector.spans().into_iter().find(|s| s.name.starts_with("async ") && s.tag("error") == "true")
    })?;
    ensure!(failed.tag("http.status_code").is_empty(), "{failed:?}");
    let authorizer = Web::start(mesh.pod("web1"), MORE)?;
    let got = wait::until("the authorizer again", wait::PATIENCE, || {
        mesh.call(&["-H", &with("00"), &url("/asked/c")]).ok().filter(|got| got.status == 200)
    })?;
    let (_, silent, _) = context(&got.echo()?)?;
    let asked = authorizer.seen("/asked/c").pop().context("nobody was asked")?;
    let (_, of_call, flags) = context(&asked)?;
    ensure!(flags == "00", "{asked}");
    let last = context(&mesh.call(&["-H", &with("01"), &url("/asked/d")])?.echo()?)?.1;
    find(&collector, &last)?;
    ensure!(collector.spans().iter().all(|s| s.span != of_call && s.span != silent), "told of all the same");
    Ok(())
}

/// Requests of the count of shares.
const MANY: usize = 2000;

pub(crate) fn a_share_of_requests_is_told(mesh: &mut Mesh) -> anyhow::Result<()> {
    let collector = Collector::start(mesh.pod("web2"), PORT)?;
    // Of 2000: 200 with a deviation of 13.4, 20 with one of 4.4; both bounds are at least 4 deviations away.
    for (share, path, bounds) in [("10", "/ten", 140..=260), ("1", "/one", 4..=45)] {
        let _objects = mesh.objects("traces", &format!("{}---{ROUTE}", traced(share, "5s")))?;
        let before = collector.len();
        mesh.call(&["--max-time", "60", "-o", "/dev/null", &url(&format!("{path}?n=[1-{MANY}]"))]).ok();
        let seen = mesh.web["web1"].seen(path).iter().map(context).collect::<Result<Vec<_>, _>>()?;
        let sampled: BTreeSet<&str> = seen.iter().filter(|(_, _, flags)| flags == "01").map(|(_, span, _)| &**span).collect();
        ensure!(seen.len() == MANY && bounds.contains(&sampled.len()), "{} of {} at {share} %", sampled.len(), seen.len());
        // What endpoints were told is told of, neither more nor less.
        wait::until_true("all spans", || collector.len() - before >= sampled.len())?;
        let spans = collector.spans();
        let told: BTreeSet<&str> = spans[before..].iter().map(|s| &*s.span).collect();
        ensure!(told == sampled, "{} told, {} sampled", told.len(), sampled.len());
    }
    Ok(())
}

pub(crate) fn a_collector_that_fails_costs_spans_only(mesh: &mut Mesh) -> anyhow::Result<()> {
    let lost = |mesh: &Mesh| -> anyhow::Result<f64> {
        let page = mesh.proxy("wp").metrics()?;
        let of = |outcome| page.sum("culvert_trace_spans_total", &[("outcome", outcome)]);
        Ok(of("failed") + of("queue_full"))
    };
    let _objects = mesh.objects("traces", &format!("{}---{ROUTE}", traced("100", "300ms")))?;
    for silent in [false, true] {
        let collector = silent.then(|| Collector::start(mesh.pod("web2"), PORT)).transpose()?;
        if let Some(collector) = &collector {
            collector.silent(true);
        }
        let before = lost(mesh)?;
        let begun = Instant::now();
        for _ in 0..20 {
            ensure!(mesh.call(&[&url("/lost")])?.status == 200);
        }
        ensure!(begun.elapsed() < Duration::from_secs(10), "{:?}", begun.elapsed());
        wait::until_true("spans to be counted as lost", || lost(mesh).is_ok_and(|now| now > before))?;
    }
    // It comes back, and so do spans.
    let collector = Collector::start(mesh.pod("web2"), PORT)?;
    wait::until("a span", Duration::from_secs(40), || {
        mesh.call(&[&url("/back")]).ok()?;
        collector.spans().into_iter().find(|s| s.tag("http.url").ends_with("/back"))
    })?;
    Ok(())
}

/// Another agent with these variables takes the pods of a node over.
fn replace(mesh: &mut Mesh, node: &'static str, env: &[(&str, &str)]) -> anyhow::Result<()> {
    let mark = mesh.proxy(node).mark();
    let next = mesh.start_with(node, env)?;
    wait::until_true("the next agent to take over", || next.log_since(mark).contains("took over from the agent"))?;
    next.wait_ready(Duration::from_secs(40))?;
    let status = mesh.proxy(node).terminate(Duration::from_secs(30))?;
    ensure!(is_clean(status), "{status}");
    mesh.proxies.insert(node, next);
    Ok(())
}
/// The one span with these tags, below `parent`.
fn below(collector: &Collector, parent: &str, tags: &[(&str, &str)]) -> anyhow::Result<Span> {
    let is_it = |s: &Span| s.parent == parent && tags.iter().all(|(key, value)| s.tag(key) == *value);
    wait::until(&format!("a span below {parent:?} with {tags:?}"), wait::PATIENCE, || {
        collector.spans().into_iter().find(|s| is_it(s))
    })
    .with_context(|| format!("{:#?}", collector.spans()))
}

/// Agents tell of connections. The span of the client's connection is above those of the requests in it, where the waypoint
/// tells of them, and those are above the connection that was made for them; what is no HTTP goes straight from one agent's span
/// to the other's.
pub(crate) fn connections_are_spans_around_their_requests(mesh: &mut Mesh) -> anyhow::Result<()> {
    let outside = mesh.topology.host("outside");
    let agents = Collector::start(outside, PORT)?;
    let to = format!("grpc://{}", outside.at(PORT));
    for node in ["node-b", "node-a"] {
        replace(mesh, node, &[("CULVERT_TRACING_COLLECTOR", &to), ("CULVERT_TRACING_SAMPLING", "100")])?;
    }
    straight_from_agent_to_agent(mesh, &agents)?;
    let requests = through_the_waypoint(mesh, &agents)?;

    // Without a collector nobody is told of anything.
    for node in ["node-b", "node-a"] {
        replace(mesh, node, &[])?;
    }
    // The connection that the waypoint kept has ended with its agent: it was made for a request.
    wait::until("a connection made for a request", wait::PATIENCE, || {
        let made_for = |s: &Span| requests.iter().any(|r| (&r.span, &r.trace) == (&s.parent, &s.trace));
        agents.spans().into_iter().find(|s| s.tag("reporter") == "destination" && made_for(s))
    })?;
    let before = agents.len();
    ensure!(mesh.call(&[&url("/untold")])?.status == 200);
    ensure!(agents.len() == before, "{:?}", agents.spans());
    Ok(())
}

fn straight_from_agent_to_agent(mesh: &Mesh, agents: &Collector) -> anyhow::Result<()> {
    let mark = mesh.proxy("node-a").mark();
    ensure!(mesh.call(&["http://10.96.0.26/straight"])?.status == 200);
    let far = [("istio.destination_workload", "far"), ("istio.source_workload", "client")];
    let client = below(agents, "", &far)?;
    ensure!(client.name == "egress far.u.svc.cluster.local" && client.kind == 3, "{client:?}");
    ensure!(client.resource["service.name"] == "ztunnel.istio-system", "{client:?}");
    for (key, value) in [
        ("reporter", "source"),
        ("network.transport", "tcp"),
        ("istio.source_principal", "spiffe://test.local/ns/t/sa/client"),
        ("istio.destination_principal", "spiffe://test.local/ns/u/sa/far"),
        ("istio.destination_service", "far.u.svc.cluster.local"),
        ("connection_security_policy", "mutual_tls"),
        ("error", ""),
    ] {
        ensure!(client.tag(key) == value, "{key}: {client:?}");
    }
    ensure!(client.tag("bytes_sent").parse::<u64>().is_ok_and(|sent| sent > 0), "{client:?}");
    let server = below(agents, &client.span, &far)?;
    ensure!(server.trace == client.trace && server.kind == 2 && server.tag("reporter") == "destination", "{server:?}");
    ensure!(server.tag("bytes_sent") == client.tag("bytes_recv"), "{client:?} {server:?}");
    mesh.proxy("node-a").wait_access("the line of the connection", mark, |line| {
        line["trace_id"] == *client.trace && line["span_id"] == *client.span && line["direction"] == "outbound"
    })?;

    // A refusal is a span with its reason.
    let _refused = Client::who(mesh.pod("client"), SocketAddr::from(([10, 96, 0, 26], 99)));
    let refused = below(agents, "", &[("error.type", "no_such_port")])?;
    ensure!(refused.tag("error") == "true" && refused.tag("istio.source_workload") == "client", "{refused:?}");
    Ok(())
}

fn through_the_waypoint(mesh: &Mesh, agents: &Collector) -> anyhow::Result<Vec<Span>> {
    // By itself the waypoint tells of no request.
    let requests = Collector::start(mesh.pod("web2"), PORT)?;
    let _objects = mesh.objects("traces", &format!("{}---{ROUTE}", traced("0", "5s")))?;
    let mark = agents.len();
    let echo = mesh.call(&[&url("/carried")])?.echo()?;
    let (trace, span, flags) = context(&echo)?;
    ensure!(flags == "01", "{echo}");
    let request = find(&requests, &span)?;
    let of_waypoint = [("reporter", "source"), ("istio.destination_service", "web.t.svc.cluster.local")];
    let client = wait::until("the client's connection", wait::PATIENCE, || {
        agents.spans().into_iter().skip(mark).find(|s| s.span == request.parent)
    })?;
    ensure!(client.trace == trace && request.trace == trace && client.parent.is_empty(), "{client:?} {request:?}");
    ensure!(of_waypoint.iter().all(|(key, value)| client.tag(key) == *value), "{client:?}");
    // Its own words count more than those of what carries it.
    let said = format!("traceparent: 00-{TRACE}-{CALLER}-01");
    let (_, span, _) = context(&mesh.call(&["-H", &said, &url("/said")])?.echo()?)?;
    ensure!(find(&requests, &span)?.parent == CALLER);
    let silent = format!("traceparent: 00-{TRACE}-{CALLER}-00");
    ensure!(context(&mesh.call(&["-H", &silent, &url("/silent")])?.echo()?)?.2 == "00");

    // Bytes: the waypoint has no span of its own.
    let _service = raw_service(mesh)?;
    let (mut stream, _) = Client::who(mesh.pod("client"), RAW.parse()?)?;
    stream.ping("once")?;
    drop(stream);
    let client = wait::until("the client's connection", wait::PATIENCE, || {
        agents.spans().into_iter().skip(mark).find(|s| s.parent.is_empty() && s.tag("hbone.authority").ends_with(":91"))
    })?;
    let server = below(agents, &client.span, &[("reporter", "destination")])?;
    ensure!(server.trace == client.trace && server.tag("istio.source_principal").ends_with("/sa/wp"), "{server:?}");
    Ok(requests.spans())
}
