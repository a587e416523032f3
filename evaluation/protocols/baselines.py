"""baselines: what `python -m evaluation.baselines` has left beside the checkpoint, if it has."""

from collections.abc import Mapping

from evaluation.baselines_record import read_baselines, theory_of
from evaluation.estimates import Table
from evaluation.protocol import Section, Subject
from trainlib.errors import UserError, say

COLUMNS = {
    "mse": "MSE",
    "mse_ratio": "MSE / diffusion's",
    "r": "MSE / limit's",
    "valid": "valid",
    "press_softness": "press softness",
    "gesture_type_accuracy": "same type",
    "type_mix_error": "type mix error",
    "bits": "bits",
    "batch_1_ms": "ms each",
}


def run(s: Subject) -> list[Section]:
    """Read the baselines."""
    folders = [place for folder in s.folders for place in (folder, folder / "baselines")]
    paths = [path for folder in folders if (path := folder / "baselines.json").is_file()]
    if not paths:
        return []
    try:
        results = read_baselines(paths[0])
    except UserError as e:
        say(f"note: {e}")
        return []
    table = {
        f"{protocol}/{method}": row
        for protocol, rows in results["protocols"].items()
        for method, row in rows.items()
    }
    text = (
        "The same network, data and number of steps, trained to do something else: a regression "
        "that answers at once, and a VAE that sees the original. Theory says who must win where: "
        "a regression in MSE wherever several gestures fit, diffusion in validity. Measured beside "
        f"{results['about']['checkpoint']}, read from {paths[0]}."
    )
    title = "Baselines: regression, VAE, look-up, chance"
    claims = [
        {
            "protocol": p["protocol"],
            "metric": p["metric"],
            "theory": theory_of(p),
            "because": p["why"],
            "came out": p["came_out"],
        }
        for p in results["predictions"]
    ]
    shown = Section("baselines", table, title, text, COLUMNS, "protocol/method", claims=claims)
    return [shown, Section("baselines_lines", baselines_lines(results["protocols"]))]


def baselines_lines(baselines: Mapping[str, Table]) -> Table:
    """Take from the baselines' tables what the plan compares: their MSE over the model's.

    Args:
        baselines: the protocols of `baselines.read_baselines`.

    Returns:
        Of "model": regression, in keyframes; vae, the least at equal bits.
    """
    scores = {}
    regression = baselines.get("keyframes", {}).get("regression", {})
    if "mse_ratio" in regression:
        scores["regression"] = regression["mse_ratio"]
    ratios = [
        row["mse_ratio"]
        for name, table in baselines.items()
        if name.startswith("reconstruction") and "diffusion" in table
        for method, row in table.items()
        if method.startswith("vae")
    ]
    if ratios:
        scores["vae"] = min(ratios, key=lambda e: e.value)
    return {"model": scores} if scores else {}
