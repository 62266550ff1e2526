# SPDX-License-Identifier: Apache-2.0
"""The duties of servers about TLS."""

from __future__ import annotations

from tests.protocol.rule import MUST, MUST_NOT, SHOULD, SHOULD_NOT, rule

MODES = "Server-side requirements"
NOTLS = "NOTLS mode"
FORCED = "FORCEDTLS mode"
SELECTIVE = "SELECTIVETLS mode"
VERSIONS = "TLS versions"
DOWNGRADE = "Protocol downgrade attacks"
STARTTLS = "NBD_OPT_STARTTLS"
HAGGLING = "Termination of the session during option haggling"
TERMINATING = "Terminating the transmission phase"
INFO = "NBD_OPT_INFO and NBD_OPT_GO"

NO_TLS_ONLY_EXPORT = "No export is for TLS only: a server insists on TLS for all, or for none."

RULES = (
    rule(
        MODES,
        MUST,
        "is in one of the three modes, and stays in it for a connection",
        "test_tls::test_notls_refuses_starttls_and_goes_on",
        "test_tls::test_forced_asks_for_tls_whatever_is_asked_of_it",
        "test_tls::test_selective_serves_without_tls",
    ),
    rule(
        MODES,
        MUST,
        "has no TLS without fixed newstyle on both sides",
        "test_tls::test_forced_gives_nothing_to_who_cant_have_tls",
    ),
    rule(
        NOTLS,
        MUST,
        "answers STARTTLS with NBD_REP_ERR_POLICY, NBD_REP_ERR_UNSUP or another fit error",
        "test_tls::test_notls_refuses_starttls_and_goes_on",
    ),
    rule(
        NOTLS,
        MUST_NOT,
        "answers anything with NBD_REP_ERR_TLS_REQD",
        "test_tls::test_notls_never_asks_for_tls",
    ),
    rule(
        FORCED,
        MUST,
        "acknowledges STARTTLS; then all goes through TLS",
        "test_tls::test_starttls_is_acknowledged_and_all_goes_through_tls",
    ),
    rule(
        FORCED,
        MUST,
        "answers a second STARTTLS with NBD_REP_ERR_INVALID",
        "test_tls::test_starttls_again_is_invalid",
    ),
    rule(
        FORCED,
        MUST,
        "ends the session when the handshake fails",
        "test_tls::test_a_handshake_that_fails_ends_the_session",
        "test_tls::test_a_client_that_trusts_nobody_is_let_go",
    ),
    rule(
        FORCED,
        MUST,
        "answers every other option before TLS, GO and unknown ones, too, with"
        " NBD_REP_ERR_TLS_REQD (but ABORT)",
        "test_tls::test_forced_asks_for_tls_whatever_is_asked_of_it",
        "test_tls::test_forced_acknowledges_abort_without_tls",
    ),
    rule(
        FORCED,
        MUST,
        "ends the session on EXPORT_NAME before TLS",
        "test_tls::test_forced_ends_the_session_on_export_name",
    ),
    rule(
        FORCED,
        MUST_NOT,
        "sends NBD_REP_ERR_TLS_REQD after TLS",
        "test_tls::test_after_tls_nothing_asks_for_it",
    ),
    rule(
        SELECTIVE,
        MUST,
        "acknowledges STARTTLS, and answers a second one with NBD_REP_ERR_INVALID",
        "test_tls::test_starttls_is_acknowledged_and_all_goes_through_tls",
        "test_tls::test_starttls_again_is_invalid",
    ),
    rule(
        SELECTIVE,
        MUST,
        "answers INFO and GO for a TLS-only export before TLS with NBD_REP_ERR_TLS_REQD",
        because=NO_TLS_ONLY_EXPORT,
    ),
    rule(
        SELECTIVE,
        MUST,
        "ends the session on EXPORT_NAME for a TLS-only export before TLS",
        because=NO_TLS_ONLY_EXPORT,
    ),
    rule(
        SELECTIVE,
        MUST_NOT,
        "sends NBD_REP_ERR_TLS_REQD after TLS, or but for INFO and GO of TLS-only exports",
        "test_tls::test_selective_serves_without_tls",
        "test_tls::test_after_tls_nothing_asks_for_it",
    ),
    rule(
        INFO,
        MUST_NOT,
        "a FORCEDTLS server sends NBD_REP_INFO before TLS",
        "test_tls::test_forced_asks_for_tls_whatever_is_asked_of_it",
    ),
    rule(
        VERSIONS,
        MUST,
        "speaks TLS 1.2, and should speak later versions",
        "test_tls::test_tls_versions_from_1_2_on_are_spoken",
    ),
    rule(
        VERSIONS,
        SHOULD_NOT,
        "speaks older versions by default",
        "test_tls::test_tls_versions_before_1_2_are_not_spoken",
    ),
    rule(
        DOWNGRADE,
        SHOULD,
        "insists on TLS where it fears downgrade attacks",
        "test_tls::test_forced_asks_for_tls_whatever_is_asked_of_it",
        "test_tls::test_forced_ends_the_session_on_export_name",
    ),
    rule(
        STARTTLS,
        MUST,
        "acknowledges, or answers with an error that is fit (INVALID when it has data)",
        "test_tls::test_starttls_with_data_is_invalid",
    ),
    rule(
        STARTTLS,
        MUST_NOT,
        "keeps what was negotiated before it",
        "test_tls::test_starttls_forgets_what_was_agreed_on",
    ),
    rule(
        HAGGLING,
        SHOULD,
        "closes TLS before the connection",
        "test_tls::test_abort_closes_tls_and_then_the_connection",
    ),
    rule(
        TERMINATING,
        MUST,
        "after DISC closes TLS, and then the connection",
        "test_tls::test_disc_closes_tls_and_then_the_connection",
    ),
)
