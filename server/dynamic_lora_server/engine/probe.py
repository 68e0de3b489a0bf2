"""Start-up check that the engine computes what transformers computes for this model."""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel

from dynamic_lora_adapters.apply.widening import model_dtype
from dynamic_lora_adapters.geometry import LayerGeometry
from dynamic_lora_server.engine.attention.packed import ATTENTION_NAME, AttentionStep, attending
from dynamic_lora_server.engine.batch import Span
from dynamic_lora_server.errors import UnsupportedModel

_LENGTHS = (7, 12)
# Largest logit difference allowed, relative to the largest logit.
TOLERANCE = {torch.float32: 1e-3, torch.float16: 3e-2, torch.bfloat16: 1e-1}


def refuse_quantised(model: PreTrainedModel) -> None:
    """Raise UnsupportedModel for a model whose weights are not of floating point.

    Deltas are added to, and adapters merged into, such alone.
    """
    kind = getattr(model.config, "quantization_config", None)
    odd = next((n for n, p in model.named_parameters() if not p.is_floating_point()), None)
    if kind is not None or odd is not None:
        raise UnsupportedModel(
            f"{type(model).__name__} is quantised ({odd or 'quantization_config'}); adapters "
            "cannot be merged into such weights, and it is not served."
        )


def settle_attention(device: torch.device) -> None:
    """Choose among torch's attention kernels on CUDA, for the whole process.

    cuDNN's, which torch prefers on Hopper, is planned anew for every shape, and nearly every
    packed step has one of its own.
    """
    if device.type == "cuda":
        torch.backends.cuda.enable_cudnn_sdp(False)


def adopt_attention(model: PreTrainedModel) -> list[LayerGeometry]:
    """Route the model's attention through the engine and prove that it still works.

    Two random sequences are run by transformers' own attention, one at a time,
    and packed into one row by ours; the logits must agree. Returns the KV
    geometry of each layer. Raises UnsupportedModel, naming the model, if it
    does not go through `AttentionInterface` or its logits differ.
    """
    name = type(model).__name__
    if "logits_to_keep" not in inspect.signature(model.forward).parameters:
        raise UnsupportedModel(f"{name} cannot compute logits for chosen rows only; not served.")
    sequences = _random_sequences(model)
    expected = torch.cat([_reference_logits(model, ids) for ids in sequences])
    _select_attention(model, name)
    with attending(AttentionStep(packed_spans(_LENGTHS))) as step:
        packed = run_packed(model, sequences)
    num_layers = int(model.config.num_hidden_layers)
    if sorted(step.observed) != list(range(num_layers)):
        raise UnsupportedModel(
            f"{name} sent {len(step.observed)} of {num_layers} layers through transformers' "
            "AttentionInterface; such a model cannot be served."
        )
    error = (packed - expected).abs().max() / expected.abs().max()
    if not error <= TOLERANCE[model_dtype(model)]:
        raise UnsupportedModel(
            f"{name} gives other logits in a packed batch (relative difference {error:.1e}); "
            "it cannot be served exactly."
        )
    return [step.observed[layer] for layer in range(num_layers)]


def packed_spans(lengths: tuple[int, ...]) -> list[Span]:
    """Spans of new sequences of these lengths, laid side by side, with nothing cached."""
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    return [Span(row, n, 0, (row,), n) for row, n in zip(starts, lengths, strict=True)]


@torch.inference_mode()
def run_packed(model: PreTrainedModel, sequences: list[torch.Tensor]) -> torch.Tensor:
    """Logits [num_tokens, vocab] of the sequences packed into one row, in float32."""
    positions = [torch.arange(len(ids), device=model.device) for ids in sequences]
    return forward(model, torch.cat(sequences)[None], torch.cat(positions)[None], 0)


def forward(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    position_ids: torch.Tensor,
    logits_to_keep: torch.Tensor | int,
) -> torch.Tensor:
    """The model's logits [rows, vocab] in float32 for one packed row of tokens [1, num_tokens]."""
    output: Any = model(
        input_ids=input_ids,
        position_ids=position_ids,
        use_cache=False,
        logits_to_keep=logits_to_keep,
    )
    logits: torch.Tensor = output.logits[0]
    return logits.float()


def trial_run(model: PreTrainedModel) -> Callable[[], object]:
    """A forward pass to observe the model by, after `adopt_attention`."""

    def run() -> object:
        with attending(AttentionStep(packed_spans(_LENGTHS))):
            return run_packed(model, _random_sequences(model))

    return run


def random_tokens(model: PreTrainedModel, number: int) -> torch.Tensor:
    """Token ids [number] of the model's vocabulary, on its device; always the same."""
    generator = torch.Generator().manual_seed(0)
    weight = model.get_input_embeddings().weight
    assert isinstance(weight, torch.Tensor)
    return torch.randint(weight.shape[0], (number,), generator=generator).to(model.device)


def _random_sequences(model: PreTrainedModel) -> list[torch.Tensor]:
    return list(random_tokens(model, sum(_LENGTHS)).split(_LENGTHS))


@torch.inference_mode()
def _reference_logits(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    logits: torch.Tensor = model(input_ids=ids[None], use_cache=False).logits[0]
    return logits.float()


def _select_attention(model: PreTrainedModel, name: str) -> None:
    try:
        model.set_attn_implementation(ATTENTION_NAME)
    except (ValueError, KeyError) as error:
        raise UnsupportedModel(
            f"{name} does not go through transformers' AttentionInterface and cannot be served."
        ) from error
