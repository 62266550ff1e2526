# SPDX-License-Identifier: Apache-2.0
"""The tables of job states, pair by pair, against a drawing of them made by hand."""

from __future__ import annotations

import pytest

from blockemu.jobs.states import (
    TRANSITIONS,
    VERBS,
    JobState,
    JobVerb,
    transition_allowed,
    verb_allowed,
)

STATES = list(JobState)

# Columns in the order of JobState: undefined created running paused ready standby waiting pending
# aborting concluded null. An x: the state of the column may follow; the verb is heard in it.
TRANSITION_ROWS = {
    "undefined": ".x.........",
    "created": "..x.....x.x",
    "running": "...xx.x.x..",
    "paused": "..x........",
    "ready": ".....xx.x..",
    "standby": "....x......",
    "waiting": ".......xx..",
    "pending": "........xx.",
    "aborting": "........xx.",
    "concluded": "..........x",
    "null": "...........",
}
VERB_ROWS = {
    "cancel": ".xxxxxxx...",
    "pause": ".xxxxx.....",
    "resume": ".xxxxx.....",
    "set-speed": ".xxxxx.....",
    "complete": "....x......",
    "finalize": ".......x...",
    "dismiss": ".........x.",
}


@pytest.mark.parametrize("new", STATES, ids=lambda state: state.value)
@pytest.mark.parametrize("old", STATES, ids=lambda state: state.value)
def test_transition_pair_is_as_drawn(old: JobState, new: JobState) -> None:
    drawn = TRANSITION_ROWS[old.value][STATES.index(new)] == "x"
    assert transition_allowed(old, new) is drawn


@pytest.mark.parametrize("state", STATES, ids=lambda state: state.value)
@pytest.mark.parametrize("verb", list(JobVerb), ids=lambda verb: verb.value)
def test_verb_pair_is_as_drawn(verb: JobVerb, state: JobState) -> None:
    drawn = VERB_ROWS[verb.value][STATES.index(state)] == "x"
    assert verb_allowed(verb, state) is drawn


def test_tables_name_every_state_and_verb() -> None:
    assert set(TRANSITIONS) == set(JobState)
    assert set(VERBS) == set(JobVerb)


def test_every_state_but_the_last_leads_to_null() -> None:
    for state in JobState:
        seen = {state}
        edge = [state]
        while edge:
            edge = [new for old in edge for new in TRANSITIONS[old] if new not in seen]
            seen.update(edge)
        assert JobState.NULL in seen, state
