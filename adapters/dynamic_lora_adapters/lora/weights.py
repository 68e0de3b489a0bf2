"""Reading a LoRA checkpoint into terms, with every tensor checked against config and base.

Only safetensors is read; `checkpoint.py` tells how PEFT names the tensors.
"""

import hashlib
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

from dynamic_lora_adapters.base_weights import BaseWeights, NoWeights
from dynamic_lora_adapters.errors import InvalidAdapter
from dynamic_lora_adapters.files.chat import ChatFormat
from dynamic_lora_adapters.files.safetensors_file import (
    WEIGHTS_FILE,
    canonical_json,
    hash_tensors,
)
from dynamic_lora_adapters.geometry import BaseGeometry
from dynamic_lora_adapters.lora.checkpoint import Checkpoint
from dynamic_lora_adapters.lora.experts import merged_parameter
from dynamic_lora_adapters.lora.parameters import copy_notes, read_copies, replaced_values
from dynamic_lora_adapters.lora.replaced import find_changes
from dynamic_lora_adapters.lora.single_experts import stacked_spec
from dynamic_lora_adapters.lora.spec import LoraSpec
from dynamic_lora_adapters.lora.targets import (
    Target,
    find_parameters,
    find_targets,
    ties_targets,
    unmatched_names,
)
from dynamic_lora_adapters.lora.terms import LoraReader
from dynamic_lora_adapters.lora.tokens import embedding_rows, head_rows, read_token_rows
from dynamic_lora_adapters.terms import AdapterTerms, EmbeddingTerms, LinearTerms, ModuleOverride


def read_adapter(
    folder: Path, spec: LoraSpec, geometry: BaseGeometry, base: BaseWeights | None = None
) -> AdapterTerms:
    """Read and check all that the adapter in `folder` does.

    `base` is needed for adapters that replace or rescale parameters of the
    base (ValueError without it). Raises `InvalidAdapter` for a broken file, a
    missing, extra, misshapen or non-finite tensor (naming it),
    `UnsupportedAdapter` for what is not served, `IncompatibleAdapter` for
    shapes of another base model.
    """
    return read_with_notes(folder, spec, geometry, base)[0]


def read_with_notes(
    folder: Path, spec: LoraSpec, geometry: BaseGeometry, base: BaseWeights | None = None
) -> tuple[AdapterTerms, list[str]]:
    """`read_adapter`, and what the uploader should know about the files."""
    base = base or NoWeights()
    _check_invocation(spec, geometry)
    checkpoint = Checkpoint(folder / WEIGHTS_FILE, geometry.parameters)
    spec = stacked_spec(spec, checkpoint, geometry)
    targets = find_targets(spec, geometry)
    notes = [
        f"{key} lists {name!r}, which the base does not have."
        for key, name in unmatched_names(spec, geometry)
    ]
    values, bias_notes = replaced_values(spec, checkpoint, geometry, targets)
    copies = read_copies(checkpoint, geometry, values)
    for target in find_parameters(spec, geometry):
        values[target.name] = merged_parameter(target, checkpoint, geometry, base)
    changes = find_changes(copies | values, geometry, base)
    reader = LoraReader(
        spec=spec, geometry=geometry, base=base, checkpoint=checkpoint, changes=changes
    )
    terms = _read_terms(reader, targets, values)
    checkpoint.finish()
    return terms, notes + bias_notes + copy_notes(copies, values, changes)


def _check_invocation(spec: LoraSpec, geometry: BaseGeometry) -> None:
    """With a token that no prompt has, the adapter would never act."""
    known = max((shape.num_tokens for shape in geometry.embeddings.values()), default=None)
    beyond = [i for i in spec.invocation_ids if known is not None and i >= known]
    if beyond:
        raise InvalidAdapter(
            f"alora_invocation_tokens lists {beyond[0]}, but the base has {known} tokens.",
            field="alora_invocation_tokens",
        )


class Canonical(Protocol):
    """A parsed config of any kind."""

    def canonical(self) -> dict[str, Any]:
        """The result-changing values in one spelling."""
        ...


def content_digest(
    spec: Canonical,
    weights: Path,
    card: Mapping[str, Any] | None,
    chat: ChatFormat | None = None,
) -> str:
    """SHA-256, in hex, of everything that changes the adapter's answers.

    That is the canonical config, all tensors in order of name (dtype, shape
    and bytes), the task card, whose template and defaults shape the prompt, and,
    if there are any, the chat template and the end tokens.
    File layout, metadata and the order of keys do not count.
    """
    digest = hashlib.sha256()
    for part in (spec.canonical(), card):
        digest.update(canonical_json(part))
    if chat is not None:
        digest.update(canonical_json(["chat", chat.model_dump(mode="json")]))
    hash_tensors(weights, digest)
    return digest.hexdigest()


def _check_tied(
    geometry: BaseGeometry,
    linears: Mapping[str, LinearTerms],
    embeddings: Mapping[str, EmbeddingTerms],
) -> None:
    """PEFT holds the factors of a tied pair once; which of two it would keep is chance."""
    for path, embedding in embeddings.items():
        for head in geometry.heads:
            term = linears.get(head)
            if embedding.a is None or embedding.b is None or term is None or term.a is None:
                continue
            scaled = term.a.T * embedding.scaling
            if not embedding.b.equal(scaled):
                raise InvalidAdapter(
                    f"ensure_weight_tying is set but the factors of {path!r} and {head!r} differ.",
                    field="ensure_weight_tying",
                )


def _read_terms(
    reader: LoraReader, targets: Collection[Target], replaced: Iterable[str]
) -> AdapterTerms:
    """All terms; `replaced` are the parameters that the adapter has new values for."""
    geometry, changes = reader.geometry, reader.changes
    linears = {
        path: LinearTerms(dense=changes.dense.get(path), bias=changes.bias.get(path))
        for path in [*changes.dense, *changes.bias]
    }
    embeddings = {
        path: EmbeddingTerms(token_ids=token_ids, rows=rows)
        for path, (token_ids, rows) in changes.rows.items()
    }
    for target in targets:
        if target.path in geometry.embeddings:
            embeddings[target.path] = reader.embedding(target)
        else:
            linears[target.path] = reader.linear(target)
    if not reader.spec.use_dora and ties_targets(reader.spec, geometry):
        _check_tied(geometry, linears, embeddings)
    adapted = {target.path for target in targets} | {n.rpartition(".")[0] for n in replaced}
    _add_tokens(reader, linears, embeddings, adapted)
    return AdapterTerms(
        linears=linears,
        embeddings=embeddings,
        overrides={
            path: ModuleOverride(parameters=values) for path, values in changes.overrides.items()
        },
        invocation_ids=reader.spec.invocation_ids,
    )


def _add_tokens(
    reader: LoraReader,
    linears: dict[str, LinearTerms],
    embeddings: dict[str, EmbeddingTerms],
    adapted: Collection[str],
) -> None:
    """Trained rows take the place of the base's, also where the file has a copy of these."""
    geometry, changes = reader.geometry, reader.changes
    tokens = read_token_rows(reader.spec, reader.checkpoint, geometry, reader.base)
    for path, (token_ids, rows) in tokens.items():
        if path in adapted:
            raise InvalidAdapter(
                f"trainable_token_indices changes {path!r}, which the adapter changes otherwise "
                "too: PEFT has no such adapter.",
                field="trainable_token_indices",
            )
        if path in geometry.embeddings:
            embeddings[path] = embedding_rows(token_ids, rows, changes.rows.get(path))
        elif path in changes.dense:
            linears[path] = LinearTerms(dense=changes.dense[path].index_copy(0, token_ids, rows))
        else:
            linears[path] = head_rows(token_ids, rows, geometry.heads[path].out_features)
