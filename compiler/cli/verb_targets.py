"""`tcompile targets`: what can be compiled for."""

from __future__ import annotations

from .terminal import Json, guarded, print_json, print_table


@guarded
def targets_verb(as_json: bool = Json) -> None:
    """List the targets that --target takes; `cpu` is this machine.

    Examples:

      tcompile targets

      tcompile targets --json
    """
    from ...targets.base import Target
    from ...targets.registry import BACKENDS

    texts = [f"{kind}:{name}" for kind, backend in BACKENDS.items() for name in backend.names()]
    targets = {text: Target.parse(text) for text in texts}
    if as_json:
        print_json({text: target.to_dict() for text, target in targets.items()})
        return
    print_table(
        ["target", "cores", "vector bits", "fp32 GFLOP/s per core", "formats"],
        [[text, item.cores, item.vector_bits, f"{item.peak_gflops():.0f}", ", ".join(sorted(item.formats))] for text, item in targets.items()],
    )
