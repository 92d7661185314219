"""The GPU path. The only room that imports cupy, and only inside functions: importing it costs nothing."""
