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
  ingressUseWaypoint: true
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
    assert!(s.is_fronted());
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

#[test]
fn policies_that_contradict_each_other_deny() {
    let two = |a: &str, b: &str| {
        let p = read(&format!("policies:\n- {{name: x, namespace: n, {a}}}\n- {{name: x, namespace: n, {b}}}\n"));
        let policy = Arc::clone(&p.policies[&PolicyKey::new("n", "x")]);
        (
            policy.scope,
            matches!(policy.body, PolicyBody::Unusable { .. }),
            p.problems.iter().map(|p| p.origin.line).collect::<Vec<_>>(),
        )
    };
    let (allow, deny) = ("scope: Namespace, action: Allow, rules: [[]]", "scope: Namespace, action: Deny, rules: [[]]");
    assert_eq!(two(allow, deny), (Scope::Namespace, true, vec![2, 3]));
    assert_eq!(two(allow, "scope: WorkloadSelector, action: Allow, rules: [[]]"), (Scope::Namespace, true, vec![2, 3]));
    assert_eq!(two("scope: WorkloadSelector, action: Deny", "scope: Global, action: Deny"), (Scope::Global, true, vec![2, 3]));
    assert_eq!(two(allow, "scope: Namespace, action: Denny"), (Scope::Namespace, true, vec![3, 2, 3]));
    assert_eq!(two(allow, allow), (Scope::Namespace, false, vec![3]));
    let dry = |p: &str| format!("{p}, dryRun: true");
    assert_eq!(two(&dry(allow), &dry(deny)), (Scope::Namespace, false, vec![3]));
    assert_eq!(two(&dry(allow), deny), (Scope::Namespace, true, vec![2, 3]));
}

#[test]
fn a_waypoint_that_cannot_be_used_refuses_and_keeps_the_service() {
    let one = |waypoints: &str| {
        let p = read(&format!("services:\n- {{name: s, namespace: n, hostname: h, vips: [/10.0.0.1], {waypoints}}}\n"));
        let s = Arc::clone(&p.services[&ServiceKey::new("n", "h")]);
        (s.waypoint_error.as_deref().unwrap_or_default().to_owned(), s.waypoints.len(), p.problems)
    };
    let to = "destination: {destination: n/wp}";
    for (text, why, field) in [
        (
            format!("weightedWaypoints: [{{{to}, weight: 1}}, {{{to}}}]"),
            "has a weight",
            "services[0].weightedWaypoints[1].weight",
        ),
        (
            format!("weightedWaypoints: [{{{to}, weight: 0}}, {{{to}, weight: 0}}]"),
            "sum to zero",
            "services[0].weightedWaypoints",
        ),
        (format!("weightedWaypoints: [{{{to}, weight: -1}}]"), "whole number", "services[0].weightedWaypoints[0].weight"),
        ("waypoint: {destination: oops}".into(), "neither", "services[0].waypoint.destination"),
    ] {
        let (error, usable, problems) = one(&text);
        assert!(error.contains(why) && usable == 0, "{text}: {error}");
        assert_eq!((problems.len(), &*problems[0].field, problems[0].origin.line), (1, field, 2), "{text}");
    }
    let (error, usable, problems) = one(&format!("weightedWaypoints: [{{{to}, weight: 1}}, {{{to}, weight: 0}}]"));
    assert_eq!((&*error, usable, problems), ("", 2, vec![]));
    assert_eq!(one("weightedWaypoints: []").1, 0);
}

#[test]
fn a_file_beyond_the_limit_is_refused_not_cut() {
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_len(crate::files::MAX_FILE + 1).unwrap();
    let e = read_text(file.path()).unwrap_err();
    assert!(e.to_string().contains("are more than"), "{e}");
}
