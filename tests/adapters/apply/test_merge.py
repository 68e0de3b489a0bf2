"""Folding adapters into the weights and restoring them."""

import hashlib
import random
from itertools import count

import pytest
import torch

from dynamic_lora_adapters import BaseGeometry
from dynamic_lora_adapters.apply import pristine
from dynamic_lora_adapters.apply.inject import head_group, inject, observe_groups
from dynamic_lora_adapters.apply.merge import MergeFailed, Merger, WeightsLost
from dynamic_lora_adapters.apply.pristine import CopiedWeights, PristineWeights, SubtractedWeights
from dynamic_lora_adapters.apply.products import EXACT_KINDS, ProductKind, obstacle
from dynamic_lora_adapters.device.groups import GroupTerms
from dynamic_lora_adapters.device.slab import ResidentAdapter
from dynamic_lora_adapters.device.slots import AdapterPool
from dynamic_lora_adapters.kernels.factor_layout import layout_for
from dynamic_lora_adapters.terms import AdapterTerms, LinearTerms
from tests.support.models import tiny_llama

IDS = torch.arange(3, 12)[None]
NUM_STEPS = 300  # every switch from each of the four to each other, many times


def random_terms(geometry: BaseGeometry, seed: int, **parts: bool) -> AdapterTerms:
    """Terms of rank 4 on every layer and the parts asked for."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * 0.1

    linears = {}
    for path, shape in geometry.linears.items():
        size = shape.out_features
        linears[path] = LinearTerms(
            a=draw(4, shape.in_features),
            b=draw(size, 4),
            scale=draw(size) if parts.get("scale") else None,
            dense=draw(size, shape.in_features) if parts.get("dense") else None,
            bias=draw(size) if parts.get("bias") else None,
        )
    return AdapterTerms(linears=linears)


class Rig:
    """A tiny model with its merger and a pool of adapters."""

    def __init__(
        self, dtype: torch.dtype = torch.float32, *, kind: ProductKind = ProductKind.PLAIN
    ) -> None:
        self.model = tiny_llama()
        self.model.to(dtype)  # type: ignore[arg-type]
        self.geometry = BaseGeometry.of(self.model, model_id="tiny")
        groups = observe_groups(self.model, self.geometry.linears, lambda: self.model(IDS))
        head = head_group(self.model)
        assert head is not None
        paths = {path for group in groups for path in group.paths}
        if not paths & set(head.paths):
            groups.append(head)
        self.site, self.projections = inject(self.model, groups, kind=kind)
        self.pristine = CopiedWeights()
        self.merger = Merger(self.projections, self.pristine)
        self.pool = AdapterPool(
            groups,
            budget_bytes=2**28,
            device=torch.device("cpu"),
            dtype=dtype,
            factor_dtype=kind.factor_dtype,
            layout=layout_for(torch.device("cpu"), kind.factor_dtype),
            merges=True,
        )

    def admit(self, name: str, terms: AdapterTerms) -> ResidentAdapter:
        adapter = self.pool.admit(name, terms)
        assert adapter is not None
        return adapter

    def digest(self) -> str:
        digest = hashlib.sha256()
        for _, tensor in sorted(self.model.state_dict().items()):
            digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_random_switches_leave_every_byte_as_it_was(dtype: torch.dtype) -> None:
    rig = Rig(dtype)
    before = rig.digest()
    choices = [
        None,
        rig.admit("plain", random_terms(rig.geometry, 1)),
        rig.admit("scaled", random_terms(rig.geometry, 2, scale=True, bias=True)),
        rig.admit("dense", random_terms(rig.geometry, 3, dense=True)),
    ]
    rng = random.Random(0)
    for _ in range(NUM_STEPS):
        rig.merger.switch(rng.choice(choices))
    rig.merger.switch(choices[1])
    assert rig.digest() != before
    rig.merger.switch(None)
    assert rig.digest() == before


@pytest.mark.parametrize("kind", EXACT_KINDS)
@torch.inference_mode()
def test_merged_weights_give_the_logits_of_the_folded_model(kind: ProductKind) -> None:
    if (reason := obstacle(kind, torch.ones(8, 8))) is not None:
        pytest.skip(reason)
    rig = Rig(kind=kind)
    terms = random_terms(rig.geometry, 1, scale=True, dense=True)
    folded = tiny_llama()
    for path, part in terms.linears.items():
        weight = folded.get_parameter(f"{path}.weight")
        assert part.a is not None and part.b is not None
        assert part.scale is not None and part.dense is not None
        delta = weight * part.scale[:, None] + part.b @ part.a + part.dense
        weight.add_(delta)
    original = rig.model(IDS).logits
    rig.merger.switch(rig.admit("a", terms))
    torch.testing.assert_close(rig.model(IDS).logits, folded(IDS).logits, rtol=1e-4, atol=1e-4)
    rig.merger.switch(None)
    assert torch.equal(rig.model(IDS).logits, original)


def test_an_adapter_that_cannot_be_undone_is_not_merged() -> None:
    rig = Rig()
    path = next(iter(rig.geometry.linears))
    size = rig.geometry.linears[path].out_features
    vanishing = AdapterTerms(linears={path: LinearTerms(scale=torch.full((size,), -1.0))})
    late = AdapterTerms(linears=random_terms(rig.geometry, 1).linears, invocation_ids=(5,))
    assert not rig.admit("vanishing", vanishing).mergeable
    assert not rig.admit("late", late).mergeable
    biases = AdapterTerms(linears={path: LinearTerms(bias=torch.ones(size))})
    assert not rig.admit("biases", biases).mergeable
    assert rig.admit("plain", random_terms(rig.geometry, 1)).mergeable


@pytest.mark.parametrize("part", ["factors", "dense"])
def test_an_adapter_far_larger_than_the_weights_does_not_spare_others(part: str) -> None:
    """Measured by layer: `v_proj` shares a group with two that are ten times as large."""
    rig = Rig()
    path = "model.layers.0.self_attn.v_proj"
    for projection in rig.projections:
        if path in projection.group.paths:
            projection.weight[: -projection.group.widths[-1]].mul_(10)
    weight = rig.model.get_parameter(f"{path}.weight").data
    u, s, v = torch.linalg.svd(weight, full_matrices=False)
    for times, spares in ((3.9, True), (4.1, False)):
        delta = LinearTerms(a=(s[:, None] * v) * times, b=u)
        if part == "dense":
            delta = LinearTerms(dense=weight * times)
        adapter = rig.admit(str(times), AdapterTerms(linears={path: delta}))
        assert rig.merger.spares_others(adapter) is spares
    assert rig.merger.spares_others(rig.admit("plain", random_terms(rig.geometry, 1)))


@pytest.mark.parametrize("kind", [ProductKind.INT8, ProductKind.W8A8])
@pytest.mark.parametrize("part", ["factors", "dense"])
def test_no_output_in_eight_bits_may_get_far_larger_weights(part: str, kind: ProductKind) -> None:
    """However small the delta is beside the whole weight: here in one output alone."""
    if (reason := obstacle(kind, torch.ones(8, 8))) is not None:
        pytest.skip(reason)
    rig = Rig(kind=kind)
    path = "model.layers.0.mlp.down_proj"
    weight = rig.model.get_parameter(f"{path}.weight").data
    where = torch.zeros(len(weight), 1)
    where[3] = 1
    for times, spares in ((0.9, True), (1.1, False)):
        row = weight[3:4] * times
        delta = LinearTerms(a=row, b=where)
        if part == "dense":
            delta = LinearTerms(dense=where * row)
        adapter = rig.admit(str(times), AdapterTerms(linears={path: delta}))
        assert rig.merger.spares_others(adapter) is spares
        # Also while another one is merged.
        rig.merger.switch(adapter)
        assert rig.merger.spares_others(adapter) is spares
        rig.merger.switch(None)


def test_subtracting_drifts_within_its_bound_and_is_refreshed() -> None:
    rig = Rig(torch.bfloat16)
    stored = [projection.weight.clone() for projection in rig.projections]
    pristine = SubtractedWeights(rig.projections, lambda index: stored[index])
    merger = Merger(rig.projections, pristine)
    adapters = [rig.admit(str(seed), random_terms(rig.geometry, seed)) for seed in range(3)]
    worst = 0.0
    for step in range(3000):
        merger.switch(adapters[step % 3])
        merger.switch(None)
        worst = max(worst, merger.drift)
    assert worst > 0
    assert pristine.num_refreshes > 0
    largest = max(float(weight.abs().max()) for weight in stored)
    assert merger.drift <= pristine.MAX_DRIFT * largest
    for projection, weight in zip(rig.projections, stored, strict=True):
        # Rows that are not watched drift alike.
        difference = float((projection.weight.float() - weight.float()).abs().max())
        assert difference <= 4 * pristine.MAX_DRIFT * largest


@torch.inference_mode()
def test_other_threads_read_the_checkpoint_while_an_adapter_is_merged() -> None:
    rig = Rig()
    weights = PristineWeights(rig.model, rig.projections, rig.pristine)
    names = [name for name, _ in tiny_llama().named_parameters()]
    rig.merger.switch(rig.admit("a", random_terms(rig.geometry, 1)))
    for name in names:
        assert torch.equal(weights.parameter(name), tiny_llama().get_parameter(name)), name
    with pytest.raises(KeyError, match="nothing"):
        weights.parameter("model.nothing.weight")


@torch.inference_mode()
def test_a_switch_that_fails_leaves_the_base(monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig()
    before = rig.digest()
    rig.merger.switch(rig.admit("a", random_terms(rig.geometry, 1)))
    broken = rig.projections[3].base
    replace, calls = broken.replace, iter([True])

    def fail_once(weight: torch.Tensor) -> None:
        if next(calls, False):
            raise MemoryError("no room")
        replace(weight)

    monkeypatch.setattr(broken, "replace", fail_once)
    with pytest.raises(MergeFailed, match="MemoryError: no room"):
        rig.merger.switch(rig.admit("b", random_terms(rig.geometry, 2)))
    assert rig.merger.merged is None
    assert rig.digest() == before


@torch.inference_mode()
def test_a_first_merge_without_memory_for_copies_leaves_the_base(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What was not touched is left alone: bringing it back would take memory."""
    rig = Rig()
    before, made, copied = rig.digest(), count(), pristine._host_copy

    def copy(weight: torch.Tensor) -> torch.Tensor:
        if next(made) == 3:
            raise MemoryError("no room")
        return copied(weight)

    def restored(_weight: torch.Tensor) -> None:
        pytest.fail("it held nothing else")

    monkeypatch.setattr(pristine, "_host_copy", copy)
    for projection in rig.projections[3:]:
        monkeypatch.setattr(projection.base, "replace", restored)
    with pytest.raises(MergeFailed, match="MemoryError: no room"):
        rig.merger.switch(rig.admit("a", random_terms(rig.geometry, 1)))
    assert (rig.merger.merged, rig.digest()) == (None, before)


@torch.inference_mode()
def test_copies_may_be_given_back_while_nothing_is_merged() -> None:
    rig = Rig()
    before, adapter = rig.digest(), rig.admit("a", random_terms(rig.geometry, 1))
    for _ in range(2):
        rig.merger.switch(adapter)
        assert rig.digest() != before
        with pytest.raises(AssertionError, match="needed to bring the base back"):
            rig.merger.forget_copies()
        rig.merger.switch(None)
        rig.merger.forget_copies()
        assert rig.digest() == before


@torch.inference_mode()
def test_what_has_no_memory_to_be_weighed_is_not_merged(monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig()
    adapter = rig.admit("a", random_terms(rig.geometry, 1))

    def fail(*_: object) -> None:
        raise MemoryError("no room")

    with monkeypatch.context() as patched:
        patched.setattr(GroupTerms, "delta_norms", fail)
        with pytest.raises(MergeFailed, match="MemoryError: no room"):
            rig.merger.spares_others(adapter)
    rig.merger.switch(adapter)
    assert rig.merger.spares_others(rig.admit("b", random_terms(rig.geometry, 2)))


@torch.inference_mode()
def test_a_base_that_cannot_be_restored_is_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig()

    def fail(_: torch.Tensor) -> None:
        raise MemoryError("no room")

    monkeypatch.setattr(rig.projections[3].base, "replace", fail)
    with pytest.raises(WeightsLost, match=r"cannot be brought back: MemoryError: no room"):
        rig.merger.switch(rig.admit("a", random_terms(rig.geometry, 1)))


# What logits lose, beside the largest.
LOST = {ProductKind.BF16: 0.02, ProductKind.INT8: 0.05, ProductKind.W8A8: 0.08}


@pytest.mark.parametrize("kind", LOST)
@torch.inference_mode()
def test_rounded_weights_hold_factors_too(kind: ProductKind) -> None:
    if (reason := obstacle(kind, torch.ones(8, 8))) is not None:
        pytest.skip(reason)
    rig = Rig(kind=kind)
    terms = random_terms(rig.geometry, 1)
    folded = tiny_llama()
    for path, part in terms.linears.items():
        assert part.a is not None and part.b is not None
        folded.get_parameter(f"{path}.weight").add_(part.b @ part.a)
    before = rig.model(IDS).logits
    rig.merger.switch(rig.admit("a", terms))
    expected, logits = folded(IDS).logits, rig.model(IDS).logits
    assert float((logits - expected).abs().max() / expected.abs().max()) < LOST[kind]
    assert float((before - expected).abs().max() / expected.abs().max()) > 2 * LOST[kind]
    rig.merger.switch(None)
    assert torch.equal(rig.model(IDS).logits, before)


@pytest.mark.parametrize("kind", LOST)
@pytest.mark.parametrize("dense", [False, True])
@torch.inference_mode()
def test_terms_without_factors_are_merged_into_rounded_weights(
    dense: bool, kind: ProductKind
) -> None:
    """Their group has no factors, in tiles or as rows."""
    if (reason := obstacle(kind, torch.ones(8, 8))) is not None:
        pytest.skip(reason)
    rig = Rig(kind=kind)
    path = "model.layers.0.mlp.down_proj"
    weight = tiny_llama().get_parameter(f"{path}.weight").detach()
    added = torch.randn(weight.shape) / 8
    terms = LinearTerms(dense=added) if dense else LinearTerms(scale=torch.ones(len(weight)))
    before = rig.model(IDS).logits
    rig.merger.switch(rig.admit("a", AdapterTerms(linears={path: terms})))
    folded = tiny_llama()
    folded.get_parameter(f"{path}.weight").copy_(weight + added if dense else 2 * weight)
    expected, logits = folded(IDS).logits, rig.model(IDS).logits
    assert float((logits - expected).abs().max() / expected.abs().max()) < LOST[kind]
    assert float((logits - before).abs().max() / expected.abs().max()) > LOST[kind]
    rig.merger.switch(None)
    assert torch.equal(rig.model(IDS).logits, before)
