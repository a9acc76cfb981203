"""The parts of the network behind the backbone, up to its predictions (section 3)."""
