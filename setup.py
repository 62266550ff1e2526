# SPDX-License-Identifier: Apache-2.0
"""Which folder is which package, and what cffi compiles.

The four floors of the house are top-level folders, yet only one name, `blockemu`, lands in
site-packages: `loop/` is imported as `blockemu.loop`, and so on. Sub-packages are found, not
listed: a folder with an `__init__.py` is one. Everything else stands in pyproject.toml.
"""

from __future__ import annotations

from pathlib import Path

from setuptools import find_packages, setup

FLOORS = {
    "blockemu.loop": "loop",
    "blockemu.drivers": "drivers",
    "blockemu.jobs": "jobs",
    "blockemu": "blockemu",
}
HERE = Path(__file__).parent


def packages_below(package: str, folder: str) -> list[str]:
    """The package in `folder`, and every package below it, by their import names."""
    if not (HERE / folder / "__init__.py").is_file():
        return []
    return [package, *(f"{package}.{name}" for name in find_packages(str(HERE / folder)))]


setup(
    packages=[name for floor in FLOORS.items() for name in packages_below(*floor)],
    package_dir=FLOORS,
    package_data={"": ["py.typed", "*.pyi"]},
    cffi_modules=[
        f"{script.relative_to(HERE)}:ffibuilder"
        for folder in FLOORS.values()
        for script in sorted((HERE / folder).rglob("_*_build.py"))
    ],
    # One wheel for every CPython from 3.11 on: cffi builds against the limited API.
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
