"""A dataflow plan's matrix-vector chain in SystemVerilog."""

from __future__ import annotations

from .plan import DataflowPlan


def project(plan: DataflowPlan) -> dict[str, str]:
    return {}
