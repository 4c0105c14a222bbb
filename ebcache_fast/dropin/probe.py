"""Probe of a model's forward against its parts: one tiny batch through both, before anything is replaced."""

from functools import partial

import torch
from torch import Tensor, nn

from ebcache_fast.dropin.diffusers_signatures import signature_of
from ebcache_fast.dropin.other_caches import has_foreign_forward, refuse_parts_that_keep
from ebcache_fast.dropin.patching import bare
from ebcache_fast.dropin.signatures import ForwardCall
from ebcache_fast.engine.buffers import Tail
from ebcache_fast.engine.engine import Engine
from ebcache_fast.engine.graphs import no_graphs
from ebcache_fast.engine.guidance import GUIDED_CHANNELS
from ebcache_fast.errors import EBCacheError, InputError
from ebcache_fast.models import as_denoiser
from ebcache_fast.models.layers import parameters_of
from ebcache_fast.plan import Plan

# Of the largest output. Two orders of the same sums differ by far less; another kind of attention, by far more.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-2, torch.float16: 0.1, torch.bfloat16: 0.1}
CFG_SCALE = 4.0
# Rows, and whether the latents are small. A model may not take as few tokens, or it cuts its batch into thirds, as
# perturbed attention does for guidance; the next is tried where its own forward raises.
BATCHES = ((2, True), (6, True), (6, False), (2, False))
NEARBY = (0.05, 0.1, 0.3)  # by how much latents differ from those before, for whoever caches where they differ little


@torch.no_grad()
def probe(model: nn.Module, plan: Plan) -> int:
    """Number of channels that the model's forward_with_cfg guides; 0 where it has none, or does something else.

    Raises InputError where its forward is not what the engine would run in its place.
    """
    weight = as_denoiser(model).weight()
    if any(parameter.is_meta for parameter in parameters_of(model)):
        raise InputError(
            f"{type(model).__name__} is on the meta device, without weights; load them first, and offload whole "
            "models (enable_model_cpu_offload), not layers"
        )
    with torch.autocast(weight.device.type, enabled=False), bare(model):
        return _probe(model, plan)


def _probe(model: nn.Module, plan: Plan) -> int:
    asked, why = _first_answer(model, plan)
    if isinstance(why, Exception):
        raise InputError(
            f"{type(model).__name__} can't be tried on {asked}: its own forward, hooks included, raised {said(why)}; "
            "call it so without enable, and mend what it says, or convert it to a dtype that it runs in"
        ) from why
    if why is not None:
        raise InputError(
            f"{type(model).__name__} has the layout of a DiT, but its forward computes something else, and the engine "
            f"would run the usual one: on {asked} {why}; pass a module that computes what its parts say, without "
            "another cache around it"
        )
    if has_foreign_forward(model) and any(map(asked.difference_again, NEARBY)):
        raise InputError(
            f"{type(model).__name__}'s forward was replaced by one that answers a call with what it kept of another: a "
            "cache of another library; take that one away first"
        )
    refuse_parts_that_keep(model, [partial(asked.ask_again, by) for by in (*NEARBY, 1.0)])
    channels = as_denoiser(model).latent_shape[0]
    guesses = dict.fromkeys((min(GUIDED_CHANNELS, channels), channels)) if hasattr(model, "forward_with_cfg") else {}
    return next((n for n in guesses if asked.difference(n) is None), 0)


def _first_answer(model: nn.Module, plan: Plan) -> tuple["_Probe", str | Exception | None]:
    """The first batch that the model's own forward takes, else the last, and the difference on it."""
    for rows, small in BATCHES:
        asked = _Probe(model, plan, rows, small=small)
        if not isinstance(why := asked.difference(), Exception):
            break
    return asked, why


def said(error: Exception) -> str:
    """An error's type and the first line of what it says."""
    text = " ".join(str(error).split("\n", 1)[0].split())
    return f"{type(error).__name__}: {text:.200}" if text else type(error).__name__


class _Probe:
    """Probe of an even number of rows, of the first and the last label in turn, at a plan's first timestep."""

    def __init__(self, model: nn.Module, plan: Plan, rows: int, *, small: bool) -> None:
        self._model, self._engine = model, Engine(model, make_graphs=no_graphs)
        denoiser, weight = self._engine.denoiser, self._engine.denoiser.weight()
        generator = torch.Generator("cpu").manual_seed(0)
        dtype = torch.int64 if isinstance(plan.timesteps[0], int) else torch.float32
        t = torch.tensor(plan.timesteps[0], dtype=dtype, device="cpu")
        latents, context = denoiser.probe_inputs(rows, small=small)
        self._call = ForwardCall(
            x=torch.randn(rows, *latents, generator=generator, device="cpu").to(weight),
            t=t.repeat(rows).to(weight.device),
            y=torch.tensor((0, denoiser.num_classes - 1 + denoiser.has_null_label) * (rows // 2), device=weight.device),
            cfg_scale=CFG_SCALE,
            context=context,
        )
        self._plan = Plan.uncached((t.item(),), plan.sites)

    def __str__(self) -> str:
        x = self._call.x
        return f"a batch of x {tuple(x.shape)} in {x.dtype}"

    def difference_again(self, by: float) -> str | Exception | None:
        """`difference` for latents that are not far from those of before."""
        self._go_away(by)
        return self.difference()

    def ask_again(self, by: float) -> None:
        """Call the model's own forward, with such latents."""
        self._go_away(by)
        signature_of(self._model).ask(self._model, self._call)

    def _go_away(self, by: float) -> None:
        x = self._call.x
        away = torch.randn(x.shape, generator=torch.Generator("cpu").manual_seed(1), device="cpu").to(x)
        self._call = self._call._replace(x=x + by * away)

    def difference(self, guided_channels: int = 0) -> str | Exception | None:
        """Account of what sets the engine apart from the model's own method, which guides if channels are guided.

        None where both compute the same; the very error where the model's own raises one.
        """
        call = self._call._replace(guided_channels=guided_channels)
        signature = signature_of(self._model)
        try:
            own = signature.ask(self._model, call)
        except Exception as error:  # whatever a model, its hooks, or a method of another meaning may raise
            return error
        try:
            ours = self._predict(call)
        except EBCacheError:
            raise
        except Exception as error:  # whatever parts that don't fit together may raise
            return f"its parts, run one by one, raised {said(error)}"
        if not isinstance(own, Tensor):
            return f"it returned a {type(own).__name__}, and no tensor"
        if (own.shape, own.dtype) != (ours.shape, ours.dtype):
            wanted, got = (f"{tuple(out.shape)} in {out.dtype}" for out in (ours, own))
            return f"it returned {got}, where its parts return {wanted}"
        distance = float((own.double() - ours.double()).abs().max() / own.double().abs().max())
        largest = TOLERANCE[ours.dtype]
        if distance <= largest or torch.equal(own, ours):
            return None
        return f"they differ by {distance:.1e} of the largest output, above {largest:g}"

    def _predict(self, call: ForwardCall) -> Tensor:
        run = self._engine.forward_run(self._plan, call.batch, Tail())
        run.guide(CFG_SCALE)
        ours = run.predict(0, call.x)
        self._engine.release(run.buffer_set)
        return ours
