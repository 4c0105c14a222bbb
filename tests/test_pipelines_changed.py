"""diffusers' pipelines whose weights change after they were enabled: LoRA, loading, conversion."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from diffusers_kinds import COG_2B, COG_5B, SIGMA, THREE, Kind, ask, drive, table_of, timesteps, twin, uncached
from diffusers_oracle import bare, drive_replaying, fate, nothing
from tiny import relative_error
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ebcache_fast import disable, enable, stats
from ebcache_fast.errors import InputError

pytest.importorskip("diffusers")
pytest.importorskip("transformers")


Change = Callable[[str, Any], None]  # of the layer of this name in a transformer


class Doubled(nn.Module):
    """A parametrization, as LoRA's users of torch write it."""

    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


class Adapter(nn.Module):
    """A layer with a low-rank addition, as peft puts it in the layer's place; its ``weight`` is the base's."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.base_layer, self.in_features, self.out_features = base, base.in_features, base.out_features
        self.down = nn.Parameter(torch.randn(2, base.in_features, generator=generator), requires_grad=False)
        self.up = nn.Parameter(torch.randn(base.out_features, 2, generator=generator), requires_grad=False)

    @property
    def weight(self) -> Tensor:
        return self.base_layer.weight

    @property
    def bias(self) -> Tensor | None:
        return self.base_layer.bias

    def forward(self, x: Tensor, *args: Any, **named: Any) -> Tensor:
        out: Tensor = self.base_layer(x, *args, **named) + x @ self.down.T @ self.up.T
        return out


class Quantised(nn.Module):
    """A layer with weights in int8, as bitsandbytes puts it in the layer's place: only its bias says a dtype."""

    def __init__(self, base: nn.Linear, bias: bool) -> None:
        super().__init__()
        self.in_features, self.out_features, self.scale = base.in_features, base.out_features, 0.01
        self.weight = nn.Parameter((base.weight / self.scale).round().clamp(-127, 127).char(), requires_grad=False)
        self.bias = base.bias if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.scale * self.weight.to(x.dtype), self.bias)


def parametrized(path: str, pipe: Any) -> None:
    parametrize.register_parametrization(pipe.transformer.get_submodule(path), "weight", Doubled())


def adapted(path: str, pipe: Any) -> None:
    owner, _, name = path.rpartition(".")
    pipe.transformer.get_submodule(owner)._modules[name] = Adapter(pipe.transformer.get_submodule(path))


def written(path: str, pipe: Any) -> None:
    """As fuse_lora does it: neither address nor version change."""
    pipe.transformer.get_submodule(path).weight.data.mul_(-1)


def loaded(path: str, pipe: Any) -> None:
    state = {
        name: value * (1.5 if name.startswith(path) else 1.0) for name, value in pipe.transformer.state_dict().items()
    }
    pipe.transformer.load_state_dict(state)


BLOCK = "transformer_blocks.1"
LAYERS: dict[Kind, dict[str, tuple[Change, ...]]] = {
    SIGMA: {
        "pos_embed.proj": (written, loaded),
        "caption_projection.linear_1": (written, adapted),
        "adaln_single.linear": (parametrized,),
        f"{BLOCK}.attn1.to_q": (loaded,),
        f"{BLOCK}.attn2.to_k": (written, parametrized),
        f"{BLOCK}.attn2.to_v": (adapted,),
        f"{BLOCK}.attn2.to_out.0": (written,),
        f"{BLOCK}.ff.net.0.proj": (adapted,),
        "proj_out": (parametrized,),
    },
    COG_5B: {
        "patch_embed.proj": (parametrized,),
        "patch_embed.text_proj": (written, adapted),
        "time_embedding.linear_1": (adapted,),
        f"{BLOCK}.norm1.linear": (written, parametrized),
        f"{BLOCK}.norm1.norm": (loaded,),
        f"{BLOCK}.attn1.to_v": (adapted,),
        f"{BLOCK}.attn1.norm_q": (written,),
        f"{BLOCK}.ff.net.2": (loaded,),
        "norm_out.linear": (written,),
        "proj_out": (adapted,),
    },
}
CHANGES = [
    pytest.param(kind, partial(change, path), id=f"{kind}-{change.__name__}-{path}")
    for kind, layers in LAYERS.items()
    for path, changes in layers.items()
    for change in changes
]


@pytest.mark.parametrize(("kind", "change"), CHANGES)
def test_changed_weights_are_followed_or_the_model_answers_itself(kind: Kind, change: Callable[[Any], None]) -> None:
    pipe, draw = bare(kind)
    changed = twin(pipe)
    change(changed)
    assert relative_error(draw(changed), draw(pipe)) > 1e-4
    assert fate(pipe, draw, nothing, change) in {"cached", "counted"}


@pytest.mark.parametrize("change", [adapted, parametrized])
@pytest.mark.parametrize("kind", [SIGMA, COG_5B], ids=str)
def test_weights_that_were_changed_before(kind: Kind, change: Change) -> None:
    for path in (f"{BLOCK}.attn1.to_v", "proj_out"):
        assert fate(*bare(kind), partial(change, path), nothing) in {"cached", "refused"}


def quantised(pipe: Any, bias: bool = True) -> None:
    layers = [(path, one) for path, one in pipe.transformer.named_modules() if type(one) is nn.Linear]
    for path, layer in layers:
        pipe.transformer.set_submodule(path, Quantised(layer, bias))


@pytest.mark.parametrize("kind", THREE, ids=str)
def test_weights_that_are_quantised(kind: Kind) -> None:
    assert fate(*bare(kind), quantised, nothing) == "cached"
    assert fate(*bare(kind), partial(quantised, bias=False), nothing) == "refused"


ONCE_A_RUN = [  # what steps share, the keys of the text among it, is otherwise asked when a run begins
    *((SIGMA, path) for path in ("caption_projection", f"{BLOCK}.attn2.to_k", "adaln_single.linear")),
    *((COG_5B, path) for path in ("patch_embed.text_proj", f"{BLOCK}.norm1.linear")),
]


@pytest.mark.parametrize("in_order", [False, True])
@pytest.mark.parametrize(("kind", "path"), ONCE_A_RUN, ids=str)
def test_hooks_that_say_another_thing_at_each_step(kind: Kind, pipe: Any, path: str, in_order: bool) -> None:
    ts, call = timesteps(pipe), kind.call(pipe)
    now = 1.0

    def drawn() -> list[Tensor]:
        nonlocal now
        outs = []
        for i, t in enumerate(ts):
            now = 1.0 + i
            outs.append(ask(pipe.transformer, call, t, seed=i))
        return outs

    pipe.transformer.get_submodule(path).register_forward_hook(lambda _, args, out: now * out)
    plain = drawn()
    enable(pipe, uncached(pipe), in_order=in_order)
    assert max(map(relative_error, drawn(), plain)) < 1e-5
    assert not stats(pipe).originals


@pytest.mark.parametrize("kind", [SIGMA, COG_5B], ids=str)
def test_another_dtype_after_enabling(kind: Kind, pipe: Any) -> None:
    ts, call = timesteps(pipe), kind.call(pipe)

    enable(pipe, table_of(pipe))
    drive(pipe.transformer, call, ts)
    pipe.transformer.to(torch.float64)
    call |= {name: call[name].double() for name in ("hidden_states", "encoder_hidden_states")}
    ours = drive(pipe.transformer, call, ts)
    assert not stats(pipe).originals
    for one, other in zip(ours, drive_replaying(disable(pipe), call, ts), strict=True):
        assert one.dtype == torch.float64
        assert relative_error(one, other) < 1e-12


# ------------------------------------------------------------------------------------------------------ offloading


class Offloading:
    """accelerate's hook around a module's forward: weights are there while it runs, and on the meta device else."""

    def __init__(self, module: nn.Module) -> None:
        self.module, self.before = module, module.forward
        self.kept = {name: parameter.data for name, parameter in module.named_parameters()}
        self.place({name: value.to("meta") for name, value in self.kept.items()})
        module.forward = self.forward  # type: ignore[method-assign]

    def place(self, values: dict[str, Tensor]) -> None:
        """Parameters are others each time, as are their addresses."""
        for path, value in values.items():
            owner, _, name = path.rpartition(".")
            self.module.get_submodule(owner)._parameters[name] = nn.Parameter(value, requires_grad=False)

    def forward(self, *args: Any, **named: Any) -> Any:
        self.place({name: value.clone() for name, value in self.kept.items()})
        try:
            return self.before(*args, **named)
        finally:
            self.place({name: value.to("meta") for name, value in self.kept.items()})


@pytest.mark.parametrize("kind", [SIGMA, COG_2B], ids=str)
def test_weights_that_come_and_go_with_every_call(kind: Kind, pipe: Any) -> None:
    """Enabled before: eagerly, and counted, since the weights of each step lie elsewhere."""
    ts, call, model = timesteps(pipe), kind.call(pipe), pipe.transformer
    plain, replayed = drive(model, call, ts), drive_replaying(pipe, call, ts)
    enable(pipe, table_of(pipe))
    drive(model, call, ts)
    offloading = Offloading(model)
    hits = stats(pipe).hits
    for ours, own, cached in zip(drive(model, call, ts), plain, replayed, strict=True):
        assert min(relative_error(ours, own), relative_error(ours, cached)) < 1e-5
    counted = stats(pipe)
    assert counted.hits > hits or counted.originals or sum(counted.refreshed.values()) == len(ts) - 1
    disable(pipe)
    assert model.forward == offloading.forward
    assert all(map(torch.equal, drive(model, call, ts), plain))


@pytest.mark.parametrize("kind", [SIGMA, COG_2B], ids=str)
def test_weights_that_were_elsewhere_when_enabled(kind: Kind, pipe: Any) -> None:
    """Enabled after: refused, or the module's own forward, which brings the weights, answers and is counted."""
    ts, call, model = timesteps(pipe), kind.call(pipe), pipe.transformer
    plain = drive(model, call, ts)
    offloading = Offloading(model)
    try:
        enable(pipe, table_of(pipe))
    except InputError as error:
        assert "meta device" in str(error)  # noqa: PT017
    else:
        assert all(map(torch.equal, drive(model, call, ts), plain))
        assert sum(stats(pipe).originals.values()) == len(ts)
    disable(pipe)
    assert model.forward == offloading.forward
    assert all(map(torch.equal, drive(model, call, ts), plain))
