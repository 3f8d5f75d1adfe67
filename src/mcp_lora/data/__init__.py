"""Records of any format become checked rows; rows become samples with candidate tools, in splits."""
