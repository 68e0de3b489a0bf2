"""Readers of the data formats."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynamic_lora_server.training import DatasetError
from dynamic_lora_server.training.config import (
    ConllDataset,
    DatasetConfig,
    E2ECsvDataset,
    JsonlDataset,
    TsvDataset,
)
from dynamic_lora_server.training.datasets import (
    Entity,
    Example,
    collect_entities,
    format_entities,
    has_dev,
    load_examples,
)

TSV = TsvDataset(kind="tsv", train="f", labels={"0": "negative", "1": "positive"})
JSONL = JsonlDataset(kind="jsonl", train="f")
CONLL = ConllDataset(kind="conll", train="f", dev="f")
E2E = E2ECsvDataset(kind="e2e-csv", train="f", held_out=0.25)


def load(folder: Path, dataset: DatasetConfig, text: str) -> list[Example]:
    """The training split of a file with this content."""
    (folder / "f").write_text(text, encoding="utf-8")
    return load_examples(dataset, folder, "train")


def test_tsv_maps_labels_to_answers(tmp_path: Path) -> None:
    examples = load(tmp_path, TSV, "a fine film\t1\ndull\t0")
    assert examples == [
        Example(input="a fine film", outputs=("positive",)),
        Example(input="dull", outputs=("negative",)),
    ]


def test_jsonl(tmp_path: Path) -> None:
    examples = load(tmp_path, JSONL, '{"input": "1+1", "output": "2"}\n\n')
    assert examples == [Example(input="1+1", outputs=("2",))]


def test_conll_sentences_become_entity_lists(tmp_path: Path) -> None:
    text = "Rick\tB-creative-work\nand\tI-creative-work\nMorty\tI-creative-work\n\t\nhi\tO\n"
    assert load(tmp_path, CONLL, text) == [
        Example(
            input="Rick and Morty",
            outputs=('[{"text": "Rick and Morty", "type": "creative-work"}]',),
        ),
        Example(input="hi", outputs=("[]",)),
    ]


def test_a_conll_token_of_white_space_ends_no_sentence(tmp_path: Path) -> None:
    text = "Rick\tB-x\n\u00a0\tI-x\nMorty\tI-x\n\u3000\tO\n\t\t\nhi\tO\n"
    assert [example.input for example in load(tmp_path, CONLL, text)] == [
        "Rick \u00a0 Morty \u3000",
        "hi",
    ]


def test_keep_empty_thins_training_only(tmp_path: Path) -> None:
    (tmp_path / "f").write_text("Bonn\tB-location\n\n" + "hi\tO\n\n" * 50, encoding="utf-8")
    dataset = CONLL.model_copy(update={"keep_empty": 0.5})
    train = load_examples(dataset, tmp_path, "train")
    assert train[0].input == "Bonn"
    assert 10 < len(train) < 40
    assert train == load_examples(dataset, tmp_path, "train")
    assert len(load_examples(dataset, tmp_path, "dev")) == 51


def test_e2e_splits_by_meaning(tmp_path: Path) -> None:
    rows = [f'"name[{meaning}], x",ref  {n}\n' for meaning in range(8) for n in range(3)]
    (tmp_path / "f").write_text("mr,ref\n" + "".join(rows), encoding="utf-8")
    train = load_examples(E2E, tmp_path, "train")
    dev = load_examples(E2E, tmp_path, "dev")
    assert (len(train), len(dev)) == (6, 2)
    assert {example.input for example in train}.isdisjoint(example.input for example in dev)
    assert all(example.outputs == ("ref 0", "ref 1", "ref 2") for example in train + dev)


def test_a_header_of_a_tsv_file_is_no_example(tmp_path: Path) -> None:
    examples = load(tmp_path, TSV, "sentence\tlabel\na fine film\t1\n")
    assert examples == [Example(input="a fine film", outputs=("positive",))]
    named = TSV.model_copy(update={"labels": {"label": "a", "other": "b"}})
    assert load(tmp_path, named, "sentence\tlabel\n")[0].input == "sentence"


@pytest.mark.parametrize(
    ("dataset", "text", "message"),
    [
        (TSV, "fine\t1\nfine\t2\n", "line 2 is not `sentence<TAB>label`"),
        (TSV, "fine\t1\nsentence\tlabel\n", "line 2 is not `sentence<TAB>label`"),
        (TSV, "no tab\n", "line 1 is not `sentence<TAB>label`"),
        (TSV, "", "the train split of f holds no example"),
        (JSONL, "{", "line 1 is not JSON"),
        (JSONL, '{"input": "a"}', "line 1 must hold exactly the keys"),
        (JSONL, '{"input": "a", "output": 1}', "line 1: `input` and `output` must be strings"),
        (JSONL, '\n{"input": "a", "output": "\\ud83d"}', "line 2 holds half a surrogate pair"),
        (CONLL, "word\n", "line 1 is not `token<TAB>tag`"),
        (CONLL, "word\tO\n\tO\n", "line 2 is not `token<TAB>tag`"),
        (CONLL, "word\tX-person\n", "tag 'X-person' is neither O, B-type nor I-type"),
        (E2E, "a,b\n1,2\n", "the header is not `mr,ref`"),
        (E2E, "mr,ref\nonly\n", "line 2 is not `mr,ref`"),
        (E2E, "mr,ref\nm,a good place, cheap\n", "line 2 is not `mr,ref`"),
        (E2E, "mr,ref\n", "the train split of f with held_out=0.25 holds no example"),
    ],
)
def test_faults_are_named(tmp_path: Path, dataset: DatasetConfig, text: str, message: str) -> None:
    with pytest.raises(DatasetError, match=message):
        load(tmp_path, dataset, text)


def test_blank_lines_and_a_byte_order_mark_are_no_examples(tmp_path: Path) -> None:
    assert load(tmp_path, TSV, "\ufefffine\t1\n\n")[0].input == "fine"
    pair = '{"input": "a", "output": "b"}'
    assert len(load(tmp_path, JSONL, f"\ufeff{pair}\n\n{pair}\n")) == 2


def test_holding_nothing_out_trains_on_all(tmp_path: Path) -> None:
    rows = "".join(f"m{index},r{index}\n" for index in range(4))
    everything = E2E.model_copy(update={"held_out": 0.0})
    assert len(load(tmp_path, everything, f"mr,ref\n{rows}")) == 4
    assert not has_dev(everything)
    assert has_dev(E2E)
    with pytest.raises(DatasetError, match="the dev split of f with held_out=0 holds no example"):
        load_examples(everything, tmp_path, "dev")


def test_missing_files(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="No such file"):
        load_examples(JSONL, tmp_path, "train")
    with pytest.raises(DatasetError, match="names no dev file"):
        load_examples(JSONL, tmp_path, "dev")


@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        (["B-a", "I-a", "O"], [("w0 w1", "a")]),
        (["B-a", "B-a", "I-a"], [("w0", "a"), ("w1 w2", "a")]),
        (["I-a", "I-a", "I-b"], [("w0 w1", "a"), ("w2", "b")]),
        (["B-a", "O", "I-a"], [("w0", "a"), ("w2", "a")]),
        (["O", "O", "O"], []),
    ],
)
def test_bio_to_entities(tags: list[str], expected: list[tuple[str, str]]) -> None:
    entities = collect_entities(["w0", "w1", "w2"], tags)
    assert [(entity.text, entity.type) for entity in entities] == expected


@given(st.lists(st.sampled_from(["O", "B-x", "I-x", "B-y", "I-y"]), max_size=12))
def test_every_tagged_token_is_in_one_entity(tags: list[str]) -> None:
    tokens = [f"t{index}" for index in range(len(tags))]
    covered = " ".join(entity.text for entity in collect_entities(tokens, tags)).split()
    assert covered == [token for token, tag in zip(tokens, tags, strict=True) if tag != "O"]


def test_entities_are_plain_json() -> None:
    text = format_entities([Entity(text='a "b" é', type="person")])
    assert "é" in text
    assert json.loads(text) == [{"text": 'a "b" é', "type": "person"}]
