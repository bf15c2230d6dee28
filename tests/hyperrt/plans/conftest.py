"""A cache of plans with one plan in it."""

from __future__ import annotations

import pytest

from hyperrt.plans.cache import PlanCache
from tests.hyperrt.some_plans import publish


@pytest.fixture
def cache(tmp_path) -> PlanCache:
    return PlanCache(tmp_path / "plans")


@pytest.fixture
def plan(cache):
    return publish(cache, weights=("unet.a", "unet.b"))
