"""A whole run on a tiny base: the loss falls, and what is saved is what was trained."""

import json
import tempfile
from errno import ENOSPC
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from dynamic_lora_server.training import (
    DatasetError,
    Progress,
    TrainingConfig,
    TrainingConfigError,
    TrainingError,
    TrainingInterrupted,
    TrainingSummary,
    run_training,
)
from tests.server.training.test_config import recipe
from tests.support.models import save_tiny_base, tiny_llama

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

PAIRS = [
    {"input": f"n {index}", "output": "even" if index % 2 == 0 else "odd"} for index in range(20)
]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A folder with a data set and a tiny base model."""
    lines = "\n".join(json.dumps(pair) for pair in PAIRS)
    (tmp_path / "train.jsonl").write_text(lines, encoding="utf-8")
    save_tiny_base(tmp_path / "base")
    return tmp_path


def config(**changes: Any) -> TrainingConfig:
    """A recipe that a tiny model learns in a second."""
    settings: dict[str, Any] = {
        "lora": {"r": 4, "alpha": 8},
        "optimizer": {"lr": 5e-3, "loraplus_ratio": 4},
        "batch_size": 4,
        "epochs": 6,
    }
    return TrainingConfig.model_validate(recipe(**{**settings, **changes}))


def run(
    data: Path, output: str = "out", *, save_every: int = 0, **changes: Any
) -> tuple[TrainingSummary, list[Progress]]:
    """Train on the folder's data into `output`."""
    steps: list[Progress] = []
    summary = run_training(
        config(**changes),
        base=data / "base",
        data=data,
        output=data / output,
        on_step=steps.append,
        save_every=save_every,
    )
    return summary, steps


def run_until(data: Path, last_step: int, error: BaseException, **options: Any) -> list[bool]:
    """Train until a step at which `error` is raised; whether a partial adapter was there by then.

    One item for each step.
    """
    seen: list[bool] = []

    def on_step(progress: Progress) -> None:
        seen.append((data / "out-partial").exists())
        if progress.step == last_step:
            raise error

    with pytest.raises((TrainingError, type(error))) as caught:
        run_training(
            config(),
            base=data / "base",
            data=data,
            output=data / "out",
            on_step=on_step,
            **options,
        )
    if caught.value is not error:
        error.add_note(str(caught.value))
    return seen


@pytest.mark.parametrize("loraplus_ratio", [None, 4])
def test_the_loss_falls(data: Path, loraplus_ratio: float | None) -> None:
    summary, steps = run(data, optimizer={"lr": 5e-3, "loraplus_ratio": loraplus_ratio})
    assert [step.step for step in steps] == list(range(1, 31))
    assert steps[0].num_steps == 30
    assert steps[-1].loss < 0.5 * steps[0].loss
    assert (summary.num_answers, summary.num_too_long) == (20, 0)


def test_the_files_of_an_adapter(data: Path) -> None:
    run(data, epochs=1, lora={"target_modules": ["v_proj", "down_proj", "q_proj"]})
    output = data / "out"
    assert sorted(path.name for path in output.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "chat_template.jinja",
        "task.json",
    ]
    tensors = load_file(output / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}
    saved = json.loads((output / "adapter_config.json").read_text(encoding="utf-8"))
    assert saved["base_model_name_or_path"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert saved["target_modules"] == ["down_proj", "q_proj", "v_proj"]
    card = json.loads((output / "task.json").read_text(encoding="utf-8"))
    assert card["prompt_template"] == "Q: {input}\nA:"
    assert card["base_model"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert card["metrics"] == {}


def test_a_seed_fixes_the_adapter(data: Path) -> None:
    for output, seed in (("a", 1), ("b", 1), ("c", 2)):
        run(data, output, epochs=1, seed=seed)
    first, second, other = (
        load_file(data / name / "adapter_model.safetensors") for name in ("a", "b", "c")
    )
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_an_older_adapter_is_replaced_and_nothing_else_is(data: Path) -> None:
    run(data, epochs=1, seed=1)
    older = (data / "out" / "adapter_model.safetensors").read_bytes()
    run(data, epochs=1, seed=2)
    assert (data / "out" / "adapter_model.safetensors").read_bytes() != older
    assert not list(data.glob(".out-*"))
    (data / "out" / "notes.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(TrainingConfigError, match=r"it holds notes\.txt"):
        run(data, epochs=1)
    assert (data / "out" / "notes.txt").read_text(encoding="utf-8") == "mine"


@pytest.mark.parametrize(
    ("lr", "message"),
    [
        (1e30, r"training diverged at step 2: the loss is nan .* learning rate of 1e\+30"),
        (1e6, "training diverged: .* holds values that fp16 cannot; lower optimizer.lr"),
    ],
)
def test_a_run_that_diverges_leaves_the_older_adapter(data: Path, lr: float, message: str) -> None:
    run(data, epochs=1)
    older = (data / "out" / "adapter_model.safetensors").read_bytes()
    settings = {"lr": lr, "schedule": "constant", "warmup_ratio": 0}
    with pytest.raises(TrainingError, match=message):
        run(data, optimizer=settings, epochs=1)
    assert (data / "out" / "adapter_model.safetensors").read_bytes() == older


@pytest.mark.parametrize("share_prompts", [False, True])
def test_a_batch_in_parts_gives_the_same_adapter(data: Path, share_prompts: bool) -> None:
    texts = ["short", "and a much longer one", "a", "in the middle"]
    lines = [json.dumps({"input": f"n {len(text)}", "output": text}) for text in texts * 3]
    (data / "train.jsonl").write_text("\n".join(lines), encoding="utf-8")
    settings: dict[str, Any] = {
        "epochs": 2,
        "share_prompts": share_prompts,
        "optimizer": {"lr": 1e-3},
    }
    whole, _ = run(data, "whole", **settings)
    parts, _ = run(data, "parts", micro_batch_size=3, **settings)
    assert parts.final_loss == pytest.approx(whole.final_loss, rel=1e-4)
    expected, found = (
        load_file(data / name / "adapter_model.safetensors") for name in ("whole", "parts")
    )
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, atol=2e-4, rtol=1e-2)


def test_an_interrupted_run_leaves_what_it_has_under_a_name_that_says_so(data: Path) -> None:
    interrupt = KeyboardInterrupt()
    run_until(data, 3, interrupt)
    assert interrupt.__notes__ == [
        f"interrupted after step 3 of 30; the adapter as it is now is in {data / 'out-partial'}"
    ]
    assert not (data / "out").exists()
    PeftModel.from_pretrained(tiny_llama(), str(data / "out-partial"))


def test_what_is_kept_on_the_way_survives_a_crash_and_goes_with_the_end(data: Path) -> None:
    seen = run_until(data, 11, RuntimeError("crash"), save_every=5)
    assert seen == [False] * 5 + [True] * 6
    assert not (data / "out").exists()
    kept = (data / "out-partial" / "adapter_model.safetensors").read_bytes()
    run(data, epochs=1, save_every=5)
    assert (data / "out" / "adapter_model.safetensors").read_bytes() != kept
    assert not (data / "out-partial").exists()


@pytest.mark.parametrize("save_every", [0, 5])
def test_an_interrupt_while_the_finished_adapter_is_written_keeps_it(
    data: Path, monkeypatch: pytest.MonkeyPatch, save_every: int
) -> None:
    rename = Path.rename

    def interrupt(self: Path, target: Path) -> Path:
        if target.name == "out":
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", interrupt)
    with pytest.raises(TrainingInterrupted, match="after step 30 of 30; .* in .*/out-partial"):
        run(data, save_every=save_every)
    assert not (data / "out").exists()
    PeftModel.from_pretrained(tiny_llama(), str(data / "out-partial"))


def test_a_copy_on_the_way_that_cannot_be_written_is_left_out(
    data: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    rename, seen = Path.rename, list[str]()

    def refuse_second(self: Path, target: Path) -> Path:
        seen.append(target.name)
        if seen.count("out-partial") == 2 and target.name == "out-partial":
            raise OSError(ENOSPC, "No space left on device")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refuse_second)
    monkeypatch.setattr(tempfile, "tempdir", str(data))
    run(data, epochs=3, save_every=5)
    (said,) = caplog.messages
    assert said.startswith(f"{data / 'out-partial'} cannot be written, training goes on without")
    assert "No space left on device" in said
    assert (data / "out" / "task.json").is_file()
    assert sorted(path.name for path in data.iterdir()) == ["base", "out", "train.jsonl"]


def test_what_others_put_beside_a_kept_adapter_stays(data: Path) -> None:
    def on_step(progress: Progress) -> None:
        if progress.step == 6:
            (data / "out-partial" / "notes.txt").touch()

    run_training(
        config(epochs=2),
        base=data / "base",
        data=data,
        output=data / "out",
        on_step=on_step,
        save_every=5,
    )
    assert (data / "out" / "task.json").is_file()
    assert (data / "out-partial" / "notes.txt").is_file()


def test_lora_plus_trains_embeddings_too(data: Path) -> None:
    run(data, epochs=1, lora={"target_modules": ["embed_tokens", "q_proj"]})
    tensors = load_file(data / "out" / "adapter_model.safetensors")
    (factor,) = (tensor for name, tensor in tensors.items() if "lora_embedding_A" in name)
    # It starts at zero; AdamW goes about one learning rate a step.
    assert factor.abs().max() > 5e-3


def test_a_gpu_that_is_too_small_is_said(data: Path) -> None:
    error = torch.OutOfMemoryError("tried to allocate 2 GiB")
    run_until(data, 1, error)
    assert error.__notes__ == [
        "the GPU's memory is too small; lower micro_batch_size or max_length: "
        "tried to allocate 2 GiB"
    ]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_refused(data: Path) -> None:
    with pytest.raises(TrainingConfigError, match="the device cuda cannot be used"):
        run_training(
            config(),
            base=data / "base",
            data=data,
            output=data / "out",
            on_step=lambda _: None,
            device="cuda",
        )


def test_the_loss_of_the_dev_split_is_told_after_each_epoch(data: Path) -> None:
    (data / "dev.jsonl").write_text(json.dumps(PAIRS[0]), encoding="utf-8")
    dataset = {"kind": "jsonl", "train": "train.jsonl", "dev": "dev.jsonl"}
    summary, steps = run(data, dataset=dataset, lora={"dropout": 0.1})
    told = [step.step for step in steps if step.dev_loss is not None]
    assert told == [5, 10, 15, 20, 25, 30]
    first, last = steps[4].dev_loss, steps[-1].dev_loss
    assert first is not None and last is not None and last < first
    assert summary.dev_loss == last
    assert run(data, epochs=1)[0].dev_loss is None


def test_measuring_changes_nothing_of_the_training(data: Path) -> None:
    dataset = {"kind": "jsonl", "train": "train.jsonl", "dev": "train.jsonl"}
    with_dev, _ = run(data, "a", dataset=dataset, epochs=2)
    without, _ = run(data, "b", epochs=2)
    assert with_dev.final_loss == without.final_loss


def test_a_dev_split_that_is_missing_is_an_error_before_training(data: Path) -> None:
    dataset = {"kind": "jsonl", "train": "train.jsonl", "dev": "none.jsonl"}
    with pytest.raises(DatasetError, match=r"none\.jsonl: .*No such file"):
        run(data, dataset=dataset)
    (data / "dev.jsonl").write_text(json.dumps({"input": "n", "output": "long " * 999}))
    with pytest.raises(DatasetError, match="no example of the dev split fits"):
        run(data, dataset={**dataset, "dev": "dev.jsonl"})


def test_answers_that_do_not_fit_are_counted(data: Path) -> None:
    with (data / "train.jsonl").open("a", encoding="utf-8") as stream:
        stream.write("\n" + json.dumps({"input": "n", "output": "long " * 40}))
    summary, _ = run(data, epochs=1, max_length=32)
    assert (summary.num_answers, summary.num_too_long) == (20, 1)
    with pytest.raises(DatasetError, match="no example of the train split fits into max_length=2"):
        run(data, max_length=2)


def test_shared_prompts_are_rows_of_at_most_max_length(data: Path) -> None:
    answers = [{"input": "same", "output": f"answer {index}"} for index in range(20)]
    text = "\n".join(json.dumps(pair) for pair in answers)
    (data / "train.jsonl").write_text(text, encoding="utf-8")
    summary, steps = run(data, epochs=1, share_prompts=True, batch_size=1, max_length=64)
    assert summary.num_answers == 20
    assert 1 < len(steps) < 10
