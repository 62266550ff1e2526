# SPDX-License-Identifier: Apache-2.0
"""Options for new images: `-o key=value,...` read, checked and shown the way qemu-img does.

The table says which format takes which option, in the order in which qemu-img's "Formatting" line
names them. An option's value is checked for its type here; what it may be is the driver's to say.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from blockemu.drivers.errors import ImageError
from blockemu.drivers.options import parse_size

OptionValue = str | int | bool


@dataclass(frozen=True, slots=True)
class OptionSpec:
    """One option that a format takes."""

    name: str
    kind: type[str] | type[int] | type[bool]
    """str a text, int a size, bool on or off."""
    help: str
    default: OptionValue | None = None
    """Shown where the user gives none."""


_CIPHER = (
    OptionSpec("cipher-alg", str, "Name of encryption cipher algorithm"),
    OptionSpec("cipher-mode", str, "Name of encryption cipher mode"),
    OptionSpec("ivgen-alg", str, "Name of IV generator algorithm"),
    OptionSpec("ivgen-hash-alg", str, "Name of IV generator hash algorithm"),
    OptionSpec("hash-alg", str, "Name of encryption hash algorithm"),
    OptionSpec("iter-time", int, "Time to spend in PBKDF in milliseconds"),
)

RAW = (
    OptionSpec("size", int, "Virtual disk size"),
    OptionSpec("preallocation", str, "Preallocation mode (allowed values: off, falloc, full)"),
)

QCOW2 = (
    OptionSpec("encryption", bool, "Encrypt the image with format 'aes'. (Not for new images)"),
    OptionSpec("encrypt.format", str, "Encrypt the image; the format is luks"),
    OptionSpec("encrypt.key-secret", str, "ID of the secret that is the LUKS passphrase"),
    *(OptionSpec(f"encrypt.{spec.name}", spec.kind, spec.help) for spec in _CIPHER),
    OptionSpec("cluster_size", int, "qcow2 cluster size", 65536),
    OptionSpec("extended_l2", bool, "Extended L2 tables", False),
    OptionSpec(
        "preallocation", str, "Preallocation mode (allowed values: off, metadata, falloc, full)"
    ),
    OptionSpec(
        "compression_type",
        str,
        "Compression method used for image cluster compression",
        "zlib",
    ),
    OptionSpec("size", int, "Virtual disk size"),
    OptionSpec("compat", str, "Compatibility level (v2 [0.10] or v3 [1.1])"),
    OptionSpec("backing_file", str, "File name of a base image"),
    OptionSpec("backing_fmt", str, "Image format of the base image"),
    OptionSpec("data_file", str, "File name of an external data file"),
    OptionSpec("data_file_raw", bool, "The external data file must stay valid as a raw image"),
    OptionSpec("lazy_refcounts", bool, "Postpone refcount updates", False),
    OptionSpec("refcount_bits", int, "Width of a reference count entry in bits", 16),
)

LUKS = (
    OptionSpec("size", int, "Virtual disk size"),
    OptionSpec("key-secret", str, "ID of the secret that is the LUKS passphrase"),
    *_CIPHER,
)

FORMATS: dict[str, tuple[OptionSpec, ...]] = {"raw": RAW, "qcow2": QCOW2, "luks": LUKS}
"""The formats that can be created."""

KEY_SLOTS = (
    OptionSpec("state", str, "Select new state of affected keyslots (active/inactive)"),
    OptionSpec("new-secret", str, "ID of the secret for the new keyslot"),
    OptionSpec("old-secret", str, "ID of the secret that affected keyslots have now"),
    OptionSpec("keyslot", int, "Select a single keyslot to modify explicitly"),
    OptionSpec("iter-time", int, "Time to spend in PBKDF in milliseconds"),
)
"""Of `img amend`, behind `encrypt.` for qcow2."""

_KIND_WORDS = {str: "<str>", int: "<size>", bool: "<bool (on/off)>"}
_ON_OFF = {
    "on": True,
    "off": False,
    "yes": True,
    "no": False,
    "true": True,
    "false": False,
    "y": True,
    "n": False,
}


def help_wanted(text: str) -> bool:
    """Whether `-o text` asks for the list of options."""
    return any(key in ("help", "?") for key in split_commas(text))


def split_commas(text: str) -> list[str]:
    """The parts between single commas; a doubled comma is one that belongs to the value."""
    parts = [part.replace("\0", ",") for part in text.replace(",,", "\0").split(",")]
    return [part for part in parts if part]


def parse_options(
    name: str, fmt: str, texts: Iterable[str], *, more: Iterable[OptionSpec] = ()
) -> dict[str, OptionValue]:
    """What the user's `-o` texts say for the image `name`; later ones win. Raises: ImageError.

    `more`: options besides those of new images.
    """
    specs = {spec.name: spec for spec in (*format_options(name, fmt), *more)}
    found: dict[str, OptionValue] = {}
    for text in texts:
        if not text.strip(","):
            raise ImageError(name, f"'-o {text}' holds no option")
        for part in split_commas(text):
            key, equals, value = part.partition("=")
            if key not in specs:
                raise ImageError(name, f"format {fmt} has no option '{key}'")
            if not equals and specs[key].kind is not bool:
                raise ImageError(name, f"option '{key}' needs a value: {key}=...")
            found[key] = _parse_value(name, specs[key], value if equals else "on")
    return found


def _parse_value(name: str, spec: OptionSpec, text: str) -> OptionValue:
    if spec.kind is bool:
        if text not in _ON_OFF:
            raise ImageError(name, f"option '{spec.name}' is 'on' or 'off', not '{text}'")
        return _ON_OFF[text]
    if spec.kind is int:
        try:
            return parse_size(text)
        except ValueError as error:
            raise ImageError(name, f"option '{spec.name}': {error}") from error
    return text


def format_options(name: str, fmt: str) -> tuple[OptionSpec, ...]:
    """The options of `fmt`. Raises: ImageError, which names the image `name`."""
    if fmt not in FORMATS:
        known = ", ".join(sorted(FORMATS))
        raise ImageError(name, f"can't create format '{fmt}'; known: {known}")
    return FORMATS[fmt]


def options_help(fmt: str) -> str:
    """What `-o help` prints. Raises: ImageError."""
    lines = [f"Supported {fmt} options:"]
    lines += help_lines(format_options("-f", fmt))
    return "\n".join(lines)


def help_lines(specs: Iterable[OptionSpec]) -> list[str]:
    """A line for each option, by name."""
    found = []
    for spec in sorted(specs, key=lambda spec: spec.name):
        usage = f"{spec.name}={_KIND_WORDS[spec.kind]}"
        found.append(f"  {usage:<22} - {spec.help}")
    return found


def formatting_line(name: str, fmt: str, options: dict[str, OptionValue]) -> str:
    """The line that qemu-img prints before it creates an image."""
    words = []
    for spec in FORMATS[fmt]:
        value = options.get(spec.name, spec.default)
        if value is not None:
            words.append(f"{spec.name}={_shown(value)}")
    return f"Formatting '{name}', fmt={fmt} " + " ".join(words)


def _shown(value: OptionValue) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return str(value).replace(",", ",,")
