"""A package as a static folder in which a browser classifies images: python -m export.web DIR --out SITE"""
