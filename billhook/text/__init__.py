"""From a SOURCE that a user names to windows of tokens.

Imports nothing of Billhook but `errors` and `ambient`.
"""
