//! Ring 4: a real istiod. Its own code (`tests/istiod`) converts the YAML that our translator reads from a folder, and what both
//! say must be one mesh, field by field, but for [`differences`]; agents that have nothing but its stream serve by it, and
//! `istioctl` reads what they know.
mod compare;
mod conversion;
mod demand;
mod differences;
mod istioctl;
mod peers;
mod proxies;
mod serving;

use std::process::ExitCode;

use mesh_tests::suite::{self, Test, test};
use mesh_tests::{real_istiod, skip};

const TESTS: &[Test<()>] = &[
    test("the_example_mesh_is_the_same", |()| conversion::example()),
    test("every_field_is_the_same", |()| conversion::same("every-field")),
    test("services_are_the_same", |()| conversion::same("services")),
    test("waypoints_are_the_same", |()| conversion::same("waypoints")),
    test("authorization_is_the_same", |()| conversion::same("authorization")),
    test("peer_authentication_is_the_same", |()| conversion::peers()),
    test("changes_are_the_same", |()| conversion::changes()),
    test("what_is_named_and_never_sent_refuses_plaintext_only", |()| conversion::never_sent()),
    test("istioctl_reads_what_agents_know", |()| istioctl::reads_every_mesh()),
    test("istioctl_lists_our_streams", |()| proxies::status()),
    test("istioctl_reads_a_waypoint", |()| proxies::config()),
    test("on_demand_it_is_asked_by_names_it_knows", |()| demand::by_names()),
    test("agents_serve_by_it", |()| serving::agents(false)),
    test("agents_on_demand_serve_by_it", |()| serving::agents(true)),
];

fn main() -> ExitCode {
    let cannot = skip::find_peer(real_istiod::PROGRAM).err();
    suite::run("e2e_istiod", cannot, || Ok(()), TESTS)
}
