"""A DiT as the engine sees it: foreign classes, parts against the whole, adapters and hooks, cost."""

from collections.abc import Callable
from operator import attrgetter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from ebcache_fast.engine.modulation import ModulationTable
from ebcache_fast.engine.workspace import Workspace
from ebcache_fast.errors import InputError
from ebcache_fast.models.base import BranchResources, Modulation
from ebcache_fast.models.embeddings import timestep_embedding
from ebcache_fast.models.facebook_dit import DiTDenoiser
from ebcache_fast.models.modules import DIT_MODELS, DiT
from ebcache_fast.ops.operations import TORCH
from ebcache_fast.plan import Branch, Site
from ebcache_fast.plan.table import CacheTable

CLASSES, WIDTH, HEADS, SIDE = 5, 16, 4, 6

# --- A class of its own with the original's attributes, spelt as in timm


class TimmAttention(nn.Module):
    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads, self.scale = num_heads, (dim // num_heads) ** -0.5
        self.qkv = nn.Linear(dim, 3 * dim)
        self.q_norm, self.k_norm = nn.Identity(), nn.Identity()
        self.attn_drop = nn.Dropout(0.0)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        weights = (self.q_norm(q) * self.scale @ self.k_norm(k).transpose(-2, -1)).softmax(dim=-1)
        out: Tensor = self.proj((self.attn_drop(weights) @ v).transpose(1, 2).reshape(b, n, c))
        return out


class TimmMlp(nn.Module):
    def __init__(self, dim: int, hidden: int, act: nn.Module) -> None:
        super().__init__()
        self.fc1, self.act, self.drop1 = nn.Linear(dim, hidden), act, nn.Dropout(0.0)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(self.drop1(self.act(self.fc1(x))))
        return out


class ForeignBlock(nn.Module):
    def __init__(self, dim: int, num_heads: int, eps: float, act: nn.Module) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, elementwise_affine=False, eps=eps)
        self.attn = TimmAttention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, elementwise_affine=False, eps=3 * eps)
        self.mlp = TimmMlp(dim, 3 * dim, act)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        vectors = self.adaLN_modulation(c)[:, None].chunk(6, dim=-1)
        x = x + vectors[2] * self.attn(self.norm1(x) * (1 + vectors[1]) + vectors[0])
        out: Tensor = x + vectors[5] * self.mlp(self.norm2(x) * (1 + vectors[4]) + vectors[3])
        return out


class ForeignTimesteps(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, t: Tensor) -> Tensor:
        out: Tensor = self.mlp(timestep_embedding(t, dtype=torch.float64))
        return out


class ForeignLabels(nn.Module):
    def __init__(self, rows: int, dim: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(rows, dim)

    def forward(self, y: Tensor) -> Tensor:
        out: Tensor = self.embedding_table(y)
        return out


class ForeignPatches(nn.Module):
    def __init__(self, patch: int, channels: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, dim, patch, stride=patch)

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("ndhw->nhwd", self.proj(x)).flatten(1, 2)


class ForeignHead(nn.Module):
    def __init__(self, dim: int, out: int, eps: float) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(dim, elementwise_affine=False, eps=eps)
        self.linear = nn.Linear(dim, out)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c)[:, None].chunk(2, dim=-1)
        out: Tensor = self.linear(self.norm_final(x) * (1 + scale) + shift)
        return out


class Foreign(nn.Module):
    def __init__(self, eps: float = 1e-2, act: nn.Module | None = None, depth: int = 2) -> None:
        super().__init__()
        self.x_embedder = ForeignPatches(2, 3, WIDTH)
        self.pos_embed = nn.Parameter(torch.zeros(1, (SIDE // 2) ** 2, WIDTH))
        self.t_embedder = ForeignTimesteps(WIDTH)
        self.y_embedder = ForeignLabels(CLASSES + 1, WIDTH)
        act = act or nn.GELU(approximate="tanh")
        self.blocks = nn.ModuleList(ForeignBlock(WIDTH, HEADS, eps, act) for _ in range(depth))
        self.final_layer = ForeignHead(WIDTH, 2 * 2 * 6, 5 * eps)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        h = self.x_embedder(x) + self.pos_embed
        c = self.t_embedder(t) + self.y_embedder(y)
        for block in self.blocks:
            h = block(h, c)
        tokens = self.final_layer(h, c).view(len(x), SIDE // 2, SIDE // 2, 2, 2, 6)
        return torch.einsum("nhwpqc->nchpwq", tokens).reshape(len(x), 6, SIDE, SIDE)


def native(**changes: Any) -> DiT:
    sizes: dict[str, Any] = dict(input_size=SIDE, patch_size=2, in_channels=3, hidden_size=WIDTH, depth=2)
    return DiT(**sizes | dict(num_heads=HEADS, num_classes=CLASSES) | changes)


def randomised(model: Any) -> Any:
    generator = torch.Generator().manual_seed(0)
    model.double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.3)
    return model


@torch.no_grad()
def assembled(model: nn.Module, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
    """The forward, put together by hand from the denoiser's parts: row n takes timestep n and label n."""
    denoiser = DiTDenoiser(model)
    rows = torch.arange(len(x))
    table = ModulationTable(denoiser, len(t), len(y), rows=1)
    modulation = Modulation(table.sites, table.head)
    denoiser.modulation(t, y, (), modulation)
    sites = modulation.sites[rows, :, :, rows]  # (N, K, 3, D)
    h = denoiser.embed(x, res(x).per_run)
    for i, site in enumerate(denoiser.shape.sites):
        shift, scale, gate = sites[:, i].unbind(1)
        u = normed(h, shift, scale, denoiser.norm(site))
        out = torch.empty(h.shape, dtype=h.dtype)  # contiguous, as the engine's cache is
        denoiser.branch(site, u, out, res(h))
        h = h + gate.unsqueeze(1) * out
    shift, scale = modulation.head[rows, :, rows].unbind(1)
    return denoiser.head(normed(h, shift, scale, denoiser.head_norm))


def res(like: Tensor) -> BranchResources:
    memory = Workspace(like.dtype, like.device)
    return BranchResources(TORCH, scratch=memory, per_run=memory)


def normed(h: Tensor, shift: Tensor, scale: Tensor, norm: nn.LayerNorm) -> Tensor:
    """A modulated LayerNorm of h (N, T, D) by vectors (N, D)."""
    normal: Tensor = norm(h)
    return normal * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(3, 3, SIDE, SIDE, generator=generator, dtype=torch.float64)
    return x, torch.tensor([999, 500, 0]), torch.tensor([0, 5, 2])


@torch.no_grad()
def difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


@torch.no_grad()
def assert_parts_equal_forward(model: nn.Module) -> None:
    assert difference(assembled(model, *inputs()), model(*inputs())) < 1e-12


# --- Parts and whole


@pytest.mark.parametrize("changes", [{}, dict(learn_sigma=False), dict(depth=3, patch_size=3, mlp_ratio=1.5)])
def test_parts_equal_forward(changes: dict[str, Any]) -> None:
    assert_parts_equal_forward(randomised(native(**changes)))


@pytest.mark.parametrize("act", [nn.GELU(approximate="tanh"), nn.ReLU()])
def test_foreign_class(act: nn.Module) -> None:
    """Its layer norms' epsilons and its activation are its own, too."""
    assert_parts_equal_forward(randomised(Foreign(act=act)))


def test_epsilons_are_read_per_layer_and_branch() -> None:
    model = Foreign(eps=1e-3)
    model.blocks[1].norm2.eps = 0.5
    denoiser = DiTDenoiser(model)
    eps = [denoiser.norm(site).eps for site in denoiser.shape.sites]
    assert eps == [1e-3, 3 * 1e-3, 1e-3, 0.5]


def test_query_and_key_norms_are_run() -> None:
    model = Foreign()
    for block in model.blocks:
        block.attn.q_norm = nn.LayerNorm(WIDTH // HEADS)
        block.attn.k_norm = nn.LayerNorm(WIDTH // HEADS)
    assert_parts_equal_forward(randomised(model))


def test_foreign_class_with_the_originals_weights_is_the_original() -> None:
    ours, foreign = native(mlp_ratio=3.0), Foreign(eps=1e-6)
    for block in foreign.blocks:
        block.norm2.eps = 1e-6
    foreign.final_layer.norm_final.eps = 1e-6
    foreign.double().load_state_dict(randomised(ours).state_dict())
    assert difference(assembled(foreign, *inputs()), ours(*inputs())) < 1e-12


@pytest.mark.parametrize("strides", [(9 * WIDTH, WIDTH, 1), (9 * WIDTH, 1, 9), (1, 2, 18)])
@pytest.mark.parametrize("branch", [Branch.SELF_ATTN, Branch.MLP])
def test_a_branch_writes_into_the_memory_it_is_given(branch: Branch, strides: tuple[int, int, int]) -> None:
    block = (model := randomised(native())).blocks[1]
    u = torch.randn(2, 9, WIDTH, dtype=torch.float64)
    out = torch.empty(2 * 9 * WIDTH, dtype=torch.float64).as_strided(u.shape, strides)
    with torch.no_grad():
        DiTDenoiser(model).branch(Site(1, branch), u, out, res(u))
        expected = block.attn(u) if branch is Branch.SELF_ATTN else block.mlp(u)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)


def test_modulation_is_of_every_pair_of_timestep_and_label() -> None:
    model = randomised(native())
    t, y = torch.tensor([7, 900]), torch.tensor([0, 3, 5])
    with torch.no_grad():
        table = ModulationTable(DiTDenoiser(model), len(t), len(y), rows=1)
        sites, head = table.sites, table.head
        DiTDenoiser(model).modulation(t, y, (), Modulation(sites, head))
        c = model.t_embedder(t[1:]) + model.y_embedder(y[2:])
        vectors = model.blocks[1].adaLN_modulation(c).view(2, 3, WIDTH)
        ends = model.final_layer.adaLN_modulation(c).view(2, WIDTH)
    assert sites.shape == (2, 4, 3, 3, WIDTH)
    assert head.shape == (2, 2, 3, WIDTH)
    torch.testing.assert_close(sites[1, 2:, :, 2], vectors)
    torch.testing.assert_close(head[1, :, 2], ends)


def test_autocast() -> None:
    """Under autocast the branches run in its dtype and still fill a float32 cache."""
    model = randomised(native()).float()
    u = torch.randn(2, 9, WIDTH)
    for branch, module in ((Branch.SELF_ATTN, model.blocks[0].attn), (Branch.MLP, model.blocks[0].mlp)):
        out = torch.empty_like(u)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            DiTDenoiser(model).branch(Site(0, branch), u, out, res(u))
            assert torch.equal(out, module(u).float())


# --- Labels


def test_null_label_by_rows_and_declared_classes() -> None:
    with_null, without = native(), native(class_dropout_prob=0.0)
    assert (DiTDenoiser(with_null).num_classes, DiTDenoiser(with_null).has_null_label) == (CLASSES, True)
    assert (DiTDenoiser(without).num_classes, DiTDenoiser(without).has_null_label) == (CLASSES, False)


def test_labels_of_a_class_that_does_not_declare_them() -> None:
    """Undeclared, the last row is the null label, as in all of the original's checkpoints."""
    foreign = Foreign()
    assert (DiTDenoiser(foreign).num_classes, DiTDenoiser(foreign).has_null_label) == (CLASSES, True)
    foreign.y_embedder.num_classes = CLASSES + 1
    assert (DiTDenoiser(foreign).num_classes, DiTDenoiser(foreign).has_null_label) == (CLASSES + 1, False)


# --- Modules of another layout

ATTRIBUTES = (
    "x_embedder.proj",
    "pos_embed",
    "t_embedder.mlp",
    "y_embedder.embedding_table",
    "blocks.0.norm1",
    "blocks.0.norm2",
    "blocks.0.attn",
    "blocks.0.attn.qkv",
    "blocks.0.attn.proj",
    "blocks.0.attn.num_heads",
    "blocks.0.mlp.fc1",
    "blocks.0.mlp.act",
    "blocks.0.mlp.fc2",
    "blocks.0.adaLN_modulation",
    "final_layer.norm_final",
    "final_layer.linear",
    "final_layer.adaLN_modulation",
)


@pytest.mark.parametrize("path", ATTRIBUTES)
def test_missing_attribute_is_named(path: str) -> None:
    model = native()
    owner, _, name = path.rpartition(".")
    delattr(attrgetter(owner)(model) if owner else model, name)
    with pytest.raises(InputError, match=f"DiT has no '{path}") as caught:
        DiTDenoiser(model)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("build", [lambda: nn.Linear(3, 3), lambda: Foreign(depth=0)])
def test_foreign_layout(build: Callable[[], nn.Module]) -> None:
    with pytest.raises(InputError, match="layout"):
        DiTDenoiser(build())


NORMS = ["blocks.0.norm1", "blocks.0.norm2", "final_layer.norm_final"]


def with_norms(build: Callable[[], nn.Module], *paths: str) -> nn.Module:
    model = native()
    for path in paths:
        owner, _, name = path.rpartition(".")
        setattr(attrgetter(owner)(model), name, build())
    return model


@pytest.mark.parametrize("bias", [True, False])
def test_layer_norms_with_parameters(bias: bool) -> None:
    assert_parts_equal_forward(randomised(with_norms(lambda: nn.LayerNorm(WIDTH, bias=bias), *NORMS)))


@pytest.mark.parametrize("path", NORMS)
def test_other_norms_are_refused(path: str) -> None:
    with pytest.raises(InputError, match=f"{path}' is a RMSNorm.*LayerNorm there"):
        DiTDenoiser(with_norms(lambda: nn.RMSNorm(WIDTH), path))


# --- Adapters, hooks and parametrizations: the result is always the live module's


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


class LowRank(nn.Linear):
    """A linear layer with an adapter in its forward, which its weight doesn't show."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__(base.in_features, base.out_features)
        self.load_state_dict(base.state_dict())
        self.down = nn.Parameter(torch.ones(1, base.in_features))
        self.up = nn.Parameter(torch.ones(base.out_features, 1))

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + F.linear(F.linear(input, self.down), self.up)


LINEARS = ("blocks.1.attn.qkv", "blocks.1.attn.proj", "blocks.0.mlp.fc1", "blocks.0.mlp.fc2")
Change = Callable[[nn.Module, str], None]


def add_hook(model: nn.Module, path: str) -> None:
    attrgetter(path)(model).register_forward_hook(lambda module, args, out: out * 3)


def add_pre_hook(model: nn.Module, path: str) -> None:
    attrgetter(path)(model).register_forward_pre_hook(lambda module, args: (args[0] + 1,))


def add_parametrization(model: nn.Module, path: str) -> None:
    parametrize.register_parametrization(attrgetter(path)(model), "weight", Doubled())


def add_low_rank(model: nn.Module, path: str) -> None:
    owner, _, name = path.rpartition(".")
    linear = attrgetter(path)(model)
    setattr(attrgetter(owner)(model), name, LowRank(linear).to(linear.weight))


def replace_forward(model: nn.Module, path: str) -> None:
    """As offloading libraries do, on the instance."""
    linear = attrgetter(path)(model)
    original = linear.forward
    linear.forward = lambda u: -original(u)


def drop_bias(model: nn.Module, path: str) -> None:
    attrgetter(path)(model).bias = None


def change_weight(model: nn.Module, path: str) -> None:
    attrgetter(path)(model).weight.data.mul_(-1)


CHANGES = (
    add_hook,
    add_pre_hook,
    add_parametrization,
    add_low_rank,
    replace_forward,
    drop_bias,
    change_weight,
)


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("path", LINEARS)
def test_changed_linear_layers_are_honoured(path: str, change: Change) -> None:
    model = randomised(native())
    before = assembled(model, *inputs())
    change(model, path)
    assert_parts_equal_forward(model)
    assert difference(assembled(model, *inputs()), before) > 1e-4


@pytest.mark.parametrize(
    "path", ["x_embedder.proj", "t_embedder.mlp.0", "blocks.0.adaLN_modulation.1", "final_layer.linear"]
)
def test_changed_outer_layers_are_honoured(path: str) -> None:
    model = randomised(native())
    before = assembled(model, *inputs())
    add_hook(model, path)
    assert_parts_equal_forward(model)
    assert difference(assembled(model, *inputs()), before) > 1e-4


# --- Cost


@pytest.fixture
def xl2(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], DiTDenoiser]:
    """DiT-XL/2 for an input size, without memory or random draws."""
    monkeypatch.setattr(nn.init, "normal_", lambda tensor, **kwargs: tensor)

    def build(input_size: int) -> DiTDenoiser:
        with torch.device("meta"):
            return DiTDenoiser(DIT_MODELS["DiT-XL/2"](input_size=input_size))

    return build


def test_macs_of_xl2(xl2: Callable[[int], DiTDenoiser]) -> None:
    """The paper's figures, of one row: 118.62 G a step at 256 pixels, 4.04 T with the released table."""
    denoiser = xl2(32)
    shape = denoiser.shape
    attention, mlp = (shape.depth * site.macs / 1e9 for site in shape.site_shapes[:2])
    assert (round(attention, 2), round(mlp, 2)) == (42.28, 76.10)
    assert round((attention + mlp + shape.fixed_macs / 1e9), 2) == 118.62
    plan = CacheTable.named("eb-cache-released-50").plan(shape)
    assert round(plan.macs(shape) / 1e12, 2) == 4.04
    assert denoiser.latent_shape == (4, 32, 32)
    assert denoiser.num_classes == 1000


def test_macs_of_xl2_at_512_pixels(xl2: Callable[[int], DiTDenoiser]) -> None:
    shape = xl2(64).shape
    total = sum(site.macs for site in shape.site_shapes) + shape.fixed_macs
    assert round(total / 1e9, 2) == 524.54


def test_weights_are_the_models() -> None:
    """All matrices a step reads: everything but biases, positions and the label table."""
    model = native()
    shape = DiTDenoiser(model).shape
    matrices = [p.numel() for name, p in model.named_parameters() if p.ndim in (2, 4) and "table" not in name]
    counted = sum(site.weights for site in shape.site_shapes) + shape.fixed_weights
    assert counted == sum(matrices)


def test_sizes() -> None:
    assert dict(DiTDenoiser(native()).shape.sizes) == {
        "depth": 2,
        "hidden_size": WIDTH,
        "mlp_hidden_size": 4 * WIDTH,
        "num_heads": HEADS,
        "tokens": 9,
        "patch_size": 2,
        "in_channels": 3,
        "out_channels": 6,
        "num_classes": CLASSES,
    }
