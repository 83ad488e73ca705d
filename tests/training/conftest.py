import pytest


@pytest.fixture(scope="session")
def values(tiny_model, tmp_path_factory) -> dict:
    """`learnable.values`, which nobody may change."""
    import learnable

    return learnable.values(tiny_model, tmp_path_factory.mktemp("questions"))
