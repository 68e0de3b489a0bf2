"""The C++ against torch's operators, and what is said where it cannot be had."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dynamic_lora_adapters.apply.products import ProductKind, obstacle
from dynamic_lora_adapters.native import NativeUnavailable, library, load_library
from dynamic_lora_adapters.native.attention import NativeAttention
from dynamic_lora_adapters.native.norm import NativeRmsNorm, adopt_native_norms
from tests.support.models import TINY_MODELS, tiny_llama


def unavailable() -> str:
    try:
        load_library("attention")
    except NativeUnavailable as reason:
        return str(reason)
    return ""


@pytest.mark.skipif(
    os.environ.get("DYNAMIC_LORA_REQUIRE_CPP") != "1", reason="DYNAMIC_LORA_REQUIRE_CPP is not 1"
)
def test_where_cpp_is_required_it_can_be_had() -> None:
    """The tests that need it are skipped where it cannot."""
    assert obstacle(ProductKind.NATIVE, torch.ones(8, 8)) is None


needs_compiler = pytest.mark.skipif(bool(unavailable()), reason=unavailable() or "never")


@pytest.fixture
def no_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache folder, and no library remembered by this process."""
    monkeypatch.setattr(library, "user_cache_path", lambda _: tmp_path)
    library.attempt.cache_clear()
    library._warn.cache_clear()
    yield tmp_path
    library.attempt.cache_clear()


def made_compiler(folder: Path, monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    compiler = folder / "odd"
    compiler.write_bytes(content)
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))


def softmax_attention(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    scaling: float,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """One token q [heads, dim] over [seen, kv_heads, dim] -> [heads, value_dim], in float64."""
    group = q.shape[0] // keys.shape[1]
    k = keys.double().repeat_interleave(group, 1)
    v = values.double().repeat_interleave(group, 1)
    scores = torch.einsum("hd,thd->ht", q.double(), k) * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if sinks is not None:
        scores = torch.cat([scores, sinks.double()[:, None]], 1)
    weights = torch.softmax(scores, 1)[:, : len(keys)]
    return torch.einsum("ht,thd->hd", weights, v)


@needs_compiler
@given(
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 9),
    dim=st.sampled_from([16, 48, 64]),
    value_dim=st.sampled_from([16, 32, 80]),
    seen=st.lists(st.integers(1, 40), min_size=1, max_size=12),
    softcap=st.sampled_from([None, 5.0]),
    with_sinks=st.booleans(),
    magnitude=st.sampled_from([0.1, 1.0, 30.0]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
@settings(deadline=None)
@example(  # with many tokens one thread has all KV heads of each
    kv_heads=3,
    group=5,
    dim=48,
    value_dim=80,
    seen=[40, 1, 16, 17, 32, 33, 5, 8, 31],
    softcap=5.0,
    with_sinks=True,
    magnitude=1.0,
    dtype=torch.bfloat16,
)
@torch.inference_mode()
def test_attention_equals_softmax_attention(
    kv_heads: int,
    group: int,
    dim: int,
    value_dim: int,
    seen: list[int],
    softcap: float | None,
    with_sinks: bool,
    magnitude: float,
    dtype: torch.dtype,
) -> None:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    heads, num_tokens = kv_heads * group, len(seen) + 1
    q = magnitude * random(num_tokens, heads, dim).transpose(0, 1)
    keys, values = random(99, kv_heads, dim).to(dtype), random(99, kv_heads, value_dim).to(dtype)
    sinks = random(heads) if with_sinks else None
    out = torch.full((num_tokens, heads, value_dim), 7.0)
    items = torch.tensor([[row, 3 * row, n] for row, n in enumerate(seen)])
    NativeAttention().attend(
        q, keys, values, out, items, scaling=dim**-0.5, softcap=softcap, sinks=sinks
    )
    for row, first, n in items.tolist():
        expected = softmax_attention(
            q[:, row],
            keys[first : first + n],
            values[first : first + n],
            dim**-0.5,
            softcap,
            sinks,
        )
        torch.testing.assert_close(out[row], expected.float(), rtol=1e-4, atol=1e-5)
    assert bool((out[-1] == 7).all()), "a row that no item names is left alone"


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("transposed", [False, True])
def test_new_keys_are_written_to_their_cells(transposed: bool, dtype: torch.dtype) -> None:
    table = torch.zeros(9, 2, 16, dtype=dtype)
    x = torch.randn(3, 2, 16).transpose(0, 1) if transposed else torch.randn(2, 3, 16)
    x[0, 0, :3] = torch.tensor([float("nan"), float("inf"), -3.4e38])
    NativeAttention().write(table, torch.tensor([7, 0, 4]), x)
    cells, new = torch.tensor([7, 0, 4]), x.transpose(0, 1).to(dtype)
    expected = torch.zeros(9, 2, 16, dtype=dtype).index_copy(0, cells, new)
    torch.testing.assert_close(table, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    ("dtype", "keys", "values"),
    [
        (torch.bfloat16, torch.zeros(2, 1, 16), torch.zeros(2, 1, 16)),
        (torch.float32, torch.zeros(2, 1, 16), torch.zeros(2, 1, 16, dtype=torch.bfloat16)),
        (torch.float32, torch.zeros(2, 1, 16).half(), torch.zeros(2, 1, 16).half()),
        (torch.float32, torch.zeros(2, 1, 24), torch.zeros(2, 1, 16)),
        (torch.float32, torch.zeros(2, 1, 16), torch.zeros(2, 1, 8)),
    ],
    ids=["queries in bfloat16", "of two dtypes", "float16", "24 wide", "8 wide"],
)
def test_tables_that_it_cannot_read_are_left_to_torch(
    dtype: torch.dtype, keys: torch.Tensor, values: torch.Tensor
) -> None:
    assert not NativeAttention.serves(dtype, keys, values)


@needs_compiler
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2"])
@torch.inference_mode()
def test_norms_that_compute_the_same_are_adopted(family: str) -> None:
    model = TINY_MODELS[family]()
    ids = torch.arange(20)[None] % 50
    expected = model(ids).logits
    num_norms = sum(type(m).__name__.endswith("RMSNorm") for m in model.modules())
    assert adopt_native_norms(model) == num_norms > 0
    torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-5)


@needs_compiler
def test_a_norm_that_computes_something_else_is_left_alone() -> None:
    class OddRMSNorm(torch.nn.Module):
        eps = 1e-6
        weight = torch.nn.Parameter(torch.ones(8), requires_grad=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.rms_norm(x, (8,), self.weight, self.eps) + 0.1

    assert adopt_native_norms(torch.nn.Sequential(OddRMSNorm())) == 0


@needs_compiler
@pytest.mark.parametrize(
    "x", [torch.ones(3, 8).bfloat16(), torch.ones(3, 16)], ids=["bfloat16", "too wide"]
)
def test_rows_that_a_norm_cannot_read_are_refused(x: torch.Tensor) -> None:
    with pytest.raises(AssertionError):
        NativeRmsNorm(torch.nn.RMSNorm(8), 1e-6, 0.0)(x)


@pytest.mark.usefixtures("no_cache")
def test_without_a_compiler_the_reason_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(NativeUnavailable, match=r"no C\+\+ compiler.*no-such-compiler"):
        load_library("norm")
    assert adopt_native_norms(tiny_llama()) == 0


def test_a_compiler_that_fails_is_quoted(no_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made_compiler(no_cache, monkeypatch, b"#!/bin/sh\necho 'out of ideas' >&2\nexit 1\n")
    with pytest.raises(NativeUnavailable, match=r"failed on norm\.cpp: out of ideas"):
        load_library("norm")


def test_what_fails_to_compile_is_not_tried_again(
    no_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = no_cache / "calls"
    made_compiler(no_cache, monkeypatch, f'#!/bin/sh\necho "$1" >> {calls}\nexit 1\n'.encode())
    for _ in range(2):
        with pytest.raises(NativeUnavailable, match=r"failed on norm\.cpp"):
            load_library("norm")
    assert len(calls.read_text().splitlines()) == 2, "it was asked for its version, and to compile"


@pytest.mark.parametrize(
    ("content", "reason"),
    [(b"\x7fELF", "Exec format error"), (b"#!/bin/sh\nexec sleep 9\n", "timed out")],
    ids=["no program", "hanging"],
)
def test_a_compiler_that_does_not_tell_its_version_is_named(
    no_cache: Path, monkeypatch: pytest.MonkeyPatch, content: bytes, reason: str
) -> None:
    made_compiler(no_cache, monkeypatch, content)
    monkeypatch.setattr(library, "_TIMEOUT_S", 0.2)
    with pytest.raises(NativeUnavailable, match=f"odd does not tell its version: .*{reason}"):
        load_library("norm")


@pytest.mark.skipif(shutil.which("gcc") is None, reason="there is no gcc")
@pytest.mark.usefixtures("no_cache")
def test_a_compiler_of_c_will_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "gcc")
    assert load_library("layer").dynamic_lora_layers


@needs_compiler
def test_a_library_is_compiled_once(no_cache: Path) -> None:
    load_library("norm")
    (made,) = (no_cache / "native").iterdir()
    stamp = made.stat().st_mtime_ns
    library.attempt.cache_clear()
    load_library("norm")
    assert made.stat().st_mtime_ns == stamp


@needs_compiler
@pytest.mark.usefixtures("no_cache")
@pytest.mark.parametrize("left", [b"", b"\x7fELF"], ids=["nothing", "a part"])
def test_a_library_that_was_cut_short_is_made_anew(left: bytes) -> None:
    made = library._library_path("peaks", library._compiler(), library._flags())
    made.parent.mkdir()
    made.write_bytes(left)
    assert load_library("peaks").dynamic_lora_peaks
    assert made.stat().st_size > len(left)


@pytest.mark.usefixtures("no_cache")
def test_that_there_is_no_compiler_is_said_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Whoever runs the server would see nothing but its slowness."""
    monkeypatch.setenv("CXX", "no-such-compiler")
    for name in ("norm", "layer"):
        with pytest.raises(NativeUnavailable):
            load_library(name)
    warned = [r for r in caplog.records if r.levelname == "WARNING"]
    assert [r.getMessage() for r in warned] == [
        "Without the project's C++ serving is slower: "
        "no C++ compiler was found (looked for no-such-compiler)"
    ]
