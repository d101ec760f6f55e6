//! Who we say we are to istiod: node id and metadata, as istio/ztunnel sends them (node-agent §1.9), and Istio's waypoints.

use std::collections::BTreeMap;

use mesh_proto::envoy::config::core::v3::Node;
use mesh_proto::well_known::{ListValue, Struct, Value, value::Kind};

/// What a process is to istiod.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// A node's agent.
    Ztunnel,
    /// A waypoint or gateway.
    Waypoint,
}

/// The node of a process with these environment variables.
pub fn of_environment(role: Role, node_name: &str, cluster: &str, env: impl IntoIterator<Item = (String, String)>) -> Node {
    let env: BTreeMap<String, String> = env.into_iter().collect();
    let get = |key: &str| env.get(key).map_or("", String::as_str);
    let (pod, namespace) = (get("POD_NAME"), get("POD_NAMESPACE"));
    let ip = Some(get("INSTANCE_IP")).filter(|ip| !ip.is_empty()).unwrap_or("1.1.1.1");
    let mut fields = BTreeMap::new();
    let mut put = |key: &str, value: &str| {
        if !value.is_empty() {
            fields.insert(key.to_owned(), text(value));
        }
    };
    put("NAME", pod);
    put("NAMESPACE", namespace);
    put("INSTANCE_IPS", ip);
    put("NODE_NAME", node_name);
    put("CLUSTER_ID", cluster);
    put("SERVICE_ACCOUNT", if role == Role::Waypoint { get("SERVICE_ACCOUNT") } else { "" });
    for (key, value) in &env {
        if let Some(name) = key.strip_prefix("ISTIO_METAJSON_") {
            // What is no JSON says nothing.
            if let Ok(value) = serde_json::from_str(value) {
                fields.insert(name.to_owned(), json(value));
            }
        } else if let Some(name) = key.strip_prefix("ISTIO_META_") {
            fields.insert(name.to_owned(), text(value));
        }
    }
    let role = match role {
        Role::Ztunnel => "ztunnel",
        Role::Waypoint => {
            // istiod lists agents in `proxy-status`, and others that have this.
            let nothing = || Value { kind: Some(Kind::StructValue(Struct::default())) };
            fields.entry("PROXY_CONFIG".to_owned()).or_insert_with(nothing);
            "waypoint"
        }
    };
    Node {
        id: format!("{role}~{ip}~{pod}.{namespace}~{namespace}.svc.cluster.local"),
        metadata: Some(Struct { fields }),
        ..Node::default()
    }
}

fn text(value: &str) -> Value {
    Value { kind: Some(Kind::StringValue(value.to_owned())) }
}

fn json(value: serde_json::Value) -> Value {
    let kind = match value {
        serde_json::Value::Null => Kind::NullValue(0),
        serde_json::Value::Bool(b) => Kind::BoolValue(b),
        serde_json::Value::Number(n) => Kind::NumberValue(n.as_f64().unwrap_or_default()),
        serde_json::Value::String(s) => Kind::StringValue(s),
        serde_json::Value::Array(all) => Kind::ListValue(ListValue { values: all.into_iter().map(json).collect() }),
        serde_json::Value::Object(all) => {
            Kind::StructValue(Struct { fields: all.into_iter().map(|(k, v)| (k, json(v))).collect() })
        }
    };
    Value { kind: Some(kind) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn id_and_metadata_are_those_of_a_ztunnel() {
        let env = [
            ("POD_NAME", "ztunnel-x"),
            ("POD_NAMESPACE", "istio-system"),
            ("INSTANCE_IP", "10.0.0.7"),
            ("ISTIO_META_DNS_CAPTURE", "true"),
            ("ISTIO_METAJSON_LABELS", r#"{"app":"ztunnel","n":[1]}"#),
            ("ISTIO_METAJSON_BROKEN", "{"),
            ("PATH", "/bin"),
        ];
        let node = of_environment(Role::Ztunnel, "node-1", "c1", env.map(|(k, v)| (k.to_owned(), v.to_owned())));
        assert_eq!(node.id, "ztunnel~10.0.0.7~ztunnel-x.istio-system~istio-system.svc.cluster.local");
        let fields = node.metadata.unwrap().fields;
        let names: Vec<&str> = fields.keys().map(String::as_str).collect();
        assert_eq!(names, ["CLUSTER_ID", "DNS_CAPTURE", "INSTANCE_IPS", "LABELS", "NAME", "NAMESPACE", "NODE_NAME"]);
        assert_eq!(fields["NODE_NAME"], text("node-1"));
        let Some(Kind::StructValue(labels)) = &fields["LABELS"].kind else { panic!("{:?}", fields["LABELS"]) };
        assert_eq!(labels.fields["app"], text("ztunnel"));
        assert_eq!(of_environment(Role::Ztunnel, "n", "", []).id, "ztunnel~1.1.1.1~.~.svc.cluster.local");
        let env = [("POD_NAME", "wp-1"), ("POD_NAMESPACE", "shop"), ("SERVICE_ACCOUNT", "wp")];
        let node = of_environment(Role::Waypoint, "n", "", env.map(|(k, v)| (k.to_owned(), v.to_owned())));
        assert_eq!(node.id, "waypoint~1.1.1.1~wp-1.shop~shop.svc.cluster.local");
        let fields = node.metadata.unwrap().fields;
        assert_eq!(fields["SERVICE_ACCOUNT"], text("wp"));
        assert!(matches!(&fields["PROXY_CONFIG"].kind, Some(Kind::StructValue(empty)) if empty.fields.is_empty()));
    }
}
