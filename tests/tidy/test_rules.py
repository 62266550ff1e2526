# SPDX-License-Identifier: Apache-2.0
"""Each rule can fail, lets good code pass, and says what to do instead."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.tidy.rules import (
    LINES_MAX,
    RULES,
    Rule,
    Source,
    file_is_short,
    files_are_opened_through_the_engine,
    floors_import_downwards,
    imports_are_absolute,
    licence_is_named,
    module_says_what_it_is,
    name_says_something,
    names_no_path_of_this_machine,
    no_test_sleeps,
    seams_are_kept,
)

# The rule, a file that breaks it, and what its message must say, the fix above all.
BROKEN = [
    (floors_import_downwards, "loop/timer.py", "from blockemu.drivers import node", "hand it in"),
    (floors_import_downwards, "jobs/mirror.py", "import blockemu.nbd.server", "hand it in"),
    (floors_import_downwards, "drivers/raw.py", "from blockemu import limits", "hand it in"),
    (floors_import_downwards, "drivers/raw.py", "def f():\n import blockemu.jobs", "raw.py:2: "),
    (imports_are_absolute, "loop/timer.py", "from .clock import Clock", "write out"),
    (imports_are_absolute, "blockemu/daemon.py", "import loop.timer", "write blockemu.loop.timer"),
    (seams_are_kept, "drivers/null.py", "import time", "ctx.now_ns()"),
    (seams_are_kept, "loop/timer.py", "from time import monotonic", "loop/clock.py"),
    (seams_are_kept, "blockemu/daemon.py", "import threading", "IOThread"),
    (seams_are_kept, "blockemu/daemon.py", "import select", "set_fd_handler()"),
    (seams_are_kept, "jobs/job.py", "import random", "hand in the generator"),
    (seams_are_kept, "jobs/job.py", "import os\nos.urandom(8)", "job.py:2: os.urandom"),
    (seams_are_kept, "drivers/file.py", "import os\nos.pread(0, 1, 2)", "FileEngine"),
    (seams_are_kept, "drivers/file.py", "import os as o\no.preadv(0, [], 2)", "os.preadv"),
    (seams_are_kept, "drivers/file.py", "from os import fsync", "FileEngine"),
    (seams_are_kept, "drivers/nbd.py", "import socket", "floor 4"),
    (seams_are_kept, "blockemu/daemon.py", "import signal\nsignal.signal(1, f)", "SignalWatcher"),
    (seams_are_kept, "loop/aio_context.py", "import asyncio", "no file"),
    (files_are_opened_through_the_engine, "drivers/raw.py", "open('x')", "HostFile"),
    (no_test_sleeps, "tests/unit/test_x.py", "import time\ntime.sleep(1)", "VirtualClock"),
    (no_test_sleeps, "tests/unit/test_x.py", "from time import sleep", "VirtualClock"),
    (licence_is_named, "loop/timer.py", "'''Timers.'''", "begin with a comment"),
    (module_says_what_it_is, "loop/timer.py", "x = 1", "begin with"),
    (file_is_short, "loop/timer.py", "\n" * (LINES_MAX + 1), "second idea"),
    (name_says_something, "drivers/qcow2/utils.py", "", "name the module"),
    (name_says_something, "loop/common/clock.py", "", "name the module"),
]

# The same rules, and what they must not complain of.
KEPT = [
    (floors_import_downwards, "jobs/mirror.py", "from blockemu.drivers import node"),
    (floors_import_downwards, "blockemu/daemon.py", "import blockemu.jobs.job"),
    (floors_import_downwards, "tests/unit/test_x.py", "import blockemu.jobs.job"),
    (floors_import_downwards, "loop/timer.py", "import blockemu_extras"),
    (imports_are_absolute, "blockemu/daemon.py", "import blockemu.loop.timer"),
    (seams_are_kept, "loop/clock.py", "import time"),
    (seams_are_kept, "blockemu/daemon.py", "import signal\nsignal.SIGTERM"),
    (seams_are_kept, "drivers/file.py", "import os\nos.path.join('a', 'b')"),
    (seams_are_kept, "drivers/file.py", "time = 1\ntime.sleep"),
    (seams_are_kept, "tests/unit/test_x.py", "import random"),
    (files_are_opened_through_the_engine, "drivers/raw.py", "opener.open('x')"),
    (files_are_opened_through_the_engine, "blockemu/config.py", "open('x')"),
    (no_test_sleeps, "tests/unit/test_x.py", "import time\ntime.monotonic_ns()"),
    (licence_is_named, "tools/x", "#!/bin/sh\n# SPDX-License-Identifier: Apache-2.0"),
    (module_says_what_it_is, "loop/timer.py", "'''Timers.'''"),
    (file_is_short, "loop/timer.py", "\n" * LINES_MAX),
    (name_says_something, "drivers/commonwealth.py", ""),
]


@pytest.mark.parametrize(("rule", "path", "text", "says"), BROKEN)
def test_rule_broken_complains_with_place_and_fix(
    rule: Rule, path: str, text: str, says: str
) -> None:
    complaints = list(rule(Source(path, text)))
    assert complaints, "the rule sees nothing wrong"
    assert all(complaint.startswith(path) for complaint in complaints)
    assert any(says in complaint for complaint in complaints)


@pytest.mark.parametrize(("rule", "path", "text"), KEPT)
def test_rule_kept_is_silent(rule: Rule, path: str, text: str) -> None:
    assert list(rule(Source(path, text))) == []


def test_every_rule_is_shown_broken_and_kept() -> None:
    assert {rule for rule, *_ in BROKEN} == set(RULES)
    assert {rule for rule, *_ in KEPT} == set(RULES)


def test_path_of_this_machine_found_complains() -> None:
    clone = Path("/srv/someone/clone")
    source = Source("docs/x.md", "fine\ncd /srv/someone/clone && make\n")
    [complaint] = names_no_path_of_this_machine(source, clone)
    assert complaint.startswith("docs/x.md:2: names /srv/someone/clone")
    assert list(names_no_path_of_this_machine(Source("x", "/srv/someone/cloned"), clone)) == []


def test_path_of_a_clone_below_the_root_is_not_looked_for() -> None:
    assert list(names_no_path_of_this_machine(Source("x", "COPY . /src"), Path("/src"))) == []
