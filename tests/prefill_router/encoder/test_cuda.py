"""Checks of what differs on CUDA; skipped without a device.

- The variable-length kernel equals causal softmax attention (float64), after a prefix and with grouped heads.
- The encoder in bfloat16 and float32 equals transformers in float32 on the CPU.
- A prompt's activations are the same in any batch, with and without a shared prefix.
- The kernel that sums each prompt's states is correct and does not modify them.
- A model that is divided between the GPU and the CPU equals transformers, too.
- Results copied while the device computes the next pack are complete.
- No layer makes the host wait for the device.
- The measured peak is that of the device.
"""

# T tokens of a pack, D hidden size

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from prefill_router.common.schema import NUM_TOKENS, activation_columns
from prefill_router.encoder import attention, placement
from prefill_router.encoder import prefill_encoder as encoder_module
from prefill_router.encoder.attention import KeyValue, PaddedAttention, VarlenAttention, attention_for
from prefill_router.encoder.checkpoint import load_causal_lm
from prefill_router.encoder.encoder_spec import EncoderSpec
from prefill_router.encoder.hardware import measured_peak_flops, preferred_dtype
from prefill_router.encoder.pack import Pack
from prefill_router.encoder.packed_backbone import PackedBackbone
from prefill_router.encoder.pooling import Pooler, PrefixSums
from prefill_router.encoder.prefill_encoder import PrefillEncoder
from reference import causal_softmax, hidden_states, relative_error
from tiny import SIZES, WORDS, random_prompts, save_tiny_model

pytestmark = pytest.mark.cuda

CUDA = torch.device("cuda")
NUM_LAYERS = SIZES["num_hidden_layers"]
# Relative L2 error: float16 rounding and the summation order of float32; the precision of bfloat16 over four layers.
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.03}
DTYPES = list(TOLERANCE)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a head size that every kernel supports, different from hidden size / heads."""
    from transformers import Qwen3Config

    sizes = SIZES | {"hidden_size": 128, "intermediate_size": 256, "initializer_range": 0.1}
    return save_tiny_model(tmp_path_factory.mktemp("cuda"), config=Qwen3Config(**sizes, head_dim=64))


def load(folder: Path, **options: Any) -> PrefillEncoder:
    return PrefillEncoder.load(EncoderSpec.model_validate({"model": str(folder), **options}), CUDA.type)


# --- attention ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "dtype"), [(VarlenAttention, torch.bfloat16), (PaddedAttention, torch.float32)])
@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (4, 1)])
@pytest.mark.parametrize("prefix_tokens", [0, 1, 64, 100])
@pytest.mark.parametrize("head_size", [64, 128])
def test_the_kernel_equals_causal_softmax_of_each_prompt(
    kind: Any, dtype: torch.dtype, heads: tuple[int, int], prefix_tokens: int, head_size: int
) -> None:
    """VarlenAttention relies on the kernel to align queries and keys at their ends."""
    if kind is VarlenAttention and attention.varlen_kernel() is None:
        pytest.skip("this torch has no variable-length kernel with grouped heads")
    num_heads, num_groups = heads
    for lengths in ([1], [63], [64], [65], [3, 1, 65, 64, 63, 130], [1000, 5]):
        torch.manual_seed(0)
        shape = (prefix_tokens + sum(lengths), num_heads + 2 * num_groups, head_size)
        projected = torch.randn(shape, device=CUDA).to(dtype)
        query, key, value = projected.split([num_heads, num_groups, num_groups], 1)
        shared, own = [t[:prefix_tokens] for t in (key, value)], [t[prefix_tokens:] for t in (query, key, value)]
        prefix = (shared[0], shared[1]) if prefix_tokens else None
        attended = kind(lengths, prefix_tokens, CUDA)(*own, prefix)
        expected = torch.cat(
            [
                causal_softmax(q, torch.cat((shared[0].double(), k)), torch.cat((shared[1].double(), v)))
                for q, k, v in zip(*(t.double().split(lengths) for t in own), strict=True)
            ]
        )
        error = (attended.double() - expected).norm() / expected.norm()
        assert error < (1e-5 if dtype == torch.float32 else 0.01), lengths


def test_the_kernel_is_used_if_available() -> None:
    kind = VarlenAttention if attention.varlen_kernel() else PaddedAttention
    assert type(attention_for([3, 5], 0, CUDA, torch.bfloat16)) is kind
    assert type(attention_for([3, 5], 0, CUDA, torch.float32)) is PaddedAttention


# --- the encoder -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mean_over", ["all", "after_first"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_layer_is_near_transformers_in_float32_on_the_cpu(folder: Path, dtype: str, mean_over: str) -> None:
    encoder, prompts = load(folder, dtype=dtype, mean_over=mean_over), [*random_prompts(20), "one"]
    assert isinstance(encoder.backbone, PackedBackbone)
    encoded = encoder.encode(prompts)
    first = int(mean_over == "after_first")
    for row, states in enumerate(hidden_states(folder, encoder.tokenize(prompts).ids)):
        for layer in range(NUM_LAYERS + 1):
            last, mean = (encoded[f"{pooling}_{layer:03d}"][row] for pooling in ("last", "mean"))
            assert relative_error(last, states[layer, -1]) < TOLERANCE[dtype]
            assert relative_error(mean, states[layer, first:].mean(0)) < TOLERANCE[dtype]


def test_hooks_give_what_transformers_gives(tmp_path: Path) -> None:
    from transformers import LlamaConfig

    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}  # is not packed
    encoder = load(save_tiny_model(tmp_path, config=LlamaConfig(**SIZES, rope_parameters=rope)), dtype="float32")
    assert not isinstance(encoder.backbone, PackedBackbone)
    prompts = random_prompts(20)
    encoded = encoder.encode(prompts)
    for row, states in enumerate(hidden_states(tmp_path, encoder.tokenize(prompts).ids)):
        for layer in range(NUM_LAYERS + 1):
            assert relative_error(encoded[f"mean_{layer:03d}"][row], states[layer].mean(0)) < TOLERANCE["float32"]


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_model_on_two_devices_is_near_transformers(folder: Path, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second one is the CPU, for a machine may have one GPU."""
    monkeypatch.setattr(placement, "gpus_of", lambda _device: [torch.device("cuda", 0), torch.device("cpu")])
    monkeypatch.setattr(placement, "activation_bytes", lambda _block, _tokens: 0)
    weights = placement.num_bytes(load_causal_lm(str(folder), None, getattr(torch, dtype)).backbone)
    monkeypatch.setattr(placement, "free_bytes", lambda _device: int(0.8 * weights))
    encoder, prompts = load(folder, dtype=dtype), random_prompts(20)
    assert len(encoder.devices) == 2
    encoded = encoder.encode(prompts)
    for row, states in enumerate(hidden_states(folder, encoder.tokenize(prompts).ids)):
        for layer in range(NUM_LAYERS + 1):
            assert relative_error(encoded[f"last_{layer:03d}"][row], states[layer, -1]) < TOLERANCE[dtype]
            assert relative_error(encoded[f"mean_{layer:03d}"][row], states[layer].mean(0)) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_prompt_is_the_same_in_fifty_random_batches(
    folder: Path, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder, rng = load(folder, dtype=dtype), np.random.default_rng(0)
    prompt = " ".join(rng.choice(WORDS, 30))
    alone = encoder.encode([prompt])
    for _ in range(50):
        monkeypatch.setitem(encoder_module.BUDGET_TOKENS, "cuda", int(rng.choice([128, 1024, 32768])))
        batch = [" ".join(rng.choice(WORDS, rng.integers(1, 200))) for _ in range(rng.integers(1, 40))]
        index = int(rng.integers(len(batch) + 1))
        batch.insert(index, prompt)
        for name, values in encoder.encode(batch).items():
            if name != NUM_TOKENS:
                assert relative_error(values[index], alone[name][0]) < TOLERANCE[dtype], name


@pytest.mark.parametrize("mean_over", ["all", "after_first"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_sharing_changes_no_activation(
    folder: Path, dtype: str, mean_over: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(encoder_module.BUDGET_TOKENS, "cuda", 256)
    encoder = load(folder, dtype=dtype, mean_over=mean_over)
    prompts = [f"{' '.join(WORDS * 3)} {prompt}" for prompt in random_prompts(30)]
    tokens = encoder.tokenize(prompts)
    together, work = encoder.forward(tokens, encoder.columns("all", ["last", "mean"]))
    assert work.computed_tokens < 0.5 * work.tokens
    for row, prompt in enumerate(prompts):
        for name, values in encoder.encode([prompt]).items():
            if name != NUM_TOKENS:
                assert relative_error(together[name][row], values[0]) < TOLERANCE[dtype], name


# --- pooling -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("leave_out_first", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pooling_equals_that_on_the_cpu_and_leaves_the_states(leave_out_first: bool, dtype: torch.dtype) -> None:
    """In float32, the summed states are the same tensor as the input of the next layer."""
    lengths = [1, 5, 2, 1, 300, 3]
    torch.manual_seed(0)
    shared, states = ((1e3 * torch.randn(n, 48)).to(dtype) for n in (7, sum(lengths)))
    columns = activation_columns([0], ["last", "mean"])
    for prefix_tokens in (0, 7):
        results = []
        for device in (torch.device("cpu"), CUDA):
            sums = PrefixSums(prefix_tokens, leave_out_first) if prefix_tokens else None
            if sums:
                sums.visit(0, shared.to(device))
            pooler, on_device = Pooler(columns, lengths, device, leave_out_first, sums), states.to(device)
            pooler.visit(0, on_device)
            assert torch.equal(on_device.cpu(), states)
            results.append(pooler.result().cpu().float())
        torch.testing.assert_close(results[1], results[0], rtol=2**-10, atol=1e-3)


# --- time --------------------------------------------------------------------------------------------------------


def test_results_copied_while_the_device_is_busy_are_whole(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The device is delayed before each of many packs, so that reading a result too early would show."""
    encoder, prompts = load(folder, dtype="bfloat16"), random_prompts(300)
    expected = encoder.encode(prompts)
    run = encoder.backbone.run

    def late(*args: Any, **options: Any) -> None:
        torch.cuda._sleep(20_000_000)  # cycles, about 10 ms
        run(*args, **options)

    monkeypatch.setattr(encoder.backbone, "run", late)
    monkeypatch.setitem(encoder_module.BUDGET_TOKENS, "cuda", 128)
    for name, values in encoder.encode(prompts).items():
        if name == NUM_TOKENS:
            np.testing.assert_array_equal(values, expected[name])
        else:
            assert relative_error(values, expected[name]).max() < TOLERANCE["bfloat16"], name


@pytest.fixture
def _waits_are_reported() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about a prototype feature
        torch.cuda.set_sync_debug_mode("warn")
    yield
    torch.cuda.set_sync_debug_mode("default")


def num_waits(encoder: PrefillEncoder, deepest: int, leave_out_first: bool, prefix: list[KeyValue] | None) -> int:
    """Counts how often the host waits for the device in one pack."""
    lengths = [5, 70, 1, 30]
    assert isinstance(encoder.backbone, PackedBackbone)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        pack = Pack.of([[7] * n for n in lengths], CUDA, prefix)
        sums = None
        if prefix:
            sums = PrefixSums(10, leave_out_first)
            for layer in range(deepest + 1):
                sums.visit(layer, torch.zeros(10, 128, device=CUDA))
        pooler = Pooler(activation_columns(range(deepest + 1), ["last", "mean"]), lengths, CUDA, leave_out_first, sums)
        encoder.backbone.run(pack, pooler.visit, deepest)
        pooler.result()
    return sum("synchroniz" in str(warning.message) for warning in caught)


@pytest.mark.usefixtures("_waits_are_reported")
@pytest.mark.parametrize("leave_out_first", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@torch.inference_mode()
def test_no_layer_waits_for_the_device(folder: Path, dtype: str, leave_out_first: bool) -> None:
    """Building a pack takes some waits; their number does not depend on the number of layers."""
    encoder = load(folder, dtype=dtype)
    assert isinstance(encoder.backbone, PackedBackbone)
    prefix: list[KeyValue] = []
    encoder.backbone.run(Pack.of([[7] * 10], CUDA), lambda _layer, _states: None, NUM_LAYERS, keep=prefix)
    for shared in (None, prefix):
        num_waits(encoder, NUM_LAYERS, leave_out_first, shared)  # warm-up: libraries initialise themselves
        one, every = (num_waits(encoder, deepest, leave_out_first, shared) for deepest in (1, NUM_LAYERS))
        assert one == every


def test_the_measured_peak_is_that_of_a_timed_product() -> None:
    peak = measured_peak_flops(CUDA, torch.bfloat16)
    a = torch.ones(4096, 4096, dtype=torch.bfloat16, device=CUDA)
    timed = []
    for _ in range(6):
        torch.cuda.synchronize()
        started = time.perf_counter()
        a @ a
        torch.cuda.synchronize()
        timed.append(time.perf_counter() - started)
    assert 1 / 3 < peak / (2 * 4096**3 / min(timed)) < 3


def test_the_preferred_dtype_is_bfloat16_from_ampere_on() -> None:
    is_ampere = torch.version.hip is not None or torch.cuda.get_device_capability() >= (8, 0)
    assert preferred_dtype("cuda") == ("bfloat16" if is_ampere else "float32")
