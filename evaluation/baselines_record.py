"""baselines.json and baselines.md: what was measured of the baselines, written and read."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from evaluation.criteria import PLAN_LINES
from evaluation.estimates import Table, format_estimate, tables_from_json, tables_to_json
from evaluation.report import flatten_about
from evaluation.theory import judge_predictions
from trainlib.errors import UserError
from trainlib.files import write_json, write_text
from trainlib.gestures import GESTURE_TYPES
from trainlib.tables import format_number, markdown_table

BASELINES_FORMAT = 1
TYPE_SHARES = tuple(f"share_{name}" for name in GESTURE_TYPES)
SEES = """\
    diffusion           the checkpoint: given frames, or x_t; a sample of its usual number of steps
    diffusion_one_shot  the checkpoint: x_t, one evaluation, no sampling
    regression          two networks of the checkpoint's size that answer in one evaluation and
                        minimise the MSE of x_0. In keyframes, infill and generate: the given
                        frames alone, drawn in training as for the checkpoint; x_t is a ramp, t is
                        T - 1. In denoise: x_t at a known, in training random, t; no loss weights
    vae_beta_*          encodes the whole original, decodes a sample of the latent; in generate
                        it decodes noise of the prior
    nearest_training_item   a lookup with what the model sees: the given frames, x_t, the original
    random_training_item    nothing: "random sampling"
    interpolation       keyframes of gestures of an unknown distribution: no limit there
    limit               keyframes: interpolation. denoise, infill: the exact posterior mean, of
                        least MSE. generate: the validation set"""
SHOWN = {
    "keyframes": (*PLAN_LINES, "mse_ratio"),
    "denoise": ("mse", "r", "mse_ratio", "valid"),
    "infill": ("mse", "r", "mse_ratio", "valid", "press_softness", "type_mix_error"),
    "generate": (
        *("valid", "one_press", "press_softness", "type_mix_error"),
        *(*TYPE_SHARES, "share_copies"),
    ),
    "reconstruction": ("bits", "sigma", "mse", "mse_ratio", "valid"),
    "cost": ("parameters", "batch_1_ms"),
}


def read_baselines(path: Path) -> dict[str, Any]:
    """Read baselines.json.

    Returns:
        format; about; protocols: protocol -> method -> metric -> Estimate; predictions: the rows
        of `judge_predictions`.

    Raises:
        UserError: missing, no JSON, or not of this format.
    """
    try:
        results = json.loads(path.read_text("utf-8"))
        if results["format"] != BASELINES_FORMAT:
            raise ValueError(f"format {results['format']}")
        results["protocols"] = tables_from_json(results["protocols"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise UserError(f"cannot read {path} ({e}); run python -m evaluation.baselines") from None
    return results


def theory_of(prediction: Mapping[str, Any]) -> str:
    """Return a prediction in words."""
    verb = "or" if prediction["is_open"] else "beats"
    return f"{prediction['first']} {verb} {prediction['second']}"


def baselines_table(tables: Mapping[str, Table], *, interval: bool = True) -> str:
    """Return the one table across protocols: a metric a row, a method a column."""
    methods = list(dict.fromkeys(method for table in tables.values() for method in table))
    methods.sort(key=_column)
    rows = []
    for protocol, table in tables.items():
        for metric in SHOWN[protocol.split("_")[0]]:
            cells = [table.get(method, {}).get(metric) for method in methods]
            shown = [format_estimate(cell, interval=interval) for cell in cells]
            if any(cells):
                rows.append([protocol, metric, *shown])
    return markdown_table(["protocol", "metric", *methods], rows)


def _column(method: str) -> int:
    """Return where a method stands in the table."""
    order = "diffusion diffusion_one_shot regression vae nearest random interpolation limit".split()
    return max(i for i, name in enumerate(order) if method.startswith(name))


def predictions_table(predictions: Sequence[Mapping[str, Any]]) -> str:
    """Return theory beside outcome, a comparison a row."""
    rows = []
    for p in predictions:
        values = [math.nan if p[k] is None else p[k] for k in ("first_value", "second_value")]
        numbers = " : ".join(format_number(value) for value in values)
        rows.append([p["protocol"], p["metric"], theory_of(p), p["why"], numbers, p["came_out"]])
    header = ["protocol", "metric", "theory", "because", "values", "came out"]
    return markdown_table(header, rows)


def baselines_markdown(results: Mapping[str, Any]) -> str:
    """Return baselines.md from what `read_baselines` returned."""
    about = flatten_about(results["about"])
    pages = [
        f"# Baselines beside {results['about']['checkpoint']}",
        "\n".join(f"- {key}: {value}" for key, value in about.items()),
        f"What each method sees:\n\n{SEES}",
        "## All protocols, with 95 % intervals",
        "r is the MSE over that of the limit, mse_ratio over that of diffusion, both on the same "
        "gestures; sigma is the noise that leaves as many bits of x_0 as the VAE sends.",
        baselines_table(results["protocols"]),
        "## Theory and outcome",
        predictions_table(results["predictions"]),
    ]
    return "\n\n".join(pages) + "\n"


def write_baselines(folder: Path, about: dict[str, Any], tables: dict[str, Table]) -> str:
    """Write baselines.json and baselines.md into an existing folder; return what to print."""
    results = {
        "format": BASELINES_FORMAT,
        "about": about,
        "protocols": tables_to_json(tables),
        "predictions": judge_predictions(tables),
    }
    write_json(folder / "baselines.json", results)
    read = read_baselines(folder / "baselines.json")
    write_text(folder / "baselines.md", baselines_markdown(read))
    table = baselines_table(read["protocols"], interval=False)
    return f"{table}\n\n{predictions_table(read['predictions'])}"
