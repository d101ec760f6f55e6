//! The chart, the plain YAML it renders, and what both promise: every flag and variable is one the programs know, the rights
//! are those the programs ask for, the numbers of an upgrade fit each other.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing, reason = "a suite")]

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::process::Command;

use mesh_sources::kubernetes::{Access, Reach, Retry, Scope, Watches};
use mesh_sources::{Origin, Viewpoint, translate};
use mesh_tests::agent::{find_program, workspace_dir};
use mesh_tests::chart;
use mesh_tests::kube_api::{KubeApi, documents};
use mesh_tests::{skip, wait};
use serde_json::{Value, json};

const NAMESPACE: &str = "istio-system";
const PROFILES: [&str; 2] = ["development", "production"];

fn manifests() -> PathBuf {
    workspace_dir().join("manifests")
}
fn rendered(profile: &str) -> String {
    let chart = manifests().join("chart");
    chart::render(&chart, &chart.join(format!("values-{profile}.yaml")), NAMESPACE).unwrap()
}
fn objects(profile: &str) -> Vec<Value> {
    documents(&rendered(profile)).unwrap()
}
fn find<'o>(objects: &'o [Value], kind: &str, name: &str) -> &'o Value {
    let found = objects.iter().find(|o| o["kind"] == kind && o["metadata"]["name"] == name);
    found.unwrap_or_else(|| panic!("no {kind} {name}"))
}
/// Pod templates, with the name of their program.
fn pods(objects: &[Value]) -> Vec<(&'static str, &Value)> {
    let of = |kind: &str, program| {
        let all: Vec<_> =
            objects.iter().filter(|o| o["kind"] == kind).map(|o| (program, &o["spec"]["template"]["spec"])).collect();
        assert!(!all.is_empty(), "no {kind}");
        all
    };
    [of("DaemonSet", "ztunnel"), of("Deployment", "waypoint")].concat()
}

/// `CULVERT_UPDATE=1 cargo test -p mesh-tests --test process_manifests` writes them anew.
#[test]
fn the_plain_files_are_what_the_chart_renders() {
    for profile in PROFILES {
        let path = manifests().join(format!("plain/{profile}.yaml"));
        let head = format!(
            "# helm template culvert manifests/chart -n {NAMESPACE} -f manifests/chart/values-{profile}.yaml\n\
             apiVersion: v1\nkind: Namespace\nmetadata:\n  name: {NAMESPACE}\n  labels:\n    pod-security.kubernetes.io/enforce: privileged\n"
        );
        let text = format!("{head}{}", rendered(profile));
        if std::env::var_os("CULVERT_UPDATE").is_some() {
            std::fs::write(&path, &text).unwrap();
        }
        assert_eq!(std::fs::read_to_string(&path).unwrap_or_default(), text, "{profile}: see this test for how to update it");
    }
}

/// `kubectl apply` makes one object after the other.
#[test]
fn namespaces_come_before_what_is_in_them() {
    for profile in PROFILES {
        let plain = std::fs::read_to_string(manifests().join(format!("plain/{profile}.yaml"))).unwrap();
        let mut there = BTreeSet::new();
        for object in documents(&plain).unwrap() {
            if object["kind"] == "Namespace" {
                there.insert(object["metadata"]["name"].to_string());
            } else if !object["metadata"]["namespace"].is_null() {
                assert!(there.contains(&object["metadata"]["namespace"].to_string()), "{}", object["metadata"]);
            }
        }
    }
}

#[test]
fn helm_renders_the_same() {
    if let Some(why) = skip::command_missing("helm") {
        return skip::skipped("process_manifests::helm_renders_the_same", &why);
    }
    for profile in PROFILES {
        let chart = manifests().join("chart");
        let values = chart.join(format!("values-{profile}.yaml"));
        let out =
            Command::new("helm").args(["template", "culvert", "-n", NAMESPACE, "-f"]).arg(values).arg(&chart).output().unwrap();
        assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
        let order = |mut objects: Vec<Value>| {
            objects.sort_by_key(|o| format!("{} {} {}", o["kind"], o["metadata"]["namespace"], o["metadata"]["name"]));
            objects
        };
        let theirs = order(documents(&String::from_utf8(out.stdout).unwrap()).unwrap());
        assert_eq!(theirs, order(objects(profile)), "{profile}");
    }
}

/// What is written down for operators is what is given.
#[test]
fn the_rights_of_the_agent_are_told() {
    let readme = std::fs::read_to_string(manifests().join("README.md")).unwrap();
    let told: BTreeSet<&str> = readme.lines().filter_map(|line| line.strip_prefix("| `")?.split('`').next()).collect();
    for profile in PROFILES {
        let all = objects(profile);
        let container = &find(&all, "DaemonSet", "culvert-agent")["spec"]["template"]["spec"]["containers"][0];
        let capabilities = &container["securityContext"]["capabilities"];
        let added: BTreeSet<&str> = capabilities["add"].as_array().unwrap().iter().map(|c| c.as_str().unwrap()).collect();
        assert_eq!(added, told);
        assert_eq!(capabilities["drop"], json!(["ALL"]));
    }
}

/// With another authority nobody has the built-in one's key, and everybody has what that one asks for.
#[test]
fn certificates_may_come_from_others() {
    for (authority, agent, waypoint) in
        [(chart::ISTIO_CA, "istio-token", "istio-token"), (chart::SPIRE, "/run/spire/admin", "csi.spiffe.io")]
    {
        let all = documents(&chart::render_with(&manifests().join("chart"), authority, NAMESPACE).unwrap()).unwrap();
        for (program, pod) in pods(&all) {
            check_names(program, pod);
            let text = pod.to_string();
            assert!(!text.contains("culvert-ca"), "{text}");
            // These are the chart's own values otherwise, and an empty name is no name of a trust domain.
            assert!(!text.contains("CULVERT_TRUST_DOMAIN_ALIASES"), "{text}");
            assert!(text.contains(if program == "ztunnel" { agent } else { waypoint }), "{text}");
        }
    }
}

#[test]
fn every_flag_and_variable_is_known_to_the_programs() {
    for profile in PROFILES {
        for (program, pod) in pods(&objects(profile)) {
            check_names(program, pod);
        }
    }
}

fn check_names(program: &str, pod: &Value) {
    let out = Command::new(find_program(program).unwrap()).args(["proxy", "--help"]).output().unwrap();
    let help = String::from_utf8(out.stdout).unwrap();
    let container = &pod["containers"][0];
    assert_eq!(container["command"][0], format!("/usr/local/bin/{program}"));
    let args: Vec<&str> = container["args"].as_array().unwrap().iter().map(|a| a.as_str().unwrap()).collect();
    assert_eq!(args[0], "proxy");
    for flag in &args[1..] {
        let known = help.split_whitespace().any(|word| word == *flag);
        assert!(known, "{program} has no flag {flag}");
    }
    let page = std::fs::read_to_string(workspace_dir().join("ztunnel/ENVIRONMENT.md")).unwrap();
    for variable in container["env"].as_array().unwrap() {
        let name = variable["name"].as_str().unwrap();
        // Some are no flag's: those of the log, which is there before any is read, and who the agent is.
        let read = || program == "ztunnel" && page.contains(&format!("| `{name}` | read |"));
        let known = matches!(name, "RUST_LOG" | "LOG_FORMAT") || help.contains(&format!("[env: {name}=")) || read();
        assert!(known, "{program} has no variable {name}");
    }
}

/// Every value must be one the program takes. What contradicts itself is noticed once all values are read, so that nothing starts.
#[test]
fn every_value_is_one_the_programs_take() {
    for profile in PROFILES {
        for (program, pod) in pods(&objects(profile)) {
            let container = &pod["containers"][0];
            let mut command = Command::new(find_program(program).unwrap());
            command.env_clear().args(["proxy", "--kubernetes", "--mesh-dir", "."]);
            for variable in container["env"].as_array().unwrap() {
                let value = variable["value"].as_str().unwrap_or("10.0.0.1");
                command.env(variable["name"].as_str().unwrap(), value);
            }
            let said = String::from_utf8_lossy(&command.output().unwrap().stderr).into_owned();
            assert!(said.contains("cannot be used with"), "{program} {profile}: {said}");
        }
    }
}

#[test]
fn an_upgrade_and_an_end_get_their_time() {
    let seconds = |text: &str| {
        let (number, unit) = text.split_at(text.len() - 1);
        number.parse::<u64>().unwrap() * if unit == "m" { 60 } else { 1 }
    };
    for profile in PROFILES {
        let all = objects(profile);
        for (program, pod) in pods(&all) {
            let deadline = pod["containers"][0]["env"]
                .as_array()
                .unwrap()
                .iter()
                .find(|v| v["name"] == "CONNECTION_TERMINATION_DEADLINE" || v["name"] == "TERMINATION_DRAIN_DURATION")
                .and_then(|v| v["value"].as_str())
                .unwrap();
            let grace = pod["terminationGracePeriodSeconds"].as_u64().unwrap();
            assert!(grace > seconds(deadline), "{program}: {grace} s for {deadline}");
        }
        let agent = find(&all, "DaemonSet", "culvert-agent");
        let rolling = &agent["spec"]["updateStrategy"]["rollingUpdate"];
        assert_eq!(
            (rolling["maxSurge"].as_u64(), rolling["maxUnavailable"].as_u64()),
            (Some(1), Some(0)),
            "the next beside the old"
        );
        let spec = &agent["spec"]["template"]["spec"];
        assert!(spec["hostNetwork"].is_null() && spec["hostPID"].is_null(), "two on one node may not want one port");
        let security = &spec["containers"][0]["securityContext"];
        assert!(security["privileged"].is_null());
        // What the agent keeps for the next one is outside of the container.
        let hosts: Vec<&Value> = spec["volumes"].as_array().unwrap().iter().map(|v| &v["hostPath"]["path"]).collect();
        assert!(hosts.iter().any(|p| **p == "/run/culvert") && hosts.iter().any(|p| **p == "/sys/fs/bpf"), "{hosts:?}");
    }
}

/// Without redirections that are kept there is nothing to take over: two agents at a time would wait for each other.
#[test]
fn an_upgrade_that_leaves_pods_open_is_a_restart() {
    for (choice, surge, unavailable) in [("open", 0, 1), ("closed", 1, 0)] {
        let values = format!("agent: {{ onAgentDeath: {choice} }}\n{}", chart::ISTIO_CA);
        let all = documents(&chart::render_with(&manifests().join("chart"), &values, NAMESPACE).unwrap()).unwrap();
        let spec = &find(&all, "DaemonSet", "culvert-agent")["spec"];
        assert_eq!(spec["updateStrategy"]["rollingUpdate"], json!({ "maxSurge": surge, "maxUnavailable": unavailable }));
        let variables = spec["template"]["spec"]["containers"][0]["env"].as_array().unwrap();
        assert!(variables.contains(&json!({ "name": "CULVERT_ON_AGENT_DEATH", "value": choice })), "{variables:?}");
    }
}

/// Every object of the whole policy below `at`, with the fields its schema has.
fn objects_of(schema: &Value, value: &Value, at: &str, out: &mut Vec<(String, BTreeSet<String>)>) {
    match value {
        Value::Object(map) if schema["additionalProperties"].is_null() => {
            let properties = schema["properties"].as_object().cloned().unwrap_or_default();
            out.push((at.to_owned(), properties.keys().cloned().collect()));
            for (key, value) in map {
                objects_of(&properties[key], value, &format!("{at}/{key}"), out);
            }
        }
        Value::Array(all) => {
            for (number, value) in all.iter().enumerate() {
                objects_of(&schema["items"], value, &format!("{at}/{number}"), out);
            }
        }
        _ => {}
    }
}

/// The translator tells of a field it does not know, and which it would: these are the fields of the schema.
#[test]
fn the_schema_of_a_traffic_policy_is_what_is_read() {
    const UNKNOWN: &str = "zzzzzzzz";
    let crd = documents(&std::fs::read_to_string(manifests().join("chart/crds/trafficpolicies.yaml")).unwrap()).unwrap();
    let schema = &crd[0]["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"];
    let mut all = Vec::new();
    objects_of(schema, &chart::whole_policy()["spec"], "/spec", &mut all);
    assert!(all.len() > 15, "{all:?}");
    let folder = tempfile::tempdir().unwrap();
    for (number, (at, _)) in all.iter().enumerate() {
        let mut policy = chart::whole_policy();
        policy["metadata"]["name"] = json!(format!("p{number}"));
        policy.pointer_mut(at).unwrap()[UNKNOWN] = json!({});
        std::fs::write(folder.path().join(format!("p{number}.yaml")), policy.to_string()).unwrap();
    }
    std::fs::write(folder.path().join("whole.yaml"), chart::whole_policy().to_string()).unwrap();
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let settings = translate::Settings { layer7: true, ..translate::Settings::default() };
    let origin = Origin::Folder(folder.path().to_owned());
    let (mesh, diagnostics) = runtime.block_on(async { mesh_sources::start_with(origin, Viewpoint::default(), &settings) });
    wait::until_true("the folder", || mesh.is_synced()).unwrap();
    let told = |name: &str| -> Vec<String> {
        let of = |p: &&mesh_sources::Problem| *p.origin.object == *format!("TrafficPolicy zamaz/{name}");
        diagnostics.list().iter().filter(of).map(|p| p.message.to_string()).filter(|m| !m.contains("does not exist")).collect()
    };
    assert_eq!(told("p"), [""; 0], "the whole policy is read");
    for (number, (at, fields)) in all.iter().enumerate() {
        let messages = told(&format!("p{number}"));
        let [message] = &messages[..] else { panic!("{at}: {messages:?}") };
        if fields.is_empty() {
            assert!(message.contains("has no fields"), "{at}: {message}");
            continue;
        }
        let known = message.split_once("known here: ").unwrap_or_else(|| panic!("{at}: {message}")).1;
        let known = known.split(';').next().unwrap_or_default().split(", ").map(str::to_owned).collect();
        assert_eq!(fields, &known, "{at}");
    }
}

/// What a program lists and watches, as a server sees it, is what its roles allow, and nothing more is allowed.
#[test]
fn the_rights_are_those_that_are_asked_for() {
    let all = objects("production");
    let agent = granted(find(&all, "ClusterRole", "culvert-agent"), "");
    assert_eq!(asked(Reach::Agent), agent);
    let mut waypoint = granted(find(&all, "ClusterRole", "culvert-waypoint"), "");
    waypoint.extend(granted(find(&all, "Role", "zamaz-waypoint"), "zamaz"));
    waypoint.extend(granted(find(&all, "Role", "culvert-mesh-config"), NAMESPACE));
    assert_eq!(asked(Reach::Waypoint { namespace: "zamaz".into() }), waypoint);
}

fn granted(role: &Value, namespace: &str) -> BTreeSet<String> {
    let mut out = BTreeSet::new();
    for rule in role["rules"].as_array().unwrap() {
        let verbs: Vec<&str> = rule["verbs"].as_array().unwrap().iter().map(|v| v.as_str().unwrap()).collect();
        if verbs == ["patch"] {
            continue;
        }
        assert_eq!(verbs, ["list", "watch"]);
        for resource in rule["resources"].as_array().unwrap() {
            let group = rule["apiGroups"][0].as_str().unwrap();
            out.insert(format!("{group}/{namespace}/{}", resource.as_str().unwrap()));
        }
    }
    out
}

fn asked(reach: Reach) -> BTreeSet<String> {
    let api = KubeApi::start().unwrap();
    let dir = tempfile::tempdir().unwrap();
    let access = Access { kubeconfig: Some(api.kubeconfig(dir.path()).unwrap()) };
    let settings = translate::Settings { layer7: reach != Reach::Agent, ..translate::Settings::default() };
    let origin = Origin::Kubernetes(Box::new(Scope { access, reach, retry: Retry::default(), watches: Watches::default() }));
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let view = Viewpoint { root_namespace: NAMESPACE.into(), ..Viewpoint::default() };
    let (mesh, _) = runtime.block_on(async { mesh_sources::start_with(origin, view, &settings) });
    wait::until_true("the first mesh", || mesh.is_synced()).unwrap();
    api.asked()
}
