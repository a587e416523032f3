"""What is asked of a GPU, line by line: `python -m benchmarks.gpu` measures each."""

LINES: dict[str, dict[str, str]] = {  # stage: line: what is asked, if anything is
    "agreement": {
        "denoiser: largest difference to the CPU, model units": "≤ 1e-4",
        "10 steps from the same noise: the same, data units": "≤ 1e-3",
        "gradient of a training step: difference over norm": "≤ 1e-3",
    },
    "plan": {
        "plan: CUDA is found and the model moves to it": "yes",
        "plan: peak memory of 5 training steps, GB": "< 1",
        "plan: forward pass of 16, times faster than the CPU": "> 2",
        "plan: training ends without running out of memory": "yes",
        "plan: 8 gestures in 20 steps, s": "< 1, best < 0.5",
        "plan: one gesture recreated, ms": "< 10",
        "plan: one of 256 gestures recreated together, ms": "< 10",
    },
    "latency": {
        "one gesture in 1 step, ms": "",
        "one gesture in 2 steps, ms": "",
        "one gesture in 10 steps, ms": "2",
        "the same by a CUDA graph, ms": "2",
        "8 gestures in 20 steps, ms": "",
        "1,024 gestures in 10 steps, gestures a second": "",
    },
    "epoch": {
        "an epoch of the plan's 50-epoch command, s": "0.5",
        "validation after it, s": "",
        "peak memory, GB": "< 1",
    },
    "training": {
        "step of the default recipe, ms": "",
        "the same with --amp, ms": "",
        "its loss and gradient alone, ms": "",
        "the same by a CUDA graph, ms": "",
    },
    "compiled": {
        "step of the default recipe with --compile, ms": "",
        "the same with --amp --compile, ms": "",
    },
    "tests": {
        "GPU tests of the suite: passed": "",
        "GPU tests of the suite: failed": "0",
        "GPU tests of the suite: skipped, for want of a package": "",
    },
    "preset": {
        "--preset gpu: epochs that fitted": "",
        "--preset gpu: an epoch, s": "",
        "--preset gpu: keyframes, dB": "",
        "--preset gpu: valid of 1,000 drawn": "",
    },
}
