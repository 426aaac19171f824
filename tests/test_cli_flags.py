"""Every flag lands on its key; faults are one line with status 2; --help imports nothing heavy."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from lora_ms.cli import main
from lora_ms.cli.flags import FLAGS as SHARED_FLAGS
from lora_ms.config import load_config
from lora_ms.config.schema import RunConfig
from lora_ms.errors import LoraMsError

ROOT = Path(__file__).parents[1]
YAML = str(ROOT / "configs/tiny/lora_tiny.yaml")

QUOTE = "a flag begins with --, and a value with spaces or a * needs quotes"

# flag and its words -> key -> value
FLAGS = [
    ("--mode 1", "context.mode", 1),
    ("--device_id 3", "context.device_id", 3),
    ("--low_memory True", "context.low_memory", True),
    ("--device_target Ascend", "context.device_target", "Ascend"),
    ("--run_mode train", "run_mode", "train"),
    ("--do_eval True", "do_eval", True),
    ("--train_dataset_dir a/b.json", "train_dataset.data_loader.dataset_dir", "a/b.json"),
    ("--hub modelscope", "hub", "modelscope"),
    ("--revision v1", "revision", "v1"),
    ("--eval_dataset_dir a/c", "eval_dataset.data_loader.dataset_dir", "a/c"),
    ("--modal_type text image", "modal_type", ["text", "image"]),
    ("--predict_batch_size 2", "predict_batch_size", 2),
    ("--adapter_id a b", "adapter_id", ["a", "b"]),
    ("--load_checkpoint 2024", "load_checkpoint", "2024"),
    ("--src_strategy_path_or_dir s", "src_strategy_path_or_dir", "s"),
    ("--auto_trans_ckpt True", "auto_trans_ckpt", True),
    ("--transform_process_num 4", "transform_process_num", 4),
    ("--only_save_strategy true", "only_save_strategy", True),
    ("--resume_training True", "resume_training", True),
    ("--resume_training FALSE", "resume_training", False),
    ("--overwrite_output_dir True", "overwrite_output_dir", True),
    ("--resume_training step_7", "resume_training", "step_7"),
    ("--strategy_load_checkpoint s", "strategy_load_checkpoint", "s"),
    ("--remote_save_url u", "remote_save_url", "u"),
    ("--seed 9", "seed", 9),
    ("--use_parallel True", "use_parallel", True),
    ("--use_parallel false", "use_parallel", False),
    ("--profile True", "profile", True),
    ("--eval_step_interval 20", "eval_step_interval", 20),
    ("--report_to tensorboard", "report_to", ["tensorboard"]),
    ("--prompts_file q.jsonl", "evaluation.prompts_file", "q.jsonl"),
    ("--tasks arc_easy mine.yaml", "evaluation.tasks", ["arc_easy", "mine.yaml"]),
    ("--num_fewshot 5", "evaluation.num_fewshot", 5),
    ("--limit 10", "evaluation.limit", 10),
    ("--options runner_config.epochs=5 use_parallel=True", "runner_config.epochs", 5),
    ("--options runner_config.epochs=5 use_parallel=True", "use_parallel", True),
    ("--options seed=1 --options seed=2", "seed", 2),
    ("--epochs 6", "runner_config.epochs", 6),
    ("--batch_size 7", "runner_config.batch_size", 7),
    ("--gradient_accumulation_steps 3", "runner_config.gradient_accumulation_steps", 3),
    ("--sink_mode False", "runner_config.sink_mode", False),
    ("--backend mindformers", "backend", "mindformers"),
    ("--num_samples 11", "train_dataset.num_samples", 11),
    ("--output_dir out", "output_dir", "out"),
    ("--register_path r", "register_path", "r"),
    ("--do_sample True", "model.model_config.do_sample", True),
    ("--trust_remote_code True", "trust_remote_code", True),
    # ours
    ("--load_adapter ad", "load_adapter", "ad"),
    (
        "--quantize nf4-double",
        "model.model_config.quantization_config",
        {
            "quant_method": "bitsandbytes",
            "load_in_4bit": True,
            "load_in_8bit": False,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_compute_dtype": "float32",
            "bnb_4bit_quant_storage": "uint8",
            "bnb_4bit_use_double_quant": True,
            "llm_int8_skip_modules": None,
        },
    ),
    ("--lora_rank 4", "model.model_config.pet_config.lora_rank", 4),
    ("--lora_alpha 8", "model.model_config.pet_config.lora_alpha", 8.0),
    ("--lora_dropout 0.1", "model.model_config.pet_config.lora_dropout", 0.1),
    ("--target_modules q_proj,v_proj", "model.model_config.pet_config.target_modules", ["q_proj", "v_proj"]),
    ("--max_steps -1", "runner_config.max_steps", -1),
    ("--max_new_tokens 12", "model.model_config.max_new_tokens", 12),
    ("--max_length 100", "model.model_config.max_decode_length", 100),
    ("--temperature 0.7", "model.model_config.temperature", 0.7),
    ("--top_k 50", "model.model_config.top_k", 50),
    ("--top_p 0.9", "model.model_config.top_p", 0.9),
    ("--repetition_penalty 1.2", "model.model_config.repetition_penalty", 1.2),
    ("--learning_rate 1e-5", "lr_schedule.learning_rate", 1e-5),
    ("--seq_length 64", "model.model_config.seq_length", 64),
    ("--preset large_dataset", "model.model_config.pet_config.lora_alpha", 64),
    ("--fill NAME=小明 --fill MAKER=a=b", "data_fill", {"NAME": "小明", "MAKER": "a=b"}),
    ("--chat_template vicuna", "processor.tokenizer.chat_template", "vicuna"),
    # any key
    ("--optimizer.eps 1e-6", "optimizer.eps", 1e-6),
    ("--optimizer.eps=1e-6", "optimizer.eps", 1e-6),
    ("--runner_config.max_steps -1", "runner_config.max_steps", -1),
    ("--callbacks.1.save_checkpoint_steps 4", "callbacks.1.save_checkpoint_steps", 4),
    ("--pet_config.lora_rank 2 --options pet_config.lora_rank=3", "model.model_config.pet_config.lora_rank", 2),
]


@pytest.fixture
def ran(monkeypatch):
    """The commands that the command line started: (command, its arguments)."""
    calls = []
    for module in main.MODULES.values():
        name = module.rpartition(".")[2]
        command = ModuleType(module)
        command.run = lambda *args, name=name, **named: calls.append((name, *args, *([named] if named else [])))
        monkeypatch.setitem(sys.modules, module, command)
    return calls


@pytest.mark.parametrize(
    ("text", "targets"),
    [("q_proj, v_proj", ["q_proj", "v_proj"]), ("q_proj, v_proj, ", ["q_proj", "v_proj"]), ("wq,", "wq")],
)
def test_target_modules_may_have_spaces_between_them_and_a_comma_behind(ran, text, targets):
    assert main.main(["finetune", "--config", YAML, "--target_modules", text]) == 0
    assert ran[0][1].pet_config.target_modules == targets


def value_at(config: RunConfig, key: str):
    here = config.model_dump(by_alias=True)
    for part in key.split("."):
        here = here[int(part)] if isinstance(here, list) else here[part]
    return here


@pytest.mark.parametrize(("flag", "key", "value"), FLAGS, ids=[flag for flag, *_ in FLAGS])
def test_flag_lands_on_its_key(ran, flag, key, value):
    assert main.main(["finetune", "--config", YAML, *flag.split()]) == 0
    [(task, config)] = ran
    assert task == "finetune"
    assert value_at(config, key) == value
    assert type(value_at(config, key)) is type(value)


NOTHING = 'nothing to predict: give --predict_data "a prompt" "another", or --predict_file FILE'


def test_table_covers_every_flag():
    given = {word[2:] for flag, *_ in FLAGS for word in flag.split() if word.startswith("--") and "." not in word}
    others = {"config", "predict_data", "predict_file", "predict_output", "system", "dry_run", "debug"}
    assert given | others == {*main.FLAG_KEYS, *main.OTHER_FLAGS}


def test_no_flag_keeps_the_yaml(ran):
    assert main.main(["finetune", "--config", YAML]) == 0
    assert ran == [("finetune", load_config(YAML))]


def test_idle_flags_share_one_notice(ran):
    main.main(["finetune", "--config", YAML, "--mode", "1", "--register_path", "a", "--auto_trans_ckpt", "False"])
    assert ran[0][1].notices() == ["no effect here: context.mode, register_path"]


@pytest.mark.parametrize(
    ("words", "task", "run_mode"),
    [
        ("finetune", "finetune", "finetune"),
        ("finetune --run_mode train", "finetune", "train"),
        ("predict --predict_data a b", "predict", "predict"),
        ("chat", "chat", "predict"),
        ("eval", "evaluate", "eval"),
    ],
)
def test_commands(ran, words, task, run_mode):
    assert main.main([*words.split(), "--config", YAML]) == 0
    assert (ran[0][0], ran[0][1].run_mode) == (task, run_mode)
    of_file = {"predict_file": None, "predict_output": None}
    flags = {"predict": {"predict_data": ["a", "b"], "system": None, **of_file}, "chat": {"system": None}}
    assert ran[0][2:] == ((flags[task],) if task in flags else ())


MERGE = {"load_adapter": "a", "load_checkpoint": None, "output_dir": "o", "dtype": "auto", "max_shard_size": "5GB",
         "safe_merge": True, "overwrite": False, "onto": None}  # fmt: skip
QUANTIZE = {"load_checkpoint": "b", "output_dir": "o", "type": "nf4", "double": False, "max_shard_size": "5GB",
            "overwrite": False}  # fmt: skip
COMBINE = {"adapters": ["a", "b"], "weights": [0.7, -0.3], "method": "linear", "density": None, "rank": None,
           "seed": 0, "output_dir": "o", "overwrite": False}  # fmt: skip


@pytest.mark.parametrize(
    ("words", "task", "given"),
    [
        ("merge --load_adapter a --output_dir o", "merge", MERGE),
        (
            "merge --load_checkpoint b --load_adapter a --output_dir o --dtype float16 --max_shard_size 1GB "
            "--safe_merge False --overwrite True --onto original",
            "merge",
            MERGE
            | {"load_checkpoint": "b", "dtype": "float16", "max_shard_size": "1GB", "safe_merge": False}
            | {"overwrite": True, "onto": "original"},
        ),
        ("quantize --load_checkpoint b --output_dir o", "quantize", QUANTIZE),
        ("quantize --load_checkpoint b --output_dir o --double", "quantize", QUANTIZE | {"double": True}),
        ("check-adapter --load_adapter a", "check_adapter", {"load_adapter": "a", "load_checkpoint": None}),
        ("check-adapter --load_adapter a --load_checkpoint b", "check_adapter",
         {"load_adapter": "a", "load_checkpoint": "b"}),
        ("adapters combine --adapters a b --weights 0.7 -0.3 --output_dir o", "combine", COMBINE),
        (
            "adapters combine --adapters a b --weights 0.7 -0.3 --method ties --density 0.5 --rank 4 --seed 7 "
            "--output_dir o",
            "combine",
            COMBINE | {"method": "ties", "density": 0.5, "rank": 4, "seed": 7},
        ),
    ],
)  # fmt: skip
def test_commands_without_a_configuration(ran, words, task, given):
    assert main.main(words.split()) == 0
    assert ran == [(task, given)]
    assert all(type(ran[0][1][name]) is type(value) for name, value in given.items())


@pytest.mark.parametrize(("faults", "status"), [(0, 0), (3, 2)])
def test_check_adapter_says_by_its_status_whether_there_are_faults(ran, faults, status):
    sys.modules["lora_ms.commands.check_adapter"].run = lambda **named: faults
    assert main.main(["check-adapter", "--load_adapter", "a"]) == status


def test_tools_and_their_tasks_agree_on_names():
    """Every flag is an argument of the task, and every argument a flag; where both have defaults, they are equal."""
    import inspect

    from lora_ms.commands import check_adapter, combine, merge

    for name, task in (("merge", merge), ("check-adapter", check_adapter), ("adapters combine", combine)):
        arguments = inspect.signature(task.run).parameters
        flags = {flag.name: flag for flag in main.TOOLS[name].flags}
        assert set(arguments) == set(flags)
        for argument in arguments.values():
            if argument.default is not argument.empty:
                assert argument.default == flags[argument.name].default


def test_without_a_yaml(ran):
    assert main.main(["finetune", "--load_checkpoint", "model"]) == 0
    assert ran == [("finetune", load_config(None, flags={"load_checkpoint": "model", "run_mode": "finetune"}))]


@pytest.mark.parametrize(
    ("run_mode", "task"),
    [(None, "finetune"), ("train", "finetune"), ("finetune", "finetune"), ("eval", "evaluate"), ("predict", "predict")],
)
def test_run_mindformer_follows_run_mode(ran, run_mode, task):
    words = ["--config", YAML, "--predict_data", "a"]
    assert main.run_mindformer(words if run_mode is None else [*words, "--run_mode", run_mode]) == 0
    assert ran[0][0] == task


def test_the_articles_command(ran):
    config = str(ROOT / "configs/llama2/lora_llama2_7b.yaml")
    assert (
        main.run_mindformer(
            [
                "--config",
                config,
                "--train_dataset_dir",
                "/path/to/alpaca-fastchat4096.mindrecord",
                "--load_checkpoint",
                "/path/to/llama2_7b.ckpt",
                "--auto_trans_ckpt",
                "False",
                "--use_parallel",
                "False",
                "--run_mode",
                "finetune",
            ]
        )
        == 0
    )
    expected = load_config(
        config,
        options=[
            "load_checkpoint=/path/to/llama2_7b.ckpt",
            "train_dataset.data_loader.dataset_dir=/path/to/alpaca-fastchat4096.mindrecord",
        ],
    )
    assert ran == [("finetune", expected)]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["finetune"],
            "what model? give --load_checkpoint with a model's folder, --load_adapter with an adapter's, "
            "or --config FILE.yaml",
        ),
        (
            ["finetune", "--config", YAML, "--epoch", "3"],
            "unknown flag --epoch; the nearest is --epochs (keys of the YAML: --section.key VALUE)",
        ),
        (["finetune", "--config", YAML, "--data", "x"], "unknown flag --data; here it is --train_dataset_dir"),
        (["predict", "--config", YAML, "--model", "x"], "unknown flag --model; here it is --load_checkpoint"),
        (
            ["finetune", "--config", YAML, "--pet_config", "null"],
            "unknown flag --pet_config; write --options pet_config=null",
        ),
        (
            ["finetune", "--config", YAML, "--label_turns", "last"],
            "unknown flag --label_turns; as a key of the YAML it is --train_dataset.label_turns last",
        ),
        (
            ["finetune", "--config", YAML, "--output_dir", ""],
            f"{YAML} with the command line: output_dir expects the name of a folder, got ''",
        ),
        (
            ["merge", "--output_dir", " "],
            "argument --output_dir: expects a path, got nothing (see lora-ms merge --help)",
        ),
        (
            ["chat", "--load_adapter", "none"],
            "load_adapter: none does not exist; give the folder that holds adapter_config.json",
        ),
        (["finetune", YAML], f"unexpected argument {YAML!r}: {QUOTE}"),
        (
            ["finetune", "--config", YAML, "--epochs", "x"],
            "argument --epochs: expects a whole number, got 'x' (see lora-ms finetune --help)",
        ),
        (
            ["finetune", "--config", YAML, "--dry_run", "True"],
            "argument --dry_run: takes no value, or a number of processes, got 'True' (see lora-ms finetune --help)",
        ),
        (
            ["finetune", "--config", YAML, "--target_modules", "q_proj", "v_proj", "--epochs", "3"],
            "unexpected argument 'v_proj': write --target_modules q_proj,v_proj",
        ),
        (
            ["finetune", "--config", YAML, "--target_modules", "q_proj v_proj"],
            "argument --target_modules: expects commas between names, got 'q_proj v_proj': write q_proj,v_proj "
            "(see lora-ms finetune --help)",
        ),
        (
            ["finetune", "--config", YAML, "--learning_rate", "x"],
            "argument --learning_rate: expects a number, got 'x' (see lora-ms finetune --help)",
        ),
        (
            ["finetune", "--config", YAML, "--use_parallel", "yes"],
            "argument --use_parallel: expects True or False, got 'yes' (see lora-ms finetune --help)",
        ),
        (
            ["finetune", "--config", YAML, "--fill", "a.b=c"],
            "argument --fill: expects NAME=text with a word as NAME, got 'a.b=c' (see lora-ms finetune --help)",
        ),
        (
            ["finetune", "--config", YAML, "--optimizer.eps"],
            "--optimizer.eps has no value: write --optimizer.eps VALUE",
        ),
        (
            ["finetune", "--config", YAML, "--optimizer.eps", "--seed", "1"],
            "--optimizer.eps has no value: write --optimizer.eps VALUE",
        ),
        (
            ["finetune", "--config", YAML, "--optimizer.epss", "1"],
            f"{YAML} with the command line: unknown key optimizer.epss; did you mean optimizer.eps?",
        ),
        (["finetune", "--config", YAML, "--options", "seed"], "override 'seed' expects the form section.key=value"),
        (
            ["predict", "--config", YAML],
            'nothing to predict: give --predict_data "a prompt" "another", or --predict_file FILE',
        ),
        (
            ["eval", "--config", YAML, "--run_mode", "predict"],
            "--run_mode predict contradicts the command eval: leave the flag out",
        ),
        (["finetune", "--config", "none.yaml"], "cannot read config none.yaml: No such file or directory"),
        (["merge"], "--load_adapter, --output_dir: missing (see lora-ms merge --help)"),
        (["merge", "--load_adapter", "a"], "--output_dir: missing (see lora-ms merge --help)"),
        (["check-adapter"], "--load_adapter: missing (see lora-ms check-adapter --help)"),
        (["merge", "--load_adaptor", "a"], "unknown flag --load_adaptor; the nearest is --load_adapter"),
        (["merge", "--shard_size", "3"], "unknown flag --shard_size; the nearest is --max_shard_size"),
        (
            ["merge", "--load_adapter", "a", "--optimizer.eps", "1"],
            "unknown flag --optimizer.eps; --help lists the flags",
        ),
        (
            ["export", "--load_adapter", "a"],
            "the command is lora-ms export gguf: write its second word before the flags",
        ),
        (["merge", "a"], f"unexpected argument 'a': {QUOTE}"),
        (
            ["merge", "--load_adapter", "a", "--output_dir", "o", "--safe_merge", "yes"],
            "argument --safe_merge: expects True or False, got 'yes' (see lora-ms merge --help)",
        ),
        (
            ["adapters", "combine", "--weights", "x"],
            "argument --weights: expects a number, got 'x' (see lora-ms adapters combine --help)",
        ),
        (
            ["adapters", "combine", "--adapters", "a"],
            "--weights, --output_dir: missing (see lora-ms adapters combine --help)",
        ),
    ],
)
def test_faults_are_one_line_and_status_2(ran, capsys, words, message):
    assert main.main(words) == 2
    assert capsys.readouterr() == ("", f"error: {message}\n")
    assert ran == []


def test_run_mindformer_needs_something_to_predict(ran, capsys):
    assert main.run_mindformer(["--config", YAML, "--run_mode", "predict"]) == 2
    assert (
        capsys.readouterr().err
        == 'error: nothing to predict: give --predict_data "a prompt" "another", or --predict_file FILE\n'
    )


def test_run_mindformer_needs_a_config(ran, capsys):
    assert main.run_mindformer(["--load_checkpoint", "model"]) == 2
    assert capsys.readouterr().err == (
        "error: --config is missing: give a YAML, such as configs/llama2/lora_llama2_7b.yaml\n"
    )


def test_debug_raises(ran):
    with pytest.raises(LoraMsError, match="^cannot read config none.yaml: No such file or directory$"):
        main.main(["finetune", "--config", "none.yaml", "--debug"])


def test_an_interrupt_while_libraries_are_imported_ends_the_process_quietly():
    script = "import os, signal\nfrom lora_ms.cli.main import _ended_by_ctrl_c\n{}"
    script += "\nwith _ended_by_ctrl_c():\n    os.kill(os.getpid(), signal.SIGINT)"
    done = [
        subprocess.run([sys.executable, "-c", script.format(text)], cwd=ROOT, capture_output=True, text=True)
        for text in ("", "signal.signal(signal.SIGINT, signal.SIG_IGN)")  # as a shell's background commands have it
    ]
    assert [(one.returncode, one.stdout, one.stderr) for one in done] == [(-signal.SIGINT, "", ""), (0, "", "")]


def test_afterwards_an_interrupt_is_an_exception_again():
    with main._ended_by_ctrl_c():
        pass
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_interrupt_is_quiet(ran, capsys):
    def interrupted(config):
        raise KeyboardInterrupt

    sys.modules["lora_ms.commands.finetune"].run = interrupted
    assert main.main(["finetune", "--config", YAML]) == 130
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    "words", [["--help"], ["finetune", "--help"], ["merge", "--help"], ["adapters", "--help"], ["--version"]]
)
def test_help_imports_nothing_heavy(words):
    script = (
        "import sys; from lora_ms.cli.main import main; status = main(sys.argv[1:]); "
        "heavy = {'mindspore', 'pydantic', 'yaml', 'numpy', 'transformers'} & set(sys.modules); "
        "sys.exit(f'{status} {heavy}' if status or heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", script, *words], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("command", ["", *main.COMMANDS, *main.TOOLS])
def test_help_fits_80_columns(capsys, command):
    assert main.main([*command.split(), "--help"]) == 0
    text = capsys.readouterr().out
    assert max(len(line) for line in text.splitlines()) <= 80
    for flag in main.TOOLS[command].flags if command in main.TOOLS else ():
        assert f"--{flag.name} " in text


def test_help_shows_what_a_command_uses(capsys):
    """Every flag is in the help of some command, and training's are not in that of chat, which accepts them."""
    shown = {}
    for command in main.COMMANDS:
        assert main.main([command, "--help"]) == 0
        shown[command] = capsys.readouterr().out
    flags = [row[0] for rows in SHARED_FLAGS.values() for row in rows]
    assert all(any(f"--{flag} " in text for text in shown.values()) for flag in flags)
    assert "--learning_rate " in shown["finetune"] and "--learning_rate " not in shown["chat"]
    assert "--predict_data " in shown["predict"] and "--predict_data " not in shown["finetune"]
    assert len(shown["chat"].splitlines()) <= 55


def test_help_lists_the_methods_of_combining(capsys):
    from lora_ms.adapters.combine import COMBINATIONS

    assert main.main(["adapters", "combine", "--help"]) == 0
    listed = capsys.readouterr().out.split("methods:\n")[1]
    assert [line.split()[0] for line in listed.splitlines() if line[:3].strip()] == list(COMBINATIONS)


def test_a_reader_that_leaves_is_no_error():
    read, write = os.pipe()
    os.close(read)
    script = (
        "import sys; from lora_ms.cli.main import _guarded; sys.exit(_guarded(lambda argv: print('line') or 0, []))"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, "")


def test_run_mindformer_script_returns_the_status():
    done = subprocess.run([sys.executable, "run_mindformer.py"], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (
        2,
        "error: --config is missing: give a YAML, such as configs/llama2/lora_llama2_7b.yaml\n",
    )


def test_configuration_loads_without_mindspore():
    script = (
        "import sys; import lora_ms.config; "
        "heavy = {'mindspore', 'transformers'} & set(sys.modules); sys.exit(str(heavy) if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
