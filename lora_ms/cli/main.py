"""The command line: ``lora-ms COMMAND …`` and MindFormers' ``run_mindformer.py …``, with the same flags.

Nothing heavy is imported before the flags are read, so that ``--help`` answers at once.
"""

import argparse
import atexit
import difflib
import gc
import io
import os
import shlex
import signal
import sys
import textwrap
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib import import_module
from itertools import takewhile
from typing import Any

from lora_ms.cli.flags import (
    ALIASES,
    COMMAND_FLAGS,
    FLAG_KEYS,
    IDLE_FLAGS,
    NOT_SHOWN,
    OTHER_FLAGS,
    OWN_WORDS,
    add_command_flags,
    add_flags,
)
from lora_ms.cli.parser import TOOLS, Help, Parser, Version, add_tools
from lora_ms.errors import LoraMsError, lost_connection, out_of_memory
from lora_ms.text import Escaping, shortened, wrapped

# Command -> the module whose ``run`` does it. Those of TOOLS get their flags as keyword arguments, the others a
# configuration and the flags that are theirs alone (COMMAND_FLAGS). check-adapter and doctor return a number of faults.
MODULES = {
    "finetune": "lora_ms.commands.finetune",
    "predict": "lora_ms.commands.predict",
    "chat": "lora_ms.commands.chat",
    "serve": "lora_ms.commands.serve",
    "eval": "lora_ms.commands.evaluate",
    "fisher": "lora_ms.commands.fisher",
    "sequence": "lora_ms.commands.sequence",
    "estimate": "lora_ms.commands.estimate",
    "preview": "lora_ms.commands.preview",
    "preprocess": "lora_ms.commands.preprocess",
    "merge": "lora_ms.commands.merge",
    "quantize": "lora_ms.commands.quantize",
    "check-adapter": "lora_ms.commands.check_adapter",
    "doctor": "lora_ms.commands.doctor",
    "adapters combine": "lora_ms.commands.combine",
    "convert-adapter": "lora_ms.commands.convert_adapter",
    "convert": "lora_ms.commands.convert",
    "download": "lora_ms.commands.download",
    "export gguf": "lora_ms.commands.export",
}
ABOUT = "Fine-tune Llama, Mistral, Qwen and SmolLM3 models with LoRA on MindSpore."
DRY_RUN = "lora_ms.commands.dry_run"  # of finetune
COMMANDS = {
    "finetune": "train an adapter (or, with pet_config: null, the whole model)",
    "predict": "answer the prompts of --predict_data, or of a file",
    "chat": "chat with a model and its adapter",
    "serve": "serve a model and its adapters by HTTP: OpenAI's interface, and a page",
    "eval": "score a model on eval_dataset, and its answers to a file of questions",
    "sequence": "learn several tasks in turn, and score all of them after each",
    "fisher": "measure which parameters general rows need, for the loss term ewc",
    "estimate": "estimate how much memory a run takes, and where it fits",
    "preview": "show the first rows as the model sees them, what it learns in colour; without a model, as read",
    "preprocess": "tokenise rows once, into MindRecord files; with --report only describe them",
}
# the flags that a command needs where there is no YAML
NEEDED = {
    "finetune": "--load_checkpoint PATH --train_dataset_dir PATH",
    "predict": "--load_adapter DIR --predict_data TEXT",
    "chat": "--load_adapter DIR",
    "serve": "--load_adapter DIR",
    "preview": "--load_checkpoint PATH --train_dataset_dir PATH",
}
# words that people try, and what there is
MEANT = {
    "train": "lora-ms finetune trains",
    "sft": "lora-ms finetune trains",
    "generate": "lora-ms predict answers, and lora-ms chat asks for more",
    "infer": "lora-ms predict answers, and lora-ms chat asks for more",
    "evaluate": "lora-ms eval scores a model",
    "api": "lora-ms serve answers by HTTP",
    "server": "lora-ms serve answers by HTTP",
    "webui": "lora-ms serve has a page to chat with",
}
NEAR_WORD = 0.85  # difflib's ratio from which another tool's word is meant by one
TRAINING = ("finetune", "train")  # run modes that mean the same
STEPPING = ("finetune", "sequence", "fisher")  # whose products read much memory, step after step
RUN_MODES = {
    "finetune": TRAINING,
    "predict": ("predict",),
    "chat": ("predict",),
    "serve": ("predict",),
    "eval": ("eval",),
    "fisher": TRAINING,
    "sequence": TRAINING,
    "estimate": TRAINING,
    "preview": TRAINING,
    "preprocess": TRAINING,
}


def main(argv: Sequence[str] | None = None) -> int:
    """``lora-ms``. Returns the exit status: 0, 2 for an error of the user's, 130 when interrupted."""
    if argv is not None:
        return _guarded(_lora_ms, list(argv))
    return _alone(_lora_ms, steps=bool({*sys.argv[1:2]} & {*STEPPING}))


def run_mindformer(argv: Sequence[str] | None = None) -> int:
    """``run_mindformer.py``: the command is ``--run_mode``, else the YAML's ``run_mode``. Returns the exit status."""
    if argv is not None:
        return _guarded(_run_mindformer, list(argv))
    return _alone(_run_mindformer, steps=not {"predict", "eval"} & {*sys.argv})


def _alone(command: Callable[[list[str]], int], steps: bool) -> int:
    """Runs ``command`` with the arguments of this process, which does nothing else.

    The libraries make half a million objects that stay. Python, which looks through them again and again, takes a tenth
    of the time of their import for that; and as a process ends, it takes all of them apart, and MindSpore its memory:
    a fifth of a second. Here it ends as soon as what was registered for its end (``atexit``) has run.
    """
    if steps:
        from lora_ms.runtime.host import start_with_huge_pages

        start_with_huge_pages()
    gc.set_threshold(50_000, 20, 20)
    status = [1]  # as Python's, where an exception ends it
    atexit.register(_leave, os.getpid(), status)  # what is registered first runs last
    status[0] = _guarded(command, sys.argv[1:])
    return status[0]


def _leave(process: int, status: list[int]) -> None:
    if os.getpid() != process:  # a fork
        return
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # closed
            stream.flush()
    os._exit(status[0])


def _guarded(command: Callable[[list[str]], int], argv: list[str]) -> int:
    streams = sys.stdout, sys.stderr
    for stream in streams:
        if isinstance(stream, io.TextIOWrapper):  # what the terminal cannot show is replaced
            stream.reconfigure(errors="replace")
    # a progress bar returns to the beginning of its line
    sys.stdout, sys.stderr = Escaping(sys.stdout), Escaping(sys.stderr, keep="\r")  # type: ignore[assignment]
    try:
        try:
            status = command(argv)
        except SystemExit as stop:  # argparse, after --help or --version
            status = int(stop.code or 0)
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `… | head`: nobody reads on, and the flush at exit must not complain either
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except BaseException as fault:  # a panic of a library in Rust is no Exception
        if "--debug" in argv:
            raise
        print(wrapped(f"error: {shortened(' '.join(_said_of(fault).split()))}", streams[1]), file=sys.stderr)
        return 2
    finally:
        sys.stdout, sys.stderr = streams


def _said_of(fault: BaseException) -> str:
    if isinstance(fault, LoraMsError):
        return str(fault)
    return (
        out_of_memory(fault)
        or lost_connection(fault)
        or f"{type(fault).__name__}: {fault} (this should not happen: add --debug to see where, and report it)"
    )


def build_parser() -> tuple[Parser, dict[str, argparse.ArgumentParser]]:
    """The parser of ``lora-ms``, and that of each command by name."""
    parser = Parser(prog="lora-ms", description=ABOUT, allow_abbrev=False)
    parser.add_argument("--version", action=Version, nargs=0, help="print the version and stop")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands", required=True)
    parsers = {}
    for name, summary in COMMANDS.items():
        command = parsers[name] = commands.add_parser(
            name,
            help=summary,
            description=f"lora-ms {name}: {summary}.",
            allow_abbrev=False,
            formatter_class=Help,
            usage=usage_of(name),
        )
        add_flags(command, name)
        add_command_flags(name, command)
    return parser, parsers | add_tools(commands)


def usage_of(command: str) -> str:
    """How a command with a configuration is called: with the flags that it needs, or with a YAML."""
    if command not in NEEDED:
        return f"lora-ms {command} [--config YAML] [flags]"
    return f"lora-ms {command} {NEEDED[command]} [flags]\n       lora-ms {command} --config YAML [flags]"


def _lora_ms(argv: list[str]) -> int:
    known, free_form = split_free_form(argv)
    if not known or known in (["adapters"], ["export"]):
        known.append("--help")
    _check_command(known[0])
    _check_action(*known[:2])
    parser, parsers = build_parser()
    if known[:2] == ["adapters", "combine"] and {"-h", "--help"} & {*known}:
        parsers["adapters combine"].epilog = combination_methods()
    args = _parse(parser, known, free_form)
    if args.tool is not None:
        return _run_tool(args)
    without_model = args.command == "preview" and args.load_adapter is None  # rows as they were read
    if args.config is None and args.load_checkpoint is None and not without_model:
        args.load_checkpoint = _base_of(args.load_adapter or _first_of(getattr(args, "lora_modules", ())), args.hub)
    allowed = RUN_MODES[args.command]
    if args.run_mode is None:
        args.run_mode = allowed[0]
    elif args.run_mode not in allowed:
        raise LoraMsError(f"--run_mode {args.run_mode} contradicts the command {args.command}: leave the flag out")
    return _run_command(args.command, args, free_form)


def _check_command(word: str) -> None:
    """Raises LoraMsError where ``word`` is no command, naming the one that was probably meant."""
    known = {*COMMANDS, *(name.partition(" ")[0] for name in TOOLS)}
    if word.startswith("-") or word in known:
        return
    near = difflib.get_close_matches(word, [*known, *MEANT], 1)
    hint = MEANT.get(near[0], f"did you mean {near[0]}?") if near else "lora-ms --help lists them"
    raise LoraMsError(f"there is no command {word!r}: {hint}")


def _check_action(command: str, word: str = "") -> None:
    """Raises LoraMsError where a flag stands in the place of the second word of ``command``."""
    action = next((name for name in TOOLS if name.startswith(f"{command} ")), None)
    if action is not None and word.startswith("-") and word not in ("-h", "--help"):
        raise LoraMsError(f"the command is lora-ms {action}: write its second word before the flags")


def _run_mindformer(argv: list[str]) -> int:
    known, free_form = split_free_form(argv)
    parser = Parser(
        prog="run_mindformer.py",
        description=ABOUT,
        allow_abbrev=False,
        formatter_class=Help,
        usage="run_mindformer.py --config YAML [flags]",
    )
    add_flags(parser)
    args = _parse(parser, known, free_form)
    if args.config is None:
        raise LoraMsError("--config is missing: give a YAML, such as configs/llama2/lora_llama2_7b.yaml")
    return _run_command(None, args, free_form)


def _run_tool(args: argparse.Namespace) -> int:
    _quiet_libraries()
    given = {flag.argument: getattr(args, flag.argument) for flag in TOOLS[args.tool].flags}
    _fetch_named(given)
    faults = import_module(MODULES[args.tool]).run(**given)
    return 2 if faults else 0


def _run_command(command: str | None, args: argparse.Namespace, free_form: list[str]) -> int:
    """Runs ``command``; None: the one that the configuration's ``run_mode`` means."""
    from lora_ms.config import load_config

    _quiet_libraries()
    config = load_config(
        args.config, preset=args.preset, flags=flags_of(args), options=args.options, free_form=free_form
    )
    if config.use_parallel and os.environ.get("MS_ROLE") == "MS_SCHED":
        from lora_ms.recipes import session

        return session.serve_scheduler()
    workers = os.environ.get("MS_WORKER_NUM", "")
    if not config.use_parallel and workers.isdigit() and int(workers) > 1:
        raise LoraMsError(f"msrun has started {workers} processes, and use_parallel is False: add --use_parallel True")
    if config.context.low_memory:
        _few_compilers()
    command = command or {"train": "finetune"}.get(config.run_mode, config.run_mode)
    if command == "eval" and args.num_samples is not None:
        config.eval_dataset.num_samples = args.num_samples
    if command == "predict" and not args.predict_data and args.predict_file is None:
        raise LoraMsError('nothing to predict: give --predict_data "a prompt" "another", or --predict_file FILE')
    if args.dry_run is not None and command != "finetune":
        raise LoraMsError(f"--dry_run checks a finetune, not {command}: leave it out")
    if args.system is not None and "system" not in COMMAND_FLAGS.get(command, ()):
        raise LoraMsError(f"--system is for predict and chat, not {command}: leave it out (rows have their own)")
    for flag in ("predict_file", "predict_output"):
        if getattr(args, flag) is not None and command != "predict":
            raise LoraMsError(f"--{flag} is for predict, not {command}: leave it out")
    from lora_ms.recipes.download import fetch_named

    fetch_named(config, command)
    if args.dry_run is not None:
        import_module(DRY_RUN).run(config, args.dry_run)
        return 0
    with _ended_by_ctrl_c():
        from lora_ms.recipes.reading_ahead import begin, end

        begin(config, command)
        module = import_module(MODULES[command])
    try:
        module.run(config, **{flag: getattr(args, flag) for flag in COMMAND_FLAGS.get(command, ())})
    finally:
        end()
    return 0


def _fetch_named(given: dict[str, Any]) -> None:
    """Puts folders in the place of a hub's names."""
    for name, kind in (("load_checkpoint", "model"), ("load_adapter", "adapter")):
        if given.get(name) is not None:
            from lora_ms.recipes.download import local_folder

            given[name] = str(local_folder(given[name], kind, said=f"{name}: "))


def _base_of(adapter: str | None, hub: str | None) -> str:
    """The model that the adapter names, for a command without a YAML and without ``--load_checkpoint``."""
    if adapter is None:
        raise LoraMsError(
            "what model? give --load_checkpoint with a model's folder, --load_adapter with an adapter's, "
            "or --config FILE.yaml"
        )
    from lora_ms.recipes.download import local_folder
    from lora_ms.recipes.model_folder import base_of

    hub = hub or "hf"
    return str(base_of(local_folder(adapter, "adapter", hub, said="load_adapter: "), None, hub))


def _first_of(modules: Sequence[str]) -> str | None:
    """The folder of the first ``name=folder``."""
    return modules[0].partition("=")[2] or None if modules else None


def combination_methods() -> str:
    """What ``adapters combine --method`` takes, in lines of at most 79 characters."""
    from lora_ms.commands.combine import methods

    lines = [textwrap.fill(f"  {name:22}{text}", 79, subsequent_indent=" " * 24) for name, text in methods().items()]
    return "\n".join(("methods:", *lines))


def _quiet_libraries() -> None:
    # Before the libraries are imported: MindSpore logs errors only, transformers does not advise to install torch,
    # and fused kernels (context.enable_graph_kernel) get no OpenMP threads, which would spin beside MindSpore's own
    # pool: on two cores that doubles the time of a step.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("GLOG_v", "3")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")


@contextmanager
def _ended_by_ctrl_c() -> Iterator[None]:
    """Ctrl-C ends the process silently: raised as an exception in the middle of MindSpore's import, it crashes."""
    python = signal.default_int_handler
    ours = signal.getsignal(signal.SIGINT) is python and threading.current_thread() is threading.main_thread()
    try:
        if ours:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
        yield
    finally:
        if ours:
            signal.signal(signal.SIGINT, python)


def _few_compilers() -> None:
    # Ascend's operator compiler starts a process for each core, of some hundred MB each
    for name in ("MAX_COMPILE_CORE_NUMBER", "TE_PARALLEL_COMPILER"):
        os.environ.setdefault(name, "1")


def use_aliases(args: argparse.Namespace) -> None:
    """Puts what was given under another name in its place. Raises LoraMsError where both were given."""
    for alias, flag in ALIASES.items():
        value = getattr(args, alias)
        if value is None:
            continue
        if getattr(args, flag) is not None:
            raise LoraMsError(f"--{alias} is another name of --{flag}, and both are given: leave one out")
        setattr(args, flag, value)


def flags_of(args: argparse.Namespace) -> dict[str, object]:
    """Configuration keys and values of the flags that were given."""
    given = {key: getattr(args, flag) for flag, key in FLAG_KEYS.items()}
    given |= {f"data_fill.{name}": text for name, text in args.fill}
    return {key: value for key, value in given.items() if value is not None}


def split_free_form(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split off ``--a.b.c v`` and ``--a.b.c=v``: (the other arguments, ``["a.b.c=v", …]``)."""
    rest: list[str] = []
    free_form: list[str] = []
    words = iter(argv)
    for word in words:
        key, equals, value = word.removeprefix("--").partition("=")
        if not word.startswith("--") or "." not in key or not key.replace(".", "").replace("_", "").isalnum():
            rest.append(word)
            continue
        if not equals:
            value = next(words, "--")
            if value.startswith("--"):
                raise LoraMsError(f"{word} has no value: write {word} VALUE")
        free_form.append(f"{key}={value}")
    return rest, free_form


def _parse(parser: Parser, argv: list[str], free_form: list[str]) -> argparse.Namespace:
    parser.set_defaults(tool=None)
    args, unknown = parser.parse_known_args(argv)
    own = COMMAND_FLAGS.get(getattr(args, "command", None) or "", ())
    names: Iterable[str] = (*FLAG_KEYS, *OTHER_FLAGS, *(name.replace("_", "-") for name in own))
    if args.tool is not None:
        names = (*(flag.name for flag in TOOLS[args.tool].flags), "debug")
        unknown += [f"--{pair}" for pair in free_form]
    if unknown:
        flag, _, value = unknown[0].partition("=")
        if not flag.startswith("-"):
            listed = argv[argv.index("--target_modules") + 1 :] if "--target_modules" in argv else []
            listed = list(takewhile(lambda word: not word.startswith("-"), listed))
            if unknown[0] in listed:
                names = ",".join(word.strip(",") for word in listed)
                raise LoraMsError(f"unexpected argument {unknown[0]!r}: write --target_modules {names}")
            raise LoraMsError(
                f"unexpected argument {flag!r}: a flag begins with --, and a value with spaces or a * needs quotes"
            )
        if flag in argv:
            value = next(iter(argv[argv.index(flag) + 1 :]), "")
        command = args.tool or getattr(args, "command", None) or args.run_mode or ""
        hint = _nearest(flag.removeprefix("--"), "" if value.startswith("--") else value, [*names], command)
        raise LoraMsError(f"unknown flag {flag}; {hint}")
    flags = () if args.tool is None else TOOLS[args.tool].flags
    for first in (each for each in flags if each.first):
        alone, given = getattr(args, f"{first.argument}_alone"), getattr(args, first.argument)
        if alone is not None and given is not None:
            raise LoraMsError(f"{alone} and --{first.name} {given}: give one of them")
        setattr(args, first.argument, given if alone is None else alone)
    required = [each.name for each in flags if each.required]
    if args.tool is None:
        use_aliases(args)
    missing = [f"--{name}" for name in required if getattr(args, name) is None]
    if missing:
        raise LoraMsError(f"{', '.join(missing)}: missing (see lora-ms {args.tool} --help)")
    return args


def _nearest(name: str, value: str, flags: Sequence[str], command: str) -> str:
    """What to write in place of a flag that is not known: a flag, or a key of the YAML with its section."""
    from lora_ms.config.other_words import OTHER_WORDS
    from lora_ms.config.problems import NEAR, key_names, key_place

    name = name.replace("-", "_")
    keys = () if command in TOOLS else key_names()
    keys_too = "" if command in TOOLS else " (keys of the YAML: --section.key VALUE)"
    spelt = {flag.replace("-", "_"): flag for flag in flags if flag not in (row[0] for row in IDLE_FLAGS)}
    if name in spelt:
        return f"here it is --{spelt[name]}"
    own = OWN_WORDS.get(command, {})
    words = [*own, *(word for word in OTHER_WORDS if keys or _flag_for(word, flags, command))]
    exact = name in words or bool(keys and key_place(name))
    if not exact:
        near = difflib.get_close_matches(name, [*spelt, *keys], 1, NEAR)
        near = difflib.get_close_matches(name, [*near, *words], 1, NEAR_WORD) or near
        if near and near[0] in spelt:
            return f"the nearest is --{spelt[near[0]]}{keys_too}"
        name = near[0] if near else ""
    return _place_of(name, value, flags, command, exact) or f"--help lists the flags{keys_too}"


def _flag_for(word: str, flags: Sequence[str], command: str) -> str | None:
    """The flag of ``command`` that another tool's word stands for."""
    from lora_ms.config.other_words import meaning

    own, key = OWN_WORDS.get(command, {}), meaning(word)[0]
    flag = own.get(word) or own.get(key) or next((flag for flag, sets in FLAG_KEYS.items() if sets == key), None)
    return flag if flag in flags else None


def _place_of(name: str, value: str, flags: Sequence[str], command: str, exact: bool) -> str:
    """Where to write what is called ``name`` elsewhere, or the key ``name``; "" where ``command`` has no use for it.

    exact: the user has written ``name``, and not what is near to it.
    """
    from lora_ms.config import load_config
    from lora_ms.config.other_words import meaning
    from lora_ms.config.problems import key_place

    key, written, it = meaning(name, value)
    if it and not key:
        return it
    it = it or "it is" if exact else "the nearest is"
    flag = _flag_for(name, flags, command)
    if flag is not None:
        shown = flag not in NOT_SHOWN.get(command, ())
        return f"here {it} --{flag}{f' {written}' if written else ''}" if shown else ""
    place = key or key_place(name)
    if not place or name in OWN_WORDS.get(command, {}):
        return ""
    if value and not written:
        with suppress(LoraMsError):  # a value that does not fit is not repeated
            load_config(None, options=[f"{place}={value}"])
            written = shlex.quote(value)
    if "." in place:
        return f"as a key of the YAML {it} --{place} {written or 'VALUE'}"
    start = it.replace("it is", "write")
    return f"{start} --options " + (f'"{place}={written}"' if key and written else f"{place}={written or 'VALUE'}")


if __name__ == "__main__":
    sys.exit(main())
