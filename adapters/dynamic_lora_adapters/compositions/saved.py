"""Which adapters a text means: names, sums of names, and compositions saved under a name."""

import threading
import time
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

from dynamic_lora_adapters.compositions.compose import CheckShapes, GivenUp, compose, merge
from dynamic_lora_adapters.compositions.composition import (
    Composition,
    InvalidComposition,
    Merge,
    Part,
    VersionNotFound,
)
from dynamic_lora_adapters.compositions.text import is_expression, parse, parse_parts
from dynamic_lora_adapters.errors import AdapterError, AdapterNotFound
from dynamic_lora_adapters.home.index import AdapterIndex, StoredComposition
from dynamic_lora_adapters.home.inspection import AdapterVersion
from dynamic_lora_adapters.home.passport import Passport
from dynamic_lora_adapters.home.registry import AdapterRegistry
from dynamic_lora_adapters.names import check_adapter_name
from dynamic_lora_adapters.near_names import near_names
from dynamic_lora_adapters.terms import AdapterTerms


class NameTaken(AdapterError):
    """The name belongs to an adapter or to a saved composition already."""


class CompositionNotFound(AdapterError):
    """No composition is saved under the name; `near` lists the closest names."""

    def __init__(self, name: str, near: Sequence[str] = ()) -> None:
        hint = f" Did you mean {', '.join(map(repr, near))}?" if near else ""
        super().__init__(
            f"No composition is named {name!r}.{hint}",
            field="name",
            fix="List the names with GET /compositions.",
        )
        self.near = tuple(near)


class SavedCompositions:
    """Compositions under names, beside the adapters of a registry.

    A saved name is used like an adapter's and stands for its text, so that a
    part without a version follows its adapter. Adapters and compositions share
    one space of names; where another process put a name into both, the adapter counts.
    All methods may be called from any thread; `has`, `resolve`, `get` and `list` touch
    no disk. `index` is where they are kept. `last_named` is when each adapter was last asked for,
    by `time.monotonic`, until `delete_adapter`.
    """

    def __init__(self, registry: AdapterRegistry, index: AdapterIndex) -> None:
        self._registry = registry
        self._index = index
        self._lock = threading.Lock()
        self._saved = {one.name: one for one in index.compositions()}
        self._publishing: Counter[str] = Counter()  # adapters' names that are being given
        self.last_named: dict[str, float] = {}

    def has(self, name: str) -> bool:
        """Whether a name is an adapter's or a saved composition's."""
        return self._is_adapter(name) or self._is_saved(name)

    def spelt_as(self, name: str) -> str | None:
        """The name that is `name` but for the case of its letters, if there is one."""
        return next((own for own in sorted(self._names()) if own.lower() == name.lower()), None)

    def resolve(self, text: str) -> Composition:
        """What a text means now: a name, a saved name, or a sum of either.

        Raises InvalidComposition with the column, or AdapterNotFound with near
        names, for an adapter of weight 0 as well.
        """
        return self.combine(parse_parts(text) if is_expression(text) else [Part(text)])

    def combine(self, parts: Iterable[Part], *, merge: Merge | None = None) -> Composition:
        """Parts put together, those with saved names written out; raises as `resolve` does."""
        flat: list[Part] = []
        for part in parts:
            saved = self._meant_by(part)
            if saved is None:
                flat.append(part)
            elif merge is None:
                flat.extend(parse(saved.text).scaled(part.weight).parts)
            else:
                raise _not_an_adapter(part, saved)
        for part in flat:
            self.version(part)
        return Composition.of(flat, merge=merge)

    def version(self, part: Part) -> AdapterVersion:
        """The adapter of a part. Raises AdapterNotFound or VersionNotFound."""
        if not self._is_adapter(part.name):
            raise AdapterNotFound(part.name, self._near(part.name))
        self.last_named[part.name] = time.monotonic()
        version = self._registry.resolve(part.name)
        check_version(part, version.digest)
        return version

    def terms(
        self,
        composition: Composition,
        digests: Sequence[str],
        given_up: GivenUp = lambda: False,
        check_shapes: CheckShapes = lambda _: None,
    ) -> AdapterTerms:
        """What a composition computes; `digests` are its parts', leased by the caller.

        Raises UnsupportedAdapter, naming the adapter, for parts that have no sum, and what
        `check_shapes` does of a merge, before it is computed. One that is `given_up` ends with
        NobodyWaits.
        """
        # In the order that the composition's digest has them, not in that of their
        # names: one digest means the same numbers to the last bit.
        pairs = zip(digests, composition.parts, strict=True)
        ordered = sorted(pairs, key=lambda pair: (pair[0], pair[1].weight))
        loaded = {digest: self._registry.load(digest) for digest in set(digests)}
        weighted = [(loaded[digest], part.weight) for digest, part in ordered]
        names = [part.label for _, part in ordered]
        dtype = self._registry.dtype
        if composition.merge is not None:
            return merge(
                weighted,
                composition.merge,
                names=names,
                dtype=dtype,
                check_shapes=check_shapes,
                given_up=given_up,
            )
        return compose(weighted, names=names, dtype=dtype)

    def save(
        self, name: str, parts: Sequence[Part], *, reserved: Collection[str] = ()
    ) -> tuple[StoredComposition, bool]:
        """Give the sum of the parts a name; also says whether the name is new.

        The sum is computed once, so that none is saved that could not run. Raises what `check`
        does, and UnsupportedAdapter as `terms` does.
        """
        composition = self.check(name, parts, reserved=reserved)
        if composition.plain is None:
            self._try(composition)
        with self._lock:
            self._check_no_adapter(name)
            created = name not in self._saved
            stored = self._index.put_composition(name, str(composition))
            self._saved[name] = stored
            return stored, created

    def check(
        self, name: str, parts: Sequence[Part], *, reserved: Collection[str] = ()
    ) -> Composition:
        """The sum of the parts, if it may get the name, as far as can be told without computing it.

        `reserved` are further names of the base model. Raises InvalidAdapterName, NameTaken,
        AdapterNotFound, and InvalidComposition for a part that is a saved composition itself or a
        sum of nothing.
        """
        check_adapter_name(name, reserved=reserved)
        self._check_no_adapter(name)
        for part in parts:
            if (saved := self._saved.get(part.name)) is not None:
                raise _not_an_adapter(part, saved)
        composition = self.combine(parts)
        if composition.is_base:
            raise InvalidComposition("The weights add up to nothing.")
        return composition

    @contextmanager
    def kept_for_adapter(self, name: str) -> Iterator[None]:
        """Keep a name from compositions until an adapter has it. Raises NameTaken."""
        with self._lock:
            self.check_free(name)
            self._publishing[name] += 1
        try:
            yield
        finally:
            with self._lock:
                self._publishing[name] -= 1
                self._publishing += Counter()  # drops what is at nothing

    def check_free(self, name: str) -> None:
        """Raise NameTaken if a composition has the name that an adapter is to get."""
        if self._is_saved(name):
            raise NameTaken(
                f"{name!r} is the name of a saved composition.",
                field="name",
                fix=f"Choose another name, or DELETE /compositions/{name} first.",
            )

    def get(self, name: str) -> StoredComposition:
        """A saved composition. Raises CompositionNotFound with near names."""
        try:
            return self._saved[name]
        except KeyError:
            near = near_names(name, self._saved.copy())
            raise CompositionNotFound(name, near) from None

    def list(self) -> Sequence[StoredComposition]:
        """All saved compositions by name."""
        saved = self._saved.copy()
        return [saved[name] for name in sorted(saved)]

    def delete(self, name: str) -> None:
        """Forget a saved composition; what runs goes on. Raises CompositionNotFound."""
        with self._lock:
            self.get(name)
            self._index.drop_composition(name)
            del self._saved[name]

    def delete_adapter(self, name: str, *, only: Passport | None = None) -> None:
        """Forget an adapter's name, here too. Raises what `AdapterRegistry.delete` does."""
        self._registry.delete(name, only=only)
        self.last_named.pop(name, None)

    def _try(self, composition: Composition) -> None:
        with ExitStack() as stack:
            leases = [
                stack.enter_context(self._registry.lease(part.name)) for part in composition.parts
            ]
            digests = [lease.version.digest for lease in leases]
            for part, digest in zip(composition.parts, digests, strict=True):
                check_version(part, digest)
            self.terms(composition, digests)

    def _meant_by(self, part: Part) -> StoredComposition | None:
        """The saved composition that a part names; None for an adapter, or nothing."""
        saved = self._saved.get(part.name)
        if saved is None or self._is_adapter(part.name):
            return None
        if part.version is not None:
            raise InvalidComposition(
                f"{part.name!r} is a saved composition and has no versions.",
                fix="Pin the versions of its adapters when you save it.",
            )
        return saved

    def _check_no_adapter(self, name: str) -> None:
        if self._is_adapter(name) or name in self._publishing:
            raise NameTaken(
                f"{name!r} is the name of an adapter.", field="name", fix="Choose another name."
            )

    def _is_saved(self, name: str) -> bool:
        return name in self._saved

    def _is_adapter(self, name: str) -> bool:
        return self._registry.has(name)

    def _near(self, name: str) -> Sequence[str]:
        return near_names(name, self._names())

    def _names(self) -> set[str]:
        return {*self._saved.copy(), *self._registry.names()}


def _not_an_adapter(part: Part, saved: StoredComposition) -> InvalidComposition:
    return InvalidComposition(
        f"{part.name!r} is a saved composition; only adapters can stand here.",
        fix=f"Write it out: {saved.text}.",
    )


def check_version(part: Part, digest: str) -> None:
    """Raise VersionNotFound unless the part's adapter, now `digest`, is what the part pins."""
    if part.version is not None and not digest.startswith(part.version):
        raise VersionNotFound(part.name, part.version, digest)
