import pytest

from jaxrl_llm import models
from jaxrl_llm.models import known_shapes as shapes

# Parameters by the models' own cards, in billions; a tied output matrix counts once.
PUBLISHED = {
    "smollm2-135m": 0.1345,
    "qwen2.5-0.5b": 0.494,
    "qwen2.5-1.5b": 1.544,
    "qwen2.5-7b": 7.616,
    "qwen3-0.6b": 0.596,
    "qwen3-1.7b": 1.721,
    "qwen3-4b": 4.022,
    "qwen3-8b": 8.191,
    "qwen3-32b": 32.762,
    "qwen3-30b-a3b": 30.532,
    "qwen3-235b-a22b": 235.094,
    "llama3.1-8b": 8.030,
    "llama3.1-70b": 70.554,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_shape_has_as_many_parameters_as_the_model(name):
    count = models.num_params(shapes.find(name)) / 1e9
    assert count == pytest.approx(PUBLISHED[name], abs=6e-4)


@pytest.mark.parametrize(
    ("name", "active", "layers", "width", "inner"),
    [
        ("qwen3-30b-a3b", 3.353, 48, 2048, 768),
        ("qwen3-235b-a22b", 22.191, 94, 4096, 1536),
    ],
)
def test_a_token_is_multiplied_with_its_own_experts_only(
    name, active, layers, width, inner
):
    # By their names they activate 3 and 22 billion; the embedding is looked up.
    others = layers * (128 - 8) * 3 * width * inner
    assert (PUBLISHED[name] * 1e9 - others) / 1e9 == pytest.approx(active, abs=2e-3)
    found = models.num_matmul_params(shapes.find(name))
    assert found == models.num_params(shapes.find(name)) - others - 151936 * width


def test_a_config_file_is_a_shape_too(tmp_path):
    (tmp_path / "config.json").write_text(
        '{"model_type": "llama", "vocab_size": 10, "hidden_size": 8, "rms_norm_eps":'
        ' 1e-5, "intermediate_size": 4, "num_hidden_layers": 1, "num_attention_heads":'
        ' 2, "max_position_embeddings": 32}'
    )
    assert shapes.find(str(tmp_path / "config.json")).hidden_size == 8


def test_an_unknown_name_is_refused_with_those_there_are():
    with pytest.raises(ValueError, match="'gpt5'.*tiny"):
        shapes.find("gpt5")
