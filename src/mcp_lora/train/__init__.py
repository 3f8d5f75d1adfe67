"""From a recipe to a run: its folder, its manifest and its adapter."""
