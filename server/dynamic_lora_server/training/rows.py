"""The rows of a run: a recipe's splits, read, rendered, tokenised and packed."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from dynamic_lora_server.training.batches import EncodedRow, Tokenizer, encode_row
from dynamic_lora_server.training.config import TrainingConfig
from dynamic_lora_server.training.datasets import Example, Split, has_dev, load_examples
from dynamic_lora_server.training.errors import DatasetError


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingRows:
    """What is trained on, and what the loss is measured on after each epoch, if anything.

    `num_too_long` counts the answers of the training split that no row holds.
    """

    train: Sequence[EncodedRow]
    dev: Sequence[EncodedRow]
    pad_id: int
    num_too_long: int


def load_rows(
    config: TrainingConfig, data: Path, tokenizer: PreTrainedTokenizerBase
) -> TrainingRows:
    """All rows of a recipe; `data` is the folder that its paths start from.

    Raises DatasetError for a file that cannot be used, and where no row fits `max_length`.
    """
    pad_id, eos_id = tokenizer.pad_token_id, tokenizer.eos_token_id
    train, num_too_long = _load_split(config, data, tokenizer, "train")
    dev, _ = _load_split(config, data, tokenizer, "dev") if has_dev(config.dataset) else ([], 0)
    return TrainingRows(
        train=train,
        dev=dev,
        pad_id=eos_id if pad_id is None else pad_id,
        num_too_long=num_too_long,
    )


def _load_split(
    config: TrainingConfig, data: Path, tokenizer: Tokenizer, split: Split
) -> tuple[list[EncodedRow], int]:
    examples = load_examples(config.dataset, data, split)
    rows = list(encode_examples(tokenizer, examples, config))
    if not rows:
        raise DatasetError(
            f"no example of the {split} split fits into max_length={config.max_length} tokens"
        )
    num_answers = sum(len(example.outputs) for example in examples)
    return rows, num_answers - sum(row.num_answers for row in rows)


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
