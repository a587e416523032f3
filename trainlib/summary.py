"""What a run prints: scores in a line, and at its end where everything is."""

from typing import Any

from trainlib.gestures import GESTURE_TYPES


def log_keys(split: str, scores: dict[str, float]) -> dict[str, float]:
    """Name scores as they are logged: `{split}/...`, two of them `sampling/...` as in the plan."""
    sampling = ("time_per_sample", "noise_reduction")
    return {f"{'sampling' if k in sampling else split}/{k}": v for k, v in scores.items()}


def score_line(scores: dict[str, float]) -> str:
    """Return the headline scores of the keyframes protocol as one line."""
    if "mse" not in scores:
        return "(no gesture has a press edge)"
    return (
        f"mse {scores['mse']:.1e}  snr {scores['mean_snr_db']:.1f} dB  "
        f"iou {scores['temporal_iou']:.3f}  spatial {scores['spatial_accuracy']:.3f}  "
        f"type {scores['gesture_type_accuracy']:.3f}"
    )


def generation_line(scores: dict[str, float]) -> str:
    """Return the scores of generated gestures as one line."""
    mix = ", ".join(f"{name} {scores[f'share_{name}']:.2f}" for name in GESTURE_TYPES)
    return f"one press {scores['one_press']:.3f}; {mix}"


def epoch_line(epoch: int, num_epochs: int, scalars: dict[str, Any]) -> str:
    """Return what an epoch, counted from 1, logged as one line."""
    scores = {key.removeprefix("val/"): value for key, value in scalars.items()}
    return (
        f"epoch {epoch:{len(str(num_epochs))}}/{num_epochs}  "
        f"loss {scalars['train/epoch_loss']:.4f}  val {scores['loss']:.4f}  {score_line(scores)}  "
        f"{scalars['train/epoch_s']:.1f}+{scalars['val/epoch_s']:.1f} s"
    )


def end_of_run(
    config: Any, checkpoint: Any, num: int, scores: dict[str, float], generated: dict[str, float]
) -> str:
    """Return the final scores of a run on `num` gestures, where it is, and what to do with it."""
    denoised = [
        f"{value:.5f} at {name.removeprefix('denoise_mse_sigma_')}"
        for name, value in scores.items()
        if name.startswith("denoise_mse_sigma_")
    ]
    return f"""
All {num} validation gestures, {config.num_inference_steps} steps, EMA weights:
  keyframes  {score_line(scores)}
  denoise    mse by sigma: {", ".join(denoised)}
  generate   {generation_line(generated)}

Run folder: {config.save_dir}
  resume    python train_diffusion_ddim.py --resume {config.save_dir}
  evaluate  python -m evaluation --checkpoint {checkpoint} --data_dir {config.val_data_dir} \\
                --output_dir {config.save_dir}/report
  sample    python train_diffusion_ddim.py --sample 32 --checkpoint {checkpoint} \\
                --output_dir {config.save_dir}/samples"""
