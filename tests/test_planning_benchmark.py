"""The benchmark's command, its results and the learned world model.

Why: hours of results must be paired, resumed and never mixed.

    python -m pytest tests/test_planning_benchmark.py
"""

import json

import pytest
import torch
from conftest import python

import train_diffusion_ddim as tdd
from planning import benchmark, document, optimizers, surrogate, tasks, world
from planning.__main__ import claim_folder, main
from planning.methods import COST, Method


def test_transitions_are_the_simulators():
    scenes, actions, after = surrogate.draw_transitions(300, seed=1, scenes=60)
    again = world.hard_world(scenes, actions)
    assert torch.equal(after.pos, again.pos) and torch.equal(after.value, again.value)
    assert ((actions >= 0) & (actions <= 1)).all()
    changed = (after.value != scenes.value).any(1) | (after.pos != scenes.pos).flatten(1).any(1)
    assert 0.1 < changed.float().mean() < 0.6, "aimed gestures hit something"


def test_the_surrogate_learns_and_keeps_to_what_can_move(tmp_path):
    path = tmp_path / "surrogate.pt"
    model = surrogate.load_or_train(path, num=2000, steps=30)
    scenes, actions, _ = surrogate.draw_transitions(50, seed=9, scenes=60)
    state = model(scenes, actions)
    fixed = scenes.low == scenes.high
    assert torch.equal(state.pos[fixed], scenes.pos[fixed])
    again = surrogate.load_or_train(path)(scenes, actions)
    assert torch.equal(again.pos, state.pos)


def test_results_are_paired_and_resumed(tmp_path):
    methods = {"a": Method("a", COST, optimizers.shoot), "b": Method("b", COST, optimizers.shoot)}
    size = benchmark.Size(4, 2, 0, 0, (), 2, 0, 1)
    jobs = [j for j in benchmark.plan_jobs(methods, size) if j.task == "scroll"]
    assert [(j.method, j.seed) for j in jobs] == [("a", 0), ("b", 0), ("a", 1), ("b", 1)]
    path, settings = tmp_path / "results.jsonl", {"a": {}, "b": {}}
    benchmark.run_jobs(jobs, methods, settings, {}, path)
    whole = path.read_text()
    lines = whole.splitlines(keepends=True)
    path.write_text("".join(lines[:2]) + lines[2][:40])  # interrupted while writing the third
    benchmark.run_jobs(jobs, methods, settings, {}, path)
    clock = {"batch_s": 0}
    assert [json.loads(x) | clock for x in path.read_text().splitlines()] == [
        json.loads(x) | clock for x in whole.splitlines()
    ]
    bits = document.collect(benchmark.read_rows(path), 250, stage="main")
    assert {len(b) for b in bits.values()} == {8}


def test_the_stage_batched_counts_calls_of_32():
    """A draw from the generator, 32·250 of them: the most that depth can pay for."""
    methods, seen = {"a": Method("a", COST, optimizers.shoot)}, []
    jobs = benchmark.plan_jobs(methods, benchmark.Size(1, 0, 0, 0, (), 0, 2))
    assert [(j.stage, j.task, j.instances) for j in jobs] == [
        ("batched", t, 2) for t in tasks.TASKS
    ]
    method = Method(
        "a", COST, lambda objective, rng: seen.append((objective.room(), objective.num))
    )
    benchmark.run_job(jobs[0], method, {}, world.soft_world)
    assert seen == [(32 * 250, 2)]


@pytest.fixture
def refused(capsys):
    """Return f(*argv): assert exit code 2 and one line; return the line."""

    def run(*argv):
        assert main([str(a) for a in argv]) == 2
        err = capsys.readouterr().err
        assert err.startswith("error: ") and err.count("\n") == 1, err
        return err

    return run


def test_a_users_mistakes(refused, tmp_path, monkeypatch, untrained_run, straight_run):
    monkeypatch.chdir(tmp_path)
    assert "train one first" in refused("--quick")
    (tmp_path / "runs" / "goals").mkdir(parents=True)  # no run to take, although it is there
    for name in ("diffusion_checkpoint_epoch_0.pth", "seconds.json"):
        (tmp_path / "runs" / "goals" / name).touch()
    assert "train one first" in refused("--quick")
    assert "nowhere" in refused("--quick", "--checkpoint", "nowhere")
    assert "see --help" in refused("--fast")
    assert "--threads" in refused("--threads", 0)
    assert "drop it, or --quick" in refused("--quick", "--document")
    given = ("--quick", "--checkpoint", untrained_run)
    monkeypatch.chdir(tmp_path / "runs" / "goals")  # from where no goals are found
    assert "nets" in refused(*given, "--goals", "nets")
    assert "--only knows shoot_noise" in refused(*given, "--only", "adam")
    assert "draws 20 frames" in refused("--quick", "--checkpoint", straight_run)
    assert not (tmp_path / "runs" / "planning_quick").exists(), "refused before any work"
    (tmp_path / "file").touch()
    assert "choose another" in refused(*given, "--output_dir", tmp_path / "file" / "x")


def test_results_are_of_one_checkpoint_and_size(refused, tmp_path, untrained_run, monkeypatch):
    """Others are refused; --replace keeps what no checkpoint had a part in, and only then."""
    monkeypatch.chdir(tmp_path)
    checkpoint = next(untrained_run.iterdir())
    claim_folder(tmp_path, checkpoint, quick=False, replace=False)
    rows = [{"method": "cem_ramp"}, {"method": "ddim_select"}]
    path = tmp_path / "results.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ("--output_dir", tmp_path, "--checkpoint")
    assert "another size" in refused("--quick", *flags, checkpoint)
    other = tmp_path / "other.pth"
    other.write_bytes(checkpoint.read_bytes()[:-100])
    assert "is not a valid checkpoint" in refused("--replace", *flags, other)
    with pytest.raises(tdd.UserError, match="another checkpoint"):
        claim_folder(tmp_path, other, quick=False, replace=False)
    assert benchmark.read_rows(path) == rows
    claim_folder(tmp_path, other, quick=False, replace=True)
    assert benchmark.read_rows(path) == rows[:1]
    path.write_text("{]\n{}\n")
    with pytest.raises(tdd.UserError, match=r"results\.jsonl is damaged .* delete it"):
        benchmark.read_rows(path)


def test_the_command_runs_on_a_tiny_set(tmp_path, untrained_run):
    done = python(
        *("-m", "planning", "--quick", "--checkpoint", untrained_run, "--output_dir", tmp_path),
        *("--only", "shoot_true", "cem_ramp", "ddim_select"),
    )
    assert done.returncode == 0, done.stderr
    assert "| DDIM, select " in done.stdout
    rows = benchmark.read_rows(tmp_path / "results.jsonl")
    assert {row["method"] for row in rows} == {"shoot_true", "cem_ramp", "ddim_select"}
    assert {row["stage"] for row in rows} == {"main", "long", "temperature", "surrogate"}
    about = json.loads((tmp_path / "about.json").read_text())
    assert about["machine"]["torch"] and about["command"].startswith("python -m planning --quick")
