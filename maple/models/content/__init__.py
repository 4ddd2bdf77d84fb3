"""Encoders of item content (texts, images, vectors from elsewhere), and their fusion into one vector per item."""
