"""The baselines must be what their names say, and the comparison with them fair.

A regression that is given all frames learns the identity and, where two gestures are possible,
their mean; it sees neither x_t nor t. The VAE's rate is the divergence that torch.distributions
computes, its bits are those of the channel, and it can repeat what it was trained on. `fit` is the
trainer's run, bit for bit. The Bayes denoiser in the place of every network comes out as theory
says.

    python -m pytest tests/test_baselines.py
"""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import ROOT, L, make_gestures
from torch import nn

import train_diffusion_ddim as tdd
from evaluation import baselines, baselines_record, rivals, theory
from evaluation.bayes import GesturePrior, posterior_mean
from evaluation.controls import interpolation
from evaluation.estimates import Estimate
from trainlib.checkpoint import load_checkpoint, save_checkpoint
from trainlib.errors import UserError
from trainlib.known import touch_down
from trainlib.muon import make_optimizers
from trainlib.shapes import shapes_of
from trainlib.state import TrainState

EXACT = {"prediction_type": "x0", "augment": False, "lr": 1e-2, "dropout": 0.0}


def regression(config, x_train, num_steps, name="regression_from_known_frames"):
    """A trained baseline, and the scheduler that asks it."""
    model, own_config, step = rivals.recipes(config)[name]
    trained = rivals.fit(model, step, x_train, own_config, num_steps, name)
    return trained, rivals.mean_scheduler(config, "cpu")


# ----------------------------------------------------------------------------------------
# REGRESSION
# ----------------------------------------------------------------------------------------


def test_regression_given_all_frames_learns_the_identity(tiny_config, monkeypatch):
    everything = {"all": (lambda x: torch.ones_like(x[..., 0], dtype=torch.bool), 1.0)}
    monkeypatch.setattr(tdd, "KNOWN_STRATEGIES", everything)
    x_train, x_new = make_gestures(400, seed=1), make_gestures(50, seed=2)
    config = tiny_config(**EXACT, known_share=1.0, batch_size=16, patch_size=1, d_model=32)
    model, _ = regression(config, x_train, 150)
    mask = torch.ones(50, L, dtype=torch.bool)
    x, t = tdd.to_model_units(x_new), torch.zeros(50, dtype=torch.long)
    answer = tdd.to_data_units(model(torch.randn_like(x), t, x, mask))  # as it answers, unclamped
    assert torch.mean((answer - x_new) ** 2) < 5e-3 * x_new.var()


@pytest.mark.parametrize("contacts", [False, True])
def test_regression_answers_an_ambiguous_question_with_the_mean(tiny_config, contacts):
    pair = make_gestures(2, seed=5)
    config = tiny_config(**EXACT | {"contacts": contacts}, known_share=0.0)
    model, scheduler = regression(config, pair.repeat(4, 1, 1), 1200 if contacts else 250)
    answer = tdd.generate(model, scheduler, (3, L, 3), 1, seed=7)
    error = (answer - pair.mean(dim=0)).abs()
    # a contact is one polynomial, which the mean of two contacts is not
    assert error.mean() < (0.03 if contacts else 0.01) and error.max() < (0.3 if contacts else 0.08)
    assert (pair[0] - pair[1]).abs().max() > 0.5  # neither of the two is near


@pytest.mark.parametrize("name", ["regression_from_known_frames", "vae_beta_0.02"])
def test_baselines_have_the_checkpoints_shapes_and_optimizer(tiny_config, name):
    """Shapes that its contacts have in common, and Muon for the same matrices of the denoiser."""
    x_train = make_gestures(20, seed=3)
    x_train[..., :2] = x_train[..., :2] ** 3
    given = {"contacts": True, "shapes": 4, "optimizer": "muon", "curve_steps": 0}
    config = tiny_config(**EXACT | given)
    model, _ = regression(config, x_train, 1, name)
    network = model.decoder if "vae" in name else model.network
    shapes = shapes_of(x_train.numpy(), 4, reversible=False)
    torch.testing.assert_close(network.output_projection.shapes, shapes)

    def stepped_by_muon(model):
        muon = make_optimizers(model, 0.1, 0.0, muon=True)[-1]
        return [p.shape for group in muon.param_groups for p in group["params"]]

    whole = tdd.build_model(replace(config, context_dim=network.options["context_dim"]))
    assert stepped_by_muon(network) == stepped_by_muon(whole)
    assert len(stepped_by_muon(model)) == len(stepped_by_muon(whole)) + 4 * ("vae" in name)


def test_regression_sees_the_given_frames_alone(tiny_config):
    config = tiny_config(**EXACT, adaln=False)  # adaLN-zero starts with a constant output
    model = rivals.Regression(tdd.build_model(config)).eval()
    x_0, x_t = make_gestures(4), torch.randn(4, L, 3)
    mask, t = tdd.press_edges(x_0), torch.full((4,), 3)
    answer = model(x_t, t, x_0, mask)
    assert torch.equal(answer, model(torch.zeros_like(x_t), t * 0, x_0, mask))
    assert torch.equal(answer, model(x_t, t, torch.where(mask[..., None], x_0, 0.5), mask))
    assert not torch.equal(answer, model(x_t, t, x_0, touch_down(x_0)))


def test_fit_repeats_the_trainers_run(straight_run):
    trained, _, config = tdd.load_model(straight_run)
    x_train = torch.from_numpy(tdd.DiffusionActionDataset(config.data_dir, L).sequences)
    num_steps = load_checkpoint(straight_run)["step"]
    torch.manual_seed(config.seed)
    model = tdd.build_model(config)
    again = rivals.fit(model, tdd.train_step, x_train, config, num_steps, "again")
    for name, weight in trained.state_dict().items():
        assert torch.equal(weight, again.state_dict()[name]), name


def test_nearest_by_known_frames_equals_loops():
    x_0, bank = make_gestures(9, seed=3), make_gestures(30, seed=4)
    mask = torch.rand(9, L, generator=torch.Generator().manual_seed(0)) < 0.3
    found = rivals.nearest_by_known_frames(x_0, mask, bank)
    for x, m, answer in zip(x_0, mask, found, strict=True):
        errors = [((x[m] - b[m]) ** 2).sum() for b in bank]
        assert torch.equal(answer, bank[int(np.argmin(errors))])


# ----------------------------------------------------------------------------------------
# VAE
# ----------------------------------------------------------------------------------------


def test_rate_is_the_divergence_from_the_prior(tiny_config):
    generator = torch.Generator().manual_seed(0)
    mean, log_variance = torch.randn(2, 6, rivals.LATENT_DIM, generator=generator)
    normal = torch.distributions.Normal
    posterior, prior = normal(mean, (0.5 * log_variance).exp()), normal(0.0, 1.0)
    expected = torch.distributions.kl_divergence(posterior, prior).sum(dim=1)
    torch.testing.assert_close(rivals.kl_from_prior(mean, log_variance), expected)

    vae, x_0 = rivals.GestureVAE(tiny_config(**EXACT, adaln=False)).eval(), make_gestures(6)
    torch.nn.init.normal_(vae.decoder.context_mlp[-1].weight)  # at first, no context counts
    answer, bits = rivals.reconstruct(vae, x_0)
    np.testing.assert_allclose(
        bits, rivals.kl_from_prior(*vae.encode(x_0)).detach() / math.log(2), rtol=1e-5
    )
    of_mean = vae.decode(vae.encode(x_0)[0]).clamp(0, 1)  # which would take infinitely many bits
    assert (answer - of_mean).abs().max() > 0.01


def test_vae_overfits_eight_gestures_and_says_which(tiny_config):
    exact = EXACT | {"contacts": True, "lr": 2e-3}
    config = tiny_config(**exact, num_layers=2, batch_size=8, d_model=32)
    x_train = make_gestures(8)
    torch.manual_seed(1)
    vae = rivals.fit(
        rivals.GestureVAE(config),
        lambda s, x_0: rivals.vae_step(s, x_0, 0.01),
        x_train,
        config,
        1200,
        "vae",
    )
    answer, bits = rivals.reconstruct(vae, x_train)
    assert torch.mean((answer - x_train) ** 2) < 0.01 * x_train.var()
    assert bits.mean() > 3  # the rate is at least the information, log2(8)
    assert bits.mean() < 30


def test_the_decoder_knows_where_it_is(tiny_config):
    """Rotary attention sees distances alone: of equal tokens it would make equal frames."""
    config = tiny_config(**EXACT | {"rotary": True, "adaln": False})
    torch.manual_seed(0)
    frames = rivals.GestureVAE(config).eval().decode(torch.randn(1, rivals.LATENT_DIM))[0]
    tokens = frames.detach().reshape(-1, config.patch_size * 3)
    assert len(tokens) > 2 and (tokens.std(dim=0) > 1e-3).all()


def test_vae_without_information_pays_nothing(tiny_config):
    config = tiny_config(**EXACT)
    vae = rivals.fit(
        rivals.GestureVAE(config),
        lambda s, x_0: rivals.vae_step(s, x_0, 1e4),
        make_gestures(8),
        config,
        100,
        "vae",
    )
    assert rivals.reconstruct(vae, make_gestures(8))[1].mean() < 0.01


def test_information_of_a_gaussian_is_its_closed_form():
    sigmas = np.geomspace(300, 0.05, 2000)
    mmse = 4 * sigmas**2 / (4 + sigmas**2)  # of N(0, 2²)
    bits = baselines.information(sigmas, mmse, 3)
    np.testing.assert_allclose(bits, 1.5 * np.log2(1 + 4 / sigmas**2), rtol=1e-3)


# ----------------------------------------------------------------------------------------
# THE COMPARISON
# ----------------------------------------------------------------------------------------

PRIOR = GesturePrior(40, 3, 12)


class Oracle(nn.Module):
    """The Bayes denoiser in a network's place, for a scheduler that predicts x_0."""

    def __init__(self, scheduler):
        super().__init__()
        self.scheduler = scheduler
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, x_t, t):
        t = int(t[0])
        noisy = tdd.to_data_units(x_t.double() / self.scheduler.alpha_bar(t) ** 0.5)
        mean = posterior_mean(noisy.numpy(), self.scheduler.sigma(t), PRIOR)
        return tdd.to_model_units(torch.from_numpy(mean)).to(x_t)


class Copier(nn.Module):
    """A VAE that repeats its input and says that this took so many bits."""

    def __init__(self, bits):
        super().__init__()
        self.mean = math.sqrt(2 * bits * math.log(2) / rivals.LATENT_DIM)

    def encode(self, x_0):
        mean = torch.full((len(x_0), rivals.LATENT_DIM), self.mean)
        return mean, torch.zeros_like(mean)

    def forward(self, x_0, eps):
        return x_0, rivals.kl_from_prior(*self.encode(x_0))


def comparison(vaes=None):
    """The Bayes denoiser in the place of every network, on 96 gestures of 40 frames."""
    config = tdd.TrainConfig(seq_len=40, num_inference_steps=5)
    scheduler = tdd.build_scheduler(config)
    oracle = Oracle(scheduler)
    x_0 = torch.from_numpy(PRIOR.draw(96, np.random.default_rng(0))).float()
    return baselines.Comparison(
        **{"model": oracle, "regression_from_x_t": oracle, "regression": oracle},
        **{"scheduler": scheduler, "x0_scheduler": scheduler, "config": config, "prior": PRIOR},
        **{"x_0": x_0, "x_val": x_0, "x_train": x_0.flip(0), "oracle": True},
        **{"num_generated": 4, "num_curve": 48, "vaes": vaes or {}},
    )


def test_reconstructions_are_compared_at_equal_bits():
    tables = baselines.run_reconstruction(comparison({"vae_6": Copier(6), "vae_12": Copier(12)}))
    few, many = tables["reconstruction_vae_6"], tables["reconstruction_vae_12"]
    for table, vae, bits in ((few, "vae_6", 6), (many, "vae_12", 12)):
        assert table[vae]["bits"].value == pytest.approx(bits, rel=1e-4)
        assert table[vae]["mse"].value == 0
        assert table["diffusion_one_shot"]["bits"].value == pytest.approx(bits, rel=0.05)
        assert table["nearest_training_item"]["bits"].value == math.log2(96)
    assert few["diffusion"]["sigma"].value > many["diffusion"]["sigma"].value
    assert few["diffusion_one_shot"]["mse"].value > 2 * many["diffusion_one_shot"]["mse"].value


def test_the_bayes_denoiser_comes_out_as_theory_says():
    c = comparison()
    x_0 = c.x_0
    answers = baselines.denoise_answers(c, 0.9)
    torch.testing.assert_close(answers["diffusion_one_shot"], answers["limit"], atol=1e-4, rtol=0)
    table = baselines.score_answers(x_0, answers, PRIOR, "limit")
    assert table["regression"]["r"].value == pytest.approx(1, abs=1e-3)
    assert table["diffusion"]["mse_ratio"] == Estimate(1.0, (1.0, 1.0), 96)
    assert table["diffusion"]["r"].value > 1.05
    rows = theory.judge_predictions({"denoise_sigma_0.9": table})
    came_out = {(r["metric"], r["first"], r["second"]): r["came_out"] for r in rows}
    assert came_out == {
        ("mse_ratio", "diffusion_one_shot", "diffusion"): "yes",
        ("mse_ratio", "regression", "diffusion"): "yes",
        ("r", "diffusion_one_shot", "regression"): "undecided",
        ("valid", "diffusion", "regression"): "yes",
    }


def test_without_a_prior_nothing_that_needs_it_is_said():
    c = replace(comparison(), prior=None, oracle=False)
    answers = baselines.denoise_answers(c, 0.9)
    assert "limit" not in answers
    answers["interpolation"] = interpolation(c.x_0)
    table = baselines.score_answers(c.x_0, answers, c.prior)
    tables = {"keyframes": table, "generate": baselines.run_generate(c)}
    metrics = {name for rows in tables.values() for row in rows.values() for name in row}
    assert not metrics & {"valid", "type_mix_error", "r"} and "share_click" in metrics
    assert "interpolation" in baselines_record.baselines_table(tables)


def test_predictions_are_judged_by_their_intervals():
    def outcome(regression, diffusion, metric="mse_ratio"):
        table = {"regression": {metric: regression}, "diffusion": {metric: diffusion}}
        (row,) = theory.judge_predictions({"infill": table})
        return row["came_out"]

    one = Estimate(1.0, (1.0, 1.0), 9)
    assert outcome(Estimate(0.6, (0.5, 0.7), 9), one) == "yes"
    assert outcome(Estimate(0.9, (0.7, 1.1), 9), one) == "undecided"
    assert outcome(Estimate(1.4, (1.3, 1.5), 9), one) == "no"
    assert outcome(Estimate(0.0, None, 1), Estimate(0.9, (0.8, 1.0), 9), "valid") == "yes"
    vaes = {name: {"mse_ratio": Estimate(2.0, (1.5, 2.5), 9)} for name in ("vae_a", "vae_b")}
    rows = theory.judge_predictions({"reconstruction_x": {"diffusion": {"mse_ratio": one}, **vaes}})
    assert [(r["first"], r["is_open"], r["came_out"]) for r in rows] == [
        ("vae_a", True, "diffusion"),
        ("vae_b", True, "diffusion"),
    ]


# ----------------------------------------------------------------------------------------
# FILES AND COMMAND LINE
# ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A checkpoint of an untrained network on the mini set."""
    folder = tmp_path_factory.mktemp("run")
    sets = {split: str(ROOT / "test_data_mini" / split) for split in ("train", "val")}
    config = tdd.TrainConfig(
        **{"d_model": 16, "num_layers": 1, "nhead": 2, "device": "cpu", "batch_size": 4},
        **{"data_dir": sets["train"], "val_data_dir": sets["val"]},
    )
    model, scheduler = tdd.build_model(config), tdd.build_scheduler(config)
    state = TrainState(model, scheduler, config, config.num_epochs, tdd.NUM_TASKS)
    state.step = 30
    content = state.to_checkpoint(0, None)
    save_checkpoint(folder / "diffusion_checkpoint_epoch_0.pth", content)
    return folder


def run(capsys, checkpoint, folder, *flags):
    argv = ["--checkpoint", str(checkpoint), "--output_dir", str(folder), "--quick", *flags]
    code = baselines.main(argv)
    return code, *capsys.readouterr()


def test_quick_run_writes_what_the_report_reads(capsys, checkpoint, tmp_path):
    code, out, err = run(capsys, checkpoint, tmp_path)
    assert code == 0, err
    refuse = pytest.fail
    results = json.loads((tmp_path / "baselines.json").read_text("utf-8"), parse_constant=refuse)
    assert results["about"]["num_steps"] == 20 and results["about"]["seed"] == 0
    assert results["about"]["command"].startswith("python -m evaluation.baselines --checkpoint")
    assert {"machine", "date", "commit", "train_s"} <= set(results["about"])
    vaes = [f"vae_beta_{beta}" for beta in rivals.BETAS]
    names = ["keyframes", *(f"denoise_sigma_{s}" for s in baselines.SIGMAS), "infill", "generate"]
    names += [*(f"reconstruction_{name}" for name in vaes), "cost"]
    assert list(results["protocols"]) == names
    mse = results["protocols"]["keyframes"]["regression"]["mse"]
    assert set(mse) == {"value", "ci", "n"} and mse["n"] == 5

    read = baselines_record.read_baselines(tmp_path / "baselines.json")
    assert read["protocols"]["keyframes"]["regression"]["mse"].value == mse["value"]
    assert read["protocols"]["generate"]["random_training_item"]["share_copies"].value == 1
    lookup = read["protocols"][f"reconstruction_{vaes[0]}"]["nearest_training_item"]["bits"]
    assert lookup.value == pytest.approx(math.log2(10))
    assert {p["came_out"] for p in read["predictions"]} & {"yes", "no", "undecided"}
    markdown = (tmp_path / "baselines.md").read_text("utf-8")
    assert baselines_record.baselines_table(read["protocols"]) in markdown
    assert baselines_record.predictions_table(read["predictions"]) in markdown
    assert baselines_record.baselines_table(read["protocols"], interval=False) in out

    written = {p: p.stat().st_mtime_ns for p in tmp_path.glob("*.pth")}
    assert {p.stem for p in written} == {
        *("regression_from_known_frames", "regression_from_x_t", *vaes)
    }
    assert run(capsys, checkpoint, tmp_path)[0] == 0  # evaluates the same weights again
    assert written == {p: p.stat().st_mtime_ns for p in tmp_path.glob("*.pth")}
    again = baselines_record.read_baselines(tmp_path / "baselines.json")["protocols"]
    assert again["keyframes"] == read["protocols"]["keyframes"]

    code, _, err = run(capsys, checkpoint, tmp_path, "--num_steps", "7")
    assert code == 2 and err.startswith("error: ") and err.count("\n") == 1
    assert "another checkpoint, data or number of steps" in err


def test_mistakes_end_in_one_line(capsys, checkpoint, tmp_path):
    content = load_checkpoint(checkpoint)
    path = tmp_path / "diffusion_checkpoint_epoch_0.pth"
    config = tdd.TrainConfig(**content["config"] | {"known_frames": False})
    model, scheduler = tdd.build_model(config), tdd.build_scheduler(config)
    state = TrainState(model, scheduler, config, config.num_epochs, tdd.NUM_TASKS)
    save_checkpoint(path, state.to_checkpoint(0, None))
    (tmp_path / "file").touch()
    for flags in (
        [tmp_path, tmp_path / "out"],
        [tmp_path / "none", tmp_path / "out"],
        [checkpoint, tmp_path / "out", "--num_steps", "0"],
        [checkpoint, tmp_path / "out", "--train_data_dir", str(tmp_path / "none")],
        [checkpoint, tmp_path / "file" / "out"],
    ):
        code, _, err = run(capsys, *flags)
        assert code == 2 and err.startswith("error: ") and err.count("\n") == 1, err
    assert not (tmp_path / "out").exists()
    (tmp_path / "baselines.json").write_text("{}")
    with pytest.raises(UserError):
        baselines_record.read_baselines(tmp_path / "baselines.json")
