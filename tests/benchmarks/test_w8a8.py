"""Writing a base in eight bits for vLLM, and the peers that run it."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks.errors import PeerUnavailable
from benchmarks.peers import PEERS, Setup, vllm_cpu
from benchmarks.peers.w8a8 import convert, quantize
from tests.support.models import tiny_llama


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tiny Llama, and the same in eight bits."""
    folder = tmp_path_factory.mktemp("w8a8")
    tiny_llama().save_pretrained(folder / "base")
    convert(folder / "base", folder / "w8a8")
    return folder / "base", folder / "w8a8"


def test_rows_are_within_half_a_step_of_the_originals() -> None:
    weight = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    weight[3] = 0
    quantized, scales = quantize(weight)
    assert (quantized.dtype, scales.dtype, scales.shape) == (torch.int8, torch.float32, (5, 1))
    assert torch.all((quantized * scales - weight).abs() <= scales * 0.5001)
    # Symmetric, and every row uses its whole range.
    assert quantized.abs().amax(dim=1).tolist() == [127, 127, 127, 0, 127]


def test_linear_weights_get_scales_and_all_else_stays(folders: tuple[Path, Path]) -> None:
    before, after = (load_file(folder / "model.safetensors") for folder in folders)
    linear = {name for name in before if name.endswith("_proj.weight")}
    assert len(linear) == 2 * 7
    scales = {name.replace(".weight", ".weight_scale") for name in linear}
    assert after.keys() == before.keys() | scales
    for name in linear:
        found = after[name] * after[name.replace(".weight", ".weight_scale")]
        assert torch.linalg.norm(found - before[name]) < 0.01 * torch.linalg.norm(before[name])
    assert all(torch.equal(after[name], before[name]) for name in before.keys() - linear)


def test_the_config_names_the_format_and_keeps_the_rest(folders: tuple[Path, Path]) -> None:
    before, after = (json.loads((folder / "config.json").read_text()) for folder in folders)
    told = after.pop("quantization_config")
    assert after == before
    assert (told["quant_method"], told["format"]) == ("compressed-tensors", "int-quantized")
    assert told["ignore"] == ["lm_head"]
    [group] = told["config_groups"].values()
    assert group["targets"] == ["Linear"]
    fields = ("num_bits", "symmetric", "strategy", "dynamic")
    assert [group["weights"][name] for name in fields] == [8, True, "channel", False]
    assert [group["input_activations"][name] for name in fields] == [8, True, "token", True]


def test_a_folder_that_is_there_is_kept(tmp_path: Path) -> None:
    (tmp_path / "done").mkdir()
    convert(tmp_path / "no base", tmp_path / "done")
    assert not list((tmp_path / "done").iterdir())


@pytest.mark.parametrize(
    ("names", "reason"),
    [(("transformer.h.0.attn.c_attn.weight",), "c_attn.weight is none of them"), ((), "holds no")],
)
def test_a_base_of_another_layout_is_refused(
    tmp_path: Path, names: tuple[str, ...], reason: str
) -> None:
    base = tmp_path / "base"
    base.mkdir()
    if names:
        save_file({name: torch.ones(2, 2) for name in names}, base / "model.safetensors")
    with pytest.raises(PeerUnavailable, match=reason):
        convert(base, tmp_path / "w8a8")
    assert not (tmp_path / "w8a8").exists()


def test_without_amx_adapters_over_w8a8_are_refused_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm_cpu, "cpu_flags", lambda: ["avx512f"])
    setup = Setup(
        base=tmp_path,
        adapters=[tmp_path / "adapter"],
        cache=tmp_path,
        logs=tmp_path,
        scratch=tmp_path,
        context_length=64,
    )
    with (
        pytest.raises(PeerUnavailable, match=r"without AMX, vLLM 0\.32 serves no adapters"),
        PEERS["vllm-cpu-w8a8"].session(setup),
    ):
        pass
