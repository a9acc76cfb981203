"""Images in and out: reading, results, drawing, ground truth."""
