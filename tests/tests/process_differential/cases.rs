//! The scenarios. Each names its objects twice: as a user writes them, and as istiod tells Envoy.
mod answers;
mod authorizers;
mod breakers;
mod callers;
mod cors;
mod ejection;
mod faults;
mod gateway_api;
mod hashing;
mod headers;
mod limits;
mod lines;
mod matching;
mod mirrors;
mod paths;
mod policies;
mod principals;
mod protocol;
mod redirects;
mod retries;
mod rewrites;
mod timeouts;
mod tokens;
mod upstream;
mod weights;

use crate::case::Scenario;

/// All of them.
pub fn all() -> Vec<Scenario> {
    [
        matching::all(),
        rewrites::all(),
        redirects::all(),
        headers::all(),
        retries::all(),
        timeouts::all(),
        faults::all(),
        mirrors::all(),
        cors::all(),
        weights::all(),
        breakers::all(),
        ejection::all(),
        hashing::all(),
        upstream::all(),
        protocol::all(),
        gateway_api::all(),
        policies::all(),
        tokens::all(),
        principals::all(),
        callers::all(),
        limits::all(),
        answers::all(),
        paths::all(),
        lines::all(),
        authorizers::all(),
    ]
    .concat()
}
