"""An audit as one page of HTML that needs nothing else."""

from __future__ import annotations

import base64
import html
import io

from keras_precision.report.result import Audit, LayerAudit

_STYLE = """
body { font: 14px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 80rem; padding: 0 1rem; color: #1b1f24; }
table { border-collapse: collapse; } th, td { padding: .2rem .4rem; border-bottom: 1px solid #d8dee4; text-align: right; }
th:first-child, td:first-child { text-align: left; min-width: 11em; overflow-wrap: anywhere; } thead th { background: #f6f8fa; }
.scroll { overflow-x: auto; } li.error { color: #a40e26; } li.warning { color: #7d4e00; } li.info { color: #0550ae; }
img { max-width: 100%; }
@media (prefers-color-scheme: dark) {
  body { background: #0d1117; color: #e6edf3; } thead th { background: #161b22; } th, td { border-color: #30363d; }
  li.error { color: #ff7b72; } li.warning { color: #e3b341; } li.info { color: #79c0ff; } img { background: #fff; }
}
"""

_HEADINGS = (
    "layer",
    "class",
    "policy",
    "computes",
    "weights 2^",
    "activations 2^",
    "gradients 2^",
    "overflow",
    "underflow",
    "subnormal",
    "SQNR dB",
    "casts",
    "cast bytes",
)


def page_of(audit: Audit) -> str:
    """Returns the page: findings, memory, plots if matplotlib is there, and a table of all layers."""
    title = _text(f"Audit of {audit.model} under {audit.policy}")
    findings = "".join(
        f'<li class="{_text(f.severity)}"><strong>{_text(f.severity)}, {_text(f.kind)}:</strong> {_text(f.message)}</li>'
        for f in audit.findings
    )
    memory = audit.memory
    bytes_rows = "".join(
        f"<tr><td>{name}</td><td>{getattr(memory, name):,}</td></tr>"
        for name in ("weights", "gradients", "optimizer", "activations", "peak")
    )
    devices = "".join(f"<li>{_text(dtype)}: {_text(speed)}</li>" for dtype, speed in audit.hardware.items())
    rows = "".join(_row(layer) for layer in audit.layers)
    heads = "".join(f"<th>{heading}</th>" for heading in _HEADINGS)
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"/>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"/><title>{title}</title>'
        f"<style>{_STYLE}</style></head>\n<body><h1>{title}</h1>"
        f"<h2>Findings</h2><ul>{findings or '<li>Nothing found that this policy would break.</li>'}</ul>"
        f"<p>Gradients are multiplied by a loss scale of {audit.loss_scale:g} ({_text(audit.loss_scale_source)}). "
        f"{audit.casts:,} casts of {audit.cast_bytes:,} bytes a step.</p>"
        f"<h2>Memory of a step on {memory.batch_size} rows, estimated</h2>"
        f"<table><thead><tr><th>what</th><th>bytes</th></tr></thead><tbody>{bytes_rows}</tbody></table>"
        f"<h2>This device</h2><ul>{devices}</ul>{_plot(audit)}"
        f'<h2>Layers</h2><div class="scroll"><table><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table></div>'
        "</body></html>\n"
    )


def _row(layer: LayerAudit):
    shares = [
        f"{max((getattr(stats, name) for stats in layer.tensors.values()), default=0):.2%}"
        for name in ("overflow", "underflow", "subnormal")
    ]
    cells = (layer.path, layer.class_name, layer.policy, layer.compute_dtype, *layer.exponents, *shares, layer.sqnr)
    return (
        "<tr>"
        + "".join(f"<td>{_text(cell)}</td>" for cell in (*cells, f"{layer.casts:,}", f"{layer.cast_bytes:,}"))
        + "</tr>"
    )


def _plot(audit):
    try:
        figure = audit.plot()
    except ImportError:
        return "<p>No plots: matplotlib is not installed.</p>"
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=110)
    data = base64.b64encode(image.getvalue()).decode()
    return (
        f"<h2>Exponents and error by layer</h2><p>Red lines: where the normal values of the layer's dtype begin and end.</p>"
        f'<img alt="Heat maps of exponents by layer, and the error of each layer" src="data:image/png;base64,{data}"/>'
    )


def _text(value):
    return html.escape(str(value), quote=True)
