"""A window as a chain of states, idle, contact, idle, contact, ...: what all frames say of each."""

import torch
import torch.nn.functional as F
from torch import Tensor

NEVER = -1e6  # log weight of what cannot be


def press_evidence(x_t: Tensor, place: Tensor, alpha_bar_t: Tensor) -> Tensor:
    """Return log p(x_t | pressed at `place`) - log p(x_t | idle) of each frame by itself, (B, L).

    Gaussian noise around √ᾱ·(place, 1) or √ᾱ·(-1, ..., -1), of variance 1 - ᾱ, at least 0.01.
    """
    pressed = F.pad(place, (0, 1), value=1.0)
    root, noise = alpha_bar_t.sqrt(), (1 - alpha_bar_t).clamp(min=0.01)
    return (root / noise * (pressed + 1) * (x_t - root / 2 * (pressed - 1))).sum(dim=-1)


def contact_chain(
    log_odds: Tensor, down: Tensor, up: Tensor, count: Tensor, durations: Tensor
) -> Tensor:
    """Return the posterior log odds of a press, (B, L), knowing how long contacts last.

    A chain without memory is asked first. Where it finds touch-downs, lift-offs so many frames
    later get the log weight of that duration, and the other way round; then it is asked again.
    Exact where the first answer is certain of one end. No gradient passes through the first.

    Args:
        log_odds: as in `memoryless_chain`; so are down, up and count.
        down: a touch-down.
        up: a lift-off.
        count: how many contacts.
        durations: log weight of 0, 1, ... L - 1 frames from touch-down to lift-off, (L,). A
            contact that the window cuts off has none.
    """
    L = len(durations)
    frame = torch.arange(L, device=durations.device)
    lag = frame - frame[:, None]  # (touch-down, lift-off)
    is_whole = (frame[:, None] > 0) & (lag > 0)
    weight = torch.where(is_whole, durations[lag.clamp(min=0)], 0)
    with torch.no_grad():
        change = memoryless_chain(log_odds, down, up, count).sigmoid().diff(dim=1)
        downs, ups = (F.pad(x.clamp(min=0), (1, 0)) for x in (change, -change))
    return memoryless_chain(log_odds, down + ups @ weight.T, up + downs @ weight, count)


def memoryless_chain(log_odds: Tensor, down: Tensor, up: Tensor, count: Tensor) -> Tensor:
    """Return the posterior log odds of a press, (B, L), of at most K contacts in a window.

    The marginals of a hidden Markov chain from left to right, by forward-backward; each of the
    2K + 1 states is one cumulative sum over frames.

    Args:
        log_odds: of a press, what each frame says by itself, (B, L).
        down: log weight of a touch-down at the frame, (B, L).
        up: log weight of a lift-off before the frame, (B, L).
        count: log weight of 0, 1, ... K contacts, (B, K + 1).
    """
    K = count.shape[1] - 1
    press = torch.cat([log_odds, log_odds.flip(1)])  # the two directions
    backward_down, backward_up = (x.roll(-1, 1).flip(1) for x in (down, up))
    change = torch.cat([up, backward_down]), torch.cat([down, backward_up])
    never = torch.full_like(count[:, 0], NEVER)
    first = torch.stack([torch.zeros_like(never), down[:, 0], *[never] * (2 * K - 1)])
    last = count.T.repeat_interleave(2, dim=0)[1:].flip(0)  # a contact, and the idle after it
    start = torch.cat([first, last], dim=1)[..., None]  # (2K + 1, 2B, 1)

    paths: list[Tensor] = []
    total = press.cumsum(dim=1)
    for state in range(2 * K + 1):
        enter = start[state]
        if state:
            enter = torch.cat([enter, paths[-1][:, :-1] + change[state % 2][:, 1:]], dim=1)
        else:
            enter = F.pad(enter, (0, press.shape[1] - 1), value=NEVER)
        if state % 2:
            path = total + torch.logcumsumexp(enter - (total - press), dim=1)
        else:
            path = torch.logcumsumexp(enter, dim=1)
        paths.append(path)
    both = torch.stack(paths)  # (2K + 1, 2B, L)
    B = log_odds.shape[0]  # not len: export traces it
    forward, backward = both[:, :B], both[:, B:]
    joint = forward + backward.flip(0, 2)
    return joint[1::2].logsumexp(dim=0) - log_odds - joint[::2].logsumexp(dim=0)
