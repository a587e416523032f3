"""Export a trained denoiser with its sampling, and check that nothing is lost on the way.

    python -m export --checkpoint runs/NAME --output_dir exported

The sampler, its steps and its eta are the run's own unless flags say otherwise; all noise is an
input. What is written: schedule.json, denoiser.pt2 (torch.export, any batch size), denoiser.onnx
where onnxscript is installed, where a C++ compiler is sampler.pt2 and sampler_batch.pt2 (all steps
as one compiled program, for one gesture and for --batch_size at a time), and runtime.py, which
samples from them without this project. A denoiser whose last step is its curves' alone is also
written as it is asked then, last_denoiser.*. Each is compared with `DDIMScheduler.sample` first;
the folder appears when all is written and agrees.
"""

import argparse
import copy
import io
import math
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import train_diffusion_ddim as tdd
from export import runtime
from trainlib.curves import CurveWalk
from trainlib.errors import OneLineParser, UserError, check_choice, first_line, run_program, say
from trainlib.files import make_folder, write_json, write_whole
from trainlib.gestures import ACTION_DIM, SEQ_LEN
from trainlib.knobs import as_type, checked
from trainlib.process import timer
from trainlib.tensors import draw_eps, is_finite

NAMES = ("known", "known_mask")
PARITY = 1e-4  # largest difference that is taken for rounding, data units
TYPICAL, RARE = 0.9, 10  # of gestures; others hang on last digits, and may differ by so much more


class WholeSampler(nn.Module):
    """All steps of a schedule as one module, so that what depends on t alone becomes a constant."""

    def __init__(self, model: nn.Module, scheduler: tdd.DDIMScheduler, **sampling: Any) -> None:
        super().__init__()
        self.model, self.scheduler = model, scheduler
        self.steps, self.eta = describe_steps(scheduler, **sampling), sampling["eta"]

    def forward(self, noise: Tensor, *given: Tensor) -> Tensor:
        """Map noise (B, K, L, C) to x_0 (B, L, C), data units.

        Given are, if the denoiser takes them, known frames in model units and their mask.
        """

        def predict(x_t: Tensor, step: dict[str, Any], z: Tensor | None) -> Tensor:
            t = torch.full((x_t.shape[0],), step["t"], device=x_t.device)
            walk = CurveWalk(step["curve_steps"], self.eta, z)
            last = {"walk": walk} if step["curve_steps"] else {}
            output = self.model(x_t, t, *given, **last)
            x_0_pred = self.scheduler.predict_x_0(output, x_t, step["t"])
            return torch.where(given[1][..., None], given[0], x_0_pred) if given else x_0_pred

        return tdd.to_data_units(runtime.walk(predict, self.steps, noise))


def describe_steps(
    scheduler: tdd.DDIMScheduler, num_inference_steps: int, eta: float = 0.0, sampler: str = "ddim"
) -> list[dict[str, Any]]:
    """Return the steps of `DDIMScheduler.sample` as the coefficients that `runtime.walk` goes by.

    σ² = eta²·(1 - ᾱ_prev)/(1 - ᾱ_t)·(1 - ᾱ_t/ᾱ_prev)                 of_noise = σ
    x_prev = sqrt(ᾱ_prev)·D + sqrt(1 - ᾱ_prev - σ²)·eps_pred + σ·z     (DDIM eq. 12, 16)
    eps_pred = (x_t - sqrt(ᾱ_t)·D)/sqrt(1 - ᾱ_t)
    D = x_0_pred + extrapolate·(x_0_pred - x_0_last)                   (DPM-Solver++(2M))
    """
    alpha_bar, steps, t_last = scheduler.alpha_bar, [], None
    for t, t_prev in scheduler.timestep_pairs(num_inference_steps):
        now, then = alpha_bar(t), alpha_bar(t_prev)
        variance = eta**2 * (1 - then) / (1 - now) * (1 - now / then)
        extrapolate = scheduler.extrapolation(t, t_prev, t_last) if sampler == "dpmpp" else 0.0
        step = {"t": t, "alpha_bar_t": now, "extrapolate": extrapolate, "of_aim": then**0.5}
        step |= {"of_eps": abs(1 - then - variance) ** 0.5, "of_noise": variance**0.5}
        step["curve_steps"] = scheduler.curve_steps if t_prev < 0 else 0
        step["takes_z"] = eta > 0 and (t_prev >= 0 or step["curve_steps"] > 0)
        steps.append(step)
        t_last = t
    return steps


def num_noises(steps: list[dict[str, Any]]) -> int:
    """Return K, the arrays of noise that a gesture takes: x_T and the z of steps that take one."""
    return 1 + sum(step["takes_z"] for step in steps)


def describe_schedule(
    model: nn.Module, scheduler: tdd.DDIMScheduler, **sampling: Any
) -> dict[str, Any]:
    """Return the content of schedule.json: what runtime.py needs besides the denoiser."""
    steps = describe_steps(scheduler, **sampling)
    return {
        "known_frames": tdd.takes_known_frames(model),
        "clip_sample": scheduler.clip_sample,
        "prediction_type": scheduler.prediction_type,
        "shape": ["B", model_length(model), ACTION_DIM],
        "noises": num_noises(steps),
        "sampling": sampling,
        "steps": steps,
    }


def example_inputs(
    model: nn.Module, batch: int, noises: int = 1, seed: int = 0
) -> tuple[Tensor, ...]:
    """Return noise (B, K, L, C) and, if the model takes them, known frames and a mask, data units.

    The noise is what `sample` draws from a generator of this seed. Known are the press edges of
    random clicks: given what no gesture can contain, a trained denoiser makes much of rounding.
    """
    generator, L, C = torch.Generator().manual_seed(seed), model_length(model), ACTION_DIM
    noise = [draw_eps((batch, L, C), "cpu", generator) for _ in range(noises)]
    if not tdd.takes_known_frames(model):
        return (torch.stack(noise, dim=1),)
    generator = generator.manual_seed(seed + 1)
    known = torch.zeros_like(noise[0])
    known[:, L // 4 : L // 2] = torch.rand((batch, 1, C), generator=generator, dtype=known.dtype)
    known[:, L // 4 : L // 2, -1] = 1
    return torch.stack(noise, dim=1), known, tdd.press_edges(known)


def model_length(model: nn.Module) -> int:
    """Return L, the frames of a gesture."""
    return getattr(model, "seq_len", SEQ_LEN)


def plain_operators() -> dict[Any, Callable[..., Any]]:
    """Return what the ONNX exporter lacks, written in operators that it has."""
    aten = torch.ops.aten

    def median(x: Tensor, dim: int, keepdim: bool = False) -> tuple[Tensor, Tensor]:
        values, indices = torch.sort(x, dim=dim)
        middle = (x.shape[dim] - 1) // 2
        return values.select(dim, middle), indices.select(dim, middle)

    def running(reduce: Callable[..., Tensor], worst: int) -> Callable[..., Any]:
        def scan(x: Tensor, dim: int) -> tuple[Tensor, Tensor]:
            later = torch.ones(x.shape[dim], x.shape[dim], dtype=torch.bool).triu(1)
            return reduce(torch.where(later, worst, x[:, None, :]), dim=-1), torch.zeros_like(x)

        return scan

    def log_add_exp(x: Tensor, y: Tensor) -> Tensor:  # log(exp + exp) would underflow
        return torch.maximum(x, y) + torch.log1p(torch.exp(-abs(x - y)))

    def log_cumsum_exp(x: Tensor, dim: int) -> Tensor:
        x, shift = x.movedim(dim, -1), 1
        while shift < x.shape[-1]:  # each is then the sum of 2 * shift before and at it
            earlier = F.pad(x[..., :-shift], (shift, 0), value=-math.inf)
            x = log_add_exp(x, earlier)
            shift *= 2
        return x.movedim(-1, dim)

    def stack(tensors: list[Tensor], dim: int = 0) -> Tensor:
        return torch.cat([t.to(torch.float32).unsqueeze(dim) for t in tensors], dim=dim)

    def sigmoid(x: Tensor) -> Tensor:  # onnxruntime's is right to 1e-7, not to a share of that
        return 1 / (1 + torch.exp(-x))

    far = 10**6  # beyond any frame
    return {
        aten.median.dim: median,
        aten.cummax.default: running(torch.amax, -far),
        aten.cummin.default: running(torch.amin, far),
        aten.logaddexp.default: log_add_exp,
        aten.logcumsumexp.default: log_cumsum_exp,
        aten.stack.default: stack,
        aten.sigmoid.default: sigmoid,
    }


def write(save: Callable[[io.BytesIO], Any], path: Path) -> None:
    """Write what `save` does: torch's own writer ends the process when the disk is full."""
    buffer = io.BytesIO()
    save(buffer)
    write_whole(path, buffer.getvalue())


@contextmanager
def optional(file: str, cure: str) -> Iterator[None]:
    """Do without a file that cannot be made here, aloud; a full disk is a fault all the same."""
    try:
        yield
    except (OSError, MemoryError):
        raise
    except Exception as e:  # a package or a compiler that is missing, or broken in any way
        say(f"note: no {file}; {cure} ({type(e).__name__}: {first_line(e)})")


class LastStep(nn.Module):
    """A denoiser as the last step of a sample asks it, where its curves take steps alone."""

    def __init__(self, model: nn.Module, curve_steps: int, eta: float) -> None:
        super().__init__()
        self.model, self.curve_steps, self.eta = model, curve_steps, eta

    def forward(self, *arguments: Tensor) -> Tensor:
        """Map z, N(0, 1), if eta is not 0, and the denoiser's arguments to its output."""
        z, rest = (arguments[0], arguments[1:]) if self.eta else (None, arguments)
        return self.model(*rest, walk=CurveWalk(self.curve_steps, self.eta, z))


def write_denoiser(model: nn.Module, folder: Path, prefix: str = "") -> None:
    """Write denoiser.pt2 and, where it can be, denoiser.onnx; names begin with the prefix."""
    noise, *given = example_inputs(getattr(model, "model", model), 2)
    takes_z = isinstance(model, LastStep) and model.eta > 0
    inputs = (*[noise[:, 0].clone()] * takes_z, noise[:, 0], torch.tensor([1, 0]), *given)
    batch = torch.export.Dim("batch", min=1, max=4096)
    sizes: Any = ({0: batch},) * len(inputs)
    sizes = (sizes,) if isinstance(model, LastStep) else sizes
    program = torch.export.export(model, inputs, dynamic_shapes=sizes)
    write(partial(torch.export.save, program), folder / (prefix + runtime.FILES["torch"]))
    onnx_file = prefix + runtime.FILES["onnx"]
    with optional(onnx_file, "it needs onnx and onnxscript"):
        plain = program.run_decompositions(plain_operators())
        names = (*["z"] * takes_z, "x_t", "t", "known", "known_mask")[: len(inputs)]
        onnx: Any = torch.onnx.export(
            plain, input_names=names, output_names=["output"], dynamo=True, verbose=False
        )
        write(onnx.save, folder / onnx_file)


def write_sampler(whole: WholeSampler, folder: Path, batch_size: int) -> None:
    """Write sampler.pt2 and sampler_batch.pt2 where it can be; each takes a minute.

    Programs for one number of gestures each, whatever the denoiser does with their number.
    """
    with optional(runtime.FILES["compiled"], "it needs a C++ compiler"):
        for batch in {1, batch_size}:
            inputs = example_inputs(whole.model, batch, num_noises(whole.steps))
            program, buffer = torch.export.export(whole, inputs), io.BytesIO()
            options: Any = {"inductor_configs": {"freezing": True}}
            torch._inductor.aoti_compile_and_package(program, package_path=buffer, **options)
            name = runtime.FILES["compiled"] if batch == 1 else runtime.BATCHED
            write_whole(folder / name, buffer.getvalue())


def plain_copy(model: nn.Module) -> nn.Module:
    """Return a denoiser as it is exported: on the CPU, float32, in eval mode, not compiled.

    Raises:
        FloatingPointError: a weight is not finite.
    """
    model = copy.deepcopy(getattr(model, "_orig_mod", model)).cpu().float().eval()
    if not all(is_finite(weight) for weight in model.state_dict().values()):
        raise FloatingPointError("the weights are not finite: did the training diverge?")
    return model.requires_grad_(False)


def export(
    model: nn.Module,
    scheduler: tdd.DDIMScheduler,
    folder: str | Path,
    num_inference_steps: int,
    eta: float = 0.0,
    sampler: str = "ddim",
    *,
    compiled: bool = True,
    batch_size: int = 64,
) -> dict[str, float]:
    """Write all files of a denoiser into a new folder, which appears whole or not at all.

    The sampling is that of `DDIMScheduler.sample`; `batch_size` the gestures of the larger of the
    two compiled programs, 1 for the smaller one alone.

    Returns: each engine's difference to `sample`, see `check_parity`.

    Raises:
        UserError: the folder cannot be made, or so many steps cannot be.
        FloatingPointError: weights or samples are not finite, or an engine differs.
    """
    folder = Path(as_type("--output_dir", folder, str))
    batch_size = checked("--batch_size", batch_size, int, low=1, high=4096)
    check_choice("--sampler", sampler, tdd.SAMPLERS)
    steps = as_type("--num_inference_steps", num_inference_steps, int)
    sampling: dict[str, Any] = {"num_inference_steps": steps, "sampler": sampler}
    sampling["eta"] = checked("--eta", eta, float, low=0, high=1)
    model = plain_copy(model)
    schedule = describe_schedule(model, scheduler, **sampling) | {"batch_size": batch_size}
    if folder.exists() or folder.is_symlink():
        raise UserError(f"--output_dir {folder} exists; choose another")
    with tempfile.TemporaryDirectory(
        prefix=f".{folder.name}.", dir=make_folder(folder.parent)
    ) as hidden:
        made = Path(hidden) / "made"
        try:
            made.mkdir()
            write_json(made / "schedule.json", schedule)
            write_whole(made / "runtime.py", Path(runtime.__file__).read_bytes())
            write_denoiser(model, made)
            if last := schedule["steps"][-1]["curve_steps"]:
                write_denoiser(LastStep(model, last, sampling["eta"]), made, runtime.LAST)
            if compiled:
                write_sampler(WholeSampler(model, scheduler, **sampling).eval(), made, batch_size)
        except OSError as e:
            raise OSError(str(e).replace(str(made), str(folder))) from None
        differences = check_parity(model, scheduler, made, **sampling)
        if not all(difference <= PARITY for difference in differences.values()):
            raise FloatingPointError(f"an engine differs by more than {PARITY}: {differences}")
        try:
            made.rename(folder)
        except OSError as e:
            raise UserError(f"cannot make --output_dir {folder} ({e}); choose another") from None
    return differences


def sample_like(
    model: nn.Module, scheduler: tdd.DDIMScheduler, batch: int, seed: int, **options: Any
) -> Tensor:
    """Return what `sample` makes of the noise of `example_inputs`, (B, L, C), data units."""
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, model_length(model), ACTION_DIM)
    return scheduler.sample(model, shape, "cpu", generator=generator, **options)


def check_parity(
    model: nn.Module, scheduler: tdd.DDIMScheduler, folder: Path, **sampling: Any
) -> dict[str, float]:
    """Return each engine's difference to `sample`: TYPICAL gestures do not exceed it, none by RARE.

    With and without known frames. Which frames are pressed is decided, so rounding may tell.
    """
    noises, found = num_noises(describe_steps(scheduler, **sampling)), {}
    for engine, name in runtime.FILES.items():
        if not (folder / name).exists():
            continue
        try:
            sampler = runtime.Sampler(folder, engine)
        except ValueError as e:
            say(f"note: {name} is not checked, since it does not run here ({first_line(e)})")
            continue
        differences: list[float] = []
        batches = sampler.programs if engine == "compiled" else (1, 3)
        for seed, batch in enumerate([*batches] * 2):
            noise, *given = example_inputs(model, batch, noises, seed)
            for known in [{}, dict(zip(("known", "known_mask"), given, strict=True))][
                : 1 + len(given)
            ]:
                ours = sample_like(model, scheduler, batch, seed, **sampling, **known)
                apart = np.abs(sampler(noise, **known) - ours.numpy())
                differences.extend(apart.max(axis=(1, 2)))
        typical = np.quantile(differences, TYPICAL, method="lower")
        found[engine] = float(np.maximum(typical, np.max(differences) / RARE))
    return found


def milliseconds(function: Callable[[], Any], calls: int = 30) -> float:
    """Return the median time of a call."""
    seconds = []
    for _ in range(calls + 3):
        taken = timer()
        function()
        seconds.append(taken())
    return 1000 * statistics.median(seconds[3:])


def report(
    model: nn.Module,
    scheduler: tdd.DDIMScheduler,
    folder: Path,
    differences: dict[str, float],
    sampling: dict[str, Any],
) -> None:
    """Print the time of one gesture by every engine, and how far it is from `sample`."""
    torch.set_num_threads(1)
    noise, *given = example_inputs(model, 1, num_noises(describe_steps(scheduler, **sampling)))
    known = dict(zip(NAMES, given, strict=False))
    say(f"one gesture, {describe_sampling(sampling)}, one thread:")
    ours = partial(sample_like, model, scheduler, 1, 0, **sampling, **known)
    say(f"  {'sample()':10} {milliseconds(ours):7.2f} ms")
    arrays = [a.numpy() for a in (noise, *given)]
    for engine, difference in differences.items():
        ms = milliseconds(partial(runtime.Sampler(folder, engine), *arrays))
        say(f"  {engine:10} {ms:7.2f} ms, difference {difference:.1e}")


def describe_sampling(sampling: dict[str, Any]) -> str:
    """Name a sampling in words."""
    N, eta = sampling["num_inference_steps"], sampling["eta"]
    return f"{N} step{'s' * (N != 1)} of {sampling['sampler']}, eta {eta:g}"


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = OneLineParser(prog="python -m export", description=__doc__)
    add = parser.add_argument
    add("--checkpoint", required=True, metavar="PATH", help="checkpoint or run folder")
    add("--output_dir", required=True, metavar="DIR", help="a new folder")
    add("--num_inference_steps", type=int, metavar="N", help="default: those of the run")
    add("--sampler", choices=tdd.SAMPLERS, help="default: that of the run")
    add("--eta", type=float, help="fresh noise in [0, 1]; default: that of the run")
    add("--batch_size", type=int, default=64, help="of sampler_batch.pt2; 1 = none; default: 64")
    add("--compiled", action=argparse.BooleanOptionalAction, default=True, help="write sampler.pt2")
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> None:
    """Export, compare, report."""
    model, scheduler, config = tdd.load_model(args.checkpoint)
    given = {name: getattr(args, name) for name in config.sampling}
    sampling = config.sampling | {name: v for name, v in given.items() if v is not None}
    if config.context_dim:
        say("note: the export takes no goal")
    folder = Path(args.output_dir)
    options: dict[str, Any] = {"compiled": args.compiled, "batch_size": args.batch_size}
    differences = export(model, scheduler, folder, **sampling, **options)
    report(model, scheduler, folder, differences, sampling)
    say(f"files in {folder}")


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return 0 done, 2 the user's mistake, 1 a fault, 130 interrupted."""
    return run_program(lambda: run(parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
