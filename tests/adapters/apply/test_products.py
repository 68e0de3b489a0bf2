"""Every kind of base product against torch's."""

import threading
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dynamic_lora_adapters.apply.products import (
    EXACT_KINDS,
    ProductKind,
    fastest_kind,
    make_product,
    obstacle,
)
from dynamic_lora_adapters.native import library
from dynamic_lora_adapters.native import product as native_product
from dynamic_lora_adapters.native.product import (
    Bfloat16Product,
    NativeProduct,
    rounds_inputs,
    whole_inputs,
)

WEIGHT = torch.ones(8, 8)
KINDS = [kind for kind in EXACT_KINDS if obstacle(kind, WEIGHT) is None]


@pytest.fixture(scope="module", autouse=True)
def compiled() -> None:
    """So that no test's time has the compiler's in it."""
    if obstacle(ProductKind.NATIVE, WEIGHT) is None:
        with whole_inputs():
            pass


@pytest.mark.parametrize("kind", EXACT_KINDS)
@given(
    rows=st.integers(1, 70),
    out_features=st.integers(1, 70),
    in_features=st.one_of(st.integers(1, 70), st.integers(2040, 2060)),
    biased=st.booleans(),
    strided=st.booleans(),
)
@settings(deadline=None)
@torch.inference_mode()
def test_products_equal_torchs(
    kind: ProductKind, rows: int, out_features: int, in_features: int, biased: bool, strided: bool
) -> None:
    if (reason := obstacle(kind, WEIGHT)) is not None:
        pytest.skip(reason)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(out_features, in_features, generator=generator)
    bias = torch.randn(out_features, generator=generator) if biased else None
    x = torch.randn(1, rows, 2 * in_features, generator=generator)
    x = x[..., ::2] if strided else x[..., :in_features].contiguous()
    out = make_product(kind, weight, bias)(x)
    assert out.shape == (1, rows, out_features)
    torch.testing.assert_close(
        out, torch.nn.functional.linear(x, weight, bias), rtol=1e-4, atol=1e-3
    )


@pytest.mark.skipif(obstacle(ProductKind.NATIVE, WEIGHT) is not None, reason="no C++ compiler")
@pytest.mark.parametrize(
    "kind", [ProductKind.NATIVE, ProductKind.BF16, ProductKind.INT8, ProductKind.W8A8]
)
@given(
    rows=st.integers(1, 70),
    out_features=st.one_of(st.sampled_from([32, 64, 96, 192]), st.integers(1, 70)),
    in_features=st.one_of(st.integers(1, 210), st.integers(2040, 2060)),
    biased=st.booleans(),
)
@settings(deadline=None)
@torch.inference_mode()
def test_halves_that_lie_in_turns_make_no_difference(
    kind: ProductKind, rows: int, out_features: int, in_features: int, biased: bool
) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(out_features, in_features, generator=generator)
    bias = torch.randn(out_features, generator=generator) if biased else None
    x = torch.randn(rows, in_features, generator=generator)
    plain = make_product(kind, weight, bias)
    in_turns = make_product(kind, weight, bias, halves=True)
    assert torch.equal(in_turns(x), plain(x))
    if isinstance(plain, NativeProduct) and isinstance(in_turns, NativeProduct):
        a = torch.randn(3, in_features, generator=generator)
        b = torch.randn(3, out_features, generator=generator)
        for product in (plain, in_turns):
            product.replace_folded(weight, a, b)
        assert torch.equal(in_turns(x), plain(x))


@pytest.mark.parametrize("kind", ProductKind)
@given(
    widths=st.lists(st.integers(1, 70), min_size=1, max_size=4),
    in_features=st.one_of(st.integers(1, 210), st.integers(2040, 2060)),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    padding=st.integers(0, 3),
    halves=st.booleans(),
)
@settings(deadline=None)
@torch.inference_mode()
def test_a_weight_in_parts_gives_the_bits_of_one_in_float32(
    kind: ProductKind,
    widths: list[int],
    in_features: int,
    dtype: torch.dtype,
    padding: int,
    halves: bool,
) -> None:
    if (reason := obstacle(kind, WEIGHT)) is not None:
        pytest.skip(reason)
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randn(n, in_features + padding, generator=generator).to(dtype) for n in widths]
    parts = tuple(part[:, :in_features] for part in rows)
    whole = torch.cat(parts).float()
    in_parts = make_product(kind, parts, None, dtype=torch.float32, halves=halves)
    in_one = make_product(kind, whole, None, halves=halves)
    x = torch.randn(5, in_features, generator=generator)
    assert torch.equal(in_parts(x), in_one(x))
    negated = tuple(-part for part in parts)
    in_parts.replace(negated)
    in_one.replace(-whole)
    assert torch.equal(in_parts(x), in_one(x))
    if isinstance(in_parts, NativeProduct) and isinstance(in_one, NativeProduct):
        a = torch.randn(3, in_features, generator=generator)
        b = torch.randn(3, sum(widths), generator=generator)
        in_parts.replace_folded(negated, a, b)
        in_one.replace_folded(-whole, a, b)
        assert torch.equal(in_parts(x), in_one(x))


@pytest.mark.parametrize("kind", KINDS)
@torch.inference_mode()
def test_a_replaced_weight_is_multiplied_by(kind: ProductKind) -> None:
    product = make_product(kind, torch.randn(20, 6), None)
    weight = torch.randn(6, 20).T
    product.replace(weight)
    x = torch.randn(3, 6)
    torch.testing.assert_close(product(x), x @ weight.T)


@pytest.mark.skipif(obstacle(ProductKind.NATIVE, WEIGHT) is not None, reason="no C++ compiler")
@given(
    out_features=st.integers(1, 70),
    in_features=st.integers(1, 210),
    rank=st.integers(1, 20),
    seed=st.integers(0, 1000),
)
@settings(deadline=None)
@torch.inference_mode()
def test_a_low_rank_delta_is_added_while_the_weight_is_packed(
    out_features: int, in_features: int, rank: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out_features, in_features, generator=generator)
    a = torch.randn(rank, in_features, generator=generator)
    # As in a slot: rows further apart than they are long, and zero outside a member's outputs.
    b = torch.randn(rank, out_features + 3, generator=generator)[:, :out_features]
    b[: rank // 2, out_features // 2 :] = 0
    product = NativeProduct(torch.zeros_like(weight), None)
    product.replace_folded(weight, a, b)
    exact = (weight.double() + b.double().T @ a.double()).T
    # Each column of the weight by itself: what is multiplied by one alone is not rounded again.
    torch.testing.assert_close(product(torch.eye(in_features)), exact.float())
    product.replace(weight)
    assert torch.equal(product(torch.eye(in_features)), weight.T)


@pytest.mark.parametrize("kind", KINDS)
def test_a_separate_product_leaves_the_weight_untouched(kind: ProductKind) -> None:
    weight = torch.ones(16, 4)
    product = make_product(kind, weight, None, shared=True)
    product.replace(torch.zeros(16, 4))
    assert product.separate
    assert bool((weight == 1).all())


def test_the_fastest_kind_is_measured() -> None:
    assert fastest_kind(torch.randn(64, 64), KINDS) in KINDS


def test_a_sole_kind_is_taken_unmeasured_and_others_where_the_weight_is() -> None:
    elsewhere = torch.empty(8, 8, device="meta")
    assert fastest_kind(elsewhere, [ProductKind.PLAIN]) is ProductKind.PLAIN
    assert fastest_kind(elsewhere, [ProductKind.PLAIN] * 2) is ProductKind.PLAIN


@pytest.mark.parametrize("kind", [kind for kind in ProductKind if kind is not ProductKind.PLAIN])
def test_a_weight_that_is_not_on_the_cpu_is_not_packed(kind: ProductKind) -> None:
    reason = obstacle(kind, torch.empty(8, 8, device="meta"))
    assert reason == "weights on meta are not packed"


def test_a_dtype_that_a_kind_does_not_know_is_named() -> None:
    weight = WEIGHT.double()
    assert "torch.float64 on this processor" in (obstacle(ProductKind.PACKED, weight) or "")
    assert "weights are torch.float64" in (obstacle(ProductKind.NATIVE, weight) or "")
    assert obstacle(ProductKind.PLAIN, weight) is None


@pytest.mark.skipif(obstacle(ProductKind.BF16, WEIGHT) is not None, reason="no C++ compiler")
@pytest.mark.parametrize("rounded", [True, False])
@given(
    rows=st.integers(1, 70),
    out_features=st.integers(1, 70),
    in_features=st.one_of(st.integers(1, 70), st.integers(2040, 2060)),
    biased=st.booleans(),
)
@settings(deadline=None)
@torch.inference_mode()
def test_bf16_multiplies_by_the_rounded_weight(
    rounded: bool, rows: int, out_features: int, in_features: int, biased: bool
) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(out_features, in_features, generator=generator)
    bias = torch.randn(out_features, generator=generator) if biased else None
    x = torch.randn(rows, in_features, generator=generator)
    product = Bfloat16Product(weight, bias)
    if rounded:
        out = product(x)
        x = x.bfloat16().float() if rounds_inputs() else x
    else:
        with whole_inputs():
            out = product(x)
    expected = torch.nn.functional.linear(x, weight.bfloat16().float(), bias)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-3)


@pytest.mark.skipif(obstacle(ProductKind.BF16, WEIGHT) is not None, reason="no C++ compiler")
@torch.inference_mode()
def test_rounding_may_be_switched_off_while_bf16_multiplies() -> None:
    """Each call rounds all of its inputs or none."""
    product, x = Bfloat16Product(torch.randn(64, 1024), None), torch.randn(40, 1024)
    rounded = product(x)
    with whole_inputs():
        whole = product(x)
    done = threading.Event()

    def switch() -> None:
        while not done.is_set():
            with whole_inputs():
                pass

    switching = threading.Thread(target=switch)
    switching.start()
    try:
        for _ in range(200):
            out = product(x)
            assert torch.equal(out, rounded) or torch.equal(out, whole)
    finally:
        done.set()
        switching.join()


@pytest.mark.skipif(obstacle(ProductKind.BF16, WEIGHT) is not None, reason="no C++ compiler")
@pytest.mark.parametrize(
    "x", [torch.ones(2, 8).double(), torch.ones(2, 4)], ids=["float64", "too narrow"]
)
def test_inputs_that_a_packed_weight_cannot_read_are_refused(x: torch.Tensor) -> None:
    product = make_product(ProductKind.NATIVE, WEIGHT, None)
    with pytest.raises(AssertionError):
        product(x)


@pytest.mark.skipif(obstacle(ProductKind.BF16, WEIGHT) is not None, reason="no C++ compiler")
@given(out_features=st.integers(1, 70), in_features=st.integers(1, 210), rank=st.integers(1, 20))
@settings(deadline=None)
@torch.inference_mode()
def test_what_is_merged_into_bf16_is_rounded_once(
    out_features: int, in_features: int, rank: int
) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(out_features, in_features, generator=generator)
    a = torch.randn(rank, in_features, generator=generator)
    b = torch.randn(rank, out_features, generator=generator)
    product = Bfloat16Product(torch.zeros_like(weight), None)
    product.replace(weight)
    assert torch.equal(product(torch.eye(in_features)), weight.bfloat16().float().T)
    product.replace_folded(weight, a, b)
    # Half a step of bfloat16, and what float32's own sums make.
    torch.testing.assert_close(
        product(torch.eye(in_features)), (weight + b.T @ a).T, rtol=2**-8 + 1e-5, atol=1e-5
    )


@pytest.mark.skipif(obstacle(ProductKind.BF16, WEIGHT) is not None, reason="no C++ compiler")
@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -float("inf")])
@torch.inference_mode()
def test_bf16_keeps_what_is_no_number_to_its_row(wrong: float) -> None:
    x = torch.ones(9, 259)
    x[4, 255] = wrong
    out = make_product(ProductKind.BF16, torch.ones(20, 259), None)(x)
    assert not out[4].isfinite().any()
    others = torch.cat([out[:4], out[5:]])
    torch.testing.assert_close(others, torch.full((8, 20), 259.0))


@dataclass(frozen=True, slots=True)
class EightBits:
    """A product by weights in eight bits: how its inputs are rounded."""

    kind: ProductKind
    group: int  # inputs of a row that share a scale
    largest: int  # what the largest of them becomes,
    pairs: bool = False  # or the largest two neighbours together

    def rounded(self, x: torch.Tensor) -> torch.Tensor:
        """x [rows, in] as the product sees it."""
        groups = []
        for group in x.split(self.group, dim=1):
            sizes = group.abs()
            if self.pairs:
                sizes = torch.nn.functional.pad(sizes, (0, sizes.shape[1] % 2))
                sizes = sizes[:, ::2] + sizes[:, 1::2]
            step = sizes.amax(1, keepdim=True) / self.largest
            groups.append((group / step).round() * step)
        return torch.cat(groups, dim=1)


EIGHT_BITS = [EightBits(ProductKind.INT8, 256, 32767)]
if obstacle(ProductKind.W8A8, WEIGHT) is None:
    EIGHT_BITS.append(EightBits(ProductKind.W8A8, 64, 127, pairs=native_product.rounds_pairs()))
eight_bits = pytest.mark.parametrize("bits", EIGHT_BITS, ids=lambda bits: bits.kind.value)


@pytest.mark.skipif(obstacle(ProductKind.INT8, WEIGHT) is not None, reason="no C++ compiler")
@eight_bits
@given(
    rows=st.integers(1, 40),
    out_features=st.integers(1, 70),
    in_features=st.one_of(st.integers(1, 70), st.integers(2040, 2060)),
    biased=st.booleans(),
)
@settings(deadline=None)
@torch.inference_mode()
def test_eight_bits_multiply_by_the_rounded_weight(
    bits: EightBits, rows: int, out_features: int, in_features: int, biased: bool
) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(out_features, in_features, generator=generator)
    weight[0] = 0
    bias = torch.randn(out_features, generator=generator) if biased else None
    step = weight.abs().amax(1, keepdim=True).clamp(min=1e-30) / 127
    rounded = (weight / step).round() * step
    x = torch.randn(rows, in_features, generator=generator)
    x *= 100 ** torch.arange(rows).remainder(5)[:, None]
    out = make_product(bits.kind, weight, bias)(x)
    expected = torch.nn.functional.linear(bits.rounded(x), rounded, bias)
    # An input halfway between two steps may be rounded to either; terms may cancel each other.
    largest = (x.abs().amax(1, keepdim=True) * weight.abs().amax()).clamp(min=1)
    halfway = max(1e-4, 1 / bits.largest)
    torch.testing.assert_close(out / largest, expected / largest, rtol=0, atol=halfway)
    if rows > 1:  # of one row, one such input moves all outputs
        assert ((out - expected) / largest).abs().median() < 1e-4


@pytest.mark.skipif(obstacle(ProductKind.INT8, WEIGHT) is not None, reason="no C++ compiler")
@eight_bits
@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", [0, 63, 64, 255, 256, 258])
@torch.inference_mode()
def test_eight_bits_keep_what_is_no_number_to_its_row(
    bits: EightBits, wrong: float, place: int
) -> None:
    x = torch.ones(9, 259)
    x[4, place] = wrong
    out = make_product(bits.kind, torch.ones(20, 259), None)(x)
    assert not out[4].isfinite().any()
    others = torch.cat([out[:4], out[5:]])
    expected = bits.rounded(torch.ones(8, 259)).sum(1, keepdim=True)
    torch.testing.assert_close(others, expected.expand(8, 20))


@pytest.mark.skipif(obstacle(ProductKind.INT8, WEIGHT) is not None, reason="no C++ compiler")
@eight_bits
@pytest.mark.parametrize("size", [0.0, 1e-44, 1e-38, 1e-31])
@torch.inference_mode()
def test_eight_bits_take_tiny_inputs_for_zeros(bits: EightBits, size: float) -> None:
    bias = torch.randn(20)
    out = make_product(bits.kind, torch.ones(20, 300), bias)(torch.full((3, 300), size))
    assert torch.equal(out, bias.expand(3, 20))


@pytest.mark.skipif(obstacle(ProductKind.W8A8, WEIGHT) is not None, reason="no C++ compiler")
@given(
    rows=st.integers(1, 40),
    out_features=st.integers(1, 70),
    in_features=st.one_of(st.integers(1, 200), st.integers(2040, 2060)),
)
@settings(deadline=None)
@torch.inference_mode()
def test_whole_inputs_of_w8a8_have_as_many_bits_as_those_of_int8(
    rows: int, out_features: int, in_features: int
) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(out_features, in_features, generator=generator)
    x = torch.randn(rows, in_features, generator=generator)
    with whole_inputs():
        out = make_product(ProductKind.W8A8, weight, None)(x)
    expected = make_product(ProductKind.INT8, weight, None)(x)
    largest = x.abs().amax(1, keepdim=True) * weight.abs().amax() * in_features**0.5
    torch.testing.assert_close(out / largest, expected / largest, rtol=0, atol=2**-14)


def computed(
    kind: ProductKind, weight: torch.Tensor, x: torch.Tensor, *, unit: bool
) -> torch.Tensor:
    """The product by a library that was compiled with or without the matrix unit."""
    library.attempt.cache_clear()
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(library, "has_matrix_unit", lambda: unit)
            return make_product(kind, weight, None)(x)
    finally:
        library.attempt.cache_clear()


@pytest.mark.skipif(
    obstacle(ProductKind.INT8, WEIGHT) is not None or not library.has_matrix_unit(),
    reason="no C++ compiler, or no matrix unit (AMX) that this process may use",
)
@pytest.mark.parametrize("kind", [ProductKind.BF16, ProductKind.INT8])
@given(
    rows=st.integers(1, 100),
    out_features=st.integers(1, 70),
    in_features=st.one_of(st.integers(1, 300), st.integers(2040, 2060)),
)
@settings(deadline=None)
@torch.inference_mode()
def test_the_matrix_unit_computes_what_registers_do(
    kind: ProductKind, rows: int, out_features: int, in_features: int
) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(out_features, in_features, generator=generator)
    x = torch.randn(rows, in_features, generator=generator)
    if kind is ProductKind.BF16:
        x = x.bfloat16().float()  # in registers it is rounded only where that pays
    on_unit, in_registers = (computed(kind, weight, x, unit=unit) for unit in (True, False))
    # The same rounded numbers, added up in another order.
    torch.testing.assert_close(on_unit, in_registers, rtol=1e-5, atol=2e-4)


@pytest.mark.skipif(obstacle(ProductKind.INT8, WEIGHT) is not None, reason="no C++ compiler")
@eight_bits
@given(
    out_features=st.integers(1, 140),
    in_features=st.integers(1, 300),
    rank=st.integers(1, 9),
    halves=st.booleans(),
)
@settings(deadline=None)
@torch.inference_mode()
def test_what_is_merged_into_eight_bits_is_rounded_with_the_weight(
    bits: EightBits, out_features: int, in_features: int, rank: int, halves: bool
) -> None:
    weight, x = torch.randn(out_features, in_features), torch.randn(5, in_features)
    a, b = torch.randn(rank, in_features), torch.randn(rank, out_features)
    b[:, out_features // 2 :] = 0
    product = make_product(bits.kind, weight, None, halves=halves)
    assert isinstance(product, NativeProduct)
    before = product(x)
    product.replace_folded(weight, a, b)
    folded = weight + b.T @ a
    fresh = make_product(bits.kind, folded, None, halves=halves)(x)
    # The sums of a delta may be added up in another order, and move a weight by a step.
    step = folded.abs().amax(1) / 127 * x.abs().max() * 2
    assert bool(((product(x) - fresh).abs() <= step + 1e-4).all())
    product.replace(folded)
    assert torch.equal(product(x), fresh)
    product.replace(weight)
    assert torch.equal(product(x), before)


@pytest.mark.skipif(obstacle(ProductKind.INT8, WEIGHT) is not None, reason="no C++ compiler")
@eight_bits
@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
@torch.inference_mode()
def test_eight_bits_keep_a_weight_that_is_no_number_to_its_output(
    bits: EightBits, wrong: float
) -> None:
    weight = torch.ones(40, 70)
    weight[3, 5] = wrong
    out = make_product(bits.kind, weight, None)(torch.ones(2, 70))
    assert not out[:, 3].isfinite().any()
    others = torch.cat([out[:, :3], out[:, 4:]], dim=1)
    expected = bits.rounded(torch.ones(2, 70)).sum(1, keepdim=True)
    torch.testing.assert_close(others, expected.expand(2, 39))


@pytest.mark.skipif(obstacle(ProductKind.W8A8, WEIGHT) is not None, reason="no C++ compiler")
@pytest.mark.parametrize("gains", [True, False])
def test_eight_bits_that_gain_nothing_are_told_of_once(
    gains: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(native_product, "gains_by_eight_bits", lambda: gains)
    native_product._warn_of_no_gain.cache_clear()
    for _ in range(2):
        make_product(ProductKind.W8A8, WEIGHT, None)
    said = [r.getMessage() for r in caplog.records if "gain nothing" in r.getMessage()]
    assert len(said) == (0 if gains else 1)


@pytest.mark.skipif(obstacle(ProductKind.W8A8, WEIGHT) is not None, reason="no C++ compiler")
def test_eight_bits_gain_where_processors_say_so() -> None:
    flags = library.processor()
    gains, doubles = native_product.gains_by_eight_bits(), native_product.doubles_by_eight_bits()
    if "avx512_vnni" in flags:
        assert gains is doubles is not library.has_matrix_unit()
    else:  # an old compiler does not know AVX-VNNI
        assert not doubles or "avx_vnni" in flags
        assert gains is ("avx2" in flags and (doubles or "avx512f" not in flags))


@pytest.mark.skipif(obstacle(ProductKind.W8A8, WEIGHT) is not None, reason="no C++ compiler")
@pytest.mark.parametrize("sign", [1, -1])
@torch.inference_mode()
def test_the_largest_weights_and_inputs_in_eight_bits_are_added_in_full(sign: int) -> None:
    """Sums of two products are the largest that they can be."""
    x, weight = torch.ones(9, 260), sign * torch.ones(20, 260)
    expected = EIGHT_BITS[-1].rounded(x) @ weight.T
    torch.testing.assert_close(make_product(ProductKind.W8A8, weight, None)(x), expected)


@pytest.mark.skipif(obstacle(ProductKind.W8A8, WEIGHT) is not None, reason="no C++ compiler")
@torch.inference_mode()
def test_inputs_stay_whole_until_the_last_who_asked_has_done() -> None:
    x = torch.randn(2, 100, generator=torch.Generator().manual_seed(0))
    product = make_product(ProductKind.W8A8, torch.eye(100), None)
    first, second = whole_inputs(), whole_inputs()
    first.__enter__()
    whole = product(x)
    second.__enter__()
    first.__exit__(None, None, None)
    assert torch.equal(product(x), whole)
    second.__exit__(None, None, None)
    assert (product(x) - x).abs().max() > 10 * (whole - x).abs().max()
