# SPDX-License-Identifier: Apache-2.0
"""The life of a job, as two tables: which state may follow which, and which verb is heard in which.

The states and verbs are those of QEMU's job layer, because clients of its control protocol know
them by name. The tables are the whole truth: `Job` (job.py) asks them before every step, so a
transition that isn't listed here can't happen, and a verb that isn't listed is refused.

    created --> running <--> paused            running: the coroutine works
       |         |   |                         ready:   work goes on, but may be completed now
       |         |   +--> ready <--> standby   paused, standby: the same two, held by a user
       |         |          |
       |         +--> waiting --> pending --> concluded --> null
       |              |           |            ^
       +--------------+-- aborting +-----------+

waiting: done, others of its transaction aren't; pending: done, a user has to say `finalize`;
concluded: over, its result can be read until `dismiss`; null: forgotten.
"""

from __future__ import annotations

import enum


class JobState(enum.Enum):
    """Where a job is in its life; the value is the name that clients see."""

    UNDEFINED = "undefined"
    CREATED = "created"
    RUNNING = "running"
    PAUSED = "paused"
    READY = "ready"
    STANDBY = "standby"
    WAITING = "waiting"
    PENDING = "pending"
    ABORTING = "aborting"
    CONCLUDED = "concluded"
    NULL = "null"


class JobVerb(enum.Enum):
    """What a user can ask of a job; the value is the name that clients see."""

    CANCEL = "cancel"
    PAUSE = "pause"
    RESUME = "resume"
    SET_SPEED = "set-speed"
    COMPLETE = "complete"
    FINALIZE = "finalize"
    DISMISS = "dismiss"


_S = JobState

TRANSITIONS: dict[JobState, frozenset[JobState]] = {
    _S.UNDEFINED: frozenset({_S.CREATED}),
    _S.CREATED: frozenset({_S.RUNNING, _S.ABORTING, _S.NULL}),
    _S.RUNNING: frozenset({_S.PAUSED, _S.READY, _S.WAITING, _S.ABORTING}),
    _S.PAUSED: frozenset({_S.RUNNING}),
    _S.READY: frozenset({_S.STANDBY, _S.WAITING, _S.ABORTING}),
    _S.STANDBY: frozenset({_S.READY}),
    _S.WAITING: frozenset({_S.PENDING, _S.ABORTING}),
    _S.PENDING: frozenset({_S.ABORTING, _S.CONCLUDED}),
    _S.ABORTING: frozenset({_S.ABORTING, _S.CONCLUDED}),
    _S.CONCLUDED: frozenset({_S.NULL}),
    _S.NULL: frozenset(),
}
"""State -> the states that may follow it."""

_WORKING = frozenset({_S.CREATED, _S.RUNNING, _S.PAUSED, _S.READY, _S.STANDBY})

VERBS: dict[JobVerb, frozenset[JobState]] = {
    JobVerb.CANCEL: _WORKING | {_S.WAITING, _S.PENDING},
    JobVerb.PAUSE: _WORKING,
    JobVerb.RESUME: _WORKING,
    JobVerb.SET_SPEED: _WORKING,
    JobVerb.COMPLETE: frozenset({_S.READY}),
    JobVerb.FINALIZE: frozenset({_S.PENDING}),
    JobVerb.DISMISS: frozenset({_S.CONCLUDED}),
}
"""Verb -> the states in which it is heard."""


def transition_allowed(old: JobState, new: JobState) -> bool:
    """Whether `new` may follow `old`."""
    return new in TRANSITIONS[old]


def verb_allowed(verb: JobVerb, state: JobState) -> bool:
    """Whether a job in `state` listens to `verb`."""
    return state in VERBS[verb]
