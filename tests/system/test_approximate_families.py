"""Approximate modes of all families that have one; tests/model/test_approximate.py has a few."""

from __future__ import annotations

from pathlib import Path

import pytest

from batchgen.families import Family
from tests.model.test_approximate import (
    FEW,
    a_tiny_autoencoder_decodes,
    built,
    every_mode_keeps_the_promises,
    families_with,
    id_of,
    no_guidance_is_a_scale_of_one,
)

pytestmark = pytest.mark.long

__all__ = ["built"]  # a fixture
MODES = ("guidance_interval", "deep_cache", "mag_cache", "taylor_seer")
OTHERS = [
    family
    for family in {id_of(one): one for mode in MODES for one in families_with(mode)}.values()
    if (family.task, family.name) not in FEW
]
GUIDED = [one for one in families_with("guidance_interval") if (one.task, one.name) not in FEW[:3]]


@pytest.mark.parametrize("family", OTHERS, ids=id_of)
def test_modes_keep_the_promises(built: dict[str, Path], family: Family) -> None:
    every_mode_keeps_the_promises(built, family)


@pytest.mark.parametrize("family", GUIDED, ids=id_of)
def test_guidance_in_no_step_and_in_all(built: dict[str, Path], family: Family) -> None:
    no_guidance_is_a_scale_of_one(built, family)


@pytest.mark.parametrize("family", families_with("tiny_vae"), ids=id_of)
def test_a_tiny_autoencoder_decodes(built: dict[str, Path], tmp_path: Path, family: Family) -> None:
    a_tiny_autoencoder_decodes(built, family, tmp_path)
