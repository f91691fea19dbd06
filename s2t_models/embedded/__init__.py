"""The model pair that ships with the project: a tiny SLM and teacher, trained on generated word problems.

`generator` draws the problems and their splits, `corpus` writes the training texts, `build` trains the pair
again from nothing. Only the embedded task and the demo import this package.
"""

from pathlib import Path

_WEIGHTS = Path(__file__).parent / "weights"


def slm_path() -> Path:
    """Model directory of the SLM, in transformers format."""
    return _WEIGHTS / "slm"


def teacher_path() -> Path:
    """Model directory of the teacher, in transformers format."""
    return _WEIGHTS / "teacher"
