"""What `python -m benchmarks.gpu` measures: a function for each stage of benchmarks/gpu_lines.py.

Each returns the value of its lines in their order: a number, words, or a spread of milliseconds.
"""

import math
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import train_diffusion_ddim as tdd
from benchmarks.measure import ROOT, default_model, in_turn, spread
from benchmarks.training import our_state, our_step
from evaluation.family import known_prior, validity
from evaluation.protocols.local_tests import gpu_table
from evaluation.scores import to_numpy
from export.__main__ import WholeSampler, num_noises
from trainlib.errors import first_line, say
from trainlib.gestures import ACTION_DIM, SEQ_LEN
from trainlib.process import timer
from trainlib.run_log import read_metrics
from trainlib.state import TrainState

PLAN_50: dict[str, Any] = {  # the plan's command, docs/RUN_DIFFUSION_TRAINING.md
    "batch_size": 64,
    "lr": 2e-4,
    "d_model": 64,
    "num_layers": 3,
    "nhead": 4,
}
TINY: dict[str, Any] = {"d_model": 16, "num_layers": 1, "nhead": 2, "patch_size": 25}


@dataclass(frozen=True)
class Place:
    """Where a stage is measured, and at what size.

    Attributes:
        device: of the model.
        quick: sizes that measure nothing, but run every line.
        limit_s: seconds that the stage may take.
    """

    device: torch.device
    quick: bool
    limit_s: float

    @property
    def knobs(self) -> dict[str, Any]:
        """What makes the default recipe small enough."""
        return TINY if self.quick else {}

    def folder(self, name: str) -> str:
        """Return the folder of the gestures of "train" or "val"."""
        return str(ROOT / ("test_data_mini" if self.quick else "diffusion_test_data") / name)

    def gestures(self, name: str) -> Tensor:
        """Return the gestures of "train" or "val", (N, L, C), data units, on the device."""
        x_0 = tdd.DiffusionActionDataset(self.folder(name)).sequences
        return torch.from_numpy(x_0).to(self.device)

    def finish(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def milliseconds(self, functions: dict[str, Any], rounds: int = 20) -> list[Any]:
        """Time functions in turn; words in the place of one that cannot be called stay."""

        def finished(function: Callable[[], Any]) -> None:
            function()
            self.finish()

        runs: dict[str, Callable[[], Any]] = {
            name: partial(finished, f) for name, f in functions.items() if callable(f)
        }
        seconds = in_turn(runs, 1 if self.quick else rounds, warm_up=1 if self.quick else 5)
        ms = {name: spread([1000 * s for s in values]) for name, values in seconds.items()}
        return [ms.get(name, words) for name, words in functions.items()]


def tried(make: Callable[[], Any]) -> Any:
    """Return what `make` does, or in words why it cannot be made here."""
    try:
        return make()
    except Exception as e:  # torch has many kinds for what it cannot capture or compile
        return f"no: {type(e).__name__}: {first_line(e)}"


def captured(function: Callable[[], Any], device: torch.device) -> Callable[[], Any]:
    """Return the replay of a function as one CUDA graph; on the CPU the function itself."""
    if device.type != "cuda":
        return function
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph.replay


def peak_gb(device: torch.device) -> float:
    """Return the peak of the device's memory so far, GB; NaN on the CPU, which does not count."""
    return torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else math.nan


# ----------------------------------------------------------------------------------------
# STAGES
# ----------------------------------------------------------------------------------------


def loss_and_gradient(state: TrainState, x_0: Tensor, drawn: tdd.Drawn) -> Tensor:
    """Do a training step's forward and backward pass, without its update; return the loss."""
    x = tdd.to_model_units(x_0)
    x_t, _ = state.scheduler.add_noise(x, drawn.t, drawn.eps)
    given = {"known": x, "known_mask": drawn.known_mask, "made_of": (x, drawn.eps)}
    output, decisions = state.model(x_t, drawn.t, **given)
    loss = tdd.per_sample_loss(state.scheduler, output, x_0, drawn.eps, drawn.t)
    total = loss + tdd.DECISION_WEIGHT * tdd.decision_loss(decisions, x_0) + decisions.practice
    total = total.mean()
    state.model.zero_grad(set_to_none=False)
    total.backward()
    return total


def agreement(place: Place) -> list[Any]:
    """Return how far the device is from the CPU: denoiser, sampler, gradient."""
    model, scheduler = default_model(**place.knobs)
    B, sampling = 4, tdd.TrainConfig(**place.knobs).sampling
    x_t, t = tdd.noise_bank((B, SEQ_LEN, ACTION_DIM)), torch.arange(B) * 200
    x_0 = place.gestures("val")[:B].cpu()
    torch.manual_seed(0)
    drawn = tdd.draw(x_0, scheduler.num_timesteps, known_share=0.5)
    outputs, samples, gradients = [], [], []
    for device in (torch.device("cpu"), place.device):
        model, scheduler = model.to(device), scheduler.to(device)
        with torch.no_grad():
            outputs.append(model(x_t.to(device), t.to(device)).cpu())
        generator = torch.Generator().manual_seed(0)  # of the CPU: the same noise on both
        options: dict[str, Any] = sampling | {"generator": generator, "x_T": x_t}
        samples.append(scheduler.sample(model, tuple(x_t.shape), device, **options).cpu())
        state = our_state(x_0, device=device.type, **place.knobs)
        here = [None if x is None else x.to(device) for x in drawn]  # type: ignore[union-attr]
        loss_and_gradient(state, x_0.to(device), tdd.Drawn(*here))  # type: ignore[arg-type]
        every: list[Any] = [p.grad for p in state.model.parameters()]
        gradients.append(torch.cat([gradient.flatten().cpu() for gradient in every]))
    difference = (gradients[1] - gradients[0]).norm() / gradients[0].norm()
    far = [float((a - b).abs().max()) for a, b in (outputs, samples)]
    return [*far, float(difference)]


def plan(place: Place) -> list[Any]:
    """Answer the plan's GPU test as the report does."""
    config = tdd.TrainConfig(**place.knobs)
    model, scheduler = default_model(**place.knobs)
    x_0 = place.gestures("train")[:256]
    with ExitStack() as stack:
        if place.device.type != "cuda":  # a rehearsal: the CPU has no counter of memory
            nothing: Any = {
                "reset_peak_memory_stats": lambda: None,
                "max_memory_allocated": lambda: 0,
            }
            stack.enter_context(mock.patch.multiple(torch.cuda, **nothing))
        models = model.to(place.device), scheduler.to(place.device)
        found = gpu_table(*models, x_0, config, config.sampling)["model"]
    names = "found training_memory_gb forward_speedup trained sampling_s"
    values: dict[str, Any] = {name: found[name].value for name in names.split()}
    values |= {name: "yes" if values[name] else "no" for name in ("found", "trained")}
    alone = [found[f"ms_per_sequence_{name}"].value for name in ("alone", "of_256")]
    return [*values.values(), *alone]


def latency(place: Place) -> list[Any]:
    """Time the run's own sampler, from one gesture to 1,024."""
    model, scheduler = default_model(**place.knobs)
    model, scheduler = model.to(place.device), scheduler.to(place.device)
    sampling = tdd.TrainConfig(**place.knobs).sampling
    many = 4 if place.quick else 1024

    def sample(batch: int, steps: int) -> Callable[[], Tensor]:
        shape, options = (batch, SEQ_LEN, ACTION_DIM), sampling | {"num_inference_steps": steps}
        return partial(scheduler.sample, model, shape, place.device, **options)

    steps_of_10 = WholeSampler(model, scheduler, **sampling | {"num_inference_steps": 10})
    noise = torch.randn(1, num_noises(steps_of_10.steps), SEQ_LEN, ACTION_DIM, device=place.device)
    eager = {f"{steps} steps": sample(1, steps) for steps in (1, 2, 10)}
    eager |= {"8 in 20 steps": sample(8, 20), "many": sample(many, 10)}
    *times, ms_of_many = place.milliseconds(eager)
    with torch.no_grad():
        graph = tried(lambda: captured(partial(steps_of_10, noise), place.device))
        by_graph = place.milliseconds({"graph": graph})
    return [*times[:3], *by_graph, times[3], 1000 * many / ms_of_many["median"]]


def train_for_a_while(place: Place, **knobs: Any) -> tuple[list[dict[str, Any]], list[Any]]:
    """Do a run in a folder that goes away; return its metrics and what `load_model` loads."""
    with tempfile.TemporaryDirectory() as folder:
        run: dict[str, Any] = {"save_dir": folder, "wandb_mode": "disabled"}
        run |= {"data_dir": place.folder("train"), "val_data_dir": place.folder("val")}
        tdd.train(tdd.TrainConfig(**knobs | run | {"device": place.device.type}))
        return read_metrics(folder), [*tdd.load_model(folder, place.device)]


def epoch(place: Place) -> list[Any]:
    """Time an epoch of the plan's command, the first not counted, and its validation."""
    rows, _ = train_for_a_while(place, **PLAN_50 | place.knobs, num_epochs=2 if place.quick else 5)
    seconds = [
        spread([row[key] for row in rows if key in row][1:])["median"]
        for key in ("train/epoch_s", "val/epoch_s")
    ]
    return [*seconds, peak_gb(place.device)]


def stepper(place: Place, x_train: Tensor, **options: Any) -> Callable[[], Any]:
    """Return the default recipe's step with these options, compiled where they say so."""
    step = our_step(our_state(x_train, device=place.device.type, **options, **place.knobs), x_train)
    step()
    return step


def training(place: Place) -> list[Any]:
    """Time the default recipe's step with and without bf16, and what a CUDA graph can hold of it.

    That is loss and gradient: a step waits for its loss before it updates the weights.
    """
    x_train = place.gestures("train")
    steps = {str(amp): stepper(place, x_train, amp=amp) for amp in (False, True)}
    state = our_state(x_train, device=place.device.type, **place.knobs)
    x_0 = x_train[: state.config.batch_size]
    drawn = tdd.draw(x_0, state.scheduler.num_timesteps, state.config.known_share)
    steps["gradient"] = partial(loss_and_gradient, state, x_0, drawn)
    times = place.milliseconds(steps)
    graph = tried(lambda: captured(steps["gradient"], place.device))
    return [*times, *place.milliseconds({"graph": graph})]


def compiled(place: Place) -> list[Any]:
    """Time the default recipe's step compiled, with and without bf16."""
    torch.compiler.set_stance("force_eager" if place.quick else "default")
    x_train = place.gestures("train")
    steps = {
        str(amp): tried(partial(stepper, place, x_train, compile=True, amp=amp))
        for amp in (False, True)
    }
    return place.milliseconds(steps)


def tests(place: Place) -> list[Any]:
    """Count how the suite's tests that need a GPU end; those that take minutes are left out."""
    command = [sys.executable, "-m", "pytest", "-m", "gpu and not slow", "-rs"]
    command += ["tests/test_scheduler.py"] if place.quick else []
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    say(done.stdout)
    if done.returncode not in (0, 1):
        raise ChildProcessError(f"pytest ended with exit code {done.returncode}")
    *_, summary = done.stdout.strip().splitlines()
    counts = {word: int(number) for number, word in re.findall(r"(\d+) (\w+)", summary)}
    failed = counts.get("failed", 0) + counts.get("errors", 0) + counts.get("error", 0)
    return [counts.get("passed", 0), failed, counts.get("skipped", 0)]


def preset(place: Place) -> list[Any]:
    """Train `--preset gpu` for as many epochs as fit, then draw from it."""
    knobs = tdd.PRESETS["gpu"] | place.knobs
    x_train, x_val = place.gestures("train"), place.gestures("val")
    state = our_state(x_train, device=place.device.type, **knobs)
    step, num = our_step(state, x_train), 1 if place.quick else 20
    for _ in range(num):
        step()
    place.finish()
    seconds = timer(place.device)
    for _ in range(num):
        step()
    an_epoch = seconds() / num * math.ceil(len(x_train) / state.config.batch_size)
    fitting = int(0.6 * place.limit_s / (1.3 * an_epoch))  # what is left is for the scores
    knobs["num_epochs"] = max(1, min(fitting, 1 if place.quick else knobs["num_epochs"]))
    say(f"  {knobs['num_epochs']} epochs of about {an_epoch:.1f} s")
    rows, (model, scheduler, config) = train_for_a_while(place, **knobs)
    shape = (8 if place.quick else 1000, *x_val.shape[1:])
    drawn = tdd.generate(model, scheduler, shape, **config.sampling).cpu()
    valid = validity(drawn, known_prior(place.folder("val"), x_val.cpu()))["valid"]
    epoch_s = spread([row["train/epoch_s"] for row in rows if "train/epoch_s" in row])["median"]
    decibel = rows[-1]["final/mean_snr_db"]
    return [knobs["num_epochs"], epoch_s, decibel, float(to_numpy(valid).mean())]


STAGES: dict[str, tuple[Callable[[Place], list[Any]], int]] = {  # and the most seconds of each
    "agreement": (agreement, 60),
    "plan": (plan, 60),
    "latency": (latency, 60),
    "epoch": (epoch, 90),
    "training": (training, 60),
    "compiled": (compiled, 150),
    "tests": (tests, 120),
    "preset": (preset, 240),
}
