"""Scores of generated answers against references; pure functions over strings."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from dynamic_lora_server.training.datasets import Entity


@dataclass(frozen=True, slots=True, kw_only=True)
class EntityScore:
    """Micro-averaged over all texts; `valid_json` is the share of answers that parse."""

    precision: float
    recall: float
    f1: float
    valid_json: float


def label_accuracy(answers: Sequence[str], labels: Sequence[str]) -> float:
    """Share of answers whose text, trimmed and lower-cased, is exactly the label."""
    matches = [
        answer.strip().lower() == label.strip().lower()
        for answer, label in zip(answers, labels, strict=True)
    ]
    return sum(matches) / len(matches)


def parse_entities(answer: str) -> list[Entity] | None:
    """Entities of an answer; None unless it is a JSON list of `{"text": str, "type": str}`."""
    try:
        items = json.loads(answer)
    except (json.JSONDecodeError, RecursionError):
        return None
    if not isinstance(items, list):
        return None
    entities = []
    for item in items:
        if not isinstance(item, dict) or set(item) != {"text", "type"}:
            return None
        if not isinstance(item["text"], str) or not isinstance(item["type"], str):
            return None
        entities.append(Entity(text=item["text"], type=item["type"]))
    return entities


def entity_score(answers: Sequence[str], references: Sequence[str]) -> EntityScore:
    """Entity F1, exact in text and type, counted with multiplicity.

    An answer that does not parse finds nothing. Raises `ValueError` when a reference
    itself does not parse.
    """
    num_valid = num_predicted = num_expected = num_correct = 0
    for answer, reference in zip(answers, references, strict=True):
        predicted, expected = parse_entities(answer), parse_entities(reference)
        if expected is None:
            raise ValueError(f"not an entity list: {reference}")
        num_valid += predicted is not None
        num_predicted += len(predicted or [])
        num_expected += len(expected)
        num_correct += (Counter(predicted or []) & Counter(expected)).total()
    precision = num_correct / num_predicted if num_predicted else 0.0
    recall = num_correct / num_expected if num_expected else 0.0
    return EntityScore(
        precision=precision,
        recall=recall,
        f1=2 * num_correct / (num_predicted + num_expected)
        if num_predicted + num_expected
        else 1.0,
        valid_json=num_valid / len(answers),
    )


def corpus_bleu(answers: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """BLEU on 0..100 (sacrebleu's defaults) against every reference of each answer.

    Needs `sacrebleu`, which the `dev` extra brings.
    """
    import sacrebleu

    # sacrebleu takes one stream per reference number. A shorter group repeats its last
    # reference, which changes no count and no closest length.
    depth = max(len(group) for group in references)
    streams = [
        [group[min(index, len(group) - 1)] for group in references] for index in range(depth)
    ]
    return float(sacrebleu.corpus_bleu([answer.strip() for answer in answers], streams).score)
