# SPDX-License-Identifier: Apache-2.0
"""The duties of servers in the transmission phase, whatever the style of their replies."""

from __future__ import annotations

from tests.protocol.rule import MUST, MUST_NOT, SHOULD, SHOULD_NOT, rule

TRANSMISSION = "Transmission"
ORDERING = "Ordering of messages and writes"
SIMPLE_REPLY = "Simple reply message"
TERMINATING = "Terminating the transmission phase"
SIZES = "Size constraints"
COMMAND_FLAGS = "Command flags"
READ = "NBD_CMD_READ"
WRITE = "NBD_CMD_WRITE"
DISC = "NBD_CMD_DISC"
FLUSH = "NBD_CMD_FLUSH"
TRIM = "NBD_CMD_TRIM"
CACHE = "NBD_CMD_CACHE"
WRITE_ZEROES = "NBD_CMD_WRITE_ZEROES"
ERRORS = "Error values"

FLUSHED = (
    "unit/nbd/test_transmission_commands::test_flush_reaches_the_backend",
    "e2e/test_crash::test_kill_under_write_load_keeps_every_flushed_byte",
)
PERSISTED = (
    "unit/nbd/test_transmission_commands::test_fua_write_reaches_the_backend_with_its_flag",
    "unit/nbd/test_transmission_commands::test_trim_with_fua_flushes_after",
    "unit/nbd/test_transmission_commands::test_write_zeroes_says_whether_a_hole_will_do",
)

RULES = (
    rule(
        TRANSMISSION,
        MUST,
        "replies are simple where nothing else was negotiated",
        "test_transmission::test_replies_are_simple_where_nothing_else_was_negotiated",
    ),
    rule(
        TRANSMISSION,
        MUST,
        "a reply's cookie is its request's, whatever that is",
        "test_transmission::test_replies_carry_the_requests_cookie_whatever_it_is",
        "test_transmission::test_replies_of_many_requests_go_to_their_own_cookies",
    ),
    rule(
        ORDERING,
        MUST,
        "what was answered before a FLUSH is on stable storage when that is answered",
        "test_transmission::test_ordering_a_flush_and_fua_are_accepted_and_what_they_cover_is_there",
        *FLUSHED,
    ),
    rule(
        ORDERING,
        MUST_NOT,
        "answers a command with FUA before its data is on stable storage",
        "test_transmission::test_ordering_a_flush_and_fua_are_accepted_and_what_they_cover_is_there",
        *PERSISTED,
    ),
    rule(
        SIMPLE_REPLY,
        MUST,
        "each request gets a simple reply where structured ones weren't negotiated",
        "test_transmission::test_replies_are_simple_where_nothing_else_was_negotiated",
        "test_transmission::test_simple_reply_with_an_error_has_no_data",
    ),
    rule(
        TERMINATING,
        MUST,
        "closes after NBD_CMD_DISC",
        "test_transmission::test_disc_closes_without_a_reply",
    ),
    rule(
        TERMINATING,
        SHOULD,
        "waits at its shutdown for requests in flight",
        "unit/nbd/test_transmission_end::test_close_answers_what_is_in_flight",
    ),
    rule(
        TERMINATING,
        SHOULD,
        "what it won't serve any more at its shutdown gets NBD_ESHUTDOWN",
        because="Requests in flight are all served. Those that come later find the stream ended:"
        " it is closed as soon as the last reply is out.",
    ),
    rule(
        TERMINATING,
        MUST_NOT,
        "disconnects without need",
        "test_transmission::test_errors_never_end_transmission",
        "test_transmission::test_a_violated_magic_ends_that_connection_alone",
        "test_transmission::test_the_server_is_well",
    ),
    rule(
        SIZES,
        SHOULD,
        "advertises sizes that aren't the default, and must unless they were agreed on elsewhere",
        "test_transmission::test_sizes_that_are_advertised_make_sense",
    ),
    rule(
        SIZES,
        SHOULD,
        "by default takes blocks of one byte and payloads of 32 MiB",
        "test_transmission::test_sizes_by_default_are_any_byte_and_32_mib",
    ),
    rule(
        SIZES,
        SHOULD_NOT,
        "refuses clients that don't ask about sizes",
        "test_options::test_go_never_requires_a_block_size_request",
        "test_options::test_export_name_enters_transmission",
    ),
    rule(
        SIZES,
        MUST,
        "cleanly errors what is outside stricter sizes than the default",
        because="There are no stricter sizes: unaligned requests are aligned by the node.",
    ),
    rule(
        SIZES,
        MUST,
        "the minimum block size is a power of two of at most 64 KiB",
        "test_transmission::test_sizes_that_are_advertised_make_sense",
    ),
    rule(
        SIZES,
        SHOULD,
        "the export's size is a multiple of it",
        "test_transmission::test_sizes_that_are_advertised_make_sense",
    ),
    rule(
        SIZES,
        MUST,
        "the preferred block size is a power of two, and at least the minimum and 512",
        "test_transmission::test_sizes_that_are_advertised_make_sense",
    ),
    rule(
        SIZES,
        MUST,
        "the maximum payload is at least the preferred block size, and should be 1 MiB",
        "test_transmission::test_sizes_that_are_advertised_make_sense",
    ),
    rule(
        SIZES,
        SHOULD_NOT,
        "takes a payload of up to 32 MiB for an attack",
        "test_transmission::test_sizes_up_to_32_mib_are_no_attack",
    ),
    rule(
        SIZES,
        SHOULD_NOT,
        "disconnects on a long TRIM or WRITE_ZEROES",
        "test_transmission::test_sizes_of_commands_without_payload_may_be_larger",
    ),
    rule(
        SIZES,
        SHOULD,
        "answers NBD_EINVAL to what is unaligned or beyond the export's end",
        "test_transmission::test_ranges_past_the_end_are_refused_by_their_own_error",
    ),
    rule(
        COMMAND_FLAGS,
        MUST,
        "accepts FUA with every command",
        "test_transmission::test_flag_fua_is_accepted_with_all_commands",
    ),
    rule(
        COMMAND_FLAGS,
        MUST_NOT,
        "answers a command with FUA before what it writes is stable",
        *PERSISTED,
    ),
    rule(
        COMMAND_FLAGS,
        MUST,
        "takes NO_HOLE where it advertises WRITE_ZEROES",
        "test_transmission::test_flag_no_hole_is_supported",
    ),
    rule(
        COMMAND_FLAGS,
        MUST,
        "fails FAST_ZERO quickly with NBD_ENOTSUP where it wouldn't be fast",
        "test_commands::test_fast_zero_is_quick_and_right_or_changes_nothing",
    ),
    rule(
        READ,
        SHOULD_NOT,
        "disconnects on a read of no length",
        "test_commands::test_no_length_never_disconnects",
    ),
    rule(
        READ,
        MUST,
        "without structured replies, answers with one simple reply and all the data",
        "test_transmission::test_replies_are_simple_where_nothing_else_was_negotiated",
        "test_commands::test_read_answers_with_all_of_the_range",
        "test_commands::test_read_of_the_last_byte_works",
    ),
    rule(
        READ,
        SHOULD,
        "sets the error's number in the reply",
        "test_transmission::test_ranges_past_the_end_are_refused_by_their_own_error",
    ),
    rule(
        READ,
        MUST_NOT,
        "sends data with an error",
        "test_transmission::test_simple_reply_with_an_error_has_no_data",
    ),
    rule(
        READ,
        MUST,
        "disconnects when an error comes up behind a reply that promised data",
        because="A simple reply is begun when all its data has been read.",
    ),
    rule(
        WRITE,
        SHOULD_NOT,
        "disconnects on a write of no length",
        "test_commands::test_no_length_never_disconnects",
    ),
    rule(
        WRITE,
        MUST,
        "writes, and then answers",
        "test_commands::test_write_is_there_when_it_is_answered",
    ),
    rule(
        WRITE,
        MUST,
        "sets the error's number when it fails",
        "test_commands::test_write_that_fails_says_so_and_writes_nothing",
        "unit/nbd/test_transmission_commands::test_the_hosts_error_reaches_the_client",
    ),
    rule(
        DISC,
        MUST,
        "handles what is outstanding, and closes",
        "test_transmission::test_disc_comes_after_what_is_outstanding",
        "test_transmission::test_disc_ends_what_comes_behind_it_unheard",
        "unit/nbd/test_transmission_end::test_disc_waits_for_what_is_in_flight",
    ),
    rule(
        FLUSH,
        MUST_NOT,
        "succeeds before all answered writes are on stable storage",
        "test_commands::test_flush_is_answered",
        *FLUSHED,
    ),
    rule(
        TRIM,
        SHOULD_NOT,
        "disconnects on a trim of no length",
        "test_commands::test_no_length_never_disconnects",
    ),
    rule(
        TRIM,
        MUST_NOT,
        "touches what lies beside the range (it may round inwards only)",
        "test_commands::test_trim_leaves_the_neighbourhood_alone",
    ),
    rule(
        CACHE,
        MUST,
        "sets the error's number when it fails",
        "test_commands::test_cache_fails_with_an_error_value",
    ),
    rule(
        CACHE,
        MUST_NOT,
        "makes any difference but to speed",
        "test_commands::test_cache_changes_nothing_that_is_read",
    ),
    rule(
        CACHE,
        MUST,
        "refuses flags that it doesn't know",
        "test_transmission::test_flags_that_a_command_doesnt_know_are_invalid",
    ),
    rule(
        WRITE_ZEROES,
        SHOULD_NOT,
        "disconnects on a request of no length",
        "test_commands::test_no_length_never_disconnects",
    ),
    rule(
        WRITE_ZEROES,
        MUST,
        "zeroes, and then answers; it reads back as zeroes",
        "test_commands::test_write_zeroes_reads_back_as_zeroes",
    ),
    rule(
        WRITE_ZEROES,
        MUST,
        "provisions the range when NO_HOLE is set",
        "unit/nbd/test_transmission_commands::test_write_zeroes_says_whether_a_hole_will_do",
    ),
    rule(
        WRITE_ZEROES,
        MUST_NOT,
        "fails with NBD_ENOTSUP where FAST_ZERO isn't set",
        "test_transmission::test_error_values_are_those_of_the_document",
    ),
    rule(
        WRITE_ZEROES,
        MUST,
        "fails a FAST_ZERO quickly unless it is faster than a write; changes nothing then",
        "test_commands::test_fast_zero_is_quick_and_right_or_changes_nothing",
    ),
    rule(
        WRITE_ZEROES,
        SHOULD,
        "answers NBD_EINVAL to a FAST_ZERO that it didn't advertise",
        "test_commands::test_fast_zero_is_quick_and_right_or_changes_nothing",
    ),
    rule(
        WRITE_ZEROES,
        SHOULD_NOT,
        "fails a FAST_ZERO with NBD_EOVERFLOW, whatever its length",
        "test_commands::test_fast_zero_is_quick_and_right_or_changes_nothing",
    ),
    rule(
        WRITE_ZEROES,
        MUST,
        "sets the error's number when it fails",
        "test_transmission::test_ranges_past_the_end_are_refused_by_their_own_error",
    ),
    rule(
        WRITE_ZEROES,
        SHOULD,
        "answers NBD_ENOSPC beyond the end, NBD_EPERM on a read-only export",
        "test_transmission::test_ranges_past_the_end_are_refused_by_their_own_error",
        "test_transmission::test_writing_to_a_read_only_export_is_not_permitted",
    ),
    rule(
        ERRORS,
        SHOULD,
        "a write beyond the end gets NBD_ENOSPC, and so do EDQUOT and EFBIG",
        "test_transmission::test_ranges_past_the_end_are_refused_by_their_own_error",
        "unit/nbd/test_transmission_commands::test_the_hosts_error_reaches_the_client",
    ),
    rule(
        ERRORS,
        SHOULD,
        "a read or trim beyond the end gets NBD_EINVAL",
        "test_transmission::test_ranges_past_the_end_are_refused_by_their_own_error",
    ),
    rule(
        ERRORS,
        SHOULD,
        "a write or trim on a read-only export gets NBD_EPERM",
        "test_transmission::test_writing_to_a_read_only_export_is_not_permitted",
    ),
    rule(
        ERRORS,
        SHOULD_NOT,
        "NBD_EOVERFLOW, NBD_ENOTSUP and NBD_ENOMEM aren't for everyday use",
        "test_transmission::test_error_values_are_those_of_the_document",
    ),
    rule(
        ERRORS,
        SHOULD,
        "an unknown command gets NBD_EINVAL",
        "test_transmission::test_unknown_commands_are_invalid",
    ),
    rule(
        ERRORS,
        SHOULD,
        "a flag that is unknown or isn't the command's gets NBD_EINVAL",
        "test_transmission::test_flags_that_a_command_doesnt_know_are_invalid",
        "test_transmission::test_flags_that_werent_negotiated_are_invalid",
    ),
)
