"""One side of `benchmarks.turns`: an engine that makes a step when it is asked to.

Reads a JSON object a line and answers each with one: `{"begin": seed, "requests": n}` starts a
closed loop of as many requests, `{}` makes a step of it. Requests are random, or those of
`{"prompts": [...]}` besides, which the adapter of a task answers.
"""

import argparse
import json
import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import dynamic_lora_adapters
from dynamic_lora_adapters.apply.products import ProductKind
from dynamic_lora_adapters.files.card import TaskCard
from dynamic_lora_adapters.home.inspection import Inspector
from dynamic_lora_adapters.terms import AdapterTerms, LinearTerms
from dynamic_lora_server.base.base_model import resolve_base
from dynamic_lora_server.engine.engine import TokenEvent
from dynamic_lora_server.engine.sequence import Sequence
from dynamic_lora_server.engine.startup.build import BuiltEngine, EngineOptions, build_engine
from dynamic_lora_server.generation import SamplingParams
from dynamic_lora_server.modes import Mode


class RandomRequests:
    """Prompts and answers of fixed lengths, for random adapters in turns."""

    def __init__(self, built: BuiltEngine, vocab_size: int, options: argparse.Namespace) -> None:
        self._token_ids = range(vocab_size)
        self._options = options
        self._adapters = [
            built.pool.admit(f"{number:064x}", _terms(built, number, options))
            for number in range(options.adapters)
        ]

    def all(self, asked: dict[str, Any]) -> Iterator[Sequence]:
        """Of one loop. The first have different lengths, so that they do not end together."""
        rng = random.Random(asked["begin"])
        first = [rng.randint(2, self._options.output_tokens) for _ in range(self._options.clients)]
        for number in range(asked["requests"]):
            prompt = rng.choices(self._token_ids, k=self._options.prompt_tokens)
            output_tokens = [*first, self._options.output_tokens][min(number, len(first))]
            yield Sequence(
                id=number,
                prompt_ids=tuple(prompt),
                sampling=SamplingParams(max_new_tokens=output_tokens, ignore_eos=True),
                stop_ids=frozenset(),
                seed=0,
                adapter=self._adapters[number % len(self._adapters)] if self._adapters else None,
            )


class TaskRequests:
    """Inputs of a data set, for the shipped adapter of their task.

    Answers end where the server's do: at the model's end token, or the card's stop strings, each of
    which must be one token here.
    """

    def __init__(self, built: BuiltEngine, base: Path, task: str) -> None:
        folder = Path(dynamic_lora_adapters.__file__).parent / "shipped" / task
        card = TaskCard.read(folder)
        if card is None or card.parameters.max_new_tokens is None:
            raise RuntimeError(f"the card of {task} does not say how long answers are")
        self._card = card
        self._sampling = SamplingParams(max_new_tokens=card.parameters.max_new_tokens)
        self._tokenizer = AutoTokenizer.from_pretrained(base)
        stops = [self._ids(text) for text in card.parameters.stop or ()]
        if any(len(ids) != 1 for ids in stops):
            raise RuntimeError(f"a stop string of {task} is more than one token")
        self._stop_ids = frozenset([self._tokenizer.eos_token_id, *(ids[0] for ids in stops)])
        inspector = Inspector(built.geometry, base=built.weights)
        self._adapter = built.pool.admit(task, inspector.read(folder))

    def all(self, asked: dict[str, Any]) -> Iterator[Sequence]:
        """Of one loop: one for each prompt."""
        for number, text in enumerate(asked["prompts"]):
            yield Sequence(
                id=number,
                prompt_ids=self._ids(self._card.render(text)),
                sampling=self._sampling,
                stop_ids=self._stop_ids,
                seed=0,
                adapter=self._adapter,
            )

    def _ids(self, text: str) -> tuple[int, ...]:
        return tuple(self._tokenizer.encode(text, add_special_tokens=False))


class Side:
    """A closed loop of clients on an engine."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._num_clients = options.clients
        base = resolve_base(options.model).path
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        drafts = {"speculate": options.speculate} if options.speculate else {}
        self._built = build_engine(
            model.eval(),
            model_id="turns",
            options=EngineOptions(
                kv_memory=2**29,
                adapter_memory=2**31,
                mode=Mode(options.mode),
                prefix_cache_memory=0,
                base_product=None if options.product is None else ProductKind(options.product),
                **drafts,
            ),
        )
        self._requests: RandomRequests | TaskRequests
        if options.task is None:
            self._requests = RandomRequests(self._built, model.config.vocab_size, options)
        else:
            self._requests = TaskRequests(self._built, base, options.task)
        self._waiting: Iterator[Sequence] = iter(())

    def begin(self, asked: dict[str, Any]) -> None:
        """Have the first requests wait."""
        self._waiting = self._requests.all(asked)
        for _ in range(self._num_clients):
            self._ask()

    def step(self) -> dict[str, float | int | bool]:
        """Make a step; clients whose request has ended send their next."""
        start = time.perf_counter()
        events = self._built.engine.step()
        seconds = time.perf_counter() - start
        tokens = [event for event in events if isinstance(event, TokenEvent)]
        if len(tokens) != len(events):
            raise RuntimeError(f"a request failed: {events}")
        for event in tokens:
            if event.reason is not None:
                self._ask()
        return {"s": seconds, "tokens": len(tokens), "more": self._built.engine.has_work}

    def _ask(self) -> None:
        request = next(self._waiting, None)
        if request is not None:
            self._built.engine.add(request)


def _terms(built: BuiltEngine, seed: int, options: argparse.Namespace) -> AdapterTerms:
    generator = torch.Generator().manual_seed(seed)
    rank, saved_in = options.rank, getattr(torch, options.saved_in)

    def draw(*shape: int) -> torch.Tensor:
        return (torch.randn(*shape, generator=generator) * 0.02).to(saved_in).float()

    return AdapterTerms(
        linears={
            path: LinearTerms(a=draw(rank, shape.in_features), b=draw(shape.out_features, rank))
            for path, shape in built.geometry.linears.items()
            if not path.endswith("lm_head")
        }
    )


def main() -> None:
    """Serve steps over standard input and output."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("model", "product", "task"):
        parser.add_argument(f"--{name}")
    parser.add_argument("--mode", required=True)
    parser.add_argument("--saved-in", default="float32")
    parser.add_argument("--speculate", type=int, default=0)
    for name in ("adapters", "clients", "rank", "prompt-tokens", "output-tokens"):
        parser.add_argument(f"--{name}", type=int, required=True)
    with torch.inference_mode():
        side = Side(parser.parse_args())
        print(json.dumps({"ready": True}), flush=True)
        for line in sys.stdin:
            asked = json.loads(line)
            answer: dict[str, float | int | bool] = {}
            if asked:
                side.begin(asked)
            else:
                answer = side.step()
            print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
