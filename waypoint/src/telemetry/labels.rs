//! Label values of Istio's standard metrics (spec/waypoint §4.1). Pure.
use mesh_model::metric_labels::{self, COMMON, Ends, NAMES};
use mesh_model::telemetry::FamilyRules;

/// Labels of `istio_requests_total` and the histograms, in the order [`http`] gives their values.
pub(super) const HTTP_LABELS: [&str; COMMON + 5] = metric_labels::with(
    NAMES,
    ["connection_security_policy", "request_protocol", "response_code", "grpc_response_status", "response_flags"],
);
/// Labels of gRPC messages, which are counted before the answer is known.
pub(super) const MESSAGE_LABELS: [&str; COMMON] = NAMES;
/// Labels of the TCP families, in the order [`tcp`] gives their values.
pub(super) const TCP_LABELS: [&str; COMMON + 3] =
    metric_labels::with(NAMES, ["connection_security_policy", "request_protocol", "response_flags"]);

/// Values of [`HTTP_LABELS`].
pub(super) fn http<'a>(
    ends: Ends<'a>,
    protocol: &'a str,
    status: &'a str,
    grpc: &'a str,
    flags: &'a str,
) -> [&'a str; HTTP_LABELS.len()] {
    metric_labels::with(ends.values(), [security(ends), protocol, status, grpc, flags])
}
/// Values of [`TCP_LABELS`].
pub(super) fn tcp<'a>(ends: Ends<'a>, flags: &'a str) -> [&'a str; TCP_LABELS.len()] {
    metric_labels::with(ends.values(), [security(ends), "tcp", flags])
}
/// A family's labels as the mesh wants them: the values of its own, and those that come beside them. `tags`: values of
/// [`MetricRules::tags`], empty where there is none.
///
/// [`MetricRules::tags`]: mesh_model::telemetry::MetricRules::tags
pub(super) fn adjust<'a, const N: usize>(
    names: &[&str; N],
    mut values: [&'a str; N],
    rules: &'a FamilyRules,
    tags: &'a [Box<str>],
) -> ([&'a str; N], Vec<(&'a str, &'a str)>) {
    let mut beside = Vec::new();
    for (name, at) in &rules.tags {
        // Removed, or without a value: a label that is empty is not exposed.
        let value = at.and_then(|at| tags.get(at)).map_or("", |v| &**v);
        match names.iter().zip(&mut values).find(|(n, _)| ***n == **name) {
            Some((_, place)) => *place = value,
            None => beside.push((&**name, value)),
        }
    }
    beside.retain(|(_, value)| !value.is_empty());
    (values, beside)
}
/// How the client came: whoever proved an identity came over mutual TLS. Whoever reports as the source cannot know how its
/// requests arrive (Istio).
fn security(ends: Ends<'_>) -> &'static str {
    match (ends.reporter, ends.source_id) {
        ("source", _) => metric_labels::UNKNOWN,
        (_, Some(_)) => "mutual_tls",
        (_, None) => "none",
    }
}
