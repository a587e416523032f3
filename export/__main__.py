"""Export a trained denoiser with its schedule, and check that nothing is lost on the way.

    python -m export --checkpoint runs/NAME --output_dir exported

writes schedule.json, denoiser.pt2 (torch.export, any batch size), denoiser.onnx where onnxscript
is installed, sampler.pt2 (all steps at batch 1 as one compiled program) where a C++ compiler is,
and runtime.py, which samples from them without this project. Each is compared with
`DDIMScheduler.sample` first; the folder appears when all is written and agrees.
"""

import argparse
import copy
import io
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
from torch import Tensor, nn

import train_diffusion_ddim as tdd
from export import runtime
from trainlib.errors import OneLineParser, UserError, first_line, run_program, say
from trainlib.files import make_folder, write_json, write_whole
from trainlib.gestures import ACTION_DIM, SEQ_LEN
from trainlib.knobs import as_type
from trainlib.process import timer
from trainlib.tensors import is_finite

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
    """Return the content of schedule.json: what runtime.py needs besides the denoiser."""
    pairs = scheduler.timestep_pairs(steps)
    alpha_bar = scheduler.alpha_bar
    return {
        "known_frames": tdd.takes_known_frames(model),
        "clip_sample": scheduler.clip_sample,
        "prediction_type": scheduler.prediction_type,
        "shape": ["B", getattr(model, "seq_len", SEQ_LEN), ACTION_DIM],
        "steps": [
            {"t": t, "alpha_bar_t": alpha_bar(t), "alpha_bar_prev": alpha_bar(t_prev)}
            for t, t_prev in pairs
        ],
    }


def example_inputs(model: nn.Module, batch: int, seed: int = 0) -> tuple[Tensor, ...]:
    """Return x_T and, if the model takes them, known frames (B, L, C) and a mask (B, L).

    Known are the press edges of random clicks: given what no gesture can contain, a trained
    denoiser makes much of rounding.
    """
    generator = torch.Generator().manual_seed(seed)
    L, C = getattr(model, "seq_len", SEQ_LEN), ACTION_DIM
    x_T = torch.randn((batch, L, C), generator=generator, dtype=torch.float32)
    if not tdd.takes_known_frames(model):
        return (x_T,)
    known = torch.zeros_like(x_T)
    known[:, L // 4 : L // 2] = torch.rand((batch, 1, C), generator=generator, dtype=x_T.dtype)
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
    write_whole(path, buffer.getvalue())


@contextmanager
def optional(engine: str, cure: str) -> Iterator[None]:
    """Do without an engine that cannot be made here, aloud; a full disk is a fault all the same."""
    try:
        yield
    except (OSError, MemoryError):
        raise
    except Exception as e:  # a package or a compiler that is missing, or broken in any way
        say(f"note: no {runtime.FILES[engine]}; {cure} ({type(e).__name__}: {first_line(e)})")


def write_denoiser(model: nn.Module, folder: Path) -> None:
    """Write denoiser.pt2 and, where it can be, denoiser.onnx."""
    x_t, *given = example_inputs(model, 2)
    inputs = (x_t, torch.tensor([1, 0]), *given)
    batch = torch.export.Dim("batch", min=1, max=4096)
    program = torch.export.export(model, inputs, dynamic_shapes=({0: batch},) * len(inputs))
    write(partial(torch.export.save, program), folder / runtime.FILES["torch"])
    with optional("onnx", "it needs onnx and onnxscript"):
        plain = program.run_decompositions(plain_operators())
        names = ("x_t", "t", "known", "known_mask")[: len(inputs)]
        onnx: Any = torch.onnx.export(
            plain, input_names=names, output_names=["output"], dynamo=True, verbose=False
        )
        write(partial(onnx.save), folder / runtime.FILES["onnx"])


def write_sampler(model: nn.Module, scheduler: tdd.DDIMScheduler, folder: Path, steps: int) -> None:
    """Write sampler.pt2 where it can be; takes a minute."""
    with optional("compiled", "it needs a C++ compiler"):
        whole = WholeSampler(model, scheduler, steps).eval()
        program = torch.export.export(whole, example_inputs(model, 1))
        package = partial(
            torch._inductor.aoti_compile_and_package, program, inductor_configs={"freezing": True}
        )
        write(lambda buffer: package(package_path=buffer), folder / runtime.FILES["compiled"])


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
    steps: int,
    *,
    compiled: bool = True,
) -> dict[str, float]:
    """Write all files of a denoiser into a new folder, which appears whole or not at all.

    Returns: each engine's largest difference to `DDIMScheduler.sample`.

    Raises:
        UserError: the folder cannot be made, or so many steps cannot be.
        FloatingPointError: weights or samples are not finite, or an engine differs.
    """
    folder = Path(as_type("--output_dir", folder, str))
    steps = as_type("--num_inference_steps", steps, int)
    model = plain_copy(model)
    schedule = describe_schedule(model, scheduler, steps)
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
            if compiled:
                write_sampler(model, scheduler, made, steps)
        except OSError as e:
            raise OSError(str(e).replace(str(made), str(folder))) from None
        differences = check_parity(model, scheduler, made, steps)
        if not all(difference <= PARITY for difference in differences.values()):
            raise FloatingPointError(f"an engine differs by more than {PARITY}: {differences}")
        try:
            made.rename(folder)
        except OSError as e:
            raise UserError(f"cannot make --output_dir {folder} ({e}); choose another") from None
    return differences


def check_parity(
    model: nn.Module, scheduler: tdd.DDIMScheduler, folder: Path, steps: int
) -> dict[str, float]:
    """Return each engine's largest difference to `sample`, with and without known frames."""
    whole, found = WholeSampler(model, scheduler, steps).eval(), {}
    for engine, name in runtime.FILES.items():
        if not (folder / name).exists():
            continue
        try:
            sampler = runtime.Sampler(folder, engine)
        except ValueError as e:
            say(f"note: {name} is not checked, since it does not run here ({first_line(e)})")
            continue
        differences = []
        for seed in range(4):
            inputs = example_inputs(model, 1 if engine == "compiled" else 3, seed)
            for arguments in (inputs, inputs[:1]):
                difference = sampler(*arguments) - whole(*arguments).numpy()
                differences.append(np.abs(difference).max())
        found[engine] = float(np.max(differences))
    return found


def milliseconds(function: Callable[[], Any], calls: int = 30) -> float:
    """Return the median time of a call."""
    seconds = []
    for _ in range(calls + 3):
        taken = timer()
        function()
        seconds.append(taken())
    return 1000 * statistics.median(seconds[3:])


def report(whole: WholeSampler, folder: Path, differences: dict[str, float]) -> None:
    """Print the time of one gesture by every engine, and how far it is from `sample`."""
    torch.set_num_threads(1)
    inputs = example_inputs(whole.model, 1)
    say(f"one gesture, {whole.steps} steps, one thread:")
    say(f"  {'sample()':10} {milliseconds(lambda: whole(*inputs)):7.2f} ms")
    arrays = [a.numpy() for a in inputs]
    for engine, difference in differences.items():
        ms = milliseconds(partial(runtime.Sampler(folder, engine), *arrays))
        say(f"  {engine:10} {ms:7.2f} ms, largest difference {difference:.1e}")


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = OneLineParser(prog="python -m export", description=__doc__)
    add = parser.add_argument
    add("--checkpoint", required=True, metavar="PATH", help="checkpoint or run folder")
    add("--output_dir", required=True, metavar="DIR", help="a new folder")
    add("--num_inference_steps", type=int, metavar="N", help="default: those of the run")
    add("--compiled", action=argparse.BooleanOptionalAction, default=True, help="write sampler.pt2")
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> None:
    """Export, compare, report."""
    model, scheduler, config = tdd.load_model(args.checkpoint)
    steps = args.num_inference_steps
    steps = config.num_inference_steps if steps is None else steps
    if config.sampler != "ddim" or config.eta:
        say("note: the exported loop is DDIM with eta 0, not the run's own sampler")
    if config.context_dim:
        say("note: the export takes no goal")
    folder = Path(args.output_dir)
    differences = export(model, scheduler, folder, steps, compiled=args.compiled)
    report(WholeSampler(model, scheduler, steps).eval(), folder, differences)
    say(f"files in {folder}")


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return 0 done, 2 the user's mistake, 1 a fault, 130 interrupted."""
    return run_program(lambda: run(parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
