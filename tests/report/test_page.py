"""The page of an audit is whole, needs nothing else, and shows names as they are."""

import builtins
import dataclasses
import html.parser
import re
import shutil
import subprocess

import keras
import numpy as np
import pytest

import keras_precision as kp
from keras_precision import files

NAME = "a<script>alert(1)</script>&'\"$x_1$"
VOID = {"meta", "img", "br", "link"}
BROWSER = shutil.which("chromium") or shutil.which("google-chrome")


class Reader(html.parser.HTMLParser):
    """Checks that tags close in order, and collects text and attributes."""

    def __init__(self):
        super().__init__()
        self.open, self.text, self.attributes = [], [], []

    def handle_starttag(self, tag, attrs):
        self.attributes += [(tag, name, value) for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.attributes += [(tag, name, value) for name, value in attrs]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture(scope="module")
def report():
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(100, name="head")], name="net")
    x = np.full((2, 4), 1e5, "float32")
    report = kp.audit(model, x, np.ones((2, 100)), loss="mse", policy="mixed_float16")
    # TensorFlow takes no such names.
    named = dataclasses.replace(report.layers[-1], path=NAME)
    return dataclasses.replace(report, model=NAME, layers=(*report.layers[:-1], named), order=(NAME,))


def test_page_is_well_formed_and_escapes_names(report):
    reader = Reader()
    text = report.to_html()
    reader.feed(text)
    assert reader.open == []
    assert {tag for tag, _, _ in reader.attributes} & {"script", "link", "iframe"} == set()
    assert "<script" not in text
    shown = " ".join(reader.text)
    assert shown.count(NAME) >= 2
    for finding in report.findings:
        assert finding.message in shown


def test_page_needs_nothing_else(report):
    text = report.to_html()
    assert "http:" not in text and "https:" not in text and "url(" not in text and "@import" not in text
    reader = Reader()
    reader.feed(text)
    sources = [value for _, name, value in reader.attributes if name in ("src", "href")]
    assert len(sources) == 1
    assert re.match(r"data:image/png;base64,iVBOR", sources[0])


def test_plot_has_a_map_for_each_kind_and_the_errors(report):
    figure = report.plot()
    titles = [axes.get_title() for axes in figure.axes]
    for kind in ("weights", "activations", "gradients of weights", "error of outputs"):
        assert any(title.startswith(kind) for title in titles)


def test_without_matplotlib_plot_says_so_and_the_page_has_none(report, monkeypatch):
    stock = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return stock(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match="pip install"):
        report.plot()
    assert "matplotlib is not installed" in report.to_html()


def test_a_page_is_written_whole_or_not_at_all(report, tmp_path, monkeypatch):
    path = tmp_path / "audit.html"
    report.save_html(path)
    assert path.read_text(encoding="utf-8").endswith("</html>\n")

    def fail(*args):
        raise OSError("full")

    monkeypatch.setattr(files.os, "replace", fail)
    with pytest.raises(OSError, match="full"):
        report.save_html(path)
    assert [one.name for one in tmp_path.iterdir()] == ["audit.html"]


@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")
def test_a_browser_shows_the_page_offline(report, tmp_path):
    path, shot = tmp_path / "audit.html", tmp_path / "audit.png"
    report.save_html(path)
    offline = ["--headless", "--no-sandbox", "--disable-gpu", "--host-resolver-rules=MAP * ~NOTFOUND"]
    where = [f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1300,1500", f"--screenshot={shot}"]
    done = subprocess.run([BROWSER, *offline, *where, path.as_uri()], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "CONSOLE" not in done.stderr  # where Chromium logs what a page gets wrong
    from matplotlib.image import imread

    rows = imread(shot)[..., :3].mean(axis=(1, 2))
    assert (rows < 0.995).mean() > 0.3, "a page of text, tables and plots is not blank"
