"""Attention fusion: softmax attention, however an export spells it, becomes one `tcompile.attention`."""
