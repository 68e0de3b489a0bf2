"""Scores of generated answers."""

import pytest

from dynamic_lora_server.training.scoring import (
    corpus_bleu,
    entity_score,
    label_accuracy,
    parse_entities,
)

ANNA = '{"text": "Anna", "type": "person"}'
BONN = '{"text": "Bonn", "type": "location"}'


def test_accuracy_ignores_case_and_space_only() -> None:
    answers = [" positive", "Negative\n", "positively", ""]
    assert label_accuracy(answers, ["positive"] + ["negative"] * 3) == 0.5


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "none",
        "{}",
        "[1]",
        '[{"text": "a"}]',
        '[{"text": 1, "type": "b"}]',
        f"[{ANNA}",
        "[" * 9999,
    ],
)
def test_answers_that_do_not_parse(answer: str) -> None:
    assert parse_entities(answer) is None


def test_entity_score_counts_text_and_type() -> None:
    wrong_type = ANNA.replace("person", "group")
    score = entity_score(
        [f" [{ANNA}]", f"[{wrong_type}, {BONN}]", "oops", "[]"],
        [f"[{ANNA}, {BONN}]", f"[{ANNA}, {BONN}]", "[]", "[]"],
    )
    assert score.precision == pytest.approx(2 / 3)
    assert score.recall == pytest.approx(2 / 4)
    assert score.f1 == pytest.approx(4 / 7)
    assert score.valid_json == 0.75


def test_entity_score_counts_repeats_once_each() -> None:
    score = entity_score([f"[{ANNA}, {ANNA}]"], [f"[{ANNA}]"])
    assert (score.precision, score.recall) == (0.5, 1.0)


def test_a_broken_reference_is_an_error() -> None:
    with pytest.raises(ValueError, match="not an entity list: x"):
        entity_score(["[]"], ["x"])


def test_bleu_uses_every_reference() -> None:
    answers = ["the cat sat on the mat today", "a dog ran over the wide field"]
    references = [["something else entirely here now", answers[0]], [answers[1]]]
    assert corpus_bleu(answers, references) == pytest.approx(100)
    assert corpus_bleu(answers, [[group[0]] for group in references]) < 80
