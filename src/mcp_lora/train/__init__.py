"""From a recipe to a run: its folder, its manifest, its adapter, and the export."""
