"""One side of `benchmarks.turns`: an engine that makes a step when it is asked to.

Reads a JSON object a line and answers each with one: `{"begin": seed, "requests": n}` starts a
closed loop of as many requests, `{}` makes a step of it.
"""

import argparse
import json
import random
import sys
import time

import torch
from transformers import AutoModelForCausalLM

from dynamic_lora_adapters.products import ProductKind
from dynamic_lora_adapters.terms import AdapterTerms, LinearTerms
from dynamic_lora_server.base_model import resolve_base
from dynamic_lora_server.engine.build import BuiltEngine, EngineOptions, build_engine
from dynamic_lora_server.engine.engine import TokenEvent
from dynamic_lora_server.engine.sequence import Sequence
from dynamic_lora_server.generation import SamplingParams
from dynamic_lora_server.modes import Mode


class Side:
    """A closed loop of clients on an engine with random adapters on all linear layers."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._options = options
        model = AutoModelForCausalLM.from_pretrained(
            resolve_base(options.model).path, dtype=torch.float32
        )
        self._token_ids = range(model.config.vocab_size)
        self._built = build_engine(
            model.eval(),
            model_id="turns",
            options=EngineOptions(
                kv_memory=2**29,
                adapter_memory=2**31,
                mode=Mode(options.mode),
                prefix_cache_memory=0,
                base_product=None if options.product is None else ProductKind(options.product),
            ),
        )
        self._adapters = [
            self._built.pool.admit(f"{number:064x}", _terms(self._built, number, options))
            for number in range(options.adapters)
        ]
        self._rng = random.Random()
        self._waiting = 0
        self._asked = 0

    def begin(self, seed: int, requests: int) -> None:
        """Have the first requests wait: of different lengths, so that they do not end together."""
        self._rng, self._waiting, self._asked = random.Random(seed), requests, 0
        for _ in range(self._options.clients):
            self._ask(self._rng.randint(2, self._options.output_tokens))

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
                self._ask(self._options.output_tokens)
        return {"s": seconds, "tokens": len(tokens), "more": self._built.engine.has_work}

    def _ask(self, output_tokens: int) -> None:
        if not self._waiting:
            return
        self._waiting -= 1
        self._asked += 1
        adapters = self._adapters
        self._built.engine.add(
            Sequence(
                id=self._asked,
                prompt_ids=tuple(self._rng.choices(self._token_ids, k=self._options.prompt_tokens)),
                sampling=SamplingParams(max_new_tokens=output_tokens, ignore_eos=True),
                stop_ids=frozenset(),
                seed=0,
                adapter=adapters[self._asked % len(adapters)] if adapters else None,
            )
        )


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
    for name in ("model", "product"):
        parser.add_argument(f"--{name}")
    parser.add_argument("--mode", required=True)
    parser.add_argument("--saved-in", default="float32")
    for name in ("adapters", "clients", "rank", "prompt-tokens", "output-tokens"):
        parser.add_argument(f"--{name}", type=int, required=True)
    with torch.inference_mode():
        side = Side(parser.parse_args())
        print(json.dumps({"ready": True}), flush=True)
        for line in sys.stdin:
            asked = json.loads(line)
            answer: dict[str, float | int | bool] = {}
            if asked:
                side.begin(asked["begin"], asked["requests"])
            else:
                answer = side.step()
            print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
