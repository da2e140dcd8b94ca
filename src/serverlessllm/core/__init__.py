"""The values everything else is spoken in: no I/O, no clock but its seam."""
