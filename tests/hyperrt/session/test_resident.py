from __future__ import annotations

import pytest

from hyperrt.engines.errors import EngineError, EngineUnusable
from hyperrt.session.resident import Resident


def test_a_value_is_loaded_once_and_again_after_another():
    resident, loads = Resident(None), []
    for value in ("a", "a", "b", "a"):
        resident.hold("lora", value, lambda value=value: loads.append(value))
    assert loads == ["a", "b", "a"] and resident.holds("lora", "a")


def test_every_change_gives_a_version_that_no_other_engine_has():
    residents, versions = [Resident(None), Resident(None)], []
    for resident in residents * 2:
        versions.append(resident.version)
        resident.hold("lora", len(versions), lambda: None)
        versions.append(resident.version)
    resident.forget("lora")
    changes = 2 + 4 + 1  # opened, held, forgotten
    assert len({*versions, resident.version}) == changes


@pytest.mark.parametrize(("error", "kept"), [(EngineError("no"), True), (EngineUnusable("no"), False)])
def test_a_load_that_fails_keeps_the_old_value_unless_the_engine_is_unusable(error, kept):
    def fail():
        raise error

    resident = Resident(None)
    resident.hold("lora", "a", lambda: None)
    with pytest.raises(EngineError):
        resident.hold("lora", "b", fail)
    assert resident.holds("lora", "a") == kept and not resident.holds("lora", "b")
