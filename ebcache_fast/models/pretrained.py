"""Transformers of diffusers from folders on the disk."""

import json
import os
from pathlib import Path
from typing import Any, cast

from torch import nn

from ebcache_fast.errors import InputError

_CONFIG = "config.json"


def load_pretrained(folder: str | os.PathLike[str], **options: Any) -> nn.Module:
    """The transformer that diffusers' ``save_pretrained`` wrote to ``folder``, alone or in its pipeline; in eval mode.

    Nothing is downloaded, and no code of the folder is run. options: as diffusers' ``from_pretrained`` takes them, such
    as ``torch_dtype``. Raises InputError where diffusers is not installed, or the folder holds no such model.
    """
    try:
        import diffusers
    except ImportError as error:
        raise InputError("diffusers is not installed; pip install 'ebcache-fast[diffusers]'") from error
    found = next((one for one in (Path(folder), Path(folder) / "transformer") if (one / _CONFIG).is_file()), None)
    if found is None:
        raise InputError(f"{folder} has no {_CONFIG}, nor has its transformer/; pass a folder of save_pretrained")
    try:
        name = json.loads((found / _CONFIG).read_text(encoding="utf-8"))["_class_name"]
        kind = getattr(diffusers, name)  # Transformer2DModel too, as older folders call what has classes of its own now
        model = kind.from_pretrained(found, local_files_only=True, **options)
    except Exception as error:  # whatever a damaged file makes of its readers
        first = (str(error).splitlines() or [""])[0]
        raise InputError(f"{found} can't be loaded ({type(error).__name__}: {first}); save it again") from error
    return cast(nn.Module, model.eval())
