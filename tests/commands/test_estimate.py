"""The estimate against real runs, and what it says of machines that are not here."""

import json
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from lora_ms import storage
from lora_ms.adapters.methods.base import Cost
from lora_ms.runtime import host, memory_estimate

LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 8192, "hidden_size": 512,
    "intermediate_size": 1408, "num_hidden_layers": 3, "num_attention_heads": 8, "num_key_value_heads": 8,
    "tie_word_embeddings": False,
}  # fmt: skip
QWEN = {
    "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "vocab_size": 16000, "hidden_size": 384,
    "intermediate_size": 1536, "num_hidden_layers": 5, "num_attention_heads": 6, "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}  # fmt: skip
RUNS = [(name, length, again) for name in ("llama", "qwen") for length, again in ((128, 0), (512, 0), (512, 1))]
CHILD = """
import sys
from lora_ms.cli.main import main
status = main(sys.argv[1:])
print("peak", open("/proc/self/status").read().partition("VmHWM:")[2].split()[0])
sys.exit(status)
"""


def sizes_of(config: dict) -> SimpleNamespace:
    heads = config["num_attention_heads"]
    bias = config["model_type"] == "qwen2"
    return SimpleNamespace(**config, head_dim=config["hidden_size"] // heads, attention_bias=bias, windows=(0,))


def write_model(folder, config: dict) -> None:
    from safetensors.numpy import save_file

    sizes = sizes_of(config)
    rng = np.random.default_rng(0)
    dense = memory_estimate.modules(sizes)
    shapes = {f"{name}.weight": (outputs, inputs) for name, (inputs, outputs) in dense.items()}
    shapes["model.embed_tokens.weight"] = dense["model.embed_tokens"]
    if sizes.tie_word_embeddings:
        del shapes["lm_head.weight"]
    tensors = {name: rng.standard_normal(shape, np.float32) * np.float32(0.02) for name, shape in shapes.items()}
    ones = np.ones(sizes.hidden_size, np.float32)
    tensors["model.norm.weight"] = ones
    for i in range(sizes.num_hidden_layers):
        tensors |= {f"model.layers.{i}.{n}_layernorm.weight": ones for n in ("input", "post_attention")}
        if sizes.attention_bias:
            for n in "qkv":
                outputs = dense[f"model.layers.{i}.self_attn.{n}_proj"][1]
                tensors[f"model.layers.{i}.self_attn.{n}_proj.bias"] = np.zeros(outputs, np.float32)
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    assert sum(value.size for value in tensors.values()) == memory_estimate.parameters(sizes)


def test_estimates_and_measured_peaks(tmp_path, python, python_env, capsys):
    """Six runs, each in a process of its own: within 15 percent."""
    from lora_ms.config import load_config
    from lora_ms.recipes.estimate import job_of
    from lora_ms.recipes.model import read_sizes

    for name, config in (("llama", LLAMA), ("qwen", QWEN)):
        write_model(tmp_path / name, config)
    rng = np.random.default_rng(1)
    found = []
    for number, (name, length, again) in enumerate(RUNS):
        rows = tmp_path / f"rows{length}.jsonl"
        ids = rng.integers(3, 8000, (16, length)).tolist()
        rows.write_text("".join(json.dumps({"input_ids": row, "labels": row}) + "\n" for row in ids))
        flags = {
            "load_checkpoint": str(tmp_path / name), "train_dataset.data_loader.dataset_dir": str(rows),
            "model.model_config.seq_length": length, "runner_config.batch_size": 2, "runner_config.max_steps": 2,
            "context.device_target": "CPU", "recompute_config.recompute": bool(again),
            "output_dir": str(tmp_path / f"out{number}"),
        }  # fmt: skip
        command = [python, "-c", CHILD, "finetune", "--options", *(f"{key}={value}" for key, value in flags.items())]
        command += ["--load_checkpoint", flags["load_checkpoint"]]
        child = subprocess.run(command, env=python_env, capture_output=True, text=True, check=True)
        assert "memory: about" in child.stdout and f"lines of {length} tokens, 2 per micro-batch" in child.stdout
        config = load_config(None, flags=flags)
        job = job_of(config, read_sizes(config), "CPU")
        found.append((memory_estimate.estimate(job).total, int(child.stdout.split()[-1]) / 2**10))
    table = [f"{'model':8}{'length':>8}{'again':>7}{'estimate':>10}{'measured':>10}{'off':>7}"]
    for (name, length, again), (expected, measured) in zip(RUNS, found, strict=True):
        table.append(f"{name:8}{length:8}{again:7}{expected:10.0f}{measured:10.0f}{expected / measured - 1:7.1%}")
    with capsys.disabled():  # stderr, which a worker of pytest-xdist passes on
        print("", *table, sep="\n", file=sys.stderr)
    for expected, measured in found:
        assert abs(expected / measured - 1) < 0.15


OPTIMIZER = """
import sys
import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor
from lora_ms.runtime.device import setup
from lora_ms.train.optimizer import FlatAdamW

def peak():
    return int(open("/proc/self/status").read().partition("VmHWM:")[2].split()[0]) * 1024

def step(optimizer):
    optimizer(Tensor(1e-4, ms.float32), Tensor(1.0, ms.float32))[0].asnumpy()

operators = setup("CPU", cpu_operators=sys.argv[1] == "True")[0].operators
small = Parameter(Tensor(np.ones((2, 8), np.float32)), name="small")
step(FlatAdamW([small], operators=operators))  # what MindSpore takes in any case
size = 1 << 22
large = [Parameter(Tensor(np.ones((2, size // 2), np.float32)), name=f"large{i}") for i in range(4)]
optimizer = FlatAdamW(large, operators=operators)
before = peak()
for _ in range(2):
    step(optimizer)
print((peak() - before) / (4 * 4 * size))
"""


@pytest.mark.parametrize("native", [True, False])
def test_vectors_of_the_optimiser(native, python, python_env):
    """A step holds no more of them than the estimate says: an operator that keeps indices would take four more."""
    child = subprocess.run(
        [python, "-c", OPTIMIZER, str(native)], env=python_env, capture_output=True, text=True, check=True
    )
    most = memory_estimate.OPTIMIZER_WORK_NATIVE if native else memory_estimate.OPTIMIZER_WORK
    assert most / 2 < float(child.stdout) < most


SEVEN_BILLION = SimpleNamespace(
    vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32,
    num_key_value_heads=32, head_dim=128, attention_bias=False, tie_word_embeddings=False, windows=(0,),
)  # fmt: skip


def job(lines=1, length=2048, **changes) -> memory_estimate.Job:
    modules = memory_estimate.modules(SEVEN_BILLION)
    costs = {
        name: Cost(trained=16 * (inputs + outputs), kept=16)
        for name, (inputs, outputs) in modules.items()
        if name.endswith(("q_proj", "v_proj"))
    }
    given = {"costs": costs, "dtype": "float16", "device": "Ascend", "recomputed": range(32), **changes}
    return memory_estimate.Job(SEVEN_BILLION, lines, length, **given)


def test_seven_billion_parameters():
    assert memory_estimate.parameters(SEVEN_BILLION) == 6_738_415_616  # of Llama 2
    assert memory_estimate.trainable(job()) == 2 * 32 * 16 * 8192
    found = memory_estimate.estimate(job())
    assert found.weights == pytest.approx(12852, rel=1e-3)  # 13.5e9 bytes
    assert memory_estimate.estimate(job(dtype="float32")).weights == 2 * found.weights


@pytest.mark.parametrize(
    "change",
    [{"lines": 2}, {"length": 4096}, {"dtype": "float32"}, {"recomputed": ()}, {"costs": None}, {"dropout": 0.1}],
)
def test_what_takes_more(change):
    assert memory_estimate.estimate(job(**change)).total > memory_estimate.estimate(job()).total


def test_state_in_the_hosts_memory_leaves_the_card():
    everything = {"costs": None, "dtype": "float32"}
    there = memory_estimate.estimate(job(**everything, swap=True))
    assert (
        memory_estimate.estimate(job(**everything)).training - there.training
        == 2 * 4 * 6_738_415_616 / memory_estimate.MB
    )
    here = {**everything, "device": "CPU"}
    assert memory_estimate.estimate(job(**here, swap=True)) == memory_estimate.estimate(job(**here))


@pytest.mark.parametrize(
    ("kind", "moments"), [("AdamW", 8), ("AdamW8bit", 2 + 8 / 256), ("PagedAdamW", 0), ("paged_adamw_8bit", 0)]
)
def test_the_state_of_an_optimiser(kind, moments):
    from lora_ms.config.optimizer import Optimizer
    from lora_ms.recipes.estimate import moment_bytes

    assert moment_bytes(Optimizer(type=kind)) == moments
    everything = {"costs": None, "dtype": "float32"}
    found, plain = (memory_estimate.estimate(job(**everything, moments=bytes)).training for bytes in (moments, 0))
    assert found - plain == pytest.approx(moments * 6_738_415_616 / memory_estimate.MB)


def test_what_fits_is_the_largest():
    room = memory_estimate.estimate(job(lines=5)).total
    assert memory_estimate.largest_batch(job(), room) == 5
    assert memory_estimate.largest_batch(job(), 1000) == memory_estimate.largest_length(job(), 1000) == 0
    length = memory_estimate.largest_length(job(), room)
    assert length % 64 == 0
    assert (
        memory_estimate.estimate(job(length=length)).total
        <= room
        < memory_estimate.estimate(job(length=length + 64)).total
    )


def test_keys_to_change_are_named_until_it_fits():
    large = job(lines=8, recomputed=(), dtype="float32", device="CPU")
    room = memory_estimate.estimate(job(lines=1, dtype="float32", device="CPU")).total
    found = memory_estimate.remedies(large, room)
    assert [text.split()[0] for text in found] == ["runner_config.batch_size", "recompute_config.recompute"]
    assert "gradient_accumulation_steps x 8" in found[0]
    assert memory_estimate.remedies(large, 1000) == []


def test_the_control_group_limits(tmp_path):
    own = tmp_path / "own"
    own.write_text("4:memory:/box\n0::/\n")
    assert host.cgroup_limit(tmp_path, own) is None
    (tmp_path / "memory" / "box").mkdir(parents=True)
    (tmp_path / "memory" / "box" / "memory.limit_in_bytes").write_text(f"{4 << 30}\n")
    (tmp_path / "memory" / "box" / "memory.usage_in_bytes").write_text(f"{1 << 30}\n")
    assert host.cgroup_limit(tmp_path, own) == (4096, 1024)
    (tmp_path / "memory.max").write_text("max\n")
    assert host.cgroup_limit(tmp_path, own) == (4096, 1024)
    (tmp_path / "memory.max").write_text(f"{2 << 30}\n")
    assert host.cgroup_limit(tmp_path, own) == (2048, 0)
    (tmp_path / "memory.current").write_text(f"{768 << 20}\n")
    (tmp_path / "memory.stat").write_text(f"anon {512 << 20}\nactive_file 0\ninactive_file {256 << 20}\n")
    assert host.cgroup_limit(tmp_path, own) == (2048, 512)  # files that the kernel would drop are not in use
    (tmp_path / "memory" / "box" / "memory.usage_in_bytes").write_text(f"{3 << 30}\n")
    assert host.cgroup_limit(tmp_path, own) == (4096, 3072)  # the larger one leaves less


@pytest.mark.parametrize(
    ("name", "text", "wanted"),
    [
        ("cpu.max", "max 100000\n", 64), ("cpu.max", "200000 100000\n", 2), ("cpu.max", "150000 100000\n", 2),
        ("box/cpu.max", "50000 100000\n", 1), ("box/cpu.max", "9900000 100000\n", 64), ("cpu.max", "odd\n", 64),
        ("cpu/box/cpu.cfs_quota_us", "300000\n", 3), ("cpu/cpu.cfs_quota_us", "-1\n", 64),
    ],
)  # fmt: skip
def test_the_control_group_limits_the_cores(tmp_path, monkeypatch, name, text, wanted):
    monkeypatch.setattr(host.os, "sched_getaffinity", lambda pid: range(64))
    (tmp_path / "own").write_text("4:cpu,cpuacct:/box\n3:memory:/other\n0::/box\n")
    for period in ("cpu", "cpu/box"):
        (tmp_path / period).mkdir(parents=True)
        (tmp_path / period / "cpu.cfs_period_us").write_text("100000\n")
    (tmp_path / "box").mkdir()
    (tmp_path / name).write_text(text)
    assert host.cores(tmp_path, tmp_path / "own") == wanted


def test_constants_that_stand_in_two_places():
    from lora_ms.nn import sharing
    from lora_ms.ops import portable
    from lora_ms.train import parts, shared_layers

    assert memory_estimate.BLOCK == shared_layers.BLOCK_LAYERS
    assert memory_estimate.SHARED_FROM == sharing.SHARED_FROM
    assert memory_estimate.CHUNK_NUMBERS == parts.CHUNK_NUMBERS
    assert memory_estimate.PART_NUMBERS == portable.PART_NUMBERS


def test_the_share_in_use(monkeypatch):
    monkeypatch.setattr(host, "system", lambda: (1000.0, 750.0))
    monkeypatch.setattr(host, "cgroup_limit", lambda: None)
    assert host.share() == 0.25 and host.available() == 750
    assert host.share(1000.0) == 0.25  # no budget below what there is
    assert host.share(100.0) > 0.25  # of this process alone: more than 25 MB
    monkeypatch.setattr(host, "cgroup_limit", lambda: (400.0, 300.0))
    assert host.share() == 0.75 and host.available() == 100


def test_a_process_holds_its_part_of_a_shared_model(tmp_path, capsys):
    from lora_ms.cli.main import main
    from lora_ms.config import load_config
    from lora_ms.nn.parallel import Shard
    from lora_ms.recipes.estimate import job_of
    from lora_ms.recipes.model import read_sizes

    write_model(tmp_path / "qwen", QWEN)
    whole = storage.open_dir(tmp_path / "qwen")
    shared = {"use_parallel": True, "parallel_config.model_parallel": 2, "load_checkpoint": str(tmp_path / "qwen")}
    config = load_config(None, flags=shared)
    job = job_of(config, read_sizes(config), "CPU")
    parts = [Shard(1, 2).slices(name, entry.shape) for name, entry in whole.items()]
    held = [np.empty(entry.shape, bool)[part].size for entry, part in zip(whole.values(), parts, strict=True)]
    assert memory_estimate.parameters(job.sizes) == sum(held)
    command = ["estimate", "--load_checkpoint", shared["load_checkpoint"], "--device_target", "CPU"]
    assert main([*command, "--use_parallel", "True", "--parallel_config.model_parallel", "2"]) == 0
    assert f"each of 2 processes that share the model:\n{sum(held):,} parameters" in capsys.readouterr().out
    assert main([*command, "--use_parallel", "True", "--parallel_config.model_parallel", "4"]) == 2
    assert "does not divide" in capsys.readouterr().err


def test_the_command(model, capsys):
    from lora_ms.cli.main import main

    assert main(["estimate", "--load_checkpoint", str(model), "--batch_size", "4", "--device_target", "CPU"]) == 0
    out = capsys.readouterr().out
    assert "all, at the peak" in out and "not measured on hardware" in out and "Orange Pi 8 GB" in out
    assert max(map(len, out.splitlines())) <= 80


def test_modules_of_mindformers_have_paths_of_their_own(reference, capsys):
    from lora_ms.cli.main import main

    key = "model.model_config.pet_config.exclude_layers=[layers.0.attention.wq]"
    words = ["estimate", "--load_checkpoint", str(reference / "models" / "llama3"), "--options"]
    assert main([*words, "backend=mindformers", key]) == 0
    assert main([*words, key]) == 2
    assert "exclude_layers layers.0.attention.wq: the model has no such module" in capsys.readouterr().err


@pytest.mark.parametrize(
    "saved",
    [(), ("embed_tokens",), ("lm_head",), ("embed_tokens", "lm_head"), ("norm",), ("k_proj",), ("0.mlp.up_proj",)],
)
def test_modules_that_train_whole(model, saved):
    """As many numbers as in the model itself, at the cost of any that trains."""
    from lora_ms.adapters.inject import inject
    from lora_ms.adapters.methods.lora import LoraConfig
    from lora_ms.models.hub import load_directory
    from lora_ms.recipes.estimate import adapter_parts

    whole = load_directory(model)
    config = LoraConfig(8, 16, target_modules=("q_proj", "v_proj"), modules_to_save=saved)
    found, plain = (
        memory_estimate.Job(whole.config, 1, 64, **adapter_parts(each, whole.config))
        for each in (config, LoraConfig(8, 16, target_modules=config.target_modules))
    )
    assert memory_estimate.trainable(found) == inject(whole, config).trainable
    more = memory_estimate.trainable(found) - memory_estimate.trainable(plain)
    with_saved, without = memory_estimate.estimate(found), memory_estimate.estimate(plain)
    assert with_saved.training - without.training == pytest.approx((8 + 8) * more / memory_estimate.MB)
    assert with_saved.graphs == without.graphs and with_saved.total >= without.total


TRAINED = {
    "plain": {},
    "biases": {"bias": "all"},
    "biases_of_adapted": {"bias": "lora_only"},
    "biases_and_whole": {"bias": "all", "modules_to_save": ("v_proj",)},
    "dora": {"use_dora": True},
    "dora_of_embedding": {"use_dora": True, "target_modules": ("q_proj", "embed_tokens")},
    "lora_bias": {"lora_bias": True},
    "tokens": {"trainable_token_indices": (3, 5)},
    "tokens_apart": {"trainable_token_indices": {"embed_tokens": (3, 5), "lm_head": (2,)}},
    "fa": {"use_lorafa": True},
}


@pytest.mark.parametrize("kind", TRAINED)
def test_all_that_trains_is_counted(reference, kind):
    """Of a tied model with biases."""
    from lora_ms.adapters.inject import inject
    from lora_ms.adapters.methods.lora import LoraConfig
    from lora_ms.models.hub import load_directory
    from lora_ms.recipes.estimate import adapter_parts

    whole = load_directory(reference / "models" / "qwen2")
    config = LoraConfig(2, 4.0, **{"target_modules": ("q_proj", "o_proj"), **TRAINED[kind]})
    job = memory_estimate.Job(whole.config, 1, 64, **adapter_parts(config, whole.config))
    assert memory_estimate.trainable(job) == inject(whole, config).trainable


def test_all_that_trains_of_adalora_is_counted(reference):
    from lora_ms.adapters.inject import inject
    from lora_ms.adapters.methods.adalora import AdaLoraConfig
    from lora_ms.models.hub import load_directory
    from lora_ms.recipes.estimate import adapter_parts

    whole = load_directory(reference / "models" / "qwen2")
    config = AdaLoraConfig(4, 4.0, target_modules=("q_proj", "o_proj"), target_rank=2, bias="lora_only")
    job = memory_estimate.Job(whole.config, 1, 64, **adapter_parts(config, whole.config))
    assert memory_estimate.trainable(job) == inject(whole, config).trainable


@pytest.mark.parametrize("name", ["qwen2", "llama2"])  # tied, and not
@pytest.mark.parametrize(
    "changes",
    [
        *({"modules_to_save": saved} for saved in (("embed_tokens",), ("lm_head",), ("embed_tokens", "lm_head"))),
        *({"modules_to_save": ("v_proj", "norm")}, {"bias": "all"}),
    ],
    ids=str,
)
def test_what_trains_whole_takes_the_place_of_the_model_s(reference, name, changes):
    """The numbers that do not train are those that the model still holds."""
    from lora_ms.adapters.inject import inject
    from lora_ms.adapters.methods.lora import LoraConfig
    from lora_ms.models.hub import load_directory
    from lora_ms.recipes.estimate import adapter_parts

    frozen, expected = [], []
    for settings in ({}, changes):
        whole = load_directory(reference / "models" / name)
        config = LoraConfig(2, 4.0, target_modules="q_proj", **settings)
        job = memory_estimate.Job(whole.config, 1, 64, **adapter_parts(config, whole.config))
        expected.append(memory_estimate.weights_mb(job) * memory_estimate.MB / 4)
        inject(whole, config)
        frozen.append(sum(p.size for p in whole.get_parameters() if not p.requires_grad))
    assert expected[1] - expected[0] == pytest.approx(frozen[1] - frozen[0], abs=0.1)
