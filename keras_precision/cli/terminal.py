"""The consoles that commands print on."""

from __future__ import annotations

from rich.console import Console

# Wide enough for every row: a pipe has no edge to fold at.
_PIPE_WIDTH = 400


def stdout_console() -> Console:
    """Returns a console on stdout that folds tables at a terminal's edge and never in a pipe."""
    console = Console(highlight=False, markup=False)
    if not console.is_terminal:
        console.width = _PIPE_WIDTH
    return console
