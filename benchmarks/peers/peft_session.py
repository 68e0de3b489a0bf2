"""A base with PEFT adapters, loaded into this process and timed batch by batch."""

import gc
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from importlib.metadata import version
from itertools import islice
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, StoppingCriteria, StoppingCriteriaList

from benchmarks.errors import BenchmarkError
from benchmarks.peers.base import Setup
from benchmarks.stats import Summary, Timing, summarise
from benchmarks.workload import (
    PromptMaker,
    Request,
    Sampling,
    Workload,
    requests,
    warm_up_requests,
)

# PEFT's name, in `adapter_names`, for a row of the base model.
_BASE_ROW = "__base__"


@contextmanager
def opened(setup: Setup) -> Iterator["PeftSession"]:
    """Load the base and every adapter; free them on leaving."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = getattr(torch, setup.dtype)
    model: Any = AutoModelForCausalLM.from_pretrained(setup.base, dtype=dtype)
    model.to(device)
    for index, folder in enumerate(setup.adapters):
        # Left to itself PEFT keeps factors of sixteen bits in float32, as training wants them.
        how: dict[str, Any] = {"adapter_name": folder.name, "autocast_adapter_dtype": False}
        if index == 0:
            model = PeftModel.from_pretrained(model, folder, **how)
        else:
            model.load_adapter(folder, **how)
    tokenizer = AutoTokenizer.from_pretrained(setup.base, padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    names = [folder.name for folder in setup.adapters]
    try:
        yield PeftSession(model.eval(), tokenizer, names, setup.dtype)
    finally:
        del model
        gc.collect()


class _StepClock(StoppingCriteria):
    """Notes the time after every generated token; stops nothing."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(
        self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any
    ) -> torch.Tensor:
        del scores, kwargs
        if input_ids.is_cuda:
            torch.cuda.synchronize()
        self.times.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def _generation(sampling: Sampling) -> dict[str, Any]:
    """The arguments of `generate`, none of them left to the model's own configuration."""
    if sampling.greedy:
        return {"do_sample": False}
    return {"do_sample": True, **sampling.parameters()}


@dataclass(slots=True)
class PeftSession:
    """What `opened` gives: a model in evaluation mode, its adapters by name."""

    model: Any
    tokenizer: Any
    names: list[str]
    dtype: str
    _is_merged: bool = False

    @property
    def version(self) -> str:
        """The versions and the dtype."""
        libraries = f"peft {version('peft')}, transformers {version('transformers')}"
        threads = f"{torch.get_num_threads()} threads"
        return f"{libraries}, {self.dtype}, {threads}, in process; a sole adapter is merged"

    @property
    def weights(self) -> str:
        """The dtype."""
        return self.dtype

    def awake(self) -> AbstractContextManager[object]:
        """Nothing runs between two batches."""
        return nullcontext()

    def measure(
        self, workload: Workload, prompts: PromptMaker, *, num_warm_up: int | None = None
    ) -> Summary:
        """Generate batch after batch. Raises BenchmarkError where a row comes short."""
        del num_warm_up  # always one short batch
        with self._merged() if workload.popularity.kind == "one" else nullcontext():
            return self._measure(workload, prompts)

    def _measure(self, workload: Workload, prompts: PromptMaker) -> Summary:
        warm_up = warm_up_requests(workload, prompts)
        self._batch(warm_up[: workload.num_clients])
        work = islice(requests(workload, prompts), workload.num_requests)
        timings: list[Timing] = []
        start = time.perf_counter()
        while batch := list(islice(work, workload.num_clients)):
            timings += self._batch(batch)
            if workload.seconds is not None and time.perf_counter() - start >= workload.seconds:
                break
        return summarise(timings, wall_s=time.perf_counter() - start)

    @contextmanager
    def _merged(self) -> Iterator[None]:
        """The first adapter folded into the weights: PEFT's best for a sole adapter."""
        self.model.merge_adapter([self.names[0]])
        self._is_merged = True
        try:
            yield
        finally:
            self.model.unmerge_adapter()
            self._is_merged = False

    def _batch(self, batch: list[Request]) -> list[Timing]:
        num_tokens = batch[0].num_output_tokens
        clock = _StepClock()
        sent = time.perf_counter()
        inputs = self.tokenizer(
            [request.prompt for request in batch], return_tensors="pt", padding=True
        ).to(self.model.device)
        with torch.inference_mode():
            output = self._generate(
                batch,
                **inputs,
                max_new_tokens=num_tokens,
                min_new_tokens=num_tokens,
                **_generation(batch[0].sampling),
                pad_token_id=self.tokenizer.pad_token_id,
                stopping_criteria=StoppingCriteriaList([clock]),
            )
        if output.shape[1] - inputs["input_ids"].shape[1] != num_tokens:
            raise BenchmarkError(f"{num_tokens} tokens were asked, not what came")
        timing = Timing(
            sent=sent,
            first_token=clock.times[0],
            last_token=clock.times[-1],
            num_output_tokens=num_tokens,
        )
        return [timing] * len(batch)

    def _generate(self, batch: list[Request], **arguments: Any) -> torch.Tensor:
        if self._is_merged:
            return self._tokens(arguments)
        if self.names and all(request.adapter is None for request in batch):
            # Cheaper than a batch whose rows are all named base rows.
            with self.model.disable_adapter():
                return self._tokens(arguments)
        if self.names:
            rows = [_BASE_ROW if r.adapter is None else self.names[r.adapter] for r in batch]
            arguments["adapter_names"] = rows
        return self._tokens(arguments)

    def _tokens(self, arguments: dict[str, Any]) -> torch.Tensor:
        output: torch.Tensor = self.model.generate(**arguments)
        return output
