"""Models for other runtimes: tracing, post-processing in the graph, running it."""
