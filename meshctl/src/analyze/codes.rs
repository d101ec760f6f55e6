//! Istio's codes for what the proxies' readers complain about.
use super::finding::{Finding, Level};
use mesh_sources::{Problem, Severity};

/// A referenced object is not there.
pub const NOT_FOUND: &str = "IST0101";
/// The object is not well formed.
pub const SCHEMA: &str = "IST0106";
/// An annotation of Istio's that Istio does not have.
pub const UNKNOWN_ANNOTATION: &str = "IST0108";
/// Two VirtualServices route one host.
pub const CONFLICTING_HOSTS: &str = "IST0109";
/// A destination without a port where the service has several.
pub const PORT_REQUIRED: &str = "IST0112";
/// A port name from which no protocol follows.
pub const PORT_NAME: &str = "IST0118";
/// A selector that selects nothing.
pub const NO_WORKLOADS: &str = "IST0127";
/// TLS without verification: of a destination, of a port.
pub const NO_VERIFICATION: &str = "IST0128";
/// The same of a port.
pub const NO_VERIFICATION_PORT: &str = "IST0129";
/// A rule that no request reaches.
pub const UNREACHABLE_RULE: &str = "IST0130";
/// A match that an earlier rule has.
pub const INEFFECTIVE_MATCH: &str = "IST0131";
/// A ServiceEntry for bytes without an address.
pub const ADDRESSES_REQUIRED: &str = "IST0134";
/// Two listeners that cannot both be.
pub const CONFLICTING_GATEWAYS: &str = "IST0145";
/// A route by claims without anything that verifies tokens.
pub const CLAIMS_WITHOUT_AUTHENTICATION: &str = "IST0149";
/// The certificate of a listener cannot be used.
pub const GATEWAY_CREDENTIAL: &str = "IST0161";
/// A selector on what only `targetRefs` reach.
pub const INEFFECTIVE_SELECTOR: &str = "IST0166";
/// A policy without effect.
pub const INEFFECTIVE_POLICY: &str = "IST0167";
/// A controller says that an object is not in force.
pub const NEGATIVE_CONDITION: &str = "IST0171";
/// A subset without endpoints.
pub const EMPTY_SUBSET: &str = "IST0173";
/// A DestinationRule for a host nobody has.
pub const UNKNOWN_HOST: &str = "IST0174";
/// ServiceEntries that disagree about a port.
pub const CONFLICTING_PROTOCOLS: &str = "IST0177";

/// What a reader complained about, as a finding.
pub fn of_problem(p: &Problem) -> Finding {
    Finding {
        level: match p.severity {
            Severity::Error => Level::Error,
            Severity::Warning => Level::Warning,
            Severity::Note => Level::Note,
        },
        code: code(p).into(),
        file: p.origin.place.to_string(),
        line: p.origin.line,
        object: p.origin.object.to_string(),
        field: p.field.to_string(),
        message: p.message.to_string(),
        fix: p.fix.to_string(),
    }
}

fn code(p: &Problem) -> &'static str {
    let object = |kind: &str| p.origin.object.starts_with(kind);
    match p.code.unwrap_or("other") {
        "bad-value" | "missing-field" | "unknown-field" | "bad-version" | "unknown-kind" | "yaml" | "header"
        | "unsupported-field" | "unsupported-filter" => SCHEMA,
        "no-service" if object("DestinationRule") => UNKNOWN_HOST,
        "no-service" | "no-subset" | "no-port" | "backend-not-found" | "delegate" | "parent" | "waypoint" => NOT_FOUND,
        "unreachable" => UNREACHABLE_RULE,
        "target" | "no-effect" if object("AuthorizationPolicy") => INEFFECTIVE_POLICY,
        "http-in-l4" | "no-rules" | "action" => INEFFECTIVE_POLICY,
        "listener-conflict" => CONFLICTING_GATEWAYS,
        "certificate" | "ref-not-found" if object("Gateway") => GATEWAY_CREDENTIAL,
        word => word,
    }
}
