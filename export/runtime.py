"""Sample from an exported denoiser; needs numpy, the files beside it, and torch or onnxruntime.

    from runtime import Sampler
    sample = Sampler("exported")  # the fastest engine that this machine has
    actions = sample(np.random.standard_normal((1, 250, 3)))  # x_0, data units [0, 1]

`schedule.json` holds the steps, each t with its coefficients:

    x_0_pred = clip(a·output + b·x_t);  x_prev = c·x_0_pred + d·x_t

`python -m export` copies this file beside what it exports.
"""

import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

FILES = {"compiled": "sampler.pt2", "onnx": "denoiser.onnx", "torch": "denoiser.pt2"}
PACKAGES = {"compiled": "torch", "onnx": "onnxruntime", "torch": "torch"}


def given_frames(
    schedule: dict[str, Any],
    x_T: np.ndarray,
    known: np.ndarray | None,
    known_mask: np.ndarray | None,
) -> tuple[np.ndarray, ...]:
    """Return known frames, float32 data units, and their mask; none if the denoiser takes none.

    Raises:
        ValueError: arguments or their shapes do not fit.
    """
    shape = (len(x_T), *schedule["shape"][1:])
    if x_T.shape != shape:
        raise ValueError(f"x_T must be {shape}, got {x_T.shape}")
    if (known is None) != (known_mask is None):
        raise ValueError("known and known_mask must be given together")
    if known is None or known_mask is None:
        known, known_mask = np.zeros(shape), np.zeros(shape[:2], bool)
    elif not schedule["known_frames"]:
        raise ValueError("this denoiser takes no known frames")
    if known.shape != shape or known_mask.shape != shape[:2] or known_mask.dtype != bool:
        raise ValueError(
            f"known must be {shape} and known_mask bool {shape[:2]}, "
            f"got {known.shape} and {known_mask.dtype} {known_mask.shape}"
        )
    known = np.ascontiguousarray(known, np.float32)
    return (known, known_mask) if schedule["known_frames"] else ()


def ddim(
    denoise: Callable[..., np.ndarray],
    schedule: dict[str, Any],
    x_T: np.ndarray,
    known: np.ndarray | None = None,
    known_mask: np.ndarray | None = None,
) -> np.ndarray:
    """Walk from noise to actions (DDIM eq. 12, eta = 0).

    Args:
        denoise: maps x_t (B, L, C) float32, t (B,) int64 and, if the schedule says so, known
            frames in [-1, 1] and their mask to the network's output (B, L, C).
        schedule: the content of schedule.json.
        x_T: noise, (B, L, C) float32.
        known: (B, L, C), data units; read only where the mask is set.
        known_mask: (B, L) bool.

    Returns: x_0, (B, L, C) float32, data units.
    """
    x_t = x_T
    given = given_frames(schedule, x_T, known, known_mask)
    if given:
        given = (2 * given[0] - 1, given[1])
    for step in schedule["steps"]:
        output = denoise(x_t, np.full(len(x_t), step["t"], np.int64), *given)
        x_0_pred = np.float32(step["a"]) * output + np.float32(step["b"]) * x_t
        if schedule["clip_sample"]:
            x_0_pred = x_0_pred.clip(-1, 1)
        if given:
            x_0_pred = np.where(given[1][..., None], given[0], x_0_pred)
        x_t = np.float32(step["c"]) * x_0_pred + np.float32(step["d"]) * x_t
    return (x_t + 1) / 2


class Sampler:
    """An exported folder as a function from noise to actions.

    Args:
        folder: that `python -m export` wrote.
        engine: "compiled" (all steps as one program for this kind of processor, batch 1),
            "onnx", "torch"; None = the first of them whose file and package are there.
        threads: that "onnx" may use; the others take those of torch.

    Raises:
        ValueError: no such engine here.
    """

    def __init__(
        self, folder: str | Path = ".", engine: str | None = None, threads: int = 1
    ) -> None:
        folder = Path(folder)
        self.schedule = json.loads((folder / "schedule.json").read_text("utf-8"))
        here = [e for e in FILES if (folder / FILES[e]).exists() and find_spec(PACKAGES[e])]
        if not here or engine not in (None, *here):
            raise ValueError(f"{folder} can be run here by {' or '.join(here) or 'nothing'}")
        self.engine = engine or here[0]
        path = str(folder / FILES[self.engine])
        self.run = self._onnx(path, threads) if self.engine == "onnx" else self._torch(path)

    def _torch(self, path: str) -> Callable[..., np.ndarray]:
        """Return a function on numpy arrays that runs a file written by torch."""
        import torch

        if self.engine == "compiled":
            program: Any = torch._inductor.aoti_load_package(path)
        else:
            program = torch.export.load(path).module()

        def run(*arrays: np.ndarray) -> np.ndarray:
            with torch.no_grad():
                return program(*map(torch.from_numpy, arrays)).numpy()

        return run

    def _onnx(self, path: str, threads: int) -> Callable[..., np.ndarray]:
        """Return a function on numpy arrays that runs an ONNX file."""
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        names = [each.name for each in session.get_inputs()]
        return lambda *arrays: session.run(None, dict(zip(names, arrays, strict=True)))[0]

    def __call__(
        self, x_T: np.ndarray, known: np.ndarray | None = None, known_mask: np.ndarray | None = None
    ) -> np.ndarray:
        """Map noise (B, L, C), perhaps with known frames, to actions; see `ddim`.

        Raises:
            ValueError: arguments or their shapes do not fit.
        """
        x_T = np.ascontiguousarray(x_T, np.float32)
        if self.engine != "compiled":
            return ddim(self.run, self.schedule, x_T, known, known_mask)
        if len(x_T) != 1:
            raise ValueError(f'"compiled" draws one gesture at a time, got {len(x_T)}')
        return self.run(x_T, *given_frames(self.schedule, x_T, known, known_mask))
