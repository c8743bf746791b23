"""Output files that are written whole or not at all."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Gives a path to write to, in the same directory and with the same suffix; what is there takes `path`'s place.

    If the block raises, `path` is as it was and nothing else is left.

    Args:
        path: of the file.

    Example:
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     path = Path(directory) / "out.txt"
        ...     with written_whole(path) as partial:
        ...         characters = partial.write_text("all of it")
        ...     path.read_text()
        'all of it'
    """
    path = Path(path)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}.", suffix=path.suffix)
    os.close(descriptor)
    partial = Path(name)
    try:
        yield partial
        mask = os.umask(0)
        os.umask(mask)
        partial.chmod(0o666 & ~mask)  # mkstemp makes files that only their owner reads
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
