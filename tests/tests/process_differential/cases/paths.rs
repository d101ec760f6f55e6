//! Modes of path normalisation (`meshConfig.pathNormalization`): what policies and the endpoint see.

use super::policies::{Rules, any, path, with_policy};
use crate::case::{Paths, Scenario, case, raw, scenario};

/// `/deny*` is denied; everything else shows how the endpoint gets it.
fn mode(name: &'static str, paths: Paths) -> Scenario {
    let rules: Rules = vec![("to: [{ operation: { paths: ['/deny*'] } }]", path("/deny*"), any())];
    let line = |target: &str| raw(&format!("GET {target} HTTP/1.1\r\nhost: $HOST\r\nx-request-id: $ID\r\n\r\n"));
    with_policy(scenario(name).paths(paths), "p", "DENY", rules)
        .gets(&[
            ("plain", "/a/b"),
            ("dot segments", "/x/../deny"),
            ("a dot segment", "/./deny"),
            ("two slashes", "//deny"),
            ("many slashes", "/a///b//c"),
            ("slashes at the end", "/a//"),
            ("an escaped slash", "/%2fdeny"),
            ("an escaped slash within", "/a%2Fb"),
            ("an escaped backslash", "/a%5cb"),
            ("a backslash", "/\\deny"),
            ("escaped dots", "/x/%2e%2e/deny"),
            ("an escaped letter", "/%64eny"),
            ("an escaped percent sign", "/%2564eny"),
            ("dot segments behind an escaped slash", "/x%2f..%2fdeny"),
            ("slashes and dots", "/x//..//deny"),
            ("a query with all of it", "/q?a=//%2f/../b\\c"),
            ("above the root", "/../../deny"),
        ])
        .case(case("a whole URI", line("http://x.example//deny")))
}

pub fn all() -> Vec<Scenario> {
    vec![mode("paths-none", Paths::None), mode("paths-merge", Paths::Merge), mode("paths-decode", Paths::DecodeAndMerge)]
}
