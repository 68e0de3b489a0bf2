"""docs/conformance.md says what the code does: a part of the table is measured anew."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.conformance import PAGE
from tests.support.conformance import checkpoints
from tests.support.conformance.architectures import ARCHITECTURES, build_base
from tests.support.conformance.bench import MODES, Bench, Generated, Row
from tests.support.conformance.cells import (
    TOLERANCE,
    Cell,
    Status,
    Table,
    first_sentence,
    measure_column,
    prompt,
)
from tests.support.conformance.checkpoints import (
    NotInPeft,
    save_checkpoint,
)
from tests.support.conformance.kinds import INVOCATION_IDS, KINDS
from tests.support.conformance.page import read, render

EVERYWHERE = "target_modules: all-linear"


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Products of tiny models are not worth a second thread, and wait for it on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def page() -> Table:
    return read(PAGE.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Table:
    """Every kind on the first architecture, one kind on every architecture."""
    home = tmp_path_factory.mktemp("conformance")
    first, *others = ARCHITECTURES
    table: Table = {}
    for architecture, kinds in [(first, list(KINDS)), *((other, [EVERYWHERE]) for other in others)]:
        for _, cells in measure_column(architecture, kinds, home):
            table |= cells
    return table


def agree(written: Cell, found: Cell) -> bool:
    """The same status and reason; digits of a difference vary with the processor."""
    return (written.status, written.text) == (found.status, found.text)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_as_written(kind: str, mode: str, page: Table, measured: Table) -> None:
    key = mode, kind, next(iter(ARCHITECTURES))
    assert agree(page[key], measured[key]), (page[key], measured[key])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_is_as_written(
    architecture: str, mode: str, page: Table, measured: Table
) -> None:
    key = mode, EVERYWHERE, architecture
    assert agree(page[key], measured[key]), (page[key], measured[key])


def test_the_page_has_every_cell(page: Table) -> None:
    assert list(page) == [
        (mode, kind, architecture)
        for mode in MODES
        for kind in KINDS
        for architecture in ARCHITECTURES
    ]


def test_nothing_on_the_page_is_wrong(page: Table) -> None:
    assert [key for key, cell in page.items() if cell.status is Status.WRONG] == []
    served = [cell for cell in page.values() if cell.status is Status.SERVED]
    assert served
    assert all(cell.difference is not None and cell.difference <= TOLERANCE for cell in served)


def test_the_page_opens_as_it_would_be_written() -> None:
    opening, _, _ = render({}).partition(f"## {MODES[0]}")
    assert PAGE.read_text(encoding="utf-8").startswith(opening)


def test_every_reason_is_given(page: Table) -> None:
    served = (Status.SERVED, Status.NOT_MERGED)
    unserved = [cell for cell in page.values() if cell.status not in served]
    assert unserved
    assert all(cell.text for cell in unserved)


def test_what_peft_cannot_make_is_told() -> None:
    base = build_base("llama")
    with pytest.raises(NotInPeft, match="no `target_parameters` found"):
        save_checkpoint(
            Path("unused"), KINDS["target_parameters"], ARCHITECTURES["llama"], base, size=4
        )


@pytest.mark.parametrize("spoilt", ["logits", "nan", "tokens"])
def test_wrong_answers_are_called_wrong(
    spoilt: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = Bench.generate

    def wrong(self: Bench, rows: Sequence[Row]) -> list[Generated]:
        *others, last = right(self, rows)
        if spoilt == "tokens":
            # The last token, whose logits nothing follows.
            return [*others, replace(last, token_ids=[*last.token_ids[:-1], 299])]
        shift = torch.nan if spoilt == "nan" else 2 * TOLERANCE
        return [*others, replace(last, logits=last.logits + shift)]

    monkeypatch.setattr(Bench, "generate", wrong)
    ((_, cells),) = measure_column("llama", ["LoRA"], tmp_path)
    expected = "other tokens than PEFT's" if spoilt == "tokens" else "other logits than PEFT's"
    assert {(cell.status, cell.text) for cell in cells.values()} == {(Status.WRONG, expected)}


def test_kinds_that_do_nothing_are_not_taken_for_served(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Untrained, B is zero.
    monkeypatch.setattr(checkpoints, "_train", lambda *_args, **_options: None)
    with pytest.raises(AssertionError, match="moves PEFT's own logits by 0.0e"):
        list(measure_column("llama", ["LoRA"], tmp_path))


def test_pages_are_read_as_they_are_written() -> None:
    cells = [
        Cell(status=Status.SERVED, difference=3e-6),
        Cell(status=Status.SERVED, difference=6e-5),
        Cell(status=Status.REFUSED, text="`bias` = 'a|b' is not served: no."),
        Cell(status=Status.NOT_IN_PEFT, text="No target modules."),
        Cell(status=Status.WRONG, difference=0.25, text="other logits than PEFT's"),
        Cell(status=Status.REFUSED, text="Another reason."),
        Cell(status=Status.NOT_MERGED, difference=1e-6),
    ]
    table: Table = {
        (mode, kind, f"architecture {number}"): cell
        for mode in MODES
        for kind in ("one", "two")
        for number, cell in enumerate(cells)
    }
    again = read(render(table))
    assert list(again) == list(table)
    for key, cell in table.items():
        assert again[key].status is cell.status
        if cell.status is Status.SERVED:
            assert again[key].difference == TOLERANCE
        elif cell.status is Status.WRONG:
            assert again[key].text == f"{cell.text}, by 2e-01"
        else:
            assert again[key].text == cell.text


def test_reasons_are_cut_to_a_sentence() -> None:
    assert first_sentence("'model.layers.0' is\nno layer. Try: another.") == (
        "'model.layers.0' is no layer."
    )
    assert len(first_sentence("word " * 100)) == 160


def test_only_longer_prompts_invoke() -> None:
    assert tuple(prompt(9, seed=0)[3:6]) == INVOCATION_IDS
    assert not set(INVOCATION_IDS) <= set(prompt(6, seed=0))
