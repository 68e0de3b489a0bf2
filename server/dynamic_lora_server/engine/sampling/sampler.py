"""From logits to the next token of every row, vectorised over rows."""

import math
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import torch

from dynamic_lora_adapters.native.draws import Draw
from dynamic_lora_adapters.native.head import Highest
from dynamic_lora_adapters.native.peaks import Peaks
from dynamic_lora_adapters.native.sampling import NativeSampling
from dynamic_lora_adapters.transfer import to_device, to_host
from dynamic_lora_server.engine.sampling.adjustments import ScoredRow, adjusted
from dynamic_lora_server.engine.sampling.noise import draw_key, gumbel
from dynamic_lora_server.engine.sampling.unread import UnreadTokens
from dynamic_lora_server.engine.sequence import Sequence


@dataclass(frozen=True, slots=True)
class Sampled:
    """A chosen token; log-probabilities are set where the request asked for them."""

    token_id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class _Reports:
    """Log-probabilities of the rows that ask for them, in the host's memory.

    Shapes: picked [num_asking], of the chosen tokens; ids, logprobs [num_asking, most],
    the likeliest tokens, of which a row wants `num_top`.
    """

    rows: tuple[int, ...]
    num_top: tuple[int, ...]
    picked: torch.Tensor
    ids: torch.Tensor
    logprobs: torch.Tensor

    def by_row(self) -> dict[int, tuple[float, tuple[tuple[int, float], ...]]]:
        """What each row that asks gets: its token's log-probability, and the likeliest tokens."""
        reports = {}
        columns = self.picked.tolist(), self.ids.tolist(), self.logprobs.tolist()
        for row, num_top, picked, ids, logprobs in zip(
            self.rows, self.num_top, *columns, strict=True
        ):
            reports[row] = picked, tuple(zip(ids, logprobs, strict=True))[:num_top]
        return reports


@dataclass(frozen=True, slots=True)
class Choice:
    """The next token of every row of a batch: `token_ids` [num_rows], int64, on its device.

    The host's copies may be read when the device has come so far.
    """

    token_ids: torch.Tensor
    _verdicts: torch.Tensor  # [2, num_rows], int64: the tokens, and whether they are sound
    _reports: _Reports | None

    def read(self) -> list[Sampled | None]:
        """The tokens; None for a row whose logits are no finite numbers."""
        reports = {} if self._reports is None else self._reports.by_row()
        tokens = zip(*self._verdicts.tolist(), strict=True)
        return [
            Sampled(token_id, *reports.get(row, ())) if is_sound else None
            for row, (token_id, is_sound) in enumerate(tokens)
        ]


def takes_highest(sequence: Sequence) -> bool:
    """Whether the sequence needs only its highest logit's position and, at most, that token's
    log-probability."""
    sampling = sequence.sampling
    reports = sampling.prompt_logprobs or sampling.top_logprobs
    return sampling.greedy and not (sequence.adjusts_scores or reports)


def choose_highest(highest: Highest, owners: Seq[ScoredRow]) -> Choice:
    """The choice of rows that all take their highest logit."""
    wanted = [row for row, owner in enumerate(owners) if owner.sequence.sampling.logprobs]
    return Choice(highest.positions, highest.verdicts, _likelihoods(highest, wanted))


def _likelihoods(highest: Highest, wanted: list[int]) -> _Reports | None:
    """What the rows that ask for their token's log-probability, and no more, get."""
    if not wanted:
        return None
    assert highest.log_masses is not None, "they were not asked for"
    return _Reports(
        rows=tuple(wanted),
        num_top=(0,) * len(wanted),
        picked=0 - highest.log_masses[wanted],  # no zero has a sign
        ids=torch.empty(len(wanted), 0, dtype=torch.long),
        logprobs=torch.empty(len(wanted), 0),
    )


def choose(
    logits: torch.Tensor,
    owners: Seq[ScoredRow],
    native: NativeSampling | None = None,
    unread: UnreadTokens | None = None,
) -> Choice:
    """Choose the next token from each row of logits [num_rows, vocab], float32.

    Draws depend on a sequence's seed and on how many tokens it has, on nothing
    else in the batch. Of a sequence with a guide, a token that it allows is chosen;
    where it allows none behind a draft, the choice is not sound.
    Of a row that was told its token, it is that one.
    Log-probabilities are those of the untouched logits. `native` is used where it can be;
    `unread` has the tokens of sequences whose last one is not read yet. Nothing here waits
    for a GPU.
    """
    scores = adjusted(logits, owners, unread)
    if native is not None and not native.serves(scores):
        native = None
    found = None if native is None else native.peaks(scores)
    chosen = scores.argmax(dim=-1) if found is None else found.positions
    draws = [
        _draw_of(row, owner)
        for row, owner in enumerate(owners)
        if not owner.sequence.sampling.greedy and owner.told is None
    ]
    if draws:
        rows = to_device([draw.row for draw in draws], logits.device)
        chosen[rows] = _draw(scores[rows], draws) if native is None else native.draws(scores, draws)
    told = {row: owner.told for row, owner in enumerate(owners) if owner.told is not None}
    if told:
        rows = to_device(list(told), logits.device)
        chosen[rows] = to_device(list(told.values()), logits.device, chosen.dtype)
    # The largest of numbers among which one is NaN is NaN to torch, so the chosen score tells, as
    # the log mass does.
    telling = scores.gather(1, chosen[:, None])[:, 0] if found is None else found.log_masses
    sound = telling.isfinite()
    reports = _reports(logits, owners, chosen, found if scores is logits else None)
    return Choice(chosen, to_host(torch.stack((chosen, sound.long()))), reports)


def _draw_of(row: int, owner: ScoredRow) -> Draw:
    sampling = owner.sequence.sampling
    return Draw(
        row=row,
        key=draw_key(owner.sequence.seed, owner.num_output),
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        min_p=sampling.min_p,
    )


def _draw(scores: torch.Tensor, draws: Seq[Draw]) -> torch.Tensor:
    """Token ids [num_draws] from rows of scores [num_draws, vocab], by the Gumbel-max trick.

    The noise depends on the sequence alone, so that a rounding difference in
    the logits, as another batch brings it, changes the draw only where the two
    best sums are as close as that. Inverting the cumulative distribution would
    add the differences of a whole vocabulary up.
    """

    def column(values: list[float], dtype: torch.dtype) -> torch.Tensor:
        return to_device(values, scores.device, dtype)[:, None]

    scaled = scores / column([draw.temperature for draw in draws], scores.dtype)
    filtered = [row for row, draw in enumerate(draws) if _filters(draw)]
    if filtered:
        rows = to_device(filtered, scores.device)
        scaled[rows] = _filter(scaled[rows], [draws[row] for row in filtered])
    keys = [draw.key for draw in draws]
    return gumbel(keys, scores.shape[-1], scores.device).add_(scaled).argmax(dim=-1)


def _filters(draw: Draw) -> bool:
    return draw.top_k > 0 or draw.top_p < 1 or draw.min_p > 0


def _filter(scores: torch.Tensor, draws: Seq[Draw]) -> torch.Tensor:
    """Top-k, then top-p (Holtzman et al. 2019), then min-p (Nguyen et al. 2024)."""

    def column(values: list[float]) -> torch.Tensor:
        return to_device(values, scores.device, scores.dtype)[:, None]

    vocab = scores.shape[-1]
    ranked, order = scores.sort(dim=-1, descending=True)
    rank = torch.arange(vocab, device=scores.device)
    top_k = column([draw.top_k or vocab for draw in draws])
    ranked = ranked.masked_fill(rank >= top_k, float("-inf"))
    probabilities = torch.softmax(ranked, dim=-1)
    before = probabilities.cumsum(dim=-1) - probabilities
    # 1 switches it off: rounded sums reach 1 before the last token.
    top_p = column([draw.top_p if draw.top_p < 1 else math.inf for draw in draws])
    min_p = column([draw.min_p for draw in draws])
    # The likeliest token always stays, whatever the rounding of the sums.
    drop = (before >= top_p) | (probabilities < min_p * probabilities[:, :1])
    drop[:, 0] = False
    ranked = ranked.masked_fill(drop, float("-inf"))
    return torch.empty_like(scores).scatter_(-1, order, ranked)


def _reports(
    logits: torch.Tensor, owners: Seq[ScoredRow], chosen: torch.Tensor, peaks: Peaks | None
) -> _Reports | None:
    """What the rows that ask for log-probabilities get; `peaks` of the logits if they are known."""
    asked = [owner.sequence.sampling for owner in owners]
    wanted = [row for row, one in enumerate(asked) if one.logprobs or one.top_logprobs]
    if not wanted:
        return None
    if len(wanted) < len(owners):
        rows = to_device(wanted, logits.device)
        logits, chosen = logits[rows], chosen[rows]
        peaks = None if peaks is None else Peaks(*(found[rows] for found in peaks))
    heights, log_masses = _divisors(logits) if peaks is None else peaks[1:]
    picked = logits.gather(1, chosen[:, None]).squeeze(1) - heights - log_masses
    num_top = tuple(owners[row].sequence.sampling.top_logprobs for row in wanted)
    # Of no columns torch would look for the likeliest all the same.
    most = min(max(num_top), logits.shape[-1])
    best = (logits if most else logits[:, :0]).topk(most, dim=-1)
    return _Reports(
        rows=tuple(wanted),
        num_top=num_top,
        picked=to_host(picked),
        ids=to_host(best.indices),
        logprobs=to_host(best.values - heights[:, None] - log_masses[:, None]),
    )


def _divisors(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The heights and the log masses of `Peaks`."""
    heights = logits.amax(dim=-1)
    return heights, (logits - heights[:, None]).exp().sum(dim=-1).log()
