"""A model and its adapters behind HTTP, as a configuration asks for them."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lora_ms.adapters.check import template_of
from lora_ms.adapters.combine import read_rows
from lora_ms.adapters.matching import ALL_LINEAR
from lora_ms.adapters.multi_adapter import AdapterPool
from lora_ms.adapters.peft_files import check_adapter_folder
from lora_ms.config import RunConfig
from lora_ms.errors import LoraMsError
from lora_ms.infer.cached_model import default_length
from lora_ms.infer.engine import ROWS, Engine
from lora_ms.models.decoder import CausalLM
from lora_ms.recipes import session
from lora_ms.recipes.adapter import quantisation_notes
from lora_ms.recipes.generate import model_for_use, sampling_of, speaker_for
from lora_ms.runtime.device import Runtime
from lora_ms.serve.app import Application
from lora_ms.serve.catalog import Catalog, check_name
from lora_ms.serve.engine_thread import EngineThread
from lora_ms.serve.server import Server, bound, server_for
from lora_ms.serve.settings import ServeSettings
from lora_ms.text import counted

LORA_RANK = 16  # that fits where adapters may be loaded by request, and nothing is said
PLACES = 8  # for such adapters


@dataclass(frozen=True)
class ServeSizes:
    """What decides how much memory a server takes; None: what the model and the adapters ask for."""

    rows: int | None = None  # requests that run at once
    length: int | None = None  # most tokens of a prompt and its answer together
    adapters: int | None = None  # the most that are there at once
    lora_rank: int | None = None  # the largest of one


def adapters_named(words: Sequence[str]) -> dict[str, str]:
    """Folders by name, from ``name=path`` or vLLM's JSON.

    Raises:
        LoraMsError: neither, or a name twice.
    """
    found: dict[str, str] = {}
    for word in words:
        name, equals, path = word.partition("=")
        if word.lstrip().startswith("{"):
            try:
                value = json.loads(word)
                name, path = value["name"], value["path"]
            except (ValueError, KeyError, TypeError):
                name = path = ""
        if not isinstance(name, str) or not isinstance(path, str) or not name or not path:
            raise LoraMsError(f'--lora-modules expects NAME=DIR or {{"name": …, "path": …}}, got {word[:200]!r}')
        if found.setdefault(check_name(name), path) != path:
            raise LoraMsError(f"--lora-modules names {name!r} twice: give each adapter a name of its own")
    return found


def serve(
    config: RunConfig,
    settings: ServeSettings,
    adapters: Mapping[str, str],
    names: Sequence[str] = (),
    sizes: ServeSizes | None = None,
) -> None:
    """Serves until a signal ends it.

    Args:
        adapters: folders by name.
        names: of the model; () for its folder's.

    Raises:
        LoraMsError: the port is taken, a folder cannot be used, or the engine's thread ended.
    """
    with bound(settings) as place:
        runtime = session.start(config)
        server, thread = _server(config, runtime, settings, adapters, names, sizes or ServeSizes())
        host, port = place.getsockname()[:2]
        url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        server.on_ready = lambda: print(f"ready: {url} (OpenAI's interface at {url}/v1)", flush=True)
        try:
            server.run([place])
        finally:
            thread.stop()
    if server.failed:
        raise LoraMsError("the engine's thread has ended: see the lines above")


def _server(
    config: RunConfig,
    runtime: Runtime,
    settings: ServeSettings,
    adapters: Mapping[str, str],
    names: Sequence[str],
    sizes: ServeSizes,
) -> tuple[Server, EngineThread]:
    model = model_for_use(config, runtime)
    sampling = sampling_of(config)
    speaker = speaker_for(config, model, sampling)
    rows = sizes.rows or ROWS
    length = length_of(model, rows, speaker.max_length, sizes.length)
    pool = _pool(model, rows, adapters, bool(settings.adapter_folders), sizes)
    engine = Engine(model, rows, length, pool)
    folder = config.load_checkpoint
    names = names or (Path(folder).resolve().name,)
    catalog = Catalog(names, speaker.tokenizer, folder, speaker.eos_token_ids, engine.length)

    def load(name: str, path: Path) -> str | None:
        if pool is None:
            raise LoraMsError(f"{path}: this server has no room for adapters: start it with --adapter-folders")
        template = template_of(path)
        pool.load(name, path)
        for line in quantisation_notes(str(path), model):
            print(line, flush=True)
        return template

    def unload(name: str) -> None:
        if pool is not None:
            pool.unload(name)

    for name, path in adapters.items():
        catalog.add(name, path, load(name, Path(path)))
    engine.warm()
    _say(catalog, settings, engine, speaker.max_length)
    thread = EngineThread(engine, engine.rows + settings.max_waiting)
    server = server_for(Application(thread, catalog, settings, sampling, load, unload).asgi(), settings)
    thread.on_death = server.fail
    return server, thread


def length_of(model: CausalLM, rows: int, longest: int, asked: int | None) -> int:
    """Most tokens of a prompt and its answer together: the model's own limit ``longest``, as far as memory is sensible,
    or what was ``asked`` for.

    Raises:
        LoraMsError: more than the model takes.
    """
    if asked is not None and asked > longest:
        raise LoraMsError(f"--max-model-len {asked}: the model takes {longest} tokens at most")
    return asked or default_length(model, rows, longest)


def _pool(model: CausalLM, rows: int, adapters: Mapping[str, str], more: bool, sizes: ServeSizes) -> AdapterPool | None:
    """Room for ``adapters``; with ``more``, for others on any layer too. None where no adapter can come."""
    if not adapters and not more:
        return None
    found: dict[str, int] = {}  # the layers that have one -> the largest rank
    kinds = more  # DoRA and biases take two more numbers of each output, and two more operations
    for adapter, path in adapters.items():
        check_adapter_folder(Path(path), f"adapter {adapter}")
        for name, update in read_rows(path).items():
            found[name] = max(found.get(name, 1), 1 if update.pair is None else len(update.pair.a))
            kinds = kinds or any(value is not None for value in update[1:])
    rank = max([*found.values(), LORA_RANK if more else 1])
    places = len(adapters) + (PLACES if more else 0)
    targets = ALL_LINEAR if more or not found else sorted(found)
    return AdapterPool(model, rows, sizes.adapters or places, sizes.lora_rank or rank, targets, more=kinds)


def _say(catalog: Catalog, settings: ServeSettings, engine: Engine, longest: int) -> None:
    """What the user should know."""
    for served in catalog.served.values():
        print(f"serving {served.name}: {served.root}")
    print(f"{counted(engine.rows, 'request')} at once, {engine.length:,} tokens each with the answer")
    if engine.length < longest:
        print(f"the model takes {longest:,} tokens: --max-model-len N for more, which takes more memory")
    if settings.api_key:
        print("an API key is asked for (LORA_MS_API_KEY)")
    else:
        print("no API key: whoever reaches the port may ask (set LORA_MS_API_KEY to ask for one)")
    if settings.adapter_folders:
        print(f"adapters below {', '.join(map(str, settings.adapter_folders))} may be loaded by request")
