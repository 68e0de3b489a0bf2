"""The learning rate over a run."""

from typing import Any

import pytest

from dynamic_lora_server.training.config import OptimizerSettings
from dynamic_lora_server.training.trainer import lr_factor


@pytest.mark.parametrize(
    ("schedule", "middle", "end"),
    [("constant", 1.0, 1.0), ("linear", 0.5, 0.0), ("cosine", 0.5, 0.0)],
)
def test_schedules(schedule: Any, middle: float, end: float) -> None:
    settings = OptimizerSettings(schedule=schedule, warmup_ratio=0.1)
    factors = [lr_factor(step, 100, settings) for step in range(101)]
    assert factors[:10] == sorted(factors[:10])
    assert 0 < factors[0] < 0.2
    assert factors[10] == 1.0
    assert factors[55] == pytest.approx(middle)
    assert factors[100] == pytest.approx(end)
