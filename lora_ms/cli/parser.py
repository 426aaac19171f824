"""The parser of the command line, and the commands that need no configuration."""

import argparse
from typing import Any, NamedTuple, NoReturn

from lora_ms import __version__
from lora_ms.cli.flags import flag_bool, flag_float, flag_int, flag_path
from lora_ms.errors import LoraMsError


class Parser(argparse.ArgumentParser):
    """Reports a wrong flag like every other error of the user's: one line, status 2."""

    def error(self, message: str) -> NoReturn:
        raise LoraMsError(f"{message} (see {self.prog} --help)")


class Help(argparse.HelpFormatter):
    """Flags in a narrow left column, so that the text fits 80 columns."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=30, width=79)


class ListHelp(Help, argparse.RawDescriptionHelpFormatter):
    """``Help`` that leaves the lines of the epilog as they are."""


class Version(argparse.Action):
    """``--version``."""

    def __call__(self, *_: Any) -> None:
        print("lora-ms", __version__)
        raise SystemExit(0)


class Flag(NamedTuple):
    """A flag of a command that needs no configuration.

    ``required`` is checked by us, after unknown flags: argparse would report what is missing first. Without a ``kind``
    the flag takes no value. The value of one that is ``first`` may also stand alone, after the command.
    """

    name: str
    kind: Any
    placeholder: str
    text: str
    default: Any = None
    required: bool = False
    nargs: str | None = None
    first: bool = False
    other: str = ""  # a second name

    @property
    def argument(self) -> str:
        """Its name as an argument in Python."""
        return self.name.replace("-", "_")


class Tool(NamedTuple):
    """A command that needs no configuration."""

    summary: str
    flags: tuple[Flag, ...]
    notes: str = ""  # stands below the flags, in lines of at most 79 characters


BASE = "the model's Hugging Face folder; default: the one the adapter names"
CONCAT = "write q, k, v as one matrix, gate and up as one (default False)"
CONTIGUOUS = "stack the parts of a fused matrix (default False: interleave)"
TOOLS = {
    "merge": Tool(
        "merge an adapter into its model, as a Hugging Face folder",
        (
            Flag("load_adapter", str, "DIR", "adapter folder", required=True),
            Flag("load_checkpoint", str, "DIR", BASE),
            Flag("output_dir", flag_path, "DIR", "where the merged model goes", required=True),
            Flag("dtype", str, "TYPE", "float16, bfloat16, float32; auto (default): as stored", "auto"),
            Flag("max_shard_size", str, "SIZE", "largest file, such as 500MB (default 5GB)", "5GB"),
            Flag("safe_merge", flag_bool, "BOOL", "refuse NaN and infinity (default True)", True),
            Flag("overwrite", flag_bool, "BOOL", "replace a model in output_dir (default False)", False),
            Flag("onto", str, "NAME", "for 4-bit training: merge onto the original or the dequantized weights"),
        ),
    ),
    "quantize": Tool(
        "write a model with weights in four bits (bitsandbytes' NF4)",
        (
            Flag("load_checkpoint", str, "DIR", "the model's Hugging Face folder", required=True),
            Flag("output_dir", flag_path, "DIR", "where the quantised model goes", required=True),
            Flag("type", str, "NAME", "nf4 (default)", "nf4"),
            Flag("double", None, "", "quantise the scales as well: 4.13 bits a number instead of 4.5"),
            Flag("max_shard_size", str, "SIZE", "largest file, such as 500MB (default 5GB)", "5GB"),
            Flag("overwrite", flag_bool, "BOOL", "replace a model in output_dir (default False)", False),
        ),
    ),
    "check-adapter": Tool(
        "check an adapter: complete, fits its model, servable",
        (
            Flag("load_adapter", str, "DIR", "adapter folder", required=True),
            Flag("load_checkpoint", str, "DIR", BASE),
        ),
    ),
    "doctor": Tool(
        "check this machine: versions, devices, memory, processes",
        (
            Flag("msrun", flag_bool, "BOOL", "start two processes as a test (default True)", True),
            Flag("clear-cache", None, "", "only remove the compiled graphs that are kept"),
        ),
    ),
    "adapters combine": Tool(
        "combine several adapters into one",
        (
            Flag("adapters", str, "DIR", "adapter folders of one model", required=True, nargs="+"),
            Flag("weights", flag_float, "X", "one number for each adapter", required=True, nargs="+"),
            Flag("method", str, "NAME", "one of the methods below (default linear)", "linear"),
            Flag("density", flag_float, "X", "share of values kept, for ties, dare and prune"),
            Flag("rank", flag_int, "N", "rank of the result, for the svd methods"),
            Flag("seed", flag_int, "N", "seed of the values that dare keeps (default 0)", 0),
            Flag("output_dir", flag_path, "DIR", "where the new adapter goes", required=True),
            Flag("overwrite", flag_bool, "BOOL", "replace an adapter in output_dir (default False)", False),
        ),
    ),
    "convert-adapter": Tool(
        "convert an adapter from PEFT to MindFormers, or back",
        (
            Flag("input", str, "PATH", "PEFT folder, or MindFormers' .ckpt, .safetensors or folder", required=True),
            Flag(
                "output", flag_path, "PATH", ".ckpt or .safetensors for MindFormers, a folder for PEFT", required=True
            ),
            Flag("naming", str, "NAME", "MindFormers' names to write: mindpet (default), mcore, v2", "mindpet"),
            Flag("concat", flag_bool, "BOOL", CONCAT, False),
            Flag("contiguous", flag_bool, "BOOL", CONTIGUOUS, False),
            Flag("lora_alpha", flag_float, "X", "lora_alpha, which a MindFormers checkpoint lacks"),
            Flag("load_checkpoint", str, "DIR", "the model's Hugging Face folder; needed with concat"),
            Flag("overwrite", flag_bool, "BOOL", "replace what is at output (default False)", False),
        ),
    ),
    "download": Tool(
        "fetch a model, an adapter or a dataset from a hub",
        (
            Flag("name", str, "NAME", "owner/name; the flag itself may be left out", required=True, first=True),
            Flag("kind", str, "KIND", "model (default), adapter or dataset", "model"),
            Flag("hub", str, "NAME", "hf (default) or modelscope", "hf"),
            Flag("revision", str, "NAME", "branch, tag or commit (default: the hub's)"),
            Flag("output_dir", flag_path, "DIR", "where to (default: the hub's own cache)"),
        ),
        "Only files that are used here are fetched (config, safetensors, tokenizer,\n"
        "template; rows of a dataset), never code; each is checked against the\n"
        "hub's digest. The next call continues a download that was cut. Mirrors, tokens\n"
        "and caches are the hubs' own: HF_ENDPOINT, HF_TOKEN, HF_HOME, HF_HUB_OFFLINE;\n"
        "MODELSCOPE_ENDPOINT, MODELSCOPE_API_TOKEN, MODELSCOPE_CACHE.\n"
        "--load_checkpoint, --load_adapter and --train_dataset_dir take such names, too.",
    ),
    "convert": Tool(
        "convert a model to MindFormers and back, or from GGUF",
        (
            Flag(
                "input",
                str,
                "PATH",
                "Hugging Face folder, .ckpt, .safetensors or their folder, or .gguf; the flag itself may be left out",
                required=True,
                first=True,
            ),
            Flag(
                "output",
                flag_path,
                "PATH",
                "file or folder for MindFormers, a folder for Hugging Face",
                required=True,
                other="output_dir",
            ),
            Flag("naming", str, "NAME", "MindFormers' names to write: legacy (default) or mcore", "legacy"),
            Flag("concat", flag_bool, "BOOL", CONCAT, False),
            Flag("contiguous", flag_bool, "BOOL", CONTIGUOUS, False),
            Flag(
                "load_checkpoint",
                str,
                "DIR",
                "folder with config.json and tokenizer; of a .gguf: another tokenizer",
            ),
            Flag(
                "dtype",
                str,
                "TYPE",
                "float16, bfloat16, float32; auto (default): as stored (quantised: float16)",
                "auto",
            ),
            Flag("max_shard_size", str, "SIZE", "largest file, such as 500MB (default 5GB)", "5GB"),
            Flag("overwrite", flag_bool, "BOOL", "replace what is at output (default False)", False),
        ),
        "lora-ms convert model.gguf --output_dir DIR writes a Hugging Face folder of a\n"
        "Llama, Mistral, Qwen2 or Qwen3, of any type that the gguf package reads.",
    ),
    "export gguf": Tool(
        "write a model or an adapter for llama.cpp and Ollama",
        (
            Flag("load_checkpoint", str, "DIR", "the model's Hugging Face folder (default: the adapter's own)"),
            Flag("load_adapter", str, "DIR", "adapter folder: writes adapter.gguf"),
            Flag("output_dir", flag_path, "DIR", "where the files go", required=True),
            Flag("with_base", flag_bool, "BOOL", "with an adapter: write its model as well (default False)", False),
            Flag("dtype", str, "TYPE", "float16, bfloat16, float32; auto (default): as stored", "auto"),
            Flag("overwrite", flag_bool, "BOOL", "replace what is in output_dir (default False)", False),
        ),
        "It also writes an Ollama Modelfile with the chat template of the training.\n"
        "DoRA, whole modules, trained biases and adapters on the embedding have no\n"
        "place in llama.cpp's adapters: merge those first. Quantise with llama.cpp.",
    ),
}


def add_tools(commands: Any) -> dict[str, argparse.ArgumentParser]:
    """Adds the parsers of ``TOOLS``, and returns them; ``adapters combine`` is a command of a command."""
    groups, parsers = {}, {}
    for name, tool in TOOLS.items():
        group, _, leaf = name.rpartition(" ")
        if group and group not in groups:
            outer = commands.add_parser(group, help=f"{leaf}: {tool.summary}", allow_abbrev=False)
            groups[group] = outer.add_subparsers(dest="action", metavar="ACTION", title="actions", required=True)
        needed = " ".join(
            flag.placeholder if flag.first else f"--{flag.name} {flag.placeholder}"
            for flag in tool.flags
            if flag.required
        )
        parser = parsers[name] = groups.get(group, commands).add_parser(
            leaf,
            help=tool.summary,
            description=f"lora-ms {name}: {tool.summary}.",
            allow_abbrev=False,
            formatter_class=ListHelp,
            usage=f"lora-ms {name} {needed} …",
            epilog=tool.notes,
        )
        for flag in tool.flags:
            if flag.first:
                parser.add_argument(
                    f"{flag.argument}_alone", nargs="?", metavar=flag.placeholder, help=argparse.SUPPRESS
                )
            if flag.kind is None:
                parser.add_argument(f"--{flag.name}", action="store_true", help=flag.text)
                continue
            parser.add_argument(
                *(f"--{name}" for name in (flag.name, flag.other) if name),
                type=flag.kind,
                default=flag.default,
                nargs=flag.nargs,
                metavar=flag.placeholder,
                help=flag.text,
            )
        parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
        parser.set_defaults(tool=name)
    return parsers
