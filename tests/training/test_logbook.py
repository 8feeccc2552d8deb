"""What a run tells on its way."""

import json

from diffusion_jax.training.logbook import Logbook


def test_the_time_left_is_told_from_the_second_line_on(tmp_path, capsys):
    """The steps of the first line waited for the compilation."""
    with Logbook(tmp_path, start=5, total=40, batch_size=2) as logbook:
        for step in (10, 20, 30):
            logbook.progress(step, {"loss": 0.5})
    lines = capsys.readouterr().err.splitlines()
    assert [line.split()[1] for line in lines] == ["10/40", "20/40", "30/40"]
    assert ["left" in line for line in lines] == [False, True, True]
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [10, 20, 30]
