"""The DiT against the original's key names and shapes, written by hand, and a float64 numpy forward."""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from ebcache_fast.errors import InputError
from ebcache_fast.models.embeddings import position_embedding, timestep_embedding
from ebcache_fast.models.modules import DIT_MODELS, DiT

Array = np.ndarray[Any, np.dtype[np.float64]]
State = dict[str, Array]

TINY: dict[str, Any] = dict(
    input_size=6, patch_size=2, in_channels=4, hidden_size=16, depth=2, num_heads=4, num_classes=5
)
PARAMETERS_XL2 = 675_129_632  # with pos_embed, at 256 pixels


def randomised(model: DiT, seed: int = 0) -> DiT:
    """The model in float64 and evaluation mode with random values everywhere, the zeroed layers included."""
    generator = torch.Generator().manual_seed(seed)
    model = model.double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.3)
    return model


@pytest.fixture
def on_meta(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Sizes without memory. Normal draws are left out, because there they make torch import its compiler."""
    monkeypatch.setattr(nn.init, "normal_", lambda tensor, **kwargs: tensor)
    with torch.device("meta"):
        yield


def inputs(rows: int, channels: int = 4, side: int = 6, seed: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, channels, side, side, generator=generator, dtype=torch.float64)
    t = torch.randint(0, 1000, (rows,), generator=generator)
    return x, t, torch.randint(0, 6, (rows,), generator=generator)


# --- Names and shapes


def original_shapes(
    *, patch: int, channels: int, width: int, depth: int, labels: int, tokens: int, out: int
) -> dict[str, tuple[int, ...]]:
    """The state dict of the original, key by key; ``labels`` counts the null label, ``out`` the channels."""
    shapes: dict[str, tuple[int, ...]] = {
        "pos_embed": (1, tokens, width),
        "x_embedder.proj.weight": (width, channels, patch, patch),
        "x_embedder.proj.bias": (width,),
        "t_embedder.mlp.0.weight": (width, 256),
        "t_embedder.mlp.0.bias": (width,),
        "t_embedder.mlp.2.weight": (width, width),
        "t_embedder.mlp.2.bias": (width,),
        "y_embedder.embedding_table.weight": (labels, width),
    }
    for i in range(depth):
        shapes |= {
            f"blocks.{i}.attn.qkv.weight": (3 * width, width),
            f"blocks.{i}.attn.qkv.bias": (3 * width,),
            f"blocks.{i}.attn.proj.weight": (width, width),
            f"blocks.{i}.attn.proj.bias": (width,),
            f"blocks.{i}.mlp.fc1.weight": (4 * width, width),
            f"blocks.{i}.mlp.fc1.bias": (4 * width,),
            f"blocks.{i}.mlp.fc2.weight": (width, 4 * width),
            f"blocks.{i}.mlp.fc2.bias": (width,),
            f"blocks.{i}.adaLN_modulation.1.weight": (6 * width, width),
            f"blocks.{i}.adaLN_modulation.1.bias": (6 * width,),
        }
    return shapes | {
        "final_layer.linear.weight": (patch * patch * out, width),
        "final_layer.linear.bias": (patch * patch * out,),
        "final_layer.adaLN_modulation.1.weight": (2 * width, width),
        "final_layer.adaLN_modulation.1.bias": (2 * width,),
    }


def shapes_of(model: DiT) -> dict[str, tuple[int, ...]]:
    return {name: tuple(weight.shape) for name, weight in model.state_dict().items()}


def test_state_dict_is_the_originals() -> None:
    expected = original_shapes(patch=2, channels=4, width=16, depth=2, labels=6, tokens=9, out=8)
    assert shapes_of(DiT(**TINY)) == expected


def test_state_dict_without_learned_sigma_and_label_dropout() -> None:
    expected = original_shapes(patch=2, channels=4, width=16, depth=2, labels=5, tokens=9, out=4)
    assert shapes_of(DiT(**TINY, learn_sigma=False, class_dropout_prob=0.0)) == expected


@pytest.mark.usefixtures("on_meta")
def test_xl2_is_the_originals() -> None:
    model = DIT_MODELS["DiT-XL/2"](input_size=32)
    assert {weight.device.type for weight in model.state_dict().values()} == {"meta"}
    expected = original_shapes(patch=2, channels=4, width=1152, depth=28, labels=1001, tokens=256, out=8)
    assert shapes_of(model) == expected
    assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS_XL2
    assert sum(math.prod(shape) for shape in expected.values()) == PARAMETERS_XL2
    assert model.num_heads == 16


def test_factory_names() -> None:
    assert set(DIT_MODELS) == {f"DiT-{size}/{patch}" for size in ("XL", "L", "B", "S") for patch in (2, 4, 8)}


@pytest.mark.usefixtures("on_meta")
@pytest.mark.parametrize(
    ("name", "depth", "width", "heads"),
    [("DiT-L/4", 24, 1024, 16), ("DiT-B/8", 12, 768, 12), ("DiT-S/2", 12, 384, 6)],
)
def test_factories(name: str, depth: int, width: int, heads: int) -> None:
    model = DIT_MODELS[name](input_size=16, num_classes=10)
    assert (len(model.blocks), model.pos_embed.shape[2], model.num_heads) == (depth, width, heads)
    assert model.patch_size == int(name[-1])
    assert model.y_embedder.embedding_table.num_embeddings == 11


def test_only_pos_embed_is_not_trained() -> None:
    assert [name for name, p in DiT(**TINY).named_parameters() if not p.requires_grad] == ["pos_embed"]


# --- The forward, from the paper, one sample and one patch at a time


def numpy_timestep(t: float) -> Array:
    frequencies = [10_000.0 ** (-k / 128) for k in range(128)]
    return np.array([math.cos(t * f) for f in frequencies] + [math.sin(t * f) for f in frequencies])


def numpy_positions(side: int, width: int) -> Array:
    """Channels: sin and cos of the column, then sin and cos of the row; tokens row by row -> (T, D)."""
    table = np.zeros((side * side, width))
    quarter = width // 4
    for row in range(side):
        for column in range(side):
            for k in range(quarter):
                omega = 10_000.0 ** (-k / quarter)
                parts = (math.sin(column * omega), math.cos(column * omega))
                parts += (math.sin(row * omega), math.cos(row * omega))
                for part, value in enumerate(parts):
                    table[row * side + column, part * quarter + k] = value
    return table


def silu(z: Array) -> Array:
    return z / (1 + np.exp(-z))


def tanh_gelu(z: Array) -> Array:
    return 0.5 * z * (1 + np.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))


def norm(h: Array) -> Array:
    centred = h - h.mean(axis=-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + 1e-6)


def linear(state: State, name: str, z: Array) -> Array:
    return z @ state[f"{name}.weight"].T + state[f"{name}.bias"]


def attention(state: State, name: str, u: Array, heads: int) -> Array:
    tokens, width = u.shape
    size = width // heads
    q, k, v = np.split(linear(state, f"{name}.qkv", u), 3, axis=1)
    mixed = np.zeros((tokens, width))
    for head in range(heads):
        part = slice(head * size, (head + 1) * size)
        scores = q[:, part] @ k[:, part].T / math.sqrt(size)
        weights = np.exp(scores - scores.max(axis=1, keepdims=True))
        mixed[:, part] = weights / weights.sum(axis=1, keepdims=True) @ v[:, part]
    return linear(state, f"{name}.proj", mixed)


def numpy_forward(state: State, x: Array, t: float, y: int, heads: int, patch: int) -> Array:
    """One sample x (C, H, W) -> (out channels, H, W)."""
    side = x.shape[1] // patch
    kernel = state["x_embedder.proj.weight"]  # (D, C, patch, patch)
    h = np.stack(
        [
            (kernel * x[:, r * patch : (r + 1) * patch, c * patch : (c + 1) * patch]).sum(axis=(1, 2, 3))
            for r in range(side)
            for c in range(side)
        ]
    )
    h = h + state["x_embedder.proj.bias"] + state["pos_embed"][0]
    condition = linear(state, "t_embedder.mlp.0", numpy_timestep(t))
    condition = linear(state, "t_embedder.mlp.2", silu(condition))
    condition = silu(condition + state["y_embedder.embedding_table.weight"][y])

    depth = sum(name.endswith("attn.qkv.weight") for name in state)
    for i in range(depth):
        vectors = linear(state, f"blocks.{i}.adaLN_modulation.1", condition)
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = np.split(vectors, 6)
        u = norm(h) * (1 + scale_a) + shift_a
        h = h + gate_a * attention(state, f"blocks.{i}.attn", u, heads)
        u = norm(h) * (1 + scale_m) + shift_m
        h = h + gate_m * linear(state, f"blocks.{i}.mlp.fc2", tanh_gelu(linear(state, f"blocks.{i}.mlp.fc1", u)))
    shift, scale = np.split(linear(state, "final_layer.adaLN_modulation.1", condition), 2)
    patches = linear(state, "final_layer.linear", norm(h) * (1 + scale) + shift)

    channels = patches.shape[1] // patch**2
    out = np.zeros((channels, side * patch, side * patch))
    for token, values in enumerate(patches):
        row, column = divmod(token, side)
        for p in range(patch):
            for q in range(patch):
                start = (p * patch + q) * channels
                out[:, row * patch + p, column * patch + q] = values[start : start + channels]
    return out


def relative(actual: Tensor, expected: Array) -> float:
    return float(np.abs(actual.detach().numpy() - expected).max() / np.abs(expected).max())


@settings(max_examples=12)
@given(
    patch=st.sampled_from([1, 2, 3]),
    side=st.integers(1, 3),
    channels=st.integers(1, 4),
    heads=st.sampled_from([1, 2, 3]),
    learn_sigma=st.booleans(),
    seed=st.integers(0, 99),
)
def test_forward_is_the_papers(patch: int, side: int, channels: int, heads: int, learn_sigma: bool, seed: int) -> None:
    sizes = dict(TINY, patch_size=patch, input_size=side * patch, in_channels=channels)
    model = randomised(DiT(**sizes | dict(hidden_size=12, num_heads=heads, learn_sigma=learn_sigma)), seed)
    x, t, y = inputs(3, channels, side * patch, seed)
    state = {name: weight.numpy() for name, weight in model.state_dict().items()}
    rows = [numpy_forward(state, x[n].numpy(), t[n].item(), int(y[n]), heads, patch) for n in range(len(x))]
    assert relative(model(x, t, y), np.stack(rows)) < 1e-10


@pytest.mark.parametrize(("side", "width"), [(1, 4), (3, 8), (4, 24)])
def test_position_embedding(side: int, width: int) -> None:
    table = position_embedding(side, width)
    assert table.shape == (1, side * side, width)
    assert table.dtype == torch.float32
    np.testing.assert_allclose(table[0].numpy(), numpy_positions(side, width), atol=1e-7)


def test_a_new_model_starts_with_the_positions() -> None:
    assert torch.equal(DiT(**TINY).pos_embed, position_embedding(3, 16))


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-10), (torch.float32, 1e-4)])
def test_timestep_embedding(dtype: torch.dtype, bound: float) -> None:
    t = torch.tensor([0, 1, 500, 999])
    expected = np.stack([numpy_timestep(value) for value in t.tolist()])
    embedded = timestep_embedding(t, dtype=dtype)
    assert embedded.dtype == dtype
    np.testing.assert_allclose(embedded.numpy(), expected, atol=bound)


def test_timestep_embedding_of_a_half_precision_model_tells_timesteps_apart() -> None:
    t = torch.tensor([750, 751, 752])
    exact = timestep_embedding(t)
    half = timestep_embedding(t, dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    assert torch.equal(half, exact.bfloat16())


# --- Guidance, label dropout, initialisation


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_guided_forward(channels: int) -> None:
    model = randomised(DiT(**dict(TINY, in_channels=channels)))
    x, t, y = inputs(4, channels)
    y[2:] = TINY["num_classes"]  # null labels
    t = t[:2].repeat(2)
    x[2:] = float("nan")  # the second half's latents are not used
    half, scale = x[:2], 2.5
    cond, uncond = model(half, t[:2], y[:2]), model(half, t[2:], y[2:])
    guided = min(3, channels)
    eps = uncond[:, :guided] + scale * (cond[:, :guided] - uncond[:, :guided])
    expected = torch.cat([torch.cat([eps, out[:, guided:]], dim=1) for out in (cond, uncond)])
    torch.testing.assert_close(model.forward_with_cfg(x, t, y, scale), expected, rtol=1e-12, atol=1e-12)


def test_guided_forward_calls_the_live_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    """What replaces a module's forward, as a drop-in does, also serves its guided forward."""
    model = randomised(DiT(**TINY))
    monkeypatch.setattr(model, "forward", lambda x, t, y: torch.cat([x, x], dim=1) * y.view(-1, 1, 1, 1))
    x, t, _ = inputs(2)
    out = model.forward_with_cfg(x, t, torch.tensor([1, 5]), 2.0)
    torch.testing.assert_close(out[:, :3], torch.stack([x[0, :3] * -3] * 2))


def test_labels_are_dropped_only_in_training() -> None:
    table = DiT(**TINY, class_dropout_prob=0.25).y_embedder
    y = torch.arange(4000) % 5
    weight = table.embedding_table.weight
    torch.manual_seed(0)
    trained = table.train()(y)
    dropped = (trained == weight[5]).all(dim=1)
    assert 0.2 < dropped.float().mean() < 0.3
    assert torch.equal(trained[~dropped], weight[y][~dropped])
    assert torch.equal(table.eval()(y), weight[y])


def test_without_label_dropout_training_keeps_labels() -> None:
    table = DiT(**TINY, class_dropout_prob=0.0).y_embedder.train()
    y = torch.arange(5)
    assert torch.equal(table(y), table.embedding_table.weight)


def test_a_new_model_is_zero_and_its_blocks_are_the_identity() -> None:
    model = DiT(**TINY).double().eval()
    x, t, y = inputs(2)
    assert torch.equal(model(x, t, y), torch.zeros(2, 8, 6, 6, dtype=torch.float64))
    h, c = torch.randn(2, 9, 16, dtype=torch.float64), torch.randn(2, 16, dtype=torch.float64)
    assert all(torch.equal(block(h, c), h) for block in model.blocks)


def test_gradients_reach_every_trained_parameter() -> None:
    model = randomised(DiT(**TINY))
    model(*inputs(2)).square().sum().backward()
    dead = [name for name, p in model.named_parameters() if p.requires_grad and not p.grad.any()]
    assert dead == []


# --- Wrong sizes


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(input_size=7), ["input_size 7", "multiple of 2", "patch_size"]),
        (dict(num_heads=3), ["hidden_size 16", "multiple of 3", "num_heads"]),
        (dict(hidden_size=6, num_heads=3), ["hidden_size 6", "multiple of 4"]),
        *(({name: 0}, [f"{name} 0", "1 or more"]) for name in TINY),
        (dict(patch_size=-2), ["patch_size -2"]),
    ],
)
def test_wrong_sizes(change: dict[str, int], words: list[str]) -> None:
    with pytest.raises(InputError) as caught:
        DiT(**TINY | change)
    message = str(caught.value)
    assert all(word in message for word in words)
    assert "\n" not in message
