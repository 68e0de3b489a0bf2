"""How far rounding moves next-token distributions from float32's.

The mean Kullback-Leibler divergence, in nats a token, of transformers' own layers with this
project's products in their place, and with adapters' factors as the server keeps them: on answers
of the shipped adapters to dev prompts (teacher forced), and on text that the base continues. Merged
means that the weights hold the adapter, or, for the base, one that is taken away again. Beside
`w8a8` stand other numbers of inputs that share a scale, computed by torch: 32, as llama.cpp's Q8_0
has them, and whole rows, as vLLM's W8A8.

    python -m benchmarks.divergence --data DIR --output FILE
"""

import sys
from collections.abc import Callable, Iterable
from enum import Enum, auto
from pathlib import Path

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.command import command, exit_with_reason, write_json
from benchmarks.quality import RECIPES, SHIPPED, TASKS
from dynamic_lora_adapters.apply.products import ProductKind, make_product
from dynamic_lora_adapters.device.groups import MemberTerms, ProjectionGroup
from dynamic_lora_adapters.device.slab import Slab
from dynamic_lora_adapters.device.slab_layout import SlabLayout
from dynamic_lora_adapters.kernels.factor_layout import layout_for
from dynamic_lora_adapters.kernels.native_segments import NativeSegments
from dynamic_lora_adapters.native.product import NativeProduct
from dynamic_lora_adapters.segments import Effect, Run
from dynamic_lora_adapters.terms import LinearTerms
from dynamic_lora_server.base.base_model import resolve_base
from dynamic_lora_server.training.config import load_config
from dynamic_lora_server.training.datasets import load_examples
from dynamic_lora_server.training.errors import TrainingError

Product = Callable[[torch.Tensor], torch.Tensor]
# How a linear layer's weight [out, in] is multiplied by.
Way = Callable[[torch.Tensor, torch.Tensor | None], Product]
# Token ids, and how many of the first are not counted.
Text = tuple[list[int], int]

_LARGEST = 127
_PROMPTS = 60
_WINDOWS, _WINDOW = 16, 256


class Layer(nn.Module):
    """A linear layer in another way."""

    def __init__(self, linear: nn.Linear, way: Way) -> None:
        super().__init__()
        self.product = way(linear.weight.data, linear.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., in] to [..., out]."""
        return self.product(x)


class Holds(Enum):
    """What weights hold of an adapter: nothing; what is to be added; what rows do without."""

    NOTHING = auto()
    OWN = auto()
    ANOTHER = auto()


class AdaptedLayer(nn.Module):
    """A linear layer with a LoRA of PEFT's, both as the server computes them for a product."""

    def __init__(self, layer: LoraLayer, kind: ProductKind, holds: Holds) -> None:
        super().__init__()
        base = layer.base_layer
        assert isinstance(base, nn.Linear)
        (name,) = layer.active_adapters
        a, b = (part[name].get_parameter("weight").data for part in (layer.lora_A, layer.lora_B))
        self._group = ProjectionGroup(("layer",), a.shape[1], (len(b),))
        terms = LinearTerms(a=a, b=b * layer.scaling[name])
        self._slab = _slab_of(MemberTerms(self._group, (terms,)), kind)
        self._add = NativeSegments()
        self._holds = holds
        self.product = make_product(kind, base.weight.data, base.bias)
        if holds is not Holds.NOTHING:
            kept = self._slab.terms(0, 0).plain(self._group)
            assert isinstance(self.product, NativeProduct)
            assert kept.a is not None and kept.b is not None
            self.product.replace_folded(base.weight.data, kept.a.float(), kept.b.float())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., in] to [..., out]."""
        rows = x.reshape(-1, x.shape[-1])
        out = self.product(rows)
        if self._holds is not Holds.OWN:
            effect = Effect.UNDO if self._holds is Holds.ANOTHER else Effect.APPLY
            run = Run(self._slab, 0, 0, [len(rows)], effect=effect)
            factors = self._slab.factors(0, run.slots)
            assert factors is not None
            self._add(out, rows, factors, run)
        return out.view(*x.shape[:-1], -1)


def _slab_of(member: MemberTerms, kind: ProductKind) -> Slab:
    assert kind.factor_dtype is not None
    device = torch.device("cpu")
    layout = SlabLayout(
        [member.group],
        device=device,
        dtype=torch.float32,
        factor_dtype=kind.factor_dtype,
        layout=layout_for(device, kind.factor_dtype),
        num_slots=1,
    )
    slab = layout.new_slab(0, (member.shape,), 1)
    member.write(slab.terms(0, 0))
    return slab


def native(kind: ProductKind) -> Way:
    """This project's product of a kind."""
    return lambda weight, bias: make_product(kind, weight, bias)


def in_groups(size: int | None) -> Way:
    """Weights in eight bits with a scale for each output, inputs with one for `size` (a row)."""

    def product(weight: torch.Tensor, bias: torch.Tensor | None) -> Product:
        rounded = in_eight_bits(weight, None)
        return lambda x: nn.functional.linear(in_eight_bits(x, size), rounded, bias)

    return product


def in_eight_bits(x: torch.Tensor, size: int | None) -> torch.Tensor:
    """x [..., in] in multiples of a 127th of the largest of each `size` inputs (None: a row)."""
    groups = []
    for group in x.split(size or x.shape[-1], dim=-1):
        step = group.abs().amax(-1, keepdim=True) / _LARGEST
        groups.append((group / step.where(step > 0, torch.ones_like(step))).round() * step)
    return torch.cat(groups, dim=-1)


KINDS = (ProductKind.BF16, ProductKind.INT8, ProductKind.W8A8)
MERGED = {f"{kind}, merged": kind for kind in (ProductKind.INT8, ProductKind.W8A8)}
OWN = {kind.value: kind for kind in KINDS} | MERGED
WAYS: dict[str, Way] = {
    **{name: native(kind) for name, kind in OWN.items()},
    "a scale for 32 inputs": in_groups(32),
    "a scale for a row of inputs": in_groups(None),
}


def replace_linears(
    module: nn.Module,
    way: Way,
    kind: ProductKind | None = None,
    holds: Holds = Holds.NOTHING,
) -> None:
    """Put `way` in the place of every linear layer; with a kind of ours, of its adapter's, too."""
    for name, child in module.named_children():
        if kind is not None and isinstance(child, LoraLayer):
            setattr(module, name, AdaptedLayer(child, kind, holds))
        elif isinstance(child, nn.Linear):
            setattr(module, name, Layer(child, way))
        elif name not in ("lora_A", "lora_B"):
            replace_linears(child, way, kind, holds)


def load(base: Path, task: str | None, name: str | None) -> nn.Module:
    """The base, with a shipped adapter or none, in one of WAYS or as it is."""
    model: nn.Module = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    holds = Holds.NOTHING
    if name in MERGED:
        holds = Holds.ANOTHER if task is None else Holds.OWN
    if task is not None or holds is Holds.ANOTHER:
        model = PeftModel.from_pretrained(model, str(SHIPPED / (task or "describe")))
    if name is not None:
        replace_linears(model, WAYS[name], OWN.get(name), holds)
    return model.eval()


def texts(base: Path, task: str | None, data: Path) -> list[Text]:
    """Prompts with their answers, or, for the base alone, sentences one behind the other."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    recipe = load_config(RECIPES / f"{task or 'ner'}.yaml")
    examples = load_examples(recipe.dataset, data, "dev")
    if task is None:
        ids = tokenizer("\n".join(example.input for example in examples))["input_ids"]
        starts = range(0, min(len(ids), _WINDOWS * _WINDOW), _WINDOW)
        return [(ids[start : start + _WINDOW], 1) for start in starts]
    found = []
    for example in examples[:: max(1, len(examples) // _PROMPTS)][:_PROMPTS]:
        prompt = tokenizer(recipe.render(example.input))["input_ids"]
        answer = tokenizer(f" {example.outputs[0].strip()}\n")["input_ids"]
        found.append((prompt + answer, len(prompt)))
    return found


@torch.inference_mode()
def log_probabilities(model: nn.Module, given: Iterable[Text]) -> list[torch.Tensor]:
    """Of each text, [tokens, vocab]: what comes at each place that counts."""
    found = []
    for ids, first in given:
        logits = model(torch.tensor([ids])).logits[0, first - 1 : -1]
        found.append(logits.float().log_softmax(-1))
    return found


def divergence(exact: list[torch.Tensor], rounded: list[torch.Tensor]) -> float:
    """The mean over all tokens of KL(exact || rounded), in nats."""
    total = sum(
        float((one.exp() * (one - other)).sum()) for one, other in zip(exact, rounded, strict=True)
    )
    return total / sum(len(one) for one in exact)


def measure(base: Path, data: Path, ways: Iterable[str] = WAYS) -> dict[str, dict[str, float]]:
    """Divergences by task, `base` for none, and by way."""
    found: dict[str, dict[str, float]] = {}
    console = Console(stderr=True)
    for task in track([*TASKS, None], description="Tasks", console=console):
        given = texts(base, task, data)
        exact = log_probabilities(load(base, task, None), given)
        found[task or "base"] = {
            name: divergence(exact, log_probabilities(load(base, task, name), given))
            for name in ways
        }
    return found


def as_table(found: dict[str, dict[str, float]]) -> Table:
    """A row for each task."""
    table = Table("nats a token", *found["base"])
    for task, values in found.items():
        table.add_row(task, *(f"{value:.5f}" for value in values.values()))
    return table


def main(argv: list[str]) -> None:
    """Measure, print and write."""
    root = command("divergence", __doc__)
    root.add_argument("--data", type=Path, required=True, help="folder with the data sets")
    root.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS, help="(default: all)")
    root.add_argument("--output", type=Path, help="a JSON file to write")
    args = root.parse_args(argv)
    with exit_with_reason("divergence", TrainingError):
        found = measure(resolve_base(None).path, args.data, args.ways)
    Console().print(as_table(found))
    if args.output:
        write_json(found, args.output)


if __name__ == "__main__":
    main(sys.argv[1:])
