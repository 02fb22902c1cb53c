"""The mesh of ranks and what travels over it. Rooms above ask for an axis, never for a rank."""

from mnemosyne.parallel.mesh import Axis, Mesh, init_mesh, single_mesh

__all__ = ["Axis", "Mesh", "init_mesh", "single_mesh"]
