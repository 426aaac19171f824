"""The shell scripts, with programs that stand for msrun, Python and pip: nothing is installed or started."""

import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BASH = shutil.which("bash") or "bash"
TOOLS = (
    *("bash", "cat", "chmod", "cut", "dirname", "grep", "ls", "mkdir", "mktemp", "mv", "printf", "rm", "sed"),
    *("setsid", "sleep", "tail", "xargs"),
)
NO_PYTHON = (
    "error: no working Python 3.10, 3.11 or 3.12 with the venv module on PATH; "
    "install one (on Debian with its python3-venv), or name it: PYTHON=/path/to/python3.11 bash {script}\n"
)
DEFAULTS = {
    "worker_num": "8",
    "local_worker_num": "8",
    "master_addr": "127.0.0.1",
    "master_port": "8118",
    "node_rank": "0",
    "log_dir": "output/msrun_log",
    "join": "True",
    "cluster_time_out": "7200",
}
# Makes environments whose Python is itself; pip and pytest write down how they were called.
FAKE_PYTHON = f"""#!{BASH}
case "$1 ${{2:-}}" in
    --version*) echo Python 3.11.7 ;;
    "-m venv") mkdir -p "$3/bin" && cat "$0" >"$3/bin/python" && chmod +x "$3/bin/python" ;;
    "-m pip")
        echo "$PWD: ${{@:3}}" >>"$CALLS"
        [ "${{PIP_STATUS:-0}}" = 0 ] || echo "ERROR: no route to host" >&2
        exit "${{PIP_STATUS:-0}}"
        ;;
    "-m pytest") echo "pytest in $PWD: ${{@:3}}; ${{LORA_MS_TORCH_PYTHON:-no torch}}"; exit 7 ;;
    -c*) ;;
    -\\ *) exec {sys.executable} "$@" ;;
    *) echo "ran $*" ;;
esac
"""


class Machine:
    """A folder of programs that is all of PATH, and the environment that the scripts see."""

    def __init__(self, folder: Path, alive: Callable[[int], bool]):
        self.folder, self.alive = folder, alive
        self.bin = folder / "bin"
        self.bin.mkdir()
        for tool in TOOLS:
            (self.bin / tool).symlink_to(shutil.which(tool))
        self.calls = folder / "calls"
        self.env = {"PATH": str(self.bin), "CALLS": str(self.calls)}

    def program(self, name: str, text: str, folder: Path | None = None) -> None:
        path = (folder or self.bin) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)

    def run(self, *command: str | Path, **env: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [BASH, *map(str, command)],
            cwd=self.folder,
            env=self.env | env,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )


@pytest.fixture
def machine(tmp_path, alive):
    return Machine(tmp_path, alive)


@pytest.fixture
def launcher(machine):
    """``launcher(*arguments)`` runs msrun_launcher.sh and returns its result; its msrun prints its arguments."""
    machine.program("msrun", f'#!{BASH}\nprintf "<%s>\\n" "$@"\n')
    return lambda *arguments, **env: machine.run(ROOT / "scripts/msrun_launcher.sh", *arguments, **env)


def outcome(machine: Machine, result: subprocess.CompletedProcess[str], log_dir: str = "output/msrun_log") -> list[str]:
    """What msrun was called with; where the launcher returned at once, that is in its log."""
    lines = result.stdout.splitlines()
    if "Stop it with: kill " not in lines[-1]:
        return lines[2:]
    process, until = int(lines[-1].split()[-1]), time.monotonic() + 20
    while machine.alive(process):
        assert time.monotonic() < until
        time.sleep(0.05)
    return (machine.folder / log_dir / "launcher.log").read_text().splitlines()[2:]


def msrun_arguments(command: tuple[str, ...], **settings: str) -> list[str]:
    return [*(f"<--{key}={value}>" for key, value in (DEFAULTS | settings).items()), *(f"<{word}>" for word in command)]


@pytest.mark.parametrize(
    ("arguments", "settings"),
    [
        ([], {}),
        (["4"], {"worker_num": "4", "local_worker_num": "4"}),
        (["1"], {"worker_num": "1", "local_worker_num": "1"}),
        (
            ["2", "9000", "logs here", "True", "60"],
            {
                "worker_num": "2",
                "local_worker_num": "2",
                "master_port": "9000",
                "log_dir": "logs here",
                "cluster_time_out": "60",
            },
        ),
        (
            ["16", "8", "10.0.0.1", "9000", "1", "logs", "false", "-1"],
            {
                "worker_num": "16",
                "master_addr": "10.0.0.1",
                "master_port": "9000",
                "node_rank": "1",
                "log_dir": "logs",
                "cluster_time_out": "-1",
            },
        ),
    ],
)
def test_launcher_forms(machine, launcher, arguments, settings):
    result = launcher("job.py --use_parallel True", *arguments)
    found = outcome(machine, result, settings.get("log_dir", DEFAULTS["log_dir"]))
    assert found == msrun_arguments(("job.py", "--use_parallel", "True"), **settings)
    assert (result.returncode, result.stderr) == (0, "")


def test_launcher_says_where_the_logs_are(launcher):
    said = launcher("job.py", "2").stdout.splitlines()
    assert said[:2] == [
        "Starting 2 of 2 processes: job.py",
        "Logs: output/msrun_log/worker_0.log … worker_1.log, scheduler.log; launcher.log says how it ends.",
    ]
    assert said[2].startswith("Follow the run with: tail -f output/msrun_log/worker_0.log. Stop it with: kill ")
    assert launcher("job.py", "4", "1", "10.0.0.1", "9000", "3", "logs", "True", "60").stdout.splitlines()[:2] == [
        "Starting 1 of 4 processes: job.py",
        "Logs: logs/worker_3.log, scheduler.log. Follow the run with: tail -f logs/worker_3.log",
    ]


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("python job.py", ("job.py",)),
        ("  python3.11   job.py\n --x 1", ("job.py", "--x", "1")),
        ("""job.py --fill 'NAME=two words' --data "a b"/*.json $HOME""", None),
        ("run_mindformer.py --config c.yaml", (str(ROOT / "run_mindformer.py"), "--config", "c.yaml")),
    ],
)
def test_launcher_splits_the_command_and_expands_nothing(machine, launcher, command, words):
    words = words or ("job.py", "--fill", "NAME=two words", "--data", "a b/*.json", "$HOME")
    assert outcome(machine, launcher(command)) == msrun_arguments(words)


def test_launcher_prefers_the_script_of_the_current_folder(machine, launcher):
    (machine.folder / "run_mindformer.py").touch()
    assert outcome(machine, launcher("run_mindformer.py")) == msrun_arguments(("run_mindformer.py",))


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ([], "1, 2, 6 or 9 arguments, not 0"),
        (["job.py", "2", "9000"], "1, 2, 6 or 9 arguments, not 3"),
        ([""], "CMD is empty"),
        (["python "], "CMD is empty"),
        (["job.py 'x"], "CMD has an unmatched quote: job.py 'x"),
        (["job.py", "two"], "N must be a whole number, at least 1, not 'two'"),
        (["job.py", "0"], "N must be a whole number, at least 1, not '0'"),
        (["job.py", "2", "x", "logs", "True", "60"], "PORT must be a whole number, at least 1, not 'x'"),
        (["job.py", "2", "9000", "logs", "yes", "60"], "JOIN must be True or False, not 'yes'"),
        (["job.py", "2", "9000", "logs", "True", "1m"], "TIMEOUT must be a whole number, at least -1, not '1m'"),
        (["job.py", "2", "4", "10.0.0.1", "9000", "0", "logs", "True", "60"], "LOCAL (4) is more than N (2)"),
        (
            ["job.py", "2", "1", "10.0.0.1", "9000", "-1", "logs", "True", "60"],
            "NODE_RANK must be a whole number, at least 0, not '-1'",
        ),
    ],
)
def test_launcher_bad_usage(launcher, arguments, problem):
    result = launcher(*arguments)
    usage = (
        f'error: {problem}; usage: bash {ROOT}/scripts/msrun_launcher.sh "CMD" [N] | '
        '"CMD" N PORT LOG_DIR JOIN TIMEOUT | "CMD" N LOCAL ADDR PORT NODE_RANK LOG_DIR JOIN TIMEOUT'
    )
    assert (result.returncode, result.stdout, result.stderr) == (2, "", f"{usage}\n")


def test_launcher_says_how_it_is_used(launcher):
    result = launcher("--help")
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.startswith("usage: bash ") and result.stdout.count("\n") == 1


def msrun_that(machine: Machine, statement: str, **logs: str) -> None:
    """A stand-in for msrun that finds these logs of its processes in logs/, then does ``statement``."""
    (machine.folder / "texts").mkdir()
    for name, text in logs.items():
        (machine.folder / f"texts/{name}.log").write_text(text)
    machine.program("msrun", f"#!{BASH}\nmkdir -p logs && cat texts/*.log >/dev/null\n" + "".join(
        f"cat texts/{name}.log >logs/{name}.log\n" for name in logs
    ) + statement)  # fmt: skip


def test_launcher_shows_the_log_of_the_process_that_failed(machine, launcher):
    (machine.folder / "logs").mkdir()
    (machine.folder / "logs/worker_0.log").write_text("error: of an earlier run\n")
    (machine.folder / "logs/worker_7.log").write_text("error: of an earlier run\n")
    msrun_that(machine, "exit 3", worker_1="step 1\n[WARNING] ME: noise\nerror: no such file\n")
    result = launcher("job.py", "2", "9000", "logs", "True", "60")
    assert (result.returncode, result.stderr) == (
        3,
        "error: the run failed, with status 3; the full logs are in logs\n"
        "--- the last lines of logs/worker_1.log\nstep 1\nerror: no such file\n",
    )


@pytest.mark.parametrize(
    ("code", "status", "how"),
    [
        ("1", 1, "ended with status 1"),
        ("-9", 137, "was killed (signal 9), by hand or for want of memory"),
        ("-11", 139, "was ended by signal 11"),
    ],
)
def test_launcher_names_the_rank_that_failed_and_waits_for_no_one(machine, launcher, code, status, how):
    line = f"[ERROR] ME(1:2,MainProcess): Worker process 4711 exit with exception. Error code: {code}."
    logs = {"worker_0": "rank 0 is process 4710\n", "worker_1": "rank 1 is process 4711\nstep 1\n"}
    msrun_that(machine, f"echo '{line}'; echo noise; sleep 30; touch waited", **logs)
    result = launcher("job.py", "2", "9000", "logs", "True", "60")
    assert (result.returncode, result.stderr) == (
        status,
        f"error: rank 1, process 4711, {how}; the others were stopped; the full logs are in logs\n"
        "--- the last lines of logs/worker_1.log\nrank 1 is process 4711\nstep 1\n",
    )
    assert "noise" not in result.stdout and not (machine.folder / "waited").exists()


def test_launcher_is_quiet_where_msrun_ended_a_moment_before_its_output(machine, launcher):
    machine.program("msrun", f"#!{BASH}\nsetsid sleep 3 &\nexit 0\n")  # what it has started still holds its output
    result = launcher("job.py", "2", "9000", "logs", "True", "60")
    assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.parametrize(
    ("statement", "what"),
    [
        ("kill -9 $$", "msrun, process {msrun},"),
        ("sleep 2.5; kill -9 $scheduler; wait $worker", "msrun's scheduler, process {scheduler},"),
    ],
    ids=["msrun", "scheduler"],
)
def test_launcher_stops_the_processes_that_a_killed_one_has_left(machine, launcher, statement, what):
    """msrun's processes have sessions of their own, and would wait for the scheduler for as long as TIMEOUT says."""
    sleeper = "setsid sleep 60 &"
    msrun_that(
        machine,
        f"MS_ROLE=MS_SCHED {sleeper}\nscheduler=$!\nMS_ROLE=MS_WORKER {sleeper}\nworker=$!\n"
        f'echo "$$ $scheduler $worker" >processes; sleep 2\n{statement}\n',
    )
    launcher_text = (ROOT / "scripts/msrun_launcher.sh").read_text()
    assert launcher_text.count("GRACE=30 ") == 1
    shutil.copytree(ROOT / "scripts", machine.folder / "scripts")
    (machine.folder / "scripts/msrun_launcher.sh").write_text(launcher_text.replace("GRACE=30 ", "GRACE=1 "))
    begun = time.monotonic()
    result = machine.run(machine.folder / "scripts/msrun_launcher.sh", "job.py", "2", "9000", "logs", "True", "7200")
    assert time.monotonic() - begun < 20
    msrun, scheduler, worker = map(int, (machine.folder / "processes").read_text().split())
    assert (result.returncode, result.stderr.splitlines()[0]) == (
        137,
        f"error: {what.format(msrun=msrun, scheduler=scheduler)} has ended, and the others were stopped; start the run "
        "again, with --resume_training True to go on from its last checkpoint; the full logs are in logs",
    )
    deadline = time.monotonic() + 5  # they are killed, and not waited for
    while any(map(machine.alive, (msrun, scheduler, worker))) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(machine.alive, (msrun, scheduler, worker)))


def test_launcher_finds_a_port_in_use(launcher):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = str(other.getsockname()[1])
        result = launcher("job.py", "2", port, "logs", "True", "60")
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.startswith(f"error: port {port} of 127.0.0.1 is in use, perhaps by another run; give a PORT")


def test_launcher_takes_msrun_from_the_environment(machine):
    script = ROOT / "scripts/msrun_launcher.sh"
    place = machine.folder / "env"
    result = machine.run(script, "job.py", LORA_MS_VENV=str(place))
    assert (result.returncode, result.stdout, result.stderr) == (
        1,
        "",
        f"error: no msrun on PATH nor in {place}/bin; run 'bash scripts/quickstart.sh' first, it installs MindSpore\n",
    )
    machine.program("python", f"#!{BASH}\necho the Python of the environment\n", place / "bin")
    machine.program("msrun", f"#!{BASH}\nexec python\n", place / "bin")
    result = machine.run(script, "job.py", "1", "9000", "logs", "True", "60", LORA_MS_VENV=str(place))
    assert (result.returncode, result.stdout.splitlines()[2:]) == (0, ["the Python of the environment"])


def python_that(statement: str) -> str:
    """A program that runs Python code after `statement`."""
    return f"#!{BASH}\nexec {sys.executable} -c 'import sys; {statement}; exec(sys.argv[1])' \"$2\"\n"


@pytest.mark.parametrize("name", ["python3.12", "python3.10", "python3", "python"])
@pytest.mark.parametrize("version", ["(3, 10, 0)", "(3, 12, 9)"])
def test_finder_skips_what_does_not_work(machine, name, version):
    machine.program("python3.11", f"#!{BASH}\necho 'python3.11: command not found' >&2\nexit 127\n")  # a shim
    machine.program(name, python_that(f"sys.version_info = {version}"))
    result = machine.run("-c", f". {ROOT}/scripts/common.sh && find_python")
    assert (result.returncode, result.stdout, result.stderr) == (0, f"{name}\n", "")


@pytest.mark.parametrize("script", ["quickstart.sh", "test.sh"])
@pytest.mark.parametrize(
    "statement",
    [
        "sys.version_info = (3, 9, 18)",
        "sys.version_info = (3, 13, 0)",
        'sys.modules["ensurepip"] = None',
        "sys.exit(127)",
    ],
)
def test_no_python_fits(machine, script, statement):
    machine.program("python3", python_that(statement))
    result = machine.run(ROOT / "scripts" / script, LORA_MS_VENV=str(machine.folder / "env"))
    assert (result.returncode, result.stderr) == (1, NO_PYTHON.format(script=ROOT / "scripts" / script))
    assert sorted(path.name for path in machine.folder.iterdir()) == ["bin"]


def test_the_named_python_must_work(machine):
    machine.program("python3", FAKE_PYTHON)
    result = machine.run(ROOT / "scripts/test.sh", LORA_MS_VENV=str(machine.folder / "env"), PYTHON="nosuch")
    assert (result.returncode, result.stdout, result.stderr) == (
        1,
        "",
        "error: PYTHON=nosuch is no Python 3.10 to 3.12 with the venv module; name another\n",
    )


@pytest.fixture
def copy(machine):
    """A repository with the scripts and what they read, on a machine with a Python."""
    machine.program("python3.11", FAKE_PYTHON)
    repository = machine.folder / "a copy"
    for name in ("scripts", "requirements"):
        shutil.copytree(ROOT / name, repository / name)
    shutil.copy(ROOT / "pyproject.toml", repository)
    return repository


LIGHT = "install -qq --disable-pip-version-check --constraint requirements/tested.txt --editable ."


def calls(machine: Machine) -> list[str]:
    """What pip was asked since the last look."""
    lines = machine.calls.read_text().splitlines() if machine.calls.exists() else []
    machine.calls.unlink(missing_ok=True)
    return lines


def test_quickstart_installs_once_and_passes_its_arguments(machine, copy):
    first = machine.run(copy / "scripts/quickstart.sh", "--author", "Li Na", "--name=Ada")
    assert (first.returncode, first.stderr) == (0, "")
    assert first.stdout.splitlines()[3].startswith(f"Making the environment {copy}/.venv with Python 3.11.7: ")
    assert first.stdout.splitlines()[4:] == [f"ran {copy}/examples/quickstart.py --author Li Na --name=Ada"]
    assert calls(machine) == [f"{copy}: {LIGHT}"]

    second = machine.run(copy / "scripts/quickstart.sh")
    assert second.stdout.splitlines() == [*first.stdout.splitlines()[:3], f"ran {copy}/examples/quickstart.py"]
    assert calls(machine) == []


def test_quickstart_with_a_real_model(machine, copy):
    result = machine.run(copy / "scripts/quickstart.sh", "--model", "smollm2", "--name", "Ada")
    assert (result.returncode, result.stderr) == (0, "")
    assert "SmolLM2-135M (93 MB to download, some 3 minutes)" in result.stdout.splitlines()[2]
    assert result.stdout.splitlines()[-1] == f"ran {copy}/examples/quickstart_smollm2.py --name Ada"
    wrong = machine.run(copy / "scripts/quickstart.sh", "--model", "gpt")
    assert (wrong.returncode, wrong.stderr) == (2, "error: --model gpt is none of tiny, smollm2\n")
    bare = machine.run(copy / "scripts/quickstart.sh", "--model")
    assert (bare.returncode, bare.stderr) == (2, "error: --model has no value: write --model tiny\n")


@pytest.mark.parametrize("arguments", [["--steps", "2"], ["rows.jsonl"], ["--name"]])
def test_quickstart_refuses_what_its_example_has_not_before_it_installs(machine, copy, arguments):
    wrong = machine.run(copy / "scripts/quickstart.sh", *arguments)
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert wrong.stderr.startswith("error: ") and arguments[0] in wrong.stderr
    assert calls(machine) == []


@pytest.mark.parametrize("example", ["quickstart.py", "quickstart_smollm2.py"])
def test_quickstart_knows_the_flags_of_its_examples(example):
    flags = re.findall(r'add_argument\("(--\w+)"', (ROOT / "examples" / example).read_text())
    assert flags == ["--name", "--author", "--output_dir"]
    assert f"{' | '.join(flags)})" in (ROOT / "scripts/quickstart.sh").read_text()


@pytest.mark.parametrize("changed", ["pyproject.toml", "requirements/tested.txt"])
def test_a_changed_requirement_installs_again(machine, copy, changed):
    machine.run(copy / "scripts/quickstart.sh")
    (copy / ".venv/left over").touch()
    with (copy / changed).open("a") as file:
        file.write("# changed\n")
    assert machine.run(copy / "scripts/quickstart.sh").returncode == 0
    assert calls(machine) == [f"{copy}: {LIGHT}"] * 2
    assert sorted(path.name for path in (copy / ".venv").iterdir()) == ["bin", "lora_ms.stamp"]


def test_a_moved_repository_installs_again(machine, copy):
    machine.run(copy / "scripts/quickstart.sh")
    moved = machine.folder / "moved"
    os.replace(copy, moved)
    assert machine.run(moved / "scripts/quickstart.sh").returncode == 0
    assert calls(machine) == [f"{copy}: {LIGHT}", f"{moved}: {LIGHT}"]


def test_a_failed_install_says_so_and_starts_afresh(machine, copy):
    failed = machine.run(copy / "scripts/quickstart.sh", PIP_STATUS="1")
    assert (failed.returncode, failed.stderr) == (
        1,
        "ERROR: no route to host\n"
        "error: pip could not install what lora_ms needs (its message is above); "
        "check the network and the free disk space, then run this script again\n",
    )
    (copy / ".venv/left over").touch()
    assert machine.run(copy / "scripts/quickstart.sh").returncode == 0
    assert calls(machine) == [f"{copy}: {LIGHT}"] * 2
    assert sorted(path.name for path in (copy / ".venv").iterdir()) == ["bin", "lora_ms.stamp"]


def test_a_folder_of_someone_else_is_left_alone(machine, copy):
    place = machine.folder / "mine"
    place.mkdir()
    (place / "thesis.txt").touch()
    result = machine.run(copy / "scripts/quickstart.sh", LORA_MS_VENV="mine")
    assert (result.returncode, result.stderr) == (
        1,
        f"error: {place} exists and was not made by this script; remove it, or name another place in LORA_MS_VENV\n",
    )
    assert [path.name for path in place.iterdir()] == ["thesis.txt"]


def test_test_script_ends_as_pytest_does(machine, copy):
    result = machine.run(copy / "scripts/test.sh", "-k", "loss or rope")
    assert (result.returncode, result.stderr) == (7, "")
    pytest = f"pytest in {copy}: -n 2 --dist loadfile"
    assert result.stdout.splitlines()[1:] == [f"{pytest} -k loss or rope; no torch"]
    full = LIGHT.removesuffix(".") + ".[mindformers,dev]"
    assert calls(machine) == [f"{copy}: {full}"]

    result = machine.run(copy / "scripts/test.sh", "--with-torch", "-x")
    assert result.stdout.splitlines()[1:] == [f"{pytest} -x; {copy}/.venv-torch/bin/python"]
    assert calls(machine) == [f"{copy}: install -qq --disable-pip-version-check --requirement requirements/torch.txt"]


def test_relative_paths_are_of_the_folder_that_they_were_given_in(machine, copy):
    machine.program("named", FAKE_PYTHON, machine.folder / "other")
    (machine.bin / "python3.11").unlink()
    given = {"LORA_MS_VENV": "env", "PYTHON": "other/named"}
    result = machine.run(copy / "scripts/test.sh", "-x", **given)
    assert (result.returncode, result.stderr) == (7, "")
    shown = machine.run("-c", f'. "{copy}/scripts/common.sh" && echo "$LORA_MS_VENV $PYTHON"', **given)
    assert shown.stdout == f"{machine.folder}/env {machine.folder}/other/named\n"


def test_setup_alone_runs_no_test(machine, copy):
    result = machine.run(copy / "scripts/test.sh", "--setup", LORA_MS_VENV="env")
    assert (result.returncode, len(result.stdout.splitlines())) == (0, 1)
    assert sorted(path.name for path in machine.folder.iterdir()) == ["a copy", "bin", "calls", "env-test"]


@pytest.mark.parametrize(
    "script", [*sorted((ROOT / "scripts").glob("*.sh")), ROOT / ".ci/run"], ids=lambda path: path.name
)
def test_scripts_parse(machine, script):
    result = machine.run("-n", script)
    assert (result.returncode, result.stderr) == (0, "")
