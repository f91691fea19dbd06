"""What cannot be had of the policies."""

from __future__ import annotations

from s2t_models.errors import UserError


class PolicyError(UserError):
    """A policy that cannot be had; the message is one line saying which and why."""
