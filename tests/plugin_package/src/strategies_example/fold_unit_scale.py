"""`fold-unit-scale`: multiplications by one."""

import autosp_ir as air


@air.register_pass("fold-unit-scale", stage=("forward", "joint"))
def fold_unit_scale(program: air.Program, ctx: air.PassContext) -> None:
    """Remove multiplications by one."""
    rewriter = ctx.rewriter(program)
    for node in program.find("aten.mul.Tensor"):
        if node.args[1] == 1.0 and node.operands[0].type == node.result.type:
            rewriter.replace(node, node.operands[0])
            ctx.count("folded")
