"""The shipped adapters whose dev prompts benchmarks ask, where answers' lengths and words count."""

from pathlib import Path

from benchmarks.quality import RECIPES
from dynamic_lora_server.training.config import load_config
from dynamic_lora_server.training.datasets import load_examples

TASKS = ("ner", "describe")


def dev_prompts(task: str, data: Path) -> list[str]:
    """The inputs of a task's dev split below `data`, each once. Raises TrainingError."""
    recipe = load_config(RECIPES / f"{task}.yaml")
    examples = load_examples(recipe.dataset, data, "dev")
    return list(dict.fromkeys(example.input for example in examples))
