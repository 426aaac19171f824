"""Reading, overriding and writing a configuration."""

from pathlib import Path

import pytest

from lora_ms.config import PRESETS, PetConfig, RunConfig, dump_config, load_config
from lora_ms.errors import LoraMsError
from lora_ms.values import Section

ROOT = Path(__file__).parents[2]

LORA = "model: {model_config: {pet_config: {lora_rank: 4}}}\n"


@pytest.fixture
def yaml_file(tmp_path):
    def write(text: str) -> str:
        path = tmp_path / "run.yaml"
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write


def error_of(path, **overrides) -> str:
    with pytest.raises(LoraMsError) as caught:
        load_config(path, **overrides)
    return str(caught.value)


def test_each_level_overrides_the_one_before(yaml_file):
    path, key = yaml_file(LORA), "model.model_config.pet_config.lora_rank"
    assert load_config(None).pet_config.lora_rank == 16
    levels = [
        {},
        {"preset": "small_dataset"},
        {"flags": {key: 10}},
        {"options": [f"{key}=12"]},
        {"free_form": [f"{key}=14"]},
    ]
    ranks, given = [], {}
    for level in levels:
        given |= level
        ranks.append(load_config(path, **given).pet_config.lora_rank)
    assert ranks == [4, 8, 10, 12, 14]


def test_a_flag_of_none_keeps_the_yaml(yaml_file):
    assert load_config(yaml_file(LORA + "seed: 7"), flags={"seed": None}).seed == 7


def test_presets(yaml_file):
    for name, (rank, alpha, dropout, rate) in {
        "few_rows": (8, 32, 0.05, 1e-3),
        "small_dataset": (8, 32, 0.2, 1e-4),
        "large_dataset": (16, 64, 0.05, 3e-5),
    }.items():
        config = load_config(yaml_file(LORA), preset=name)
        assert config.pet_config == PetConfig(lora_rank=rank, lora_alpha=alpha, lora_dropout=dropout)
        assert config.learning_rate == rate
    assert list(PRESETS) == ["few_rows", "small_dataset", "large_dataset"]
    assert error_of(None, preset="big") == "unknown preset 'big': choose one of few_rows, small_dataset, large_dataset"


@pytest.mark.parametrize(("text", "value"), [("True", True), ("true", True), ("False", False), ("'False'", False)])
def test_options_read_booleans(text, value):
    assert load_config(None, options=[f"use_parallel={text}"]).use_parallel is value


@pytest.mark.parametrize("text", ["1e-5", "1.e-5", "0.00001", "'1e-5'"])
def test_numbers_in_any_spelling(text):
    assert load_config(None, options=[f"optimizer.eps={text}"]).optimizer.eps == 1e-5


def test_override_inside_a_list(yaml_file):
    path = yaml_file(LORA + "callbacks: [{type: MFLossMonitor}, {type: CheckpointMonitor, save_checkpoint_steps: 5}]")
    config = load_config(path, options=["callbacks.1.save_checkpoint_steps=9"])
    assert config.save_steps == 9
    assert error_of(path, options=["callbacks.2.prefix=a"]) == (
        "override callbacks.2.prefix: callbacks is a list of 2, counted from 0; got '2'"
    )


def test_overriding_a_dataset_leaves_its_alias_alone(yaml_file):
    path = yaml_file(LORA + "train_dataset: &d {data_loader: {dataset_dir: a}}\neval_dataset: *d\n")
    config = load_config(path, options=["train_dataset.data_loader.dataset_dir=b"])
    assert (config.train_dataset.data_loader.dataset_dir, config.eval_dataset.data_loader.dataset_dir) == ("b", "a")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["seed"], "override 'seed' expects the form section.key=value"),
        (["seed.x=3"], "override seed.x: seed is 7, not a section"),
        (
            ["load_adapter=*a"],
            "override 'load_adapter=*a' is not valid YAML (found undefined alias 'a' "
            "(line 1, column 1)): quote the value",
        ),
    ],
)
def test_impossible_overrides(yaml_file, overrides, message):
    assert error_of(yaml_file(LORA + "seed: 7"), options=overrides) == message


def test_unreadable_files(yaml_file, tmp_path):
    missing = str(tmp_path / "none.yaml")
    assert error_of(missing) == f"cannot read config {missing}: No such file or directory"
    assert error_of(str(tmp_path)) == f"{tmp_path}: not a regular file"
    path = yaml_file("seed: 1\n  x: 2\n")
    assert error_of(path) == f"{path} is not valid YAML: mapping values are not allowed here (line 2, column 4)"
    assert error_of(yaml_file("- 1\n")) == f"{path}: the top level expects a mapping (key: value), got list"
    assert error_of(yaml_file("seed: 1\nseed: 2\n")) == (
        f"{path} is not valid YAML: key 'seed' is given twice (line 2, column 1)"
    )
    assert error_of(yaml_file("[1]: 2")) == f"{path} is not valid YAML: found unhashable key (line 1, column 1)"
    assert error_of(yaml_file("1: 2\npet_config: null")) == f"{path}: 1 is not text: quote the key"
    assert error_of(yaml_file("model: {model_config: 3}")) == (
        f"{path}: model.model_config expects a mapping of keys, got 3"
    )
    assert error_of(yaml_file("pet_config: null\nmodel: 3")) == "model expects a mapping of keys, got 3"
    assert error_of(yaml_file("a: &a [*a]\n")) == (
        f"{path} is not valid YAML: an anchor contains itself (line 1, column 4)"
    )
    (tmp_path / "run.yaml").write_bytes(b"seed: 1 # \xff\n")
    assert error_of(path) == f"{path} is not UTF-8 text (byte 10): save it as UTF-8"


def test_merge_keys_still_override(yaml_file):
    config = load_config(yaml_file(LORA + "train_dataset: &d {num_samples: 3}\neval_dataset: {<<: *d, num_samples: 4}"))
    assert (config.train_dataset.num_samples, config.eval_dataset.num_samples) == (3, 4)


def test_pet_config_missing_null_or_defaulted(yaml_file):
    assert load_config(None).pet_config == PetConfig()
    path = yaml_file("seed: 1")
    missing = (
        f"{path}: pet_config is missing: add model.model_config.pet_config, {{}} for LoRA as it is by default, or null "
        "to train all parameters"
    )
    assert error_of(path) == missing
    assert error_of(path, flags={"run_mode": "train"}) == missing
    assert load_config(path, flags={"run_mode": "predict"}).pet_config is None
    assert load_config(path, options=["pet_config.lora_rank=2"]).pet_config.lora_rank == 2
    for text in ("pet_config: null", "pet_config:", "model: {model_config: {pet_config: null}}"):
        config = load_config(yaml_file(text))
        assert config.pet_config is None
        dump_config(config, path)
        assert load_config(path).pet_config is None


def test_pet_config_in_both_places(yaml_file):
    path = yaml_file(LORA + "pet_config: {lora_rank: 8}")
    assert error_of(path) == (
        "pet_config is given twice: {'lora_rank': 8} at the top level and {'lora_rank': 4} in "
        "model.model_config; remove one of them"
    )
    assert load_config(yaml_file(LORA + "pet_config: {lora_rank: 4}")).pet_config.lora_rank == 4
    assert load_config(yaml_file("pet_config: {lora_rank: 5}")).pet_config.lora_rank == 5
    assert RunConfig.model_validate({"pet_config": {"lora_rank": 6}}).pet_config.lora_rank == 6


def test_dump_writes_beside_and_says_where_it_cannot(tmp_path):
    config = load_config(
        None,
        options=[
            "pet_config.target_modules=[q_proj, v_proj]",
            "data_fill={NAME: 小明}",
            "model.model_config.eos_token_id=[1, 2]",
            "resume_training=step_3",
        ],
    )
    dump_config(config, str(tmp_path / "config.yaml"))
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]
    assert load_config(str(tmp_path / "config.yaml")) == config
    (tmp_path / "file").touch()
    nowhere = str(tmp_path / "file" / "config.yaml")
    with pytest.raises(LoraMsError) as caught:
        dump_config(config, nowhere)
    assert str(caught.value) == f"cannot write {nowhere}: File exists"


def given(section) -> object:
    """What a configuration holds, with the keys that were given where that counts."""
    if isinstance(section, list):
        return [given(entry) for entry in section]
    if not isinstance(section, Section):
        return section
    said = {name for name in section.model_fields_set if name in section.given_counts()}
    return said, {name: given(value) for name, value in section}


@pytest.mark.parametrize("file", sorted((ROOT / "configs").rglob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_configs_are_the_same_once_written_and_read(file, tmp_path):
    config = load_config(str(file))
    dump_config(config, str(tmp_path / "config.yaml"))
    found = load_config(str(tmp_path / "config.yaml"))
    assert given(found) == given(config) and found.notices() == config.notices()
    assert found.eval_intervals == config.eval_intervals


OPTIONS = [
    (["eval_epoch_interval=1"], (0, 1)),
    (["eval_step_interval=7"], (7, 0)),
    (["callbacks=[{type: EvalCallBack, epoch_interval: 2}]"], (0, 2)),
    (["callbacks=[{type: EvalCallBack, step_interval: 3}]"], (3, 0)),
    (["callbacks=[{type: EvalCallBack}]", "eval_step_interval=20"], (20, 0)),
    (["callbacks=[{type: ProfileMonitor, start_step: 3}]"], (100, 0)),
    (["train_dataset.validation_split=0.1"], (100, 0)),
    (["pet_config.pet_type=adalora", "pet_config.lora_dropout=0.0"], (100, 0)),
    (["model.model_config.max_new_tokens=128"], (100, 0)),
]


@pytest.mark.parametrize(("options", "intervals"), OPTIONS)
def test_what_was_not_given_is_not_given_once_written_and_read(options, intervals, tmp_path):
    config = load_config(None, options=["pet_config={}", *options])
    dump_config(config, str(tmp_path / "config.yaml"))
    found = load_config(str(tmp_path / "config.yaml"))
    assert given(found) == given(config) and found.notices() == config.notices()
    assert found.eval_intervals == config.eval_intervals == intervals
    assert found.pet_config is not None and config.pet_config is not None


def test_mindformers_is_told_the_same_once_its_configuration_is_written_and_read(yaml_file, tmp_path):
    text = LORA + "backend: mindformers\nseed: 3\noptimizer: {type: AdamW, eps: 1.e-6}\n"
    config = load_config(yaml_file(text))
    dump_config(config, str(tmp_path / "config.yaml"))
    found = load_config(str(tmp_path / "config.yaml"))
    assert found.model_dump(exclude_unset=True) == config.model_dump(exclude_unset=True)
    assert found == config and found.mindformers_sections == config.mindformers_sections


@pytest.mark.parametrize("handler", ["100", "-1.5", "True", "[AlpacaInstructDataHandler]", "[3]", "{type: Other}"])
def test_a_handler_that_is_none(handler):
    with pytest.raises(LoraMsError, match=r"expects a list of \{type: AlpacaInstructDataHandler"):
        load_config(None, options=["pet_config={}", f"train_dataset.data_loader.handler={handler}"])


def test_a_missing_pet_config_hides_no_unknown_key(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("run_mode: finetune\nlearning_rat: 3\n")
    with pytest.raises(LoraMsError, match="unknown key learning_rat; did you .*; pet_config is missing: add model"):
        load_config(str(path))
