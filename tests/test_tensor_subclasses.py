"""Weights that are tensors of a class of their own, as torchao, bitsandbytes and torch.distributed leave them."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from diffusers_kinds import COG_2B, DIT, SIGMA, THREE, Kind, uncached
from diffusers_oracle import bare, fate, nothing
from dropin import TYPES, assert_bitwise, assert_close, drive, fresh_model, latents, naive_drive, plan_of
from fake_graphs import FakeGraphs
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_map_only

from ebcache_fast import Engine, disable, enable, sample, stats
from ebcache_fast.dropin import cached_forward
from ebcache_fast.errors import InputError
from ebcache_fast.models import as_denoiser

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

NAMED = {"aten.detach.default", "aten.alias.default"}


class Strange(Tensor):
    """Eight bits a weight and a scale; it knows what is in ``NAMED`` and products, and refuses all else.

    It has no memory of its own that anybody could read, and does not tell its version.
    """

    codes: Tensor
    scale: Tensor

    @staticmethod
    def __new__(cls, codes: Tensor, scale: Tensor) -> Any:
        return Tensor._make_wrapper_subclass(cls, codes.shape, dtype=scale.dtype)

    def __init__(self, codes: Tensor, scale: Tensor) -> None:
        self.codes, self.scale = codes, scale

    @classmethod
    def of(cls, weight: Tensor) -> nn.Parameter:
        scale = weight.detach().abs().amax() / 127
        return nn.Parameter(cls((weight.detach() / scale).round().to(torch.int8), scale), requires_grad=False)

    def __deepcopy__(self, memo: object) -> nn.Parameter:
        return nn.Parameter(Strange(self.codes.clone(), self.scale.clone()), requires_grad=False)

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is F.linear:
            return function(*tree_map_only(Strange, lambda one: one.codes.to(one.scale.dtype) * one.scale, args))
        if function in (Tensor._version.__get__, Tensor.stride, Tensor.data_ptr):  # type: ignore[attr-defined]
            raise NotImplementedError(function)
        with torch._C.DisableTorchFunctionSubclass():
            return function(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if str(function) not in NAMED:
            raise NotImplementedError(f"{function} of {types}")
        return Strange(args[0].codes, args[0].scale)


class Named(Tensor):
    """It knows everything, and is no plain tensor all the same."""


class Packed(nn.Parameter):
    """Two weights a byte, in another shape than the layer's, as bitsandbytes and GGUF have them."""


class FourBit(nn.Linear):
    """A layer with packed weights and, perhaps, nothing but an attribute to say what it computes in."""

    def __init__(self, base: nn.Linear, bias: bool) -> None:
        super().__init__(base.in_features, base.out_features, device="meta")
        self.scale, self.compute_dtype = float(base.weight.detach().abs().amax()) / 7, base.weight.dtype
        codes = ((base.weight.detach() / self.scale).round() + 8).to(torch.uint8).flatten()
        self.weight = Packed((codes[::2] << 4 | codes[1::2])[:, None], requires_grad=False)
        self.bias = base.bias if bias else None

    def forward(self, x: Tensor) -> Tensor:
        codes = torch.stack([self.weight >> 4, self.weight & 15], dim=1).flatten().as_subclass(Tensor)
        return F.linear(x, (codes.to(x.dtype) - 8).view(self.out_features, -1) * self.scale, self.bias)


def with_strange_weights(model: nn.Module) -> None:
    for layer in model.modules():
        if type(layer) is nn.Linear:
            layer.weight = Strange.of(layer.weight)


def with_packed_weights(model: nn.Module, bias: bool = True) -> None:
    for path, layer in list(model.named_modules()):
        if type(layer) is nn.Linear:
            model.set_submodule(path, FourBit(layer, bias))


def of_pipeline(change: Callable[[nn.Module], None]) -> Callable[[Any], None]:
    return lambda pipe: change(pipe.transformer)


CHANGES: dict[str, Callable[[nn.Module], None]] = {
    "strange": with_strange_weights,
    "packed": with_packed_weights,
    "packed, without a bias": partial(with_packed_weights, bias=False),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("kind", THREE, ids=str)
def test_quantised_layers_run_as_the_modules_that_they_are(kind: Kind, change: Callable[[nn.Module], None]) -> None:
    assert fate(*bare(kind), of_pipeline(change), nothing) == "cached"
    assert fate(*bare(kind), nothing, of_pipeline(change)) == "cached"


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("when", ["before", "after"])
def test_of_the_original_layout(when: str, change: Callable[[nn.Module], None]) -> None:
    model = fresh_model()
    if when == "before":
        change(model)
    enable(model, plan_of())
    drive(model, latents(model))
    if when == "after":
        change(model)
    xs = latents(model)
    assert_close(drive(model, xs), naive_drive(model, xs))
    assert not stats(model).originals
    assert sample(disable(model), [1, 2], steps=3).isfinite().all()


@pytest.mark.parametrize("path", ["blocks.1.mlp.fc2", "blocks.0.attn.qkv"])
def test_no_graph_keeps_what_such_a_weight_is(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    graphs = FakeGraphs()
    monkeypatch.setattr(cached_forward, "Engine", partial(Engine, make_graphs=lambda _: graphs))
    model = fresh_model()
    layer = model.get_submodule(path)
    layer.weight = Strange.of(layer.weight)
    xs = latents(model)
    enable(model, plan_of())
    assert_close(drive(model, xs), naive_drive(model, xs))
    assert stats(model).eager == {f"{path} is no layer of torch's own": len(TYPES)}
    assert not graphs.recorded


@pytest.mark.parametrize("kind", [DIT, SIGMA], ids=str)
def test_a_bias_says_the_dtype_where_conversion_left_the_weights(kind: Kind) -> None:
    model = kind.pipeline().transformer
    for layer in model.modules():
        if type(layer) is nn.Linear:
            layer.weight, layer.bias = Strange.of(layer.weight), nn.Parameter(layer.bias.detach().double())
    made = as_denoiser(model).weight()
    assert (type(made), made.dtype) == (Tensor, torch.float64)


def test_a_bias_of_a_class_of_its_own_is_left_to_its_layer() -> None:
    model = fresh_model()
    for layer in (model.final_layer.linear, model.x_embedder.proj):
        assert as_denoiser(model).has_plain_embed_head
        plain, layer.bias = layer.bias, Strange.of(layer.bias)
        assert not as_denoiser(model).has_plain_embed_head
        layer.bias = plain


def test_float8_is_for_plain_weights() -> None:
    model = fresh_model(dtype=torch.float32)
    model.blocks[1].mlp.fc1.weight = Strange.of(model.blocks[1].mlp.fc1.weight)
    with pytest.raises(InputError, match=r"fp8=True needs .* weights are quantised or sharded already; leave it out$"):
        enable(model, plan_of(), fp8=True)


READ_AS_THEY_ARE = [
    (SIGMA, "", "scale_shift_table"),
    (SIGMA, "transformer_blocks.1", "scale_shift_table"),
    (COG_2B, "transformer_blocks.1.norm2.norm", "weight"),
    (COG_2B, "norm_out.norm", "bias"),
]


@pytest.mark.parametrize(("kind", "path", "name"), READ_AS_THEY_ARE)
def test_what_no_layer_computes_with_has_to_be_plain(kind: Kind, path: str, name: str) -> None:
    def change(pipe: Any) -> None:
        owner = pipe.transformer.get_submodule(path)
        setattr(owner, name, Strange.of(getattr(owner, name)))

    pipe = kind.pipeline()
    change(pipe)
    where = f"{path}.{name}".lstrip(".")
    with pytest.raises(InputError, match=rf"'{where}' is a Strange, and .* reads plain tensors there; quantise"):
        enable(pipe, uncached(pipe))


def test_positions_of_a_class_of_its_own_are_refused_and_later_left_to_the_model() -> None:
    model = fresh_model()
    xs = latents(model)
    enable(model, plan_of())
    drive(model, xs[:2])
    model.pos_embed = nn.Parameter(Named(model.pos_embed.detach().clone()), requires_grad=False)
    ours = drive(model, xs)
    assert [*stats(model).originals.values()] == [len(xs)]
    assert_bitwise(ours, drive(disable(model), xs))
    with pytest.raises(InputError, match="'pos_embed' is a Named"):
        enable(model, plan_of())


def test_such_latents_are_the_models_own() -> None:
    model = fresh_model()
    xs = [Named(x) for x in latents(model)[:2]]
    plain = drive(model, xs)
    enable(model, plan_of())
    assert_bitwise(drive(model, xs), plain)
    assert stats(model).originals == {"arguments that are no plain tensors": 2}


# -------------------------------------------------------------------------------------------------- sharded weights


@pytest.fixture
def mesh() -> Iterator[Any]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield dist.device_mesh.init_device_mesh("cpu", (1,))
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("kind", [SIGMA, COG_2B], ids=str)
def test_sharded_models_are_refused_and_later_left_to_themselves(kind: Kind, mesh: Any) -> None:
    from torch.distributed.fsdp import fully_shard

    def shard(pipe: Any) -> None:
        for block in pipe.transformer.transformer_blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(pipe.transformer, mesh=mesh)

    pipe = kind.pipeline()
    plain = kind.draw(pipe)
    enable(pipe, uncached(pipe))
    shard(pipe)
    assert torch.equal(kind.draw(pipe), plain)
    assert stats(pipe).originals
    pipe = kind.pipeline()
    shard(pipe)
    with pytest.raises(InputError, match=r"is a DTensor, and the engine reads plain tensors there; .* load .* whole"):
        enable(pipe, uncached(pipe))
    assert torch.equal(kind.draw(pipe), plain)


@pytest.mark.parametrize("kind", THREE, ids=str)
def test_layers_that_are_parallel_run_as_the_modules_that_they_are(kind: Kind, mesh: Any) -> None:
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    def parallelise(pipe: Any) -> None:
        for block in pipe.transformer.transformer_blocks:
            parallelize_module(block.ff, mesh, {"net.0.proj": ColwiseParallel(), "net.2": RowwiseParallel()})

    pipe = kind.pipeline()
    plain = kind.draw(pipe)
    for when in ("before", "after"):
        pipe = kind.pipeline()
        if when == "before":
            parallelise(pipe)
        enable(pipe, uncached(pipe))
        if when == "after":
            parallelise(pipe)
        assert (kind.draw(pipe) - plain).abs().max() <= 1e-5 * plain.abs().max()
        assert not stats(pipe).originals


def test_layers_that_quantise_their_input_find_the_very_one() -> None:
    """torchao's, where it is installed: a last bit of the input would come out a thousand times as large."""
    torchao = pytest.importorskip("torchao.quantization")

    def quantise(pipe: Any) -> None:
        torchao.quantize_(pipe.transformer, torchao.Int8DynamicActivationInt8WeightConfig())

    pipe = DIT.pipeline()
    quantise(pipe)
    plain = DIT.draw(pipe)
    enable(pipe, uncached(pipe))
    assert (DIT.draw(pipe) - plain).abs().max() <= 1e-5 * plain.abs().max()
