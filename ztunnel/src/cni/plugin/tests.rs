use super::*;

const ARGS: &str = "IgnoreUnknown=1;K8S_POD_NAMESPACE=shop;K8S_POD_NAME=web-0;K8S_POD_INFRA_CONTAINER_ID=c1;K8S_POD_UID=u1";

/// A call with this command and configuration, and one variable that is another one.
fn call(command: &str, config: &Value, other: (&str, &str)) -> Result<Step, Fault> {
    let env = |name: &str| {
        let value = match name {
            _ if name == other.0 => other.1,
            "CNI_COMMAND" => command,
            "CNI_CONTAINERID" => "c1",
            "CNI_NETNS" => "/run/netns/c1",
            "CNI_IFNAME" => "eth0",
            "CNI_PATH" => "/opt/cni/bin",
            "CNI_ARGS" => ARGS,
            _ => return None,
        };
        Some(value.to_owned())
    };
    first(env, &config.to_string())
}
fn config() -> Value {
    json!({
        "cniVersion": "1.0.0", "name": "k8s-pod-network", "type": "culvert-cni", "socket": "/run/culvert/n1.cni",
        "unreachable": "refuse", "excludeNamespaces": ["kube-system"],
        "prevResult": { "cniVersion": "1.0.0", "interfaces": [{ "name": "eth0" }], "ips": [{ "address": "10.0.0.7/24" }] },
    })
}
fn with(key: &str, value: Value) -> Value {
    let mut config = config();
    config[key] = value;
    config
}
fn question(config: &Value) -> Question {
    match call("ADD", config, ("", "")) {
        Ok(Step::Ask(question)) => *question,
        other => panic!("{other:?}"),
    }
}

#[test]
fn an_add_asks_the_agent_and_hands_on_what_others_gave() {
    let asked = question(&config());
    let request = Request { check: false, namespace: "shop".into(), name: "web-0".into(), uid: Some("u1".into()) };
    assert_eq!((&asked.request, asked.netns.to_str()), (&request, Some("/run/netns/c1")));
    assert_eq!(asked.socket.to_str(), Some("/run/culvert/n1.cni"));
    for answer in [Answer::Captured, Answer::NotEnrolled] {
        assert_eq!(conclude(question(&config()), Ok(answer)), Ok(Some(config()["prevResult"].clone())));
    }
}

#[test]
fn a_pod_that_is_not_captured_does_not_start() {
    let refused = |later| Ok(Answer::Refused { why: "because".into(), later });
    assert_eq!(conclude(question(&config()), refused(true)).map_err(|f| (f.code, f.details)), Err((11, "because".into())));
    assert_eq!(conclude(question(&config()), refused(false)).map_err(|f| (f.code, f.details)), Err((100, "because".into())));
    let gone = || Err(io::ErrorKind::ConnectionRefused.into());
    assert_eq!(conclude(question(&config()), gone()).map_err(|f| f.code), Err(11));
    let lenient = with("unreachable", json!("allow"));
    assert_eq!(conclude(question(&lenient), gone()), Ok(Some(config()["prevResult"].clone())));
    assert_eq!(conclude(question(&lenient), refused(true)).map_err(|f| f.code), Err(11), "an agent that answers is obeyed");
}

#[test]
fn others_pass_without_a_question() {
    let passed = Ok(Step::Say(Some(config()["prevResult"].clone())));
    assert_eq!(call("ADD", &config(), ("CNI_ARGS", "IgnoreUnknown=1")), passed, "no pod");
    assert_eq!(call("ADD", &with("excludeNamespaces", json!(["shop"])), ("", "")), passed);
    for command in ["DEL", "GC", "STATUS"] {
        assert_eq!(call(command, &config(), ("", "")), Ok(Step::Say(None)), "{command}");
    }
}

#[test]
fn a_check_asks_and_says_nothing_if_all_is_well() {
    let Ok(Step::Ask(asked)) = call("CHECK", &config(), ("", "")) else { panic!("no question") };
    assert!(asked.request.check);
    assert_eq!(conclude(*asked, Ok(Answer::Captured)), Ok(None));
}

#[test]
fn versions_are_told() {
    let Ok(Step::Say(Some(told))) = call("VERSION", &json!({ "cniVersion": "1.1.0" }), ("", "")) else { panic!("no answer") };
    assert_eq!(told["cniVersion"], "1.1.0");
    assert!(told["supportedVersions"].as_array().unwrap().contains(&json!("1.0.0")));
}

#[test]
fn what_is_wrong_has_the_code_of_the_specification() {
    let code = |outcome: Result<Step, Fault>| outcome.map_err(|fault| fault.code);
    assert_eq!(code(call("ADD", &with("cniVersion", json!("2.0.0")), ("", ""))), Err(1));
    assert_eq!(code(call("", &config(), ("", ""))), Err(4));
    assert_eq!(code(call("MOVE", &config(), ("", ""))), Err(4));
    for variable in ["CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME"] {
        assert_eq!(code(call("ADD", &config(), (variable, ""))), Err(4), "{variable}");
    }
    assert_eq!(code(first(|_| Some("ADD".into()), "{")), Err(6));
    assert_eq!(code(call("ADD", &with("prevResult", Value::Null), ("", ""))), Err(7));
    assert_eq!(code(call("ADD", &with("socket", Value::Null), ("", ""))), Err(7));
}
