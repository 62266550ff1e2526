# SPDX-License-Identifier: Apache-2.0
"""What every test run shares: hypothesis profiles, a printed seed, marks that need the machine.

The seed is chosen here and printed in the header, so that any run can be replayed with
`pytest --hypothesis-seed=N`. Tests that draw on their own (the differential and the simulation
tests) take the `seed` fixture, which is the same number: one option replays them all.
"""

from __future__ import annotations

import os
import secrets

import hypothesis
import pytest

from tests.peers.requirement import in_ci, require_root

SEED_BITS = 32

hypothesis.settings.register_profile("dev", deadline=None, max_examples=50)
hypothesis.settings.register_profile(
    "ci",
    deadline=None,
    max_examples=200,
    print_blob=True,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """Choose the profile and the seed before hypothesis' own plugin looks at its options."""
    profile = os.environ.get("HYPOTHESIS_PROFILE") or ("ci" if in_ci() else "dev")
    hypothesis.settings.load_profile(profile)
    if config.getoption("--hypothesis-seed") is None:
        config.option.hypothesis_seed = str(secrets.randbits(SEED_BITS))


def pytest_report_header(config: pytest.Config) -> str:
    """How to run exactly this again."""
    seed = config.getoption("--hypothesis-seed")
    return f"seed: {seed} (replay with: pytest --hypothesis-seed={seed})"


@pytest.fixture(scope="session")
def seed(pytestconfig: pytest.Config) -> int:
    """The run's seed, for tests with a random generator of their own: `random.Random(seed)`."""
    return int(pytestconfig.getoption("--hypothesis-seed"))


@pytest.fixture(autouse=True)
def _needs_of_marks(request: pytest.FixtureRequest) -> None:
    if request.node.get_closest_marker("root") is not None:
        require_root()
