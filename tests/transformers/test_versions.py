"""Unsupported releases of transformers are named before one is imported."""

import importlib.metadata

import pytest

from torch_rpa.transformers import versions


@pytest.mark.parametrize("version", ["4.57.0", "4.57.6", "5.0.0", "5.23.0.dev0"])
def test_supported_releases_pass(monkeypatch, version):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version)
    versions.require_supported()


@pytest.mark.parametrize("version", ["4.56.2", "3.0", "6.0.0"])
def test_other_releases_are_refused(monkeypatch, version):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version)
    with pytest.raises(ImportError, match=f">=4.57,<6.0, got {version}"):
        versions.require_supported()


def test_no_transformers_at_all_is_reported(monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    with pytest.raises(ImportError, match=r"got none: pip install"):
        versions.require_supported()
