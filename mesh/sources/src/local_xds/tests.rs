use super::*;

const TEXT: &str = r#"
workloads:
- uid: cluster1//v1/Pod/default/local
  name: local
  namespace: default
  serviceAccount: default
  workloadIps: ["127.0.0.1"]
  protocol: HBONE
  node: local
  waypoint: {destination: "default/waypoint.default.svc.cluster.local", hboneMtlsPort: 15008}
  networkGateway: {destination: "remote/1.2.3.4", hboneMtlsPort: 15443}
  applicationTunnel: {protocol: PROXY, port: 15088}
  authorizationPolicies: ["default/sel-policy"]
  services: {"default/example.com": {80: 8080}}
policies:
- {name: p, namespace: default, scope: Namespace, action: Allow, dryRun: false,
   rules: [[[{notDestinationPorts: [9999], sourceIps: ["10.0.0.0/8"], principals: [!Prefix "cluster.local/ns/a/", {Exact: x}, Presence]}]]]}
services:
- name: local
  namespace: default
  hostname: example.com
  vips: ["/127.10.0.1"]
  cidrVips: [{network: "", cidr: 10.9.0.0/24}]
  ports: {80: 8080, 81: 0}
  subjectAltNames: [spiffe://cluster.local/ns/default/sa/local]
  canonical: true
  loadBalancer: {routingPreferences: [Network, Region, Zone], mode: Failover, healthPolicy: OnlyHealthy}
  weightedWaypoints: [{destination: {destination: "default/wp", hboneMtlsPort: 15008}, weight: 90}]
"#;

fn read(text: &str) -> Parsed {
    parse(text, &"local.yaml".into(), &Viewpoint::default()).unwrap()
}

#[test]
fn the_documented_example_is_read() {
    let p = read(TEXT);
    assert_eq!(p.problems, []);
    let w = &p.workloads["cluster1//v1/Pod/default/local"];
    assert_eq!((w.protocol, w.target_port(&ServiceKey::new("default", "example.com"), 80)), (Protocol::Hbone, Some(8080)));
    assert_eq!(w.application_tunnel, Some(ApplicationTunnel::Proxy(Some(15088))));
    assert_eq!(
        w.network_gateway.as_ref().unwrap().destination,
        GatewayDestination::Address("remote".into(), "1.2.3.4".parse().unwrap())
    );
    let PolicyBody::Rules { rules, .. } = &p.policies[&PolicyKey::new("default", "p")].body else { panic!() };
    let m = &rules[0].clauses[0].matches[0];
    assert_eq!(
        m.principals.any(),
        [TextMatch::Prefix("cluster.local/ns/a/".into()), TextMatch::Exact("x".into()), TextMatch::Presence]
    );
    assert_eq!((m.destination_ports.none(), m.source_ips.any().len()), ([9999].as_slice(), 1));
    let s = &p.services[&ServiceKey::new("default", "example.com")];
    assert_eq!((s.ports.len(), s.port(81).unwrap().target, s.waypoints[0].weight, s.lb.scopes.len()), (2, 0, 90, 3));
    assert_eq!(p.changes_since(&Parsed::default()).len(), 3);
    assert_eq!(read(TEXT).changes_since(&p).len(), 0);
    assert_eq!(Parsed::default().changes_since(&p).len(), 3);
}

#[test]
fn mistakes_are_refused_alone_and_policies_deny() {
    let p = read(
        "workloads:\n- {uid: a, namespace: n, workloadIPs: []}\n- {uid: b, namespace: n}\npolicies:\n- name: x\n  namespace: n\n  scope: Namespace\n  action: Alow\n- {name: y}\n",
    );
    assert_eq!(p.workloads.keys().map(|k| &**k).collect::<Vec<_>>(), ["b"]);
    assert_eq!((p.problems[0].origin.line, &*p.problems[0].field), (2, "workloads[0].workloadIPs"));
    assert!(p.problems[0].message.contains("did you mean `workloadIps`"), "{}", p.problems[0]);
    let x = &p.policies[&PolicyKey::new("n", "x")];
    assert!(matches!(x.body, PolicyBody::Unusable { .. }) && x.scope == Scope::Namespace);
    assert_eq!((p.problems[1].origin.line, &*p.problems[1].field), (8, "policies[0].action"));
    let y = p.policies.values().find(|p| &*p.key.name == "y").unwrap();
    assert_eq!(y.scope, Scope::Global, "its namespace is not known");
    assert!(parse("workload: []", &"f".into(), &Viewpoint::default()).is_err());
    assert!(parse("policies: [", &"f".into(), &Viewpoint::default()).is_err());
}
