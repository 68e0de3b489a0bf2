"""Templates that are left alone for a while."""

import pytest

from dynamic_lora_server.requests import stopped_templates as module
from dynamic_lora_server.requests.stopped_templates import PAUSE_SECONDS, StoppedTemplates


def test_a_template_is_left_alone_for_a_minute() -> None:
    now = 100.0
    stopped = StoppedTemplates(clock=lambda: now)
    assert stopped.seconds_left("a") == 0
    stopped.add("a")
    assert (stopped.seconds_left("a"), stopped.seconds_left("b")) == (PAUSE_SECONDS, 0)
    now += PAUSE_SECONDS - 0.5
    assert stopped.seconds_left("a") == 1
    stopped.add("a")
    assert stopped.seconds_left("a") == PAUSE_SECONDS
    now += PAUSE_SECONDS
    assert stopped.seconds_left("a") == 0


def test_of_too_many_the_oldest_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MOST_KEPT", 2)
    stopped = StoppedTemplates()
    for template in ("a", "b", "a", "c"):
        stopped.add(template)
    assert [bool(stopped.seconds_left(one)) for one in ("a", "b", "c")] == [True, False, True]
