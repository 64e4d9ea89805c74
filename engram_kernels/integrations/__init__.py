"""Work with other libraries, each of which is imported only when it is asked for."""

from __future__ import annotations

from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .flash_linear_attention import FlaRidgeMemory
    from .patching import Acceleration

__all__ = ["accelerate", "register_with_fla"]


def accelerate(module_or_name: ModuleType | str) -> Acceleration:
    """Make another editing library faster, in place, until that is reverted.

    Functions that the library looks up when it calls them are replaced by others of the same signature,
    shapes, types and devices; its own code, caches and hyper-parameters stay in use. What ours cannot do
    soundly is handed to the library's own function, once with a warning, and counted in the report.

    | library | algorithms |
    |---|---|
    | `easyeditor` | ROME, R-ROME, MEMIT, EMMET, AlphaEdit |
    | `rome` | ROME |
    | `memit` | MEMIT |

    Args:
        module_or_name: the library's package, or its name, such as `"easyeditor"`; `"rome"` and `"memit"` are
            the packages of those names in the repositories of ROME and MEMIT.

    Returns:
        A report of what was replaced, what was not and why. `.revert()` puts the very same objects back, and
        so does the end of a `with` block.

    Raises:
        TypeError: `module_or_name` is neither a module nor a string.
        EngramError: the library cannot be imported, is none of these, is of a version that is not known, or
            is accelerated already. Nothing is replaced then.

    Example:
        >>> with ek.integrations.accelerate("easyeditor") as report:
        ...     print(report)
        ...     editor.edit(prompts, target_new=targets, subject=subjects)

    Source: Meng et al. 2022 (arXiv 2202.05262), Meng et al. 2023 (arXiv 2210.07229).
    """
    from .libraries import acceleration

    return acceleration(module_or_name)


def register_with_fla() -> type[FlaRidgeMemory]:
    """Put the ridge memory among flash-linear-attention's layers: `fla.layers.RidgeMemory`.

    It is `ek.layers.RidgeMemory` with that library's arguments: a padding mask, its cache, `layer_idx`.

    Returns:
        The class.

    Raises:
        EngramError: flash-linear-attention cannot be imported.

    Example:
        >>> ek.integrations.register_with_fla()
        >>> from fla.layers import RidgeMemory
    """
    from .flash_linear_attention import register

    return register()
