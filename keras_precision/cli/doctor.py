"""`keras-precision doctor`: what this machine can do with each dtype."""

from __future__ import annotations

import json
from typing import Any

import click
from rich.table import Table

from keras_precision import hardware
from keras_precision.cli.terminal import stdout_console


@click.command(epilog="Example: keras-precision --backend jax doctor --json")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")
def doctor(as_json: bool) -> None:
    """Show the backend, its devices, the dtypes they support, and the policy that "auto" stands for."""
    report = _report()
    if as_json:
        click.echo(json.dumps(report, indent=2))
        return
    console = stdout_console()
    console.print(_facts_table(report))
    console.print(_dtypes_table(report))
    console.print(_matrix_table(report))
    console.print(f"Recommended policy, the one that 'auto' stands for: {report['recommended_policy']}")


def _report() -> dict[str, Any]:
    description = hardware.describe()
    matrix = hardware.support_matrix()
    return {
        "hardware": description.to_dict(),
        "device_class": hardware.device_class(description),
        "dtypes": {dtype: matrix.current(dtype)._asdict() for dtype in matrix.dtypes},
        "support_matrix": matrix.to_rows(),
        "recommended_policy": hardware.best_policy(description),
    }


def _facts_table(report: dict[str, Any]) -> Table:
    found = report["hardware"]
    table = Table(title="This machine", show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    table.add_row("backend", f"{found['backend']} {found['backend_version']}")
    for kind, name in found["devices"]:
        table.add_row(f"device ({kind})", name)
    table.add_row("processor", f"{found['cpu_name']} ({', '.join(found['cpu_flags']) or 'no known flags'})")
    if found["compute_capability"]:
        table.add_row("compute capability", found["compute_capability"])
    table.add_row("float64", "kept" if found["is_x64_enabled"] else "becomes float32: jax_enable_x64 is off")
    table.add_row("float32 matmul", found["default_matmul_precision"] or "the device's default")
    table.add_row("device class", report["device_class"])
    return table


def _dtypes_table(report: dict[str, Any]) -> Table:
    table = Table("dtype", "here", "why", title="dtypes on the default device")
    for dtype, cell in report["dtypes"].items():
        table.add_row(dtype, cell["status"], cell["reason"])
    return table


def _matrix_table(report: dict[str, Any]) -> Table:
    rows = report["support_matrix"]
    table = Table("device", *(row["dtype"] for row in rows), title=f"Support matrix, {report['hardware']['backend']}")
    for column in list(rows[0])[1:]:
        is_here = column == report["device_class"]
        table.add_row(f"{column} (here)" if is_here else column, *(row[column] for row in rows))
    return table
