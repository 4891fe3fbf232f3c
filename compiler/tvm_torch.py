"""The part of TVM that needs torch: its op converters. Import this module only after torch has been found."""

from __future__ import annotations

from tvm.relax.frontend.torch.exported_program_translator import ExportedProgramImporter

__all__ = ["ExportedProgramImporter"]
