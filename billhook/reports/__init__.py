"""What is shown to people: report.json, the model card, report.html, and pictures.

Imports tables, plans and `verification`; no model is opened.
"""
