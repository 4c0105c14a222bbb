"""Former paths of modules, and former names in them: both keep working for one release, with a warning.

`import ebcache_fast.presets` gives the very module `ebcache_fast.apps.bundled`. This folder goes with that release.
"""

import sys
import warnings
from collections.abc import Iterable, Mapping, Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import MappingProxyType, ModuleType
from typing import Any, Final

PACKAGE: Final = "ebcache_fast"

MODULES: Final[Mapping[str, str]] = MappingProxyType(
    {
        "algorithm1": "calibration.algorithm1",
        "attach": "dropin.enable",
        "cache_table": "plan.table",
        "calibration_progress": "calibration.progress",
        "calibration_target": "calibration.target",
        "calibration_voting": "calibration.voting",
        "cli": "apps.cli",
        "compare": "apps.compare",
        "console": "apps.console",
        "demo": "apps.demo",
        "dropin.advice": "dropin.departures",
        "dropin.capture_call": "calibration.capture_call",
        "dropin.velocity": "dropin.output_change",
        "dry_run": "dropin.dry_run",
        "engine.ends": "engine.embed_head",
        "engine.feature_cache": "engine.cache",
        "engine.fingerprint": "engine.module_watch",
        "engine.numerics": "engine.flags",
        "engine.step_clock": "engine.clock",
        "fallback": "ops.fallback",
        "files": "plan.files",
        "job": "apps.jobs",
        "methods": "apps.method_spec",
        "models.cogvideox_denoiser": "models.cogvideox",
        "models.cogvideox_sizes": "models.cogvideox",
        "models.denoiser": "models.base",
        "models.diffusers_denoiser": "models.base",
        "models.diffusers_dit_denoiser": "models.diffusers_dit",
        "models.dit": "models.modules",
        "models.dit_denoiser": "models.facebook_dit",
        "models.dit_embeddings": "models.embeddings",
        "models.dit_layout": "models.layout",
        "models.letter_classifier": "apps.quality.letter_classifier",
        "models.pixart_denoiser": "models.pixart",
        "models.pixart_sizes": "models.pixart",
        "noise_schedule": "samplers.schedule",
        "operands": "ops.operands",
        "pictures": "apps.pictures",
        "pipeline_calibration": "calibration.pipeline",
        "presets": "apps.bundled",
        "profile_job": "apps.profile",
        "profiling": "apps.profiling",
        "program_report": "apps.program_report",
        "quality": "apps.quality",
        "reference": "ops.reference",
        "reference_tokens": "ops.reference_tokens",
        "report": "apps.report",
        "retiming": "plan.retiming",
        "room": "apps.room",
        "sampler_step": "ops.update",
        "samplers.data_form": "samplers.x0_form",
        "samplers.of_scheduler": "samplers.from_diffusers",
        "table_checks": "plan.table_checks",
        "table_file": "plan.table_file",
        "table_fit": "plan.table_fit",
        "table_importers": "plan.importers",
        "table_schema": "plan.table_schema",
        "table_set": "plan.table_set",
        "table_steps": "plan.table_steps",
        "timeline": "apps.timeline",
        "timeline_picture": "apps.timeline_picture",
    }
)

NAMES: Final[Mapping[str, str]] = MappingProxyType(
    {
        "At": "StepIndex",
        "CogVideoXContext": "CogVideoXConditioning",
        "Context": "Conditioning",
        "DataForm": "X0Form",
        "Ending": "Tail",
        "Ends": "EmbedHead",
        "Guide": "GuidanceArgs",
        "Means": "BranchResources",
        "Numerics": "Flags",
        "PixArtContext": "PixArtConditioning",
        "Scratch": "BufferPool",
    }
)


class FormerModules(MetaPathFinder, Loader):
    """Finds modules by their former paths."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The spec of a former module, or of what lay in one; None of all others."""
        return None if moved(fullname) is None else ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec: ModuleSpec) -> None:
        """Leave it to Python to make an empty module, in the place of which the moved one is put."""

    def exec_module(self, module: ModuleType) -> None:
        """Put the moved module where the former one is looked for, with the names that it had."""
        name = module.__name__
        where = str(moved(name))
        warn(name, where)
        found = import_module(where)
        for former, now in NAMES.items():
            if hasattr(found, now) and not hasattr(found, former):
                setattr(found, former, getattr(found, now))
        sys.modules[name] = found


def moved(name: str) -> str | None:
    """Full name by now of a module of this former name; None of a name that is not a former one."""
    parts = name.removeprefix(f"{PACKAGE}.").split(".") if name.startswith(f"{PACKAGE}.") else []
    for end in range(len(parts), 0, -1):
        if (now := MODULES.get(".".join(parts[:end]))) is not None:
            return ".".join((PACKAGE, now, *parts[end:]))
    return None


def former_module(name: str) -> ModuleType:
    """The module that a former one of the package is now, with a warning; AttributeError for what was none."""
    if (where := moved(f"{PACKAGE}.{name}")) is None:
        raise AttributeError(f"module {PACKAGE!r} has no attribute {name!r}")
    warn(f"{PACKAGE}.{name}", where, stacklevel=4)
    return import_module(where)


def former_name(module: str, name: str) -> Any:
    """The object that a module calls otherwise by now, with a warning; AttributeError for a name that it never had."""
    if name not in NAMES:
        raise AttributeError(f"module {module!r} has no attribute {name!r}")
    warn(f"{module}.{name}", f"{module}.{NAMES[name]}", stacklevel=4)
    return getattr(import_module(module), NAMES[name])


def former_home(module: str, name: str, now: str, names: Iterable[str]) -> Any:
    """The object that a module had until it became a folder, with a warning; AttributeError unless it is in ``names``.

    now: the module in that folder which has it.
    """
    if name not in names:
        raise AttributeError(f"module {module!r} has no attribute {name!r}")
    warn(f"{module}.{name}", f"{module}.{now}.{name}", stacklevel=4)
    return getattr(import_module(f"{module}.{now}"), name)


def warn(former: str, now: str, *, stacklevel: int = 3) -> None:
    """Warn of a name that will go."""
    warnings.warn(f"{former} will go with the next release; use {now}", DeprecationWarning, stacklevel=stacklevel)


def install() -> None:
    """Put the finder of former modules in place; once, however often the package is imported."""
    if not any(type(finder).__name__ == FormerModules.__name__ for finder in sys.meta_path):
        sys.meta_path.insert(0, FormerModules())  # before whatever else finds parts of the package
