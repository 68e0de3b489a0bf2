"""One whole training run: recipe in, adapter folder out."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from dynamic_lora_server.training.artifacts import adapter_files
from dynamic_lora_server.training.batches import EncodedRow, Tokenizer, encode_row
from dynamic_lora_server.training.config import TrainingConfig
from dynamic_lora_server.training.datasets import Example, load_examples
from dynamic_lora_server.training.errors import DatasetError, TrainingConfigError
from dynamic_lora_server.training.output import check_output, write_output
from dynamic_lora_server.training.trainer import Progress, attach_lora, train_adapter


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingSummary:
    """What a run did: where the adapter lies, and how many answers were seen or were too long."""

    output: Path
    num_answers: int
    num_too_long: int
    final_loss: float


def run_training(
    config: TrainingConfig,
    *,
    base: Path,
    data: Path,
    output: Path,
    on_step: Callable[[Progress], None],
) -> TrainingSummary:
    """Train the recipe's adapter on the model in `base` and write it to `output`.

    An answer that does not fit `max_length` with its prompt is left out and counted:
    cut short, it would teach the model to stop early. Raises a `TrainingError`.
    """
    output = check_output(output)
    examples = load_examples(config.dataset, data, "train")
    torch.manual_seed(config.seed)
    tokenizer = AutoTokenizer.from_pretrained(base)
    rows = list(encode_examples(tokenizer, examples, config))
    num_answers = sum(row.num_answers for row in rows)
    if not rows:
        raise DatasetError(f"no example fits into max_length={config.max_length} tokens")
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    _check_window(model, config)
    adapted = attach_lora(model, config.lora)
    losses: list[float] = []

    def record(progress: Progress) -> None:
        losses.append(progress.loss)
        on_step(progress)

    pad_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    train_adapter(adapted, rows, config, pad_id, record)
    write_output(output, adapter_files(adapted, config))
    return TrainingSummary(
        output=output,
        num_answers=num_answers,
        num_too_long=sum(len(example.outputs) for example in examples) - num_answers,
        final_loss=sum(losses[-10:]) / len(losses[-10:]),
    )


def encode_examples(
    tokenizer: Tokenizer, examples: Sequence[Example], config: TrainingConfig
) -> Iterator[EncodedRow]:
    """Rows of at most `max_length` columns; answers that do not fit alone are left out."""
    for text, answers in _group(examples, config.share_prompts):
        prompt = config.render(text)
        packed: list[str] = []
        for answer in (config.answer_prefix + answer for answer in answers):
            if _length(tokenizer, prompt, [answer]) > config.max_length:
                continue
            if packed and _length(tokenizer, prompt, [*packed, answer]) > config.max_length:
                yield encode_row(tokenizer, prompt, packed)
                packed = []
            packed.append(answer)
        if packed:
            yield encode_row(tokenizer, prompt, packed)


def _group(examples: Sequence[Example], share: bool) -> Iterator[tuple[str, Sequence[str]]]:
    if not share:
        yield from ((example.input, [output]) for example in examples for output in example.outputs)
        return
    grouped: dict[str, list[str]] = {}
    for example in examples:
        grouped.setdefault(example.input, []).extend(example.outputs)
    yield from grouped.items()


def _length(tokenizer: Tokenizer, prompt: str, answers: Sequence[str]) -> int:
    return len(encode_row(tokenizer, prompt, answers).input_ids)


def _check_window(model: PreTrainedModel, config: TrainingConfig) -> None:
    window = getattr(model.config, "sliding_window", None)
    if config.share_prompts and window is not None and window < config.max_length:
        raise TrainingConfigError(
            f"share_prompts needs max_length within the model's attention window: "
            f"max_length is {config.max_length}, the window {window}"
        )
