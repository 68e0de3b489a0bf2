"""Dev figures of adapters, measured through a running server.

    python -m benchmarks.quality --url http://127.0.0.1:8000 --data DIR
    python -m benchmarks.quality --data DIR --recipe mine.yaml --adapter mine

Those that ship, or one of your own. Each adapter gets the bare sentences of its dev
split; the base model alone gets the same prompts, rendered by the recipe, with the
parameters of its card. `DIR` holds the data sets under the paths that the recipes name.
"""

import asyncio
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import httpx
import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import dynamic_lora_adapters
from benchmarks.command import exit_with_reason, write_json
from dynamic_lora_server.training import TrainingConfig, load_config
from dynamic_lora_server.training.config import ConllDataset, E2ECsvDataset
from dynamic_lora_server.training.datasets import Example, load_examples
from dynamic_lora_server.training.errors import TrainingError
from dynamic_lora_server.training.scoring import corpus_bleu, entity_score, label_accuracy

RECIPES = Path(__file__).resolve().parent.parent / "recipes"
SHIPPED = Path(dynamic_lora_adapters.__file__).parent / "shipped"
TASKS = ["ner", "sentiment", "describe"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskQuality:
    """One task's figures: the adapter's and the base model's, by metric name."""

    task: str
    num_examples: int
    adapter: dict[str, float]
    base: dict[str, float]

    def metrics(self) -> dict[str, float]:
        """One flat mapping, as the task card's `metrics` holds it."""
        base = {f"base_{name}": value for name, value in self.base.items()}
        return {**self.adapter, **base, "num_examples": self.num_examples}


def score(
    recipe: TrainingConfig, answers: Sequence[str], dev: Sequence[Example]
) -> dict[str, float]:
    """The metrics that suit the recipe's data set, by name, rounded to four digits."""
    if isinstance(recipe.dataset, ConllDataset):
        entities = entity_score(answers, [example.outputs[0] for example in dev])
        found = {
            "entity_f1": entities.f1,
            "entity_precision": entities.precision,
            "entity_recall": entities.recall,
            "valid_json": entities.valid_json,
        }
    elif isinstance(recipe.dataset, E2ECsvDataset):
        found = {"bleu": corpus_bleu(answers, [example.outputs for example in dev])}
    else:
        found = {"accuracy": label_accuracy(answers, [example.outputs[0] for example in dev])}
    return {name: round(value, 4) for name, value in found.items()}


async def generate_all(
    client: httpx.AsyncClient,
    bodies: Sequence[dict[str, Any]],
    *,
    adapter: str | None,
    concurrency: int,
    progress: Progress,
) -> list[str]:
    """Generated text per body, in order; raises `httpx.HTTPStatusError` on any error answer."""
    gate = asyncio.Semaphore(concurrency)
    task = progress.add_task(adapter or "base", total=len(bodies))
    query = {} if adapter is None else {"adapter": adapter}

    async def one(body: dict[str, Any]) -> str:
        async with gate:
            response = await client.post("/generate", params=query, json=body)
        response.raise_for_status()
        progress.advance(task)
        return str(response.json()["generated_text"])

    return list(await asyncio.gather(*map(one, bodies)))


async def measure(
    client: httpx.AsyncClient,
    name: str,
    recipe: TrainingConfig,
    data: Path,
    limit: int | None,
    concurrency: int,
) -> TaskQuality:
    """Answers of the adapter `name` and of the base for the recipe's dev split, scored."""
    dev = load_examples(recipe.dataset, data, "dev")[:limit]
    bare = [{"inputs": example.input} for example in dev]
    parameters = recipe.card.parameters.model_dump(exclude_none=True)
    rendered = [
        {"inputs": recipe.render(example.input), "parameters": parameters} for example in dev
    ]
    with Progress(console=Console(stderr=True)) as progress:
        adapted = await generate_all(
            client, bare, adapter=name, concurrency=concurrency, progress=progress
        )
        alone = await generate_all(
            client, rendered, adapter=None, concurrency=concurrency, progress=progress
        )
    return TaskQuality(
        task=name,
        num_examples=len(dev),
        adapter=score(recipe, adapted, dev),
        base=score(recipe, alone, dev),
    )


async def measure_all(
    url: str, recipes: Mapping[str, Path], data: Path, limit: int | None, concurrency: int
) -> list[TaskQuality]:
    """Every adapter in turn, by its recipe, against the server at `url`."""
    async with httpx.AsyncClient(base_url=url, timeout=600) as client:
        return [
            await measure(client, name, load_config(recipe), data, limit, concurrency)
            for name, recipe in recipes.items()
        ]


def write_card(quality: TaskQuality) -> None:
    """Put the measured figures into the shipped adapter's task card."""
    path = SHIPPED / quality.task / "task.json"
    card = json.loads(path.read_text(encoding="utf-8"))
    card["metrics"] = quality.metrics()
    path.write_text(f"{json.dumps(card, indent=2, ensure_ascii=False)}\n", encoding="utf-8")


def as_table(results: Sequence[TaskQuality]) -> Table:
    """A table with one row per metric."""
    table = Table("task", "metric", "adapter", "base alone", "examples")
    for quality in results:
        for name, value in quality.adapter.items():
            base = quality.base[name]
            table.add_row(
                quality.task, name, f"{value:.4g}", f"{base:.4g}", str(quality.num_examples)
            )
    return table


def main(
    data: Annotated[Path, typer.Option(help="Folder with the data sets.")],
    url: Annotated[str, typer.Option(help="The running server.")] = "http://127.0.0.1:8000",
    task: Annotated[list[str], typer.Option(help="Shipped adapter; repeatable.")] = TASKS,
    recipe: Annotated[Path | None, typer.Option(help="Recipe of an adapter of your own.")] = None,
    adapter: Annotated[str | None, typer.Option(help="Its name on the server.")] = None,
    limit: Annotated[int | None, typer.Option(help="First N examples only, for a try.")] = None,
    concurrency: Annotated[int, typer.Option(help="Requests in flight.")] = 16,
    out: Annotated[Path, typer.Option(help="JSON file to write.")] = Path("quality.json"),
    write_cards: Annotated[
        bool, typer.Option("--write-cards", help="Put the figures into the shipped task cards.")
    ] = False,
) -> None:
    """Measure the shipped adapters, or one of your own, and the base alone."""
    if write_cards and limit is not None:
        raise typer.BadParameter("cards take figures of the whole dev split: drop --limit")
    if write_cards and recipe is not None:
        raise typer.BadParameter("only shipped cards are written: drop --write-cards")
    if recipe is None and adapter is None:
        recipes = {name: RECIPES / f"{name}.yaml" for name in task}
    elif recipe is None or adapter is None:
        raise typer.BadParameter("--recipe and --adapter go together")
    else:
        recipes = {adapter: recipe}
    with exit_with_reason("quality", TrainingError, httpx.HTTPError):
        results = asyncio.run(measure_all(url, recipes, data, limit, concurrency))
    Console().print(as_table(results))
    report = {
        quality.task: {
            "num_examples": quality.num_examples,
            "adapter": quality.adapter,
            "base": quality.base,
        }
        for quality in results
    }
    write_json(report, out)
    if write_cards:
        for quality in results:
            write_card(quality)


if __name__ == "__main__":
    typer.run(main)
