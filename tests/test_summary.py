"""The lines that a run prints say what was measured, under the names that are logged.

Why: a user reads them first, and often nothing else.

    python -m pytest tests/test_summary.py
"""

from types import SimpleNamespace

from trainlib.gestures import GESTURE_TYPES
from trainlib.summary import end_of_run, epoch_line, generation_line, log_keys, score_line

SCORES = {
    **{"mse": 1.234e-3, "mean_snr_db": 21.26, "temporal_iou": 0.98765, "loss": 0.5},
    **{"spatial_accuracy": 0.5, "gesture_type_accuracy": 0.25},
    **{"denoise_mse_sigma_0.2": 0.001234, "time_per_sample": 0.1},
}
GENERATED = {"one_press": 0.75} | {f"share_{name}": 0.1 * i for i, name in enumerate(GESTURE_TYPES)}


def test_scores_are_logged_by_the_plans_names():
    keys = log_keys("val", {"mse": 1.0, "time_per_sample": 2.0, "noise_reduction": 3.0})
    assert keys == {"val/mse": 1, "sampling/time_per_sample": 2, "sampling/noise_reduction": 3}


def test_the_headline_in_a_line():
    line = "mse 1.2e-03  snr 21.3 dB  iou 0.988  spatial 0.500  type 0.250"
    assert score_line(SCORES) == line
    assert score_line({"loss": 1.0}) == "(no gesture has a press edge)"
    scalars = {"train/epoch_loss": 0.25, "train/epoch_s": 2.04, "val/epoch_s": 0.5}
    scalars |= log_keys("val", SCORES)
    assert epoch_line(3, 45, scalars) == f"epoch  3/45  loss 0.2500  val 0.5000  {line}  2.0+0.5 s"


def test_shares_in_the_order_of_the_table():
    mix = ", ".join(f"{name} {0.1 * i:.2f}" for i, name in enumerate(GESTURE_TYPES))
    assert generation_line(GENERATED) == f"one press 0.750; {mix}"


def test_the_end_names_the_folder_and_the_next_commands():
    config = SimpleNamespace(num_inference_steps=10, save_dir="runs/a", val_data_dir="set/val")
    text = end_of_run(config, "runs/a/x.pth", 7, SCORES, GENERATED)
    for words in (
        "All 7 validation gestures, 10 steps",
        "mse by sigma: 0.00123 at 0.2",
        "--resume runs/a\n",
        "python -m evaluation --checkpoint runs/a/x.pth --data_dir set/val",
        "--sample 32 --checkpoint runs/a/x.pth",
        score_line(SCORES),
        generation_line(GENERATED),
    ):
        assert words in text
