"""benchmarks.profile: where the time of a run goes, by its metrics and its trace."""

import json

import jax
import jax.numpy as jnp
import pytest

from benchmarks import profile
from rcgrpo_jax.runs.run import trace_steps


def write_metrics(folder, steps: int) -> None:
    """Ten seconds a step: 1 of data, 4 of rollout, 2 of reward, 2 of update, 1 of records; the first takes 100."""
    phases = {"seconds/data": 1.0, "seconds/rollout": 4.0, "seconds/reward": 2.0, "seconds/update": 2.0}
    lines = ({"step": i + 1, "time": 100.0 + 10 * i, **phases} for i in range(steps))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_shares_are_medians_and_what_is_left_is_records(tmp_path, capsys):
    write_metrics(tmp_path, 4)
    profile.main([str(tmp_path)])
    shares = {line.split()[0]: line.split()[-1] for line in capsys.readouterr().out.splitlines()[1:]}
    assert shares == {"data": "10.0%", "rollout": "40.0%", "reward": "20.0%", "update": "20.0%", "records": "10.0%"}


@pytest.mark.parametrize(("steps", "problem"), [(0, "metrics.jsonl"), (2, "2 steps found")])
def test_says_what_it_lacks(tmp_path, capsys, steps, problem):
    if steps:
        write_metrics(tmp_path, steps)
    with pytest.raises(SystemExit, match="2"):
        profile.main([str(tmp_path)])
    assert problem in capsys.readouterr().err


def test_intervals_that_overlap_count_once():
    assert profile.covered([(0, 2), (1, 3), (5, 6), (5.5, 5.75)]) == 4


def test_a_trace_names_the_programs_of_the_steps_after_the_first(tmp_path):
    @jax.jit
    def triple(x):
        return 3 * jnp.sort(x)

    for step in trace_steps(range(1, 5), "train", tmp_path, 2):
        if step == 1:
            jax.jit(lambda x: x + 1)(jnp.ones(3)).block_until_ready()
        triple(jnp.arange(100_000.0)).block_until_ready()
    (trace,) = tmp_path.glob("**/*.xplane.pb")
    programs, steps = profile.program_seconds(trace)
    assert [name for name in programs if "triple" in name]
    assert not [name for name in programs if "lambda" in name]
    assert 0 < sum(programs.values()) <= steps
