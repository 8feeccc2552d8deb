"""What a run tells on its way."""

import json
import math

import pytest

from diffusion_jax.training import logbook


class Clock:
    """Stands in for the module `time`."""

    def __init__(self):
        self.now = 0.0

    def perf_counter(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    monkeypatch.setattr(logbook, "time", Clock())
    return logbook.time


def rows_of(directory):
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def test_the_time_left_is_told_from_the_speed_of_the_last_steps(tmp_path, capsys, clock):
    """5 steps in 10 s leave 30 steps a minute; 10 in 10 s leave 20 steps 20 s."""
    with logbook.Logbook(tmp_path, start=5, total=40, batch_size=2) as book:
        for step in (10, 20):
            clock.now += 10.0
            book.progress(step, {"loss": 0.5})
    lines = capsys.readouterr().err.splitlines()
    assert [line.split()[1] for line in lines] == ["10/40", "20/40"]
    assert [line.split("  ")[-1] for line in lines] == ["0:01:00 left", "0:00:20 left"]
    assert [row["step"] for row in rows_of(tmp_path)] == [10, 20]


def test_seconds_add_up_over_an_interruption(tmp_path, clock):
    """Killed 7 s after the checkpoint of step 20, whose work is lost; 100 s of something else count nowhere."""
    with logbook.Logbook(tmp_path, start=0, total=40, batch_size=2) as book:
        clock.now += 100.0
        book.rest()
        for step in (10, 20):
            clock.now += 5.0
            book.progress(step, {"loss": 0.5})
        clock.now += 7.0
        book.progress(30, {"loss": 0.5})
    clock.now += 1000.0
    with logbook.Logbook(tmp_path, start=20, total=40, batch_size=2) as book:
        clock.now += 3.0
        book.progress(30, {"loss": 0.5})
        clock.now += 100.0
        book.write(30, {"evaluate/frechet": 1.0})
        book.rest()
        clock.now += 4.0
        book.progress(40, {"loss": 0.5})
    assert [row.get("seconds") for row in rows_of(tmp_path)] == [5.0, 10.0, 13.0, None, 17.0]
    assert logbook.seconds_until(tmp_path / "metrics.jsonl", 40) == 17.0
    assert logbook.seconds_until(tmp_path / "metrics.jsonl", 30) == 13.0


def test_seconds_are_unknown_where_a_run_did_not_keep_them(tmp_path, clock):
    (tmp_path / "metrics.jsonl").write_text('{"step": 10, "loss": 0.5}\n{"step": 20, "lo')
    with logbook.Logbook(tmp_path, start=10, total=40, batch_size=2) as book:
        clock.now += 3.0
        book.progress(20, {"loss": 0.5})
    assert [row["step"] for row in rows_of(tmp_path)] == [10, 20]
    assert rows_of(tmp_path)[-1]["seconds"] is None
    assert math.isnan(logbook.seconds_until(tmp_path / "metrics.jsonl", 20))


def test_a_warning_is_told_once_while_it_lasts_and_kept_in_each_line(tmp_path, capsys):
    with logbook.Logbook(tmp_path, start=0, total=50, batch_size=2) as book:
        for step, warnings in (
            (10, {}),
            (20, {"collapse": "few"}),
            (30, {"collapse": "fewer"}),
            (40, {}),
            (50, {"collapse": "few"}),
        ):
            book.progress(step, {}, warnings)
    told = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert told == ["step 20  warning, collapse: few", "step 50  warning, collapse: few"]
    kept = [row.get("warnings") for row in rows_of(tmp_path)]
    assert kept == [None, ["collapse"], ["collapse"], None, ["collapse"]]
