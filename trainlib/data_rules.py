"""Options that the training set decides, each by a rule that is printed."""

import math
from dataclasses import replace
from typing import Any

import numpy as np

from trainlib.contacts import Contact, contacts_of
from trainlib.legendre import legendre_table
from trainlib.shapes import MISSED, missed_by

SEEN = 2000  # gestures that are looked at
SAME = 1e-6  # less than this is rounding
FINEST, COARSEST = 1e-3, 5e-3  # sigma_min, data units
MOST_CONTACTS, RARE = 3, 1e-3  # in a window; a share of windows that does not count
POLYNOMIALS, SHAPES = 8, 6  # that curves are made of, whichever they are
CURVE_STEPS = 12  # of curves alone
PATCH_SIZE = 10  # frames a token


def patch_size_for(frames: int) -> int:
    """Return how many frames a token has: PATCH_SIZE, or what divides both that and a window."""
    return math.gcd(PATCH_SIZE, frames)


def decided_by_data(config: Any, x_train: np.ndarray) -> tuple[Any, list[str]]:
    """Decide what is None in a config; return it, and why, in lines.

        augment       on, if at least half of the swipes are parallel to an axis: generated gestures
                      have the symmetries that it draws from, people's have not
        max_contacts  as many as windows hold, but for RARE ones, in [1, MOST_CONTACTS]
        sigma_min     a tenth of the 10th percentile of motions, in [FINEST, COARSEST]. A motion is
                      how far a contact reaches along an axis that it does not rest on
        shapes        SHAPES, those that the contacts have in common, if polynomials miss a tenth of
                      these by more than MISSED; else 0, and curves are polynomials
        curve_steps   CURVE_STEPS where windows hold one contact at most; else 0: which of several
                      there are is decided too soon
        patch_size    by `patch_size_for`

    Args:
        config: with these options, contacts and context_dim.
        x_train: (N, L, 3), data units.
    """
    rules = ("augment", "max_contacts", "sigma_min", "shapes", "curve_steps", "patch_size")
    if None not in [getattr(config, name) for name in rules]:
        return config, []
    seen = x_train[:: max(1, len(x_train) // SEEN)]
    contacts = contacts_of(seen)
    reach = np.array([np.ptp(contact.xy, axis=0) for contact in contacts]).reshape(-1, 2)
    swipes = reach[[contact.moves for contact in contacts]]
    why = []
    if config.augment is None:
        parallel = float((swipes.min(axis=1) < SAME).mean()) if len(swipes) else 0.0
        augment = parallel >= 0.5 and not (config.context_dim or config.distill)
        config = replace(config, augment=augment)
        cause = f"{parallel:.0%} of the swipes are parallel to an axis"
        if parallel >= 0.5 and not augment:
            cause = f"a mirrored gesture has no {'goal' if config.context_dim else 'lesson'}"
        why.append(f"augmentation {'on' if augment else 'off'}: {cause}")
    if config.max_contacts is None:
        held = np.bincount([contact.window for contact in contacts], minlength=max(len(seen), 1))
        most = int(np.quantile(held, 1 - RARE, method="higher").clip(1, MOST_CONTACTS))
        config = replace(config, max_contacts=most)
        share = f"{(held <= most).mean():.1%} of the windows hold no more"
        why.append(f"{most} contact{'s' * (most > 1)} in a window at most: {share}")
    if config.sigma_min is None:
        motions = reach[reach > SAME]
        smallest = float(np.quantile(motions, 0.1)) if len(motions) else 10 * COARSEST
        sigma_min = float(f"{min(max(smallest / 10, FINEST), COARSEST):.2g}")
        config = replace(config, sigma_min=sigma_min)
        cause = f"a tenth of the motions are below {smallest:.2g} of the screen"
        why.append(f"the steps end at sigma {sigma_min:g}: {cause}")
    config, more = _decide_denoiser(config, contacts, x_train.shape[1])
    return config, why + more


def _decide_denoiser(config: Any, contacts: list[Contact], frames: int) -> tuple[Any, list[str]]:
    """Decide shapes, curve_steps and patch_size, as `decided_by_data`."""
    why = []
    if config.shapes is None and not config.contacts:
        config = replace(config, shapes=0)
    elif config.shapes is None:
        polynomials = legendre_table(frames, POLYNOMIALS)
        missed = missed_by(polynomials, [contact.xy for contact in contacts])
        most_missed = float(np.quantile(missed.max(axis=1), 0.9)) if len(missed) else 0.0
        config = replace(config, shapes=SHAPES if most_missed > MISSED else 0)
        made = f"of {SHAPES} shapes of their own" if config.shapes else "polynomials"
        cause = f"polynomials miss a tenth of the contacts by {most_missed:.2g} of the screen"
        why.append(f"contacts are {made}: {cause} or more")
    if config.curve_steps is None:
        alone = config.contacts and config.max_contacts == 1
        config = replace(config, curve_steps=CURVE_STEPS if alone else 0)
        why += [f"curves end in {CURVE_STEPS} steps of their own: windows hold one contact"] * alone
    if config.patch_size is None:
        config = replace(config, patch_size=patch_size_for(frames))
    return config, why
