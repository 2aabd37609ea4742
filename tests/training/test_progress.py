"""What a run says while it goes on, where nobody watches a bar."""

import pytest

from jaxchunk.training.progress import Progress


class Record:
    def __init__(self, step, time_s):
        self.step, self.time_s = step, time_s

    def line(self, total_steps):
        return f"step {self.step}/{total_steps}"


@pytest.mark.parametrize(("step_s", "said"), [(2.0, "14 s"), (60.0, "7 min"), (1800.0, "3.5 h")])
def test_lines_say_how_long_is_left(step_s, said, capsys):
    """By the steps of this process: a run that goes on has done others before."""
    with Progress(12, 3) as progress:
        for step in (4, 5):
            progress.step(Record(step, 100.0 + step_s * step))
    first, second = capsys.readouterr().out.splitlines()
    assert first == "step 4/12" and second == f"step 5/12  {said} left"


def test_the_last_line_says_nothing_of_it(capsys):
    with Progress(2, 0) as progress:
        progress.step(Record(1, 1.0))
        progress.step(Record(2, 2.0))
    assert "left" not in capsys.readouterr().out


def test_silence(capsys):
    with Progress(2, 0, silent=True) as progress:
        progress.step(Record(1, 1.0))
        progress.say("something")
    assert capsys.readouterr().out == ""
