"""Short runs of the reference models on the rows of the reference traces."""

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

TIMES = ("tokens_per_second", "step_time_s", "wait_share", "peak_memory_mb", "eval_time_s")


@dataclass
class Finished:
    """A run that ended: where, its records without times, and its adapter."""

    path: Path
    outcome: object
    records: list[dict]
    adapter: dict[str, np.ndarray]

    @property
    def losses(self) -> list[float]:
        return [record["loss"] for record in self.records if "loss" in record]

    @property
    def evaluations(self) -> list[dict]:
        return [record for record in self.records if "eval_loss" in record]


def untimed(path: Path) -> list[dict]:
    """Records of a run without the fields that depend on the clock or the machine."""
    records = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in record.items() if key not in TIMES} for record in records]


@pytest.fixture(scope="session")
def rows(golden) -> list:
    """48 rows of 5 to 16 tokens, named row 0 to row 47."""
    from lora_ms.data.example import TokenRow

    values = golden("trace_qwen2")
    ids, labels = values["input_ids"].reshape(-1, 16), values["labels"].reshape(-1, 16)
    return [TokenRow(f"row {i}", ids[i, :n], labels[i, :n]) for i, n in enumerate(values["lengths"].ravel()[:48])]


@pytest.fixture(scope="session")
def settings() -> Callable:
    """Six steps of eight rows: ``settings(folder, batch_size=4, accumulation=2)``."""
    from lora_ms.train.settings import TrainSettings

    def make(output_dir: Path, **changes):
        plain = {"batch_size": 8, "seq_length": 16, "seed": 7}
        plain |= {"learning_rate": 5e-3, "warmup_steps": 2, "weight_decay": 0.1}
        return TrainSettings(output_dir, **plain | changes)

    return make


@pytest.fixture(scope="session")
def train(graph_mode, reference, rows, settings) -> Callable[..., Finished]:
    """Trains LoRA on qwen2 (or ``name``): ``train(folder, dropout=…, plan={…}, prepare=…, **settings)``.

    plan: fields of the DataPlan to replace. prepare: called with the model before the run. callbacks: the run's.
    held_out: rows to evaluate. sample: the Evaluator's. hooks: StepHooks.
    """
    import mindspore as ms
    from safetensors.numpy import load_file

    from lora_ms.adapters.inject import inject
    from lora_ms.adapters.methods.lora import LoraConfig
    from lora_ms.data.store import TokenStore
    from lora_ms.models.hub import load_directory
    from lora_ms.recipes import train as recipe
    from lora_ms.recipes.data import held_out_plan, plan_rows
    from lora_ms.recipes.outputs import weights_of
    from lora_ms.runtime import device
    from lora_ms.train.evaluation import Evaluator

    def run(
        path, dropout=0.0, plan=None, prepare=None, name="qwen2", dtype=ms.float32, data=rows, callbacks=(),
        held_out=None, sample=None, hooks=(), config=None, **changes,
    ):  # fmt: skip
        path.mkdir(parents=True, exist_ok=True)
        chosen = settings(path, **changes)
        here, _ = device.setup("CPU", seed=chosen.seed, bfloat16=dtype == ms.bfloat16)
        model = load_directory(reference / "models" / name, dtype, operators=here.operators)
        config = LoraConfig(4, 8.0, dropout, "all-linear") if config is None else config
        inject(model, config)
        if prepare is not None:
            prepare(model)
        data_plan = plan_rows(data, None, chosen, here, 128)
        if plan:
            data_plan = dataclasses.replace(data_plan, **plan)
        evaluator = None
        if held_out is not None:
            evaluator = Evaluator(model, held_out_plan(TokenStore.of(held_out), 4, None, 16, here), 128, here, sample)
        weights = weights_of(model, config, None)
        prepared = recipe.NativeRun(
            model, data_plan, chosen, here, weights, hooks=hooks, evaluator=evaluator, callbacks=callbacks
        )
        outcome = recipe.train(prepared)
        return Finished(path, outcome, untimed(path), load_file(path / "adapter" / "adapter_model.safetensors"))

    return run


@pytest.fixture
def poisoned(rows) -> dict:
    """Arguments of ``train``: four rows, of which the third alone has a token whose embedding is no number."""
    data = rows[:4]
    token = next(t for t in data[2].input_ids if not any(t in row.input_ids for row in (data[0], data[1], data[3])))

    def poison(model):
        from mindspore import Tensor

        weight = model.model.embed_tokens.weight.asnumpy().copy()
        weight[token] = np.nan
        model.model.embed_tokens.weight.set_data(Tensor(weight))

    return {"prepare": poison, "data": data}


@pytest.fixture(scope="session")
def plain_run(train, tmp_path_factory) -> Finished:
    """Six steps of 8 x 1 rows, without dropout: what other runs are held against."""
    return train(tmp_path_factory.mktemp("plain"))
