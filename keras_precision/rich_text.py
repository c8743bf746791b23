"""Results that print as rich tables."""

from rich.console import Console


class RichText:
    """Gives a class with `__rich__` a `__str__` of the same table, without colours."""

    def __str__(self) -> str:
        console = Console(width=160, color_system=None)
        with console.capture() as capture:
            console.print(self)
        return capture.get().rstrip()
