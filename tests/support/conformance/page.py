"""The table as a page of the documentation, and read back from it."""

import re
from importlib.metadata import version

from tests.support.conformance.bench import MODES
from tests.support.conformance.cells import TOLERANCE, Cell, Status, Table

_INTRODUCTION = """\
# Conformance

What the server makes of PEFT checkpoints, with PEFT as the oracle. There is one
table for each of the server's [modes](modes.md), bypass and merged. In both,
every kind on every architecture gives PEFT's own answers, is refused by name,
or is one that PEFT itself cannot make there.

- `≤1e-4`: served. No logit of any row differs from PEFT's by more, and all
  greedy tokens are equal, or tie within twice the difference.
- `bypass`, a cell of the table of merged mode: served just as exactly, but in
  bypass there too, because it is never merged.
- `R1`: refused, with the message under that number below the table.
- `P1`: PEFT itself does not make or run this kind on this architecture, for the
  reason under that number.
- **`W1`**: wrong. No released version has such a cell.

## How it is measured

PEFT makes each checkpoint on a tiny model of the architecture. All weights are
random, and the adapter's visibly move the logits. The checkpoint goes through
the server's own upload, store and engine in float32.

One batch mixes three prompts with the adapter, two with a second adapter of the
same kind, and two with the base model alone. Some prompts are longer than the
sliding windows and are prefilled in pieces. The batch is decoded greedily; then
PEFT computes each row by itself along the same tokens.

`make test` measures every kind on Llama, and `target_modules: all-linear` on
every architecture. `python -m benchmarks.conformance --write` measures every
cell and writes this page.

## What else a checkpoint may hold

Of the files that trainers save beside an adapter, these shape its answers, and
they are honoured ([api.md](api.md#adapters) says when):

- the task card, `task.json`;
- the chat template: `chat_template.jinja`, else the `chat_template` of
  `tokenizer_config.json`;
- the end tokens: `eos_token` of `tokenizer_config.json`, `eos_token_id` of
  `generation_config.json`.

Nothing else in these files is used. In particular, prompts are tokenised by the
base model's tokenizer, not by the adapter's.

Beside an adapter's own tensors, PEFT saves others, which are read as PEFT reads
them:

- Copies of the embedding and the head (`save_embedding_layers`), also below the
  wrappers of `modules_to_save` and `trainable_token_indices`. A copy that
  differs from the base model's replaces it for this adapter. One with another
  vocabulary is refused, with both sizes.
- Biases. Earlier releases of PEFT saved none with `bias: lora_only`; then the
  base model's own are used.
- Experts that were adapted one by one, under transformers 4. They are stacked
  as PEFT stacks them under transformers 5.
"""
_LETTERS = {Status.REFUSED: "R", Status.NOT_IN_PEFT: "P", Status.WRONG: "W"}
_NOTE = re.compile(r"- \*?\*?`?([RPW]\d+)`?\*?\*?: (.*)")


def render(table: Table, *, digits: bool = False) -> str:
    """The whole page; with `digits` it shows differences, which vary from run to run."""
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "peft"))
    parts = [_INTRODUCTION]
    parts += [_section(mode, _of_mode(table, mode), digits) for mode in MODES]
    return "\n".join([*parts, f"Made with {packages}.\n"])


def read(page: str) -> Table:
    """The cells of a rendered page; differences come back as the bound that was written."""
    table: Table = {}
    for section in page.split("\n## ")[1:]:
        mode, _, body = section.partition("\n")
        if mode not in MODES:
            continue
        notes = {m[1]: m[2] for line in body.splitlines() if (m := _NOTE.fullmatch(line))}
        header, _, *rows = [_columns(line) for line in body.splitlines() if line.startswith("|")]
        for kind, *cells in rows:
            for architecture, cell in zip(header[1:], cells, strict=True):
                table[mode, kind, architecture] = _read_cell(cell, notes)
    return table


def _of_mode(table: Table, mode: str) -> dict[tuple[str, str], Cell]:
    return {(kind, column): cell for (m, kind, column), cell in table.items() if m == mode}


def _section(mode: str, cells: dict[tuple[str, str], Cell], digits: bool) -> str:
    kinds = list(dict.fromkeys(kind for kind, _ in cells))
    columns = list(dict.fromkeys(column for _, column in cells))
    notes: dict[tuple[Status, str], str] = {}
    lines = [_line(["kind", *columns]), _line(["---"] * (len(columns) + 1))]
    for kind in kinds:
        shown = [_shown(cells[kind, column], notes, digits) for column in columns]
        lines.append(_line([kind, *shown]))
    listed = [f"- `{number}`: {text}" for (_, text), number in sorted(notes.items(), key=_order)]
    return "\n".join([f"## {mode}", "", *lines, "", *listed, ""])


def _order(item: tuple[tuple[Status, str], str]) -> tuple[str, int]:
    return item[1][0], int(item[1][1:])


def _shown(cell: Cell, notes: dict[tuple[Status, str], str], digits: bool) -> str:
    if cell.status is Status.NOT_MERGED:
        return "bypass"
    if cell.status is Status.SERVED:
        bound = cell.difference if digits else TOLERANCE
        return f"≤{bound:.0e}".replace("e-0", "e-")
    letter = _LETTERS[cell.status]
    text = cell.text if cell.difference is None else f"{cell.text}, by {cell.difference:.0e}"
    number = sum(status is cell.status for status, _ in notes) + 1
    shown = notes.setdefault((cell.status, text), f"{letter}{number}")
    return f"**{shown}**" if cell.status is Status.WRONG else shown


def _read_cell(cell: str, notes: dict[str, str]) -> Cell:
    if cell.startswith("≤"):
        return Cell(status=Status.SERVED, difference=float(cell[1:]))
    if cell == "bypass":
        return Cell(status=Status.NOT_MERGED)
    number = cell.strip("*")
    status = next(status for status, letter in _LETTERS.items() if number.startswith(letter))
    return Cell(status=status, text=notes[number])


def _line(columns: list[str]) -> str:
    return f"| {' | '.join(columns)} |"


def _columns(line: str) -> list[str]:
    return [column.strip() for column in line.strip("|").split("|")]
