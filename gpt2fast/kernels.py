"""The package `gpt2fast.kernels`: the Triton implementation of the seven names. Its files are in ../kernels.

Why this file is a package. A top-level import package named `kernels` would collide with Hugging Face's package of
that name (with both on the path, `from transformers import GPT2LMHeadModel` fails; installing ours would overwrite
theirs). So the folder `kernels/` has no `__init__.py` and is never imported as `kernels`. It is installed as
`gpt2fast/kernels/` (pyproject.toml, package-dir); Python prefers this module to a folder without `__init__.py`, and a
module that has a `__path__` is a package. In a plain checkout the folder is one level up.

No public name is also the name of a file in kernels/, so `gpt2fast.kernels.NAME` never depends on what was imported.
"""

from pathlib import Path

_here = Path(__file__).resolve().parent
_folders = (_here / "kernels", _here.parent / "kernels")  # installed, checkout
__path__ = [str(folder) for folder in _folders if (folder / "registration.py").is_file()][:1]

# below __path__, which these need to be found
from gpt2fast.kernels.adamw import ParameterTable, adamw_, gradient_norm  # noqa: E402
from gpt2fast.kernels.attention_decode import cached_attention  # noqa: E402
from gpt2fast.kernels.attention_forward import attention, flash_attention  # noqa: E402
from gpt2fast.kernels.embeddings import embedding  # noqa: E402
from gpt2fast.kernels.layernorm import add_layer_norm, layer_norm  # noqa: E402
from gpt2fast.kernels.loss import cross_entropy, linear_cross_entropy  # noqa: E402
from gpt2fast.kernels.projections import linear, mlp  # noqa: E402
from gpt2fast.kernels.registration import interpreter_fault  # noqa: E402
from gpt2fast.kernels.tanh_gelu import bias_gelu, gelu  # noqa: E402

__all__ = [
    "ParameterTable", "adamw_", "add_layer_norm", "attention", "bias_gelu", "cached_attention", "cross_entropy",
    "embedding", "flash_attention", "gelu", "gradient_norm", "interpreter_fault", "layer_norm", "linear",
    "linear_cross_entropy", "mlp",
]  # fmt: skip
