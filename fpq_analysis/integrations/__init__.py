"""In other programs' training loops: a monitor of curvature, and the callbacks that call it."""
