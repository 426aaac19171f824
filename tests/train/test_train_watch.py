"""TensorBoard's file and the profile by themselves: what resumes, what overflows, what fails."""

from functools import partial
from pathlib import Path

import pytest

from lora_ms.errors import LoraMsError
from lora_ms.train import profile as profile_module
from lora_ms.train.callbacks import EvaluationRecord, RunState, StepRecord
from lora_ms.train.profile import OperatorCost, Profiling, read_costs, table
from lora_ms.train.tensorboard import Summaries, TensorBoard


def state_at(step: int, folder: Path, total: int = 10) -> RunState:
    return RunState(None, folder, total, True, step)


def record(step: int, loss: float | None = 2.0, terms: dict | None = None) -> StepRecord:
    return StepRecord(
        step=step, epoch=1.0, loss=loss, grad_norm=None if loss is None else 0.5, learning_rate=1e-3, tokens=100,
        label_tokens=40, tokens_per_second=1000.0, step_time_s=0.1, wait_share=0.0, peak_memory_mb=300.0,
        terms=terms or {},
    )  # fmt: skip


@pytest.fixture
def read(events):
    """Events of a TensorBoard file."""
    from tensorboardX.proto.event_pb2 import Event  # after MindSpore, which chooses protobuf's implementation

    return partial(events, kind=Event)


def test_a_resumed_run_takes_the_later_steps_back(tmp_path, read):
    for start, steps in ((0, (1, 2, 3)), (2, (3, 4))):
        board = TensorBoard(tmp_path, 1)
        board.on_train_begin(state_at(start, tmp_path))
        for step in steps:
            board.on_step_end(state_at(step, tmp_path), record(step))
        board.on_train_end(state_at(steps[-1], tmp_path))
    first, second = sorted(tmp_path.iterdir(), key=lambda file: file.suffix)
    assert [e.step for e in read(first)[2:]] == [1, 2, 3]
    start = read(second)[1]
    assert (start.step, start.session_log.status) == (3, start.session_log.START)
    assert [e.step for e in read(second)[2:]] == [3, 4]


def test_every_nth_step_and_the_last_without_what_overflowed(tmp_path, read):
    board = TensorBoard(tmp_path, 4)
    board.on_train_begin(state_at(0, tmp_path))
    for step in range(1, 11):
        board.on_step_end(state_at(step, tmp_path), record(step, None if step == 8 else 2.0))
        (file,) = tmp_path.iterdir()
        assert len(read(file)) == 2 + step // 4 + (step == 10)  # on disk at once
    found = {e.step: {v.tag for v in e.summary.value} for e in read(file)[2:]}
    assert found[4] == found[10] == found[8] | {"train/loss", "train/grad_norm"}
    assert found[8] == {"train/learning_rate", "train/tokens_per_second", "train/peak_memory_mb"}
    board.on_train_end(state_at(10, tmp_path))


def test_the_terms_of_the_loss_have_tags_of_their_own(tmp_path, read):
    board = TensorBoard(tmp_path, 1)
    board.on_train_begin(state_at(0, tmp_path))
    board.on_step_end(state_at(1, tmp_path), record(1, 3.0, {"cross_entropy": 2.0, "orthogonality": 1.0}))
    board.on_train_end(state_at(1, tmp_path))
    (file,) = tmp_path.iterdir()
    found = {v.tag: v.simple_value for event in read(file)[2:] for v in event.summary.value}
    assert found["train/loss"] == 3 and found["train/cross_entropy"] == 2 and found["train/orthogonality"] == 1


def test_a_full_disk_is_said_once(tmp_path, monkeypatch, capsys):
    board = TensorBoard(tmp_path, 1)
    board.on_train_begin(state_at(0, tmp_path))

    def full(event):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(board.writer, "write_event", full)
    for step in (1, 2, 3):
        board.on_step_end(state_at(step, tmp_path), record(step))
    board.on_train_end(state_at(3, tmp_path))
    warning = f"warning: cannot write {tmp_path}: No space left on device; numbers there may be missing\n"
    assert capsys.readouterr().out == warning


def test_a_folder_that_cannot_be_is_an_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(LoraMsError, match=f"^report_to tensorboard: cannot write {tmp_path / 'file'}: File exists$"):
        TensorBoard(tmp_path / "file", 1).on_train_begin(state_at(0, tmp_path))


def test_other_ranks_write_and_say_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(profile_module, "profile", Fake)
    monkeypatch.setattr(Fake, "calls", [])
    state = RunState(None, tmp_path, 2, False)
    for looking in (TensorBoard(tmp_path, 1), Summaries(tmp_path, 1), Profiling(tmp_path, 1, 2)):
        looking.on_train_begin(state)
        for state.step in (1, 2):
            looking.on_step_end(state, record(state.step))
        scores = {"eval_loss": 2.0, "eval_perplexity": 7.4, "eval_accuracy": 0.5, "eval_label_tokens": 40}
        looking.on_evaluate(state, EvaluationRecord(step=2, epoch=1.0, eval_time_s=0.1, **scores))
        looking.on_train_end(state)
    assert list(tmp_path.iterdir()) == Fake.calls == [] and capsys.readouterr().out == ""


CPU = "op_type,type_occurrences,execution_frequency(per-step),total_compute_time,avg_time(ms),percent\n"
CPU += "Add,12,3,1.5,0.125,0.3\nMatMul,4,1,3.5,0.875,0.7\n"
ASCEND = "Device_id,OP Type,Core Type,Count,Total Time(us),Min Time(us),Avg Time(us),Max Time(us),Ratio(%)\n"
ASCEND += "0,MatMulV2,AI_CORE,1024,2500000.5,1,1,1,80\n"


def test_costs_and_their_table(tmp_path):
    (tmp_path / "FRAMEWORK").mkdir()
    (tmp_path / "FRAMEWORK" / "cpu_op_type_info_0.csv").write_text(CPU)
    assert read_costs(tmp_path) == [OperatorCost("MatMul", 4, 3.5), OperatorCost("Add", 12, 1.5)]
    assert table(read_costs(tmp_path)) == [
        "  operator                                            calls     total ms   share",
        "  MatMul                                                  4          3.5   70.0%",
        "  Add                                                    12          1.5   30.0%",
    ]
    (tmp_path / "FRAMEWORK" / "cpu_op_type_info_0.csv").unlink()
    (tmp_path / "op_statistic.csv").write_text(ASCEND)
    assert read_costs(tmp_path) == [OperatorCost("MatMulV2", 1024, pytest.approx(2500.0005))]
    many = table([OperatorCost("x" * n, 10**8, 10.0**7) for n in range(1, 60)][::-1])
    assert len(many) == 11 and {len(line) for line in many} == {80}


class Fake:
    """Notes when it is started and stopped."""

    calls: list[str] = []

    def __init__(self, on_trace_ready):
        pass

    def start(self):
        self.calls.append("start")

    def stop(self):
        self.calls.append("stop")


@pytest.mark.parametrize(
    ("reads", "found", "said"),
    [
        # steps that are done before the run and at each read of the numbers; what is called at each
        ((0, 1, 2, 3, 4, 5), [(1, "start"), (3, "stop")], "profile of steps 2 to 3: "),
        ((0, 4, 8), [(4, "start"), (8, "stop")], "profile of steps 5 to 8: "),
        ((2, 3, 4), [(2, "start"), (3, "stop")], "profile of steps 3 to 3: "),
        ((0, 1, 2), [(1, "start"), ("end", "stop")], "profile of steps 2 to 2: "),
        ((0, 10), [], "no profile: none of the steps 2 to 3 was run"),
        ((3, 4), [], "no profile: none of the steps 2 to 3 was run"),
    ],
)
def test_when_it_profiles(tmp_path, monkeypatch, capsys, reads, found, said):
    monkeypatch.setattr(profile_module, "profile", Fake)
    monkeypatch.setattr(Fake, "calls", [])
    looking, seen = Profiling(tmp_path / "profile", 2, 3), []
    (tmp_path / "profile").mkdir()
    (tmp_path / "profile" / "mine.txt").touch()  # what is there stays there
    looking.on_train_begin(state_at(reads[0], tmp_path))
    seen += [(reads[0], call) for call in Fake.calls]
    for before, now in zip(reads, reads[1:], strict=False):
        for step in range(before + 1, now + 1):
            count = len(Fake.calls)
            looking.on_step_end(state_at(now, tmp_path), record(step))
            seen += [(step, call) for call in Fake.calls[count:]]
    count = len(Fake.calls)
    looking.on_train_end(state_at(reads[-1], tmp_path))
    seen += [("end", call) for call in Fake.calls[count:]]
    assert seen == found
    assert capsys.readouterr().out.startswith(said)
    assert [path.name for path in (tmp_path / "profile").iterdir()] == ["mine.txt"]
