"""A recipe becomes a run: its folder, its manifest, its adapter, and the export."""
