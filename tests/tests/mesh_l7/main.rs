//! Ring 3: two nodes, real agents, a real waypoint and a real gateway. What layer 7 promises, seen by `curl` in a pod and by
//! the servers in others; nothing here knows the product's insides.
use std::process::ExitCode;

use mesh_tests::skip;
use mesh_tests::suite::{self, Test, test};

mod authorizer;
mod binding;
mod bytes;
mod change;
mod clients;
mod destinations;
mod explained;
mod frames;
mod fronts;
mod hostile;
mod identities;
mod idle;
mod mesh;
mod named;
mod outside;
mod phases;
mod policy;
mod pools;
mod resolved;
mod routes;
mod rules;
mod scrape;
mod sessions;
mod stalled;
mod tokens;
mod traces;
mod traffic;
mod upstream;

use mesh::{Mesh, set_up};

const TESTS: &[Test<Mesh>] = &[
    test("a_call_goes_through_the_waypoint", routes::a_call_goes_through_the_waypoint),
    test("a_canary_by_header_is_exact", routes::a_canary_by_header_is_exact),
    test("a_canary_by_weight_hits_its_share", routes::a_canary_by_weight_hits_its_share),
    test("rewrites_redirects_and_answers", routes::rewrites_redirects_and_answers),
    test("a_route_change_is_live_and_drops_nothing", routes::a_route_change_is_live_and_drops_nothing),
    test("a_broken_route_closes_its_host_only", routes::a_broken_route_closes_its_host_only),
    test("failures_are_retried_as_the_route_says", upstream::failures_are_retried_as_the_route_says),
    test("mesh_config_counts_where_no_object_does", upstream::mesh_config_counts_where_no_object_does),
    test("an_early_refusal_is_retried_with_the_whole_body", upstream::an_early_refusal_is_retried_with_the_whole_body),
    test("a_breaker_opens_and_heals", upstream::a_breaker_opens_and_heals),
    test("a_slow_upstream_is_timed_out", upstream::a_slow_upstream_is_timed_out),
    test("request_bodies_arrive_whole", upstream::request_bodies_arrive_whole),
    test("an_upgrade_is_carried", bytes::an_upgrade_is_carried),
    test("an_upgrade_over_http2_is_carried", bytes::an_upgrade_over_http2_is_carried),
    test("a_server_that_speaks_first_is_heard", bytes::a_server_that_speaks_first_is_heard),
    test("large_transfers_arrive_whole", bytes::large_transfers_arrive_whole),
    test("labels_say_which_waypoint", binding::labels_say_which_waypoint),
    test("a_canary_waypoint_gets_its_share", binding::a_canary_waypoint_gets_its_share),
    test("a_sandwiched_waypoint_is_told_who_calls", binding::a_sandwiched_waypoint_is_told_who_calls),
    test("a_waypoint_carries_only_what_names_it", binding::a_waypoint_carries_only_what_names_it),
    test("the_streams_of_one_tunnel_use_all_threads", binding::the_streams_of_one_tunnel_use_all_threads),
    test("a_destination_of_bytes_keeps_its_rules", named::a_destination_of_bytes_keeps_its_rules),
    test("bytes_leave_through_another_proxy", named::bytes_leave_through_another_proxy),
    test("silent_connections_live_unless_told_otherwise", named::silent_connections_live_unless_told_otherwise),
    test("connections_of_bytes_follow_their_routes", named::connections_of_bytes_follow_their_routes),
    test("tls_passes_through_by_its_name", named::tls_passes_through_by_its_name),
    test("the_gateway_carries_tls_and_bytes", named::the_gateway_carries_tls_and_bytes),
    test("the_gateway_ends_tls_around_bytes", named::the_gateway_ends_tls_around_bytes),
    test("a_silent_http_connection_is_ended", idle::a_silent_http_connection_is_ended),
    test("names_outside_are_reached_by_the_name_the_client_gives", named::names_outside_are_reached_by_the_name_the_client_gives),
    test("a_policy_that_cannot_be_read_closes", policy::a_policy_that_cannot_be_read_closes),
    test("a_further_header_value_hides_nothing", policy::a_further_header_value_hides_nothing),
    test("what_lives_on_is_judged_again", policy::what_lives_on_is_judged_again),
    test("a_name_in_tls_through_a_tunnel_is_judged", policy::a_name_in_tls_through_a_tunnel_is_judged),
    test("dry_runs_and_audits_are_told_only", policy::dry_runs_and_audits_are_told_only),
    test("an_authorizer_is_asked_over_http", authorizer::over_http),
    test("an_authorizer_is_asked_over_grpc", authorizer::over_grpc),
    test("an_authorizer_sees_bodies_and_changes_routes", authorizer::bodies_and_routes),
    test("an_authorizer_judges_connections_of_bytes", authorizer::connections_of_bytes),
    test("what_can_never_apply_is_told", policy::what_can_never_apply_is_told),
    test("meshctl_why_says_what_the_waypoint_does", explained::meshctl_why_says_what_the_waypoint_does),
    test("meshctl_why_looks_at_tokens_as_the_waypoint_does", explained::meshctl_why_looks_at_tokens_as_the_waypoint_does),
    test("tokens_that_are_not_true_are_refused", tokens::tokens_that_are_not_true_are_refused),
    test("limits_count_by_claims", tokens::limits_count_by_claims),
    test("keys_are_found_by_the_issuers_own_metadata", tokens::keys_are_found_by_the_issuers_own_metadata),
    test(
        "a_selector_of_pods_closes_what_is_reached_through_a_waypoint",
        tokens::a_selector_of_pods_closes_what_is_reached_through_a_waypoint,
    ),
    test("a_host_by_another_name_is_judged_as_itself", policy::a_host_by_another_name_is_judged_as_itself),
    test("a_path_by_another_name_is_judged_as_itself", policy::a_path_by_another_name_is_judged_as_itself),
    test("a_token_leaves_and_its_claims_come", tokens::a_token_leaves_and_its_claims_come),
    test("policies_and_routes_ask_for_claims", tokens::policies_and_routes_ask_for_claims),
    test("keys_are_fetched_rotate_and_outlive_their_server", tokens::keys_are_fetched_rotate_and_outlive_their_server),
    test("keys_are_withdrawn_by_the_refresh", tokens::keys_are_withdrawn_by_the_refresh),
    test("a_bad_key_server_refuses_in_time", tokens::a_bad_key_server_refuses_in_time),
    test("an_unreadable_authentication_closes_its_service", tokens::an_unreadable_authentication_closes_its_service),
    test("the_gateway_lets_its_hosts_in", outside::the_gateway_lets_its_hosts_in),
    test("the_gateway_ends_tls", outside::the_gateway_ends_tls),
    test(
        "a_gateway_goes_through_the_waypoint_where_that_is_wanted",
        fronts::a_gateway_goes_through_the_waypoint_where_that_is_wanted,
    ),
    test("the_gateway_asks_clients_for_certificates", clients::the_gateway_asks_clients_for_certificates),
    test("an_endpoint_is_removed_and_comes_back", change::an_endpoint_is_removed_and_comes_back),
    test("an_endpoint_dies_unannounced", change::an_endpoint_dies_unannounced),
    test("a_route_is_replaced_and_removed", change::a_route_is_replaced_and_removed),
    test("a_waypoint_is_restarted", change::a_waypoint_is_restarted),
    test("a_waypoint_has_its_certificate_from_files", change::a_waypoint_has_its_certificate_from_files),
    test("agents_are_upgraded", change::agents_are_upgraded),
    test("one_tunnel_carries_thousands_of_streams", change::one_tunnel_carries_thousands_of_streams),
    test("the_agent_of_the_client_is_restarted", change::the_agent_of_the_client_is_restarted),
    test("the_sixth_of_five_is_refused", traffic::the_sixth_of_five_is_refused),
    test("buckets_are_apart_by_their_key", traffic::buckets_are_apart_by_their_key),
    test("the_gateway_counts_by_client_address", traffic::the_gateway_counts_by_client_address),
    test("answers_are_compressed_as_asked", traffic::answers_are_compressed_as_asked),
    test("large_bodies_are_refused", traffic::large_bodies_are_refused),
    test("known_envoy_filters_work_and_others_are_told", traffic::known_envoy_filters_work_and_others_are_told),
    test("a_broken_policy_closes_its_targets_only", traffic::a_broken_policy_closes_its_targets_only),
    test("rules_match_by_everything_they_name", phases::rules_match_by_everything_they_name),
    test("faults_are_injected", phases::faults_are_injected),
    test("cors_is_answered_and_added", phases::cors_is_answered_and_added),
    test("headers_are_edited_at_route_and_destination", phases::headers_are_edited_at_route_and_destination),
    test("mirrors_get_a_copy_of_their_own", phases::mirrors_get_a_copy_of_their_own),
    test("delegates_are_part_of_their_root", phases::delegates_are_part_of_their_root),
    test("an_http_route_does_as_it_says", phases::an_http_route_does_as_it_says),
    test("grpc_is_routed_and_its_trailers_arrive", phases::grpc_is_routed_and_its_trailers_arrive),
    test("what_nobody_wrote_a_route_for_is_carried", phases::what_nobody_wrote_a_route_for_is_carried),
    test("a_limit_of_time_begins_with_the_end_of_the_request", phases::a_limit_of_time_begins_with_the_end_of_the_request),
    test("consistent_hashing_keeps_clients_where_they_are", destinations::consistent_hashing_keeps_clients_where_they_are),
    test("turns_and_draws_reach_everybody", destinations::turns_and_draws_reach_everybody),
    test("locality_failover_and_shares", destinations::locality_failover_and_shares),
    test("services_prefer_what_is_near_the_waypoint", destinations::services_prefer_what_is_near_the_waypoint),
    test("limits_overflow_as_envoy_says", destinations::limits_overflow_as_envoy_says),
    test("a_retry_budget_is_kept", destinations::a_retry_budget_is_kept),
    test("a_cookie_keeps_a_session_where_it_is", sessions::a_cookie_keeps_a_session_where_it_is),
    test("a_session_stays_with_its_backend", sessions::a_session_stays_with_its_backend),
    test("a_policy_of_a_backend_keeps_sessions_and_a_budget", sessions::a_policy_of_a_backend_keeps_sessions_and_a_budget),
    test("a_newcomer_warms_up", destinations::a_newcomer_warms_up),
    test("tls_is_originated", destinations::tls_is_originated),
    test("the_proxy_protocol_names_the_client", destinations::the_proxy_protocol_names_the_client),
    test("http2_is_spoken_to_endpoints_where_asked", destinations::http2_is_spoken_to_endpoints_where_asked),
    test("a_service_entry_leads_out", destinations::a_service_entry_leads_out),
    test("connections_are_kept_alive_as_told", destinations::connections_are_kept_alive_as_told),
    test("an_ejection_ends_and_is_counted", destinations::an_ejection_ends_and_is_counted),
    test("ejections_by_the_statuses_that_are_named", destinations::ejections_by_the_statuses_that_are_named),
    test("ejections_by_cause_and_their_limit", destinations::ejections_by_cause_and_their_limit),
    test("the_clients_own_destination_is_kept", destinations::the_clients_own_destination_is_kept),
    test("connections_to_endpoints_are_as_told", destinations::connections_to_endpoints_are_as_told),
    test("a_port_has_settings_of_its_own", rules::a_port_has_settings_of_its_own),
    test("a_subset_has_settings_of_its_own", rules::a_subset_has_settings_of_its_own),
    test("hashing_by_query_keeps_a_value_where_it_is", rules::hashing_by_query_keeps_a_value_where_it_is),
    test("tls_is_originated_with_certificates_of_a_secret", rules::tls_is_originated_with_certificates_of_a_secret),
    test("limits_of_connections_and_retries_hold", rules::limits_of_connections_and_retries_hold),
    test("a_connect_takes_no_longer_than_told", rules::a_connect_takes_no_longer_than_told),
    test("regions_fail_over_as_told", rules::regions_fail_over_as_told),
    test("a_changed_limit_counts_at_once", pools::a_changed_limit_counts_at_once),
    test("a_connection_that_answers_no_pings_is_replaced", pools::a_connection_that_answers_no_pings_is_replaced),
    test("a_peer_that_does_not_read_costs_little", stalled::a_peer_that_does_not_read_costs_little),
    test("every_address_of_a_name_is_an_endpoint", resolved::every_address_of_a_name_is_an_endpoint),
    test("requests_cannot_be_smuggled", hostile::requests_cannot_be_smuggled),
    test("no_request_is_carried_under_another_identity", identities::no_request_is_carried_under_another_identity),
    test("odd_targets_are_refused_or_made_plain", hostile::odd_targets_are_refused_or_made_plain),
    test("too_much_of_anything_is_refused", hostile::too_much_of_anything_is_refused),
    test("malformed_http2_heads_are_stream_errors", hostile::malformed_http2_heads_are_stream_errors),
    test("http2_floods_cost_nobody_else", hostile::http2_floods_cost_nobody_else),
    test("an_endpoint_that_lies_harms_its_own_request_only", hostile::an_endpoint_that_lies_harms_its_own_request_only),
    test("half_closed_and_abandoned_requests_leave_nothing", hostile::half_closed_and_abandoned_requests_leave_nothing),
    test("metrics_and_log_name_both_ends", outside::metrics_and_log_name_both_ends),
    test("the_mesh_says_what_is_told", outside::the_mesh_says_what_is_told),
    test(
        "a_request_is_a_span_between_its_caller_and_its_endpoint",
        traces::a_request_is_a_span_between_its_caller_and_its_endpoint,
    ),
    test("authorizers_and_dry_runs_are_told", traces::authorizers_and_dry_runs_are_told),
    test("prometheus_takes_every_page", scrape::prometheus_takes_every_page),
    test("alerts_fire_as_they_should", scrape::alerts_fire_as_they_should),
    test("a_share_of_requests_is_told", traces::a_share_of_requests_is_told),
    test("a_collector_that_fails_costs_spans_only", traces::a_collector_that_fails_costs_spans_only),
    test("connections_are_spans_around_their_requests", traces::connections_are_spans_around_their_requests),
];

fn main() -> ExitCode {
    suite::run("mesh_l7", skip::netns_unavailable(), set_up, TESTS)
}
