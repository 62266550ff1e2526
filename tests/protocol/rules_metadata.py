# SPDX-License-Identifier: Apache-2.0
"""The duties of servers that know meta contexts."""

from __future__ import annotations

from tests.protocol.rule import MUST, MUST_NOT, SHOULD, SHOULD_NOT, rule

QUERYING = "Metadata querying"
BASE = "The `base:` metadata namespace"
LIST = "NBD_OPT_LIST_META_CONTEXT"
SET = "NBD_OPT_SET_META_CONTEXT"
REPLY = "NBD_REP_META_CONTEXT"
COMMAND_FLAGS = "Command flags"
CHUNK = "NBD_REPLY_TYPE_BLOCK_STATUS"
CHUNK_EXT = "NBD_REPLY_TYPE_BLOCK_STATUS_EXT"
STATUS = "NBD_CMD_BLOCK_STATUS"

OFFERED = "test_metadata::test_status_payload_chooses_among_the_contexts"

RULES = (
    rule(
        QUERYING,
        MUST,
        "a good BLOCK_STATUS is answered by one status chunk for each context",
        "test_metadata::test_status_tells_holes_and_zeroes_in_order",
        "test_metadata::test_contexts_are_good_for_info_and_go_alike",
    ),
    rule(
        QUERYING,
        SHOULD,
        "BLOCK_STATUS without a context gets NBD_EINVAL",
        "test_transmission::test_block_status_without_a_context_is_invalid",
        "test_metadata::test_set_of_no_queries_chooses_nothing",
        "test_metadata::test_set_for_another_export_than_that_of_go_is_as_none",
    ),
    rule(
        QUERYING,
        MUST,
        "the name of a context is a namespace, a colon and a leaf, and a string",
        "test_metadata::test_listed_names_have_a_namespace_and_no_id",
    ),
    rule(
        QUERYING,
        MUST,
        "namespaces are base, nbd-server, x-something, or registered ones",
        "test_metadata::test_list_of_no_queries_is_all_that_set_takes",
    ),
    rule(
        QUERYING,
        SHOULD_NOT,
        "an empty leaf selects a context in SET",
        "test_metadata::test_set_ignores_wild_cards_and_what_it_doesnt_know",
    ),
    rule(
        QUERYING,
        SHOULD,
        "the syntax of queries is documented",
        because="The namespace qemu is QEMU's, and documented by it; there is no other of ours.",
    ),
    rule(
        BASE,
        MUST,
        "`base:` is a wild card in LIST, and ignored in SET",
        "test_metadata::test_list_of_a_query_is_what_matches_it",
        "test_metadata::test_set_ignores_wild_cards_and_what_it_doesnt_know",
    ),
    rule(
        BASE,
        MUST,
        "a leaf that it doesn't know is ignored",
        "test_metadata::test_list_ignores_unknown_namespaces_and_leaves",
        "test_metadata::test_set_ignores_wild_cards_and_what_it_doesnt_know",
    ),
    rule(
        BASE,
        MUST_NOT,
        "a write to what isn't a hole fails for want of space",
        "test_metadata::test_status_says_that_what_isnt_a_hole_can_be_written",
    ),
    rule(
        BASE,
        SHOULD,
        "flags of base:allocation that aren't defined are zero",
        "test_metadata::test_status_tells_holes_and_zeroes_in_order",
    ),
    rule(
        LIST,
        MUST,
        "lengths that lie get NBD_REP_ERR_INVALID",
        "test_metadata::test_queries_with_lengths_that_lie_are_invalid",
    ),
    rule(
        LIST,
        MUST,
        "namespaces that it doesn't know are ignored; where nothing is found, an ACK alone",
        "test_metadata::test_list_ignores_unknown_namespaces_and_leaves",
    ),
    rule(
        LIST,
        MUST,
        "contexts, then an ACK or an error",
        "test_metadata::test_list_of_no_queries_is_all_that_set_takes",
        "test_metadata::test_contexts_of_an_unknown_export_are_an_error",
    ),
    rule(
        LIST,
        MUST,
        "without queries, all that may be selected",
        "test_metadata::test_list_of_no_queries_is_all_that_set_takes",
    ),
    rule(
        LIST,
        SHOULD_NOT,
        "without queries, it is too big",
        "test_metadata::test_list_of_no_queries_is_all_that_set_takes",
    ),
    rule(
        LIST,
        MUST,
        "with queries, what may be selected and matches one",
        "test_metadata::test_list_of_a_query_is_what_matches_it",
        "test_metadata::test_too_many_queries_are_too_big",
    ),
    rule(
        LIST,
        SHOULD,
        "the id in an answer is zero",
        "test_metadata::test_listed_names_have_a_namespace_and_no_id",
    ),
    rule(
        LIST,
        MUST_NOT,
        "asks for extended headers for the sake of `base:`",
        "test_metadata::test_base_contexts_never_need_extended_headers",
    ),
    rule(
        SET,
        SHOULD,
        "without structured replies it gets NBD_REP_ERR_INVALID",
        "test_metadata::test_set_without_structured_replies_is_invalid",
    ),
    rule(
        SET,
        MUST,
        "replaces what was selected, even when it fails",
        "test_metadata::test_set_again_replaces_what_was_chosen_even_if_it_fails",
    ),
    rule(
        SET,
        MUST,
        "without queries, selects nothing",
        "test_metadata::test_set_of_no_queries_chooses_nothing",
    ),
    rule(
        SET,
        MUST,
        "answers with each selected context under an id of its own, then an ACK",
        "test_metadata::test_set_answers_with_the_chosen_contexts_and_unique_ids",
    ),
    rule(
        SET,
        MUST,
        "a context of 64 bits is left out, or fails, without extended headers",
        because="No context has a status of more than 32 bits.",
    ),
    rule(
        REPLY,
        MUST,
        "the name is UTF-8",
        "test_metadata::test_listed_names_have_a_namespace_and_no_id",
    ),
    rule(
        COMMAND_FLAGS,
        MUST_NOT,
        "with REQ_ONE, tells of more than one extent",
        "test_metadata::test_status_with_req_one_is_one_extent_in_the_range",
    ),
    rule(
        CHUNK,
        MUST,
        "has a context's id, and at least one extent, none of them empty",
        "test_metadata::test_status_tells_holes_and_zeroes_in_order",
    ),
    rule(
        CHUNK,
        MUST,
        "with REQ_ONE, the one extent isn't longer than the request",
        "test_metadata::test_status_with_req_one_is_one_extent_in_the_range",
    ),
    rule(
        CHUNK,
        MUST,
        "all extents but the last are shorter together than the request",
        "test_metadata::test_status_tells_holes_and_zeroes_in_order",
    ),
    rule(
        CHUNK,
        SHOULD_NOT,
        "has more than 2^20 extents",
        "test_metadata::test_status_tells_holes_and_zeroes_in_order",
    ),
    rule(
        CHUNK_EXT,
        MUST_NOT,
        "is used without extended headers; with them, the short form isn't",
        "test_metadata::test_status_tells_holes_and_zeroes_in_order",
    ),
    rule(
        CHUNK_EXT,
        MUST,
        "counts its extents, and leaves the upper half of a status of 32 bits zero",
        "test_metadata::test_status_of_64_bits_has_nothing_in_the_upper_half",
    ),
    rule(
        STATUS,
        SHOULD_NOT,
        "a request of no length disconnects",
        "test_metadata::test_status_of_no_length_doesnt_disconnect",
    ),
    rule(
        STATUS,
        MUST,
        "returns an extent at least, so that a client makes progress",
        "test_metadata::test_status_always_makes_progress_to_the_end",
    ),
    rule(
        STATUS,
        SHOULD,
        "neighbours have different states; lengths are multiples of 512 where possible",
        "test_metadata::test_status_of_neighbours_differs_and_is_cut_at_multiples_of_512",
    ),
    rule(
        STATUS,
        SHOULD,
        "lengths are multiples of the minimum block size",
        "test_metadata::test_status_of_neighbours_differs_and_is_cut_at_multiples_of_512",
    ),
    rule(
        STATUS,
        SHOULD,
        "tells a state that is easily told",
        "test_metadata::test_status_tells_what_is_easily_told",
    ),
    rule(
        STATUS,
        SHOULD,
        "errors are in an error chunk; NBD_EINVAL past the export's end",
        "test_metadata::test_status_past_the_end_is_invalid",
    ),
    rule(
        STATUS,
        MUST,
        "takes in a payload that isn't offered or names wrong contexts, and answers NBD_EINVAL",
        OFFERED,
        "test_metadata::test_status_payload_isnt_offered_without_extended_headers",
    ),
)
