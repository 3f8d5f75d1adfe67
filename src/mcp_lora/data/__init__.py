"""Records of any format become checked rows, and these samples with candidate tools, in splits."""
