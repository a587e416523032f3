"""Take a trained denoiser to a planner: `python -m export`, then runtime.py."""
