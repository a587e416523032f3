"""Sample from an exported denoiser; needs numpy, the files beside it, and torch or onnxruntime.

    from runtime import Sampler
    sample = Sampler("exported")  # the fastest engine that this machine has
    noise = sample.draw(1, np.random.default_rng(0))  # all that is random, (1, K, 250, 3)
    actions = sample(noise)  # x_0, (1, 250, 3), data units [0, 1]

It draws what the run itself draws: sampler, steps and eta are those of the export. Arrays may be of
any real dtype and strides, any number of gestures at once.
`python -m export` copies this file beside what it exports.
"""

import json
import operator
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

FILES = {"compiled": "sampler.pt2", "onnx": "denoiser.onnx", "torch": "denoiser.pt2"}
LAST = "last_"  # + a denoiser's file: as it is asked in a step with curve_steps
BATCHED = "sampler_batch.pt2"  # as sampler.pt2, for schedule["batch_size"] gestures at a time
BATCH = 256  # gestures at a time of a denoiser, to bound the memory


def plain_array(name: str, x: Any, shape: tuple[int, ...], kinds: str, dtype: Any) -> np.ndarray:
    """Return an argument as a copy in C order: a compiled program reads memory without strides.

    Raises:
        ValueError: it is of another shape, or its dtype is none of `kinds` (of numpy).
    """
    try:
        array = np.asarray(x)
    except Exception as e:  # each kind of tensor has its own
        raise ValueError(f"{name} must be an array, got {type(x).__name__} ({e})") from None
    if array.dtype.kind not in kinds:
        raise ValueError(f"{name} must be {np.dtype(dtype).name}, got {array.dtype}")
    if array.shape != shape:
        raise ValueError(f"{name} must be {shape}, got {array.shape}")
    with np.errstate(over="ignore"):  # becomes infinite, which is refused
        return np.array(array, dtype, order="C")


def plain_arrays(schedule: dict[str, Any], noise: Any, known: Any, known_mask: Any) -> list[Any]:
    """Return [noise], or [noise, known, known_mask] if the denoiser takes known frames.

    See `Sampler.__call__`. The noise is (B, K, L, C), known frames are in [-1, 1].

    Raises:
        ValueError: arguments do not fit the denoiser or each other, or are not finite.
    """
    K, (L, C) = schedule["noises"], schedule["shape"][1:]
    num = max(1, len(noise)) if np.ndim(noise) else 1
    wanted = (num, L, C) if K == 1 and np.ndim(noise) == 3 else (num, K, L, C)
    arrays = [plain_array("noise", noise, wanted, "fiu", np.float32).reshape(num, K, L, C)]
    if not np.isfinite(arrays[0]).all():
        raise ValueError("noise must be finite")
    if (known is None) != (known_mask is None):
        raise ValueError("known and known_mask must be given together")
    if known is not None and not schedule["known_frames"]:
        raise ValueError("this denoiser takes no known frames")
    if known is None:
        known, known_mask = np.zeros((num, L, C)), np.zeros((num, L), bool)
    known = plain_array("known", known, (num, L, C), "fiu", np.float32)
    known_mask = plain_array("known_mask", known_mask, (num, L), "b", bool)
    known[~known_mask] = 0
    if not np.isfinite(known).all():
        raise ValueError("known must be finite where known_mask is set")
    return [*arrays, 2 * known - 1, known_mask] if schedule["known_frames"] else arrays


def predict_x_0(schedule: dict[str, Any], output: Any, x_t: Any, alpha_bar_t: float) -> Any:
    """Turn the denoiser's output at (x_t, t) into x_0_pred."""
    if schedule["prediction_type"] == "epsilon":
        x_0_pred = (x_t - (1 - alpha_bar_t) ** 0.5 * output) / alpha_bar_t**0.5
    elif schedule["prediction_type"] == "v":
        x_0_pred = alpha_bar_t**0.5 * x_t - (1 - alpha_bar_t) ** 0.5 * output
    else:
        x_0_pred = output
    return x_0_pred.clip(-1, 1) if schedule["clip_sample"] else x_0_pred


def walk(
    predict: Callable[[Any, dict[str, Any], Any], Any], steps: list[dict[str, Any]], noise: Any
) -> Any:
    """Go the steps of a schedule from noise to x_0, (B, L, C), model units.

        aim = x_0_pred + extrapolate·(x_0_pred - x_0_last)
        x_prev = of_aim·aim + of_eps·(x_t - sqrt(ᾱ_t)·aim)/sqrt(1 - ᾱ_t) + of_noise·z

    Each step is linear, whatever the sampler, so it is its coefficients; `describe_steps` of
    export/__main__.py has where they come from. Arrays are of numpy or of torch.

    Args:
        predict: maps x_t, a step and its z, or None, to x_0_pred.
        steps: of schedule.json; those that take a z add it or, with curve_steps, use it inside.
        noise: x_T and every z, (B, K, L, C), N(0, 1).
    """
    x_t, taken, x_0_last = noise[:, 0], 1, None
    for step in steps:
        z = noise[:, taken] if step["takes_z"] else None
        taken += step["takes_z"]
        x_0_pred = aim = predict(x_t, step, z)
        if step["extrapolate"]:
            aim = x_0_pred + step["extrapolate"] * (x_0_pred - x_0_last)
        alpha_bar_t = step["alpha_bar_t"]
        eps = (x_t - alpha_bar_t**0.5 * aim) / (1 - alpha_bar_t) ** 0.5
        x_t = step["of_aim"] * aim + step["of_eps"] * eps
        if step["of_noise"]:
            x_t = x_t + step["of_noise"] * z
        x_0_last = x_0_pred
    return x_t


def sample_by(
    denoise: Callable[..., np.ndarray],
    denoise_last: Callable[..., np.ndarray],
    schedule: dict[str, Any],
    noise: np.ndarray,
    *given: Any,
) -> np.ndarray:
    """Denoise step by step, noise → actions (B, L, C), data units.

    Args:
        denoise: maps x_t (B, L, C) float32, t (B,) int64 and, if the schedule says so, known
            frames in [-1, 1] and their mask to the network's output (B, L, C).
        denoise_last: likewise, in a step with curve_steps; before x_t comes its z, if it takes one.
        schedule: the content of schedule.json.
        noise: as of `plain_arrays`.
        *given: likewise, known frames and their mask.
    """

    def predict(x_t: np.ndarray, step: dict[str, Any], z: np.ndarray | None) -> np.ndarray:
        arguments = x_t, np.full(len(x_t), step["t"], np.int64), *given
        if step["curve_steps"]:
            output = denoise_last(*([] if z is None else [z]), *arguments)
        else:
            output = denoise(*arguments)
        x_0_pred = predict_x_0(schedule, output, x_t, step["alpha_bar_t"])
        return np.where(given[1][..., None], given[0], x_0_pred) if given else x_0_pred

    return (walk(predict, schedule["steps"], np.ascontiguousarray(noise)) + 1) / 2


class Sampler:
    """An exported folder as a function from noise to actions.

    Args:
        folder: that `python -m export` wrote.
        engine: "compiled" (all steps as one program for this kind of processor), "onnx", "torch";
            None = the first of them that works here.
        threads: that "onnx" may use; the others take those of torch.

    Raises:
        ValueError: no export, or no such engine here.
    """

    def __init__(
        self, folder: str | Path = ".", engine: str | None = None, threads: int = 1
    ) -> None:
        folder = Path(folder)
        try:
            self.schedule = json.loads((folder / "schedule.json").read_text("utf-8"))
        except (OSError, ValueError) as e:
            raise ValueError(f"{folder} is not an export ({e})") from None
        if engine not in (None, *FILES):
            raise ValueError(f"engine must be one of {', '.join(FILES)}, got {engine!r}")
        reasons = []
        for self.engine in [engine] if engine else FILES:
            try:
                self.programs = self._load_all(folder, threads)
                return
            except Exception as e:  # no file, no package, or one that is broken in any way
                reasons.append(f"{self.engine}: {(str(e) or type(e).__name__).splitlines()[0]}")
        raise ValueError(f"{folder} cannot be run here ({'; '.join(reasons)})")

    def _load_all(self, folder: Path, threads: int) -> dict[int, Callable[..., np.ndarray]]:
        """Return functions from `plain_arrays` to actions by the most gestures that each takes."""
        program = self._load((folder / FILES[self.engine]).read_bytes(), threads)
        if self.engine != "compiled":
            both = program, program
            if self.schedule["steps"][-1]["curve_steps"]:
                last = (folder / (LAST + FILES[self.engine])).read_bytes()
                both = program, self._load(last, threads)
            return {BATCH: lambda *arrays: sample_by(*both, self.schedule, *arrays)}
        programs = {1: program}
        if (folder / BATCHED).exists():
            many = self._load((folder / BATCHED).read_bytes(), threads)
            programs[self.schedule["batch_size"]] = many
        return programs

    def _load(self, content: bytes, threads: int) -> Callable[..., np.ndarray]:
        """Return a function on numpy arrays that runs the content of the engine's file."""
        if self.engine == "onnx":
            import onnxruntime

            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = operator.index(threads)
            session = onnxruntime.InferenceSession(content, options, ["CPUExecutionProvider"])
            names = [each.name for each in session.get_inputs()]
            return lambda *arrays: session.run(None, dict(zip(names, arrays, strict=True)))[0]

        import torch

        if self.engine == "compiled":
            program: Any = torch._inductor.aoti_load_package(BytesIO(content))
        else:
            program = torch.export.load(BytesIO(content)).module()

        def run(*arrays: np.ndarray) -> np.ndarray:
            with torch.no_grad():
                return program(*map(torch.from_numpy, arrays)).numpy()

        return run

    def draw(self, num: int, rng: np.random.Generator) -> np.ndarray:
        """Draw all noise of `num` gestures: x_T and that of the steps, (num, K, L, C) float32."""
        shape = (num, self.schedule["noises"], *self.schedule["shape"][1:])
        return rng.standard_normal(shape, np.float32)

    def __call__(self, noise: Any, known: Any = None, known_mask: Any = None) -> np.ndarray:
        """Map noise, perhaps with known frames, to actions: x_0, (B, L, C) float32, data units.

        Args:
            noise: N(0, 1), see `draw`, (B, K, L, C); (B, L, C) will do where K is 1.
            known: (B, L, C), data units; read only where the mask is set.
            known_mask: (B, L) bool; these frames are given and come back unchanged.

        Raises:
            ValueError: an argument is of another shape or type, or not finite.
            FloatingPointError: the sample is not finite.
        """
        arrays = plain_arrays(self.schedule, noise, known, known_mask)
        samples, at = [], 0
        while (left := len(arrays[0]) - at) > 0:
            size = max(size for size in self.programs if size < 2 * left or len(self.programs) == 1)
            rows = [array[at : at + size] for array in arrays]
            if self.engine == "compiled":  # takes so many and no fewer: the last batch is filled up
                rows = [np.resize(row, (size, *row.shape[1:])) for row in rows]
            samples.append(self.programs[size](*rows)[:left])
            at += size
        x_0 = np.concatenate(samples)
        if not np.isfinite(x_0).all():
            raise FloatingPointError("the sample is not finite: did the training diverge?")
        return x_0
