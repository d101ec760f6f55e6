//! Every difference between what our translator and what istiod make of the same objects, with its reason. A field that differs
//! and is not here fails the test, and so does a reason that nothing shows any more.
use crate::compare::Found;

/// What differs for one reason.
#[derive(Debug)]
pub struct Difference {
    /// Why.
    pub reason: &'static str,
    /// In which meshes; each of them shows it.
    pub meshes: &'static [&'static str],
    /// Whether this is it.
    pub is_it: fn(&Found) -> bool,
}

/// The meshes of every mode that a mesh may have.
const MODES: &[&str] = &["mesh-nothing", "mesh-unset", "mesh-permissive", "mesh-strict"];

/// All of them.
pub const DIFFERENCES: &[Difference] = &[
    Difference {
        reason: "a waypoint that is declared and cannot be used is an error of what declares it, and its traffic is refused; istiod \
                 leaves the waypoint out, and traffic goes around it",
        meshes: &["waypoints"],
        is_it: |f| f.field == "waypoint_error" && f.istiod.as_deref() == Some("None"),
    },
    Difference {
        reason: "gateways are to go through a waypoint that is declared and cannot be used, and refuse; istiod leaves both out",
        meshes: &["waypoints"],
        is_it: |f| f.field == "ingress_use_waypoint" && f.istiod.as_deref() == Some("false"),
    },
    Difference {
        reason: "istiod takes no labels for any labels: every selector selects the endpoints of a ServiceEntry (or a pod) that has \
                 none",
        meshes: &["zamaz", "every-field"],
        is_it: |f| f.object.contains("/ServiceEntry/") && f.field == "policies",
    },
    Difference {
        reason: "the mesh carries TCP: ports of UDP are left out",
        meshes: &["services"],
        is_it: |f| f.object == "service t/udp.t.svc.cluster.local" && f.field == "ports",
    },
    Difference {
        reason: "an endpoint that only a slice knows is no deployment; istiod leaves the kind out, and the first of them is read",
        meshes: &["services"],
        is_it: |f| f.object.contains("/EndpointSlice/") && f.field == "workload_type",
    },
    Difference {
        reason: "`trustDomains` narrows a policy; istiod drops it",
        meshes: &["authorization"],
        is_it: |f| f.object == "policy t/domains" && f.field == "rules",
    },
    Difference {
        reason: "a CUSTOM policy for pods can be asked of nobody and refuses; istiod does not send it",
        meshes: &["authorization"],
        is_it: |f| {
            f.object == "policy t/custom"
                || f.object == "workload Kubernetes//Pod/t/web"
                    && f.field == "policies"
                    && f.istiod.as_ref().is_some_and(|theirs| !theirs.contains("t/custom"))
        },
    },
    Difference {
        reason: "a rule of an ALLOW policy that only HTTP could tell never matches; istiod leaves the rule out, which says the same",
        meshes: &["authorization"],
        is_it: |f| ["l7-allow", "l7-allow-only", "l7-when-allow", "jwt-allow"].iter().any(|name| of_policy(f, name)),
    },
    Difference {
        reason: "what only HTTP could tell is left out of a rule of a DENY policy, which then denies more; istiod leaves a match \
                 without fields in its place, which matches nothing, and the rule denies nothing",
        meshes: &["authorization"],
        is_it: |f| ["l7-deny-only", "l7-when", "remote-ip"].iter().any(|name| of_policy(f, name)),
    },
    Difference {
        reason: "DISABLE means PERMISSIVE; where the mode is inherited, istiod looks for PERMISSIVE alone among the ports",
        meshes: MODES,
        is_it: |f| f.object.ends_with("-ports-disable") && (f.field == "policies" || f.istiod.is_none()),
    },
    Difference {
        reason: "istiod names the conversion of a PeerAuthentication and does not make it, where STRICT of the mesh meets modes of \
                 ports; what stands in for it refuses plaintext at every port",
        meshes: &["mesh-strict"],
        is_it: |f| {
            let stands_in = f.istiod.as_ref().is_some_and(|rules| rules.contains("none: [Presence]") && !rules.contains("808"));
            f.object.contains("/converted_peer_authentication_") && f.field == "rules" && stands_in
        },
    },
];

fn of_policy(found: &Found, name: &str) -> bool {
    found.object.strip_prefix("policy t/") == Some(name) && found.field == "rules"
}
