"""From logical mesh axes to the process groups of a run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from autosp_ir.errors import RuntimeMismatchError
from autosp_ir.ir.graph import Node
from autosp_ir.ir.program import Program
from autosp_ir.ir.streams import mesh_axis


@dataclass(frozen=True)
class MeshBinding:
    """The process groups that carry a program's mesh axes.

    Args:
        groups: Axis name to process group; axes of size 1 need none.
        sizes: Axis name to size.
    """

    groups: Mapping[str, dist.ProcessGroup] = field(default_factory=dict)
    sizes: Mapping[str, int] = field(default_factory=dict)

    def group_name(self, stream: str) -> str:
        """The c10d name of a stream's group; the logical name when its axis has one rank.

        The first stream of an axis is the axis's own group; a further one is made when it is first named, on every
        rank of the group at once, and lives as long as the process.
        """
        axis = mesh_axis(stream)
        group = self.groups.get(axis)
        if group is None:
            return stream
        return group.group_name if stream == axis else _further_group(group, stream).group_name


_FURTHER: dict[tuple[str, str], dist.ProcessGroup] = {}


def _further_group(group: dist.ProcessGroup, stream: str) -> dist.ProcessGroup:
    """Another group of the same ranks, one for each stream."""
    key = group.group_name, stream
    if key not in _FURTHER:
        ranks = dist.get_process_group_ranks(group)
        made = dist.new_group(ranks, use_local_synchronization=True, group_desc=f"autosp_ir {stream}")
        _FURTHER[key] = made
    return _FURTHER[key]


def bind_mesh(program: Program, mesh: DeviceMesh | None) -> MeshBinding:
    """Find the groups of every axis of a program's mesh.

    Args:
        program: The program; its mesh names axes and sizes.
        mesh: A device mesh with named dimensions; None when all ranks are the program's only axis.

    Raises:
        RuntimeMismatchError: No process group runs, an axis is missing, or a size differs.
    """
    wanted = {axis: size for axis, size in program.mesh.items() if size > 1}
    if not wanted:
        return MeshBinding({}, dict(program.mesh))
    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeMismatchError(
            f"the program needs {wanted} ranks, but torch.distributed is not initialized",
            hint="start the script with torchrun and call torch.distributed.init_process_group(), "
            "or run every rank in this process with autosp_ir.simulate(program, batch)",
        )
    groups = _of_world(wanted) if mesh is None else {a: _of_mesh(a, size, mesh) for a, size in wanted.items()}
    return MeshBinding(groups, dict(program.mesh))


def _of_world(wanted: Mapping[str, int]) -> dict[str, dist.ProcessGroup]:
    axis, size = next(iter(wanted.items()))
    world = dist.get_world_size()
    if len(wanted) > 1 or size != world:
        raise RuntimeMismatchError(
            f"the program is written for {dict(wanted)} ranks, but {world} are running",
            hint=f"start {size} ranks, partition for {world}, or pass mesh= with these axes",
        )
    group = dist.group.WORLD
    return {axis: group} if group is not None else {}


def _of_mesh(axis: str, size: int, mesh: DeviceMesh) -> dist.ProcessGroup:
    names = mesh.mesh_dim_names or ()
    if axis not in names:
        raise RuntimeMismatchError(
            f"the device mesh has axes {list(names) or 'without names'}, but the program uses {axis!r}",
            hint=f'make it with init_device_mesh(..., mesh_dim_names=(..., "{axis}"))',
        )
    if mesh[axis].size() != size:
        raise RuntimeMismatchError(
            f"the program is written for {size} ranks on {axis!r}, the device mesh has {mesh[axis].size()}",
            hint="partition the model for this mesh, or start the number of ranks that the program names",
        )
    return mesh.get_group(axis)


def bind_axes(program: Program, binding: MeshBinding) -> Program:
    """A copy of a program that runs: collectives name process groups in place of axes, chunks are views."""
    bound = program.clone()
    for node in list(bound.graph.nodes):
        if node.is_op("autosp.chunk", "autosp.unchunk"):
            _localise(bound, node)
            continue
        schema = node.op.schema
        if schema is None:
            continue
        for name in ("axis", "group_name"):
            axis = node.arg(name) if any(a.name == name for a in schema.arguments) else None
            if isinstance(axis, str) and mesh_axis(axis) in binding.sizes:
                node.set_args(*node.with_arg(name, binding.group_name(axis)))
    return bound


def _localise(program: Program, node: Node) -> None:
    """Put torch's own chunk or cat in place of ours: what one rank runs has no layouts to respect."""
    dim = node.arg("dim")
    name, args = (
        ("aten.chunk", (node.arg("x"), node.arg("chunks"), dim))
        if node.is_op("autosp.chunk")
        else ("aten.cat", (list(node.arg("parts")), dim))
    )
    local = program.graph.create(
        name, args, before=node, type=node.result.type, phase=node.phase, origin=node.origin, meta=node.meta
    )
    for reader in node.result.users:
        reader.replace_operand(node.result, local.result)
    program.graph.erase(node)
