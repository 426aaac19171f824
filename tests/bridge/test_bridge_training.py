"""MindFormers' own trainer through our command line, against our engine: same rows, same start."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import yaml
from numpy.testing import assert_allclose, assert_array_equal

from lora_ms.adapters.peft_format import load_adapter, read_tensors
from lora_ms.commands import check_adapter, convert, convert_adapter, merge
from lora_ms.models.hub import load_directory

pytestmark = [pytest.mark.mindformers, pytest.mark.slow]

LOSS, ADAPTER = 1e-4, 1e-4  # relative; absolute
STEPS = 20


class Runs(NamedTuple):
    """What ``runs.py`` left: its folder, and status and output by run."""

    folder: Path
    status: dict[str, int]
    printed: dict[str, str]

    def records(self, name: str) -> list[dict]:
        lines = (self.folder / name / "metrics.jsonl").read_text().splitlines()
        return [record for record in map(json.loads, lines) if "loss" in record]

    def losses(self, name: str) -> list[float]:
        return [record["loss"] for record in self.records(name)]

    def tensors(self, name: str) -> dict[str, np.ndarray]:
        return read_tensors(self.folder / name / "adapter")

    def scores(self, name: str) -> list[float]:
        """Loss and perplexity of the last evaluation that a run printed."""
        found = re.findall(r"loss ([\d.]+)  perplexity ([\d.]+)  accuracy", self.printed[name])
        return [float(number) for number in found[-1]]


@pytest.fixture(scope="session")
def runs(tmp_path_factory, python_env) -> Runs:
    from importlib.util import find_spec

    for name in ("mindformers", "mindpet"):
        if find_spec(name) is None:
            pytest.skip(f"{name} is not installed")
    folder = tmp_path_factory.mktemp("bridge")
    command = [sys.executable, str(Path(__file__).with_name("runs.py")), str(folder)]
    env = {**python_env, "HOME": str(tmp_path_factory.mktemp("home"))}  # MindPet logs there
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    parts = re.split(r"^== (\w+) (\d+)\n", done.stdout, flags=re.MULTILINE)
    names, statuses, texts = parts[1::3], parts[2::3], parts[3::3]
    return Runs(folder, dict(zip(names, map(int, statuses), strict=True)), dict(zip(names, texts, strict=True)))


def test_every_run_ends_well(runs):
    assert len(runs.status) == 28
    assert {name: runs.printed[name] for name, status in runs.status.items() if status} == {}


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("mindpet_qwen2", "native_qwen2"),
        ("mindpet_llama3", "native_llama3"),
        ("ours_qwen2", "native_qwen2"),
        ("ours_dora", "native_dora"),
    ],
)
def test_losses_and_adapters_are_the_native_engine_s(runs, theirs, ours):
    found, expected = runs.losses(theirs), runs.losses(ours)
    assert len(expected) == (STEPS if "dora" not in ours else 4)
    assert_allclose(found, expected, rtol=LOSS, atol=0)
    trained, tensors = runs.tensors(theirs), runs.tensors(ours)
    assert set(trained) == set(tensors)
    for name, value in tensors.items():
        assert_allclose(trained[name], value, rtol=0, atol=ADAPTER, err_msg=name)
    start = read_tensors(Path(json.loads((runs.folder / "starts.json").read_text())[ours]))
    assert max(np.abs(tensors[name] - start[name]).max() for name in tensors) > 1e-2  # it has moved far from its start
    configs = [json.loads((runs.folder / n / "adapter" / "adapter_config.json").read_text()) for n in (theirs, ours)]
    assert configs[0] == configs[1]


def test_a_file_in_mindformers_layout_is_read_where_it_is(runs):
    assert runs.losses("own_file") == runs.losses("mindpet_qwen2")
    assert not (runs.folder / "own_file" / "mindformers" / "train.mindrecord").exists()
    asked = yaml.safe_load((runs.folder / "own_file" / "mindformers" / "mindformers.yaml").read_text())
    assert asked["train_dataset"]["data_loader"]["dataset_dir"] == "preprocess/train-00000.mindrecord"


def test_a_folder_of_files_is_read_whole_and_in_order(runs):
    assert runs.losses("own_folder") == runs.losses("mindpet_qwen2")
    assert runs.losses("second_of_folder") == runs.losses("second")
    asked = yaml.safe_load((runs.folder / "own_folder" / "mindformers" / "mindformers.yaml").read_text())
    files = [f"preprocess_parts/train-0000{number}.mindrecord" for number in range(4)]
    assert asked["train_dataset"]["data_loader"]["dataset_files"] == files


def test_mindformers_own_weights(runs):
    """A .safetensors file under MindFormers' names, read by MindFormers itself."""
    assert len(runs.losses("own_weights")) == 4
    assert runs.losses("own_weights")[0] == runs.losses("mindpet_qwen2")[0]


def test_a_run_goes_on_from_mindformers_checkpoint(runs):
    """Two halves give what our engine gives in one go: the optimiser's state came along."""
    halves = runs.records("first") + runs.records("second")
    assert [record["step"] for record in halves] == list(range(1, 2 * STEPS + 1))
    assert_allclose([record["loss"] for record in halves], runs.losses("whole"), rtol=LOSS)


def test_what_a_step_reports(runs):
    for theirs, ours in zip(runs.records("mindpet_qwen2"), runs.records("native_qwen2"), strict=True):
        for key in ("step", "epoch", "label_tokens"):
            assert theirs[key] == ours[key]
        assert_allclose(theirs["learning_rate"], ours["learning_rate"], rtol=1e-4, atol=1e-9)
        assert_allclose(theirs["grad_norm"], ours["grad_norm"], rtol=1e-4)
    assert (runs.folder / "mindpet_qwen2" / "loss.png").stat().st_size > 1000


@pytest.mark.parametrize("name", ["mindpet_qwen2", "mindpet_concat", "ours_concat", "ours_groups"])
def test_the_exported_adapter_says_what_mindformers_model_says(runs, name):
    """Joint matrices and ranks by layer, too: MindFormers' model after training, and ours, on the same rows."""
    assert_allclose(runs.scores(f"eval_{name}"), runs.scores(name), rtol=1e-4)


def test_evaluation_with_mindformers_model(runs):
    assert_allclose(runs.scores("eval_mindformers"), runs.scores("eval_mindpet_qwen2"), rtol=1e-4)


def test_joint_matrices_begin_as_the_model_does(runs):
    """Fresh adapters change nothing: the first loss is the bare model's, whatever the layout of its weights."""
    first = [runs.losses(name)[0] for name in ("mindpet_concat", "ours_concat")]
    assert_allclose(first, runs.losses("native_bare")[0], rtol=LOSS)
    tensors = runs.tensors("mindpet_concat")
    a = [tensors[f"base_model.model.model.layers.0.self_attn.{x}_proj.lora_A.weight"] for x in "qkv"]
    assert_array_equal(a[0], a[1])
    assert_array_equal(a[0], a[2])


def test_mindformers_checkpoint_is_the_exported_adapter(runs, reference, tmp_path):
    """MindFormers' own file, with base weights and the optimiser's state beside the adapter."""
    (file,) = (runs.folder / "mindpet_qwen2" / "checkpoint" / "rank_0").glob(f"*_{STEPS}.ckpt")
    convert_adapter.run(str(file), str(tmp_path / "adapter"), lora_alpha=8)
    expected = runs.tensors("mindpet_qwen2")
    found = read_tensors(tmp_path / "adapter")
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert_array_equal(found[name], value, name)
    model = reference / "models" / "qwen2"
    convert.run(str(file), str(tmp_path / "hf"), load_checkpoint=str(model), dtype="float32")
    base, again = (dict(load_directory(path).parameters_and_names()) for path in (model, tmp_path / "hf"))
    for name, value in base.items():
        assert_array_equal(again[name].asnumpy(), value.asnumpy(), name)


def test_other_commands_take_the_adapter(runs, reference, tmp_path, capsys):
    adapter, model = runs.folder / "mindpet_qwen2" / "adapter", reference / "models" / "qwen2"
    assert not check_adapter.run(str(adapter), str(model))
    merge.run(str(adapter), str(tmp_path / "merged"))  # the adapter names its model
    assert (tmp_path / "merged" / "model.safetensors").is_file()


def test_the_published_file(runs):
    """MindFormers' file for Llama 2 7B, sizes from the command line, with either backend."""
    assert len(runs.losses("published_mindformers")) == len(runs.losses("published_native")) == 4
    printed = runs.printed["published_mindformers"]
    for line in (
        "context.device_target is Ascend, but there is none here: running on the CPU",
        "optimizer.type FP32StateAdamWeightDecay, which MindFormers has dropped: its AdamW instead",
        "callbacks without ObsMonitor, which MindFormers has dropped",
        "on the CPU: model_config.use_flash_attention False",
        "on the CPU: model_config.fused_rms_norm False",
        "on the CPU: model_config.use_rope_slice True",
        "on the CPU: all types float32, in place of compute_dtype float16, param_init_type float16, "
        "softmax_compute_type float16, rotary_dtype float16",
        "on the CPU: runner_config.sink_mode False",
        "on the CPU: runner_wrapper PortableTrainOneStepCell, in place of MFTrainOneStepCell",
        "on the CPU: context without max_device_memory, save_graphs, save_graphs_path",
    ):
        assert line in printed
    if (os.cpu_count() or 1) < 8:
        assert "on the CPU: train_dataset.num_parallel_workers" in printed
    # what the file says of these reaches MindFormers as it stands
    given = yaml.safe_load(Path(__file__).with_name("lora_llama2_7b.yaml").read_text())
    asked = yaml.safe_load((runs.folder / "published_mindformers" / "mindformers" / "mindformers.yaml").read_text())
    for section in ("parallel", "parallel_config", "recompute_config", "trainer", "metric"):
        assert asked[section] == given[section]
    assert asked["lr_schedule"] == {**given["lr_schedule"], "total_steps": 4}  # max_steps is 4
    assert asked["runner_wrapper"]["use_clip_grad"] is True
    assert [callback["type"] for callback in asked["callbacks"]] == ["MFLossMonitor", "CheckpointMonitor"]
    assert asked["optimizer"]["betas"] == [0.9, 0.999]


def test_the_terminal_is_ours_and_the_log_has_the_noise(runs):
    printed = runs.printed["mindpet_qwen2"]
    assert len(re.findall(r"^step +\d+/20  epoch ", printed, re.MULTILINE)) == STEPS
    assert "INFO" not in printed and "WARNING" not in printed and "mindpet_delta" not in printed
    log = (runs.folder / "mindpet_qwen2" / "run.log").read_text()
    assert "Starting Training Model" in log and "[SDK]" not in printed
    for line in printed.strip().splitlines():
        assert line in log


def test_a_run_can_be_read_back(runs):
    """config.yaml holds MindFormers' sections beside ours, and gives the same configuration."""
    from lora_ms.config import load_config

    config = load_config(str(runs.folder / "mindpet_qwen2" / "config.yaml"))
    assert config.backend == "mindformers"
    assert config.mindformers_sections["callbacks"][1]["prefix"] == "x"
    assert config.mindformers_sections["lr_schedule"]["learning_rate"] == 2e-2


@pytest.mark.peft
def test_peft_reads_the_adapter(runs, reference, tmp_path):
    """Logits of transformers and PEFT with the exported adapter, and ours."""
    from mindspore import Tensor

    live = os.environ.get("LORA_MS_TORCH_PYTHON")
    if not live:
        pytest.skip("no LORA_MS_TORCH_PYTHON")
    model_dir = reference / "models" / "qwen2"
    for name in ("mindpet_qwen2", "mindpet_concat", "ours_dora"):
        adapter, out = runs.folder / name / "adapter", tmp_path / f"{name}.npz"
        command = [live, str(reference / "live_peft.py"), str(model_dir), str(adapter), str(out)]
        subprocess.run(command, check=True, capture_output=True)
        with np.load(out) as arrays:
            ids, expected = arrays["input_ids"], arrays["logits"]
        model = load_directory(model_dir)
        load_adapter(model, adapter)
        assert_allclose(model.set_train(False)(Tensor(ids)).asnumpy(), expected, rtol=0, atol=1e-4)
