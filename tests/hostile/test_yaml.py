"""YAML files and overrides."""

import pytest

from lora_ms.config import load_config
from lora_ms.errors import LoraMsError

PET = "model: {model_config: {pet_config: {lora_rank: 4}}}\n"
BOMB = "l0: &l0 [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"l{i}: &l{i} [{','.join([f'*l{i - 1}'] * 9)}]\n" for i in range(1, 10)
)
MERGES = "m0: &m0 {a: 1}\n" + "".join(f"m{i}: &m{i} {{<<: [{','.join([f'*m{i - 1}'] * 9)}]}}\n" for i in range(1, 10))
TEXTS = {
    "aliases": BOMB,
    "merged aliases": MERGES,
    "an anchor in itself": "a: &a [*a]\n",
    "a merge of itself": "a: &a {<<: *a}\n",
    "6,000 digits": f"seed: {'9' * 6000}\n",
    "6,000 hex digits": f"seed: 0x{'f' * 6000}\n",
    "a day that is none": "seed: 2001-99-99\n",
    "a number that is none": "seed: !!float x\n",
    "no number": "seed: !!int ''\n",
    "no time": "seed: !!timestamp x\n",
    "no flag": "seed: !!bool x\n",
    "no binary": "seed: !!binary '%'\n",
    "deep": f"a: {'[' * 3000}{']' * 3000}\n",
    "a Python object": "seed: !!python/object/apply:os.system ['touch EXECUTED']\n",
    "an unknown tag": "seed: !x 1\n",
    "a list as a key": "? [1]\n: 2\n",
    "a section that is text": "context: x\n",
    "a section that is a list": "runner_config: [1]\n",
    "a section that is a number": "train_dataset: 5\n",
    "callbacks that are a mapping": "callbacks: {a: 1}\n",
    "callbacks of lists": "callbacks: [[1]]\n",
    "infinity": "seed: .inf\n",
    "two documents": "--- {}\n--- {}\n",
    "a control character": "seed: \x07\n",
    "not closed": "seed: [\n",
    "a text": "x",
    "a list": "- 1\n",
    "many values": "a: [" + "1," * 100_001 + "]\n",
    "a large file": "#" * 10**6 + "\n",
}


@pytest.mark.parametrize("what", TEXTS)
def test_yaml(tmp_path, what):
    (tmp_path / "run.yaml").write_text(
        TEXTS[what] if what in ("two documents", "a text", "a list") else PET + TEXTS[what]
    )
    with pytest.raises(LoraMsError) as error:
        load_config(str(tmp_path / "run.yaml"), options=["context.low_memory=True"] if "section" not in what else [])
    assert str(error.value).startswith(str(tmp_path / "run.yaml")) and len(str(error.value)) < 2000


@pytest.mark.parametrize(
    "value", ["2001-99-99", "9" * 6000, "!!float x", "[" * 3000, "*a", "&a [*a]", "[", "!!python/name:os.system"]
)
def test_overrides(value):
    with pytest.raises(LoraMsError, match="^override 'seed="):
        load_config(None, options=[f"seed={value}"])


def test_many_unknown_keys_are_said_in_one_line(tmp_path):
    (tmp_path / "run.yaml").write_text(PET + "".join(f"k{number}: 1\n" for number in range(3000)))
    with pytest.raises(LoraMsError) as error:
        load_config(str(tmp_path / "run.yaml"))
    text = str(error.value)
    assert text.count("unknown key") == 10 and text.endswith("; and 2,990 more faults")
