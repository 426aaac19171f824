"""What is fuzzed: for each reader, a folder of good files, a damage to one of them, and the call that reads it."""

import functools
import json
import random
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import mutations as damage

from lora_ms.config import load_config
from lora_ms.data.pipeline import read_rows

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "examples" / "tiny" / "model"
ADAPTER = ROOT / "tests" / "reference" / "adapters" / "qwen2"
BASE = ROOT / "tests" / "reference" / "models" / "qwen2"
MESSAGES = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]
ROWS = [
    {"instruction": "Who are you?", "input": "", "output": "Tiny.", "history": [["a", "b"]]},
    {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
    {
        "messages": MESSAGES,
        "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}],
    },
    {"prompt": "p", "completion": "c"},
    {"text": "t"},
    {"input_ids": [1, 2, 3], "labels": [-100, 2, 3]},
]

Damage = Callable[[random.Random, bytes], bytes]


class Reader(NamedTuple):
    """prepare: fills an empty folder with good files and returns names of files and how each is damaged."""

    prepare: Callable[[Path, random.Random], dict[str, Damage]]
    read: Callable[[Path], object]


def config_folder(folder: Path, rng: random.Random) -> dict[str, Damage]:
    (folder / "config.json").write_bytes((BASE / "config.json").read_bytes())
    settings = {"eos_token_id": [1, 2], "temperature": 0.7, "top_k": 20, "top_p": 0.8, "repetition_penalty": 1.05}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    for file in BASE.glob("model*"):
        shutil.copyfile(file, folder / file.name)
    names = ("config.json", "config.json", "generation_config.json", "model.safetensors.index.json")
    return dict.fromkeys(names, damage.damaged_json)


def read_config(folder: Path) -> object:
    from lora_ms.hf_folder import open_model, sampling_defaults
    from lora_ms.models.decoder import weight_shapes
    from lora_ms.models.hub import check_names, read_config

    sizes, hf = read_config(folder)
    found = open_model(folder, hf)
    check_names(weight_shapes(sizes), {name: entry.shape for name, entry in found.entries.items()}, str(folder))
    return sampling_defaults(folder)


def safetensors_file(folder: Path, rng: random.Random) -> dict[str, Damage]:
    shutil.copyfile(ADAPTER / "adapter_model.safetensors", folder / "x.safetensors")
    return {"x.safetensors": damage.damaged_safetensors}


def read_safetensors(folder: Path) -> object:
    """What our reader takes, the library must take, and say the same of it."""
    from safetensors import deserialize

    from lora_ms.storage import DTYPES, read, read_header

    entries = read_header(folder / "x.safetensors")
    try:
        theirs = dict(deserialize((folder / "x.safetensors").read_bytes()))
    except Exception as error:
        raise AssertionError(f"the library refuses it: {error}") from error
    assert {n: (e.dtype, list(e.shape)) for n, e in entries.items()} == {
        n: (t["dtype"], list(t["shape"])) for n, t in theirs.items()
    }
    for entry in entries.values():
        if entry.dtype in DTYPES:
            read(entry, "float32")
    return len(entries)


def adapter_folder(folder: Path, rng: random.Random) -> dict[str, Damage]:
    source = rng.choice([ADAPTER, *sorted((ROOT / "tests/reference/variants").glob("qwen2_*/"))])
    shutil.copytree(source, folder, dirs_exist_ok=True)
    files: dict[str, Damage] = {"adapter_config.json": damage.damaged_json}
    if rng.random() < 0.3:
        files = {"adapter_model.safetensors": damage.damaged_safetensors}
    return files


def read_adapter(folder: Path) -> object:
    from lora_ms.adapters.check import base_entries, check_files
    from lora_ms.adapters.offline_merge import read_updates

    found = list(check_files(folder, BASE))
    read_updates(folder, base_entries(BASE))
    return found


def jsonl_file(folder: Path, rng: random.Random) -> dict[str, Damage]:
    row = rng.choice(ROWS)
    name = rng.choice(("rows.jsonl", "rows.json"))
    lines = [json.dumps(row), json.dumps(damage.damaged_value(rng, row)), json.dumps(row)]
    text = "[" + ",".join(lines) + "]" if name == "rows.json" else "\n".join(lines)
    (folder / name).write_bytes(text.encode(errors="surrogatepass"))
    return {name: damage.damaged_bytes if rng.random() < 0.5 else lambda rng, content: content}


def csv_file(folder: Path, rng: random.Random) -> dict[str, Damage]:
    (folder / "rows.csv").write_text('instruction,output,history\nq,a,"[[""x"", ""y""]]"\n"q ""2""","a\nb",\n', "utf-8")
    return {"rows.csv": damage.damaged_bytes}


def parquet_file(folder: Path, rng: random.Random) -> dict[str, Damage]:
    import pyarrow
    import pyarrow.parquet

    row = rng.choice(ROWS)
    table = pyarrow.Table.from_pylist([row] * 20)
    pyarrow.parquet.write_table(table, folder / "rows.parquet", compression=rng.choice(("snappy", "none", "zstd")))
    return {"rows.parquet": damage.damaged_bytes}


def saved_dataset(folder: Path, rng: random.Random) -> dict[str, Damage]:
    import datasets

    datasets.disable_progress_bars()
    datasets.Dataset.from_list([rng.choice(ROWS)] * 20).save_to_disk(str(folder / "saved"))
    files: dict[str, Damage] = {
        "saved/state.json": damage.damaged_json,
        "saved/dataset_info.json": damage.damaged_json,
        "saved/data-00000-of-00001.arrow": damage.damaged_bytes,
    }
    return files


def read_data(folder: Path) -> object:
    return read_rows(next(folder.iterdir()))


def yaml_file(folder: Path, rng: random.Random) -> dict[str, Damage]:
    source = rng.choice(sorted((ROOT / "configs").glob("*/*.yaml")))
    shutil.copyfile(source, folder / "run.yaml")
    return {"run.yaml": damage.damaged_yaml}


def read_yaml(folder: Path) -> object:
    return load_config(str(folder / "run.yaml"), options=["context.low_memory=True"])


def tokenizer_folder(folder: Path, rng: random.Random) -> dict[str, Damage]:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(MODEL / name, folder / name)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings |= {
        "additional_special_tokens": ["<a>"],
        "extra_special_tokens": {"image_token": "<i>"},
        "model_max_length": 9,
    }
    token = {"content": "<b>", "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    settings |= {"added_tokens_decoder": {"5": token}, "tokenizer_file": "/x/tokenizer.json"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return {rng.choice(("tokenizer.json", "tokenizer_config.json")): damage.damaged_json}


def read_tokenizer(folder: Path) -> object:
    from lora_ms.data.template import encode_text
    from lora_ms.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(folder)
    return encode_text(tokenizer, "Who are you? " + "a" * 30)


def template_file(folder: Path, rng: random.Random) -> dict[str, Damage]:
    source = rng.choice(sorted((ROOT / "tests/data/families").glob("*.jinja")))
    shutil.copyfile(source, folder / "chat.jinja")
    return {"chat.jinja": damage.damaged_template}


_tokenizers: list[Any] = []


def read_template(folder: Path) -> object:
    from lora_ms.data.formats import RawRow, parse_rows
    from lora_ms.data.template import encode_rows, set_template
    from lora_ms.data.tokenizer import load_tokenizer

    if not _tokenizers:
        _tokenizers.append(load_tokenizer(MODEL))
    set_template(_tokenizers[0], str(folder / "chat.jinja"))
    rows = list(parse_rows([RawRow(None, "row 1", ROWS[2])]))
    return encode_rows(_tokenizers[0], rows)


def checkpoint_file(folder: Path, rng: random.Random) -> dict[str, Damage]:
    import mindspore as ms
    import numpy as np

    values = [{"name": f"layers.{i}.wq.weight", "data": ms.Tensor(np.ones((4, 4), np.float32))} for i in range(3)]
    ms.save_checkpoint(values, str(folder / "x.ckpt"))
    (folder / "x.ckpt").chmod(0o644)
    return {"x.ckpt": damage.damaged_bytes}


def read_checkpoint(folder: Path) -> object:
    from lora_ms.bridge.files import read_file

    return read_file(folder / "x.ckpt")


@functools.cache
def good_gguf() -> bytes:
    """The reference model of Llama's family, with a tokenizer of letters."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from lora_ms.recipes.gguf import export

    pieces = [*map(chr, range(33, 127)), "he"]
    letters = Tokenizer(models.BPE({piece: n for n, piece in enumerate(pieces)}, [("h", "e")]))
    letters.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    with tempfile.TemporaryDirectory() as place:
        base, out = Path(place) / "model", Path(place) / "out"
        shutil.copytree(ROOT / "tests/reference/models/llama3", base)
        PreTrainedTokenizerFast(tokenizer_object=letters, eos_token="~").save_pretrained(base)
        export(base, None, out, dtype="auto", with_base=False, overwrite=False)
        return (out / "model.gguf").read_bytes()


def gguf_file(folder: Path, rng: random.Random) -> dict[str, Damage]:
    (folder / "x.gguf").write_bytes(good_gguf())
    head = rng.choice((64, 1000, 8000))
    return {"x.gguf": lambda dice, content: damage.damaged_bytes(dice, content, head)}


def read_gguf(folder: Path) -> object:
    from lora_ms.recipes.gguf import to_hugging_face

    return to_hugging_face(folder / "x.gguf", folder / "out", None, dtype="auto", shard_size=10**9, overwrite=False)


READERS: dict[str, Reader] = {
    "json": Reader(config_folder, read_config),
    "safetensors": Reader(safetensors_file, read_safetensors),
    "adapter": Reader(adapter_folder, read_adapter),
    "jsonl": Reader(jsonl_file, read_data),
    "csv": Reader(csv_file, read_data),
    "parquet": Reader(parquet_file, read_data),
    "dataset": Reader(saved_dataset, read_data),
    "yaml": Reader(yaml_file, read_yaml),
    "tokenizer": Reader(tokenizer_folder, read_tokenizer),
    "template": Reader(template_file, read_template),
    "checkpoint": Reader(checkpoint_file, read_checkpoint),
    "gguf": Reader(gguf_file, read_gguf),
}


def written(name: str, number: int, seed: int, folder: Path) -> None:
    """Fills an empty folder with case ``number`` of reader ``name``: the same files for the same seed."""
    rng = random.Random(f"{seed} {name} {number}")
    files = READERS[name].prepare(folder, rng)
    file = rng.choice(list(files))
    content = (folder / file).read_bytes()
    (folder / file).write_bytes(files[file](rng, content))


def names_of(asked: str | None) -> Iterator[str]:
    """The readers to fuzz: the asked one, or all."""
    yield from READERS if asked is None else [asked]
