"""Data files in the formats that recipes name, read into `Example`s."""

import csv
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from dynamic_lora_server.training.config import (
    ConllDataset,
    DatasetConfig,
    E2ECsvDataset,
    JsonlDataset,
    TsvDataset,
)
from dynamic_lora_server.training.errors import DatasetError

Split = Literal["train", "dev"]
_Read = TypeVar("_Read")

# As GLUE's files have it.
_TSV_HEADER = ("sentence", "label")


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """One input with its accepted answers: training learns each, scoring compares with all."""

    input: str
    outputs: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Entity:
    """One named entity: its tokens joined by spaces, and its type."""

    text: str
    type: str


def load_examples(dataset: DatasetConfig, data: Path, split: Split) -> list[Example]:
    """All examples of one split, in file order; `data` is the folder that paths are relative to.

    `e2e-csv` has one example per meaning representation, with every reference of it.
    Raises `DatasetError`.
    """
    examples = _read_split(dataset, data, split)
    if examples:
        return examples
    if isinstance(dataset, E2ECsvDataset):
        split_by = f" with held_out={dataset.held_out:g}"
        raise DatasetError(f"the {split} split of {dataset.train}{split_by} holds no example")
    name = dataset.train if split == "train" else dataset.dev
    raise DatasetError(f"the {split} split of {name} holds no example")


def has_dev(dataset: DatasetConfig) -> bool:
    """Whether the recipe keeps examples to measure on."""
    if isinstance(dataset, E2ECsvDataset):
        return dataset.held_out > 0
    return dataset.dev is not None


def _read_split(dataset: DatasetConfig, data: Path, split: Split) -> list[Example]:
    if isinstance(dataset, E2ECsvDataset):
        return _split_meanings(dataset, _open(data / dataset.train, _read_e2e), split)
    name = dataset.train if split == "train" else dataset.dev
    if name is None:
        raise DatasetError("the recipe's dataset names no dev file")
    path = data / name
    match dataset:
        case ConllDataset():
            examples = _open(path, _read_conll)
            return examples if split == "dev" else _thin_empty(examples, dataset)
        case TsvDataset(labels=labels):
            return _open(path, lambda lines: _read_tsv(lines, labels))
        case JsonlDataset():
            return _open(path, _read_jsonl)


def _open(path: Path, read: Callable[[Iterator[str]], _Read]) -> _Read:
    try:
        with path.open(encoding="utf-8-sig", newline="") as lines:
            return read(iter(lines))
    except (OSError, UnicodeDecodeError, DatasetError) as error:
        raise DatasetError(f"{path}: {error}") from error


def _read_tsv(lines: Iterator[str], labels: dict[str, str]) -> list[Example]:
    examples = []
    for number, line in enumerate(lines, start=1):
        sentence, tab, label = line.rstrip("\r\n").rpartition("\t")
        if not line.strip():
            continue
        if number == 1 and (sentence, label) == _TSV_HEADER and label not in labels:
            continue
        if not tab or label not in labels:
            raise DatasetError(f"line {number} is not `sentence<TAB>label`, label in {set(labels)}")
        examples.append(Example(input=sentence, outputs=(labels[label],)))
    return examples


def _read_jsonl(lines: Iterator[str]) -> list[Example]:
    return [_parse_pair(line, number) for number, line in enumerate(lines, start=1) if line.strip()]


def _parse_pair(line: str, number: int) -> Example:
    try:
        pair: Any = json.loads(line)
    except json.JSONDecodeError as error:
        raise DatasetError(f"line {number} is not JSON: {error}") from error
    if not isinstance(pair, dict) or set(pair) != {"input", "output"}:
        raise DatasetError(f"line {number} must hold exactly the keys `input` and `output`")
    if not all(isinstance(value, str) for value in pair.values()):
        raise DatasetError(f"line {number}: `input` and `output` must be strings")
    if not all(_is_unicode(value) for value in pair.values()):
        raise DatasetError(f"line {number} holds half a surrogate pair, which is no character")
    return Example(input=pair["input"], outputs=(pair["output"],))


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _read_conll(lines: Iterator[str]) -> list[Example]:
    return [
        Example(
            input=" ".join(tokens),
            outputs=(format_entities(collect_entities(tokens, tags)),),
        )
        for tokens, tags in _sentences(lines)
    ]


def _thin_empty(examples: list[Example], dataset: ConllDataset) -> list[Example]:
    rng = random.Random(dataset.sample_seed)
    empty = format_entities([])
    return [
        example
        for example in examples
        if example.outputs != (empty,) or rng.random() < dataset.keep_empty
    ]


def _sentences(lines: Iterator[str]) -> Iterator[tuple[list[str], list[str]]]:
    tokens: list[str] = []
    tags: list[str] = []
    for number, line in enumerate(lines, start=1):
        token, tab, tag = line.rstrip("\r\n").partition("\t")
        if line.strip():
            if not token or not tab or not tag:
                raise DatasetError(f"line {number} is not `token<TAB>tag`")
            tokens.append(token)
            tags.append(tag.strip())
        elif tokens:
            yield tokens, tags
            tokens, tags = [], []
    if tokens:
        yield tokens, tags


def collect_entities(tokens: list[str], tags: list[str]) -> list[Entity]:
    """Entities of one sentence from its BIO tags, in order.

    `B-` always starts an entity, also right after one of the same type. `I-` continues
    an entity of its own type; elsewhere it starts one (the usual IOB repair). Raises
    `DatasetError` on a tag that is neither `O`, `B-type` nor `I-type`.
    """
    entities: list[Entity] = []
    open_type = None
    for token, tag in zip(tokens, tags, strict=True):
        prefix, _, kind = tag.partition("-")
        if tag != "O" and (prefix not in {"B", "I"} or not kind):
            raise DatasetError(f"tag {tag!r} is neither O, B-type nor I-type")
        if prefix == "I" and kind == open_type:
            entities[-1] = Entity(text=f"{entities[-1].text} {token}", type=kind)
        elif tag != "O":
            entities.append(Entity(text=token, type=kind))
        open_type = None if tag == "O" else kind
    return entities


def format_entities(entities: list[Entity]) -> str:
    """The answer text of a tagging task: a JSON list of `{"text", "type"}`."""
    return json.dumps(
        [{"text": entity.text, "type": entity.type} for entity in entities], ensure_ascii=False
    )


def _read_e2e(lines: Iterator[str]) -> dict[str, list[str]]:
    """References by meaning representation."""
    meanings: dict[str, list[str]] = {}
    rows = csv.DictReader(lines, strict=True)
    if rows.fieldnames is None or list(rows.fieldnames) != ["mr", "ref"]:
        raise DatasetError("the header is not `mr,ref`")
    try:
        for row in rows:
            if None in row:  # where the reader puts what is beyond the header's fields
                raise csv.Error("too many fields")
            meanings.setdefault(row["mr"], []).append(" ".join(row["ref"].split()))
    except (csv.Error, AttributeError) as error:
        raise DatasetError(f"line {rows.line_num} is not `mr,ref`") from error
    return meanings


def _split_meanings(
    dataset: E2ECsvDataset, meanings: dict[str, list[str]], split: Split
) -> list[Example]:
    # Split by meaning: two references of one meaning on both sides would leak answers.
    shuffled = sorted(meanings)
    random.Random(dataset.split_seed).shuffle(shuffled)
    num_dev = round(len(shuffled) * dataset.held_out)
    chosen = shuffled[:num_dev] if split == "dev" else shuffled[num_dev:]
    return [Example(input=mr, outputs=tuple(meanings[mr])) for mr in chosen]
