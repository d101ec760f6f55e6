//! Ring 3: the ways of enrolling and redirecting pods beside the one of the other suites. Here: Istio's CNI agent, played from its
//! protocol, with its rules in the pods.
use std::process::ExitCode;

use mesh_tests::skip;
use mesh_tests::suite::{self, Test, test};

mod check;
mod zds;

use zds::Zds;

const TESTS: &[Test<Zds>] = &[
    test("check_says_what_is_allowed", check::check_says_what_is_allowed),
    test("pods_of_the_cni_agent_call_each_other", zds::pods_of_the_cni_agent_call_each_other),
    test("the_source_stays_and_plaintext_is_judged", zds::the_source_stays_and_plaintext_is_judged),
    test("a_repeated_pod_changes_nothing", zds::a_repeated_pod_changes_nothing),
    test("an_unknown_pod_can_be_removed", zds::an_unknown_pod_can_be_removed),
    test("a_pod_may_come_before_the_mesh_knows_it", zds::a_pod_may_come_before_the_mesh_knows_it),
    test("a_removed_pod_is_ended", zds::a_removed_pod_is_ended),
    test("a_pod_that_cannot_be_served_is_tried_again", zds::a_pod_that_cannot_be_served_is_tried_again),
    test("what_breaks_the_protocol_is_answered_and_survived", zds::what_breaks_the_protocol_is_answered_and_survived),
    test("a_restarted_cni_agent_finds_its_pods_served", zds::a_restarted_cni_agent_finds_its_pods_served),
    test("the_next_agent_takes_over", zds::the_next_agent_takes_over),
];

fn main() -> ExitCode {
    let cannot = skip::netns_unavailable().or_else(|| skip::command_missing("nft"));
    suite::run("redirection", cannot, zds::set_up, TESTS)
}
