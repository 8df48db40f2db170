"""Sets how many cases a fuzz test tries: few in every run, many in the profile ``slow``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import pytest
from hypothesis import HealthCheck, settings

SLOW = "slow"
Test = TypeVar("Test", bound=Callable[..., Any])


def register_profiles() -> None:
    """``pytest -m fuzz --hypothesis-profile=slow`` selects the second; `make fuzz` does so."""
    common: dict[str, Any] = {
        "deadline": None,
        "database": None,
        "print_blob": True,
        "suppress_health_check": list(HealthCheck),
    }
    settings.register_profile("quick", derandomize=True, **common)
    settings.register_profile(SLOW, **common)
    settings.load_profile("quick")


def fuzz(quick: int = 50, slow: int = 2000) -> Callable[[Test], Test]:
    """Above ``@given``: try ``quick`` cases, the same in every run, or ``slow`` random ones."""

    def decorate(test: Test) -> Test:
        count = slow if settings.get_current_profile_name() == SLOW else quick
        sized: Test = pytest.mark.fuzz(settings(max_examples=count)(test))
        return sized

    return decorate
