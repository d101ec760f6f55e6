//! Annotations that look like Istio's or ours and are none.
use super::Context;
use super::codes::UNKNOWN_ANNOTATION;
use super::finding::{Findings, Level};
use mesh_sources::yaml::Value;

/// Groups whose annotations are all listed below.
const GROUPS: &[&str] = &["istio.io", "culvert.dev"];
/// Istio's (istio.io/docs/reference/config/annotations), then ours.
const KNOWN: &[&str] = &[
    "ambient.istio.io/bypass-inbound-capture",
    "ambient.istio.io/dns-capture",
    "ambient.istio.io/redirection",
    "ambient.istio.io/waypoint-inbound-binding",
    "galley.istio.io/analyze-suppress",
    "gateway.istio.io/controller-version",
    "gateway.istio.io/name-override",
    "gateway.istio.io/service-account",
    "inject.istio.io/templates",
    "install.operator.istio.io/chart-owner",
    "install.operator.istio.io/owner-generation",
    "install.operator.istio.io/version",
    "internal.istio.io/service-upstream-of",
    "istio.io/connect-strategy",
    "istio.io/dry-run",
    "istio.io/rev",
    "istio.io/reroute-virtual-interfaces",
    "istio.io/use-waypoint-canary-weight",
    "istio.io/workloadGroup",
    "kubernetes.istio.io/ingress",
    "networking.istio.io/address-type",
    "networking.istio.io/exportTo",
    "networking.istio.io/service-type",
    "networking.istio.io/traffic-distribution",
    "prometheus.istio.io/merge-metrics",
    "proxy.istio.io/config",
    "proxy.istio.io/overrides",
    "security.istio.io/autoRegistration",
    "sidecar.istio.io/agentLogLevel",
    "sidecar.istio.io/bootstrapOverride",
    "sidecar.istio.io/componentLogLevel",
    "sidecar.istio.io/controlPlaneAuthPolicy",
    "sidecar.istio.io/discoveryAddress",
    "sidecar.istio.io/enableCoreDump",
    "sidecar.istio.io/extraStatTags",
    "sidecar.istio.io/inject",
    "sidecar.istio.io/interceptionMode",
    "sidecar.istio.io/logLevel",
    "sidecar.istio.io/nativeSidecar",
    "sidecar.istio.io/proxyCPU",
    "sidecar.istio.io/proxyCPULimit",
    "sidecar.istio.io/proxyImage",
    "sidecar.istio.io/proxyImageType",
    "sidecar.istio.io/proxyMemory",
    "sidecar.istio.io/proxyMemoryLimit",
    "sidecar.istio.io/rewriteAppHTTPProbers",
    "sidecar.istio.io/statsCompression",
    "sidecar.istio.io/statsHistogramBuckets",
    "sidecar.istio.io/statsInclusionPrefixes",
    "sidecar.istio.io/statsInclusionRegexps",
    "sidecar.istio.io/statsInclusionSuffixes",
    "sidecar.istio.io/status",
    "sidecar.istio.io/userVolume",
    "sidecar.istio.io/userVolumeMount",
    "status.sidecar.istio.io/port",
    "topology.istio.io/controlPlaneClusters",
    "traffic.istio.io/nodeSelector",
    "traffic.sidecar.istio.io/excludeInboundPorts",
    "traffic.sidecar.istio.io/excludeInterfaces",
    "traffic.sidecar.istio.io/excludeOutboundIPRanges",
    "traffic.sidecar.istio.io/excludeOutboundPorts",
    "traffic.sidecar.istio.io/includeInboundPorts",
    "traffic.sidecar.istio.io/includeOutboundIPRanges",
    "traffic.sidecar.istio.io/includeOutboundPorts",
    "traffic.sidecar.istio.io/kubevirtInterfaces",
    "culvert.dev/netns",
];

/// Checks the annotations of every object.
pub fn check(context: &Context<'_>, findings: &mut Findings) {
    for object in context.objects.iter() {
        let Some(Value::Map(entries)) = object.at(&["metadata", "annotations"]).map(|n| &n.value) else { continue };
        for e in entries {
            let Some((group, _)) = e.key.split_once('/') else { continue };
            let ours = GROUPS.iter().any(|g| group == *g || group.strip_suffix(g).is_some_and(|head| head.ends_with('.')));
            if ours && !KNOWN.contains(&&*e.key) {
                let message = format!("{} is no annotation of Istio or Culvert: nobody reads it", e.key);
                let field = format!("metadata.annotations[{:?}]", e.key);
                findings.on(
                    (Level::Warning, UNKNOWN_ANNOTATION),
                    object,
                    (&e.node, &field),
                    message,
                    "correct the name, or remove it",
                );
            }
        }
    }
}
