"""Audits: what remains of rows that a model was asked to forget, found out from outside and under attack."""

from remanence.forget.audit.report import AuditReport, Finding
from remanence.forget.audit.run import audit
from remanence.forget.audit.settings import AuditSettings
from remanence.forget.audit.verdict import Thresholds

__all__ = ["AuditReport", "AuditSettings", "Finding", "Thresholds", "audit"]
