"""What a run says beforehand about how long it will take."""

from types import SimpleNamespace

import pytest

from lora_ms.train.expected import StepTimes, duration


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.2, "1 s"), (89, "89 s"), (91, "2 min"), (5340, "89 min"), (7500, "2 h 5 min")]
)
def test_durations_as_a_table(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize(("times", "kept"), [([9.0, 1.0], []), ([9.0, 1.0, 3.0, 2.0], [2.0])])
def test_a_usual_step_is_one_after_the_first(times, kept):
    found = []
    callback = StepTimes(found.append)
    for seconds in times:
        callback.on_step_end(None, SimpleNamespace(step_time_s=seconds))
    callback.on_train_end(SimpleNamespace(is_main=True))
    assert found == kept
