"""The training loop: a LoRA on a frozen base, loss on the answer only."""

import math
import random
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from torch.nn import functional
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel

from dynamic_lora_server.training.batches import IGNORED, Batch, EncodedRow, collate, plan_batches
from dynamic_lora_server.training.config import LoraSettings, OptimizerSettings, TrainingConfig
from dynamic_lora_server.training.errors import TrainingError
from dynamic_lora_server.training.rows import TrainingRows


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """One finished optimiser step; `loss` is the mean over its answer tokens, in nats.

    `dev_loss` is the same over the dev split, where an epoch has ended and there is one.
    """

    step: int
    num_steps: int
    loss: float
    lr: float
    dev_loss: float | None = None


def attach_lora(model: PreTrainedModel, settings: LoraSettings) -> PeftModel:
    """Wrap `model` with a freshly initialised LoRA; only the LoRA's tensors are trained."""
    config = LoraConfig(
        r=settings.r,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=settings.target_modules,
        task_type=TaskType.CAUSAL_LM,
    )
    with warnings.catch_warnings():
        # PEFT asks through a name that transformers 5.23 deprecates; the answer is the same.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        # Of a GPT-2 it says that it does the right thing.
        warnings.filterwarnings("ignore", "fan_in_fan_out is set to False", UserWarning)
        wrapped = get_peft_model(model, config)
    assert isinstance(wrapped, PeftModel)
    return wrapped


def train_adapter(
    model: PeftModel,
    rows: TrainingRows,
    config: TrainingConfig,
    on_step: Callable[[Progress], None],
) -> None:
    """Train the LoRA in place; the same config, rows and machine give the same adapter.

    Raises TrainingError at the first step whose loss or gradient is not finite.
    """
    steps_per_epoch = math.ceil(len(rows.train) / config.batch_size)
    num_steps = steps_per_epoch * config.epochs
    optimizer = _build_optimizer(model, config.optimizer)
    scheduler = LambdaLR(optimizer, lambda step: lr_factor(step, num_steps, config.optimizer))
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    _keep_projection_contiguous(model)
    model.train()
    for step, batch in enumerate(_batches(rows.train, config), start=1):
        loss = _add_gradients(model, batch, config, rows.pad_id)
        norm = torch.nn.utils.clip_grad_norm_(parameters, config.optimizer.max_grad_norm)
        lr = float(scheduler.get_last_lr()[0])
        _check_finite(step, loss, norm.item(), lr)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        scheduler.step()
        measured = bool(rows.dev) and step % steps_per_epoch == 0
        dev_loss = mean_loss(model, rows.dev, config, rows.pad_id) if measured else None
        on_step(Progress(step=step, num_steps=num_steps, loss=loss, lr=lr, dev_loss=dev_loss))
    model.eval()


@torch.no_grad()
def mean_loss(
    model: PeftModel, rows: Sequence[EncodedRow], config: TrainingConfig, pad_id: int
) -> float:
    """Mean cross-entropy over the answer tokens of all `rows`, without dropout."""
    was_training = model.training
    model.eval()
    ordered = sorted(rows, key=lambda row: len(row.input_ids))
    losses = _losses(model, ordered, config.rows_at_once, pad_id)
    total = sum(loss.item() for loss in losses)
    model.train(was_training)
    return total


def _add_gradients(
    model: PeftModel, rows: Sequence[EncodedRow], config: TrainingConfig, pad_id: int
) -> float:
    """Add the gradients of the rows' mean loss; that loss."""
    total = 0.0
    for loss in _losses(model, rows, config.rows_at_once, pad_id):
        loss.backward()
        total += loss.item()
    return total


def _losses(
    model: PeftModel, rows: Sequence[EncodedRow], rows_at_once: int, pad_id: int
) -> Iterator[torch.Tensor]:
    """The summands of the mean loss over all answer tokens of `rows`, a few rows each."""
    num_labels = sum(len(row.labels) for row in rows)
    for start in range(0, len(rows), rows_at_once):
        part = rows[start : start + rows_at_once]
        share = sum(len(row.labels) for row in part) / num_labels
        yield share * answer_loss(model, collate(part, pad_id).to(model.device))


def answer_loss(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """Mean cross-entropy over the batch's answer tokens (EOS included), a scalar.

    Only the answer's columns go through the vocabulary projection, which for a small
    model is a large part of the cost of a step.
    """
    logits = model(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        position_ids=batch.position_ids,
        logits_to_keep=batch.labels.shape[1],
        use_cache=False,
    ).logits
    return functional.cross_entropy(
        logits.flatten(0, 1).float(), batch.labels.flatten(), ignore_index=IGNORED
    )


def lr_factor(step: int, num_steps: int, settings: OptimizerSettings) -> float:
    """Share of the peak learning rate at `step` (from 0): linear warm-up, then the schedule."""
    num_warmup = int(num_steps * settings.warmup_ratio)
    if step < num_warmup:
        return (step + 1) / (num_warmup + 1)
    if settings.schedule == "constant":
        return 1.0
    done = min(1.0, (step - num_warmup) / max(1, num_steps - num_warmup))
    if settings.schedule == "linear":
        return 1.0 - done
    return 0.5 * (1.0 + math.cos(math.pi * done))


def _check_finite(step: int, loss: float, norm: float, lr: float) -> None:
    if not (math.isfinite(loss) and math.isfinite(norm)):
        raise TrainingError(
            f"training diverged at step {step}: the loss is {loss:.3g} and its gradient's norm "
            f"{norm:.3g} at a learning rate of {lr:.3g}; lower optimizer.lr"
        )


def _batches(rows: Sequence[EncodedRow], config: TrainingConfig) -> Iterator[list[EncodedRow]]:
    rng = random.Random(config.seed)
    lengths = [len(row.input_ids) for row in rows]
    for _ in range(config.epochs):
        for indices in plan_batches(lengths, config.batch_size, rng):
            yield [rows[index] for index in indices]


def _keep_projection_contiguous(model: PeftModel) -> None:
    # A slice of columns makes torch take a batched product per row here, which for the
    # widest matrix of the model is ten times slower than one product over all rows.
    base = model.get_base_model()
    assert isinstance(base, PreTrainedModel)
    projection = base.get_output_embeddings()
    assert projection is not None
    projection.register_forward_pre_hook(lambda _, inputs: (inputs[0].contiguous(),))


def _build_optimizer(model: PeftModel, settings: OptimizerSettings) -> torch.optim.Optimizer:
    if settings.loraplus_ratio is not None:
        optimizer = create_loraplus_optimizer(
            model=model,
            optimizer_cls=torch.optim.AdamW,
            lr=settings.lr,
            loraplus_lr_ratio=settings.loraplus_ratio,
            loraplus_lr_embedding=settings.lr,  # PEFT's 1e-6 teaches nothing
            loraplus_weight_decay=settings.weight_decay,
        )
        assert isinstance(optimizer, torch.optim.Optimizer)
        return optimizer
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(parameters, lr=settings.lr, weight_decay=settings.weight_decay)
