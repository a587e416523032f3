"""The table of protocols, in the order of the report.

    keyframes       recreate a gesture from its press edges, from pure noise
    denoise         recreate it from the gesture under noise
    generate        invent one from nothing
    realism         can it be told from a real one, and does it shake
    infill          complete it from the touch-down alone
    invert          encode it as noise by DDIM and decode it again
    baselines       what python -m evaluation.baselines has left: regression, VAE, look-up, chance
    quality         keyframes by type, by complexity level, and of the plan's patterns
    error           where the error sits: frame by frame, step by step
    excess_loss     the training loss above the irreducible one, by noise
    samplers        steps, sampler, eta: quality and latency
    frontier        model size against quality and latency, measured by benchmarks.frontier
    training        the record of the run
    local_tests     the plan's two tests on a Mac's CPU and on a GPU

To add a protocol, write its file and add its row here; to judge it, add its lines to CRITERIA.
"""

from evaluation.protocol import Protocol
from evaluation.protocols import (
    baselines,
    denoise,
    error,
    excess_loss,
    frontier,
    generate,
    infill,
    invert,
    keyframes,
    local_tests,
    quality,
    realism,
    samplers,
    training,
)

PROTOCOLS = (
    Protocol("keyframes", keyframes.run),
    Protocol("denoise", denoise.run, full={"num_ddim": 200}, quick={"num_ddim": 4}),
    Protocol("generate", generate.run, quick={"limit": 64}),
    Protocol(
        "realism",
        realism.run,
        full={"num": 1000, "num_recreated": 500, "steps": realism.STEPS},
        quick={"num": 200, "num_recreated": 64, "steps": (2, 10)},
    ),
    Protocol(
        "infill",
        infill.run,
        full={"num_conditions": 32, "num_samples": 16, "num_asked": 100},
        quick={"num_conditions": 8, "num_samples": 4, "num_asked": 32},
    ),
    Protocol(
        "invert",
        invert.run,
        full={"steps": invert.STEPS, "budget": 1500, "num_exact": 8},
        quick={"steps": (10, 20, 50), "budget": 100, "num_exact": 0},
    ),
    Protocol("baselines", baselines.run),
    Protocol("quality", quality.run, full={"num": 128}, quick={"num": 8}),
    Protocol(
        "error",
        error.run,
        full={"num_frames": 256, "num_steps": 128},
        quick={"num_frames": 8, "num_steps": 8},
    ),
    Protocol(
        "excess_loss",
        excess_loss.run,
        full={"num": 48, "num_bins": 20},
        quick={"num": 6, "num_bins": 6},
    ),
    Protocol(
        "samplers",
        samplers.run,
        full={"num": 96, "repeats": 9, "num_exact": 48},
        quick={"num": 8, "steps": (1, 2, 5, 10), "repeats": 2, "num_exact": 0},
    ),
    Protocol("frontier", frontier.run),
    Protocol("training", training.run, quick={"limits": False}),
    Protocol("local_tests", local_tests.run),
)
