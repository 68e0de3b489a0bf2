"""One base model behind a real intake, store, pool and engine, whose logits can be read."""

import contextlib
from collections import defaultdict
from collections.abc import Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self
from unittest import mock

import torch
from transformers import PreTrainedModel

from dynamic_lora_adapters.apply.products import ProductKind
from dynamic_lora_adapters.device.slab import ResidentAdapter
from dynamic_lora_adapters.files.archive import Intake
from dynamic_lora_adapters.home.registry import AdapterRegistry
from dynamic_lora_server.engine.engine import FailedEvent
from dynamic_lora_server.engine.model_runner import ModelRunner
from dynamic_lora_server.engine.sequence import Sequence
from dynamic_lora_server.engine.startup.build import BuiltEngine
from dynamic_lora_server.modes import Mode
from tests.support.conformance.architectures import build_base
from tests.support.engines import make_engine, make_sequence

NUM_NEW_TOKENS = 5


class EngineFailed(Exception):
    """A step of the engine broke; the text is the engine's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A sequence of the mixed batch: its tokens, and whose they are (None: the base model's)."""

    adapter: ResidentAdapter | None
    prompt_ids: list[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Generated:
    """What the engine made of a row: greedy tokens, and the logits [num_tokens, vocab]."""

    token_ids: list[int]
    logits: torch.Tensor


MODES = (Mode.BYPASS, Mode.MERGED)
"""The modes of an engine that have a table of their own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """`base` is pristine, for PEFT; the engine runs on a model of its own."""

    base: PreTrainedModel
    built: BuiltEngine
    registry: AdapterRegistry

    @classmethod
    @contextlib.contextmanager
    def open(cls, architecture: str, tied: bool | None, mode: Mode, home: Path) -> Iterator[Self]:
        """An engine with little memory and pieces of 32 tokens; the store is under `home`."""
        home.mkdir(parents=True, exist_ok=True)
        built = make_engine(
            build_base(architecture, tied), mode=mode, base_product=ProductKind.PLAIN
        )
        with AdapterRegistry(home, built.geometry, base=built.weights) as registry:
            yield cls(base=build_base(architecture, tied), built=built, registry=registry)

    @contextlib.contextmanager
    def serving(self, name: str, source: Path) -> Iterator[ResidentAdapter]:
        """Upload a folder, publish it and bring it to the device. Raises AdapterError."""
        with self.registry.staging() as folder:
            intake = Intake(folder, self.registry.limits)
            intake.add_folder(source)
            ignored = intake.ignored_files
            passport = self.registry.publish(name, folder, ignored_files=ignored).passport
        try:
            adapter = self.built.pool.admit(passport.version, self.registry.load(passport.version))
            assert adapter is not None, "the pool has room for the few adapters of a cell"
            try:
                yield adapter
            finally:
                self.built.pool.release(adapter)
                self.built.pool.drop(passport.version)
        finally:
            self.registry.delete(name)

    def generate(self, rows: Seq[Row]) -> list[Generated]:
        """Run the rows as one batch, greedily. Raises EngineFailed."""
        sequences = [
            make_sequence(row.prompt_ids, adapter=row.adapter, max_new_tokens=NUM_NEW_TOKENS)
            for row in rows
        ]
        with _recorded_logits() as logits:
            self._run(sequences)
        return [
            Generated(token_ids=one.output_ids, logits=torch.stack(logits[one.id]))
            for one in sequences
        ]

    def _run(self, sequences: Seq[Sequence]) -> None:
        for sequence in sequences:
            self.built.engine.add(sequence)
        failures = []
        while self.built.engine.has_work:
            failures += [e for e in self.built.engine.step() if isinstance(e, FailedEvent)]
        self.built.engine.scheduler.check_integrity()
        if failures:
            raise EngineFailed(failures[0].message)


@contextlib.contextmanager
def _recorded_logits() -> Iterator[dict[int, list[torch.Tensor]]]:
    """The logits of every sampled token meanwhile, by sequence id."""
    recorded: dict[int, list[torch.Tensor]] = defaultdict(list)
    run = ModelRunner.run

    def recording(self: ModelRunner, *args: Any, **options: Any) -> Any:
        options.pop("greedy_only", None)  # there would be none
        sampled, logits = run(self, *args, **options)
        for piece, row in zip(sampled, logits, strict=True):
            recorded[piece.sequence.id].append(row.clone())
        return sampled, logits

    with mock.patch.object(ModelRunner, "run", recording):
        yield recorded
