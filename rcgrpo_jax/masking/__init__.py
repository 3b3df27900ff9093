"""Masks for examples that have none: from the target, from a foreground segmenter, or from the editor itself."""
