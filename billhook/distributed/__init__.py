"""One run in several processes, as torchrun starts them: who takes part, what is shared out and summed, who was lost.

Imports nothing of Billhook but `errors`.
"""
