"""A model and its adapters behind HTTP, as a configuration asks for them."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from lora_ms.config import RunConfig
from lora_ms.errors import LoraMsError
from lora_ms.infer.engine import ROWS, Engine
from lora_ms.recipes import session
from lora_ms.recipes.generate import model_for_use, sampling_of, speaker_for
from lora_ms.runtime.device import Runtime
from lora_ms.serve.app import Application
from lora_ms.serve.catalog import Catalog, check_name
from lora_ms.serve.engine_thread import EngineThread
from lora_ms.serve.server import Server, bound, server_for
from lora_ms.serve.settings import ServeSettings
from lora_ms.text import counted


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
    rows: int | None = None,
    length: int | None = None,
) -> None:
    """Serves until a signal ends it.

    Args:
        adapters: folders by name.
        names: of the model; () for its folder's.
        rows: requests that run at once.
        length: most tokens of a prompt and its answer together.

    Raises:
        LoraMsError: the port is taken, a folder cannot be used, or the engine's thread ended.
    """
    with bound(settings) as place:
        runtime = session.start(config)
        server = _server(config, runtime, settings, adapters, names, (rows, length))
        host, port = place.getsockname()[:2]
        url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        print(f"ready: {url} (OpenAI's interface at {url}/v1)", flush=True)
        server.run([place])
    if server.failed:
        raise LoraMsError("the engine's thread has ended: see the lines above")


def _server(
    config: RunConfig,
    runtime: Runtime,
    settings: ServeSettings,
    adapters: Mapping[str, str],
    names: Sequence[str],
    sizes: tuple[int | None, int | None],
) -> Server:
    model = model_for_use(config, runtime)
    sampling = sampling_of(config)
    speaker = speaker_for(config, model, sampling)
    rows, length = sizes
    engine = Engine(model, rows or ROWS, length or speaker.max_length)
    folder = config.load_checkpoint
    names = names or (Path(folder).resolve().name,)
    catalog = Catalog(names, speaker.tokenizer, folder, speaker.eos_token_ids, engine.length)

    def load(name: str, path: Path) -> str | None:
        raise LoraMsError(f"{path}: adapters cannot be served yet")

    def unload(name: str) -> None:
        raise LoraMsError(f"{name}: adapters cannot be served yet")

    for name, path in adapters.items():
        catalog.add(name, path, load(name, Path(path)))
    engine.warm()
    _say(catalog, settings, engine)
    thread = EngineThread(engine, engine.rows + settings.max_waiting)
    server = server_for(Application(thread, catalog, settings, sampling, load, unload).asgi(), settings)
    thread.on_death = server.fail
    return server


def _say(catalog: Catalog, settings: ServeSettings, engine: Engine) -> None:
    """What the user should know."""
    for served in catalog.served.values():
        print(f"serving {served.name}: {served.root}")
    print(f"{counted(engine.rows, 'request')} at once, {engine.length:,} tokens each with the answer")
    if settings.api_key:
        print("an API key is asked for (LORA_MS_API_KEY)")
    else:
        print("no API key: whoever reaches the port may ask (set LORA_MS_API_KEY to ask for one)")
    if settings.adapter_folders:
        print(f"adapters below {', '.join(map(str, settings.adapter_folders))} may be loaded by request")
