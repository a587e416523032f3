"""What a call of the planner may ask for, checked; a wrong argument is a UserError of one line."""

import math
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch
from torch import Tensor

from train_diffusion_ddim import to_gesture
from trainlib.errors import UserError
from trainlib.gestures import PRESSED, SEQ_LEN
from trainlib.tensors import describe

INIT, DRAW, VARIATION = "init", "draw", "variation"


def require(condition: bool, text: str, got: Any) -> None:
    """Raise UserError unless the condition holds."""
    if not condition:
        raise UserError(f"{text}, got {got}")


def integer(name: str, value: Any, least: int) -> int:
    """Return an argument as an int of at least `least`, or raise UserError."""
    is_integer = isinstance(value, Integral) and not isinstance(value, bool)
    require(is_integer, f"{name} must be an integer", describe(value))
    value = int(value)
    shown = value if value.bit_length() < 64 else f"one of {value.bit_length()} bits"
    require(value >= least, f"{name} must be at least {least}", shown)
    require(value < 2**63, f"{name} must be below 2**63", shown)
    return value


def number(name: str, value: Any) -> float:
    """Return an argument as a float, or raise UserError."""
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    require(is_number, f"{name} must be a number", describe(value))
    try:
        return float(value)
    except OverflowError:  # an integer too large for any float
        return math.copysign(math.inf, value > 0 or -1)


def plain_copy(name: str, x: Any, shape: tuple[int, ...] | str) -> Tensor:
    """Return a copy of a tensor or numpy array: dense, on the CPU, bool or float32, no gradient.

    Args:
        name: of the argument.
        x: of any strides, real dtype, byte order and device.
        shape: wanted; a word stands for any one-dimensional shape.

    Raises:
        UserError: it is something else.
    """
    given = describe(x)
    if isinstance(x, np.ndarray) and x.dtype.kind in "biuf" and not np.ma.isMaskedArray(x):
        x = torch.from_numpy(np.array(x, bool if x.dtype.kind == "b" else np.float64, order="C"))
    is_real = isinstance(x, Tensor) and not x.is_complex()
    is_dense = is_real and x.layout == torch.strided and not x.is_meta
    fits = is_dense and (x.ndim == 1 if isinstance(shape, str) else x.shape == shape)
    wanted = f"[{shape}]" if isinstance(shape, str) else list(shape)
    require(fits, f"{name} must be a real, dense tensor or array {wanted}", given)
    dtype = torch.bool if x.dtype == torch.bool else torch.float32
    return x.detach().to("cpu", dtype, copy=True, memory_format=torch.contiguous_format)


@dataclass
class Request:
    """The arguments of one call, as of `Planner.plan`.

    Arrays become copies, float32 or bool, on the CPU. The i-th draw is a function of the noise
    alone, however many are drawn at a time.

    Attributes:
        noise: seed of all noise.
        source: what `init` is called as a candidate.
        varied: of as many draws the last is a variation of `init`; 0 = none.
        bank: where draws come from, see `take_from`; None = from the denoiser.
        bank_rows: those of its gestures that agree with what is known.
        streams: noise of draws from nothing, of variations, of samplers with eta > 0, of CEM, of
            places.
    """

    known: Any
    known_mask: Any
    init: Any
    strength: float
    goal: Any
    guidance: float
    num_plans: int
    num_inference_steps: int
    budget_ms: float
    noise: tuple[int, ...]
    places: Any = None
    refine: bool = True
    source: str = field(default=INIT, init=False)
    varied: int = field(default=0, init=False)
    drawn: int = field(default=0, init=False)
    bank: Tensor | None = field(default=None, init=False)
    bank_rows: Tensor | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        for name in ("num_plans", "num_inference_steps"):
            setattr(self, name, integer(name, getattr(self, name), 1))
        for name in ("strength", "budget_ms", "guidance"):
            setattr(self, name, number(name, getattr(self, name)))
        require(self.budget_ms > 0, "budget_ms must be above 0", self.budget_ms)
        require(0 < self.strength <= 1, "strength must be in (0, 1]", self.strength)
        is_near = self.init is not None or self.strength == 1
        require(is_near, "strength below 1 needs an init to stay near to", self.strength)
        if self.init is not None:
            init = plain_copy("init", self.init, (SEQ_LEN, 3)).float()
            low, high = init.min().item(), init.max().item()  # NaN if any number is
            require(low >= 0 and high <= 1, "init must be in [0, 1]", f"{low} to {high}")
            self.init = to_gesture(init)
            self.varied = int(self.strength < 1)
        require(
            isinstance(self.refine, bool), "refine must be True or False", describe(self.refine)
        )
        self._check_goal()
        self._check_known()
        self._check_places()
        self.streams = np.random.default_rng(self.noise).spawn(5)

    def vary(self, init: Tensor, strength: float, turn: int, source: str) -> None:
        """Start from a gesture that the call did not name: vary it by every `turn`-th draw."""
        self.init, self.strength, self.varied, self.source = init, strength, turn, source

    def _check_goal(self) -> None:
        """Check goal and guidance."""
        require(abs(self.guidance) <= 1000, "guidance must be in [-1000, 1000]", self.guidance)
        if self.goal is None:
            require(self.guidance == 1, "guidance needs a goal to weigh", self.guidance)
            return
        self.goal = plain_copy("goal", self.goal, "context_dim").float()
        require(bool(self.goal.isfinite().all()), "goal must be finite", self.goal.tolist())
        require(bool(self.goal.any()), "goal must not be all zeros, which is no goal", "zeros")

    def _check_known(self) -> None:
        """Check the known frames; what the mask leaves out becomes zero."""
        if self.known is None and self.known_mask is None:
            return
        if self.known is None or self.known_mask is None:
            raise UserError("known and known_mask must be given together")
        known = plain_copy("known", self.known, (SEQ_LEN, 3)).float()
        mask = plain_copy("known_mask", self.known_mask, (SEQ_LEN,))
        is_mask = mask.dtype == torch.bool
        require(is_mask, "known_mask must be bool", describe(self.known_mask))
        self.known_mask, frames = mask, known[mask]
        if not torch.equal(frames, to_gesture(frames)):
            raise UserError(
                "known frames must have x and y in [0, 1] and press 0 or 1, and be zero while idle"
            )
        self.known = torch.where(mask[:, None], known, 0)

    def _check_places(self) -> None:
        """Check where gestures may begin and end."""
        if self.places is None:
            return
        shape = tuple(getattr(self.places, "shape", ()))
        wanted = "places must be two maps of weights, (2, rows, columns)"
        require(len(shape) == 3 and shape[0] == 2 and 0 not in shape, wanted, describe(self.places))
        self.places = plain_copy("places", self.places, shape).float()
        sums, low = self.places.sum(dim=(1, 2)), self.places.min()
        is_weight = bool(sums.isfinite().all()) and bool((sums > 0).all()) and bool(low >= 0)
        wanted = "places must be finite and at least 0, and no map all zeros"
        require(is_weight, wanted, f"a least of {low} and sums {sums.tolist()}")

    def take_from(self, bank: Tensor | None) -> None:
        """Let draws be gestures of a bank, (N, L, 3), that agree with what is known.

        Where no known frame is pressed, those that are idle there are what a denoiser should draw
        (rejection sampling). A contact that is known, or a goal, needs the denoiser itself.
        """
        if bank is None or self.goal is not None:
            return
        agrees = torch.ones(len(bank), dtype=torch.bool)
        if self.known is not None:
            if self.known.any():
                return
            agrees = ~(bank[:, self.known_mask, 2] > PRESSED).any(dim=1)
        if agrees.any():
            self.bank, self.bank_rows = bank, agrees.nonzero()[:, 0]

    @property
    def free(self) -> Tensor | None:
        """The frames that are not known, (L,) bool; None = all."""
        return None if self.known is None else ~self.known_mask

    def next_kinds(self, num: int) -> list[str]:
        """Return of each of the next `num` draws whether it is a DRAW or a VARIATION."""
        turns = range(self.drawn + 1, self.drawn + num + 1)
        self.drawn += num
        return [VARIATION if self.varied and i % self.varied == 0 else DRAW for i in turns]

    def eps(self, kind: str, num: int) -> Tensor:
        """Draw the noise of the next `num` draws of a kind, (num, L, 3), float32."""
        stream = self.streams[kind == VARIATION]
        return torch.from_numpy(stream.standard_normal((num, SEQ_LEN, 3), dtype=np.float32))

    def from_bank(self, *shape: int) -> Tensor:
        """Draw the next gestures from the bank, (*shape, L, 3)."""
        assert self.bank is not None and self.bank_rows is not None
        return self.bank[self.bank_rows[self.streams[0].integers(0, len(self.bank_rows), shape)]]

    def paste(self, actions: Tensor) -> Tensor:
        """Put the known frames into actions (..., L, 3)."""
        if self.known is None:
            return actions
        return torch.where(self.known_mask[:, None], self.known, actions)
