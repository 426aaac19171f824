"""The names of a training run's graphs: whatever changes what is computed changes a name."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor

from lora_ms.adapters.inject import inject
from lora_ms.adapters.methods.adalora import AdaLoraConfig
from lora_ms.adapters.methods.ia3 import IA3Config
from lora_ms.adapters.methods.lora import LoraConfig
from lora_ms.data.example import TokenRow
from lora_ms.infer.cached_model import CachedModel
from lora_ms.models.decoder import CausalLM
from lora_ms.models.hub import load_directory
from lora_ms.ops import PORTABLE
from lora_ms.recipes import train as recipe
from lora_ms.recipes.data import plan_rows
from lora_ms.recipes.outputs import weights_of
from lora_ms.runtime import graph_digest
from lora_ms.runtime.device import Runtime
from lora_ms.train.gradient import MicroStep
from lora_ms.train.settings import TrainSettings

LORA = LoraConfig(4, 8.0, 0.0, "q_proj|v_proj")


@pytest.fixture(scope="module")
def names(reference, runtime, tmp_path_factory) -> Callable[..., tuple[str, str]]:
    """``names(config, model=…, dtype=…, operators=…, length=…, **settings)``: of the gradient's graphs, and the
    optimiser's. length: tokens of a row."""
    folder = tmp_path_factory.mktemp("names")

    def find(config=LORA, model="qwen2", dtype=ms.float32, operators=runtime.operators, length=12, **changes):
        ids = np.random.default_rng(0).integers(5, 128, (8, length)).astype(np.int32)
        data = [TokenRow(f"row {i}", row, row) for i, row in enumerate(ids)]
        plain = {"batch_size": 2, "seq_length": 64, "packing": False, "length_buckets": 1, "max_steps": 2}
        settings = TrainSettings(folder, **plain | changes)
        here = replace(runtime, operators=operators)
        built = load_directory(reference / "models" / model, dtype, operators=operators)
        hook = None
        if config is not None:
            trained = config.for_run(2)
            inject(built, trained)
            hook = trained.step_hook(built)
        plan = plan_rows(data, None, settings, here, 128)
        hooks = [] if hook is None else [hook]
        run = recipe.NativeRun(built, plan, settings, here, weights_of(built, config, None, hook), hooks=hooks)
        steps = run.loop.steps
        batches, _ = plan.step(0)
        with nullcontext() if steps.noise is None else steps.noise.on(length):
            of_step = name_of_step(steps.micro_step, tuple(map(Tensor, batches[0][:4])))
        of_optimizer = graph_digest.graph_digest(steps.optimizer, (Tensor(0.0, ms.float32), Tensor(1.0, ms.float32)))
        steps.close()
        return of_step, of_optimizer

    return find


def name_of_step(step: MicroStep, batch: tuple[Tensor, ...]) -> str:
    """Of its graph; where the layers below the last are an operator, which is in none, of all that it has."""
    graphs = (step,) if step.shared is None else (step.inputs, step.top, step.accumulate)
    return " ".join(graph_digest.graph_digest(graph, batch) for graph in graphs)


@pytest.fixture(scope="module")
def plain(names) -> tuple[str, str]:
    return names()


@pytest.mark.parametrize(
    "changes",
    [
        {"config": replace(LORA, lora_rank=8)},
        {"config": replace(LORA, lora_alpha=16.0)},
        {"config": replace(LORA, lora_dropout=0.1)},
        {"config": replace(LORA, target_modules="q_proj")},
        {"config": replace(LORA, target_modules="q_proj|k_proj")},
        {"config": replace(LORA, layers_to_transform=[0])},
        {"config": replace(LORA, rank_pattern={"v_proj": 2})},
        {"config": replace(LORA, alpha_pattern={"v_proj": 2.0})},
        {"config": replace(LORA, use_dora=True)},
        {"config": replace(LORA, bias="all")},
        {"config": replace(LORA, lora_bias=True)},
        {"config": replace(LORA, modules_to_save=["norm"])},
        {"config": AdaLoraConfig(target_modules="q_proj|v_proj", lora_rank=4, target_rank=2)},
        {"config": IA3Config(target_modules="q_proj|v_proj", feedforward_modules=[])},
        {"config": None},
        {"model": "qwen3"},
        {"dtype": ms.float16},
        {"operators": PORTABLE},
        {"batch_size": 4},
        {"length": 24},
        {"recompute": 1},
        {"eps": 1e-2},
        {"weight_decay": 0.5},
        {"betas": (0.9, 0.99)},
        {"betas": (0.8, 0.999)},
        {"max_grad_norm": 0.5},
        {"max_grad_norm": None},
        {"loraplus_lr_ratio": 16.0},
        {"neftune_noise_alpha": 5.0},
    ],
    ids=" ".join,
)
def test_a_change_of_what_is_computed_is_a_miss(names, plain, changes):
    assert names(**changes) != plain


@pytest.mark.parametrize(
    "changes",
    [
        {"learning_rate": 0.5},
        {"seed": 3},
        {"warmup_steps": 1},
        {"accumulation": 2},
        {"max_steps": 1},
        {"save_steps": 1},
        {"config": replace(LORA, use_rslora=True)},
    ],
    ids=" ".join,
)
def test_what_the_graphs_are_given_at_each_step_is_no_miss(names, plain, changes):
    """Rates, draws, the update's scaling and the number of micro-batches go in as numbers: the graphs are the same."""
    assert names(**changes) == plain


@pytest.mark.parametrize("change", [{"loss_scale": 2.0}, {"dynamic_scale": False}, {"scale_window": 7}], ids=" ".join)
def test_loss_scaling_is_in_the_name_of_a_run_in_float16(names, change):
    """But for the first scale, which is the value of a parameter."""
    before = names(dtype=ms.float16)
    assert (names(dtype=ms.float16, **change) == before) == ("loss_scale" in change)


def generation(folder: Path, dtype=ms.float32, batch: int = 1, length: int = 64, adapter=None) -> str:
    model = load_directory(folder, dtype, operators=PORTABLE)
    if adapter is not None:
        inject(model, adapter)
    graph = CachedModel(model, batch, length).whole
    lines = Tensor(np.zeros(batch, np.int32))
    return graph_digest.graph_digest(graph, (Tensor(np.zeros((batch, 32), np.int32)), *[lines] * 5))


def test_generation(reference):
    folder = reference / "models" / "qwen2"
    before = generation(folder)
    assert before == generation(folder)
    others = [
        generation(folder, ms.float16),
        generation(folder, batch=2),
        generation(folder, length=128),
        generation(folder, adapter=LORA),
        generation(folder, adapter=replace(LORA, lora_alpha=16.0)),
        generation(reference / "models" / "llama3"),
    ]
    assert len({before, *others}) == 1 + len(others)


class Device:
    """MindSpore's settings, of which one is another."""

    def __init__(self, **changed):
        self.changed = changed

    def __call__(self, key: str):
        return self.changed.get(key, REAL(key))


REAL = ms.get_context


@pytest.mark.parametrize("changed", [{"device_target": "Ascend"}, {"deterministic": "ON"}, {"max_call_depth": 7}])
def test_device_and_settings_of_mindspore(reference, monkeypatch, changed):
    folder = reference / "models" / "qwen2"
    before = generation(folder)
    monkeypatch.setattr(ms, "get_context", Device(**changed))
    assert generation(folder) != before


def test_rank_and_number_of_processes(reference):
    model: CausalLM = load_directory(reference / "models" / "qwen2", operators=PORTABLE)
    ids = (Tensor(np.zeros((1, 4), np.int32)),)
    found = {graph_digest.graph_digest(model, ids, process) for process in ((0, 1), (0, 2), (1, 2), (1, 4))}
    assert len(found) == 4


def test_the_compiled_operators_are_in_the_name(reference, runtime, native, tmp_path):
    """Their library is named by a digest of processor, compiler and sources; another name is another graph."""
    from lora_ms.ops import select

    folder = reference / "models" / "qwen2"
    model = load_directory(folder, operators=native)
    other = load_directory(folder, operators=select("CPU", False, str(tmp_path / "operators-other.so")))
    ids = (Tensor(np.zeros((1, 4), np.int32)),)
    assert graph_digest.graph_digest(model, ids) != graph_digest.graph_digest(other, ids)
    assert Runtime("CPU", operators=native).operators.name == "native"
