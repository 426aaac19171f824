"""examples/notebook.ipynb in a Jupyter kernel, and what an interrupt there does."""

import re
import time

import nbformat
import pytest
from jupyter_client import KernelManager
from nbclient import NotebookClient

SECONDS = 200  # for anything, at most


@pytest.fixture(scope="module")
def executed(root, tmp_path_factory, python_env):
    folder = tmp_path_factory.mktemp("notebook")
    (folder / "tiny").symlink_to(root / "examples" / "tiny")
    notebook = nbformat.read(root / "examples" / "notebook.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells)
    client = NotebookClient(notebook, timeout=SECONDS, resources={"metadata": {"path": str(folder)}})
    client.execute(env=python_env)
    return [cell for cell in notebook.cells if cell.cell_type == "code"], folder


def texts(cell) -> str:
    return "".join(output.get("text", "") or output.get("data", {}).get("text/plain", "") for output in cell.outputs)


def test_a_bar_a_picture_and_no_line_for_each_step(executed):
    cells, folder = executed
    training = cells[-2]
    assert not re.search(r"^step ", texts(training), re.MULTILINE)
    assert re.search(r"25/25 .*loss \d\.\d+ ", texts(training))
    assert sum("image/png" in output.get("data", {}) for output in training.outputs) == 1
    assert texts(training).count("TrainOutput(global_step=25") == 1
    assert (folder / "output" / "notebook" / "adapter" / "adapter_model.safetensors").is_file()


def test_what_was_learnt(executed):
    cells, _ = executed
    assert texts(cells[0]).startswith("ModelForCausalLM(tiny/model: 4 layers of 224")
    assert "Mira" not in texts(cells[3]) and "Mira" in texts(cells[-1])


class Kernel:
    """A Jupyter kernel that runs code, and is interrupted while it does."""

    def __init__(self, cwd, env):
        self.manager = KernelManager(kernel_name="python3")
        self.manager.start_kernel(cwd=str(cwd), env=env)
        self.client = self.manager.client()
        self.client.start_channels()
        self.client.wait_for_ready(timeout=SECONDS)

    def run(self, code: str, interrupt_after: str = "") -> tuple[str, str]:
        """The status, and all that was shown; the kernel is interrupted once ``interrupt_after`` was."""
        asked = self.client.execute(code)
        shown = ""
        interrupted = not interrupt_after
        end = time.monotonic() + SECONDS
        while time.monotonic() < end:
            message = self.client.get_iopub_msg(timeout=SECONDS)
            content = message["content"]
            shown += content.get("text", "") + content.get("data", {}).get("text/plain", "")
            if not interrupted and re.search(interrupt_after, shown):
                interrupted = True
                self.manager.interrupt_kernel()
            if message["parent_header"].get("msg_id") == asked and content.get("execution_state") == "idle":
                break
        return self.client.get_shell_msg(timeout=SECONDS)["content"]["status"], shown

    def close(self) -> None:
        self.client.stop_channels()
        self.manager.shutdown_kernel(now=True)


@pytest.fixture
def kernel(tmp_path, python_env):
    found = Kernel(tmp_path, python_env)
    yield found
    found.close()


BEGIN = """
import lora_ms, time
net = lora_ms.AutoModelForCausalLM.from_pretrained({model!r})
rows = [{{"input_ids": list(range(5, 17)), "labels": list(range(5, 17))}}] * 8
peft = lora_ms.get_peft_model(net, lora_ms.LoraConfig(r=2, target_modules=["q_proj"]))
trainer = lora_ms.Trainer(peft, lora_ms.TrainingArguments("out", max_steps=1_000_000, logging_steps=1000), rows)
"""


def test_an_interrupt_ends_a_training_and_never_the_kernel(kernel, reference, tmp_path):
    assert kernel.run(BEGIN.format(model=str(reference / "models" / "qwen2")))[0] == "ok"
    status, shown = kernel.run("trainer.train()", r"loss \d")
    assert status == "ok", shown
    assert "to go on: train(resume_from_checkpoint=True)" in shown and ", stopped)" in shown
    assert len(list((tmp_path / "out" / "checkpoints").glob("step_*"))) == 1
    # and after it, where MindSpore's own handler would end the process, Python's is in its place
    generate = "while True:\n    tokens = peft.generate([[5, 6, 7]], max_new_tokens=2)\n    print('new', flush=True)"
    status, shown = kernel.run(generate, "new")
    assert status == "error", shown
    assert kernel.run("print('waiting', flush=True); time.sleep(60)", "waiting")[0] == "error"
    assert kernel.run("1 + 41") == ("ok", "42")
