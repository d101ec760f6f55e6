//! Ring 3: two nodes, real agents, real eBPF, real sockets. What layer 4 promises, seen from the pods, the logs, the metrics
//! and the admin pages; nothing here knows the product's insides.
use std::process::ExitCode;

use mesh_tests::skip;
use mesh_tests::suite::{self, Test, test};

mod calls;
mod explained;
mod hostile;
mod lifecycle;
mod load;
mod mesh;
mod policy;
mod telling;

use mesh::{Mesh, set_up};

const TESTS: &[Test<Mesh>] = &[
    test("an_allowed_call_shows_both_identities_in_both_logs", calls::an_allowed_call_shows_both_identities_in_both_logs),
    test(
        "a_source_outside_the_allow_list_is_refused_with_its_reason",
        policy::a_source_outside_the_allow_list_is_refused_with_its_reason,
    ),
    test("a_deny_policy_wins_over_an_allow_policy", policy::a_deny_policy_wins_over_an_allow_policy),
    test("strict_refuses_plaintext_from_outside", calls::strict_refuses_plaintext_from_outside),
    test("probes_of_the_node_itself_pass_and_nothing_it_forwards", calls::probes_of_the_node_itself_pass_and_nothing_it_forwards),
    test("permissive_takes_plaintext_and_mutual_tls", calls::permissive_takes_plaintext_and_mutual_tls),
    test("the_server_sees_the_original_source", calls::the_server_sees_the_original_source),
    test("a_pod_calls_its_own_service", calls::a_pod_calls_its_own_service),
    test("pods_of_one_node_talk_with_mutual_tls", calls::pods_of_one_node_talk_with_mutual_tls),
    test("a_service_address_spreads_over_its_endpoints", calls::a_service_address_spreads_over_its_endpoints),
    test("a_service_port_that_does_not_exist_is_refused", calls::a_service_port_that_does_not_exist_is_refused),
    test("a_service_without_endpoints_is_refused", calls::a_service_without_endpoints_is_refused),
    test("outside_addresses_are_passed_through", calls::outside_addresses_are_passed_through),
    test("the_wire_carries_only_tls", calls::the_wire_carries_only_tls),
    test("large_transfers_arrive_whole_both_ways", calls::large_transfers_arrive_whole_both_ways),
    test("half_close_works_end_to_end", calls::half_close_works_end_to_end),
    test("server_first_protocols_work", calls::server_first_protocols_work),
    test("a_client_port_is_usable_again_at_once", calls::a_client_port_is_usable_again_at_once),
    test("the_agents_port_numbers_elsewhere_are_ordinary_ports", calls::the_agents_port_numbers_elsewhere_are_ordinary_ports),
    test("resets_are_passed_on_in_both_directions", calls::resets_are_passed_on_in_both_directions),
    test("nothing_listening_is_refused_quickly", calls::nothing_listening_is_refused_quickly),
    test("an_interface_added_later_is_captured", calls::an_interface_added_later_is_captured),
    test("a_namespace_policy_cuts_a_live_connection", policy::a_namespace_policy_cuts_a_live_connection),
    test("a_new_selector_policy_cuts_a_live_connection", policy::a_new_selector_policy_cuts_a_live_connection),
    test("a_removed_workload_is_cut", policy::a_removed_workload_is_cut),
    test("a_bad_object_is_rejected_alone", policy::a_bad_object_is_rejected_alone),
    test("an_unusable_policy_denies_its_target", policy::an_unusable_policy_denies_its_target),
    test("a_missing_waypoint_is_gone_around_by_setting_only", policy::a_missing_waypoint_is_gone_around_by_setting_only),
    test("meshctl_why_says_what_the_mesh_does", explained::meshctl_why_says_what_the_mesh_does),
    test("garbage_on_the_agents_ports_does_no_harm", hostile::garbage_on_the_agents_ports_does_no_harm),
    test("a_certificate_of_another_trust_domain_is_refused", hostile::a_certificate_of_another_trust_domain_is_refused),
    test("a_certificate_of_an_unknown_authority_is_refused", hostile::a_certificate_of_an_unknown_authority_is_refused),
    test("a_pod_whose_path_cannot_be_opened_stays_served", policy::a_pod_whose_path_cannot_be_opened_stays_served),
    test("metrics_carry_istio_labels", telling::metrics_carry_istio_labels),
    test("config_dump_has_the_shape_istioctl_reads", telling::config_dump_has_the_shape_istioctl_reads),
    test("metrics_are_scraped_over_hbone_by_whom_policies_allow", telling::metrics_are_scraped_over_hbone_by_whom_policies_allow),
    test("live_connections_are_listed", telling::live_connections_are_listed),
    test("profiles_are_taken_while_it_serves", telling::profiles_are_taken_while_it_serves),
    test("a_thousand_silent_connections_stop_nobody", hostile::a_thousand_silent_connections_stop_nobody),
    test("ten_thousand_silent_connections_stop_nobody", hostile::ten_thousand_silent_connections_stop_nobody),
    test("half_made_handshakes_from_many_addresses_stop_nobody", hostile::half_made_handshakes_from_many_addresses_stop_nobody),
    test("a_peer_that_stops_after_tls_is_ended", hostile::a_peer_that_stops_after_tls_is_ended),
    test("hundreds_of_connections_at_once", load::hundreds_of_connections_at_once),
    test("connections_leave_nothing_open", load::connections_leave_nothing_open),
    test("a_reader_that_stops_holds_up_nobody", load::a_reader_that_stops_holds_up_nobody),
    test("sigterm_ends_idle_connections_at_the_deadline", lifecycle::sigterm_ends_idle_connections_at_the_deadline),
    test("sigterm_drains_what_is_in_flight", lifecycle::sigterm_drains_what_is_in_flight),
    test("sigterm_drains_the_sources_agent_too", lifecycle::sigterm_drains_the_sources_agent_too),
    test("an_agent_is_not_ready_before_it_has_its_mesh", lifecycle::an_agent_is_not_ready_before_it_has_its_mesh),
    test("pods_are_given_their_lasting_places", lifecycle::pods_are_given_their_lasting_places),
    test("a_killed_agent_is_replaced_by_a_new_one", lifecycle::a_killed_agent_is_replaced_by_a_new_one),
    test(
        "the_plain_log_is_istios_line_and_quitquitquit_ends_the_agent",
        telling::the_plain_log_is_istios_line_and_quitquitquit_ends_the_agent,
    ),
    test("a_killed_agent_fails_closed", lifecycle::a_killed_agent_fails_closed),
    test("a_stopped_agent_fails_closed_until_cleaned_up", lifecycle::a_stopped_agent_fails_closed_until_cleaned_up),
    test("an_upgrade_loses_nothing", lifecycle::an_upgrade_loses_nothing),
    test("an_agent_that_is_not_ready_is_replaced_too", lifecycle::an_agent_that_is_not_ready_is_replaced_too),
    test("an_agent_takes_over_what_the_one_before_it_has_alone", lifecycle::an_agent_takes_over_what_the_one_before_it_has_alone),
    test("pqc_leaves_no_other_key_exchange", lifecycle::pqc_leaves_no_other_key_exchange),
    test("where_bpf_is_refused_rules_redirect", lifecycle::where_bpf_is_refused_rules_redirect),
    test("fifty_restarts_leave_nothing_behind", lifecycle::fifty_restarts_leave_nothing_behind),
    test("an_agent_killed_while_it_enrols_is_taken_over", lifecycle::an_agent_killed_while_it_enrols_is_taken_over),
    test("a_killed_agent_may_leave_its_pods_open", lifecycle::a_killed_agent_may_leave_its_pods_open),
    test("nothing_is_left_behind", lifecycle::nothing_is_left_behind),
];

fn main() -> ExitCode {
    suite::run("mesh_l4", skip::netns_unavailable(), set_up, TESTS)
}
