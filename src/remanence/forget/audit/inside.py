"""Audits inside a life: each served request is attacked at once, against the model before it and, where a recipe has one, the oracle's."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import nn

from remanence.forget.audit.run import audit, check
from remanence.forget.audit.settings import AuditSettings
from remanence.stream import Moment, Request


@dataclass(frozen=True)
class RequestAuditor:
    """Audit every request of a life (an `Auditor`).

    Args:
        settings: how to audit.
        progress: draw a bar.
    """

    settings: AuditSettings = field(default_factory=AuditSettings)
    progress: bool = True

    def check(self, model: nn.Module, request: Request, oracle: nn.Module | None, processor: Any) -> None:
        """Refuse models and rows that do not fit each other.

        Raises:
            Mistake: see `audit`.
        """
        check(request, {"model": model} | ({"oracle": oracle} if oracle is not None else {}), processor)

    def audit(self, model: nn.Module, request: Request, original: nn.Module, oracle: nn.Module | None, at: Moment) -> dict[str, Any]:
        """Return the report as plain JSON, see `audit`."""
        report = audit(
            model,
            request,
            processor=at.processor,
            original=original,
            oracle=oracle,
            settings=self.settings,
            seed=at.seed,
            progress=self.progress,
        )
        return report.as_dict()
