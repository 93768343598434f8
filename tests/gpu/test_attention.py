"""Attention on GPUs: forward and backward against the dense reference in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import tasp_coll
from attention_cases import CASES, Case, check
from gpu_arrays import Place


@pytest.fixture
def device(place: Place) -> str:
    if not place.has_torch:
        pytest.skip("this torch sees no GPU: install one built for CUDA")
    return place.torch_device


@pytest.mark.parametrize("case", [CASES[0], CASES[1], CASES[5], CASES[9]], ids=repr)
def test_equals_the_dense_reference(comm: tasp_coll.Communicator, device: str, case: Case) -> None:
    check(comm, replace(case, heads=8, head_dim=16, device=device))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("is_causal", [False, True])
def test_half_precision(comm: tasp_coll.Communicator, device: str, dtype: torch.dtype, is_causal: bool) -> None:
    check(comm, Case(1024, is_causal=is_causal, heads=8, kv_heads=8, head_dim=128, dtype=dtype, device=device))
