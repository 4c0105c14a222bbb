"""Families of models: recognition by layout, and what an author gets from a `Layout` without writing it."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers_tiny import tiny_cogvideox, tiny_pixart, tiny_transformer
from tiny import tiny_dit
from torch import nn

from ebcache_fast import CacheTable, enable
from ebcache_fast.dropin import diffusers_signatures
from ebcache_fast.dropin.diffusers_signatures import signature_of
from ebcache_fast.dropin.signatures import ForwardCall
from ebcache_fast.engine.workspace import Workspace
from ebcache_fast.errors import InputError
from ebcache_fast.models import FAMILIES, Denoiser, Family, PixArtDenoiser, as_denoiser
from ebcache_fast.models.base import BranchResources
from ebcache_fast.ops import reference
from ebcache_fast.ops.operations import TORCH
from ebcache_fast.plan import Branch

pytest.importorskip("diffusers")

Make = Callable[[], Any]
OF_EACH: tuple[Make, ...] = tiny_dit, tiny_transformer, tiny_pixart, tiny_cogvideox  # in the order of FAMILIES
every_family = pytest.mark.parametrize(("family", "make"), [*zip(FAMILIES, OF_EACH, strict=True)])


@every_family
def test_a_model_is_of_one_family_alone(family: type[Family], make: Make) -> None:
    model = make()
    assert type(as_denoiser(model)) is family
    assert [other for other in FAMILIES if not other.layout.missing(model)] == [family]
    assert issubclass(Denoiser, Family)


@every_family
def test_a_family_is_called_in_a_known_way(family: type[Family], make: Make) -> None:
    """Its signature's own call of the model returns as many channels as the family says."""
    model = make().double()
    latents, context = (denoiser := as_denoiser(model)).probe_inputs(2)
    x, labels = torch.randn(2, *latents, dtype=torch.float64), torch.zeros(2, dtype=torch.int64)
    out = signature_of(model).ask(model, ForwardCall(x, torch.tensor([500, 500]), labels, context=context))
    assert out.shape == (2, denoiser.out_channels, *latents[1:])


def test_a_family_in_a_way_of_its_own_is_called_as_the_one_it_came_from(monkeypatch: pytest.MonkeyPatch) -> None:
    class Nearby(PixArtDenoiser):
        """A family of its own."""

    monkeypatch.setattr(diffusers_signatures, "as_denoiser", Nearby)
    assert signature_of(tiny_pixart()) is diffusers_signatures.PixArtSignature


def test_a_family_without_a_signature_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diffusers_signatures, "_SIGNATURES", {PixArtDenoiser: diffusers_signatures.PixArtSignature})
    told = r"^DiTDenoiser, the family of a DiT, has no signature, .* PixArtDenoiser; add .* ebcache_fast\.dropin\.diff"
    with pytest.raises(InputError, match=told):
        enable(tiny_dit(), CacheTable((999, 0), (0, 0)))


@every_family
def test_what_is_missing_of_the_nearest_is_named_and_nothing_of_others(family: type[Family], make: Make) -> None:
    model = make()
    owner, _, name = family.layout.head.rpartition(".")
    delattr(model.get_submodule(owner), name)
    lacking = f"of the nearest, {family.layout.name}, it lacks '{family.layout.head}"
    with pytest.raises(InputError, match=lacking) as error:
        as_denoiser(model)
    text = str(error.value)
    assert all(other.layout.name in text for other in FAMILIES)
    assert "\n" not in text
    assert text.count("lacks") == 1


@pytest.mark.parametrize("model", [nn.Linear(3, 3), nn.Sequential(nn.Linear(3, 3))])
def test_a_model_that_is_near_to_none_lacks_nothing_in_particular(model: nn.Module) -> None:
    names = ", ".join(family.layout.name for family in FAMILIES)
    with pytest.raises(InputError) as error:
        as_denoiser(model)
    name = type(model).__name__
    assert str(error.value) == f"{name} is of no known family: {names}; pass a model of one of these"


@every_family
def test_each_block_is_looked_at(family: type[Family], make: Make) -> None:
    """Norms are checked, hooks found and foreign layers named in all blocks alike, by their paths from the model."""
    layout = family.layout
    for i in range(2):
        prefix = f"{layout.blocks}.{i}"
        model = make()
        for path in layout.norms.values():
            swapped = make()
            owner, _, name = f"{prefix}{path}".rpartition(".")
            setattr(swapped.get_submodule(owner), name, nn.RMSNorm(16))
            with pytest.raises(InputError, match=f"'{prefix}{path}' is a RMSNorm"):
                as_denoiser(swapped)
        assert as_denoiser(model).passed_over_hooks() is None
        handle = model.get_submodule(prefix).register_forward_hook(lambda *_: None)
        assert as_denoiser(model).passed_over_hooks() == prefix
        handle.remove()
        assert as_denoiser(model).foreign_layer() is None
        owner, _, name = f"{prefix}{layout.dtype_of}".rpartition(".")
        linear = model.get_submodule(owner).get_submodule(name)
        linear.__class__ = type("Wrapped", (nn.Linear,), {"__module__": "elsewhere"})
        assert as_denoiser(model).foreign_layer() == f"{prefix}{layout.dtype_of}"


@every_family
def test_tensors_that_are_read_as_they_are_have_to_be_plain(family: type[Family], make: Make) -> None:
    class Strange(nn.Parameter):
        pass

    for path in family.layout.paths(make(), family.layout.read):
        model = make()
        owner, _, name = path.rpartition(".")
        module = model.get_submodule(owner)
        module._parameters[name] = Strange(getattr(module, name).detach())
        with pytest.raises(InputError, match=f"'{path}' is a Strange, and the engine reads plain tensors"):
            as_denoiser(model)


@every_family
def test_sizes_of_other_latents_leave_the_model_as_it_was(family: type[Family], make: Make) -> None:
    denoiser = as_denoiser(make())
    before = denoiser.shape, denoiser.latent_shape
    latents, context = denoiser.probe_inputs(2)
    for_shape = denoiser.for_shape(latents, context)
    assert for_shape.latent_shape == latents
    assert for_shape.shape.tokens == for_shape.text_tokens + for_shape.latent_tokens
    assert (denoiser.shape, denoiser.latent_shape) == before
    assert for_shape.shape.width == for_shape.width == 16


@every_family
def test_head_and_its_linear_map_agree(family: type[Family], make: Make) -> None:
    """The bare map, its features placed patch by patch, is the module's own head."""
    denoiser = as_denoiser(make().double())
    latents, context = denoiser.probe_inputs(2)
    denoiser = denoiser.for_shape(latents, context)
    u = torch.randn(2, denoiser.latent_tokens, 16, dtype=torch.float64)
    linear = denoiser.head_linear()
    tokens = nn.functional.linear(u, linear.weight, linear.bias)
    height = latents[1] * latents[2] if len(latents) == 4 else latents[1]  # frames below each other
    out = u.new_empty(2, denoiser.out_channels, height, latents[-1])
    with torch.no_grad():
        reference.unpatchify(tokens, out)
        torch.testing.assert_close(denoiser.head(u).reshape(out.shape), out, rtol=1e-12, atol=1e-12)


MODULES = {Branch.SELF_ATTN: ("attn", "attn1"), Branch.CROSS_ATTN: ("attn2",), Branch.MLP: ("mlp", "ff")}


@every_family
def test_costs_of_a_layer_are_its_matrices(family: type[Family], make: Make) -> None:
    """Each weight is multiplied once a token, and attention adds two products of all tokens and keys. Keys and values
    of text are computed once for a run, and count for no step.
    """
    denoiser = as_denoiser(model := make())
    latents, context = denoiser.probe_inputs(2)
    shape, block = denoiser.for_shape(latents, context).shape, model.get_submodule(f"{family.layout.blocks}.0")
    keys = {Branch.SELF_ATTN: shape.tokens, Branch.CROSS_ATTN: 3, Branch.MLP: 0}  # 3 of the probe's text
    branches = [site for site in shape.site_shapes if site.layer == 0]
    assert len(branches) * denoiser.shape.depth == len(shape.site_shapes)
    for site in branches:
        (module,) = (getattr(block, name) for name in MODULES[site.branch] if hasattr(block, name))
        once_a_run = ("to_k", "to_v") if site.branch is Branch.CROSS_ATTN else ()
        matrices = (p for name, p in module.named_parameters() if p.ndim == 2 and not name.startswith(once_a_run))
        assert site.weights == sum(matrix.numel() for matrix in matrices)
        assert site.macs == site.weights * shape.tokens + 2 * shape.tokens * keys[site.branch] * shape.width
        assert site.is_normed is (site.branch in family.layout.norms)


def test_linear_and_gelu_are_one_operation_for_a_plain_layer_alone() -> None:
    memory, linear, u = (
        Workspace(torch.float64, torch.device("cpu")),
        nn.Linear(16, 24).double(),
        torch.ones(2, 3, 16).double(),
    )
    res = BranchResources(replace(TORCH, linear_gelu=reference.linear_gelu), scratch=memory, per_run=memory)
    with torch.no_grad():
        fused, apart = res.linear_gelu(linear, u), nn.functional.gelu(linear(u), approximate="tanh")
    assert fused is not None
    torch.testing.assert_close(fused, apart, rtol=1e-12, atol=1e-12)
    assert res._replace(operations=TORCH).linear_gelu(linear, u) is None
    assert res.linear_gelu(linear, u.float()) is None  # as under autocast
    linear.register_forward_hook(lambda *_: None)
    assert res.linear_gelu(linear, u) is None
