"""What ``lora-ms doctor`` looks at on a machine with Ascend cards: driver, CANN, health, their network, rank table.

Written from Huawei's documentation of npu-smi, hccn_tool and HCCL; tested with programs that print what it shows.
"""

import json
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from lora_ms.text import counted, listed

INSTALLED = Path("/usr/local/Ascend")
TIME_LIMIT = 20  # seconds for a call of a tool
Said = Callable[[list[str]], str | None]  # a tool's output, None where it fails
Line = tuple[str, bool, str]  # name, whether all is well, text
# files below CANN's folder that state its version, the first that is there
VERSIONS = ("version.cfg", "version.info", "compiler/version.info", "*-linux/ascend_toolkit_install.info")


def say(command: list[str]) -> str | None:
    """The output of a tool; None where it does not run, fails or takes too long."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=TIME_LIMIT)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout if done.returncode == 0 else None


def tool(name: str, installed: Path = INSTALLED) -> str | None:
    """Where npu-smi or hccn_tool is."""
    beside = installed / "driver" / "tools" / name
    return shutil.which(name) or (str(beside) if beside.is_file() else None)


def missing_tools(installed: Path = INSTALLED) -> str:
    """``no npu-smi, no hccn_tool`` as far as they are not installed."""
    return ", ".join(f"no {name}" for name in ("npu-smi", "hccn_tool") if tool(name, installed) is None)


def ascend_lines(cards: list[int], environment: Mapping[str, str], installed: Path = INSTALLED) -> Iterator[Line]:
    """The lines of the report for a machine with ``cards``."""
    yield version_line(environment, installed)
    smi = tool("npu-smi", installed)
    if smi is None:
        yield "npu-smi", False, "not found: it comes with the driver; without it the cards' health is not known"
    else:
        yield health_line(say([smi, "info"]), cards)
    hccn = tool("hccn_tool", installed)
    if hccn is None:
        yield "hccn_tool", False, "not found: it comes with the driver; the network between cards is not checked"
    else:
        yield from network_lines(hccn, cards, say)
    yield from hccl_lines(environment)


def stated_version(file: Path) -> str | None:
    """``Version=…`` of a file of the driver's or CANN's."""
    try:
        found = re.search(r"^(?:\w*_)?version\w*\s*=\s*\[?(?:[\w.]+:)?([\w.]+)", file.read_text(), re.I | re.M)
    except (OSError, UnicodeDecodeError):
        return None
    return found[1] if found else None


def version_line(environment: Mapping[str, str], installed: Path) -> Line:
    """Versions of the driver and of CANN; MindSpore's release says which it was built for."""
    driver = stated_version(installed / "driver" / "version.info")
    home = Path(environment.get("ASCEND_HOME_PATH") or installed / "ascend-toolkit" / "latest")
    files = [file for pattern in VERSIONS for file in sorted(home.glob(pattern))]
    cann = next(filter(None, map(stated_version, files)), None)
    text = f"driver {driver or 'of unknown version'}, CANN {cann or 'of unknown version'}"
    return "driver", bool(driver and cann), f"{text}; MindSpore's release notes name the CANN that it needs"


def health_line(said: str | None, cards: list[int]) -> Line:
    """What ``npu-smi info`` says of each card: a row ``| 0  910B3 | OK | …``. Below are rows of processes, with numbers
    in these places: ``| 0  0 | 4711 | python | …``."""
    if said is None:
        return "npu-smi", False, "npu-smi info fails: is the driver loaded, and may this user open the cards?"
    rows = re.findall(r"^\|\s*(\d+)\s+(\S*[A-Za-z]\S*)\s*\|\s*([A-Za-z]+)\s*\|", said, re.M)
    chips = {int(number): (kind, health) for number, kind, health in rows}
    if not chips:
        return "npu-smi", False, "npu-smi info lists no card that could be read"
    ill = [f"card {number}: {health}" for number, (_, health) in chips.items() if health != "OK"]
    lost = [f"card {number}: not listed" for number in cards if number not in chips]
    kinds = ", ".join(sorted({kind for kind, _ in chips.values()}))
    text = f"{counted(len(chips), 'card')} of type {kinds}"
    return "npu-smi", not ill + lost, f"{text}, all healthy" if not ill + lost else f"{text}; {listed(ill + lost)}"


def network_lines(hccn: str, cards: list[int], ask: Said) -> Iterator[Line]:
    """Link, address, health and TLS of every card's own network port, which HCCL uses between machines."""
    down, silent, addresses, tls = [], [], {}, {}
    for card in cards:
        answers = {what: ask([hccn, "-i", str(card), f"-{what}", "-g"]) for what in ("link", "ip", "net_health", "tls")}
        if answers["link"] is None:
            silent.append(card)
            continue
        if "UP" not in answers["link"]:
            down.append(f"card {card}: link {after(answers['link'], 'link status') or 'unknown'}")
        health = after(answers["net_health"] or "", "net health status")
        if health and health not in ("Success", "Init"):  # Init: no address to check is configured
            down.append(f"card {card}: network {health}")
        addresses[card] = after(answers["ip"] or "", "ipaddr")
        switch = re.search(r"tls switch\[(\d)\]", answers["tls"] or "")
        if switch:
            tls[card] = switch[1]
    if silent:
        numbers = ", ".join(map(str, silent))
        text = f"hccn_tool does not answer for {counted(len(silent), 'card')} ({numbers}): run lora-ms doctor as root"
        yield "network", False, text
    if len(silent) == len(cards):
        return
    without = [f"card {card}: no address" for card, address in addresses.items() if not address]
    twice = [address for address in {*addresses.values()} if address and [*addresses.values()].count(address) > 1]
    faults = [*down, *without, *(f"{address} is on two cards" for address in twice)]
    note = "" if not faults else "; one machine can do without, several cannot"
    text = "links are up, each card has an address" if not faults else listed(faults) + note
    yield "network", not faults, text
    if len({*tls.values()}) > 1:
        yield (
            "network",
            False,
            f"TLS differs between cards ({tls}): HCCL does not connect them; set it alike by hccn_tool",
        )


def after(text: str, title: str) -> str:
    """The word after ``title:``."""
    found = re.search(rf"{title}\s*:\s*(\S+)", text)
    return found[1] if found else ""


def hccl_lines(environment: Mapping[str, str]) -> Iterator[Line]:
    """The rank table, where one is named, and HCCL's own settings."""
    table = environment.get("RANK_TABLE_FILE")
    if table:
        faults = rank_table_faults(Path(table))
        text = f"{table} names each card once" if not faults else f"{table}: {listed(faults)}"
        yield (
            "rank table",
            not faults,
            f"{text}; scripts/msrun_launcher.sh needs none: unset RANK_TABLE_FILE to do without",
        )
    given = [f"{name}={value}" for name, value in sorted(environment.items()) if name.startswith("HCCL_")]
    if given:
        yield "hccl", True, ", ".join(given)


def rank_table_faults(file: Path) -> list[str]:
    """What is wrong with a rank table of version 1.0: its ranks, and cards or addresses that are given twice."""
    try:
        table: Any = json.loads(file.read_text())
        servers = table["server_list"]
        listed_cards = [(server["server_id"], card) for server in servers for card in server["device"]]
        ranks = sorted(int(card["rank_id"]) for _, card in listed_cards)
        cards = [(server, card["device_id"]) for server, card in listed_cards]
        addresses = [card["device_ip"] for _, card in listed_cards if card.get("device_ip")]
    except OSError as error:
        return [f"cannot be read ({error.strerror})"]
    except (ValueError, KeyError, TypeError) as error:
        return [f"is no rank table ({type(error).__name__}: {error})"]
    faults = []
    if ranks != list(range(len(ranks))):
        faults.append(f"rank_id are {ranks}, not 0 to {len(ranks) - 1}")
    if len({*map(str, cards)}) < len(cards):
        faults.append("a device_id stands twice in one server")
    if len({*addresses}) < len(addresses):
        faults.append("a device_ip stands twice")
    if str(table.get("server_count", len(servers))) != str(len(servers)):
        faults.append(f"server_count is {table['server_count']}, there are {len(servers)} servers")
    return faults


def card_numbers(dev: Path = Path("/dev")) -> list[int]:
    """The cards' numbers, from /dev/davinciN."""
    return sorted(int(file.name.removeprefix("davinci")) for file in dev.glob("davinci[0-9]*"))
