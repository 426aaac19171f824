"""IA3: its formula, its settings, its files, and several by name."""

import json

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn, ops
from safetensors.numpy import load_file

import lora_ms
from lora_ms.adapters.combine import read_adapter
from lora_ms.adapters.inject import adapted_layers, inject
from lora_ms.adapters.methods.ia3 import IA3Config, IA3Spec
from lora_ms.adapters.methods.ia3_cells import IA3Dense
from lora_ms.adapters.peft_format import load_adapter, save_adapter
from lora_ms.cli import main as cli
from lora_ms.errors import LoraMsError
from lora_ms.models.hub import load_directory

pytestmark = pytest.mark.usefixtures("graph_mode")
RNG = np.random.default_rng(8)
T, IN, OUT = 4, 6, 5
W, BIAS, X, WEIGHTS = (RNG.standard_normal(shape) for shape in ((OUT, IN), OUT, (T, IN), (T, OUT)))
L = {False: RNG.uniform(0.5, 2, (OUT, 1)), True: RNG.uniform(0.5, 2, (1, IN))}
PREFIX = "base_model.model."
K0, DOWN0, UP0 = (f"model.layers.0.{name}" for name in ("self_attn.k_proj", "mlp.down_proj", "mlp.up_proj"))


def f32(x: np.ndarray) -> Tensor:
    return Tensor(np.asarray(x, np.float32))


def error_of(function, *args, **kwargs) -> str:
    with pytest.raises(LoraMsError) as caught:
        function(*args, **kwargs)
    message = str(caught.value)
    assert "\n" not in message
    return message


def formula(x: np.ndarray, scale: np.ndarray, feedforward: bool) -> np.ndarray:
    return (x * scale) @ W.T + BIAS if feedforward else (x @ W.T + BIAS) * scale[:, 0]


class Gradients(nn.Cell):
    """The output, and the gradients in x and l of its sum with fixed weights."""

    def __init__(self, layer: nn.Cell):
        super().__init__()
        self.layer, self.weights = layer, f32(WEIGHTS)
        self.grad = ops.value_and_grad(self.weighted, 0, [layer.ia3_l], has_aux=True)

    def weighted(self, x):
        y = self.layer(x)
        return (y * self.weights).sum(), y

    def construct(self, x):
        return self.grad(x)


@pytest.mark.parametrize("feedforward", [False, True])
def test_values_gradients_and_merging(numerical_gradient, operators, feedforward):
    scale = L[feedforward]
    layer = IA3Dense(nn.Dense(IN, OUT, f32(W), f32(BIAS)), feedforward, operators=operators)
    np.testing.assert_array_equal(layer(f32(X)).asnumpy(), layer.base(f32(X)).asnumpy())
    layer.ia3_l.set_data(f32(scale))
    (_, y), (d_x, (d_l,)) = Gradients(layer)(f32(X))
    np.testing.assert_allclose(y.asnumpy(), formula(X, scale, feedforward), rtol=0, atol=2e-5)
    for found, value, number in (
        (d_x, X, lambda x: (formula(x, scale, feedforward) * WEIGHTS).sum()),
        (d_l, scale, lambda l: (formula(X, l, feedforward) * WEIGHTS).sum()),  # noqa: E741
    ):
        np.testing.assert_allclose(found.asnumpy(), numerical_gradient(number, value), rtol=0, atol=5e-5)
    merged = layer.merge()
    assert type(merged) is nn.Dense
    np.testing.assert_allclose(merged.weight.asnumpy(), W * scale, rtol=0, atol=1e-6)
    np.testing.assert_allclose(merged(f32(X)).asnumpy(), formula(X, scale, feedforward), rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("settings", "feedforward"),
    [
        ({}, {DOWN0}),
        ({"feedforward_modules": ()}, set()),
        ({"feedforward_modules": "up_proj|k_proj"}, {UP0, K0}),
        ({"feedforward_modules": "w3"}, {UP0}),  # MindFormers' name of up_proj
        ({"feedforward_modules": r".*layers\.1\..*"}, set()),
        ({"target_modules": ["mlp.up_proj"], "feedforward_modules": ["mlp.up_proj"]}, {UP0}),
    ],
)
def test_which_modules_scale_their_input(settings, feedforward):
    config = IA3Config(**settings)
    assert {name for name in (K0, DOWN0, UP0) if config.spec(name).feedforward} == feedforward


def test_feedforward_modules_are_targets():
    """As in PEFT, where both are lists."""
    assert error_of(IA3Config, ["k_proj"], feedforward_modules=["down_proj"]) == (
        "feedforward_modules down_proj must be among target_modules k_proj: add them"
    )


def test_it_has_no_rank(capsys):
    with pytest.raises(LoraMsError, match="unknown argument lora_rank"):
        IA3Config(lora_rank=4)
    flags = ["--load_checkpoint", ".", "--train_dataset_dir", ".", "--pet_config.pet_type", "ia3"]
    assert cli.main(["finetune", *flags, "--pet_config.lora_rank", "4"]) == 2
    assert "lora_rank with pet_type ia3: leave them out, or set pet_type: lora or adalora" in capsys.readouterr().err


def moved(model: nn.Cell) -> nn.Cell:
    """Vectors away from one."""
    rng = np.random.default_rng(3)
    for cell in adapted_layers(model).values():
        cell.ia3_l.set_data(f32(1 + 0.3 * rng.standard_normal(cell.ia3_l.shape)))
    return model


def test_what_is_written(bare, tmp_path):
    model, config = bare(), IA3Config()
    report = inject(model, config)
    assert report.line().startswith("IA3 on 6 modules: 320 of ")  # 2 layers: 32 + 32 of k and v, 96 of down's input
    save_adapter(model, tmp_path, config, "models/some")
    assert json.loads((tmp_path / "adapter_config.json").read_text()) == {
        "peft_type": "IA3",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "models/some",
        "inference_mode": True,
        "target_modules": ["down_proj", "k_proj", "v_proj"],
        "feedforward_modules": ["down_proj"],
        "exclude_modules": None,
        "modules_to_save": None,
        "init_ia3_weights": True,
        "fan_in_fan_out": False,
    }
    shapes = {name: value.shape for name, value in load_file(tmp_path / "adapter_model.safetensors").items()}
    assert len(shapes) == 6
    assert shapes[f"{PREFIX}{K0}.ia3_l"] == (32, 1) and shapes[f"{PREFIX}{DOWN0}.ia3_l"] == (1, 96)


def test_modules_of_one_name_and_of_both_kinds_are_written_by_path(bare, tmp_path):
    """PEFT takes feedforward_modules by the ends of paths, too."""
    model, config = bare(), IA3Config(target_modules="o_proj", feedforward_modules=r".*layers\.1\..*")
    inject(model, config)
    save_adapter(moved(model), tmp_path, config)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    paths = [f"model.layers.{n}.self_attn.o_proj" for n in (0, 1)]
    assert (written["target_modules"], written["feedforward_modules"]) == (paths, paths[1:])
    again = bare()
    load_adapter(again, tmp_path)
    assert {name: cell.spec for name, cell in adapted_layers(again).items()} == {
        paths[0]: IA3Spec(False),
        paths[1]: IA3Spec(True),
    }


def test_not_on_the_embedding(bare):
    model = bare()
    before = {name: type(cell) for name, cell in model.cells_and_names()}
    message = error_of(inject, model, IA3Config(target_modules=("k_proj", "embed_tokens")))
    assert message == "IA3 adapts dense layers and the head, not the embedding: leave it out of target_modules"
    assert {name: type(cell) for name, cell in model.cells_and_names()} == before


def test_vectors_that_start_from_normal_numbers(bare):
    model = bare()
    ms.set_seed(2)
    inject(model, IA3Config(init_ia3_weights=False))
    values = np.concatenate([cell.ia3_l.asnumpy().ravel() for cell in adapted_layers(model).values()])
    np.testing.assert_allclose([values.mean(), values.std()], [0, 1], atol=0.15)


def test_it_cannot_be_combined(reference):
    path = reference / "variants" / "qwen2_ia3"
    assert error_of(read_adapter, path) == (f"{path}: an adapter with IA3 cannot be combined: only LoRA and rsLoRA can")


def test_several_by_name(reference, golden):
    """Switched without compiling, merged, taken back, and not in one batch with others."""
    values = golden("variants/qwen2_ia3")
    ids = Tensor(values["input_ids"])
    model = lora_ms.AutoModelForCausalLM.from_pretrained(reference / "models" / "qwen2")
    peft = lora_ms.PeftModel.from_pretrained(model, reference / "variants" / "qwen2_ia3", "a")
    peft.add_adapter("fresh", lora_ms.IA3Config())
    peft.load_adapter(reference / "combined" / "qwen2" / "a", "lora")
    for name, wanted in (("fresh", "base_logits"), ("a", "logits"), ("fresh", "base_logits"), ("a", "logits")):
        peft.set_adapter(name)
        np.testing.assert_allclose(peft(ids).asnumpy(), values[wanted], rtol=0, atol=1e-4)
    assert len(peft.graphs) == 1
    peft.merge_adapter()
    np.testing.assert_allclose(peft(ids).asnumpy(), values["merged_logits"], rtol=0, atol=1e-4)
    peft.unmerge_adapter()
    message = error_of(peft, ids, adapter_names=["a", "lora"])
    assert message.startswith("adapter 'a' cannot share a batch with others: model.layers.0.")
    assert error_of(peft.add_weighted_adapter, ["a", "lora"], [1, 1], "sum") == (
        "an adapter with IA3 cannot be combined: only LoRA and rsLoRA can"
    )


@pytest.mark.parametrize("name", ["llama3_ia3", "qwen2_ia3", "qwen3_ia3", "qwen2_ia3_regex", "qwen3_ia3_lm_head"])
def test_merged_offline(reference, golden, tmp_path, name):
    values = golden(f"variants/{name}")
    base = reference / "models" / name.partition("_")[0]
    words = ["--load_adapter", reference / "variants" / name, "--load_checkpoint", base]
    words += ["--output_dir", tmp_path / "merged", "--dtype", "float32"]
    assert cli.main(["merge", *map(str, words)]) == 0
    logits = load_directory(tmp_path / "merged").set_train(False)(Tensor(values["input_ids"])).asnumpy()
    np.testing.assert_allclose(logits, values["merged_logits"], rtol=0, atol=1e-4)


def test_check_adapter(reference, bare, tmp_path, capsys):
    path = reference / "variants" / "qwen2_ia3"
    words = ["check-adapter", "--load_adapter", str(path), "--load_checkpoint", str(reference / "models" / "qwen2")]
    assert cli.main(words) == 0
    table = capsys.readouterr().out
    for line in (
        "settings        ok       IA3",
        "6 tensors, IA3 on 6 modules: down_proj, k_proj, v_proj",
        "l not one       ok       all 6 modules change something",
        "vLLM: kind      warning  vLLM does not serve IA3; merge it instead: lora-ms",
    ):
        assert line in table
    assert "rank" not in table
    model = bare()
    inject(model, IA3Config())
    save_adapter(model, tmp_path, IA3Config())
    assert cli.main(["check-adapter", "--load_adapter", str(tmp_path)]) == 2
    assert "l not one       fault    every l is one: IA3 changes nothing" in capsys.readouterr().out
