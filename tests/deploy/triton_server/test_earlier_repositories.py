"""Model repositories that an earlier version wrote import its place of the served bundle."""

from __future__ import annotations


def test_repositories_of_earlier_versions_find_the_served_bundle() -> None:
    from maskformer_fast.deploy.triton_model import ServedBundle
    from maskformer_fast.deploy.triton_server import model

    assert ServedBundle is model.ServedBundle
