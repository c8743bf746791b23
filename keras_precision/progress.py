"""The progress bar of long work."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn


def progress_bar(task: str, unit: str, verbose: int = 1) -> Progress:
    """Returns a bar on stderr that counts units of work and goes when it is done; none in a pipe.

    Args:
        task: the widest description that a task will have.
        unit: of what is counted, in the plural.
        verbose: 0 for none at all.
    """
    console = Console(stderr=True)
    return Progress(
        TextColumn(f"{{task.description:>{len(task)}}}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit),
        TimeElapsedColumn(),
        console=console,
        transient=True,
        disable=not verbose or not console.is_terminal,
    )
