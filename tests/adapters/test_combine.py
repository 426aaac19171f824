"""Several adapters made into one: PEFT's values, and what each method promises, in NumPy."""

import json
import os
import re
import shutil
import subprocess

import numpy as np
import pytest

from lora_ms.adapters.arithmetic import dropped, elected, nearest, trimmed
from lora_ms.adapters.combine import COMBINATIONS, Adapter, combine, read_adapter, write_adapter
from lora_ms.adapters.methods.base import Pair
from lora_ms.adapters.methods.lora import LoraConfig
from lora_ms.adapters.peft_files import base_name
from lora_ms.errors import LoraMsError

WEIGHTS = (0.7, 0.4, -0.2)
# Golden file: adapters, method, further arguments.
GOLDEN = {
    "linear": ("abc", "linear", {}),
    "cat": ("abd", "cat", {}),
    "svd": ("abd", "svd", {}),
    "svd_rank_3": ("abc", "svd", {"rank": 3}),
    "ties": ("abc", "ties", {"density": 0.5}),
    "ties_frequency": ("abc", "ties", {"density": 0.5, "majority_sign_method": "frequency"}),
    "ties_svd": ("abd", "ties_svd", {"density": 0.5}),
    "dare_linear": ("abc", "dare_linear", {"density": 1.0}),
    "magnitude_prune": ("abc", "magnitude_prune", {"density": 0.5}),
}
PRUNING = [name for name in COMBINATIONS if name not in ("linear", "cat", "svd")]


@pytest.fixture
def stored(reference):
    """``stored("a")``: a reference adapter on qwen2."""
    return lambda name: read_adapter(reference / "combined" / "qwen2" / name)


def adapter_of(**modules) -> Adapter:
    """Factors by the module's name; settings that say which modules they are."""
    pairs = {name: Pair(*pair) for name, pair in modules.items()}
    return Adapter(LoraConfig(target_modules=tuple(modules)), pairs)


def random_adapter(seed: int, rank: int = 3, scaling: float = 1.5, names=("q_proj", "v_proj")) -> Adapter:
    """On modules [6, 5], in float64."""
    rng = np.random.default_rng(seed)
    return adapter_of(
        **{name: (rng.standard_normal((rank, 5)), rng.standard_normal((6, rank)), scaling) for name in names}
    )


def update(adapter: Adapter, name: str = "q_proj") -> np.ndarray:
    a, b, scaling = adapter.tensors[name]
    return scaling * (b @ a)


def best_of_rank(matrix: np.ndarray, rank: int) -> np.ndarray:
    u, s, v = np.linalg.svd(matrix)
    return u[:, :rank] * s[:rank] @ v[:rank]


def error_of(function, *args, **kwargs) -> str:
    with pytest.raises(LoraMsError) as caught:
        function(*args, **kwargs)
    return str(caught.value)


@pytest.mark.parametrize("name", GOLDEN)
def test_pefts_tensors(stored, golden, name):
    values, (adapters, method, options) = golden(f"combined/qwen2_{name}"), GOLDEN[name]
    combined = combine([stored(one) for one in adapters], WEIGHTS, method, **options)
    assert combined.config.lora_rank == values["lora_rank"]
    assert 2 * len(combined.tensors) == sum(key.startswith("tensor/") for key in values)
    for path, (a, b, scaling) in combined.tensors.items():
        wanted_a, wanted_b = (values[f"tensor/base_model.model.{path}.lora_{half}.weight"] for half in "AB")
        assert (a.shape, b.shape, scaling, a.dtype) == (wanted_a.shape, wanted_b.shape, 1.0, np.float32)
        np.testing.assert_allclose(b @ a, wanted_b @ wanted_a, rtol=0, atol=2e-6)
        if "svd" not in method:  # whose signs are free
            np.testing.assert_allclose(a, wanted_a, rtol=0, atol=1e-6)
            np.testing.assert_allclose(b, wanted_b, rtol=0, atol=1e-6)


@pytest.mark.usefixtures("graph_mode")
@pytest.mark.parametrize("name", GOLDEN)
def test_pefts_logits_through_the_engine(stored, native, reference, golden, tmp_path, name):
    from mindspore import Tensor

    from lora_ms.adapters.peft_format import load_adapter
    from lora_ms.models.hub import load_directory

    values, (adapters, method, options) = golden(f"combined/qwen2_{name}"), GOLDEN[name]
    write_adapter(combine([stored(one) for one in adapters], WEIGHTS, method, **options), tmp_path)
    model = load_directory(reference / "models" / "qwen2", operators=native)
    load_adapter(model, tmp_path)
    np.testing.assert_allclose(model(Tensor(values["input_ids"])).asnumpy(), values["logits"], rtol=0, atol=1e-4)


@pytest.mark.peft
@pytest.mark.slow
@pytest.mark.parametrize(
    "others",
    [("combined/qwen2/a", "combined/qwen2/d"), ("variants/qwen2_exclude_modules",), ("variants/qwen2_embed",)],
)
def test_peft_loads_a_combined_adapter(reference, python_env, tmp_path, others):
    torch_python = os.environ.get("LORA_MS_TORCH_PYTHON")
    if not torch_python:
        pytest.skip("LORA_MS_TORCH_PYTHON names no Python with torch and PEFT")
    from mindspore import Tensor

    from lora_ms.adapters.peft_format import load_adapter
    from lora_ms.models.hub import load_directory

    source, folders = reference / "models" / "qwen2", [reference / "variants" / "qwen2_rank_alpha_pattern"]
    folders += [reference / other for other in others]
    combined = combine([read_adapter(folder) for folder in folders], WEIGHTS[: len(folders)], "cat")
    write_adapter(combined, tmp_path / "adapter", str(source))
    paths = [reference / "live_peft.py", source, tmp_path / "adapter", tmp_path / "out.npz"]
    child = subprocess.run(
        [torch_python, *map(str, paths)], env={**python_env, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True
    )
    assert child.returncode == 0, child.stderr
    theirs, model = np.load(tmp_path / "out.npz"), load_directory(source)
    load_adapter(model, tmp_path / "adapter")
    ours = model(Tensor(theirs["input_ids"].astype(np.int32))).asnumpy()
    assert np.abs(theirs["logits"] - theirs["base_logits"]).mean() > 0.1
    np.testing.assert_allclose(ours, theirs["logits"], rtol=0, atol=1e-4)


# what the methods promise


def test_cat_is_the_weighted_sum_of_updates_of_any_ranks_and_modules():
    parts = [random_adapter(1), random_adapter(2, 2, 0.5, ("q_proj",)), random_adapter(3, 1, 2.0, ("v_proj", "k_proj"))]
    combined = combine(parts, WEIGHTS, "cat")
    assert combined.config.lora_rank == combined.config.lora_alpha == 5
    assert combined.config.target_modules == ("k_proj", "q_proj", "v_proj")
    for name in combined.tensors:
        assert len(combined.tensors[name][0]) == 5
        wanted = sum(w * update(part, name) for part, w in zip(parts, WEIGHTS, strict=True) if name in part.tensors)
        np.testing.assert_allclose(update(combined, name), wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_svd_is_the_best_of_its_rank(rank):
    parts = [random_adapter(seed, seed) for seed in (1, 2, 3)]
    combined = combine(parts, WEIGHTS, "svd", rank=rank)
    whole = sum(w * update(part) for part, w in zip(parts, WEIGHTS, strict=True))
    assert combined.tensors["q_proj"][0].shape == (rank, 5)
    np.testing.assert_allclose(update(combined), best_of_rank(whole, rank), rtol=0, atol=1e-9)


def test_svd_alone_lowers_a_rank_and_has_the_largest_by_default():
    part = random_adapter(1, 4)
    lowered = combine([part], [1.0], "svd", rank=2)
    np.testing.assert_allclose(update(lowered), best_of_rank(update(part), 2), rtol=0, atol=1e-9)
    same = combine([part, random_adapter(2, 2)], [1.0, 0.0], "svd")
    assert same.config.lora_rank == 4
    np.testing.assert_allclose(update(same), update(part), rtol=0, atol=1e-9)


@pytest.mark.parametrize("shape", [(4, 9), (9, 4)])
def test_the_nearest_pair_of_a_matrix_and_a_rank_above_its_own(shape):
    matrix = np.random.default_rng(0).standard_normal(shape)
    a, b = nearest(matrix, 2)
    np.testing.assert_allclose(b @ a, best_of_rank(matrix, 2), rtol=0, atol=1e-12)
    a, b = nearest(matrix, 7)
    assert len(a) == 4
    np.testing.assert_allclose(b @ a, matrix, rtol=0, atol=1e-12)


def test_linear_shares_the_weight_between_both_factors():
    a, b = np.array([[2.0]]), np.array([[3.0]])
    first, second = adapter_of(q_proj=(a, b, 2.0)), adapter_of(q_proj=(a, -b, 1.0))
    alone = combine([first], [-2.0], "linear")
    assert [value.item() for value in alone.tensors["q_proj"][:2]] == [
        -4.0,
        6.0,
    ]  # the root of 4 on each, the sign on A
    both = combine([first, second], [2.0, 4.0], "linear")
    assert [value.item() for value in both.tensors["q_proj"][:2]] == [8.0, 0.0]  # crosswise products are in it


def test_signs_are_elected_as_the_table_says():
    tensors = [np.array(row, float) for row in ([4, -1, 0, 3], [-2, -3, 5, 1], [-1, 2, -4, 0])]
    np.testing.assert_array_equal(elected(tensors, [1, 1, 1], "total"), [4, -2, 5, 2])
    np.testing.assert_array_equal(elected(tensors, [1, 1, 1], "frequency"), [-1.5, -2, 5, 2])
    # weights come after the election
    np.testing.assert_array_equal(elected(tensors, [-1, 1, 10], "total"), [-4, -1, 5, -1])
    rows = [line.split() for line in elected.__doc__.splitlines() if line.strip().startswith(("total", "frequency"))]
    for name, *row in rows:
        np.testing.assert_array_equal(elected(tensors, [1, 1, 1], name), np.array(row, float))
    assert len(rows) == 2
    np.testing.assert_array_equal(elected([np.zeros(2), np.array([1.0, 0])], [1, 1], "total"), [1, 0])


def test_the_largest_values_are_kept():
    tensor = np.array([[1.0, -5.0, 2.0], [-3.0, 4.0, 0.5]])
    np.testing.assert_array_equal(trimmed(tensor, 0.5), [[0, -5, 0], [-3, 4, 0]])
    np.testing.assert_array_equal(trimmed(tensor, 0.66), [[0, -5, 0], [-3, 4, 0]])  # 3.96 of 6 are 3
    np.testing.assert_array_equal(trimmed(tensor, 1.0), tensor)
    np.testing.assert_array_equal(trimmed(tensor, 0.1), np.zeros((2, 3)))


def test_what_dare_keeps_is_scaled_up_and_right_on_average():
    tensor, rng = np.random.default_rng(1).standard_normal((3, 4)), np.random.default_rng(2)
    draws = np.stack([dropped(tensor, 0.25, rng) for _ in range(20000)])
    assert set(np.unique(np.round(draws / tensor, 9))) == {0.0, 4.0}
    # a value of 4 with probability 1/4 deviates by √3, the mean of 20000 by 0.0122: five of these
    np.testing.assert_allclose((draws / tensor).mean(0), 1, rtol=0, atol=0.062)


@pytest.mark.parametrize("svd", ["", "_svd"])
def test_dare_with_density_1_is_linear_and_on_average_too(svd):
    parts = [random_adapter(seed) for seed in (1, 2, 3)]
    linear = update(combine(parts, WEIGHTS, "linear" if not svd else "svd"))
    np.testing.assert_allclose(update(combine(parts, WEIGHTS, f"dare_linear{svd}", 1.0)), linear, rtol=0, atol=1e-9)
    ties = [update(combine(parts, WEIGHTS, f"{method}{svd}", 1.0)) for method in ("ties", "dare_ties")]
    np.testing.assert_allclose(ties[1], ties[0], rtol=0, atol=1e-9)
    rank = 5 if svd else None  # nothing is lost to the rank: the mean of best approximations is another thing
    linear = update(combine(parts, WEIGHTS, "svd", rank=5)) if svd else linear
    draws = np.stack([update(combine(parts, WEIGHTS, f"dare_linear{svd}", 0.8, rank, seed)) for seed in range(1500)])
    standard_errors = draws.std(0) / 1500**0.5
    assert np.abs((draws.mean(0) - linear) / standard_errors).max() < 5
    assert standard_errors.min() > 1e-4


@pytest.mark.parametrize(("whole", "of_tensors"), [("ties_svd", "ties"), ("magnitude_prune_svd", "magnitude_prune")])
def test_methods_on_whole_updates_know_scalings_before_they_prune(whole, of_tensors):
    parts = [random_adapter(1, scaling=0.5), random_adapter(2, scaling=3.0), random_adapter(3)]
    pruned = [trimmed(update(part), 0.4) for part in parts]
    if of_tensors == "ties":
        wanted = elected(pruned, WEIGHTS, "total")
    else:
        wanted = sum(w * one for w, one in zip(WEIGHTS, pruned, strict=True))
    combined = combine(parts, WEIGHTS, whole, 0.4, rank=5)
    np.testing.assert_allclose(update(combined), wanted, rtol=0, atol=1e-9)


@pytest.mark.parametrize("method", PRUNING)
def test_a_seed_decides_and_a_module_of_one_adapter_is_left_alone_by_others(method):
    first, second = random_adapter(1), random_adapter(2, names=("q_proj",))
    combined, again = (combine([first, second], [1, 1], method, 0.5, rng=7) for _ in range(2))
    for name in ("q_proj", "v_proj"):
        np.testing.assert_array_equal(update(combined, name), update(again, name))
    other = combine([first, second], [1, 1], method, 0.5, rng=8)
    assert np.array_equal(update(combined), update(other)) == (not method.startswith("dare"))
    zero = adapter_of(q_proj=second.tensors["q_proj"], v_proj=(np.zeros((3, 5)), np.zeros((6, 3)), 1.0))
    if not method.startswith("dare"):  # which would draw for the zeros too
        spelled_out = combine([first, zero], [1, 1], method, 0.5)
        np.testing.assert_allclose(update(combined, "v_proj"), update(spelled_out, "v_proj"), rtol=0, atol=1e-12)


# directories


@pytest.mark.parametrize(
    ("name", "leaf"), [("combined/qwen2/c", True), ("variants/qwen2_rank_alpha_pattern", True),
                       ("variants/qwen2_embed", True), ("variants/qwen2_exclude_modules", False),
                       ("variants/qwen2_layers_to_transform", False), ("variants/qwen2_regex_target", False)]
)  # fmt: skip
def test_written_and_read_again_nothing_changes(reference, tmp_path, raw_tensors, name, leaf):
    adapter = read_adapter(reference / name)
    write_adapter(adapter, tmp_path, "base")
    again, config = read_adapter(tmp_path), json.loads((tmp_path / "adapter_config.json").read_text())
    before, after = (raw_tensors(path / "adapter_model.safetensors") for path in (reference / name, tmp_path))
    before = {key: value for key, value in before.items() if not key.endswith("base_layer.weight")}
    assert set(before) == set(after)
    for key in before:
        np.testing.assert_array_equal(before[key], after[key])
    assert {path: part[2] for path, part in adapter.tensors.items()} == pytest.approx(
        {path: part[2] for path, part in again.tensors.items()}
    )
    assert base_name(tmp_path) == "base"
    targets = {path.rpartition(".")[2] if leaf else path for path in adapter.tensors}
    assert set(config["target_modules"]) == targets


def test_ranks_and_alphas_by_pattern_count(reference):
    folder = reference / "variants" / "qwen2_rank_alpha_pattern"
    adapter, peft = read_adapter(folder), json.loads((folder / "adapter_config.json").read_text())
    ranks, alphas = {}, {}
    for path, (a, _, scaling) in adapter.tensors.items():
        for key, values, default in (("rank_pattern", ranks, peft["r"]), ("alpha_pattern", alphas, peft["lora_alpha"])):
            fitting = [value for end, value in peft[key].items() if re.search(rf"(^|\.)({end})$", path)]
            values[path] = fitting[0] if fitting else default
        assert len(a) == ranks[path] and scaling == pytest.approx(alphas[path] / ranks[path])
    assert len(set(ranks.values())) > 1 and len(set(alphas.values())) > 1
    combined = combine([adapter, adapter], [0.5, 0.25], "cat")
    assert len({len(part[0]) for part in combined.tensors.values()}) == 1
    for name in adapter.tensors:
        np.testing.assert_allclose(update(combined, name), 0.75 * update(adapter, name), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "narrowed",
    [
        {"target_modules": "q_proj"},
        {"target_modules": ("layers.0.q_proj",)},
        {"exclude_modules": ("layers.1.q_proj",)},
        {"exclude_layers": ("layers.1",)},
        {"layers_to_transform": (0,)},
    ],
)
def test_whole_paths_are_written_where_leaf_names_would_say_too_much(tmp_path, narrowed):
    wide = random_adapter(1, names=("layers.0.v_proj", "layers.1.v_proj"))
    wide = Adapter(LoraConfig(target_modules=("v_proj",)), wide.tensors)
    narrow = random_adapter(2, names=("layers.0.q_proj",))
    narrow = Adapter(LoraConfig(**{"target_modules": ("q_proj",), **narrowed}), narrow.tensors)
    combined = combine([wide, narrow], [1, 1], "cat")
    write_adapter(combined, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["target_modules"] == ["layers.0.q_proj", "layers.0.v_proj", "layers.1.v_proj"]
    assert combined.config.target_modules == tuple(config["target_modules"])


@pytest.mark.parametrize(
    ("variant", "word"),
    [
        ("qwen2_dora", "DoRA"),
        ("qwen2_adalora", "AdaLoRA"),
        ("qwen2_lora_bias", "lora_bias"),
        ("qwen2_bias_all", "bias: all"),
        ("qwen2_modules_to_save_norms", "modules_to_save: norm, input_layernorm"),
        ("qwen2_trainable_tokens", "trainable_token_indices"),
        ("qwen2_pissa", "init_lora_weights pissa changed the base weights"),
        ("qwen2_olora", "init_lora_weights olora changed the base weights"),
    ],
)
def test_what_is_more_than_lora_is_refused(reference, variant, word):
    folder = reference / "variants" / variant
    message = error_of(read_adapter, folder)
    assert message.startswith(f"{folder}: ") and word in message and "\n" not in message


def test_a_damaged_directory_is_refused_with_every_fault(reference, tmp_path):
    from safetensors.numpy import load_file, save_file

    assert error_of(read_adapter, tmp_path) == f"{tmp_path}: no adapter here: adapter_config.json is missing"
    shutil.copytree(reference / "combined" / "qwen2" / "a", tmp_path, dirs_exist_ok=True)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    name = "base_model.model.model.layers.0.self_attn"
    del tensors[f"{name}.q_proj.lora_A.weight"]
    tensors[f"{name}.v_proj.lora_A.weight"] = np.full((3, 64), np.nan, np.float32)
    tensors["base_model.model.lm_head.weight"] = np.zeros((2, 2), np.float32)
    save_file(tensors, file)
    message = error_of(read_adapter, tmp_path)
    for part in (
        "v_proj.lora_A.weight holds NaN",
        "model.layers.0.self_attn.q_proj has {'lora_B.weight': (64, 4)}, should have A and B of rank 4",
        "model.layers.0.self_attn.v_proj has {'lora_A.weight': (3, 64)",
        "base_model.model.lm_head.weight is no factor of LoRA",
    ):
        assert part in message
    save_file({}, file)
    assert error_of(read_adapter, tmp_path) == f"{tmp_path}: cannot be combined: it holds no LoRA tensor"


def test_numbers_that_are_not_finite_are_not_written(tmp_path):
    a, b, _ = random_adapter(1).tensors["q_proj"]
    adapter = adapter_of(q_proj=(a, b * np.inf, 1.0))
    assert "q_proj holds NaN or infinity" in error_of(write_adapter, adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("adapters", "weights", "method", "options", "words"),
    [
        ("ab", (1, 1), "tis", {}, "method 'tis' is none of linear, cat, svd, ties"),
        ("", (), "cat", {}, "0 adapters and 0 weights"),
        ("ab", (1,), "cat", {}, "2 adapters and 1 weights: give one weight for each adapter"),
        ("ab", (1, float("nan")), "cat", {}, "weights must be finite, got 1, nan"),
        ("ad", (1, 1), "linear", {}, "q_proj has 4 in adapter 1 and 2 in adapter 2; use cat or svd"),
        ("ad", (1, 1), "ties", {"density": 0.5}, "needs equal ranks: model.layers.0.self_attn.q_proj has 4"),
        ("ad", (1, 1), "dare_ties", {"density": 0.5}, "use dare_ties_svd"),
        ("ab", (1, 1), "linear", {"density": 0.5}, "density 0.5 means nothing to method linear"),
        ("ab", (1, 1), "ties", {"density": 0.0}, "density must be above 0 and at most 1, got 0.0"),
        ("ab", (1, 1), "ties", {"density": 1.5}, "density must be above 0 and at most 1, got 1.5"),
        ("ab", (1, 1), "cat", {"rank": 2}, "method cat cannot choose a rank: leave rank 2 out, or use svd"),
        ("ab", (1, 1), "ties", {"density": 0.5, "rank": 2}, "leave rank 2 out, or use ties_svd"),
        ("ab", (1, 1), "svd", {"rank": 0}, "rank must be at least 1, got 0"),
        ("ab", (1, 1), "ties", {"density": 0.5, "majority_sign_method": "x"}, "'x' is none of total, frequency"),
        *(("ab", (1, 1), method, {}, f"method {method} needs density") for method in PRUNING),
    ],
)
def test_what_cannot_be_asked_for_is_refused(stored, adapters, weights, method, options, words):
    assert words in error_of(combine, [stored(one) for one in adapters], weights, method, **options)


def test_adapters_of_different_models_are_refused():
    rng = np.random.default_rng(0)
    other = adapter_of(q_proj=(rng.standard_normal((3, 8)), rng.standard_normal((6, 3)), 1.0))
    message = error_of(combine, [random_adapter(1), other], [1, 1], "cat")
    assert message == (
        "the adapters are made for different models: q_proj is [6, 5] in adapter 1 and [6, 8] in adapter 2"
    )
    assert "empty" in error_of(combine, [Adapter(LoraConfig(), {})], [1], "cat")
