"""Sample from an exported denoiser; needs numpy, the files beside it, and torch or onnxruntime.

    from runtime import Sampler
    sample = Sampler("exported")  # the fastest engine that this machine has
    actions = sample(np.random.standard_normal((1, 250, 3)))  # x_0, data units [0, 1]

Arrays may be of any real dtype and strides, any number of gestures at once.
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
BATCH = {"compiled": 1, "onnx": 256, "torch": 256}  # gestures at a time, to bound the memory


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


def plain_arrays(schedule: dict[str, Any], x_T: Any, known: Any, known_mask: Any) -> list[Any]:
    """Return [x_T], or [x_T, known, known_mask] if the denoiser takes known frames; see `ddim`.

    Raises:
        ValueError: arguments do not fit the denoiser or each other, or are not finite.
    """
    L, C = schedule["shape"][1:]
    num = max(1, len(x_T)) if np.ndim(x_T) else 1
    arrays = [plain_array("x_T", x_T, (num, L, C), "fiu", np.float32)]
    if not np.isfinite(arrays[0]).all():
        raise ValueError("x_T must be finite")
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
    return [*arrays, known, known_mask] if schedule["known_frames"] else arrays


def predict_x_0(schedule: dict[str, Any], output: Any, x_t: Any, alpha_bar_t: float) -> Any:
    """Turn the denoiser's output at (x_t, t) into x_0_pred."""
    if schedule["prediction_type"] == "epsilon":
        x_0_pred = (x_t - (1 - alpha_bar_t) ** 0.5 * output) / alpha_bar_t**0.5
    elif schedule["prediction_type"] == "v":
        x_0_pred = alpha_bar_t**0.5 * x_t - (1 - alpha_bar_t) ** 0.5 * output
    else:
        x_0_pred = output
    return x_0_pred.clip(-1, 1) if schedule["clip_sample"] else x_0_pred


def ddim(
    denoise: Callable[..., np.ndarray],
    schedule: dict[str, Any],
    x_T: Any,
    known: Any = None,
    known_mask: Any = None,
) -> np.ndarray:
    """Denoise step by step, noise → actions (DDIM eq. 12 with eta 0).

    Args:
        denoise: maps x_t (B, L, C) float32, t (B,) int64 and, if the schedule says so, known
            frames in [-1, 1] and their mask to the network's output (B, L, C).
        schedule: the content of schedule.json.
        x_T: noise, (B, L, C).
        known: (B, L, C), data units; read only where the mask is set.
        known_mask: (B, L) bool; these frames are given and come back unchanged.

    Returns: x_0, (B, L, C) float32, data units.

    Raises:
        ValueError: an argument is of another shape or type, or not finite.
    """
    x_t, *given = plain_arrays(schedule, x_T, known, known_mask)
    if given:
        given[0] = 2 * given[0] - 1
    for step in schedule["steps"]:
        alpha_bar_t, alpha_bar_prev = step["alpha_bar_t"], step["alpha_bar_prev"]
        output = denoise(x_t, np.full(len(x_t), step["t"], np.int64), *given)
        x_0_pred = predict_x_0(schedule, output, x_t, alpha_bar_t)
        if given:
            x_0_pred = np.where(given[1][..., None], given[0], x_0_pred)
        eps_pred = (x_t - alpha_bar_t**0.5 * x_0_pred) / (1 - alpha_bar_t) ** 0.5
        x_t = alpha_bar_prev**0.5 * x_0_pred + (1 - alpha_bar_prev) ** 0.5 * eps_pred  # eq. 12
    return (x_t + 1) / 2


class Sampler:
    """An exported folder as a function from noise to actions.

    Args:
        folder: that `python -m export` wrote.
        engine: "compiled" (all steps as one program for this kind of processor, gesture by
            gesture), "onnx", "torch"; None = the first of them that works here.
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
                self.run = self._load((folder / FILES[self.engine]).read_bytes(), threads)
                return
            except Exception as e:  # no file, no package, or one that is broken in any way
                reasons.append(f"{self.engine}: {(str(e) or type(e).__name__).splitlines()[0]}")
        raise ValueError(f"{folder} cannot be run here ({'; '.join(reasons)})")

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

    def __call__(self, x_T: Any, known: Any = None, known_mask: Any = None) -> np.ndarray:
        """Map noise (B, L, C), perhaps with known frames, to actions; see `ddim`.

        Raises:
            ValueError: an argument is of another shape or type, or not finite.
            FloatingPointError: the sample is not finite.
        """
        arrays = plain_arrays(self.schedule, x_T, known, known_mask)
        samples, size = [], BATCH[self.engine]
        for i in range(0, len(arrays[0]), size):
            rows = [array[i : i + size] for array in arrays]
            is_whole = self.engine == "compiled"
            samples.append(self.run(*rows) if is_whole else ddim(self.run, self.schedule, *rows))
        x_0 = np.concatenate(samples)
        if not np.isfinite(x_0).all():
            raise FloatingPointError("the sample is not finite: did the training diverge?")
        return x_0
