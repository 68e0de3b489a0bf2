"""The cells of the table: what the server makes of a kind on an architecture."""

import contextlib
import functools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path

import torch
from peft import PeftModel

from dynamic_lora_adapters.errors import AdapterError
from dynamic_lora_server.modes import Mode
from tests.support.conformance.architectures import ARCHITECTURES
from tests.support.conformance.bench import MODES, Bench, Generated, Row
from tests.support.conformance.checkpoints import (
    CausalLM,
    NotInPeft,
    load_oracle,
    reference_logits,
    save_checkpoint,
)
from tests.support.conformance.kinds import INVOCATION_IDS, KINDS, Kind
from tests.support.engines import random_prompt

TOLERANCE = 1e-4
"""Largest difference of a logit in fp32 that counts as the same answer."""

_SIZES = (4, 8)  # ranks of the two adapters, or what comes next to it
# Prompt lengths of a mixed batch, by whose they are; None is the base model.
# The windows are 32 tokens long and the engine cuts prompts after 32.
_LENGTHS: Mapping[int | None, tuple[int, ...]] = {0: (60, 34, 9), None: (47, 12), 1: (40, 6)}
# An adapter that moves logits by less could be left out unnoticed.
_VISIBLE = 100 * TOLERANCE
_MAX_TEXT = 160


class Status(StrEnum):
    """What became of a kind on an architecture."""

    SERVED = "served"  # as PEFT serves it
    NOT_MERGED = "not merged"  # as PEFT serves it, but by bypass in merged mode too
    WRONG = "wrong"  # served, and other than PEFT serves it
    REFUSED = "refused"  # with a reason
    NOT_IN_PEFT = "not in PEFT"  # PEFT itself does not make or run it


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One cell.

    `difference` is the largest of any logit, where it was measured; `text` is
    the reason where PEFT's answer is not given.
    """

    status: Status
    difference: float | None = None
    text: str = ""


Table = dict[tuple[str, str, str], Cell]
"""Cells by mode, kind and architecture."""


def measure_column(
    architecture: str, kinds: Iterable[str], home: Path
) -> Iterator[tuple[str, Table]]:
    """Measure kinds on one architecture; yields each kind with its cells of all modes.

    `home` is a folder for stores and checkpoints.
    """
    with contextlib.ExitStack() as stack:
        benches: dict[bool | None, list[Bench]] = {}
        for number, name in enumerate(kinds):
            tied = KINDS[name].tied
            if tied not in benches:
                places = {mode: home / architecture / f"home-{mode}-{tied}" for mode in MODES}
                benches[tied] = [
                    stack.enter_context(Bench.open(architecture, tied, mode, place))
                    for mode, place in places.items()
                ]
            folder = home / architecture / f"kind-{number}"
            cells = _measure(benches[tied], KINDS[name], architecture, folder)
            yield (
                name,
                {(mode, name, architecture): cell for mode, cell in zip(MODES, cells, strict=True)},
            )


def prompt(length: int, *, seed: int) -> list[int]:
    """Random tokens; longer prompts hold the invocation tokens a third of their way in."""
    ids = random_prompt(length, seed=seed)
    if length > 8:
        ids[length // 3 : length // 3 + len(INVOCATION_IDS)] = INVOCATION_IDS
    return ids


def first_sentence(text: str) -> str:
    """A message's first sentence on one line, cut where it is very long."""
    line = re.split(r"(?<=[.!?])\s", " ".join(text.split()), maxsplit=1)[0]
    return line if len(line) <= _MAX_TEXT else f"{line[: _MAX_TEXT - 3]}..."


def _measure(benches: list[Bench], kind: Kind, architecture: str, folder: Path) -> list[Cell]:
    """A cell for each bench."""
    base, layout = benches[0].base, ARCHITECTURES[architecture]
    folders = [folder / f"adapter-{size}" for size in _SIZES]
    try:
        for place, size in zip(folders, _SIZES, strict=True):
            save_checkpoint(place, kind, layout, base, size=size)
        # Asked for only where the server serves: PEFT cannot load all that it refuses.
        oracles = functools.cache(lambda: [load_oracle(place, base) for place in folders])
        return [_compare(bench, folders, oracles) for bench in benches]
    except NotInPeft as error:
        return [Cell(status=Status.NOT_IN_PEFT, text=first_sentence(str(error)))] * len(benches)


def _compare(bench: Bench, folders: list[Path], oracles: Callable[[], list[PeftModel]]) -> Cell:
    owners = [owner for owner, lengths in _LENGTHS.items() for _ in lengths]
    prompts = [prompt(n, seed=n) for lengths in _LENGTHS.values() for n in lengths]
    num_merged = bench.built.modes.stats().num_merged_rows
    try:
        generated = _serve(bench, folders, owners, prompts)
    except AdapterError as error:
        return Cell(status=Status.REFUSED, text=first_sentence(error.message))
    except Exception as error:  # a server that breaks is a finding too
        text = f"{type(error).__name__}: {error}"
        return Cell(status=Status.WRONG, text=first_sentence(text))
    models: list[CausalLM] = [bench.base if o is None else oracles()[o] for o in owners]
    expected = [
        _teacher_forced(model, ids, one)
        for model, ids, one in zip(models, prompts, generated, strict=True)
    ]
    _check_visible(bench, owners, prompts, generated, expected)
    cell = _judge(generated, expected)
    stats = bench.built.modes.stats()
    bypassed = stats.mode is Mode.MERGED and stats.num_merged_rows == num_merged
    if bypassed and cell.status is Status.SERVED:
        return replace(cell, status=Status.NOT_MERGED)
    return cell


def _serve(
    bench: Bench, folders: list[Path], owners: list[int | None], prompts: list[list[int]]
) -> list[Generated]:
    with contextlib.ExitStack() as stack:
        adapters = [stack.enter_context(bench.serving(folder.name, folder)) for folder in folders]
        rows = [
            Row(adapter=None if owner is None else adapters[owner], prompt_ids=ids)
            for owner, ids in zip(owners, prompts, strict=True)
        ]
        return bench.generate(rows)


def _teacher_forced(model: CausalLM, prompt_ids: list[int], one: Generated) -> torch.Tensor:
    """What the model answers along the engine's tokens, [num_tokens, vocab]."""
    logits = reference_logits(model, [*prompt_ids, *one.token_ids[:-1]])
    return logits[len(prompt_ids) - 1 :]


def _check_visible(
    bench: Bench,
    owners: list[int | None],
    prompts: list[list[int]],
    generated: list[Generated],
    expected: list[torch.Tensor],
) -> None:
    """A kind that does nothing would be served by serving the base model."""
    for owner in set(owners) - {None}:
        moved = max(
            float((_teacher_forced(bench.base, ids, one) - wanted).abs().max())
            for whose, ids, one, wanted in zip(owners, prompts, generated, expected, strict=True)
            if whose == owner
        )
        assert moved > _VISIBLE, f"adapter {owner} moves PEFT's own logits by {moved:.1e} only"


def _judge(generated: list[Generated], expected: list[torch.Tensor]) -> Cell:
    pairs = list(zip(generated, expected, strict=True))
    # A NaN anywhere is the maximum of a tensor.
    difference = float(
        torch.stack([(one.logits - wanted).abs().max() for one, wanted in pairs]).max()
    )
    equal = all(_same_tokens(one, wanted, 2 * difference) for one, wanted in pairs)
    if not difference <= TOLERANCE:
        return Cell(status=Status.WRONG, difference=difference, text="other logits than PEFT's")
    if not equal:
        return Cell(status=Status.WRONG, difference=difference, text="other tokens than PEFT's")
    return Cell(status=Status.SERVED, difference=difference)


def _same_tokens(one: Generated, wanted: torch.Tensor, margin: float) -> bool:
    """Whether each token is PEFT's best, or ties with it within rounding."""
    chosen = wanted.gather(1, torch.tensor(one.token_ids)[:, None])[:, 0]
    return bool((wanted.amax(1) - chosen <= margin).all())
