"""The benchmark of quality per CPU second trains each recipe, judges all alike and goes on.

Why: it runs for hours, so what is cut must not be lost, and a peer that is wired wrongly would look
bad at no fault of its own: each must learn, and see and say what the wrapper claims.

    python -m pytest tests/test_quality.py
"""

import json

import pytest
import torch
from conftest import ROOT, L

from benchmarks import quality, report
from benchmarks.peers import import_torchvision
from benchmarks.recipes import FRAMES, RECIPES, Padded
from train_diffusion_ddim import DiffusionActionDataset, generate, to_model_units

OURS, LUCIDRAINS, DIFFUSERS = RECIPES
SIZES = {
    OURS: {"d_model": 16, "num_layers": 1, "nhead": 2, "patch_size": 25},
    LUCIDRAINS: {"dim": 8, "dim_mults": (1, 2)},
    DIFFUSERS: {"block_out_channels": (32, 32, 32), "layers_per_block": 1},
}
NEEDS = {LUCIDRAINS: "denoising_diffusion_pytorch", DIFFUSERS: "diffusers"}


@pytest.fixture(scope="module")
def x_train():
    return torch.from_numpy(DiffusionActionDataset(ROOT / "test_data_mini" / "train").sequences)


def recipe_of(name, x_train, steps=30):
    if name in NEEDS:
        import_torchvision()
        pytest.importorskip(NEEDS[name])
    return RECIPES[name](x_train, RECIPES[name].LEARNING_RATES[1], steps, **SIZES[name])


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_learns(name, x_train):
    """Its weights in training come nearer to what it is asked for at much noise."""
    recipe = recipe_of(name, x_train)
    model, scheduler, _ = recipe.trained()
    network = {
        OURS: lambda r: r.state.model,
        LUCIDRAINS: lambda r: r.diffusion.model,
        DIFFUSERS: lambda r: r.model,
    }[name](recipe)
    x_0, t = to_model_units(x_train), torch.full((len(x_train),), 900)
    eps = torch.randn(x_0.shape, generator=torch.Generator().manual_seed(0))
    x_t, _ = scheduler.add_noise(x_0, 900, eps)

    def loss():
        with torch.no_grad():
            output = network.eval()(x_t, t)
        return float((output - scheduler.target(x_0, eps, 900)).square().mean())

    before = loss()
    for _ in range(30):
        recipe.step()
    assert loss() < 0.9 * before
    assert generate(model, scheduler, (2, 250, 3), 2).shape == (2, 250, 3)


@pytest.mark.parametrize("name", [LUCIDRAINS, DIFFUSERS])
def test_a_peers_schedule_is_the_one_it_is_judged_by(name, x_train):
    recipe = recipe_of(name, x_train)
    _, scheduler, _ = recipe.trained()
    theirs = recipe.diffusion if name == LUCIDRAINS else recipe.noise
    torch.testing.assert_close(theirs.alphas_cumprod, scheduler.alphas_cumprod)


def test_padding_is_seen_and_cut_off_again():
    """A network that answers the mean over 256 frames, t and its input, channels first."""

    def network(x, t):
        assert x.shape == (2, 3, FRAMES) and float(x[..., L:].abs().sum()) == 0
        return x.mean(dim=2, keepdim=True) + t[:, None, None] + 0 * x

    padded = Padded(torch.nn.Identity())
    padded.network = torch.nn.Identity()
    padded.network.forward = network
    x_t, t = torch.rand(2, L, 3), torch.tensor([3, 5])
    expected = x_t.sum(dim=1, keepdim=True) / FRAMES + t[:, None, None]
    torch.testing.assert_close(padded(x_t, t), expected.expand(2, L, 3))


def test_the_clock_ends_a_training(x_train):
    _, cost = quality.train(OURS, x_train, 1e-3, 0.3, **SIZES[OURS])
    assert cost["steps"] >= 1 and cost["cpu_s"] < 0.6
    assert cost["ms_per_step"] == pytest.approx(1000 * cost["cpu_s"] / cost["steps"])


@pytest.fixture
def tiny(monkeypatch):
    """Make all small: two gestures, one and two steps."""
    monkeypatch.setattr(quality, "STEPS", (10, 2))
    monkeypatch.setattr(quality, "PROBE", 1)


def test_the_command_resumes_and_its_rows_become_a_table(tiny, tmp_path, capsys):
    flags = ["--data_dir", "test_data_mini", "--recipes", OURS, "--num", "2"]
    flags += ["--seconds", "0.1", "--output_dir", str(tmp_path)]
    quality.run(flags, **SIZES)
    first = (tmp_path / "quality.json").read_bytes()
    rows = json.loads(first)
    assert [row["lr"] for row in rows] == [*RECIPES[OURS].LEARNING_RATES]
    for row in rows:
        assert {"10", "2"} == row["valid"].keys() and 0 <= row["valid"]["10"] <= 1
        assert row["parameters"] > 1000 and row["mb_kept"] > 0 and row["ms_per_sample"] > 0
        assert {"0.1", "0.2", "0.4"} < row["r"].keys() and min(row["r"].values()) > 0.5
    quality.run(flags, **SIZES)
    assert (tmp_path / "quality.json").read_bytes() == first
    quality.run([*flags, "--seconds", "0.1", "0.2"], **SIZES)
    assert len(json.loads((tmp_path / "quality.json").read_text())) == 4
    report.main(tmp_path, tmp_path / "BENCHMARKS.md")
    text = (tmp_path / "BENCHMARKS.md").read_text("utf-8")
    section = text[text.index("## Quality") : text.index("## On a GPU")]
    assert section.count("| ours ") == 2 and "Not measured" not in section
    assert "runs of hours" in section.replace("\n", " ")


def row(name, lr, seconds, valid, r):
    return {"name": name, "lr": lr, "seconds": seconds, "valid": {"10": valid}, "r": {"0.1": r}}


def test_the_better_learning_rate_is_shown():
    rows = [row("a", 1, 60, 0.5, 2.0), row("a", 2, 60, 0.6, 3.0), row("a", 1, 180, 0.9, 1.5)]
    rows += [row("b", 1, 60, 0.0, 7.0), row("b", 2, 60, 0.0, 6.5)]
    found = [(r["name"], r["lr"], r["seconds"]) for r in report.better_rows(rows)]
    assert found == [("a", 2, 60), ("b", 2, 60), ("a", 1, 180)]


def test_an_hour_is_given_to_the_better_rate_at_the_end(tmp_path):
    args = quality.parse_args(["--hour", "--recipes", OURS, "--seconds", "60"])
    path = tmp_path / "quality.json"
    stock, other = RECIPES[OURS].LEARNING_RATES
    assert quality.plan(path, args) == [(OURS, stock, 60.0), (OURS, other, 60.0)]
    rows = [row(OURS, stock, 60.0, 0.7, 2.0), row(OURS, other, 60.0, 0.8, 2.0)]
    path.write_text(json.dumps(rows))
    assert quality.plan(path, args) == [(OURS, other, 3600.0)]
    path.write_text(json.dumps([*rows, row(OURS, other, 3600.0, 1.0, 1.0)]))
    assert quality.plan(path, args) == []


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--seconds", "0"], "must be above 0"),
        (["--num", "0"], "must be above 0"),
        (["--recipes", "stable"], "see --help"),
        (["--data_dir", "nowhere"], "nowhere"),
    ],
)
def test_mistakes_are_one_line(flags, words, capsys, tmp_path):
    assert quality.main([*flags, "--output_dir", str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1 and words in err


def test_a_peer_that_is_not_installed_is_named(tiny, replace_package, capsys, tmp_path):
    replace_package("denoising_diffusion_pytorch", "raise ImportError('not here')")
    flags = ["--recipes", LUCIDRAINS, "--data_dir", "test_data_mini"]
    assert quality.main([*flags, "--output_dir", str(tmp_path)]) == 2
    assert "pip install -r requirements-bench.txt" in capsys.readouterr().err


@pytest.mark.slow
def test_the_quick_command(tmp_path):
    import_torchvision()
    for package in NEEDS.values():
        pytest.importorskip(package)
    assert quality.main(["--quick", "--output_dir", str(tmp_path)]) == 0
    assert len(json.loads((tmp_path / "quality-quick.json").read_text())) == 6
