"""The benchmark's command, its results and the learned world model.

Why: hours of results must be paired, resumed and never mixed.

    python -m pytest tests/test_planning_benchmark.py
"""

import json
from dataclasses import replace

import pytest
import torch

import train_diffusion_ddim as tdd
from planning import (
    benchmark,
    document,
    learned,
    optimizers,
    predictor,
    search,
    surrogate,
    tasks,
    world,
)  # fmt: skip
from planning.__main__ import claim_folder, drop_results, main
from planning.methods import COST, Method


def test_transitions_are_the_simulators():
    scenes, actions, after = surrogate.draw_transitions(300, seed=1, scenes=60)
    again = world.hard_world(scenes, actions)
    assert torch.equal(after.pos, again.pos) and torch.equal(after.value, again.value)
    assert ((actions >= 0) & (actions <= 1)).all()
    changed = (after.value != scenes.value).any(1) | (after.pos != scenes.pos).flatten(1).any(1)
    assert 0.1 < changed.float().mean() < 0.6, "aimed gestures hit something"


@pytest.fixture
def tiny_recipes(monkeypatch):
    """World models of a second."""
    for name in ("objects_60k", "tokens_60k"):
        recipe = replace(learned.RECIPES[name], num=200, steps=2, batch_size=4)
        monkeypatch.setitem(learned.RECIPES, name, recipe)


@pytest.mark.parametrize("name", ["objects_60k", "tokens_60k"])
def test_world_models_are_trained_once_and_apart(tmp_path, tiny_recipes, name):
    """The weights are kept; the second has its own; both say what follows in every scene."""
    scenes, actions, _ = surrogate.draw_transitions(20, seed=9, scenes=60)

    def tokens(seed):
        model = learned.load(name, seed, tmp_path)
        return world.as_tokens(scenes, model(scenes, actions))

    first, second = tokens(0), tokens(1)
    assert torch.equal(tokens(0), first) and not torch.equal(second, first)
    assert torch.allclose(first.mean(dim=-1), torch.zeros(20, 256), atol=1e-4)
    assert len(list(tmp_path.iterdir())) == 2
    assert learned.cpu_seconds(name, 0, tmp_path) > 0


def test_objects_stay_where_they_cannot_move(tmp_path, tiny_recipes):
    scenes, actions, _ = surrogate.draw_transitions(50, seed=9, scenes=60)
    state = learned.load("objects_60k", 0, tmp_path)(scenes, actions)
    fixed = scenes.low == scenes.high
    assert torch.equal(state.pos[fixed], scenes.pos[fixed])


def test_the_token_predictor_is_of_the_users_kind():
    """[B, T, N, D] and [B, T, 250, 3]; at first nothing changes; a gradient reaches the action."""
    model = predictor.TokenPredictor(width=8, heads=2)
    z, actions = torch.randn(3, 1, 256, 16), torch.rand(3, 1, 250, 3, requires_grad=True)
    assert torch.equal(model(z, actions), z)
    torch.nn.init.normal_(model.head.weight)
    model(z, actions).square().sum().backward()
    assert model(z, actions).shape == z.shape and (actions.grad.abs().amax(dim=(0, 1)) > 0).all()


def test_accuracy_by_hand():
    """The simulator itself is right about all; a world where nothing changes about that alone."""
    right = learned.accuracy(world.hard_world, 300)
    assert right["r2"] == 1 and right["changed"] == right["unchanged"] == 0
    assert right["auc"] > 0.99 and learned.advice(right["r2"]) == learned.GRADIENT
    still = learned.accuracy(lambda scenes, actions: scenes.state, 300)
    assert still["r2"] == 0 and still["unchanged"] == pytest.approx(0, abs=0.01)
    assert still["changed"] == still["identity"] == right["identity"] > 0.1
    assert still["auc"] == 0.5 and learned.advice(still["r2"]) == learned.SELECT
    assert learned.auc(torch.tensor([1.0, 3.0]), torch.tensor([2.0, 3.0])) == 2.5 / 4


@pytest.mark.parametrize("task", ["slider"])
def test_a_second_world_model_chooses(task):
    """The first likes nothing but presses; the second, the simulator, decides among the ends."""
    instances = tasks.make_instances(task, 3, 0)
    second, seen = tasks.model_cost(instances), []

    def second_cost(actions):
        seen.append(actions)
        return second(actions)

    objective = search.Objective(lambda a: -a[..., 2].mean(-1), 3, 250)
    rng = benchmark.rng_for("test")
    optimizers.refine_then_choose(objective, rng, second_cost=second_cost, share=0.2)
    assert [a.shape[1] for a in seen] == [8] and 230 < objective.used <= 250
    assert torch.equal(objective.best_cost, second(tdd.to_gesture(seen[0])).min(dim=1).values)


def test_a_trust_region_bounds_every_number():
    start = torch.rand(2, 3, 6)
    adam = search.Adam(start, 0.1, reach=0.05)
    for _ in range(9):
        adam.step(torch.randn(2, 3, 6))
    moved = (adam.z - start).abs()
    assert 0.04 < moved.max() <= 0.05 + 1e-6 and adam.z.min() >= 0 and adam.z.max() <= 1


def test_results_are_paired_and_resumed(tmp_path):
    methods = {"a": Method("a", COST, optimizers.shoot), "b": Method("b", COST, optimizers.shoot)}
    size = benchmark.Size(4, 2, 0, 0, (), 2, (), 0, 1)
    jobs = [j for j in benchmark.plan_jobs(methods, size) if j.task == "scroll"]
    assert [(j.method, j.seed) for j in jobs] == [("a", 0), ("b", 0), ("a", 1), ("b", 1)]
    path = tmp_path / "results.jsonl"

    def run(job):
        return benchmark.run_job(job, methods[job.method], {}, world.soft_world)

    benchmark.run_jobs(jobs, run, path)
    whole = path.read_text()
    lines = whole.splitlines(keepends=True)
    path.write_text("".join(lines[:2]) + lines[2][:40])  # interrupted while writing the third
    benchmark.run_jobs(jobs, run, path)
    clock = {"batch_s": 0}
    assert [json.loads(x) | clock for x in path.read_text().splitlines()] == [
        json.loads(x) | clock for x in whole.splitlines()
    ]
    bits = document.collect(benchmark.read_rows(path), 250, stage="main")
    assert {len(b) for b in bits.values()} == {8}


def test_the_stage_batched_counts_calls_of_32():
    """A draw from the generator, 32·250 of them: the most that depth can pay for."""
    methods, seen = {"a": Method("a", COST, optimizers.shoot)}, []
    jobs = benchmark.plan_jobs(methods, benchmark.Size(1, 0, 0, 0, (), 0, (), 2))
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
    before = (tmp_path / "checkpoint.json").read_text()
    claim_folder(tmp_path, None, quick=False, replace=False)  # of stages that do not read it
    assert (tmp_path / "checkpoint.json").read_text() == before
    claim_folder(tmp_path, other, quick=False, replace=True)
    assert benchmark.read_rows(path) == rows[:1]
    path.write_text("{]\n{}\n")
    with pytest.raises(tdd.UserError, match=r"results\.jsonl is damaged .* delete it"):
        benchmark.read_rows(path)


@pytest.mark.parametrize(("stale", "kept"), [("sha256", "021"), ("human_sha256", "0134")])
def test_only_what_a_denoiser_had_a_part_in_is_dropped(tmp_path, stale, kept):
    """Row by row: lines, knots, a denoiser of human-like gestures, the planner, refined draws."""
    rows = [
        ("main", "cem_ramp"), ("courses", "knots_cem"), ("courses", "human_bend"),
        ("loop", "warm"), ("learned", "ddim_adam"),
    ]  # fmt: skip
    lines = [json.dumps({"stage": stage, "method": method}) + "\n" for stage, method in rows]
    (tmp_path / "results.jsonl").write_text("".join(lines))
    for name in ("bank.npy", "human_bank.npy", "objects_60k_0.pt"):
        (tmp_path / "cache").mkdir(exist_ok=True)
        (tmp_path / "cache" / name).touch()
    drop_results(tmp_path, {stale})
    left = (tmp_path / "results.jsonl").read_text().splitlines(keepends=True)
    assert left == [lines[int(i)] for i in sorted(kept)]
    gone = "bank.npy" if stale == "sha256" else "human_bank.npy"
    cached = {path.name for path in (tmp_path / "cache").iterdir()}
    assert cached == {"bank.npy", "human_bank.npy", "objects_60k_0.pt"} - {gone}


def test_the_command_runs_on_a_tiny_set(run_module, tmp_path, untrained_run):
    code, out, err = run_module(
        *("planning", "--quick", "--checkpoint", untrained_run, "--output_dir", tmp_path),
        *("--only", "shoot_true", "ddim_select", "line_cem", "--instances", 1),
        *("--stage", "main", "temperature", "learned", "courses"),
    )
    assert code == 0, err
    assert "| DDIM, select " in out
    rows = benchmark.read_rows(tmp_path / "results.jsonl")
    assert {row["method"] for row in rows} == {"shoot_true", "ddim_select", "line_cem"}
    assert {row["stage"] for row in rows} == {"main", "temperature", "learned", "courses"}
    assert {row["instances"] for row in rows} == {1}
    assert "| tokens, 60 k " in out, "how right it is"
    about = json.loads((tmp_path / "about.json").read_text())
    assert about["machine"]["torch"] and about["command"].startswith("python -m planning --quick")
