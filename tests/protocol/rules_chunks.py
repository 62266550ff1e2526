# SPDX-License-Identifier: Apache-2.0
"""The duties of servers whose replies come in chunks: structured ones, and extended ones."""

from __future__ import annotations

from tests.protocol.rule import MUST, MUST_NOT, SHOULD, SHOULD_NOT, rule

STRUCTURED_REPLY = "NBD_OPT_STRUCTURED_REPLY"
SIMPLE_REPLY = "Simple reply message"
CHUNKS = "Structured reply chunk message"
FLAGS = "Structured reply flags"
TYPES = "Structured reply types"
READ = "NBD_CMD_READ"
TRANSMISSION_FLAGS = "Transmission flags"
EXTENDED_HEADERS = "NBD_OPT_EXTENDED_HEADERS"
EXTENDED_REQUEST = "Request message (extended)"
EXTENDED_CHUNKS = "Extended reply chunk message"

KEEP_THE_RULES = (
    "test_chunks::test_chunks_of_any_request_keep_the_rules",
    "test_chunks::test_chunks_interleaved_with_other_replies_stay_whole",
)
NO_LATE_ERRORS = (
    "A chunk of data is begun when the data has been read; an error takes the place of the rest."
)

STRUCTURED_RULES = (
    rule(
        STRUCTURED_REPLY,
        SHOULD,
        "refuses it with NBD_REP_ERR_INVALID when it has data",
        "test_chunks::test_asking_for_chunks_with_data_is_invalid",
    ),
    rule(
        STRUCTURED_REPLY,
        MUST,
        "once acknowledged, READ is answered by structured replies",
        "test_chunks::test_structured_replies_are_acknowledged_and_used",
        "test_chunks::test_structured_replies_work_after_export_name",
        "test_chunks::test_read_behind_the_acknowledgement_is_heard",
    ),
    rule(
        STRUCTURED_REPLY,
        SHOULD_NOT,
        "advertises what needs structured replies before they are negotiated",
        "test_options::test_transmission_flag_df_is_clear_without_structured_replies",
        "test_chunks::test_structured_replies_agreed_on_after_info_are_in_the_flags_of_go",
    ),
    rule(
        TRANSMISSION_FLAGS,
        MUST,
        "NBD_FLAG_SEND_DF is set where READ knows DF",
        "test_chunks::test_flag_df_is_set_where_df_is_supported",
    ),
    rule(
        CHUNKS,
        MUST_NOT,
        "sends chunks without having negotiated them",
        "test_transmission::test_replies_are_simple_where_nothing_else_was_negotiated",
    ),
    rule(
        CHUNKS,
        MUST,
        "answers in chunks where there is a payload; a READ always, even when it fails early",
        "test_chunks::test_chunks_answer_a_read_even_if_it_fails_early",
    ),
    rule(
        CHUNKS,
        SHOULD,
        "sends errors in chunks, for the sake of their text",
        "test_chunks::test_chunks_carry_errors_with_a_text",
    ),
    rule(CHUNKS, MUST, "the chunk that is marked as the last one is the last", *KEEP_THE_RULES),
    rule(
        CHUNKS,
        SHOULD,
        "sends as few chunks as it can",
        "test_chunks::test_chunks_of_plain_data_are_few",
    ),
    rule(
        CHUNKS,
        MUST_NOT,
        "marks a chunk as the last one while an error may still come up",
        because=NO_LATE_ERRORS,
    ),
    rule(FLAGS, MUST, "DONE is set on the last chunk, and on no other", *KEEP_THE_RULES),
    rule(FLAGS, MUST, "DONE is always set on NONE", *KEEP_THE_RULES),
    rule(FLAGS, MUST_NOT, "no other flag is set", *KEEP_THE_RULES),
    rule(
        TYPES,
        MUST_NOT,
        "a chunk's variable part is longer than the maximum payload",
        "test_chunks::test_chunks_have_no_more_data_than_the_maximum_payload",
    ),
    rule(TYPES, MUST, "NONE has no payload and is the last chunk", *KEEP_THE_RULES),
    rule(
        TYPES,
        MUST,
        "data and holes lie in the request's range, aren't empty and don't overlap",
        "test_chunks::test_read_of_data_and_holes_covers_all_of_it",
        *KEEP_THE_RULES,
    ),
    rule(
        TYPES,
        MUST,
        "a hole's payload has 12 bytes, and its size isn't zero",
        "test_chunks::test_read_of_data_and_holes_covers_all_of_it",
    ),
    rule(
        TYPES,
        MUST,
        "an error's number isn't zero, and its message fits and has at most 4096 bytes",
        "test_chunks::test_chunks_carry_errors_with_a_text",
    ),
    rule(TYPES, SHOULD_NOT, "ERROR comes more than once in a reply", *KEEP_THE_RULES),
    rule(
        TYPES,
        MUST,
        "an ERROR_OFFSET's offset lies in the request's range",
        "test_chunks::test_chunks_carry_errors_with_a_text",
    ),
    rule(
        TYPES,
        SHOULD_NOT,
        "ERROR_OFFSET repeats an offset, or has several in one content chunk",
        because="A reply has one error at most.",
    ),
    rule(
        READ,
        MUST,
        "in chunks, the answer has one or more of them, and the last is marked",
        *KEEP_THE_RULES,
    ),
    rule(
        READ,
        SHOULD,
        "content is cut at multiples of 512 where it can be",
        "test_chunks::test_read_is_cut_at_multiples_of_512",
    ),
    rule(
        READ,
        MUST,
        "without an error, content covers all of the request's range",
        "test_chunks::test_read_of_data_and_holes_covers_all_of_it",
        "test_chunks::test_chunks_of_plain_data_are_few",
    ),
    rule(READ, MUST, "an error completes the chunk that it comes up in", because=NO_LATE_ERRORS),
    rule(
        READ,
        MUST,
        "an error is told in an error chunk, behind content for the same offset",
        "test_chunks::test_chunks_carry_errors_with_a_text",
    ),
    rule(
        READ,
        SHOULD_NOT,
        "mixes errors with and without an offset",
        because="A reply has one error at most.",
    ),
    rule(
        READ,
        MUST,
        "with DF, sends one content chunk at most, and data where there are holes in it, too",
        "test_chunks::test_read_with_df_is_in_one_chunk_of_data",
    ),
    rule(
        READ,
        MUST_NOT,
        "sends content when it refuses a DF that is too long",
        "test_chunks::test_read_with_df_too_long_for_one_chunk_has_no_content",
    ),
    rule(
        READ,
        MUST,
        "serves DF up to 65,536 bytes",
        "test_chunks::test_read_with_df_is_in_one_chunk_of_data",
    ),
)

EXTENDED_RULES = (
    rule(
        EXTENDED_HEADERS,
        SHOULD,
        "refuses it with NBD_REP_ERR_INVALID when it has data",
        "test_chunks::test_asking_for_chunks_with_data_is_invalid",
    ),
    rule(
        EXTENDED_HEADERS,
        MUST,
        "serves GO where it acknowledges extended headers",
        "test_extended::test_extended_headers_never_require_more",
        "test_extended::test_extended_headers_take_precedence_over_structured_replies",
    ),
    rule(
        EXTENDED_HEADERS,
        SHOULD,
        "acknowledges without structured replies before",
        "test_extended::test_extended_headers_are_acknowledged_without_structured_replies",
    ),
    rule(
        EXTENDED_HEADERS,
        MUST,
        "once acknowledged, all replies have extended headers",
        "test_extended::test_extended_replies_answer_everything_and_name_the_requests_offset",
    ),
    rule(
        STRUCTURED_REPLY,
        MUST,
        "is refused with NBD_REP_ERR_EXT_HEADER_REQD after extended headers",
        "test_extended::test_structured_replies_after_extended_headers_are_refused",
    ),
    rule(
        EXTENDED_REQUEST,
        MUST,
        "a WRITE without its payload flag is invalid",
        "test_extended::test_write_needs_its_payload_flag",
        "test_extended::test_extended_write_of_the_maximum_payload_is_taken",
    ),
    rule(
        EXTENDED_REQUEST,
        SHOULD,
        "disconnects on a payload that is longer than the maximum",
        "test_extended::test_payload_longer_than_the_maximum_disconnects",
    ),
    rule(
        EXTENDED_REQUEST,
        SHOULD,
        "takes in a payload that it didn't expect, answers NBD_EINVAL and goes on",
        "test_extended::test_payload_that_isnt_expected_is_consumed_and_invalid",
    ),
    rule(
        EXTENDED_REQUEST,
        MUST,
        "an effect length has 64 bits",
        "test_extended::test_effect_lengths_may_have_64_bits",
    ),
    rule(
        EXTENDED_CHUNKS,
        MUST,
        "every reply is an extended one, and has its request's cookie and offset",
        "test_extended::test_extended_replies_answer_everything_and_name_the_requests_offset",
    ),
    rule(
        EXTENDED_CHUNKS,
        MUST_NOT,
        "sends simple replies",
        "test_extended::test_extended_replies_answer_everything_and_name_the_requests_offset",
    ),
    rule(
        TRANSMISSION_FLAGS,
        MUST_NOT,
        "advertises NBD_FLAG_BLOCK_STATUS_PAYLOAD without extended headers",
        "test_extended::test_block_status_payload_needs_extended_headers",
    ),
    rule(
        TRANSMISSION_FLAGS,
        SHOULD_NOT,
        "advertises NBD_FLAG_BLOCK_STATUS_PAYLOAD without meta contexts",
        "test_extended::test_block_status_payload_that_isnt_offered_is_consumed_and_invalid",
    ),
    rule(
        "Maximum interoperability",
        SHOULD_NOT,
        "requires extended headers of GO",
        "test_extended::test_extended_headers_never_require_more",
    ),
)

RULES = (*STRUCTURED_RULES, *EXTENDED_RULES)
