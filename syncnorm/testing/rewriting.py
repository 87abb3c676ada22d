"""Let a failing assert show its values on a rank, too, if pytest runs the tests.

pytest rewrites the asserts of the modules that it imports. The ranks import the test's module anew, and from pytest's
cache if it has been rewritten there. What this needs of pytest is not public. If a version of pytest does it in another
way, a failing assert shows no values.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence

__all__ = ["rewrite", "rewritten_modules"]


def rewritten_modules() -> list[str]:
    """Return the modules of this process whose asserts pytest has rewritten."""
    hook = getattr(sys.modules.get("_pytest.assertion.rewrite"), "AssertionRewritingHook", None)
    if hook is None:
        return []
    loaders = {name: getattr(module, "__loader__", None) for name, module in list(sys.modules.items())}
    return [name for name, loader in loaders.items() if isinstance(loader, hook)]


def rewrite(modules: Sequence[str]) -> None:
    """Rewrite the asserts of these modules when this process imports them."""
    missing = [name for name in modules if name not in sys.modules]
    if not missing:
        return
    with contextlib.suppress(AttributeError, ImportError, TypeError):
        import pytest
        from _pytest.assertion import install_importhook
        from _pytest.config import get_config

        config = get_config()
        vars(config).setdefault("inicfg", {})  # of pytest 8, which has read no settings
        install_importhook(config)
        pytest.register_assert_rewrite(*missing)
