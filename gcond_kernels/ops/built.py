"""Why an extension module is missing."""

from pathlib import Path

# Written by setup.py where the module would be.
_REASON = Path(__file__).parents[1] / "_cpu_missing.txt"


def why_cpu_is_not_built() -> str:
    """Return why the C++ extension of the CPU backend is missing."""
    reason = "pip install . builds it with a C++ compiler, unless GCOND_BUILD_CPU=0 is set"
    if _REASON.is_file():
        reason = _REASON.read_text(encoding="utf-8").strip()
    return (
        f"its C++ extension is not built: {reason} (and then pip install --force-reinstall "
        "--no-cache-dir --no-deps: pip keeps the wheel that it has made)"
    )
