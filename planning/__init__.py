"""Is diffusion a better optimizer for the planner? A GUI world, its tasks, planners, a planner API.

`python -m planning` runs the benchmark; docs/PLANNING.md holds what came out.
"""
