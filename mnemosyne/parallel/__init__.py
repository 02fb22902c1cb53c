"""The mesh of ranks and what travels over it. Rooms above ask for an axis, never for a rank."""
