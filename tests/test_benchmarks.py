"""Every benchmark runs to its table, on sizes too small to measure anything.

Why: a benchmark that broke months ago is noticed when its number is needed. The arithmetic of the
tables is checked on made-up times.

    python -m pytest tests/test_benchmarks.py
"""

import argparse
import importlib
import json
import math
import shutil

import pytest
import torch
from conftest import make_gestures

from augmentation import generate_augmented_dataset
from benchmarks import (
    ablations,
    cost_curves,
    keyframes,
    latency,
    measure,
    report,
    roofline,
    scaling,
    training,
    trainings,
)
from evaluation import recorded
from evaluation.controls import interpolate
from evaluation.protocols import infill
from train_diffusion_ddim import (
    DiffusionActionDataset,
    MinimalDiffusionTransformer,
    TrainConfig,
    has_press_edge,
    load_model,
    parse_args,
    press_edges,
    train,
)
from trainlib.checkpoint import newest_checkpoint
from trainlib.data_rules import SHAPES
from trainlib.errors import UserError
from trainlib.gestures import GESTURE_TYPES
from trainlib.run_log import read_metrics
from trainlib.shapes import shapes_of

MINI = ["--data_dir", "test_data_mini"]
TINY = {
    "training": [
        "--batch_size",
        "2",
        "--d_model",
        "8",
        "--num_layers",
        "1",
        "--calls",
        "1",
        "--variants",
        "0",
        *MINI,
    ],
    "optimizer": ["--avx2", "1", *MINI],
    "keyframes": ["--limit_s", "0.01", "--every", "1", "--val_sequences", "2", *MINI],
    "sampling": ["--steps", "2", "--batches", "1"],
    "latency": ["--steps", "3", "--step_counts", "1", "--compiled", "0", "--num_layers", "1"],
    "roofline": ["--copy_mb", "1"],
    "cost_curves": [
        *("--seq_lens", "20", "40", "--widths", "8", "16", "--batch_sizes", "2", "4"),
        *("--set_sizes", "10", "20", "--step_counts", "1", "2", "--batches", "1", "2"),
    ],
    "startup": [],
    "scaling": ["--processes", "1", "--batch_sizes", "8", "--data_dir", "test_data_mini/train"],
    "loading": ["--sizes", "25", "--per_file", "30", "--data_dir", "test_data_mini/train"],
}


@pytest.mark.parametrize("name", report.ORDER)
def test_benchmark_runs(name, tmp_path, capsys):
    module = importlib.import_module(f"benchmarks.{name}")
    flags = [*TINY[name], "--threads", "1", "--output_dir", str(tmp_path)]
    flags += ["--rounds", "1"] if "rounds" in module.OPTIONS else []
    flags += ["--workers", "0"] if "workers" in module.OPTIONS else []
    assert measure.main(name, module.__doc__, module.measure, module.OPTIONS, flags) == 0
    (path,) = tmp_path.glob("*.json")
    result = json.loads(path.read_text())
    assert result["commit"] and result["machine"]["torch"] and result["machine"]["processor"]
    for table in result["tables"]:
        assert table["rows"] and all(row.keys() == table["rows"][0].keys() for row in table["rows"])
    assert f"## {result['title']}" in capsys.readouterr().out
    report.main(tmp_path, tmp_path / "BENCHMARKS.md")
    assert result["tables"][0]["title"] in (tmp_path / "BENCHMARKS.md").read_text("utf-8")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--rounds", "0"], "--rounds must be above 0, got 0"),
        (["--threads", "-1"], "--threads must be above 0"),
        (["--steps", "ten"], "see --help"),
        (["--step_counts", "5", "0"], "--step_counts must be above 0"),
        (["--batch", "1"], "see --help"),
        (["--output_dir", f"{__file__}/x"], "choose another"),
    ],
)
def test_mistakes_are_one_line(flags, words, capsys):
    code = measure.main("latency", "", lambda args: [], latency.OPTIONS, flags)
    err = capsys.readouterr().err
    assert code == 2 and err.startswith("error: ") and err.count("\n") == 1 and words in err


def test_a_child_that_fails_is_a_fault(capfd):
    def measured(_):
        measure.run_child("train_diffusion_ddim.py", "--lr", "-1")

    assert measure.main("latency", "", measured, latency.OPTIONS, []) == 1
    child, own = capfd.readouterr().err.splitlines()  # the child's words, then the parent's
    assert "--lr must be in" in child
    assert own == "error: python train_diffusion_ddim.py --lr -1 ended with exit code 2"


@pytest.mark.parametrize("name", ["ablations", "frontier"])
def test_committed_rows_are_shown_without_training(run_module, name):
    rows = json.loads((measure.RESULTS / f"{name}.json").read_text())
    code, out, err = run_module(f"benchmarks.{name}", "--only")
    shown = [line for line in out.splitlines() if line.startswith("|")]
    tables = len({row.get("num_epochs") for row in rows})
    assert code == 0 and len(shown) == 2 * tables + len(rows), err


def test_unknown_benchmarks_are_named(run_module):
    code, _, err = run_module("benchmarks", "speed", "sampling")
    assert code == 2 and err.count("\n") == 1 and "got speed" in err


def test_ratios_are_formed_within_a_round():
    seconds = {"ours": [1.0, 10.0, 1.0], "theirs": [2.0, 20.0, 4.0]}  # the second was disturbed
    ours, theirs = measure.compare(seconds, "ours")
    assert ours["ratio"] == 1 and theirs["ratio"] == 2 and theirs["ms max"] == 20000
    assert measure.compare(seconds, "theirs", faster=True)[0]["times faster"] == 2


def test_turns_are_taken_in_turn():
    calls = []
    names = {name: lambda n=name: calls.append(n) for name in "ab"}
    seconds = measure.in_turn(names, rounds=2, warm_up=1)
    assert calls == list("ababab") and [len(v) for v in seconds.values()] == [2, 2]


def test_times_per_gesture():
    """100 ms for 64 gestures against 10 ms for 32: five times faster each."""
    rows = [{"": "plan", "ms": 100.0}, {"": "ours", "ms": 10.0}]
    training.per_gesture(rows, {"plan": 64, "ours": 32}, "plan")
    assert [row["times faster per gesture"] for row in rows] == [1, 5]


def test_training_until_a_target():
    scores = iter([3.0, 2.0, 0.5, 0.1])
    curve, reached = keyframes.train_until(lambda: None, lambda: next(scores), 1.0, 60, every=10)
    assert reached and [(row["steps"], row["mse"]) for row in curve] == [
        (10, 3),
        (20, 2),
        (30, 0.5),
    ]
    assert keyframes.train_until(lambda: None, lambda: 3.0, 1.0, 1e-9, every=1)[1] is False


def test_bytes_of_a_ring():
    """All-reduce of n numbers over 8 devices moves 2·7/8·4n bytes through each link."""
    rows = scaling.paper_table(1000, 0.0, 0.0)["rows"]
    assert [row["MB over each link"] for row in rows] == [0, 0.004, 0.006, 0.007]


def test_slope_of_a_power_law():
    sizes = [1, 2, 4, 8]
    assert math.isclose(measure.log_log_slope(sizes, [3 * s**1.5 for s in sizes]), 1.5)


def test_work_of_a_linear_layer_and_of_attention():
    layer, x = torch.nn.Linear(8, 16, bias=False), torch.randn(4, 8)
    flops, moved = roofline.work(lambda: layer(x))
    assert flops == 2 * 4 * 8 * 16 and moved == 4 * (4 * 8 + 8 * 16 + 4 * 16)
    q = torch.randn(2, 3, 10, 4)  # (B, heads, L, D): two products of 2·L·L·D each
    flops, _ = roofline.work(lambda: torch.nn.functional.scaled_dot_product_attention(q, q, q))
    product = 2 * 3 * (2 * 10 * 10 * 4)
    assert flops == 2 * product
    q.requires_grad_()
    attention = torch.nn.functional.scaled_dot_product_attention
    assert roofline.work(lambda: attention(q, q, q).sum().backward())[0] == 7 * product


def test_kept_bytes_counts_each_storage_once():
    x = torch.randn(5, requires_grad=True)
    assert cost_curves.kept_bytes(lambda: (x * x, x * x)) == 20


def test_a_row_of_the_ablations_is_read_off_a_run(straight_run, tmp_path, monkeypatch):
    monkeypatch.setattr(ablations, "DRAWN", argparse.Namespace(num=40, judged=20, seed=0))
    row = ablations.read_run("default", straight_run)
    assert {"AUC", "valid", "R at 0.2"} <= row["scores"].keys()
    last = read_metrics(straight_run)[-1]
    assert row["scores"]["snr dB"] == last["final/mean_snr_db"] and row["seed"] == 0
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    with pytest.raises(UserError, match="no finished run"):
        ablations.read_run("default", tmp_path)


@pytest.mark.parametrize("name", ablations.VARIANTS)
def test_every_variant_is_of_todays_knobs(name):
    args = vars(parse_args(ablations.VARIANTS[name].split()))
    TrainConfig(**args)
    assert bool(args) == (name != "default")


def test_a_mean_stands_below_several_trainings(straight_run, tmp_path):
    flags = ["--num", "40", "--judged", "20", "--output_dir", str(tmp_path)]
    described = trainings.__doc__, trainings.measure, trainings.OPTIONS
    other = tmp_path / "other"  # as if of another seed
    shutil.copytree(straight_run, other)
    path = newest_checkpoint(other)
    content = torch.load(path, weights_only=True)
    moved = {name: value + 0.01 for name, value in content["ema_state_dict"].items()}
    torch.save(content | {"ema_state_dict": moved}, path)
    runs = ["--runs", str(straight_run), str(other)]
    assert measure.main("trainings", *described, [*flags, *runs]) == 0
    (result,) = tmp_path.glob("trainings-*.json")
    first, second, mean = json.loads(result.read_text())["tables"][0]["rows"]
    assert first["R at 0.2"] != second["R at 0.2"]
    for key in set(mean) - {"training"}:
        if mean[key] is not None:  # no swipe, no shake
            assert mean[key] == pytest.approx((first[key] + second[key]) / 2), key
    shares = [first[key] for key in ("none", *GESTURE_TYPES)]
    assert sum(shares) == pytest.approx(1)


def test_trainings_on_human_like_gestures_are_scored_without_a_prior(
    no_figures, tiny_config, tmp_path
):
    """Their curves have shapes of their own, in the weights; of lines the MSE is by hand."""
    for split, num in (("train", 24), ("val", 12)):
        folder, seed = str(tmp_path / split), len(split)
        generate_augmented_dataset(output_dir=folder, num_sequences=num, seed=seed, style="human")
    sets = {"data_dir": str(tmp_path / "train"), "val_data_dir": str(tmp_path / "val")}
    lengths = {"seq_len": 250, "patch_size": 50, "num_epochs": 1, "num_inference_steps": 2}
    lengths |= {"contacts": True, "prediction_type": "x0"}
    run = tmp_path / "run"
    config = tiny_config(**sets, **lengths, save_dir=str(run))
    train(config)
    model, _, config = load_model(run)
    x_train = DiffusionActionDataset(config.data_dir).sequences
    assert config.shapes == SHAPES
    torch.testing.assert_close(model.output_projection.shapes, shapes_of(x_train, SHAPES))

    (table,) = trainings.measure(argparse.Namespace(runs=[str(run)], num=12, judged=12, seed=0))
    (row,) = table["rows"]
    assert row["training"] == "run, seed 0" and table["title"] == trainings.OTHER
    x_0 = torch.from_numpy(DiffusionActionDataset(config.val_data_dir).sequences)
    x_0 = x_0[has_press_edge(x_0)]
    error = (interpolate(x_0, press_edges(x_0)) - x_0).square().mean()
    assert row["MSE (lines)"] == pytest.approx(error.item())


def test_many_answers_are_scored_beside_the_window_that_they_answer(monkeypatch):
    """Answers that are off by 0, 1, ... 15 hundredths everywhere: the mean is off by 0.075."""
    x_0 = make_gestures(4)
    off = 0.01 * torch.arange(trainings.NUM_ANSWERS)

    def answer(model, scheduler, shape, *, known=None, **_):
        if known is None:
            return torch.zeros(shape)
        return known + off.repeat(len(known) // len(off))[:, None, None]

    found = recorded.Recorded(x_0.numpy(), x_0.numpy(), None, "")
    for module in (trainings.tdd, infill):
        monkeypatch.setattr(module, "generate", answer)
    monkeypatch.setattr(trainings.tdd, "recreate", lambda model, scheduler, x, **_: x + 0.1)
    monkeypatch.setattr(trainings, "read_recorded", lambda *_: found)
    args = argparse.Namespace(judged=4, seed=0)
    row = trainings.score_recorded(None, None, TrainConfig(), x_0, args)
    assert row["MSE of the mean"] == pytest.approx(0.075**2, rel=1e-4)
    assert row["MSE"] == pytest.approx(0.01, rel=1e-4)
    pairs = [abs(i - j) for i in range(16) for j in range(16) if i != j]
    energy = math.sqrt(2) * (0.075 - 0.01 * sum(pairs) / len(pairs) / 2)
    assert row["energy"] == pytest.approx(energy, rel=1e-3)


@pytest.mark.parametrize("num_layers", [1, 12])
def test_a_step_is_the_sum_of_its_parts(num_layers):
    """All blocks are counted, those of two digits, too; a head holds its chain and its curves."""
    options = {"d_model": 16, "nhead": 2, "patch_size": 10, "adaln": True, "rotary": True}
    options |= {"contacts": True, "num_layers": num_layers}
    model = MinimalDiffusionTransformer(**options).eval()
    rows = {row["part"]: row for row in latency.parts_table(model, 1)["rows"]}
    whole, blocks, head, chain, curves = (row["operations"] for row in rows.values())
    given = torch.zeros(1, 25, 16), torch.zeros(1, 16)
    with latency.Operations() as alone, torch.inference_mode():
        model.blocks[0](*given)
    assert blocks == num_layers * alone.count > 0
    assert 0 < chain + curves < head < whole - blocks
    assert all(row["ms"] > 0 for row in rows.values())
