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
from export.__main__ import check_parity, describe_schedule, example_inputs, export, main
from trainlib.checkpoint import load_checkpoint, save_checkpoint
from trainlib.errors import UserError


def tiny_model(**options):
    torch.manual_seed(0)
    config = tdd.TrainConfig(**(TINY | options))
    model = tdd.build_model(config).eval().requires_grad_(False)
    for p in model.parameters():
        p += 0.1 * torch.randn_like(p)
    return model, tdd.build_scheduler(config)


@pytest.mark.parametrize("prediction_type", tdd.PREDICTION_TYPES)
@pytest.mark.parametrize("known_frames", [True, False])
def test_the_numpy_loop_agrees_with_the_scheduler(prediction_type, known_frames):
    model, scheduler = tiny_model(prediction_type=prediction_type, known_frames=known_frames)
    schedule = json.loads(json.dumps(describe_schedule(model, scheduler, 5)))
    x_T, *given = example_inputs(model, 3)

    def denoise(*arrays):
        return model(*map(torch.from_numpy, arrays)).numpy()

    theirs = runtime.ddim(denoise, schedule, x_T.numpy(), *(a.numpy() for a in given))
    known = dict(zip(("known", "known_mask"), given, strict=False))
    ours = scheduler.sample(model, (3, L, 3), "cpu", 5, x_T=x_T, **known)
    assert np.abs(theirs - ours.numpy()).max() < 1e-5


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A tiny model, its scheduler, and the folder with both denoisers but no compiled sampler."""
    model, scheduler = tiny_model(contacts=True, prediction_type="x0")
    folder = tmp_path_factory.mktemp("export") / "exported"
    export(model, scheduler, folder, 3, compiled=False)
    return model, scheduler, folder


def test_exported_files_agree(exported):
    differences = check_parity(*exported, 3)
    assert "torch" in differences and max(differences.values()) < 1e-5


def test_parity_sees_a_wrong_schedule(exported, tmp_path):
    model, scheduler, folder = exported
    shutil.copytree(folder, tmp_path / "wrong")
    path = tmp_path / "wrong" / "schedule.json"
    schedule = json.loads(path.read_text())
    schedule["steps"][0]["alpha_bar_prev"] *= 0.9
    path.write_text(json.dumps(schedule))
    assert min(check_parity(model, scheduler, path.parent, 3).values()) > 1e-4


def test_parity_sees_lost_known_frames(exported, monkeypatch):
    """The largest difference counts, and only the inputs with known frames have one."""
    kept = runtime.plain_arrays

    def lost(*arguments):
        x_T, known, mask = kept(*arguments)
        return x_T, 0 * known, mask

    monkeypatch.setattr(runtime, "plain_arrays", lost)
    assert min(check_parity(*exported, 3).values()) > 1e-2


def test_the_folder_needs_nothing_of_ours(exported):
    code = (
        "import sys, numpy as np; from runtime import Sampler;"
        f"x = Sampler('.', 'torch')(np.zeros((2, {L}, 3)));"
        "print(x.shape, 'train_diffusion_ddim' in sys.modules)"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=exported[2], capture_output=True, text=True)
    assert done.stdout == f"(2, {L}, 3) False\n", done.stderr


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """The folder of a tiny model whose one step is compiled."""
    if not shutil.which("g++"):
        pytest.skip("no g++")
    folder = tmp_path_factory.mktemp("compiled") / "exported"
    differences = export(*tiny_model(contacts=True, prediction_type="x0"), folder, 1)
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
    arrays = [x.numpy() for x in example_inputs(tiny_model()[0], 1)]
    before = sampler(*arrays)
    for i in range(3):
        given = [VIEWS[view](x) if i == j else x for j, x in enumerate(arrays)]
        assert np.array_equal(sampler(*given), before), ("x_T", "known", "known_mask")[i]


def test_any_number_of_gestures(sampler, monkeypatch):
    """Those above what is run at once are run after it, by the program of one gesture, too."""
    arrays = [x.numpy() for x in example_inputs(tiny_model()[0], 5)]
    one_by_one = [sampler(*(x[i : i + 1] for x in arrays)) for i in range(5)]
    monkeypatch.setitem(runtime.BATCH, sampler.engine, min(2, runtime.BATCH[sampler.engine]))
    assert np.abs(sampler(*arrays) - np.concatenate(one_by_one)).max() < 1e-5


def test_the_default_dtype_does_not_matter(sampler):
    arrays = [x.numpy() for x in example_inputs(tiny_model()[0], 1)]
    before = sampler(*arrays)
    torch.set_default_dtype(torch.float64)
    try:
        assert np.array_equal(sampler(*arrays), before) and before.dtype == np.float32
    finally:
        torch.set_default_dtype(torch.float32)


def test_what_is_not_known_is_not_read(sampler):
    x_T, known, mask = (x.numpy() for x in example_inputs(tiny_model()[0], 1))
    strange = np.where(mask[..., None], known, np.nan)
    assert np.array_equal(sampler(x_T, strange, mask), sampler(x_T, known, mask))


X, MASK = np.zeros((1, L, 3)), np.ones((1, L), bool)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"x_T": np.zeros((1, L + 1, 3))}, "x_T must be"),
        ({"x_T": np.zeros((0, L, 3))}, "x_T must be"),
        ({"x_T": np.zeros((L, 3))}, "x_T must be"),
        ({"x_T": np.zeros(())}, "x_T must be"),
        ({"x_T": X.astype(complex)}, "x_T must be float32, got complex128"),
        ({"x_T": X.astype(str)}, "x_T must be float32"),
        ({"x_T": X > 0}, "x_T must be float32, got bool"),
        ({"x_T": None}, "x_T must be float32, got object"),
        ({"x_T": torch.zeros(1, L, 3, requires_grad=True)}, "x_T must be an array, got Tensor"),
        ({"x_T": torch.zeros(1, L, 3, device="meta")}, "x_T must be an array, got Tensor"),
        ({"x_T": X + np.nan}, "x_T must be finite"),
        ({"x_T": X - np.inf}, "x_T must be finite"),
        ({"x_T": X + 1e300}, "x_T must be finite"),
        ({"known": X}, "given together"),
        ({"known_mask": MASK}, "given together"),
        ({"known": X, "known_mask": np.zeros((1, L))}, "known_mask must be bool, got float64"),
        ({"known": X, "known_mask": MASK.astype(np.uint8)}, "known_mask must be bool, got uint8"),
        ({"known": X, "known_mask": MASK[0]}, "known_mask must be"),
        ({"known": X, "known_mask": np.repeat(MASK, 2, 0)}, "known_mask must be"),
        ({"known": np.zeros((L, 3)), "known_mask": MASK}, "known must be"),
        ({"known": X + np.nan, "known_mask": MASK}, "known must be finite where"),
    ],
)
def test_arrays_that_do_not_fit(sampler, arguments, words):
    with pytest.raises(ValueError, match=words):
        sampler(**{"x_T": X} | arguments)


def test_a_sample_that_is_not_finite_is_a_fault(exported, monkeypatch):
    sampler = runtime.Sampler(exported[2], "torch")
    monkeypatch.setattr(sampler, "run", lambda x_t, *_: x_t + np.float32(np.nan))
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
    x, mask = np.zeros((1, L, 3), np.float32), np.ones((1, L), bool)
    with pytest.raises(ValueError, match="takes no known frames"):
        runtime.ddim(lambda x_t, t: x_t, schedule, x, x, mask)


def test_the_command(straight_run, tmp_path, capsys):
    flags = ["--checkpoint", str(straight_run), "--output_dir", str(tmp_path / "x")]
    assert main([*flags, "--no-compiled"]) == 0
    out = capsys.readouterr().out
    assert f"one gesture, {TINY['num_inference_steps']} steps" in out
    assert re.search(r"torch +[\d.]+ ms, largest difference \d\.\de[+-]\d\d", out)
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


@pytest.mark.parametrize("difference", [0.1, math.nan])
def test_an_export_that_differs_is_a_fault(straight_run, tmp_path, capsys, monkeypatch, difference):
    monkeypatch.setattr(command, "write_denoiser", lambda *_: None)
    monkeypatch.setattr(command, "check_parity", lambda *_: {"torch": difference})
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
    assert check_parity(expected, scheduler, tmp_path / "x", 3)["torch"] < 1e-5


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
        ({"steps": 3.0}, "--num_inference_steps must be an integer"),
        ({"steps": "3"}, "--num_inference_steps must be an integer"),
        ({"steps": True}, "--num_inference_steps must be an integer"),
        ({"steps": 2**70}, "num_inference_steps must be in"),
        ({"folder": None}, "--output_dir must be text"),
        ({"folder": "a\0b"}, "--output_dir must be text"),
    ],
)
def test_arguments_of_the_library_are_checked(tmp_path, arguments, words):
    with pytest.raises(UserError, match=words):
        export(*tiny_model(), **{"folder": tmp_path / "x", "steps": 3} | arguments)
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
