"""The tensors that hold keys and values, one pair per layer."""

from collections.abc import Sequence

import torch

from dynamic_lora_adapters.arena import Arena
from dynamic_lora_adapters.geometry import LayerGeometry
from dynamic_lora_server.engine.kv.ahead import CommittedAhead
from dynamic_lora_server.engine.kv.prefix_cache import CellCopy


class KVCache:
    """Per layer: keys [num_cells, num_kv_heads, key_dim], values likewise.

    A cell belongs to one token of one sequence; who holds which is
    `kv_space`'s business. On a CPU the tables lie on huge pages where there are some,
    which the operating system commits when they are first written, or, of the cells `aside` that
    prefixes are copied to, shortly before. `dtype` may be shorter than the model's: what is
    written is rounded to it, to the nearest.
    """

    def __init__(
        self,
        layers: Sequence[LayerGeometry],
        *,
        num_cells: int,
        device: torch.device,
        dtype: torch.dtype,
        aside: range = range(0),
    ) -> None:
        arena = Arena()

        def table(layer: LayerGeometry, width: int) -> torch.Tensor:
            sizes = num_cells, layer.num_kv_heads, width
            if device.type == "cpu":
                return arena.empty(*sizes, dtype=dtype)
            return torch.empty(*sizes, device=device, dtype=dtype)

        self.keys = [table(layer, layer.key_dim) for layer in layers]
        self.values = [table(layer, layer.value_dim) for layer in layers]
        self._aside = aside
        tables = [*self.keys, *self.values] if device.type == "cpu" else []
        self._ahead = CommittedAhead(tables, aside)
        self._ahead.use(aside.start)

    @property
    def device(self) -> torch.device:
        """Where the tables are: the model's device, which a model looks up anew each time."""
        return self.keys[0].device

    def similar(self, *, num_cells: int, dtype: torch.dtype) -> "KVCache":
        """Another one for the same layers."""
        layers = [
            LayerGeometry(keys.shape[1], keys.shape[2], values.shape[2])
            for keys, values in zip(self.keys, self.values, strict=True)
        ]
        return KVCache(layers, num_cells=num_cells, device=self.device, dtype=dtype)

    @staticmethod
    def bytes_per_token(layers: Sequence[LayerGeometry], dtype: torch.dtype) -> int:
        """Memory of one cell over all layers."""
        return sum(layer.num_elements for layer in layers) * dtype.itemsize

    def write(
        self, layer: int, cells: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
    ) -> None:
        """Store keys and values [num_tokens, num_kv_heads, dim] of new tokens, in its own dtype."""
        for table, new in ((self.keys[layer], keys), (self.values[layer], values)):
            table.index_copy_(0, cells, new.to(table.dtype))

    def copy(self, copies: Sequence[CellCopy]) -> None:
        """Copy the keys and values of runs of cells, in this order."""
        kept = [one for one in copies if one.target in self._aside]
        if kept:
            self._ahead.use(max(one.target + one.num_cells for one in kept))
        for table in (*self.keys, *self.values):
            for one in copies:
                source = table[one.source : one.source + one.num_cells]
                if abs(one.target - one.source) < one.num_cells:
                    source = source.clone()  # `copy_` may read what it has written
                table[one.target : one.target + one.num_cells].copy_(source)
