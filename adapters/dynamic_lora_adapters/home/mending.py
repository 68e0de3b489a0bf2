"""Files that are damaged, and how an upload of the same content mends them."""

import logging
from collections.abc import Collection
from pathlib import Path

from dynamic_lora_adapters.home.index import AdapterIndex
from dynamic_lora_adapters.home.inspection import AdapterVersion, is_sound
from dynamic_lora_adapters.home.store import BlobStore

logger = logging.getLogger(__name__)


def is_damaged(store: BlobStore, digest: str, named: Collection[AdapterVersion]) -> bool:
    """Whether files of a content are not what they were, or gone though one of `named` has it.

    Takes as long as they are large.
    """
    folder = store.path(digest)
    if folder.is_dir():
        return not is_sound(folder, digest)
    return any(version.digest == digest for version in named)


def mend(store: BlobStore, index: AdapterIndex, digest: str, folder: Path) -> None:
    """Put the files of a prepared folder in the place of those that are damaged."""
    store.remove(digest)
    store.publish(folder, digest)
    try:
        index.put_sizes(digest, store.sizes(digest))
    except Exception:
        logger.exception("the next start finds how large %.12s is by now", digest)
