import gc

from jaxrl_llm.tracking.performance import long_lived_objects_set_aside


def test_what_lasts_is_walked_by_no_collection():
    """Objects from before are the collector's again afterwards, later ones always."""
    lasting = [[] for _ in range(1000)]
    before = gc.get_freeze_count()
    with long_lived_objects_set_aside() as set_aside:
        assert gc.get_freeze_count() == before
        set_aside()
        assert gc.get_freeze_count() > before + len(lasting)
        assert not any(x is lasting[0] for x in gc.get_objects())
        frozen, later = gc.get_freeze_count(), [[]]
        set_aside()
        assert gc.get_freeze_count() == frozen
        assert any(x is later[0] for x in gc.get_objects())
    assert gc.get_freeze_count() == 0
    assert any(x is lasting[0] for x in gc.get_objects())
