"""The command line as a newcomer meets it: bare, misspelt, with other tools' flags, cut off by a pipe, as a dry run."""

import json
import shutil
import subprocess

import pytest
from safetensors.numpy import load_file

import lora_ms
from lora_ms.cli import main as cli
from lora_ms.config import load_config


def said(capsys, *argv: str) -> tuple[int, list[str], list[str]]:
    capsys.readouterr()
    status = cli.main(list(argv))
    captured = capsys.readouterr()
    return status, captured.out.splitlines(), captured.err.splitlines()


@pytest.mark.parametrize("argv", [[], ["adapters"], ["export"]])
def test_a_bare_command_prints_help(capsys, argv):
    status, out, err = said(capsys, *argv)
    assert (status, err) == (0, []) and out[0].startswith("usage: lora-ms")


PROCESS = """
import atexit, sys
from lora_ms.cli import main as cli
run = cli._lora_ms
def beginning(argv):
    atexit.register(print, "registered", flush=True)
    return run(argv)
cli._lora_ms = beginning
sys.exit(cli.main())
"""


@pytest.mark.parametrize(
    ("argv", "status", "line"),
    [
        (["--version"], 0, f"lora-ms {lora_ms.__version__}"),
        (["xyzzy"], 2, "error: there is no command 'xyzzy': lora-ms --help lists them"),
        (["xyzzy", "--debug"], 1, "lora_ms.errors.LoraMsError: there is no command 'xyzzy': lora-ms --help lists them"),
    ],
)
def test_a_process_ends_with_its_status_once_what_was_registered_has_run(python, python_env, argv, status, line):
    """It leaves without taking itself apart."""
    child = subprocess.run([python, "-c", PROCESS, *argv], env=python_env, capture_output=True, text=True)
    assert child.returncode == status, child.stderr
    assert line in (child.stdout + child.stderr).splitlines()
    assert child.stdout.splitlines()[-1] == "registered"


@pytest.mark.parametrize(
    ("word", "line"),
    [
        ("train", "there is no command 'train': lora-ms finetune trains"),
        ("finetun", "there is no command 'finetun': did you mean finetune?"),
        ("exprot", "there is no command 'exprot': did you mean export?"),
        ("serv", "there is no command 'serv': did you mean serve?"),
        ("webui", "there is no command 'webui': lora-ms serve has a page to chat with"),
        ("xyzzy", "there is no command 'xyzzy': lora-ms --help lists them"),
    ],
)
def test_a_command_that_does_not_exist(capsys, word, line):
    assert said(capsys, word, "--config", "x") == (2, [], [f"error: {line}"])


@pytest.mark.parametrize(
    ("flag", "line"),
    [
        ("--warmup_step 3", "as a key of the YAML the nearest is --lr_schedule.warmup_steps 3"),
        ("--warmup 100", "as a key of the YAML it is --lr_schedule.warmup_steps 100"),
        ("--warmup 0.1", "as a key of the YAML it is --lr_schedule.warmup_ratio 0.1"),
        ("--warmup", "as a key of the YAML it is --lr_schedule.warmup_ratio VALUE"),
        ("--weight_decay 1", "as a key of the YAML it is --optimizer.weight_decay 1"),
        ("--gradient_checkpointing True", "as a key of the YAML it is --recompute_config.recompute True"),
        ("--optim adamw_torch", "as a key of the YAML it is --optimizer.type VALUE"),
        ("--pet_config null", "write --options pet_config=null"),
        ("--lr 1", "here it is --learning_rate"),
        ("--cutoff_len 1", "here it is --seq_length"),
        ("--device 1", "here it is --device_target"),
        ("--lora-rank 8", "here it is --lora_rank"),
        ("--save_model x", "--help lists the flags (keys of the YAML: --section.key VALUE)"),
        ("--lr_decay 3", "the nearest is --options layer_decay=3"),
        ("--load_in_8bit True", "here the nearest is --quantize nf4"),
        ("--adaptor x", "here the nearest is --load_adapter"),
        ("--batch 8", "here it is --batch_size"),
        ("--load_in_4bit", "here it is --quantize nf4"),
        ("--load_in_4bit False", "leave it out"),
        ("--quantization_bit=4", "here it is --quantize nf4"),
        ("--quantization_bit 8", "here the nearest is --quantize nf4"),
        ("--bf16 True", "as a key of the YAML it is --model.model_config.compute_dtype bfloat16"),
        ("--bf16 False", "leave it out"),
        ("--fp16", "as a key of the YAML it is --model.model_config.compute_dtype float16"),
        ("--save_steps", 'write --options "callbacks=[{type: CheckpointMonitor, save_checkpoint_steps: N}]"'),
        ("--save_steps 50", 'write --options "callbacks=[{type: CheckpointMonitor, save_checkpoint_steps: 50}]"'),
        (
            "--save_strategy epoch",
            'the nearest is --options "callbacks=[{type: CheckpointMonitor, save_checkpoint_steps: N}]"',
        ),
        ("--save_strategy no", "leave it out"),
        ("--resume 1", "here it is --resume_training"),
        ("--num_beams 1", "--help lists the flags (keys of the YAML: --section.key VALUE)"),
        ("--deepspeed 1", "--help lists the flags (keys of the YAML: --section.key VALUE)"),
        ("--lora_ranks 1", "the nearest is --lora_rank (keys of the YAML: --section.key VALUE)"),
    ],
)
def test_a_flag_that_does_not_exist(capsys, flag, line):
    words = flag.split()
    assert said(capsys, "finetune", *words)[2] == [f"error: unknown flag {words[0].partition('=')[0]}; {line}"]


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("eval --dataset x", "here it is --eval_dataset_dir"),
        ("predict --data x", "here it is --predict_file"),
        ("chat --dataset x", "--help lists the flags (keys of the YAML: --section.key VALUE)"),
        ("predict --prompt hi", "here it is --predict_data"),
        ("predict --prompts hi", "here it is --predict_data"),
        ("chat --prompt hi", "--help lists the flags (keys of the YAML: --section.key VALUE)"),
        ("chat --lora x", "here it is --load_adapter"),
        ("serve --adapters a=x", "here it is --lora-modules"),
        ("serve --lora_modules a=x", "here it is --lora-modules"),
        ("convert-adapter --output_dir x", "here it is --output"),
        ("merge --output x", "here it is --output_dir"),
        ("merge --adaptor x", "here the nearest is --load_adapter"),
    ],
)
def test_a_flag_of_another_command_or_tool(capsys, words, line):
    command, flag, *value = words.split()
    assert said(capsys, command, flag, *value)[2] == [f"error: unknown flag {flag}; {line}"]


@pytest.fixture
def configured(monkeypatch, root, capsys):
    """``configured("--lora_rank", "4")``: the configuration that ``finetune`` would run, of the tiny YAML."""
    import sys
    from types import ModuleType

    found = []
    module = ModuleType("lora_ms.commands.finetune")
    module.run = lambda config: found.append(config)
    monkeypatch.setitem(sys.modules, "lora_ms.commands.finetune", module)

    def run(*argv: str):
        assert cli.main(["finetune", "--config", str(root / "configs/tiny/lora_tiny.yaml"), *argv]) == 0
        return found.pop()

    return run


def test_flags_that_people_know(configured, capsys):
    config = configured(
        *("--model_name_or_path", "m", "--num_train_epochs", "3", "--lora_r", "4", "--lora_alpha", "32"),
        *("--lora_dropout", "0.1", "--target_modules", "q_proj,v_proj", "--max_seq_length", "64"),
    )
    assert (config.load_checkpoint, config.runner_config.epochs, config.model.sizes.seq_length) == ("m", 3, 64)
    pet = config.pet_config
    assert (pet.lora_rank, pet.lora_alpha, pet.lora_dropout) == (4, 32, 0.1)
    assert pet.target_modules == ["q_proj", "v_proj"]
    assert configured("--target_modules", "all-linear").pet_config.target_modules == "all-linear"
    assert configured("--target_modules", ".*wq|.*wv").pet_config.target_modules == ".*wq|.*wv"
    assert configured("--target_modules", "q_proj").pet_config.target_modules == ["q_proj"]
    assert said(capsys, "finetune", "--lora_r", "4", "--lora_rank", "8", "--load_checkpoint", "m")[2] == [
        "error: --lora_r is another name of --lora_rank, and both are given: leave one out"
    ]


def test_a_mapping_merges_and_what_it_takes_back_is_named(configured):
    config = configured(
        "--learning_rate", "1e-3", "--options", "lr_schedule={type: ConstantWarmUpLR, learning_rate: 2.e-4}"
    )
    schedule = config.lr_schedule
    assert (schedule.type, schedule.learning_rate, schedule.warmup_ratio) == ("ConstantWarmUpLR", 2e-4, 0.03)
    assert config.notices() == [
        "lr_schedule.learning_rate: 0.0002 (--options) takes the place of lr_schedule.learning_rate: 0.001 (named flag)"
    ]
    config = configured("--learning_rate", "1e-3", "--options", "lr_schedule={type: ConstantWarmUpLR}")
    assert config.learning_rate == 1e-3 and config.notices() == []
    config = configured("--lora_rank", "4", "--options", "pet_config=null")
    assert config.pet_config is None
    assert config.notices() == ["pet_config: None (--options) takes the place of pet_config.lora_rank: 4 (named flag)"]


def test_a_mapping_merges_into_what_the_yaml_says(root):
    yaml = str(root / "configs/tiny/lora_tiny.yaml")
    config = load_config(yaml, options=["pet_config={lora_rank: 2}"], flags={"data_fill": {"NAME": "x"}})
    assert (config.pet_config.lora_rank, config.pet_config.lora_alpha) == (2, 16)


@pytest.mark.parametrize("words", ["finetune --help", "doctor --help", ""])
def test_a_reader_that_stops(python, python_env, words):
    command = f"{python} -m lora_ms.cli {words} | head -1"
    done = subprocess.run(["bash", "-c", command], env=python_env, capture_output=True, text=True)
    assert done.stderr == "" and done.stdout.startswith("usage: lora-ms")


# --- the dry run


@pytest.fixture
def dry(capsys, root, tmp_path, monkeypatch):
    """``dry("--batch_size", "2", …)``: status and lines of a dry run on the bundled model."""
    monkeypatch.chdir(root)

    def run(*argv: str):
        settings = ("--config", "configs/tiny/lora_tiny.yaml", "--fill", "NAME=Mira", "--fill", "AUTHOR=Lin")
        out = str(tmp_path / "out")
        status, lines, err = said(capsys, "finetune", *settings, "--output_dir", out, "--dry_run", *argv)
        assert err == [] and not (tmp_path / "out").exists()
        return status, lines

    return run


def test_a_dry_run_that_is_ready(dry):
    status, lines = dry()
    assert (status, lines[-1]) == (0, "ready")
    assert [line.split(":")[0].strip() for line in lines[:-1] if ":" in line and line[0] != " "] == [
        "model", "data", "training", "memory", "disk",
    ]  # fmt: skip


def test_a_dry_run_of_several_processes(dry):
    status, lines = dry("8", "--parallel_config.model_parallel", "2", "--context.device_target", "Ascend")
    assert (status, lines[-1]) == (0, "ready")
    assert "processes: 4 data-parallel x 2 model-parallel" in lines
    assert any("on Ascend 910B, 64 GB for each process" in line for line in lines)


def test_a_dry_run_says_all_that_is_wrong(dry, root, tmp_path):
    broken = tmp_path / "model"
    shutil.copytree(root / "examples/tiny/model", broken)
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps({**config, "intermediate_size": 600}))
    argv = ("--load_checkpoint", str(broken), "--train_dataset_dir", "none.jsonl")
    status, lines = dry("3", "--parallel_config.model_parallel", "2", *argv)
    text = " ".join(" ".join(lines).split())
    assert status == 2 and "ready" not in lines and all(len(line) <= 80 or str(broken) in line for line in lines)
    assert "12 tensors do not fit the model" in text
    assert "parallel_config.model_parallel 2 does not divide 3 processes" in text
    assert "none.jsonl: no such file or folder" in text


def test_a_dry_run_names_a_missing_adapter_beside_a_missing_model(dry):
    status, lines = dry("--load_checkpoint", "none", "--load_adapter", "nowhere", "--train_dataset_dir", "none.jsonl")
    text = " ".join(" ".join(lines).split())
    assert status == 2 and "none.jsonl: no such file or folder" in text
    assert "load_checkpoint: none does not exist" in text and "load_adapter: nowhere does not exist" in text


def test_a_dry_run_that_does_not_fit(dry, monkeypatch):
    from lora_ms.runtime import host

    monkeypatch.setattr(host, "available", lambda: 100.0)
    status, lines = dry()
    text = " ".join(" ".join(lines).split())
    assert status == 2 and "are needed, and 100 MB are there (this machine); change: " in text


def test_a_dry_run_without_room_on_the_disk(dry, monkeypatch):
    from collections import namedtuple

    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10, 9, 1000))
    status, lines = dry()
    text = " ".join(" ".join(lines).split())
    assert status == 2 and "lower keep_checkpoint_max, or give another output_dir" in text


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--resume_training", "True"], "checkpoints: no checkpoint to resume from"),
        (["--load_adapter", "{adapter}", "--lora_rank", "16"], "lora_rank: 16 in pet_config, 4 in the adapter"),
        (["--load_adapter", "tests/reference/adapters/qwen3"], "made for another model: base_model.model.model."),
        (["--load_adapter", "nowhere"], "load_adapter: nowhere does not exist; give the folder"),
        (["--options", "evaluation={sets: {own: {dataset_dir: none}}}"], "evaluation.sets.own: none: no such file"),
        (
            ["--options", "objectives=[{type: contrastive}]"],
            "contrastive needs domain rows and at least 2 general ones",
        ),
        (["--options", "objectives=[{type: ewc, fisher: none}]"], "none: no such file: lora-ms fisher writes it"),
    ],
)
def test_a_dry_run_says_what_the_run_would(dry, root, tmp_path, argv, said):
    if "{adapter}" in argv:
        net = lora_ms.AutoModelForCausalLM.from_pretrained(root / "examples/tiny/model")
        lora_ms.get_peft_model(net, lora_ms.LoraConfig(4, 8.0)).save_pretrained(tmp_path / "adapter")
    status, lines = dry(*(str(tmp_path / "adapter") if word == "{adapter}" else word for word in argv))
    wrong = lines[lines.index("not ready:") + 1 :]
    text = " ".join(" ".join(wrong).split())
    assert status == 2 and said in text and text.count("- ") == 1 and "ready" not in lines


def test_an_estimate_knows_the_rank_of_a_loaded_adapter(capsys, reference):
    model, adapter = reference / "models/qwen2", reference / "adapters/qwen2"
    found = []
    for argv in (["--load_adapter", str(adapter)], []):
        status, lines, _ = said(capsys, "estimate", "--load_checkpoint", str(model), *argv)
        found.append(next(text.split("; ")[1] for text in lines if "numbers train" in text))
    loaded = sum(entry.size for entry in load_file(adapter / "adapter_model.safetensors").values())
    assert found[0] == f"{loaded:,} numbers train" != found[1]


def test_an_estimate_says_which_machine_is_too_small(capsys, root, monkeypatch):
    from lora_ms.runtime import host

    monkeypatch.setattr(host, "available", lambda: 100.0)
    monkeypatch.chdir(root)
    status, lines, _ = said(capsys, "estimate", "--config", "configs/tiny/lora_tiny.yaml")
    assert status == 0 and "it will not fit this machine (100 MB free); change, until it does:" in lines
