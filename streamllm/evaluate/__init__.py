"""Scores of a long text under the four ways of attending to it."""
