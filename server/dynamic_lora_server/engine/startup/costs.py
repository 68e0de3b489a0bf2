"""What is measured at the first start, and kept for the next ones."""

import json
import logging
import math
import tempfile
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch

from dynamic_lora_adapters.apply.costs import KernelCosts, measure_costs
from dynamic_lora_adapters.apply.merge import Merger
from dynamic_lora_adapters.device.groups import ProjectionGroup
from dynamic_lora_adapters.kernels import DeltaKernel
from dynamic_lora_server.engine.startup.mode_costs import measure_mode_costs
from dynamic_lora_server.modes.costs import StepCosts

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class StartupCosts:
    """Seconds of the delta kernels, and of steps and switches."""

    kernels: KernelCosts
    steps: StepCosts

    def to_json(self) -> str:
        """Both tables as text."""
        return json.dumps({"kernels": self.kernels.to_json(), "steps": self.steps.to_json()})

    @classmethod
    def from_json(cls, text: str, names: Collection[str]) -> Self:
        """Read what `to_json` wrote for the kernels `names`; ValueError for anything else."""
        try:
            document = json.loads(text)
            kernels, steps = document["kernels"], document["steps"]
        except (KeyError, TypeError) as error:
            raise ValueError(f"these are no start-up costs: {error!r}") from error
        return cls(KernelCosts.from_json(kernels, names), StepCosts.from_json(steps))


def startup_costs(
    groups: Sequence[ProjectionGroup],
    kernels: Mapping[str, DeltaKernel],
    merger: Merger,
    trial: Callable[[int], object],
    *,
    device: torch.device,
    dtype: torch.dtype,
    factor_dtype: torch.dtype | None = None,
    merges: bool,
    drafts: bool,
    file: Path | None,
    on_step: Callable[[str], object],
) -> StartupCosts:
    """Read the costs from `file`, or measure them and write it.

    `trial` runs a step of the base model with so many rows. Steps are measured where
    something `merges` or `drafts`, a switch only with `merges`. What a busy machine left no
    time to measure whole is not written.
    """
    if file is not None and file.is_file():
        try:
            found = StartupCosts.from_json(file.read_text(), kernels)
        except ValueError:
            file.unlink()  # written by another version: measure anew
        else:
            # A start with too little memory to merge has measured no switch.
            if not merges or math.isfinite(found.steps.switch_s):
                return found
    on_step("Measuring the delta kernels")
    measured = measure_costs(groups, kernels, device=device, dtype=dtype, factor_dtype=factor_dtype)
    steps = StepCosts.never_merging()
    if merges or drafts:
        on_step("Measuring steps and switches" if merges else "Measuring steps")
        steps = measure_mode_costs(
            groups,
            measured,
            merger,
            trial,
            device=device,
            dtype=dtype,
            factor_dtype=factor_dtype,
            merges=merges,
        )
    costs = StartupCosts(measured, steps)
    if file is not None and measured.whole:
        _write(costs.to_json(), file)
    return costs


def _write(text: str, file: Path) -> None:
    """Moved into place: another server that starts reads all of it or nothing.

    A disk that takes no more costs the next start the time of measuring again.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=file.parent) as folder:
            made = Path(folder) / file.name
            made.write_text(text)
            made.replace(file)
    except OSError as error:
        logger.warning("What was measured is not kept for the next start: %s", error)
