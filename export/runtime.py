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
from pathlib import Path
from typing import Any

import numpy as np

FILES = {"compiled": "sampler.pt2", "onnx": "denoiser.onnx", "torch": "denoiser.pt2"}


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
    given: tuple[np.ndarray, ...] = ()
    if schedule["known_frames"]:
        values = np.zeros_like(x_T) if known is None else (2 * known - 1).astype(np.float32)
        mask = np.zeros(x_T.shape[:2], bool) if known_mask is None else known_mask
        given = (values, mask)
    for step in schedule["steps"]:
        output = denoise(x_t, np.full(len(x_t), step["t"], np.int64), *given)
        x_0_pred = np.float32(step["a"]) * output + np.float32(step["b"]) * x_t
        if schedule["clip_sample"]:
            x_0_pred = x_0_pred.clip(-1, 1)
        if given:
            x_0_pred = np.where(mask[..., None], values, x_0_pred)
        x_t = np.float32(step["c"]) * x_0_pred + np.float32(step["d"]) * x_t
    return (x_t + 1) / 2


class Sampler:
    """An exported folder as a function from noise to actions.

    Args:
        folder: that `python -m export` wrote.
        engine: "compiled" (all steps as one program for this kind of processor, batch 1),
            "onnx", "torch"; None = the first of them whose file is there.
        threads: that the engine may use, where it can be told.
    """

    def __init__(
        self, folder: str | Path = ".", engine: str | None = None, threads: int = 1
    ) -> None:
        folder = Path(folder)
        self.schedule = json.loads((folder / "schedule.json").read_text("utf-8"))
        self.engine = engine or next(e for e, name in FILES.items() if (folder / name).exists())
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
        """Map noise (B, L, C), perhaps with known frames, to actions; see `ddim`."""
        x_T = np.ascontiguousarray(x_T, np.float32)
        if self.engine != "compiled":
            return ddim(self.run, self.schedule, x_T, known, known_mask)
        if not self.schedule["known_frames"]:
            return self.run(x_T)
        known = np.zeros_like(x_T) if known is None else known.astype(np.float32)
        mask = np.zeros(x_T.shape[:2], bool) if known_mask is None else known_mask
        return self.run(x_T, known, mask)
