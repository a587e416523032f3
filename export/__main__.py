"""Export a trained denoiser with its schedule, and check that nothing is lost on the way.

    python -m export --checkpoint runs/NAME --output_dir exported

writes schedule.json, denoiser.pt2 (torch.export, any batch size), denoiser.onnx where onnxscript
is installed, sampler.pt2 (all steps at batch 1 as one compiled program) where a C++ compiler is,
and runtime.py, which samples from them without this project. Then it prints, for each, the
largest difference to `DDIMScheduler.sample` and the time of one gesture on one thread.
"""

import argparse
import io
import json
import shutil
import sys
import time
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import train_diffusion_ddim as tdd
from export import runtime
from trainlib.errors import OneLineParser, UserError, say
from trainlib.gestures import ACTION_DIM, SEQ_LEN

PARITY = 1e-4  # largest difference that is taken for rounding, data units


class WholeSampler(nn.Module):
    """All DDIM steps as one module, so that what depends on t alone becomes a constant."""

    def __init__(self, model: nn.Module, scheduler: tdd.DDIMScheduler, steps: int) -> None:
        super().__init__()
        self.model, self.scheduler, self.steps = model, scheduler, steps

    def forward(self, x_T: Tensor, *given: Tensor) -> Tensor:
        """Map x_T (B, L, C), and known frames and mask if there are, to x_0, data units."""
        known: dict[str, Any] = dict(zip(("known", "known_mask"), given, strict=False))
        shape = tuple(x_T.shape)
        return self.scheduler.sample(self.model, shape, "cpu", self.steps, x_T=x_T, **known)


def describe_schedule(model: nn.Module, scheduler: tdd.DDIMScheduler, steps: int) -> dict[str, Any]:
    """Return the content of schedule.json; its coefficients are read off the scheduler itself.

    Both maps are linear before clipping, so their values at 1 and 0 are their coefficients.
    """
    one, zero = torch.ones(1, 1, 1, dtype=torch.float64), torch.zeros(1, 1, 1, dtype=torch.float64)
    rows = []
    for t, t_prev in scheduler.timestep_pairs(steps):
        values = {
            "a": scheduler.predict_x_0(one, zero, t, clip=False),
            "b": scheduler.predict_x_0(zero, one, t, clip=False),
            "c": scheduler.step(one, zero, t, t_prev),
            "d": scheduler.step(zero, one, t, t_prev),
        }
        rows.append({"t": t, **{name: value.item() for name, value in values.items()}})
    return {
        "known_frames": tdd.takes_known_frames(model),
        "clip_sample": scheduler.clip_sample,
        "shape": ["B", getattr(model, "seq_len", SEQ_LEN), ACTION_DIM],
        "steps": rows,
    }


def example_inputs(model: nn.Module, batch: int, seed: int = 0) -> tuple[Tensor, ...]:
    """Return x_T and, if the model takes them, known frames (B, L, C) and a mask (B, L).

    Known are the press edges of random clicks: given what no gesture can contain, a trained
    denoiser makes much of rounding.
    """
    generator = torch.Generator().manual_seed(seed)
    L, C = getattr(model, "seq_len", SEQ_LEN), ACTION_DIM
    x_T = torch.randn((batch, L, C), generator=generator)
    if not tdd.takes_known_frames(model):
        return (x_T,)
    known = torch.zeros(batch, L, C)
    known[:, L // 4 : L // 2] = torch.rand((batch, 1, C), generator=generator)
    known[:, L // 4 : L // 2, -1] = 1
    return x_T, known, tdd.press_edges(known)


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

    def stack(tensors: list[Tensor], dim: int = 0) -> Tensor:
        return torch.cat([t.to(torch.float32).unsqueeze(dim) for t in tensors], dim=dim)

    far = 10**6  # beyond any frame
    return {
        aten.median.dim: median,
        aten.cummax.default: running(torch.amax, -far),
        aten.cummin.default: running(torch.amin, far),
        aten.stack.default: stack,
    }


def write(save: Callable[[io.BytesIO], Any], path: Path) -> None:
    """Write what `save` does: torch's own writer ends the process when the disk is full."""
    buffer = io.BytesIO()
    save(buffer)
    path.write_bytes(buffer.getvalue())


def write_denoiser(model: nn.Module, folder: Path) -> None:
    """Write denoiser.pt2 and, where onnxscript is installed, denoiser.onnx."""
    x_t, *given = example_inputs(model, 2)
    inputs = (x_t, torch.tensor([1, 0]), *given)
    batch = torch.export.Dim("batch", min=1, max=4096)
    program = torch.export.export(model, inputs, dynamic_shapes=({0: batch},) * len(inputs))
    write(partial(torch.export.save, program), folder / runtime.FILES["torch"])
    try:
        import onnxscript  # noqa: F401
    except ImportError:
        say("note: no denoiser.onnx; pip install onnx onnxscript brings it")
        return
    names = ("x_t", "t", "known", "known_mask")[: len(inputs)]
    plain = program.run_decompositions(plain_operators())
    try:
        onnx: Any = torch.onnx.export(
            plain, input_names=names, output_names=["output"], dynamo=True, verbose=False
        )
        onnx.save(folder / runtime.FILES["onnx"])
    except torch.onnx.OnnxExporterError as e:
        say(f"note: no denoiser.onnx; torch cannot translate it ({str(e).splitlines()[0]})")


def write_sampler(model: nn.Module, scheduler: tdd.DDIMScheduler, folder: Path, steps: int) -> None:
    """Write sampler.pt2 where a C++ compiler is; takes a minute."""
    if not any(map(shutil.which, ("g++", "clang++", "c++"))):
        say("note: no sampler.pt2; it needs a C++ compiler")
        return
    whole = WholeSampler(model, scheduler, steps).eval()
    program = torch.export.export(whole, example_inputs(model, 1))
    package = partial(
        torch._inductor.aoti_compile_and_package, program, inductor_configs={"freezing": True}
    )
    write(lambda buffer: package(package_path=buffer), folder / runtime.FILES["compiled"])


def export(
    model: nn.Module,
    scheduler: tdd.DDIMScheduler,
    folder: Path,
    steps: int,
    *,
    compiled: bool = True,
) -> None:
    """Write all files of a denoiser, on the CPU and in eval mode, into a new folder.

    Raises:
        UserError: the folder cannot be made, or so many steps cannot be.
    """
    text = json.dumps(describe_schedule(model, scheduler, steps), indent=1)
    try:
        folder.mkdir(parents=True)
    except OSError as e:
        raise UserError(f"cannot make --output_dir {folder} ({e}); choose another") from None
    try:
        (folder / "schedule.json").write_text(text + "\n", "utf-8")
        shutil.copy(runtime.__file__, folder / "runtime.py")
        write_denoiser(model, folder)
        if compiled:
            write_sampler(model, scheduler, folder, steps)
    except BaseException as e:
        shutil.rmtree(folder)  # made above: half an export is none
        if isinstance(e, OSError):
            raise OSError(f"cannot write into {folder}: {e}") from None
        raise


def check_parity(
    model: nn.Module, scheduler: tdd.DDIMScheduler, folder: Path, steps: int
) -> dict[str, float]:
    """Return each engine's largest difference to `sample`, with and without known frames."""
    whole, found = WholeSampler(model, scheduler, steps).eval(), {}
    for engine, name in runtime.FILES.items():
        if not ((folder / name).exists() and find_spec(runtime.PACKAGES[engine])):
            continue
        sampler, differences = runtime.Sampler(folder, engine), []
        for seed in range(4):
            inputs = example_inputs(model, 1 if engine == "compiled" else 3, seed)
            for arguments in (inputs, inputs[:1]):
                theirs = sampler(*(a.numpy() for a in arguments))
                differences.append(np.abs(theirs - whole(*arguments).numpy()).max())
        found[engine] = float(np.max(differences))  # NaN if any is
    return found


def milliseconds(function: Callable[[], Any], calls: int = 30) -> float:
    """Return the median time of a call."""
    seconds = []
    for _ in range(calls + 3):
        start = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - start)
    return 1000 * sorted(seconds[3:])[calls // 2]


def report(
    model: nn.Module, scheduler: tdd.DDIMScheduler, folder: Path, steps: int
) -> dict[str, float]:
    """Print parity and time of every engine; return the differences."""
    torch.set_num_threads(1)
    inputs = example_inputs(model, 1)
    whole = WholeSampler(model, scheduler, steps).eval()
    say(f"one gesture, {steps} steps, one thread:")
    say(f"  {'sample()':10} {milliseconds(lambda: whole(*inputs)):7.2f} ms")
    differences = check_parity(model, scheduler, folder, steps)
    for engine, difference in differences.items():
        sampler, arrays = runtime.Sampler(folder, engine), [a.numpy() for a in inputs]
        ms = milliseconds(lambda s=sampler, a=arrays: s(*a))  # type: ignore[misc]
        say(f"  {engine:10} {ms:7.2f} ms, largest difference {difference:.1e}")
    return differences


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = OneLineParser(
        prog="python -m export",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--checkpoint", required=True, metavar="PATH", help="checkpoint or run folder")
    add("--output_dir", required=True, metavar="DIR", help="a new folder")
    add("--num_inference_steps", type=int, metavar="N", help="default: those of the run")
    add("--compiled", action=argparse.BooleanOptionalAction, default=True, help="write sampler.pt2")
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> None:
    """Export, compare, report.

    Raises:
        UserError: bad arguments.
        ArithmeticError: an export differs.
    """
    model, scheduler, config = tdd.load_model(args.checkpoint)
    steps = args.num_inference_steps
    steps = config.num_inference_steps if steps is None else steps
    if config.sampler != "ddim" or config.eta:
        say("note: the exported loop is DDIM with eta 0, not the run's own sampler")
    if config.context_dim:
        say("note: the export takes no goal")
    folder = Path(args.output_dir)
    export(model, scheduler, folder, steps, compiled=args.compiled)
    differences = report(model, scheduler, folder, steps)
    if not all(difference <= PARITY for difference in differences.values()):
        raise ArithmeticError(f"an export in {folder} differs by more than {PARITY}")
    say(f"files in {folder}")


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return 0 done, 2 the user's mistake, 1 a fault, 130 interrupted."""
    try:
        run(parse_args(argv))
    except UserError as e:
        say(f"error: {e}", err=True)
        return 2
    except (ArithmeticError, OSError) as e:
        say(f"error: {e}", err=True)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
