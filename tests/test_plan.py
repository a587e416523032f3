"""Every command and snippet of the user's two documents, word for word.

Why: what is written in `diffusion_test_plan.md` and `README_of_the_pack.md` is the contract. The
commands run in a copy of the project's root as they stand, by bash; only `cd` lines are left out.
Snippets about data sets are in tests/test_augmentation.py; those with defects that
could not work as written (DDPMScheduler(), metrics of unrelated samples) are not repeated.

    python -m pytest tests/test_plan.py
"""

import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, make_gestures, read_jsonl
from torch.utils.data import DataLoader

import train_diffusion_ddim as tdd
from augmentation.click_aug import generate_augmented_dataset
from trainlib.gestures import GESTURE_TYPES
from trainlib.metrics import classify_gestures

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")

IMPORTS = """
from train_diffusion_ddim import PositionalEncoding, TimestepEmbedding
from train_diffusion_ddim import MinimalDiffusionTransformer, DDIMScheduler, DiffusionActionDataset
from train_diffusion_ddim import compute_reconstruction_metrics, visualize_action_sequences
from train_diffusion_ddim import visualize_noise_comparison, train_diffusion_model
from train_diffusion_ddim import comprehensive_evaluation, compute_temporal_iou
from train_diffusion_ddim import compute_spatial_accuracy, compute_gesture_type_accuracy
from augmentation.click_aug import generate_augmented_dataset
"""

CPU_STEP_1 = r"""
python -m augmentation.generate_click_dataset \
    --output_dir test_data_mini/train \
    --num_sequences 10 \
    --sequences_per_file 10 \
    --action_type mixed

python -m augmentation.generate_click_dataset \
    --output_dir test_data_mini/val \
    --num_sequences 5 \
    --sequences_per_file 5 \
    --action_type mixed
"""

CPU_STEP_2 = r"""
python -c "
import torch
from train_diffusion_ddim import MinimalDiffusionTransformer, DDIMScheduler

# Test model instantiation
model = MinimalDiffusionTransformer(d_model=32, num_layers=2, nhead=2)
scheduler = DDIMScheduler(num_timesteps=100)
print(f'Model created: {sum(p.numel() for p in model.parameters())} params')

# Test forward pass
x = torch.randn(2, 250, 3)  # 2 sequences
t = torch.randint(0, 100, (2,))
noise_pred = model(x, t)
print(f'Forward pass: {x.shape} -> {noise_pred.shape}')

# Test DDIM sampling
sampled = scheduler.sample(model, (1, 250, 3), 'cpu', num_inference_steps=5)
print(f'DDIM sampling: {sampled.shape}, range: [{sampled.min():.3f}, {sampled.max():.3f}]')
"
"""

CPU_STEP_3 = r"""
python train_diffusion_ddim.py \
    --data_dir test_data_mini/train \
    --val_data_dir test_data_mini/val \
    --batch_size 2 \
    --num_epochs 3 \
    --lr 1e-3 \
    --d_model 32 \
    --num_layers 2 \
    --nhead 2 \
    --wandb_project ddim-mac-test \
    --device cpu
"""

CPU_STEP_4 = r"""
python -c "
import torch
import numpy as np
from train_diffusion_ddim import compute_reconstruction_metrics, DDIMScheduler

# Create dummy data
original = torch.rand(3, 250, 3) * 0.8 + 0.1  # [0.1, 0.9] range
reconstructed = original + torch.randn_like(original) * 0.05  # Add small noise
scheduler = DDIMScheduler()

# Test all metrics
metrics = compute_reconstruction_metrics(original, reconstructed, scheduler)
for k, v in metrics.items():
    print(f'{k}: {v:.4f}')
"
"""

CUDA_STEP_2 = r"""
python -c "
import torch
from train_diffusion_ddim import MinimalDiffusionTransformer, DDIMScheduler

if not torch.cuda.is_available():
    print('❌ CUDA not available')
    exit(1)

device = torch.device('cuda')
print(f'✅ Using GPU: {torch.cuda.get_device_name()}')

# Test model on GPU
model = MinimalDiffusionTransformer(d_model=128, num_layers=4, nhead=4).to(device)
scheduler = DDIMScheduler()
print(f'Model GPU memory: {torch.cuda.memory_allocated()/1e6:.1f}MB')

# Test forward pass with larger batch
x = torch.randn(16, 250, 3, device=device)
t = torch.randint(0, 1000, (16,), device=device)
noise_pred = model(x, t)
print(f'Forward pass memory: {torch.cuda.memory_allocated()/1e6:.1f}MB')

# Test DDIM sampling speed
import time
start = time.time()
sampled = scheduler.sample(model, (8, 250, 3), device, num_inference_steps=20)
elapsed = time.time() - start
print(f'DDIM sampling: {elapsed:.2f}s for 8 sequences (20 steps)')
torch.cuda.empty_cache()
"
"""

CUDA_STEP_3 = r"""
python train_diffusion_ddim.py \
    --data_dir test_data_mini/train \
    --val_data_dir test_data_mini/val \
    --batch_size 16 \
    --num_epochs 5 \
    --lr 2e-4 \
    --d_model 128 \
    --num_layers 4 \
    --nhead 4 \
    --wandb_project ddim-cuda-test \
    --device cuda
"""

CUDA_STEP_4 = r"""
python -c "
import torch
from train_diffusion_ddim import MinimalDiffusionTransformer

device = torch.device('cuda')
model = MinimalDiffusionTransformer(d_model=128, num_layers=4, nhead=4).to(device)

# Test different batch sizes
for batch_size in [4, 8, 16, 32]:
    try:
        x = torch.randn(batch_size, 250, 3, device=device)
        t = torch.randint(0, 1000, (batch_size,), device=device)
        _ = model(x, t)
        mem_mb = torch.cuda.memory_allocated() / 1e6
        print(f'Batch {batch_size}: {mem_mb:.1f}MB')
        torch.cuda.empty_cache()
    except RuntimeError as e:
        print(f'Batch {batch_size}: OOM - {str(e)[:50]}...')
        break
"
"""

GENERATE = r"""
mkdir -p diffusion_test_data/{train,val}

# Generate training data (5K mixed actions)
python -m augmentation.generate_click_dataset \
    --output_dir diffusion_test_data/train \
    --num_sequences 5000 \
    --action_type mixed \
    --min_delta_t_pct 0.02 \
    --max_delta_t_pct 0.3

# Generate validation data (1K mixed actions)
python -m augmentation.generate_click_dataset \
    --output_dir diffusion_test_data/val \
    --num_sequences 1000 \
    --action_type mixed \
    --min_delta_t_pct 0.02 \
    --max_delta_t_pct 0.3
"""

LAUNCH = r"""
python train_diffusion_ddim.py \
    --data_dir diffusion_test_data/train \
    --val_data_dir diffusion_test_data/val \
    --batch_size 64 \
    --num_epochs 50 \
    --lr 2e-4 \
    --d_model 64 \
    --num_layers 3 \
    --nhead 4 \
    --wandb_project action-ddim-test
"""

README_GPU = r"""
python train_diffusion_ddim.py \
    --data_dir ../data_aug/train \
    --val_data_dir ../data_aug/val \
    --batch_size 64 \
    --num_epochs 50 \
    --lr 2e-4 \
    --d_model 64 \
    --num_layers 3 \
    --nhead 4 \
    --wandb_project action-ddim-real \
    --device cuda
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A project root without data: links to the script and the generator, and a `python`."""
    folder = tmp_path_factory.mktemp("plan") / "diffusion_pack"
    (folder / "bin").mkdir(parents=True)
    for name in ("train_diffusion_ddim.py", "augmentation", "trainlib"):
        (folder / name).symlink_to(ROOT / name)
    python = folder / "bin" / "python"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    return folder


@pytest.fixture(scope="module")
def bash(root):
    """Return f(text): run lines of the documents by bash in `root`; its stdout."""

    def run(text, timeout=200):
        path = f"{root / 'bin'}{os.pathsep}{os.environ['PATH']}"
        done = subprocess.run(
            ["bash", "-euc", text],
            cwd=root,
            env={**os.environ, "PATH": path, "WANDB_MODE": "disabled"},
            capture_output=True,
            text=True,
            timeout=timeout,
            stdin=subprocess.DEVNULL,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


@pytest.fixture(scope="module")
def mini_data(bash, root):
    """Step 1."""
    bash(CPU_STEP_1)
    return root / "test_data_mini"


def run_folders(root):
    return {path.parent for path in root.glob("runs/*/config.json")}


def test_imports():
    exec(IMPORTS, {})


def test_cpu_step_1(mini_data):
    for split, num in (("train", 10), ("val", 5)):
        assert tdd.DiffusionActionDataset(mini_data / split).sequences.shape == (num, 250, 3)
        assert len(list((mini_data / split).glob("*_actions.npy"))) == 1


def test_cpu_step_2(bash):
    out = bash(CPU_STEP_2)
    assert "Model created: 42339 params" in out
    assert "Forward pass: torch.Size([2, 250, 3]) -> torch.Size([2, 250, 3])" in out
    low, high = map(float, re.search(r"range: \[(.*), (.*)\]", out).groups())
    assert "DDIM sampling: torch.Size([1, 250, 3])" in out and 0 <= low < high <= 1


def test_cpu_step_3(bash, root, mini_data):
    before = run_folders(root)
    bash(CPU_STEP_3)
    (run,) = run_folders(root) - before
    config = json.loads((run / "config.json").read_text())
    assert config["wandb_project"] == "ddim-mac-test" and config["d_model"] == 32
    assert (run / "diffusion_checkpoint_epoch_2.pth").exists()
    rows = [row for row in read_jsonl(run / "metrics.jsonl") if "train/epoch_loss" in row]
    # the plan: "loss decreases"; at fixed noise, since ten draws of t decide the training loss
    losses = [row["val/loss"] for row in rows]
    assert len(losses) == 3 and losses[2] < losses[1] < losses[0]


def test_cpu_step_4(bash):
    lines = dict(line.split(": ") for line in bash(CPU_STEP_4).splitlines())
    assert len(lines) >= 19
    assert float(lines["mse"]) == pytest.approx(0.05**2, rel=0.15)
    assert float(lines["mean_snr_db"]) > 20  # the plan's expected results
    for c in "xyp":
        assert float(lines[f"variance_ratio_{c}"]) == pytest.approx(1, abs=0.15)


def test_generating_the_training_data(bash, root):
    bash(GENERATE)
    for split in ("train", "val"):
        ours = ROOT / "diffusion_test_data" / split
        for path in ours.glob("*_actions.npy"):
            made = root / "diffusion_test_data" / split / path.name
            assert made.read_bytes() == path.read_bytes()


README_CPU = CPU_STEP_3.replace("ddim-mac-test", "ddim-test")  # the pack's; else the same
COMMANDS = {"cuda": CUDA_STEP_3, "plan": LAUNCH, "pack": README_GPU, "pack, cpu": README_CPU}


@pytest.mark.parametrize("name", COMMANDS)
def test_commands_are_understood(name):
    argv = COMMANDS[name].replace("\\\n", " ").split()[2:]
    given = vars(tdd.parse_args(argv))
    assert given.keys() == {flag.removeprefix("--") for flag in argv[::2]}
    config = tdd.TrainConfig(**given)
    assert [str(given[flag.removeprefix("--")]) for flag in argv[::2] if flag != "--lr"] == [
        value for flag, value in zip(argv[::2], argv[1::2], strict=True) if flag != "--lr"
    ]
    assert config.lr == (1e-3 if name == "pack, cpu" else 2e-4)


def test_the_default_model_trains_and_is_evaluated_as_in_the_plan(tmp_path):
    # the plan's main(), sizes apart: a default model, the plan's scheduler, plain loaders
    model = tdd.MinimalDiffusionTransformer(d_model=16, num_layers=1, nhead=2)
    scheduler = tdd.DDIMScheduler()
    train_loader = DataLoader(list(make_gestures(6, 250)), batch_size=3, shuffle=True)
    val_loader = DataLoader(list(make_gestures(4, 250, seed=1)), batch_size=3, shuffle=False)
    before = [p.clone() for p in model.parameters()]
    tdd.train_diffusion_model(
        model=model,
        scheduler=scheduler,
        train_loader=train_loader,
        val_loader=val_loader,
        num_epochs=2,
        lr=1e-3,
        device="cpu",
        save_dir=tmp_path / "checkpoints",
    )
    assert any(not torch.equal(p, q) for p, q in zip(before, model.parameters(), strict=True))
    assert (tmp_path / "checkpoints" / "diffusion_checkpoint_epoch_1.pth").exists()
    rows = read_jsonl(tmp_path / "checkpoints" / "metrics.jsonl")
    assert "val/mse" in rows[-2] and math_is_finite(rows[-2]["val/mse"])

    results = tdd.comprehensive_evaluation(model, scheduler, val_loader, "cpu")
    names = "reconstruction_quality action_timing_accuracy spatial_accuracy".split()
    for name in [*names, "gesture_type_preservation"]:
        assert math_is_finite(results[f"{name}_mean"]) and results[f"{name}_std"] >= 0


def math_is_finite(value):
    return isinstance(value, float) and bool(np.isfinite(value))


def test_the_plans_call_signatures():
    model = tdd.MinimalDiffusionTransformer(3, 250, 16, 2, 1, 32, 0.1, 1000).eval()
    scheduler = tdd.DDIMScheduler(1000, 1e-4, 2e-2)
    x_0 = make_gestures(2, 250)
    t = torch.randint(0, scheduler.num_timesteps, (2,))
    x_t, noise = scheduler.add_noise(x_0, t)
    assert torch.equal(scheduler.add_noise(x_0, t, noise)[0], x_t)
    x_prev, pred_x0 = scheduler.ddim_step(model, x_t, t, t - 1, eta=0.0)
    sampled = scheduler.sample(model, x_0.shape, "cpu", num_inference_steps=3, eta=0.5)
    for x in (x_prev, pred_x0, sampled):
        assert x.shape == x_0.shape and x.isfinite().all()
    assert scheduler.get_variance(x_0).shape == (3,)
    scores = tdd.compute_reconstruction_metrics(x_0, sampled, scheduler)
    assert scores["mse"] == pytest.approx(((x_0 - sampled) ** 2).mean().item(), rel=1e-5)
    figure = tdd.visualize_action_sequences(
        x_0.cpu().numpy(),
        sampled.cpu().numpy(),
        x_t.cpu().numpy(),
        title_prefix="Epoch 0",
        max_samples=2,
    )
    assert figure.axes
    active = (x_0[:, :, 2] > 0.5).float(), (sampled[:, :, 2] > 0.5).float()
    assert 0 <= tdd.compute_temporal_iou(*active) <= 1
    assert 0 <= tdd.compute_spatial_accuracy(x_0, sampled, threshold=0.1) <= 1
    assert 0 <= tdd.compute_gesture_type_accuracy(x_0, sampled) <= 1


@pytest.mark.parametrize("action_type", ["click", "swipe", "mixed"])
def test_the_plans_data_reach_the_loader(tmp_path, action_type):
    generate_augmented_dataset(
        output_dir=str(tmp_path / "set"),
        num_sequences=12,
        action_type=action_type,
        min_delta_t=5,
        max_delta_t=40,
    )
    x = torch.stack(list(tdd.DiffusionActionDataset(tmp_path / "set", seq_len=250)))
    kinds = {GESTURE_TYPES[i] for i in classify_gestures(x)}
    if action_type == "click":
        assert kinds == {"click"}
    else:
        assert len(kinds) > 1 and "none" not in kinds


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("step", [CUDA_STEP_2, CUDA_STEP_3, CUDA_STEP_4], ids=["2", "3", "4"])
def test_cuda_steps(bash, mini_data, step):
    out = bash(step)
    assert "OOM" not in out
    speed = re.search(r"DDIM sampling: (.*)s for 8", out)
    assert speed is None or float(speed.group(1)) < 1  # the plan's criterion


@pytest.mark.gpu
@pytest.mark.slow
@needs_cuda
@pytest.mark.parametrize("command", [LAUNCH, README_GPU], ids=["plan", "pack"])
def test_long_commands_on_cuda(bash, root, command):
    data = root.parent / "data_aug"
    if not data.exists():
        data.symlink_to(ROOT / "diffusion_test_data")
    if not (root / "diffusion_test_data").exists():
        (root / "diffusion_test_data").symlink_to(ROOT / "diffusion_test_data")
    assert "epoch 50/50" in bash(command, timeout=290)
