"""What only a GPU can show: `pytest --gpu`. Every case of the first half of benchmarks/gpu.py is a test, in a process
of its own, and must keep its limits."""

import importlib.util
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
spec = importlib.util.spec_from_file_location("gpu", ROOT / "benchmarks" / "gpu.py")
gpu = importlib.util.module_from_spec(spec)
spec.loader.exec_module(gpu)


@pytest.mark.parametrize("name", gpu.HALVES[1])
def test_case(name, tmp_path, monkeypatch):
    if not torch.cuda.is_available():
        pytest.skip("torch finds no GPU here")
    monkeypatch.setenv("GPU_SCRATCH", str(tmp_path))
    row = gpu.run_case(name, False, gpu.CASES[name][2], tmp_path)
    assert row["ok"], gpu.describe(row)
