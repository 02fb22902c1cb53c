"""Abilities of a processor, as it tells them."""

from __future__ import annotations

import pytest

from mnemosyne.kernels.cpu.library import flags_of

X86 = "processor\t: 0\nflags\t\t: fpu sse2 avx2\nbugs\t\t: spectre_v1\n\n"
ARM = "processor\t: 0\nBogoMIPS\t: 50.00\nFeatures\t: fp asimd bf16\nCPU part\t: 0xd0c\n\n"


@pytest.mark.parametrize(
    ("info", "flags"),
    [
        (2 * X86, {"fpu", "sse2", "avx2"}),
        (2 * ARM, {"fp", "asimd", "bf16"}),
        ("processor\t: 0\nhart\t: 2\nisa\t: rv64imafdc\n", set()),
    ],
    ids=["x86", "ARM", "another"],
)
def test_flags_are_found_on_x86_and_on_arm(info: str, flags: set[str]) -> None:
    assert flags_of(info) == flags
