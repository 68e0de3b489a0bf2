"""How far logits differ between bypass, merged, and rows that run beside a merged adapter.

On the embedded base model with random adapters of rank 16 on all linear layers, for
float32 and bfloat16; and what restoring by subtraction leaves behind.

    python -m benchmarks.mode_differences --output benchmarks/results/mode-differences.json
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM

from benchmarks.command import command, write_json
from dynamic_lora_adapters.device.slab import ResidentAdapter
from dynamic_lora_adapters.terms import AdapterTerms, LinearTerms
from dynamic_lora_server.base.base_model import resolve_base
from dynamic_lora_server.engine.sequence import Sequence as Row
from dynamic_lora_server.engine.startup.build import BuiltEngine, EngineOptions, build_engine
from dynamic_lora_server.generation import SamplingParams
from dynamic_lora_server.modes import Mode

_CYCLES = 100
_PROMPTS = 4
_PROMPT_TOKENS = 48
_LAYERS = ("down_proj", "q_proj")


def load(path: Path, dtype: torch.dtype) -> tuple[BuiltEngine, list[ResidentAdapter]]:
    """The engine on the base in `dtype`, with two adapters on the device."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()
    options = EngineOptions(kv_memory=2**28, adapter_memory=2**30, mode=Mode.BYPASS)
    built = build_engine(model, model_id="base", options=options)
    adapters = []
    for seed in range(2):
        adapter = built.pool.admit(f"{seed}", random_terms(built, seed))
        assert adapter is not None
        adapters.append(adapter)
    return built, adapters


def random_terms(built: BuiltEngine, seed: int) -> AdapterTerms:
    """Factors of rank 16; the deltas change every greedy token on random prompts."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * 0.03

    linears = {
        path: LinearTerms(a=draw(16, shape.in_features), b=draw(shape.out_features, 16))
        for path, shape in built.geometry.linears.items()
    }
    return AdapterTerms(linears=linears)


def logits(built: BuiltEngine, adapter: ResidentAdapter | None) -> torch.Tensor:
    """Logits [prompts, vocab] after prompts that are the same for every call."""
    generator = torch.Generator().manual_seed(99)
    rows = [
        Row(
            id=number,
            prompt_ids=tuple(
                torch.randint(100, 40_000, (_PROMPT_TOKENS,), generator=generator).tolist()
            ),
            sampling=SamplingParams(max_new_tokens=1),
            stop_ids=frozenset(),
            seed=0,
            adapter=adapter,
        )
        for number in range(_PROMPTS)
    ]
    engine = built.engine
    for row in rows:
        engine.add(row)
    _, found = engine.runner.run(engine.scheduler.schedule())
    for row in rows:
        engine.cancel(row)
    return found.clone()


def compare(path: Path, dtype: torch.dtype) -> dict[str, float]:
    """Largest logit differences; `delta` is what the adapter itself changes."""
    built, (a, b) = load(path, dtype)
    merger = built.engine.runner.merger
    plain = {"a": logits(built, a), "b": logits(built, b), "base": logits(built, None)}
    merger.switch(a)
    merged = {"a": logits(built, a), "b": logits(built, b), "base": logits(built, None)}
    merger.switch(None)
    restored = logits(built, None)
    return {
        "delta": _apart(plain["a"], plain["base"]),
        "merged row against bypass": _apart(merged["a"], plain["a"]),
        "other adapter's row beside it": _apart(merged["b"], plain["b"]),
        "base row beside it": _apart(merged["base"], plain["base"]),
        "base row after restoring": _apart(restored, plain["base"]),
    }


def peft(path: Path, dtype: torch.dtype) -> dict[str, float]:
    """PEFT's own merged against its own unmerged forward, and what the dtype itself costs."""
    config = LoraConfig(r=16, lora_alpha=16, target_modules="all-linear")
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()
    exact = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    ids = torch.randint(
        100, 40_000, (_PROMPTS, _PROMPT_TOKENS), generator=torch.Generator().manual_seed(99)
    )
    with torch.inference_mode():
        rounding = _apart(model(ids).logits[:, -1], exact(ids).logits[:, -1])
        wrapped = get_peft_model(model, config)
        generator = torch.Generator().manual_seed(0)
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                drawn = torch.randn(parameter.shape, generator=generator) * 0.03
                parameter.copy_(drawn.to(parameter.dtype))
        unmerged = wrapped(ids).logits[:, -1].clone()
        wrapped.merge_adapter()
        merged = wrapped(ids).logits[:, -1]
    return {
        "PEFT: merged against unmerged": _apart(merged, unmerged),
        "base model against float32": rounding,
    }


def drift(path: Path, dtype: torch.dtype) -> dict[str, float]:
    """Largest difference of two layers' weights after merging and subtracting _CYCLES times."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
    generator = torch.Generator().manual_seed(0)
    found = {}
    for name in _LAYERS:
        weight = next(p for n, p in model.named_parameters() if n.endswith(f"{name}.weight"))
        now = weight.detach().clone()
        a = torch.randn(16, weight.shape[1], generator=generator) * 0.03
        b = torch.randn(weight.shape[0], 16, generator=generator) * 0.03
        for _ in range(_CYCLES):
            now = torch.addmm(now.float(), b, a).to(dtype)
            now = torch.addmm(now.float(), b, a, alpha=-1).to(dtype)
        found[f"{name} after {_CYCLES} cycles of subtracting"] = _apart(now, weight.detach())
    return found


def _apart(left: torch.Tensor, right: torch.Tensor) -> float:
    return float((left.float() - right.float()).abs().max())


def report(results: dict[str, dict[str, float]], names: Sequence[str]) -> Table:
    """One line for each figure, one column for each dtype."""
    table = Table("", *names)
    for key in results[names[0]]:
        table.add_row(key, *(f"{results[name][key]:.2g}" for name in names))
    return table


def main() -> None:
    """Measure, print and write."""
    parser = command("mode_differences", __doc__)
    parser.add_argument("--model", help="base model; by default the embedded one")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    path = resolve_base(arguments.model).path
    results = {
        str(dtype).removeprefix("torch."): compare(path, dtype)
        | peft(path, dtype)
        | drift(path, dtype)
        for dtype in (torch.float32, torch.bfloat16)
    }
    Console().print(report(results, list(results)))
    if arguments.output:
        write_json(results, arguments.output)


if __name__ == "__main__":
    main()
