use super::*;

fn strings(list: &[&str]) -> Vec<String> {
    list.iter().map(|text| (*text).to_owned()).collect()
}
fn environment(list: &[(&str, &str)]) -> BTreeMap<String, String> {
    list.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
}
const PODINFO: &str = "app=\"x\"\ngateway.networking.k8s.io/gateway-name=\"wp\"\nistio.io/dataplane-mode=\"none\"";

/// What istiod's template makes (files/waypoint.yaml of 1.31).
fn deployment() -> (Vec<String>, BTreeMap<String, String>) {
    let arguments = strings(&[
        "waypoint",
        "--domain",
        "shop.svc.cluster.test",
        "--serviceCluster",
        "wp.shop",
        "--proxyLogLevel",
        "warning",
        "--proxyComponentLogLevel",
        "misc:error",
        "--log_output_level",
        "default:info",
        "--log_as_json",
    ]);
    let environment = environment(&[
        ("ISTIO_META_SERVICE_ACCOUNT", "wp"),
        ("ISTIO_META_NODE_NAME", "node-a"),
        ("PILOT_CERT_PROVIDER", "istiod"),
        ("CA_ADDR", "istiod-canary.istio-system.svc:15012"),
        ("POD_NAME", "wp-1"),
        ("POD_NAMESPACE", "shop"),
        ("INSTANCE_IP", "10.0.0.9"),
        ("SERVICE_ACCOUNT", "wp"),
        ("HOST_IP", "192.168.0.1"),
        ("ISTIO_CPU_LIMIT", "2"),
        (
            "PROXY_CONFIG",
            r#"{"discoveryAddress":"istiod-canary.istio-system.svc:15012","terminationDrainDuration":"10s","tracing":{},
            "proxyMetadata":{"A":"b"},"gatewayTopology":{"numTrustedProxies":2},"statusPort":15020}"#,
        ),
        ("ISTIO_META_CLUSTER_ID", "c1"),
        ("ISTIO_META_INTERCEPTION_MODE", "REDIRECT"),
        ("ISTIO_META_MESH_ID", "cluster.test"),
        ("TRUST_DOMAIN", "cluster.test"),
    ]);
    (arguments, environment)
}

#[test]
fn a_deployment_of_istiod_is_understood() {
    let (arguments, environment) = deployment();
    let Translated { flags, notes } = translate(&arguments, &environment, Some(PODINFO)).unwrap().unwrap();
    let istiod = "istiod-canary.istio-system.svc:15012";
    let wanted = [
        "--cluster-domain cluster.test",
        "--log-format json",
        "--num-trusted-proxies 2",
        "--stats-addr [::]:15020",
        "--termination-deadline 10s",
        "--root-namespace istio-system",
        "--kubernetes",
        &format!("--xds-address {istiod}"),
        &format!("--ca-address {istiod}"),
        "--node node-a",
        "--cluster-id c1",
        "--worker-threads 2",
        "--gateway wp",
        "--log-levels info",
    ];
    assert_eq!(flags.join(" "), wanted.join(" "));
    assert_eq!((namespace("istiod.mesh.svc:15012"), namespace("10.0.0.1:15012")), (Some("mesh"), None));
    let about: Vec<&str> = notes.iter().filter_map(|note| note.split_once(": ").map(|(what, _)| what)).collect();
    assert_eq!(about, ["--serviceCluster", "--proxyComponentLogLevel", "PROXY_CONFIG tracing"]);
}

#[test]
fn a_gateway_between_networks_is_known_by_its_controller() {
    let (arguments, environment) = deployment();
    let between = format!("{PODINFO}\ngateway.istio.io/managed=\"istio.io-eastwest-controller\"\n");
    let flags = |labels| translate(&arguments, &environment, Some(labels)).unwrap().unwrap().flags;
    assert!(flags(&between).iter().any(|flag| flag == "--east-west"));
    assert!(!flags(PODINFO).iter().any(|flag| flag == "--east-west"));
}

#[test]
fn our_own_variables_win_and_nothing_else_is_touched() {
    let (arguments, mut environment) = deployment();
    for ours in ["XDS_ADDRESS", "CA_ADDRESS", "CULVERT_WORKER_THREADS", "RUST_LOG", "GATEWAY", "CLUSTER_DOMAIN"] {
        environment.insert(ours.into(), "ours".into());
    }
    let flags = translate(&arguments, &environment, None).unwrap().unwrap().flags.join(" ");
    for flag in ["--xds-address", "--ca-address", "--worker-threads", "--log-levels", "--gateway", "--cluster-domain"] {
        assert!(!flags.contains(flag), "{flags}");
    }
    assert_eq!(translate(&strings(&["--mesh-dir", "x"]), &environment, None), Ok(None), "our own command line");
    assert_eq!(translate(&[], &environment, None), Ok(None));
}

#[test]
fn what_cannot_be_done_ends_the_start_and_says_why() {
    let (arguments, environment) = deployment();
    let with = |more: &[&str]| [arguments.clone(), strings(more)].concat();
    let cases: [(&[&str], &str); 7] = [
        (&["--stsPort", "15463"], "--stsPort: there is no token service"),
        (&["--templateFile=/x"], "--templateFile=/x: there is no bootstrap"),
        (&["--unheard-of", "x"], "--unheard-of: it is not known here"),
        (&["--domain"], "--domain: its value is missing"),
        (&["--domain", "cluster.local"], "--domain: it is `<namespace>.svc."),
        (&["--proxyLogLevel", "loud"], "--proxyLogLevel: it is no level"),
        (&["stray"], "stray: it is not an argument"),
    ];
    for (more, why) in cases {
        let error = translate(&with(more), &environment, Some(PODINFO)).unwrap_err().to_string();
        assert!(error.starts_with(why), "{error}");
    }
    assert!(translate(&with(&["--stsPort", "0"]), &environment, Some(PODINFO)).is_ok());
    let variables = [
        ("CA_PROVIDER", "GoogleCAS", "CA_PROVIDER: only istiod's"),
        ("FILE_MOUNTED_CERTS", "true", "FILE_MOUNTED_CERTS: "),
        ("PROXY_CONFIG", "a: b", "PROXY_CONFIG: it is not the JSON"),
        ("PROXY_CONFIG", r#"{"privateKeyProvider":{}}"#, "PROXY_CONFIG privateKeyProvider: "),
        ("PROXY_CONFIG", r#"{"gatewayTopology":{"proxyProtocol":{}}}"#, "PROXY_CONFIG gatewayTopology.proxyProtocol: "),
    ];
    for (name, value, why) in variables {
        let mut environment = environment.clone();
        environment.insert(name.into(), value.into());
        let error = translate(&arguments, &environment, Some(PODINFO)).unwrap_err().to_string();
        assert!(error.starts_with(why), "{error}");
    }
    let error = translate(&arguments, &environment, Some("app=\"x\"")).unwrap_err().to_string();
    assert!(error.starts_with("./etc/istio/pod/labels: "), "{error}");
}

#[test]
fn the_more_verbose_level_holds() {
    let (_, environment) = deployment();
    let levels = |arguments: &[&str]| {
        let out = translate(&strings(arguments), &environment, Some(PODINFO)).unwrap().unwrap();
        (out.flags.iter().skip_while(|flag| *flag != "--log-levels").nth(1).cloned(), out.notes)
    };
    assert_eq!(levels(&["router", "--proxyLogLevel=debug", "--log_output_level=default:info"]).0.as_deref(), Some("debug"));
    assert_eq!(levels(&["router", "--proxyLogLevel=warning"]).0.as_deref(), Some("warn"));
    assert_eq!(levels(&["router"]).0, None);
    let (level, notes) = levels(&["waypoint", "--log_output_level", "dns:debug,all:error"]);
    assert_eq!(level.as_deref(), Some("error"));
    assert!(notes.iter().any(|note| note.starts_with("dns:debug: ")), "{notes:?}");
}
