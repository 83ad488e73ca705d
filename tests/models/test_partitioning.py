import pytest
import tiny

from jaxrl_llm.models import kv_copies


@pytest.mark.parametrize(
    ("heads", "kv_heads", "devices", "copies"),
    [
        (12, 2, 1, 1),
        (12, 2, 2, 1),
        (12, 2, 4, 2),  # Qwen2.5-1.5B
        (28, 4, 4, 1),  # Qwen2.5-7B
        (32, 8, 16, 2),
        (9, 3, 9, 3),  # SmolLM2-135M
        (12, 6, 4, 2),  # 12 heads, three a device
        (6, 2, 3, 3),  # of which one looks at both
    ],
)
def test_every_device_has_the_heads_of_its_queries(heads, kv_heads, devices, copies):
    arch = tiny.arch(num_heads=heads, num_kv_heads=kv_heads)
    assert kv_copies(arch, devices) == copies
    # Head k of the copied ones is head k // copies: where device d's queries look.
    a_device, queries = kv_heads * copies // devices, heads // devices
    for query in range(heads):
        of_its_device = query % queries // (queries // a_device)
        copied = query // queries * a_device + of_its_device
        assert copied // copies == query // (heads // kv_heads)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "devices"), [(9, 3, 2), (12, 2, 8), (28, 4, 8)]
)
def test_what_does_not_fit_is_named(heads, kv_heads, devices):
    arch = tiny.arch(num_heads=heads, num_kv_heads=kv_heads)
    wanted = f"{heads} attention heads with {kv_heads} key/value heads .* {devices} dev"
    with pytest.raises(ValueError, match=wanted):
        kv_copies(arch, devices)
