"""The model's own chat template: samples become token ids and labels, answers become calls."""
