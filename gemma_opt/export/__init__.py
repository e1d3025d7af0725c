"""Folders that other programs load: plain transformers, vLLM through compressed-tensors, and ExecuTorch."""

from gemma_opt.export.folder import Exported, ExportFormat, export, refuse
from gemma_opt.export.hub import push, refuse_name

__all__ = ["ExportFormat", "Exported", "export", "push", "refuse", "refuse_name"]
