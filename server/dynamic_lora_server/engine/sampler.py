"""From logits to the next token of every row, vectorised over rows."""

import math
import struct
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from hashlib import blake2b

import torch

from dynamic_lora_adapters.native.peaks import NativePeaks, Peaks
from dynamic_lora_server.engine.sequence import Sequence


@dataclass(frozen=True, slots=True)
class Sampled:
    """A chosen token; log-probabilities are set where the request asked for them."""

    token_id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


def sample(
    logits: torch.Tensor, sequences: Seq[Sequence], peaks: NativePeaks | None = None
) -> list[Sampled | None]:
    """Choose the next token of each sequence from its row of logits [num_rows, vocab], float32.

    Draws depend on a sequence's seed and on how many tokens it has, on nothing
    else in the batch. Log-probabilities are those of the untouched logits. None
    for a row whose logits are no finite numbers. `peaks` is used where it can be.
    """
    scores = _penalise(logits, sequences)
    found = peaks(scores) if peaks is not None and peaks.serves(scores) else None
    chosen = scores.argmax(dim=-1) if found is None else found.positions
    drawn = [row for row, s in enumerate(sequences) if not s.sampling.greedy]
    if drawn:
        rows = torch.tensor(drawn, device=logits.device)
        chosen[rows] = _draw(scores[rows], [sequences[row] for row in drawn])
    # The largest of numbers among which one is NaN is NaN to torch, so the chosen score tells.
    sound = scores.gather(1, chosen[:, None]).squeeze(1).isfinite()
    if found is not None:
        sound &= found.log_masses.isfinite()
    reports = _logprobs(logits, sequences, chosen, found if scores is logits else None)
    return [
        (reports.get(row) or Sampled(token_id=token_id)) if is_sound else None
        for row, (token_id, is_sound) in enumerate(
            zip(chosen.tolist(), sound.tolist(), strict=True)
        )
    ]


def gumbel(seed: int, index: int, size: int) -> torch.Tensor:
    """Standard Gumbel noise [size], float32 on the CPU, that depends on its arguments only.

    The generator's seed is BLAKE2b of `seed` and `index`.
    """
    digest = blake2b(struct.pack("<QQ", seed, index), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
    return torch.empty(size).exponential_(generator=generator).log_().neg_()


def _penalise(logits: torch.Tensor, sequences: Seq[Sequence]) -> torch.Tensor:
    rows = [(row, s) for row, s in enumerate(sequences) if s.sampling.penalised]
    if not rows:
        return logits
    scores = logits.clone()
    for row, sequence in rows:
        _penalise_row(scores[row], sequence)
    return scores


def _penalise_row(scores: torch.Tensor, sequence: Sequence) -> None:
    """Repetition penalty as in CTRL (Keskar et al. 2019), the other two as in OpenAI's API."""
    sampling = sequence.sampling
    if sampling.repetition_penalty != 1:
        seen = torch.tensor(sequence.tokens(0, sequence.num_tokens), device=scores.device).unique()
        values = scores[seen]
        penalty = sampling.repetition_penalty
        scores[seen] = torch.where(values > 0, values / penalty, values * penalty)
    if sequence.output_ids and (sampling.presence_penalty or sampling.frequency_penalty):
        output = torch.tensor(sequence.output_ids, device=scores.device)
        seen, counts = output.unique(return_counts=True)
        scores[seen] -= sampling.presence_penalty + sampling.frequency_penalty * counts


def _draw(scores: torch.Tensor, sequences: Seq[Sequence]) -> torch.Tensor:
    """Token ids [num_rows], drawn by the Gumbel-max trick.

    The noise depends on the sequence alone, so that a rounding difference in
    the logits, as another batch brings it, changes the draw only where the two
    best sums are as close as that. Inverting the cumulative distribution would
    add the differences of a whole vocabulary up.
    """

    def column(values: list[float], dtype: torch.dtype) -> torch.Tensor:
        return torch.tensor(values, device=scores.device, dtype=dtype)[:, None]

    scaled = scores / column([s.sampling.temperature for s in sequences], scores.dtype)
    filtered = [row for row, s in enumerate(sequences) if _filters(s)]
    if filtered:
        rows = torch.tensor(filtered, device=scores.device)
        scaled[rows] = _filter(scaled[rows], [sequences[row] for row in filtered])
    noise = [gumbel(s.seed, len(s.output_ids), scores.shape[-1]) for s in sequences]
    return (scaled + torch.stack(noise).to(scores.device)).argmax(dim=-1)


def _filters(sequence: Sequence) -> bool:
    sampling = sequence.sampling
    return bool(sampling.top_k) or sampling.top_p < 1 or sampling.min_p > 0


def _filter(scores: torch.Tensor, sequences: Seq[Sequence]) -> torch.Tensor:
    """Top-k, then top-p (Holtzman et al. 2019), then min-p (Nguyen et al. 2024)."""

    def column(values: list[float]) -> torch.Tensor:
        return torch.tensor(values, device=scores.device, dtype=scores.dtype)[:, None]

    vocab = scores.shape[-1]
    ranked, order = scores.sort(dim=-1, descending=True)
    rank = torch.arange(vocab, device=scores.device)
    top_k = column([s.sampling.top_k or vocab for s in sequences])
    ranked = ranked.masked_fill(rank >= top_k, float("-inf"))
    probabilities = torch.softmax(ranked, dim=-1)
    before = probabilities.cumsum(dim=-1) - probabilities
    # 1 switches it off: rounded sums reach 1 before the last token.
    top_p = column([s.sampling.top_p if s.sampling.top_p < 1 else math.inf for s in sequences])
    min_p = column([s.sampling.min_p for s in sequences])
    # The likeliest token always stays, whatever the rounding of the sums.
    drop = (before >= top_p) | (probabilities < min_p * probabilities[:, :1])
    drop[:, 0] = False
    ranked = ranked.masked_fill(drop, float("-inf"))
    return torch.empty_like(scores).scatter_(-1, order, ranked)


def _logprobs(
    logits: torch.Tensor, sequences: Seq[Sequence], chosen: torch.Tensor, peaks: Peaks | None
) -> dict[int, Sampled]:
    """What the rows that ask for log-probabilities get; `peaks` of the logits if they are known."""
    wanted = [
        row for row, s in enumerate(sequences) if s.sampling.logprobs or s.sampling.top_logprobs
    ]
    if not wanted:
        return {}
    if len(wanted) < len(sequences):
        rows = torch.tensor(wanted, device=logits.device)
        logits, chosen = logits[rows], chosen[rows]
        peaks = None if peaks is None else Peaks(*(found[rows] for found in peaks))
    heights, log_masses = _divisors(logits) if peaks is None else peaks[1:]
    picked = logits.gather(1, chosen[:, None]).squeeze(1) - heights - log_masses
    most = max(sequences[row].sampling.top_logprobs for row in wanted)
    best = logits.topk(most, dim=-1)
    best_logprobs = best.values - heights[:, None] - log_masses[:, None]
    tops = [
        tuple(zip(ids, values, strict=True))
        for ids, values in zip(best.indices.tolist(), best_logprobs.tolist(), strict=True)
    ]
    return {
        row: Sampled(token_id, logprob, top[: sequences[row].sampling.top_logprobs])
        for row, token_id, logprob, top in zip(
            wanted, chosen.tolist(), picked.tolist(), tops, strict=True
        )
    }


def _divisors(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The heights and the log masses of `Peaks`."""
    heights = logits.amax(dim=-1)
    return heights, (logits - heights[:, None]).exp().sum(dim=-1).log()
