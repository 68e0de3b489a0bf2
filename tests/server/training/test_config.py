"""Recipes: what they may say, and how faults are named."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from dynamic_lora_server.training import TrainingConfigError, load_config

RECIPES = sorted((Path(__file__).parents[3] / "recipes").glob("*.yaml"))


def recipe(**changes: Any) -> dict[str, Any]:
    """A small valid recipe with top-level fields replaced."""
    return {
        "dataset": {"kind": "jsonl", "train": "train.jsonl"},
        "prompt_template": "Q: {input}\nA:",
        "output": "adapter",
        "card": {
            "description": "d",
            "dataset": "s",
            "license": "Apache-2.0",
            "attribution": "a",
            "example": {"input": "i", "output": "o"},
        },
        **changes,
    }


def write(path: Path, content: object) -> Path:
    """Write a recipe file."""
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return path


def test_defaults_and_rendering(tmp_path: Path) -> None:
    config = load_config(write(tmp_path / "r.yaml", recipe()))
    assert config.render("why {input}?") == "Q: why {input}?\nA:"
    assert config.base_name == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert config.lora.target_modules == "all-linear"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora": {"rank": 8}}, "lora.rank: is not a key of a recipe"),
        ({"lora": {"r": 0}}, "lora.r: Input should be greater than or equal to 1"),
        ({"optimizer": {"lr": float("inf")}}, "optimizer.lr: Input should be a finite number"),
        ({"micro_batch_size": 0}, "micro_batch_size: Input should be greater than or equal to 1"),
        ({"optimizer": {"schedule": "step"}}, "optimizer.schedule: Input should be 'cosine'"),
        ({"prompt_template": "Q:"}, r"must hold \{input\} exactly once"),
        ({"prompt_template": "{input}{input}"}, r"must hold \{input\} exactly once"),
        ({"dataset": {"kind": "csv", "train": "x"}}, "dataset: Input tag 'csv'"),
        ({"dataset": {"kind": "jsonl"}}, "dataset.jsonl.train: Field required"),
        (
            {"card": {**recipe()["card"], "parameters": {"max_tokens": 8}}},
            "card.parameters.max_tok",
        ),
        ({"seed": 2**64}, "seed: Input should be less than 18446744073709551616"),
        ({"seed": -(2**63) - 1}, "seed: Input should be greater than or equal to -9223372036854"),
        ({"epoch": 2}, "epoch: is not a key of a recipe"),
    ],
)
def test_faults_are_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(TrainingConfigError, match=message):
        load_config(write(tmp_path / "r.yaml", recipe(**changes)))


def test_unreadable_recipes(tmp_path: Path) -> None:
    with pytest.raises(TrainingConfigError, match="cannot read the recipe .*absent.yaml"):
        load_config(tmp_path / "absent.yaml")
    (tmp_path / "broken.yaml").write_text("a: [", encoding="utf-8")
    with pytest.raises(TrainingConfigError, match="cannot read the recipe .*broken.yaml"):
        load_config(tmp_path / "broken.yaml")
    (tmp_path / "date.yaml").write_text("card: {dataset: 2024-02-30}", encoding="utf-8")
    with pytest.raises(TrainingConfigError, match=r"cannot read the recipe .*date\.yaml: day"):
        load_config(tmp_path / "date.yaml")
    with pytest.raises(TrainingConfigError, match="recipe: Input should be a valid dictionary"):
        load_config(write(tmp_path / "list.yaml", ["a"]))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_shipped_recipes_are_valid(path: Path) -> None:
    config = load_config(path)
    assert config.output.endswith(f"shipped/{path.stem}")


def test_there_are_three_shipped_recipes() -> None:
    assert [path.stem for path in RECIPES] == ["describe", "ner", "sentiment"]
