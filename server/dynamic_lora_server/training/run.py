"""One whole training run: recipe in, adapter folder out."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from dynamic_lora_server.training.artifacts import adapter_files
from dynamic_lora_server.training.base import (
    check_base,
    load_model,
    load_tokenizer,
    training_device,
)
from dynamic_lora_server.training.chat import build_chat_template
from dynamic_lora_server.training.config import TrainingConfig
from dynamic_lora_server.training.errors import TrainingError, TrainingInterrupted
from dynamic_lora_server.training.output import (
    check_output,
    remove_output,
    replace_output,
    write_output,
)
from dynamic_lora_server.training.rows import TrainingRows, load_rows
from dynamic_lora_server.training.trainer import Progress, attach_lora, train_adapter

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingSummary:
    """What a run did: where the adapter lies, and how many answers were seen or were too long."""

    output: Path
    num_answers: int
    num_too_long: int
    final_loss: float
    dev_loss: float | None


def run_training(
    config: TrainingConfig,
    *,
    base: Path,
    data: Path,
    output: Path,
    on_step: Callable[[Progress], None],
    device: str = "cpu",
    save_every: int = 0,
) -> TrainingSummary:
    """Train the recipe's adapter on the model in `base` and write it to `output`.

    An answer that does not fit `max_length` with its prompt is left out and counted:
    cut short, it would teach the model to stop early.

    Every `save_every` steps (0: never), and when a KeyboardInterrupt ends the run, the adapter
    as it is then goes to a folder beside `output`, its name ending in `-partial`; a run that is
    finished takes away what it kept there. A copy on the way that cannot be written is left out
    with a warning. `device` is as of `training_device`. Raises a `TrainingError`.
    """
    where = training_device(device)
    output = check_output(output)
    partial = check_output(output.with_name(f"{output.name}-partial"))
    check_base(base, config)
    tokenizer = load_tokenizer(base)
    template = build_chat_template(config, tokenizer)
    rows = load_rows(config, data, tokenizer)
    torch.manual_seed(config.seed)
    with _enough_memory():
        adapted = attach_lora(load_model(base, where), config.lora)

        def files() -> dict[str, bytes]:
            return adapter_files(adapted, config, template)

        steps: list[Progress] = []
        with _interruptible(steps, partial, files):

            def record(progress: Progress) -> None:
                steps.append(progress)
                on_step(progress)
                if save_every and progress.step % save_every == 0:
                    _keep(partial, files())

            train_adapter(adapted, rows, config, record)
            write_output(output, files())
    if save_every and len(steps) >= save_every:
        remove_output(partial)
    return _summary(output, steps, rows)


def _keep(partial: Path, files: Mapping[str, bytes]) -> None:
    """Write a copy for the case that the machine fails; a run need not end for want of one."""
    try:
        replace_output(partial, files)
    except OSError as error:
        logger.warning("%s cannot be written, training goes on without: %s", partial, error)


@contextmanager
def _interruptible(
    steps: Sequence[Progress], partial: Path, files: Callable[[], Mapping[str, bytes]]
) -> Iterator[None]:
    """Save what there is to `partial` where somebody ends the run after its first step."""
    try:
        yield
    except KeyboardInterrupt as interrupt:
        if not steps:
            raise
        write_output(partial, files())
        raise TrainingInterrupted(
            f"interrupted after step {steps[-1].step} of {steps[-1].num_steps}; "
            f"the adapter as it is now is in {partial}"
        ) from interrupt


@contextmanager
def _enough_memory() -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise TrainingError(
            f"the GPU's memory is too small; lower micro_batch_size or max_length: {error}"
        ) from error


def _summary(output: Path, steps: Sequence[Progress], rows: TrainingRows) -> TrainingSummary:
    last = [step.loss for step in steps[-10:]]
    return TrainingSummary(
        output=output,
        num_answers=sum(row.num_answers for row in rows.train),
        num_too_long=rows.num_too_long,
        final_loss=sum(last) / len(last),
        dev_loss=steps[-1].dev_loss,
    )
