# SPDX-License-Identifier: Apache-2.0
"""The duties of servers up to the transmission phase; TLS and meta contexts have tables apart."""

from __future__ import annotations

from tests.protocol.rule import MUST, MUST_NOT, SHOULD, SHOULD_NOT, rule

CONVENTIONS = "Conventions"
PHASES = "Protocol phases"
NEWSTYLE = "Newstyle negotiation"
FIXED = "Fixed newstyle negotiation"
HAGGLING = "Termination of the session during option haggling"
HANDSHAKE_FLAGS = "Handshake flags"
CLIENT_FLAGS = "Client flags"
TRANSMISSION_FLAGS = "Transmission flags"
EXPORT_NAME = "NBD_OPT_EXPORT_NAME"
ABORT = "NBD_OPT_ABORT"
LIST = "NBD_OPT_LIST"
INFO = "NBD_OPT_INFO and NBD_OPT_GO"
REPLIES = "Option reply types"
BASELINE = "Baseline"
INTEROPERABILITY = "Maximum interoperability"

RULES = (
    rule(
        CONVENTIONS,
        MUST_NOT,
        "a string that is sent has no NUL in it",
        "test_negotiation::test_strings_that_the_server_sends_keep_the_rules_of_strings",
        "test_negotiation::test_strings_that_break_the_rules_name_no_export",
    ),
    rule(
        CONVENTIONS,
        MUST,
        "a string has at most 4096 bytes",
        "test_negotiation::test_strings_that_the_server_sends_keep_the_rules_of_strings",
        "unit/nbd/test_handshake::test_the_longest_name_is_only_unknown",
    ),
    rule(
        CONVENTIONS,
        SHOULD,
        "a string has at most 256 bytes",
        because="Names and descriptions are the user's; our own messages are shorter.",
    ),
    rule(
        PHASES,
        SHOULD,
        "TCP sockets don't wait to send more at once (TCP_NODELAY)",
        "test_sockets::test_a_tcp_clients_small_replies_arrive_at_once",
    ),
    rule(
        NEWSTYLE,
        SHOULD,
        "ports other than 10809 speak the old style",
        because="The old style can't name exports; the document itself calls it history.",
    ),
    rule(
        NEWSTYLE,
        SHOULD,
        "the port of the new style doesn't speak the old one",
        "test_negotiation::test_newstyle_greeting_is_not_oldstyle",
    ),
    rule(
        NEWSTYLE,
        SHOULD_NOT,
        "in production the port isn't another one",
        because="10809 is the default; others are the user's choice.",
    ),
    rule(
        NEWSTYLE,
        MUST,
        "closes the connection on client flags that it doesn't know",
        "test_negotiation::test_newstyle_unknown_client_flag_closes",
    ),
    rule(
        NEWSTYLE,
        MUST,
        "ends the session when it won't give the export of an EXPORT_NAME",
        "test_negotiation::test_newstyle_export_name_that_isnt_offered_ends_the_session",
    ),
    rule(
        FIXED,
        MUST,
        "a reply has its magic, the option, a type, and as much data as it says",
        "test_negotiation::test_fixed_newstyle_replies_name_the_option_that_they_answer",
        "test_negotiation::test_fixed_newstyle_unknown_options_data_is_skipped",
    ),
    rule(
        HAGGLING,
        MUST,
        "disconnects hard where it has to end the session and can't answer with an error",
        "test_negotiation::test_haggling_what_cant_be_answered_with_an_error_is_hung_up_on",
    ),
    rule(
        HAGGLING,
        MUST_NOT,
        "disconnects otherwise, but on a breach of a mandatory rule or an attack",
        "test_negotiation::test_haggling_errors_never_end_the_session",
        "test_negotiation::test_haggling_out_of_step_is_hung_up_on",
        "unit/nbd/test_handshake::test_bytes_in_negotiation_are_bounded",
        "unit/nbd/test_handshake::test_a_silent_client_is_shown_the_door",
    ),
    rule(
        HAGGLING,
        MUST,
        "errors the options of an unwelcome client until it goes by itself",
        "test_negotiation::test_haggling_errors_never_end_the_session",
    ),
    rule(
        HAGGLING,
        SHOULD,
        "answers options with NBD_REP_ERR_SHUTDOWN while it shuts down",
        "test_negotiation::test_haggling_an_option_under_way_at_shutdown_is_answered",
        "unit/nbd/test_server::test_close_waits_a_moment_for_the_option_under_way",
    ),
    rule(
        HANDSHAKE_FLAGS,
        MUST,
        "sets NBD_FLAG_FIXED_NEWSTYLE, which it speaks",
        "test_negotiation::test_handshake_flags_are_fixed_newstyle_and_no_zeroes_alone",
    ),
    rule(
        HANDSHAKE_FLAGS,
        MUST_NOT,
        "sends the 124 zeroes when both sides had said NO_ZEROES",
        "test_negotiation::test_client_flag_no_zeroes_leaves_the_zeroes_out",
    ),
    rule(
        HANDSHAKE_FLAGS,
        MUST_NOT,
        "sets any other flag",
        "test_negotiation::test_handshake_flags_are_fixed_newstyle_and_no_zeroes_alone",
    ),
    rule(
        HANDSHAKE_FLAGS,
        SHOULD_NOT,
        "behaves otherwise unless the client answers a flag with its own",
        "test_negotiation::test_client_without_no_zeroes_gets_124_zeroes",
        "test_options::test_other_options_need_fixed_newstyle",
    ),
    rule(
        HANDSHAKE_FLAGS,
        MUST_NOT,
        "sets these flags in the old style",
        because="There is no old style here.",
    ),
    rule(
        CLIENT_FLAGS,
        MUST_NOT,
        "sends zeroes to a client that set NBD_FLAG_C_NO_ZEROES",
        "test_negotiation::test_client_flag_no_zeroes_leaves_the_zeroes_out",
    ),
    rule(
        CLIENT_FLAGS,
        MUST,
        "drops a client that sets a flag that is unknown or wasn't offered",
        "test_negotiation::test_newstyle_unknown_client_flag_closes",
    ),
    rule(
        TRANSMISSION_FLAGS,
        MUST_NOT,
        "sets the flag of a feature that it hasn't",
        "test_options::test_transmission_flags_promise_only_commands_that_work",
    ),
    rule(
        TRANSMISSION_FLAGS,
        MUST,
        "NBD_FLAG_HAS_FLAGS is always 1",
        "test_options::test_transmission_flags_say_that_there_are_flags",
    ),
    rule(
        TRANSMISSION_FLAGS,
        MUST,
        "errors writing to an export that it calls read-only",
        "test_options::test_transmission_flag_read_only_is_told",
        "test_transmission::test_writing_to_a_read_only_export_is_not_permitted",
    ),
    rule(
        TRANSMISSION_FLAGS,
        MUST,
        "NBD_FLAG_SEND_DF is clear without structured replies",
        "test_options::test_transmission_flag_df_is_clear_without_structured_replies",
    ),
    rule(
        TRANSMISSION_FLAGS,
        MUST,
        "with NBD_FLAG_CAN_MULTI_CONN, FLUSH and FUA take effect on all connections",
        "test_options::test_transmission_flag_multi_conn_makes_writes_seen_by_all",
    ),
    rule(
        TRANSMISSION_FLAGS,
        MUST,
        "NBD_FLAG_SEND_FAST_ZERO is clear where NBD_FLAG_SEND_WRITE_ZEROES is",
        "test_options::test_transmission_flag_fast_zero_needs_write_zeroes",
    ),
    rule(
        EXPORT_NAME,
        MUST,
        "ends the session for an export that isn't there",
        "test_negotiation::test_newstyle_export_name_that_isnt_offered_ends_the_session",
    ),
    rule(
        EXPORT_NAME,
        MUST,
        "speaks fixed newstyle where it takes any other option",
        "test_options::test_export_name_works_without_fixed_newstyle",
        "test_options::test_other_options_need_fixed_newstyle",
    ),
    rule(
        ABORT,
        MUST,
        "answers with NBD_REP_ACK",
        "test_options::test_abort_is_acknowledged_whatever_comes_with_it",
    ),
    rule(
        ABORT,
        SHOULD,
        "ignores data that comes with it",
        "test_options::test_abort_is_acknowledged_whatever_comes_with_it",
    ),
    rule(
        ABORT,
        SHOULD,
        "takes it well when the client doesn't wait for the answer",
        "test_options::test_abort_of_a_client_that_doesnt_wait_is_taken_well",
    ),
    rule(
        LIST,
        SHOULD,
        "refuses it with NBD_REP_ERR_INVALID when it has data",
        "test_options::test_list_with_data_is_invalid",
    ),
    rule(
        LIST,
        MUST,
        "one NBD_REP_SERVER for each export, then NBD_REP_ACK",
        "test_options::test_list_names_each_export_once_and_acknowledges",
    ),
    rule(
        INFO,
        MUST,
        "the name fits into the option",
        "test_options::test_info_and_go_with_lengths_that_lie_are_invalid",
    ),
    rule(
        INFO,
        MUST,
        "ignores information requests that it doesn't know",
        "test_options::test_info_and_go_ignore_items_that_they_dont_know",
    ),
    rule(
        INFO,
        MUST_NOT,
        "relies on information that the client didn't ask for",
        "test_transmission::test_sizes_by_default_are_any_byte_and_32_mib",
        "test_options::test_go_never_requires_a_block_size_request",
    ),
    rule(
        INFO,
        MUST,
        "sends NBD_INFO_EXPORT before it acknowledges",
        "test_options::test_info_and_go_always_tell_the_export",
        "test_options::test_info_and_go_of_no_name_mean_the_default_export",
    ),
    rule(
        INFO,
        SHOULD_NOT,
        "tells anything of an export that isn't there",
        "test_options::test_info_and_go_of_an_unknown_export_tell_nothing_but_that",
    ),
    rule(
        INFO,
        MUST_NOT,
        "asks for a block size request of a client that made one",
        "test_options::test_go_never_requires_a_block_size_request",
    ),
    rule(
        INFO,
        SHOULD_NOT,
        "asks for one while its sizes are the default",
        "test_options::test_go_never_requires_a_block_size_request",
    ),
    rule(
        INFO,
        SHOULD,
        "sends NBD_INFO_BLOCK_SIZE before NBD_REP_ERR_BLOCK_SIZE_REQD",
        because="That error is never sent.",
    ),
    rule(
        INFO,
        MUST,
        "GO right after an INFO of the same words tells the same",
        "test_options::test_info_then_go_tell_the_same",
        "test_options::test_info_stays_in_negotiation",
    ),
    rule(
        INFO,
        MUST_NOT,
        "sends padding behind the acknowledgement of GO",
        "test_options::test_go_enters_transmission_without_padding",
    ),
    rule(
        REPLIES,
        MUST,
        "the name in NBD_REP_SERVER fits into the reply",
        "test_options::test_list_names_each_export_once_and_acknowledges",
    ),
    rule(
        REPLIES,
        MUST,
        "a listed name is one that EXPORT_NAME, INFO and GO take",
        "test_options::test_listed_names_are_those_that_info_takes",
        "test_options::test_export_name_enters_transmission",
    ),
    rule(
        REPLIES,
        SHOULD,
        "one kind of information comes once",
        "test_options::test_info_items_asked_for_twice_are_told_once",
    ),
    rule(
        REPLIES,
        MUST,
        "each information item has its length: 12, 14, at least 2",
        "test_options::test_info_items_have_their_lengths",
    ),
    rule(
        REPLIES,
        MUST,
        "sends NBD_INFO_BLOCK_SIZE when asked and its sizes aren't the default",
        "test_options::test_info_items_have_their_lengths",
    ),
    rule(
        BASELINE,
        MUST,
        "answers what it doesn't know with NBD_REP_ERR_UNSUP, and parses what comes next",
        "test_options::test_options_that_arent_known_are_unsupported_and_the_next_is_parsed",
        "test_options::test_options_in_one_packet_are_answered_one_by_one",
    ),
    rule(
        BASELINE,
        MUST,
        "NOTLS mode, fixed newstyle, INFO, GO, ABORT, LIST, simple replies, READ, WRITE, DISC",
        "test_options::test_go_enters_transmission_without_padding",
        "test_commands::test_write_is_there_when_it_is_answered",
        "test_transmission::test_disc_closes_without_a_reply",
    ),
    rule(
        INTEROPERABILITY,
        SHOULD,
        "takes EXPORT_NAME beside INFO and GO",
        "test_options::test_export_name_enters_transmission",
    ),
    rule(
        INTEROPERABILITY,
        SHOULD_NOT,
        "requires size constraints",
        "test_options::test_go_never_requires_a_block_size_request",
    ),
    rule(
        INTEROPERABILITY,
        SHOULD,
        "takes FLUSH, and FUA on WRITE",
        "test_transmission::test_ordering_a_flush_and_fua_are_accepted_and_what_they_cover_is_there",
    ),
)
