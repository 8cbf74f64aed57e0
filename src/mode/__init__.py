"""MoDE: Mixture of Data Experts for CLIP."""
