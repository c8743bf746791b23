"""Devices that dispatch takes this one for."""

from keras_precision.kernels import device


def on_nvidia(monkeypatch, *, hopper=False):
    """Makes dispatch choose as on an NVIDIA GPU, and run here what it chooses, which a test then interprets."""
    monkeypatch.setattr(device, "on_nvidia", lambda kernel, otherwise: kernel)
    with_nvidia_as_default(monkeypatch, hopper=hopper)


def with_nvidia_as_default(monkeypatch, *, hopper=False):
    """Makes dispatch choose as in a process whose default device is an NVIDIA GPU; programs run where they do."""
    monkeypatch.setattr(device, "has_triton", lambda: True)
    monkeypatch.setattr(device, "has_float8", lambda: True)
    monkeypatch.setattr(device, "has_wgmma", lambda: hopper)
