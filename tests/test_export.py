"""The exported denoiser samples what the trained one samples, whatever array it is given.

Why: a planner that runs an export trusts that nothing was lost on the way. The numpy loop of
export/runtime.py is written apart from the scheduler, so each checks the other.

    python -m pytest tests/test_export.py
"""

import copy
import json
import math
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, L

import train_diffusion_ddim as tdd
from export import __main__ as command
from export import runtime
from export.__main__ import (
    check_parity,
    describe_schedule,
    describe_steps,
    example_inputs,
    export,
    main,
    sample_like,
)
from trainlib.checkpoint import load_checkpoint, save_checkpoint
from trainlib.errors import UserError


def tiny_model(**options):
    torch.manual_seed(0)
    config = tdd.TrainConfig(**(TINY | options))
    model = tdd.build_model(config).eval().requires_grad_(False)
    for p in model.parameters():
        p += 0.1 * torch.randn_like(p)
    return model, tdd.build_scheduler(config)


SAMPLING = {"num_inference_steps": 3, "eta": 1.0, "sampler": "dpmpp"}
SAMPLINGS = [("ddim", 0.0), ("ddim", 0.3), ("dpmpp", 1.0)]


@pytest.mark.parametrize("steps", [1, 5])
@pytest.mark.parametrize(("sampler", "eta"), SAMPLINGS)
@pytest.mark.parametrize("prediction_type", tdd.PREDICTION_TYPES)
@pytest.mark.parametrize("known_frames", [True, False])
def test_the_numpy_loop_agrees_with_the_scheduler(
    prediction_type, known_frames, sampler, eta, steps
):
    model, scheduler = tiny_model(prediction_type=prediction_type, known_frames=known_frames)
    sampling = {"num_inference_steps": steps, "eta": eta, "sampler": sampler}
    schedule = json.loads(json.dumps(describe_schedule(model, scheduler, **sampling)))
    assert schedule["noises"] == (steps if eta else 1)
    noise, *given = example_inputs(model, 3, schedule["noises"], seed=7)

    def denoise(*arrays):
        return model(*map(torch.from_numpy, arrays)).numpy()

    arrays = runtime.plain_arrays(schedule, noise, *(given or [None, None]))
    known = dict(zip(("known", "known_mask"), given, strict=False))
    ours = sample_like(model, scheduler, 3, 7, **sampling, **known)
    assert (
        np.abs(runtime.sample_by(denoise, denoise, schedule, *arrays) - ours.numpy()).max() < 1e-5
    )


@pytest.mark.parametrize("spacing", tdd.SPACINGS)
@pytest.mark.parametrize(("sampler", "eta"), SAMPLINGS)
def test_steps_keep_the_marginals_of_the_forward_process(spacing, sampler, eta):
    """Of the true x_0: sqrt(ᾱ_prev)·x_0 and noise of variance 1 - ᾱ_prev (DDIM, lemma 1)."""
    scheduler = tdd.DDIMScheduler(spacing=spacing)
    steps = describe_steps(scheduler, 10, eta, sampler)
    after = [step["alpha_bar_t"] for step in steps[1:]] + [1.0]
    for step, alpha_bar_prev in zip(steps, after, strict=True):
        variance = step["of_eps"] ** 2 + step["of_noise"] ** 2
        assert step["of_aim"] == pytest.approx(alpha_bar_prev**0.5)
        assert variance == pytest.approx(1 - alpha_bar_prev)
    assert (steps[3]["of_noise"] > 0) == (eta > 0)
    assert (steps[3]["extrapolate"] > 0) == (sampler == "dpmpp")


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A tiny model, its scheduler, and the folder with both denoisers but no compiled sampler."""
    curves: dict = {"sigma_min": 0.05, "curve_steps": 3, "spacing": "log_sigma"}
    model, scheduler = tiny_model(contacts=True, prediction_type="x0", **curves)
    folder = tmp_path_factory.mktemp("export") / "exported"
    export(model, scheduler, folder, **SAMPLING, compiled=False)
    return model, scheduler, folder


def test_exported_files_agree(exported):
    differences = check_parity(*exported, **SAMPLING)
    assert "torch" in differences and max(differences.values()) < 1e-5


@pytest.mark.parametrize(
    ("off", "by", "is_same"), [(1, 5e-4, True), (2, 5e-4, True), (3, 5e-4, False), (1, 0.01, False)]
)
def test_parity_forgives_half_a_pixel_in_one_gesture_of_ten(
    exported, monkeypatch, off, by, is_same
):
    """Of 16, in batches of one and three; a gesture that is another is never forgiven."""
    right, left = runtime.sample_by, [off]

    def sample_by(*arguments):
        x_0 = right(*arguments)
        x_0[:1] += by * (left[0] > 0)
        left[0] -= 1
        return x_0

    monkeypatch.setattr(runtime, "sample_by", sample_by)
    monkeypatch.setattr(runtime, "FILES", {"torch": runtime.FILES["torch"]})
    (difference,) = check_parity(*exported, **SAMPLING).values()
    assert (difference <= command.PARITY) is is_same


def test_parity_sees_a_wrong_schedule(exported, tmp_path):
    model, scheduler, folder = exported
    shutil.copytree(folder, tmp_path / "wrong")
    path = tmp_path / "wrong" / "schedule.json"
    schedule = json.loads(path.read_text())
    schedule["steps"][0]["of_noise"] *= 0.9
    path.write_text(json.dumps(schedule))
    assert min(check_parity(model, scheduler, path.parent, **SAMPLING).values()) > 1e-4


def test_parity_sees_curves_without_their_last_steps(exported, tmp_path):
    model, scheduler, folder = exported
    shutil.copytree(folder, tmp_path / "short")
    shorter = command.LastStep(command.plain_copy(model), 1, SAMPLING["eta"])
    command.write_denoiser(shorter, tmp_path / "short", runtime.LAST)
    assert check_parity(model, scheduler, tmp_path / "short", **SAMPLING)["torch"] > 1e-4
    (tmp_path / "short" / "last_denoiser.pt2").unlink()
    with pytest.raises(ValueError, match=r"last_denoiser\.pt2"):
        runtime.Sampler(tmp_path / "short", "torch")


def test_parity_sees_lost_known_frames(exported, monkeypatch):
    """They are half of the inputs, and only these have any."""
    kept = runtime.plain_arrays

    def lost(*arguments):
        noise, known, mask = kept(*arguments)
        return noise, 0 * known, mask

    monkeypatch.setattr(runtime, "plain_arrays", lost)
    assert min(check_parity(*exported, **SAMPLING).values()) > 1e-2


def test_the_folder_needs_nothing_of_ours(exported):
    code = (
        "import sys, numpy as np; from runtime import Sampler;"
        "sample = Sampler('.', 'torch'); x = sample(sample.draw(2, np.random.default_rng(0)));"
        "print(x.shape, 'train_diffusion_ddim' in sys.modules)"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=exported[2], capture_output=True, text=True)
    assert done.stdout == f"(2, {L}, 3) False\n", done.stderr


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """The folder of a tiny model whose steps are compiled, for one gesture and for three."""
    if not shutil.which("g++"):
        pytest.skip("no g++")
    folder = tmp_path_factory.mktemp("compiled") / "exported"
    model, scheduler = tiny_model(contacts=True, max_contacts=1, prediction_type="x0")
    differences = export(model, scheduler, folder, **SAMPLING, batch_size=3)
    assert differences["compiled"] < 1e-5
    return folder


@pytest.fixture(scope="module", params=runtime.FILES)
def sampler(request):
    """Each engine's sampler; what cannot be run here is skipped."""
    if request.param == "compiled":
        folder = request.getfixturevalue("compiled")
    else:
        _, _, folder = request.getfixturevalue("exported")
    if not (folder / runtime.FILES[request.param]).exists():
        pytest.skip(f"no {request.param}")
    return runtime.Sampler(folder, request.param)


def inputs_of(sampler, num):
    """Noise, known frames and mask for so many gestures, numpy."""
    noises = sampler.schedule["noises"]
    return [x.numpy() for x in example_inputs(tiny_model()[0], num, noises)]


VIEWS = {
    "every other one of twice as many": lambda x: np.repeat(x, 2, axis=1)[:, ::2],
    "turned round": lambda x: x[:, ::-1].copy()[:, ::-1],
    "one channel of three": lambda x: np.stack([x, x, x], -1)[..., 0],
    "Fortran order": np.asfortranarray,
    "read-only": lambda x: np.frombuffer(x.tobytes(), x.dtype).reshape(x.shape),
    "broadcast": lambda x: np.broadcast_to(x, x.shape),
    "bytes swapped": lambda x: x.astype(x.dtype.newbyteorder()),
    "torch": torch.from_numpy,
    "torch, transposed": lambda x: torch.from_numpy(x.swapaxes(0, 1).copy()).transpose(0, 1),
    "a list": lambda x: x.tolist(),
    "float64": lambda x: x.astype(np.float64) if x.dtype != bool else x,
}


@pytest.mark.parametrize("view", VIEWS)
def test_views_sample_what_a_plain_copy_does(sampler, view):
    arrays = inputs_of(sampler, 1)
    before = sampler(*arrays)
    for i in range(3):
        given = [VIEWS[view](x) if i == j else x for j, x in enumerate(arrays)]
        assert np.array_equal(sampler(*given), before), ("noise", "known", "known_mask")[i]


@pytest.mark.parametrize("num", [2, 4, 5])
def test_any_number_of_gestures(sampler, monkeypatch, num):
    """Those above what is run at once are run after it; a compiled program's batch is filled up."""
    arrays = inputs_of(sampler, num)
    one_by_one = [sampler(*(x[i : i + 1] for x in arrays)) for i in range(num)]
    if sampler.engine != "compiled":
        monkeypatch.setattr(sampler, "programs", {2: sampler.programs[runtime.BATCH]})
    # a batch is summed in another order, and a random network decides presses by a hair
    assert np.abs(sampler(*arrays) - np.concatenate(one_by_one)).max() < 1e-3


def test_compiled_programs_get_the_number_that_they_are_made_for(compiled, monkeypatch):
    sampler, sizes = runtime.Sampler(compiled, "compiled"), []
    assert [*sampler.programs] == [1, 3]
    for size, program in [*sampler.programs.items()]:

        def counted(*arrays, size=size, program=program):
            assert {len(array) for array in arrays} == {size}
            sizes.append(size)
            return program(*arrays)

        sampler.programs[size] = counted
    for num, wanted in ((1, [1]), (2, [3]), (4, [3, 1]), (5, [3, 3]), (7, [3, 3, 1])):
        sizes.clear()
        assert len(sampler(*inputs_of(sampler, num))) == num and sizes == wanted


def test_noise_is_drawn_in_its_shape(sampler):
    noise = sampler.draw(2, np.random.default_rng(0))
    assert noise.shape == (2, sampler.schedule["noises"], L, 3) and noise.dtype == np.float32
    assert abs(noise.mean()) < 0.3 and 0.8 < noise.std() < 1.2
    x_0 = sampler(noise)
    assert x_0.shape == (2, L, 3) and np.abs(x_0[0] - x_0[1]).max() > 0
    changed = noise.copy()
    changed[:, -1] += 1  # the last z counts
    assert np.abs(sampler(changed) - x_0).max() > 1e-3


def test_the_default_dtype_does_not_matter(sampler):
    arrays = inputs_of(sampler, 1)
    before = sampler(*arrays)
    torch.set_default_dtype(torch.float64)
    try:
        assert np.array_equal(sampler(*arrays), before) and before.dtype == np.float32
    finally:
        torch.set_default_dtype(torch.float32)


def test_what_is_not_known_is_not_read(sampler):
    noise, known, mask = inputs_of(sampler, 1)
    strange = np.where(mask[..., None], known, np.nan)
    assert np.array_equal(sampler(noise, strange, mask), sampler(noise, known, mask))


K = SAMPLING["num_inference_steps"] + 1  # x_T and a z for each step, of curves in the last
X, KNOWN, MASK = np.zeros((1, K, L, 3)), np.zeros((1, L, 3)), np.ones((1, L), bool)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"noise": np.zeros((1, K, L + 1, 3))}, "noise must be"),
        ({"noise": np.zeros((1, K + 1, L, 3))}, "noise must be"),
        ({"noise": np.zeros((1, L, 3))}, r"noise must be \(1, K, 20, 3\), got \(1, 20, 3\)"),
        ({"noise": np.zeros((0, K, L, 3))}, "noise must be"),
        ({"noise": np.zeros((L, 3))}, "noise must be"),
        ({"noise": np.zeros(())}, "noise must be"),
        ({"noise": X.astype(complex)}, "noise must be float32, got complex128"),
        ({"noise": X.astype(str)}, "noise must be float32"),
        ({"noise": X > 0}, "noise must be float32, got bool"),
        ({"noise": None}, "noise must be float32, got object"),
        (
            {"noise": torch.zeros(1, K, L, 3, requires_grad=True)},
            "noise must be an array, got Tensor",
        ),
        ({"noise": torch.zeros(1, device="meta")}, "noise must be an array, got Tensor"),
        ({"noise": X + np.nan}, "noise must be finite"),
        ({"noise": X - np.inf}, "noise must be finite"),
        ({"noise": X + 1e300}, "noise must be finite"),
        ({"known": KNOWN}, "given together"),
        ({"known_mask": MASK}, "given together"),
        ({"known": KNOWN, "known_mask": np.zeros((1, L))}, "known_mask must be bool, got float64"),
        (
            {"known": KNOWN, "known_mask": MASK.astype(np.uint8)},
            "known_mask must be bool, got uint8",
        ),
        ({"known": KNOWN, "known_mask": MASK[0]}, "known_mask must be"),
        ({"known": KNOWN, "known_mask": np.repeat(MASK, 2, 0)}, "known_mask must be"),
        ({"known": np.zeros((L, 3)), "known_mask": MASK}, "known must be"),
        ({"known": KNOWN + np.nan, "known_mask": MASK}, "known must be finite where"),
    ],
)
def test_arrays_that_do_not_fit(sampler, arguments, words):
    given, noises = {"noise": X} | arguments, sampler.schedule["noises"]
    if (
        getattr(given["noise"], "ndim", 0) == 4
    ):  # the compiled one has no curves that take noise of their own
        given["noise"] = given["noise"][:, K - noises :]
    with pytest.raises(ValueError, match=words.replace("K", str(noises))):
        sampler(**given)


def test_a_sample_that_is_not_finite_is_a_fault(exported, monkeypatch):
    sampler = runtime.Sampler(exported[2], "torch")
    nothing = {runtime.BATCH: lambda noise, *_: noise[:, 0] + np.float32(np.nan)}
    monkeypatch.setattr(sampler, "programs", nothing)
    with pytest.raises(FloatingPointError, match="not finite"):
        sampler(X)


def test_engines_that_are_not_here(exported, tmp_path):
    with pytest.raises(ValueError, match=r"compiled: .*sampler\.pt2"):
        runtime.Sampler(exported[2], "compiled")
    with pytest.raises(ValueError, match="must be one of compiled, onnx, torch, got 'gpu'"):
        runtime.Sampler(exported[2], "gpu")
    with pytest.raises(ValueError, match="not an export"):
        runtime.Sampler(tmp_path)
    (tmp_path / "schedule.json").write_text("{}")
    for name in runtime.FILES.values():
        (tmp_path / name).write_bytes(b"half a file")
    with pytest.raises(ValueError, match=r"cannot be run here .*compiled: .*torch: "):
        runtime.Sampler(tmp_path)


def test_an_engine_that_is_broken_is_passed_over(exported, tmp_path):
    shutil.copytree(exported[2], tmp_path / "x")
    (tmp_path / "x" / runtime.FILES["compiled"]).write_bytes(b"of another processor")
    (tmp_path / "x" / runtime.FILES["onnx"]).write_bytes(b"of another version")
    assert runtime.Sampler(tmp_path / "x").engine == "torch"


def test_known_frames_are_refused_where_they_cannot_be_read(exported):
    schedule = json.loads((exported[2] / "schedule.json").read_text()) | {"known_frames": False}
    with pytest.raises(ValueError, match="takes no known frames"):
        runtime.plain_arrays(schedule, X, KNOWN, MASK)


def test_noise_of_the_start_alone_needs_no_axis_of_its_own(exported):
    schedule = json.loads((exported[2] / "schedule.json").read_text()) | {"noises": 1}
    for noise in (KNOWN, KNOWN[:, None]):
        assert runtime.plain_arrays(schedule, noise, None, None)[0].shape == (1, 1, L, 3)


def test_the_command(straight_run, tmp_path, capsys):
    flags = ["--checkpoint", str(straight_run), "--output_dir", str(tmp_path / "x")]
    assert main([*flags, "--no-compiled"]) == 0
    out = capsys.readouterr().out
    default = tdd.TrainConfig(**TINY)
    said = f"{default.num_inference_steps} steps of {default.sampler}, eta {default.eta:g}"
    assert f"one gesture, {said}, one thread" in out
    schedule = json.loads((tmp_path / "x" / "schedule.json").read_text())
    assert schedule["sampling"] == default.sampling
    assert re.search(r"torch +[\d.]+ ms, difference \d\.\de[+-]\d\d", out)
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


@pytest.mark.parametrize("difference", [0.1, math.nan])
def test_an_export_that_differs_is_a_fault(straight_run, tmp_path, capsys, monkeypatch, difference):
    monkeypatch.setattr(command, "write_denoiser", lambda *_: None)
    monkeypatch.setattr(command, "check_parity", lambda *_, **__: {"torch": difference})
    flags = ["--checkpoint", str(straight_run), "--output_dir", str(tmp_path / "x")]
    assert main([*flags, "--no-compiled"]) == 1
    assert "differs" in capsys.readouterr().err and not [*tmp_path.iterdir()]


@pytest.mark.parametrize("place", ["all", "one", "infinite", "buffer"])
def test_weights_that_diverged_are_not_exported(tmp_path, place):
    model, scheduler = tiny_model()
    weight = model.output_projection.weight
    weight.view(-1)[slice(None) if place == "all" else 0] = math.nan
    if place == "infinite":
        weight.view(-1)[0] = math.inf
    if place == "buffer":
        weight.view(-1)[0] = 0
        model.register_buffer("scale", torch.tensor(math.nan))
    with pytest.raises(FloatingPointError, match="not finite"):
        export(model, scheduler, tmp_path / "x", 3, compiled=False)
    assert not [*tmp_path.iterdir()]


def test_a_checkpoint_that_diverged_ends_with_one(tmp_path, capsys, straight_run):
    content = load_checkpoint(straight_run)
    for weight in content["ema_state_dict"].values():
        weight.mul_(math.nan)
    del content["path"]
    save_checkpoint(tmp_path / "bad.pth", content)
    flags = ["--checkpoint", str(tmp_path / "bad.pth"), "--output_dir", str(tmp_path / "x")]
    assert main([*flags, "--no-compiled"]) == 1
    err = capsys.readouterr().err
    assert "not finite" in err and err.count("\n") == 1 and not (tmp_path / "x").exists()


def test_a_model_as_training_has_it_is_exported(tmp_path):
    """In training mode, float64 and under float64 as the default: the same export."""
    model, scheduler = tiny_model()
    expected = copy.deepcopy(model)
    torch.set_default_dtype(torch.float64)
    try:
        export(model.train().double(), scheduler, str(tmp_path / "x"), np.int64(3), compiled=False)
    finally:
        torch.set_default_dtype(torch.float32)
    assert model.training and model.output_projection.weight.dtype == torch.float64
    found = check_parity(expected, scheduler, tmp_path / "x", num_inference_steps=3)
    assert found["torch"] < 1e-5


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"--checkpoint": "nowhere"}, "nowhere"),
        ({"--output_dir": "here"}, "choose another"),
        ({"--output_dir": "here/file/x"}, "choose another"),
        ({"--output_dir": "here/file"}, "choose another"),
        ({"--output_dir": "here/lost"}, "choose another"),
        ({"--num_inference_steps": "0"}, "num_inference_steps must be in"),
        ({"--num_inference_steps": "99"}, "num_inference_steps must be in"),
        ({"--num_inference_steps": "ten"}, "see --help"),
        ({"--steps": "3"}, "see --help"),
        ({"--eta": "1.5"}, "eta must be in"),
        ({"--sampler": "euler"}, "see --help"),
        ({"--batch_size": "0"}, "--batch_size must be in"),
    ],
)
def test_mistakes_are_one_line(tmp_path, capsys, monkeypatch, straight_run, flags, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "file").touch()
    (tmp_path / "here" / "lost").symlink_to("nowhere")
    given = {"--checkpoint": str(straight_run), "--output_dir": "exported"} | flags
    assert main([word for pair in given.items() for word in pair]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1 and words in err
    assert not (tmp_path / "exported").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"num_inference_steps": 3.0}, "--num_inference_steps must be an integer"),
        ({"num_inference_steps": "3"}, "--num_inference_steps must be an integer"),
        ({"num_inference_steps": True}, "--num_inference_steps must be an integer"),
        ({"num_inference_steps": 2**70}, "num_inference_steps must be in"),
        ({"eta": "much"}, "--eta must be a number"),
        ({"eta": math.nan}, "--eta must be in"),
        ({"sampler": "euler"}, "--sampler must be one of ddim, dpmpp, got 'euler'"),
        ({"batch_size": 1.5}, "--batch_size must be an integer"),
        ({"folder": None}, "--output_dir must be text"),
        ({"folder": "a\0b"}, "--output_dir must be text"),
    ],
)
def test_arguments_of_the_library_are_checked(tmp_path, arguments, words):
    with pytest.raises(UserError, match=words):
        export(*tiny_model(), **{"folder": tmp_path / "x", "num_inference_steps": 3} | arguments)
    assert not [*tmp_path.iterdir()]


def stop(*_, **__):
    raise KeyboardInterrupt


def fill(*_, **__):
    raise OSError(28, "No space left on device")


def of_all_kinds(*_, **__):
    raise RuntimeError("broken in any way")


@pytest.mark.parametrize(
    ("at", "end", "code"),
    [
        ("os.replace", stop, 130),
        ("torch.export.export", stop, 130),
        ("torch.export.save", fill, 1),
        ("export.runtime.Sampler.__call__", fill, 1),
    ],
)
def test_an_export_that_ends_early_leaves_nothing(
    tmp_path, monkeypatch, straight_run, at, end, code
):
    monkeypatch.setattr(at, end)
    flags = ["--checkpoint", str(straight_run), "--output_dir", str(tmp_path / "x")]
    assert main([*flags, "--no-compiled"]) == code
    assert not [*tmp_path.iterdir()]


def test_a_full_disk_is_named(tmp_path, monkeypatch, straight_run, capsys):
    monkeypatch.setattr("os.replace", fill)
    flags = ["--checkpoint", str(straight_run), "--output_dir", str(tmp_path / "x")]
    assert main([*flags, "--no-compiled"]) == 1
    err = capsys.readouterr().err
    assert f"cannot write {tmp_path}/x/" in err and "bytes needed" in err and err.count("\n") == 1


@pytest.mark.parametrize("scale", [1, 100, 1e5])
@pytest.mark.parametrize("dim", [0, 1])
def test_what_stands_for_torchs_operators_in_onnx_does_not_underflow(scale, dim):
    """log(cumsum(exp)), as the exporter would have it, is -inf here: of any trained network."""
    plain, aten = command.plain_operators(), torch.ops.aten
    x = scale * torch.randn(7, 50, generator=torch.Generator().manual_seed(3))
    ours = plain[aten.logcumsumexp.default](x, dim)
    torch.testing.assert_close(ours, torch.logcumsumexp(x, dim), rtol=1e-5, atol=1e-5)
    ours = plain[aten.logaddexp.default](x, 2 * x.flip(1))
    torch.testing.assert_close(ours, torch.logaddexp(x, 2 * x.flip(1)), rtol=1e-5, atol=1e-5)
    frames = torch.arange(350).view(7, 50).roll(3, 1)
    for torchs, name in ((torch.cummax, "cummax"), (torch.cummin, "cummin")):
        values, _ = plain[getattr(aten, name).default](frames, 1)
        assert torch.equal(values, torchs(frames, 1).values)


@pytest.mark.parametrize(
    "at", ["torch.onnx.export", "torch.export.ExportedProgram.run_decompositions"]
)
def test_onnx_that_is_broken_costs_its_file_alone(tmp_path, monkeypatch, capsys, at):
    monkeypatch.setattr(at, of_all_kinds)
    assert set(export(*tiny_model(), tmp_path / "x", 3, compiled=False)) == {"torch"}
    assert "note: no denoiser.onnx" in capsys.readouterr().out


def test_a_compiler_that_is_broken_costs_its_file_alone(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("torch._inductor.aoti_compile_and_package", of_all_kinds)
    assert "compiled" not in export(*tiny_model(), tmp_path / "x", 1)
    assert "note: no sampler.pt2; it needs a C++ compiler" in capsys.readouterr().out


def test_two_at_once_end_with_one_whole(tmp_path, monkeypatch):
    """The other one finished while this one wrote."""
    model, scheduler = tiny_model()
    write_denoiser = command.write_denoiser

    def meanwhile(*arguments):
        write_denoiser(*arguments)
        monkeypatch.setattr(command, "write_denoiser", write_denoiser)
        export(model, scheduler, tmp_path / "x", 2, compiled=False)

    monkeypatch.setattr(command, "write_denoiser", meanwhile)
    with pytest.raises(UserError, match="choose another"):
        export(model, scheduler, tmp_path / "x", 3, compiled=False)
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
    assert len(runtime.Sampler(tmp_path / "x", "torch").schedule["steps"]) == 2


def test_terminals_and_names_of_all_kinds(tmp_path, straight_run):
    """A closed pipe, an ASCII terminal and a name that is not UTF-8 cost no file."""
    folder = os.fsencode(tmp_path) + b"/\xff\xe9"
    command = [sys.executable, "-m", "export", "--checkpoint", str(straight_run)]
    command += ["--output_dir", os.fsdecode(folder), "--no-compiled"]
    reader, writer = os.pipe()
    os.close(reader)
    ascii = os.environ | {"PYTHONIOENCODING": "ascii"}
    with os.fdopen(writer, "wb") as closed:
        pipes = {"stdout": closed, "stderr": subprocess.PIPE, "text": True}
        done = subprocess.run(command, cwd=ROOT, env=ascii, **pipes)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    assert {b"denoiser.pt2", b"runtime.py", b"schedule.json"} <= {*os.listdir(folder)}
